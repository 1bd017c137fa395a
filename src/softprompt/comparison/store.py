"""The cells of a comparison as files: one JSON file for task, model, method and seed, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_atomic
from ..errors import ConfigError, OutputError
from .catalogue import BEHIND
from .config import ComparisonConfig
from .places import behind

FORMAT = 1
DONE, LEFT_OUT, FAILED = "done", "left out", "failed"


@dataclass(frozen=True)
class Cell:
    """One thing to be measured. digest: of all that its result depends on."""

    task: str
    model: str
    method: str
    seed: int
    digest: str

    @property
    def name(self) -> str:
        """A file name: sst2.smollm2-135m.lora.seed0."""
        return f"{self.task}.{slug(self.model)}.{self.method}.seed{self.seed}"


def slug(model: str) -> str:
    """A model's name for files: the last part of a path or hub id, and a hash where that alone could be confused."""
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(model).name).strip("-") or "model"
    return short if short == model else f"{short}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def digest_of(config: ComparisonConfig, task: str, model: str, method: str, rows: dict[str, Any]) -> str:
    """Sixteen hex digits of the data (`rows`: its sizes and hashes), template, budget and settings of a cell."""
    template = config.tasks[task].template()
    placed = behind(template) if method in BEHIND else None
    data = {
        "format": FORMAT,
        "rows": rows,
        "template": template.to_dict(),
        "metric": config.tasks[task].score_name,
        "budget": config.budget(task),
        "model": model,
        "precision": config.precision,
        "method": method,
        "rates": config.rates(method),
        "settings": config.settings.get(method, {}),
        **({"placed": placed.input} if placed else {}),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """The results folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.cells = self.folder / "cells"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it. Raises OutputError."""
        from filelock import FileLock, Timeout

        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"{self.folder} is in use by another comparison; wait for it, or choose another"
            ) from None
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def path(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"

    def work(self, cell: Cell) -> Path:
        """Where a cell keeps what it has done so far; gone when it is finished."""
        return self.folder / "work" / cell.name

    def read(self, cell: Cell) -> dict[str, Any] | None:
        return read_cell(self.path(cell))

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell that need not be run again: done, and under the same settings."""
        found = self.read(cell)
        return found if found and found["status"] == DONE and found["digest"] == cell.digest else None

    def check(self, cells: Sequence[Cell], again: bool) -> None:
        """Raise ConfigError if results of other settings are in the way, unless they are to be run `again`."""
        other = [
            c.name for c in cells if (found := self.read(c)) and found["status"] == DONE and found["digest"] != c.digest
        ]
        if other and not again:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise ConfigError(
                f"out: {self.folder} holds results of other rows or settings ({other[0]}{more}); choose another out, "
                "or run those cells again (--again)"
            )

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        write_cell(self.path(cell), result)

    def all(self) -> list[dict[str, Any]]:
        """Every cell in the folder, whatever asked for it, in the order of their names."""
        found = (read_cell(path) for path in sorted(self.cells.glob("*.json")))
        return [cell for cell in found if cell is not None]


def read_cell(path: Path) -> dict[str, Any] | None:
    """A cell's result, None if there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = ("status", "task", "model", "method", "seed", "digest")
    return data if isinstance(data, dict) and all(key in data for key in needed) else None


def write_cell(path: Path, result: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(result, ensure_ascii=False, default=str) + "\n").encode())
