"""`softprompt prune`: a shorter prompt that scores no worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .looking import load_prompts, smaller, stages, task_of
from .options import DEVICE, FORMAT, MODEL, PRECISION, THREADS, load_backbone
from .output import Output


@command
def prune(
    out: Output,
    prompt: Annotated[str, typer.Argument(help="Prompt folder.")],
    data: Annotated[str, typer.Argument(help="Table of rows, divided as when tuning.")],
    save: Annotated[str | None, typer.Option("--out", help="Folder for the shorter prompt.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a prompt that is there.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write loss against length to this SVG file.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Numbers of tokens to try, as 10,5; default: parts of P.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of tuning again at each length.")] = 50,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of these; default: half of the usual.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 8,
    rows: Annotated[int, typer.Option(min=2, help="At most so many validation rows.")] = 200,
    test_rows: Annotated[int | None, typer.Option(min=1, help="At most so many test rows.")] = None,
    validation: Annotated[str | None, typer.Option(help="Table of validation rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Table of test rows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of rows and tuning.")] = 0,
    format: FORMAT = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Drop the soft tokens that do not matter, tune the rest again briefly, and show score against length.

    The shortest prompt whose loss is within one standard error of the whole one's is kept with --out.
    """
    from dataclasses import replace

    from ..fileformat import check_output

    whole = next(iter(load_prompts([prompt]).values()))
    wanted = _lengths(lengths, whole.tokens)
    if save is not None:
        check_output(save, overwrite)
    task = task_of(out, data, whole, format, validation, test)
    task = replace(task, test=smaller(task.test, test_rows, seed))
    backbone = load_backbone(out, model, whole, precision, device, threads)
    from ..inspection.prune import prune as shorten

    with stages(out) as stage:
        found = shorten(
            backbone,
            task,
            whole,
            lengths=wanted,
            steps=steps,
            rows=rows,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            progress=stage,
        )
    _show(out, found, whole.tokens)
    if picture is not None:
        from ..atomic import write_atomic
        from ..inspection.pictures import as_file

        write_atomic(picture, as_file(found.picture()))
        out.show(f"picture {picture}")
    if save is not None:
        found.prompt.save(save, overwrite=overwrite)
        out.show(f"prompt of {found.chosen} tokens saved in {save}")
    out.document({**found.to_dict(), "prompt": save})


def _lengths(text: str | None, tokens: int) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"lengths: expected numbers with commas, as 10,5; found '{text}'") from None
    if wrong := [size for size in found if not 1 <= size < tokens]:
        raise ConfigError(f"lengths: expected numbers from 1 to {tokens - 1}, found {wrong[0]}")
    return found


def _show(out: Output, found: Any, tokens: int) -> None:
    from .scores import table

    shown = table("tokens", "accuracy", "loss", "at once", "against the whole", "p")
    shown.add_row(str(tokens), _share(found.whole.accuracy), f"{found.whole.main_loss:.3f}", "", "", "")
    for each in found.lengths:
        against = each.against
        shown.add_row(
            str(each.tokens) + (" (chosen)" if each.tokens == found.chosen else ""),
            _share(each.scores.accuracy),
            f"{each.scores.main_loss:.3f}",
            f"{each.cut.main_loss:.3f}",
            f"{against.difference:+.3f} +- {2 * against.error:.3f}",
            "-" if against.p is None else f"{against.p:.2g}",
        )
    what = "loss" if found.whole.choices is None else "loss among the labels"
    out.show(f"on validation rows; {what} after tuning again, and at once", shown)
    if found.chosen == tokens:
        out.show("no shorter prompt is as good; try more --steps, or lengths nearer to the whole")
    if found.test is not None:
        a, b, test = found.test
        p = "" if test.p is None else f", McNemar p {test.p:.2g}"
        out.show(
            f"on {len(a.losses):,} test rows: whole {_share(a.accuracy)} (loss {a.main_loss:.3f}), "
            f"{found.chosen} tokens {_share(b.accuracy)} (loss {b.main_loss:.3f}){p}"
        )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
