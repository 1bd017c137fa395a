"""What the commands that look into prompts share: prompts by folder, rows of a table, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .evaluate import SPLITS, _divided, _recorded, _rows
from .output import Output
from .progress import PLAIN_SECONDS, _bar

if TYPE_CHECKING:
    from ..data import Split, Task
    from ..prompt import SoftPrompt

DATA = Annotated[
    str | None, typer.Option(help="Table of rows to measure on, divided as when tuning; this runs the model.")
]
SPLIT = Annotated[
    str | None,
    typer.Option(help="all, train, validation or test. Default: test if it is the file tuned on, else all."),
]
LIMIT = Annotated[int, typer.Option(min=1, help="At most so many rows, drawn by seed.")]


def load_prompts(folders: list[str]) -> dict[str, SoftPrompt]:
    """The prompts by the names of their folders; by their whole paths where two names are the same."""
    from ..prompt import SoftPrompt

    short = [Path(folder).resolve().name for folder in folders]
    names = folders if len(set(short)) < len(short) else short
    if len(set(names)) < len(names):
        raise ConfigError(f"the prompt {next(n for n in names if names.count(n) > 1)} was given twice")
    return {name: SoftPrompt.load(folder) for name, folder in zip(names, folders, strict=True)}


def rows_of(out: Output, data: str, split: str | None, prompt: SoftPrompt, format: str | None) -> Split:
    """The rows of DATA that `softprompt evaluate` would score, with the prompt's own template."""
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split: expected {', '.join(SPLITS)}, found '{split}'")
    if prompt.template is None:
        raise ConfigError(
            "template: the prompt came without one, so its rows cannot be read; import it with a template"
        )
    options: dict[str, Any] = {"template": prompt.template, "format": format, "references": None}
    return _rows(out, data, split, prompt, options)[0]


def task_of(
    out: Output, data: str, prompt: SoftPrompt, format: str | None, validation: str | None, test: str | None
) -> Task:
    """DATA as a task, divided as it was for tuning; its files for validation and test where they are given."""
    from ..data import Task

    if prompt.template is None:
        raise ConfigError(
            "template: the prompt came without one, so its rows cannot be read; import it with a template"
        )
    options: dict[str, Any] = {"template": prompt.template, "format": format}
    if validation is None and test is None:
        task = _divided(data, _recorded(prompt), options)
        assert task is not None
    else:
        task = Task.load(train=data, validation=validation, test=test, **options)
    counts = ", ".join(f"{len(part):,} {part.name}" for part in (task.train, task.validation, task.test))
    out.note(f"rows: {counts}")
    return task


def smaller(split: Split, rows: int | None, seed: int) -> Split:
    return split if rows is None else replace(split.take(rows, seed=seed))


@contextmanager
def stages(out: Output) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, in all) that shows how far several measurements are, one after the other."""
    if out.quiet or not out.live:
        told = time.monotonic()

        def tell(what: str, done: int, total: int) -> None:
            nonlocal told
            if not out.quiet and time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                out.note(f"{what}: {done:,} of {total:,}")

        yield tell
        return
    with _bar(out, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for old in tasks.values():
                    bar.update(old, visible=False)
                tasks[what] = bar.add_task(what, total=total, told="")
            bar.update(tasks[what], completed=done, total=total)

        yield show
