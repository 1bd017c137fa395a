"""The figures of a comparison, as SVG for a page (in the colours of the run report) or for a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..inspection import plots
from .catalogue import METHODS
from .store import DONE
from .summary import as_share, averages, averages_by_size

Line = dict[str, Any]
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; legible on light and dark.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#66c2a5", "#d55e00", "#e69f00", "#cc79a7", "#999999", "#b09f20")
MARKERS = ("o", "s", "D", "d", "^", "v", "X", "P", "*")
ORDER = ("deep", "deep-behind", "prompt", "prompt-behind", "lora", "full", "peft-prompt", "zero-shot", "few-shot")
FILE_COLOURS = {
    "var(--ink)": "#333333",
    "var(--rule)": "#c9ced4",
    "var(--first)": "#0072b2",
    "var(--second)": "#d55e00",
}


def style(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every figure."""
    place = ORDER.index(method)
    return {"color": COLOURS[place], "marker": MARKERS[place], "label": method}


def scores_figure(lines: Sequence[Line]) -> plots.Figure | None:
    """Score with interval by task, a mark for each method; of the first model."""
    model = lines[0]["model"] if lines else ""
    done = [line for line in lines if line["status"] == DONE and line["model"] == model]
    tasks = list(dict.fromkeys(line["task"] for line in done))
    methods = [name for name in METHODS if any(line["method"] == name for line in done)]
    if not done:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, method in enumerate(methods):
            some = [line for line in done if line["method"] == method]
            heights = [tasks.index(x["task"]) + (number - (len(methods) - 1) / 2) * 0.8 / len(methods) for x in some]
            axes.plot([as_share(x) for x in some], heights, linestyle="none", markersize=6, **style(method))
            for line, height in zip(some, heights):
                if line["low"] is not None:
                    ends = [as_share(line, "low"), as_share(line, "high")]
                    axes.plot(ends, [height] * 2, color=style(method)["color"], linewidth=1)
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set_xlabel("score")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)

    said = "; ".join(f"{x['task']}, {x['method']}: {as_share(x):.3f}" for x in done)
    caption = "Scores on the test rows with 95 % intervals."
    return plots.Figure(plots._render("scores", draw, (7.2, 1.0 + 0.62 * len(tasks))), said, caption)


def cost_figure(lines: Sequence[Line], key: str, label: str) -> plots.Figure | None:
    """Mean score over the tasks against a cost on a logarithmic axis, one mark a method; of the first model."""
    model = lines[0]["model"] if lines else ""
    shown = [line for line in averages(lines) if line["model"] == model and line[key]]
    if not shown:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for line in shown:
            axes.plot([line[key]], [line["score"]], linestyle="none", markersize=9, **style(line["method"]))
        _logarithmic(axes, [line[key] for line in shown])
        axes.set_xlabel(label)
        axes.set_ylabel("mean score")
        axes.legend(loc="best", fontsize=8)

    said = "; ".join(f"{x['method']}: {x['score']:.3f} at {x[key]:.4g}" for x in shown)
    caption = f"Mean score over {shown[0]['tasks']} tasks against {label}."
    return plots.Figure(plots._render(key.replace("_", "-"), draw, (5.4, 3.4)), said, caption)


def size_figure(lines: Sequence[Line]) -> plots.Figure | None:
    """Mean score against the model's size, one line a method: the figure that made prompt tuning known (Lester et al.
    2021, figure 1). None for a single model."""
    shown = averages_by_size(lines)
    if len({x["model"] for x in shown}) < 2:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for method in METHODS:
            some = sorted((x for x in shown if x["method"] == method), key=lambda x: x["model_parameters"])
            if some:
                axes.plot([x["model_parameters"] / 1e6 for x in some], [x["score"] for x in some], **style(method))
        _logarithmic(axes, [x["model_parameters"] / 1e6 for x in shown])
        axes.set_xlabel("parameters of the model, in millions")
        axes.set_ylabel("mean score")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)

    said = "; ".join(f"{x['method']} at {x['model_parameters']:,}: {x['score']:.3f}" for x in shown)
    caption = f"Mean score over {shown[0]['tasks']} tasks, the same for all, by size of the model."
    return plots.Figure(plots._render("sizes", draw, (7.2, 3.8)), said, caption)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    if max(values) > 3 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
        axes.xaxis.set_minor_formatter("")


def all_figures(lines: Sequence[Line]) -> dict[str, plots.Figure]:
    """Every figure that these lines allow, by file name."""
    made: dict[str, Callable[[], plots.Figure | None]] = {
        "scores": lambda: scores_figure(lines),
        "parameters": lambda: cost_figure(lines, "trained_parameters", "trained parameters"),
        "time": lambda: cost_figure(lines, "train_seconds", "seconds of training"),
        "sizes": lambda: size_figure(lines),
    }
    found = {name: make() for name, make in made.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def as_file(figure: plots.Figure) -> bytes:
    """A figure as an SVG file of its own."""
    svg = figure.svg
    for variable, colour in FILE_COLOURS.items():
        svg = svg.replace(variable, colour)
    if "xmlns=" not in svg:
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return ('<?xml version="1.0" encoding="utf-8"?>\n' + svg).encode()
