"""Tables of every format come out alike, and what cannot be read is told with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.errors import DataError
from softprompt.tables import read_table

ROWS = [
    {"text": 'A "fine", film;\nwith\ttwo lines', "label": "good"},
    {"text": "评论 🙂 \u2028 {x}", "label": "schön"},
    {"text": " spaces ", "label": "0"},
]


def as_separated(rows: list[dict[str, str]], separator: str) -> str:
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"'

    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    return "\r\n".join(separator.join(map(quoted, line)) for line in lines)


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "csv": lambda rows: as_separated(rows, ","),
    "tsv": lambda rows: as_separated(rows, "\t"),
    "jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
    "json": lambda rows: json.dumps(rows, indent=1),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_text_formats_packed_or_not(tmp_path: Path, kind: str, pack: str) -> None:
    path = tmp_path / f"some.rows.{kind.upper()}{pack}"
    path.write_bytes(PACKERS[pack](WRITERS[kind](ROWS).encode()))
    assert read_table(path) == ROWS
    plain = tmp_path / f"rows{pack}"
    plain.write_bytes(path.read_bytes())
    assert read_table(str(plain), format=kind) == ROWS


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"a": cells, "b b": cells}), min_size=1, max_size=4))
def test_any_text_survives(tmp_path: Path, kind: str, rows: list[dict[str, str]]) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(WRITERS[kind](rows).encode())
    assert read_table(path) == rows


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | st.text('{}[]",:\t\n;a1e', max_size=30).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.json", "x.csv.gz", "x.json.xz", "x.jsonl.bz2"):
        (tmp_path / name).write_bytes(content)
        try:
            rows = read_table(tmp_path / name)
        except DataError as error:
            message = str(error)
            assert name in message
            assert "\n" not in message
        else:
            assert all(isinstance(row, dict) for row in rows)


def test_parquet_keeps_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "评论", "label": 1, "refs": ["a", "b"]}, {"text": None, "label": 0, "refs": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet") == rows
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet is not a parquet file that can be read"):
        read_table(tmp_path / "bad.parquet")


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "all"))
    assert read_table(tmp_path / "all" / "train") == ROWS
    with pytest.raises(DataError, match=r"holds the splits train; give the folder of one, as .*all/train"):
        read_table(tmp_path / "all")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        read_table(tmp_path / "other")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*arguments: Any, **more: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", refuse)
    before = hub.constants.HF_HUB_OFFLINE
    with pytest.raises(DataError, match="no file nobody/nothing:test, and no hub data set of that name"):
        read_table("nobody/nothing:test")
    assert before == hub.constants.HF_HUB_OFFLINE


def test_spreadsheet_habits(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext; label\r\na, b;good\r\n".encode())
    assert read_table(path) == [{"text": "a, b", "label": "good"}]
    (tmp_path / "rows.tsv").write_text('text\tlabel\n"so" he said\tgood\n"open\tbad\n')
    assert read_table(tmp_path / "rows.tsv") == [
        {"text": '"so" he said', "label": "good"},
        {"text": '"open', "label": "bad"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_table(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty; it needs rows"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b'text,label\na,b\n\n"x\ny",c,d\n', "line 4: 3 cells, the header has 2; quote cells"),
        ("a.csv", b'text,label\na,b\nc,"d\ne,f\n', "line 3: "),
        ("a.csv", b'text,label\na,"b" c\n', "line 2: "),
        ("a.tsv", b"text\tlabel\na\tb\tc\n", "line 2: 3 cells"),
        ("a.csv", b"text,text\na,b\n", "column 'text' stands twice"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', r"line 3: not JSON \(Expecting value at character 7\)"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2: expected an object of columns, found list"),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000 + b"\n", "line 1: "),
        ("a.json", b'[{"a": 1},\n {"a": }]', "line 2: not JSON"),
        ("a.json", b'{"a": 1}', "expected a list of objects, found dict"),
        ("a.json", b'[{"a": 1}, 2]', "row 2: expected an object of columns, found int"),
        ("a.json", b"[" * 200_000, "cannot be read|not JSON"),
        ("a.csv", "text\nschön\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.csv", "text\nx\n".encode("utf-16"), "is not UTF-8 text"),
        ("a.csv.gz", b"no gzip at all", "cannot read .*a.csv.gz"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 999, mtime=0)[:-20], "cannot read"),
        ("a.csv.bz2", b"nothing", "cannot read"),
        ("a.csv.xz", b"nothing", "cannot read"),
        ("a.data", b"x", "cannot tell the format of .*; give format"),
        ("a.pkl", b"x", "cannot tell the format of"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_that_are_no_file(tmp_path: Path) -> None:
    for source in (tmp_path / "none.csv", "none.csv", "./none", str(tmp_path / "none"), "no file", "a/b/c"):
        with pytest.raises(DataError, match="no such file"):
            read_table(source)
    with pytest.raises(DataError, match="unknown table format 'xls'; expected one of csv"):
        read_table(tmp_path, format="xls")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        read_table(tmp_path / "folder.csv")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_table(tmp_path / "folder.csv", format="csv")
