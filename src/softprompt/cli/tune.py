"""`softprompt tune`: from a table of examples to a prompt folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from ..config import RunConfig, fields_by_panel, load_config
from .command import FAILED, INTERRUPTED, command, with_options
from .output import Output, duration, interval
from .progress import counting

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..data import Task
    from ..evaluation.runner import Report
    from ..training.run import TuneResult
    from ..training.sweep import SweepResult
    from .few import FewProgress


def _tune(
    output: Output,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config file, and settings over it."),
    ] = None,
    **flags: str,
) -> None:
    """Tune a soft prompt on a frozen model.

    A config file, KEY=VALUE and flags are the same thing; flags win over KEY=VALUE, and these over the file. All
    mistakes in them are told at once, before the model is loaded. Ctrl-C keeps a checkpoint; --resume RUN goes on.
    """
    config = load_config(*split_settings(settings or []), flags)
    from .few import FewProgress, few_task  # which use parts of this file

    task = load_task(output, config, few_task)
    backbone = load_tuned_backbone(output, config)
    tried = None
    if config.auto:
        from .sweep import tune_automatically

        config, tried = tune_automatically(output, config, backbone, task)
    if config.ensemble:
        from .ensemble import tune_and_show

        tune_and_show(output, config, backbone, task)
        return
    result = _run(output, config, backbone, task, FewProgress)
    if result.reason == "interrupted":
        output.document({"reason": result.reason, "steps": result.steps, "run": config.run})
        output.notes.print(
            f"interrupted after step {result.steps}; {how_to_go_on(config)}", markup=False, soft_wrap=True
        )
        raise typer.Exit(FAILED)
    result.prompt.save(config.out or "", overwrite=config.overwrite)
    output.note(f"prompt saved in {config.out}")
    test = score_test(output, config, backbone, task, result)
    _show(output, config, result, test, tried)


def split_settings(settings: list[str]) -> tuple[Path | None, list[str]]:
    """The config file, if the first setting is one, and the key=value texts."""
    if settings and ("=" not in settings[0] or Path(settings[0]).is_file()):
        return Path(settings[0]), settings[1:]
    return None, settings


def how_to_go_on(config: RunConfig) -> str:
    return f"go on with: softprompt tune --resume {config.run}"


def load_task(
    out: Output, config: RunConfig, instead: Callable[[RunConfig, Task], Task | None] = lambda config, task: None
) -> Task:
    """The rows of the config. instead: may give another division of them."""
    from ..data import Task

    task = Task.load(**config.task_options())
    task = instead(config, task) or task
    counts = ", ".join(f"{len(split):,} {split.name}" for split in (task.train, task.validation, task.test))
    classes = f"; classes {', '.join(task.template.classes[:8])}" if task.template.classes else "; free text"
    more = f" and {len(task.template.classes) - 8} more" if len(task.template.classes) > 8 else ""
    out.note(f"rows: {counts}{classes}{more}")
    if not len(task.validation) and not _cross_validated(config, task):
        out.warn("there are no validation rows: the last vectors are kept, not the best; give a file or a share")
    return task


def _cross_validated(config: RunConfig, task: Task) -> bool:
    from ..training.few import folds_of

    return folds_of(task, config.tuning()) > 0


def load_tuned_backbone(out: Output, config: RunConfig) -> Backbone:
    from ..backbone import Backbone
    from ..fileformat import check_output

    check_output(config.out or "", config.overwrite)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return Backbone.load(config.model, precision=config.precision, device=config.device, report=out.note)


def _run(out: Output, config: RunConfig, backbone: Backbone, task: Task, shown: type[FewProgress]) -> TuneResult:
    from ..training.run import tune as tune_prompt

    where = "at the front" if task.template.placement == "front" else task.template.placement.replace("_", " ")
    out.note(f"{config.tokens} soft tokens {where}; run folder {config.run} (Ctrl-C keeps what is done)")
    try:
        with shown(out, steps_of(config)) as progress:
            return tune_prompt(
                backbone,
                task,
                config.tuning(),
                run_folder=config.run,
                resume=config.resume is not None,
                listen=progress,
                config_text=config.to_yaml(),
            )
    except KeyboardInterrupt:
        out.fail(KeyboardInterrupt(), [f"interrupted at once; {how_to_go_on(config)}"])
        raise typer.Exit(INTERRUPTED) from None


def steps_of(config: RunConfig) -> int:
    """How many steps the run that is gone on with has in all."""
    events = Path(config.run or "") / "metrics.jsonl"
    if config.resume is None or not events.exists():
        return 0
    from ..training.monitor import read_events

    return next((int(event["steps"]) for event in read_events(events) if event["event"] == "start"), 0)


def score_test(
    out: Output, config: RunConfig, backbone: Backbone, task: Task, result: TuneResult | SweepResult
) -> Report | None:
    """Score the test rows, and write the scores beside the prompt, which is saved already."""
    if not len(task.test):
        return None
    from ..evaluation.generation import Sampling
    from ..evaluation.runner import evaluate

    rows = task.test if config.test_rows is None else task.test.take(config.test_rows, seed=0)
    out.note(f"scoring {len(rows):,} test rows")
    with counting(out, "test") as progress:
        report = evaluate(
            backbone,
            rows,
            result.prompt,
            sampling=Sampling(config.max_new_tokens),
            max_tokens=config.max_tokens,
            progress=progress,
        )
    result.prompt.metrics["test"] = report.to_dict(brief=True)
    result.prompt.save(config.out or "", overwrite=True)
    return report


def _show(
    out: Output, config: RunConfig, result: TuneResult, test: Report | None, tried: SweepResult | None = None
) -> None:
    from .scores import headline, table

    shown = table("split", "score", "value", "95 % interval", "rows")
    crossed = result.prompt.provenance.get("cross_validation")
    validated = f"cross-validation, {crossed['folds']} folds" if crossed else "validation"
    for name, report in ((validated, result.validation), ("test", test)):
        if report is not None:
            metric, value, bounds = headline(report)
            shown.add_row(name, metric, f"{value:.3f}", interval(bounds), f"{len(report.true):,}")
    if shown.row_count:
        out.show(shown)
    ended = "" if result.reason == "finished" else f" ({result.reason})"
    out.show(f"{result.steps:,} steps in {duration(result.seconds)}{ended}", "")
    files = {"prompt": config.out, "run": config.run, "report": result.report and str(result.report)}
    for name, path in files.items():
        if path:
            out.show(f"{name:<8}{path}")
    out.show("", "go on with:", *(f"  {line}" for line in next_commands(config)))
    out.document(
        {
            **files,
            "model": result.prompt.base_model,
            "tokens": result.prompt.tokens,
            "reason": result.reason,
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "validation": result.validation and result.validation.to_dict(),
            "test": test and test.to_dict(),
            **({"cross_validation": crossed} if crossed else {}),
            **({"auto": [trial.to_dict() for trial in tried.trials]} if tried else {}),
        }
    )


def next_commands(config: RunConfig) -> list[str]:
    from ..templates import Template

    fields = Template.make(config.input, config.target, config.chat, config.labels).fields
    text = '"some text"' if len(fields) == 1 else " ".join(f'{name}="..."' for name in fields)
    data = config.test or config.train
    return [f"softprompt run {config.out} {text}", f"softprompt evaluate {config.out} {data}"]


# --- the flags, made from the fields of RunConfig -------------------------------------------------------------------


def _metavar(key: str, annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if type(None) in get_args(annotation) and len(kinds) == 1:
        return _metavar(key, kinds[0])
    if key in ("labels", "chat", "shares"):
        return {"labels": "A,B,...", "chat": "YAML", "shares": "A,B,C"}[key]
    return {int: "INTEGER", float: "NUMBER"}.get(annotation, "TEXT")


def flag_of(key: str, panel: str) -> Any:
    field = RunConfig.model_fields[key]
    flag = "--from" if key == "from_prompt" else "--" + key.replace("_", "-")
    text = field.description or ""
    if field.is_required():
        text += " [required]"
    elif field.default is not None and not isinstance(field.default, bool):
        default = field.default
        text += f" [default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]"
    text = text.replace("[", r"\[")  # rich would take it for markup
    if field.annotation is bool:
        return Annotated[
            bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, rich_help_panel=panel, show_default=False)
        ]
    metavar = _metavar(key, field.annotation)
    return Annotated[str | None, typer.Option(flag, help=text, metavar=metavar, rich_help_panel=panel)]


with_options(_tune, {key: flag_of(key, panel) for panel, keys in fields_by_panel().items() for key in keys})
tune = command(_tune)
