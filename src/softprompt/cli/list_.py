"""`softprompt list`: the prompts in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OutputError
from .command import command
from .output import Output


@command
def list_(
    out: Output, folder: Annotated[Path, typer.Argument(help="Folder that is searched.")] = Path("prompts")
) -> None:
    """The prompts in and below FOLDER, with their model, size and score; broken ones are marked."""
    from ..library import list_prompts
    from .scores import table

    if not folder.is_dir():
        raise OutputError(f"no folder {folder}; tune a prompt first, or name another folder")
    found = list_prompts(folder)
    shown = table("prompt", "model", "tokens", "placement", "score", "made", "size")
    shown.columns[1].no_wrap, shown.columns[1].overflow, shown.columns[1].justify = False, "fold", "left"
    for each in found:
        shown.add_row(*_cells(each))
    out.show(shown if found else f"no prompts in {folder}")
    for each in found:
        for problem in each["problems"]:
            out.show(f"{each['name']}: {problem}")
    out.document({"folder": str(folder), "prompts": found})


def _cells(each: dict[str, Any]) -> tuple[str, ...]:
    score = "" if each["score"] is None else f"{each['metric']} {each['score']:.3f}"
    size = f"{each['bytes'] / 1000:,.0f} kB"
    name = each["name"] + (" (broken)" if each["tokens"] is None else " (!)" if each["problems"] else "")
    made = (each["made"] or "")[:10]
    model = each["base_model"] or ""
    model = Path(model).name if Path(model).is_absolute() else model
    return name, model, str(each["tokens"] or ""), each["placement"] or "", score, made, size
