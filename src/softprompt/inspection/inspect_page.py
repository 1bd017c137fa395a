"""The report of `inspect` and of `similarity`: one self-contained HTML file in the style of the run report."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import write_atomic
from . import pictures, plots, summary
from .findings import answers, facts
from .importance import Importance
from .inspect_figures import figure_groups, similarity_figures
from .inspecting import Inspection
from .measuring import Paired, RowScores
from .projection import Projection
from .report import render
from .sections import template_texts
from .similarity import Similarity

MOST_ROWS = 60


def write_inspections(
    path: str | Path,
    inspections: Sequence[Inspection],
    *,
    together: Projection | None = None,
    similarity: Similarity | None = None,
    title: str = "",
) -> Path:
    """Write one page for one or more prompts and return its path. Raises OutputError."""
    names = ", ".join(found.name for found in inspections)
    page = {
        "title": title or f"Inside {names}" if names else title or "Prompts compared",
        "prompts": [_prompt(found, number) for number, found in enumerate(inspections)],
        "together": _together(together),
        "similarity": _similarity(similarity) if similarity is not None else None,
        "writer": f"softprompt {__version__}, Python {platform.python_version()}",
    }
    path = Path(path)
    write_atomic(path, render(page, "inspect.html.j2").encode("utf-8", "replace"))
    return path


def _together(found: Projection | None) -> plots.Figure | None:
    return pictures.points(
        "together",
        found,
        "All prompts among the vocabulary's words. Two dimensions show a small part of the differences: what lies "
        "apart here is apart, what lies together may not be.",
    )


def _prompt(found: Inspection, number: int) -> dict[str, Any]:
    prompt = found.prompt
    key = f"p{number}"
    return {
        "key": key,
        "name": found.name,
        "facts": facts(found),
        "answers": answers(found),
        "rows": _rows(found),
        "measured": found.importance is not None or found.attention is not None,
        "lengths": found.lengths,
        "yardsticks": [
            (measure, _figures(stick.words), _figures(stick.chance)) for measure, stick in found.yardsticks.items()
        ],
        "groups": figure_groups(found, key),
        "changes": changes(found.importance),
        "layers": _layer_words(found),
        "template": template_texts(prompt),
        "notes": found.notes,
    }


def _figures(three: tuple[float, float, float]) -> str:
    return f"{three[1]:.3g} (nine in ten: {three[0]:.3g} to {three[2]:.3g})"


def _rows(found: Inspection) -> list[dict[str, Any]]:
    """One line a soft token."""
    near = found.near
    count = found.prompt.tokens
    costs = found.importance.of_token if found.importance else []
    errors = found.importance.errors if found.importance else []
    choosing = found.importance is not None and found.importance.whole.choices is not None
    looked = found.attention.tokens.mean(dim=0).tolist() if found.attention else []
    return [
        {
            "token": token,
            "begun": found.begun[token] if found.begun else None,
            "cosine": near["cosine"][token] if near else [],
            "euclidean": near["euclidean"][token] if near else [],
            "dot": near["dot"][token] if near else [],
            "norm": float(found.norms[token]),
            "distance": found.moved[token][0] if found.moved else None,
            "turned": found.moved[token][1] if found.moved else None,
            "cost": costs[token] if costs else None,
            "error": errors[token] if errors else None,
            "answer": found.importance.of_answer[token] if found.importance and choosing and costs else None,
            "attention": looked[token] if looked else None,
        }
        for token in range(count)
    ]


def changes(measured: Importance | None) -> list[dict[str, Any]]:
    if measured is None:
        return []
    rows: list[tuple[str, RowScores, Paired | None]] = [("the whole prompt", measured.whole, None)]
    rows += [(change.name, change.scores, change.against) for change in [*measured.first, *measured.shuffled]]
    return [
        {
            "name": name,
            "loss": f"{scores.main_loss:.3f}",
            "answer": "–" if scores.choices is None else f"{scores.loss:.3f}",
            "accuracy": summary.figure("accuracy", scores.accuracy) if scores.accuracy is not None else "–",
            "difference": "–" if against is None else f"{against.difference:+.3f}",
            "interval": "–"
            if against is None or not against.interval
            else "{:+.3f} to {:+.3f}".format(*against.interval),
            "p": "–" if against is None or against.p is None else f"{against.p:.2g}",
        }
        for name, scores, against in rows
    ]


def _layer_words(found: Inspection) -> list[dict[str, Any]]:
    """For each soft token of a deep prompt the words its values push for, layer by layer."""
    if found.deep is None or not found.deep.words:
        return []
    layers = found.deep.words
    return [
        {"token": token, "layers": [(number, layer[token]) for number, layer in enumerate(layers)]}
        for token in range(min(found.prompt.tokens, MOST_ROWS))
    ]


def _similarity(found: Similarity) -> dict[str, Any]:
    names = [found.names[i] for i in found.order]
    nearest: list[Mapping[str, Any]] = [
        {"name": name, "others": found.nearest(name)[:3]} for name in names if len(found.names) > 1
    ]
    return {"figures": similarity_figures(found), "nearest": nearest, "left_out": found.left_out}


def write_pictures(
    folder: str | Path,
    inspections: Sequence[Inspection] = (),
    *,
    together: Projection | None = None,
    similarity: Similarity | None = None,
) -> list[Path]:
    """Write each figure of the report as an SVG file, NAME-FIGURE.svg, in light colours. Raises OutputError."""
    drawn = [("together", _together(together))]
    drawn += similarity_figures(similarity) if similarity is not None else []
    for found in inspections:
        stem = re.sub(r"[^\w.-]+", "-", found.name)
        for group in figure_groups(found, stem):
            drawn += [(f"{stem}-{name}", figure) for name, figure in group.figures]
    written = []
    for name, figure in drawn:
        if figure is not None:
            written.append(Path(folder) / f"{name}.svg")
            write_atomic(written[-1], pictures.as_file(figure))
    return written
