"""Where the answer looks: attention from the answer's position to each soft token, by layer.

The last token of a row's context is the one whose state gives the answer's first token. Its attention is computed by
transformers' own eager attention, on the plain path, row by row: everything before it goes into the model's own cache,
and it alone is asked for its attention, so memory never holds a whole T by T map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import one_at_a_time
from ..backbone import Backbone, _softmax_in_float64
from ..computation import deep_states, is_deep, prompt_length
from ..data import Split
from ..errors import BackboneError, DataError, TemplateError
from ..evaluation.runner import make_encoder
from ..placement import embed_with_soft, first_soft
from ..rotary import moved
from .measuring import Progress


@dataclass(frozen=True)
class Attention:
    """tokens: [L, P], the share of the attention that each soft token gets, mean over heads and rows.

    heads: [L, heads, P], the same for each head. fair: the share of a token were attention even, mean over rows. rows:
    how many were looked at.
    """

    tokens: Tensor
    heads: Tensor
    fair: float
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.tokens.tolist(), "even_share": self.fair, "rows": self.rows}


@torch.no_grad()
def answer_attention(
    backbone: Backbone,
    split: Split,
    vectors: Tensor,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Attention:
    """Attention from the answer's position to each soft token over all rows of `split`.

    Raises DataError (no rows), BackboneError where the model has no attention weights to show.
    """
    if not len(split):
        raise DataError(f"the {split.name} split has no rows to look at; give a file for it, or a share")
    encoder = make_encoder(backbone, split.template, prompt_length(vectors), max_tokens)
    total: Tensor | None = None
    fair = 0.0
    for number, fields in enumerate(split):
        ids = encoder.context(fields).ids
        weights = last_attention(backbone, ids, vectors)  # [L, heads, T]
        places = sorted((i for i, token in enumerate(ids) if token < 0), key=lambda i: -ids[i])
        found = weights[:, :, places].double()
        total = found if total is None else total + found
        fair += 1 / len(ids)
        if progress:
            progress(number + 1, len(split))
    assert total is not None
    mean = total / len(split)
    return Attention(mean.mean(dim=1).float(), mean.float(), fair / len(split), len(split))


@torch.no_grad()
def last_attention(backbone: Backbone, ids: tuple[int, ...], vectors: Tensor | None) -> Tensor:
    """Attention of the last of `ids` to all of them, by transformers' eager attention: [L, heads, T].

    A layer with a sliding window gives nothing to what lies outside it. Raises BackboneError.
    """
    line = torch.tensor(ids, device=backbone.device)[None]
    places = torch.arange(len(ids), device=backbone.device)[None]
    soft = None if is_deep(vectors) or vectors is None else vectors.to(backbone.device)
    try:
        with one_at_a_time, _eager(backbone.model):
            cache, done = _deep_cache(backbone, ids, vectors) if vectors is not None and is_deep(vectors) else (None, 0)
            if done < len(ids) - 1:
                before = embed_with_soft(line[:, done:-1], soft, backbone.embed)
                cache = _call(backbone, before, places[:, done:-1], cache, use_cache=True).past_key_values
            last = embed_with_soft(line[:, -1:], soft, backbone.embed)
            out = _call(backbone, last, places[:, -1:], cache, use_cache=True, output_attentions=True)
    except (TypeError, AttributeError) as error:
        raise BackboneError(f"{backbone.name} does not show its attention ({error})") from error
    if not out.attentions or any(layer is None for layer in out.attentions):
        raise BackboneError(f"{backbone.name} has layers without attention weights: they cannot be shown")
    return torch.stack([_whole(layer[0, :, -1].cpu(), len(ids)) for layer in out.attentions])


def _deep_cache(backbone: Backbone, ids: tuple[int, ...], vectors: Tensor) -> tuple[Any, int]:
    """The model's own cache with what stands before a deep prompt and the prompt itself, and how many ids these are."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    start = first_soft(ids)
    if start:
        line = torch.tensor(ids[:start], device=backbone.device)[None]
        place = torch.arange(start, device=backbone.device)[None]
        cache = _call(backbone, backbone.embed(line), place, cache, use_cache=True).past_key_values
    states = moved(backbone, deep_states(backbone, vectors), torch.tensor([start], device=backbone.device))
    for layer, (key, value) in enumerate(zip(states.keys, states.values, strict=True)):
        cache.update(key, value, layer)
    end = start + prompt_length(vectors)
    if end >= len(ids):
        raise TemplateError(
            "a deep prompt has no token of its own to answer from: put text between {soft} and the answer"
        )
    return cache, end


def _call(backbone: Backbone, embeddings: Tensor, place: Tensor, cache: Any, **more: Any) -> Any:
    given: dict[str, Any] = {"inputs_embeds": embeddings, "past_key_values": cache, **more}
    if backbone._takes_positions:
        given["position_ids"] = place
    given["attention_mask"] = torch.ones(1, int(place[0, -1]) + 1, dtype=torch.long, device=backbone.device)
    return backbone.model(**given)


def _whole(weights: Tensor, size: int) -> Tensor:
    """[heads, T or fewer] -> [heads, T]: a window's cache keeps the latest tokens only."""
    missing = size - weights.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(weights, (missing, 0))
    return weights[:, -size:]


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Within it the model computes its attention by transformers' eager functions, which return the weights."""
    config = model.config
    before = config._attn_implementation
    precise = next(model.parameters()).dtype == torch.float64
    config._attn_implementation = "eager"
    try:
        with _softmax_in_float64() if precise else nullcontext():
            yield
    finally:
        config._attn_implementation = before
