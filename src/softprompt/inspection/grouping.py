"""Prompts in groups of like ones, so that of a large library only some need be tried on a new task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..prompt import by_token
from .similarity import pooled_matrix


def groups(vectors: Sequence[Tensor], most: int) -> list[list[int]]:
    """At most `most` groups of prompts, by SPoT's pooled cosine and average linkage (Sokal and Michener 1958).

    In each the middle one first (the largest sum of similarities to the others), then the others from the most to the
    least like it. The groups are in the order of their first prompt. Prompts of one kind and width are expected.
    """
    if len(vectors) <= most:
        return [[i] for i in range(len(vectors))]
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    alike = np.nan_to_num(pooled_matrix([by_token(each).float() for each in vectors]), nan=-1.0)
    distance = np.clip(1 - alike, 0, 2)
    np.fill_diagonal(distance, 0.0)
    numbers = fcluster(linkage(squareform(distance, checks=False), "average"), most, "maxclust")
    found = [np.flatnonzero(numbers == number).tolist() for number in dict.fromkeys(numbers.tolist())]
    return [_from_the_middle(members, alike) for members in found]


def _from_the_middle(members: list[int], alike: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[int]:
    middle = max(members, key=lambda i: alike[i, members].sum())
    return sorted(members, key=lambda i: (i != middle, -alike[middle, i]))
