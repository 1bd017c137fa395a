"""Paired tests and intervals against textbook numbers and outside implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, f1_score

from softprompt.comparison.paired import (
    bootstrap_p,
    compare_pair,
    mcnemar,
    mean_score,
    observed,
    resampled,
)


def classes_cell(right: Any, seed: int = 0, metric: str = "accuracy") -> dict[str, Any]:
    right = np.asarray(right, dtype=bool)
    true = np.arange(len(right)) % 2
    predicted = np.where(right, true, 1 - true)
    each = {"classes": 2, "true": true.tolist(), "predicted": predicted.tolist()}
    score = float(right.mean())
    return {"seed": seed, "metric": metric, "score": score, "low": score - 0.1, "high": score + 0.1, "each": each}


def values_cell(values: Any, seed: int = 0, metric: str = "rouge_l", score: float | None = None) -> dict[str, Any]:
    found = float(np.mean(values)) if score is None else score
    return {"seed": seed, "metric": metric, "score": found, "low": 0.0, "high": 1.0, "each": {"values": list(values)}}


def pattern(both: int, first: int, second: int, none: int) -> tuple[Any, Any]:
    a = [True] * both + [True] * first + [False] * second + [False] * none
    b = [True] * both + [False] * first + [True] * second + [False] * none
    return np.array(a), np.array(b)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (10, 2), (2, 10), (40, 15), (700, 800)])
def test_mcnemar_is_the_exact_binomial_test_of_the_rows_they_differ_on(first: int, second: int) -> None:
    a, b = pattern(7, first, second, 3)
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar(b, a) == pytest.approx(expected)


def test_one_seed_gives_mcnemar_and_the_difference() -> None:
    a, b = pattern(60, 25, 5, 10)
    found = compare_pair([classes_cell(a)], [classes_cell(b)])
    assert found["test"] == "mcnemar" and found["p"] == pytest.approx(binomtest(5, 30).pvalue)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["low"] < -0.2 < found["high"] < 0


def test_several_seeds_give_twice_the_median() -> None:
    a, b = pattern(60, 25, 5, 10)
    c, d = pattern(60, 12, 10, 18)
    e, f = pattern(60, 20, 5, 15)
    best = [classes_cell(x, seed) for seed, x in enumerate((a, c, e))]
    other = [classes_cell(x, seed) for seed, x in enumerate((b, d, f))]
    values = sorted(mcnemar(x, y) for x, y in ((a, b), (c, d), (e, f)))
    assert compare_pair(best, other)["p"] == pytest.approx(2 * values[1])
    alone = compare_pair(best, [classes_cell(b)])  # without seeds: beside each seed of the other
    assert alone["p"] == pytest.approx(min(1, 2 * sorted(mcnemar(x, b) for x in (a, c, e))[1]))


def test_other_scores_are_tested_by_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(size=200)
    near = [values_cell(base)], [values_cell(base - 0.02 + 0.01 * generator.normal(size=200))]
    found = compare_pair(*near)
    assert found["test"] == "bootstrap" and found["p"] < 0.01  # pairing sees what unpaired intervals could not
    assert found["low"] < found["difference"] < found["high"] < 0
    same = compare_pair([values_cell(base)], [values_cell(base)])
    assert same["p"] == 1.0 and same["difference"] == 0


def test_a_difference_of_corpus_scores_lies_in_its_interval() -> None:
    """chrf and bleu of a corpus are no means of sentence scores, by which rows are drawn."""
    generator = np.random.default_rng(0)
    base = generator.uniform(30, 50, size=200)
    best = [values_cell(base, metric="bleu", score=61.0)]
    other = [values_cell(base - 3 + generator.normal(size=200), metric="bleu", score=51.0)]
    found = compare_pair(best, other)
    assert found["difference"] == pytest.approx(-10)
    assert -10.5 < found["low"] < -10 < found["high"] < -9.5 and found["p"] < 0.01


def test_other_rows_are_not_paired() -> None:
    found = compare_pair([values_cell([0.1, 0.2])], [values_cell([0.1, 0.2, 0.3])])
    assert found["p"] is None and found["test"] is None


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_scores_from_the_rows_are_those_of_scikit_learn(metric: str) -> None:
    generator = np.random.default_rng(1)
    true, predicted = generator.integers(0, 3, size=(2, 60)).tolist()
    cell = {"metric": metric, "each": {"classes": 3, "true": true, "predicted": predicted}}
    outside = {
        "macro_f1": lambda: f1_score(true, predicted, average="macro"),
        "balanced_accuracy": lambda: balanced_accuracy_score(true, predicted),
    }
    assert observed(cell) == pytest.approx(outside[metric]())
    assert resampled(cell).mean() == pytest.approx(outside[metric](), abs=0.03)


def test_one_seed_keeps_its_own_interval_and_several_get_one_of_their_mean() -> None:
    generator = np.random.default_rng(2)
    one = classes_cell(generator.uniform(size=400) < 0.8)
    assert mean_score([one]) == {"score": one["score"], "low": one["low"], "high": one["high"], "seed_sd": None}
    two = classes_cell(generator.uniform(size=400) < 0.7, seed=1)
    both = mean_score([one, two])
    assert both["score"] == pytest.approx((one["score"] + two["score"]) / 2)
    assert both["low"] < both["score"] < both["high"]
    assert both["high"] - both["low"] < 0.1
    assert both["seed_sd"] == pytest.approx(np.std([one["score"], two["score"]], ddof=1))


def test_a_corpus_score_keeps_its_own_centre() -> None:
    values = np.random.default_rng(3).uniform(40, 60, size=100)
    cells = [values_cell(values, seed, "chrf", score=70.0) for seed in (0, 1)]
    found = mean_score(cells)
    assert found["low"] < 70 < found["high"]


def test_p_of_a_bootstrap_is_never_zero() -> None:
    assert bootstrap_p(np.full(1000, 0.5)) == pytest.approx(1 / 1000)
    assert bootstrap_p(np.linspace(-1, 1, 1001)) == pytest.approx(1.0, abs=0.01)
