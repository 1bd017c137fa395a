"""The report's figures, as SVG that stands inside the page and takes its colours from there.

A figure is drawn in placeholder colours that are then replaced by the page's CSS variables, so that one drawing serves
light mode, dark mode and paper. Texts stay texts: they can be searched, and the browser finds the glyphs of any script.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .history import Array, smooth, thin

# Placeholders that matplotlib draws with -> what the page's style sheet calls them.
INK, RULE, FIRST, SECOND = "#010203", "#020304", "#030405", "#040506"
VARIABLES = {INK: "var(--ink)", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)"}
MOST_POINTS, MOST_COLUMNS = 1000, 300
ENOUGH_TO_SMOOTH = 20
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called "$5"
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Figure:
    """A finished figure. svg: markup for inside a page. alt: what it shows, for those who cannot see it."""

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One curve: steps [S], values [S]. noisy: drawn faint under its running mean."""

    label: str
    steps: Array
    values: Array
    noisy: bool = False
    dots: bool = False


def curve(
    name: str, lines: Sequence[Line], label: str, caption: str, marks: Sequence[tuple[str, float]] = ()
) -> Figure | None:
    """Curves over steps, at most two; marks: labelled horizontal lines. None when there is no point to draw."""
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for line, colour in zip(lines, (FIRST, SECOND)):
            _draw_line(axes, line, colour)
        for text, height in marks:
            axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=text)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        if len(lines) + len(marks) > 1:
            axes.legend(loc="best", fontsize=9)

    return Figure(_render(name, draw, (5.4, 3.0)), " ".join(_in_words(line) for line in lines), caption)


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    steps, values = thin(line.steps, line.values, MOST_POINTS)
    few = len(steps) < 3  # a line of one point would not be seen
    if line.noisy and len(steps) >= ENOUGH_TO_SMOOTH:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
        values = smooth(values, max(5, len(steps) // 20))
    axes.plot(steps, values, color=colour, label=line.label, marker="o" if line.dots or few else None, markersize=5)


def _in_words(line: Line) -> str:
    first, last = (f"{line.values[i]:.3g} at step {line.steps[i]:.0f}" for i in (0, -1))
    if len(line.steps) == 1:
        return f"{line.label}: {first}."
    return f"{line.label}: from {first} to {last} (lowest {line.values.min():.3g}, highest {line.values.max():.3g})."


def token_map(
    name: str,
    steps: Array,
    values: Array,
    label: str,
    caption: str,
    *,
    logarithmic: bool = False,
    reference: tuple[float, float, float] | None = None,
) -> Figure | None:
    """A heat map of values [S, P] over steps [S]: one row for each soft token, below the curve of all of them.

    reference: (mean, low, high) of the vocabulary's words, drawn as a line and a band behind the curve.
    """
    if not len(steps) or not np.isfinite(values).any():
        return None
    steps, values = thin(steps, values, MOST_COLUMNS)

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))
        _draw_spread(top, steps, values, reference, logarithmic)
        top.set_ylabel(label)
        image = _draw_cells(bottom, steps, values, logarithmic)
        bar = figure.colorbar(image, ax=bottom, pad=0.02, aspect=12, label=label, format="{x:g}")
        bar.ax.yaxis.set_minor_formatter("")
        bar.outline.set_visible(False)
        bottom.set_xlabel("step")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_ylabel("soft token")

    return Figure(_render(name, draw, (5.4, 4.6)), _map_in_words(label, values, reference), caption)


def _draw_spread(axes: Any, steps: Array, values: Array, reference: Any, logarithmic: bool) -> None:
    """Mean over the tokens with the band from the smallest to the largest, and the vocabulary's for comparison."""
    seen = np.isfinite(values).any(axis=1)
    steps, values = steps[seen], values[seen]
    if reference:
        axes.axhspan(reference[1], reference[2], color=SECOND, alpha=0.18, linewidth=0)
        axes.axhline(reference[0], color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)), label="vocabulary")
    axes.fill_between(steps, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=FIRST, alpha=0.25, linewidth=0)
    marker = "o" if len(steps) < 3 else None
    axes.plot(steps, np.nanmean(values, axis=1), color=FIRST, marker=marker, label="soft tokens")
    if logarithmic and (values > 0).any():
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics
        axes.yaxis.set_minor_formatter("")
    if reference:
        axes.legend(loc="best", fontsize=9, ncols=2)


def _draw_cells(axes: Any, steps: Array, values: Array, logarithmic: bool) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    positive = values[np.isfinite(values) & (values > 0)]
    norm: Any = Normalize()
    if logarithmic and positive.size and positive.max() > positive.min():
        norm = LogNorm(vmin=positive.min(), vmax=positive.max(), clip=True)
    half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
    tokens = values.shape[1]
    axes.grid(False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return axes.imshow(
        np.ma.masked_invalid(values.T),
        cmap="viridis",
        norm=norm,
        aspect="auto",
        interpolation="none",
        extent=(steps[0] - half, steps[-1] + half, tokens - 0.5, -0.5),
    )


def _map_in_words(label: str, values: Array, reference: Any) -> str:
    means = [np.nanmean(row) for row in values if np.isfinite(row).any()]
    text = (
        f"Heat map of the {label} of {values.shape[1]} soft tokens: mean {means[0]:.3g} at first, {means[-1]:.3g} last"
    )
    last = values[-1]
    if np.isfinite(last).any():
        text += f", where token {np.nanargmax(last)} has most ({np.nanmax(last):.3g})"
    return text + (f"; the vocabulary's mean is {reference[0]:.3g}." if reference else ".")


def bars(name: str, values: Sequence[float], label: str, caption: str) -> Figure | None:
    """One bar for each soft token."""
    if not len(values):
        return None
    heights = np.asarray(values, dtype=np.float64)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.stairs(heights, np.arange(len(heights) + 1) - 0.5, fill=True, color=FIRST)  # one path, however many bars
        axes.set_xlabel("soft token")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = (
        f"Bars of the {label} of {len(heights)} soft tokens: mean {heights.mean():.3g}, "
        f"least {heights.min():.3g} (token {heights.argmin()}), most {heights.max():.3g} (token {heights.argmax()})."
    )
    return Figure(_render(name, draw, (5.4, 3.0)), alt, caption)


def confusion_map(name: str, confusion: Array, classes: Sequence[str], caption: str) -> Figure:
    """The share of each true class (row) that was predicted as each class (column), for many classes: [C, C]."""
    support = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(support == 0, confusion.shape), confusion / np.maximum(support, 1))
    size = len(classes)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="none")
        figure.colorbar(image, ax=axes, pad=0.02, shrink=0.8, label="share of the true class").outline.set_visible(
            False
        )
        axes.grid(False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if size <= 40:
            names = [shorten(c, 18) for c in classes]
            axes.set_xticks(range(size), names, rotation=90, fontsize=7)
            axes.set_yticks(range(size), names, fontsize=7)

    right = confusion.trace() / max(int(confusion.sum()), 1)
    alt = f"Heat map of {size} true classes by {size} predicted classes; {right:.1%} of the rows lie on the diagonal."
    return Figure(_render(name, draw, (6.4, 5.6)), alt, caption)


def shorten(text: str, most: int) -> str:
    """The text with characters that cannot be seen escaped, and cut to `most` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"


def _render(name: str, draw: Any, size: tuple[float, float]) -> str:
    """Draw on a new figure and return markup that can stand inside a page; the same input gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks: the browser has them
        figure = Canvas(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embeddable(buffer.getvalue(), name)


def _embeddable(svg: str, name: str) -> str:
    """The `<svg>` element alone: ids made unique in the page, colours those of the page, no size of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?) width="[^"]*"', r"<svg \1\2", svg, count=1)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
