"""Several runs step by step: all ask for their gradients, and those that can share a pass are computed by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from ..backbone import Backbone
from ..computation import LossAndGradient
from ..shared_passes import losses_and_gradients
from .loop import GradientRequest
from .sweep_trial import Trial


def sharing_pays(backbone: Backbone) -> bool:
    """Whether runs are much faster together. Not on a CPU, where the matrix products of one batch keep all cores at
    work: a pass of several trials takes nearly as long as their passes (docs/log.md). An accelerator waits for its
    next operation."""
    return backbone.device.type != "cpu"


def turns(trials: Sequence[Trial], together: bool) -> list[list[Trial]]:
    """Which of `trials` are advanced together, group after group."""
    return [list(trials)] if together else [[trial] for trial in trials]


def advance(
    trials: Sequence[Trial],
    share: float,
    asked: Callable[[], bool],
    ended: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Train each of `trials`, which have one backbone, up to `share` of its steps or until `asked` says to stop. Their
    steps share passes. A loss that is not finite ends one trial and not the others. ended: told of each trial when its
    stretch is over."""
    backbone = trials[0].run.backbone
    with ExitStack() as stack:
        courses = [stack.enter_context(closing(trial.course(share, asked))) for trial in trials]
        found: dict[int, LossAndGradient | None] = dict.fromkeys(range(len(trials)))
        while found:
            requests = {}
            for number, answer in found.items():
                try:
                    requests[number] = courses[number].send(answer)  # type: ignore[arg-type]  # None begins it
                except StopIteration:
                    ended(trials[number])
            found = dict(zip(requests, compute_all(backbone, list(requests.values())), strict=True))


def compute_all(backbone: Backbone, requests: Sequence[GradientRequest]) -> list[LossAndGradient]:
    """What `requests` ask for, in their order. Those of prompts of one shape behind the same first tokens share."""
    groups: dict[Any, list[int]] = {}
    for number, request in enumerate(requests):
        begins = request.rows[0].ids[: request.start]
        alike = (begins, request.vectors.shape, id(request.cache), request.micro_batch_tokens)
        groups.setdefault(alike, []).append(number)
    answers: dict[int, LossAndGradient] = {}
    for numbers in groups.values():
        some = [requests[number] for number in numbers]
        begun = time.perf_counter()
        found = losses_and_gradients(
            backbone,
            [request.rows for request in some],
            [request.vectors for request in some],
            micro_batch_tokens=some[0].micro_batch_tokens,
            start=some[0].start,
            cache=some[0].cache,
        )
        for request in some:
            request.seconds = (time.perf_counter() - begun) / len(some)
        answers.update(zip(numbers, found, strict=True))
    return [answers[number] for number in range(len(requests))]
