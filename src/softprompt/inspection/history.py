"""The events of a run (`metrics.jsonl`) as arrays. Whatever is missing, repeated or not a number is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Event = Mapping[str, Any]


def at_steps(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of one kind in order of their step, the last one of each step (a resumed run repeats some)."""
    found = {event["step"]: event for event in events if event.get("event") == kind and _is_number(event.get("step"))}
    return [found[step] for step in sorted(found)]


def series(events: Sequence[Event], name: str) -> tuple[Array, Array]:
    """(steps [S], values [S]) of those events that hold a finite number under `name`."""
    pairs = [(event["step"], event[name]) for event in events if _is_number(event.get(name))]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def token_series(events: Sequence[Event], name: str, tokens: int) -> tuple[Array, Array]:
    """(steps [S], values [S, P]) of those events that hold P numbers under `name`; a value that is none is NaN."""
    kept = [event for event in events if isinstance(event.get(name), (list, tuple)) and len(event[name]) == tokens]
    rows = [[float(value) if _is_number(value) else math.nan for value in event[name]] for event in kept]
    return np.array([event["step"] for event in kept], dtype=np.float64), np.array(rows).reshape(len(kept), tokens)


def thin(steps: Array, values: Array, most: int) -> tuple[Array, Array]:
    """At most `most` points: means over neighbouring steps, [S] and [S] or [S, P]; the steps are the groups' last."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)
    sums = np.add.reduceat(np.nan_to_num(values), edges[:-1], axis=0)
    counts = np.add.reduceat(np.isfinite(values).astype(np.float64), edges[:-1], axis=0)
    means: Array = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return steps[edges[1:] - 1], means


def smooth(values: Array, width: int) -> Array:
    """Centred running mean over `width` values; fewer at the ends, so that the curve has no lag and no gap."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    mean: Array = (sums[high] - sums[low]) / (high - low)
    return mean


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
