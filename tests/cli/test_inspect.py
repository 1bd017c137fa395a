"""`softprompt inspect`, `similarity`, `diff`, `prune` and `discretize`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_material import Called

from softprompt import SoftPrompt

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")
FLOAT = ("--precision", "float32")


@pytest.fixture
def prompt(tuned: Path) -> str:
    return str(tuned / "prompts/reviews")


@pytest.fixture
def data(tuned: Path) -> str:
    return str(tuned / "reviews.jsonl")


@pytest.fixture
def library(prompt: str, tmp_path: Path) -> Path:
    """The tuned prompt, itself turned around, and one that PEFT could have written."""
    folder = tmp_path / "library"
    first = SoftPrompt.load(prompt)
    first.save(folder / "reviews")
    shutil.copytree(prompt, folder / "again")
    SoftPrompt(first.vectors.flip(0) + 0.002 * torch.randn(4, 32), first.template, first.base_model).save(
        folder / "other"
    )
    (folder / "peft").mkdir()
    shutil.copy(Path(prompt) / "adapter_model.safetensors", folder / "peft")
    shutil.copy(Path(prompt) / "adapter_config.json", folder / "peft")
    return folder


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_a_prompt_alone(cli: Cli, prompt: str, tuned: Path) -> None:
    called = cli("inspect", prompt, "--run", tuned / "runs/reviews", "--report", "r.html", "--pictures", "p", *FLOAT)
    assert called.code == 0, called.err
    assert {path.name for path in Path("p").iterdir()} >= {"reviews-moved.svg", "reviews-gradients.svg"}
    for told in ("nearest words (cosine)", "cosine with start", "norm of a word", "report r.html"):
        assert told in called.out, told
    for told in ("by Euclidean distance", "by dot product", "The gradient of a token was", "in two dimensions"):
        assert told in called.out, told
    assert "evaluating" not in called.err
    assert "<svg" in Path("r.html").read_text()
    found = cli("inspect", prompt, "--run", tuned / "runs/reviews", "--json", *FLOAT).json
    assert len(found["gradients"]["steps"]) == len(found["gradients"]["norms"]) > 0
    assert all(len(row) == 4 and min(row) > 0 for row in found["gradients"]["norms"])
    assert cli("inspect", prompt, "--json", *FLOAT).json["gradients"] is None


def test_inspect_json_with_rows(cli: Cli, prompt: str, data: str) -> None:
    called = cli("inspect", prompt, "--data", data, "--rows", 4, "--changes", "left_out", "--json", *FLOAT)
    assert called.code == 0, called.err
    found = called.json
    assert len(found["importance"]["importance"]) == 4
    assert found["importance"]["first"] == []
    assert len(found["attention"]["layers"]) == 2
    assert found["attention"]["rows"] == 4
    assert len(found["nearest"]["dot"]) == 4
    assert "kept apart" in called.err
    shown = cli("inspect", prompt, "--data", data, "--rows", 4, "--changes", "none", *FLOAT).out
    assert "attention to the prompt" in shown and "most to" in shown


def test_inspect_several_and_a_bare_adapter(cli: Cli, library: Path) -> None:
    called = cli("inspect", library / "other", library / "peft", "--report", "r.html", "--json", *FLOAT)
    assert called.code == 0, called.err
    second = called.json["prompts"][1]
    assert second["template"] is None
    assert any("template" in note for note in second["notes"])
    assert set(called.json["together"]["prompts"]) == {"other", "peft"}
    assert called.json["similarity"]["prompts"] == ["other", "peft"]
    page = Path("r.html").read_text()
    assert 'id="together"' in page and 'id="similarity"' in page


def test_inspect_goes_on_without_a_model(cli: Cli, prompt: str, tmp_path: Path) -> None:
    lost = SoftPrompt.load(prompt)
    lost.base_model = str(tmp_path / "gone")
    lost.save(tmp_path / "lost")
    called = cli("inspect", tmp_path / "lost", *FLOAT)
    assert called.code == 0, called.err
    assert "looking without the model" in called.err
    assert "nearest words: no model" in called.out
    assert cli("inspect", tmp_path / "lost", "--no-model", "--json").json["nearest"] == {}
    assert cli("inspect", tmp_path / "lost", "--data", "x.csv").code == 1


def test_inspect_wrong_use(cli: Cli, prompt: str, tmp_path: Path) -> None:
    assert cli("inspect", prompt, "--changes", "everything").code == 2
    assert cli("inspect", prompt, prompt).code == 2
    assert cli("inspect", prompt, "--run", tmp_path / "nowhere").code == 2
    lost = cli("inspect", prompt, "--data", tmp_path / "none.csv", "--model", tmp_path / "gone")
    assert lost.code == 1 and "none.csv" in lost.err  # found before the model is loaded
    assert cli("inspect", tmp_path).code == 1
    assert cli("inspect", prompt, "--data", "x", "--split", "some").code == 2


# --- similarity -----------------------------------------------------------------------------------------------------


def test_similarity_of_a_library(cli: Cli, library: Path) -> None:
    called = cli("similarity", library, "--report", "s.html", "--pictures", "pictures", *FLOAT)
    assert called.code == 0, called.err
    assert "reviews" in called.out and "other" in called.out
    assert "<svg" in Path("s.html").read_text()
    assert Path("pictures/similar-words.svg").is_file() and Path("pictures/together.svg").is_file()
    found = cli("similarity", library, "--of", "reviews", "--json", *FLOAT).json
    names = [name for name, _ in found["nearest"]]
    assert set(names[:2]) == {"again", "peft"}
    assert found["nearest"][0][1] == pytest.approx(1.0, abs=1e-6)
    assert found["measures"]["words"][found["prompts"].index("reviews")][found["prompts"].index("again")] == 1.0


def test_similarity_by_loss(cli: Cli, library: Path, data: str) -> None:
    called = cli("similarity", library, "--loss", "--rows", 4, "--json", *FLOAT)
    assert called.code == 0, called.err
    found = called.json
    at = {name: i for i, name in enumerate(found["prompts"])}
    assert found["loss"][at["reviews"]][at["again"]] == pytest.approx(found["loss"][at["again"]][at["reviews"]])
    assert found["loss"][at["reviews"]][at["peft"]] is None
    given = cli("similarity", library, "--loss", "--data", f"other={data}", "--rows", 4, "--json", *FLOAT).json
    assert given["loss"][at["reviews"]][at["other"]] is not None
    assert given["loss"][at["reviews"]][at["again"]] is None


def test_similarity_wrong_use(cli: Cli, library: Path, tmp_path: Path) -> None:
    assert cli("similarity", tmp_path / "nowhere").code == 2
    assert cli("similarity", library, "--measure", "best").code == 2
    assert cli("similarity", library, "--measure", "words", "--no-model").code == 2
    assert cli("similarity", library, "--no-model", "--of", "nobody").code == 2
    assert cli("similarity", library, "--loss", "--data", "nobody=x.csv").code == 2


# --- diff, prune, discretize ----------------------------------------------------------------------------------------


def test_diff(cli: Cli, library: Path, data: str) -> None:
    same = cli("diff", library / "reviews", library / "again", "--no-model")
    assert same.code == 0, same.err
    assert "the same 4 vectors" in same.out
    called = cli("diff", library / "reviews", library / "other", "--data", data, "--rows", 6, *FLOAT)
    assert called.code == 0, called.err
    assert "McNemar's exact test" in called.out and "how it was made" in called.out
    found = cli("diff", library / "reviews", library / "other", "--json", "--no-model").json
    assert found["matched_cosine"] > 0.9 and not found["equal_vectors"]


def test_prune(cli: Cli, prompt: str, data: str, tmp_path: Path) -> None:
    arguments = ("--lengths", "3,1", "--steps", 2, "--out", "shorter", *FLOAT)
    called = cli("prune", prompt, data, "--picture", "p/lengths.svg", *arguments)
    assert called.code == 0, called.err
    assert "against the whole" in called.out and "on 10 test rows" in called.out
    assert "tuned again" in Path("p/lengths.svg").read_text("utf-8")
    kept = SoftPrompt.load("shorter")
    assert f"prompt of {kept.tokens} tokens saved in shorter" in called.out
    assert cli("prune", prompt, data, *arguments).code == 1  # it is there already
    assert cli("prune", prompt, data, "--lengths", "9").code == 2
    assert cli("prune", prompt, data, "--lengths", "few").code == 2


def test_discretize(cli: Cli, prompt: str, data: str) -> None:
    called = cli("discretize", prompt, data, "--rounds", 1, "--candidates", 2, "--rows", 4, "--json", *FLOAT)
    assert called.code == 0, called.err
    found = called.json
    names = [line["name"] for line in found["lines"]]
    assert names[:3] == ["soft prompt", "zero-shot (template alone)", "hand-written text"]
    assert found["lines"][2]["text"].startswith("Classify the text as negative or positive")
    assert len(found["ids"]) == 4
    shown = cli("discretize", prompt, data, "--rounds", 0, "--test-rows", 3, "--text", "Good or bad? ", *FLOAT)
    assert "'Good or bad? '" in shown.out and "nearest words" in shown.out
    assert cli("discretize", prompt, data, "--measure", "taste").code == 2


def test_json_is_one_document(cli: Cli, library: Path) -> None:
    for arguments in (("similarity", library, "--no-model"), ("inspect", library / "peft", "--no-model")):
        assert json.loads(cli(*arguments, "--json").out)
