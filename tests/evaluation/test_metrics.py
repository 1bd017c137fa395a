"""Scores of classes: against scikit-learn, and where the rows do not determine a figure."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from softprompt.errors import DataError
from softprompt.evaluation.intervals import wilson
from softprompt.evaluation.metrics import classification_scores, expected_calibration_error

CLASSES = ("a", "b", "c", "d")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(CLASSES)), min_size=1, max_size=40))
@pytest.mark.filterwarnings("ignore")  # scikit-learn warns where we return None
def test_scores_equal_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    true, predicted = [p[0] for p in pairs], [p[1] for p in pairs]
    scores = classification_scores(true, predicted, None, CLASSES)
    assert scores.accuracy == pytest.approx(sk.accuracy_score(true, predicted))
    assert scores.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(true, predicted))
    assert scores.macro_f1 == pytest.approx(sk.f1_score(true, predicted, average="macro", zero_division=0))
    assert scores.confusion == sk.confusion_matrix(true, predicted, labels=CLASSES).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        true, predicted, labels=CLASSES, zero_division=np.nan
    )
    for row, *expected in zip(scores.per_class, precision, recall, f1, support, strict=True):
        ours = [math.nan if row[k] is None else row[k] for k in ("precision", "recall", "f1", "support")]
        assert ours == pytest.approx(expected, nan_ok=True)
    assert scores.interval == wilson(int(sum(t == p for t, p in pairs)), len(pairs))
    json.dumps(scores.to_dict(), allow_nan=False)


def test_intervals_hold_the_scores() -> None:
    generator = np.random.default_rng(0)
    true = generator.choice(CLASSES, 500, p=[0.7, 0.1, 0.1, 0.1]).tolist()
    predicted = [t if generator.random() < 0.6 else str(generator.choice(CLASSES)) for t in true]
    scores = classification_scores(true, predicted, None, CLASSES)
    for value, interval in (
        (scores.accuracy, scores.interval),
        (scores.balanced_accuracy, scores.balanced_accuracy_interval),
        (scores.macro_f1, scores.macro_f1_interval),
    ):
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert scores == classification_scores(true, predicted, None, CLASSES)
    assert scores.majority_class == "a"
    assert scores.majority_score == true.count("a") / 500


def test_one_row() -> None:
    scores = classification_scores(["a"], ["b"], np.array([[0.4, 0.6]]), ("a", "b"))
    assert (scores.accuracy, scores.balanced_accuracy, scores.macro_f1) == (0, 0, 0)
    assert scores.interval == wilson(0, 1)
    assert scores.interval[1] > 0.7
    assert scores.balanced_accuracy_interval is None
    assert scores.macro_f1_interval is None
    assert scores.per_class[1] == {"class": "b", "precision": 0.0, "recall": None, "f1": 0.0, "support": 0}


def test_one_class_and_all_right() -> None:
    scores = classification_scores(["a"] * 9, ["a"] * 9, np.ones((9, 1)), ("a",))
    assert (scores.accuracy, scores.macro_f1, scores.majority_score) == (1, 1, 1)
    assert scores.macro_f1_interval is None, "a bootstrap of perfect rows knows nothing about rows to come"
    assert scores.expected_calibration_error == 0


def test_all_predictions_equal() -> None:
    scores = classification_scores(["a", "b", "b", "c"], ["b"] * 4, None, CLASSES)
    assert scores.accuracy == scores.majority_score == 0.5
    assert scores.balanced_accuracy == pytest.approx(1 / 3)
    assert scores.per_class[0]["precision"] is None
    assert scores.per_class[0]["recall"] == 0
    assert scores.per_class[3] == {"class": "d", "precision": None, "recall": None, "f1": None, "support": 0}
    assert scores.expected_calibration_error is None


def test_calibration_error_by_hand() -> None:
    right = np.array([True, True, False, True])
    confidence = np.array([0.9, 0.9, 0.9, 0.62])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.38)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


@pytest.mark.parametrize(
    ("true", "predicted", "probabilities", "message"),
    [
        ([], [], None, "there are no rows to score"),
        (["a"], ["a", "b"], None, "1 true classes but 2 predictions"),
        (["a", "z"], ["a", "b"], None, "true class 'z' of row 1 is none of a, b"),
        (["a"], ["z"], None, "predicted class 'z' of row 0"),
        (["a"], ["a"], np.ones((1, 3)), r"\[1, 2\] \(rows, classes\), found \(1, 3\)"),
        (["a"], ["a"], np.array([[np.nan, 0.5]]), "row 0 has probabilities that are not numbers between 0 and 1"),
    ],
)
def test_mistakes(true: list[str], predicted: list[str], probabilities: np.ndarray | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classification_scores(true, predicted, probabilities, ("a", "b"))
