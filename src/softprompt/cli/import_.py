"""`softprompt import`: a PEFT adapter becomes a prompt folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BackboneMismatchError
from .command import command
from .options import CHAT, DEVICE, INPUT, LABELS, MODEL, PRECISION, TARGET, load_backbone, template_from
from .output import Output


@command
def import_(
    out: Output,
    adapter: Annotated[Path, typer.Argument(help="PEFT prompt-tuning or P-tuning adapter folder, or a prompt folder.")],
    folder: Annotated[Path, typer.Argument(help="Prompt folder that is written.")],
    input: INPUT = None,
    chat: CHAT = None,
    target: TARGET = None,
    labels: LABELS = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the prompt that OUT holds.")] = False,
) -> None:
    """Read a PEFT adapter and write it as a prompt folder.

    With --input and --target (and --labels) the prompt gets a template, so that `evaluate` and `run` know what to do
    with it; with --model it is checked against that model and remembers it.
    """
    from ..fileformat import check_output
    from ..prompt import SoftPrompt

    check_output(folder, overwrite)
    prompt = SoftPrompt.load(adapter)
    template = template_from(input, chat, target, labels)
    if template is not None:
        prompt = replace(prompt, template=template)
    if model is not None:
        backbone = load_backbone(out, model, None, precision, device, None)
        if prompt.width != backbone.width:
            raise BackboneMismatchError(
                f"the prompt is {prompt.width} wide, {backbone.name} {backbone.width}; name the model it was made for"
            )
        prompt = replace(
            prompt,
            base_model=backbone.name,
            fingerprint=backbone.fingerprint,
            tokenizer_hash=backbone.tokenizer_hash,
            provenance={**prompt.provenance, "architecture": backbone.architecture},
        )
    prompt.save(folder, overwrite=overwrite)
    out.show(
        f"{prompt.tokens} soft tokens of width {prompt.width} for {prompt.base_model or 'an unnamed model'}: {folder}"
    )
    if prompt.template is None:
        out.note("it has no template; `softprompt import --input ... --target ...` gives it one")
    out.document({"prompt": str(folder), "tokens": prompt.tokens, "width": prompt.width, "model": prompt.base_model})
