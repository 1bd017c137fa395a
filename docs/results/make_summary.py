"""Put the cells of results folders of `softprompt compare` together: summary.json, results.csv, figures, the page.

`python docs/results/make_summary.py FOLDER...` reads FOLDER/cells/*.json of each; a cell that stands in several is
taken from the last. Without a folder it reads those in `cells/` beside it, which `--keep` copies there first. Cells
hold no text of the data. docs/accuracy.md gets its tables between its markers: of the first model, by size of all
models, and those of `defaults/*.json` and `transfer/*.json`, the documents of benchmarks/defaults.py and
benchmarks/transfer.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.comparison.catalogue import METHODS, SOFT
from softprompt.comparison.figures import all_figures, as_file
from softprompt.comparison.store import DONE, Store
from softprompt.comparison.summary import as_share, averages, averages_by_size, document, summarise, to_csv
from softprompt.training.config import TuneConfig

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))
from speed.tables import put, read_json  # noqa: E402

PAGE = HERE.parent / "accuracy.md"
TUNED = ("lora", "full")
Line = dict[str, Any]


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """All cells of the folders, one for each task, model, method and seed."""
    found = {}
    for folder in folders:
        for cell in Store(folder).all():
            if cell["model"].startswith((".", "/", "~")):  # where a model's folder lay is nobody's business
                cell["model"] = Path(cell["model"]).name
            found[cell["task"], cell["model"], cell["method"], cell["seed"]] = cell
    return list(found.values())


# --- the page -------------------------------------------------------------------------------------------------------


def score_table(lines: Sequence[Line]) -> list[str]:
    """A row a task, a column a method: the mean over seeds in hundredths, its interval and the number of seeds."""
    methods = [name for name in METHODS if any(line["method"] == name for line in lines)]
    made = [f"| task | rows, train and test | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|"]
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = {line["method"]: line for line in lines if line["task"] == task}
        some = next((line for line in of_task.values() if line["status"] == DONE), None)
        rows = f"{max(x.get('train_rows') or 0 for x in of_task.values())}, {some['test_rows']}" if some else ""
        made.append(f"| {task} | {rows} | {' | '.join(_score(of_task.get(name)) for name in methods)} |")
    means = {row["method"]: row for row in averages(lines)}
    if means:
        tasks = next(iter(means.values()))["tasks"]
        shown = [f"{100 * means[name]['score']:.1f}" if name in means else "" for name in methods]
        made.append(f"| mean of {tasks} | | {' | '.join(shown)} |")
    return made


def _score(line: Line | None) -> str:
    if line is None or line["status"] != DONE:
        return "" if line is None else str(line["status"])
    ends = "" if line["low"] is None else f" ({100 * as_share(line, 'low'):.1f} to {100 * as_share(line, 'high'):.1f})"
    mark = "**" if line["best"] else ""
    return f"{mark}{100 * as_share(line):.1f}{mark}{ends}, {line['seeds']}"


def cost_table(lines: Sequence[Line]) -> list[str]:
    """What each method costs, means over the tasks that all of them have done."""
    made = [
        "| method | trained parameters | kB on disk | s of training | examples/s | peak memory, GB | s to switch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in averages(lines):
        rate = "" if row["examples_per_second"] is None else f"{row['examples_per_second']:.1f}"
        made.append(
            f"| {row['method']} | {int(row['trained_parameters'] or 0):,} | {(row['disk_bytes'] or 0) / 1e3:,.0f} "
            f"| {row['train_seconds'] or 0:.0f} | {rate} | {(row['peak_memory_bytes'] or 0) / 1e9:.1f} "
            f"| {row['switch_seconds'] or 0:.2f} |"
        )
    return made


def size_table(lines: Sequence[Line]) -> list[str]:
    """A row a model, smallest first, a column a method: means over tasks that are the same for all, in hundredths."""
    found = averages_by_size(lines)
    methods = [name for name in METHODS if any(line["method"] == name for line in found)]
    made = [f"| model | parameters | tasks | {' | '.join(methods)} |", "|---" * (len(methods) + 3) + "|"]
    for model in dict.fromkeys(line["model"] for line in found):
        own = {line["method"]: line for line in found if line["model"] == model}
        some = next(iter(own.values()))
        scores = [f"{100 * own[name]['score']:.1f}" if name in own else "" for name in methods]
        made.append(f"| {model} | {some['model_parameters']:,} | {some['tasks']} | {' | '.join(scores)} |")
    return made


def target_table(lines: Sequence[Line]) -> list[str]:
    """Each kind of soft prompt beside the better of LoRA and full fine-tuning, beside PEFT's prompt tuning (differences
    in hundredths, means over the tasks that have both) and beside LoRA's training time and parameters."""
    made = [
        "| kind | beside better of LoRA and full | worst task | beside PEFT's prompt tuning | of LoRA's training time "
        "| of LoRA's parameters |",
        "|---|---|---|---|---|---|",
    ]
    for kind in SOFT:
        own = {line["task"]: line for line in lines if line["method"] == kind and line["status"] == DONE}
        tuned = _best_of(lines, TUNED, own)
        peft = _best_of(lines, ("peft-prompt",), own)
        lora = {line["task"]: line for line in lines if line["method"] == "lora" and line["status"] == DONE}
        if not tuned or not (both := [task for task in own if task in lora]):
            continue
        gaps = {task: as_share(own[task]) - as_share(tuned[task]) for task in tuned}
        worst = min(gaps, key=lambda task: gaps[task])
        ahead = [as_share(own[task]) - as_share(peft[task]) for task in peft]
        times = [_times(own[task], lora[task]) for task in both]
        shares = [
            sum(mine for mine, _ in times) / sum(other for _, other in times),
            sum(own[task]["trained_parameters"] for task in both) / sum(lora[x]["trained_parameters"] for x in both),
        ]
        made.append(
            f"| {kind} | {_points(list(gaps.values()))} on {len(gaps)} tasks | {worst}: {100 * gaps[worst]:+.1f} "
            f"| {_points(ahead)} on {len(ahead)} tasks | {shares[0]:.2f} | {shares[1]:.4f} |"
        )
    return made


def _times(one: Line, other: Line) -> tuple[float, float]:
    """Seconds of the processor where both lines have them: what runs beside a cell is not in these."""
    both = one.get("processor_seconds") and other.get("processor_seconds")
    key = "processor_seconds" if both else "train_seconds"
    return one[key], other[key]


def _best_of(lines: Sequence[Line], methods: Sequence[str], own: dict[str, Line]) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for line in lines:
        if line["method"] in methods and line["status"] == DONE and line["task"] in own:
            other = found.get(line["task"])
            found[line["task"]] = line if other is None or line["score"] > other["score"] else other
    return found


def _points(differences: Sequence[float]) -> str:
    return f"{100 * sum(differences) / len(differences):+.1f}" if differences else "?"


def defaults_table(found: Sequence[Line]) -> list[str]:
    """Scores of the documents of benchmarks/defaults.py, a table an axis: a row a task and model, a column a value, the
    means over the seeds that all columns have."""
    made: list[str] = []
    for axis in dict.fromkeys(t["axis"] for run in found for t in run["trials"] if t["axis"] != "base"):
        changes = [t["change"] for run in found for t in run["trials"] if t["axis"] == axis]
        columns = {_told(change): change for change in changes}
        if axis == "peft":  # another method: the base is no value of this axis
            columns = dict(sorted(columns.items(), key=lambda pair: float(pair[1]["peft_learning_rate"])))
        else:
            columns = {"default": {}, **columns}
        shipped = getattr(TuneConfig(), axis, None)
        if isinstance(shipped, float):
            columns = dict(sorted(columns.items(), key=lambda pair: pair[1].get(axis, shipped)))
        made += ["", f"| task, model, training rows | {' | '.join(columns)} | best less worst | seeds |"]
        made += ["|---" * (len(columns) + 3) + "|"]
        for run in found:
            given = [[t for t in run["trials"] if t["change"] == change] for change in columns.values()]
            if not any(given[1:]):
                continue
            ran = [{t["seed"] for t in trials if "score" in t} for trials in given]
            seeds = set.intersection(*(some for some in ran if some)) if any(ran) else set()
            scores = [[t["score"] for t in trials if "score" in t and t["seed"] in seeds] for trials in given]
            means = [100 * sum(some) / len(some) if some else None for some in scores]
            failed = [trials[0].get("error", "")[:40] if trials else "" for trials in given]
            shown = [f"{mean:.1f}" if mean is not None else why for mean, why in zip(means, failed, strict=True)]
            known = [mean for mean in means if mean is not None]
            spread = f"{max(known) - min(known):.1f}" if known else ""
            where = f"{run['task']}, {run['model']}, {run.get('training_rows', run['rows'])}"
            where += ", prompt" if run.get("base", {}).get("kind") == "embedding" else ""
            made.append(f"| {where} | {' | '.join(shown)} | {spread} | {len(seeds)} |")
    return made[1:]


def transfer_table(found: Sequence[Line]) -> list[str]:
    """Of the documents of benchmarks/transfer.py: a row a number of training rows, mean scores over the seeds."""
    made: list[str] = []
    for run in found:
        made += ["", f"| {run['target']}, training rows | from its instruction | from {run['source']} | seeds |"]
        made += ["|---|---|---|---|"]
        for rows in dict.fromkeys(trial["rows"] for trial in run["trials"]):
            by_start = {start: _scores(run, rows, start) for start in ("text", "source")}
            shown = [f"{100 * sum(some) / len(some):.1f}" if some else "" for some in by_start.values()]
            made.append(f"| {rows} | {' | '.join(shown)} | {max(map(len, by_start.values()))} |")
    return made[1:]


def _scores(run: Line, rows: int, start: str) -> list[float]:
    some = [trial for trial in run["trials"] if trial["rows"] == rows and trial["start"] == start]
    return [trial["score"] for trial in some if "score" in trial]


def _told(change: Line) -> str:
    return ", ".join(f"{key} {value}" for key, value in change.items())


def main(arguments: list[str], out: Path = HERE, page: Path | None = PAGE) -> int:
    keep = "--keep" in arguments
    folders = [Path(argument) for argument in arguments if argument != "--keep"]
    if keep:
        others = [folder for folder in folders if folder.resolve() != out.resolve()]
        for path in (path for folder in others for path in sorted((folder / "cells").glob("*.json"))):
            (out / "cells").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / "cells" / path.name)
    cells = collect(folders if folders and not keep else [out])
    if not cells:
        print("error: no cells found; give the results folders of softprompt compare", file=sys.stderr)
        return 2
    lines = summarise(cells)
    text = json.dumps(document(lines), indent=1, ensure_ascii=False, default=str)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    (out / "results.csv").write_text(to_csv(lines), encoding="utf-8")
    for name, figure in all_figures(lines).items():
        (out / f"{name}.svg").write_bytes(as_file(figure))
    if page is not None:
        first = [line for line in lines if line["model"] == lines[0]["model"]]
        made = {"scores": score_table(first), "targets": target_table(first), "costs": cost_table(first)}
        made["sizes"] = size_table(lines)
        for name, table in (("defaults", defaults_table), ("transfer", transfer_table)):
            made[name] = table([read_json(path) for path in sorted((out / name).glob("*.json"))])
        text = page.read_text(encoding="utf-8")
        for name, table in made.items():
            text = put(text, table, name, str(page))
        page.write_text(text, encoding="utf-8")
    print(f"{len(cells)} cells, {len(lines)} lines: {out / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
