"""The report of `inspect` and of `similarity`: one self-contained HTML file in the style of the run report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..atomic import write_atomic
from . import pictures, plots, summary
from .history import at_steps, token_series
from .importance import Importance
from .inspecting import Inspection
from .measuring import Paired, RowScores
from .projection import Projection
from .report import render
from .sections import template_texts
from .similarity import MEASURES, Similarity

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
        "together": pictures.points(
            "together",
            together,
            "All prompts among the vocabulary's words. Two dimensions show a small part of the differences: what lies "
            "apart here is apart, what lies together may not be.",
        ),
        "similarity": _similarity(similarity) if similarity is not None else None,
        "writer": f"softprompt {__version__}, Python {platform.python_version()}",
    }
    path = Path(path)
    write_atomic(path, render(page, "inspect.html.j2").encode("utf-8", "replace"))
    return path


def _prompt(found: Inspection, number: int) -> dict[str, Any]:
    prompt = found.prompt
    key = f"p{number}"
    return {
        "key": key,
        "name": found.name,
        "facts": facts(found),
        "answers": answers(found),
        "rows": _rows(found),
        "lengths": found.lengths,
        "yardsticks": [
            (measure, _figures(stick.words), _figures(stick.chance)) for measure, stick in found.yardsticks.items()
        ],
        "figures": [figure for figure in _figures_of(found, key) if figure],
        "changes": changes(found.importance),
        "layers": _layer_words(found),
        "template": template_texts(prompt),
        "notes": found.notes,
    }


def facts(found: Inspection) -> list[tuple[str, str]]:
    prompt = found.prompt
    size = f"{prompt.tokens:,} token{'s' if prompt.tokens != 1 else ''}"
    size += (
        f" of width {prompt.width}" if prompt.kind == "embedding" else f" in each of {prompt.vectors.shape[0]} layers"
    )
    facts = [("model", prompt.base_model or "not known"), ("soft prompt", size), ("kind", prompt.kind)]
    if prompt.template is not None:
        facts.append(("place", prompt.template.placement.replace("_", " ")))
    if found.start:
        facts.append(("started from", found.start))
    return facts


def answers(found: Inspection) -> list[str]:
    """What the figures say, in sentences; only what was measured."""
    said = []
    near, stick = found.near.get("cosine"), found.yardsticks.get("cosine")
    if near and stick:
        best = [row[0].similarity for row in near if row]
        close = sum(value > stick.words[1] for value in best)
        said.append(
            f"{close} of {len(near)} soft tokens are nearer to a word than a word usually is to its nearest other word "
            f"(cosine above {stick.words[1]:.2f}); a word by chance is at {stick.chance[1]:.2f}."
        )
    if found.clusters and found.clusters.tightness is not None and found.clusters.by_chance is not None:
        tight = found.clusters
        said.append(
            f"The neighbours of one token have a mean cosine of {tight.tightness:.2f} with each other (by chance: "
            f"{tight.by_chance:.2f}), and {tight.same_stem:.0%} of them share a stem with another one."
        )
    words = found.vocabulary
    if words is not None:
        if words.survived_share is not None:
            said.append(
                f"For {words.survived_share:.0%} of the tokens the nearest word is still the one they started from."
            )
        if words.labels is not None:
            there = [f"“{word}” ({_tokens(tokens)})" for word, tokens in words.labels.items() if tokens]
            said.append(f"Label words among the neighbours: {', '.join(there) or 'none'}.")
        if words.repeated:
            most = ", ".join(f"“{word.strip()}” ({len(tokens)})" for word, tokens in words.repeated[:6])
            said.append(f"Words near more than one token: {most}.")
        if words.frequent:
            some = ", ".join(f"“{word}” ({_tokens(tokens)})" for word, tokens in list(words.frequent.items())[:8])
            said.append(f"Frequent words of the task's texts among the neighbours: {some}.")
    return said + _measured(found)


def _measured(found: Inspection) -> list[str]:
    said = []
    if found.importance and found.importance.left_out:
        costs, errors = found.importance.of_token, found.importance.errors
        clear = [i for i, (cost, error) in enumerate(zip(costs, errors)) if cost > 2 * error]
        top = max(range(len(costs)), key=costs.__getitem__)
        said.append(
            f"Leaving a token out makes the loss clearly higher for {len(clear)} of {len(costs)} tokens; most for "
            f"token {top} ({costs[top]:+.3f} nats a row, on {len(found.importance.whole.losses)} rows)."
        )
        if found.importance.whole.choices is not None:
            whole = found.importance.of_answer
            top = max(range(len(whole)), key=whole.__getitem__)
            said.append(
                f"That is the loss among the labels. That the answer is to be a label at all depends most on token "
                f"{top} (loss of the answer {whole[top]:+.3f} nats a row without it)."
            )
    if found.attention:
        share = float(found.attention.tokens.sum(dim=1).mean())
        even = found.attention.fair * found.attention.tokens.shape[1]
        said.append(
            f"From the answer's position {share:.0%} of the attention goes to the soft tokens, mean over layers (if it "
            f"were even: {even:.0%})."
        )
    return said


def _tokens(tokens: Sequence[int]) -> str:
    return (
        ("token " if len(tokens) == 1 else "tokens ")
        + ", ".join(map(str, tokens[:8]))
        + ("…" if len(tokens) > 8 else "")
    )


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


def _figures_of(found: Inspection, key: str) -> list[plots.Figure | None]:
    prompt, deep = found.prompt, found.deep
    unit = found.lengths.mean if found.lengths and found.lengths.mean else 1.0
    in_words = " (1: as a word of the vocabulary on average)" if unit != 1.0 else ""
    drawn = [
        plots.bars(
            f"{key}-norms", [n / unit for n in found.norms.tolist()], "norm", f"The length of each vector{in_words}."
        )
        if prompt.kind == "embedding"
        else None,
        plots.bars(
            f"{key}-moved",
            [d / unit for d, _ in found.moved],
            "distance from the start",
            f"How far each soft token has moved{', in mean lengths of a word' if unit != 1.0 else ''}.",
        ),
        pictures.points(
            f"{key}-points",
            found.projection,
            "The prompt among the vocabulary's words (grey), by direction. Two dimensions show a small part of the "
            "differences: what lies apart here is apart, what lies together may not be.",
            labelled=1,
        ),
        plots.token_map(
            f"{key}-gradients",
            *token_series(at_steps(found.events, "step"), "token_gradient_norms", prompt.tokens),
            "gradient norm",
            "How strongly the data pulled at each soft token during tuning.",
            logarithmic=True,
        ),
        *_measured_figures(found, key),
    ]
    if deep is not None:
        for part, what in enumerate(("keys", "values")):
            text = f"The length of the {what} of each token in each layer."
            drawn.append(pictures.layer_map(f"{key}-{what}", deep.norms[:, part].numpy(), f"norm of the {what}", text))
            if deep.moved is not None:
                text = f"How far the {what} have moved from where they started, as a share of their length there."
                moved = deep.moved[:, part].numpy()
                drawn.append(pictures.layer_map(f"{key}-moved-{what}", moved, f"movement of the {what}", text))
    return drawn


def _measured_figures(found: Inspection, key: str) -> list[plots.Figure | None]:
    drawn: list[plots.Figure | None] = []
    measured = found.importance
    if measured:
        what = "loss" if measured.whole.choices is None else "loss among the labels"
        drawn.append(
            pictures.signed_bars(
                f"{key}-importance",
                measured.of_token,
                measured.errors,
                f"{what} without it (change, nats)",
                f"How much higher the {what} is without each soft token; the lines are two standard errors. Around 0: "
                "the other tokens do without it.",
            )
        )
        if measured.whole.choices is not None:
            drawn.append(
                pictures.signed_bars(
                    f"{key}-answer",
                    measured.of_answer,
                    measured.answer_errors,
                    "loss of the answer without it",
                    "The same by the loss of the whole answer, which is what tuning made small. Tokens that stand out "
                    "here and not there say that a label is wanted, not which.",
                )
            )
        kept = [len(change.kept) for change in measured.first]
        losses = [change.scores.main_loss for change in measured.first]
        errors = [change.against.error for change in measured.first]
        line = ([*kept, found.prompt.tokens], [*losses, measured.whole.main_loss], [*errors, 0.0])
        drawn.append(
            pictures.length_curve(
                f"{key}-first",
                {"the first k tokens": line} if kept else {},
                "soft tokens kept",
                f"{what} (nats a row)",
                f"The {what} when only the first k soft tokens are kept; 0 is the template alone.",
            )
        )
    if found.attention:
        drawn.append(
            pictures.layer_map(
                f"{key}-attention",
                found.attention.tokens.numpy(),
                "attention",
                "The share of the answer position's attention that goes to each soft token, by layer; mean over heads "
                f"and {found.attention.rows} rows. Were it even, each would get {found.attention.fair:.3f}.",
            )
        )
    return drawn


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
    order = found.order
    names = [found.names[i] for i in order]
    figures = []
    for measure, matrix in found.matrices.items():
        caption = f"{MEASURES[measure][0].upper()}{MEASURES[measure][1:]}. Prompts that are alike stand together."
        ordered = matrix[np.ix_(order, order)]
        figures.append(pictures.named_map(f"similar-{measure}", ordered, names, names, measure, caption))
    for measure, crossed in (("loss", found.loss), ("accuracy", found.accuracy)):
        if crossed is None:
            continue
        shown = [i for i in order if np.isfinite(crossed[:, i]).any()]
        columns = [found.names[i] for i in shown]
        caption = f"The {measure} of each prompt (down) on the rows of each task (across), with that task's template."
        figures.append(
            pictures.named_map(f"cross-{measure}", crossed[np.ix_(order, shown)], names, columns, measure, caption)
        )
    nearest: list[Mapping[str, Any]] = [
        {"name": name, "others": found.nearest(name)[:3]} for name in names if len(found.names) > 1
    ]
    return {"figures": [figure for figure in figures if figure], "nearest": nearest, "left_out": found.left_out}
