"""Tasks: files to splits, and every mistake in the rows told with what was expected."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data import Split, Task
from softprompt.errors import DataError, TemplateError
from softprompt.rows import carve
from softprompt.templates import Template

INPUT, TARGET, LABELS = "{soft}Review: {text}\nMood:", " {label}", ["bad", "good"]
TEMPLATE = Template.make(INPUT, TARGET, labels=LABELS)
FREE = Template.make("{text}", "{answer}")
SHARED = Path("/work/shared/data")


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": LABELS[i % 2], "film": f"film {i // 4}"} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **more: Any) -> Task:
    return Task.load(path, **{"input": INPUT, "target": TARGET, "labels": LABELS, **more})


# --- loading ----------------------------------------------------------------------------------------------------------


def test_one_file_is_divided(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.jsonl", rows_of(200))
    task = load(path)
    sizes = [len(split) for split in (task.train, task.validation, task.test)]
    assert sizes == [160, 20, 20]
    texts = [row["text"] for split in (task.train, task.validation, task.test) for row in split]
    assert sorted(texts) == sorted(row["text"] for row in rows_of(200))
    assert [Counter(split.labels)["good"] for split in (task.train, task.validation, task.test)] == [80, 10, 10]
    assert task.name == "reviews"
    assert task.template == task.test.template == TEMPLATE
    assert load(path) == task
    assert load(path, seed=1).test.rows != task.test.rows
    assert load(path, shares=(1, 0, 0)).train.rows == tuple(rows_of(200))
    assert len(load(path, shares=(0.5, 0.5, 0)).test) == 0


def test_given_files_are_used_whole(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", rows_of(90))
    two = write(tmp_path / "b.jsonl", rows_of(7))
    task = load(one, test=two)
    assert task.test.rows == tuple(rows_of(7))
    assert (len(task.train), len(task.validation)) == (80, 10)
    task = load(one, test=two, validation=two)
    assert len(task.train) == 90
    assert task.validation.rows == task.test.rows
    assert task.validation.name == "validation"
    assert "shares" not in task.source
    only = Task.load(test=two, template=TEMPLATE)
    assert (len(only.train), len(only.validation), len(only.test)) == (0, 0, 7)
    assert only.name == "b"


def test_the_source_tells_where_the_rows_came_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_of(50))
    source = load(path, limit=10, group_by="film", name="mood").source
    assert source["files"] == {"train": str(path)}
    assert source["shares"] == pytest.approx([0.8, 0.1, 0.1])
    assert (source["seed"], source["stratify"], source["group_by"], source["limit"]) == (0, True, "film", 10)
    assert source["sizes"]["train"] == 10
    assert all(len(digest) == 64 for digest in source["sha256"].values())
    json.dumps(source)
    other = write(tmp_path / "b.jsonl", [*rows_of(49), {**rows_of(50)[-1], "text": "changed"}])
    assert load(path).source["sha256"] != load(other).source["sha256"]


def test_limit_takes_training_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_of(100))
    task, whole = load(path, limit=20), load(path)
    assert len(task.train) == 20
    assert task.test.rows == whole.test.rows
    assert set(task.train.labels) == set(LABELS)
    with pytest.raises(DataError, match="limit is 0, expected at least 1"):
        load(path, limit=0)


def test_cells_of_any_type_become_text(tmp_path: Path) -> None:
    rows = [
        {"text": None, "more": 1, "ok": True, "x": [1, "ä"]},
        {"text": "b", "more": 2.5, "ok": False, "x": {"a": 1}},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    task = Task.load(path, input="{text}{more} {x}", target="{ok}", labels={True: "yes", False: "no"}, shares=(1, 0, 0))
    assert list(task.train) == [
        {"text": "", "more": "1", "ok": "true", "x": '[1, "ä"]'},
        {"text": "b", "more": "2.5", "ok": "false", "x": '{"a": 1}'},
    ]


def test_references_stay_lists(tmp_path: Path) -> None:
    rows = [{"text": "a", "answer": "x", "refs": ["x", "y", " "]}, {"text": "b", "answer": "z", "refs": "z [1]"}]
    task = Task.load(test=write(tmp_path / "a.jsonl", rows), template=FREE, references="refs")
    assert task.test.references == "refs"
    assert [row["refs"] for row in task.test] == [["x", "y"], ["z [1]"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "answer", "refs"], ["a", "x", '["x", "y"]'], ["b", "z", "[sic] z"]])
    task = Task.load(test=tmp_path / "a.csv", template=FREE, references="refs")
    assert [row["refs"] for row in task.test] == [["x", "y"], ["[sic] z"]]
    with pytest.raises(DataError, match="row 1 has no reference text in refs"):
        Task.from_rows([], [], [{"text": "a", "answer": "x", "refs": []}], FREE, references="refs")


def test_rows_in_memory() -> None:
    task = Task.from_rows(rows_of(8), [], rows_of(2), TEMPLATE, name="mood", source={"made": "here"})
    assert (len(task.train), len(task.validation), task.test.labels) == (8, 0, ["bad", "good"])
    assert task.source["made"] == "here"
    with pytest.raises(DataError, match="train rows: row 1 has no text"):
        Task.from_rows([{"text": "", "label": "bad"}], [], [], TEMPLATE)


def test_splits_behave_like_sequences() -> None:
    split = Split("test", tuple(rows_of(10)), TEMPLATE)
    assert split[1]["text"] == "text 1"
    assert [row["text"] for row in split.take(2)] == ["text 0", "text 1"]
    few = split.take(4, seed=3)
    assert few == split.take(4, seed=3)
    assert [row["text"] for row in few] == sorted(row["text"] for row in few)
    assert split.take(99) is split
    assert few.template is TEMPLATE
    with pytest.raises(DataError, match="free text has no labels"):
        _ = Split("test", (), FREE).labels


# --- dividing ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    classes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.9, 0.1, 0.0), (1.0, 0.0, 0.0)]),
    seed=st.integers(0, 9),
)
def test_every_class_is_divided_in_its_shares(classes: list[int], shares: tuple[float, ...], seed: int) -> None:
    rows = [{"text": f"{name} {i}", "label": f"c{name}"} for name, size in enumerate(classes) for i in range(size)]
    template = Template.make("{text}", "{label}", labels=[f"c{i}" for i in range(max(2, len(classes)))])
    parts = carve(rows, template, shares, seed)
    assert sorted(row["text"] for part in parts for row in part) == sorted(row["text"] for row in rows)
    assert {row["label"] for row in parts[0]} == {row["label"] for row in rows}  # no class is unseen in training
    for name, size in enumerate(classes):
        for share, part in zip(shares, parts):
            found = sum(row["label"] == f"c{name}" for row in part)
            assert abs(found - share * size) <= 2 + len(classes) / 4
            assert share or not found


@given(st.integers(0, 5), st.booleans())
def test_groups_stay_together(seed: int, stratify: bool) -> None:
    rows = rows_of(400)
    parts = carve(rows, TEMPLATE, (0.8, 0.1, 0.1), seed, stratify, "film")
    films = [{row["film"] for row in part} for part in parts]
    assert not films[0] & films[1]
    assert not films[0] & films[2]
    assert not films[1] & films[2]
    assert [len(part) for part in parts] == [320, 40, 40]


def test_rows_without_a_group_are_no_group() -> None:
    parts = carve([{**row, "film": ""} for row in rows_of(100)], TEMPLATE, (0.8, 0.1, 0.1), 0, True, "film")
    assert [len(part) for part in parts] == [80, 10, 10]


def test_rows_with_the_same_input_stay_together() -> None:
    """Else a test row would have been seen in training."""
    rows = [{"text": f"text {i % 50}", "label": LABELS[i % 2]} for i in range(200)]
    parts = carve(rows, TEMPLATE, (0.5, 0.25, 0.25), 0)
    texts = [{row["text"] for row in part} for part in parts]
    assert sum(map(len, texts)) == 50


def test_parts_are_in_file_order_and_the_division_is_by_chance() -> None:
    rows = rows_of(100)
    parts = carve(rows, TEMPLATE, (0.5, 0.5, 0), 0)
    places = [[rows.index(row) for row in part] for part in parts]
    assert all(place == sorted(place) for place in places)
    assert places[0] != list(range(50))
    assert carve(rows, TEMPLATE, (0.5, 0.5, 0), 1) != parts


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (rows_of(4), {"input": "{txt}"}, "has no column 'txt'; it has text, label, film"),
        (rows_of(4), {"target": "{lbl}"}, "has no column 'lbl'; it has text, label, film"),
        (rows_of(4), {"group_by": "movie"}, "has no column 'movie'"),
        (rows_of(4), {"references": "refs"}, "has no column 'refs'"),
        ([*rows_of(3), {"text": "x"}], {}, "row 4 has no column 'label'; it has text"),
        ([*rows_of(3), {"text": "x", "label": "Good"}], {}, r"label 'Good' of row 4 is not in labels \(bad, good\)"),
        ([*rows_of(2), *[{"text": "x", "label": None}] * 3], {}, r"label '' of row 3 \(and 2 more rows\) is not in"),
        (
            [*rows_of(2), {"text": " ", "label": "bad"}],
            {},
            "row 3 has no text in text; remove or mend",
        ),
        ([*rows_of(2), *[{"text": None, "label": "bad"}] * 2], {}, r"2 rows have no text in .* \(first: row 3\)"),
        ([{"text": "x", "label": "bad"}] * 3, {}, "all 3 training rows are of the one class 'bad'"),
        ([{"text": "x", "label": " "}], {"labels": None}, "row 1 has an empty answer; remove or mend"),
        ([*rows_of(2), {"text": "\ud800", "label": "bad"}], {}, "row 3 holds half of a surrogate pair in 'text'"),
        (rows_of(9), {"shares": (0.5, 0.2, 0.2)}, r"sum to 1, found \[0.5, 0.2, 0.2\]"),
        (rows_of(9), {"shares": (0, 0.5, 0.5)}, "shares are three numbers"),
        (rows_of(9), {"shares": (1.0,)}, "shares are three numbers"),
        (rows_of(9), {"shares": (1.5, -0.5, 0)}, "shares are three numbers"),
    ],
)
def test_mistakes_in_rows_are_told(tmp_path: Path, rows: list[Any], arguments: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "{odd} name.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        load(path, **arguments)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "shares" in arguments or "training rows" in message


def test_a_row_may_lack_some_of_its_texts() -> None:
    template = Template.make("{instruction}\n{input}", "{output}")
    rows = [{"instruction": "Count.", "input": "", "output": "1 2"}, {"instruction": "", "input": "x", "output": "y"}]
    assert len(Task.from_rows(rows, [], [], template).train) == 2


def test_many_labels_make_no_long_message() -> None:
    template = Template.make("{text}", "{label}", labels=[f"class {i}" for i in range(150)])
    with pytest.raises(DataError, match="class 11 and 138 more") as caught:
        Task.from_rows([{"text": "x", "label": "y"}], [], [], template)
    assert len(str(caught.value)) < 300


def test_other_mistakes() -> None:
    with pytest.raises(DataError, match="no file was given"):
        Task.load(input="{text}", target="x")
    with pytest.raises(TemplateError, match="no target"):
        Task.load("reviews.csv", input="{text}")
    with pytest.raises(DataError, match=r"no such file: reviews\.csv"):
        Task.load("reviews.csv", template=FREE)
    with pytest.raises(DataError, match="validation rows: label 'c' of row 1"):
        Task.from_rows(rows_of(4), [{"text": "a", "label": "c"}], [], TEMPLATE)


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets of this workshop are not here")
@pytest.mark.parametrize("name", ["trec", "uit_vsfc", "clinc150"])
def test_real_classification_files(name: str) -> None:
    labels = sorted({json.loads(line)["label"] for line in (SHARED / name / "train.jsonl").open(encoding="utf-8")})
    task = Task.load(SHARED / name / "train.jsonl", input="{text}{soft}", target=" {label}", labels=labels)
    total = len(task.train) + len(task.validation) + len(task.test)
    assert len(task.train) == pytest.approx(0.8 * total, rel=0.02)
    assert set(task.train.labels) == set(labels)
    assert not {row["text"] for row in task.train} & {row["text"] for row in task.test}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets of this workshop are not here")
def test_real_text_files() -> None:
    task = Task.load(test=SHARED / "e2e" / "test.jsonl", input="{mr}", target=" {ref}", references="refs")
    assert all(row["ref"] in row["refs"] for row in task.test)
