"""Training whose loss is no number, or that is interrupted, for tests of what becomes of it."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from softprompt.training.loop import Trainer


def spoil_losses(monkeypatch: pytest.MonkeyPatch, where: Callable[[Trainer], bool]) -> None:
    """The loss is not a number in each step of a run before which `where` says so."""
    real = Trainer._train_step

    def broken(self, batch, examples):
        step = real(self, batch, examples)
        found = yield next(step)
        if where(self):
            found.loss = math.nan
        try:
            step.send(found)
        except StopIteration:
            return

    monkeypatch.setattr(Trainer, "_train_step", broken)


class interrupt_at:
    """Listens to a run, or several, and interrupts it as Ctrl-C does after so many steps in all. steps: those seen."""

    def __init__(self, count: int):
        self.count, self.steps = count, 0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.steps += 1
            if self.steps == self.count:
                os.kill(os.getpid(), signal.SIGINT)
