"""A deep prompt layer by layer: how large its keys and values are, how far they moved, and what the values say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import BackboneError
from .lens import value_words
from .nearest import Neighbour


@dataclass(frozen=True)
class DeepView:
    """norms: [L, 2, P], lengths of the keys and of the values of each token over all heads. moved: [L, 2, P], distance
    from the start as a share of the start's length, None if it is not known. words: L lists of P lists of words that
    the values push for, [] if the model's output layer could not be looked through."""

    norms: Tensor
    moved: Tensor | None
    words: list[list[list[Neighbour]]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "key_norms": self.norms[:, 0].tolist(),
            "value_norms": self.norms[:, 1].tolist(),
            "moved": None if self.moved is None else self.moved.tolist(),
            "value_words": [[[word._asdict() for word in row] for row in layer] for layer in self.words],
        }


def look_inside(
    vectors: Tensor, initial: Tensor | None, backbone: Backbone | None, k: int, notes: list[str]
) -> DeepView:
    """Look into a deep prompt [L, 2, K, P, D]; what cannot be told is added to `notes`."""
    norms = _norms(vectors)
    moved = None
    if initial is not None and initial.shape == vectors.shape:
        moved = _norms(vectors - initial) / _norms(initial).clamp_min(1e-12)
    words: list[list[list[Neighbour]]] = []
    if backbone is not None:
        try:
            words = value_words(backbone, vectors, k)
        except BackboneError as error:
            notes.append(f"words of the values: {error}")
    return DeepView(norms, moved, words)


def _norms(vectors: Tensor) -> Tensor:
    """[L, 2, K, P, D] -> [L, 2, P]."""
    squares: Tensor = vectors.square().sum(dim=(2, 4))
    return torch.sqrt(squares)
