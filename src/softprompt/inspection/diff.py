"""`diff`: what is different in two versions of a prompt: vectors, template, making, and score with a paired test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..backbone import Backbone
from ..data import Split
from ..errors import ConfigError
from ..prompt import SoftPrompt, by_token
from .measuring import Paired, RowScores, paired, row_scores
from .nearest import nearest_tokens
from .sections import flat
from .similarity import matched

Stage = Callable[[str, int, int], None]
# Of the provenance these change with every run, and say nothing that the rest does not.
NOISE = ("made", "seconds", "run.data_sha256")


@dataclass
class Diff:
    """tokens: (P of A, P of B). pooled, matched: similarities, None for prompts of different shapes of token.

    moved: distance and cosine from A to B of each token, for prompts of one shape. words: (token, nearest word in A, in
    B) where these differ. template, made: (what, in A, in B) where these differ. a, b, test: scores on the rows, and
    the paired comparison (A is A).
    """

    names: tuple[str, str]
    tokens: tuple[int, int]
    kinds: tuple[str, str]
    equal: bool
    pooled: float | None
    matched: float | None
    norms: tuple[float, float]
    moved: list[tuple[float, float | None]] = field(default_factory=list)
    words: list[tuple[int, str, str]] = field(default_factory=list)
    template: list[tuple[str, str, str]] = field(default_factory=list)
    made: list[tuple[str, str, str]] = field(default_factory=list)
    a: RowScores | None = None
    b: RowScores | None = None
    test: Paired | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.names[0],
            "b": self.names[1],
            "tokens": self.tokens,
            "kinds": self.kinds,
            "equal_vectors": self.equal,
            "pooled_cosine": self.pooled,
            "matched_cosine": self.matched,
            "mean_norms": self.norms,
            "movement": [{"distance": d, "cosine": c} for d, c in self.moved],
            "nearest_words": [{"token": t, "a": a, "b": b} for t, a, b in self.words],
            "template": [{"what": what, "a": a, "b": b} for what, a, b in self.template],
            "made": [{"what": what, "a": a, "b": b} for what, a, b in self.made],
            "scores": None if self.a is None or self.b is None else {"a": self.a.to_dict(), "b": self.b.to_dict()},
            "test": self.test.to_dict() if self.test else None,
        }


def diff(
    a: SoftPrompt,
    b: SoftPrompt,
    backbone: Backbone | None = None,
    data: Split | None = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    max_tokens: int | None = None,
    progress: Stage | None = None,
) -> Diff:
    """Compare two prompts.

    backbone: for their nearest words. data: rows on which both are scored, each with its own template (that of the rows
    where it came without one), and compared by McNemar's test. Raises ConfigError (data without a backbone),
    BackboneMismatchError, DataError.
    """
    from .nearest import movement

    if data is not None and backbone is None:
        raise ConfigError("scoring two prompts on rows needs the model: give a backbone")
    one, two = by_token(a.vectors), by_token(b.vectors)
    alike = a.kind == b.kind and one.shape[1] == two.shape[1]
    found = Diff(
        names,
        (a.tokens, b.tokens),
        (a.kind, b.kind),
        a.vectors.shape == b.vectors.shape and bool((a.vectors == b.vectors).all()),
        _pooled(one, two) if alike else None,
        matched(one, two) if alike else None,
        (float(one.norm(dim=1).mean()), float(two.norm(dim=1).mean())),
        moved=movement(b.vectors, a.vectors),
        template=changes(_template(a), _template(b)),
        made=changes(_made(a), _made(b)),
    )
    if backbone is not None and alike and a.kind == "embedding" and a.width == backbone.width:
        found.words = _words(a, b, backbone)
    if data is not None and backbone is not None:
        found.a = _scores(backbone, data, a, names[0], max_tokens, progress)
        found.b = _scores(backbone, data, b, names[1], max_tokens, progress)
        found.test = paired(found.a, found.b)
    return found


def _pooled(one: Tensor, two: Tensor) -> float | None:
    x, y = one.mean(dim=0), two.mean(dim=0)
    length = float(x.norm() * y.norm())
    return float(x @ y) / length if length and math.isfinite(length) else None


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value in a, value in b) of all that differs; what is missing in one is an empty text."""
    one, two = dict(flat(a)), dict(flat(b))
    names = [*one, *(name for name in two if name not in one)]
    return [(name, one.get(name, ""), two.get(name, "")) for name in names if one.get(name) != two.get(name)]


def _template(prompt: SoftPrompt) -> dict[str, Any]:
    return prompt.template.to_dict() if prompt.template is not None else {}


def _made(prompt: SoftPrompt) -> dict[str, Any]:
    facts = {"base_model": prompt.base_model, "fingerprint": prompt.fingerprint, "metrics": prompt.metrics}
    settings = dict(flat({**facts, **prompt.provenance}))
    return {name: value for name, value in settings.items() if name not in NOISE and not name.endswith(".seconds")}


def _words(a: SoftPrompt, b: SoftPrompt, backbone: Backbone) -> list[tuple[int, str, str]]:
    table = backbone.embedding_table()
    pairs = zip(*(nearest_tokens(prompt.vectors, table, backbone.tokenizer, k=1) for prompt in (a, b)))
    return [(token, x[0].text, y[0].text) for token, (x, y) in enumerate(pairs) if x and y and x[0].id != y[0].id]


def _scores(
    backbone: Backbone, data: Split, prompt: SoftPrompt, name: str, max_tokens: int | None, progress: Stage | None
) -> RowScores:
    backbone.check(prompt)
    rows = replace(data, template=prompt.template or data.template)
    told = None if progress is None else (lambda done, total: progress(name, done, total))
    return row_scores(backbone, rows, prompt.vectors, max_tokens=max_tokens, progress=told)
