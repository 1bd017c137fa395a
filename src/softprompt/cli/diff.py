"""`softprompt diff`: what is different in two versions of a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import SoftPromptError
from .command import command
from .looking import DATA, SPLIT, load_prompts, rows_of, smaller, stages
from .options import DEVICE, FORMAT, MODEL, PRECISION, THREADS, load_backbone
from .output import Output


@command
def diff(
    out: Output,
    a: Annotated[str, typer.Argument(metavar="A", help="Prompt folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    data: DATA = None,
    split: SPLIT = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many rows, drawn by seed.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Without the model: no words, no scores.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows.")] = 0,
    format: FORMAT = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Compare two prompts: vectors, nearest words, template, how they were made; with --data by a paired test."""
    names = (a, b)
    first, second = (next(iter(load_prompts([folder]).values())) for folder in names)
    sample = None
    if data is not None:
        sample = smaller(rows_of(out, data, split, first, format), rows, seed)
    backbone = None
    if not no_model or data is not None:
        try:
            backbone = load_backbone(out, model, first, precision, device, threads)
        except SoftPromptError as error:
            if data is not None or model is not None:
                raise
            out.warn(f"without nearest words: {error}")
    from ..inspection.diff import diff as compare

    with stages(out) as stage:
        found = compare(first, second, backbone, sample, names=names, max_tokens=max_tokens, progress=stage)
    _show(out, found)
    out.document(found.to_dict())


def _show(out: Output, found: Any) -> None:
    if found.equal:
        out.show(f"the same {found.tokens[0]} vectors")
    else:
        out.show(f"tokens {found.tokens[0]} and {found.tokens[1]}, kinds {' and '.join(found.kinds)}")
        for name in ("pooled", "matched"):
            value = getattr(found, name)
            out.show(f"{name} cosine: " + ("not to be compared" if value is None else f"{value:.4f}"))
        out.show(f"mean norm: {found.norms[0]:.3g} and {found.norms[1]:.3g}")
        _show_tokens(out, found)
    for title, rows in (("template", found.template), ("how it was made", found.made)):
        if rows:
            shown = _wide(title, "A", "B")
            for what, x, y in rows:
                shown.add_row(what, x, y)
            out.show(shown)
    _show_test(out, found)


def _show_tokens(out: Output, found: Any) -> None:
    words = {token: (x, y) for token, x, y in found.words}
    if not found.moved and not words:
        return
    shown = _wide("token", "distance", "cosine", "nearest word in A", "in B")
    for token in range(max(len(found.moved), max(words, default=-1) + 1)):
        distance, cosine = found.moved[token] if found.moved else (None, None)
        x, y = words.get(token, ("", ""))
        shown.add_row(
            str(token),
            "-" if distance is None else f"{distance:.3g}",
            "-" if cosine is None else f"{cosine:.4f}",
            repr(x) if x or y else "the same" if found.words else "-",
            repr(y) if x or y else "",
        )
    out.show(shown)


def _show_test(out: Output, found: Any) -> None:
    if found.test is None:
        return
    test = found.test
    for name, scores in zip("AB", (found.a, found.b)):
        accuracy = "" if scores.accuracy is None else f"accuracy {scores.accuracy:.3f}, "
        out.show(f"{name}: {accuracy}loss {scores.main_loss:.3f} on {test.rows:,} rows")
    bounds = f" ({test.interval[0]:+.3f} to {test.interval[1]:+.3f})" if test.interval else ""
    what = "loss" if found.a.choices is None else "loss among the labels"
    out.show(f"{what}, B minus A: {test.difference:+.3f}{bounds}")
    if test.p is not None:
        out.show(
            f"only A right: {test.only_a:,}, only B right: {test.only_b:,}; McNemar's exact test p = {test.p:.3g}"
            + (", a clear difference" if test.p < 0.05 else ", no clear difference")
        )


def _wide(*columns: str) -> Any:
    from .scores import table

    shown = table(*columns)
    for column in shown.columns[1:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    return shown
