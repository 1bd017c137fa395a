"""`sweep`: many prompts tuned over one frozen model in one process, the losers dropped early.

Trials are runs like those of `tune`, and a trial that runs to the end has the very vectors of such a run (but for
rounding, where trials share passes). What they have in common is done once: the model, the encoded rows, and the states
of texts before any soft token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_atomic
from ..backbone import Backbone
from ..data import Task
from ..errors import ConfigError, DataError, OutputError, SoftPromptError, TemplateError, TrainingError
from ..evaluation.runner import Report
from ..prompt import SoftPrompt
from ..templates import Template
from ..text_store.store import open_texts
from .config import TuneConfig
from .folder import prepare, record
from .loop import Validation
from .monitor import Listener
from .run import begin, encode_task, finish, interruptible, settle
from .sweep_plan import HALVING, Settings, SweepPlan, expected_runs, kept, make_plan, rungs
from .sweep_trial import DIVERGED, FINISHED, RUNNING, Trial, advance, best_first, finite, turns

STATE = "sweep.json"
Tell = Callable[[dict[str, Any]], None]


@dataclass
class SweepResult:
    """prompt: the winner's best vectors. trials: all of them, best validation score first; the first is the winner.
    validation: the winner's report on the validation split, report: its report.html, both None when interrupted.
    reason: "finished" or "interrupted"."""

    prompt: SoftPrompt
    trials: list[Trial]
    reason: str
    validation: Report | None = None
    report: Path | None = None
    run_folder: Path | None = None
    seconds: float = 0.0

    @property
    def winner(self) -> Trial:
        return self.trials[0]


def sweep(
    backbone: Backbone,
    task: Task,
    config: TuneConfig | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    trials: Sequence[Mapping[str, Any]] | None = None,
    halving: int = HALVING,
    run_folder: str | Path | None = None,
    resume: bool = False,
    share_passes: bool | None = None,
    listen: Listener | Sequence[Listener] = (),
    config_text: str | None = None,
    **settings: Any,
) -> SweepResult:
    """Tune a prompt for each of several settings, over one frozen `backbone`, and find the best by validation.

    grid: lists of values by setting, of which all combinations are tried; trials: settings one after the other; both
    may be given. A setting is a field of TuneConfig, or `input` for another text with {soft} in another place. config
    and settings: what all trials have in common, as for `tune`. All trials learn from and are scored on the same rows.

    halving: by successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) only the best one in `halving` trials
    goes on after 1/9, 1/3 (for 3) of the steps; 0 lets all run to the end. run_folder: where every trial's settings,
    log, checkpoint and prompt go. resume: go on from there; the result is that of the undisturbed sweep. share_passes:
    compute a step of all trials in one pass where their rows begin alike and their prompts have the same shape; None:
    on every device but a CPU. listen: called with each event of each trial, with its "trial", and with those of the
    sweep ("sweep", "rung", "trial").

    A trial whose loss is not finite ends, and the others go on. Raises ConfigError (all mistakes in the settings),
    DataError (no rows to train or to compare on), OutputError (folder), TrainingError (all trials diverged).
    """
    begun = time.monotonic()
    base, plan, configs = _settings(config, settings, grid, trials, halving)
    if not len(task.validation):
        raise DataError("a sweep compares trials by validation rows and there are none; give a file or a share")
    folder = Path(run_folder) if run_folder is not None else None
    listeners = (listen,) if callable(listen) else tuple(listen)
    tasks = _tasks(task, plan)

    def tell(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    state = _open_folder(folder, resume, backbone, task, base, plan, config_text)
    racers = begin_all(backbone, tasks, plan, configs, folder, resume, tell)
    steps = sum(trial.steps for trial in racers) / len(racers) * expected_runs(len(racers), plan.halving)
    done = sum(trial.step for trial in racers)
    tell({"event": "sweep", "trials": [t.to_dict() for t in racers], "steps": round(steps), "done": done})
    with interruptible() as asked:
        finished = _race(racers, plan.halving, share_passes, state, asked, tell)
    ordered = sorted(racers, key=lambda trial: trial.rank)
    if not finished:
        prompt = _best_so_far(ordered)
        return SweepResult(prompt, ordered, "interrupted", None, None, folder, time.monotonic() - begun)
    return _crown(ordered, plan, state, folder, begun)


def _best_so_far(ordered: Sequence[Trial]) -> SoftPrompt:
    from .run import prompt_of

    return ordered[0].prompt or prompt_of(ordered[0].run, "interrupted")


def _crown(ordered: list[Trial], plan: SweepPlan, state: _State, folder: Path | None, begun: float) -> SweepResult:
    """The winner with its scores and its report."""
    winner = ordered[0]
    result = finish(winner.run, winner.state)
    made = {"trial": winner.name, "settings": winner.settings, "trials": len(ordered), "halving": plan.halving}
    result.prompt.provenance["sweep"] = made
    winner.prompt = result.prompt
    if winner.run.folder:
        result.prompt.save(winner.run.folder / "prompt", overwrite=True)
        facts = {**winner.to_dict(), "validation": result.prompt.metrics.get("validation")}
        write_atomic(winner.run.folder / "result.json", json.dumps(facts, indent=2).encode())
    state.finish([trial.to_dict() for trial in ordered])
    seconds = time.monotonic() - begun
    return SweepResult(result.prompt, ordered, "finished", result.validation, result.report, folder, seconds)


# --- making ready ---------------------------------------------------------------------------------------------------


def _settings(
    config: TuneConfig | None, settings: Settings, grid: Any, trials: Any, halving: Any
) -> tuple[TuneConfig, SweepPlan, list[TuneConfig]]:
    """The base, the plan and each trial's settings, or all mistakes in them at once."""
    problems: list[str] = []
    plan = make_plan(grid, trials, halving, problems)
    configs, base = [], None
    for own in ({}, *plan.trials):
        tuned = {key: value for key, value in own.items() if key != "input"}
        try:
            configs.append(settle(config, {**settings, **tuned}))
            base = base or configs[0]
        except ConfigError as error:
            named = f"trial {tuned}: " if own else ""
            told = {text.partition("}: ")[2] or text for text in problems}
            problems += [named + text for text in error.problems if text not in told]
    if problems:
        raise ConfigError(problems)
    assert base is not None
    return base, plan, configs[1:]


def _tasks(task: Task, plan: SweepPlan) -> list[Task]:
    """Each trial's task: the same rows, for some with another text around them."""
    made: dict[Any, Task] = {None: task}
    problems = []
    for text in dict.fromkeys(own.get("input") for own in plan.trials):
        if text is None:
            continue
        try:
            made[text] = _with_input(task, text)
        except SoftPromptError as error:
            problems.append(f"input {text!r:.80}: {error}")
    if problems:
        raise ConfigError(problems)
    return [made[own.get("input")] for own in plan.trials]


def _with_input(task: Task, text: str) -> Task:
    old = task.template
    template = Template.make(text, old.target, None, old.labels)
    missing = [name for name in template.fields if any(name not in row for row in task.train)]
    if missing:
        raise TemplateError(f"no column '{missing[0]}' in the rows; they have {', '.join(task.train[0])}")
    return task.with_template(template)


def begin_all(
    backbone: Backbone,
    tasks: Sequence[Task],
    plan: SweepPlan,
    configs: Sequence[TuneConfig],
    folder: Path | None,
    resume: bool,
    tell: Tell,
) -> list[Trial]:
    """A run for each trial. Those with the same rows share them encoded, and all share the states of texts."""
    texts = open_texts(backbone, configs[0])
    encoded: dict[Any, Any] = {}
    width = max(2, len(str(len(configs))))
    racers = []
    for number, (own, task, config) in enumerate(zip(plan.trials, tasks, configs, strict=True), 1):
        name = f"{number:0{width}}"
        alike = (id(task), config.tokens, config.max_tokens)
        if alike not in encoded:
            encoded[alike] = encode_task(backbone, task, config)
        place = folder / "trials" / name if folder else None
        run = begin(
            backbone,
            task,
            config,
            folder=place,
            resume=resume and place is not None and (place / "run.json").exists(),
            listeners=(_named(name, tell),),
            texts=texts,
            encoded=encoded[alike],
        )
        if run.resumed:  # it may have ended already, and then its log is all that tells how
            run.monitor.look_back(run.trainer.step)
        if run.trainer.validate is not None:
            run.trainer.validate = finite(run.trainer.validate)
        racers.append(Trial(name, own, run))
    return racers


def _named(name: str, tell: Tell) -> Listener:
    return lambda event: tell({**event, "trial": name})


class _State:
    """What has been decided so far, kept in sweep.json so that a resumed sweep decides nothing twice."""

    def __init__(self, path: Path | None, data: Mapping[str, Any]):
        self.path = path
        self.rungs: list[dict[str, Any]] = list(data.get("rungs", ()))
        self.diverged: dict[str, str] = dict(data.get("diverged", {}))

    def finish(self, trials: list[dict[str, Any]]) -> None:
        self.save(winner=trials[0]["trial"], trials=trials)

    def save(self, **more: Any) -> None:
        if self.path is not None:
            data = {**more, "rungs": self.rungs, "diverged": self.diverged}
            write_atomic(self.path, json.dumps(data, indent=2, ensure_ascii=False, default=str).encode())


def _open_folder(
    folder: Path | None,
    resume: bool,
    backbone: Backbone,
    task: Task,
    config: TuneConfig,
    plan: SweepPlan,
    config_text: str | None,
) -> _State:
    """Make the sweep's folder ready, or check that the one there can be gone on with."""
    now = {"trials": [dict(own) for own in plan.trials], "halving": plan.halving}
    prepare(folder, resume, {**record(backbone, task, config), "sweep": now}, config_text)
    if folder is None:
        return _State(None, {})
    if not resume:
        return _State(folder / STATE, {})
    before = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("sweep")
    if before != json.loads(json.dumps(now, default=str)):
        what = "is a run of tune, not a sweep" if before is None else "was started with other trials or halving"
        raise ConfigError(f"the run in {folder} {what}; resume it with what it was started with, or start a new one")
    path = folder / STATE
    try:
        return _State(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {path}: {error}; start the sweep anew in another folder") from error


# --- the race -------------------------------------------------------------------------------------------------------


def _race(
    trials: list[Trial], halving: int, together: bool | None, state: _State, asked: Callable[[], bool], tell: Tell
) -> bool:
    """Train all, dropping the losers at each rung; False if it was interrupted. Raises TrainingError (all diverged)."""
    for trial in trials:
        if trial.name in state.diverged:  # before the sweep was resumed
            trial.state, trial.why = DIVERGED, state.diverged[trial.name]
            trial.keep()
    for number, share in enumerate([*rungs(len(trials), halving), 1.0]):
        entered = [trial for trial in trials if trial.state == RUNNING]
        if number < len(state.rungs):
            _drop(entered, state.rungs[number], tell)
            continue
        if not _advance(entered, share, together, state, asked, tell):
            return False
        if share < 1:
            scores = {trial.name: found for trial in entered if trial.state == RUNNING and (found := trial.judge())}
            _note_diverged(entered, state, tell)
            stay = best_first(scores)[: kept(len(entered), halving)]
            plain = {n: {"score": v.score, "loss": v.loss, "error": v.error} for n, v in scores.items()}
            state.rungs.append({"share": share, "scores": plain, "kept": stay})
            state.save()
            _drop(entered, state.rungs[-1], tell)
        if all(trial.state == DIVERGED for trial in trials):
            raise TrainingError(f"all {len(trials)} trials diverged ({trials[0].why}); try smaller learning rates")
    for trial in trials:
        if trial.state == RUNNING:
            _end(trial, FINISHED, tell)
    return True


def _advance(
    trials: Sequence[Trial], share: float, together: bool | None, state: _State, asked: Callable[[], bool], tell: Tell
) -> bool:
    """Train each of `trials` up to `share` of its steps, step by step or one after another; False if that was
    interrupted."""
    for some in turns(trials, together):
        advance(some, share, asked, lambda trial: _note_diverged([trial], state, tell))
        if asked():
            return False
    return True


def _note_diverged(trials: Sequence[Trial], state: _State, tell: Tell) -> None:
    for trial in trials:
        if trial.state == DIVERGED and trial.name not in state.diverged:
            state.diverged[trial.name] = trial.why
            state.save()
            _end(trial, DIVERGED, tell)


def _drop(entered: Sequence[Trial], rung: Mapping[str, Any], tell: Tell) -> None:
    for trial in entered:
        if trial.name in rung["scores"] and trial.name not in rung["kept"]:
            facts = rung["scores"][trial.name]
            trial.drop(Validation(facts["score"], facts["loss"], "", error=facts["error"]))
            _end(trial, trial.state, tell)
    tell({"event": "rung", "share": rung["share"], "kept": rung["kept"], "entered": len(entered)})


def _end(trial: Trial, state: str, tell: Tell) -> None:
    trial.state = state
    trial.keep()
    tell({"event": "trial", **trial.to_dict()})
