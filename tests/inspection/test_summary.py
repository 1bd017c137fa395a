"""What the report says in words must follow from the figures, and no more."""

from __future__ import annotations

import pytest

from softprompt.evaluation.metrics import classification_scores, text_scores
from softprompt.inspection import summary


def scores(right: int, wrong: int) -> dict:
    true = ["a", "b"] * ((right + wrong) // 2)
    predicted = [t if i < right else "ab"[t == "a"] for i, t in enumerate(true)]
    return classification_scores(true, predicted, None, ("a", "b")).to_dict()


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.841, "84.1 %"),
        ("accuracy", 1, "100.0 %"),
        ("accuracy", 0.99999, "over 99.9 %"),
        ("accuracy", 0.00001, "under 0.1 %"),
        ("accuracy", 0.0, "0.0 %"),
        ("accuracy", None, "not known"),
        ("accuracy", float("nan"), "not known"),
        ("chrf", 43.21, "43.2"),
        ("bits_per_token", 1.5234, "1.523"),
        ("somebody_s_own", 0.5, "50.0 %"),
    ],
)
def test_figures(metric: str, value: float, shown: str) -> None:
    assert summary.figure(metric, value) == shown.replace("50.0 %", "0.500" if metric == "somebody_s_own" else "50.0 %")


def test_only_disjoint_intervals_are_called_clear() -> None:
    baselines = [
        {"name": "zero-shot", "score": 0.5, "low": 0.47, "high": 0.53},
        {"name": "4-shot", "score": 0.83, "low": 0.81, "high": 0.85},
        {"name": "lora", "score": 0.95, "low": 0.94, "high": 0.96},
        {"name": "of another metric", "score": 9, "metric": "bleu"},
        {"name": "without score", "score": None},
    ]
    entries = summary.comparison(scores(840, 160), baselines)
    assert [entry.name for entry in entries] == ["this prompt", "zero-shot", "4-shot", "lora", "always \u201ca\u201d"]
    said = summary.verdicts(entries)
    assert [line.split(":")[0] for line in said] == [
        "Clearly better than \u201czero-shot\u201d",
        "Not clearly different from \u201c4-shot\u201d",
        "Clearly worse than \u201clora\u201d",
        "Clearly better than always \u201ca\u201d",
    ]
    assert "outside this prompt's interval" in said[3]


def test_less_is_better_for_bits() -> None:
    text = text_scores(["x y", "z"], [["x y"], ["q"]], 1.2).to_dict() | {"metric": "bits_per_token"}
    text["intervals"]["bits_per_token"] = [1.1, 1.3]
    entries = summary.comparison(text, [{"name": "zero-shot", "score": 2.0, "low": 1.9, "high": 2.1}])
    assert summary.verdicts(entries) == ["Clearly better than \u201czero-shot\u201d: the intervals do not touch."]
    assert summary.scale(entries) == "0 to 2.1"
    assert entries[0].score_at < entries[1].score_at <= 100


def test_without_an_interval_nothing_is_claimed() -> None:
    entries = summary.comparison({"accuracy": 0.9}, [{"name": "zero-shot", "score": 0.1}])
    assert "cannot be told" in summary.verdicts(entries)[0]
    assert summary.verdicts(summary.comparison({}, [])) == []


def test_notes_about_scores() -> None:
    assert summary.notes(scores(840, 160)) == []
    same = classification_scores(["a", "b", "a"], ["a"] * 3, None, ("a", "b", "c")).to_dict()
    few, constant, empty = summary.notes(same)
    assert few.startswith("Only 3 rows were scored")
    assert constant.startswith("Every row was given the same answer, \u201ca\u201d")
    assert empty.startswith("1 of 3 classes have no rows here (\u201cc\u201d)")


def test_most_frequent_confusions() -> None:
    pairs = summary.confusions({"classes": ["a", "b"], "confusion": [[5, 1], [3, 1]]})
    assert pairs[0] == {"true": "b", "predicted": "a", "rows": 3, "share": 0.75}
    assert summary.confusions({}) == []
