"""Figures for looking into prompts: maps, bars with their uncertainty, points, curves. Drawn as plots.py draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .history import Array
from .plots import FIRST, INK, SECOND, VARIABLES, Figure, _render, shorten
from .projection import Projection

MARKS = ("o", "^", "s", "D", "v", "P", "X", "*", "<", ">")
PAPER = {"var(--ink)": "#1c2024", "var(--rule)": "#c9ced4", "var(--first)": "#0072b2", "var(--second)": "#d55e00"}


def layer_map(
    name: str, values: Array, label: str, caption: str, *, rows: str = "layer", columns: str = "soft token"
) -> Figure | None:
    """A heat map of values [L, P]: layers down, soft tokens across."""
    if not values.size or not np.isfinite(values).any():
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto", interpolation="none")
        figure.colorbar(image, ax=axes, pad=0.02, label=label).outline.set_visible(False)
        axes.grid(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(columns)
        axes.set_ylabel(rows)

    top = np.unravel_index(np.nanargmax(values), values.shape)
    alt = (
        f"Heat map of the {label}: {values.shape[0]} {rows}s by {values.shape[1]} {columns}s, mean "
        f"{np.nanmean(values):.3g}, most {np.nanmax(values):.3g} ({rows} {top[0]}, {columns} {top[1]})."
    )
    return Figure(_render(name, draw, (5.4, 3.8)), alt, caption)


def named_map(
    name: str,
    values: Array,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    caption: str,
    *,
    percent: bool = False,
) -> Figure | None:
    """A heat map of values [N, M] with a name for each row and column, and the figures in the cells while they fit."""
    if not values.size or not np.isfinite(values).any():
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", interpolation="none", aspect="auto")
        figure.colorbar(image, ax=axes, pad=0.02, shrink=0.8, label=label).outline.set_visible(False)
        axes.grid(False)
        size = 8 if max(values.shape) <= 12 else 6
        axes.set_xticks(range(len(columns)), [shorten(c, 20) for c in columns], rotation=45, ha="right", fontsize=size)
        axes.set_yticks(range(len(rows)), [shorten(r, 20) for r in rows], fontsize=size)
        for (i, j), value in np.ndenumerate(values) if values.size <= 144 else ():
            if np.isfinite(value):
                dark = high > low and (value - low) / (high - low) < 0.6
                shown = f"{100 * value:.0f}" if percent else f"{value:.2f}"
                axes.text(j, i, shown, ha="center", va="center", fontsize=size, color="white" if dark else "black")

    side = min(8.0, 3.2 + 0.32 * max(values.shape))
    alt = f"Heat map of the {label} of {len(rows)} by {len(columns)}: from {low:.3g} to {high:.3g}."
    return Figure(_render(name, draw, (side, side * 0.8)), alt, caption)


def signed_bars(name: str, values: Sequence[float], errors: Sequence[float], label: str, caption: str) -> Figure | None:
    """One bar for each soft token, up or down, with two standard errors each way."""
    if not len(values):
        return None
    heights, spread = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = np.arange(len(heights))
        axes.bar(places, heights, color=FIRST, width=0.8)
        if np.isfinite(spread).all():
            axes.errorbar(places, heights, yerr=2 * spread, fmt="none", ecolor=INK, elinewidth=1)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xlabel("soft token")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = (
        f"Bars of the {label} of {len(heights)} soft tokens: most {heights.max():.3g} (token {heights.argmax()}), "
        f"least {heights.min():.3g} (token {heights.argmin()})."
    )
    return Figure(_render(name, draw, (5.4, 3.0)), alt, caption)


def length_curve(
    name: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]],
    across: str,
    label: str,
    caption: str,
) -> Figure | None:
    """At most two curves of (x, y, error or None) over a number of tokens; the bars are two standard errors long."""
    lines = {key: line for key, line in lines.items() if len(line[0])}
    if not lines:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for (key, (x, y, error)), colour, mark in zip(lines.items(), (FIRST, SECOND), MARKS):
            spread = None if error is None else 2 * np.nan_to_num(np.asarray(error, dtype=np.float64))
            axes.errorbar(x, y, yerr=spread, color=colour, marker=mark, markersize=5, label=key, capsize=2)
        axes.set_xlabel(across)
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=9)

    parts = (f"{key}: " + ", ".join(f"{b:.3g} at {a:g}" for a, b in zip(x, y)) for key, (x, y, _) in lines.items())
    return Figure(_render(name, draw, (5.4, 3.2)), "; ".join(parts) + ".", caption)


def points(name: str, found: Projection | None, caption: str, labelled: int = 0) -> Figure | None:
    """Prompts and vocabulary in two dimensions; each prompt has a colour and a mark of its own."""
    if found is None:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if len(found.words):
            axes.scatter(*found.words.T, s=5, color=INK, alpha=0.25, linewidths=0, label="vocabulary")
        for index, (key, place) in enumerate(found.prompts.items()):
            colour = (FIRST, SECOND)[index % 2] if len(found.prompts) <= 2 else _colour(index)
            axes.scatter(
                *place.T, s=26, color=colour, marker=MARKS[index % len(MARKS)], label=shorten(key, 24), alpha=0.9
            )
            for number, (x, y) in enumerate(place) if index < labelled else ():
                axes.annotate(str(number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set_xlabel(f"first component ({found.explained[0]:.0%} of the variance)")
        axes.set_ylabel(f"second ({found.explained[1]:.0%})")
        axes.legend(loc="best", fontsize=8, markerscale=1.2)

    alt = f"Points of {', '.join(found.prompts)} and {len(found.words)} words of the vocabulary in two dimensions."
    return Figure(_render(name, draw, (6.4, 4.8)), alt, caption)


def _colour(index: int) -> str:
    """Okabe and Ito's colours that stand out on light and on dark ground alike."""
    return ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")[index % 6]


def as_file(figure: Figure) -> bytes:
    """The figure as an SVG file of its own, in the page's light colours on white: for documents."""
    svg = (
        figure.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        if "xmlns=" not in figure.svg
        else figure.svg
    )
    for variable in VARIABLES.values():
        svg = svg.replace(variable, PAPER[variable])
    start = svg.index(">", svg.index("<svg")) + 1
    svg = svg[:start] + '<rect width="100%" height="100%" fill="#fff"/>' + svg[start:]
    svg = svg.replace("<svg ", '<svg font-family="sans-serif" ', 1)
    return svg.encode("utf-8", "replace")
