"""A library as PEFT adapters: a folder for each prompt that stands where PEFT puts one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OutputError
from ..fileformat import save_prompt
from ..peft_format import CONFIG_FILE
from ..prompt import SoftPrompt
from ..tensorfile import TENSOR_FILE
from .collect import Prompts, collect
from .folder import new_folder


@dataclass
class PeftExport:
    """written: name -> adapter folder. refused: name -> why PEFT cannot use that prompt."""

    written: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def export_peft(prompts: Prompts, out: str | Path, *, report: Callable[[str], None] = lambda line: None) -> PeftExport:
    """Write a PEFT adapter folder OUT/NAME for each prompt (see `collect`) that stands at the front.

    PEFT knows no other place, so a prompt at another one is not written but reported, with the reason. `report` gets a
    line for each. Raises ConfigError (names), PromptFormatError, and OutputError when `out` is not empty or none of the
    prompts can be written.
    """
    made = collect(prompts)
    done = PeftExport()
    files = {}
    for name, prompt in made.items():
        found = _adapter_files(prompt)
        if CONFIG_FILE in found:
            files[name] = found
        else:
            assert prompt.template is not None
            done.refused[name] = (
                f"its soft tokens stand {prompt.template.placement!r}, and PEFT puts them before everything else, "
                "where they would mean something else"
            )
    if not files:
        raise OutputError("; ".join(["nothing to write", *(f"{name}: {why}" for name, why in done.refused.items())]))
    with new_folder(out) as temporary:
        for name, found in files.items():
            (temporary / name).mkdir()
            for file, data in {**found, "README.md": _readme(name, made[name]).encode()}.items():
                (temporary / name / file).write_bytes(data)
    for name in made:
        if name in files:
            done.written[name] = Path(out) / name
            report(f"{name}: {done.written[name]}")
        else:
            report(f"{name}: not written, {done.refused[name]}")
    return done


def _adapter_files(prompt: SoftPrompt) -> dict[str, bytes]:
    """What PEFT reads of the prompt's own folder; without its configuration if PEFT cannot place the prompt."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_prompt(prompt, Path(place) / "prompt")
        return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE) if (folder / name).exists()}


def _readme(name: str, prompt: SoftPrompt) -> str:
    """PEFT knows no template, so the text that belongs to the prompt stands in the adapter's README."""
    head = f"---\nbase_model: {prompt.base_model}\nlibrary_name: peft\n---\n" if prompt.base_model else ""
    lines = [f"# {name}", "", f"{prompt.tokens} soft tokens ({prompt.kind}), written by softprompt."]
    if prompt.template is not None:
        said = prompt.template.to_dict()
        lines += ["", "Text that they were tuned with:", ""]
        lines += [f"    {key}: {said[key]!r}" for key in ("input", "chat", "target", "labels") if said.get(key)]
    return head + "\n".join([*lines, ""])
