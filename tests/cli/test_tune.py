"""`softprompt tune` from start to end on a tiny random model: what it says, writes, resumes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_material import TEMPLATE, Called, make_model, reviews, write_rows

from softprompt import SoftPrompt
from softprompt.cli.progress import TuneProgress

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")
QUICK = ("--tokens", 3, "--steps", 4, "--shares", "0.5,0.25,0.25", "--precision", "float32")


@pytest.fixture
def tune(cli: Cli, model_folder: str, train_file: Path) -> Cli:
    def call(*more: object) -> Called:
        return cli("tune", "--model", model_folder, "--train", train_file, *TEMPLATE, *QUICK, *more)

    return call


def test_start_to_end(tune: Cli, tmp_path: Path) -> None:
    called = tune()
    assert called.code == 0, called.err
    for told in ("rows: 20 train, 10 validation, 10 test; classes negative, positive", "4 steps over 20 rows", "loss"):
        assert told in called.err
    for told in ("validation", "test", "95 % interval", "prompts/reviews", "runs/reviews/report.html"):
        assert told in called.out
    assert "softprompt run prompts/reviews" in called.out
    assert set(os.listdir("runs/reviews")) >= {"config.yaml", "metrics.jsonl", "report.html", "result.json"}
    prompt = SoftPrompt.load("prompts/reviews")
    assert prompt.tokens == 3
    assert 0 <= prompt.metrics["test"]["accuracy"] <= 1


def test_json_is_one_document(tune: Cli) -> None:
    called = tune("--json")
    assert called.code == 0
    assert called.json["prompt"] == "prompts/reviews"
    assert called.json["test"]["rows"] == 10
    assert called.json["steps"] == 4
    assert "4 steps over" in called.err


def test_quiet(tune: Cli) -> None:
    called = tune("--quiet")
    assert "steps over" not in called.err
    assert "prompts/reviews" in called.out


def test_config_file_and_its_copy_in_the_run(cli: Cli, model_folder: str, train_file: Path, tune: Cli) -> None:
    config = {"model": model_folder, "train": str(train_file), "input": TEMPLATE[1], "target": TEMPLATE[3]}
    config |= {"labels": ["negative", "positive"], "tokens": 9, "steps": 4, "shares": [0.5, 0.25, 0.25]}
    Path("c.yaml").write_text(json.dumps({**config, "precision": "float32"}))
    by_file = cli("tune", "c.yaml", "tokens=3", "out=prompts/one", "run=runs/one")
    assert by_file.code == 0, by_file.err
    again = cli("tune", "runs/one/config.yaml", "out=prompts/two", "run=runs/two")
    assert again.code == 0, again.err
    assert tune("--out", "prompts/three").code == 0
    one, two, three = (Path(f"prompts/{n}/adapter_model.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two == three


def test_ctrl_c_and_resume(tune: Cli, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune("--out", "prompts/whole").code == 0
    shown = TuneProgress._on_step

    def interrupt(self: TuneProgress, event: dict[str, object]) -> None:
        shown(self, event)  # type: ignore[arg-type]
        if event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TuneProgress, "_on_step", interrupt)
    stopped = tune("--out", "prompts/parts", "--run", "runs/parts")
    assert stopped.code == 1
    assert "interrupted after step 2; go on with: softprompt tune --resume runs/parts" in stopped.err
    assert not Path("prompts/parts").exists()
    monkeypatch.setattr(TuneProgress, "_on_step", shown)
    resumed = cli("tune", "--resume", "runs/parts")
    assert resumed.code == 0, resumed.err
    assert "going on at step 2 of 4" in resumed.err
    tensor = "adapter_model.safetensors"
    assert Path("prompts/parts", tensor).read_bytes() == Path("prompts/whole", tensor).read_bytes()


def test_resume_with_another_setting(tune: Cli, cli: Cli) -> None:
    assert tune("--out", "prompts/a", "--run", "runs/a").code == 0
    called = cli("tune", "--resume", "runs/a", "--out", "prompts/b", "--seed", 3)
    assert called.code == 2
    assert "was started with another" in called.err


def test_three_mistakes(tune: Cli) -> None:
    called = tune("tokns=3", "--epochs", "-1", "--device", "gpu", "--json")
    assert called.code == 2
    assert called.err.splitlines() == [
        "error: tokns: unknown key; did you mean tokens?",
        "error: epochs: must be greater than 0, found -1",
        "error: device: expected cpu, cuda, cuda:NUMBER or mps, found 'gpu'",
    ]
    assert len(called.json["problems"]) == 3


def test_folder_that_holds_something_else(tune: Cli) -> None:
    os.makedirs("mine")
    Path("mine/thesis.tex").write_text("x")
    called = tune("--out", "mine")
    assert called.code == 2
    assert "error: out: mine holds something that is not a prompt (thesis.tex): choose another folder" in called.err


def test_prompt_is_replaced_only_when_asked(tune: Cli) -> None:
    assert tune("--init", "random").code == 0
    refused = tune()
    assert refused.code == 2
    assert "already holds a prompt" in refused.err
    assert tune("--overwrite").code == 0
    assert Path("runs/reviews-2/report.html").exists()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "is empty"),
        (
            [{"text": "x", "label": "negative"}, {"text": "y", "label": "mixed"}],
            "label 'mixed' of row 2 is not in labels",
        ),
        ([{"text": "x", "label": "negative"}] * 9, "the one class 'negative'"),
        ([{"text": "x", "label": "negative"}, {"text": " ", "label": "positive"}], "row 2"),
    ],
)
def test_bad_rows(tune: Cli, train_file: Path, rows: list[dict[str, str]], expected: str) -> None:
    write_rows(train_file, rows)
    called = tune()
    assert called.code == 1
    assert called.err.startswith("error: ")
    assert expected in called.err
    assert len(called.err.splitlines()) == 1


def test_row_that_does_not_parse(tune: Cli, train_file: Path) -> None:
    train_file.write_text('{"text": "a", "label": "positive"}\n{"text": "b", "label"\n')
    called = tune()
    assert called.code == 1
    assert "line 2" in called.err


def test_more_tokens_than_the_context(tune: Cli) -> None:
    called = tune("--tokens", 200)
    assert called.code == 2
    assert "200 soft tokens leave no room for text in 128 tokens" in called.err
    assert not Path("runs/reviews").exists()


def test_texts_longer_than_the_context_are_cut_and_counted(tune: Cli, train_file: Path) -> None:
    rows = reviews()
    for row in rows:
        row["text"] *= 9
    write_rows(train_file, rows)
    called = tune()
    assert called.code == 0, called.err
    assert "warning: 20 of 20 training rows were cut to fit" in called.err


def test_prompt_for_another_width_as_start(tune: Cli, tuned: Path) -> None:
    called = tune("--init", f"prompt:{tuned / 'prompts/reviews'}")
    assert called.code == 0, called.err


def test_no_space(tune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 << 20, 99 << 20, 1 << 20))
    called = tune()
    assert called.code == 1
    assert "only 1 MiB free at" in called.err


def test_model_that_is_not_causal(tune: Cli, model_folder: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "encoder")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    called = tune("--model", other)
    assert called.code == 1
    assert "expected a causal language model" in called.err


def test_debug_shows_the_traceback(tune: Cli, train_file: Path) -> None:
    write_rows(train_file, [{"text": "x", "label": "negative"}] * 9)
    with pytest.raises(Exception, match="the one class"):
        tune("--debug")


def test_free_text(cli: Cli, model_folder: str) -> None:
    write_rows(Path("t.jsonl"), [{"q": f"say {i}", "a": f"{i}"} for i in range(20)])
    called = cli(
        *("tune", "--model", model_folder, "--train", "t.jsonl", "--input", "{q}{soft}:", "--target", " {a}"),
        *(*QUICK, "--out", "p", "--max-new-tokens", 4),
    )
    assert called.code == 0, called.err
    assert "ROUGE-L" in called.out


def test_chat(cli: Cli, model_folder: str, train_file: Path) -> None:
    chat = "[{role: user, content: '{soft}{text}'}]"
    called = cli(
        *("tune", "--model", model_folder, "--train", train_file, "--chat", chat, "--target", "{label}"),
        *("--labels", "negative,positive", *QUICK),
    )
    assert called.code == 0, called.err
    assert not Path("prompts/reviews/adapter_config.json").exists()
