"""The learning rate over a run: warm-up, then decay to zero."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor for step 0 <= step < steps: rises linearly over the share `warmup`, then linear, cosine or constant.

    The first step already learns (factor > 0) and the last one still does.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    left = (steps - step) / (steps - rising + 1)  # in (0, 1)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
