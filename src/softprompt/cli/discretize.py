"""`softprompt discretize`: the best plain text near a soft prompt, and what it scores."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .looking import load_prompts, stages, task_of
from .options import DEVICE, FORMAT, MODEL, PRECISION, THREADS, load_backbone
from .output import Output, interval


@command
def discretize(
    out: Output,
    prompt: Annotated[str, typer.Argument(help="Prompt folder.")],
    data: Annotated[str, typer.Argument(help="Table of rows, divided as when tuning.")],
    candidates: Annotated[int, typer.Option(min=1, max=100, help="Nearest words to try for each token.")] = 5,
    rounds: Annotated[int, typer.Option(min=0, help="Times through all tokens; 0 reads the words off only.")] = 2,
    rows: Annotated[int, typer.Option(min=2, help="At most so many training rows to search on.")] = 64,
    test_rows: Annotated[int | None, typer.Option(min=1, help="At most so many test rows to score on.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A hand-written prompt to compare with; default: what it started from.")
    ] = None,
    measure: Annotated[str, typer.Option(help="Nearest by cosine, euclidean or dot.")] = "cosine",
    validation: Annotated[str | None, typer.Option(help="Table of validation rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Table of test rows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows.")] = 0,
    format: FORMAT = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Read the nearest words off a soft prompt, search better ones, and score them beside the soft prompt.

    The template alone and the hand-written text are scored on the same rows.
    """
    if measure not in ("cosine", "euclidean", "dot"):
        raise ConfigError(f"measure: expected cosine, euclidean or dot, found '{measure}'")
    soft = next(iter(load_prompts([prompt]).values()))
    if soft.kind != "embedding":
        raise ConfigError("discretize: a deep prompt stands in no vocabulary; expected a prompt of kind embedding")
    task = task_of(out, data, soft, format, validation, test)
    backbone = load_backbone(out, model, soft, precision, device, threads)
    from ..inspection.discretize import discretize as to_text

    with stages(out) as stage:
        found = to_text(
            backbone,
            task,
            soft,
            candidates=candidates,
            rounds=rounds,
            rows=rows,
            test_rows=test_rows,
            text=text,
            measure=measure,
            max_tokens=max_tokens,
            seed=seed,
            progress=stage,
        )
    _show(out, found)
    out.document(found.to_dict())


def _show(out: Output, found: Any) -> None:
    from .scores import table

    what = "loss" if found.lines[0].scores.choices is None else "loss among labels"
    shown = table("prompt", "accuracy", what, "above the soft prompt", "95 % interval", "p")
    for line in found.lines:
        against = line.against
        shown.add_row(
            line.name,
            "-" if line.scores.accuracy is None else f"{line.scores.accuracy:.3f}",
            f"{line.scores.main_loss:.3f}",
            "" if against is None else f"{against.difference:+.3f}",
            "" if against is None else interval(against.interval),
            "" if against is None or against.p is None else f"{against.p:.2g}",
        )
    out.show(shown)
    for line in found.lines:
        if line.text:
            out.show(f"{line.name}: {line.text!r}")
    out.show("", f"{found.evaluations:,} texts scored in the search; the best by its rows:", repr(found.text))
