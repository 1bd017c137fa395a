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
