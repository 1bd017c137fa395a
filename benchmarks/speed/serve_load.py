"""A server under open-loop load: requests come at random times, whatever becomes of those before them."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
) -> tuple[float, float, list[Call]]:
    """Send the calls (model, text) at random times (Poisson), `rate` a second in the mean.

    Returns the seconds until the last one was sent, until the last one had ended, and what became of each.
    """
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

        begun, sent, due = time.perf_counter(), [], 0.0
        for model, text in calls:
            # By the clock and not by the last one sent: a client that is late catches up.
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - begun)))
            sent.append(asyncio.ensure_future(one(model, text)))
            due += draw.expovariate(rate)
        offered = time.perf_counter() - begun
        found = list(await asyncio.gather(*sent))
        return offered, time.perf_counter() - begun, found


def from_outside(
    url: str, rate: float, calls: Sequence[tuple[str, str]], max_tokens: int
) -> tuple[float, float, list[Call]]:
    """`open_loop` in a process of its own: in the server's the engine would hold the client up."""
    asked = json.dumps({"url": url, "rate": rate, "calls": list(calls), "max_tokens": max_tokens})
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the client of the benchmark failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found["offered"], found["seconds"], [Call(**call) for call in found["calls"]]


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
    from softprompt.server.run import Server

    server = Server(service)
    with server.bound() as (url, sockets):
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        thread.start()
        try:
            from_outside(url, capacity, calls[: most // 2], max_tokens)
            return [row(share, *from_outside(url, share * capacity, calls[:most], max_tokens)) for share in SHARES]
        finally:
            server.should_exit = True
            thread.join()


def row(share: float, offered: float, seconds: float, answers: Sequence[Call]) -> dict[str, Any]:
    good = [call for call in answers if call.status == 200]
    gaps = [b - a for call in good for a, b in zip(call.tokens, call.tokens[1:])]
    return {
        "share_of_capacity": share,
        "offered_per_second": len(answers) / offered,
        "served_per_second": len(good) / seconds,
        "accepted": len(good) / len(answers),
        "refused_with_429": sum(call.status == 429 for call in answers) / len(answers),
        "first_token_ms": percentiles([call.tokens[0] for call in good if call.tokens]),
        "between_tokens_ms": percentiles(gaps),
        "whole_ms": percentiles([call.whole for call in good]),
    }


def main() -> int:
    """What `from_outside` runs: the load as JSON on standard input, what became of it on standard output."""
    asked = json.load(sys.stdin)
    offered, seconds, calls = asyncio.run(open_loop(asked["url"], asked["rate"], asked["calls"], asked["max_tokens"]))
    print(json.dumps({"offered": offered, "seconds": seconds, "calls": [asdict(call) for call in calls]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
