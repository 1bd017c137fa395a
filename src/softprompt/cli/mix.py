"""`softprompt mix`: one prompt tuned on several tasks at once, to start others from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import RunConfig, fields_by_panel
from ..training.mixing_plan import CAP, OWN, TEMPERATURE, MixConfig, load_mix
from .command import FAILED, INTERRUPTED, command, with_options
from .output import Output, duration, interval
from .progress import TuneProgress, counting
from .tune import flag_of, load_tuned_backbone, split_settings, steps_of

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..data import Task
    from ..evaluation.runner import Report
    from ..training.mixing import MixResult

PANEL = "Mixture"
NOT_HERE = (*OWN, "auto", "folds", "ensemble")


def _mix(
    output: Output,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config with a tasks section, and settings over it."
        ),
    ] = None,
    **flags: str,
) -> None:
    """Tune one soft prompt on several tasks at once: a source to start the prompt of each task from.

    The config is that of tune with a section of tasks, each with its own table, template and labels, as
    tasks: {sst2: {train: sst2.csv, input: "{soft}{text}", target: " {label}", labels: [bad, good]}, trec: {...}}.
    A prompt for one task then starts from it with tune --from. Ctrl-C keeps a checkpoint; --resume RUN goes on.
    """
    config = load_mix(*split_settings(settings or []), flags)
    tasks = _load_tasks(output, config)
    backbone = load_tuned_backbone(output, config.base)
    result = _run(output, config, backbone, tasks)
    if result.reason == "interrupted":
        output.document({"reason": result.reason, "steps": result.steps, "run": config.base.run})
        output.notes.print(f"interrupted after step {result.steps}; {_go_on(config)}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED)
    result.prompt.save(config.base.out or "", overwrite=config.base.overwrite)
    output.note(f"prompt saved in {config.base.out}")
    test = _score_tests(output, config, backbone, tasks, result)
    _show(output, config, result, test)


def _go_on(config: MixConfig) -> str:
    return f"go on with: softprompt mix --resume {config.base.run}"


def _load_tasks(out: Output, config: MixConfig) -> dict[str, Task]:
    from ..data import Task
    from ..training.mixing import shares_of

    tasks = {name: Task.load(**{**each.task_options(), "name": name}) for name, each in config.tasks.items()}
    shares = shares_of({name: len(task.train) for name, task in tasks.items()}, config.temperature, config.cap)
    for name, task in tasks.items():
        counts = ", ".join(f"{len(split):,} {split.name}" for split in (task.train, task.validation, task.test))
        out.note(f"{name}: {counts}; {shares[name]:.1%} of the mixture")
    without = [name for name, task in tasks.items() if not len(task.validation)]
    if without:
        rest = "the last vectors are kept, not the best" if len(without) == len(tasks) else "they do not count"
        out.warn(f"there are no validation rows of {', '.join(without)}: {rest}; give a file or a share")
    return tasks


def _run(out: Output, config: MixConfig, backbone: Backbone, tasks: dict[str, Task]) -> MixResult:
    from ..training.mixing import mix as mix_tasks

    base = config.base
    out.note(f"{base.tokens} soft tokens for {len(tasks)} tasks; run folder {base.run} (Ctrl-C keeps what is done)")
    try:
        with MixProgress(out, steps_of(base)) as progress:
            return mix_tasks(
                backbone,
                tasks,
                base.tuning(),
                temperature=config.temperature,
                cap=config.cap,
                run_folder=base.run,
                resume=base.resume is not None,
                listen=progress,
                config_text=config.to_yaml(),
            )
    except KeyboardInterrupt:
        out.fail(KeyboardInterrupt(), [f"interrupted at once; {_go_on(config)}"])
        raise typer.Exit(INTERRUPTED) from None


class MixProgress(TuneProgress):
    """That of a run, with each task's validation score."""

    def _on_task(self, event: dict[str, Any]) -> None:
        score = f"accuracy {event['accuracy']:.3f}, " if "accuracy" in event else ""
        self.out.note(f"step {event['step']}/{self.steps}: {event['task']} {score}loss {event['loss']:.3f}")


def _score_tests(
    out: Output, config: MixConfig, backbone: Backbone, tasks: dict[str, Task], result: MixResult
) -> dict[str, Report]:
    """Score the test rows of each task, and write the scores beside the prompt, which is saved already."""
    from ..evaluation.generation import Sampling
    from ..evaluation.runner import evaluate

    base, reports = config.base, {}
    for name, task in tasks.items():
        if not len(task.test):
            continue
        rows = task.test if base.test_rows is None else task.test.take(base.test_rows, seed=0)
        out.note(f"scoring {len(rows):,} test rows of {name}")
        with counting(out, name) as progress:
            sampling = Sampling(base.max_new_tokens)
            reports[name] = evaluate(
                backbone, rows, result.prompt, sampling=sampling, max_tokens=base.max_tokens, progress=progress
            )
    if reports:
        result.prompt.metrics["test"] = {"tasks": {n: report.to_dict(brief=True) for n, report in reports.items()}}
        result.prompt.save(base.out or "", overwrite=True)
    return reports


def _show(out: Output, config: MixConfig, result: MixResult, test: dict[str, Report]) -> None:
    from .scores import headline, table

    shown = table("task", "share", "split", "score", "value", "95 % interval", "rows")
    for name, share in result.shares.items():
        for split, reports in (("validation", result.tasks), ("test", test)):
            if name in reports:
                metric, value, bounds = headline(reports[name])
                row = (f"{share:.1%}", split, metric, f"{value:.3f}", interval(bounds), f"{len(reports[name].true):,}")
                shown.add_row(name, *row)
    if shown.row_count:
        out.show(shown)
    if result.mean is not None:
        out.show(f"mean validation score {result.mean:.3f}")
    out.show(f"{result.steps:,} steps in {duration(result.seconds)}", "")
    base = config.base
    files = {"prompt": base.out, "run": base.run, "report": result.report and str(result.report)}
    for name, path in files.items():
        if path:
            out.show(f"{name:<8}{path}")
    first = next(iter(config.tasks))
    again = f"softprompt tune TASK.yaml --from {base.out} --out {Path(base.out or '').parent / first}"
    out.show("", "a prompt for one task then starts from it:", f"  {again}")
    out.document(
        {
            **files,
            "model": result.prompt.base_model,
            "reason": result.reason,
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "temperature": config.temperature,
            "cap": config.cap,
            "shares": result.shares,
            "mean": result.mean,
            "validation": {name: report.to_dict() for name, report in result.tasks.items()},
            "test": {name: report.to_dict() for name, report in test.items()},
        }
    )


def _flags() -> dict[str, Any]:
    """Those of tune that are not of a single task, and how tasks are mixed."""
    flags = {
        key: flag_of(key, panel) for panel, keys in fields_by_panel().items() for key in keys if key not in NOT_HERE
    }
    told = {
        "temperature": (
            "NUMBER",
            f"1 mixes in proportion to rows, higher nearer to equal shares. [default: {TEMPERATURE}]",
        ),
        "cap": ("INTEGER", f"Rows of a task that count at most. [default: {CAP}]"),
    }
    for key, (metavar, text) in told.items():
        option = typer.Option(f"--{key}", help=text.replace("[", r"\["), metavar=metavar, rich_help_panel=PANEL)
        flags[key] = Annotated[str | None, option]
    assert set(NOT_HERE) <= set(RunConfig.model_fields)
    return flags


with_options(_mix, _flags())
mix = command(_mix)
