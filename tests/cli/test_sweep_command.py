"""`softprompt sweep` and `tune --auto` on a tiny random model: what they say, keep, resume and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_material import TEMPLATE, Called

from softprompt import SoftPrompt
from softprompt.cli.scores import in_one_line
from softprompt.cli.sweep import SweepProgress
from softprompt.config import load_config
from softprompt.errors import ConfigError
from softprompt.evaluation.runner import Report
from softprompt.training.sweep_config import load_sweep
from spoiled import spoil_losses

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")
TENSOR = "adapter_model.safetensors"
SWEEP = {"grid": {"learning_rate": [0.05, 0.5], "init": ["random", "labels"]}, "halving": 2}


@pytest.fixture
def config(cli: Cli, model_folder: str, train_file: Path) -> dict[str, object]:
    """A sound config, standing in c.yaml too."""
    data: dict[str, object] = {"model": model_folder, "train": str(train_file), "input": TEMPLATE[1]}
    data |= {"target": TEMPLATE[3], "labels": ["negative", "positive"], "tokens": 3, "steps": 4}
    data |= {"shares": [0.5, 0.25, 0.25], "precision": "float32", "sweep": SWEEP}
    write(data)
    return data


def write(data: dict[str, object]) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def problems(*settings: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_sweep("c.yaml", settings)
    return error.value.problems


def test_start_to_end(cli: Cli, config: dict[str, object]) -> None:
    called = cli("sweep", "c.yaml")
    assert called.code == 0, called.err
    for told in (
        "4 trials; run folder runs/reviews",
        "about 8 steps in all",
        "after 25% of the steps 2 of 4 trials go on",
    ):
        assert told in called.err
    lines = [line for line in called.out.splitlines() if " of 4 " in line]
    assert [line.split()[-1] for line in lines].count("finished") == 1 and len(lines) == 4
    assert f"the winner is trial {lines[0].split()[0]}: learning_rate=0." in called.out
    assert "softprompt run prompts/reviews" in called.out
    assert sorted(os.listdir("runs/reviews/trials")) == ["01", "02", "03", "04"]
    assert set(os.listdir("runs/reviews")) >= {"config.yaml", "versions.json", "sweep.json", "winner.yaml"}
    prompt = SoftPrompt.load("prompts/reviews")
    assert 0 <= prompt.metrics["test"]["accuracy"] <= 1
    assert prompt.provenance["sweep"]["trials"] == 4


def test_json_and_the_winner_tuned_again(cli: Cli, config: dict[str, object]) -> None:
    found = cli("sweep", "c.yaml", "--halving", "off", "--json").json
    assert [each["state"] for each in found["trials"]] == ["finished"] * 4
    order = [(-each["score"], each["loss"]) for each in found["trials"]]
    assert order == sorted(order)
    assert found["winner"] == found["trials"][0]
    assert found["test"]["rows"] == 10
    assert cli("tune", found["config"], "out=prompts/again").code == 0
    assert Path("prompts/again", TENSOR).read_bytes() == Path(found["prompt"], TENSOR).read_bytes()


def test_the_grid_as_an_option_and_no_file(cli: Cli, model_folder: str, train_file: Path) -> None:
    called = cli(
        *("sweep", "--model", model_folder, "--train", train_file, *TEMPLATE, "--tokens", 3, "--steps", 2),
        *("--shares", "0.5,0.25,0.25", "--precision", "float32", "--grid", "{seed: [0, 1]}", "--quiet"),
        "trials=[{tokens: 4}]",
    )
    assert called.code == 0, called.err
    assert "seed=" in called.out or "tokens=" in called.out
    assert len(os.listdir("runs/reviews/trials")) == 3
    assert "go on" not in called.err


def test_ctrl_c_and_resume(cli: Cli, config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("sweep", "c.yaml", "out=prompts/whole", "run=runs/whole").code == 0
    shown = SweepProgress._on_step

    def interrupt(self: SweepProgress, event: dict[str, object]) -> None:
        shown(self, event)
        if self.done == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SweepProgress, "_on_step", interrupt)
    stopped = cli("sweep", "c.yaml", "out=prompts/parts", "run=runs/parts")
    assert stopped.code == 1
    assert "interrupted; go on with: softprompt sweep --resume runs/parts" in stopped.err
    assert not Path("prompts/parts").exists()
    monkeypatch.setattr(SweepProgress, "_on_step", shown)
    resumed = cli("sweep", "--resume", "runs/parts")
    assert resumed.code == 0, resumed.err
    assert "5 of them done" in resumed.err
    assert Path("prompts/parts", TENSOR).read_bytes() == Path("prompts/whole", TENSOR).read_bytes()
    states = [json.loads(Path(f"runs/{name}/sweep.json").read_text()) for name in ("parts", "whole")]
    assert states[0]["rungs"] == states[1]["rungs"] and states[0]["winner"] == states[1]["winner"]


def test_resume_of_a_run_that_is_no_sweep(cli: Cli, config: dict[str, object]) -> None:
    assert cli("tune", "c.yaml").code == 2  # it has a sweep section
    write({key: value for key, value in config.items() if key != "sweep"})
    assert cli("tune", "c.yaml", "run=runs/one").code == 0
    called = cli("sweep", "--resume", "runs/one", "--overwrite", "--grid", "{seed: [0, 1]}")
    assert called.code == 2
    assert "error: the run in runs/one is a run of tune, not a sweep" in called.err


# --- tune --auto ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(cli: Cli, config: dict[str, object]) -> Cli:
    write({**{key: value for key, value in config.items() if key != "sweep"}, "steps": 15})
    return lambda *more: cli("tune", "c.yaml", *more)


def test_auto_tunes_with_what_won(tune: Cli) -> None:
    called = tune("--auto", "--json")
    assert called.code == 0, called.err
    assert "trying 6 settings for a fraction of the steps, in runs/reviews/auto" in called.err
    tried = called.json["auto"]
    assert [each["steps"] for each in tried] == [3] * 6
    assert sorted({each["settings"]["learning_rate"] for each in tried}) == [0.015, 0.05, 0.15]
    assert {each["settings"]["init"] for each in tried} == {"text", "labels"}
    best = tried[0]["settings"]
    assert called.json["steps"] == 15
    kept = load_config("runs/reviews/config.yaml", ["overwrite=true", "run=runs/again", "out=prompts/again"])
    assert (kept.learning_rate, kept.init, kept.auto) == (best["learning_rate"], best["init"], False)
    assert tune("out=prompts/alone", *(f"{key}={value}" for key, value in best.items())).code == 0
    assert Path("prompts/alone", TENSOR).read_bytes() == Path("prompts/reviews", TENSOR).read_bytes()


@pytest.mark.parametrize("stop", [4, 16])
def test_auto_interrupted_and_resumed(tune: Cli, cli: Cli, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Once in the sweep, which has 10 steps, and once in the run after it."""
    from softprompt.cli.progress import TuneProgress

    assert tune("auto=true", "out=prompts/whole", "run=runs/whole").code == 0
    steps = 0

    def interrupting(shown: Callable[..., None]) -> Callable[..., None]:
        def interrupt(self: object, event: dict[str, object]) -> None:
            nonlocal steps
            steps += 1
            shown(self, event)
            if steps == stop:
                signal.raise_signal(signal.SIGINT)

        return interrupt

    monkeypatch.setattr(SweepProgress, "_on_step", interrupting(SweepProgress._on_step))
    monkeypatch.setattr(TuneProgress, "_on_step", interrupting(TuneProgress._on_step))
    stopped = tune("auto=true", "out=prompts/parts", "run=runs/parts")
    assert stopped.code == 1
    assert "go on with: softprompt tune --resume runs/parts" in stopped.err
    resumed = cli("tune", "--resume", "runs/parts")
    assert resumed.code == 0, resumed.err
    assert steps == 25
    assert Path("prompts/parts", TENSOR).read_bytes() == Path("prompts/whole", TENSOR).read_bytes()


def test_auto_keeps_a_start_that_was_chosen(tune: Cli) -> None:
    called = tune("auto=true", "init_text=good or bad?", "--json")
    assert called.code == 0, called.err
    assert len(called.json["auto"]) == 3


def test_auto_without_validation_rows(tune: Cli) -> None:
    called = tune("--auto", "shares=0.8,0,0.2")
    assert called.code == 2
    assert "error: auto: compares by validation rows" in called.err


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, "sweep: has no trials; give a grid, as grid: {learning_rate: [0.02, 0.05]}, or a list of trials"),
        ({}, "sweep: has no trials; give a grid, as grid: {learning_rate: [0.02, 0.05]}, or a list of trials"),
        ({"grid": {}}, "sweep.grid: is empty; give values, as grid: {learning_rate: [0.02, 0.05]}"),
        ({"trials": []}, "sweep.trials: is an empty list; give settings, as trials: [{learning_rate: 0.05}]"),
        ({"grid": {"seed": []}}, "sweep.grid.seed: is an empty list; give values, or leave seed out"),
        ([1], "sweep: must be a section with grid or trials, found [1]"),
    ],
)
def test_a_sweep_without_trials(config: dict[str, object], section: object, expected: str) -> None:
    write({**config, "sweep": section})
    assert problems() == [expected]


def test_all_mistakes_at_once(cli: Cli, config: dict[str, object]) -> None:
    grid = {"lerning_rate": [1], "tokens": [5, 0], "init": ["txt", "random"], "input": ["{soft}{body}"], "seed": [0, 1]}
    write({**config, "epochs": -1, "tokns": 3, "sweep": {"grid": grid, "halvng": 3, "halving": 0.5}})
    called = cli("sweep", "c.yaml", "--json")
    assert called.code == 2
    assert [line.removeprefix("error: ")[:75] for line in called.err.splitlines()] == [
        line[:75]
        for line in (
            "sweep.halvng: unknown key; did you mean halving?",
            "sweep.grid.lerning_rate: not a setting that can be swept; did you mean learning_rate?",
            "sweep.halving: must be a whole number above 1 (one in so many goes on) or off, found 0.5",
            "tokns: unknown key; did you mean tokens?",
            "epochs: must be greater than 0, found -1",
            *called.err.replace("error: ", "").splitlines()[5:],
        )
    ]
    told = called.json["problems"][5:]
    assert len(told) == 3
    for part in (
        "no column 'body'",
        "unknown initialiser 'txt'",
        "tokens: must be greater than or equal to 1, found 0",
    ):
        assert sum(part in line and line.startswith("sweep trial (") for line in told) == 1, part


def test_a_setting_that_only_trials_give(config: dict[str, object]) -> None:
    del config["input"]
    inputs = ["{soft}Review: {text}", "Review: {text}\n{soft}Sentiment:"]
    write({**config, "sweep": {"grid": {"input": inputs}}})
    assert [trial["input"] for trial in load_sweep("c.yaml").plan.trials] == inputs
    write({**config, "sweep": {"trials": [{"input": inputs[0]}, {"seed": 1}]}})
    assert "input: missing" in problems()[0]


def test_no_validation_rows(config: dict[str, object]) -> None:
    assert problems("shares=0.8,0,0.2") == [
        "validation: a sweep compares trials by validation rows; give a file or a share of the rows"
    ]


def test_written_and_read_back(config: dict[str, object]) -> None:
    found = load_sweep("c.yaml", ["trials=[{tokens: 5}]"])
    Path("again.yaml").write_text(found.to_yaml())
    assert load_sweep("again.yaml") == found
    assert len(found.plan.trials) == 5


def test_tune_says_where_the_sweep_section_belongs(cli: Cli, config: dict[str, object]) -> None:
    assert "error: sweep: is a section for `softprompt sweep`" in cli("tune", "c.yaml").err


def test_a_config_is_checked_without_torch(config: dict[str, object]) -> None:
    code = "import sys; from softprompt.training.sweep_config import load_sweep; load_sweep('c.yaml')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trial_that_diverges_is_told_and_the_others_go_on(
    cli: Cli, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_losses(monkeypatch, lambda trainer: trainer.config.seed == 1)
    called = cli("sweep", "c.yaml", "grid={seed: [0, 1]}", "halving=off", "--json")
    assert called.code == 0, called.err
    assert "warning: trial 02 (seed=1) ended at step 0, the others go on: the loss became nan" in called.err
    assert [each["state"] for each in called.json["trials"]] == ["finished", "diverged"]
    assert "warnings" in called.json


def test_a_score_without_an_interval_in_one_line() -> None:
    report = Report(None, None, 0.5, ["fine"], [], ["Review: good"])
    assert in_one_line(report) == "loss 0.500 on 1 row"
