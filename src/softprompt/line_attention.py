"""The products of attention for rows that stand in one line, and their gradient, written out.

Tokens of all rows stand in one line, [N, heads, D]. Rows of like length form a block. For a block the queries and keys
are gathered from the line into rectangles, the query heads that share a key-value head laid out as further queries of
it, so that no key is repeated; gathering, and putting back into the line what is computed, is one step for all blocks.
Autograd would do the same through some hundred small operations a layer, which took longer than the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Piece = tuple[torch.Tensor, torch.Tensor]  # keys and values that stand before the rows, [R or 1, K, S, D] each
# A further block takes as long as so many pairs of a query and a key: some 40 operations, of which most are short.
APART = 8192


def alike(lengths: Sequence[int], lead: int = 0) -> list[list[int]]:
    """The numbers of the rows in groups of like length, the longest first: rows that are shorter go into a group of
    their own where that spares more pairs of empty slots than a further group is worth. lead: keys besides a row's own.
    """

    def cut(rows: list[int]) -> list[list[int]]:
        pairs = [lengths[row] * (lead + lengths[row]) for row in rows]
        spared = [(pairs[0] - mine) * (len(rows) - i) for i, mine in enumerate(pairs)]
        most = max(spared, default=0)
        if most <= APART:
            return [rows] if rows else []
        at = spared.index(most)
        return cut(rows[:at]) + cut(rows[at:])

    return cut(sorted(range(len(lengths)), key=lambda row: -lengths[row]))


@dataclass
class Block:
    """R rows of at most T own tokens that are attended in one product.

    tokens: [R, T], the number in line of each slot's token, 0 in an empty slot; real: [R, T], which are not empty.
    before: size and lengths ([R] or None) of each piece that stands before the rows. lead: so many tokens at the
    beginning of the line stand between those and the rows. parents: as in `Pass`. has_lead: the last row is the lead
    itself, which sees only its own.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    before: Sequence[tuple[int, torch.Tensor | None]]
    lead: int
    parents: Sequence[int] | None
    device: torch.device
    has_lead: bool = False

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
        of_lead = None
        if self.has_lead:
            of_lead = torch.full((self.rows,), self.lead)
            of_lead[-1] = 0
        for size, lengths in [*self.before, (self.lead, of_lead)]:
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
    """Where everything goes, for a model with H query heads and K key-value heads, G = H / K, J = H + 2 K.

    A line of queries, keys and values side by side is seen as [N * J, D]; of each block there are rectangles of queries
    [R, K, G, T], keys and values [R, K, lead + T], one after the other. gathered: the places in line of the rectangles
    of all blocks. slots: [N * J], where each place of the line stands among all these. query_slots: [N * H], where each
    query stands among the rectangles of queries alone.
    """

    def __init__(self, blocks: Sequence[Block], heads: int, kv_heads: int):
        device = blocks[0].device
        self.heads, self.kv_heads, self.joined = heads, kv_heads, heads + 2 * kv_heads
        of_head, of_kv = torch.arange(heads), heads + torch.arange(kv_heads)
        count = 1 + max(int(block.tokens.max()) for block in blocks)
        slots = torch.empty(count, self.joined, dtype=torch.long)
        query_slots = torch.empty(count, heads, dtype=torch.long)
        gathered: list[torch.Tensor] = []
        self.sizes: list[tuple[int, int]] = []  # places of queries and of keys in each block
        begin = queries_before = 0
        for block in blocks:
            lead = torch.arange(block.lead).expand(block.rows, -1)
            queries = block.tokens[:, None] * self.joined + of_head[:, None]  # [R, H, T]
            keys = torch.cat([lead, block.tokens], dim=1)[:, None] * self.joined + of_kv[:, None]  # [R, K, lead + T]
            gathered += [queries.flatten(), keys.flatten(), keys.flatten() + kv_heads]
            sizes = queries.numel(), keys.numel()
            row, slot = block.real.nonzero().T
            mine = block.tokens[block.real]
            of_queries = ((row * heads)[:, None] + torch.arange(heads)) * block.width + slot[:, None]
            of_keys = ((row * kv_heads)[:, None] + torch.arange(kv_heads)) * block.own + block.lead + slot[:, None]
            of_keys += begin + sizes[0]
            slots[mine] = torch.cat([begin + of_queries, of_keys, of_keys + sizes[1]], dim=1)
            query_slots[mine] = queries_before + of_queries
            begin, queries_before = begin + sizes[0] + 2 * sizes[1], queries_before + sizes[0]
            self.sizes.append(sizes)
        self.queries, self.all = queries_before, begin
        self.gathered = torch.cat(gathered).to(device)
        self.slots, self.query_slots = slots.flatten().to(device), query_slots.flatten().to(device)

    def rectangles(self, gathered: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Queries, keys and values of each block, views of [all, D]."""
        parts = gathered.split([size for queries, keys in self.sizes for size in (queries, keys, keys)])
        return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))


@dataclass(frozen=True)
class Call:
    """What one layer asks for, besides its tensors. scale: of the products of queries and keys."""

    blocks: Sequence[Block]
    places: Places
    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(joined: torch.Tensor, pieces: Sequence[Piece], call: Call, fused: bool) -> torch.Tensor:
    """Attention of a line, queries, keys and values side by side [N, H + 2 K, D], behind `pieces`: [N, H, D].

    fused: by PyTorch's own attention, which keeps no scores for the backward pass; for long rows.
    """
    line = joined.reshape(-1, joined.shape[-1])
    if fused:
        out = _fused(line, pieces, call)
    else:
        out = _Attention.apply(line, call, *(tensor for piece in pieces for tensor in piece))
    return out.view(len(joined), call.places.heads, -1)


class _Attention(torch.autograd.Function):
    """A line [N * (H + 2 K), D], then keys and values of each piece in turn -> [N * H, D]."""

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, call: Call, *before: torch.Tensor) -> torch.Tensor:
        places, kv_heads = call.places, call.places.kv_heads
        gathered = line.index_select(0, places.gathered)
        outs = line.new_empty(places.queries, line.shape[-1])
        saved = []
        of_blocks = outs.split([queries for queries, _ in places.sizes])
        for block, rectangles, out in zip(call.blocks, places.rectangles(gathered), of_blocks, strict=True):
            q, *own = _of_heads(rectangles, block, kv_heads)
            keys, values = (_multiplied(before[i::2], own[i], q, kv_heads) for i in (0, 1))
            scores = _joined([_times(q, transposed(key), kv_heads) for key in keys])  # [R * K, G * T, all keys]
            bias = block.bias(call.window, scores.dtype)
            if call.softcap:
                scores = torch.tanh(scores * (call.scale / call.softcap)) * call.softcap
            capped = scores.clone() if call.softcap else q[:0]
            _scale_and_add(scores, 1 if call.softcap else call.scale, bias, block, kv_heads)
            weights = _softmax(scores)
            *of_others, mine = weights.split([value.shape[2] for value in values], dim=-1)
            seen = out.view(q.shape)
            torch.bmm(mine, values[-1].flatten(0, 1), out=seen)
            for others, value in zip(of_others, values, strict=False):
                seen += _times(others, value, kv_heads)
            saved += [weights, capped]
        ctx.save_for_backward(*before, gathered, *saved)
        ctx.call, ctx.before = call, len(before)
        return outs.index_select(0, places.query_slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, before, (gathered, *saved) = ctx.call, ctx.saved_tensors[: ctx.before], ctx.saved_tensors[ctx.before :]
        places, kv_heads = call.places, call.places.kv_heads
        # An empty slot has seen something too, but what it saw counts for nothing.
        of_outs = gradient.new_zeros(places.queries, gradient.shape[-1]).index_copy_(0, places.query_slots, gradient)
        found = torch.empty_like(gathered)
        of_before: list[torch.Tensor | None] = [None] * len(before)
        of_blocks = of_outs.split([queries for queries, _ in places.sizes])
        of_each = (
            call.blocks,
            of_blocks,
            places.rectangles(gathered),
            places.rectangles(found),
            saved[::2],
            saved[1::2],
        )
        for block, mine, rectangles, gradients, weights, capped in zip(*of_each, strict=True):
            q, *own = _of_heads(rectangles, block, kv_heads)
            of_query, *of_own = _of_heads(gradients, block, kv_heads)
            g = mine.view(q.shape)
            keys, values = (_multiplied(before[i::2], own[i], q, kv_heads) for i in (0, 1))
            of_weights = _joined([_times(g, transposed(value), kv_heads) for value in values])
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            if call.softcap:
                of_scores *= 1 - (capped / call.softcap) ** 2
            of_scores *= call.scale
            *of_others, of_mine = of_scores.split([key.shape[2] for key in keys], dim=-1)
            torch.bmm(of_mine, keys[-1].flatten(0, 1), out=of_query)
            for others, key in zip(of_others, keys, strict=False):
                of_query += _times(others, key, kv_heads)
            for i, (left, right) in enumerate(((of_scores, q), (weights, g))):
                needed = ctx.needs_input_grad[2 + i :: 2]
                of_pieces = _key_gradients(left, right, before[i::2], needed, of_own[i], kv_heads)
                of_before[i::2] = [_added(*both) for both in zip(of_before[i::2], of_pieces, strict=True)]
        return _back_in_line(found, call), None, *of_before


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax with its sums in float32 at least.

    On a CPU that of half precision takes up to five times as long where the number of keys is no multiple of 32.
    """
    if scores.device.type == "cpu" and scores.element_size() < 4:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _of_heads(rectangles: Sequence[torch.Tensor], block: Block, kv_heads: int) -> list[torch.Tensor]:
    """Queries [R * K, G * T, D], keys and values [R * K, lead + T, D]."""
    return [x.view(block.rows * kv_heads, -1, x.shape[-1]) for x in rectangles]


def _multiplied(
    pieces: Sequence[torch.Tensor], own: torch.Tensor, q: torch.Tensor, kv_heads: int
) -> list[torch.Tensor]:
    """Keys (or values) as queries are multiplied with them: pieces [R or 1, K, S, D] and the rows' own [R * K, T, D].

    Side by side for each row, [R, K, all, D], or, where their copies would be more than the scores are, apart.
    """
    rows = own.unflatten(0, (-1, kv_heads))
    if not pieces or not _side_by_side(q):
        return [*pieces, rows]
    return [torch.cat([*(piece.expand(len(rows), -1, -1, -1) for piece in pieces), rows], dim=2)]


def _side_by_side(q: torch.Tensor) -> bool:
    """Whether a key's part in the scores of q [R * K, G * T, D] is larger than the key."""
    return q.shape[1] >= q.shape[2]


def _joined(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(scores), dim=-1) if len(scores) > 1 else scores[0]


def _key_gradients(
    left: torch.Tensor,
    right: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    needed: Sequence[bool],
    of_own: torch.Tensor,
    kv_heads: int,
) -> list[torch.Tensor | None]:
    """Gradients of keys (or values): left^T right, [R * K, G * T, all keys] and [R * K, G * T, D].

    That of the rows' own is put into of_own [R * K, own, D], those of `pieces` which are needed are returned.
    """
    sizes = [*(piece.shape[2] for piece in pieces), of_own.shape[1]]
    found: list[torch.Tensor | None] = [None] * len(pieces)
    if not any(needed) or not _side_by_side(right):
        *of_pieces, mine = left.split(sizes, dim=-1)
        torch.bmm(mine.transpose(1, 2), right, out=of_own)
        for number, piece in enumerate(pieces):
            if needed[number]:
                found[number] = _piece_gradient(of_pieces[number], right, piece)
        return found
    first = list(needed).index(True)
    together = torch.bmm(left[..., sum(sizes[:first]) :].transpose(1, 2), right).unflatten(0, (-1, kv_heads))
    *of_pieces, mine = together.split(sizes[first:], dim=2)
    of_own.view(mine.shape).copy_(mine)
    precise = torch.promote_types(torch.float32, right.dtype)
    for number, of_piece in enumerate(of_pieces, first):
        of_rows = pieces[number].shape[0] == len(mine)
        found[number] = of_piece if of_rows else of_piece.sum(0, keepdim=True, dtype=precise).to(right.dtype)
    return found


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _scale_and_add(scores: torch.Tensor, scale: float, bias: torch.Tensor | None, block: Block, kv_heads: int) -> None:
    """scores * scale + bias, in place: one pass over the scores [R * K, G * T, all keys]."""
    if bias is None:
        scores *= scale
    else:
        of_heads = scores.view(block.rows, kv_heads, -1, block.width, scores.shape[-1])
        torch.add(bias, of_heads, alpha=scale, out=of_heads)


def transposed(states: torch.Tensor) -> torch.Tensor:
    """[..., S, D] -> [..., D, S] for a product.

    On a CPU in bfloat16 a product with the transposed view of a part of a longer tensor copies it number by number, and
    takes two to three times as long as copying the part first.
    """
    if states.dtype == torch.bfloat16 and states.device.type == "cpu":
        states = states.contiguous()
    return states.transpose(-2, -1)


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


def _back_in_line(found: torch.Tensor, call: Call) -> torch.Tensor:
    """Gradients of gathered queries, keys and values, [all, D], added up in line: [N * (H + 2 K), D]."""
    places, size = call.places, found.shape[-1]
    line = found.index_select(0, places.slots)
    if not call.blocks[0].lead:
        return line
    precise = torch.promote_types(torch.float32, found.dtype)
    of_lead = torch.zeros(call.blocks[0].lead, 2 * places.kv_heads, size, dtype=precise, device=found.device)
    begin = 0
    for block, (queries, keys) in zip(call.blocks, places.sizes, strict=True):
        if block.lead:
            of_keys = found[begin + queries : begin + queries + 2 * keys]  # and of values
            of_keys = of_keys.view(2, block.rows, places.kv_heads, block.own, size)[:, :, :, : block.lead]
            of_lead += of_keys.sum(dim=1, dtype=precise).flatten(0, 1).transpose(0, 1)
        begin += queries + 2 * keys
    line.view(-1, places.joined, size)[: len(of_lead), places.heads :] += of_lead.to(line.dtype)
    return line


def _fused(line: torch.Tensor, pieces: Sequence[Piece], call: Call) -> torch.Tensor:
    """The same by PyTorch's fused attention, differentiated by autograd; what all rows share is copied for each row."""
    outs, places = [], call.places
    rectangles = places.rectangles(line.index_select(0, places.gathered))
    for block, (q, *own) in zip(call.blocks, rectangles, strict=True):
        shape = (block.rows, places.kv_heads, -1, line.shape[-1])
        q = q.view(shape)  # [R, K, G * T, D]
        keys, values = (
            torch.cat([*(piece[i].expand(block.rows, -1, -1, -1) for piece in pieces), own[i].view(shape)], dim=2)
            for i in (0, 1)
        )
        bias = block.bias(call.window, q.dtype)
        if bias is not None:
            group = q.shape[2] // block.width
            bias = bias[:, 0].expand(-1, group, -1, -1).reshape(bias.shape[0], 1, q.shape[2], -1)
        out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=call.scale)
        outs.append(out.reshape(-1, out.shape[-1]))
    return torch.cat(outs).index_select(0, places.query_slots)
