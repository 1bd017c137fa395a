"""Reports as tables for people and as data for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import interval

if TYPE_CHECKING:
    from ..evaluation.runner import Report

MOST_CLASSES = 12  # a larger confusion matrix does not fit a terminal: the largest confusions are listed
TEXT_METRICS = (
    ("exact_match", "exact match"),
    ("token_f1", "token F1"),
    ("rouge_l", "ROUGE-L"),
    ("chrf", "chrF (0 to 100)"),
    ("bleu", "BLEU (0 to 100)"),
)


def table(*columns: str) -> Any:
    """An empty table; columns after the first are right-aligned and never wrapped."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns[:1]:
        made.add_column(column, overflow="fold", min_width=min(12, len(column) + 6))
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def headline(report: Report) -> tuple[str, float, Any]:
    """The name, value and interval of the score that stands for a report."""
    if report.scores is not None:
        return "accuracy", report.accuracy, report.interval
    if report.texts is not None:
        return "ROUGE-L", report.texts.rouge_l, report.texts.intervals.get("rouge_l")
    return "loss", report.loss, None


def in_one_line(report: Report) -> str:
    name, value, bounds = headline(report)
    rows = len(report.true)
    shown = f"{name} {value:.3f}" + (f" ({interval(bounds)})" if bounds else "")
    return f"{shown} on {rows:,} row{'s' if rows != 1 else ''}"


def report_tables(report: Report) -> list[Any]:
    """Everything that a report says, as rich tables with lines above them."""
    if report.scores is not None:
        return [_class_scores(report), _per_class(report), *_confusion(report)]
    return [_text_scores(report)]


def report_data(report: Report) -> dict[str, Any]:
    """The same as plain data."""
    return report.to_dict()


def _class_scores(report: Report) -> Any:
    scores = report.scores
    assert scores is not None
    made = table("score", "value", "95 % interval")
    made.add_row("accuracy", f"{scores.accuracy:.3f}", interval(scores.interval))
    made.add_row("balanced accuracy", f"{scores.balanced_accuracy:.3f}", interval(scores.balanced_accuracy_interval))
    made.add_row("macro-F1", f"{scores.macro_f1:.3f}", interval(scores.macro_f1_interval))
    if scores.expected_calibration_error is not None:
        made.add_row("expected calibration error", f"{scores.expected_calibration_error:.3f}", "")
    made.add_row(f"majority class ({scores.majority_class})", f"{scores.majority_score:.3f}", "")
    made.add_row("loss (nats a row)", f"{report.loss:.3f}", "")
    made.add_row("rows", f"{scores.rows:,}", "")
    return made


def _per_class(report: Report) -> Any:
    assert report.scores is not None
    made = table("class", "precision", "recall", "F1", "rows")
    for each in report.scores.per_class:
        figures = ("-" if each[key] is None else f"{each[key]:.3f}" for key in ("precision", "recall", "f1"))
        made.add_row(each["class"], *figures, f"{each['support']:,}")
    return made


def _confusion(report: Report) -> list[Any]:
    assert report.scores is not None
    classes, counts = report.scores.classes, report.scores.confusion
    if len(classes) <= MOST_CLASSES:
        made = table("", *classes)
        for name, row in zip(classes, counts, strict=True):
            made.add_row(name, *(f"{count:,}" for count in row))
        return ["rows of each class (down) by predicted class (across)", made]
    wrong = [
        (n, t, p)
        for t, row in zip(classes, counts, strict=True)
        for p, n in zip(classes, row, strict=True)
        if t != p and n
    ]
    made = table("class", "predicted as", "rows")
    for count, true, predicted in sorted(wrong, reverse=True)[:MOST_CLASSES]:
        made.add_row(true, predicted, f"{count:,}")
    return [f"the {MOST_CLASSES} most frequent confusions", made]


def _text_scores(report: Report) -> Any:
    made = table("score", "value", "95 % interval")
    texts = report.texts
    if texts is not None:
        for key, label in TEXT_METRICS:
            value = getattr(texts, key)
            made.add_row(label, "-" if value is None else f"{value:.3f}", interval(texts.intervals.get(key)))
        if texts.bits_per_token is not None:
            made.add_row("bits per target token", f"{texts.bits_per_token:.3f}", "")
    made.add_row("rows", f"{len(report.true):,}", "")
    return made
