"""Several prompts in one batch say what each says alone, and their votes are counted rightly."""

from __future__ import annotations

import math

import pytest
import torch

import softprompt as sp
from softprompt.attention import StateCache
from softprompt.computation import deep_from_tokens
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation.runner import label_scores, make_encoder
from softprompt.evaluation.voting import _majority, best_by_validation, member_scores
from tiny_models import FAST, make_backbone, make_reviews, make_tokenizer, random_vectors

INPUTS = {
    "front": "Review : {text} \n Sentiment :",
    "after_bos": "{bos}{soft}Review : {text} \n Sentiment :",
    "behind": "Review : {text} {soft} \n Sentiment :",
    "divided": "{soft}Review : {text} {soft} \n Sentiment :",
}
LABELS = {"positive": "good film", "negative": "bad film", "neutral": "good plot"}  # a tree of label words


def make_template(placement: str, labels=LABELS) -> sp.Template:
    return sp.Template.make(INPUTS[placement], " {label}", labels=labels)


def make_split(template: sp.Template, count: int = 9) -> sp.Split:
    return sp.Split("test", tuple(make_reviews(count)), template)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float64, make_tokenizer())


def make_members(backbone, kind: str = "embedding") -> list[torch.Tensor]:
    members = [random_vectors(backbone, 4, seed) for seed in range(3)]
    return [deep_from_tokens(backbone, each) for each in members] if kind == "deep" else members


@pytest.mark.parametrize("kind", ["embedding", "deep"])
@pytest.mark.parametrize("placement", INPUTS)
def test_one_batch_says_what_each_member_says_alone(backbone, placement, kind):
    if kind == "deep" and placement == "divided":
        pytest.skip("a deep prompt stands in one place")
    encoder = make_encoder(backbone, make_template(placement), 4)
    contexts = [encoder.context(row).ids for row in make_reviews(9)]
    members = make_members(backbone, kind)
    together = member_scores(backbone, encoder, contexts, members, micro_batch_tokens=120)
    for scores, vectors in zip(together, members, strict=True):
        alone = label_scores(backbone, encoder, contexts, vectors)
        assert (scores - alone).abs().max() < 1e-10
    kept = StateCache()
    again = member_scores(backbone, encoder, contexts, members, texts=kept)
    assert (again - together).abs().max() < 1e-10


@pytest.mark.parametrize("architecture", [*FAST, "bloom"])
def test_all_architectures(architecture):
    other = make_backbone(architecture, torch.float64, make_tokenizer())
    for placement in ("front", "behind"):
        encoder = make_encoder(other, make_template(placement), 4)
        contexts = [encoder.context(row).ids for row in make_reviews(4)]
        members = make_members(other)
        together = member_scores(other, encoder, contexts, members)
        alone = torch.stack([label_scores(other, encoder, contexts, each) for each in members])
        assert (together - alone).abs().max() < 1e-9


def test_the_text_before_the_soft_tokens_is_computed_once_for_all_members(backbone, monkeypatch):
    import softprompt.computation as computation

    real, computed = computation._compute_texts, []

    def counting(backbone, rows, *more):
        computed.append(len(rows))
        return real(backbone, rows, *more)

    monkeypatch.setattr(computation, "_compute_texts", counting)
    encoder = make_encoder(backbone, make_template("behind"), 4)
    contexts = [encoder.context(row).ids for row in make_reviews(8)]
    member_scores(backbone, encoder, contexts, make_members(backbone), micro_batch_tokens=150)
    assert sum(computed) <= len(contexts) + len(computed)  # a batch may try one row to see how large its states are


def prompts_of(backbone, template, kind="embedding") -> list[sp.SoftPrompt]:
    known = (backbone.name, backbone.fingerprint, backbone.tokenizer_hash)
    return [sp.SoftPrompt(each, template, *known) for each in make_members(backbone, kind)]


def test_votes_and_averages(backbone):
    template = make_template("front", ["positive", "negative"])
    split, prompts = make_split(template, 20), prompts_of(backbone, template)
    found = sp.evaluate_ensemble(backbone, split, prompts)
    alone = [sp.evaluate(backbone, split, prompt) for prompt in prompts]
    assert [each.predicted for each in found.members] == [each.predicted for each in alone]
    assert [each.loss for each in found.members] == pytest.approx([each.loss for each in alone], abs=1e-6)
    mean = torch.stack([each.probabilities for each in alone]).mean(dim=0)
    assert (found.averaged.probabilities - mean).abs().max() < 1e-6
    for row in range(20):
        said = [each.predicted[row] for each in alone]
        assert said.count(found.majority_predicted[row]) >= 2
    assert found.mean_accuracy == pytest.approx(sum(each.accuracy for each in alone) / 3)
    assert found.members[found.best_here].accuracy == max(each.accuracy for each in alone)
    assert found.best is None and found.to_dict()["best"] is None
    assert found.to_dict()["majority"]["rows"] == 20
    labels = sp.classify(backbone, prompts, split.rows)
    assert [each.label for each in labels] == found.averaged.predicted


def test_the_loss_of_the_average_is_that_of_the_mean_probability(backbone):
    template = make_template("front", ["positive", "negative"])
    split, prompts = make_split(template, 6), prompts_of(backbone, template)
    found = sp.evaluate_ensemble(backbone, split, prompts)
    encoder = make_encoder(backbone, template, 4)
    contexts = [encoder.context(row).ids for row in split]
    raw = torch.stack([label_scores(backbone, encoder, contexts, prompt.vectors) for prompt in prompts])
    right = [template.classes.index(label) for label in split.labels]
    expected = -sum(math.log(float(raw[:, row, label].exp().mean())) for row, label in enumerate(right)) / 6
    assert found.averaged.loss == pytest.approx(expected, rel=1e-9)


def test_a_tie_goes_to_the_higher_mean_probability():
    probabilities = torch.tensor([[[0.6, 0.4, 0.0]], [[0.1, 0.9, 0.0]], [[0.5, 0.2, 0.3]], [[0.1, 0.6, 0.3]]])
    predicted, shares = _majority(probabilities)
    assert predicted.tolist() == [1] and shares.tolist() == [[0.5, 0.5, 0.0]]
    # One vote less is never made up for by certainty.
    predicted, _ = _majority(torch.tensor([[[0.51, 0.49]], [[0.51, 0.49]], [[0.0, 1.0]]]))
    assert predicted.tolist() == [0]


def test_the_best_by_validation():
    made = [sp.SoftPrompt(torch.zeros(1, 4)) for _ in range(3)]
    assert best_by_validation(made) is None
    made[0].metrics["validation"] = {"accuracy": 0.8, "loss": 0.5}
    made[1].metrics["validation"] = {"score": 0.8, "loss": 0.4}
    made[2].metrics["validation"] = {"score": 0.7, "loss": 0.1}
    assert best_by_validation(made) == 1


def test_members_of_other_templates_and_lengths(backbone):
    one, other = (make_template(name, ["positive", "negative"]) for name in ("front", "behind"))
    prompts = prompts_of(backbone, one)[:2] + prompts_of(backbone, other, "deep")[2:]
    prompts[0] = sp.SoftPrompt(random_vectors(backbone, 6), one, *(backbone.name, backbone.fingerprint, ""))
    found = sp.evaluate_ensemble(backbone, make_split(one, 8), prompts)
    splits = [make_split(prompt.template, 8) for prompt in prompts]
    alone = [sp.evaluate(backbone, split, prompt) for split, prompt in zip(splits, prompts, strict=True)]
    for mine, theirs in zip(found.members, alone, strict=True):
        assert (mine.probabilities - theirs.probabilities).abs().max() < 1e-6
    assert sp.evaluate_ensemble(backbone, make_split(one, 8), prompts, calibrate=True).averaged.setting["calibrated"]


def test_what_cannot_vote(backbone):
    template = make_template("front")
    prompts = prompts_of(backbone, template)
    with pytest.raises(ConfigError, match="no prompts to let vote"):
        sp.evaluate_ensemble(backbone, make_split(template), [])
    prompts[2].template = make_template("front", ["positive", "negative"])
    with pytest.raises(
        ConfigError, match="different classes and cannot vote: found positive, negative beside positive"
    ):
        sp.evaluate_ensemble(backbone, make_split(template), prompts)
    free = sp.Template.make("{text}", " {label}")
    with pytest.raises(DataError, match="only vote on a task with labels"):
        sp.evaluate_ensemble(backbone, make_split(free), prompts)
    with pytest.raises(DataError, match="has no rows"):
        sp.evaluate_ensemble(backbone, sp.Split("test", (), template), prompts[:2])
    with pytest.raises(sp.SoftPromptError, match="same labels"):
        sp.classify(backbone, prompts, [{"text": "good"}])
    with pytest.raises(ConfigError, match="no prompts"):
        sp.classify(backbone, [], [{"text": "good"}])
