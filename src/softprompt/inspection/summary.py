"""What the scores of a run say, in words and rows for people. Never says more than the figures do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is called and written. top: the value of a perfect score; None where there is no such value."""

    label: str
    meaning: str
    top: float | None = 1.0
    percent: bool = True
    lower_is_better: bool = False


METRICS = {
    "accuracy": Metric("accuracy", "share of the rows answered rightly"),
    "balanced_accuracy": Metric(
        "balanced accuracy", "mean over classes of the share found: rare classes count as much"
    ),
    "macro_f1": Metric("macro-F1", "mean over classes of F1: finding a class, and not claiming it wrongly"),
    "expected_calibration_error": Metric(
        "expected calibration error",
        "mean gap between the stated probability and the share that was right; 0 is best",
        None,
    ),
    "exact_match": Metric("exact match", "share of the texts equal to a reference, but for spaces"),
    "token_f1": Metric("token F1", "words in common with the best reference, in any order"),
    "rouge_l": Metric("ROUGE-L", "words in common with the best reference, in the same order"),
    "chrf": Metric("chrF", "pieces of 1 to 6 characters in common, over all rows (sacrebleu, 0 to 100)", 100.0, False),
    "bleu": Metric("BLEU", "runs of 1 to 4 words in common, over all rows (sacrebleu, 0 to 100)", 100.0, False),
    "bits_per_token": Metric("bits per token", "surprise at the reference text; less is better", None, False, True),
    "loss": Metric("loss", "surprise at the right answer, in nats; less is better", None, False, True),
}
UNKNOWN = "not known"


@dataclass(frozen=True)
class Entry:
    """One line of the comparison. low, high, score in the metric's own unit; *_at: places on the bar in percent."""

    name: str
    score: float
    low: float | None
    high: float | None
    ours: bool
    metric: str
    width: float

    @property
    def score_text(self) -> str:
        return figure(self.metric, self.score)

    @property
    def interval_text(self) -> str:
        return interval(self.metric, (self.low, self.high))

    @property
    def low_at(self) -> float:
        return self._place(self.score if self.low is None else self.low)

    @property
    def high_at(self) -> float:
        return self._place(self.score if self.high is None else self.high)

    @property
    def score_at(self) -> float:
        return self._place(self.score)

    def _place(self, value: float) -> float:
        return round(100 * min(max(value / self.width, 0.0), 1.0), 2)


def metric_of(name: str) -> Metric:
    """The known metric of that name, or a plain one for a name of somebody else's."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "", None, False)


def number(value: Any) -> float | None:
    """The value as a float, or None when it is no finite number."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def figure(metric: str, value: Any) -> str:
    """A score as people read it: 84.1 %, 43.2, 1.523. Rounding never makes a score perfect or nothing that is not."""
    known, real = metric_of(metric), number(value)
    if real is None:
        return UNKNOWN
    if not known.percent:
        return f"{real:.1f}" if known.top else f"{real:.3f}"
    shown = f"{100 * real:.1f}"
    if shown == "100.0" and real < 1:
        return "over 99.9 %"
    return "under 0.1 %" if shown == "0.0" and real > 0 else f"{shown} %"


def interval(metric: str, bounds: Any) -> str:
    """`81.8 % to 86.2 %`, or nothing when the interval is not known."""
    low, high = _bounds(bounds)
    return "" if low is None or high is None else f"{figure(metric, low)} to {figure(metric, high)}"


def _bounds(bounds: Any) -> tuple[float | None, float | None]:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        return None, None
    return number(bounds[0]), number(bounds[1])


def main_metric(scores: Scores) -> str:
    """The metric that stands in the headline: what the scores name, else accuracy, else the first that is known."""
    named = scores.get("metric")
    choices = [named] if isinstance(named, str) else []
    return next((name for name in [*choices, *METRICS] if number(scores.get(name)) is not None), "accuracy")


def interval_of(scores: Scores, metric: str) -> Any:
    """The interval that belongs to a metric, wherever the two kinds of scores keep it."""
    intervals = scores.get("intervals")
    if isinstance(intervals, Mapping) and metric in intervals:
        return intervals[metric]
    return scores.get("interval" if metric == "accuracy" else f"{metric}_interval")


def comparison(scores: Scores, baselines: Sequence[Scores]) -> list[Entry]:
    """The prompt's score beside those of the baselines and of always giving the most frequent answer."""
    metric = main_metric(scores)
    found = [("this prompt", scores.get(metric), *_bounds(interval_of(scores, metric)))]
    found += [
        (str(line.get("name", "baseline")), line.get("score"), *_bounds((line.get("low"), line.get("high"))))
        for line in baselines
        if line.get("metric", metric) == metric
    ]
    if metric == "accuracy" and scores.get("majority_class") is not None:
        found.append((f"always \u201c{scores['majority_class']}\u201d", scores.get("majority_score"), None, None))
    known = [(name, real, low, high) for name, value, low, high in found if (real := number(value)) is not None]
    width = metric_of(metric).top or max((high or real for _, real, _, high in known), default=1.0) or 1.0
    return [
        Entry(name, real, low, high, place == 0 and name == "this prompt", metric, width)
        for place, (name, real, low, high) in enumerate(known)
    ]


def scale(entries: Sequence[Entry]) -> str:
    """What the bars of the comparison reach from and to."""
    if not entries:
        return ""
    width = entries[0].width
    return "0 to 100 %" if metric_of(entries[0].metric).percent and width == 1 else f"0 to {width:.3g}"


def verdicts(entries: Sequence[Entry]) -> list[str]:
    """One sentence on each comparison of the prompt with another line; only disjoint intervals are called clear."""
    if not entries or not entries[0].ours:
        return []
    ours = entries[0]
    return [_verdict(ours, other) for other in entries[1:]]


def _verdict(ours: Entry, other: Entry) -> str:
    name = other.name if other.name.startswith("always") else f"\u201c{other.name}\u201d"
    if ours.low is None or ours.high is None:
        return f"Whether it is better than {name} cannot be told: there is no interval for this prompt."
    low = other.score if other.low is None else other.low
    high = other.score if other.high is None else other.high
    above, below = ours.low > high, ours.high < low
    if metric_of(ours.metric).lower_is_better:
        above, below = below, above
    alone = other.low is None or other.high is None
    if above or below:
        why = "its score lies outside this prompt's interval" if alone else "the intervals do not touch"
        return f"Clearly {'better' if above else 'worse'} than {name}: {why}."
    why = "its score lies inside this prompt's interval" if alone else "the intervals overlap"
    return f"Not clearly different from {name}: {why}; more test rows could tell."


def score_table(scores: Scores) -> list[dict[str, str]]:
    """All known metrics with interval and meaning; a metric that is there but None is told as not known."""
    return [
        {
            "label": metric.label,
            "value": figure(name, scores[name]),
            "interval": interval(name, interval_of(scores, name)),
            "meaning": metric.meaning,
        }
        for name, metric in METRICS.items()
        if name in scores
    ]


def confusions(scores: Scores, most: int = 10) -> list[dict[str, Any]]:
    """The most frequent wrong answers: {true, predicted, rows, share of the true class}."""
    classes, counts = list(scores.get("classes", [])), scores.get("confusion", [])
    pairs = [
        {"true": classes[i], "predicted": classes[j], "rows": rows, "share": rows / sum(line)}
        for i, line in enumerate(counts)
        for j, rows in enumerate(line)
        if i != j and rows
    ]
    return sorted(pairs, key=lambda pair: -int(pair["rows"]))[:most]


def notes(scores: Scores) -> list[str]:
    """Warnings that the scores themselves give cause for."""
    found = []
    rows = scores.get("rows")
    if isinstance(rows, int) and rows < 100:
        found.append(f"Only {rows} row{'s were' if rows != 1 else ' was'} scored: read the interval, not the figure.")
    counts = scores.get("confusion") or []
    used = [j for j in range(len(counts)) if any(line[j] for line in counts)]
    if len(used) == 1 and len(counts) > 1:
        found.append(
            f"Every row was given the same answer, \u201c{scores['classes'][used[0]]}\u201d: the prompt tells nothing "
            "apart. Try more steps, a higher learning rate, or another initialiser."
        )
    empty = [line["class"] for line in scores.get("per_class") or [] if not line.get("support")]
    if empty:
        names = ", ".join(f"\u201c{name}\u201d" for name in empty[:5]) + (", \u2026" if len(empty) > 5 else "")
        found.append(
            f"{len(empty)} of {len(counts)} classes have no rows here ({names}): nothing is known about them, and "
            "macro-F1 counts those that were predicted nevertheless as 0."
        )
    return found
