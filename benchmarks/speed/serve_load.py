"""A server under open-loop load: requests come at random times, whatever becomes of those before them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.server.run import Server
from softprompt.server.service import Service

SHARES = (0.5, 0.9, 10.0)  # offered load as a share of what the engine can do


@dataclass
class Call:
    """One request as the client saw it. tokens: when each came, in seconds since it was sent."""

    status: int
    tokens: list[float]
    whole: float


async def open_loop(
    url: str, rate: float, calls: Sequence[tuple[str, str]], max_tokens: int
) -> tuple[float, list[Call]]:
    """Send the calls (model, text) at random times (Poisson), `rate` a second in the mean; seconds, and the answers."""
    import httpx

    draw = random.Random(2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def one(model: str, text: str) -> Call:
            body = {"model": model, "prompt": text, "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
                    "temperature": 0}  # fmt: skip
            begun = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=body) as got:
                lines = (line async for line in got.aiter_lines() if line.startswith("data: {"))
                tokens = [time.perf_counter() - begun async for _ in lines]
            # The last piece only says why it ended.
            return Call(got.status_code, tokens[:-1], time.perf_counter() - begun)

        begun, sent = time.perf_counter(), []
        for model, text in calls:
            sent.append(asyncio.ensure_future(one(model, text)))
            await asyncio.sleep(draw.expovariate(rate))
        found = list(await asyncio.gather(*sent))
        return time.perf_counter() - begun, found


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(values)
    return {
        f"p{p}": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else None
        for p in (50, 95, 99)
    }


def under_load(
    service: Service, calls: Sequence[tuple[str, str]], max_tokens: int, capacity: float, most: int
) -> list[dict[str, Any]]:
    """A row for each share of `capacity` (requests a second), at most `most` calls each; a first pass warms up."""
    server = Server(service)
    with server.bound() as (url, sockets):
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        thread.start()
        try:
            asyncio.run(open_loop(url, capacity, calls[: most // 2], max_tokens))
            return [
                row(share, share * capacity, *asyncio.run(open_loop(url, share * capacity, calls[:most], max_tokens)))
                for share in SHARES
            ]
        finally:
            server.should_exit = True
            thread.join()


def row(share: float, rate: float, seconds: float, answers: Sequence[Call]) -> dict[str, Any]:
    good = [call for call in answers if call.status == 200]
    gaps = [b - a for call in good for a, b in zip(call.tokens, call.tokens[1:])]
    return {
        "share_of_capacity": share,
        "offered_per_second": rate,
        "served_per_second": len(good) / seconds,
        "accepted": len(good) / len(answers),
        "refused_with_429": sum(call.status == 429 for call in answers) / len(answers),
        "first_token_ms": percentiles([call.tokens[0] for call in good if call.tokens]),
        "between_tokens_ms": percentiles(gaps),
        "whole_ms": percentiles([call.whole for call in good]),
    }
