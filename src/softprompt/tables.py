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
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from .errors import DataError
from .markup import shorten

Rows = list[dict[str, Any]]
HUB_SECONDS = 5.0  # how long a hub that does not answer is waited for
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
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
    path = Path(source).expanduser()
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
    path = Path(source).expanduser()
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
            raise DataError(f"{path} is empty; it needs rows of examples")
        if kind == "parquet":
            return _read_parquet(path)
        opener = _PACKED.get(path.suffix.lower(), open)
        with opener(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="").read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if kind in ("csv", "tsv"):
        return _read_separated(text, path, kind)
    return _read_jsonl(text, path) if kind == "jsonl" else _read_json(text, path)


def _read_separated(text: str, path: Path, kind: str) -> Rows:
    if kind == "csv":
        first = text[: text.find("\n")]
        # What spreadsheets in half of Europe call csv.
        return _read_cells(text, path, ";" if ";" in first and "," not in first else ",", csv.QUOTE_MINIMAL)
    try:
        return _read_cells(text, path, "\t", csv.QUOTE_MINIMAL)
    except DataError as quoted:
        # Many tsv files know no quotes: a cell may begin with one that is never closed.
        try:
            return _read_cells(text, path, "\t", csv.QUOTE_NONE)
        except DataError:
            raise quoted from None


def _read_cells(text: str, path: Path, separator: str, quoting: Literal[0, 3]) -> Rows:
    csv.field_size_limit(1 << 27)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    rows, line = [], 1
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
        if twice is not None:
            raise DataError(f"{path}: column '{twice}' stands twice in the header; rename one")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, the header has {len(header)}; "
                    "quote cells that hold the separator or a line break"
                )
            if cells:  # else a blank line
                rows.append(dict(zip(header, cells)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}") from error
    return rows


def _read_jsonl(text: str, path: Path) -> Rows:
    rows = []
    for number, line in enumerate(io.StringIO(text), 1):  # not splitlines, which also divides at U+2028 in a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at character {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: JSON that cannot be read ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object of columns, found {type(row).__name__}")
        rows.append(row)
    return rows


def _read_json(text: str, path: Path) -> Rows:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); one object a line is .jsonl") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read ({error})") from error
    if isinstance(found, dict):  # {"data": [...]} and the like
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of objects, found {type(found).__name__}")
    wrong = next((i for i, row in enumerate(found, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise DataError(f"{path}, row {wrong}: expected an object of columns, found {type(found[wrong - 1]).__name__}")
    return found


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: Rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {_first_line(error)}") from error
    return rows


def _read_datasets(path: Path) -> Rows:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # of many kinds when its files are damaged
        raise DataError(f"{path} is not a folder saved by datasets that can be read: {_first_line(error)}") from error
    if not isinstance(found, Dataset):
        splits = shorten(list(map(str, found)))
        raise DataError(f"{path} holds the splits {splits}; give the folder of one, as {path / str(next(iter(found)))}")
    rows: Rows = found.to_list()
    return rows


def _read_hub(source: str) -> Rows:
    name, _, split = source.partition(":")
    if not HUB_ID.fullmatch(name):
        raise DataError(f"no such file: {source}; it is no hub id (owner/name) either")
    with _hub_within_reach(name):
        from datasets import load_dataset

        try:
            rows: Rows = load_dataset(name, split=split or "train").to_list()
        except Exception as error:  # the library raises many kinds
            raise DataError(f"no file {source}, and no hub data set of that name: {_first_line(error)}") from error
    return rows


@contextmanager
def _hub_within_reach(name: str) -> Iterator[None]:
    """Within it `datasets` uses its cache only, if the hub does not answer: it would try for half a minute."""
    import datasets
    from huggingface_hub import HfApi, constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not before[0]:
        try:
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        except Exception:  # no network, or not there: what is in the cache is used all the same
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
