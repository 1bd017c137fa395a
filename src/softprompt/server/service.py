"""Between HTTP and the engine's thread: submit, follow, cancel. One event loop, one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from ..engine.engine import Engine, StepStats
from ..engine.requests import Event, Request
from ..engine.tasks import Task
from ..engine.worker import Worker
from .errors import ApiError, unknown_model
from .metrics import Metrics
from .registry import Registry
from .settings import ServerSettings

T = TypeVar("T")
GRACE = 5  # seconds after which a refused client may try again while the server stops


class Service:
    """draining: no new work is taken. over: what was under way is not waited for either. active: requests that are
    being answered."""

    def __init__(self, engine: Engine, registry: Registry, settings: ServerSettings, metrics: Metrics):
        self.engine, self.registry, self.settings, self.metrics = engine, registry, settings, metrics
        self.worker = Worker(engine, self._deliver)
        self.draining = self.over = False
        self.active = 0
        self.started = int(time.time())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[int, asyncio.Queue[Event]] = {}
        # One thread: texts are tokenised off the event loop, and one after the other.
        self._encoding = ThreadPoolExecutor(1, "softprompt-encode")

    @property
    def ready(self) -> bool:
        return not self.draining and self._loop is not None and self.worker.alive()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.metrics.watch(self.engine, self.registry)
        self.worker.start()
        if self.settings.watch:
            self.registry.watch(self.settings.watch)

    async def stop(self) -> None:
        self.draining = True
        await asyncio.to_thread(self.worker.stop)
        await asyncio.to_thread(self.registry.close)
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def end_all(self) -> None:
        """End what is under way: who waits for it is told that the server stops. In the event loop's thread."""
        self.over = True
        self.worker.cancel(list(self._queues))
        for id, queue in self._queues.items():
            queue.put_nowait(Event(id, finish="cancelled"))

    def task(self, name: str) -> Task:
        """Raises ApiError 404."""
        task = self.registry.find(name)
        if task is None:
            raise unknown_model()
        return task

    def check_open(self) -> None:
        """Raises ApiError 503 while the server stops."""
        if self.draining:
            self.metrics.rejections.labels("draining").inc()
            raise ApiError(503, "the server is stopping", "draining", headers={"Retry-After": str(GRACE)})

    async def encode(self, make: Callable[[], T]) -> T:
        """Run what reads texts in the thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, make)

    async def follow(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event], None]:
        """Submit, and yield (which of the requests, event) until all have ended. Left early, it cancels the rest.

        Raises what `Engine.submit` raises, and ApiError when the engine failed or the time is over.
        """
        self.check_open()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        try:
            ids = self.worker.submit(requests)
        except Exception as error:
            self.metrics.rejections.labels(type(error).__name__.removesuffix("Error")).inc()
            raise
        place = {id: index for index, id in enumerate(ids)}
        self._queues.update(dict.fromkeys(ids, queue))
        for request in requests:
            self.metrics.requests.labels(request.task).inc()
        clock = _Clock(self.metrics, self.settings.limits.seconds)
        self.active += 1
        try:
            while place:
                event = await clock.next(queue)
                clock.saw(event)
                if event.finish:
                    self._queues.pop(event.id)
                    index = place.pop(event.id)
                    self.metrics.ended(event.usage, event.finish)
                    if event.finish == "cancelled" and self.over:
                        raise ApiError(503, "the server stopped before the answer was complete", "draining")
                    if event.finish in ("error", "cancelled"):
                        raise ApiError(500, "the server failed on this request", "internal_error")
                    yield index, event
                else:
                    yield place[event.id], event
        finally:
            self.active -= 1
            if place:
                for id in place:
                    self._queues.pop(id, None)
                    self.metrics.ended(None, "abort")
                self.worker.cancel(place)

    async def gather(self, requests: Sequence[Request]) -> list[list[Event]]:
        """All events of each request. Raises as `follow`."""
        found: list[list[Event]] = [[] for _ in requests]
        async with aclosing(self.follow(requests)) as events:
            async for index, event in events:
                found[index].append(event)
        return found

    def _deliver(self, events: Sequence[Event], stats: StepStats) -> None:
        """In the engine's thread: one call into the loop for all events of a step."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, events, stats)

    def _hand_out(self, events: Sequence[Event], stats: StepStats) -> None:
        self.metrics.stepped(stats)
        for event in events:
            queue = self._queues.get(event.id)
            if queue is not None:
                queue.put_nowait(event)


class _Clock:
    """When the tokens of a call came, and when its time is over."""

    def __init__(self, metrics: Metrics, seconds: float):
        self.metrics, self.begun, self.end = metrics, time.perf_counter(), time.perf_counter() + seconds
        self._last: dict[int, float] = {}

    async def next(self, queue: asyncio.Queue[Event]) -> Event:
        if not queue.empty():
            return queue.get_nowait()
        try:
            return await asyncio.wait_for(queue.get(), max(0.0, self.end - time.perf_counter()))
        except asyncio.TimeoutError:
            raise ApiError(504, "the request took too long", "timeout") from None

    def saw(self, event: Event) -> None:
        now = time.perf_counter()
        if event.tokens or event.scores is not None:
            last = self._last.get(event.id)
            if last is None:
                self.metrics.first.observe(now - self.begun)
            else:
                self.metrics.between.observe(now - last)
            self._last[event.id] = now
        if event.finish:
            self.metrics.whole.observe(now - self.begun)


async def unless_gone(gone: Awaitable[None], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client is gone (then asyncio.CancelledError)."""
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for each in (doing, watching):
            each.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


class ClientGoneError(Exception):
    """Nobody listens any more."""
