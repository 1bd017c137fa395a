"""Which rows of an embedding table stand for ordinary text, and how their numbers are spread.

`table` is [V, H]. Rows that no text uses may hold zeros or NaN; nothing here lets such a row through.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

_ROWS_AT_ONCE = 8_192  # bounds the memory for tables of a quarter of a million rows
_UNUSED = re.compile(
    r"<0x[0-9A-Fa-f]{2}>|[<\[]/?(\|.*\||(unused|reserved|extra_id|madeupword|special|dummy|pad).*)[>\]]", re.I
)


def ordinary_tokens(table: Tensor, tokenizer: Any, most: int, least: int = 1) -> list[int]:
    """Ids of up to `most` ordinary tokens, lowest first: words and word pieces, no special, added, byte or unused ones.

    Where fewer than `least` are words (a tiny vocabulary), punctuation and single characters are taken as well.
    """
    excluded = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    words: list[int] = []
    others: list[int] = []
    alive = usable_rows(table)
    for number in range(min(table.shape[0], len(tokenizer))):
        if len(words) == most:
            break
        if number in excluded or not alive[number]:
            continue
        text = _text(number, tokenizer)
        if text is not None:
            (words if _is_word(text) else others).append(number)
    return words if len(words) >= least else (words + others)[:most]


def usable_rows(table: Tensor) -> Tensor:
    """True for the rows of the table [V, H] that hold a trained embedding: finite, and not (nearly) zero; bool [V]."""
    norms = torch.cat([rows.float().norm(dim=1) for rows in torch.split(table, _ROWS_AT_ONCE)])  # [V]; NaN stays NaN
    usable = torch.isfinite(norms) & (norms > 0)
    if not bool(usable.any()):
        raise ConfigError("the model's embedding table holds no usable row: its weights are damaged")
    return usable & (norms > 1e-3 * norms[usable].median())


def text_ids(text: str, table: Tensor, tokenizer: Any) -> list[int]:
    """The token ids of `text` without special ones and without those whose row is missing, zero or not finite."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [number for number in ids if number not in special and number < table.shape[0]]
    norms = table[ids].float().norm(dim=1).tolist()
    return [number for number, norm in zip(ids, norms) if 0 < norm < math.inf]


def mean_and_spread(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [H] over the usable rows, summed in float64, some rows at a time."""
    alive = usable_rows(table)
    parts = [(rows, use) for rows, use in zip(torch.split(table, _ROWS_AT_ONCE), torch.split(alive, _ROWS_AT_ONCE))]
    count = int(alive.sum())
    mean = sum((rows[use].double().sum(dim=0) for rows, use in parts), torch.zeros(table.shape[1], dtype=torch.float64))
    mean = mean / count
    squares = sum(((rows[use].double() - mean).square().sum(dim=0) for rows, use in parts), torch.zeros_like(mean))
    return mean.float(), (squares / count).sqrt().float()


def _text(number: int, tokenizer: Any) -> str | None:
    """The text of a token, None when it has none of its own (a byte of a character, a control or a place holder)."""
    piece = tokenizer.convert_ids_to_tokens(number)
    if not piece or _UNUSED.fullmatch(piece):
        return None
    text = str(tokenizer.decode([number])).strip().removeprefix("##")
    return text if text and text.isprintable() and "\ufffd" not in text and not _UNUSED.fullmatch(text) else None


def _is_word(text: str) -> bool:
    """Letters, and more than one of them: byte-pair vocabularies begin with all single ones, frequent or not."""
    return any(character.isalpha() for character in text) and (len(text) > 1 or not text.isascii())
