"""Training whose loss is no number, for tests of what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable

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
