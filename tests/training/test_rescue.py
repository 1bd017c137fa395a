"""A run whose loss has risen far above its lowest goes back to where it was, and goes on with smaller steps."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from test_run import SETTINGS, make_task

import softprompt as sp
from softprompt.training import loop, rescue
from softprompt.training.rescue import Valley
from softprompt.training.schedule import learning_rate_factor
from tiny_models import make_backbone, make_tokenizer

LEAP = 12  # the step after so many is ten thousand times too long
LONG = {**SETTINGS, "steps": 28, "batch_size": 32, "validate_every": 8, "warmup": 0.0, "schedule": "constant"}


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float32, make_tokenizer())


@pytest.fixture
def leap(monkeypatch):
    """One step that leads far away. A tiny model's loss hardly varies, so that less of a rise counts here."""

    def factor(step: int, *given) -> float:
        return learning_rate_factor(step, *given) * (10_000 if step == LEAP else 1)

    monkeypatch.setattr(loop, "learning_rate_factor", factor)
    monkeypatch.setattr(rescue, "RATIO", 1.0)
    monkeypatch.setattr(rescue, "NATS", 0.1)


def rescued(result: sp.TuneResult) -> list[dict]:
    return [event for event in result.history if event["event"] == "warning" and "half of the" in event["text"]]


def losses(result: sp.TuneResult) -> list[float]:
    return [event["loss"] for event in result.history if event["event"] == "step"]


@pytest.mark.parametrize("more", [{}, {"kind": "deep", "norm_guard": 0}, {"reparametrisation": "residual"}])
def test_a_run_that_leapt_away_comes_back(backbone, leap, more):
    result = sp.tune(backbone, make_task(), **LONG, **more)
    (said,) = rescued(result)
    before, after = losses(result)[: LEAP + 1], losses(result)[said["step"] + 1 :]
    assert LEAP < said["step"] <= LEAP + 4
    assert max(losses(result)[LEAP + 1 : said["step"] + 1]) > before[-1] + 0.1
    assert sum(after) / len(after) < min(before) + 0.05  # no step of it is lost
    rates = [event["learning_rate"] for event in result.history if event["event"] == "step"]
    assert rates[0] == 0.5 and rates[-1] == 0.25
    lost = sp.tune(backbone, make_task(), rescue=False, **LONG, **more)
    assert not rescued(lost)
    assert losses(lost)[: said["step"]] == losses(result)[: said["step"]]
    assert losses(lost)[-1] > losses(result)[-1] + 0.1


@pytest.mark.parametrize("more", [{}, {"kind": "deep", "norm_guard": 0}])
@pytest.mark.parametrize("stopped_at", [10, 14, 22])
def test_resumed_before_and_after_it_equals_undisturbed(backbone, leap, tmp_path, stopped_at, more):
    settings = {**LONG, "average": 0.7, **more}
    whole = sp.tune(backbone, make_task(), run_folder=tmp_path / "whole", **settings)
    assert rescued(whole)

    def interrupt(event):
        if event["event"] == "step" and event["step"] == stopped_at:
            os.kill(os.getpid(), signal.SIGINT)

    part = sp.tune(backbone, make_task(), run_folder=tmp_path / "part", listen=interrupt, **settings)
    assert part.reason == "interrupted" and part.steps == stopped_at
    resumed = sp.tune(backbone, make_task(), run_folder=tmp_path / "part", resume=True, **settings)
    assert losses(resumed) == losses(whole)
    assert [(e["event"], e["step"]) for e in resumed.history] == [(e["event"], e["step"]) for e in whole.history]
    assert torch.equal(resumed.prompt.vectors, whole.prompt.vectors)


def test_the_mean_is_of_the_steps_after_it_alone(backbone, leap):
    """The mean's steps begin before the leap; with the vectors from far away in it, it would be far away itself."""
    task = sp.Task.from_rows([dict(row) for row in make_task().train], [], [], make_task().template)
    settings = {**LONG, "folds": 0}
    mean = sp.tune(backbone, task, average=0.9, **settings).prompt.vectors
    last = sp.tune(backbone, task, average=0.0, **settings).prompt.vectors
    start = sp.tune(backbone, task, average=0.0, **{**settings, "steps": LEAP}).prompt.vectors
    assert float((mean - last).norm()) < float((start - last).norm())


def test_noise_is_no_rise_and_what_lies_far_above_the_lowest_is_one():
    draw = random.Random(0)

    def fed(losses: list[float], batch_size: int) -> Valley:
        valley = Valley(batch_size)
        for step, loss in enumerate(losses):
            valley.note(loss, step, [("delta", torch.tensor([float(step)]))])
            if valley.left:
                break
        return valley

    for size, steps in ((1, 2000), (16, 500), (128, 200)):
        # a row is answered well or badly: one in ten has a loss of 2
        noisy = [sum(2.0 * (draw.random() < 0.1) for _ in range(size)) / size for _ in range(steps)]
        assert not fed(noisy, size).left
    risen = fed([2.0] * 10 + [0.5] * 10 + [0.6] * 10 + [6.0] * 10, 16)
    assert risen.left and risen.lowest == 0.5
    assert risen.parameters["delta"].item() == risen.step == 17
    assert len(risen.recent) == 8 and risen.recent.count(6.0) == 1
    assert not fed([6.0] * 10 + [9.0] * 40, 16).left  # a bad start is no valley
    assert not fed([0.5] * 3 + [6.0], 16).left  # before the first whole window nothing is known
