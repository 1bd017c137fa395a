"""`softprompt export`: prompts for other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .options import DEVICE, FORCE, MODEL, MODEL_PANEL, load_backbone
from .output import Output
from .run import argument_row

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..prompt import SoftPrompt

TARGETS = ("peft", "model", "gguf", "vllm")


@command
def export(
    out: Output,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder (peft, model) or file (gguf, vllm).")],
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPTS", help="Prompt folders, NAME=FOLDER, or folders of prompt folders."),
    ],
    to: Annotated[str, typer.Option(help="peft, model, gguf or vllm.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="For vllm: the text, or FIELD=VALUE for each field of the template."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For vllm: longest answer.")] = 64,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="For gguf: the model's file to extend. Default: the one that it is loaded from, else it is converted."
        ),
    ] = None,
    model: MODEL = None,
    precision: Annotated[
        str,
        typer.Option(
            help="stored (as the model's weights are), float32, bfloat16 or float16.", rich_help_panel=MODEL_PANEL
        ),
    ] = "stored",
    device: DEVICE = None,
    force: FORCE = False,
) -> None:
    """Write prompts for other engines. See docs/export.md for the commands that use them there.

    peft: an adapter folder for each prompt at the front. model: a copy of the model with the prompts in its vocabulary,
    for transformers, vLLM, SGLang, TGI. gguf: the same for llama.cpp. vllm: the embeddings of one text with one prompt.
    """
    if to not in TARGETS:
        raise ConfigError(f"to: expected one of {', '.join(TARGETS)}, found '{to}'")
    if text and to != "vllm":
        raise ConfigError(f"text: is for vllm, which takes one text with one prompt; found with '{to}'")
    if gguf is not None and to != "gguf":
        raise ConfigError(f"gguf: is for --to gguf; found with '{to}'")
    from ..export.collect import check_new, check_one_model, collect, needs_embeddings

    check_new(target, "folder" if to in ("peft", "model") else "file")
    found = collect(prompts)
    if to == "peft":
        return _peft(out, target, found)
    needs_embeddings(found, "prompt_embeds" if to == "vllm" else "a token of the vocabulary")
    if to == "vllm" and (len(found) != 1 or not text):
        raise ConfigError(f"vllm takes one prompt and --text; found {len(found)} prompts, {len(text or ())} texts")
    if not force:
        check_one_model(found)
    name = model or next((prompt.base_model for prompt in found.values() if prompt.base_model), "")
    source = gguf or (_gguf_source(out, name) if to == "gguf" else None)
    backbone = _load(out, name, next(iter(found.values())), precision, device)
    if to == "vllm":
        return _vllm(out, backbone, target, found, text or [], max_new_tokens, force)
    _vocabulary(out, backbone, target, found, source, to, force)


def _peft(out: Output, target: Path, found: dict[str, SoftPrompt]) -> None:
    from ..export import export_peft

    done = export_peft(found, target)
    for name, why in done.refused.items():
        out.warn(f"{name}: not written, {why}")
    out.show(f"{len(done.written)} adapters in {target}: {', '.join(done.written)}")
    out.document(
        {"to": "peft", "out": str(target), "written": {n: str(p) for n, p in done.written.items()}}
        | {"refused": done.refused}
    )


def _vllm(
    out: Output,
    backbone: Backbone,
    target: Path,
    found: dict[str, SoftPrompt],
    text: list[str],
    max_new_tokens: int,
    force: bool,
) -> None:
    from ..export import export_vllm
    from ..export.usage import WITHOUT_TEMPLATE

    ((name, prompt),) = found.items()
    row = argument_row(prompt.template or WITHOUT_TEMPLATE, text)
    done = export_vllm(backbone, prompt, row, target, max_new_tokens=max_new_tokens, force=force)
    out.show(f"{done.tokens} tokens, {done.characters:,} characters of base64: {target}")
    out.document({"to": "vllm", "out": str(target), "prompt": name, "tokens": done.tokens, "model": backbone.name})


def _vocabulary(
    out: Output,
    backbone: Backbone,
    target: Path,
    found: dict[str, SoftPrompt],
    source: Path | None,
    to: str,
    force: bool,
) -> None:
    from ..export import export_gguf, export_model

    if to == "gguf":
        done = export_gguf(backbone, found, target, source=source, force=force, report=out.note)
    else:
        done = export_model(backbone, found, target, force=force, report=out.note)
    out.show(f"{len(done.prompts)} prompts in the vocabulary of {target}, which has {done.vocabulary:,} tokens now:")
    for each in done.prompts:
        out.show(_how(each))
    out.document({"to": to, "out": str(target), "vocabulary": done.vocabulary, "prompts": done.prompts})


def _how(each: dict[str, Any]) -> str:
    """How a prompt is written, in a line."""
    first, last = each["ids"]
    if each["messages"]:
        return f"  {each['name']}: {json.dumps(each['messages'], ensure_ascii=False)}"
    if each["text"] is None:
        return f"  {each['name']}: by its ids, {first} to {last}"
    special = "" if each["add_special_tokens"] else "  (add_special_tokens: false)"
    return f"  {each['name']}: {json.dumps(each['text'], ensure_ascii=False)}{special}"


def _load(out: Output, name: str, prompt: SoftPrompt, precision: str, device: str | None) -> Backbone:
    """The model in the precision that its weights are stored in, unless another was asked for."""
    if precision == "stored" and name:
        precision = _stored_precision(out, name)
    return load_backbone(out, name or None, prompt, "float32" if precision == "stored" else precision, device, None)


def _stored_precision(out: Output, name: str) -> str:
    from .. import weights
    from ..backbone import PRECISIONS

    folder = weights.locate(name, report=lambda line: None).folder
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = described.get("dtype") or described.get("torch_dtype") or "float32"
    out.note(f"precision {stored}: that of the weights")
    return stored if stored in PRECISIONS else "float32"


def _gguf_source(out: Output, name: str) -> Path | None:
    """The GGUF file that the model of this name is loaded from; None for one that has to be converted."""
    from .. import weights

    if Path(name).suffix.lower() == ".gguf":
        return Path(name).expanduser()
    if not name:
        return None
    origin = weights.locate(name, report=lambda line: None).origin
    for alias in weights.ALIASES.values():
        if origin == f"the package {alias.package}":
            found = weights.package_file(alias.package, alias.file)
            out.note(f"extending {found}")
            return found
    return None
