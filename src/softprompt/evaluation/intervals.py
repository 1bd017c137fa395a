"""How far a score can be trusted: 95 % intervals over the rows that it was measured on.

An interval is (low, high), or None where the rows cannot tell. None is the honest answer for a single row, and for a
bootstrap in which every resample gives the same score: a width of zero would claim a certainty that nobody has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 1000
CELLS_AT_ONCE = 4_000_000  # numbers drawn at once, which bounds the memory to some tens of megabytes


def sign_test(fewer: int, tosses: int) -> float:
    """Two-sided exact p that a fair coin falls so unevenly: min(1, 2 * P(Binomial(tosses, 1/2) <= fewer)).

    1 where nothing was tossed.
    """
    tail = sum(math.comb(tosses, k) for k in range(fewer + 1))
    return min(1.0, 2 * (tail / 2**tosses))


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval | None:
    """Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, equation 4).

    Unlike the textbook p +- 1.96 s it stays inside 0 to 1 and keeps its level for small n and for shares near 0 or 1.
    Returns None for n = 0. Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, found {successes} of {n}")
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exactly 0 and 1 there, but for rounding
    high = 1.0 if successes == n else centre + half
    return (max(0.0, low), min(1.0, high))


def resampled_sums(rows: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Sums over rows drawn with replacement: rows [N, S] -> [R, S].

    How often each row is drawn is multinomial, so one product of the counts [R, N] with the rows does it.
    """
    n = rows.shape[0]
    generator = np.random.default_rng(seed)
    share = np.full(n, 1.0 / n)
    at_once = max(1, CELLS_AT_ONCE // n)
    starts = range(0, resamples, at_once)
    sizes = [min(at_once, resamples - start) for start in starts]
    values = rows.astype(np.float64)
    return np.concatenate([generator.multinomial(n, share, size=size) @ values for size in sizes])


def percentile_interval(scores: Array, level: float = LEVEL) -> Interval | None:
    """The middle `level` of resampled scores [R] (the percentile bootstrap, Efron 1979), NaN left out."""
    scores = scores[np.isfinite(scores)]
    if scores.size == 0:
        return None
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    if math.isclose(low, high, rel_tol=0.0, abs_tol=1e-12):
        return None
    return (float(low), float(high))


def bootstrap(
    rows: Array,
    statistic: Callable[[Array], Array] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval | None:
    """Percentile bootstrap over rows of a score that depends on the rows only through sums.

    rows: [N] or [N, S], the numbers that each row adds. statistic: maps sums [R, S] to scores [R]; without it the
    score is the mean of `rows` [N]. Same seed, same interval. None for fewer than two rows.
    """
    n = rows.shape[0]
    if n < 2:
        return None
    sums = resampled_sums(rows.reshape(n, -1), resamples=resamples, seed=seed)
    scores = sums[:, 0] / n if statistic is None else statistic(sums)
    return percentile_interval(scores, level)


def resampled_confusions(confusion: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Array, Array, Array]:
    """Confusion counts of rows drawn with replacement, by class: (hits, true, predicted), each [R, C].

    confusion: counts [C, C], true class by predicted class. Drawing N rows with replacement draws the cells from a
    multinomial with the cells' shares, so rows are never touched, and only cells that are not empty are drawn.
    """
    rows, columns = confusion.nonzero()
    counts = confusion[rows, columns]
    total = int(counts.sum())
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(total, counts / total, size=resamples)  # [R, cells]
    classes = confusion.shape[0]
    on_diagonal = rows == columns
    return (
        _sum_by(drawn[:, on_diagonal], rows[on_diagonal], classes),
        _sum_by(drawn, rows, classes),
        _sum_by(drawn, columns, classes),
    )


def _sum_by(values: Array, groups: Array, number: int) -> Array:
    """Sum columns of `values` [R, K] that have the same group [K] into [R, number]."""
    sums = np.zeros((values.shape[0], number), dtype=np.int64)
    if groups.size:
        order = np.argsort(groups, kind="stable")
        present, starts = np.unique(groups[order], return_index=True)
        sums[:, present] = np.add.reduceat(values[:, order], starts, axis=1)
    return sums
