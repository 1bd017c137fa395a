"""The parts of the report: from a run's figures to what the page's template shows. Nothing here knows HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..prompt import SoftPrompt
from . import plots, summary
from .history import Event, series, token_series
from .nearest import Lengths, movement, nearest_tokens, vocabulary_lengths

MOST_MISTAKES, MOST_TEXT, SHORT_TEXT = 20, 5000, 320
CONFUSION_TABLE = 12  # classes up to which the confusion matrix is a table; beyond, a heat map


@dataclass(frozen=True)
class Words:
    """The vocabulary around the prompt: neighbours of each soft token, where each started, lengths of its words."""

    lengths: Lengths | None
    rows: list[dict[str, Any]]


def facts(prompt: SoftPrompt, steps: Sequence[Event], events: Sequence[Event]) -> list[tuple[str, str]]:
    """What was tuned, in a few words: (what, value)."""
    count = "1 token" if prompt.tokens == 1 else f"{prompt.tokens:,} tokens"
    found = [
        ("model", prompt.base_model or "not known"),
        ("soft prompt", f"{count} of width {prompt.width}, {prompt.vectors.numel() * 4 / 1024:.1f} kB"),
    ]
    if prompt.template is not None:
        found.append(("place", prompt.template.placement.replace("_", " ")))
    if steps:
        found.append(("steps", f"{steps[-1]['step']:,}"))
    speeds = series(steps, "examples_per_second")[1]
    if len(speeds):
        found.append(("speed", f"{np.median(speeds):,.0f} examples/s (median)"))
    ends = [event for event in events if event.get("event") == "end"]
    if ends:
        found.append(("ended", str(ends[-1].get("reason", ""))))
    return found


def result(scores: Mapping[str, Any] | None, baselines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The headline, the comparison and the table of all scores."""
    if not scores:
        return None
    metric = summary.main_metric(scores)
    entries = summary.comparison(scores, baselines)
    rows = scores.get("rows")
    return {
        "metric": summary.metric_of(metric).label,
        "value": summary.figure(metric, scores.get(metric)),
        "interval": summary.interval(metric, summary.interval_of(scores, metric)),
        "rows": f"{rows:,}" if isinstance(rows, int) else None,
        "split": scores.get("split"),
        "entries": entries,
        "scale": summary.scale(entries),
        "verdicts": summary.verdicts(entries),
        "table": summary.score_table(scores),
    }


def warnings_of(events: Sequence[Event], scores: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Warnings of the run, repeated ones once with their first step and number, then those of the scores."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "warning":
            text = str(event.get("text", ""))
            line = found.setdefault(text, {"text": text, "step": event.get("step"), "times": 0})
            line["times"] += 1
    return [*found.values(), *({"text": text, "step": None, "times": 1} for text in summary.notes(scores or {}))]


def curves(steps: Sequence[Event], checks: Sequence[Event], scores: Mapping[str, Any]) -> list[plots.Figure]:
    """Loss, validation score, learning rate and gradient norm over steps; those that were recorded."""
    name = str(next((event["metric"] for event in checks if event.get("metric")), "score"))
    marks: list[tuple[str, float]] = []
    majority = summary.number(scores.get("majority_score"))
    if name == "accuracy" and majority is not None:
        marks.append((f"always the most frequent class ({scores.get('split') or 'scored'} rows)", majority))
    smoothed = len(steps) >= plots.ENOUGH_TO_SMOOTH
    measured = plots.Line("validation", *series(checks, "score"), dots=True)
    label = summary.metric_of(name).label
    drawn = [
        plots.curve(
            "loss",
            [
                plots.Line("training", *series(steps, "loss"), noisy=True),
                plots.Line("validation", *series(checks, "loss"), dots=True),
            ],
            "loss",
            "How surprised the model is by the right answers (in nats; lower is better)."
            + (" The thin line is each step, the thick one its running mean." if smoothed else ""),
        ),
        plots.curve("score", [measured], label, _score_caption(label, name, measured), marks),
        plots.curve(
            "rate",
            [plots.Line("learning rate", *series(steps, "learning_rate"))],
            "learning rate",
            "How far the vectors may move in one step.",
        ),
        plots.curve(
            "gradient",
            [plots.Line("gradient norm", *series(steps, "gradient_norm"), noisy=True)],
            "gradient norm",
            "How strongly the data pull at the whole prompt. A steady rise often means that the learning rate is too "
            "high.",
        ),
    ]
    return [figure for figure in drawn if figure]


def _score_caption(label: str, name: str, line: plots.Line) -> str:
    if not len(line.steps):
        return ""
    best = int(line.values.argmin() if summary.metric_of(name).lower_is_better else line.values.argmax())
    value = summary.figure(name, float(line.values[best]))
    return f"The {label} on validation rows; best at step {line.steps[best]:.0f} ({value})."


def token_figures(
    steps: Sequence[Event], prompt: SoftPrompt, words: Words, initial: Tensor | None
) -> list[plots.Figure]:
    """Gradient and length of each soft token over steps, and how far each has moved."""
    lengths, moved = words.lengths, movement(prompt.vectors, initial)
    drawn = [
        plots.token_map(
            "token-gradients",
            *token_series(steps, "token_gradient_norms", prompt.tokens),
            "gradient norm",
            "How strongly the data pull at each soft token. A dark row is a token that learns little. Above: the mean "
            "over the tokens, and the band from the smallest to the largest.",
            logarithmic=True,
        ),
        plots.token_map(
            "token-lengths",
            *token_series(steps, "token_norms", prompt.tokens),
            "vector norm",
            "The length of each soft token's vector. "
            + (f"Words of the vocabulary have {lengths.mean:.3g} on average." if lengths else "")
            + " Tokens that grow far beyond that have left the region that the model knows.",
            reference=lengths,
        ),
        plots.bars(
            "movement",
            [distance / (lengths.mean if lengths and lengths.mean else 1.0) for distance, _ in moved],
            "distance from the start",
            "How far each soft token has moved from where it started"
            + (", in units of the mean length of a vocabulary word." if lengths and lengths.mean else "."),
        ),
    ]
    return [figure for figure in drawn if figure]


def near_words(prompt: SoftPrompt, table: Tensor | None, tokenizer: Any, initial: Tensor | None) -> Words:
    """Neighbours of each soft token, with its length and movement; no rows for a deep prompt, or another width."""
    if (
        prompt.kind != "embedding"
        or table is None
        or table.ndim != 2
        or table.shape[1] != prompt.width
        or not len(table)
    ):
        return Words(None, [])
    moved = movement(prompt.vectors, initial)
    starts = nearest_tokens(initial, table, tokenizer, k=1) if initial is not None and moved else []
    rows = [
        {
            "token": token,
            "near": near,
            "start": starts[token][0] if starts and starts[token] else None,
            "norm": float(prompt.vectors[token].norm()),
            "distance": moved[token][0] if moved else None,
            "cosine": moved[token][1] if moved else None,
        }
        for token, near in enumerate(nearest_tokens(prompt.vectors, table, tokenizer, k=5))
    ]
    return Words(vocabulary_lengths(table), rows)


def class_tables(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Per-class table, confusion matrix (table or heat map) and the most frequent wrong answers."""
    if not scores or not scores.get("confusion"):
        return None
    names, counts = [str(name) for name in scores["classes"]], np.array(scores["confusion"])
    rows = list(scores.get("per_class") or [])
    ranked = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"] or 0.0)
    caption = "Each row is a true class, each column what it was taken for; a bright diagonal is good."
    many = len(names) > CONFUSION_TABLE
    return {
        "names": names,
        "rows": rows,
        "worst": ranked[:10] if many else [],
        "matrix": None if many else _shares(counts),
        "figure": plots.confusion_map("confusion", counts, names, caption) if many else None,
        "pairs": summary.confusions(scores) if len(names) > 2 else [],
    }


def _shares(counts: Any) -> list[list[tuple[int, float]]]:
    """(rows, share of the true class) of each cell of a confusion matrix [C, C]."""
    return [[(int(cell), round(float(cell) / max(int(line.sum()), 1), 3)) for cell in line] for line in counts]


def surest(mistakes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The most confident ones first."""

    def confidence(row: Mapping[str, Any]) -> float:
        return summary.number(row.get("probability")) or 0.0

    return [
        {
            **_text(row.get("text", "")),
            "true": str(row.get("true", "")),
            "predicted": str(row.get("predicted", "")),
            "probability": summary.figure("accuracy", row.get("probability")),
        }
        for row in sorted(mistakes, key=confidence, reverse=True)[:MOST_MISTAKES]
    ]


def example(row: Mapping[str, Any]) -> dict[str, Any]:
    """One generated text beside its input and its references."""
    wanted = row.get("references", row.get("true", row.get("target", ())))
    references = [wanted] if isinstance(wanted, str) else list(wanted or ())
    return {
        **_text(row.get("text", "")),
        "predicted": _text(row.get("predicted", "")),
        "references": [_text(reference) for reference in references],
    }


def _text(value: Any) -> dict[str, Any]:
    """A text of the data: its beginning, and the whole where that is longer (but no more than a page can take)."""
    text = str(value)
    whole = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\u2026 ({len(text) - MOST_TEXT:,} characters more)"
    return {"start": text[:SHORT_TEXT], "whole": whole if len(text) > SHORT_TEXT else None}


def template_texts(prompt: SoftPrompt) -> list[tuple[str, str]]:
    """The hard text around the prompt: (what, text)."""
    template = prompt.template
    if template is None:
        return []
    turns = [(role, text) for role, text in template.chat or ()]
    found = turns or [("input", template.input or "")]
    found.append(("target", template.target))
    if template.labels:
        found.append(("labels", "\n".join(f"{name}: {word!r}" for name, word in template.labels)))
    return found


def flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) in their own order."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", _shown(value)))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "\u2013"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
