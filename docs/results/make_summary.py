"""Put the cells of results folders of `softprompt compare` together: summary.json, results.csv, figures beside this.

`python docs/results/make_summary.py FOLDER...` reads FOLDER/cells/*.json of each; a cell that stands in several is
taken from the last. Cells hold no text of the data, and summary.json holds no more than means over rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from softprompt.comparison.figures import all_figures, as_file
from softprompt.comparison.store import Store
from softprompt.comparison.summary import document, summarise, to_csv

HERE = Path(__file__).parent


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """All cells of the folders, one for each task, model, method and seed."""
    found = {}
    for folder in folders:
        for cell in Store(folder).all():
            found[cell["task"], cell["model"], cell["method"], cell["seed"]] = cell
    return list(found.values())


def main(arguments: list[str], out: Path = HERE) -> int:
    cells = collect([Path(argument) for argument in arguments])
    if not cells:
        print("error: no cells found; give the results folders of softprompt compare", file=sys.stderr)
        return 2
    lines = summarise(cells)
    text = json.dumps(document(lines), indent=1, ensure_ascii=False, default=str)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    (out / "results.csv").write_text(to_csv(lines), encoding="utf-8")
    for name, figure in all_figures(lines).items():
        (out / f"{name}.svg").write_bytes(as_file(figure))
    print(f"{len(cells)} cells, {len(lines)} lines: {out / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
