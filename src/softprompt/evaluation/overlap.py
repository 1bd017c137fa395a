"""How much of a text another text has in common with it: token F1 and ROUGE-L, in any script."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

# Scripts written without spaces between words: one character is one token, as in multilingual question answering.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class _WordMap(dict[int, str]):
    """For str.translate: letters, digits and their marks stay, an unspaced script gets spaces, the rest is a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in "LMN":
            mapped = " "
        elif unicodedata.name(character, "").startswith(UNSPACED):
            mapped = f" {character} "
        else:
            mapped = character
        self[code] = mapped
        return mapped


_WORDS = _WordMap()


def normalise(text: str) -> str:
    """Text for exact match: Unicode NFC, no space around it, one space for any run of spaces. Case counts."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """Tokens for token F1 and ROUGE-L: NFKC, case folded, runs of letters, digits and combining marks.

    Scripts without spaces between words (Chinese, Japanese, Thai, ...) give one token a character. Punctuation and
    symbols are dropped, except that a text of nothing else ("+", "???") gives one token for each of its characters.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_WORDS).split() or list("".join(folded.split()))


def token_f1(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the tokens in common, each counted as often as it occurs (Rajpurkar et al. 2016, section 6.1).

    Two texts without tokens agree (1); one without tokens and one with some do not (0). Articles are kept, unlike in
    SQuAD's script, since what an article is depends on the language.
    """
    common = (Counter(predicted) & Counter(reference)).total()
    return _f1(common, len(predicted), len(reference))


def rouge_l(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F1: the longest common subsequence of tokens (Lin 2004, equations 2 to 4 with beta = 1)."""
    return _f1(common_subsequence(predicted, reference), len(predicted), len(reference))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): a column of the table of dynamic
    programming is one integer, so a row of thousands of tokens costs thousands, not millions, of steps.
    """
    places: dict[str, int] = {}
    for bit, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << bit
    full = (1 << len(first)) - 1
    column = full
    for token in second:
        matches = column & places.get(token, 0)
        column = (column + matches | column - matches) & full
    return len(first) - column.bit_count()


def _f1(common: int, predicted: int, reference: int) -> float:
    """2 |both| / (|predicted| + |reference|), the harmonic mean of precision and recall."""
    if predicted + reference == 0:
        return 1.0
    return 2 * common / (predicted + reference)
