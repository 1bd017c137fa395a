"""The config: YAML, key=value and flags are the same thing; every mistake is told, all at once, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_material import write_rows

from softprompt.config import RunConfig, fields_by_panel, load_config
from softprompt.errors import ConfigError

GOOD = ["model=some/model", "input={soft}{text}", "target= {label}"]


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "reviews.jsonl", [{"text": "a", "label": "x", "film": "f"}])
    return [*GOOD, "train=reviews.jsonl"]


def problems(*overrides: str, path: Path | None = None, **flags: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, flags)
    return error.value.problems


def test_three_ways_are_the_same_thing(good: list[str], tmp_path: Path) -> None:
    by_override = load_config(None, [*good, "tokens=7", "learning_rate=1e-2", "labels=[x, y]", "stratify=false"])
    pairs = dict(text.split("=", 1) for text in good)
    flags = {**pairs, "tokens": "7", "learning_rate": "0.01", "labels": "x,y", "stratify": False}
    by_flag = load_config(None, [], flags)
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: some/model\ntrain: reviews.jsonl\ninput: '{soft}{text}'\ntarget: ' {label}'\n"
        "tokens: 7\nlearning_rate: 1e-2\nlabels: [x, y]\nstratify: false\n"
    )
    assert by_override == by_flag == load_config(file)


def test_later_wins(good: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tokens: 1\nseed: 1\nclip: 1\n")
    config = load_config(file, [*good, "seed=2", "clip=2"], {"clip": "3"})
    assert (config.tokens, config.seed, config.clip) == (1, 2, 3.0)


def test_names_are_filled_in(good: list[str], tmp_path: Path) -> None:
    config = load_config(None, good)
    assert (config.name, config.out, config.run) == ("reviews", "prompts/reviews", "runs/reviews")
    (tmp_path / "runs/reviews").mkdir(parents=True)
    assert load_config(None, good).run == "runs/reviews-2"
    assert load_config(None, [*good, "out=p/q"]).name == "q"


def test_written_and_read_back(good: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*good, "labels={x: ' a', y: 'b, c'}", "target={label}", "shares=0.5,0.2,0.3"])
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.labels == {"x": " a", "y": "b, c"}


def test_texts_are_taken_as_they_are(good: list[str]) -> None:
    config = load_config(None, [*good, "input={soft}# {text}: yes", "target= [{label}]", "name=2026-11-21"])
    assert (config.input, config.target, config.name) == ("{soft}# {text}: yes", " [{label}]", "2026-11-21")


def test_yes_and_no_are_texts_in_labels(good: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("labels: [no, yes]\n")
    assert load_config(file, good).labels == ["no", "yes"]
    assert load_config(None, [*good, "labels={0: no, 1: yes}"]).labels == {"0": "no", "1": "yes"}
    assert "quote it" in problems(*good, "labels=[true, false]")[0]


def test_all_mistakes_at_once(good: list[str]) -> None:
    found = problems(*good, "tokens=0", "lerning_rate=1", "optimizer=adam", "init=txt", "train=reviws.jsonl")
    assert found == [
        "lerning_rate: unknown key; did you mean learning_rate?",
        "tokens: must be greater than or equal to 1, found 0",
        "optimizer: must be 'adamw' or 'adafactor', found 'adam'; did you mean adamw?",
        "train: no file reviws.jsonl; did you mean reviews.jsonl?",
        "init: unknown initialiser 'txt'; expected text, examples, labels, vocabulary, random or prompt:PATH; "
        "did you mean text?",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokens=2000"], "tokens: must be less than or equal to 1024, found 2000"),
        (["tokens=many"], "tokens: must be a valid integer, found 'many'"),
        (["tokens=true"], "tokens: must not be true or false"),
        (["tokens"], "tokens: expected key=value, as tokens=20"),
        (["epochs=[1"], "epochs: cannot read '[1' as YAML"),
        (["shares=0.5,0.6,0.1"], "shares: must be three numbers (train, validation, test) that sum to 1"),
        (["shares=.8,.2"], "shares: must be three numbers"),
        (["input={text"], "template: '{' "),
        (["input={soft}{txt}"], "train: no column 'txt' (for the template) in reviews.jsonl; it has text, label, film"),
        (["group_by=movie"], "train: no column 'movie' (for group_by) in reviews.jsonl; it has text, label, film"),
        (["target="], "template: the template has no target"),
        (["labels=x"], "template: labels need at least two classes"),
        (["labels=3"], "labels: must be a list of classes, or class: label word pairs"),
        (["chat=[{role: user}]"], "chat: must be a list of turns"),
        (["input=null", "chat=[{role: poet, content: '{text}'}]"], "template: unknown chat role 'poet'"),
        (["input=null"], "input: missing; give the text that the model reads"),
        (["init=prompt:"], "init: 'prompt:' needs the folder of a prompt"),
        (["init=prompt:nowhere"], "init: no prompt folder nowhere"),
        (["init=labels"], "init: labels needs labels"),
        (["init=random", "init_text=x"], "init_text: is only used with init=text, found init=random"),
        (["max_tokens=20"], "tokens: 20 soft tokens leave no room for text in max_tokens=20"),
        (["device=gpu"], "device: expected cpu, cuda, cuda:NUMBER or mps, found 'gpu'"),
        (["model=./nowhere"], "model: no file or folder ./nowhere"),
        (["out=reviews.jsonl"], "out: reviews.jsonl is a file; choose another folder"),
        (["out=reviews.jsonl/x"], "out: cannot make reviews.jsonl/x: reviews.jsonl is a file"),
        (["out=full"], "out: full holds something that is not a prompt"),
        (["run=full"], "run: full holds something that is not a run; choose another run folder"),
        (["run=before"], "run: before holds a run already; go on with it (--resume before) or choose another"),
        (["resume=full"], "resume: full is not the folder of a run started here: it has no config.yaml"),
        (["validation=data/v.csv"], "validation: no file data/v.csv; there is no folder data either"),
    ],
)
def test_one_mistake(good: list[str], tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("x")
    (tmp_path / "before").mkdir()
    (tmp_path / "before/run.json").write_text("{}")
    found = problems(*good, *overrides)
    assert len(found) == 1, found
    assert found[0].startswith(expected)


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [line.split(";")[0] for line in problems()] == [
        "model: missing",
        "train: missing",
        "target: missing",
        "input: missing",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokens: 1\nseed: 2\ntokens: 3\n", "tokens: stands twice, in line 1 and line 3; keep one"),
        ("tokens: [1\n", "config file c.yaml, line 2: not YAML"),
        ("- a\n", "config file c.yaml holds a list, expected 'key: value' lines"),
        ("!!python/object/apply:os.system ['echo']\n", "config file c.yaml, line 1: not YAML"),
        ("labels: {x: a, y: b, x: c}\n", "x: stands twice, in line 1 and line 1; keep one"),
    ],
)
def test_bad_files(good: list[str], tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert problems(*good, path=Path("c.yaml"))[0].startswith(expected)


def test_resume_of_a_run_from_python(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: x\ntuning: {tokens: 3}\n")
    assert "was started from Python" in problems("resume=.")[0]


def test_no_file(good: list[str]) -> None:
    assert problems(*good, path=Path("no.yaml")) == ["no config file no.yaml"]


def test_every_field_is_described_and_has_a_panel() -> None:
    assert all(field.description for field in RunConfig.model_fields.values())
    placed = [key for keys in fields_by_panel().values() for key in keys]
    assert sorted(placed) == sorted(RunConfig.model_fields)


def test_neither_help_nor_config_load_torch() -> None:
    code = "import sys; from softprompt.cli.main import main; import softprompt.config; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, stdout=-1, check=True)
    assert told.stdout.decode().strip() == "False"


def test_from_is_another_way_to_write_init(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    config = load_config(None, [*good, "out=prompts/new"], {"from_prompt": "auto"})
    assert config.init == "auto:prompts" and config.from_prompt is None
    (tmp_path / "other").mkdir()
    assert load_config(None, [*good, "from_prompt=other"]).init == "prompt:other"
    assert "init: no prompt folder elsewhere" in problems(*good, "from_prompt=elsewhere")
    assert "init: no folder nowhere of prompts to choose from; as auto:prompts" in problems(*good, "init=auto:nowhere")
