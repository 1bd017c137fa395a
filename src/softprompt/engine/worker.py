"""The engine in a thread of its own: whoever asks never waits for a step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from .engine import Engine, StepStats
from .requests import Event, Request

log = logging.getLogger(__name__)
Deliver = Callable[[Sequence[Event], StepStats], None]


class Worker:
    """Steps an engine as long as there is something to do, and hands the events of each step to `deliver`, once a step.

    `deliver` is called in the worker's thread and must not wait.
    """

    def __init__(self, engine: Engine, deliver: Deliver):
        self.engine, self._deliver = engine, deliver
        self._wake = threading.Condition()
        self._stopping = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Iterable[Request]) -> list[int]:
        """Take requests, all or none. Raises what `Engine.submit` raises."""
        ids = self.engine.submit(requests)
        with self._wake:
            self._wake.notify()
        return ids

    def cancel(self, ids: Iterable[int]) -> None:
        self.engine.cancel(ids)
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def alive(self, patience: float = 120.0) -> bool:
        """Whether the thread lives and has ended a step, or looked for work, within `patience` seconds."""
        return self._thread.is_alive() and time.monotonic() - self._beat < patience

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._stopping and not self.engine.busy:
                    self._beat = time.monotonic()
                    self._wake.wait(5)
                if self._stopping:
                    return
            self._beat = time.monotonic()
            try:
                events = self.engine.step()
            except Exception as error:  # no memory, or a mistake of ours: what was under way ends, the rest goes on
                log.error("a step failed: %s", type(error).__name__)
                log.debug("a step failed", exc_info=True)
                events = self.engine.fail()
            self._deliver(events, self.engine.last)
