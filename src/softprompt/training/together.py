"""Runs that stop at each step to ask for a gradient: those that can share a pass are computed by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import StateCache
from ..backbone import Backbone
from ..computation import LossAndGradient
from ..placement import Row
from ..shared_passes import losses_and_gradients


@dataclass
class GradientRequest:
    """What a step needs: the loss of `rows` and its gradient at `vectors`, that is `loss_and_gradient` with the other
    fields as its arguments. seconds: what that took, of a pass for several the request's share; set by who computed."""

    rows: Sequence[Row]
    vectors: torch.Tensor
    start: int
    cache: StateCache
    micro_batch_tokens: int
    seconds: float = 0.0


# One run, or a stretch of it. Returns why it ended.
Course = Generator[GradientRequest, LossAndGradient, str]


def sharing_pays(backbone: Backbone) -> bool:
    """Whether runs are much faster together. Not on a CPU, where the matrix products of one batch keep all cores at
    work: a pass of several trials takes nearly as long as their passes (docs/log.md). An accelerator waits for its
    next operation."""
    return backbone.device.type != "cpu"


def follow(
    courses: Sequence[Course], backbone: Backbone, ended: Callable[[int], None] = lambda number: None
) -> list[str]:
    """Go through all `courses` side by side, computing what they ask for; returns why each ended. ended: told the
    number of each when it has."""
    reasons = [""] * len(courses)
    with ExitStack() as stack:
        for course in courses:
            stack.enter_context(closing(course))
        found: dict[int, LossAndGradient | None] = dict.fromkeys(range(len(courses)))
        while found:
            requests = {}
            for number, answer in found.items():
                try:
                    requests[number] = courses[number].send(answer)  # type: ignore[arg-type]  # None begins it
                except StopIteration as end:
                    reasons[number] = str(end.value)
                    ended(number)
            found = dict(zip(requests, compute_all(backbone, list(requests.values())), strict=True))
    return reasons


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
