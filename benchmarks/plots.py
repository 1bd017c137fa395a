"""Draw what cost_curves.py measured as docs/pictures/speed-*.svg: cost against soft tokens, batch, length and trials.

python benchmarks/plots.py docs/results/speed/cost_curves.json
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed.tables import Found, read_json

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
STYLES = {
    "peft-prompt": ("#d55e00", "^", "PEFT prompt tuning"),
    "softprompt": ("#0072b2", "o", "in front of the text"),
    "suffix": ("#009e73", "s", "behind the text, texts kept"),
    "deep-suffix": ("#cc79a7", "D", "deep, behind the text, texts kept"),
}
LABELS = {"tokens": "soft tokens", "batch": "rows a step", "length": "tokens a row, soft ones not counted"}


def figure_of(found: Found, axis: str) -> Any:
    """One curve of ms a row, both axes logarithmic."""
    figure, axes = blank()
    for name, (colour, marker, label) in STYLES.items():
        points = numbers(found["curves"][axis].get(name, {}))
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label)
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    values = sorted({value for side in found["curves"][axis].values() for value, _ in numbers(side)})
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    common = found["common"]
    held = ", ".join(f"{common[name]} {LABELS[name].split(',')[0]}" for name in LABELS if name != axis)
    axes.set_xlabel(f"{LABELS[axis]} ({held})")
    axes.set_ylabel("milliseconds a row")
    named(figure)
    return figure


def trials_figure(found: Found) -> Any:
    """Seconds of a sweep against its trials, beside as many runs alone."""
    figure, axes = blank()
    most = max(int(count) for points in found["trials"].values() for count in points)
    for name, points in found["trials"].items():
        colour, marker, label = STYLES[name]
        known = numbers(points)
        axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, label=label)
        alone = [(1, known[0][1]), (most, known[0][1] * most)]
        axes.plot(*zip(*alone, strict=True), color=colour, linestyle=":", linewidth=1, label=f"{label}: runs alone")
    axes.set_xlabel("trials of a sweep")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({int(count) for points in found["trials"].values() for count in points}))
    named(figure)
    return figure


def numbers(points: Mapping[str, float]) -> list[tuple[int, float]]:
    return sorted((int(value), cost) for value, cost in points.items())


def blank() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def named(figure: Any) -> None:
    """The names of the lines above the picture, where they hide nothing."""
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)


def as_svg(figure: Any) -> str:
    """The same bytes for the same figures, so that a file changes only where they do."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "softprompt", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def draw(found: Found, folder: Path = PICTURES) -> list[Path]:
    """Write the pictures of a document of cost_curves.py; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {axis: figure_of(found, axis) for axis in found["curves"]} | {"trials": trials_figure(found)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"speed-{name}.svg")
        paths[-1].write_text(as_svg(figure), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("curves", type=Path, help="what cost_curves.py wrote")
    parser.add_argument("--folder", type=Path, default=PICTURES)
    args = parser.parse_args()
    for path in draw(read_json(args.curves), args.folder):
        print(path)


if __name__ == "__main__":
    main()
