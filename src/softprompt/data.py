"""A task: a template, and rows for training, validation and test."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DataError
from .rows import Row, carve, clean, wanted_shares
from .tables import read_table
from .templates import Labels, Template, Turn

NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Rows of fields (all text) with the template that reads them. references: a column with lists of right texts."""

    name: str
    rows: tuple[Row, ...]
    template: Template
    references: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def labels(self) -> list[str]:
        """The class of each row. Raises DataError for a task of free text."""
        column = self.template.label_field
        if column is None:
            raise DataError("a task of free text has no labels")
        return [str(row[column]) for row in self.rows]

    def take(self, count: int, seed: int | None = None) -> Split:
        """The first `count` rows, or with a seed that many by chance, in file order; all if there are no more."""
        if count >= len(self.rows):
            return self
        chosen = range(count) if seed is None else sorted(random.Random(seed).sample(range(len(self.rows)), count))
        return replace(self, rows=tuple(self.rows[i] for i in chosen))


@dataclass(frozen=True)
class Task:
    """What is to be learned and from what. source: where the rows came from, as plain data for the record."""

    template: Template
    train: Split
    validation: Split
    test: Split
    name: str = "task"
    source: dict[str, Any] = field(default_factory=dict)

    def with_template(self, template: Template) -> Task:
        """The same rows with another template around them, whose columns they must have."""
        splits = {name: replace(getattr(self, name), template=template) for name in NAMES}
        return replace(self, template=template, **splits)

    @staticmethod
    def load(
        train: str | Path | None = None,
        *,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        input: str | None = None,
        target: str | None = None,
        chat: Sequence[Turn] | None = None,
        labels: Labels | None = None,
        template: Template | None = None,
        shares: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        stratify: bool = True,
        group_by: str | None = None,
        limit: int | None = None,
        format: str | None = None,
        references: str | None = None,
        name: str | None = None,
    ) -> Task:
        """Read files (see `read_table`) into a task.

        A file that is given is used whole for its split. Where there is none for validation or test, they get their
        `shares` (train, validation, test) of the training file by `seed`: stratified by class; rows with the same
        input, or with `group_by` the same value in that column, stay in one split. limit: at most so many training
        rows. input, target, chat, labels: see `Template.make`. Raises DataError and TemplateError.
        """
        template = template or Template.make(input, target, chat, labels)
        files = {name: path for name, path in zip(NAMES, (train, validation, test)) if path is not None}
        if not files:
            raise DataError("no file was given; expected at least one of train, validation, test")
        if limit is not None and limit < 1:
            raise DataError(f"limit is {limit}, expected at least 1 training row")
        needed = {"train": group_by}
        rows = {
            split: clean(read_table(path, format), template, str(path), references, needed.get(split))
            for split, path in files.items()
        }
        source: dict[str, Any] = {"files": {split: str(path) for split, path in files.items()}}
        if "train" in files and len(files) < 3:
            wanted = wanted_shares(shares, "validation" not in files, "test" not in files)
            parts = carve(rows["train"], template, wanted, seed, stratify, group_by)
            rows = {**dict(zip(NAMES, parts)), **{k: v for k, v in rows.items() if k != "train"}}
            source |= {"shares": list(wanted), "seed": seed, "stratify": stratify, "group_by": group_by}
        if limit is not None and limit < len(rows.get("train", ())):
            rows["train"] = random.Random(seed).sample(rows["train"], limit)
            source["limit"] = limit
        made = name or Path(str(next(iter(files.values())))).name.split(".")[0] or "task"
        return _task([rows.get(split, []) for split in NAMES], template, references, made, source)

    @staticmethod
    def from_rows(
        train: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        template: Template,
        *,
        references: str | None = None,
        name: str = "task",
        source: dict[str, Any] | None = None,
    ) -> Task:
        """A task of rows that are in memory already; they are checked as those of files are. Raises DataError."""
        given = zip(NAMES, (train, validation, test))
        rows = [clean(some, template, f"{split} rows", references) if len(some) else [] for split, some in given]
        return _task(rows, template, references, name, source or {})


def _task(
    rows: Sequence[Sequence[Row]], template: Template, references: str | None, name: str, source: dict[str, Any]
) -> Task:
    if template.label_field is not None and rows[0]:
        found = {row[template.label_field] for row in rows[0]}
        if len(found) < 2:
            raise DataError(
                f"all {len(rows[0])} training rows are of the one class '{min(found)}'; there must be two to tell apart"
            )
    train, validation, test = (Split(split, tuple(some), template, references) for split, some in zip(NAMES, rows))
    digests = {split: _digest(some) for split, some in zip(NAMES, rows) if some}
    sizes = {split: len(some) for split, some in zip(NAMES, rows)}
    return Task(template, train, validation, test, name, {**source, "sizes": sizes, "sha256": digests})


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()).hexdigest()
