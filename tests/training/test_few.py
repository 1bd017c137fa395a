"""Few rows: folds are separate runs, the last run is the schedule cut at the step found, and it resumes bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError, TrainingError
from softprompt.training.config import TuneConfig
from softprompt.training.few import (
    FEW,
    FOLDS,
    Folds,
    choose,
    few_config,
    fold_rows,
    fold_tasks,
    folds_of,
    tune_few,
)
from softprompt.training.loop import LEAST, Validation, planned_steps
from spoiled import interrupt_at, spoil_losses
from tiny_models import make_backbone, make_reviews, make_tokenizer

BASE = dict(tokens=4, steps=8, batch_size=6, learning_rate=0.5, validate_every=2, checkpoint_every=3, init="random")
BEHIND = "Review : {text} {soft} \n Sentiment :"


def make_task(count: int = 18, validation: int = 0, input: str = "Review : {text} \n Sentiment :", **more) -> sp.Task:
    template = sp.Template.make(input, " {label}", labels=["negative", "positive"])
    rows = make_reviews(validation, 1)
    return sp.Task.from_rows(make_reviews(count), rows, [], template, **more)


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


# --- dividing -------------------------------------------------------------------------------------------------------


def test_each_row_is_in_one_fold_and_each_class_in_all():
    task = make_task(33)
    parts = fold_rows(task, 5, 0)
    assert sorted(index for part in parts for index in part) == list(range(33))
    assert {len(part) for part in parts} <= {6, 7, 8}
    assert all({task.train.labels[i] for i in part} == {"negative", "positive"} for part in parts)
    assert fold_rows(task, 5, 1) != parts and fold_rows(task, 5, 0) == parts
    for fold, part in zip(fold_tasks(task, 5, 0), parts, strict=True):
        assert list(fold.validation) == [task.train[i] for i in part]
        assert len(fold.train) + len(part) == 33
        assert all(set(row) == {"text", "label"} for row in fold.train)


def test_rows_with_the_same_input_or_group_stay_in_one_fold():
    rows = [{**row, "film": f"f{i // 4}"} for i, row in enumerate(make_reviews(24))]
    rows += rows[:6]
    template = make_task().template
    for source in ({}, {"group_by": "film"}):
        task = sp.Task.from_rows(rows, [], [], template, source=source)
        key = "film" if source else "text"
        homes = [{task.train[i][key] for i in part} for part in fold_rows(task, 4, 0)]
        assert sum(map(len, homes)) == len(set.union(*homes))


def test_when_it_is_done():
    config = TuneConfig()
    assert folds_of(make_task(20), config) == FOLDS
    assert folds_of(make_task(FEW), config) == 0 and folds_of(make_task(FEW - 1), config) == FOLDS
    assert folds_of(make_task(20, validation=2), config) == 0
    assert folds_of(make_task(20), TuneConfig(folds=0)) == 0
    assert folds_of(make_task(FEW), TuneConfig(folds=3)) == 3
    assert folds_of(make_task(4), config) == 3  # as many folds as leave both classes to tune on
    assert folds_of(make_task(2), config) == 0


@pytest.mark.parametrize(
    ("count", "folds", "message"),
    [
        (4, 5, "4 training rows cannot be divided into 5 folds; use fewer"),
        (20, 1, "fold 1 has no rows to tune on"),
        (2, 2, "fold 1 has no rows to tune on|fold . has (no rows|rows of one class)"),
    ],
)
def test_folds_that_cannot_be(count, folds, message):
    with pytest.raises(DataError, match=message):
        folds_of(make_task(count), TuneConfig(folds=folds))


def test_folds_and_validation_rows(backbone):
    with pytest.raises(DataError, match="there are validation rows, and folds are for tuning without"):
        sp.tune(backbone, make_task(20, validation=4), **BASE, folds=3)


def test_two_epochs_of_few_rows_are_not_too_few_steps():
    assert planned_steps(TuneConfig(), 26) == LEAST
    assert planned_steps(TuneConfig(), 2000) == 250
    assert [planned_steps(TuneConfig(), count) for count in (100, 500, 1000)] == [LEAST, 188, 250]
    assert [planned_steps(TuneConfig(kind="deep"), count) for count in (26, 400, 1000)] == [LEAST, 200, 250]
    assert planned_steps(TuneConfig(epochs=2), 26) == 3  # who says how many gets as many
    assert planned_steps(TuneConfig(steps=4, epochs=9), 26) == 4


def test_how_many_steps():
    assert few_config(TuneConfig(), 32).steps == few_config(TuneConfig(kind="deep"), 80).steps == LEAST
    assert few_config(TuneConfig(steps=7), 32).steps == 7
    assert few_config(TuneConfig(epochs=10), 32).steps == 20
    assert few_config(TuneConfig(patience=2), 32).patience is None  # of a single run: the mean has it instead
    assert few_config(TuneConfig(), 32).validate_every == LEAST // 10


# --- folds are runs of tune -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("input", ["Review : {text} \n Sentiment :", BEHIND])
def test_a_fold_is_a_run_of_tune_on_the_other_rows(backbone, input):
    task = make_task(input=input)
    config = few_config(TuneConfig(**BASE, seed=2), 18)
    folds = Folds(backbone, task, config, 3)
    found = folds.run(lambda: False)
    assert [point[0] for point in found.curve] == [2, 4, 6, 8]
    for number, (trial, alone) in enumerate(zip(folds.trials, fold_tasks(task, 3, 2), strict=True), 1):
        result = sp.tune(backbone, alone, config.model_copy(update={"seed": 2 + number}))
        assert same(trial.run.trainer.parameters.vectors().detach(), last_vectors(backbone, alone, config, 2 + number))
        mine, whole = validations(trial.run.monitor.events), validations(result.history)
        assert [(e["step"], e["score"]) for e in mine] == [(e["step"], e["score"]) for e in whole]
        # Another mixture of texts in a batch may round the last bit of a float64 sum differently, as on AVX-512.
        assert [e["loss"] for e in mine] == pytest.approx([e["loss"] for e in whole], rel=1e-13)


def validations(events):
    return [event for event in events if event["event"] == "validation"]


def last_vectors(backbone, task, config, seed):
    from softprompt.training.run import begin

    run = begin(backbone, task, config.model_copy(update={"seed": seed}))
    run.go_on(lambda: False)
    return run.trainer.parameters.vectors().detach()


def test_the_report_has_each_row_as_the_fold_without_it_says(backbone):
    task = make_task()
    folds = Folds(backbone, task, few_config(TuneConfig(**BASE), 18), 3)
    found = folds.run(lambda: False)
    assert len(found.report.true) == 18 and sorted(found.report.true) == sorted(task.train.labels)
    score = {step: score for step, score, _ in found.curve}[found.steps]
    assert found.report.accuracy == pytest.approx(score)
    low, high = found.report.interval
    assert high - low > 0.35  # 18 rows tell little
    split = folds.trials[1].run.task.validation
    at_end = folds.report(8)
    alone = sp.evaluate(
        backbone,
        split,
        sp.SoftPrompt(
            folds.trials[1].run.trainer.parameters.vectors().detach(), task.template, fingerprint=backbone.fingerprint
        ),
    )
    first = len(folds.trials[0].run.task.validation)
    assert at_end.predicted[first : first + len(split)] == alone.predicted
    plain = found.to_dict()
    assert plain["folds"] == 3 and plain["rows"] == 18 and plain["interval"] == list(found.report.interval)


def scores(*values: float, error: float = 0.05) -> dict[int, Validation]:
    return {2 * (i + 1): Validation(value, 1.0 + i, "accuracy", error=error) for i, value in enumerate(values)}


def test_the_last_step_unless_an_earlier_one_is_clearly_better():
    assert choose(scores(0.5, 0.8, 0.84, 0.8)) == 8  # 0.84 is within one standard error of what the last has
    assert choose(scores(0.5, 0.8, 0.86, 0.8)) == 6
    assert choose(scores(0.5, 0.9, 0.86, 0.8)) == 4
    assert choose(scores(0.8)) == 2
    assert choose(scores(-1.2, -1.0, -1.1, error=0.0)) == 4  # free text: minus the loss, which has no error of its own


def test_folds_go_on_to_the_end_unless_patience_ends_them(backbone, monkeypatch):
    config = few_config(TuneConfig(**{**BASE, "steps": 20}), 18)
    found = {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.7}

    def mean(step: int) -> Validation:
        return Validation(found.get(step, 0.7), 1.0, "accuracy", error=0.1)

    for patience, end in [(None, 20), (2, 8)]:
        folds = Folds(backbone, make_task(), config, 3, patience=patience)
        monkeypatch.setattr(folds, "mean", mean)
        crossed = folds.run(lambda: False)
        assert [trial.step for trial in folds.trials] == [end, end, end]
        assert [point[0] for point in crossed.curve] == list(range(2, end + 1, 2))
        assert crossed.steps == end  # 0.7 is not clearly better than 0.6 here


# --- the run over all rows ------------------------------------------------------------------------------------------


def test_the_prompt_is_that_of_a_run_over_all_rows_after_so_many_steps(backbone):
    task = make_task()
    found = sp.tune(backbone, task, **BASE, folds=3)
    steps = found.prompt.provenance["cross_validation"]["steps"]
    assert found.steps == steps and found.reason == "finished"
    seen = {}

    def look(event):
        if event["event"] == "step" and event["step"] == steps:
            seen.update(event)

    sp.tune(backbone, task, **BASE, folds=0, listen=look)
    mine = next(e for e in found.history if e["event"] == "step" and e["step"] == steps)
    for key in ("loss", "token_norms", "learning_rate"):
        assert mine[key] == seen[key]
    whole = sp.tune(backbone, task, **BASE, folds=0)
    assert same(found.prompt.vectors, whole.prompt.vectors) == (steps == 8)
    assert found.validation.accuracy == found.prompt.metrics["validation"]["accuracy"]
    assert found.validation.setting["cross_validated"] == 3


@pytest.mark.parametrize("moment", [3, 13, 27])
def test_interrupted_and_resumed_equals_undisturbed(backbone, tmp_path, moment):
    settings = {**BASE, "folds": 3, "patience": 9}
    whole = sp.tune(backbone, make_task(), run_folder=tmp_path / "whole", **settings)
    stopped = sp.tune(backbone, make_task(), run_folder=tmp_path / "part", listen=interrupt_at(moment), **settings)
    chosen = whole.prompt.provenance["cross_validation"]
    if moment < 24 + chosen["steps"]:
        assert stopped.reason == "interrupted"
    resumed = sp.tune(backbone, make_task(), run_folder=tmp_path / "part", resume=True, **settings)
    assert resumed.reason == "finished" and same(resumed.prompt.vectors, whole.prompt.vectors)
    assert resumed.prompt.provenance["cross_validation"] == chosen
    assert [e["event"] for e in resumed.history] == [e["event"] for e in whole.history]
    kept = json.loads((tmp_path / "part" / "result.json").read_text())
    assert kept["cross_validation"] == json.loads(json.dumps(chosen)) and kept["reason"] == "finished"
    again = sp.tune(backbone, make_task(), run_folder=tmp_path / "part", resume=True, **settings)
    assert same(again.prompt.vectors, whole.prompt.vectors) and len(again.history) == len(whole.history)


def test_folds_that_share_passes_say_the_same(backbone, monkeypatch):
    from softprompt.training import sweep_trial

    alone = sp.tune(backbone, make_task(), **BASE, folds=3)
    monkeypatch.setattr(sweep_trial, "sharing_pays", lambda backbone: True)
    shared = sp.tune(backbone, make_task(), **BASE, folds=3)
    torch.testing.assert_close(shared.prompt.vectors, alone.prompt.vectors, rtol=0, atol=1e-8)
    one, other = (found.prompt.provenance["cross_validation"] for found in (shared, alone))
    assert {**one, "curve": None, "loss": None} == {**other, "curve": None, "loss": None}
    for mine, its in zip(one["curve"], other["curve"], strict=True):
        assert mine == pytest.approx(its, abs=1e-8)


def test_free_text(backbone):
    template = sp.Template.make("Review : {text} \n Sentiment :", " {label}")
    task = sp.Task.from_rows(make_reviews(12), [], [], template)
    found = sp.tune(backbone, task, **{**BASE, "steps": 4})
    crossed = found.prompt.provenance["cross_validation"]
    assert crossed["metric"] == "minus loss" and "interval" not in crossed
    assert found.validation.scores is None and found.validation.loss == pytest.approx(crossed["loss"])


def test_a_fold_that_diverges_stops_all(backbone, monkeypatch):
    spoil_losses(monkeypatch, lambda trainer: True)
    with pytest.raises(TrainingError, match="the loss became nan"):
        sp.tune(backbone, make_task(), **BASE, folds=2)


def test_listeners_are_told(backbone):
    events = []
    tune_few(backbone, make_task(), TuneConfig(**BASE), 2, listeners=[events.append])
    kinds = [e["event"] for e in events if "trial" not in e]
    assert kinds[0] == "folds" and "cross-validation" in kinds and "fold-mean" in kinds
    assert {e["trial"] for e in events if "trial" in e} == {"01", "02"}
    with pytest.raises(ConfigError):
        sp.tune(backbone, make_task(), folds=-1)
