"""`softprompt evaluate`, `run`, `list`, `import`, `doctor` and the entry point itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_material import TEMPLATE, Called, make_model, reviews, write_rows

from softprompt import SoftPrompt, Template
from softprompt.doctor import Fact

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")


@pytest.fixture
def prompt(tuned: Path) -> str:
    return str(tuned / "prompts/reviews")


@pytest.fixture
def data(tuned: Path) -> str:
    return str(tuned / "reviews.jsonl")


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_tuning_wrote_the_real_report(tuned: Path) -> None:
    assert (tuned / "runs/reviews/report.html").stat().st_size > 10_000


def test_evaluate_takes_the_rows_kept_apart(cli: Cli, prompt: str, data: str) -> None:
    called = cli("evaluate", prompt, data, "--precision", "float32")
    assert called.code == 0, called.err
    assert "taking the test rows that were kept apart" in called.err
    for told in ("accuracy", "balanced accuracy", "macro-F1", "calibration", "majority class", "95 % interval"):
        assert told in called.out
    assert re.search(r"rows +10", called.out)


def test_evaluate_json(cli: Cli, prompt: str, data: str) -> None:
    found = cli("evaluate", prompt, data, "--split", "all", "--json", "--mistakes", 2).json
    assert found["rows"] == 40
    assert found["split"] == "all rows"
    assert 0 <= found["accuracy"] <= 1
    assert len(found["confusion"]) == 2
    assert len(found["mistakes"]) <= 2


def test_evaluate_without_prompt(cli: Cli, prompt: str, data: str, model_folder: str) -> None:
    by_prompt = cli("evaluate", prompt, data, "--no-prompt", "--split", "all", "--json").json
    by_template = cli("evaluate", data, "--no-prompt", "--model", model_folder, *TEMPLATE, "--json").json
    assert by_prompt["prompt"] is None
    assert by_prompt["loss"] == pytest.approx(by_template["loss"])


def test_evaluate_chat(cli: Cli, data: str, model_folder: str) -> None:
    chat = "[{role: user, content: 'Review: {text}'}]"
    template = ("--chat", chat, "--target", "{label}", "--labels", "negative,positive")
    called = cli("evaluate", data, "--no-prompt", "--model", model_folder, *template, "--shots", 1, "--json")
    assert called.code == 0, called.err
    assert called.json["rows"] == 39


def test_evaluate_shots_are_not_evaluated_on(cli: Cli, data: str, model_folder: str) -> None:
    found = cli("evaluate", data, "--no-prompt", "--model", model_folder, *TEMPLATE, "--shots", 2, "--json").json
    assert (found["rows"], found["shots"]) == (38, 2)


def test_evaluate_calibrated(cli: Cli, prompt: str, data: str) -> None:
    assert cli("evaluate", prompt, data, "--calibrate", "--json").json["calibrated"] is True


def test_evaluate_says_when_rows_were_trained_on(cli: Cli, model_folder: str) -> None:
    write_rows(Path("train.jsonl"), reviews())
    write_rows(Path("test.jsonl"), reviews(20))
    made = cli(
        *("tune", "--model", model_folder, "--train", "train.jsonl", "--validation", "test.jsonl"),
        *("--test", "test.jsonl", *TEMPLATE, "--tokens", 2, "--steps", 1, "--out", "p"),
    )
    assert made.code == 0, made.err
    assert "very rows that the prompt was tuned on" in cli("evaluate", "p", "train.jsonl").err
    assert "very rows" not in cli("evaluate", "p", "test.jsonl").err


def test_evaluate_many_classes(cli: Cli, model_folder: str) -> None:
    write_rows(Path("t.jsonl"), [{"text": f"x{i}", "label": f"c{i % 15}"} for i in range(45)])
    labels = ",".join(f"c{i}" for i in range(15))
    called = cli(
        *("evaluate", "t.jsonl", "--no-prompt", "--model", model_folder),
        *("--input", "{text}:", "--target", " {label}", "--labels", labels),
    )
    assert called.code == 0, called.err
    assert "most frequent confusions" in called.out


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["p.jsonl"], 2, "evaluate takes PROMPT DATA (or --no-prompt DATA), found 1"),
        (["p.jsonl", "--no-prompt"], 2, "template: missing; give --input and --target"),
        (["p.jsonl", "--no-prompt", "--input", "{text}"], 2, "target: missing"),
        (["p.jsonl", "--no-prompt", "--chat", "[", "--target", "x"], 2, "template: not YAML"),
        (["p.jsonl", "--no-prompt", "--chat", "[1]", "--target", "x"], 2, "template: "),
        (["p.jsonl", "--no-prompt", "--input", "{text}", "--target", "{label}"], 2, "model: missing"),
        (["p.jsonl", "--no-prompt", "--input", "{texts}", "--target", "{label}"], 1, "has no column 'texts'"),
        (["PROMPT", "p.jsonl", "--precision", "int8"], 2, "precision: expected auto, float32"),
        (["PROMPT", "p.jsonl", "--device", "gpu"], 2, "device: expected cpu, cuda"),
        (["nowhere", "p.jsonl"], 1, "no prompt folder nowhere"),
        (["PROMPT", "nowhere.csv"], 1, "no such file: nowhere.csv"),
        (["PROMPT", "p.jsonl", "--split", "dev"], 2, "split: expected all, train, validation, test, found 'dev'"),
        (["PROMPT", "p.jsonl", "--model", "OTHER"], 1, "the prompt was tuned for"),
    ],
)
def test_evaluate_mistakes(
    cli: Cli, prompt: str, tmp_path: Path, arguments: list[str], code: int, expected: str
) -> None:
    write_rows(Path("p.jsonl"), reviews(6))
    if "OTHER" in arguments:
        make_model(tmp_path / "other", seed=1)
    named = {"PROMPT": prompt, "OTHER": tmp_path / "other"}
    called = cli("evaluate", *(named.get(each, each) for each in arguments))
    assert called.code == code
    assert called.err.splitlines()[-1].startswith("error: ")
    assert expected in called.err


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_on_a_text(cli: Cli, prompt: str) -> None:
    called = cli("run", prompt, "film was good")
    assert called.code == 0, called.err
    assert re.search(r"(negative|positive) +0\.\d{3}", called.out)
    named = cli("run", prompt, "text=film was good", "--json").json
    piped = cli("run", prompt, "--json", stdin="film was good\n").json
    assert named == piped
    row = piped["rows"][0]
    assert row["fields"] == {"text": "film was good"}
    assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_run_on_files(cli: Cli, prompt: str) -> None:
    Path("lines.txt").write_text("film was good\n\nfilm was bad\n")
    Path("rows.csv").write_text("text,label\nfilm was good,\nfilm was bad,\n")
    by_lines = cli("run", prompt, "--file", "lines.txt", "--json").json
    by_csv = cli("run", prompt, "--file", "rows.csv", "--json").json
    by_pipe = cli("run", prompt, "--file", "-", "--json", stdin="film was good\nfilm was bad\n").json
    assert by_lines["rows"] == by_csv["rows"] == by_pipe["rows"]
    assert len(by_lines["rows"]) == 2
    assert re.match(r"(negative|positive)\t0\.\d{3}\tfilm was good\n", cli("run", prompt, "--file", "lines.txt").out)


@pytest.fixture
def talker(cli: Cli, model_folder: str) -> str:
    write_rows(Path("t.jsonl"), [{"q": f"say {i}", "who": "x", "a": f"{i}"} for i in range(20)])
    made = cli(
        *("tune", "--model", model_folder, "--train", "t.jsonl", "--input", "{who}: {q}{soft}:", "--target", " {a}"),
        *("--tokens", 3, "--steps", 1, "--shares", "0.8,0.2,0", "--out", "talker", "--precision", "float32"),
    )
    assert made.code == 0, made.err
    return "talker"


def test_run_generates(cli: Cli, talker: str) -> None:
    options = ("--max-new-tokens", 8, "--precision", "float32")
    streamed = cli("run", talker, "who=a", "q=say it", *options)
    assert streamed.code == 0, streamed.err
    write_rows(Path("rows.jsonl"), [{"who": "b", "q": "say"}, {"who": "a", "q": "say it"}])
    batch = cli("run", talker, "--file", "rows.jsonl", "--json", *options).json["rows"]
    assert streamed.out.strip() == batch[1]["text"]
    sampled = [cli("run", talker, "who=a", "q=b", "--temperature", 2, "--seed", s, *options).out for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["one text"], 2, 'a text cannot fill the fields of this template; give who="..." q="..."'),
        (["who=x"], 2, "the template also needs q=..."),
        ([], 2, "standard input cannot fill the fields"),
        (["--file", "no.txt"], 2, "a file of plain lines cannot fill"),
        (["--file", "no.jsonl"], 1, "no such file: no.jsonl"),
        (["--file", "rows.jsonl"], 1, "row 1 has no column 'q'"),
        (["who=x", "q=y", "--temperature", "-1"], 2, "temperature is -1.0, expected 0 (greedy) or more"),
        (["who=x", "q=y", "--file", "x"], 2, "give either a text or --file, not both"),
    ],
)
def test_run_mistakes(cli: Cli, talker: str, arguments: list[str], code: int, expected: str) -> None:
    write_rows(Path("rows.jsonl"), [{"who": "b"}])
    called = cli("run", talker, *arguments, stdin="some text")
    assert (called.code, called.out) == (code, "")
    assert expected in called.err


def test_run_nothing(cli: Cli, prompt: str) -> None:
    assert "standard input holds no text" in cli("run", prompt, stdin="\n").err
    assert "the text is empty" in cli("run", prompt, " ").err


def test_run_refuses_a_damaged_prompt(cli: Cli, prompt: str) -> None:
    shutil.copytree(prompt, "damaged")
    tensor = Path("damaged/adapter_model.safetensors")
    tensor.write_bytes(tensor.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    called = cli("run", "damaged", "x")
    assert called.code == 1
    assert "NaN" in called.err or "changed after the prompt was saved" in called.err


# --- list, import, doctor --------------------------------------------------------------------------------------------


def test_list(cli: Cli, tuned: Path) -> None:
    called = cli("list", tuned / "prompts")
    assert "reviews" in called.out
    assert "accuracy" in called.out
    assert cli("list", tuned, "--json").json["prompts"][0]["tokens"] == 4
    Path("empty").mkdir()
    assert "no prompts in empty" in cli("list", "empty").out
    assert "no folder prompts; tune a prompt first" in cli("list").err


def test_import(cli: Cli, prompt: str, data: str, model_folder: str) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        Path("adapter").mkdir(exist_ok=True)
        shutil.copy(Path(prompt, name), Path("adapter", name))
    bare = cli("import", "adapter", "bare")
    assert bare.code == 0, bare.err
    assert "it has no template" in bare.err
    assert "give --input and --target" in cli("run", "bare", "x").err
    whole = cli("import", "adapter", "whole", "--model", model_folder, *TEMPLATE, "--json")
    assert whole.json["tokens"] == 4
    made = SoftPrompt.load("whole")
    assert made.fingerprint == SoftPrompt.load(prompt).fingerprint
    assert made.template == Template.make(TEMPLATE[1], TEMPLATE[3], labels=["negative", "positive"])
    theirs, ours = (cli("evaluate", p, data, "--split", "all", "--json").json for p in ("whole", prompt))
    assert theirs["loss"] == ours["loss"]
    assert "already holds a prompt" in cli("import", "adapter", "whole").err


def test_import_for_another_width(cli: Cli, prompt: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", width=64)
    called = cli("import", prompt, "x", "--model", other)
    assert called.code == 1
    assert "the prompt is 32 wide" in called.err


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import softprompt.doctor

    monkeypatch.setattr(softprompt.doctor, "doctor_facts", lambda: [Fact("python", "3")])
    good = cli("doctor")
    assert good.code == 0
    assert "nothing is wrong" in good.out
    monkeypatch.setattr(softprompt.doctor, "doctor_facts", lambda: [Fact("python", "3"), Fact("disk", "0 GB", "full")])
    bad = cli("doctor", "--json")
    assert bad.code == 1
    assert bad.json["ok"] is False
    assert bad.json["facts"][1] == {"name": "disk", "value": "0 GB", "problem": "full"}


# --- the entry point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tune", "--tokns", "5"], "error: no such option: --tokns"),
        (["evlauate"], "error: no such command 'evlauate'. Did you mean 'evaluate'?"),
        (["run"], "error: missing argument"),
        (["tune", "--tokens"], "error: option '--tokens' requires an argument"),
    ],
)
def test_wrong_use(cli: Cli, arguments: list[str], expected: str) -> None:
    called = cli(*arguments)
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith(expected)
    assert len(called.err.splitlines()) == 1


def test_options_before_the_command(cli: Cli) -> None:
    assert json.loads(cli("--json", "list", "nowhere").out)["error"].startswith("no folder nowhere")


@pytest.mark.parametrize("name", ["tune", "evaluate", "run", "list", "import", "demo", "doctor"])
def test_help(cli: Cli, name: str) -> None:
    called = cli(name, "--help")
    assert called.code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in called.out


def test_tune_help_has_every_setting(cli: Cli) -> None:
    from softprompt.config import RunConfig

    shown = cli("tune", "--help").out
    options = {
        key: "--from" if key == "from_prompt" else f"--{key.replace('_', '-')}" for key in RunConfig.model_fields
    }
    missing = [key for key, option in options.items() if option not in shown]
    assert not missing


def test_version(cli: Cli) -> None:
    assert re.fullmatch(r"softprompt \d+\.\d+\.\d+\n", cli("--version").out)


def test_unexpected_errors_are_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Any) -> None:
        raise RuntimeError("odd\nthing")

    import softprompt.library

    monkeypatch.setattr(softprompt.library, "list_prompts", broken)
    called = cli("list", ".")
    assert called.code == 1
    assert called.err == "error: RuntimeError: odd thing (not an error that softprompt expects; --debug shows more)\n"
