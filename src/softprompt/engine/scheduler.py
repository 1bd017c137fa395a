"""Who is next: tasks take turns by tokens, and a step reads only so many tokens that nobody waits long."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

QUANTUM = 512  # tokens that a task may have admitted before the next one's turn
PART = 32  # tokens of a text that are read together, as far as it has them


class Waiting(Protocol):
    """What waits: of which task it is, and how many tokens it will take."""

    @property
    def task(self) -> str: ...

    @property
    def cost(self) -> int: ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """First come first served within a task, deficit round robin between tasks (Shreedhar and Varghese 1996)."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, deque[T]] = OrderedDict()
        self._credit: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tasks.values()))

    def push(self, item: T, front: bool = False) -> None:
        if item.task not in self._tasks:
            self._tasks[item.task] = deque()
            self._credit[item.task] = 0
        waiting = self._tasks[item.task]
        waiting.appendleft(item) if front else waiting.append(item)

    def peek(self) -> T | None:
        """Whose turn it is; stays in the queue until `pop`."""
        if not self._tasks:
            return None
        while True:
            task, waiting = next(iter(self._tasks.items()))
            if self._credit[task] >= waiting[0].cost:
                return waiting[0]
            if len(self._tasks) == 1:
                self._credit[task] = waiting[0].cost
                return waiting[0]
            self._credit[task] += QUANTUM
            if self._credit[task] < waiting[0].cost:
                self._tasks.move_to_end(task)

    def pop(self) -> T:
        item = self.peek()
        assert item is not None
        self._credit[item.task] -= item.cost
        self._remove_first(item.task)
        return item

    def remove(self, item: T) -> None:
        waiting = self._tasks.get(item.task)
        if waiting is not None and item in waiting:
            waiting.remove(item)
            if not waiting:
                self._forget(item.task)

    def items(self) -> list[T]:
        return [item for waiting in self._tasks.values() for item in waiting]

    def _remove_first(self, task: str) -> None:
        self._tasks[task].popleft()
        if not self._tasks[task]:
            self._forget(task)
        elif self._credit[task] < self._tasks[task][0].cost:
            self._tasks.move_to_end(task)

    def _forget(self, task: str) -> None:
        # A task that has nothing to do saves nothing up for later, and leaves nothing behind.
        del self._tasks[task], self._credit[task]


def share(left: Sequence[int], budget: int) -> list[int]:
    """How many of its `left` tokens each request may read in this step, `budget` in all; the oldest request is first.

    The oldest one always goes on; then the shortest ones, so that a short text is never held up by long ones and no
    long one starves. A request's part is not so small that all would end late.
    """
    given = [0] * len(left)
    order = [0, *sorted(range(1, len(left)), key=lambda index: left[index])] if left else []
    for place, index in enumerate(order):
        given[index] = min(left[index], budget, max(PART, budget // (len(order) - place)))
        budget -= given[index]
    return given
