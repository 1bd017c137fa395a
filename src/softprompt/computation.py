"""Nothing is computed twice: the loss of a batch and its gradient, sharing whatever rows have in common.

A row of ids is cut where the rules of a causal model allow:

    [ shared by all rows of the batch      | own text before any soft token | the rest ]
    [ constant text | soft tokens and text |                                |          ]
      once a process  once an optimiser step  once a row, kept                 each step

"Once a step" is one pass with the rows, where they are one micro-batch. Where they are more it is a split backward
pass: the states of the shared part are computed with a graph, then cut off as leaves; every micro-batch adds its
gradient to the leaves; at the end one backward pass goes through the few shared tokens. A deep prompt is states from
the start. The plain reference (`exact_reference=True`) concatenates everything in every row and asks the model itself.
All give the same loss and the same gradient (tests/test_computation.py, to 1e-10 in float64).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .attention import Pass, StateCache, States, join
from .backbone import Backbone
from .errors import BackboneError, TemplateError
from .losses import PIECE, log_probabilities, losses_of_hidden, summed_cross_entropy
from .placement import Line, Row, embed_with_soft, first_soft, in_line, in_rectangle, shared_length
from .rotary import moved

Ids = tuple[int, ...]
AnyRow = TypeVar("AnyRow", bound=Row)
# Keys and values of a token take a tenth or less of the memory that its computation takes for the backward pass; they
# are copied once or twice.
LIGHT = 8
TOLD_ROWS = 256  # rows whose texts are looked up between two calls that tell how far it is


@dataclass
class LossAndGradient:
    """loss: natural-log cross-entropy summed over `tokens` label tokens. gradient: d loss / d vectors, same shape."""

    loss: float
    tokens: int
    gradient: torch.Tensor


def is_deep(vectors: torch.Tensor | None) -> bool:
    """Whether a prompt (or each in a stack) is keys and values in each layer, [L, 2, K, P, D], not vectors [P, H]."""
    return vectors is not None and vectors.ndim >= 5


def prompt_length(vectors: torch.Tensor | None) -> int:
    """P, the number of soft tokens of a prompt of either kind, or of each in a stack; 0 without one."""
    return 0 if vectors is None else vectors.shape[-2]


def stacked(vectors: torch.Tensor) -> torch.Tensor:
    """A prompt as a stack of one, [1, P, H] or [1, L, 2, K, P, D]; a stack as it is.

    What is computed before all rows takes a stack of all prompts, what is computed of rows one with a prompt for each.
    """
    return vectors if vectors.ndim in (3, 6) else vectors[None]


def deep_states(backbone: Backbone, vectors: torch.Tensor) -> States:
    """A deep prompt as the states of P tokens at positions 0 to P - 1; a stack of R of them as those of R rows."""
    layers = stacked(vectors).to(backbone.device, backbone.dtype).unbind(dim=1)
    return States([layer[:, 0] for layer in layers], [layer[:, 1] for layer in layers])


@torch.no_grad()
def deep_from_tokens(backbone: Backbone, vectors: torch.Tensor) -> torch.Tensor:
    """The deep prompt [L, 2, K, P, D] that says what the embeddings [P, H] say: the states they have at the front.

    Raises BackboneError where the model's own cache forgets some of them, since P is longer than its sliding window.
    """
    precise = torch.promote_types(torch.float32, backbone.dtype)
    soft = [-(i + 1) for i in range(len(vectors))]
    if backbone.fast:
        states = shared_states(backbone, soft, vectors.to(backbone.device))
        layers = list(zip(states.keys, states.values, strict=True))
    else:
        embeddings = embed_with_soft(torch.tensor([soft], device=backbone.device), vectors, backbone.embed)
        cache = backbone.model(inputs_embeds=embeddings, use_cache=True).past_key_values
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if kept := [key.shape[2] for key, _ in layers if key.shape[2] != len(vectors)]:
            raise BackboneError(
                f"{backbone.name} keeps no more than {min(kept)} tokens in a layer with a sliding window, a deep "
                f"prompt of {len(vectors)} needs them all: tune fewer tokens, or an embedding prompt"
            )
    return torch.stack([torch.stack([key[0], value[0]]) for key, value in layers]).to("cpu", precise)


def split_shared(
    backbone: Backbone, ids: Sequence[int], vectors: torch.Tensor | None, cache: StateCache | None = None
) -> tuple[States, Ids]:
    """Of the tokens before every row: states that need no computation now, and the tokens left to be computed.

    Constant text before the first soft token comes from `cache`; a deep prompt is states already (of a stack, those of
    a row each).
    """
    constant = first_soft(ids)
    before = _constant_states(backbone, tuple(ids[:constant]), cache)
    if constant < len(ids) and vectors is not None and is_deep(vectors):
        after = constant + prompt_length(vectors)
        if after > len(ids):
            raise _no_tail(backbone)
        deep = deep_states(backbone, vectors)
        place = torch.tensor([constant] * deep.rows, device=backbone.device)
        before = join([before.expanded(deep.rows), moved(backbone, deep, place)])
        constant = after
    return before, tuple(ids[constant:])


def _no_tail(backbone: Backbone) -> TemplateError:
    return TemplateError(
        f"a deep prompt has no token of its own to answer from ({backbone.name} must read something after it): put at "
        "least one character of text between {soft} and the answer"
    )


def shared_states(
    backbone: Backbone, ids: Sequence[int], vectors: torch.Tensor | None, cache: StateCache | None = None
) -> States:
    """States of tokens that stand before every row: S ids (soft ones from `vectors`) -> L x [1, K, S, D], or of a stack
    of R prompts [R, K, S, D], where there are soft ones.

    With a graph to `vectors` where gradients are enabled. Constant text before the first soft token comes from `cache`,
    and so does the whole where no gradient is wanted and the same vectors have been seen.
    """
    if not ids:
        return States([], [])
    key: tuple[object, ...] = ()
    if cache and vectors is not None and first_soft(ids) < len(ids) and not torch.is_grad_enabled():
        key = ("prompt", tuple(ids), tuple(vectors.shape), _digest(vectors))
        kept = cache.get(key)
        if kept is not None:
            return kept
    before, left = split_shared(backbone, ids, vectors, cache)
    if not left:
        return before
    count = 1 if vectors is None or first_soft(ids) == len(ids) else len(stacked(vectors))
    rest = torch.tensor(left, device=backbone.device).repeat(count)
    owners = torch.arange(count, device=backbone.device).repeat_interleave(len(left))
    embeddings = embed_of_owners(backbone, rest, owners, vectors)
    positions = torch.arange(len(ids) - len(left), len(ids), device=backbone.device).repeat(count)
    rows = Pass([len(left)] * count, [before], record=True, device=backbone.device)
    backbone.hidden(embeddings, positions, rows, rest[:0])
    states = join([before.expanded(count), rows.states()])
    if cache and key:
        cache.put(key, states)
    return states


def embed_of_owners(
    backbone: Backbone, ids: torch.Tensor, owners: torch.Tensor, vectors: torch.Tensor | None
) -> torch.Tensor:
    """Embeddings [N, H] of ids [N], the soft ones taken from prompt owners[n] [N] of a stack [R, P, H]."""
    if vectors is None or is_deep(vectors):
        return embed_with_soft(ids, None, backbone.embed)
    flat = stacked(vectors).flatten(0, 1)
    return embed_with_soft(ids - owners * prompt_length(vectors) * (ids < 0), flat, backbone.embed)


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
        backbone.hidden(backbone.embed(line), torch.arange(len(ids), device=backbone.device), rows, line[:0])
        states = rows.states()
        if cache:
            cache.put(("constant", ids), states)
    return states


def text_ends(rows: Sequence[Row], start: int, cache: StateCache | None = None) -> list[int]:
    """Where each row's own text before any soft token ends, at least `start`.

    Where no soft token follows (the template without a prompt) it is as much as `cache` holds from a prompt's rows. At
    least the last token of the context is left to the row, since its output is needed.
    """
    if not any(first_soft(row.ids) < len(row.ids) for row in rows):
        return [_kept_text(row, start, cache) if cache else start for row in rows]
    return [max(start, min(first_soft(row.ids), row.answer - 1)) for row in rows]


@torch.no_grad()
def text_states(
    backbone: Backbone, rows: Sequence[Row], start: int, shared: States, cache: StateCache | None = None
) -> tuple[States | None, list[int]]:
    """States of each row from its beginning to its first soft token, and where each row goes on.

    shared: those of ids[:start], the same in all rows. The text behind them is the same at every step: rows that
    `keep_texts` has put into `cache` are not computed again. Returns (None, starts) if no row has any such text.
    """
    ends = text_ends(rows, start, cache)
    if all(end == start for end in ends):
        return None, ends
    kept = [cache.get(_text_key(row, start, end)) if cache else None for row, end in zip(rows, ends, strict=True)]
    missing = [i for i, states in enumerate(kept) if states is None and ends[i] > start]
    if missing:
        fresh = _compute_texts(backbone, [rows[i] for i in missing], start, [ends[i] for i in missing], shared)
        for i, states in zip(missing, fresh, strict=True):
            kept[i] = states
    return _pad(shared, kept, backbone), ends


def before_rows(
    backbone: Backbone,
    rows: Sequence[Row],
    start: int,
    shared: States,
    vectors: torch.Tensor | None,
    cache: StateCache | None = None,
) -> tuple[list[States], list[int]]:
    """All that stands before each row's own tokens, and where each row goes on.

    shared: states of ids[:start], the same in all rows (or, with a soft token there and a prompt for each row, each
    row's). Then come the row's text before any soft token, and a deep prompt that stands behind that text. vectors: one
    prompt for all rows, or a stack of one for each. Raises TemplateError where nothing is left to answer from.
    """
    past, starts = text_states(backbone, rows, start, shared, cache)
    before = [shared if past is None else past]
    if vectors is not None and is_deep(vectors) and any(id < 0 for id in rows[0].ids[start:]):
        assert all(row.ids[begin] == -1 for row, begin in zip(rows, starts, strict=True)), "one place for a deep prompt"
        offsets = torch.tensor(starts, device=backbone.device)
        before.append(moved(backbone, deep_states(backbone, vectors), offsets))
        starts = [begin + prompt_length(vectors) for begin in starts]
        if any(begin >= row.answer for row, begin in zip(rows, starts, strict=True)):
            raise _no_tail(backbone)
    return before, starts


def _kept_text(row: Row, start: int, cache: StateCache) -> int:
    """Where the longest beginning of the row's context ends whose states are kept; `start` if there is none."""
    ends = range(row.answer - 1, start, -1)
    return next((end for end in ends if _text_key(row, start, end) in cache), start)


def _text_key(row: Row, start: int, end: int) -> tuple[object, ...]:
    return ("text", start, row.ids[:end])


def _compute_texts(
    backbone: Backbone, rows: Sequence[Row], start: int, ends: Sequence[int], shared: States
) -> list[States]:
    line = in_line(
        [Row(row.ids[:end], end) for row, end in zip(rows, ends, strict=True)], [start] * len(rows), backbone.device
    )
    passed = Pass(line.lengths, [shared], record=True, device=backbone.device)
    backbone.hidden(backbone.embed(line.ids), line.positions, passed, line.ids[:0])
    fresh = passed.states()
    packed = torch.stack([*fresh.keys, *fresh.values])
    return [States.of_packed(packed[:, i : i + 1, :, : end - start].clone()) for i, end in enumerate(ends)]


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
    `rows` share, or if the states of all would not fit (or, having computed them, if they could not be written). What
    `cache` holds already is not computed again, and rows without soft tokens find what others have put there. Rows are
    taken in their own order, so that the same data give the same bytes whenever a run is resumed. advance: called with
    the rows finished.
    """
    ends = text_ends(rows, start, cache)
    if not backbone.fast or first_soft(rows[0].ids[:start]) < start or all(end == start for end in ends):
        return False
    missing = _missing_texts(rows, start, ends, cache, advance)
    if not missing:
        return True
    shared = shared_states(backbone, rows[0].ids[:start], None, cache)
    sample = shared if shared.size else _compute_texts(backbone, [rows[missing[0]]], start, [start + 1], shared)[0]
    if not cache.plan(sum(ends[i] - start for i in missing), sample):
        return False
    for batch in _in_order(missing, [end - start for end in ends], micro_batch_tokens):
        fresh = _compute_texts(backbone, [rows[i] for i in batch], start, [ends[i] for i in batch], shared)
        for i, states in zip(batch, fresh, strict=True):
            cache.put(_text_key(rows[i], start, ends[i]), states)
        cache.end_batch()
        advance(len(batch))
    return cache.finish()


def _missing_texts(
    rows: Sequence[Row], start: int, ends: Sequence[int], cache: StateCache, advance: Callable[[int], None]
) -> list[int]:
    """Which rows have a text that `cache` does not hold. What it holds on disk is read here, which takes a while."""
    keys = [_text_key(row, start, end) for row, end in zip(rows, ends, strict=True)]
    mine = [i for i, end in enumerate(ends) if end > start]
    advance(len(rows) - len(mine))
    told = 0
    for number in range(TOLD_ROWS, len(mine) + TOLD_ROWS, TOLD_ROWS):
        found = sum(cache.get(keys[i]) is not None for i in mine[number - TOLD_ROWS : number])
        advance(found)
        told += found
    missing = [i for i in mine if keys[i] not in cache]
    if told > len(mine) - len(missing):  # a file turned out to be damaged after some of it had been used
        advance(len(mine) - len(missing) - told)
    return missing


def _in_order(indices: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive `indices` in batches of at most `budget` tokens, or of one index."""
    batch: list[int] = []
    for index in indices:
        if batch and sum(sizes[i] for i in (*batch, index)) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(shared: States, states: Sequence[States | None], backbone: Backbone) -> States:
    """Rows of states [1, K, C_r, D], each behind the shared ones, as one padded [R, K, S + C, D] with its lengths.

    A copy of what is shared for every row costs less than a piece of its own in each product of attention.
    """
    assert not any(key.requires_grad for key in shared.keys), "no soft token stands before such texts"
    front = shared.size
    lengths = [front + s.size if s else front for s in states]
    some = next(s for s in states if s)
    sample = some.keys[0]
    # Only what is padding is filled with zeros: these are tens of megabytes at every step.
    packed = sample.new_empty(2 * len(some.keys), len(states), sample.shape[1], max(lengths), sample.shape[3])
    for place, layer in enumerate([*shared.keys, *shared.values]):
        packed[place, :, :, :front] = layer
    for r, row in enumerate(states):
        packed[:, r, :, lengths[r] :] = 0
        if row is not None:
            one = torch.stack([*row.keys, *row.values]) if row.packed is None else row.packed
            packed[:, r, :, front : lengths[r]] = one[:, 0]
    return States.of_packed(packed, torch.tensor(lengths, device=backbone.device))


def micro_batches(
    rows: Sequence[AnyRow], start: int, budget: int, extra: int = 0, known: Callable[[Row], int] = lambda row: 0
) -> Iterator[list[AnyRow]]:
    """Rows of like length together, in micro-batches of like size with at most `budget` own tokens (or a single longer
    row).

    extra: tokens that will be added to each row. known: how many of a row's tokens from `start` on are states already,
    which take less memory and no computation: `LIGHT` of them count as one.
    """
    sizes = [_counts_as(row, start, extra, known(row)) for row in rows]
    even = sum(sizes) / max(1, math.ceil(sum(sizes) / budget))  # as many as are needed, of like size
    batch: list[AnyRow] = []
    used = 0
    for own, row in sorted(zip(sizes, rows, strict=True), key=lambda sized: -len(sized[1].ids)):
        if batch and (used >= even or used + own > budget):
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += own
    if batch:
        yield batch


def _counts_as(row: Row, start: int, extra: int, known: int) -> int:
    return len(row.ids) - start + extra - known + -(-known // LIGHT)


def known_tokens(start: int, vectors: torch.Tensor | None, cache: StateCache | None) -> Callable[[Row], int]:
    """How many tokens of a row from `start` on are states already: its kept text, and a deep prompt behind it."""

    def known(row: Row) -> int:
        (end,) = text_ends([row], start, cache)
        kept = end - start if cache is not None and _text_key(row, start, end) in cache else 0
        behind = is_deep(vectors) and any(token < 0 for token in row.ids[start:])
        return kept + prompt_length(vectors) * behind

    return known


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
    """Summed cross-entropy of the answers of `rows` given the soft prompt `vectors`, and its gradient.

    vectors: [P, H], or a deep prompt [L, 2, K, P, D]; the gradient has the same shape.

    exact_reference: by the plain concatenation of every row and the model's own forward, for tests and for whoever
    doubts the fast path. micro_batch_tokens bounds the memory and changes nothing else. start: how many leading ids all
    rows have in common; by default what these do. cache: of constant text, and of what `keep_texts` put there.
    """
    assert all(row.answer < len(row.ids) for row in rows), "every row needs an answer"
    precise = torch.promote_types(torch.float32, backbone.dtype)
    leaf = vectors.detach().to(backbone.device, precise).requires_grad_()
    tokens = sum(len(row.ids) - row.answer for row in rows)
    if exact_reference or not backbone.fast:
        batches = [rows] if exact_reference else plain_batches(backbone, rows, micro_batch_tokens)
        loss = _plain_backward(backbone, batches, leaf)
    else:
        loss = _shared_backward(backbone, rows, leaf, micro_batch_tokens, start, cache)
    gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return LossAndGradient(loss, tokens, gradient)


def plain_budget(backbone: Backbone, budget: int) -> int:
    """Tokens at once for the plain path, which has logits at every one of them."""
    return min(budget, max(1, 4 * PIECE // backbone.vocab_size))


def plain_batches(backbone: Backbone, rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Rows to be computed plainly, few enough at once for their logits."""
    return micro_batches(rows, 0, plain_budget(backbone, budget))


def plain_answers(
    backbone: Backbone, rows: Sequence[Row], vectors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the answers of `rows`, by concatenation and the model's own forward: [A, V], [A].

    The reference for everything else. A deep prompt is put into transformers' own cache, row by row.
    """
    if vectors is not None and is_deep(vectors):
        found = [_plain_deep_row(backbone, row, vectors) for row in rows]
        targets = [token for row in rows for token in row.ids[row.answer :] or (-1,)]
        return torch.cat(found), torch.tensor(targets, device=backbone.device)
    grid = in_rectangle(rows, backbone.device)
    embeddings = embed_with_soft(grid.ids, vectors, backbone.embed)
    return backbone.plain_logits(embeddings, grid.mask, grid.positions)[grid.scored], grid.targets


def _plain_deep_row(backbone: Backbone, row: Row, vectors: torch.Tensor) -> torch.Tensor:
    end = len(row.ids) - 1 if row.answer < len(row.ids) else len(row.ids)
    logits, _ = plain_deep_prefill(backbone, row.ids[:end], vectors)
    return logits[row.answer - 1 - end :]


def plain_deep_prefill(backbone: Backbone, ids: Ids, vectors: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Logits [T, V] of the tokens after a deep prompt in one row, and the model's own cache of the whole row."""
    from transformers import DynamicCache

    cache = DynamicCache()
    place, after = first_soft(ids), first_soft(ids) + prompt_length(vectors)
    if after >= len(ids):
        raise _no_tail(backbone)
    if place:
        _plain_piece(backbone, ids[:place], 0, cache)
    states = moved(backbone, deep_states(backbone, vectors), torch.tensor([place], device=backbone.device))
    for layer, (key, value) in enumerate(zip(states.keys, states.values, strict=True)):
        cache.update(key, value, layer)
    return _plain_piece(backbone, ids[after:], after, cache), cache


def _plain_piece(backbone: Backbone, ids: Ids, start: int, cache: Any) -> torch.Tensor:
    line = torch.tensor(ids, device=backbone.device)[None]
    positions = torch.arange(start, start + len(ids), device=backbone.device)[None]
    mask = torch.ones(1, start + len(ids), dtype=torch.long, device=backbone.device)
    return backbone.plain_logits(backbone.embed(line), mask, positions, cache)[0]


def _plain_backward(backbone: Backbone, batches: Iterable[Sequence[Row]], leaf: torch.Tensor) -> float:
    total = 0.0
    for batch in batches:
        loss = summed_cross_entropy(*plain_answers(backbone, batch, leaf))
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
    known, left = split_shared(backbone, rows[0].ids[:start], leaf, cache)
    batches = list(micro_batches(rows, start, budget, known=known_tokens(start, leaf, cache)))
    if left and len(batches) == 1 and len(left) <= budget:
        return _backward_at_once(backbone, batches[0], leaf, known, left)
    shared = shared_states(backbone, rows[0].ids[:start], leaf, cache)
    learns = shared.size > 0 and shared.keys[0].requires_grad
    leaves = shared.detached() if learns else shared
    total = 0.0
    for batch in batches:
        before, starts = before_rows(backbone, batch, start, leaves, leaf, cache)
        line = in_line(batch, starts, backbone.device)
        embeddings = embed_with_soft(line.ids, None if is_deep(leaf) else leaf, backbone.embed)
        passed = Pass(line.lengths, before, device=backbone.device)
        total += _sum(backward_of_line(backbone, embeddings, line.positions, passed, line.scored, line.targets))
    if learns:
        go_back(shared, leaves)
    return total


def go_back(states: States, leaves: States) -> None:
    """The end of a split backward pass: what `leaves`, cut off from `states`, have collected goes on through these."""
    pairs = [(s, g.grad) for s, g in zip(states.keys + states.values, leaves.keys + leaves.values, strict=True)]
    torch.autograd.backward([s for s, g in pairs if g is not None], [g for _, g in pairs if g is not None])


def _backward_at_once(backbone: Backbone, batch: list[Row], leaf: torch.Tensor, known: States, left: Ids) -> float:
    """A step of one micro-batch: the tokens before all rows in the same pass as the rows, since one matrix product of
    all tokens is faster than two, one of which has few."""
    start = known.size + len(left)
    line = in_line(batch, [start] * len(batch), backbone.device)
    ids = torch.cat([torch.tensor(left, device=backbone.device), line.ids])
    embeddings = embed_with_soft(ids, None if is_deep(leaf) else leaf, backbone.embed)
    positions = torch.cat([torch.arange(known.size, start, device=backbone.device), line.positions])
    passed = Pass(line.lengths, [known], lead=len(left), device=backbone.device)
    return _sum(backward_of_line(backbone, embeddings, positions, passed, len(left) + line.scored, line.targets))


def _sum(losses: torch.Tensor) -> float:
    return float(losses.cpu().double().sum())  # there are devices without float64


def backward_of_line(
    backbone: Backbone,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    passed: Pass,
    scored: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """One pass over tokens in one line, forward and back to its leaves; the losses at the scored places [A]."""
    hidden = backbone.hidden(embeddings, positions, passed, scored)
    losses, gradient = losses_of_hidden(hidden, targets, backbone.head, backbone.vocab_size)
    hidden.backward(gradient)
    return losses


@torch.no_grad()
def answer_log_probability(
    backbone: Backbone,
    rows: Sequence[Row],
    vectors: torch.Tensor | None,
    *,
    exact_reference: bool = False,
    micro_batch_tokens: int = 1024,
    cache: StateCache | None = None,
) -> float:
    """log p(answer | context) summed over the answers of all rows, natural logarithm. No gradient is computed.

    cache: where `keep_texts` has put the texts before the soft tokens, if it has.
    """
    total = 0.0
    if exact_reference or not backbone.fast:
        for batch in plain_batches(backbone, rows, micro_batch_tokens):
            total += float(log_probabilities(*plain_answers(backbone, batch, vectors)).cpu().double().sum())
        return total
    start = shared_length(rows)
    shared = shared_states(backbone, rows[0].ids[:start], vectors, backbone.states)
    known = known_tokens(start, vectors, cache)
    for batch in micro_batches(rows, start, micro_batch_tokens, known=known):
        hidden, line, _, _ = contexts_hidden(backbone, batch, start, shared, vectors, cache)
        at_once = max(1, PIECE // backbone.vocab_size)
        pieces = zip(hidden.split(at_once), line.targets.split(at_once), strict=True)
        total += sum(float(log_probabilities(backbone.head(h), t).cpu().double().sum()) for h, t in pieces)
    return total


@torch.no_grad()
def contexts_hidden(
    backbone: Backbone,
    batch: Sequence[Row],
    start: int,
    shared: States,
    vectors: torch.Tensor | None,
    cache: StateCache | None = None,
    record: bool = False,
) -> tuple[torch.Tensor, Line, Pass, list[int]]:
    """One pass without gradients over rows behind what they share: hidden states [A, H] of the places that are scored,
    line, pass, where rows go on.

    Texts before the soft tokens are computed apart only where they have been kept, or where a deep prompt must follow.
    """
    if cache is not None or is_deep(vectors):
        before, starts = before_rows(backbone, batch, start, shared, vectors, cache)
    else:
        before, starts = [shared], [start] * len(batch)
    line = in_line(batch, starts, backbone.device)
    passed = Pass(line.lengths, before, record=record, device=backbone.device)
    embeddings = embed_with_soft(line.ids, None if is_deep(vectors) else vectors, backbone.embed)
    return backbone.hidden(embeddings, line.positions, passed, line.scored), line, passed, starts
