"""The report of a run: one HTML file that needs nothing else, for people who do not know the code.

Whatever is missing (no validation, no scores, a prompt from elsewhere) is left out, and the report says so at its end.
Texts of the data are escaped; the page holds no script, and its policy forbids the browser to run or fetch anything.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..atomic import write_atomic
from ..prompt import SoftPrompt
from . import plots, summary
from .history import Event, at_steps, series, token_series
from .nearest import Lengths, movement, nearest_tokens, vocabulary_lengths

MOST_MISTAKES, MOST_EXAMPLES, MOST_TEXT, SHORT_TEXT = 20, 20, 5000, 320
CONFUSION_TABLE = 12  # classes up to which the confusion matrix is a table; beyond, a heat map
LOWER_IS_BETTER = ("loss", "bits_per_token", "perplexity")


@dataclass(frozen=True)
class Words:
    """The vocabulary around the prompt: neighbours of each soft token, where each started, lengths of its words."""

    lengths: Lengths | None
    rows: list[dict[str, Any]]


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    events: Sequence[Event],
    prompt: SoftPrompt,
    table: Tensor | None = None,
    tokenizer: Any = None,
    initial: Tensor | None = None,
    scores: Mapping[str, Any] | None = None,
    mistakes: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    baselines: Sequence[Mapping[str, Any]] = (),
    versions: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run as one self-contained HTML file and return its path.

    events: the lines of metrics.jsonl. table: the vocabulary's embeddings [V, H] after the model's own scaling.
    initial: the vectors [P, H] before tuning. scores: ClassificationScores or TextScores as a dict. mistakes: {text,
    true, predicted, probability}. examples: {text, predicted, references}. baselines: {name, score, low, high} in the
    headline's metric. versions: by default those that the prompt's provenance tells. The same arguments give the same
    bytes. Raises OutputError when the file cannot be written.
    """
    path = Path(path)
    words = _words(prompt, table, tokenizer, initial)
    steps, checks = at_steps(events, "step"), at_steps(events, "validation")
    told = versions or prompt.provenance.get("versions")
    page = {
        "title": title,
        "facts": _facts(prompt, steps, events),
        "result": _result(scores, baselines),
        "warnings": _warnings(events, scores),
        "curves": _curves(steps, checks, scores or {}),
        "token_figures": _token_figures(steps, prompt, words, initial),
        "classes": _classes(scores),
        "mistakes": _mistakes(mistakes),
        "mistakes_total": len(mistakes),
        "examples": [_example(row) for row in examples[:MOST_EXAMPLES]],
        "words": words,
        "template": _template(prompt),
        "config": _flat(config),
        "versions": _flat(told) if isinstance(told, Mapping) else [],
        "writer": f"softprompt {_version('softprompt')}, Python {platform.python_version()}",
    }
    page["missing"] = _missing(page, checks, initial)
    page["contents"] = _contents(page)
    write_atomic(path, render(page).encode("utf-8", "replace"))
    return path


def _contents(page: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(section, whether it is there) in the order of the page."""
    there = (page["result"], page["warnings"], page["curves"], page["token_figures"], page["words"].rows)
    further = (page["classes"], page["mistakes"], page["examples"], True)
    names = "Result Warnings Tuning Soft-tokens Nearest-words Classes Mistakes Examples Settings".split()
    return [(name.replace("-", " "), bool(part)) for name, part in zip(names, (*there, *further))]


def render(page: Mapping[str, Any]) -> str:
    """Fill the template; everything but our own figures is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup
    environment.filters["seen"] = _seen
    return environment.from_string(source).render(page)


def _seen(text: str) -> str:
    """A token's text with what cannot be seen made visible: spaces as an open box, control characters as escapes."""
    return plots.shorten(text.replace(" ", "\u2423"), 40)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _facts(prompt: SoftPrompt, steps: Sequence[Event], events: Sequence[Event]) -> list[tuple[str, str]]:
    """What was tuned, in a few words: (what, value)."""
    size = prompt.vectors.numel() * 4
    facts = [
        ("model", prompt.base_model or "not known"),
        ("soft prompt", f"{prompt.tokens} token{'s' * (prompt.tokens != 1)} of width {prompt.width}, {size / 1024:.0f} kB"),
    ]
    if prompt.template is not None:
        facts.append(("place", prompt.template.placement.replace("_", " ")))
    if steps:
        facts.append(("steps", f"{steps[-1]['step']:,}"))
    speeds = series(steps, "examples_per_second")[1]
    if len(speeds):
        facts.append(("speed", f"{np.median(speeds):,.0f} examples/s (median)"))
    ends = [event for event in events if event.get("event") == "end"]
    if ends:
        facts.append(("ended", str(ends[-1].get("reason", ""))))
    return facts


def _result(scores: Mapping[str, Any] | None, baselines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
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
        "entries": entries,
        "top": summary.figure(metric, entries[0].width) if entries else "",
        "verdicts": summary.verdicts(entries),
        "table": summary.score_table(scores),
    }


def _warnings(events: Sequence[Event], scores: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Warnings of the run, repeated ones once with their first step and number, then those of the scores."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "warning":
            text = str(event.get("text", ""))
            line = found.setdefault(text, {"text": text, "step": event.get("step"), "times": 0})
            line["times"] += 1
    return [*found.values(), *({"text": text, "step": None, "times": 1} for text in summary.notes(scores or {}))]


def _curves(
    steps: Sequence[Event], checks: Sequence[Event], scores: Mapping[str, Any]
) -> list[plots.Figure]:
    """Loss, validation score, learning rate and gradient norm over steps; those that were recorded."""
    name = str(next((event["metric"] for event in checks if event.get("metric")), "score"))
    marks = []
    if name == "accuracy" and summary.number(scores.get("majority_score")) is not None:
        marks.append(("always the most frequent class", float(scores["majority_score"])))
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
            "How surprised the model is by the right answers (nats a token; lower is better). The thin line is each "
            "step, the thick one its running mean.",
        ),
        plots.curve("score", [measured], label, _score_caption(label, name, measured), marks if len(measured.steps) else ()),
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
            "How strongly the data pull at the whole prompt. A steady rise means that the learning rate is too high.",
        ),
    ]
    return [figure for figure in drawn if figure]


def _score_caption(label: str, name: str, line: plots.Line) -> str:
    if not len(line.steps):
        return ""
    best = int(line.values.argmin() if name in LOWER_IS_BETTER else line.values.argmax())
    return f"The {label} on validation rows; best at step {line.steps[best]:.0f} ({summary.figure(name, line.values[best])})."


def _token_figures(
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


def _words(prompt: SoftPrompt, table: Tensor | None, tokenizer: Any, initial: Tensor | None) -> Words:
    """Neighbours of each soft token, with its length and movement; no rows for a table of another width."""
    if table is None or table.ndim != 2 or table.shape[1] != prompt.width or not len(table):
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


def _classes(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
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


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _template(prompt: SoftPrompt) -> list[tuple[str, str]]:
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


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) in their own order."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", _shown(value)))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "\u2013"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _missing(page: Mapping[str, Any], checks: Sequence[Event], initial: Tensor | None) -> list[str]:
    """What a full report would also hold, and why it is not here."""
    parts = [
        ("scores (nothing was evaluated)", page["result"]),
        ("curves (the run's events are not there)", page["curves"]),
        ("validation (none was measured)", checks),
        ("movement (the vectors before tuning are not known)", initial is not None),
        ("nearest words (the model's vocabulary was not given)", page["words"].rows),
        ("the text around the prompt (it came without a template)", page["template"]),
        ("configuration (how the prompt was made is not known)", page["config"]),
        ("versions (none were recorded)", page["versions"]),
    ]
    return [name for name, there in parts if not there]
