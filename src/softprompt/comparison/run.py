"""`compare`: all cells of a comparison, one after the other, those that are finished left as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, SoftPromptError
from .config import ComparisonConfig
from .store import DONE, Cell, Store, digest_of

PACKAGE = Path(__file__).parents[2]


@dataclass
class Progress:
    """Where a comparison is. event: start (cells, to_do), begin, line (text), end (result, seconds), finish.

    number: of the cells to be run in this call, from 1. seconds_left: None until something is known about it.
    """

    event: str
    cell: Cell | None = None
    number: int = 0
    to_do: int = 0
    cells: int = 0
    text: str = ""
    result: dict[str, Any] | None = None
    seconds_left: float | None = None


Listener = Callable[[Progress], None]


def compare(
    config: ComparisonConfig,
    *,
    listen: Listener = lambda progress: None,
    again: bool = False,
    run: bool = True,
) -> list[dict[str, Any]]:
    """Run what is not finished yet, and return the results of all cells of `config` (see cell.run_cell).

    A cell that fails or cannot be run is marked with its reason, the others go on, and it is tried again in the next
    call. Killed at any moment, the next call goes on with the first cell that is not finished; a cell's search goes on
    with the next learning rate. again: also run cells whose results are of other settings. run: False only reads.
    Raises ConfigError (all mistakes in the data at once), OutputError (also where another process runs it already).
    """
    store = Store(config.out)
    cells = plan(config)
    if run:
        with store.alone():
            store.check(cells, again)
            _run_missing(config, store, cells, listen)
    return [result for cell in cells if (result := store.read(cell)) is not None and result["digest"] == cell.digest]


def _run_missing(config: ComparisonConfig, store: Store, cells: Sequence[Cell], listen: Listener) -> None:
    missing = [cell for cell in cells if store.finished(cell) is None]
    whole = Progress("start", cells=len(cells), to_do=len(missing))
    listen(whole)
    runner = _in_process if config.isolate else _here({})
    for number, cell in enumerate(missing, 1):
        clock = Clock(store, missing[number - 1 :])
        now = replace(whole, cell=cell, number=number)
        listen(replace(now, event="begin", seconds_left=clock.left()))
        tell = _Teller(listen, now, clock)
        work = store.work(cell)
        _forget_other_settings(work, cell)
        result = runner(config, cell, work, _rate_of_first_seed(config, store, cells, cell), tell)
        result["cell_seconds"] = round(tell.spent(), 3)
        store.write(cell, result)
        if result["status"] == DONE:
            shutil.rmtree(work, ignore_errors=True)
        listen(replace(now, event="end", result=result))
    listen(replace(whole, event="finish"))


class _Teller:
    """What the running cell says, with the time left."""

    def __init__(self, listen: Listener, now: Progress, clock: Clock):
        self.listen, self.now, self.clock, self.begun = listen, now, clock, time.perf_counter()

    def spent(self) -> float:
        return time.perf_counter() - self.begun

    def __call__(self, text: str) -> None:
        self.listen(replace(self.now, event="line", text=text, seconds_left=self.clock.left(self.spent())))


def plan(config: ComparisonConfig) -> list[Cell]:
    """All cells, seed after seed, so that a comparison which is stopped early has something of every task.

    A method without seeds has one cell. Reads the rows of every task. Raises ConfigError with the mistakes of all.
    """
    from .catalogue import METHODS
    from .cell import load_task

    rows: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in config.tasks:
        try:
            task = load_task(config, name)
            rows[name] = {key: task.source[key] for key in ("sizes", "sha256")} | {"test_rows": len(task.test)}
        except ConfigError as error:
            problems += error.problems
        except (DataError, SoftPromptError) as error:
            problems.append(f"tasks.{name}: {error}")
    if problems:
        raise ConfigError(problems)
    return [
        Cell(task, model, method, seed, digest_of(config, task, model, method, rows[task]))
        for index, seed in enumerate(config.seeds)
        for model in config.model
        for task in config.tasks
        for method in config.methods_of(task)
        if METHODS[method].seeded or index == 0
    ]


def _rate_of_first_seed(config: ComparisonConfig, store: Store, cells: Sequence[Cell], cell: Cell) -> float | None:
    """The learning rate that the search at the first seed chose; None at that seed, or where none was chosen."""
    if len(config.rates(cell.method)) < 2 or cell.seed == config.seeds[0]:
        return None
    first = next(c for c in cells if (c.task, c.model, c.method) == (cell.task, cell.model, cell.method))
    found = store.finished(first)
    rate = found["settings"].get("learning_rate") if found else None
    return None if rate is None else float(rate)


def _forget_other_settings(work: Path, cell: Cell) -> None:
    """Throw away what a cell had done under other settings."""
    mark = work / "digest"
    if work.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != cell.digest):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(cell.digest, encoding="utf-8")


def _here(backbones: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Run cells in this process, one model kept."""
    from .cell import failed, run_cell

    def run(config: ComparisonConfig, cell: Cell, work: Path, rate: float | None, tell: Any) -> dict[str, Any]:
        from ..backbone import Backbone

        try:
            if cell.model not in backbones:
                backbones.clear()
                made = Backbone.load(cell.model, precision=config.precision, device=config.device, report=tell)
                backbones[cell.model] = made
            return run_cell(config, cell, work, rate, backbones[cell.model], tell)
        except SoftPromptError as error:
            return failed(cell, config.tasks[cell.task].score_name, str(error))

    return run


def _in_process(config: ComparisonConfig, cell: Cell, work: Path, rate: float | None, tell: Any) -> dict[str, Any]:
    """Run a cell in a process of its own; what it says goes to `tell`. If this process is stopped, so is that one."""
    from .cell import failed

    job, answer = work / "job.json", work / "result.json"
    answer.unlink(missing_ok=True)
    given = {
        "config": config.model_dump(),
        "cell": asdict(cell),
        "work": str(work),
        "rate": rate,
        "result": str(answer),
    }
    job.write_text(json.dumps(given), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])}
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command = [sys.executable, "-m", "softprompt.comparison.cell", str(job)]
    with (work / "errors.txt").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tell(line.rstrip("\n"))
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if code == 0 and answer.exists():
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result
    if code in (-2, 130):
        raise KeyboardInterrupt
    why = "killed by the system, most likely for lack of memory" if code == -9 else f"ended with code {code}"
    last = f": {said[-1][:300]}" if said else ""
    return failed(cell, config.tasks[cell.task].score_name, f"the cell's process {why}{last}")


class Clock:
    """How long what is left will take, by what finished cells took: the same task and method, else the same method,
    else the mean of all."""

    def __init__(self, store: Store, cells: Sequence[Cell]):
        self.cells = cells
        self.known = [
            (cell["task"], cell["model"], cell["method"], float(cell["cell_seconds"]))
            for cell in store.all()
            if cell["status"] == DONE and cell.get("cell_seconds")
        ]

    def left(self, spent: float = 0.0) -> float | None:
        """Seconds until the end, `spent` having gone into the first of the cells. None if nothing is known."""
        if not self.known:
            return None
        first, *others = (self._expected(cell) for cell in self.cells)
        return max(0.0, first - spent) + sum(others)

    def _expected(self, cell: Cell) -> float:
        for key in ((0, 1, 2), (1, 2), (2,), ()):
            wanted = tuple((cell.task, cell.model, cell.method)[i] for i in key)
            same = [each[3] for each in self.known if tuple(each[i] for i in key) == wanted]
            if same:
                return sum(same) / len(same)
        raise AssertionError("the last key fits everything")
