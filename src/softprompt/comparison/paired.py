"""Scores of several seeds with an interval, and paired tests of two methods on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data import Split
from ..evaluation.intervals import Array, Interval, percentile_interval, resampled_sums, sign_test
from ..evaluation.metrics import balanced_accuracy, macro_f1
from ..evaluation.runner import Report
from ..evaluation.texts import _row_scores, bleu_tokenizer
from .catalogue import PERCENT

Cell = dict[str, Any]
ROW_METRICS = ("exact_match", "token_f1", "rouge_l")


def row_values(report: Report, split: Split, metric: str) -> dict[str, Any]:
    """What each row adds to the score: classes as numbers, or for free text the row's own value of the metric.

    For chrf and bleu, which are scores of a corpus, it is sacrebleu's sentence score: good for pairing, another number
    than the corpus score.
    """
    if report.scores is not None:
        place = {name: index for index, name in enumerate(report.scores.classes)}
        return {
            "classes": len(place),
            "true": [place[name] for name in report.true],
            "predicted": [place[name] for name in report.predicted],
        }
    column = split.references
    references = [list(row[column]) if column else [true] for row, true in zip(split, report.true, strict=True)]
    said = [text.strip() for text in report.predicted]
    if metric in ROW_METRICS:
        index = ROW_METRICS.index(metric)
        return {"values": [_row_scores(text, choices)[index] for text, choices in zip(said, references, strict=True)]}
    return {"values": _sentence_scores(metric, said, references)}


def _sentence_scores(metric: str, said: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer: Any = CHRF() if metric == "chrf" else BLEU(tokenize=bleu_tokenizer(references), effective_order=True)
    return [
        float(scorer.sentence_score(text, list(choices)).score) for text, choices in zip(said, references, strict=True)
    ]


# --- one score of several seeds -------------------------------------------------------------------------------------


def mean_score(cells: Sequence[Cell]) -> dict[str, Any]:
    """Mean score over seeds, its 95 % interval over the test rows, and the seeds' standard deviation.

    The interval of one seed is the evaluator's own (Wilson's for accuracy, a bootstrap else); of several it is a
    bootstrap over rows of the seeds' mean, each draw taking the same rows from every seed. It says what other test rows
    would change; what other seeds would change is told by seed_sd, None for a single seed.
    """
    scores = [cell["score"] for cell in cells]
    mean = sum(scores) / len(scores)
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    low, high = cells[0]["low"], cells[0]["high"]
    if len(cells) > 1:
        drawn = np.mean([resampled(cell) for cell in cells], axis=0) + _shift(cells, mean)
        bounds = percentile_interval(drawn)
        low, high = bounds if bounds else (None, None)
    return {"score": mean, "low": low, "high": high, "seed_sd": spread}


def _shift(cells: Sequence[Cell], mean: float) -> float:
    """chrf and bleu: from the mean of sentence scores to the corpus score, which the draws are centred on."""
    return mean - sum(observed(cell) for cell in cells) / len(cells) if cells[0]["metric"] in PERCENT else 0.0


def observed(cell: Cell) -> float:
    """The score by the rows' own values."""
    rows, statistic = _sums(cell)
    return float(statistic(rows.sum(axis=0, keepdims=True))[0])


def resampled(cell: Cell) -> Array:
    """Scores on test rows drawn with replacement [R]; cells with the same number of rows get the same draws."""
    rows, statistic = _sums(cell)
    return statistic(resampled_sums(rows))


def _sums(cell: Cell) -> tuple[Array, Callable[[Array], Array]]:
    """Numbers that each row adds [N, S], and how sums of them [R, S] give scores [R]."""
    each, metric = cell["each"], cell["metric"]
    if "values" in each or metric == "accuracy":
        values = np.asarray(each["values"]) if "values" in each else right(cell)
        return values[:, None].astype(float), lambda sums: sums[:, 0] / len(values)
    classes = each["classes"]
    true, predicted = np.eye(classes)[each["true"]], np.eye(classes)[each["predicted"]]
    rows = np.concatenate([true * predicted, true, predicted], axis=1)  # [N, 3C]: hits, support, guesses

    def score(sums: Array) -> Array:
        hits, support, guesses = np.split(sums, 3, axis=1)
        return balanced_accuracy(hits, support) if metric == "balanced_accuracy" else macro_f1(hits, support, guesses)

    return rows, score


def right(cell: Cell) -> Array:
    """Whether each row got its class: booleans [N]."""
    return np.asarray(cell["each"]["true"]) == np.asarray(cell["each"]["predicted"])


# --- two methods ----------------------------------------------------------------------------------------------------


def compare_pair(best: Sequence[Cell], other: Sequence[Cell]) -> dict[str, Any]:
    """Whether `other` differs from `best` beyond chance on the same rows: {test, p, difference, low, high}.

    difference: other minus best, with a paired bootstrap interval over rows. Accuracy: McNemar's exact test (McNemar
    1947) for each pair of cells, other scores: paired bootstrap. Where there are several pairs of seeds, which share
    their rows, p is twice the median of the pairs' (Rueger 1978), which holds however they depend on each other.
    """
    if best[0]["each"].get("true") != other[0]["each"].get("true") or _size(best[0]) != _size(other[0]):
        return {"test": None, "p": None, "difference": None, "low": None, "high": None}  # not the same rows
    scores = [sum(cell["score"] for cell in cells) / len(cells) for cells in (other, best)]
    difference = scores[0] - scores[1]
    mine, its = (
        np.mean([resampled(cell) for cell in cells], axis=0) + _shift(cells, score)
        for cells, score in zip((other, best), scores, strict=True)
    )
    drawn = mine - its
    bounds: Interval | None = percentile_interval(drawn)
    low, high = bounds if bounds else (None, None)
    if best[0]["metric"] == "accuracy":
        pairs = _pairs(best, other)
        values = [mcnemar(right(a), right(b)) for a, b in pairs]
        p = values[0] if len(values) == 1 else min(1.0, 2 * float(np.median(values)))
        return {"test": "mcnemar", "p": p, "difference": difference, "low": low, "high": high}
    return {
        "test": "bootstrap",
        "p": bootstrap_p(drawn),
        "difference": difference,
        "low": low,
        "high": high,
    }


def _size(cell: Cell) -> int:
    return len(cell["each"].get("true") or cell["each"]["values"])


def _pairs(best: Sequence[Cell], other: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Cells of the same seed; a method without seeds is paired with every seed of the other."""
    if len(best) == 1 or len(other) == 1:
        return [(a, b) for a in best for b in other]
    by_seed = {cell["seed"]: cell for cell in best}
    same = [(by_seed[cell["seed"]], cell) for cell in other if cell["seed"] in by_seed]
    return same or [(a, b) for a in best for b in other]


def mcnemar(first: Array, second: Array) -> float:
    """Two-sided exact p: of the rows that only one of two methods gets right, half should be each's. [N] booleans."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return sign_test(min(only_first, only_second), only_first + only_second)


def bootstrap_p(differences: Array) -> float:
    """Two-sided p of a difference of zero from resampled differences [R], never below 1 / R."""
    draws = len(differences)
    side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, max(2 * side, 1) / draws)
