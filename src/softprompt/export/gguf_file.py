"""Soft prompts as vocabulary of a GGUF model, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbone import Backbone
from ..errors import BackboneError, BackboneMismatchError
from .collect import Prompts, check_new, collect
from .folder import new_file
from .gguf_convert import convert
from .gguf_source import Source, is_plain, need_gguf, packed, read_gguf, write_gguf
from .model import VocabularyExport, check_for, write_manifest
from .tokens_file import in_memory, naming_chat_template
from .usage import usage
from .vocabulary import Entry, input_rows, make_entries, unlikely_row

TABLE, HEAD, HEAD_BIAS = "token_embd.weight", "output.weight", "output.bias"
LARGE = 1 << 29  # numbers in a table: 2 GiB as float32
SCORE = -1000.0  # of a new token, for vocabularies that have scores; no text is ever divided into them


def export_gguf(
    backbone: Backbone,
    prompts: Prompts,
    out: str | Path,
    *,
    source: str | Path | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> VocabularyExport:
    """Write a GGUF model with P more tokens for each prompt into the file `out`.

    source: the GGUF file that `backbone` was loaded from, or one of the same model in another packing; all of it is
    kept, and only the two tables and the vocabulary grow. Without it the backbone itself is converted (see
    gguf_convert.py for which can be). llama.cpp has nothing that could replace one text by another, so in a text every
    row of a prompt is written, `<|NAME:0|><|NAME:1|>...`; in a chat `<|NAME|>` does, as the chat template replaces it.
    OUT.json says how each prompt is written.
    Raises as `export_model`, and BackboneError when there is no converter, or `source` is another model.
    """
    made = collect(prompts)
    check_new(Path(out), "file")
    manifest = Path(str(out) + ".json")
    check_new(manifest, "file")
    need_gguf()
    check_for(backbone, made, force)
    entries = make_entries(made, backbone.tokenizer)
    report(f"{len(entries)} prompts, {sum(len(entry.ids) for entry in entries)} new tokens")
    model = read_gguf(Path(source)) if source is not None else convert(backbone)
    size = add_prompts(model, backbone, entries)
    reader = in_memory(backbone.tokenizer, entries)
    said = [usage(entry, backbone.tokenizer, reader, named=False) for entry in entries]
    if model.value("tokenizer.ggml.model") != "gpt2":
        # Its reading of other vocabularies puts a space behind every special token in a text: only ids are exact.
        said = [{**each, "text": None, "add_special_tokens": None, "messages": None} for each in said]
    with new_file(out) as temporary, new_file(manifest) as beside:
        report(f"writing {out}")
        write_gguf(model, temporary)
        write_manifest(beside, backbone, said)
    for each in said:
        report(f"{each['name']}: tokens {each['ids'][0]} to {each['ids'][1]}")
    return VocabularyExport(Path(out), said, size)


def add_prompts(model: Source, backbone: Backbone, entries: Sequence[Entry]) -> int:
    """Put the prompts' tokens and rows into `model`; the number of rows that its tables have then."""
    old = model.rows(TABLE)  # [V, H]
    _check_same_model(model, backbone, old)
    fresh = np.arange(entries[0].first, entries[-1].ids[-1] + 1)
    size = max(len(old), int(fresh[-1]) + 1)
    rows = input_rows(backbone, entries).float().cpu().numpy()
    row, bias = unlikely_row(backbone)
    silent = np.repeat(row.float().cpu().numpy()[None], len(fresh), axis=0)
    if HEAD not in model.tensors:  # tied: the table that it had is the head from now on
        model.tensors[HEAD] = model.tensors[TABLE]
    model.tensors[HEAD] = _grown_head(model, size, fresh, silent)
    _, kind = model.tensors[TABLE]
    model.tensors[TABLE] = _stored(_grown(old, size, fresh, rows), kind)
    if HEAD_BIAS in model.tensors and bias is not None:
        values = np.full(len(fresh), float(bias), np.float32)
        model.tensors[HEAD_BIAS] = _stored(_grown(model.rows(HEAD_BIAS), size, fresh, values), _type("F32"))
    _check_other_tables(model, len(old), size)
    _add_tokens(model, entries, size)
    return size


def _grown(
    old: np.ndarray[Any, Any], size: int, fresh: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """A copy of `old` [V, ...] with `size` rows and `rows` at the ids `fresh`."""
    grown = np.zeros((size, *old.shape[1:]), old.dtype)
    grown[: len(old)] = old
    grown[fresh] = rows
    return grown


def _grown_head(model: Source, size: int, fresh: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """The output table with the new rows, byte for byte as it was where its type can be written."""
    data, kind = model.tensors[HEAD]
    new = packed(rows, kind)
    if new is None:
        return _stored(_grown(model.rows(HEAD), size, fresh, rows), kind)
    return _grown(np.ascontiguousarray(data), size, fresh, new), kind


def _stored(rows: np.ndarray[Any, Any], kind: Any) -> tuple[np.ndarray[Any, Any], Any]:
    """A table in its own type, or unpacked where that is one of blocks, which soft tokens do not bear.

    As float32, so that ordinary text gives the very numbers that it gave; very large ones as float16.
    """
    kind = kind if is_plain(kind) else _type("F32" if rows.size < LARGE else "F16")
    data = packed(rows, kind)
    assert data is not None
    return data, kind


def _type(name: str) -> Any:
    return need_gguf().GGMLQuantizationType[name]


def _check_same_model(model: Source, backbone: Backbone, table: np.ndarray[Any, Any]) -> None:
    """Raise BackboneMismatchError unless the file's table is the backbone's, as near as packing leaves it."""
    own: torch.Tensor = backbone.embed.weight  # type: ignore[assignment]
    mine = own[:256].float().cpu().numpy().ravel()
    found = table[:256].ravel()
    same = table.shape == tuple(own.shape)
    if not same or np.dot(mine, found) < 0.9 * np.linalg.norm(mine) * np.linalg.norm(found):
        raise BackboneMismatchError(
            f"the GGUF file ({model.value('general.name', 'unnamed')}, {table.shape[0]} tokens of width "
            f"{table.shape[1]}) is not the model {backbone.name} ({own.shape[0]} of width {own.shape[1]})"
        )


def _check_other_tables(model: Source, before: int, size: int) -> None:
    """Raise BackboneError for a model that has further tables with a row for each token (Gemma 3n)."""
    for name, (data, _) in model.tensors.items():
        if name not in (TABLE, HEAD, HEAD_BIAS) and data.ndim == 2 and len(data) == before != size and before > 4096:
            raise BackboneError(f"{name} has a row for each token too: such a model cannot be given more tokens")


def _add_tokens(model: Source, entries: Sequence[Entry], size: int) -> None:
    kinds = need_gguf().GGUFValueType
    types = need_gguf().TokenType
    tokens = list(model.value("tokenizer.ggml.tokens", []))
    count = len(tokens)
    tokens += [f"[PAD{number}]" for number in range(count, size)]
    kind = [int(k) for k in model.value("tokenizer.ggml.token_type", [int(types.NORMAL)] * count)]
    kind += [int(types.UNUSED)] * (size - count)
    scores = [float(s) for s in model.value("tokenizer.ggml.scores", [])]
    scores += [SCORE] * (size - count if scores else 0)
    for entry in entries:
        for number, text in zip(entry.ids, entry.rows):
            tokens[number], kind[number] = text, int(types.CONTROL)
            if scores:
                scores[number] = SCORE
    model.set("tokenizer.ggml.tokens", tokens, kinds.ARRAY, kinds.STRING)
    model.set("tokenizer.ggml.token_type", kind, kinds.ARRAY, kinds.INT32)
    if scores:
        model.set("tokenizer.ggml.scores", scores, kinds.ARRAY, kinds.FLOAT32)
    if f"{model.architecture}.vocab_size" in model.fields:
        model.set(f"{model.architecture}.vocab_size", size, kinds.UINT32)
    chat = model.value("tokenizer.chat_template")
    if chat:
        model.set("tokenizer.chat_template", naming_chat_template(chat, entries), kinds.STRING)
