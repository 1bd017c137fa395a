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
    """The prompts in and below FOLDER, with their task, model, size and score; broken ones are marked.

    NAME@2 is the second version of NAME; where there are several, a * stands behind the one that NAME means.
    """
    from ..library import list_prompts
    from .scores import table

    if not folder.is_dir():
        raise OutputError(f"no folder {folder}; tune a prompt first, or name another folder")
    found = list_prompts(folder)
    shown = table("prompt", "task", "kind", "tokens", "placement", "model", "score", "made", "size")
    for column in (shown.columns[1], shown.columns[5]):
        column.no_wrap, column.overflow, column.justify = False, "fold", "left"
    several = {_base(each) for each in found if each["version"] > 1}
    for each in found:
        shown.add_row(*_cells(each, mark=each["newest"] and _base(each) in several))
    out.show(shown if found else f"no prompts in {folder}")
    for each in found:
        for problem in each["problems"]:
            out.show(f"{each['name']}: {problem}")
    out.document({"folder": str(folder), "prompts": found})


def _base(each: dict[str, Any]) -> str:
    """The path without the version."""
    return str(each["path"]).removesuffix(f"@{each['version']}")


def _cells(each: dict[str, Any], mark: bool) -> tuple[str, ...]:
    score = "" if each["score"] is None else f"{each['metric']} {each['score']:.3f}"
    size = f"{each['bytes'] / 1000:,.0f} kB"
    name = each["name"] + " *" * mark
    name += " (broken)" if each["tokens"] is None else " (!)" if each["problems"] else ""
    made = (each["made"] or "")[:10]
    model = each["base_model"] or ""
    model = Path(model).name if Path(model).is_absolute() else model
    facts = (str(each[key] or "") for key in ("task", "kind", "tokens", "placement"))
    return name, *facts, model, score, made, size
