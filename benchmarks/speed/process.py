"""A side in a process of its own, asked for one step at a time over a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .sides import Made, Setting

PAUSE = 0.02  # seconds between turns, in which the threads of the side that just worked go to sleep


@dataclass(frozen=True)
class Taken:
    """One step: seconds of the clock, of processors, summed loss, gradient (or whatever array the side gives)."""

    seconds: float
    processor: float
    loss: float
    array: Any = None


class SideDied(Exception):
    """The process ended without an answer; on Linux mostly killed because memory was short."""


def serve(make: Callable[[Setting], Made], setting: Setting, pipe: Connection) -> None:
    """Load one side, then do what the parent asks for: ("step", number), ("memory",), or ("end",)."""
    torch.set_num_threads(setting.threads)
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        _quiet_transformers()
        model, step, facts = make(setting)
        touch(model)
        base = resident(setting.device, fresh=True)
        pipe.send(facts)
        while True:
            asked, *number = pipe.recv()
            if asked == "end":
                return
            if asked == "memory":
                pipe.send(None if base is None else resident(setting.device)[1] - base[0])  # type: ignore[index]
                continue
            pipe.send(_timed(step, number[0], setting.device))
    except EOFError:  # the parent is gone
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{make.__name__}: {type(error).__name__}: {error}"))
        raise


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _timed(step: Callable[[int], tuple[float, Any]], number: int, device: str) -> Taken:
    begun, used = time.perf_counter(), time.process_time()
    loss, array = step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - begun, time.process_time() - used
    if isinstance(array, torch.Tensor):
        array = array.double().cpu().numpy()
    return Taken(seconds, processor, loss, array)


def touch(model: torch.nn.Module) -> None:
    """Read every weight, since those mapped from a file become resident only then; give back what has been freed."""
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].sum()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only with glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident(device: str, fresh: bool = False) -> tuple[int, int] | None:
    """Bytes in use now, and the most since `fresh` was asked for; None where the system does not say."""
    if device == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return None


class Side:
    """The parent's end of one side, whose process starts at once; `ready` waits for it, so that several may load
    together. facts: what the side told about itself when it was ready."""

    def __init__(self, make: Callable[[Setting], Made], setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(make, setting, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}

    def ready(self) -> Side:
        """Raises SideDied, and RuntimeError with what went wrong in the process."""
        self.facts = self._answer()
        return self

    def step(self, number: int) -> Taken:
        return self._ask("step", number)

    def memory(self) -> int | None:
        """Peak bytes over what the loaded model takes."""
        return self._ask("memory")

    def _ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise SideDied(
                f"its process ended (exit code {self.process.exitcode}), perhaps for want of memory"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        time.sleep(PAUSE)
        return answer

    def end(self) -> None:
        with contextlib.suppress(OSError):  # it may have died
            self.pipe.send(("end",))
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
