"""The search for defaults and the benchmark of transfer: a second model that is made here, and trials that are not run
twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "cli")]
import defaults  # noqa: E402
import half_model  # noqa: E402
import transfer  # noqa: E402
from cli_material import make_model  # noqa: E402

import softprompt as sp  # noqa: E402


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two data sets; the label never stands in a text."""
    monkeypatch.setattr(half_model, "SETS", ("sst2", "trec"))
    folder = tmp_path / "data"
    for name, labels in (("sst2", ["negative", "positive"]), ("trec", ["human", "number"])):
        (folder / name).mkdir(parents=True)
        rows = [{"text": f"{['dull', 'lovely'][i % 2]} film {i} " * 40, "label": labels[i % 2]} for i in range(120)]
        for split in ("train", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_half_of_a_model_is_one_that_every_command_can_use(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert half_model.kept_layers(30) == [*range(12), 27, 28, 29]
    assert not any(word in text for text in half_model.texts(data) for word in ("positive", "number"))
    whole, out = make_model(tmp_path / "whole"), tmp_path / "half"
    given = ["--data", str(data), "--out", str(out), "--model", str(whole), "--threads", "1", "--minutes", "0.01"]
    assert half_model.main(given) == 0
    assert f"kept in {out}" in capsys.readouterr().out
    models = [sp.Backbone.load(str(folder)) for folder in (whole, out)]
    assert [each.layers for each in models] == [2, 2] and models[1].fast
    assert torch.equal(models[1].embedding_table(), models[0].embedding_table())
    assert models[1].fingerprint != models[0].fingerprint  # its layers have learned


def test_half_of_a_model_says_what_is_missing_before_it_trains(data: Path, tmp_path: Path) -> None:
    (data / "trec" / "train.jsonl").unlink()
    for more in (["--out", str(tmp_path / "half")], ["--out", str(tmp_path)], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            half_model.main(["--data", str(data), *more])


def test_trials_change_one_setting_of_the_base_and_are_not_run_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(make_model(tmp_path)), tmp_path / "found"
    told = [
        "--data",
        str(data),
        "--out",
        str(out),
        "--models",
        model,
        "--tasks",
        "sst2",
        "--axes",
        "init",
        "place",
        "peft",
    ]
    monkeypatch.setattr(
        defaults,
        "AXES",
        {
            "init": [{"init": "random"}],
            "reparametrisation": [{"reparametrisation": "residual"}],
            "place": [{"tokens": 900}, {"place": "front"}],
            "peft": [{"peft_learning_rate": 0.03}],
        },
    )
    defaults.main([*told, "--rows", "20", "--test-rows", "12"])
    (file,) = out.iterdir()
    found = json.loads(file.read_text())
    assert [trial["change"] for trial in found["trials"]] == [
        {}, {"init": "random"}, {"tokens": 900}, {"place": "front"}, {"peft_learning_rate": 0.03}
    ]  # fmt: skip
    base, random, too_long, front, peft = found["trials"]
    assert "900 soft tokens" in too_long["error"]
    assert base["trained_parameters"] == random["trained_parameters"]
    assert front["trained_parameters"] == base["trained_parameters"] * 19 // 20  # the sink stays where it is
    assert base["loss"] != random["loss"] != front["loss"]
    assert peft["steps"] == base["steps"] and peft["loss"] != base["loss"]
    assert all(0 <= trial["low"] <= trial["score"] <= trial["high"] <= 1 for trial in (base, random, front, peft))

    capsys.readouterr()
    defaults.main([*told, "--rows", "20", "--test-rows", "12"])
    assert capsys.readouterr().out == "" and json.loads(file.read_text())["trials"] == found["trials"]
    defaults.main([*told[:-1], "--seeds", "2", "--rows", "20", "--test-rows", "12"])
    assert [trial["seed"] for trial in json.loads(file.read_text())["trials"]] == [0] * 5 + [1] * 4
    with pytest.raises(SystemExit, match="another rows"):
        defaults.main([*told, "--rows", "10", "--test-rows", "12"])
    with pytest.raises(SystemExit, match="another base"):
        defaults.main([*told, "--rows", "20", "--test-rows", "12", "--base", "prompt"])
    given = [*told[:-3], "reparametrisation", "--rows", "20", "--test-rows", "12"]
    defaults.main([*given, "--out", str(tmp_path / "prompt"), "--base", "prompt"])
    trials = json.loads((tmp_path / "prompt" / file.name).read_text())["trials"]
    assert [trial["change"] for trial in trials] == [{}, {"reparametrisation": "residual"}]
    assert trials[0]["loss"] != base["loss"] and trials[0]["trained_parameters"] != base["trained_parameters"]
    defaults.main([*given, "--out", str(tmp_path / "deep")])
    assert len(json.loads((tmp_path / "deep" / file.name).read_text())["trials"]) == 1  # a deep prompt has none
    with pytest.raises(SystemExit, match="no task nothing"):
        defaults.main(["--data", str(data), "--out", str(out), "--tasks", "nothing"])
    with pytest.raises(SystemExit):
        defaults.main([*told, "--seeds", "0"])
    assert "expected a whole number from 1 on, not 0" in capsys.readouterr().err


def test_transfer_from_the_source_as_it_is_and_tuned_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "found" / "sst2.json", tmp_path / "work"
    told = ["--data", str(data), "--out", str(out), "--work", str(work), "--model", str(make_model(tmp_path))]
    told += ["--source", "trec", "--target", "sst2", "--source-rows", "20", "--test-rows", "12", "--seeds", "1"]
    assert transfer.main([*told, "--rows", "8"]) == 0
    found = json.loads(out.read_text())["trials"]
    assert [(t["rows"], t["start"]) for t in found] == [(0, "source"), (8, "text"), (8, "source")]
    assert len({trial["loss"] for trial in found}) == 3

    capsys.readouterr()
    assert transfer.main([*told, "--rows", "8", "16"]) == 0  # the source prompt and the runs that are there stay
    again = json.loads(out.read_text())["trials"]
    assert again[:3] == found and [(t["rows"], t["start"]) for t in again[3:]] == [(16, "text"), (16, "source")]
    assert "source prompt" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another target"):
        transfer.main([*told, "--target", "trec"])
    with pytest.raises(SystemExit, match=r"sst2 has \d+ training rows, 1000 were asked for"):
        transfer.main([*told, "--rows", "1000"])
    with pytest.raises(SystemExit, match="no classification task e2e"):
        transfer.main([*told[:2], "--out", str(tmp_path / "other.json"), "--target", "e2e"])
