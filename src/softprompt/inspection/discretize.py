"""`discretize`: the best plain text that can be read off a soft prompt or found near it, and what it scores.

Two texts are made: the nearest word of each soft token, and what a greedy coordinate search over each token's nearest
words finds by the loss on a sample (the search of AutoPrompt, Shin et al. 2020, arXiv:2010.15980, with the soft token's
neighbours in place of the gradient's candidates). They are scored as a person would use them: typed into the template,
tokenised anew. Beside them stand the soft prompt, the template alone, and the hand-written text that the prompt started
from, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..backbone import Backbone
from ..data import Split, Task
from ..encoding import divide
from ..errors import ConfigError
from ..markup import SOFT, escape
from ..prompt import SoftPrompt
from ..templates import Template
from ..vocabulary import ordinary_tokens
from .measuring import Paired, RowScores, paired, row_scores
from .nearest import Neighbour, nearest_tokens
from .starting import written_text

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Line:
    """One of the prompts that were compared. text: what stands in the template, None for the soft prompt.

    against: A is the soft prompt, B this one; None for the soft prompt itself.
    """

    name: str
    text: str | None
    scores: RowScores
    against: Paired | None

    def to_dict(self) -> dict[str, Any]:
        against = self.against.to_dict() if self.against else None
        return {"name": self.name, "text": self.text, **self.scores.to_dict(), "against_soft": against}


@dataclass(frozen=True)
class Discretized:
    """text: the better one of the texts that were read off and searched, by the loss on the sample that the search saw.

    lines: the soft prompt first, then what it is compared with, on rows that the search did not see. ids: the tokens
    that were found. evaluations: how many texts the search scored.
    """

    text: str
    ids: list[int]
    lines: list[Line]
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        lines = [line.to_dict() for line in self.lines]
        return {"text": self.text, "ids": self.ids, "evaluations": self.evaluations, "lines": lines}


def discretize(
    backbone: Backbone,
    task: Task,
    prompt: SoftPrompt,
    *,
    candidates: int = 5,
    rounds: int = 2,
    rows: int = 64,
    test_rows: int | None = None,
    text: str | None = None,
    measure: str = "cosine",
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Stage | None = None,
) -> Discretized:
    """Turn a soft prompt into text, and compare.

    The search tries `candidates` nearest words (by `measure`) in the place of each token in turn, `rounds` times over
    or until nothing gets better, on `rows` training rows; rounds=0 only reads off. All are then scored on the test rows
    (at most `test_rows`). text: a hand-written prompt; by default the text that the prompt started from, if known.

    Raises ConfigError (a deep prompt has no place in the vocabulary; no rows), BackboneMismatchError.
    """
    backbone.check(prompt)
    if prompt.kind != "embedding":
        raise ConfigError("discretize: a deep prompt stands in no vocabulary; expected a prompt of kind embedding")
    template = task.template
    rest = task.test if len(task.test) else task.validation
    if not len(task.train) or not len(rest):
        raise ConfigError("discretize: needs rows to search on and others to score on; give a table to be divided")
    table = backbone.embedding_table()
    near = _candidates(prompt.vectors, table, backbone, candidates, measure)
    sample = task.train.take(rows, seed=seed)

    def stage(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    read = [row[0].id for row in near]
    ids, evaluations = search(backbone, sample, table, near, rounds, max_tokens, stage("search"))
    texts = {"nearest words": as_text(backbone, read)}
    if ids != read:
        texts["searched words"] = as_text(backbone, ids)
    best = min(texts, key=lambda name: _text_loss(backbone, sample, template, texts[name], max_tokens))
    scored = rest if test_rows is None else rest.take(test_rows, seed=seed)
    lines = _compare(backbone, scored, prompt, {**_others(prompt, text), **texts}, max_tokens, stage)
    return Discretized(texts[best], ids if best == "searched words" else read, lines, evaluations)


def _candidates(vectors: Tensor, table: Tensor, backbone: Backbone, count: int, measure: str) -> list[list[Neighbour]]:
    """The nearest ordinary tokens of each soft token, which can be typed: no special ones, no halves of characters."""
    ids = ordinary_tokens(table, backbone.tokenizer, table.shape[0], 1)
    if not ids:
        raise ConfigError("discretize: the vocabulary has no ordinary words")
    found = nearest_tokens(vectors, table[ids], None, count, measure)
    return [[Neighbour(as_text(backbone, [ids[w.id]]), ids[w.id], w.similarity) for w in row] for row in found]


def as_text(backbone: Backbone, ids: Sequence[int]) -> str:
    """The text of tokens, as one would type it."""
    return str(backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def search(
    backbone: Backbone,
    sample: Split,
    table: Tensor,
    near: Sequence[Sequence[Neighbour]],
    rounds: int,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], int]:
    """Greedy coordinate search: (token ids, texts scored). Starts at the nearest words; never ends with a higher loss.

    A text is scored as its tokens' own embeddings in the place of the soft tokens.
    """
    ids = [row[0].id for row in near]
    total = 1 + rounds * sum(len(row) - 1 for row in near)
    scored = 1

    def loss(tokens: Sequence[int]) -> float:
        return row_scores(backbone, sample, table[list(tokens)], max_tokens=max_tokens).main_loss

    if rounds == 0:
        return ids, 0
    best = loss(ids)
    for _ in range(rounds):
        before = list(ids)
        for place, row in enumerate(near):
            for word in row:
                if word.id == ids[place]:
                    continue
                tried = [*ids[:place], word.id, *ids[place + 1 :]]
                value = loss(tried)
                scored += 1
                if progress:
                    progress(min(scored, total), total)
                if value < best:
                    best, ids = value, tried
        if ids == before:
            break
    return ids, scored


def hard_template(template: Template, text: str) -> Template:
    """The template with `text` typed where its soft tokens stand; divided over the places if there are several."""
    places = max(1, template.soft_count)
    words = text.split(" ")
    sizes, parts, at = divide(len(words), places), [], 0
    for size in sizes:
        parts.append(" ".join(words[at : at + size]))
        at += size
    if template.unmarked:
        if template.input is not None:
            return replace(template, input=escape(text) + template.input, soft=False)
        (role, first), *others = template.chat or ()
        return replace(template, chat=((role, escape(text) + first), *others), soft=False)
    given = iter(parts)
    if template.input is not None:
        return replace(template, input=_typed(template.input, given), soft=False)
    return replace(template, chat=tuple((role, _typed(turn, given)) for role, turn in template.chat or ()), soft=False)


def _typed(text: str, given: Any) -> str:
    found = text.split(SOFT)
    return "".join(
        piece + (escape(next(given)) if number < len(found) - 1 else "") for number, piece in enumerate(found)
    )


def _others(prompt: SoftPrompt, text: str | None) -> dict[str, str]:
    """What the texts are compared with: nothing at all, and what a person wrote."""
    found = {"zero-shot (template alone)": ""}
    written = text if text is not None else written_text(prompt)
    return {**found, "hand-written text": written} if written else found


def _text_loss(backbone: Backbone, split: Split, template: Template, text: str, max_tokens: int | None) -> float:
    typed = replace(split, template=hard_template(template, text))
    return row_scores(backbone, typed, None, max_tokens=max_tokens).main_loss


def _compare(
    backbone: Backbone,
    split: Split,
    prompt: SoftPrompt,
    texts: dict[str, str],
    max_tokens: int | None,
    stage: Callable[[str], Callable[[int, int], None] | None],
) -> list[Line]:
    soft = row_scores(backbone, split, prompt.vectors, max_tokens=max_tokens, progress=stage("soft prompt"))
    lines = [Line("soft prompt", None, soft, None)]
    for name, text in texts.items():
        template = hard_template(split.template, text) if text else split.template.without_soft()
        scores = row_scores(
            backbone, replace(split, template=template), None, max_tokens=max_tokens, progress=stage(name)
        )
        lines.append(Line(name, text, scores, paired(soft, scores)))
    return lines
