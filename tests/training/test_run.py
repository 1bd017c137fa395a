"""Tuning end to end on a tiny model: it learns, changes nothing but the prompt, and resumes bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError, OutputError, TrainingError
from softprompt.training.checkpoint import load_checkpoint
from softprompt.training.folder import CHECKPOINT
from softprompt.training.loop import Validation, batches
from softprompt.training.monitor import majority_warning, movement_warning, read_events
from spoiled import spoil_losses
from tiny_models import make_backbone, make_reviews, make_tokenizer

SETTINGS = dict(
    tokens=4, steps=8, batch_size=6, learning_rate=0.5, validate_every=3, checkpoint_every=2, init="random", seed=3
)


def make_task(count: int = 40, input: str = "Review : {text} \n Sentiment :") -> sp.Task:
    template = sp.Template.make(input, " {label}", labels=["negative", "positive"])
    return sp.Task.from_rows(make_reviews(count), make_reviews(12, 1), make_reviews(12, 2), template)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float32, make_tokenizer())


@pytest.fixture(scope="module")
def undisturbed(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return sp.tune(backbone, make_task(), run_folder=folder, **SETTINGS)


def test_the_loss_falls_and_only_the_prompt_changed(backbone):
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    result = sp.tune(backbone, make_task(), **{**SETTINGS, "steps": 80, "learning_rate": 2.0})
    losses = [e["loss"] for e in result.history if e["event"] == "step"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.named_parameters())
    assert not backbone.model.training
    assert result.prompt.vectors.shape == (4, 32)


def test_the_run_folder_holds_what_it_should(undisturbed):
    folder = undisturbed.run_folder
    assert {p.name for p in folder.iterdir()} >= {
        "run.json", "config.yaml", "versions.json", "metrics.jsonl", "checkpoints", "report.html", "result.json",
    }  # fmt: skip
    events = read_events(folder / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 9))
    assert [e["step"] for e in events if e["event"] == "validation"] == [3, 6, 8]
    step = next(e for e in events if e["event"] == "step")
    assert len(step["token_gradient_norms"]) == len(step["token_norms"]) == 4
    assert undisturbed.validation.accuracy in [e["score"] for e in events if e["event"] == "validation"]


def test_same_seed_same_bytes(backbone, undisturbed, tmp_path):
    again = sp.tune(backbone, make_task(), **SETTINGS)
    assert again.prompt.vectors.numpy().tobytes() == undisturbed.prompt.vectors.numpy().tobytes()
    other = sp.tune(backbone, make_task(), **{**SETTINGS, "seed": 4})
    assert not torch.equal(other.prompt.vectors, again.prompt.vectors)


@pytest.mark.parametrize("more", [{}, {"optimizer": "adafactor"}, {"reparametrisation": "residual"}, {"average": 0.9}])
@pytest.mark.parametrize("input", ["Review : {text} \n Sentiment :", "Review : {text} {soft} \n Sentiment :"])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, more, input):
    backbone = make_backbone("llama", torch.float32, make_tokenizer())
    settings = {**SETTINGS, **more}
    whole = sp.tune(backbone, make_task(input=input), run_folder=tmp_path / "whole", **settings)

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = sp.tune(backbone, make_task(input=input), run_folder=tmp_path / "part", listen=interrupt, **settings)
    assert stopped.reason == "interrupted" and stopped.steps == 5
    resumed = sp.tune(backbone, make_task(input=input), run_folder=tmp_path / "part", resume=True, **settings)
    assert resumed.reason == "finished"
    assert resumed.prompt.vectors.numpy().tobytes() == whole.prompt.vectors.numpy().tobytes()
    for name in ("loss", "gradient_norm", "token_norms"):
        assert [e.get(name) for e in resumed.history] == [e.get(name) for e in whole.history]
    kept = read_events(tmp_path / "part" / "metrics.jsonl")
    assert [(e["event"], e["step"]) for e in kept] == [(e["event"], e["step"]) for e in whole.history]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_run import SETTINGS, make_task
from tiny_models import make_backbone, make_tokenizer
import softprompt as sp
def kill(event):
    if event["event"] == "step" and event["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
backbone = make_backbone("llama", torch.float32, make_tokenizer())
sp.tune(backbone, make_task(), run_folder={folder!r}, listen=kill, **SETTINGS)
"""


def test_killed_in_the_middle_and_resumed_equals_undisturbed(backbone, undisturbed, tmp_path):
    folder = tmp_path / "killed"
    here = Path(__file__).parent
    code = KILLED.format(path=sys.path, tests=str(here), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_checkpoint(folder / CHECKPOINT).facts["step"] == 4
    resumed = sp.tune(backbone, make_task(), run_folder=folder, resume=True, **SETTINGS)
    assert resumed.prompt.vectors.numpy().tobytes() == undisturbed.prompt.vectors.numpy().tobytes()


@pytest.mark.parametrize("kind", ["embedding", "deep"])
def test_the_prompt_is_the_mean_over_the_last_steps(backbone, kind):
    """Of 4 steps, half are the last two: their vectors are what runs of 3 and of 4 steps end with."""
    task = sp.Task.from_rows(make_reviews(40), [], [], make_task().template)

    def vectors(steps: int, average: float) -> torch.Tensor:
        settings = dict(tokens=4, batch_size=6, learning_rate=0.5, warmup=0.0, schedule="constant", folds=0, kind=kind)
        return sp.tune(backbone, task, steps=steps, average=average, **settings).prompt.vectors

    torch.testing.assert_close(vectors(4, 0.5), (vectors(3, 0.0) + vectors(4, 0.0)) / 2)
    assert not torch.allclose(vectors(3, 0.0), vectors(4, 0.0))
    torch.testing.assert_close(vectors(4, 0.0), vectors(4, 0.2))


def test_not_a_number_stops_with_the_last_checkpoint_kept(backbone, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, lambda trainer: trainer.step == 5)
    with pytest.raises(TrainingError, match=r"loss became nan at step 6.*last good checkpoint is kept.*learning_rate"):
        sp.tune(backbone, make_task(), run_folder=tmp_path / "run", **SETTINGS)
    kept = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert kept.facts["step"] == 4 and all(torch.isfinite(t).all() for t in kept.tensors.values())


def test_dropout_is_off_whatever_the_caller_did_with_the_model():
    backbone = make_backbone("gpt2", torch.float32, make_tokenizer())
    assert backbone.text_config.resid_pdrop == backbone.text_config.attn_pdrop == 0.1
    still = sp.tune(backbone, make_task(), **{**SETTINGS, "steps": 3})
    backbone.model.train()
    dropping = sp.tune(backbone, make_task(), **{**SETTINGS, "steps": 3})
    assert torch.equal(dropping.prompt.vectors, still.prompt.vectors)


def test_early_stopping(backbone):
    result = sp.tune(backbone, make_task(), **{**SETTINGS, "learning_rate": 1e-9, "steps": 50, "patience": 2})
    assert result.reason == "no better score" and result.steps == 9


def test_a_run_of_an_earlier_version_goes_on_and_another_setting_is_named(backbone, tmp_path):
    folder = tmp_path / "run"
    whole = sp.tune(backbone, make_task(), run_folder=folder, **SETTINGS)
    saved = json.loads((folder / "run.json").read_text())
    del saved["tuning"]["folds"]  # it had not been thought of
    (folder / "run.json").write_text(json.dumps(saved))
    again = sp.tune(backbone, make_task(), run_folder=folder, resume=True, **SETTINGS)
    assert torch.equal(whole.prompt.vectors, again.prompt.vectors)
    with pytest.raises(ConfigError, match=r"another tuning \(seed was \d+ and is 77\)"):
        sp.tune(backbone, make_task(), run_folder=folder, resume=True, **{**SETTINGS, "seed": 77})


def test_a_run_that_ended_early_stays_ended(backbone, tmp_path):
    settings = {**SETTINGS, "learning_rate": 1e-9, "steps": 50, "patience": 2}
    whole = sp.tune(backbone, make_task(), run_folder=tmp_path / "run", **settings)
    again = sp.tune(backbone, make_task(), run_folder=tmp_path / "run", resume=True, **settings)
    assert (again.reason, again.steps) == (whole.reason, whole.steps) == ("no better score", 9)
    assert torch.equal(again.prompt.vectors, whole.prompt.vectors)


def test_a_warning_is_given_once(backbone):
    result = sp.tune(backbone, make_task(), **{**SETTINGS, "learning_rate": 1e-6, "steps": 12})
    assert sum(e["event"] == "warning" and "hardly moved" in e["text"] for e in result.history) == 1


def test_micro_batches_change_nothing_that_matters(backbone):
    whole = sp.tune(backbone, make_task(), **SETTINGS)
    split = sp.tune(backbone, make_task(), **{**SETTINGS, "micro_batch_tokens": 16})
    torch.testing.assert_close(split.prompt.vectors, whole.prompt.vectors, rtol=1e-3, atol=1e-4)


def test_residual_starts_at_the_initialiser(backbone):
    from softprompt.training.parameters import make_parameters

    initial = torch.randn(4, 32)
    torch.testing.assert_close(make_parameters(initial, "residual", 0.1, 0).vectors(), initial)


def test_the_better_validation_is_not_the_luckier_one():
    def validation(score, loss):
        return Validation(score, loss, "accuracy", error=0.03)

    assert validation(0.80, 0.5).beats(-math.inf, math.inf)
    assert validation(0.83, 0.37).beats(0.84, 0.42)  # as good, with the lower loss
    assert not validation(0.84, 0.42).beats(0.83, 0.37)
    assert validation(0.90, 0.42).beats(0.83, 0.37)  # clearly better
    assert not validation(0.70, 0.30).beats(0.83, 0.37)
    assert Validation(-0.4, 0.4, "minus loss").beats(-0.5, 0.5)


def test_batches_hold_every_row_once_an_epoch():
    found = list(batches(10, 4, 5, seed=1))
    assert [len(b) for b in found] == [4] * 5
    flat = [i for b in found for i in b]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_holds_something_else(backbone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something that is not a run"):
        sp.tune(backbone, make_task(), run_folder=tmp_path, **SETTINGS)


def test_a_run_folder_that_is_a_file(backbone, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        sp.tune(backbone, make_task(), run_folder=tmp_path / "run", **SETTINGS)


def test_a_run_folder_that_holds_a_run(backbone, undisturbed):
    with pytest.raises(OutputError, match="holds a run already; go on with it"):
        sp.tune(backbone, make_task(), run_folder=undisturbed.run_folder, **SETTINGS)


def test_resume_with_other_settings(backbone, undisturbed):
    with pytest.raises(ConfigError, match="started with another tuning"):
        sp.tune(backbone, make_task(), run_folder=undisturbed.run_folder, resume=True, **{**SETTINGS, "tokens": 5})
    with pytest.raises(ConfigError, match="started with another data_sha256"):
        sp.tune(backbone, make_task(41), run_folder=undisturbed.run_folder, resume=True, **SETTINGS)


def test_resume_of_nothing(backbone, tmp_path):
    with pytest.raises(OutputError, match="holds no run to resume"):
        sp.tune(backbone, make_task(), run_folder=tmp_path, resume=True, **SETTINGS)


def test_a_damaged_checkpoint(backbone, undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed.run_folder, tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="cannot read checkpoint"):
        sp.tune(backbone, make_task(), run_folder=tmp_path / "run", resume=True, **SETTINGS)


def test_no_room_on_the_disk(backbone, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1 << 20))
    with pytest.raises(OutputError, match="only 1 MiB free"):
        sp.tune(backbone, make_task(), run_folder=tmp_path / "run", **SETTINGS)


def test_settings_that_make_no_sense_are_all_named(backbone):
    with pytest.raises(ConfigError) as caught:
        sp.tune(backbone, make_task(), tokens=0, learning_rate=-1, colour="red")
    assert len(caught.value.problems) == 3


def test_more_soft_tokens_than_context(backbone):
    with pytest.raises(ConfigError, match="300 soft tokens leave no room for text in 256 tokens"):
        sp.tune(backbone, make_task(), **{**SETTINGS, "tokens": 300})


def test_no_training_rows(backbone):
    template = make_task().template
    with pytest.raises(DataError, match="training split has no rows"):
        sp.tune(backbone, sp.Task.from_rows([], make_reviews(4), [], template), **SETTINGS)


def test_warnings_say_what_to_try():
    start = torch.zeros(3, 4)
    assert "hardly moved" in movement_warning(start + 1e-6, start, unit=1.0, share_done=0.5)
    assert movement_warning(start + 1e-6, start, unit=1.0, share_done=0.1) is None
    assert "grown to 500 times" in movement_warning(start + 500.0, start, unit=1.0, share_done=0.1)
    assert movement_warning(start + 0.5, start, unit=1.0, share_done=0.9) is None
    assert "every validation row was classified as 'a'" in majority_warning(["a"] * 20, share_done=0.5)
    assert majority_warning(["a"] * 20, share_done=0.4) is None
    assert majority_warning(["a"] * 19 + ["b"], share_done=0.5) is None


def test_result_json_is_plain(undisturbed):
    found = json.loads((undisturbed.run_folder / "result.json").read_text())
    assert found["reason"] == "finished" and found["steps"] == 8
