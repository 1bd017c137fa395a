"""Read tables of examples: csv, tsv, jsonl, json, parquet, packed or not, a `datasets` folder, or a hub data set.

Reading never runs code from the data: pickles and data set scripts are not read.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .errors import DataError

Rows = list[dict[str, Any]]
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "datasets", "hub")
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_PACKED: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]


def read_table(source: str | Path, format: str | None = None) -> Rows:
    """All rows of a table as dicts of column -> value, in file order.

    source: a file, a folder saved by `datasets`, or `hub id` / `hub id:split`. format: one of FORMATS, when the name
    does not tell. Raises DataError: missing, empty, or unparseable (with the line number).
    """
    path = Path(source)
    kind = format or detect_format(source)
    if kind not in FORMATS:
        raise DataError(f"unknown table format '{kind}'; expected one of {', '.join(FORMATS)}")
    if kind == "hub":
        return _read_hub(str(source))
    if not path.exists():
        raise DataError(f"no such file: {path}; give a file, a folder saved by datasets, or a hub id")
    rows = _read_datasets(path) if kind == "datasets" else _read_file(path, kind)
    if not rows:
        raise DataError(f"{path} has no rows; it needs a header and rows of examples")
    return rows


def detect_format(source: str | Path) -> str:
    """The format by name. Raises DataError if the name does not tell."""
    path = Path(source)
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    if path.is_dir():
        return "datasets"
    if suffixes and suffixes[-1] in _SUFFIXES:
        return _SUFFIXES[suffixes[-1]]
    if path.exists():
        raise DataError(f"cannot tell the format of {path} by its name; give format: one of {', '.join(FORMATS)}")
    if not path.is_absolute() and not str(source).startswith("."):
        return "hub"
    raise DataError(f"no such file: {path}; give a file, a folder saved by datasets, or a hub id")


def _read_file(path: Path, kind: str) -> Rows:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; it needs a header and rows of examples")
        if kind == "parquet":
            return _read_parquet(path)
        opener = _PACKED.get(path.suffix.lower(), open)
        with opener(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            if kind in ("csv", "tsv"):
                return _read_separated(text, path, "," if kind == "csv" else "\t")
            return _read_jsonl(text, path) if kind == "jsonl" else _read_json(text, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}; convert it first") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _read_separated(file: IO[str], path: Path, separator: str) -> Rows:
    csv.field_size_limit(1 << 27)
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: column '{twice}' stands twice in the header; rename one")
        rows = []
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}; "
                    "quote cells that hold the separator or a line break"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _read_jsonl(file: IO[str], path: Path) -> Rows:
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at character {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object of columns, found {type(row).__name__}")
        rows.append(row)
    return rows


def _read_json(file: IO[str], path: Path) -> Rows:
    try:
        found = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); for one object a line use .jsonl") from error
    if isinstance(found, dict):  # {"data": [...]} and the like
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}: expected a list of objects, found {type(found).__name__}")
    return found


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: Rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    return rows


def _read_datasets(path: Path) -> Rows:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{path} is a folder, but not one saved by datasets: {error}") from error
    if not isinstance(found, Dataset):
        raise DataError(f"{path} holds the splits {', '.join(found)}; give the folder of one, for instance {path}/train")
    rows: Rows = found.to_list()
    return rows


def _read_hub(source: str) -> Rows:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        rows: Rows = load_dataset(name, split=split or "train").to_list()
    except Exception as error:  # the library raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"no file '{source}', and no hub data set could be loaded by that name: {reason}") from error
    return rows
