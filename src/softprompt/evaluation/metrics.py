"""Scores, each with an interval: of classes here, of free texts in texts.py. Pure functions on lists and arrays.

A figure that the rows do not determine is None, never 0 or NaN: the recall of a class without rows, an interval from
one row, a calibration error without probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .intervals import Array, Interval, percentile_interval, resampled_confusions, wilson
from .texts import TextScores, text_scores

__all__ = ["ClassificationScores", "TextScores", "classification_scores", "text_scores"]

BINS = 15


@dataclass(frozen=True)
class ClassificationScores:
    """How well classes were told apart, over `rows` rows.

    interval: Wilson's of the accuracy; the other intervals are bootstraps over rows. balanced_accuracy: mean recall
    of the classes that have rows. macro_f1: mean F1 of the classes that have rows or predictions. per_class: one
    {class, precision, recall, f1, support} each. confusion[i][j]: rows of class i predicted as class j.
    majority_score: accuracy of always answering majority_class, the most frequent class of these rows.
    """

    rows: int
    classes: tuple[str, ...]
    accuracy: float
    interval: Interval
    balanced_accuracy: float
    balanced_accuracy_interval: Interval | None
    macro_f1: float
    macro_f1_interval: Interval | None
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    expected_calibration_error: float | None
    majority_class: str
    majority_score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as json would read it back."""
        return {
            "kind": "classification",
            "metric": "accuracy",
            "score": self.accuracy,
            **json.loads(json.dumps(asdict(self))),
        }


def classification_scores(
    true: Sequence[str],
    predicted: Sequence[str],
    probabilities: Array | None,
    classes: Sequence[str],
    seed: int = 0,
) -> ClassificationScores:
    """Scores of `predicted` against `true`, both [N]; probabilities [N, C] in the order of `classes`, or None.

    Raises DataError when there are no rows, lengths differ, a class is not in `classes`, or a probability is not one.
    """
    confusion = confusion_matrix(true, predicted, classes)
    hits, support, guesses = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    drawn = resampled_confusions(confusion, seed=seed)
    rows, majority = len(true), int(support.argmax())
    interval = wilson(int(hits.sum()), rows)
    assert interval is not None  # there is at least one row
    return ClassificationScores(
        rows=rows,
        classes=tuple(classes),
        accuracy=int(hits.sum()) / rows,
        interval=interval,
        balanced_accuracy=float(balanced_accuracy(hits, support)),
        balanced_accuracy_interval=percentile_interval(balanced_accuracy(drawn[0], drawn[1])),
        macro_f1=float(macro_f1(hits, support, guesses)),
        macro_f1_interval=percentile_interval(macro_f1(*drawn)),
        per_class=_per_class(classes, hits, support, guesses),
        confusion=confusion.tolist(),
        expected_calibration_error=_calibration(true, predicted, probabilities, classes),
        majority_class=classes[majority],
        majority_score=int(support[majority]) / rows,
    )


def confusion_matrix(true: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> Array:
    """Counts [C, C]: true class by predicted class. Raises DataError as `classification_scores` does."""
    if not len(true):
        raise DataError("there are no rows to score: the split is empty; give a test file or a larger share")
    if len(true) != len(predicted):
        raise DataError(f"{len(true)} true classes but {len(predicted)} predictions: give one prediction for each row")
    place = {name: index for index, name in enumerate(classes)}
    for kind, names in (("true", true), ("predicted", predicted)):
        unknown = next(((row, name) for row, name in enumerate(names) if name not in place), None)
        if unknown:
            raise DataError(f"{kind} class {unknown[1]!r} of row {unknown[0]} is none of {', '.join(classes)[:200]}")
    size = len(classes)
    cells = np.array([place[t] * size + place[p] for t, p in zip(true, predicted, strict=True)])
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def balanced_accuracy(hits: Array, support: Array) -> Array:
    """Mean recall over the classes that have rows: [..., C] -> [...]."""
    return _mean_where(hits, support, support > 0)


def macro_f1(hits: Array, support: Array, guesses: Array) -> Array:
    """Mean F1 = 2 hits / (support + guesses) over the classes that have rows or predictions: [..., C] -> [...]."""
    return _mean_where(2 * hits, support + guesses, support + guesses > 0)


def _mean_where(parts: Array, wholes: Array, present: Array) -> Array:
    ratio: Array = np.where(present, parts / np.maximum(wholes, 1), 0.0)
    mean: Array = ratio.sum(axis=-1) / present.sum(axis=-1)
    return mean


def _per_class(classes: Sequence[str], hits: Array, support: Array, guesses: Array) -> list[dict[str, Any]]:
    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return [
        {
            "class": name,
            "precision": share(int(h), int(g)),
            "recall": share(int(h), int(s)),
            "f1": share(2 * int(h), int(s + g)),
            "support": int(s),
        }
        for name, h, s, g in zip(classes, hits, support, guesses, strict=True)
    ]


def _calibration(
    true: Sequence[str], predicted: Sequence[str], probabilities: Array | None, classes: Sequence[str]
) -> float | None:
    """Check the probabilities [N, C] and return the calibration error of those of the predicted classes."""
    if probabilities is None:
        return None
    values = np.asarray(probabilities, dtype=np.float64)
    if values.shape != (len(true), len(classes)):
        raise DataError(f"probabilities must be [{len(true)}, {len(classes)}] (rows, classes), found {values.shape}")
    wrong = ~((values >= 0) & (values <= 1 + 1e-6)).all(axis=1)  # also true for NaN
    if wrong.any():
        raise DataError(f"row {int(wrong.argmax())} has probabilities that are not numbers between 0 and 1")
    place = {name: index for index, name in enumerate(classes)}
    confidence = values[np.arange(len(true)), [place[name] for name in predicted]]
    right = np.array([t == p for t, p in zip(true, predicted, strict=True)])
    return expected_calibration_error(confidence, right)


def expected_calibration_error(confidence: Array, right: Array, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by rows (Guo et al. 2017, equation 3).

    confidence: [N] in 0 to 1, the probability of the predicted class; right: [N] booleans.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high]
    gaps = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
