"""`softprompt demo` with a tiny model and made-up reviews: what it does, shows and leaves behind."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_material import Called, make_model, reviews

import softprompt.demo_data
from softprompt import SoftPrompt

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")


@pytest.fixture
def demo(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    def write(folder: Path, train: int, test: int, seed: int) -> dict[str, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 32), ("validation", 12), ("test", 12)):
            with (folder / f"{split}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ("text", "label", "movie"))
                writer.writeheader()
                writer.writerows({**row, "movie": split} for row in reviews(count))
        return {split: folder / f"{split}.csv" for split in ("train", "validation", "test")}

    monkeypatch.setattr(softprompt.demo_data, "write_movie_reviews", write)
    model = make_model(tmp_path / "model", context=512)
    return lambda *more: cli("demo", "--model", model, *more)


def test_demo(demo: Cli, cli: Cli) -> None:
    called = demo()
    assert called.code == 0, called.err
    for told in ("zero-shot", "4-shot", "soft prompt", "always '", "95 % interval", "Two hours of noise", "in all"):
        assert told in called.out
    assert "no film stands in two of them" in called.err
    assert "metrics" not in called.out
    assert "test" in SoftPrompt.load("demo/prompts/sentiment").metrics
    shown = [line.strip() for line in called.out.splitlines() if line.startswith("  softprompt ")]
    assert len(shown) == 3
    assert cli("evaluate", "demo/prompts/sentiment", "demo/data/test.csv").code == 0
    again = demo("--json")
    assert again.json["files"]["run"] == "demo/runs/sentiment-2"
    assert set(again.json["scores"]) == {"zero-shot", "4-shot", "soft prompt"}
    assert len(again.json["reviews"]) == 3
    more = cli("tune", "demo/runs/sentiment/config.yaml", "tokens=5", "out=prompts/five", "run=runs/five")
    assert more.code == 0, more.err
