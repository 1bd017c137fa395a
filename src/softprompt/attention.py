"""Attention over rows of different lengths that share what stands before them: the one layer that must know of rows.

All other layers of a transformer treat each token alone, so the tokens of all rows of a batch can stand in one line
[1, N, H] with no padding at all. Only attention has to know which token belongs to which row. transformers lets a model
call an attention function registered by name; the one here computes, for every row r,

    keys and values seen by r  =  [ shared (the same for all rows) | past of r | own tokens of r, causal ]

`shared` is computed once for all rows (a constant text, or the soft prompt), `past` once for a row (a text that no soft
token precedes). Softmax over the joined scores is exactly the attention over the concatenation; nothing is approximate.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "softprompt_rows"
# Scores of one layer that are kept for the backward pass: 16 MiB in float32. Longer rows take fused attention.
LONG = 1 << 22


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that this function does not compute; the plain path does."""


@dataclass
class States:
    """Keys and values of C tokens in each of L layers, as cached by the model (after rotary embedding).

    keys, values: L tensors [R, K, C, D]; R rows (1 where all rows share them), K key-value heads, D head size.
    lengths: how many of the C tokens are real in each row (rows are padded on the right); None: all of them.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """C, tokens of the longest row."""
        return self.keys[0].shape[2] if self.keys else 0

    def detached(self) -> States:
        """The same numbers as leaves that collect gradients: where the split backward pass is cut."""
        keys = [k.detach().requires_grad_() for k in self.keys]
        return States(keys, [v.detach().requires_grad_() for v in self.values], self.lengths)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def join(parts: Sequence[States]) -> States:
    """Shared states of consecutive pieces of one sequence, as the states of the whole sequence."""
    parts = [p for p in parts if p.size]
    if len(parts) <= 1:
        return parts[0] if parts else States([], [])
    keys = [torch.cat(layer, dim=2) for layer in zip(*(p.keys for p in parts), strict=True)]
    return States(keys, [torch.cat(layer, dim=2) for layer in zip(*(p.values for p in parts), strict=True)])


@dataclass
class Pass:
    """One pass of a model over R rows whose own tokens stand in one line.

    lengths: own tokens of each row. shared: states that stand before every row. past: states of each row's own
    context, between `shared` and its own tokens. record: keep the own keys and values of each layer in `recorded`.
    parents: own tokens form a tree (the same in every row) in which each sees its ancestors only; -1 at the root.
    """

    lengths: Sequence[int]
    shared: States | None = None
    past: States | None = None
    record: bool = False
    device: torch.device | str = "cpu"
    parents: Sequence[int] | None = None
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = torch.as_tensor(self.lengths)
        rows, width = len(lengths), int(lengths.max())
        own = torch.arange(width)[None] < lengths[:, None]  # [R, T], which slots hold a token
        self.rows, self.width = rows, width
        self.padded = not bool(own.all())
        self.slots = own.flatten().nonzero().flatten().to(self.device)  # [N], the slot of each token in line
        tokens = torch.zeros(rows * width, dtype=torch.long)
        tokens[own.flatten()] = torch.arange(int(lengths.sum()))
        self.tokens = tokens.to(self.device)  # [R * T], the token in each slot (0 where there is none)
        before = (self.shared.size if self.shared else 0) + (self.past.size if self.past else 0)
        self.total = before + width  # keys that a row can see at most
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Which keys a query may not see: bool [R or 1, T, S + C + T], True where hidden; None if all are seen.

        window: a query sees keys less than `window` positions before it (sliding-window attention).
        """
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> torch.Tensor | None:
        if self.width == 1 and self.past is None and window is None:  # one query that sees all there is
            return None
        shared = self.shared.size if self.shared else 0
        past = self.past.size if self.past else 0
        dev = torch.device(self.device)
        own, own_hidden = self._own_places(dev)
        start = torch.full((1,), shared, device=dev)  # [R or 1], position of the first own token
        hidden_past = torch.zeros(1, 1, past, dtype=torch.bool, device=dev)
        if self.past is not None:
            lengths = self.past.lengths
            if lengths is None:
                lengths = torch.full((self.rows,), past, device=dev)
            start = shared + lengths.to(dev)
            hidden_past = (torch.arange(past, device=dev)[None] >= lengths.to(dev)[:, None])[:, None]  # [R, 1, C]
        rows = start.shape[0]
        hidden = torch.cat(
            [
                torch.zeros(rows, self.width, shared, dtype=torch.bool, device=dev),
                hidden_past.expand(rows, self.width, past),
                own_hidden.expand(rows, -1, -1),
            ],
            dim=2,
        )
        if window is not None:
            before = torch.arange(shared + past, device=dev).expand(rows, -1)  # positions of shared and past keys
            positions = torch.cat([before, start[:, None] + own], dim=1)  # [R or 1, S + C + T]
            hidden = hidden | (start[:, None, None] + own[None, :, None] - positions[:, None, :] >= window)
        return hidden

    def _own_places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of each own token after the row's context [T], and which own keys it may not see [1, T, T]."""
        if self.parents is None:
            own = torch.arange(self.width, device=device)
            return own, (own[None, :] > own[:, None])[None]
        hidden = torch.ones(self.width, self.width, dtype=torch.bool)
        depth = torch.zeros(self.width, dtype=torch.long)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                hidden[node], depth[node] = hidden[parent], depth[parent] + 1
            hidden[node, node] = False
        return depth.to(device), hidden[None].to(device)

    def states(self) -> States:
        """The recorded keys and values, one row of own tokens padded to [R, K, T, D] per layer."""
        layers = range(len(self.recorded))
        keys = [_spread(self.recorded[i][0], self) for i in layers]
        values = [_spread(self.recorded[i][1], self) for i in layers]
        return States(keys, values, torch.as_tensor(self.lengths, device=self.device))


class StateCache:
    """States that never change for a backbone (no soft token before them), kept up to a bound of bytes, oldest out.

    Keys hold all token ids (and a digest of the vectors) that the states come from, so nothing that differs can ever be
    confused. One cache belongs to one backbone.
    """

    def __init__(self, max_bytes: int = 1 << 30):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, States] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> States | None:
        with one_at_a_time:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, states: States) -> None:
        size = states.nbytes()
        with one_at_a_time:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = states
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes()


class _Spread(torch.autograd.Function):
    """Tokens [N, ...] into slots [R * T, ...]. An empty slot is never read, so its gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Pass) -> torch.Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.index_select(0, ctx.rows.slots), None


def _spread(x: torch.Tensor, rows: Pass) -> torch.Tensor:
    """[1, K, N, D] in line -> [R, K, T, D], one row each; slots without a token repeat token 0 and are never seen."""
    line = x[0].transpose(0, 1)  # [N, K, D]
    if rows.padded:
        line = _Spread.apply(line, rows)  # [R * T, K, D]
    return line.reshape(rows.rows, rows.width, *line.shape[1:]).transpose(1, 2)  # [R, K, T, D]


def _collect(x: torch.Tensor, rows: Pass) -> torch.Tensor:
    """[R, T, heads, D] -> [1, N, heads, D], the tokens back in line."""
    line = x.reshape(rows.rows * rows.width, *x.shape[2:])
    if rows.padded:
        line = _Collect.apply(line, rows)
    return line[None]


class _Collect(torch.autograd.Function):
    """Tokens out of their slots; the gradient of a slot without a token is zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Pass) -> torch.Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows.slots)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.rows.slots, grad), None


_active = threading.local()
# Which attention a model calls is a setting of the whole model, so passes of several threads take turns.
one_at_a_time = threading.RLock()
_KNOWN = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions"}


def rows_attention(
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
    """What transformers calls in each layer in place of its own attention. Returns [1, N, heads, D]."""
    rows: Pass | None = getattr(_active, "rows", None)
    strange = [name for name, given in kwargs.items() if name not in _KNOWN and given is not None]
    if rows is None or strange or query.shape[0] != 1:
        raise UnsupportedAttentionError(f"{type(module).__name__} asks its attention for {strange or 'a mask'}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if rows.record:
        rows.recorded[layer] = (key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _collect(_attend(query * scale, key, value, rows, layer, sliding_window, softcap), rows), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Pass,
    layer: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[-1]
    group, count, width = heads // kv_heads, rows.rows, rows.width
    # The query heads of one key-value head are laid out as further queries of it, so that no key is ever repeated.
    q = _spread(query, rows).reshape(count, kv_heads, group * width, size)  # [R, K, G * T, D]
    k, v = _spread(key, rows), _spread(value, rows)  # [R, K, T, D]
    if softcap is None and q.numel() // size * rows.total > LONG:
        return _attend_long(q, k, v, rows, layer, window)
    parts = []
    if rows.shared is not None and rows.shared.size:
        shared = (rows.shared.keys[layer][0], rows.shared.values[layer][0])  # [K, S, D]
        by_head = q.transpose(0, 1).reshape(kv_heads, count * group * width, size)
        scores = (by_head @ shared[0].transpose(1, 2)).view(kv_heads, count, group * width, -1).transpose(0, 1)
        parts.append(scores)  # [R, K, G * T, S], one product for all rows
    if rows.past is not None:
        parts.append(q @ rows.past.keys[layer].transpose(2, 3))  # [R, K, G * T, C]
    parts.append(q @ k.transpose(2, 3))  # [R, K, G * T, T]
    scores = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = rows.mask(window)
    if hidden is not None:
        scores = scores.reshape(count, kv_heads, group, width, -1)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf")).reshape(count, kv_heads, group * width, -1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    out, start = None, 0
    if rows.shared is not None and rows.shared.size:
        start = rows.shared.size
        by_head = weights[..., :start].transpose(0, 1).reshape(kv_heads, count * group * width, start)
        out = (by_head @ shared[1]).view(kv_heads, count, group * width, size).transpose(0, 1)
    if rows.past is not None:
        end = start + rows.past.size
        seen = weights[..., start:end] @ rows.past.values[layer]
        out, start = seen if out is None else out + seen, end
    own = weights[..., start:] @ v
    out = own if out is None else out + own  # [R, K, G * T, D]
    return out.reshape(count, heads, width, size).transpose(1, 2)  # [R, T, heads, D]


def _attend_long(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Pass, layer: int, window: int | None
) -> torch.Tensor:
    """The same by PyTorch's fused attention, which keeps no scores: shared states are copied for each row instead."""
    keys, values = [k], [v]
    if rows.past is not None:
        keys.insert(0, rows.past.keys[layer])
        values.insert(0, rows.past.values[layer])
    if rows.shared is not None and rows.shared.size:
        keys.insert(0, rows.shared.keys[layer].expand(rows.rows, -1, -1, -1))
        values.insert(0, rows.shared.values[layer].expand(rows.rows, -1, -1, -1))
    hidden = rows.mask(window)
    seen = None
    if hidden is not None:
        group = q.shape[2] // rows.width
        seen = ~hidden[:, None, None].expand(-1, 1, group, -1, -1).reshape(hidden.shape[0], 1, q.shape[2], -1)
    out = nn.functional.scaled_dot_product_attention(
        q, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=seen, scale=1.0
    )
    return out.reshape(rows.rows, -1, rows.width, q.shape[-1]).transpose(1, 2)  # [R, T, heads, D]


AttentionInterface.register(NAME, rows_attention)


@contextmanager
def rows_in_line(model: Any, rows: Pass) -> Iterator[Pass]:
    """Within it `model` computes the rows of `rows` (its inputs have the shape [1, N, ...]); nothing else changes."""
    config = model.config
    with one_at_a_time:
        before = config._attn_implementation
        config._attn_implementation = NAME
        _active.rows = rows
        try:
            yield rows
        finally:
            config._attn_implementation = before
            _active.rows = None
