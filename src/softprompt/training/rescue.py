"""A run that has left the valley it was in goes back to it.

Now and then a few large steps carry the vectors to where the model no longer answers and where no gradient leads back
(one run of fourteen of 250 steps, docs/log.md). Such a run is worth nothing at its end, and what it had learned before
is still there: the vectors at which the loss was lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# A loss of few examples is noise: it is judged by its mean over this many, and over four batches at least.
EXAMPLES, BATCHES = 128, 4
# How far above the lowest mean is too far: this many times, and nats more. Tasks that are learned well have lowest
# means near zero, so a ratio alone would see a fall in noise.
RATIO, NATS = 2.0, 0.25
PREFIX = "valley."  # of the names of its tensors in a checkpoint


class Valley:
    """Where the mean loss over the last `window` steps was lowest.

    recent: the last losses, at most `window`. lowest: the lowest mean so far (inf before the first whole window), at
    step `step` with these `parameters`, by name.
    """

    def __init__(self, batch_size: int):
        self.window = max(BATCHES, math.ceil(EXAMPLES / batch_size))
        self.recent: list[float] = []
        self.lowest = math.inf
        self.step = 0
        self.parameters: dict[str, torch.Tensor] = {}

    def note(self, loss: float, step: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the loss of a batch in, with the parameters that gave it, before they are moved."""
        self.recent = [*self.recent, loss][-self.window :]
        if len(self.recent) == self.window and self.mean < self.lowest:
            self.lowest, self.step = self.mean, step
            self.parameters = {name: parameter.detach().clone() for name, parameter in parameters}

    @property
    def mean(self) -> float:
        return math.fsum(self.recent) / len(self.recent)

    @property
    def left(self) -> bool:
        """Whether the loss has risen so far above its lowest that the run will hardly come back by itself."""
        return len(self.recent) == self.window and self.mean > RATIO * self.lowest + NATS

    # --- for a checkpoint ---------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{PREFIX}{name}": kept for name, kept in self.parameters.items()}

    def facts(self) -> dict[str, Any]:
        lowest = self.lowest if math.isfinite(self.lowest) else None  # JSON has no infinity
        return {"step": self.step, "lowest": lowest, "recent": self.recent}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Be what gave these `facts` and, among others, these `tensors`."""
        self.step, self.recent = facts["step"], facts["recent"]
        self.lowest = math.inf if facts["lowest"] is None else facts["lowest"]
        self.parameters = {name[len(PREFIX) :]: kept for name, kept in tensors.items() if name.startswith(PREFIX)}
