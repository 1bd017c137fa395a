"""Members of an ensemble are the runs of tune with their seeds; they are kept, found again and asked together."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError, OutputError, PromptFormatError
from softprompt.training.ensemble import load_members
from tiny_models import make_backbone, make_reviews, make_tokenizer

BASE = dict(tokens=4, steps=6, batch_size=6, learning_rate=0.5, validate_every=3, checkpoint_every=2, init="random")


def make_task(count: int = 24, validation: int = 12) -> sp.Task:
    template = sp.Template.make("Review : {text} \n Sentiment :", " {label}", labels=["negative", "positive"])
    return sp.Task.from_rows(make_reviews(count), make_reviews(validation, 1), make_reviews(10, 2), template)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float64, make_tokenizer())


@pytest.fixture(autouse=True)
def plain_report(monkeypatch):
    """Runs without figures, which would take most of the time."""
    import softprompt.training.run

    monkeypatch.setattr(softprompt.training.run, "_write_page", lambda folder, *_, **__: folder / "report.html")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()


def test_members_are_runs_of_tune(backbone, tmp_path):
    found = sp.tune_ensemble(backbone, make_task(), size=3, run_folder=tmp_path / "run", seed=4, **BASE)
    alone = [sp.tune(backbone, make_task(), **BASE, seed=seed) for seed in (4, 5, 6)]
    assert all(same(one.vectors, other.prompt.vectors) for one, other in zip(found.prompts, alone, strict=True))
    scores = [(-each.validation.accuracy, each.validation.loss) for each in alone]
    assert scores[found.best] == min(scores)
    assert found.validation.accuracy == -min(scores)[0] and found.steps == 18
    assert found.prompt is found.prompts[found.best] and len(found.members) == 3


@pytest.mark.parametrize("validation", [12, 0])
def test_interrupted_and_resumed_equals_undisturbed(backbone, tmp_path, validation):
    task, settings = make_task(validation=validation), {**BASE, "folds": None if validation else 2}
    whole = sp.tune_ensemble(backbone, task, size=2, run_folder=tmp_path / "whole", **settings)
    count = 0

    def interrupt(event):
        nonlocal count
        count += event["event"] == "step"
        if count == (8 if validation else 16):
            count += 1
            os.kill(os.getpid(), signal.SIGINT)

    part = {"run_folder": tmp_path / "part", "size": 2, **settings}
    assert sp.tune_ensemble(backbone, task, listen=interrupt, **part).reason == "interrupted"
    resumed = sp.tune_ensemble(backbone, task, resume=True, **part)
    assert resumed.reason == "finished" and resumed.best == whole.best
    assert all(same(one.vectors, other.vectors) for one, other in zip(resumed.prompts, whole.prompts, strict=True))


def test_few_rows_are_cross_validated_once_for_all_members(backbone):
    events = []
    task, settings = make_task(18, validation=0), {**BASE, "steps": 3, "folds": 2}
    found = sp.tune_ensemble(backbone, task, size=2, listen=events.append, **settings)
    assert [e["event"] for e in events].count("cross-validation") == 1
    assert found.validation.setting["cross_validated"] == 2 and found.best == 0
    for seed, prompt in enumerate(found.prompts):
        assert prompt.provenance["cross_validation"]["steps"] == 3  # the only validation there is
        assert same(prompt.vectors, sp.tune(backbone, task, **{**settings, "folds": 0}, seed=seed).prompt.vectors)


def test_members_of_few_rows_may_share_passes(backbone, monkeypatch):
    from softprompt.training import sweep_trial

    task, settings = make_task(18, validation=0), {**BASE, "steps": 3, "folds": 2}
    alone = sp.tune_ensemble(backbone, task, size=2, **settings)
    monkeypatch.setattr(sweep_trial, "sharing_pays", lambda backbone: True)
    shared = sp.tune_ensemble(backbone, task, size=2, **settings)
    for one, other in zip(shared.prompts, alone.prompts, strict=True):
        torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=1e-8)


def test_the_folder_is_a_prompt_with_members_inside(backbone, tmp_path):
    found = sp.tune_ensemble(backbone, make_task(), size=3, **BASE)
    folder = found.save(tmp_path / "mood")
    assert same(sp.SoftPrompt.load(folder).vectors, found.prompt.vectors)
    members = load_members(folder)
    assert list(members) == ["01", "02", "03"]
    assert all(same(one.vectors, other.vectors) for one, other in zip(members.values(), found.prompts, strict=True))
    with pytest.raises(OutputError, match="already holds a prompt"):
        found.save(folder)
    smaller = sp.tune_ensemble(backbone, make_task(), size=2, **BASE)
    smaller.save(folder, overwrite=True)
    assert list(load_members(folder)) == ["01", "02"] and len(os.listdir(folder / "members")) == 2
    assert load_members(folder / "members" / "01") == {}
    sp.tune(backbone, make_task(), **BASE).prompt.save(folder, overwrite=True)
    assert load_members(folder) == {}  # a single prompt took its place
    found.save(folder, overwrite=True)
    shutil.rmtree(folder / "members" / "02")
    with pytest.raises(PromptFormatError, match="no prompt folder"):
        load_members(folder)


def test_member_names_that_lead_elsewhere(backbone, tmp_path):
    prompt = sp.tune(backbone, make_task(), **BASE).prompt
    prompt.provenance["ensemble"] = {"members": ["../../secret"]}
    prompt.save(tmp_path / "odd")
    with pytest.raises(PromptFormatError, match="names its members as no ensemble does"):
        load_members(tmp_path / "odd")


def test_what_is_refused(backbone):
    with pytest.raises(ConfigError, match="2 to 32 members, found 1"):
        sp.tune_ensemble(backbone, make_task(), size=1, **BASE)
    with pytest.raises(DataError, match="validation rows"):
        sp.tune_ensemble(backbone, make_task(24, validation=0), size=2, **BASE, folds=0)
