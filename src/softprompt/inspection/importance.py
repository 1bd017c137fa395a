"""How much each soft token matters: the loss without it, with the first k only, with tokens in other places.

The rows are the same each time, so each figure is a mean of paired differences with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..computation import prompt_length
from ..data import Split
from .measuring import Paired, Progress, RowScores, paired, row_scores, without

SHUFFLES = 3


@dataclass(frozen=True)
class Change:
    """What became of the score when the prompt was changed. kept: the tokens that were left, in their order."""

    name: str
    kept: tuple[int, ...]
    scores: RowScores
    against: Paired  # A: the whole prompt, B: the changed one

    def to_dict(self) -> dict[str, Any]:
        return {"change": self.name, "kept": list(self.kept), **self.scores.to_dict(), **self.against.to_dict()}


@dataclass(frozen=True)
class Importance:
    """whole: the prompt as it is. left_out: one change for each token. first: the first k only, k rising from 0 (the
    template without a prompt). shuffled: backwards, then other orders by chance."""

    whole: RowScores
    left_out: list[Change]
    first: list[Change]
    shuffled: list[Change]

    @property
    def of_token(self) -> list[float]:
        """Importance of each token: the mean loss of a row without it, minus that of the whole prompt (nats).

        The loss is that among the labels where there are labels.
        """
        return [change.against.difference for change in self.left_out]

    @property
    def errors(self) -> list[float]:
        """Standard errors of these over the rows."""
        return [change.against.error for change in self.left_out]

    @property
    def of_answer(self) -> list[float]:
        """The same by the loss of the whole answer, which also counts knowing that a label is wanted."""
        return [change.against.answer_difference for change in self.left_out]

    @property
    def answer_errors(self) -> list[float]:
        return [change.against.answer_error for change in self.left_out]

    def to_dict(self) -> dict[str, Any]:
        return {
            "whole": self.whole.to_dict(),
            "importance": self.of_token,
            "standard_error": self.errors,
            "answer_importance": self.of_answer,
            "answer_standard_error": self.answer_errors,
            "left_out": [change.to_dict() for change in self.left_out],
            "first": [change.to_dict() for change in self.first],
            "shuffled": [change.to_dict() for change in self.shuffled],
        }


def importance(
    backbone: Backbone,
    split: Split,
    vectors: Tensor,
    *,
    parts: Sequence[str] = ("left_out", "first", "shuffled"),
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Importance:
    """Score the prompt `vectors` and changed versions of it on all rows of `split`.

    parts: which changes to make. seed: of the orders by chance. progress: called with (rows scored, rows in all).
    Leaving a token out makes the prompt one token shorter, as if it had never been there; that tells what is lost when
    nothing takes its place, not what tuning again would make of it. Raises DataError (no rows).
    """
    tokens = prompt_length(vectors)
    everything = tuple(range(tokens))
    plans: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "left_out": [(f"without token {i}", everything[:i] + everything[i + 1 :]) for i in everything],
        "first": [(f"the first {k} only" if k else "no prompt", everything[:k]) for k in first_lengths(tokens)],
        "shuffled": list(_orders(tokens, seed)),
    }
    count = 1 + sum(len(plans[part]) for part in parts)
    told = _told(progress, len(split), count)
    whole = row_scores(backbone, split, vectors, max_tokens=max_tokens, progress=next(told))
    found: dict[str, list[Change]] = {part: [] for part in plans}
    for part in parts:
        for name, kept in plans[part]:
            changed = without(backbone, vectors, kept)
            scores = row_scores(backbone, split, changed, max_tokens=max_tokens, progress=next(told))
            found[part].append(Change(name, kept, scores, paired(whole, scores)))
    return Importance(whole, found["left_out"], found["first"], found["shuffled"])


def first_lengths(tokens: int) -> list[int]:
    """0, 1, 2, 4, 8 ... below P: how many of the first tokens are kept alone."""
    lengths = [0, 1]
    while lengths[-1] * 2 < tokens:
        lengths.append(lengths[-1] * 2)
    return [length for length in lengths if length < tokens]


def _orders(tokens: int, seed: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if tokens < 2:
        return
    yield "backwards", tuple(reversed(range(tokens)))
    generator = torch.Generator().manual_seed(seed)
    for number in range(SHUFFLES if tokens > 2 else 0):
        yield f"order by chance {number + 1}", tuple(torch.randperm(tokens, generator=generator).tolist())


def _told(progress: Progress | None, rows: int, times: int) -> Iterator[Callable[[int, int], None] | None]:
    """Progress of each scoring as progress of them all."""
    for turn in range(times):
        if progress is None:
            yield None
        else:
            yield partial(_shifted, progress, turn * rows, rows * times)


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)
