"""Scores of generated texts against their references, each with an interval, in any script."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .intervals import Array, Interval, bootstrap, wilson
from .overlap import UNSPACED, normalise, rouge_l, token_f1, words

MIN_BLEU_TOKENS = 4


@dataclass(frozen=True)
class TextScores:
    """How close generated texts are to their references, over `rows` rows; the best reference of each row counts.

    exact_match, token_f1 and rouge_l are means in 0 to 1; chrf and bleu are sacrebleu's corpus scores in 0 to 100, with
    its signatures. bleu is None when no reference has four tokens: it would be 0 even for perfect answers.
    intervals: by name of the metric; Wilson's for exact_match, bootstraps over rows for the others.
    """

    rows: int
    exact_match: float
    token_f1: float
    rouge_l: float
    chrf: float | None
    bleu: float | None
    bits_per_token: float | None
    intervals: dict[str, Interval | None]
    signatures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as json would read it back."""
        return {"kind": "text", "metric": "rouge_l", "score": self.rouge_l, **json.loads(json.dumps(asdict(self)))}


def text_scores(
    predicted: Sequence[str], references: Sequence[Sequence[str]], bits_per_token: float | None = None, seed: int = 0
) -> TextScores:
    """Scores of texts [N] against one or more references each [N][*]; an empty prediction is an answer like another.

    Raises DataError when there are no rows, lengths differ, or a row has no reference.
    """
    _check_texts(predicted, references)
    values = np.array([_row_scores(text, choices) for text, choices in zip(predicted, references, strict=True)])
    exact, f1, rouge = values.T
    chrf, chrf_interval, chrf_signature = _sacrebleu("chrf", predicted, references, seed)
    bleu, bleu_interval, bleu_signature = _sacrebleu("bleu", predicted, references, seed)
    return TextScores(
        rows=len(predicted),
        exact_match=float(exact.mean()),
        token_f1=float(f1.mean()),
        rouge_l=float(rouge.mean()),
        chrf=chrf,
        bleu=bleu,
        bits_per_token=bits_per_token,
        intervals={
            "exact_match": wilson(int(exact.sum()), len(exact)),
            "token_f1": bootstrap(f1, seed=seed),
            "rouge_l": bootstrap(rouge, seed=seed),
            "chrf": chrf_interval,
            "bleu": bleu_interval,
        },
        signatures={"chrf": chrf_signature, "bleu": bleu_signature},
    )


def _check_texts(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not len(predicted):
        raise DataError("there are no rows to score: the split is empty; give a test file or a larger share")
    if len(predicted) != len(references):
        raise DataError(f"{len(predicted)} texts but references for {len(references)} rows: give one list for each row")
    for row, choices in enumerate(references):
        if isinstance(choices, str) or not choices:
            raise DataError(f"row {row} needs a list of at least one reference text, found {choices!r:.80}")


def _row_scores(text: str, references: Sequence[str]) -> tuple[float, float, float]:
    """(exact match, token F1, ROUGE-L) of one text, each with the reference that suits it best."""
    exact = float(normalise(text) in {normalise(reference) for reference in references})
    tokens, choices = words(text), [words(reference) for reference in references]
    return exact, max(token_f1(tokens, c) for c in choices), max(rouge_l(tokens, c) for c in choices)


def _sacrebleu(
    name: str, predicted: Sequence[str], references: Sequence[Sequence[str]], seed: int
) -> tuple[float | None, Interval | None, str]:
    """(corpus score in 0 to 100, bootstrap interval, signature).

    The resampling is ours, over the numbers that each row adds: sacrebleu's own tells only a mean and a half width.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    tokenizer = bleu_tokenizer(references)
    metric: Any = CHRF() if name == "chrf" else BLEU(tokenize=tokenizer, force=True)
    if name == "bleu" and not _long_enough(metric.tokenizer, references):
        return None, None, ""
    if name == "chrf" and not any("".join(choice.split()) for choices in references for choice in choices):
        return None, None, ""
    most = max(len(choices) for choices in references)
    streams = [[choices[i] if i < len(choices) else None for choices in references] for i in range(most)]
    stats = np.array(metric._extract_corpus_statistics(list(predicted), streams))  # [N, S], what each row adds

    def scores(sums: Array) -> Array:
        return np.array([metric._compute_score_from_stats(list(row)).score for row in sums])

    score = float(scores(stats.sum(axis=0, keepdims=True))[0])
    return score, bootstrap(stats, scores, seed=seed), str(metric.get_signature())


def _long_enough(tokenize: Any, references: Sequence[Sequence[str]]) -> bool:
    """Whether some reference has the four tokens that BLEU's longest n-gram needs."""
    return any(len(tokenize(choice).split()) >= MIN_BLEU_TOKENS for choices in references for choice in choices)


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """The sacrebleu tokenizer for the script of the references.

    `zh` where a fifth or more of the letters are Chinese characters and none kana, `char` for the other scripts written
    without spaces, `13a` (sacrebleu's default) for the rest.
    """
    letters = Counter(c for choices in references for choice in choices for c in choice if c.isalpha())
    scripts: Counter[str] = Counter()
    for character, number in letters.items():
        scripts[_script(character)] += number
    if 5 * (scripts["CJK"] + scripts["other"]) < letters.total() or not letters:
        return "13a"
    return "zh" if scripts["CJK"] > 19 * scripts["other"] else "char"


def _script(character: str) -> str:
    """CJK for Chinese characters, other for the further scripts without spaces, spaced for all the rest."""
    name = unicodedata.name(character, "")
    if name.startswith("CJK"):
        return "CJK"
    return "other" if name.startswith(UNSPACED) else "spaced"
