"""Requests of many tasks for the tests of the engine, and what each of them alone must give."""

from __future__ import annotations

import hashlib

import torch

from softprompt.backbone import Backbone
from softprompt.engine.engine import Engine, EngineLimits
from softprompt.engine.requests import Event, Request, Settings
from softprompt.evaluation.generation import Sampling, generate_tokens
from softprompt.placement import first_soft
from tiny_models import make_backbone, make_tokenizer, random_ids, random_vectors

LABELS = ((5,), (6, 7), (6, 8, 9), (6, 8, 10), (20, 21, 22, 23))


def float_backbone(architecture: str) -> Backbone:
    return make_backbone(architecture, torch.float32, make_tokenizer())


def deep_vectors(backbone: Backbone, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    layers, heads, size = backbone.state_shape
    return torch.randn(layers, 2, heads, tokens, size, generator=generator)


def digest(vectors: torch.Tensor) -> str:
    return hashlib.sha256(vectors.numpy().tobytes()).hexdigest()


def make_request(backbone: Backbone, placement: str, seed: int, settings: Settings, tokens: int = 0, **more) -> Request:
    """A request of a task of its own: front, after_bos, inside, behind, divided, none, deep or deep_inside."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 1 + seed % 5
    text = random_ids(2 + (7 * seed) % 23, generator)
    soft = [-(i + 1) for i in range(tokens)]
    ids, constant = {
        "front": ([*soft, 5, 6, *text], tokens + 2),
        "after_bos": ([1, *soft, *text], tokens + 1),
        "inside": ([1, 7, *text, *soft, 11, 12], 2),
        "behind": ([1, 7, *text, *soft], 2),
        "divided": ([1, 7, *soft[:1], *text, 9, *soft[1:], 4], 3),
        "none": ([1, *text], 1),
        "deep": ([*soft, 5, *text], tokens + 1),
        "deep_inside": ([1, *text, *soft, 11], 1),
    }[placement]
    vectors = None
    if placement.startswith("deep"):
        vectors = deep_vectors(backbone, tokens, seed)
    elif placement != "none":
        vectors = random_vectors(backbone, tokens, seed).float()
    more = {"task": f"{placement}-{seed}", "constant": constant, **more}
    key = digest(vectors) if vectors is not None else ""
    return Request(tuple(ids), vectors, key, settings=settings, **more)


def requests_of_all_kinds(backbone: Backbone, count: int = 12, **more) -> list[Request]:
    kinds = ["front", "after_bos", "inside", "behind", "divided", "none", "deep", "deep_inside"]
    if not backbone.fast:
        kinds.remove("deep_inside")
    return [
        make_request(backbone, kinds[i % len(kinds)], i, Settings(max_new_tokens=4 + i % 9), **more)
        for i in range(count)
    ]


def finish(engine: Engine, ids: list[int]) -> dict[int, list[Event]]:
    """Step until all has ended; the events of each request."""
    found: dict[int, list[Event]] = {id: [] for id in ids}
    for _ in range(10_000):
        if not engine.busy:
            return found
        for event in engine.step():
            found.setdefault(event.id, []).append(event)
    raise AssertionError("the engine does not come to an end")


def tokens_of(events: list[Event]) -> list[int]:
    return [token.id for event in events for token in event.tokens]


def alone(backbone: Backbone, request: Request) -> list[int]:
    """What the request gives by itself, computed without the engine."""
    settings = request.settings
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed or 0)
    ends = sorted(request.ends)
    return [token for _, token in generate_tokens(backbone, [request.ids], request.vectors, sampling, ends=ends)]


def small_limits(**more) -> EngineLimits:
    """So small that requests wait, are read in pieces and meet in every phase."""
    return EngineLimits(**{"rows": 5, "waiting": 100, "step_tokens": 7, **more})


def soft_ends(request: Request) -> int:
    return first_soft(request.ids)
