"""`softprompt compare`: one command, one config, files and tables; stopped and gone on with; wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_material import Called, reviews, write_rows

Cli = Callable[..., Called]


@pytest.fixture
def config(tmp_path: Path, model_folder: str) -> Path:
    rows = reviews(60)
    write_rows(tmp_path / "train.jsonl", rows[:30])
    write_rows(tmp_path / "validation.jsonl", rows[30:40])
    write_rows(tmp_path / "test.jsonl", rows[40:])
    data: dict[str, Any] = {
        "model": model_folder,
        "precision": "float32",
        "isolate": False,
        "steps": 2,
        "batch_size": 4,
        "methods": ["zero-shot", "few-shot", "prompt", "deep", "lora", "peft-prompt", "full"],
        "settings": {"prompt": {"tokens": 4}, "deep": {"tokens": 4}, "peft-prompt": {"tokens": 4}},
        "learning_rates": {"lora": [1e-3], "full": [1e-4]},
        "tasks": {
            "films": {
                **{name: f"{name}.jsonl" for name in ("train", "validation", "test")},
                "input": "{soft}Review: {text}\nSentiment:",
                "target": " {label}",
                "labels": ["negative", "positive"],
            }
        },
    }
    path = tmp_path / "films.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_all_methods_then_nothing_left_to_do(cli: Cli, config: Path, tmp_path: Path) -> None:
    called = cli("compare", config, "--out", "results")
    assert called.code == 0, called.err
    for method in ("zero-shot", "few-shot", "prompt", "deep", "lora", "peft-prompt", "full"):
        assert method in called.out
    assert "cell 1/7" in called.err and "left" in called.err
    summary = json.loads((tmp_path / "results/summary.json").read_text())
    assert len(summary["cells"]) == 7 and all(cell["status"] == "done" for cell in summary["cells"])
    assert (tmp_path / "results/report.html").exists() and (tmp_path / "results/results.csv").exists()
    again = cli("compare", config, "--out", "results", "--json")
    assert again.code == 0 and "7 cells, 7 finished before" in again.err
    assert again.json["cells"] == summary["cells"]
    shown = cli("compare", config, "--out", "results", "--no-run", "--methods", "lora", "--json")
    assert [cell["method"] for cell in shown.json["cells"]] == ["lora"]


def test_a_process_for_each_cell(cli: Cli, config: Path, tmp_path: Path) -> None:
    called = cli("compare", config, "isolate=true", "--methods", "prompt", "--out", "results", "--json")
    assert called.code == 0, called.err
    (cell,) = called.json["cells"]
    assert cell["status"] == "done" and cell["steps"] == 2
    if cell["peak_memory_bytes"] is not None:
        assert cell["peak_memory_bytes"] >= cell["memory_before_bytes"] > 10e6


def test_free_text_with_references_in_the_test_rows_alone(cli: Cli, config: Path, tmp_path: Path) -> None:
    rows = [{"text": f"film {i}", "answer": "a good film"} for i in range(12)]
    write_rows(tmp_path / "plain.jsonl", rows)
    write_rows(tmp_path / "many.jsonl", [{**row, "refs": ["a good film", "a film that is good"]} for row in rows])
    data = yaml.safe_load(config.read_text())
    files = {"train": "plain.jsonl", "validation": "plain.jsonl", "test": "many.jsonl", "references": "refs"}
    texts = {"input": "{soft}{text}:", "target": " {answer}", "metric": "chrf", "max_new_tokens": 8}
    data["tasks"] = {"films": {**files, **texts}}
    config.write_text(yaml.safe_dump(data))
    called = cli("compare", config, "--methods", "zero-shot,prompt,full", "--seeds", 2, "--out", "results", "--json")
    assert called.code == 0, called.err
    cells = {cell["method"]: cell for cell in called.json["cells"]}
    assert cells["prompt"]["metric"] == "chrf" and cells["prompt"]["seeds"] == 2 and cells["zero-shot"]["seeds"] == 1
    assert {cell["test"] for cell in cells.values() if not cell["best"]} == {"bootstrap"}


def test_a_failed_cell_makes_the_command_fail_but_shows_the_others(
    cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = cli(
        "compare", config, "learning_rates.full=[1e30]", "--methods", "zero-shot,full", "--out", "results", "--json"
    )
    assert called.code == 1
    status = {cell["method"]: cell["status"] for cell in called.json["cells"]}
    assert status == {"zero-shot": "done", "full": "failed"}
    assert "give smaller ones in learning_rates" in called.err


def test_wrong_use_is_told_before_a_model_is_loaded(cli: Cli, config: Path) -> None:
    called = cli("compare", config, "epochz=1", "model=/nowhere", "--methods", "lorra", "--json")
    assert called.code == 2
    assert any("did you mean epochs?" in line for line in called.json["problems"])
    called = cli("compare", config, "model=/nowhere", "--methods", "lorra", "--json")
    assert called.code == 2
    assert len(called.json["problems"]) == 2
    assert cli("compare", config, "--tasks", "sst2").code == 2
    assert cli("compare", config, "--no-run", "--out", "empty").code == 2
    assert cli("compare", "nowhere.yaml").code == 2
    assert cli("compare").code == 2


def test_interrupted_and_gone_on_with(cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from softprompt.comparison import cell as cells

    real = cells.run_cell

    def stopped(config: Any, cell: Any, *more: Any, **keys: Any) -> Any:
        if cell.method == "prompt":
            raise KeyboardInterrupt
        return real(config, cell, *more, **keys)

    monkeypatch.setattr(cells, "run_cell", stopped)
    called = cli("compare", config, "--methods", "zero-shot,prompt", "--out", "results")
    assert called.code == 1 and "the same command goes on" in called.err
    monkeypatch.setattr(cells, "run_cell", real)
    called = cli("compare", config, "--methods", "zero-shot,prompt", "--out", "results")
    assert called.code == 0 and "2 cells, 1 finished before" in called.err
