"""The prompts that are served: what the folder held when it was last looked at, swapped as a whole.

A request that has begun holds the Task it began with. A name in a request is a key of a dict and never part of a path.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..backbone import Backbone
from ..engine.tasks import Task
from ..errors import PromptFormatError, SoftPromptError
from ..library import Entry, Library
from ..library.names import name_problem

log = logging.getLogger("softprompt.server")
BASE = "base"


@dataclass(frozen=True)
class Registered:
    """tasks: by name and by name@version. skipped: prompts of the folder that cannot be used (their names), with why;
    the reasons name paths, so they are for logs. told: the same names with what clients may know of the reason. kept:
    those of them that were served before they broke, and are served as they were. problem: why the folder itself cannot
    be read."""

    tasks: dict[str, Task]
    skipped: dict[str, str]
    told: dict[str, str] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    problem: str = ""

    @property
    def prompts(self) -> int:
        """How many versions of prompts are served."""
        return len({id(task) for task in self.tasks.values()}) - 1

    def listed(self) -> list[tuple[str, Task]]:
        """The tasks by name, base first."""
        return sorted(self.tasks.items(), key=lambda item: (item[0] != BASE, item[0]))


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
        return self.now.listed()

    def refresh(self) -> Registered:
        """Look at the folder, load what is new, and swap; nothing is mixed.

        Only what is gone from the folder, or is now for another model, is dropped.
        """
        with self._lock:
            begun = time.perf_counter()
            scan = self.library.scan(self.backbone.fingerprint)
            if scan.problem:  # a disk that is away for a moment does not take the tasks with it
                found = replace(self.now, problem=scan.problem)
            else:
                found = self._load(scan)
            fresh = {id(t) for t in found.tasks.values()} - {id(t) for t in self.now.tasks.values()}
            self._tell(self.now, found)
            self.now = found
            if fresh:
                self._observe(time.perf_counter() - begun, len(found.skipped))
            return found

    def _load(self, entries: Iterable[Entry]) -> Registered:
        known = {task.reference: task for task in self.now.tasks.values() if task.prompt is not None}
        found: dict[str, Task] = {}
        kept: dict[str, Task] = {}
        skipped, told = {}, {}
        for entry in entries:
            name = entry.reference
            try:
                found[name] = self._task(entry, known.get(name))
            except SoftPromptError as error:
                skipped[name], told[name] = str(error), self._reason(entry)
                # It is there but cannot be read, now or any more: as it was is better than not at all.
                if name in known and not self._is_for_another_model(entry):
                    kept[name] = known[name]
        kept = {name: task for name, task in kept.items() if name not in found}
        found |= kept
        newest = {task.name: task for task in sorted(found.values(), key=lambda task: task.version)}
        return Registered({BASE: self.base, **found, **newest}, skipped, told, frozenset(kept))

    def _task(self, entry: Entry, before: Task | None) -> Task:
        """The one that is served already if it is the same. Raises SoftPromptError."""
        if not entry.usable:
            raise PromptFormatError(entry.problems[0])
        if before is not None and before.sha256 == entry.sha256:
            return before
        entry, prompt = self.library.take(entry.reference, self.backbone.fingerprint)
        return Task(self.backbone, prompt, entry.name, entry.version, entry.sha256)

    def _is_for_another_model(self, entry: Entry) -> bool:
        return entry.summary.get("fingerprint") not in (None, "", self.backbone.fingerprint)

    def _reason(self, entry: Entry) -> str:
        """Why it cannot be used, in words that name neither a path nor anything that stands in its files."""
        if self._is_for_another_model(entry):
            return "it is for another model"
        if name_problem(entry.name):
            return "its folder is not called as a prompt can be"
        if entry.usable:
            return "it does not fit the model"
        if entry.summary.get("tokens") is not None and entry.sha256:
            return "another folder is the same version"
        return "its files cannot be read, or are not whole"

    def _tell(self, before: Registered, after: Registered) -> None:
        for name, why in after.skipped.items():
            if before.skipped.get(name) != why:
                now = "is served as it was before" if name in after.kept else "is not served"
                log.warning("prompt %s %s: %s", name, now, why)
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
