"""What the nearest words of a prompt mean: whether they are near, repeat, are clusters, survived, belong to the task.

The questions are those of Lester et al. 2021 (arXiv:2104.08691), section 7.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Split
from ..errors import ConfigError
from ..initialisers import label_texts
from ..markup import as_text
from ..prompt import SoftPrompt
from ..vocabulary import ordinary_tokens, text_ids, usable_rows
from .nearest import Neighbour, nearest_tokens

SAMPLE, ORDINARY = 200, 5_000
FREQUENT_WORDS = 200
_LETTERS = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Yardstick:
    """What "near" is worth, in one measure: each (low, median, high), the middle 90 % over a sample.

    words: from an ordinary word to the nearest other word. chance: from a soft token to an ordinary word by chance.
    """

    words: tuple[float, float, float]
    chance: tuple[float, float, float]


def yardstick(vectors: Tensor, table: Tensor, tokenizer: Any, measure: str, seed: int = 0) -> Yardstick | None:
    """Measured on up to 200 of the 5,000 most frequent ordinary words; None for a table with none."""
    ids = _sample(table, tokenizer, seed)
    if len(ids) < 2:
        return None
    near = nearest_tokens(table[ids], table, tokenizer, k=2, measure=measure)
    others = [[found for found in row if found.id != own] for own, row in zip(ids, near)]
    nearest = [row[0].similarity for row in others if row]
    by_chance = nearness(vectors, table[ids], measure).flatten()
    by_chance = by_chance[torch.isfinite(by_chance)]
    if not nearest or not by_chance.numel():
        return None
    return Yardstick(_middle(torch.tensor(nearest)), _middle(by_chance))


def _sample(table: Tensor, tokenizer: Any, seed: int) -> list[int]:
    try:
        ids = ordinary_tokens(table, tokenizer, ORDINARY, 2)
    except (AttributeError, TypeError, ConfigError):  # no tokenizer to tell words by, or nothing in the table
        ids = usable_rows(table).nonzero().flatten().tolist() if tokenizer is None else []
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    return [ids[i] for i in order.tolist()]


def nearness(a: Tensor, b: Tensor, measure: str) -> Tensor:
    """[M, H], [N, H] -> [M, N]: cosine, dot product or Euclidean distance; a cosine with length zero is NaN."""
    a, b = a.float(), b.float()
    if measure == "euclidean":
        return torch.cdist(a, b)
    dot = a @ b.T
    return dot if measure == "dot" else dot / (a.norm(dim=1)[:, None] * b.norm(dim=1))


def _middle(values: Tensor) -> tuple[float, float, float]:
    ordered = values.flatten().sort().values
    low, middle, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.05, 0.5, 0.95))
    return low, middle, high


@dataclass(frozen=True)
class Clusters:
    """Whether the neighbours of a soft token belong together (Lester et al. 2021, section 7).

    tightness: mean cosine between different neighbours of one soft token, mean over tokens; by_chance: the same of as
    many ordinary words by chance. same_stem: the share of neighbours that share their first four letters, whatever the
    case, with another neighbour of the same token ("Technology", "technologies").
    """

    tightness: float | None
    by_chance: float | None
    same_stem: float


def clusters(near: Sequence[Sequence[Neighbour]], table: Tensor, tokenizer: Any, seed: int = 0) -> Clusters:
    """Of the neighbours of each soft token, as `nearest_tokens` gives them."""
    tight = [value for row in near if (value := _tightness(table[[word.id for word in row]])) is not None]
    sample = _sample(table, tokenizer, seed)
    size = max((len(row) for row in near), default=0)
    groups = [sample[i : i + size] for i in range(0, len(sample) - size + 1, size)] if size > 1 else []
    chance = [value for group in groups if (value := _tightness(table[group])) is not None]
    shared = [_has_relative(word, row) for row in near for word in row]
    return Clusters(_mean(tight), _mean(chance), _mean([float(x) for x in shared]) or 0.0)


def _tightness(rows: Tensor) -> float | None:
    if len(rows) < 2:
        return None
    cosines = nearness(rows, rows, "cosine")
    return float(cosines[~torch.eye(len(rows), dtype=torch.bool)].mean())


def _has_relative(word: Neighbour, row: Sequence[Neighbour]) -> bool:
    stem = word.text.strip().lower()[:4]
    return len(stem) >= 3 and any(o.id != word.id and o.text.strip().lower()[:4] == stem for o in row)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Vocabulary:
    """Which of the nearest words repeat, survived from the initialiser, or belong to the task.

    repeated: (word, soft tokens near it) of words near more than one token. survived: (token, word) where the nearest
    word is still the one that the token started from; survived_share: of all tokens, None when the start is not known.
    labels, frequent: soft tokens with a label word, or a frequent word of the task's rows, among their neighbours
    (None: not known). distinct: different words among all neighbours, as a share.
    """

    repeated: list[tuple[str, list[int]]]
    survived: list[tuple[int, str]]
    survived_share: float | None
    labels: dict[str, list[int]] | None
    frequent: dict[str, list[int]] | None
    distinct: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def vocabulary(
    near: Sequence[Sequence[Neighbour]],
    prompt: SoftPrompt,
    table: Tensor,
    tokenizer: Any,
    initial: Tensor | None = None,
    data: Split | None = None,
) -> Vocabulary:
    """What the neighbours `near` of the soft tokens have to do with each other, the start and the task."""
    tokens_of: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for token, row in enumerate(near):
        for word in row:
            tokens_of.setdefault(word.id, []).append(token)
            texts[word.id] = word.text
    repeated = sorted(((texts[i], t) for i, t in tokens_of.items() if len(t) > 1), key=lambda pair: -len(pair[1]))
    survived, share = _survived(near, table, tokenizer, initial)
    count = sum(len(row) for row in near)
    return Vocabulary(
        repeated,
        survived,
        share,
        _labels(tokens_of, prompt, table, tokenizer),
        None if data is None else _by_text(near, frequent_words(data)),
        len(tokens_of) / count if count else 0.0,
    )


def _survived(
    near: Sequence[Sequence[Neighbour]], table: Tensor, tokenizer: Any, initial: Tensor | None
) -> tuple[list[tuple[int, str]], float | None]:
    if initial is None or len(initial) != len(near):
        return [], None
    starts = nearest_tokens(initial, table, tokenizer, k=1)
    pairs = [
        (token, now[0])
        for token, (now, then) in enumerate(zip(near, starts))
        if now and then and now[0].id == then[0].id
    ]
    return [(token, word.text) for token, word in pairs], len(pairs) / len(near)


def _labels(
    tokens_of: Mapping[int, list[int]], prompt: SoftPrompt, table: Tensor, tokenizer: Any
) -> dict[str, list[int]] | None:
    """Soft tokens near a token of each label word, written with and without the space before it."""
    if prompt.template is None or not prompt.template.labels or tokenizer is None:
        return None
    found = {}
    for word in label_texts(prompt.template):
        bare = word.strip()
        spelled = (word, bare, " " + bare, bare.capitalize(), " " + bare.capitalize(), bare.lower(), " " + bare.lower())
        ids = {i for text in spelled for i in text_ids(text, table, tokenizer)[:1] if _is_start(tokenizer, i, bare)}
        found[bare] = sorted({token for i in ids for token in tokens_of.get(i, ())})
    return found


def _is_start(tokenizer: Any, token: int, word: str) -> bool:
    """Whether a token is the word's beginning, and more than a letter or two of it."""
    text = str(tokenizer.decode([token])).strip().lower()
    return bool(text) and word.lower().startswith(text) and len(text) >= min(3, len(word))


def frequent_words(data: Split, most: int = FREQUENT_WORDS) -> list[str]:
    """The words of three letters or more that stand in most rows of the task, the most frequent first."""
    counts: Counter[str] = Counter()
    for row in data:
        texts = (as_text(row[name]) for name in data.template.fields)
        counts.update({word.lower() for text in texts for word in _LETTERS.findall(text)})
    return [word for word, count in counts.most_common(most) if count > 1]


def _by_text(near: Sequence[Sequence[Neighbour]], words: Sequence[str]) -> dict[str, list[int]]:
    wanted = set(words)
    found: dict[str, list[int]] = {}
    for token, row in enumerate(near):
        for word in {neighbour.text.strip().lower() for neighbour in row} & wanted:
            found.setdefault(word, []).append(token)
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))
