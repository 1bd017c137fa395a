"""A tiny random model with a tokenizer in a folder, tables of examples, and the command line called in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_material import TEMPLATE, Called, make_model, reviews, write_rows

from softprompt.cli.main import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without figures, which would take most of the time."""
    import softprompt.training.run

    def write(folder: Path, *_: object, **__: object) -> Path:
        (folder / "report.html").write_text("<html></html>")
        return folder / "report.html"

    monkeypatch.setattr(softprompt.training.run, "_write_page", write)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Called]:
    """Call `softprompt ARGUMENTS` inside an empty folder, as the entry point does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object, stdin: str = "") -> Called:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Called(int(ended.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "reviews.jsonl", reviews())


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    """Folder with reviews.jsonl, runs/reviews (and its real report) and prompts/reviews, made by `softprompt tune`."""
    folder = tmp_path_factory.mktemp("tuned")
    write_rows(folder / "reviews.jsonl", reviews())
    arguments = ["tune", "--model", model_folder, "--train", str(folder / "reviews.jsonl"), *TEMPLATE, "--quiet"]
    arguments += ["--tokens", "4", "--steps", "4", "--shares", "0.5,0.25,0.25", "--precision", "float32"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(folder / "prompts/reviews"), "--run", str(folder / "runs/reviews")])
    assert not ended.value.code
    return folder
