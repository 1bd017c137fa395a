"""What the values of a deep prompt say, through the model's own output layer (logit lens).

A value that is attended to with weight one adds `o_proj(value)` to the residual stream of the answer's position. Read
through the final norm and the head, that gives the words that it pushes for if nothing later changed it: the logit
lens (nostalgebraist 2020) of an attention layer's output, as in Dar et al. 2022 (arXiv:2209.02535). It is a hint: later
layers do change it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import BackboneError
from .nearest import Neighbour, token_text

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")  # what architectures call the projection out of the heads
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class Parts(NamedTuple):
    """The modules that the lens goes through: one projection out of the heads a layer, and the final norm."""

    outputs: list[nn.Module]
    norm: nn.Module
    after: nn.Module | None  # OPT's projection to the width of its embeddings


def find_parts(backbone: Backbone) -> Parts:
    """Raises BackboneError, saying what was not found, for an architecture that names its parts otherwise."""
    body: Any = backbone.model.base_model
    layers, _, heads_size = backbone.state_shape
    heads = int(getattr(backbone.text_config, "num_attention_heads", None) or 0)
    outputs = [
        module
        for name, module in body.named_modules()
        if name.rpartition(".")[2] in OUTPUTS and "attn" in name.rpartition(".")[0].rpartition(".")[2].lower()
    ]
    if len(outputs) != layers or not heads or any(_inputs(module) != heads * heads_size for module in outputs):
        raise BackboneError(
            f"{backbone.name} ({type(backbone.model).__name__}): the projection out of the attention heads was not "
            "found, so what the values of a deep prompt say cannot be shown"
        )
    stack = getattr(body, "decoder", body)
    norm = next((getattr(stack, name) for name in NORMS if getattr(stack, name, None) is not None), None)
    if norm is None:
        raise BackboneError(
            f"{backbone.name} ({type(backbone.model).__name__}): the final norm was not found, so what the values of a "
            "deep prompt say cannot be shown"
        )
    return Parts(outputs, norm, getattr(stack, "project_out", None))


def _inputs(module: Any) -> int:
    weight = module.weight  # a linear layer's is [out, in], GPT-2's Conv1D's [in, out]
    return int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1])


@torch.no_grad()
def value_logits(backbone: Backbone, vectors: Tensor, layer: int, parts: Parts | None = None) -> Tensor:
    """Logits [P, V] of what the values of a deep prompt [L, 2, K, P, D] in `layer` add. Raises BackboneError."""
    parts = parts or find_parts(backbone)
    heads = int(backbone.text_config.num_attention_heads)
    values = vectors[layer, 1].to(backbone.device, backbone.dtype)  # [K, P, D]
    values = values.repeat_interleave(heads // values.shape[0], dim=0)  # [heads, P, D]
    joined = values.transpose(0, 1).flatten(1)  # [P, heads * D]
    output: Any = parts.outputs[layer]
    added = output(joined)
    if getattr(output, "bias", None) is not None:
        added = added - output.bias  # it is added whatever is attended to
    hidden = parts.norm(added)
    if parts.after is not None:
        hidden = parts.after(hidden)
    return backbone.head(hidden).float().cpu()


def value_words(backbone: Backbone, vectors: Tensor, k: int = 5) -> list[list[list[Neighbour]]]:
    """The k words that each layer's values push for most: L lists of P lists; similarity is the logit.

    Raises BackboneError.
    """
    parts = find_parts(backbone)
    found = []
    for layer in range(vectors.shape[0]):
        logits = value_logits(backbone, vectors, layer, parts)[:, : len(backbone.tokenizer)]
        values, ids = logits.topk(min(k, logits.shape[1]), dim=1)
        found.append(
            [
                [Neighbour(token_text(backbone.tokenizer, token), token, value) for token, value in zip(row, scores)]
                for row, scores in zip(ids.tolist(), values.tolist())
            ]
        )
    return found
