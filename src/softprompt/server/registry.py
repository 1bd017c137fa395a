"""The prompts that are served: what the folder held when it was last looked at, swapped as a whole.

A request that has begun holds the Task it began with. A name in a request is a key of a dict and never part of a path.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..backbone import Backbone
from ..engine.tasks import Task
from ..errors import SoftPromptError
from ..library import Entry, Library

log = logging.getLogger("softprompt.server")
BASE = "base"


@dataclass(frozen=True)
class Registered:
    """tasks: by name and by name@version. skipped: prompts of the folder that cannot be used (their names), with why;
    the reasons name paths, so they are for logs. problem: why the folder itself cannot be read."""

    tasks: dict[str, Task]
    skipped: dict[str, str]
    problem: str = ""


class Registry:
    """Tasks by name. `refresh` may be called from any thread; `find` never waits."""

    def __init__(self, backbone: Backbone, library: Library, observe: Callable[[float, int], None] | None = None):
        self.backbone, self.library = backbone, library
        self.base = Task(backbone, None)
        self.now = Registered({BASE: self.base}, {})
        self._observe = observe or (lambda seconds, failures: None)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def find(self, name: str) -> Task | None:
        return self.now.tasks.get(name)

    def listed(self) -> list[tuple[str, Task]]:
        """Each name that may be asked for, once for the newest version and once for each version."""
        return sorted(self.now.tasks.items(), key=lambda item: (item[0] != BASE, item[0]))

    def refresh(self) -> Registered:
        """Look at the folder, load what is new, and swap. What cannot be read any more is gone; nothing is mixed."""
        with self._lock:
            begun = time.perf_counter()
            scan = self.library.scan(self.backbone.fingerprint)
            if scan.problem:  # a disk that is away for a moment does not take the tasks with it
                found = Registered(self.now.tasks, self.now.skipped, scan.problem)
            else:
                found = self._load(scan)
            fresh = {id(t) for t in found.tasks.values()} - {id(t) for t in self.now.tasks.values()}
            self._tell(self.now, found)
            self.now = found
            if fresh:
                self._observe(time.perf_counter() - begun, len(found.skipped))
            return found

    def _load(self, entries: Iterable[Entry]) -> Registered:
        known = {(task.name, task.version, task.sha256): task for task in self.now.tasks.values()}
        tasks, skipped = {BASE: self.base}, {}
        newest: dict[str, Task] = {}
        for entry in entries:
            if not entry.usable:
                skipped[entry.reference] = entry.problems[0]
                continue
            task = known.get((entry.name, entry.version, entry.sha256))
            try:
                task = task or Task(self.backbone, self.library.load(entry), entry.name, entry.version, entry.sha256)
            except SoftPromptError as error:
                skipped[entry.reference] = str(error)
                continue
            tasks[entry.reference] = task
            if entry.name not in newest or newest[entry.name].version < task.version:
                newest[entry.name] = task
        return Registered(tasks | newest, skipped)

    def _tell(self, before: Registered, after: Registered) -> None:
        for name, why in after.skipped.items():
            if before.skipped.get(name) != why:
                log.warning("prompt %s is not served: %s", name, why)
        for name, task in after.tasks.items():
            old = before.tasks.get(name)
            if old is None or old.sha256 != task.sha256:
                log.info("%s %s (%.12s)", "serving" if old is None else "replaced", name, task.sha256 or "the model")
        for name in before.tasks.keys() - after.tasks.keys():
            log.info("%s is gone", name)
        if after.problem and before.problem != after.problem:
            log.error("%s", after.problem)

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, seconds: float) -> None:
        """Look at the folder every so many seconds until `close`."""

        def look() -> None:
            while not self._stop.wait(seconds):
                try:
                    self.refresh()
                except Exception as error:  # whatever a disk may do: the next look may succeed
                    log.error("looking at the prompts failed: %s", type(error).__name__)

        self._thread = threading.Thread(target=look, name="softprompt-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
