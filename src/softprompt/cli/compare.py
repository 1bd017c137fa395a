"""`softprompt compare`: prompts beside zero-shot, few-shot, LoRA and full fine-tuning on the same rows and budget."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .command import FAILED, command
from .output import Output, duration
from .progress import PLAIN_SECONDS

if TYPE_CHECKING:
    from ..comparison.run import Progress


@command
def compare(
    out: Output,
    settings: Annotated[
        list[str], typer.Argument(metavar="CONFIG.yaml [KEY=VALUE]...", help="A config file, and settings over it.")
    ],
    data: Annotated[str | None, typer.Option(help="Folder that the paths of the tasks start from.")] = None,
    model: Annotated[str | None, typer.Option(help="Models, separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks of the config, separated by commas.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, separated by commas.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0.")] = None,
    folder: Annotated[
        str | None, typer.Option("--out", help="Results folder; finished cells in it are not run again.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also run cells that were finished with other rows or settings.")
    ] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Run nothing: only show and write what is there.")] = False,
) -> None:
    """Compare methods: zero-shot, few-shot, soft and deep prompts, LoRA, PEFT's prompt tuning, full fine-tuning.

    Every method gets the same rows, template and budget and is scored by the same evaluator. Each finished cell (task,
    model, method, seed) is a file: stopped at any moment, the same command goes on. Scores with intervals, paired tests
    against the best and what each method costs are shown, and written as summary.json, results.csv and report.html.
    """
    from ..comparison.config import load_comparison

    only = None if tasks is None else [name.strip() for name in tasks.split(",")]
    config = load_comparison(
        settings[0], settings[1:], only=only, data=data, model=model, methods=methods, seeds=seeds, out=folder
    )
    from ..comparison.report import at_edge, write_results
    from ..comparison.run import compare as compare_all
    from ..comparison.summary import document

    shown = CompareProgress(out)
    try:
        cells = compare_all(config, listen=shown, again=again, run=not no_run)
    except KeyboardInterrupt:
        shown.close()
        out.fail(KeyboardInterrupt(), ["interrupted; finished cells are kept, the same command goes on"])
        raise typer.Exit(FAILED) from None
    finally:
        shown.close()
    if not cells:
        raise ConfigError(f"out: {config.out} holds no results of this config; run it without --no-run")
    lines = write_results(config.out, cells, Path(settings[0]).stem)
    for table in tables(lines):
        out.show(table)
    for line in lines:
        if where := at_edge(line):
            out.note(
                f"{line['method']} on {line['task']}: the best learning rate, {line['learning_rate']:g}, is {where}; "
                f"others may be better (learning_rates={{{line['method']}: [...]}})"
            )
    files = {name: str(Path(config.out) / name) for name in ("summary.json", "results.csv", "report.html")}
    out.show("", *(f"{name:<14}{path}" for name, path in files.items()))
    failed = [cell for cell in cells if cell["status"] == "failed"]
    for cell in failed:
        out.warn(f"{cell['task']}, {cell['method']}, seed {cell['seed']} failed: {cell['reason']}")
    out.document({**document(lines), "files": files})
    if failed:
        raise typer.Exit(FAILED)


def tables(lines: list[dict[str, Any]]) -> list[Any]:
    """One table of all tasks, and one of the means over tasks where there are several."""
    from ..comparison.report import number, shown, shown_costs
    from ..comparison.summary import averages
    from .scores import table

    several = len({line["model"] for line in lines}) > 1
    costs = ["parameters", "disk", "memory", "time", "rate_of_examples", "switch", "added"]
    heads = ["trained", "on disk", "memory", "training", "examples/s", "switch", "added a row"]
    if any(line.get("energy_joules") is not None for line in lines):
        costs, heads = [*costs, "energy"], [*heads, "energy"]
    first = table("task", *(["model"] if several else []), "method", "score", "95 % interval", "seeds", "p", *heads)
    for line in lines:
        row, models = shown(line), [line["model"]] if several else []
        keys = ("score", "interval", "seeds", "p", *costs)
        told = [row[key] for key in keys] if row["done"] else [line["status"]]
        first.add_row(line["task"], *models, line["method"], *told)
    means = averages(lines)
    if max((row["tasks"] for row in means), default=0) < 2:
        return [first]
    second = table("all tasks", *(["model"] if several else []), "tasks", "mean score", *heads)
    for row in means:
        models = [row["model"]] if several else []
        cost = shown_costs(row)
        second.add_row(row["method"], *models, str(row["tasks"]), number(row["score"]), *(cost[key] for key in costs))
    return [first, second]


class CompareProgress:
    """A bar over cells with the time left, and what the running cell says; without a terminal plain lines."""

    def __init__(self, out: Output):
        self.out = out
        self.told = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, progress: Progress) -> None:
        getattr(self, f"_on_{progress.event}")(progress)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_start(self, progress: Progress) -> None:
        ready = progress.cells - progress.to_do
        self.out.note(f"{progress.cells} cells, {ready} finished before" if ready else f"{progress.cells} cells")
        if self.out.live and progress.to_do:
            from .progress import _bar

            self._bar = _bar(self.out)
            self._task = self._bar.add_task("cells", total=progress.to_do, told="")
            self._bar.start()

    def _on_begin(self, progress: Progress) -> None:
        self.told = time.monotonic()
        self.out.note(f"cell {progress.number}/{progress.to_do}: {_name(progress)}{_left(progress)}")

    def _on_line(self, progress: Progress) -> None:
        if self._bar is not None:
            self._bar.update(self._task, told=f"{_name(progress)}: {progress.text}{_left(progress)}")
        elif not self.out.quiet and time.monotonic() - self.told >= PLAIN_SECONDS:
            self.told = time.monotonic()
            self.out.note(f"  {progress.text}{_left(progress)}")

    def _on_end(self, progress: Progress) -> None:
        result = progress.result or {}
        if result["status"] == "done":
            told = f"{result['metric']} {result['score']:.4f} in {duration(result['cell_seconds'])}"
        else:
            told = f"{result['status']}: {result['reason']}"
        self.out.note(f"  {_name(progress)}: {told}")
        if self._bar is not None:
            self._bar.update(self._task, advance=1)

    def _on_finish(self, progress: Progress) -> None:
        self.close()


def _name(progress: Progress) -> str:
    assert progress.cell is not None
    return f"{progress.cell.task}, {progress.cell.method}, seed {progress.cell.seed}"


def _left(progress: Progress) -> str:
    return "" if progress.seconds_left is None else f" ({duration(progress.seconds_left)} left)"
