"""`softprompt doctor`: what is on this machine, and what is wrong."""

from __future__ import annotations

import typer

from .command import FAILED, command
from .output import Output


@command
def doctor(out: Output) -> None:
    """Versions, device, precision, threads, memory, model caches, and what is wrong with them.

    Exits with 1 if something is wrong.
    """
    from dataclasses import asdict

    from ..doctor import doctor_facts
    from .scores import table

    facts = doctor_facts()
    problems = [fact for fact in facts if fact.problem]
    shown = table("what", "found")
    shown.columns[1].justify, shown.columns[1].no_wrap = "left", False
    for fact in facts:
        shown.add_row(fact.name, f"{fact.value}  ! {fact.problem}" if fact.problem else fact.value)
    out.show(shown)
    out.show("nothing is wrong" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}:")
    for fact in problems:
        out.show(f"- {fact.name}: {fact.problem}")
    out.document({"ok": not problems, "facts": [asdict(fact) for fact in facts]})
    if problems:
        raise typer.Exit(FAILED)
