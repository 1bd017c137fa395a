"""What the vectors of a prompt stand next to: the nearest words of the vocabulary, and how long its words are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..prompt import by_token

MEASURES = ("cosine", "dot", "euclidean")
VECTORS_AT_ONCE = 64  # bounds the [rows, V] block of similarities to some tens of megabytes


class Neighbour(NamedTuple):
    """A vocabulary token near a soft token. similarity: in the measure asked for (euclidean: the distance)."""

    text: str
    id: int
    similarity: float


def nearest_tokens(
    vectors: Tensor, table: Tensor, tokenizer: Any, k: int = 5, measure: str = "cosine"
) -> list[list[Neighbour]]:
    """The k vocabulary tokens nearest to each soft token, nearest first: vectors [P, H], table [V, H] -> P lists.

    Rows of the table that no text can give are left out: those beyond the tokenizer's vocabulary (padding of the table)
    and, for the cosine, those of length zero. A soft token of length zero has no direction, hence no neighbours by
    cosine. Raises ValueError for another measure or a table of another width.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, found {measure!r}")
    if vectors.ndim != 2 or table.ndim != 2 or vectors.shape[1] != table.shape[1]:
        raise ValueError(f"vectors {list(vectors.shape)} and table {list(table.shape)} must be [P, H] and [V, H]")
    rows = table[: _usable(tokenizer, table.shape[0])].detach().float()
    lengths = rows.norm(dim=1)  # [V]
    return [
        [Neighbour(token_text(tokenizer, token), token, value) for token, value in found]
        for block in vectors.detach().split(VECTORS_AT_ONCE)
        for found in _nearest(block.to(rows.device, torch.float32), rows, lengths, k, measure)
    ]


def _usable(tokenizer: Any, rows: int) -> int:
    return min(rows, len(tokenizer)) if tokenizer is not None else rows


def _nearest(block: Tensor, rows: Tensor, lengths: Tensor, k: int, measure: str) -> list[list[tuple[int, float]]]:
    """(id, similarity) of the k nearest rows [V, H] for each vector [n, H] of the block."""
    dot = block @ rows.T  # [n, V]
    own = block.norm(dim=1, keepdim=True)  # [n, 1]
    if measure == "cosine":
        nearness = (dot / (own * lengths)).masked_fill(~((own * lengths) > 0), -torch.inf)
    elif measure == "euclidean":
        nearness = -(own.square() + lengths.square() - 2 * dot).clamp_min(0).sqrt()
    else:
        nearness = dot
    values, ids = nearness.topk(min(k, rows.shape[0]), dim=1)
    sign = -1.0 if measure == "euclidean" else 1.0
    return [
        [(token, sign * value) for token, value in zip(row_ids, row_values) if value > -torch.inf]
        for row_ids, row_values in zip(ids.tolist(), values.tolist())
    ]


def token_text(tokenizer: Any, token: int) -> str:
    """What the token stands for in a text, its leading space included; its raw name where it is no whole character."""
    if tokenizer is None:
        return f"#{token}"
    raw = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        return raw
    return " " + text if raw.startswith("\u2581") and not text.startswith(" ") else text  # sentencepiece drops it


class Lengths(NamedTuple):
    """Lengths (Euclidean norms) of the vocabulary's vectors: the mean, and the middle 90 % of them."""

    mean: float
    low: float
    high: float


def vocabulary_lengths(table: Tensor) -> Lengths:
    """How long ordinary word vectors are: table [V, H]; rows of zeros (padding of the table) do not count."""
    lengths = table.detach().float().norm(dim=1)
    lengths = lengths[lengths > 0]
    if not lengths.numel():
        return Lengths(0.0, 0.0, 0.0)
    ordered = lengths.sort().values  # torch.quantile refuses more than 16 million numbers, a sort does not
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.05, 0.95))
    return Lengths(float(lengths.mean()), low, high)


def movement(vectors: Tensor, initial: Tensor | None) -> list[tuple[float, float | None]]:
    """(distance, cosine) of each soft token from where it started; [] when that is not known or of other shape.

    [P, H], or a deep prompt [L, 2, K, P, D], of which all numbers of a token count together.

    The cosine is None where one of both has length zero.
    """
    if initial is None or initial.shape != vectors.shape:
        return []
    now, then = by_token(vectors).detach().float().cpu(), by_token(initial).detach().float().cpu()
    distances = (now - then).norm(dim=1).tolist()
    lengths = (now.norm(dim=1) * then.norm(dim=1)).tolist()
    dots = (now * then).sum(dim=1).tolist()
    return [(d, dot / length if length else None) for d, dot, length in zip(distances, dots, lengths)]
