"""States that many requests begin with: computed once by the first of them, while the others wait, then kept.

Keys are content (a hash of the prompt's vectors and all token ids) or a group of requests, never a name, so a prompt
that is replaced under its name can never be served from old states. Kept up to a bound of bytes, the least recently
used out; states of a group of requests go with its last member, so that no one can learn by timing what others sent.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable

from ..attention import States
from .requests import Request

Key = tuple[Hashable, ...]


class PrefixCache:
    """hits, misses, evictions: counted for prompts, not for groups. bytes: what is kept of prompts."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._kept: OrderedDict[Key, States] = OrderedDict()
        self._of_groups: dict[Key, States] = {}
        self._members: Counter[Key] = Counter()
        self._building: dict[Key, int] = {}  # key -> id of the request that computes it

    def wanted(self, request: Request) -> list[tuple[int, Key]]:
        """Beginnings of the request that are worth keeping, (tokens, key), the shortest first."""
        found: list[tuple[int, Key]] = []
        last = len(request.ids) - 1  # the last token is always computed: its output is needed
        if request.constant and (size := min(request.constant, last)):
            found.append((size, ("prompt", request.digest, request.ids[:size])))
        if request.group is not None and (size := min(request.shared, last)) and (not found or size > found[0][0]):
            found.append((size, ("group", request.group)))
        return found

    def get(self, key: Key) -> States | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return self._of_groups.get(key)

    def put(self, key: Key, states: States) -> None:
        """Keep what `begin` announced."""
        self._building.pop(key, None)
        if key[0] == "group":
            self._of_groups[key] = states
            return
        size = states.nbytes()
        if size > self.max_bytes or key in self._kept:
            return
        self._kept[key] = states
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes()
            self.evictions += 1

    # --- single flight --------------------------------------------------------------------------------------------

    def builder(self, key: Key) -> int | None:
        """The request that is computing this."""
        return self._building.get(key)

    def begin(self, key: Key, id: int) -> None:
        self._building[key] = id

    def give_up(self, id: int) -> None:
        """The request has ended before it had computed what it announced."""
        self._building = {key: builder for key, builder in self._building.items() if builder != id}

    # --- groups -----------------------------------------------------------------------------------------------------

    def left(self, request: Request) -> None:
        """One request of a group needs its states no longer."""
        if request.group is None:
            return
        key: Key = ("group", request.group)
        self._members[key] += 1
        if self._members[key] >= request.members:
            del self._members[key]
            self._of_groups.pop(key, None)
