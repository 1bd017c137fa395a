"""`softprompt tune --ensemble K`, and how several prompts that vote are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from ..config import RunConfig
from .command import FAILED, INTERRUPTED
from .few import FewProgress
from .output import Output, duration, interval
from .progress import counting

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..data import Task
    from ..evaluation.voting import EnsembleReport
    from ..training.ensemble import EnsembleResult


def tune_and_show(out: Output, config: RunConfig, backbone: Backbone, task: Task) -> None:
    """Tune the members, save them, score the test rows alone and together."""
    result = _tune(out, config, backbone, task)
    if result.reason == "interrupted":
        from .tune import how_to_go_on

        out.document({"reason": result.reason, "run": config.run})
        out.notes.print(f"interrupted; {how_to_go_on(config)}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED)
    result.save(config.out or "", overwrite=config.overwrite)
    out.note(f"{len(result.prompts)} prompts saved in {config.out}")
    test = _score(out, config, backbone, task, result)
    _show(out, config, result, test)


def _tune(out: Output, config: RunConfig, backbone: Backbone, task: Task) -> EnsembleResult:
    from ..training.ensemble import tune_ensemble

    out.note(f"{config.ensemble} prompts; run folder {config.run} (Ctrl-C keeps what is done)")
    try:
        with FewProgress(out) as progress:
            return tune_ensemble(
                backbone,
                task,
                config.tuning(),
                size=config.ensemble or 2,
                run_folder=config.run,
                resume=config.resume is not None,
                listen=progress,
                config_text=config.to_yaml(),
            )
    except KeyboardInterrupt:
        from .tune import how_to_go_on

        out.fail(KeyboardInterrupt(), [f"interrupted at once; {how_to_go_on(config)}"])
        raise typer.Exit(INTERRUPTED) from None


def _score(
    out: Output, config: RunConfig, backbone: Backbone, task: Task, result: EnsembleResult
) -> EnsembleReport | None:
    """Let the members vote on the test rows, and write the best member's own scores beside it."""
    if not len(task.test) or task.template.labels is None:
        return None
    from ..evaluation.voting import evaluate_ensemble

    rows = task.test if config.test_rows is None else task.test.take(config.test_rows, seed=0)
    out.note(f"scoring {len(rows):,} test rows")
    with counting(out, "test") as progress:
        report = evaluate_ensemble(backbone, rows, result.prompts, max_tokens=config.max_tokens, progress=progress)
    for prompt, alone in zip(result.prompts, report.members, strict=True):
        prompt.metrics["test"] = alone.to_dict(brief=True)
    result.prompt.metrics["ensemble_test"] = {
        "majority": report.majority.accuracy,
        "averaged": report.averaged.accuracy,
        "mean_of_members": report.mean_accuracy,
        "rows": report.majority.rows,
    }
    result.save(config.out or "", overwrite=True)
    return report


def _show(out: Output, config: RunConfig, result: EnsembleResult, test: EnsembleReport | None) -> None:
    from .tune import next_commands

    if test is not None:
        out.show(f"test, {test.majority.rows:,} rows", vote_table(test))
    out.show(f"{result.steps:,} steps in {duration(result.seconds)}", "")
    for name, path in (("prompts", config.out), ("run", config.run)):
        out.show(f"{name:<8}{path}")
    out.show("", "go on with:", *(f"  {line}" for line in next_commands(config)))
    out.document(
        {
            "prompt": config.out,
            "run": config.run,
            "model": result.prompt.base_model,
            "reason": result.reason,
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "members": result.members,
            "best": result.best + 1,
            "validation": result.validation and result.validation.to_dict(),
            "test": test and test.to_dict(),
        }
    )


def vote_table(report: EnsembleReport) -> Any:
    """Members, their mean, the single best and the votes, each with its interval."""
    from .scores import table

    shown = table("prompts", "accuracy", "95 % interval", "macro-F1", "loss")
    for index, (name, each) in enumerate(zip(report.names, report.members, strict=True)):
        mark = " (best by validation)" if index == report.best else ""
        row = (f"{name}{mark}", f"{each.accuracy:.3f}", interval(each.interval), f"{each.macro_f1:.3f}")
        shown.add_row(*row, f"{each.loss:.3f}")
    best = report.members[report.best_here]
    shown.add_row("mean of these", f"{report.mean_accuracy:.3f}", "", "", "")
    shown.add_row(f"best on these rows ({report.names[report.best_here]})", f"{best.accuracy:.3f}", "", "", "")
    vote, mixed = report.majority, report.averaged
    shown.add_row("majority vote", f"{vote.accuracy:.3f}", interval(vote.interval), f"{vote.macro_f1:.3f}", "")
    figures = (f"{mixed.accuracy:.3f}", interval(mixed.interval), f"{mixed.macro_f1:.3f}", f"{mixed.loss:.3f}")
    shown.add_row("averaged probabilities", *figures)
    return shown
