"""Several tasks in one prompt: what comes up how often, what is learned from it, and that it resumes bit for bit."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError
from softprompt.training.config import TuneConfig
from softprompt.training.mixing import Mixture, draws, shares_of
from softprompt.training.run import encode_task
from softprompt.training.together import compute_all
from tiny_models import make_backbone, make_reviews, make_tokenizer

BASE = dict(tokens=4, steps=8, batch_size=6, learning_rate=0.5, validate_every=4, checkpoint_every=3)


def make_task(count: int, input: str = "Review : {text} \n Sentiment :", validation: int = 6, **more) -> sp.Task:
    given = {"labels": ["negative", "positive"], **more}
    template = sp.Template.make(input, " {label}", labels=given["labels"])
    return sp.Task.from_rows(make_reviews(count), make_reviews(validation, 1), make_reviews(4, 2), template)


def make_tasks(place: str = "") -> dict[str, sp.Task]:
    words = {"negative": "bad plot", "positive": "fine plot"}
    return {
        "reviews": make_task(30, f"Review : {{text}} {place} \n Sentiment :"),
        "films": make_task(8, f"{{text}} {place} film :", labels=words),
        "free": make_task(12, f"text {{text}} {place} :", labels=None),
    }


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


# --- how often ------------------------------------------------------------------------------------------------------


def test_shares():
    sizes = {"a": 100, "b": 400, "c": 900}
    assert shares_of(sizes, 1) == pytest.approx({"a": 1 / 14, "b": 4 / 14, "c": 9 / 14})
    assert shares_of(sizes, 2) == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6})
    assert shares_of(sizes, 1e9) == pytest.approx(dict.fromkeys("abc", 1 / 3), rel=1e-6)
    assert shares_of(sizes, 1, cap=100) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert shares_of(sizes, 2, cap=400) == pytest.approx({"a": 1 / 5, "b": 2 / 5, "c": 2 / 5})


def test_draws():
    sizes = {"a": 5, "b": 50}
    drawn = draws(sizes, shares_of(sizes, 2), 100, seed=0)
    counts = Counter(name for name, _ in drawn)
    assert len(drawn) == 100 and counts == {"a": 24, "b": 76}  # 1 to sqrt(10)
    for name, size in sizes.items():
        times = Counter(index for each, index in drawn if each == name)
        assert set(times) == set(range(size)) and max(times.values()) - min(times.values()) <= 1
    assert draws(sizes, shares_of(sizes, 2), 100, seed=0) == drawn != draws(sizes, shares_of(sizes, 2), 100, seed=1)


def test_the_rows_of_a_run_are_those_of_the_tasks_each_in_its_template(backbone):
    tasks = make_tasks()
    mixed = Mixture(backbone, tasks, TuneConfig(**BASE), temperature=1.0, cap=1000)
    rows, _ = mixed.rows()
    assert len(rows) == 8 * 6
    known = {name: set(encode_task(backbone, task, mixed.config)[0]) for name, task in tasks.items()}
    counts = Counter(next(name for name in known if row in known[name]) for row in rows)
    assert all(abs(counts[name] / 48 - share) < 1 / 48 for name, share in mixed.shares.items())
    # Two epochs are so many passes over the rows of all tasks.
    assert Mixture(backbone, tasks, TuneConfig(epochs=2, batch_size=10), 2.0, 1000).steps == 10
    assert Mixture(backbone, tasks, TuneConfig(epochs=2, batch_size=10), 2.0, 10).steps == 6


# --- tuning ---------------------------------------------------------------------------------------------------------


def mixed_places() -> dict[str, sp.Task]:
    """Soft tokens at the front in one task, behind the text in another, in two places in the third."""
    tasks = make_tasks()
    tasks["films"] = make_task(8, "{text} {soft} film :")
    tasks["free"] = make_task(12, "text {soft} {text} {soft} :", labels=None)
    return tasks


@pytest.mark.parametrize("make", [make_tasks, mixed_places])
def test_the_gradient_of_a_mixed_batch_is_the_sum_of_the_tasks(backbone, make):
    tasks = make()
    config = TuneConfig(**{**BASE, "steps": 1, "batch_size": 12, "validate_every": 1})
    run = Mixture(backbone, tasks, config, 1.0, 1000).begin(None, False, (), None)
    vectors = run.trainer.parameters.vectors().detach()
    (mixed,) = compute_all(backbone, [run.trainer.request(run.trainer.rows, vectors)])
    by_task = {name: set(encode_task(backbone, task, config)[0]) for name, task in tasks.items()}
    loss, gradient, tokens = 0.0, torch.zeros_like(vectors, dtype=torch.float64), 0
    from softprompt.computation import loss_and_gradient

    for known in by_task.values():
        rows = [row for row in run.trainer.rows if row in known]
        part = loss_and_gradient(backbone, rows, vectors, exact_reference=True)
        loss, gradient, tokens = loss + part.loss, gradient + part.gradient, tokens + part.tokens
    assert mixed.tokens == tokens and mixed.loss == pytest.approx(loss, rel=1e-10)
    assert (mixed.gradient - gradient).abs().max() < 1e-9 * gradient.abs().max()


def test_one_prompt_learns_all_tasks(backbone):
    tasks = make_tasks()
    start = sp.mix(backbone, tasks, **{**BASE, "steps": 1, "learning_rate": 1e-9})
    found = sp.mix(backbone, tasks, **{**BASE, "steps": 30, "learning_rate": 2.0, "validate_every": 10})
    assert found.reason == "finished" and set(found.tasks) == set(tasks)
    for name in tasks:
        assert found.tasks[name].loss < start.tasks[name].loss, name
    assert found.mean == pytest.approx(-sum(report.loss for report in found.tasks.values()) / 3)
    told = [e for e in found.history if e["event"] == "task"]
    assert [e["task"] for e in told] == list(tasks) * 3
    assert found.prompt.template == tasks["reviews"].template
    facts = found.prompt.provenance["mixture"]
    assert facts["tasks"]["films"]["template"] == tasks["films"].template.to_dict()
    assert facts["temperature"] == 2.0 and set(found.prompt.metrics["validation"]["tasks"]) == set(tasks)


def test_the_mean_of_accuracies_where_all_have_labels(backbone):
    tasks = {name: task for name, task in make_tasks().items() if name != "free"}
    tasks["silent"] = replace(tasks["films"], validation=replace(tasks["films"].validation, rows=()))
    found = sp.mix(backbone, tasks, **BASE)
    assert set(found.tasks) == {"reviews", "films"}  # a task without validation rows does not count
    assert found.mean == pytest.approx(sum(report.accuracy for report in found.tasks.values()) / 2)
    scores = [e["score"] for e in found.history if e["event"] == "validation"]
    assert found.mean in scores and found.prompt.metrics["validation"]["score"] == found.mean
    none = {name: replace(task, validation=replace(task.validation, rows=())) for name, task in tasks.items()}
    silent = sp.mix(backbone, none, **BASE)
    assert silent.tasks == {} and silent.mean is None and silent.prompt.provenance["step"] == 8


@pytest.mark.parametrize("place", ["", "{soft}"])
def test_interrupted_and_resumed_equals_undisturbed(backbone, tmp_path, place):
    tasks = make_tasks(place)
    whole = sp.mix(backbone, tasks, run_folder=tmp_path / "whole", **BASE)

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    part = {"run_folder": tmp_path / "part", **BASE}
    assert sp.mix(backbone, tasks, listen=interrupt, **part).reason == "interrupted"
    resumed = sp.mix(backbone, tasks, resume=True, **part)
    assert resumed.reason == "finished" and same(resumed.prompt.vectors, whole.prompt.vectors)
    assert [e["event"] for e in resumed.history] == [e["event"] for e in whole.history]
    with pytest.raises(ConfigError, match="was started with another data_sha256"):
        sp.mix(backbone, tasks, resume=True, temperature=3.0, **part)
    other = {**tasks, "films": make_task(8, f"{{text}} {place} other film :", labels=["negative", "positive"])}
    with pytest.raises(ConfigError, match="was started with another"):
        sp.mix(backbone, other, resume=True, **part)


def test_texts_before_the_soft_tokens_are_computed_once(backbone, monkeypatch):
    import softprompt.computation as computation

    real, computed = computation._compute_texts, []

    def counting(backbone, rows, *more):
        computed.append(len(rows))
        return real(backbone, rows, *more)

    monkeypatch.setattr(computation, "_compute_texts", counting)
    tasks = {name: task for name, task in make_tasks("{soft}").items() if name != "free"}
    tasks = {name: replace(task, validation=replace(task.validation, rows=())) for name, task in tasks.items()}
    sp.mix(backbone, tasks, **{**BASE, "steps": 20})
    assert sum(computed) <= 30 + 8 + 2  # one is tried each time to see how large its states are


def test_a_prompt_of_one_task_starts_from_it(backbone, tmp_path):
    source = sp.mix(backbone, make_tasks(), **BASE).prompt
    source.save(tmp_path / "source")
    task = make_tasks()["films"]
    result = sp.tune(backbone, task, **{**BASE, "steps": 1}, init=f"prompt:{tmp_path / 'source'}")
    assert torch.equal(result.initial, source.vectors)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused(backbone):
    tasks = make_tasks()
    with pytest.raises(ConfigError, match="at least two tasks, found 1; tune a single one"):
        sp.mix(backbone, {"a": tasks["films"]}, **BASE)
    with pytest.raises(ConfigError, match="two tasks have the same name"):
        sp.mix(backbone, list(tasks.values()), **BASE)
    with pytest.raises(ConfigError) as caught:
        sp.mix(backbone, tasks, temperature=0.5, cap=0, init="examples", folds=2, **BASE)
    assert [text.partition(":")[0] for text in caught.value.problems] == ["temperature", "cap", "folds", "init"]
    empty = {**tasks, "films": replace(tasks["films"], train=replace(tasks["films"].train, rows=()))}
    with pytest.raises(DataError, match="training split of films has no rows"):
        sp.mix(backbone, empty, **BASE)
    with pytest.raises(ConfigError, match="leave no room"):
        sp.mix(backbone, tasks, **{**BASE, "tokens": 300})
