"""A task: a template, and rows for training, validation and test. Everything wrong with the rows is found here."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DataError
from .tables import read_table
from .templates import Labels, Template

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Rows of fields (all text) with the template that reads them. references: a column with a list of right texts."""

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
        """The class of each row; only for a task with labels."""
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

    @staticmethod
    def load(
        train: str | Path | None = None,
        *,
        validation: str | Path | None = None,
        test: str | Path | None = None,
        input: str | None = None,
        target: str | None = None,
        chat: Sequence[Mapping[str, str] | Sequence[str]] | None = None,
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
        """Read files into a task.

        A file that is given is used whole for its split. Of `train`, validation and test get their `shares` (train,
        validation, test) by `seed` when no file is given for them: stratified by class, and with `group_by` rows with
        the same value in that column stay in one split. limit: at most so many training rows. Raises DataError and
        TemplateError.
        """
        template = template or Template.make(input, target, chat, labels)
        given = {"train": train, "validation": validation, "test": test}
        if not any(given.values()):
            raise DataError("no file was given; expected at least one of train, validation, test")
        tables = {split: read_table(path, format) for split, path in given.items() if path is not None}
        source: dict[str, Any] = {"files": {split: str(path) for split, path in given.items() if path is not None}}
        for split, rows in tables.items():
            tables[split] = clean(rows, template, str(given[split]), references, group_by)
        if train is not None and (validation is None or test is None):
            wanted = _wanted_shares(shares, validation is None, test is None)
            parts = carve(tables["train"], template, wanted, seed, stratify, group_by)
            for split, rows in zip(("train", "validation", "test"), parts, strict=True):
                if split == "train" or given[split] is None:
                    tables[split] = rows
            source |= {"shares": list(wanted), "seed": seed, "stratify": stratify, "group_by": group_by}
        if limit is not None and "train" in tables:
            tables["train"] = random.Random(seed).sample(tables["train"], min(limit, len(tables["train"])))
        made = name or Path(str(next(path for path in given.values() if path))).name.split(".")[0]
        return Task.from_rows(
            tables.get("train", []),
            tables.get("validation", []),
            tables.get("test", []),
            template,
            references=references,
            name=made,
            source=source,
            checked=True,
        )

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
        checked: bool = False,
    ) -> Task:
        """A task of rows that are in memory already; they are checked as those of files are."""
        splits = {"train": list(map(dict, train)), "validation": list(map(dict, validation)), "test": list(map(dict, test))}
        if not checked:
            splits = {k: clean(rows, template, k, references, None) if rows else [] for k, rows in splits.items()}
        if template.labels is not None and splits["train"]:
            _check_classes(splits["train"], template)
        found = dict(source or {})
        found["sha256"] = {k: _digest(rows) for k, rows in splits.items() if rows}
        parts = [Split(k, tuple(rows), template, references) for k, rows in splits.items()]
        return Task(template, parts[0], parts[1], parts[2], name, found)


def clean(
    rows: Sequence[Mapping[str, Any]],
    template: Template,
    where: str,
    references: str | None = None,
    group_by: str | None = None,
) -> list[Row]:
    """Rows with every value as text, checked against the template. Raises DataError that names column and row."""
    needed = [*template.fields, *template.target_fields]
    for name in [*needed, *([references] if references else []), *([group_by] if group_by else [])]:
        if name not in rows[0]:
            raise DataError(f"{where} has no column '{name}'; it has {', '.join(map(str, rows[0]))}")
    found = [{key: _text(value, key == references) for key, value in row.items()} for row in rows]
    for number, row in enumerate(found, 1):
        missing = next((name for name in needed if name not in row), None)
        if missing is not None:
            raise DataError(f"{where}, row {number} has no column '{missing}'")
    if template.fields:
        empty = [i for i, row in enumerate(found, 1) if not any(str(row[name]).strip() for name in template.fields)]
        if empty:
            columns = ", ".join(template.fields)
            raise DataError(f"{where}: {len(empty)} rows have no text in {columns} (first: row {empty[0]}); remove them")
    _check_targets(found, template, where)
    return found


def _check_targets(rows: Sequence[Row], template: Template, where: str) -> None:
    label = template.label_field
    if label is not None:
        known = set(template.classes)
        for number, row in enumerate(rows, 1):
            if row[label] not in known:
                raise DataError(
                    f"{where}, row {number}: label '{row[label]}' is not in labels ({', '.join(template.classes)})"
                )
        return
    empty = [i for i, row in enumerate(rows, 1) if not template.render_target(row).strip()]
    if empty:
        raise DataError(f"{where}: {len(empty)} rows have an empty answer (first: row {empty[0]}); remove them")


def _check_classes(rows: Sequence[Row], template: Template) -> None:
    label = template.label_field
    found = Counter(str(row[label]) for row in rows)
    if len(found) < 2:
        only = next(iter(found))
        raise DataError(f"all {len(rows)} training rows have the one class '{only}'; there is nothing to learn apart")


def _text(value: Any, keep_list: bool) -> Any:
    if keep_list and isinstance(value, list | tuple):
        return [str(item) for item in value]
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value)


def _wanted_shares(shares: Sequence[float], validation: bool, test: bool) -> tuple[float, float, float]:
    if len(shares) != 3 or any(s < 0 for s in shares) or not shares[0] or not 0.99 < sum(shares) < 1.01:
        raise DataError(f"shares are three numbers (train, validation, test) that sum to 1, found {list(shares)}")
    kept = [shares[0], shares[1] if validation else 0.0, shares[2] if test else 0.0]
    return kept[0] / sum(kept), kept[1] / sum(kept), kept[2] / sum(kept)


def carve(
    rows: Sequence[Row],
    template: Template,
    shares: Sequence[float],
    seed: int,
    stratify: bool = True,
    group_by: str | None = None,
) -> list[list[Row]]:
    """Rows divided by `shares` at random by `seed`, each part in file order.

    Whole groups (rows with the same value of `group_by`) go to one part; with `stratify` each class is divided by
    itself as far as groups allow.
    """
    units: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault(row[group_by] if group_by else index, []).append(index)
    strata: dict[str, list[list[int]]] = {}
    label = template.label_field if stratify else None
    for members in units.values():
        classes = Counter(rows[i][label] for i in members) if label else Counter({"": 1})
        strata.setdefault(str(classes.most_common(1)[0][0]), []).append(members)
    parts: list[list[int]] = [[] for _ in shares]
    generator = random.Random(seed)
    for key in sorted(strata):
        members_of = strata[key]
        generator.shuffle(members_of)
        total = sum(map(len, members_of))
        filled = [0] * len(shares)
        for members in members_of:  # each unit goes where most is lacking
            lack = [share * total - have for share, have in zip(shares, filled, strict=True)]
            part = max(range(len(shares)), key=lambda p: (shares[p] > 0, lack[p]))
            parts[part].extend(members)
            filled[part] += len(members)
    return [[rows[i] for i in sorted(part)] for part in parts]


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
