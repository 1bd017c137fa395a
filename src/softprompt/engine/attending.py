"""Attention of many requests at once over their slots: beside attention.py's, for rows that have nothing in common.

The tokens of all requests stand in one line; each layer first writes their keys and values into the slots and then
reads the slots in place. Requests that read one token (all that are being continued) go together, one product a pool;
those that read more (a piece of a text, a tree of labels) go one by one, each exactly as long as it is, not padded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..attention import _KNOWN, UnsupportedAttentionError, one_at_a_time
from ..backbone import Backbone
from ..few_rows import few_rows_at_once
from ..frozen_layers import frozen_layers
from ..line_attention import transposed
from .slots import Pool, Slot

NAME = "softprompt_slots"
_active = threading.local()


class Single:
    """One token for each of R slots of a pool, in line from `begin`; slots hold `length` tokens before it."""

    def __init__(self, pool: Pool, slots: Sequence[Slot], begin: int):
        self.pool, self.begin, self.end = pool, begin, begin + len(slots)
        device = pool.keys[0].device
        rows = [slot.row for slot in slots]
        self.rows = torch.tensor(rows, device=device)
        self.places = torch.tensor([slot.length for slot in slots], device=device)
        self.used = max(slot.length for slot in slots) + 1
        self.together = rows == list(range(rows[0], rows[0] + len(rows)))  # then they are read as a view
        self.first = rows[0]
        self._bias: dict[int | None, torch.Tensor] = {}

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [K, N, D] of the whole line."""
        self.pool.keys[layer][self.rows, :, self.places] = key[:, self.begin : self.end].transpose(0, 1)
        self.pool.values[layer][self.rows, :, self.places] = value[:, self.begin : self.end].transpose(0, 1)

    def attend(self, query: torch.Tensor, layer: int, window: int | None, softcap: float | None) -> torch.Tensor:
        """Scaled queries of the whole line [heads, N, D] -> [R, heads, D]."""
        keys, values = self._read(self.pool.keys[layer]), self._read(self.pool.values[layer])  # [R, K, used, D]
        rows, heads, size = len(self.rows), query.shape[0], query.shape[-1]
        q = query[:, self.begin : self.end].transpose(0, 1).reshape(rows, keys.shape[1], -1, size)  # [R, K, G, D]
        scores = _capped(q @ transposed(keys), softcap)  # [R, K, G, used]
        scores += self.bias(window, scores.dtype)
        return (_softmax(scores) @ values).reshape(rows, heads, size)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = slice(self.first, self.first + len(self.rows)) if self.together else self.rows
        return tensor[rows, :, : self.used]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a row sees a key, -inf elsewhere: [R, 1, 1, used]."""
        if window not in self._bias:
            keys = torch.arange(self.used, device=self.places.device)
            behind = self.places[:, None] - keys
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            self._bias[window] = _bias(hidden, dtype)[:, None, None]
        return self._bias[window]


class Several:
    """Tokens of one slot, in line from `begin`: `count` that continue its text, then a tree of tokens behind them.

    parents, depths: of the nodes of the tree (see evaluation/scoring.py); each sees the text and its own ancestors.
    """

    def __init__(self, slot: Slot, begin: int, count: int, parents: Sequence[int] = (), depths: Sequence[int] = ()):
        self.slot, self.begin, self.end = slot, begin, begin + count + len(parents)
        self.count, self.parents, self.depths = count, parents, depths
        self.used = slot.length + count + len(parents)
        self._bias: dict[int | None, torch.Tensor] = {}

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        pool, places = self.slot.pool, slice(self.slot.length, self.used)
        pool.keys[layer][self.slot.row, :, places] = key[:, self.begin : self.end]
        pool.values[layer][self.slot.row, :, places] = value[:, self.begin : self.end]

    def attend(self, query: torch.Tensor, layer: int, window: int | None, softcap: float | None) -> torch.Tensor:
        """Scaled queries of the whole line [heads, N, D] -> [T, heads, D]."""
        keys = self.slot.pool.keys[layer][self.slot.row, :, : self.used]  # [K, used, D]
        values = self.slot.pool.values[layer][self.slot.row, :, : self.used]
        kv_heads, size, count = keys.shape[0], query.shape[-1], self.end - self.begin
        q = query[:, self.begin : self.end].reshape(kv_heads, -1, size)  # [K, G * T, D]
        scores = _capped(q @ transposed(keys), softcap)
        scores.view(kv_heads, -1, count, self.used).add_(self.bias(window, scores.dtype))
        seen = (_softmax(scores) @ values).view(-1, count, size)  # [heads, T, D]
        return seen.transpose(0, 1)

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[T, used]"""
        if window not in self._bias:
            keys = torch.arange(self.used)
            queries = keys[self.slot.length :].clone()
            hidden = keys[None] > queries[:, None]
            for node, parent in enumerate(self.parents):
                at, tree = self.count + node, self.slot.length + self.count
                hidden[at, tree:] = True if parent < 0 else hidden[self.count + parent, tree:]
                hidden[at, tree + node] = False
            if window is not None:
                positions = keys.clone()
                if len(self.depths):
                    positions[self.slot.length + self.count :] = (
                        self.slot.length + self.count + torch.tensor(list(self.depths))
                    )
                hidden |= positions[self.slot.length :, None] - positions[None] >= window
            self._bias[window] = _bias(hidden, dtype).to(self.slot.pool.keys[0].device)
        return self._bias[window]


def _bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(scores.dtype)


def slots_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, N, D]
    key: torch.Tensor,  # [1, K, N, D]
    value: torch.Tensor,  # [1, K, N, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer during a step. Returns [1, N, heads, D]."""
    parts: Sequence[Single | Several] | None = getattr(_active, "parts", None)
    strange = [name for name, given in kwargs.items() if name not in _KNOWN and given is not None]
    if parts is None or strange or query.shape[0] != 1:
        raise UnsupportedAttentionError(f"{type(module).__name__} asks its attention for {strange or 'a mask'}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    line = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    found = []
    for part in parts:
        part.write(layer, key[0], value[0])
        found.append(part.attend(line, layer, sliding_window, softcap))
    return torch.cat(found)[None], None


AttentionInterface.register(NAME, slots_attention)


def hidden_states(
    backbone: Backbone, embeddings: torch.Tensor, positions: torch.Tensor, parts: Sequence[Single | Several]
) -> torch.Tensor:
    """Last hidden states of all tokens in line: embeddings [N, H], positions [N] -> [N, H]. Writes the slots."""
    model = backbone.model
    with _in_slots(model, parts), few_rows_at_once(model), frozen_layers(model):
        out = model.base_model(inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False)
    states: torch.Tensor = out.last_hidden_state[0]
    return states


@contextmanager
def _in_slots(model: Any, parts: Sequence[Single | Several]) -> Iterator[None]:
    config = model.config
    with one_at_a_time:
        before = config._attn_implementation
        config._attn_implementation = NAME
        _active.parts = parts
        try:
            yield
        finally:
            config._attn_implementation = before
            _active.parts = None
