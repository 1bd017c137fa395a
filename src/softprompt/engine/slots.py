"""Keys and values of the requests under way: preallocated rows, ragged lengths, nothing concatenated at any token.

Rows of like length live in one pool, [rows, K, capacity, D] for the keys and the values of each layer, in its first
rows, so that what attention reads is a view. A row that outgrows its pool moves to the next larger one, once for four
times the length. One long row therefore never makes the short ones read as far as it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..attention import Pass, States
from ..backbone import Backbone

SMALLEST, FACTOR = 128, 4  # capacity of the first pool in tokens, and how many times that of the next one
BLOCK = 1024  # tokens for which room is made at once, at least


@dataclass(eq=False)
class Slot:
    """A place for the states of one sequence. length: tokens in it. row: its row in the pool, which may change."""

    pool: Pool
    row: int
    length: int = 0

    def write(self, states: States) -> None:
        """Append shared states [1, K, n, D] of n tokens; the slot must have room."""
        end = self.length + states.size
        for layer, (key, value) in enumerate(zip(states.keys, states.values, strict=True)):
            self.pool.keys[layer][self.row, :, self.length : end] = key[0]
            self.pool.values[layer][self.row, :, self.length : end] = value[0]
        self.length = end

    def read(self, count: int) -> States:
        """A copy of the states of the first `count` tokens."""
        keys = [k[self.row : self.row + 1, :, :count].clone() for k in self.pool.keys]
        return States(keys, [v[self.row : self.row + 1, :, :count].clone() for v in self.pool.values])


@dataclass(eq=False)
class Pool:
    """Rows of one capacity. keys, values: [rows, K, capacity, D] a layer, of which the first len(slots) are used."""

    capacity: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slots: list[Slot] = field(default_factory=list)

    def add(self) -> Slot:
        rows = len(self.keys[0])
        if len(self.slots) == rows:
            more = max(1, BLOCK // self.capacity, rows // 2)
            self.keys = [_longer(k, more) for k in self.keys]
            self.values = [_longer(v, more) for v in self.values]
        self.slots.append(Slot(self, len(self.slots)))
        return self.slots[-1]

    def remove(self, slot: Slot) -> None:
        """Free a slot; the last one takes its row, so that used rows stay together."""
        last = self.slots.pop()
        if last is not slot:
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot.row, :, : last.length] = tensor[last.row, :, : last.length]
            self.slots[slot.row], last.row = last, slot.row


def _longer(tensor: torch.Tensor, more: int) -> torch.Tensor:
    # Zeros: what no token has been written to is read under a mask, where anything but a number would spread.
    return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])


class SlotCache:
    """The pools of a backbone. token_bytes: of the states of one token in all layers."""

    def __init__(self, backbone: Backbone):
        self._shapes = _state_shapes(backbone)
        self._make = torch.zeros((), dtype=backbone.dtype, device=backbone.device)
        self._pools: list[Pool] = []
        self.token_bytes = sum(2 * heads * size for heads, size in self._shapes) * self._make.element_size()

    def new(self, tokens: int) -> Slot:
        """A free slot with room for `tokens`."""
        return self._pool(tokens).add()

    def reserve(self, slot: Slot, tokens: int) -> Slot:
        """The slot with room for `tokens` in all: this one, or another one with the same content."""
        if tokens <= slot.pool.capacity:
            return slot
        moved = self.new(tokens)
        moved.write(slot.read(slot.length))
        self.free(slot)
        return moved

    def free(self, slot: Slot) -> None:
        slot.pool.remove(slot)
        if not slot.pool.slots and slot.pool.capacity > SMALLEST:
            self._pools.remove(slot.pool)  # memory of a peak is given back

    @property
    def used_tokens(self) -> int:
        return sum(slot.length for pool in self._pools for slot in pool.slots)

    @property
    def rows(self) -> int:
        return sum(len(pool.slots) for pool in self._pools)

    def _pool(self, tokens: int) -> Pool:
        capacity = capacity_for(tokens)
        for pool in self._pools:
            if pool.capacity == capacity:
                return pool
        rows = max(1, BLOCK // capacity)
        keys, values = (
            [self._make.new_zeros(rows, heads, capacity, size) for heads, size in self._shapes] for _ in range(2)
        )
        self._pools.append(Pool(capacity, keys, values))
        return self._pools[-1]


def capacity_for(tokens: int) -> int:
    """Of the pool whose rows have room for so many tokens: what such a request really takes of the memory."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity *= FACTOR
    return capacity


@torch.no_grad()
def _state_shapes(backbone: Backbone) -> Sequence[tuple[int, int]]:
    """(K, D) of each layer, seen from what the layers give to attention."""
    rows = Pass([1], record=True, device=backbone.device)
    line = torch.zeros(1, dtype=torch.long, device=backbone.device)
    backbone.hidden(backbone.embed(line), line, rows)
    return [(rows.recorded[i][0].shape[1], rows.recorded[i][0].shape[3]) for i in range(len(rows.recorded))]
