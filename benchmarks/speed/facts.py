"""Where figures come from: commit, machine, versions, and what its matrix products reach."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from softprompt import machine
from softprompt.errors import SoftPromptError

from .cases import PRECISIONS

PEAK_SHAPE = (512, 576, 1536)  # rows, inputs, outputs: a layer of SmolLM2-135M over a batch of short texts
PEAK_SHAPE_CUDA = (16384, 4096, 4096)
PROBE = 0.5  # seconds for each precision


def facts(benchmark: str, model: str, device: str, threads: int) -> dict[str, Any]:
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": benchmark,
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": threads,
        "cpu": cpu_name(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def as_program(main: Callable[[], int | None]) -> None:
    """Run a benchmark and end with its status; what a user can mend is one line, not a traceback."""
    try:
        sys.exit(main())
    except SoftPromptError as error:
        sys.exit(f"error: {error}")


def count(given: str) -> int:
    """For argparse: a number of things, at least one."""
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, not {given}")
    return int(given)


def precision_named(given: str) -> str:
    """For argparse: a precision; auto is what is faster here, as `softprompt.tune` takes it."""
    if given == "auto":
        return str(machine.probe_precision().dtype).removeprefix("torch.")
    if given not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"expected auto, {' or '.join(PRECISIONS)}, not {given}")
    return given


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matrix_peak(precision: str, device: str, threads: int, seconds: float = PROBE) -> float:
    """FLOP/s of x [512, 576] through a layer of weights [1536, 576]: the best pass in `seconds`, of at least one."""
    rows, inputs, outputs = PEAK_SHAPE_CUDA if device == "cuda" else PEAK_SHAPE
    dtype = getattr(torch, precision)
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = (torch.full(s, 0.01, dtype=dtype, device=device) for s in ((rows, inputs), (outputs, inputs)))
        deadline, best = time.perf_counter() + seconds, float("inf")
        while best == float("inf") or time.perf_counter() < deadline:
            begun = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(used)
    return 2 * rows * inputs * outputs / best


def body_parameters(folder: str) -> int:
    """Parameters of the model without token embeddings and output layer, counted without loading a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    outside = {id(p): p.numel() for p in (table, head)}  # one and the same where they are tied
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def keep(document: dict[str, Any], out: str | None) -> None:
    """Write the document to `out`, if given, whole or not at all; also of what is measured so far."""
    if out:
        temporary = Path(f"{out}.part")
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
        temporary.replace(out)


def finish(document: dict[str, Any], out: str | None) -> None:
    """Write the document to `out`, if given, and print it as the last line."""
    keep(document, out)
    print(json.dumps(document), flush=True)
