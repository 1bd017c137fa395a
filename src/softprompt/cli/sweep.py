"""`softprompt sweep`: many settings tuned over one frozen model, and the best of them saved."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..atomic import write_atomic
from ..config import CONFIG_FILE, fields_by_panel
from ..training.sweep_config import SweepConfig, load_sweep
from .command import FAILED, INTERRUPTED, command, with_options
from .output import Output, duration
from .progress import PLAIN_SECONDS, RunProgress, _bar
from .tune import flag_of, how_to_go_on, load_task, load_tuned_backbone, next_commands, score_test, split_settings

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..config import RunConfig
    from ..data import Task
    from ..evaluation.runner import Report
    from ..training.sweep import SweepResult

WINNER = "winner.yaml"  # in the sweep's folder: what `softprompt tune` needs to tune the winner again
PANEL = "Sweep"
NOT_HERE = ("auto", "folds", "ensemble")  # of tune, but not of a sweep


def _sweep(
    output: Output,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config with a sweep section, and settings over it."
        ),
    ] = None,
    **flags: str,
) -> None:
    """Tune with many settings over one frozen model, drop the losers early, and save the best.

    The config is that of tune with a section that says what is tried, as sweep: {grid: {learning_rate: [0.02, 0.05]}}.
    Every trial stays in the run folder. Ctrl-C keeps what is done; --resume RUN goes on.
    """
    config = load_sweep(*split_settings(settings or []), flags)
    task = load_task(output, config.base)
    backbone = load_tuned_backbone(output, config.base)
    result = _race(output, config, backbone, task)
    if result.reason == "interrupted":
        output.document({"reason": result.reason, "run": config.base.run, "trials": _trials(result)})
        output.notes.print(f"interrupted; {_how_to_go_on(config)}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED)
    result.prompt.save(config.base.out or "", overwrite=config.base.overwrite)
    output.note(f"the winner's prompt is saved in {config.base.out}")
    again = config.of_trial(result.winner.settings).model_copy(update={"run": None})
    write_atomic(Path(config.base.run or "") / WINNER, again.to_yaml().encode())
    test = score_test(output, config.base, backbone, result.winner.run.task, result)
    _show(output, config, result, test)


def _how_to_go_on(config: SweepConfig) -> str:
    return f"go on with: softprompt sweep --resume {config.base.run}"


def _race(out: Output, config: SweepConfig, backbone: Backbone, task: Task) -> SweepResult:
    from ..training.sweep import sweep as sweep_prompts

    base = config.base
    out.note(f"{len(config.plan.trials)} trials; run folder {base.run} (Ctrl-C keeps what is done)")
    try:
        with SweepProgress(out) as progress:
            return sweep_prompts(
                backbone,
                task,
                base.tuning(),
                trials=config.plan.trials,
                halving=config.plan.halving,
                run_folder=base.run,
                resume=base.resume is not None,
                listen=progress,
                config_text=config.to_yaml(),
            )
    except KeyboardInterrupt:
        out.fail(KeyboardInterrupt(), [f"interrupted at once; {_how_to_go_on(config)}"])
        raise typer.Exit(INTERRUPTED) from None


def tune_automatically(out: Output, config: RunConfig, backbone: Backbone, task: Task) -> tuple[RunConfig, SweepResult]:
    """What `tune --auto` does first: a small sweep inside the run folder. Returns the config with what won.

    The run folder's config says auto until the sweep has ended, so that --resume goes on with the sweep until then.
    """
    from ..training.sweep import sweep as sweep_prompts
    from ..training.sweep_auto import FOLDER, auto_config, auto_trials

    folder = Path(config.run or "")
    if config.resume is None:
        write_atomic(folder / CONFIG_FILE, config.to_yaml().encode())
    trials = auto_trials(config.tuning(), task)
    out.note(f"trying {len(trials)} settings for a fraction of the steps, in {folder / FOLDER}")
    with SweepProgress(out) as progress:
        result = sweep_prompts(
            backbone,
            task,
            auto_config(config.tuning(), task),
            trials=trials,
            run_folder=folder / FOLDER,
            resume=(folder / FOLDER / "run.json").exists(),
            listen=progress,
        )
    if result.reason == "interrupted":
        out.document({"reason": result.reason, "run": config.run, "auto": _trials(result)})
        out.notes.print(f"interrupted; {how_to_go_on(config)}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED)
    if not out.quiet:
        out.notes.print(trial_table(result))
    out.note(f"tuning with {in_words(result.winner.settings)}")
    begun = (folder / "run.json").exists()
    settled = {**result.winner.settings, "auto": False, "resume": config.resume if begun else None}
    return config.model_copy(update=settled), result


# --- showing --------------------------------------------------------------------------------------------------------


def in_words(settings: dict[str, Any]) -> str:
    """{'learning_rate': 0.05, 'init': 'text'} -> 'learning_rate=0.05 init=text'."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _trials(result: SweepResult) -> list[dict[str, Any]]:
    return [trial.to_dict() for trial in result.trials]


def trial_table(result: SweepResult) -> Any:
    """The trials, best validation score first."""
    from .scores import table

    keys = list(dict.fromkeys(key for trial in result.trials for key in trial.settings))
    shown = table("trial", *keys, "score", "loss", "steps", "ended")
    for trial in result.trials:
        values = [str(trial.settings.get(key, "")).replace("\n", "\\n") for key in keys]
        scores = [_number(trial.score), _number(trial.loss)]
        shown.add_row(trial.name, *values, *scores, f"{trial.step:,} of {trial.steps:,}", trial.state)
    return shown


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _show(out: Output, config: SweepConfig, result: SweepResult, test: Report | None) -> None:
    from .scores import in_one_line

    base, winner = config.base, result.winner
    out.show(trial_table(result))
    out.show(f"the winner is trial {winner.name}: {in_words(winner.settings)}")
    for name, report in (("validation", result.validation), ("test", test)):
        if report is not None:
            out.show(f"{name} {in_one_line(report)}")
    out.show(f"{len(result.trials)} trials in {duration(result.seconds)}", "")
    again = str(Path(base.run or "") / WINNER)
    files = {"prompt": base.out, "run": base.run, "report": result.report and str(result.report)}
    files["config"] = again
    for name, path in files.items():
        if path:
            out.show(f"{name:<8}{path}")
    out.show("", "go on with:", *(f"  {line}" for line in next_commands(base)))
    out.document(
        {
            **files,
            "model": result.prompt.base_model,
            "reason": result.reason,
            "seconds": round(result.seconds, 2),
            "halving": config.plan.halving,
            "winner": winner.to_dict(),
            "trials": _trials(result),
            "validation": result.validation and result.validation.to_dict(),
            "test": test and test.to_dict(),
        }
    )


class SweepProgress(RunProgress):
    """Listens to the events of a sweep and of its trials, and shows them. Use as a context."""

    least_told = 1.0  # most trials find theirs ready

    def __init__(self, out: Output):
        super().__init__(out)
        self.done, self.first, self.total = 0, 0, 0
        self.settings: dict[str, str] = {}
        self.scores: dict[str, float] = {}
        self.warned: set[str] = set()

    def _on_sweep(self, event: dict[str, Any]) -> None:
        self.settings = {each["trial"]: in_words(each["settings"]) for each in event["trials"]}
        self.total, self.done, self.first = event["steps"], event["done"], event["done"]
        self.begun = self.told = time.monotonic()
        going_on = f", {self.done:,} of them done" if self.done else ""
        self.out.note(f"about {self.total:,} steps in all{going_on}")
        if self.out.live:
            self._bar = _bar(self.out)
            self._task = self._bar.add_task("sweep", total=self.total, completed=self.done, told="")
            self._bar.start()

    def _on_start(self, event: dict[str, Any]) -> None:
        if event["cut_rows"]:
            self._warn(f"{event['cut_rows']:,} of {event['rows']:,} training rows were cut to fit; see max_tokens")

    def _on_texts(self, event: dict[str, Any]) -> None:
        if event["done"] <= event["rows"]:  # else the trial goes on after a rung
            super()._on_texts(event)

    def _on_step(self, event: dict[str, Any]) -> None:
        self._end_texts()
        self.done += 1
        words = self._words(event)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=max(self.total, self.done), told=words)
        elif not self.out.quiet and time.monotonic() - self.told >= PLAIN_SECONDS:
            self.told = time.monotonic()
            self.out.note(f"step {self.done:,} of about {max(self.total, self.done):,}: {words}")

    def _words(self, event: dict[str, Any]) -> str:
        """Which trial, its step and loss, the best so far, the time left."""
        each = (time.monotonic() - self.begun) / max(1, self.done - self.first)
        best = max(self.scores, key=lambda name: self.scores[name], default=None)
        parts = [f"trial {event['trial']} step {event['step']}", f"loss {event['loss']:.3f}"]
        if best is not None:
            parts.append(f"best {best} {self.scores[best]:.3f}")
        return ", ".join([*parts, f"{duration(each * max(0, self.total - self.done))} left"])

    def _on_validation(self, event: dict[str, Any]) -> None:
        name = event["trial"]
        self.scores[name] = max(event["score"], self.scores.get(name, -math.inf))

    def _on_rung(self, event: dict[str, Any]) -> None:
        if "trial" in event:  # one trial was judged
            self._on_validation(event)
            return
        best = ", ".join(event["kept"])
        self.out.note(
            f"after {event['share']:.0%} of the steps {len(event['kept'])} of {event['entered']} trials go on: {best}"
        )

    def _on_trial(self, event: dict[str, Any]) -> None:
        named = f"trial {event['trial']} ({self.settings.get(event['trial'], '')})"
        if event["state"] == "diverged":
            self.scores.pop(event["trial"], None)
            self.out.warn(f"{named} ended at step {event['step']}, the others go on: {event['why']}")
        else:
            self.out.note(f"{named} {event['state']}: score {event['score']:.3f}, loss {event['loss']:.3f}")

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._warn(f"trial {event['trial']}, step {event['step']}: {event['text']}")

    def _warn(self, text: str) -> None:
        """The same about the rows is not told for each trial."""
        if text not in self.warned:
            self.warned.add(text)
            self.out.warn(text)


def _flags() -> dict[str, Any]:
    """Those of tune, and what is tried."""
    flags = {
        key: flag_of(key, panel) for panel, keys in fields_by_panel().items() for key in keys if key not in NOT_HERE
    }
    told = {
        "grid": (
            "YAML",
            "Values by setting, all combinations are tried: '{learning_rate: [0.02, 0.05], init: [text, labels]}'.",
        ),
        "trials": ("YAML", "Settings one after the other: '[{tokens: 20}, {tokens: 50, learning_rate: 0.02}]'."),
        "halving": (
            "INTEGER",
            "After each rung one trial in so many goes on; off lets all run to the end. [default: 3]",
        ),
    }
    for key, (metavar, text) in told.items():
        flags[key] = Annotated[
            str | None,
            typer.Option(f"--{key}", help=text.replace("[", r"\["), metavar=metavar, rich_help_panel=PANEL),
        ]
    return flags


with_options(_sweep, _flags())
sweep = command(_sweep)
