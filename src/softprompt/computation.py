"""Nothing is computed twice: the loss of a batch and its gradient, sharing whatever rows have in common.

A row of ids is cut where the rules of a causal model allow:

    [ shared by all rows of the batch      | own text before any soft token | the rest ]
    [ constant text | soft tokens and text |                                |          ]
      once a process  once an optimiser step  once a row, kept                 each step

"Once a step" is done as a split backward pass: the states of the shared part are computed with a graph, then cut off as
leaves; every micro-batch adds its gradient to the leaves; at the end one backward pass goes through the few shared
tokens. The plain reference (`exact_reference=True`) concatenates everything in every row and asks the model itself.
Both give the same loss and the same gradient (tests/test_computation.py, to 1e-10 in float64).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .attention import Pass, StateCache, States, join
from .backbone import Backbone
from .losses import PIECE, log_probabilities, loss_of_hidden, summed_cross_entropy
from .placement import Row, embed_with_soft, first_soft, in_line, in_rectangle, shared_length


@dataclass
class LossAndGradient:
    """loss: natural-log cross-entropy summed over `tokens` label tokens. gradient: d loss / d vectors, [P, H]."""

    loss: float
    tokens: int
    gradient: torch.Tensor


def shared_states(
    backbone: Backbone, ids: Sequence[int], vectors: torch.Tensor | None, cache: StateCache | None = None
) -> States:
    """States of tokens that stand before every row: S ids (soft ones from `vectors` [P, H]) -> L x [1, K, S, D].

    With a graph to `vectors` where gradients are enabled. Constant text before the first soft token comes from `cache`,
    and so does the whole where no gradient is wanted and the same vectors have been seen.
    """
    if not ids:
        return States([], [])
    constant = first_soft(ids)
    key: tuple[object, ...] = ()
    if cache and vectors is not None and constant < len(ids) and not torch.is_grad_enabled():
        key = ("prompt", tuple(ids), _digest(vectors))
        kept = cache.get(key)
        if kept is not None:
            return kept
    before = _constant_states(backbone, tuple(ids[:constant]), cache)
    if constant == len(ids):
        return before
    rest = torch.tensor(ids[constant:], device=backbone.device)
    embeddings = embed_with_soft(rest, vectors, backbone.embed)
    positions = torch.arange(constant, len(ids), device=backbone.device)
    rows = Pass([len(rest)], shared=before if constant else None, record=True, device=backbone.device)
    backbone.hidden(embeddings, positions, rows)
    states = join([before, rows.states()])
    if cache and key:
        cache.put(key, states)
    return states


def _digest(vectors: torch.Tensor) -> int:
    return int.from_bytes(hashlib.sha256(vectors.detach().cpu().float().numpy().tobytes()).digest()[:16], "big")


@torch.no_grad()
def _constant_states(backbone: Backbone, ids: tuple[int, ...], cache: StateCache | None) -> States:
    if not ids:
        return States([], [])
    states = cache.get(("constant", ids)) if cache else None
    if states is None:
        line = torch.tensor(ids, device=backbone.device)
        rows = Pass([len(ids)], record=True, device=backbone.device)
        backbone.hidden(backbone.embed(line), torch.arange(len(ids), device=backbone.device), rows)
        states = rows.states()
        states.lengths = None
        if cache:
            cache.put(("constant", ids), states)
    return states


def text_ends(rows: Sequence[Row], start: int) -> list[int]:
    """Where each row's own text before any soft token ends, at least `start`; `start` if no soft token follows.

    At least the last token of the context is left to the row, since its output is needed.
    """
    if not any(first_soft(row.ids) < len(row.ids) for row in rows):
        return [start] * len(rows)
    return [max(start, min(first_soft(row.ids), row.answer - 1)) for row in rows]


@torch.no_grad()
def text_states(
    backbone: Backbone, rows: Sequence[Row], start: int, shared: States, cache: StateCache | None = None
) -> tuple[States | None, list[int]]:
    """States of each row's own text from `start` to its first soft token, and where each row goes on.

    Such text is the same at every step: rows that `keep_texts` has put into `cache` are not computed again. Returns
    (None, starts) if no row has any such text.
    """
    ends = text_ends(rows, start)
    if all(end == start for end in ends):
        return None, ends
    kept = [cache.get(_text_key(row, start, end)) if cache else None for row, end in zip(rows, ends, strict=True)]
    missing = [i for i, states in enumerate(kept) if states is None and ends[i] > start]
    if missing:
        fresh = _compute_texts(backbone, [rows[i] for i in missing], start, [ends[i] for i in missing], shared)
        for i, states in zip(missing, fresh, strict=True):
            kept[i] = states
    return _pad(kept, backbone), ends


def _text_key(row: Row, start: int, end: int) -> tuple[object, ...]:
    return ("text", start, row.ids[:end])


def _compute_texts(
    backbone: Backbone, rows: Sequence[Row], start: int, ends: Sequence[int], shared: States
) -> list[States]:
    line = in_line(
        [Row(row.ids[:end], end) for row, end in zip(rows, ends, strict=True)], [start] * len(rows), backbone.device
    )
    passed = Pass(line.lengths, shared if shared.size else None, record=True, device=backbone.device)
    backbone.hidden(backbone.embed(line.ids), line.positions, passed)
    fresh = passed.states()
    return [
        States(
            [k[i : i + 1, :, : end - start].clone() for k in fresh.keys],
            [v[i : i + 1, :, : end - start].clone() for v in fresh.values],
        )
        for i, end in enumerate(ends)
    ]


@torch.no_grad()
def keep_texts(
    backbone: Backbone,
    rows: Sequence[Row],
    start: int,
    cache: StateCache,
    *,
    micro_batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda rows: None,
) -> bool:
    """Compute the texts of a whole data set that stand before any soft token, once, into `cache`.

    All or nothing: returns False, having computed nothing, if no row has such a text, if soft tokens stand in what
    `rows` share, or if the states of all would not fit. Rows are taken in their own order, so that the same data give
    the same bytes whenever a run is resumed. advance: called with the rows finished.
    """
    ends = text_ends(rows, start)
    if not backbone.fast or first_soft(rows[0].ids[:start]) < start or all(end == start for end in ends):
        return False
    shared = shared_states(backbone, rows[0].ids[:start], None, cache)
    sample = shared if shared.size else _compute_texts(backbone, rows[:1], start, [start + 1], shared)[0]
    needed = sum(ends) - start * len(rows)
    if needed * sample.nbytes() // sample.size > cache.max_bytes - shared.nbytes():
        return False
    batch: list[int] = []
    for index in range(len(rows) + 1):
        used = sum(ends[i] - start for i in batch)
        if batch and (index == len(rows) or used + ends[index] - start > micro_batch_tokens):
            own = [i for i in batch if ends[i] > start]
            fresh = (
                _compute_texts(backbone, [rows[i] for i in own], start, [ends[i] for i in own], shared) if own else []
            )
            for i, states in zip(own, fresh, strict=True):
                cache.put(_text_key(rows[i], start, ends[i]), states)
            advance(len(batch))
            batch = []
        batch.append(index)
    return True


def _pad(states: Sequence[States | None], backbone: Backbone) -> States:
    """Rows of states [1, K, C_r, D] as one padded [R, K, C, D] with its lengths."""
    lengths = [s.size if s else 0 for s in states]
    some = next(s for s in states if s)
    shape = (len(states), some.keys[0].shape[1], max(lengths), some.keys[0].shape[3])
    keys = [some.keys[0].new_zeros(shape) for _ in some.keys]
    values = [some.keys[0].new_zeros(shape) for _ in some.keys]
    for r, row in enumerate(states):
        if row is not None:
            for layer in range(len(keys)):
                keys[layer][r, :, : lengths[r]] = row.keys[layer][0]
                values[layer][r, :, : lengths[r]] = row.values[layer][0]
    return States(keys, values, torch.tensor(lengths, device=backbone.device))


def micro_batches(rows: Sequence[Row], start: int, budget: int, extra: int = 0) -> Iterator[list[Row]]:
    """Rows of like length together, each micro-batch with at most `budget` own tokens (or a single longer row).

    extra: tokens that will be added to each row.
    """
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    batch: list[Row] = []
    used = 0
    for row in ordered:
        own = len(row.ids) - start + extra
        if batch and used + own > budget:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += own
    if batch:
        yield batch


def loss_and_gradient(
    backbone: Backbone,
    rows: Sequence[Row],
    vectors: torch.Tensor,
    *,
    exact_reference: bool = False,
    micro_batch_tokens: int = 1024,
    start: int | None = None,
    cache: StateCache | None = None,
) -> LossAndGradient:
    """Summed cross-entropy of the answers of `rows` given the soft prompt `vectors` [P, H], and its gradient [P, H].

    exact_reference: by the plain concatenation of every row and the model's own forward, for tests and for whoever
    doubts the fast path. micro_batch_tokens bounds the memory and changes nothing else. start: how many leading ids all
    rows have in common; by default what these do. cache: of constant text, and of what `keep_texts` put there.
    """
    assert all(row.answer < len(row.ids) for row in rows), "every row needs an answer"
    precise = torch.promote_types(torch.float32, backbone.dtype)
    leaf = vectors.detach().to(backbone.device, precise).requires_grad_()
    tokens = sum(len(row.ids) - row.answer for row in rows)
    if exact_reference or not backbone.fast:
        loss = _plain_backward(backbone, rows, leaf, len(rows) if exact_reference else None, micro_batch_tokens)
    else:
        loss = _shared_backward(backbone, rows, leaf, micro_batch_tokens, start, cache)
    gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return LossAndGradient(loss, tokens, gradient)


def plain_budget(backbone: Backbone, budget: int) -> int:
    """Tokens at once for the plain path, which has logits at every one of them."""
    return min(budget, max(1, 4 * PIECE // backbone.vocab_size))


def _plain_backward(
    backbone: Backbone, rows: Sequence[Row], leaf: torch.Tensor, at_once: int | None, budget: int
) -> float:
    batches = [list(rows)] if at_once else list(micro_batches(rows, 0, plain_budget(backbone, budget)))
    total = 0.0
    for batch in batches:
        grid = in_rectangle(batch, backbone.device)
        embeddings = embed_with_soft(grid.ids, leaf, backbone.embed)
        logits = backbone.plain_logits(embeddings, grid.mask, grid.positions)
        loss = summed_cross_entropy(logits[grid.scored], grid.targets)
        loss.backward()
        total += float(loss.detach())
    return total


def _shared_backward(
    backbone: Backbone,
    rows: Sequence[Row],
    leaf: torch.Tensor,
    budget: int,
    start: int | None,
    cache: StateCache | None,
) -> float:
    start = shared_length(rows) if start is None else start
    shared = shared_states(backbone, rows[0].ids[:start], leaf, cache)
    learns = shared.size > 0 and shared.keys[0].requires_grad
    leaves = shared.detached() if learns else shared
    total = 0.0
    for batch in micro_batches(rows, start, budget):
        past, starts = text_states(backbone, batch, start, leaves, cache)
        line = in_line(batch, starts, backbone.device)
        embeddings = embed_with_soft(line.ids, leaf, backbone.embed)
        passed = Pass(line.lengths, leaves if leaves.size else None, past, device=backbone.device)
        scored = backbone.hidden(embeddings, line.positions, passed)[line.scored]
        loss, gradient = loss_of_hidden(scored, line.targets, backbone.head, backbone.vocab_size)
        scored.backward(gradient)
        total += loss
    if learns:
        pairs = [(s, g.grad) for s, g in zip(shared.keys + shared.values, leaves.keys + leaves.values, strict=True)]
        torch.autograd.backward([s for s, g in pairs if g is not None], [g for _, g in pairs if g is not None])
    return total


@torch.no_grad()
def answer_log_probability(
    backbone: Backbone,
    rows: Sequence[Row],
    vectors: torch.Tensor | None,
    *,
    exact_reference: bool = False,
    micro_batch_tokens: int = 1024,
) -> float:
    """log p(answer | context) summed over the answers of all rows, natural logarithm. No gradient is computed."""
    total = 0.0
    if exact_reference or not backbone.fast:
        for batch in micro_batches(rows, 0, plain_budget(backbone, micro_batch_tokens)):
            grid = in_rectangle(batch, backbone.device)
            embeddings = embed_with_soft(grid.ids, vectors, backbone.embed)
            logits = backbone.plain_logits(embeddings, grid.mask, grid.positions)[grid.scored]
            total += float(log_probabilities(logits, grid.targets).cpu().double().sum())
        return total
    start = shared_length(rows)
    shared = shared_states(backbone, rows[0].ids[:start], vectors, backbone.states)
    for batch in micro_batches(rows, start, micro_batch_tokens):
        line = in_line(batch, [start] * len(batch), backbone.device)
        passed = Pass(line.lengths, shared if shared.size else None, device=backbone.device)
        hidden = backbone.hidden(embed_with_soft(line.ids, vectors, backbone.embed), line.positions, passed)
        at_once = max(1, PIECE // backbone.vocab_size)
        pieces = zip(hidden[line.scored].split(at_once), line.targets.split(at_once), strict=True)
        total += sum(float(log_probabilities(backbone.head(h), t).cpu().double().sum()) for h, t in pieces)
    return total
