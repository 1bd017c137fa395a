"""Moving keys along the sequence: what a deep prompt needs to stand anywhere but at the very front.

A deep prompt keeps its keys as the model caches them at positions 0 to P - 1. Rotary embeddings (Su et al. 2021,
arXiv:2104.09864) turn a key by an angle for each position, and turns add up, so the same keys at positions o to
o + P - 1 are those turned once more by position o. Learned positions are added to the embeddings and leave keys alone.
Which of the two a model does is found out by looking and trying: a single token's key at position 0, turned by o, must
be the key that the model itself caches at o.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import Pass, States
from .errors import BackboneError

if TYPE_CHECKING:
    from .backbone import Backbone

_TRIED_AT = (1, 7)


def moved(backbone: Backbone, states: States, offsets: torch.Tensor) -> States:
    """`states` of P tokens at positions 0.. as they are at positions offsets[r]..

    L times [1 or R, K, P, D] -> [R, K, P, D]. offsets: [R] whole numbers. Differentiable. Raises BackboneError for a
    model whose keys cannot be moved.
    """
    if bool((offsets == 0).all()):
        return states.expanded(len(offsets))
    if not can_move(backbone):
        raise BackboneError(
            f"{backbone.name} does not turn its keys by position as rotary embeddings do: a deep prompt can only stand "
            "at the very front there; put {soft} first in the template, or tune an embedding prompt"
        )
    return _moved(backbone, states, offsets)


def _moved(backbone: Backbone, states: States, offsets: torch.Tensor) -> States:
    keys = [
        turned_by(backbone, layer, key, offsets).expand(len(offsets), -1, -1, -1)
        for layer, key in enumerate(states.keys)
    ]
    values = [value.expand(len(offsets), -1, -1, -1) for value in states.values]
    return States(keys, values)


def turned_by(backbone: Backbone, layer: int, states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Keys or queries [1 or R, heads, N, D] of a layer as they are offsets[r] positions further on (or back):
    [R, heads, N, D], or as they are where the model turns none."""
    turn = _turn(backbone, layer, states, offsets)
    return states if turn is None else _turned(states, *turn)


def can_move(backbone: Backbone) -> bool:
    """Whether `moved` gives this model's own keys; tried once."""
    known: bool | None = getattr(backbone, "_keys_move", None)
    if known is None:
        known = backbone.fast and (_learned_positions(backbone) or _try(backbone))
        backbone._keys_move = known  # type: ignore[attr-defined]
    return known


def _learned_positions(backbone: Backbone) -> bool:
    """Whether positions are added to the embeddings and nowhere else."""
    body = backbone.model.base_model
    if any("rotary" in name for name, _ in body.named_modules()):
        return False
    return any(isinstance(m, torch.nn.Embedding) and m is not backbone.embed for m in body.modules())


@torch.no_grad()
def _try(backbone: Backbone) -> bool:
    # One token alone attends to itself only, so its hidden states are the same wherever it stands, and its keys differ
    # in all layers by their position alone.
    noise = torch.randn(1, backbone.width, generator=torch.Generator().manual_seed(0)) * backbone.embedding_rms
    noise = noise.to(backbone.device, backbone.dtype)
    try:
        at_0 = _keys_at(backbone, noise, 0)
        for place in _TRIED_AT:
            ours = _moved(backbone, at_0, torch.tensor([place], device=backbone.device))
            theirs = _keys_at(backbone, noise, place)
            for mine, model in zip(ours.keys, theirs.keys, strict=True):
                tolerance = 1e-4 if backbone.dtype in (torch.float32, torch.float64) else 0.02
                if not (mine - model).abs().max() <= tolerance * model.abs().max():
                    return False
    except (TypeError, AttributeError, RuntimeError, ValueError):  # rotary embeddings of another kind
        return False
    return True


def _keys_at(backbone: Backbone, noise: torch.Tensor, place: int) -> States:
    rows = Pass([1], record=True, device=backbone.device)
    backbone.hidden(noise, torch.tensor([place], device=backbone.device), rows)
    return rows.states()


def _turn(
    backbone: Backbone, layer: int, key: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines [R, 1, 1, D or fewer] of the turn to `offsets` in a layer; None if the model turns no keys."""
    rotary: Any = getattr(backbone.model.base_model, "rotary_emb", None)
    if rotary is None:
        return None
    types = getattr(backbone.text_config, "layer_types", None)
    kind = (types[layer],) if types and hasattr(rotary, f"{types[layer]}_inv_freq") else ()
    cos, sin = rotary(key, offsets[:, None], *kind)  # [R, 1, D]
    scale = getattr(rotary, f"{kind[0]}_attention_scaling" if kind else "attention_scaling", 1.0)  # it is in the key
    return cos[:, None] / scale, sin[:, None] / scale


def _turned(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]  # some models turn a part of each key only
    turning, still = key[..., :size], key[..., size:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned
