"""Intervals: against scipy, against a plain bootstrap, and where there is nothing to tell."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from softprompt.evaluation.intervals import bootstrap, percentile_interval, resampled_confusions, wilson
from softprompt.evaluation.metrics import classification_scores, confusion_matrix, macro_f1


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 10), (841, 1000)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_rows_is_unknown_and_nonsense_is_refused() -> None:
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="between 0 and n, found 3 of 2"):
        wilson(3, 2)


def test_bootstrap_of_a_mean_is_the_plain_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).normal(size=400)
    draws = np.random.default_rng(4).integers(400, size=(4000, 400))
    plain = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    assert bootstrap(values, resamples=4000) == pytest.approx(tuple(plain), abs=0.01)
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5) != bootstrap(values, seed=6)


def test_bootstrap_says_nothing_where_the_rows_do_not() -> None:
    assert bootstrap(np.array([0.3])) is None
    assert bootstrap(np.ones(50)) is None
    assert percentile_interval(np.array([np.nan, np.nan])) is None


def test_bootstrap_in_pieces_when_rows_are_many() -> None:
    values = np.random.default_rng(0).random(300_000)
    low, high = bootstrap(values, resamples=40) or (0.0, 0.0)
    assert low < values.mean() < high


def test_resampled_confusions_are_those_of_resampled_rows() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(3, size=200)
    predicted = np.where(generator.random(200) < 0.7, true, generator.integers(3, size=200))
    names = [str(i) for i in range(4)]  # class 3 has no rows
    confusion = confusion_matrix([names[i] for i in true], [names[i] for i in predicted], names)
    hits, support, guesses = resampled_confusions(confusion, resamples=3000)
    assert hits.shape == support.shape == guesses.shape == (3000, 4)
    assert (support.sum(axis=1) == 200).all()
    assert (guesses.sum(axis=1) == 200).all()
    assert not support[:, 3].any()
    ours = percentile_interval(macro_f1(hits, support, guesses))
    rows = generator.integers(200, size=(500, 200))
    plain = [f1_score(true[draw], predicted[draw], average="macro") for draw in rows]
    assert ours == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.02)


def test_a_thousand_resamples_are_quick() -> None:
    generator = np.random.default_rng(0)
    classes = [f"c{i}" for i in range(150)]
    true = [classes[i] for i in generator.integers(150, size=1000)]
    predicted = [classes[i] for i in generator.integers(150, size=1000)]
    start = time.perf_counter()
    classification_scores(true, predicted, None, classes)
    assert time.perf_counter() - start < 1.5  # about 0.1 s on an idle core
