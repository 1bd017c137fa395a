"""A sweep is K separate runs to the bit, drops losers, goes on after a kill, and outlives a trial that diverges."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError, OutputError, TrainingError
from softprompt.training.monitor import Monitor, read_events
from softprompt.training.sweep_plan import expected_runs, kept, make_plan, rungs
from spoiled import interrupt_at, spoil_losses
from tiny_models import make_backbone, make_reviews, make_tokenizer

BEHIND = "Review : {text} {soft} \n Sentiment :"
BASE = dict(tokens=4, steps=9, batch_size=6, learning_rate=0.5, validate_every=4, checkpoint_every=2, init="random")
GRID = {"learning_rate": [0.2, 1.0], "seed": [0, 1], "init": ["random", "labels"]}


def make_task(count: int = 40, input: str = "Review : {text} \n Sentiment :") -> sp.Task:
    template = sp.Template.make(input, " {label}", labels=["negative", "positive"])
    return sp.Task.from_rows(make_reviews(count), make_reviews(12, 1), make_reviews(12, 2), template)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float64, make_tokenizer())


@pytest.fixture(autouse=True)
def plain_report(monkeypatch):
    """Runs without figures, which would take most of the time."""
    import softprompt.training.run

    monkeypatch.setattr(softprompt.training.run, "_write_page", lambda folder, *_, **__: folder / "report.html")


@pytest.fixture(scope="module")
def halved(backbone, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import softprompt.training.run

        patch.setattr(softprompt.training.run, "_write_page", lambda folder, *_, **__: None)
        folder = tmp_path_factory.mktemp("sweeps") / "whole"
        return sp.sweep(backbone, make_task(), grid=GRID, halving=2, run_folder=folder, **BASE)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()


# --- K separate runs ------------------------------------------------------------------------------------------------

DIFFERENT = [
    {"learning_rate": 0.2},
    {"init": "labels", "seed": 3},
    {"tokens": 7, "schedule": "cosine", "weight_decay": 0.1},
    {"clip": 0.01, "optimizer": "adafactor"},
    {"reparametrisation": "residual", "warmup": 0.5},
    {"steps": 5, "batch_size": 3},
    {"kind": "deep", "sink": 0},
]


@pytest.mark.parametrize("halving", [0, 3])
def test_trials_that_end_are_the_runs_of_tune(backbone, halving):
    found = sp.sweep(backbone, make_task(), trials=DIFFERENT, halving=halving, **BASE)
    finished = [trial for trial in found.trials if trial.state == "finished"]
    assert len(finished) == (len(DIFFERENT) if not halving else 3)
    for trial in finished:
        alone = sp.tune(backbone, make_task(), **{**BASE, **trial.settings})
        assert same(trial.prompt.vectors, alone.prompt.vectors), trial.settings
        assert trial.score == alone.validation.accuracy
        assert trial.step == alone.steps


@pytest.mark.parametrize("input", ["Review : {text} \n Sentiment :", BEHIND])
def test_trials_that_share_passes_are_the_runs_of_tune(backbone, monkeypatch, input):
    from softprompt.training import together

    real, sizes = together.losses_and_gradients, []

    def counting(backbone, batches, prompts, **more):
        sizes.append(len(prompts))
        return real(backbone, batches, prompts, **more)

    monkeypatch.setattr(together, "losses_and_gradients", counting)
    task, deep = make_task(input=input), {"kind": "deep", "sink": 0}
    trials = [*DIFFERENT, {**deep, "learning_rate": 0.1}]
    found = sp.sweep(backbone, task, trials=trials, halving=0, share_passes=True, **BASE)
    shared = sorted(sizes)
    assert [trial.state for trial in found.trials] == ["finished"] * len(trials)
    for trial in found.trials:
        alone = sp.tune(backbone, task, **{**BASE, **trial.settings})
        torch.testing.assert_close(trial.prompt.vectors, alone.prompt.vectors, rtol=0, atol=1e-8)
        assert (trial.score, trial.step) == (alone.validation.accuracy, alone.steps)
    # Five of one shape, one of them for five steps only, two deep ones, and one of seven tokens by itself.
    assert shared == [1] * 9 + [2] * 9 + [4] * 4 + [5] * 5
    assert sum(shared) == sum(trial.step for trial in found.trials)


def test_trials_of_other_texts_and_lengths_do_not_mix(backbone):
    """Three that share, one of another text, one of another length: each is the run of tune."""
    task = make_task(input=BEHIND)
    trials = [{"seed": 0}, {"seed": 1}, {"seed": 2}, {"input": "{soft}{text} :"}, {"tokens": 6}]
    found = sp.sweep(backbone, task, trials=trials, halving=0, share_passes=True, **BASE)
    for trial in found.trials:
        settings = {key: value for key, value in trial.settings.items() if key != "input"}
        own = make_task(input=trial.settings.get("input", BEHIND))
        alone = sp.tune(backbone, own, **{**BASE, **settings})
        torch.testing.assert_close(trial.prompt.vectors, alone.prompt.vectors, rtol=0, atol=1e-8)


def test_a_trials_seconds_are_its_share_of_the_passes(backbone, monkeypatch):
    """By a clock that stands still but for the passes: three of nine seconds each make nine for three trials."""
    from softprompt.training import loop, together

    now = 0.0

    def slow(backbone, batches, prompts, **more):
        nonlocal now
        now += 9.0
        return real(backbone, batches, prompts, **more)

    real = together.losses_and_gradients
    monkeypatch.setattr(together, "losses_and_gradients", slow)
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(together, "time", clock)
    settings = {**BASE, "steps": 3}
    found = sp.sweep(backbone, make_task(), grid={"seed": [0, 1, 2]}, halving=0, share_passes=True, **settings)
    assert [trial.run.trainer.seconds for trial in found.trials] == [9.0] * 3
    assert found.trials[0].run.monitor.events[1]["examples_per_second"] == pytest.approx(6 / 3)


def test_a_failure_in_a_shared_pass_closes_all_runs(backbone, tmp_path, monkeypatch):
    from softprompt.training import together

    def broken(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(together, "losses_and_gradients", broken)
    closed = []
    real = Monitor.close
    monkeypatch.setattr(Monitor, "close", lambda self: closed.append(self) or real(self))
    with pytest.raises(KeyboardInterrupt):
        sp.sweep(backbone, make_task(), grid={"seed": [0, 1]}, run_folder=tmp_path / "s", share_passes=True, **BASE)
    assert len(set(map(id, closed))) == 2 and all(each._file is None for each in closed)


def test_passes_are_shared_on_every_device_but_a_cpu(backbone, monkeypatch):
    from softprompt.training import sweep, sweep_trial

    turns = []
    real = sweep_trial.advance
    monkeypatch.setattr(sweep, "advance", lambda some, *given: turns.append(len(some)) or real(some, *given))
    trials = {"grid": {"seed": [0, 1, 2]}, "halving": 0}
    sp.sweep(backbone, make_task(), **trials, **BASE)
    assert turns == [1, 1, 1]
    assert not sweep_trial.sharing_pays(backbone)
    monkeypatch.setattr(sweep_trial, "sharing_pays", lambda backbone: True)
    sp.sweep(backbone, make_task(), **trials, **BASE)
    assert turns == [1, 1, 1, 3]


def test_placements_share_the_rows_and_the_texts(backbone, monkeypatch):
    import softprompt.computation as computation

    real, computed = computation._compute_texts, []

    def counting(backbone, rows, *more):
        computed.append(len(rows))
        return real(backbone, rows, *more)

    monkeypatch.setattr(computation, "_compute_texts", counting)
    alone = [
        sp.tune(backbone, make_task(input=BEHIND), **{**BASE, "tokens": tokens}).prompt.vectors for tokens in (4, 6)
    ]
    each = sum(computed) / 2
    computed.clear()
    behind = [{"input": BEHIND, "tokens": 4}, {"input": BEHIND, "tokens": 6}]
    found = sp.sweep(backbone, make_task(), trials=[*behind, {"tokens": 4}], halving=0, **BASE)
    assert each and sum(computed) <= each  # the texts of two trials for the price of one
    by_name = {trial.name: trial for trial in found.trials}
    assert same(by_name["01"].prompt.vectors, alone[0]) and same(by_name["02"].prompt.vectors, alone[1])
    assert by_name["03"].prompt.template.placement == "front" and by_name["01"].prompt.template.placement == "behind"
    rows = [by_name[name].run.trainer.rows for name in ("01", "02", "03")]
    assert rows[0] is not rows[1]  # other ids
    same_rows = sp.sweep(backbone, make_task(), grid={"seed": [0, 1]}, halving=0, **{**BASE, "steps": 1}).trials
    assert same_rows[0].run.trainer.rows is same_rows[1].run.trainer.rows


# --- halving --------------------------------------------------------------------------------------------------------


def test_halving_drops_the_losers_early(halved):
    state = json.loads((halved.run_folder / "sweep.json").read_text())
    assert [(round(r["share"], 3), len(r["scores"]), len(r["kept"])) for r in state["rungs"]] == [
        (0.125, 8, 4), (0.25, 4, 2), (0.5, 2, 1),
    ]  # fmt: skip
    assert sorted(trial.step for trial in halved.trials) == [1] * 4 + [2] * 2 + [4, 9]
    assert [t.state for t in halved.trials].count("finished") == 1
    for rung in state["rungs"]:
        order = sorted(rung["scores"], key=lambda n: (-rung["scores"][n]["score"], rung["scores"][n]["loss"], n))
        assert rung["kept"] == order[: len(rung["kept"])]
    assert halved.winner.name == state["winner"] == state["trials"][0]["trial"]


def test_the_table_is_sorted_and_the_first_is_the_winner(halved):
    order = [(-trial.score, trial.loss) for trial in halved.trials]
    assert order == sorted(order)
    assert same(halved.prompt.vectors, halved.trials[0].prompt.vectors)
    assert halved.prompt.metrics["validation"]["accuracy"] == halved.validation.accuracy
    assert halved.prompt.provenance["sweep"]["trials"] == 8


def test_every_trial_is_kept(halved):
    folders = sorted((halved.run_folder / "trials").iterdir())
    assert [folder.name for folder in folders] == [f"{n:02}" for n in range(1, 9)]
    for trial in halved.trials:
        folder = trial.run.folder
        assert same(sp.SoftPrompt.load(folder / "prompt").vectors, trial.prompt.vectors)
        run = json.loads((folder / "run.json").read_text())
        assert all(run["tuning"][key] == value for key, value in trial.settings.items())
        events = read_events(folder / "metrics.jsonl")
        assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, trial.step + 1))
        ends = [e["reason"] for e in events if e["event"] == "end"]
        assert ends == ["finished" if trial.state == "finished" else "dropped"]
        result = json.loads((folder / "result.json").read_text())
        assert (result["state"], result["score"], result["step"]) == (trial.state, trial.score, trial.step)


def test_rungs():
    assert rungs(9, 3) == [1 / 9, 1 / 3]
    assert rungs(27, 3) == [1 / 9, 1 / 3]  # never before a tenth of the steps
    assert rungs(6, 3) == [1 / 3]
    assert rungs(8, 2) == [1 / 8, 1 / 4, 1 / 2]
    assert rungs(2, 3) == rungs(9, 0) == []
    assert [kept(n, 3) for n in (9, 6, 4, 3, 1)] == [3, 2, 2, 1, 1]
    assert expected_runs(9, 3) == pytest.approx(9 / 9 + 3 * 2 / 9 + 6 / 9)
    assert expected_runs(9, 0) == 9


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_trials_that_share_passes_go_on_after_an_interruption(backbone, halved, tmp_path, stop):
    interrupt = interrupt_at(stop)
    settings = dict(grid=GRID, halving=2, run_folder=tmp_path / "part", share_passes=True, **BASE)
    stopped = sp.sweep(backbone, make_task(), listen=interrupt, **settings)
    assert stopped.reason == "interrupted" and stop <= interrupt.steps < stop + 8
    resumed = sp.sweep(backbone, make_task(), resume=True, listen=interrupt, **settings)
    assert interrupt.steps == sum(trial.step for trial in halved.trials)  # nothing was computed twice
    for one, other in zip(resumed.trials, halved.trials, strict=True):
        assert (one.name, one.state, one.score, one.step) == (other.name, other.state, other.score, other.step)
        torch.testing.assert_close(one.prompt.vectors, other.prompt.vectors, rtol=0, atol=1e-8)


@pytest.mark.parametrize("stop", [3, 10, 17])
def test_interrupted_and_resumed_equals_undisturbed(backbone, halved, tmp_path, stop):
    interrupt = interrupt_at(stop)
    settings = dict(grid=GRID, halving=2, run_folder=tmp_path / "part", **BASE)
    stopped = sp.sweep(backbone, make_task(), listen=interrupt, **settings)
    assert stopped.reason == "interrupted" and interrupt.steps == stop
    resumed = sp.sweep(backbone, make_task(), resume=True, listen=interrupt, **settings)
    assert interrupt.steps == sum(trial.step for trial in halved.trials)  # nothing was computed twice
    assert_same(resumed, halved)
    again = sp.sweep(backbone, make_task(), resume=True, listen=interrupt, **settings)  # ended already
    assert interrupt.steps == sum(trial.step for trial in halved.trials)
    assert_same(again, halved)


def assert_same(one: sp.SweepResult, other: sp.SweepResult) -> None:
    assert one.reason == other.reason == "finished"
    facts = ("name", "settings", "state", "score", "loss", "step")
    assert [[getattr(t, f) for f in facts] for t in one.trials] == [
        [getattr(t, f) for f in facts] for t in other.trials
    ]
    assert all(same(a.prompt.vectors, b.prompt.vectors) for a, b in zip(one.trials, other.trials, strict=True))
    assert one.validation.accuracy == other.validation.accuracy
    for a, b in zip(one.trials, other.trials, strict=True):
        kept = [read_events(t.run.folder / "metrics.jsonl") for t in (a, b)]
        assert [(e["event"], e["step"], e.get("loss")) for e in kept[0]] == [
            (e["event"], e["step"], e.get("loss")) for e in kept[1]
        ]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from test_sweep import BASE, GRID, make_task
from tiny_models import make_backbone, make_tokenizer
import softprompt as sp
steps = 0
def kill(event):
    global steps
    steps += event["event"] == "step"
    if steps == 15:
        os.kill(os.getpid(), signal.SIGKILL)
backbone = make_backbone("llama", torch.float64, make_tokenizer())
sp.sweep(backbone, make_task(), grid=GRID, halving=2, run_folder={folder!r}, listen=kill, **BASE)
"""


def test_killed_and_resumed_equals_undisturbed(backbone, halved, tmp_path):
    here = Path(__file__).parent
    code = KILLED.format(path=[str(here), str(here.parent), *sys.path], folder=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = sp.sweep(backbone, make_task(), grid=GRID, halving=2, run_folder=tmp_path / "killed", resume=True, **BASE)
    assert_same(resumed, halved)


def test_resume_with_other_trials(backbone, halved):
    settings = dict(run_folder=halved.run_folder, resume=True, **BASE)
    with pytest.raises(ConfigError, match="was started with other trials or halving"):
        sp.sweep(backbone, make_task(), grid={"seed": [0, 1]}, halving=2, **settings)
    with pytest.raises(ConfigError, match="started with another data_sha256"):
        sp.sweep(backbone, make_task(41), grid=GRID, halving=2, **settings)


def test_a_folder_that_holds_a_sweep(backbone, halved):
    with pytest.raises(OutputError, match="holds a run already; go on with it"):
        sp.sweep(backbone, make_task(), grid=GRID, run_folder=halved.run_folder, **BASE)


# --- trials that diverge --------------------------------------------------------------------------------------------


@pytest.fixture
def diverging(monkeypatch):
    """Every run whose learning rate is 7 has a loss that is not a number from its fourth step on."""
    spoil_losses(monkeypatch, lambda trainer: trainer.config.learning_rate == 7 and trainer.step >= 3)


@pytest.mark.parametrize("share_passes", [False, True])
def test_one_trial_diverges_and_the_others_go_on(backbone, diverging, tmp_path, share_passes):
    grid = {"learning_rate": [0.2, 7.0, 0.5]}
    settings = dict(grid=grid, halving=0, run_folder=tmp_path / "sweep", share_passes=share_passes, **BASE)
    events = []
    found = sp.sweep(backbone, make_task(), listen=events.append, **settings)
    assert [trial.state for trial in found.trials] == ["finished", "finished", "diverged"]
    lost = found.trials[-1]
    assert (lost.score, lost.step) == (None, 3) and "loss became nan at step 4" in lost.why
    assert "loss became nan" in json.loads((lost.run.folder / "result.json").read_text())["why"]
    for trial in found.trials[:2]:
        alone = sp.tune(backbone, make_task(), **{**BASE, **trial.settings})
        assert same(trial.prompt.vectors, alone.prompt.vectors) or share_passes
        torch.testing.assert_close(trial.prompt.vectors, alone.prompt.vectors, rtol=0, atol=1e-8)
    steps = sum(event["event"] == "step" for event in events)
    again = sp.sweep(backbone, make_task(), listen=events.append, resume=True, **settings)
    assert again.trials[-1].state == "diverged"
    assert sum(event["event"] == "step" for event in events) == steps


def test_a_trial_that_diverged_takes_no_place_at_a_rung(backbone, diverging):
    grid = {"learning_rate": [0.2, 7.0, 0.5, 0.3]}
    found = sp.sweep(backbone, make_task(), grid=grid, halving=2, **{**BASE, "steps": 16})
    assert sorted(trial.state for trial in found.trials) == ["diverged", "dropped", "dropped", "finished"]


def test_validation_that_is_not_a_number_is_divergence(backbone, monkeypatch):
    import softprompt.training.run as training

    real = training.evaluate_prompt

    def broken(backbone, split, vectors, **more):
        report = real(backbone, split, vectors, **more)
        if len(vectors) == 5:
            report.loss = math.nan
        return report

    monkeypatch.setattr(training, "evaluate_prompt", broken)
    found = sp.sweep(backbone, make_task(), grid={"tokens": [5, 4, 3]}, halving=3, **BASE)
    assert found.trials[-1].config.tokens == 5
    assert "validation loss became nan" in found.trials[-1].why and found.trials[-1].prompt is None


def test_all_diverged(backbone, diverging):
    with pytest.raises(TrainingError, match="all 2 trials diverged"):
        sp.sweep(backbone, make_task(), grid={"learning_rate": [7.0], "seed": [0, 1]}, **BASE)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_sweep_without_trials(backbone):
    with pytest.raises(ConfigError, match="sweep: has no trials; give a grid"):
        sp.sweep(backbone, make_task(), **BASE)


def test_all_mistakes_at_once(backbone):
    with pytest.raises(ConfigError) as caught:
        sp.sweep(
            backbone,
            make_task(),
            grid={"lerning_rate": [1], "tokens": [], "seed": 3, "tensorboard": [True]},
            trials=[{"learning_rate": -1}],
            halving=1.5,
            epochs=-2,
        )
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7, told
    for part in (
        "grid.lerning_rate: not a setting that can be swept; did you mean learning_rate?",
        "grid.tokens: is an empty list",
        "grid.seed: must be a list of values, found 3",
        "grid.tensorboard: is the same for all trials",
        "halving: must be a whole number above 1",
        "epochs",
        "learning_rate",
    ):
        assert part in told


def test_an_input_with_an_unknown_column(backbone):
    with pytest.raises(ConfigError, match="no column 'body' in the rows; they have"):
        sp.sweep(backbone, make_task(), trials=[{"input": "{soft}{body}"}], **BASE)


def test_no_validation_rows(backbone):
    task = sp.Task.from_rows(make_reviews(20), [], [], make_task().template)
    with pytest.raises(DataError, match="compares trials by validation rows and there are none"):
        sp.sweep(backbone, task, grid={"seed": [0, 1]}, **BASE)


def test_too_many_trials_and_repeated_ones():
    problems = []
    make_plan({"learning_rate": list(range(1, 400)), "seed": list(range(9))}, problems=problems)
    assert problems == ["sweep: 3,591 trials are more than 1,000; give fewer values"]
    assert len(make_plan({"seed": [0, 1, 1]}, [{"seed": 1}, {"seed": 2}]).trials) == 3
