"""Fill docs/performance.md with what the benchmarks measured, between its markers, and draw its pictures.

    python benchmarks/performance_page.py    # from docs/results/speed/*.json, which benchmarks/all.py writes

A result that is not there leaves its place with a sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import plots
from speed.page_tables import curve_lines, goal_lines, inference_lines, suffix_lines, train_lines
from speed.tables import Found, put, read_json

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "speed"
PAGE = DOCS / "performance.md"
# Marker in the page -> the benchmark whose result it shows, and how.
PLACES: dict[str, tuple[str, Callable[[Found], list[str]]]] = {
    "train": ("train_speed", train_lines),
    "suffix": ("suffix_speed", suffix_lines),
    "goal": ("suffix_speed", goal_lines),
    "inference": ("inference_speed", inference_lines),
    "curves": ("cost_curves", curve_lines),
}


def fill(page: Path = PAGE, results: Path = RESULTS, pictures: Path = plots.PICTURES) -> None:
    text = page.read_text(encoding="utf-8")
    for name, (benchmark, lines) in PLACES.items():
        path = results / f"{benchmark}.json"
        shown = lines(read_json(path)) if path.is_file() else []
        missing = [f"Not measured yet: `python benchmarks/all.py {benchmark}` does it and fills this place."]
        text = put(text, shown or missing, name, str(page))
    page.write_text(text, encoding="utf-8")
    if (results / "cost_curves.json").is_file():
        plots.draw(read_json(results / "cost_curves.json"), pictures)


if __name__ == "__main__":
    fill()
