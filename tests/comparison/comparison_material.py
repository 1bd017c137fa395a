"""What the tests of comparisons are made of: made-up reviews, a tiny backbone, and a config for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from softprompt.backbone import Backbone
from softprompt.comparison.config import ComparisonConfig, check_comparison
from softprompt.comparison.run import plan
from softprompt.comparison.store import Cell
from tiny_models import make_backbone, make_reviews, make_tokenizer

INPUT = "{soft}Review: {text}\nSentiment:"


def tiny_backbone() -> Backbone:
    return make_backbone("llama", torch.float32, make_tokenizer())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_reviews(folder: Path, train: int = 24, validation: int = 8, test: int = 12) -> None:
    for number, (name, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        write_jsonl(folder / f"reviews/{name}.jsonl", make_reviews(count, seed=number))


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """A config of one task of reviews, as plain data."""
    task = {name: f"reviews/{name}.jsonl" for name in ("train", "validation", "test")}
    task |= {"input": INPUT, "target": " {label}", "labels": ["negative", "positive"]}  # type: ignore[dict-item]
    return {
        "model": "tiny",
        "data": str(folder),
        "out": str(folder / "out"),
        "precision": "float32",
        "isolate": False,
        "steps": 3,
        "batch_size": 4,
        "max_tokens": 128,
        "settings": {name: {"tokens": 4} for name in ("prompt", "deep", "prompt-behind", "deep-behind")},
        "methods": ["zero-shot"],
        "tasks": {"reviews": task},
        **more,
    }


def make_config(folder: Path, **more: Any) -> ComparisonConfig:
    write_reviews(folder)
    return check_comparison(settings(folder, **more))


def the_cell(config: ComparisonConfig, method: str) -> Cell:
    return next(cell for cell in plan(config) if cell.method == method)
