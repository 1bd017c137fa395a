"""Prompts of a few numbers, and a library of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

DESCRIPTION, TENSOR, PEFT = "softprompt.json", "adapter_model.safetensors", "adapter_config.json"


def make(seed: int = 0, **changes: Any) -> SoftPrompt:
    """A prompt of 3 tokens of width 8; another seed, other vectors."""
    fields: dict[str, Any] = {
        "template": Template.make(input="{soft}Review: {text}", target=" {label}", labels=["bad", "good"]),
        "base_model": "someone/model",
        "fingerprint": "f" * 16,
        "provenance": {"made": "2026-11-21T04:00:00+00:00"},
        "metrics": {"accuracy": 0.75},
    }
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(vectors, **{**fields, **changes})


def age(folder: Path, seconds: int = 60) -> None:
    """Make the files look as if they had been written a while ago (their contents' times; ctime cannot be set)."""
    for path in folder.rglob("*"):
        about = path.stat()
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns - seconds * 10**9))


def tree(folder: Path) -> dict[str, bytes]:
    """All files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
