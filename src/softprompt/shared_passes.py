"""Several prompts in one pass: loss and gradient of many small batches, each at a prompt of its own.

An accelerator computes sixteen short rows in the time of a few hundred: what it waits for is to be told the next
operation. So trials that are tuned over one frozen model ask together. Their rows stand in one line; each row's
attention is on its own prompt, and each soft token is looked up in its own. What stands before all rows of a trial is
one row of a pass over all trials. Rows never meet, so each gradient is that of its batch alone; the plain reference is
`loss_and_gradient`, batch by batch (tests/test_shared_passes.py, to 1e-10 in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attention import Pass, StateCache
from .backbone import Backbone
from .computation import (
    LIGHT,
    LossAndGradient,
    backward_of_line,
    before_rows,
    embed_of_owners,
    go_back,
    is_deep,
    known_tokens,
    loss_and_gradient,
    micro_batches,
    shared_states,
)
from .placement import Row, in_line, shared_length


@dataclass(frozen=True)
class OwnedRow(Row):
    """A row that reads prompt number `owner`."""

    owner: int = 0


def losses_and_gradients(
    backbone: Backbone,
    batches: Sequence[Sequence[Row]],
    prompts: Sequence[torch.Tensor],
    *,
    micro_batch_tokens: int = 1024,
    start: int | None = None,
    cache: StateCache | None = None,
) -> list[LossAndGradient]:
    """`loss_and_gradient` of each of K batches of rows at its own prompt, in passes that they share.

    prompts: K prompts of one shape. start: how many leading ids all rows of all batches have in common; by default what
    these do. The other arguments are those of `loss_and_gradient`. A model without the fast path takes the batches one
    by one. Where the device has no memory for all, or one of the prompts is not finite, halves of them are tried.
    """
    assert len(batches) == len(prompts) and len({prompt.shape for prompt in prompts}) == 1
    start = shared_length([row for batch in batches for row in batch]) if start is None else start
    if len(prompts) == 1 or not backbone.fast:
        return [
            loss_and_gradient(backbone, batch, vectors, micro_batch_tokens=micro_batch_tokens, start=start, cache=cache)
            for batch, vectors in zip(batches, prompts, strict=True)
        ]
    at_once = max(2, micro_batch_tokens // max(1, start))  # what stands before the rows of each is one pass for all
    if len(prompts) <= at_once:
        try:
            return _together(backbone, batches, torch.stack(list(prompts)), micro_batch_tokens, start, cache)
        except (torch.OutOfMemoryError, _NotFinite):
            at_once = len(prompts) // 2
    found: list[LossAndGradient] = []
    for first in range(0, len(prompts), at_once):
        some = batches[first : first + at_once], prompts[first : first + at_once]
        found += losses_and_gradients(backbone, *some, micro_batch_tokens=micro_batch_tokens, start=start, cache=cache)
    return found


class _NotFinite(Exception):
    """A prompt that is no longer finite spoils every pass that it is part of: 0 x nan of what is masked is nan."""


def _together(
    backbone: Backbone,
    batches: Sequence[Sequence[Row]],
    prompts: torch.Tensor,
    budget: int,
    start: int,
    cache: StateCache | None,
) -> list[LossAndGradient]:
    precise = torch.promote_types(torch.float32, backbone.dtype)
    leaf = prompts.detach().to(backbone.device, precise).requires_grad_()  # [K, P, H] or [K, L, 2, heads, P, D]
    rows = [OwnedRow(row.ids, row.answer, owner) for owner, batch in enumerate(batches) for row in batch]
    assert all(row.answer < len(row.ids) for row in rows), "every row needs an answer"
    shared = shared_states(backbone, rows[0].ids[:start], leaf, cache)
    learns = shared.size > 0 and shared.keys[0].requires_grad
    leaves = shared.detached() if learns else shared
    of_each = leaves.rows > 1  # what stands before the rows is not the same for all, so each has a copy
    behind = is_deep(leaf) and any(token < 0 for token in rows[0].ids[start:])
    losses: list[torch.Tensor] = []
    owners_of_losses: list[int] = []
    extra = -(-start // LIGHT) if of_each else 0
    for batch in micro_batches(rows, start, budget, extra, known=known_tokens(start, leaf, cache)):
        owners = torch.tensor([row.owner for row in batch], device=backbone.device)
        front = leaves.of_rows(owners) if of_each else leaves
        before, starts = before_rows(backbone, batch, start, front, leaf[owners] if behind else None, cache)
        line = in_line(batch, starts, backbone.device)
        whose = [row.owner for row, length in zip(batch, line.lengths, strict=True) for _ in range(length)]
        embeddings = embed_of_owners(backbone, line.ids, torch.tensor(whose, device=backbone.device), leaf)
        passed = Pass(line.lengths, before, device=backbone.device)
        losses.append(backward_of_line(backbone, embeddings, line.positions, passed, line.scored, line.targets))
        owners_of_losses += [row.owner for row in batch for _ in row.ids[row.answer :]]
    if learns:
        go_back(shared, leaves)
    gradients = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    sums = torch.zeros(len(batches), dtype=torch.float64)
    sums.index_add_(0, torch.tensor(owners_of_losses), torch.cat(losses).cpu().double())
    if not (bool(sums.isfinite().all()) and bool(gradients.isfinite().all())):
        raise _NotFinite
    tokens = [sum(len(row.ids) - row.answer for row in batch) for batch in batches]
    return [LossAndGradient(*found) for found in zip(sums.tolist(), tokens, gradients, strict=True)]
