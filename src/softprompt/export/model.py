"""Soft prompts as vocabulary of a copy of the model, for every engine that takes tokens."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backbone import Backbone
from ..encoding import Encoder
from ..errors import BackboneError
from ..placement import embed_with_soft
from .collect import Prompts, check_new, check_one_model, collect, needs_embeddings
from .folder import new_folder
from .tokens_file import save_tokenizer
from .usage import template_of, usage
from .vocabulary import MANIFEST, Entry, input_rows, make_entries, unlikely_row


@dataclass(frozen=True)
class VocabularyExport:
    """path: what was written. prompts: how each is written in a text (see usage.py). vocabulary: rows of the table."""

    path: Path
    prompts: list[dict[str, Any]]
    vocabulary: int


def export_model(
    backbone: Backbone,
    prompts: Prompts,
    out: str | Path,
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> VocabularyExport:
    """Write a copy of the model with P more tokens for each prompt into the folder `out`, for any engine.

    prompts: see `collect`. `<|NAME|>`, written once, stands for the whole prompt. The new tokens are suppressed in
    generation_config.json, and their output rows never win (see `vocabulary.unlikely_row`). Tied embeddings are
    untied. `backbone` is not changed. `softprompt_export.json` says how each prompt is written.
    Raises ConfigError (names, deep prompts), BackboneMismatchError, BackboneError, OutputError (`out` is not empty).
    """
    made = collect(prompts)
    check_new(Path(out), "folder")
    check_for(backbone, made, force)
    entries = make_entries(made, backbone.tokenizer)
    report(f"{len(entries)} prompts, {sum(len(entry.ids) for entry in entries)} new tokens")
    model = extended_copy(backbone, entries)
    check_copy(backbone, model, entries)
    with new_folder(out) as temporary:
        report(f"writing the model to {out}")
        model.save_pretrained(str(temporary))
        tokenizer, named = save_tokenizer(backbone.tokenizer, entries, temporary)
        said = [usage(entry, backbone.tokenizer, tokenizer, named) for entry in entries]
        write_manifest(temporary / MANIFEST, backbone, said)
    for each in said:
        report(f"{each['name']}: {json.dumps(each['text'], ensure_ascii=False) if each['text'] else 'by its ids'}")
    return VocabularyExport(Path(out), said, model.get_input_embeddings().weight.shape[0])


def check_for(backbone: Backbone, prompts: dict[str, Any], force: bool) -> None:
    """Raise the errors of prompts that cannot become vocabulary of this model."""
    needs_embeddings(prompts, "a token of the vocabulary")
    if not force:
        check_one_model(prompts)
    for prompt in prompts.values():
        backbone.check(prompt, force=force)


@torch.no_grad()
def extended_copy(backbone: Backbone, entries: Sequence[Entry]) -> Any:
    """A model with the prompts' rows in its tables. It shares all other weights with `backbone.model`."""
    source = backbone.model
    shared = {id(tensor): tensor for tensor in itertools.chain(source.parameters(), source.buffers())}
    model = copy.deepcopy(source, shared)
    row, bias = unlikely_row(backbone)
    size = max(backbone.vocab_size, entries[-1].ids[-1] + 1)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    fresh = torch.arange(entries[0].first, entries[-1].ids[-1] + 1, device=backbone.device)
    table.weight = _grown(table.weight, size, fresh, input_rows(backbone, entries))
    head.weight = _grown(head.weight, size, fresh, row.expand(len(fresh), -1))
    if bias is not None:
        head.bias = _grown(head.bias, size, fresh, bias.expand(len(fresh)))
    table.num_embeddings = head.out_features = size
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.vocab_size, config.tie_word_embeddings = size, False
    model.all_tied_weights_keys = {}  # what was tied is two tables now
    silent = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*silent, *fresh.tolist()})
    return model


def _grown(weight: torch.Tensor, size: int, fresh: torch.Tensor, rows: torch.Tensor) -> torch.nn.Parameter:
    """A copy of `weight` [V, ...] with `size` rows, `rows` at the ids `fresh`; rows of no token are zero."""
    grown = weight.new_zeros((size, *weight.shape[1:]))
    grown[: len(weight)] = weight
    grown[fresh] = rows.to(weight.dtype)
    return torch.nn.Parameter(grown, requires_grad=False)


@torch.no_grad()
def check_copy(backbone: Backbone, model: Any, entries: Sequence[Entry]) -> None:
    """Raise BackboneError unless the copy reads each new token as its soft token and answers a row as the backbone."""
    entry = entries[0]
    vectors = torch.cat([each.prompt.vectors for each in entries]).to(backbone.device, backbone.dtype)
    fresh = torch.arange(entry.first, entries[-1].ids[-1] + 1, device=backbone.device)
    coarse = torch.finfo(backbone.dtype).eps
    read = model.get_input_embeddings()(fresh)
    same = torch.allclose(read, vectors, rtol=4 * coarse, atol=4 * coarse * float(vectors.abs().max()))
    template = template_of(entry)
    soft = Encoder(template, backbone.tokenizer, entry.prompt.tokens).context(dict.fromkeys(template.fields, "x")).ids
    ids = torch.tensor([[token if token >= 0 else entry.first - token - 1 for token in soft]], device=backbone.device)
    given = embed_with_soft(
        torch.tensor([soft], device=backbone.device), entry.prompt.vectors.to(backbone.device), backbone.embed
    )
    ours = backbone.model(inputs_embeds=given, use_cache=False).logits[0, -1].float()
    theirs = model(input_ids=ids, use_cache=False).logits[0, -1, : len(ours)].float()
    kept = torch.ones(len(ours), dtype=torch.bool, device=ours.device)
    kept[fresh[fresh < len(ours)]] = False  # rows of padding that are tokens now
    spread = float(ours[kept].std())
    same = same and torch.allclose(ours[kept], theirs[kept], rtol=0, atol=max(100 * coarse, 1e-4) * max(1.0, spread))
    if not same:
        raise BackboneError(
            f"{backbone.name} ({type(backbone.model).__name__}) does something with token ids that more rows of its "
            "table cannot follow: it cannot be exported so; give vLLM the embeddings instead (--to vllm)"
        )


def write_manifest(path: Path, backbone: Backbone, said: list[dict[str, Any]]) -> None:
    """What is in the export, for people and programs."""
    content = {
        "written_by": f"softprompt {__version__}",
        "base_model": backbone.name,
        "fingerprint": backbone.fingerprint,
        "prompts": said,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
