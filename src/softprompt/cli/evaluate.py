"""`softprompt evaluate`: how good a prompt is on rows, or the same template without one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .options import (
    CHAT,
    DEVICE,
    FORCE,
    FORMAT,
    INPUT,
    LABELS,
    MODEL,
    PRECISION,
    TARGET,
    THREADS,
    load_backbone,
    template_from,
)
from .output import Output
from .progress import counting

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..data import Split, Task
    from ..prompt import SoftPrompt
    from ..templates import Template

SPLITS = ("all", "train", "validation", "test")


@command
def evaluate(
    out: Output,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[PROMPT]... DATA", help="Prompt folder, and a table of rows. Several prompts of one task vote."
        ),
    ],
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="The same template without soft tokens; PROMPT may then be left out.")
    ] = False,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each text.")] = 0,
    examples: Annotated[
        str | None, typer.Option(help="Table to take these from; default: DATA, whose rows are then left out.")
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Divide by each label's prior.")] = False,
    split: Annotated[
        str | None,
        typer.Option(
            help="all, train, validation or test, divided as when tuning. Default: test if DATA is the file "
            "that the prompt was tuned on, else all."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows, drawn by seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="For examples, limit and sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of free text.")] = 64,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens.")] = None,
    mistakes: Annotated[int, typer.Option(min=0, help="Also show so many of the most confident mistakes.")] = 0,
    references: Annotated[str | None, typer.Option(help="Column with a list of right texts (free text).")] = None,
    format: FORMAT = None,
    input: INPUT = None,
    chat: CHAT = None,
    target: TARGET = None,
    labels: LABELS = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
    force: FORCE = False,
) -> None:
    """Evaluate a prompt on rows: scores with intervals, per class, and the confusion matrix.

    With --no-prompt the same template is evaluated as plain text, zero-shot or with --shots worked examples. Several
    prompts, or one made by tune --ensemble, are asked together and vote.
    """
    folders, data = _what(what, no_prompt)
    members = {} if no_prompt else _members(folders)
    folder = folders[0] if folders else None
    prompt, template = _prompt_and_template(folder, template_from(input, chat, target, labels))
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split: expected {', '.join(SPLITS)}, found '{split}'")
    options: dict[str, Any] = {"template": template, "format": format, "references": references}
    rows, worked = _rows(out, data, split, prompt, options)
    if examples is not None:
        from ..data import Task

        worked = Task.load(test=examples, **options).test
    if members and shots:
        raise ConfigError("shots: are for a single prompt; several are asked without worked examples")
    if shots:
        rows, worked = _shots(rows, worked, shots, seed)
    if limit:
        rows = rows.take(limit, seed=seed)
    backbone = load_backbone(out, model, prompt, precision, device, threads)
    if prompt is not None:
        backbone.check(prompt, force=force)
    out.note(f"{len(rows):,} rows of {data} ({'drawn by seed' if limit else rows.name})")
    facts: dict[str, Any] = {"prompt": None if no_prompt else folder, "model": backbone.name}
    facts |= {"data": data, "split": rows.name}
    if members:
        given = {"calibrate": calibrate, "max_tokens": max_tokens, "force": force}
        _vote(out, backbone, rows, members, {**facts, "prompt": folders}, mistakes, **given)
        return
    from ..evaluation.generation import Sampling
    from ..evaluation.runner import evaluate as evaluate_prompt
    from .scores import report_data, report_tables

    with counting(out, "evaluating") as progress:
        report = evaluate_prompt(
            backbone,
            rows,
            None if no_prompt else prompt,
            shots=shots,
            examples=worked,
            calibrate=calibrate,
            sampling=Sampling(max_new_tokens, seed=seed),
            max_tokens=max_tokens,
            seed=seed,
            force=force,
            progress=progress,
        )
    if report.cut_rows:
        out.warn(f"{report.cut_rows:,} of {len(rows):,} rows were cut to fit")
    out.show(*report_tables(report))
    _show_mistakes(out, report, mistakes)
    shown = {"mistakes": report.mistakes(mistakes)} if mistakes else {}
    out.document({**report_data(report), **facts, **shown})


def _what(what: list[str], no_prompt: bool) -> tuple[list[str], str]:
    """Prompt folders and data file out of the arguments."""
    if len(what) > 2 and no_prompt:
        raise ConfigError(f"evaluate takes [PROMPT] DATA with --no-prompt, found {len(what)} arguments")
    if len(what) >= 2 or no_prompt:
        return what[:-1], what[-1]
    raise ConfigError("evaluate takes PROMPT DATA (or --no-prompt DATA), found 1 arguments")


def _members(folders: list[str]) -> dict[str, SoftPrompt]:
    """The prompts that are to vote by name: the members of one ensemble, or several prompts; {} for a single one."""
    from ..prompt import SoftPrompt
    from ..training.ensemble import load_members

    if len(folders) == 1:
        return load_members(folders[0])
    if len(set(folders)) < len(folders):
        raise ConfigError("the same prompt is named twice; name each once, so that each has one vote")
    return {folder: SoftPrompt.load(folder) for folder in folders}


def _vote(
    out: Output,
    backbone: Backbone,
    rows: Split,
    members: dict[str, SoftPrompt],
    facts: dict[str, Any],
    mistakes: int,
    **options: Any,
) -> None:
    from ..evaluation.voting import evaluate_ensemble
    from .ensemble import vote_table
    from .scores import report_tables

    with counting(out, "evaluating") as progress:
        report = evaluate_ensemble(
            backbone, rows, list(members.values()), names=list(members), progress=progress, **options
        )
    if report.averaged.cut_rows:
        out.warn(f"{report.averaged.cut_rows:,} of {len(rows):,} rows were cut to fit")
    out.show(vote_table(report), "averaged probabilities", *report_tables(report.averaged))
    _show_mistakes(out, report.averaged, mistakes)
    shown = {"mistakes": report.averaged.mistakes(mistakes)} if mistakes else {}
    out.document({**report.to_dict(), **facts, **shown})


def _prompt_and_template(folder: str | None, given: Template | None) -> tuple[SoftPrompt | None, Template]:
    from ..prompt import SoftPrompt

    prompt = SoftPrompt.load(folder) if folder is not None else None
    template = given or (prompt.template if prompt is not None else None)
    if template is None:
        raise ConfigError("template: missing; give --input and --target (and --labels for classes)")
    return prompt, template


def _rows(
    out: Output, data: str, split: str | None, prompt: SoftPrompt | None, options: dict[str, Any]
) -> tuple[Split, Split | None]:
    """The rows to evaluate on, and the training rows if DATA was divided."""
    from ..data import Task

    recorded = _recorded(prompt)
    if split in (None, "all"):
        found = Task.load(test=data, **options)
        rows = replace(found.test, name="all rows")
        if split == "all" or not recorded:
            return rows, None
        divided = _divided(data, recorded, options)
        known = recorded.get("sha256", {})
        if divided is None or not known.get("test") or divided.source["sha256"].get("test") != known["test"]:
            if found.source["sha256"]["test"] == known.get("train"):
                out.warn(
                    "these are the very rows that the prompt was tuned on; the scores say nothing about other rows"
                )
            return rows, None
        out.note("the prompt was tuned on this file: taking the test rows that were kept apart (--split all takes all)")
        return divided.test, divided.train
    task = _divided(data, recorded, options)
    assert task is not None
    return getattr(task, str(split)), task.train


def _recorded(prompt: SoftPrompt | None) -> dict[str, Any]:
    """What a prompt says about the data that it was tuned on."""
    run = prompt.provenance.get("run") if prompt is not None else None
    data = run.get("data") if isinstance(run, dict) else None
    return data if isinstance(data, dict) else {}


def _divided(data: str, recorded: dict[str, Any], options: dict[str, Any]) -> Task | None:
    """DATA divided as the tuned file was, or by the default shares."""
    from ..data import Task

    keys = ("shares", "seed", "stratify", "group_by")
    return Task.load(train=data, **{key: recorded[key] for key in keys if recorded.get(key) is not None}, **options)


def _shots(rows: Split, worked: Split | None, shots: int, seed: int) -> tuple[Split, Split]:
    """The rows to evaluate on and those to show as examples, which are never the same."""
    from ..evaluation.runner import pick_shots

    source = worked if worked is not None and worked is not rows else rows
    picked = pick_shots(source, shots, seed)
    shown = [dict(row) for row in picked]
    rest = tuple(row for row in rows if row not in shown)
    return replace(rows, rows=rest), replace(source, rows=tuple(picked))


def _show_mistakes(out: Output, report: Any, most: int) -> None:
    for each in report.mistakes(most) if most else ():
        text = " ".join(each["text"].split())
        out.show(f"{each['true']}, predicted {each['predicted']} ({each['probability']:.3f}): {text[:200]}")
