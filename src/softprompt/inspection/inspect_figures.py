"""The figures of the report of `inspect`, by what they show, and those of `similarity`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import pictures, plots
from .importance import Importance
from .inspecting import Inspection
from .similarity import MEASURES, Similarity

Drawn = list[tuple[str, plots.Figure | None]]


@dataclass(frozen=True)
class Group:
    """figures: (name, figure); the name is that of its file, where it is written as one."""

    title: str
    figures: list[tuple[str, plots.Figure]]


def figure_groups(found: Inspection, key: str) -> list[Group]:
    """All figures that there is something to draw for. key: what makes their ids unique in the page."""
    groups: dict[str, Drawn] = {
        "How much each token matters": _of_importance(found.importance, found.prompt.tokens, key),
        "Where the answer looks": _of_attention(found, key),
        "Where the vectors are, and how they came there": _of_vectors(found, key),
        "Layer by layer": _of_layers(found, key),
    }
    whole = {title: [(name, one) for name, one in drawn if one is not None] for title, drawn in groups.items()}
    return [Group(title, drawn) for title, drawn in whole.items() if drawn]


def _of_vectors(found: Inspection, key: str) -> Drawn:
    prompt = found.prompt
    unit = found.lengths.mean if found.lengths and found.lengths.mean else 1.0
    in_words = " (1: as a word of the vocabulary on average)" if unit != 1.0 else ""
    norms = [norm / unit for norm in found.norms.tolist()] if prompt.kind == "embedding" else []
    return [
        (
            "points",
            pictures.points(
                f"{key}-points",
                found.projection,
                "The prompt among the vocabulary's words (grey), by direction. Two dimensions show a small part of the "
                "differences: what lies apart here is apart, what lies together may not be.",
                labelled=1,
            ),
        ),
        ("norms", plots.bars(f"{key}-norms", norms, "norm", f"The length of each vector{in_words}.")),
        (
            "moved",
            plots.bars(
                f"{key}-moved",
                [distance / unit for distance, _ in found.moved],
                "distance from the start",
                f"How far each soft token has moved{', in mean lengths of a word' if unit != 1.0 else ''}.",
            ),
        ),
        (
            "gradients",
            plots.token_map(
                f"{key}-gradients",
                *found.gradient_history(),
                "gradient norm",
                "How strongly the data pulled at each soft token during tuning.",
                logarithmic=True,
            ),
        ),
    ]


def _of_importance(measured: Importance | None, tokens: int, key: str) -> Drawn:
    if measured is None:
        return []
    what = "loss" if measured.whole.choices is None else "loss among the labels"
    drawn: Drawn = [
        (
            "importance",
            pictures.signed_bars(
                f"{key}-importance",
                measured.of_token,
                measured.errors,
                f"change of the {what}",
                f"How much higher the {what} is (nats a row) without each soft token; the lines are two standard "
                "errors. Around 0: the other tokens do without it.",
            ),
        )
    ]
    if measured.whole.choices is not None:
        drawn.append(
            (
                "answer",
                pictures.signed_bars(
                    f"{key}-answer",
                    measured.of_answer,
                    measured.answer_errors,
                    "change of the answer's loss",
                    "The same by the loss of the whole answer, which is what tuning made small. Tokens that stand out "
                    "here and not there say that a label is wanted, not which.",
                ),
            )
        )
    kept = [len(change.kept) for change in measured.first]
    losses = [change.scores.main_loss for change in measured.first]
    errors = [change.against.error for change in measured.first]
    line = ([*kept, tokens], [*losses, measured.whole.main_loss], [*errors, 0.0])
    drawn.append(
        (
            "first",
            pictures.length_curve(
                f"{key}-first",
                {"the first k tokens": line} if kept else {},
                "soft tokens kept",
                f"{what}",
                f"The {what} (nats a row) when only the first k soft tokens are kept; 0 is the template alone.",
            ),
        )
    )
    return drawn


def _of_attention(found: Inspection, key: str) -> Drawn:
    if not found.attention:
        return []
    caption = (
        "The share of the answer position's attention that goes to each soft token, by layer; mean over heads and "
        f"{found.attention.rows} rows. Were it even, each would get {found.attention.fair:.3f}."
    )
    return [("attention", pictures.layer_map(f"{key}-attention", found.attention.tokens.numpy(), "attention", caption))]


def _of_layers(found: Inspection, key: str) -> Drawn:
    deep = found.deep
    drawn: Drawn = []
    for part, what in enumerate(("keys", "values")) if deep is not None else ():
        assert deep is not None
        text = f"The length of the {what} of each token in each layer."
        norms = deep.norms[:, part].numpy()
        drawn.append((what, pictures.layer_map(f"{key}-{what}", norms, f"norm of the {what}", text)))
        if deep.moved is not None:
            text = f"How far the {what} have moved from where they started, as a share of their length there."
            moved = deep.moved[:, part].numpy()
            name = f"moved-{what}"
            drawn.append((name, pictures.layer_map(f"{key}-{name}", moved, f"movement of the {what}", text)))
    return drawn


def similarity_figures(found: Similarity) -> list[tuple[str, plots.Figure]]:
    """A heat map for each measure, and for the loss and the accuracy of each prompt on each task."""
    order = found.order
    names = [found.names[i] for i in order]
    drawn: Drawn = []
    for measure, matrix in found.matrices.items():
        caption = f"{MEASURES[measure][0].upper()}{MEASURES[measure][1:]}. Prompts that are alike stand together."
        ordered, name = matrix[np.ix_(order, order)], f"similar-{measure}"
        drawn.append((name, pictures.named_map(name, ordered, names, names, measure, caption)))
    for measure, crossed in (("loss", found.loss), ("accuracy", found.accuracy)):
        if crossed is None:
            continue
        shown = [i for i in order if np.isfinite(crossed[:, i]).any()]
        columns, name = [found.names[i] for i in shown], f"cross-{measure}"
        caption = f"The {measure} of each prompt (down) on the rows of each task (across), with that task's template."
        values = crossed[np.ix_(order, shown)]
        drawn.append((name, pictures.named_map(name, values, names, columns, measure, caption)))
    return [(name, figure) for name, figure in drawn if figure is not None]
