"""The products of attention for rows that stand in one line, and their gradient, written out.

Tokens of all rows stand in one line, [N, heads, D]. Rows of like length form a block. For a block the queries and keys
are gathered from the line into a rectangle in one step each, the query heads that share a key-value head laid out as
further queries of it, so that no key is repeated; what is computed is put back into the line in one step for all
blocks. Autograd would do the same through some hundred small operations a layer, which took longer than the products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Piece = tuple[torch.Tensor, torch.Tensor]  # keys and values that stand before the rows, [R or 1, K, S, D] each
# A row that is shorter than this share of its block's longest goes into another block: less to compute for nothing.
ALIKE = 0.6


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the rows in groups of like length, the longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


@dataclass
class Block:
    """R rows of at most T own tokens that are attended in one product.

    tokens: [R, T], the number in line of each slot's token, 0 in an empty slot; real: [R, T], which are not empty.
    before: size and lengths ([R] or None) of each piece that stands before the rows. lead: so many tokens at the
    beginning of the line stand between those and the rows. parents: as in `Pass`.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    before: Sequence[tuple[int, torch.Tensor | None]]
    lead: int
    parents: Sequence[int] | None
    device: torch.device

    def __post_init__(self) -> None:
        self.rows, self.width = self.tokens.shape
        self._biases: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}

    @property
    def own(self) -> int:
        """Keys of a row that stand in line: the lead's and its own."""
        return self.lead + self.width

    @property
    def total(self) -> int:
        """Keys that a row can see at most."""
        return sum(size for size, _ in self.before) + self.own

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores: 0 where a query may see a key, -inf where not; None if all are seen.

        Shape [R or 1, 1, 1, T, all keys]. window: a query sees keys less than `window` positions before it
        (sliding-window attention).
        """
        if (window, dtype) not in self._biases:
            hidden = self._hidden(window)
            made = None
            if hidden is not None:
                made = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
                made = made.masked_fill_(hidden, float("-inf"))[:, None, None]
            self._biases[window, dtype] = made
        return self._biases[window, dtype]

    def _hidden(self, window: int | None) -> torch.Tensor | None:
        """Which keys a query may not see: bool [R or 1, T, all keys], or None."""
        if self.width == 1 and window is None and all(lengths is None for _, lengths in self.before):
            return None  # one query that sees all there is
        own, own_hidden = self._own_places()
        pieces: list[torch.Tensor] = []  # of keys hidden because there is no token, [R or 1, 1, size]
        positions: list[torch.Tensor] = []  # of keys, [R or 1, size]
        start = torch.zeros(1, dtype=torch.long, device=self.device)  # [R or 1], position of each row's next piece
        for size, lengths in [*self.before, (self.lead, None)]:
            places = torch.arange(size, device=self.device)[None]
            real = torch.full((1,), size, device=self.device) if lengths is None else lengths.to(self.device)
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

    def _own_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of each own token after the row's context [T], and which own keys it may not see [1, T, T]."""
        if self.parents is None:
            own = torch.arange(self.width, device=self.device)
            return own, (own[None, :] > own[:, None])[None]
        hidden = torch.ones(self.width, self.width, dtype=torch.bool)
        depth = torch.zeros(self.width, dtype=torch.long)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                hidden[node], depth[node] = hidden[parent], depth[parent] + 1
            hidden[node, node] = False
        return depth.to(self.device), hidden[None].to(self.device)


class Places:
    """Where everything goes, for a model with H query heads and K key-value heads, G = H / K.

    A line is seen as [N * H, D] or [N * K, D]. queries, keys: for each block the places in line of its rectangles
    [R, K, G, T] and [R, K, lead + T]. query_slots: [N * H], key_slots: [N * K], where each place of the line stands in
    the rectangles of all blocks, one after the other.
    """

    def __init__(self, blocks: Sequence[Block], heads: int, kv_heads: int):
        device = blocks[0].device
        of_head, of_kv = torch.arange(heads), torch.arange(kv_heads)
        count = sum(int(block.real.sum()) for block in blocks)
        query_slots = torch.empty(count, heads, dtype=torch.long)
        key_slots = torch.empty(count, kv_heads, dtype=torch.long)
        self.heads, self.kv_heads = heads, kv_heads
        self.queries, self.keys = [], []
        queries_before = keys_before = 0
        for block in blocks:
            queries = block.tokens[:, None] * heads + of_head[:, None]  # [R, H, T]
            tokens = torch.cat([torch.arange(block.lead).expand(block.rows, -1), block.tokens], dim=1)
            keys = tokens[:, None] * kv_heads + of_kv[:, None]  # [R, K, lead + T]
            row, slot = block.real.nonzero().T
            mine = block.tokens[block.real]
            query_slots[mine] = queries_before + ((row * heads)[:, None] + of_head) * block.width + slot[:, None]
            key_slots[mine] = keys_before + ((row * kv_heads)[:, None] + of_kv) * block.own + block.lead + slot[:, None]
            self.queries.append(queries.flatten().to(device))
            self.keys.append(keys.flatten().to(device))
            queries_before, keys_before = queries_before + queries.numel(), keys_before + keys.numel()
        self.query_slots, self.key_slots = query_slots.flatten().to(device), key_slots.flatten().to(device)


@dataclass(frozen=True)
class Call:
    """What one layer asks for, besides its tensors."""

    blocks: Sequence[Block]
    places: Places
    window: int | None
    softcap: float | None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Sequence[Piece], call: Call, fused: bool
) -> torch.Tensor:
    """Attention of a line, query [H, N, D] (scaled), key and value [K, N, D], behind `pieces`: [N, H, D].

    fused: by PyTorch's own attention, which keeps no scores for the backward pass; for long rows.
    """
    q, k, v = (x.transpose(0, 1).reshape(-1, x.shape[-1]) for x in (query, key, value))
    if fused:
        out = _fused(q, k, v, pieces, call)
    else:
        out = _Attention.apply(q, k, v, call, *(tensor for piece in pieces for tensor in piece))
    return out.view(query.shape[1], query.shape[0], -1)


class _Attention(torch.autograd.Function):
    """query [N * H, D], key and value [N * K, D], then keys and values of each piece in turn -> [N * H, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, *before: torch.Tensor
    ) -> torch.Tensor:
        places, kv_heads = call.places, call.places.kv_heads
        outs, saved = [], []
        for block, q_at, k_at in zip(call.blocks, places.queries, places.keys, strict=True):
            q = _gather(query, q_at, block.rows * kv_heads)  # [R * K, G * T, D]
            k, v = (_gather(x, k_at, block.rows * kv_heads) for x in (key, value))  # [R * K, lead + T, D]
            parts = [_times(q, transposed(piece), kv_heads) for piece in before[::2]]
            parts.append(torch.bmm(q, k.transpose(1, 2)))  # [R * K, G * T, size] each
            scores = torch.cat(parts, dim=-1) if before else parts[0]
            if call.softcap:
                scores = torch.tanh(scores / call.softcap) * call.softcap
            capped = scores.clone() if call.softcap else q[:0]
            bias = block.bias(call.window, scores.dtype)
            if bias is not None:
                scores.view(block.rows, kv_heads, -1, block.width, scores.shape[-1]).add_(bias)
            # In bfloat16, as in float32, the sums inside are in float32 and only the result is rounded.
            weights = torch.softmax(scores, dim=-1)
            split = weights.split([*(piece.shape[2] for piece in before[::2]), block.own], dim=-1)
            seen = [_times(w, piece, kv_heads) for w, piece in zip(split, before[1::2], strict=False)]
            seen.append(torch.bmm(split[-1], v))
            outs.append(functools.reduce(torch.add, seen).flatten(0, 1))
            saved += [q, k, v, weights, capped]
        ctx.save_for_backward(*before, *saved)
        ctx.call, ctx.before = call, len(before)
        return _joined(outs).index_select(0, places.query_slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, before, saved = ctx.call, ctx.saved_tensors[: ctx.before], ctx.saved_tensors[ctx.before :]
        places, kv_heads = call.places, call.places.kv_heads
        slots = sum(len(at) for at in places.queries)
        # An empty slot has seen something too, but what it saw counts for nothing.
        out = gradient.new_zeros(slots, gradient.shape[-1]).index_copy_(0, places.query_slots, gradient)
        of_queries, of_keys, of_values = [], [], []
        of_before: list[torch.Tensor | None] = [None] * len(before)
        of_blocks = out.split([len(at) for at in places.queries])
        for number, (block, mine) in enumerate(zip(call.blocks, of_blocks, strict=True)):
            q, k, v, weights, capped = saved[5 * number : 5 * number + 5]
            g = mine.view(*q.shape[:2], -1)
            sizes = [*(piece.shape[2] for piece in before[::2]), block.own]
            parts = [_times(g, transposed(piece), kv_heads) for piece in before[1::2]]
            parts.append(torch.bmm(g, v.transpose(1, 2)))
            of_weights = torch.cat(parts, dim=-1) if before else parts[0]
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            if call.softcap:
                of_scores = of_scores * (1 - (capped / call.softcap) ** 2)
            scores_split, weights_split = of_scores.split(sizes, dim=-1), weights.split(sizes, dim=-1)
            of_query = [_times(s, piece, kv_heads) for s, piece in zip(scores_split, before[::2], strict=False)]
            of_query.append(torch.bmm(scores_split[-1], k))
            of_queries.append(functools.reduce(torch.add, of_query).flatten(0, 1))
            of_keys.append(torch.bmm(scores_split[-1].transpose(1, 2), q))
            of_values.append(torch.bmm(weights_split[-1].transpose(1, 2), g))
            for i, piece in enumerate(before):
                if ctx.needs_input_grad[4 + i]:
                    left, right = (weights_split, g) if i % 2 else (scores_split, q)
                    found = _piece_gradient(left[i // 2], right, piece)
                    so_far = of_before[i]
                    of_before[i] = found if so_far is None else so_far + found
        of_query_line = _joined(of_queries).index_select(0, places.query_slots)
        of_key_line, of_value_line = (_back_in_line(x, call) for x in (of_keys, of_values))
        return of_query_line, of_key_line, of_value_line, None, *of_before


def transposed(states: torch.Tensor) -> torch.Tensor:
    """[..., S, D] -> [..., D, S] for a product.

    On a CPU in bfloat16 a product with the transposed view of a part of a longer tensor copies it number by number, and
    takes two to three times as long as copying the part first.
    """
    if states.dtype == torch.bfloat16 and states.device.type == "cpu":
        states = states.contiguous()
    return states.transpose(-2, -1)


def _gather(line: torch.Tensor, places: torch.Tensor, batch: int) -> torch.Tensor:
    return line.index_select(0, places).view(batch, -1, line.shape[-1])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _times(a: torch.Tensor, b: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """a [R * K, X, Y] times b [R, K, Y, Z], or b [1, K, Y, Z] that all rows share, then one product for all of them."""
    rows = a.shape[0] // kv_heads
    if b.shape[0] == rows:
        return torch.bmm(a, b.flatten(0, 1))
    found = torch.bmm(_by_head(a, kv_heads), b[0]).view(kv_heads, rows, a.shape[1], -1)
    return found.transpose(0, 1).flatten(0, 1)


def _by_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[R * K, X, Y] -> [K, R * X, Y]."""
    rows = x.shape[0] // kv_heads
    return x.view(rows, kv_heads, *x.shape[1:]).transpose(0, 1).reshape(kv_heads, rows * x.shape[1], -1)


def _piece_gradient(left: torch.Tensor, right: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """left^T right, [R * K, X, S] and [R * K, X, D], in the shape of the piece [R or 1, K, S, D]."""
    kv_heads = piece.shape[1]
    if piece.shape[0] * kv_heads != left.shape[0]:
        left, right = _by_head(left, kv_heads), _by_head(right, kv_heads)
    return torch.bmm(left.transpose(1, 2), right).view(piece.shape)


def _back_in_line(parts: Sequence[torch.Tensor], call: Call) -> torch.Tensor:
    """Gradients of gathered keys or values, [R * K, lead + T, D] a block, added up in line: [N * K, D]."""
    size, kv_heads = parts[0].shape[-1], call.places.kv_heads
    line = _joined([part.view(-1, size) for part in parts]).index_select(0, call.places.key_slots)
    for block, part in zip(call.blocks, parts, strict=True):
        if block.lead:
            first = part.view(block.rows, kv_heads, block.own, size)[:, :, : block.lead]
            first = first.sum(dim=0, dtype=torch.promote_types(torch.float32, part.dtype))  # [K, lead, D]
            line[: block.lead * kv_heads] += first.transpose(0, 1).reshape(-1, size).to(line.dtype)
    return line


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Sequence[Piece], call: Call
) -> torch.Tensor:
    """The same by PyTorch's fused attention, differentiated by autograd; what all rows share is copied for each row."""
    outs = []
    for block, q_at, k_at in zip(call.blocks, call.places.queries, call.places.keys, strict=True):
        shape = (block.rows, call.places.kv_heads)
        q = _gather(query, q_at, math.prod(shape)).unflatten(0, shape)  # [R, K, G * T, D]
        own = [_gather(x, k_at, math.prod(shape)).unflatten(0, shape) for x in (key, value)]
        keys, values = (
            torch.cat([*(piece[i].expand(block.rows, -1, -1, -1) for piece in pieces), own[i]], dim=2) for i in (0, 1)
        )
        bias = block.bias(call.window, q.dtype)
        if bias is not None:
            group = q.shape[2] // block.width
            bias = bias[:, 0].expand(-1, group, -1, -1).reshape(bias.shape[0], 1, q.shape[2], -1)
        out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)
        outs.append(out.reshape(-1, out.shape[-1]))
    return _joined(outs).index_select(0, call.places.query_slots)
