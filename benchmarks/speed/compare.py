"""Several sides over the same batches, in turns; medians; equality asserted where the mathematics is the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.linalg import norm

from .process import Side, SideDied, Taken
from .sides import Made, Setting

# Largest difference of loss and gradient, relative to PEFT's. bfloat16 keeps 8 bits, and the two sides round and add
# in different orders through all layers: 0.01 and 0.06 were seen with SmolLM2-135M, 1e-6 and 3e-6 in float32.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.15), "float64": (1e-6, 1e-6)}

Makers = Mapping[str, tuple[Callable[[Setting], Made], Setting]]
Steps = dict[str, list[Taken]]


def take_steps(
    makers: Makers, steps: int, *, together: bool = True, limit: float = float("inf")
) -> tuple[Steps, dict[str, dict[str, Any]]]:
    """Steps 0 to `steps` of all sides; number 0 warms up. Returns them with facts, memory_over_model, failed by side.

    together: all processes live at once and take turns step by step, the first turn changing hands, so that whatever
    else the machine does meets all alike; else one side after the other, for want of memory. limit: seconds after which
    no further step is begun once one has been timed.
    """
    groups = [list(makers)] if together else [[name] for name in makers]
    taken: Steps = {name: [] for name in makers}
    facts: dict[str, dict[str, Any]] = {name: {} for name in makers}
    for group in groups:
        with _started({name: makers[name] for name in group}, facts) as sides:
            begun = time.perf_counter()
            for number in range(steps + 1):
                if number > 1 and time.perf_counter() - begun > limit / len(groups):
                    break
                _turn(sides, number, taken, facts)
            for name, side in sides.items():
                facts[name]["memory"] = side.memory()
    _same_number(taken, facts)
    return taken, facts


def alone(make: Callable[[Setting], Made], setting: Setting, numbers: Sequence[int]) -> tuple[list[Taken], int | None]:
    """Steps `numbers` of one side, and its memory over the model in bytes; for sides of which each has its own work.

    Raises SideDied.
    """
    side = Side(make, setting)
    try:
        side.ready()
        return [side.step(number) for number in numbers], side.memory()
    finally:
        side.end()


@contextmanager
def _started(makers: Makers, facts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Side]]:
    started: dict[str, Side] = {}
    try:
        started |= {name: Side(make, setting) for name, (make, setting) in makers.items()}
        sides = dict(started)
        for name, side in started.items():
            try:
                facts[name] |= side.ready().facts
            except SideDied as death:
                facts[name]["failed"] = str(death)
                del sides[name]
        yield sides
    finally:
        for side in started.values():
            side.end()


def _turn(sides: dict[str, Side], number: int, taken: Steps, facts: dict[str, dict[str, Any]]) -> None:
    names = list(sides)
    for name in names[number % len(names) :] + names[: number % len(names)] if names else []:
        try:
            taken[name].append(sides[name].step(number))
        except SideDied as death:
            facts[name]["failed"] = str(death)
            sides.pop(name).end()


def _same_number(taken: Steps, facts: dict[str, dict[str, Any]]) -> None:
    """All sides over the same batches: cut to what the slowest reached; a side that died has none."""
    for name in taken:
        if "failed" in facts[name]:
            taken[name].clear()
    least = min((len(each) for each in taken.values() if each), default=0)
    for each in taken.values():
        del each[least:]


def check_same(
    taken: Steps, pairs: Sequence[tuple[str, str]], tolerance: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Assert equal loss and gradient of each pair at each step; the largest relative differences by "ours = theirs"."""
    found = {}
    for ours, theirs in pairs:
        if not (taken.get(ours) and taken.get(theirs)):
            continue
        each = [_differences(a, b) for a, b in zip(taken[ours], taken[theirs], strict=True)]
        for number, (loss, gradient) in enumerate(each):
            assert loss <= tolerance[0], f"batch {number}: the losses of {ours} and {theirs} differ by {loss:.2e}"
            assert gradient <= tolerance[1], f"batch {number}: {ours} and {theirs}: gradients differ by {gradient:.2e}"
        most = [float(f"{max(values):.2e}") for values in zip(*each, strict=True)]
        found[f"{ours} = {theirs}"] = {"loss": most[0], "gradient": most[1]}
    return found


def _differences(ours: Taken, theirs: Taken) -> tuple[float, float]:
    loss = abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-12)
    if ours.array is None:
        return loss, 0.0
    return loss, float(norm(ours.array - theirs.array) / norm(theirs.array))


def figures(
    taken: Sequence[Taken],
    examples: Sequence[int],
    tokens: Sequence[int],
    needed: Sequence[int],
    body: int,
    peak: float | None,
    memory: int | None,
) -> dict[str, Any]:
    """Medians over the timed steps (the first step is left out). examples, tokens, needed: of each timed step.

    body: parameters of the model without its embeddings and output layer. peak: FLOP/s that a matrix product reaches.
    utilisation = 4 x body x needed tokens / (seconds x peak): forward and backward to the inputs, 2 FLOP a parameter
    and token each.
    """
    steps = taken[1:]
    seconds = [step.seconds for step in steps]
    median = statistics.median
    used = [4 * body * n / (s * peak) for n, s in zip(needed, seconds)] if peak else []
    return {
        "examples_per_s": round(median(n / s for n, s in zip(examples, seconds)), 3),
        "tokens_per_s": round(median(n / s for n, s in zip(tokens, seconds)), 1),
        "utilisation": round(median(used), 4) if used else None,
        "memory_over_model_mb": None if memory is None else round(memory / 1e6),
        "processor_ms_per_example": round(1000 * sum(s.processor for s in steps) / sum(examples[: len(steps)]), 1),
    }


def ratio(taken: Steps, ours: str, theirs: str) -> dict[str, Any] | None:
    """How many times as fast `ours` is, by step: median and quartiles by the clock, median by processor time."""
    if not (taken.get(ours) and taken.get(theirs)):
        return None
    pairs = list(zip(taken[ours][1:], taken[theirs][1:], strict=True))
    if not pairs:
        return None
    ratios = [b.seconds / a.seconds for a, b in pairs]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "median": round(statistics.median(ratios), 3),
        "quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
        "processor": round(statistics.median(b.processor / a.processor for a, b in pairs), 3),
    }
