"""Cross-entropy of the label rows alone, in pieces, so that memory never holds vocabulary x tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

# Logits held at once, in numbers: 64 MiB in float32. A piece has at least one row.
PIECE = 1 << 24


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -log softmax(logits)[target], natural logarithm: [A, V], [A] -> scalar, at least float32."""
    return F.cross_entropy(_precise(logits), targets, reduction="sum")


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def losses_of_hidden(
    hidden: torch.Tensor, targets: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each label row, and the gradient of their sum with respect to their hidden states.

    hidden: [A, H], targets: [A] -> ([A], at least float32; [A, H]). The head is frozen, so each piece of rows is
    finished, gradient included, before the next one is begun; what stays is [A, H] and never [A, V].
    """
    gradient = torch.empty_like(hidden)
    losses = []
    rows = max(1, PIECE // vocab_size)
    for start in range(0, len(targets), rows):
        piece = hidden[start : start + rows].detach().requires_grad_()
        each = F.cross_entropy(_precise(head(piece)), targets[start : start + rows], reduction="none")
        (gradient[start : start + rows],) = torch.autograd.grad(each.sum(), piece)
        losses.append(each.detach())
    return torch.cat(losses), gradient


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target] of each row: [A, V], [A] -> [A], at least float32."""
    logits = _precise(logits)
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
