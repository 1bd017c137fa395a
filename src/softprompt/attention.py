"""Attention over rows of different lengths that share what stands before them: the one layer that must know of rows.

All other layers of a transformer treat each token alone, so the tokens of all rows of a batch can stand in one line
[1, N, H] with no padding at all. Only attention has to know which token belongs to which row. transformers lets a model
call an attention function registered by name; the one here computes, for every row r,

    keys and values seen by r  =  [ pieces that stand before r, one after the other | own tokens of r, causal ]

A piece is the same for all rows and computed once (a constant text, the soft prompt), or belongs to a row (a text that
no soft token precedes, computed once for ever). What all rows share can also be computed in the same pass, at the
beginning of the line (`lead`). Softmax over the joined scores is exactly the attention over the concatenation; nothing
is approximate.
"""

from __future__ import annotations

import functools
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
    packed: [2 L, R, K, C, D] of which keys, then values are parts, where they are; copied with one call, not 2 L.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: torch.Tensor | None = None
    packed: torch.Tensor | None = None

    @staticmethod
    def of_packed(packed: torch.Tensor, lengths: torch.Tensor | None = None) -> States:
        """States that are parts of one tensor [2 L, R, K, C, D]: keys of all layers, then values."""
        keys, values = packed.split(len(packed) // 2)
        return States(list(keys.unbind()), list(values.unbind()), lengths, packed)

    @property
    def size(self) -> int:
        """C, tokens of the longest row."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def shared(self) -> bool:
        """Whether these are of one row, the same for all."""
        return not self.keys or self.keys[0].shape[0] == 1

    def of_rows(self, index: torch.Tensor) -> States:
        """The states of some of the rows."""
        lengths = None if self.lengths is None else self.lengths[index]
        return States([k[index] for k in self.keys], [v[index] for v in self.values], lengths)

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

    lengths: own tokens of each row. before: what stands before them, one piece after the other, each either the same
    for all rows (States of one row) or each row's own (States of R rows). record: keep the own keys and values of each
    layer in `recorded`. parents: own tokens form a tree (the same in every row) in which each sees its ancestors only;
    -1 at the root. lead: so many tokens at the beginning of the line are no row: they stand before every row, after
    all of `before`, and are computed in the same pass.
    """

    lengths: Sequence[int]
    before: Sequence[States] = ()
    record: bool = False
    device: torch.device | str = "cpu"
    parents: Sequence[int] | None = None
    lead: int = 0
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
        self.before = [states for states in self.before if states.size]
        assert not self.lead or all(states.shared for states in self.before), "a lead follows what all rows share"
        self.leading = Pass([self.lead], self.before, device=self.device) if self.lead else None
        self.total = sum(states.size for states in self.before) + self.lead + width  # keys that a row can see at most
        self._biases: dict[int | None, torch.Tensor | None] = {}

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores: 0 where a query may see a key, -inf where not; None if all are seen.

        Shape [R or 1, 1, 1, T, all keys]. window: a query sees keys less than `window` positions before it
        (sliding-window attention).
        """
        if window not in self._biases:
            hidden = self._hidden(window)
            if hidden is not None:
                bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
                self._biases[window] = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
            else:
                self._biases[window] = None
        return self._biases[window]

    def _hidden(self, window: int | None) -> torch.Tensor | None:
        """Which keys a query may not see: bool [R or 1, T, all keys], or None."""
        if self.width == 1 and window is None and all(states.lengths is None for states in self.before):
            return None  # one query that sees all there is
        dev = torch.device(self.device)
        own, own_hidden = self._own_places(dev)
        pieces: list[torch.Tensor] = []  # of keys hidden because there is no token, [R or 1, 1, size]
        positions: list[torch.Tensor] = []  # of keys, [R or 1, size]
        start = torch.zeros(1, dtype=torch.long, device=dev)  # [R or 1], position of the next piece in each row
        sizes = [(states.size, states.lengths) for states in self.before] + [(self.lead, None)] * bool(self.lead)
        for size, lengths in sizes:
            places = torch.arange(size, device=dev)[None]
            real = torch.full((1,), size, device=dev) if lengths is None else lengths.to(dev)
            pieces.append((places >= real[:, None])[:, None])
            positions.append(start[:, None] + places)
            start = start + real
        rows = start.shape[0]
        pieces = [piece.expand(rows, self.width, -1) for piece in pieces]
        hidden = torch.cat([*pieces, own_hidden.expand(rows, -1, -1)], dim=2)
        if window is not None:
            queries = start[:, None] + own  # [R or 1, T]
            keys = torch.cat([*(p.expand(rows, -1) for p in positions), queries], dim=1)
            hidden = hidden | (queries[:, :, None] - keys[:, None, :] >= window)
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
        return States(keys, values, torch.as_tensor(self.lengths, device=self.device) if self.padded else None)


class StateCache:
    """States that never change for a backbone (no soft token before them), kept up to a bound of bytes, oldest out.

    Keys hold all token ids (and a digest of the vectors) that the states come from, so nothing that differs can ever be
    confused. One cache belongs to one backbone.
    """

    def __init__(self, max_bytes: int = 1 << 30):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, States] = OrderedDict()
        self._bytes = 0

    @property
    def room(self) -> int:
        """Bytes that can be put without putting anything out."""
        return self.max_bytes - self._bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

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

    def clear(self) -> None:
        """Forget everything that is kept in memory."""
        with one_at_a_time:
            self._kept.clear()
            self._bytes = 0

    # What `keep_texts` tells a cache while it puts the texts of a data set; text_store/store.py does more with it.

    def plan(self, tokens: int, sample: States) -> bool:
        """Whether there is room for so many tokens of texts. sample: states of one row, which tell the size."""
        return tokens * sample.nbytes() // sample.size <= self.room

    def end_batch(self) -> None:
        """Called after each batch of texts that were computed together."""

    def finish(self) -> bool:
        """Called after the last of the texts that were planned. False if some of them could not be kept."""
        return True


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
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    attend = functools.partial(_attend, layer=layer, window=sliding_window, softcap=softcap)
    if not rows.leading:
        return attend(query, key, value, rows), None
    sizes = (rows.lead, query.shape[2] - rows.lead)
    (lead_q, q), (lead_k, k), (lead_v, v) = (x.split(sizes, dim=2) for x in (query, key, value))
    first, rest = attend(lead_q, lead_k, lead_v, rows.leading), attend(q, k, v, rows, lead=(lead_k, lead_v))
    return torch.cat([first, rest], dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Pass,
    *,
    layer: int,
    window: int | None,
    softcap: float | None,
    lead: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Own tokens in line, [1, heads or K, N, D] each, over all that stands before them: [1, N, heads, D]."""
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[-1]
    group, count, width = heads // kv_heads, rows.rows, rows.width
    # The query heads of one key-value head are laid out as further queries of it, so that no key is ever repeated.
    q = _spread(query, rows).reshape(count, kv_heads, group * width, size)  # [R, K, G * T, D]
    pieces = [(states.keys[layer], states.values[layer]) for states in rows.before]
    pieces += [lead] if lead else []
    pieces.append((_spread(key, rows), _spread(value, rows)))  # [R or 1, K, size, D] each
    if softcap is None and q.numel() // size * rows.total > LONG:
        return _collect(_attend_long(q, pieces, rows, window), rows)
    parts = [_times(q, k.transpose(2, 3)) for k, _ in pieces]  # [R, K, G * T, size] each
    scores = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    bias = rows.bias(window, scores.dtype)
    if bias is not None:
        scores.view(count, kv_heads, group, width, -1).add_(bias)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    split = weights.split([k.shape[2] for k, _ in pieces], dim=-1)
    seen = [_times(w, v) for w, (_, v) in zip(split, pieces, strict=True)]
    out = functools.reduce(torch.add, seen)  # [R, K, G * T, D]
    return _collect(out.reshape(count, heads, width, size).transpose(1, 2), rows)


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for a [R, K, X, Y] and b [R, K, Y, Z], or b [1, K, Y, Z] that all rows share: then one product for all."""
    rows, kv_heads, size = a.shape[0], a.shape[1], a.shape[2]
    if b.shape[0] == rows:
        return a @ b
    by_head = a.transpose(0, 1).reshape(kv_heads, rows * size, a.shape[3])
    return (by_head @ b[0]).view(kv_heads, rows, size, -1).transpose(0, 1)


def _attend_long(
    q: torch.Tensor, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: Pass, window: int | None
) -> torch.Tensor:
    """The same by PyTorch's fused attention, which keeps no scores: shared states are copied for each row instead."""
    keys = torch.cat([k.expand(rows.rows, -1, -1, -1) for k, _ in pieces], dim=2)
    values = torch.cat([v.expand(rows.rows, -1, -1, -1) for _, v in pieces], dim=2)
    bias = rows.bias(window, q.dtype)
    if bias is not None:
        group = q.shape[2] // rows.width
        bias = bias[:, 0].expand(-1, group, -1, -1).reshape(bias.shape[0], 1, q.shape[2], -1)
    out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)
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
