"""Similarity of prompts on constructed prompts, and diff."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from inspect_material import make_model, make_task, prompt_of, renamed, words_prompt

import softprompt as sp
from softprompt import SoftPrompt, Template
from softprompt.computation import deep_from_tokens
from softprompt.errors import ConfigError
from softprompt.evaluation.runner import evaluate_prompt
from softprompt.inspection.grouping import groups
from softprompt.inspection.similarity import cluster, matched


def some(tokens: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_two_equal_prompts_have_similarity_one() -> None:
    backbone = make_model()
    a = words_prompt(backbone)
    found = sp.similarity({"a": a, "b": renamed(a), "c": prompt_of(backbone, some(7))}, backbone)
    for measure in ("pooled", "matched", "words"):
        assert found.matrices[measure][0, 1] == pytest.approx(1.0), measure
        assert found.matrices[measure][0, 2] < 0.99, measure
        assert np.allclose(np.diag(found.matrices[measure]), 1.0), measure
        assert np.allclose(found.matrices[measure], found.matrices[measure].T), measure
    assert found.nearest("a")[0][0] == "b"


def test_spot_s_measures_by_hand() -> None:
    a, b = some(3), some(5, 1)
    found = sp.similarity({"a": SoftPrompt(a), "b": SoftPrompt(b)})
    cosine = torch.nn.functional.cosine_similarity
    assert found.matrices["pooled"][0, 1] == pytest.approx(float(cosine(a.mean(0), b.mean(0), dim=0)), abs=1e-6)
    pairs = [float(cosine(x, y, dim=0)) for x in a for y in b]
    assert found.matrices["tokens"][0, 1] == pytest.approx(sum(pairs) / 15, abs=1e-6)


def test_matched_does_not_mind_the_order_of_tokens() -> None:
    a = some(6)
    assert matched(a, a[[3, 1, 5, 0, 4, 2]]) == pytest.approx(1.0, abs=1e-6)
    assert matched(a, a[:2]) == pytest.approx(1.0, abs=1e-6)
    assert matched(a, -a) < 0.9


def test_prompts_of_other_models_are_not_compared() -> None:
    wide, deep = SoftPrompt(torch.randn(3, 8)), SoftPrompt(torch.randn(2, 2, 1, 3, 16))
    other = renamed(SoftPrompt(some()), fingerprint="1" * 16)
    found = sp.similarity({"a": renamed(SoftPrompt(some()), fingerprint="2" * 16), "b": wide, "c": deep, "d": other})
    matrix = found.matrices["matched"]
    assert np.isnan(matrix[~np.eye(4, dtype=bool)]).all()
    assert found.nearest("a") == []
    assert found.to_dict()["measures"]["matched"][0][1] is None


def test_clusters_stand_together() -> None:
    alike = np.full((4, 4), 0.1)
    for i, j in ((0, 2), (1, 3)):
        alike[i, j] = alike[j, i] = 0.9
    np.fill_diagonal(alike, 1.0)
    order = cluster(alike)
    assert abs(order.index(0) - order.index(2)) == 1 and abs(order.index(1) - order.index(3)) == 1
    assert cluster(np.full((3, 3), math.nan)) and cluster(np.ones((2, 2))) == [0, 1]


def test_groups_are_of_like_prompts_the_middle_one_first() -> None:
    """Directions at these angles in a plane: three heaps; of each the one with the least angle to the others leads."""
    angles = [0.0, 100.0, 10.0, 200.0, 4.0, 103.0, 107.0]
    plane = [torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))]]) for a in angles]
    assert groups(plane, 3) == [[4, 0, 2], [5, 1, 6], [3]]
    assert groups(plane, 7) == [[i] for i in range(7)]
    assert sorted(groups(plane, 1)[0]) == list(range(7))


def test_a_library_is_read_and_broken_prompts_are_told(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        SoftPrompt(some(3, seed)).save(tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "softprompt.json").write_text("{")
    found = sp.similarity(tmp_path)
    assert found.names == ["a", "b"]
    assert [name for name, _ in found.left_out] == ["broken"]
    with pytest.raises(ConfigError, match="no folder"):
        sp.similarity(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no prompt 'z'"):
        found.nearest("z")


def test_cross_task_loss_is_that_of_the_evaluator() -> None:
    backbone, task = make_model(), make_task()
    other = make_task(template=Template.make("{text} {soft}", "{label}", labels=["negative", "positive"]))
    a, b = words_prompt(backbone), renamed(prompt_of(backbone, some(3)), template=other.template)
    said: list[int] = []
    data = {"a": task.test, "b": other.test}
    found = sp.similarity({"a": a, "b": b}, backbone, data=data, progress=lambda done, total: said.append(done))
    assert found.loss is not None
    for i, prompt in enumerate((a, b)):
        for j, split in enumerate((task.test, other.test)):
            expected = evaluate_prompt(backbone, split, prompt.vectors)
            assert found.loss[i, j] == pytest.approx(expected.loss, rel=1e-6)
    assert said[-1] == 2 * (len(task.test) + len(other.test))
    with pytest.raises(ConfigError, match="needs the model"):
        sp.similarity({"a": a}, data=data)


# --- diff -----------------------------------------------------------------------------------------------------------


def test_no_difference() -> None:
    backbone = make_model()
    a = words_prompt(backbone)
    found = sp.diff(a, renamed(a), backbone, make_task().test)
    assert found.equal and found.template == [] and found.made == [] and found.words == []
    assert found.matched == pytest.approx(1.0) and found.pooled == pytest.approx(1.0)
    assert found.test is not None
    assert (found.test.difference, found.test.p, found.test.only_a, found.test.only_b) == (0.0, 1.0, 0, 0)


def test_differences_are_told() -> None:
    backbone, task = make_model(), make_task()
    a = words_prompt(backbone, "Classify the film")
    b = renamed(
        words_prompt(backbone, "Classify the plot"),
        template=Template.make("{soft}Review : {text} Sentiment :", "{label}", labels=["negative", "positive"]),
        provenance={"made": "today", "run": {"tuning": {"steps": 5}}},
    )
    found = sp.diff(a, b, backbone, task.test)
    assert not found.equal
    assert found.words == [(2, "film", "plot")]
    assert [round(distance, 6) for distance, _ in found.moved][:2] == [0, 0]
    assert found.moved[2][0] > 0
    assert [what for what, _, _ in found.template] == ["labels"]
    assert ("run.tuning.steps", "", "5") in found.made
    assert not any(what == "made" for what, _, _ in found.made)
    assert found.a is not None and found.b is not None
    assert found.a.loss == pytest.approx(evaluate_prompt(backbone, task.test, a.vectors).loss, rel=1e-6)
    assert found.b.loss != found.a.loss


def test_prompts_that_cannot_be_compared_still_differ() -> None:
    backbone = make_model()
    deep = SoftPrompt(deep_from_tokens(backbone, some(3)))
    found = sp.diff(words_prompt(backbone), deep, backbone)
    assert found.pooled is None and found.matched is None and found.moved == []
    assert found.kinds == ("embedding", "deep")
    with pytest.raises(ConfigError, match="needs the model"):
        sp.diff(deep, deep, None, make_task().test)
