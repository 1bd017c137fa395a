"""vLLM without a new model: a text and a prompt as the embeddings that its API takes (`prompt_embeds`).

The rules are those of vLLM's own loader, `safe_load_prompt_embeds`: strict base64 of what `torch.save` writes, read
with `weights_only=True`, dense, two dimensions, the model's hidden size, a floating-point type (it is cast to the
server's). That format is a pickle; it is written here because nothing else is accepted, and never read.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backbone import Backbone
from ..encoding import Encoder
from ..errors import BackboneError, ConfigError, DataError
from ..placement import embed_with_soft
from ..prompt import SoftPrompt
from .folder import new_file
from .usage import WITHOUT_TEMPLATE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Payload:
    """path: the JSON body for POST /v1/completions. tokens: rows of the embeddings. characters: of their base64."""

    path: Path
    tokens: int
    characters: int


def prompt_embeds(backbone: Backbone, prompt: SoftPrompt, row: Mapping[str, Any], *, force: bool = False) -> str:
    """What vLLM's `prompt_embeds` takes for `prompt` and one row of fields, in the model's precision.

    Raises as `embedded_row`.
    """
    return encode(embedded_row(backbone, prompt, row, force=force))


@torch.no_grad()
def embedded_row(
    backbone: Backbone, prompt: SoftPrompt, row: Mapping[str, Any], *, force: bool = False
) -> torch.Tensor:
    """The whole context of one row of fields as embeddings, soft tokens in their places: [T, H].

    Raises BackboneMismatchError, ConfigError (a deep prompt:
    its keys and values are no embeddings), BackboneError (a model whose embeddings are not as wide as its layers, which
    vLLM compares), DataError (a missing field).
    """
    if prompt.kind != "embedding":
        raise ConfigError(f"a {prompt.kind} prompt has keys and values in each layer, which prompt_embeds cannot hold")
    backbone.check(prompt, force=force)
    hidden = int(backbone.text_config.hidden_size)
    if hidden != backbone.width:
        raise BackboneError(
            f"{backbone.name} has embeddings of width {backbone.width} and layers of width {hidden}; vLLM takes only "
            "embeddings of the layers' width"
        )
    template = prompt.template or WITHOUT_TEMPLATE
    missing = [name for name in template.fields if name not in row]
    if missing:
        raise DataError(f"the prompt's template needs '{missing[0]}'; given: {', '.join(sorted(row)) or 'nothing'}")
    ids = Encoder(template, backbone.tokenizer, prompt.tokens, backbone.context_length).context(row, 1).ids
    line = torch.tensor(ids, device=backbone.device)
    return embed_with_soft(line, prompt.vectors.to(backbone.device), backbone.embed)


def encode(rows: torch.Tensor) -> str:
    """Rows [T, H] as vLLM reads them; also what a `prompt_embeds` part of a chat message holds in `data`."""
    dense = rows.detach().to("cpu", rows.dtype if rows.dtype in DTYPES.values() else torch.float32)
    buffer = io.BytesIO()
    torch.save(dense.contiguous().clone(), buffer)  # a clone: torch.save would write all that a view looks into
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def export_vllm(
    backbone: Backbone,
    prompt: SoftPrompt,
    row: Mapping[str, Any],
    out: str | Path,
    *,
    max_new_tokens: int = 64,
    force: bool = False,
) -> Payload:
    """Write the body of a request to vLLM's /v1/completions for `prompt` and one row of fields into the file `out`.

    The server must run the same model with --enable-prompt-embeds. Raises as `prompt_embeds`, and OutputError when
    `out` is there already.
    """
    rows = embedded_row(backbone, prompt, row, force=force)
    data = encode(rows)
    body = {
        "model": backbone.name,
        "prompt_embeds": data,
        "max_tokens": max_new_tokens,
        "temperature": 0,
    }
    with new_file(out) as temporary:
        temporary.write_text(json.dumps(body) + "\n", encoding="ascii")
    return Payload(Path(out), len(rows), len(data))
