"""How much tokens matter, on models made so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inspect_material import deaf_to_first, make_model, make_task, words_prompt

from softprompt.computation import deep_from_tokens, loss_and_gradient
from softprompt.errors import DataError
from softprompt.evaluation.runner import evaluate_prompt, make_encoder
from softprompt.inspection.importance import first_lengths, importance
from softprompt.inspection.measuring import RowScores, mcnemar, paired, row_scores, without
from softprompt.templates import Template
from tiny_models import random_vectors


def test_a_token_without_influence_scores_zero_and_others_do_not() -> None:
    backbone, vectors = deaf_to_first()
    found = importance(backbone, make_task().test, vectors, parts=("left_out",))
    assert found.of_token[0] == pytest.approx(0, abs=1e-9)
    assert found.errors[0] == pytest.approx(0, abs=1e-9)
    assert found.of_answer[0] == pytest.approx(0, abs=1e-9)
    assert min(abs(cost) for cost in found.of_token[1:]) > 1e-6


def test_row_scores_are_those_of_the_evaluator() -> None:
    backbone, task = make_model(), make_task()
    vectors = words_prompt(backbone).vectors
    for prompt in (vectors, None):
        ours, theirs = row_scores(backbone, task.test, prompt), evaluate_prompt(backbone, task.test, prompt)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.accuracy == theirs.accuracy
        assert ours.predicted == theirs.predicted
        assert theirs.probabilities is not None and ours.choices is not None
        right = [task.template.classes.index(label) for label in task.test.labels]
        among = -theirs.probabilities.log().gather(1, torch.tensor(right)[:, None])[:, 0]
        assert ours.choices == pytest.approx(among.numpy(), rel=1e-5)
        assert (ours.losses > ours.choices).all()


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_rows_of_free_text_each_get_their_own_loss(architecture: str) -> None:
    template = Template.make("{soft}Review : {text} Sentiment :", "{label} {text}")
    backbone, split = make_model(architecture), make_task(template=template).test
    vectors = random_vectors(backbone)
    found = row_scores(backbone, split, vectors)
    encoder = make_encoder(backbone, template, len(vectors))
    for loss, fields in zip(found.losses, split):
        row = encoder.row(fields)[0]
        alone = loss_and_gradient(backbone, [row], vectors, exact_reference=True)
        assert loss == pytest.approx(alone.loss / alone.tokens, rel=1e-8)
    assert found.accuracy is None


def test_the_first_k_and_other_orders_are_what_they_say() -> None:
    backbone, task = make_model(), make_task()
    vectors = random_vectors(backbone, 5)
    said: list[tuple[int, int]] = []
    found = importance(backbone, task.test, vectors, progress=lambda done, total: said.append((done, total)))
    assert (
        [change.kept for change in found.first]
        == [tuple(range(k)) for k in first_lengths(5)]
        == [
            (),
            (0,),
            (0, 1),
            (0, 1, 2, 3),
        ]
    )
    assert found.first[0].scores.loss == pytest.approx(row_scores(backbone, task.test, None).loss)
    assert found.shuffled[0].kept == (4, 3, 2, 1, 0)
    assert all(sorted(change.kept) == [0, 1, 2, 3, 4] for change in found.shuffled)
    backwards = row_scores(backbone, task.test, vectors.flip(0))
    assert np.allclose(found.shuffled[0].scores.losses, backwards.losses)
    total = len(task.test) * (1 + 5 + 4 + 4)
    assert said[-1] == (total, total)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_a_deep_prompt_without_a_token_is_the_deep_prompt_of_the_other_tokens() -> None:
    """Left out at its end: the keys and values of a prompt of one token fewer, by the model itself."""
    backbone = make_model()
    vectors = random_vectors(backbone, 4)
    deep = deep_from_tokens(backbone, vectors)
    shorter = without(backbone, deep, (0, 1, 2))
    assert shorter is not None and torch.allclose(shorter, deep_from_tokens(backbone, vectors[:3]), atol=1e-12)
    moved = without(backbone, deep, (1, 0))
    assert moved is not None and torch.equal(moved[:, 1], deep[:, 1][:, :, [1, 0]])  # values stand in no position
    first = deep_from_tokens(backbone, vectors[1:2])
    assert torch.allclose(
        moved[0, 0, :, 0], first[0, 0, :, 0], atol=1e-6
    )  # in the first layer keys see their own token
    assert without(backbone, deep, ()) is None


def test_no_rows_is_an_error_that_says_so() -> None:
    backbone, task = make_model(), make_task()
    with pytest.raises(DataError, match="no rows"):
        row_scores(backbone, task.test.take(0), None)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    from scipy.stats import binomtest

    for a, b in ((0, 0), (1, 0), (3, 9), (12, 12), (400, 460), (2000, 0)):
        expected = 1.0 if a + b == 0 else binomtest(a, a + b, 0.5).pvalue
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_paired_differences() -> None:
    a = RowScores(np.array([1.0, 2.0, 3.0]), np.array([True, False, True]), [])
    b = RowScores(np.array([1.5, 2.5, 3.5]), np.array([True, True, False]), [])
    found = paired(a, b)
    assert found.difference == pytest.approx(0.5)
    assert found.error == pytest.approx(0)
    assert (found.only_a, found.only_b, found.accuracy_difference, found.p) == (1, 1, 0.0, 1.0)
    same = paired(a, a)
    assert (same.difference, same.p) == (0.0, 1.0)
    with pytest.raises(ValueError, match="same rows"):
        paired(a, RowScores(np.array([1.0]), None, []))
