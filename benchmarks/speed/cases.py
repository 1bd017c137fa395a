"""What is measured: data, template, soft tokens, precision; and how many tokens have to be computed at the least."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from softprompt.demo_data import movie_reviews
from softprompt.encoding import Encoder
from softprompt.errors import SoftPromptError
from softprompt.placement import Row, shared_length
from softprompt.templates import Template

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCH = 16
PRECISIONS = ("float32", "bfloat16")
Fields = dict[str, str]
REVIEW = Template.make("{soft}Review: {text}\nSentiment:", " {label}", labels=["negative", "positive"])
FACTS = Template.make("{soft}{mr}\nSentence:", " {ref}")


@dataclass(frozen=True)
class Data:
    """Rows of one kind. folder: under the data folder; None: the reviews that come with a package.

    room: tokens of a row without its soft ones, longer texts are cut (PEFT's padded batches would not fit into memory);
    together: whether all sides fit into memory at once, so that they can take turns step by step; steps: timed ones.
    """

    folder: str | None
    template: Template
    room: int
    together: bool
    steps: int


KINDS = {
    "short": Data(None, REVIEW, 256, True, 2),
    "long": Data("imdb", REVIEW, 256, False, 1),
    "answers": Data("e2e", FACTS, 256, True, 1),
}


@dataclass(frozen=True)
class Case:
    kind: str
    tokens: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.kind}-P{self.tokens}-{self.precision}"

    @property
    def data(self) -> Data:
        return KINDS[self.kind]


CASES = [Case(kind, tokens, precision) for precision in PRECISIONS for kind in KINDS for tokens in (20, 100)]


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases whose names hold one of `only`, all without any; SystemExit if there are none."""
    found = [case for case in CASES if not only or any(part in case.name for part in only)]
    if not found:
        raise SystemExit(f"no case is named {' or '.join(only)}; there are {', '.join(case.name for case in CASES)}")
    return found


def read_fields(data: Data, count: int) -> list[Fields]:
    """`count` rows of fields in random order, over and over if there are not so many."""
    if data.folder is None:
        return movie_reviews(train=max(count, 16)).train[:count]
    path = DATA / data.folder / "train.jsonl"
    if not path.is_file():
        raise SystemExit(f"there is no {path}; leave its cases out with --only")
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[order[i % len(rows)]] for i in range(count)]


def encode(tokenizer: object, template: Template, fields: Sequence[Fields], tokens: int, room: int) -> list[Row]:
    try:
        encoder = Encoder(template, tokenizer, tokens, room + tokens)
        return [encoder.row(row)[0] for row in fields]
    except SoftPromptError as error:
        raise SystemExit(f"the rows do not fit the template: {error}") from error


def in_batches(rows: Sequence[Row], size: int) -> tuple[tuple[Row, ...], ...]:
    return tuple(tuple(rows[i : i + size]) for i in range(0, len(rows), size))


def without_soft(row: Row) -> Row:
    """The same row as plain text."""
    soft = sum(token < 0 for token in row.ids)
    return Row(tuple(token for token in row.ids if token >= 0), row.answer - soft)


def needed_tokens(rows: Sequence[Row], kind: str) -> int:
    """Tokens that a step over `rows` cannot do without, for utilisation.

    What all rows have in common counts once; an answer's last token predicts nothing and does not count. kind: prompt
    (soft tokens in front, computed once), deep (their states are the parameters themselves) or plain (no soft tokens).
    """
    if kind == "plain":
        rows = [without_soft(row) for row in rows]
    start = shared_length(rows)
    known = sum(token < 0 for token in rows[0].ids[:start]) if kind == "deep" else 0
    return start - known + sum(len(row.ids) - 1 - start for row in rows)


def own_tokens(rows: Sequence[Row], kind: str) -> int:
    """Tokens of the rows, soft ones included where there are any, padding not."""
    return sum(len((without_soft(row) if kind == "plain" else row).ids) for row in rows)
