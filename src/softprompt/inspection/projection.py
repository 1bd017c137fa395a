"""Prompts and vocabulary in two dimensions: principal components of their directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..vocabulary import ordinary_tokens, usable_rows
from .nearest import token_text

Array = NDArray[Any]
WORDS, ORDINARY = 500, 5_000


@dataclass(frozen=True)
class Projection:
    """prompts: [P, 2] by name. words: [N, 2] of the sample of the vocabulary, word_texts what they are.

    explained: the shares of all variance that the two axes show; what they do not show is most of it, usually.
    """

    prompts: dict[str, Array]
    words: Array
    word_texts: list[str]
    explained: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": {name: points.tolist() for name, points in self.prompts.items()},
            "explained": self.explained,
            "words": [[text, *point] for text, point in zip(self.word_texts, self.words.tolist())],
        }


def project(
    prompts: Mapping[str, Tensor], table: Tensor | None = None, tokenizer: Any = None, seed: int = 0
) -> Projection | None:
    """Prompts [P, H] of one width, with up to 500 of the 5,000 most frequent ordinary words of `table` [V, H].

    Every vector is taken at length one, so that only directions count; the mean is taken off; prompts and words weigh
    equally, however many they are; the axes are the first two principal components. Signs are fixed, so that the same
    input gives the same picture. None where there are fewer than three vectors or no variance.
    """
    ids = _sample(table, tokenizer, seed) if table is not None else []
    soft = torch.cat([_unit(vectors) for vectors in prompts.values()])
    words = _unit(table[ids]) if table is not None and ids else soft.new_zeros(0, soft.shape[1])
    points = torch.cat([soft, words]).double()
    if len(points) < 3:
        return None
    weights = torch.cat([torch.full((len(part),), 1 / len(part)) for part in (soft, words) if len(part)]).double()
    weights = weights / weights.sum()
    centred = points - (weights[:, None] * points).sum(dim=0)
    _, sizes, axes = torch.linalg.svd(centred * weights.sqrt()[:, None], full_matrices=False)
    if not float(sizes[0]) > 1e-9:
        return None
    axes = axes[:2] * torch.sign(axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)))
    flat = (centred @ axes.T).numpy()  # [M, 2]
    share = (sizes.square() / sizes.square().sum())[:2].tolist()
    found, at = {}, 0
    for name, vectors in prompts.items():
        found[name] = flat[at : at + len(vectors)]
        at += len(vectors)
    texts = [token_text(tokenizer, token) for token in ids]
    return Projection(found, flat[at:], texts, (share[0], share[1] if len(share) > 1 else 0.0))


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.detach().float().cpu()
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _sample(table: Tensor, tokenizer: Any, seed: int) -> list[int]:
    try:
        ids = ordinary_tokens(table, tokenizer, ORDINARY, 2)
    except (AttributeError, TypeError, ConfigError):
        ids = usable_rows(table).nonzero().flatten().tolist() if tokenizer is None else []
    chosen = np.random.default_rng(seed).permutation(len(ids))[:WORDS]
    return [ids[i] for i in sorted(chosen.tolist())]
