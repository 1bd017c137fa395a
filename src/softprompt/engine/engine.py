"""The engine: requests of many tasks go in, and each step gives all of them their next tokens in one pass.

    waiting --(tasks take turns)--> reading, a piece a step --> writing, a token a step --> ended
       \\__ parked, while another request computes what both begin with __/

The model is one line of all tokens of all requests; only attention knows whose they are (attending.py). What a request
begins with (its task's prompt and constant text) is copied into its slot when it is admitted, so a step costs the same
for one task or five hundred.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..backbone import Backbone
from ..computation import is_deep, prompt_length
from ..placement import first_soft
from ..rotary import can_move
from .compute import Piece, compute, label_scores, logits_in_pieces, skip_deep
from .plain import PlainRow
from .prefixes import Key, PrefixCache
from .requests import EngineError, Event, QueueFullError, Request, TooLongError, TooManyError
from .running import Running
from .scheduler import FairQueue, share
from .slots import SlotCache, capacity_for


@dataclass(frozen=True)
class EngineLimits:
    """rows: requests under way at once. waiting: requests that may wait. step_tokens: text tokens read in one step,
    which bounds how long the others pause; twice as many where no request is being written. cache_bytes: keys and
    values that the requests under way may come to have. prompt_bytes: of states kept for prompts."""

    rows: int = 64
    waiting: int = 256
    step_tokens: int = 128
    cache_bytes: int = 2 << 30
    prompt_bytes: int = 1 << 30


@dataclass(frozen=True)
class StepStats:
    """What one step did. rows, tasks: requests and distinct tasks in it. read, written: tokens. seconds: it took."""

    rows: int = 0
    tasks: int = 0
    read: int = 0
    written: int = 0
    seconds: float = 0.0


class Engine:
    """`submit` and `cancel` may be called from any thread, `step` from one only."""

    def __init__(self, backbone: Backbone, limits: EngineLimits | None = None):
        self.backbone, self.limits = backbone, limits or EngineLimits()
        self.slots = SlotCache(backbone) if backbone.fast else None
        self.prefixes = PrefixCache(self.limits.prompt_bytes)
        self.last = StepStats()
        self._lock = threading.Lock()
        self._next = 0
        self._rows: dict[int, Running] = {}  # all that have not ended
        self._inbox: list[Running] = []
        self._to_cancel: set[int] = set()
        self._queue: FairQueue[Running] = FairQueue()
        self._parked: dict[Key, list[Running]] = {}
        self._running: dict[int, Running] = {}
        self._plain: dict[int, PlainRow] = {}

    # --- from any thread --------------------------------------------------------------------------------------------

    def submit(self, requests: Request | Iterable[Request]) -> list[int]:
        """Take requests, all or none; their ids.

        Raises QueueFullError, TooManyError (more than can ever wait), TooLongError (no room for an answer), EngineError
        (a deep prompt where it cannot stand).
        """
        given = [requests] if isinstance(requests, Request) else list(requests)
        for request in given:
            self._check(request)
        if len(given) > (most := self.limits.waiting + self.limits.rows):
            raise TooManyError(f"{len(given)} requests at once, at most {most} are taken; submit fewer")
        tokenizer, context = self.backbone.tokenizer, self.backbone.context_length
        rows = [Running(0, request, tokenizer, context) for request in given]
        with self._lock:
            if self.waiting + len(rows) > self.limits.waiting + max(0, self.limits.rows - len(self._running)):
                raise QueueFullError(f"{self.waiting} requests wait already, at most {self.limits.waiting} may")
            for row in rows:
                self._next += 1
                row.id = self._next
                self._rows[row.id] = row
            self._inbox += rows
        return [row.id for row in rows]

    def cancel(self, ids: Iterable[int]) -> None:
        """End requests in whatever phase they are; those that have ended are ignored."""
        with self._lock:
            self._to_cancel |= set(ids) & self._rows.keys()

    @property
    def waiting(self) -> int:
        return len(self._rows) - len(self._running)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._rows)

    def _check(self, request: Request) -> None:
        longest = max(map(len, request.labels), default=1)
        read, room = len(request.ids), self.backbone.context_length
        if not read:
            raise EngineError("there is nothing to read: the context has no tokens")
        if read + longest > room:
            raise TooLongError(f"a text of {read} tokens leaves no room in a context of {room}; shorten it")
        soft, places = prompt_length(request.vectors), [-token - 1 for token in request.ids if token < 0]
        if any(place >= soft for place in places):
            raise EngineError(f"the context has soft token {max(places)}, the prompt only {soft}")
        if is_deep(request.vectors) and places:
            at = first_soft(request.ids)
            if places != list(range(soft)) or list(request.ids[at : at + soft]) != [-i - 1 for i in range(soft)]:
                raise EngineError("a deep prompt stands in one place, whole")
            if request.ids[-1] < 0:
                raise EngineError("a deep prompt has no token to answer from; text must stand behind it")
            if at and self.backbone.fast and not can_move(self.backbone):
                raise EngineError(f"a deep prompt can only stand at the very front in {self.backbone.name}")

    # --- a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Give every request that is under way its next tokens; what there is to say about them."""
        begun = time.perf_counter()
        with self._lock:
            fresh, self._inbox = self._inbox, []
            cancelled, self._to_cancel = self._to_cancel, set()
        for row in fresh:
            self._queue.push(row)
        events = [self._ended(self._rows[id], self._rows[id].end("cancelled")) for id in cancelled if id in self._rows]
        self._admit()
        rows = list(self._running.values())
        read, found = self._plain_step(rows) if self.slots is None else self._slots_step(rows, self.slots)
        written = sum(len(event.tokens) for event in found)
        tasks = len({row.task for row in rows})
        self.last = StepStats(len(rows), tasks, read, written, time.perf_counter() - begun)
        return events + found

    def fail(self) -> list[Event]:
        """End all that are under way after a step that raised: what is in their slots cannot be trusted any more."""
        rows = list(self._running.values())
        return [self._ended(row, Event(row.id, finish="error", usage=row.usage())) for row in rows]

    def _slots_step(self, rows: Sequence[Running], slots: SlotCache) -> tuple[int, list[Event]]:
        for row in rows:
            if row.at_deep:
                skip_deep(self.backbone, row, slots)
                self._publish(row)
        pieces = [Piece(row, 1) for row in rows if row.writing]
        reading = [row for row in rows if not row.writing]
        # Where nobody waits for a next token, nobody is held up: twice as many at once are read a third faster.
        budget = self.limits.step_tokens * (1 if pieces else 2)
        counts = share([row.left for row in reading], budget)
        pieces += [Piece(row, count) for row, count in zip(reading, counts, strict=True) if count]
        if not pieces:
            return 0, []
        hidden = compute(self.backbone, pieces, slots)
        for row in reading:
            self._publish(row)
        return sum(counts), self._say([self._running[id] for id in hidden], list(hidden.values()))

    def _say(self, rows: Sequence[Running], hidden: Sequence[torch.Tensor]) -> list[Event]:
        """Choose the next tokens, or score the labels, of rows whose context has been read."""
        events = []
        logits = logits_in_pieces(self.backbone, hidden)
        for row, each in zip(rows, logits, strict=True):
            if row.sampler is None:
                event = row.scored(label_scores(row, each))
            else:
                event = row.take(row.sampler.pick(each[0]))
            events.append(self._ended(row, event) if event.finish else event)
        return events

    def _plain_step(self, rows: Sequence[Running]) -> tuple[int, list[Event]]:
        read, events = 0, []
        for row in rows:
            read += 0 if row.writing else len(row.request.ids)
            event = self._plain.setdefault(row.id, PlainRow(self.backbone, row)).step()
            events.append(self._ended(row, event) if event.finish else event)
        return read, events

    # --- admission and end ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while len(self._running) < self.limits.rows:
            row = self._queue.peek()
            if row is None or not self._fits(row):
                return
            self._queue.pop()
            self._running[row.id] = row
            if self.slots is not None and not self._begin(row, self.slots):
                del self._running[row.id]

    def _fits(self, row: Running) -> bool:
        """Whether there is room for its states; a request that is alone always has it."""
        if self.slots is None or not self._running:
            return True
        promised = sum(capacity_for(other.needed) for other in (*self._running.values(), row))
        return promised * self.slots.token_bytes <= self.limits.cache_bytes

    def _begin(self, row: Running, slots: SlotCache) -> bool:
        """Give the row a slot with what is known of its beginning, or park it until another row has computed that.

        Returns whether it has begun. It counts as running meanwhile, so that `fail` ends it should there be no memory.
        """
        wanted = self.prefixes.wanted(row.request)
        builds: list[tuple[int, Key]] = []
        known, size = None, 0
        for size, key in reversed(wanted):
            known = row.given.get(key) or self.prefixes.get(key)
            if known is not None:
                break
            if self.prefixes.builder(key) is not None:
                row.parked = key
                self._parked.setdefault(key, []).append(row)
                return False
            builds.append((size, key))
        if wanted and wanted[0][1][0] == "prompt":
            missed = any(key[0] == "prompt" for _, key in builds)
            self.prefixes.misses += missed
            self.prefixes.hits += not missed
        row.builds = builds[::-1]
        for _, key in builds:
            self.prefixes.begin(key, row.id)
        row.slot = slots.new(min(row.needed, len(row.ids) + 32))
        if known is not None:
            row.slot.write(known)
            row.cached = size
        row.given = {}
        return True

    def _publish(self, row: Running) -> None:
        """Keep the beginnings that the row was to compute and has passed, and wake who waits for them."""
        while row.builds and row.done >= row.builds[0][0]:
            size, key = row.builds.pop(0)
            assert row.slot is not None
            states = row.slot.read(size)
            self.prefixes.put(key, states)
            for other in reversed(self._parked.pop(key, [])):
                other.parked, other.given[key] = None, states
                self._queue.push(other, front=True)

    def _ended(self, row: Running, event: Event) -> Event:
        """Forget a row in whatever phase it is."""
        with self._lock:
            self._rows.pop(row.id, None)
            self._running.pop(row.id, None)
        self._plain.pop(row.id, None)
        self._queue.remove(row)
        if row.parked is not None:
            self._parked[row.parked].remove(row)
            if not self._parked[row.parked]:
                del self._parked[row.parked]
        self.prefixes.give_up(row.id)
        for _, key in row.builds:  # the next one that needs it computes it
            for other in reversed(self._parked.pop(key, [])):
                other.parked = None
                self._queue.push(other, front=True)
        self.prefixes.left(row.request)
        if row.slot is not None and self.slots is not None:
            self.slots.free(row.slot)
            row.slot = None
        return event
