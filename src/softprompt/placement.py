"""Where soft tokens stand among ordinary ones, and what a model must be given to compute a batch of such rows.

Pure functions. A row is one flat sequence of token ids in which soft token i is written as -(i + 1), so a placement
(front, after BOS, inside a chat turn, behind the text, or several places) is nothing but where the negative ids stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One encoded example.

    ids: T token ids; soft token i of the prompt is -(i + 1). answer: ids[answer:] is scored (the answer), and what
    stands before it is the context; answer == len(ids) when there is nothing to score.
    """

    ids: tuple[int, ...]
    answer: int

    def __post_init__(self) -> None:
        assert 0 < self.answer <= len(self.ids), (self.answer, len(self.ids))


def shared_length(rows: Sequence[Row]) -> int:
    """How many leading ids all rows have in common, leaving each row the last token before its answer as its own.

    Whatever stands there (constant text, soft tokens) has the same states in every row of a causal model, so it is
    computed once. That the ids agree is all it takes; no template needs to declare anything constant.
    """
    first = min((row.ids for row in rows), key=len)
    limit = min(row.answer - 1 for row in rows)
    for index in range(limit):
        if any(row.ids[index] != first[index] for row in rows):
            return index
    return limit


def first_soft(ids: Sequence[int]) -> int:
    """Index of the first soft token, or len(ids) if there is none: what stands before it never depends on it."""
    return next((index for index, token in enumerate(ids) if token < 0), len(ids))


@dataclass(frozen=True)
class Line:
    """The tokens of several rows in one line, and everything that must agree about them, built together.

    ids, positions: [N]. lengths: own tokens of each row. scored: [A], places in the line whose next token is scored;
    targets: [A], those next tokens. The last token of an answer predicts nothing that is scored and is left out.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    scored: torch.Tensor
    targets: torch.Tensor


def in_line(rows: Sequence[Row], starts: Sequence[int], device: torch.device | str = "cpu") -> Line:
    """Rows from index `starts[r]` on, one after the other; what stands before is computed elsewhere.

    A row with an answer ends before its last answer token; one without ends with its context, of which the last token
    is scored for nothing (targets has -1 there) so that its logits can be had.
    """
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    scored: list[int] = []
    targets: list[int] = []
    for row, start in zip(rows, starts, strict=True):
        end = len(row.ids) - 1 if row.answer < len(row.ids) else len(row.ids)
        assert start < row.answer <= end + 1, (start, row.answer, end)
        scored.extend(range(len(ids) + row.answer - 1 - start, len(ids) + end - start))
        targets.extend(row.ids[row.answer :] or (-1,))
        ids.extend(row.ids[start:end])
        positions.extend(range(start, end))
        lengths.append(end - start)
    return Line(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        tuple(lengths),
        torch.tensor(scored, device=device),
        torch.tensor(targets, device=device),
    )


@dataclass(frozen=True)
class Rectangle:
    """Whole rows padded on the right to [B, T]: the plain concatenation that every fast path is checked against.

    mask: 1 where there is a token. scored: pairs (row, column) whose next token is scored, [A] each; targets: [A].
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    scored: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor


def in_rectangle(rows: Sequence[Row], device: torch.device | str = "cpu") -> Rectangle:
    """Rows as a right-padded rectangle. Padding stands behind all that is read, so a causal model never sees it."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    where: list[tuple[int, int]] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
        answer = row.ids[row.answer :] or (-1,)
        where.extend((index, row.answer - 1 + offset) for offset in range(len(answer)))
        targets.extend(answer)
    scored = torch.tensor(where, device=device).unbind(dim=1)
    positions = torch.arange(width, device=device).expand(len(rows), -1)
    return Rectangle(
        ids.to(device), mask.to(device), positions, (scored[0], scored[1]), torch.tensor(targets, device=device)
    )


def embed_with_soft(ids: torch.Tensor, vectors: torch.Tensor | None, embed: torch.nn.Module) -> torch.Tensor:
    """Embeddings of ids [...] with soft token -(i + 1) taken from vectors[i] [P, H]: [..., H], differentiable."""
    embeddings: torch.Tensor = embed(ids.clamp(min=0))
    soft = ids < 0
    if vectors is None or not bool(soft.any()):
        assert not bool(soft.any()), "soft tokens in a row, but no prompt given"
        return embeddings
    return embeddings.index_put(soft.nonzero(as_tuple=True), vectors.to(embeddings.dtype)[-ids[soft] - 1])
