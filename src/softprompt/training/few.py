"""Few examples: how long to tune is found by cross-validation, and then all rows are tuned on for so long.

A tenth of 40 rows is 4 rows, whose accuracy says next to nothing. So where there are few rows and none of them are set
aside, each row is scored once by a prompt that was tuned without it: K folds, each with a seed of its own, are tuned
side by side over one frozen model. The last run takes all rows through the same schedule, to its end unless the mean
over all rows was clearly better before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_atomic
from ..backbone import Backbone
from ..data import Task
from ..errors import DataError, TrainingError
from ..evaluation.metrics import classification_scores
from ..evaluation.runner import Report
from ..rows import carve
from .config import TuneConfig
from .loop import Validation, planned_steps
from .monitor import Listener
from .run import Run, TuneResult, begin, finish, interruptible
from .sweep import begin_all
from .sweep_plan import SweepPlan
from .sweep_trial import DIVERGED, Trial, advance, turns

FEW = 100  # rows; a tenth of as many, the default share for validation, would be under ten
FOLDS = 5
CHECKS = 10  # how often a run is validated
FOLDER = "folds"  # inside the run folder
NUMBER = "\0number"  # a column that no table has
SETTING = "cross_validated"  # in a report: scores of rows by prompts that were tuned without them

Tell = Callable[[dict[str, Any]], None]


@dataclass
class CrossValidation:
    """steps: after which the last run ends, of planned steps. report: of all rows, each scored by the fold
    that it was kept out of. curve: (step, score, loss) of each validation. folds, rows, metric: what it was done with.

    The interval of the report is that of as many independent rows. Folds share most of their training rows, so it is
    somewhat too narrow (no unbiased estimate exists: Bengio and Grandvalet 2004), and where an earlier step
    was taken its score is the best of the curve, so it is somewhat too high.
    """

    steps: int
    planned: int
    folds: int
    rows: int
    metric: str
    report: Report
    curve: list[tuple[int, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        best = next(point for point in self.curve if point[0] == self.steps)
        found: dict[str, Any] = {"folds": self.folds, "rows": self.rows, "steps": self.steps, "planned": self.planned}
        found |= {"metric": self.metric, "score": best[1], "loss": best[2]}
        if self.report.scores is not None:
            found["interval"] = list(self.report.interval)
        return found | {"curve": [list(point) for point in self.curve]}


# --- whether and how ------------------------------------------------------------------------------------------------


def folds_of(task: Task, config: TuneConfig) -> int:
    """In how many folds `task` is to be cross-validated; 0: not at all.

    config.folds None: only where there are no validation rows and fewer than FEW training rows, and as far as they can
    be divided. Raises DataError where folds were asked for and rows cannot be divided so, or validation rows are there.
    """
    if config.folds == 0 or (config.folds is None and (len(task.validation) or not 0 < len(task.train) < FEW)):
        return 0
    if len(task.validation):
        raise DataError("there are validation rows, and folds are for tuning without them; leave out one of the two")
    wanted = config.folds or FOLDS
    if config.folds is not None:
        _check(task, wanted, config)
        return wanted
    for count in range(min(wanted, len(task.train)), 1, -1):
        try:
            _check(task, count, config)
        except DataError:
            continue
        return count
    return 0


def _check(task: Task, count: int, config: TuneConfig) -> None:
    if count > len(task.train):
        raise DataError(f"{len(task.train)} training rows cannot be divided into {count} folds; use fewer, or folds=0")
    for number, part in enumerate(fold_rows(task, count, config.seed), 1):
        rest = len(task.train) - len(part)
        classes = (
            {label for i, label in enumerate(task.train.labels) if i not in part} if _labelled(task) else {"", " "}
        )
        if not part or not rest or len(classes) < 2:
            what = "no rows" if not part else "no rows to tune on" if not rest else "rows of one class only to tune on"
            raise DataError(
                f"{len(task.train)} training rows cannot be divided into {count} folds: fold {number} has {what}; use "
                "fewer folds, more rows, or folds=0"
            )


def _labelled(task: Task) -> bool:
    return task.template.label_field is not None


def fold_rows(task: Task, count: int, seed: int) -> list[list[int]]:
    """The training rows of each fold, by index: divided by class, rows with the same input or group in one fold."""
    numbered = [{**row, NUMBER: str(index)} for index, row in enumerate(task.train)]
    shares = [1 / count] * count
    parts = carve(numbered, task.template, shares, seed, True, task.source.get("group_by"))
    return [[int(row[NUMBER]) for row in part] for part in parts]


def fold_tasks(task: Task, count: int, seed: int) -> list[Task]:
    """One task a fold: tuned on all other rows, validated on the fold's."""
    made = []
    for part in fold_rows(task, count, seed):
        inside = set(part)
        held = tuple(row for index, row in enumerate(task.train) if index in inside)
        rest = tuple(row for index, row in enumerate(task.train) if index not in inside)
        validation = replace(task.validation, rows=held, template=task.template)
        made.append(replace(task, train=replace(task.train, rows=rest), validation=validation))
    return made


def few_config(config: TuneConfig, rows: int) -> TuneConfig:
    """`config` as all runs of few rows have it: the steps of a run over all `rows`, validated CHECKS times."""
    steps = planned_steps(config, rows)
    every = config.validate_every or max(1, math.ceil(steps / CHECKS))
    return config.model_copy(update={"steps": steps, "validate_every": every, "patience": None})


# --- cross-validation -----------------------------------------------------------------------------------------------


class Folds:
    """The runs of all folds, advanced together.

    config: of `few_config`. patience: validations without a better mean after which no fold goes on; None: all go on to
    the end.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        config: TuneConfig,
        count: int,
        *,
        patience: int | None = None,
        folder: Path | None = None,
        tell: Tell = lambda event: None,
    ):
        self.task, self.config, self.count, self.tell = task, config, count, tell
        self.patience = patience
        tasks = fold_tasks(task, count, config.seed)
        plan = SweepPlan(tuple({"fold": number, "seed": config.seed + number} for number in range(1, count + 1)), 0)
        configs = [config.model_copy(update={"seed": own["seed"], "tensorboard": False}) for own in plan.trials]
        self.trials = begin_all(backbone, tasks, plan, configs, folder, folder is not None, tell)
        for trial in self.trials:
            _log_predictions(trial.run)

    def run(self, asked: Callable[[], bool]) -> CrossValidation | None:
        """Advance all folds to the end, or to where `patience` ends them; None if that was interrupted."""
        means: dict[int, Validation] = {}
        for step in self.checks():
            for some in turns(self.trials):
                advance(some, step / some[0].steps, asked, _none_diverged)
                if asked():
                    return None
            means[step] = found = self.mean(step)
            self.tell({"event": "fold-mean", "step": step, "score": found.score, "loss": found.loss})
            since_best = list(reversed(means)).index(highest(means))
            if self.patience is not None and since_best >= self.patience:
                break
        chosen = choose(means)
        curve = [(step, found.score, found.loss) for step, found in means.items()]
        metric, rows, steps = means[chosen].metric, len(self.task.train), self.trials[0].steps
        return CrossValidation(chosen, steps, self.count, rows, metric, self.report(chosen), curve)

    def checks(self) -> Iterator[int]:
        """The steps after which a run is validated."""
        every, steps = self.config.validate_every or 1, self.trials[0].steps
        yield from range(every, steps, every)
        yield steps

    def mean(self, step: int) -> Validation:
        """The mean over all rows after `step`, each scored by the fold that it was kept out of."""
        found = [(_event(trial, "validation", step), len(trial.run.task.validation)) for trial in self.trials]
        rows = sum(count for _, count in found)
        score = sum(each["score"] * count for each, count in found) / rows
        loss = sum(each["loss"] * count for each, count in found) / rows
        error = (score * (1 - score) / rows) ** 0.5 if _labelled(self.task) else 0.0
        return Validation(score, loss, found[0][0]["metric"], error=error)

    def report(self, step: int) -> Report:
        """The scores of all rows after `step`."""
        folds = [(trial.run.task.validation, _event(trial, "fold", step)) for trial in self.trials]
        rows = [row for split, _ in folds for row in split]
        template, loss = self.task.template, self.mean(step).loss
        inputs = [template.without_soft().render_context(row) for row in rows]
        setting = {"shots": 0, "prompt": True, "calibrated": False, SETTING: self.count}
        if not _labelled(self.task):
            true = [template.render_target(row).strip() for row in rows]
            return Report(None, None, loss, true, [], inputs, setting=setting)
        true = [label for split, _ in folds for label in split.labels]
        predicted = [label for _, event in folds for label in event["predicted"]]
        probabilities = torch.tensor([each for _, event in folds for each in event["probabilities"]]).double()
        scores = classification_scores(true, predicted, probabilities.numpy(), list(template.classes))
        return Report(scores, None, loss, true, predicted, inputs, probabilities, setting=setting)


def _none_diverged(trial: Trial) -> None:
    if trial.state == DIVERGED:
        raise TrainingError(trial.why)


def highest(means: dict[int, Validation]) -> int:
    """The first step after which the mean was highest."""
    return max(means, key=lambda step: means[step].score)


def choose(means: dict[int, Validation]) -> int:
    """The step to end at, by the mean after each: the last, unless the best was better by more than a standard error.

    The end of a schedule, where steps are small and averaged, is nearly always better than its middle, and which of ten
    means of few rows is the highest is mostly chance. (Their loss says less still: it rises as the prompt becomes more
    sure, while the accuracy rises too.)
    """
    last, best = max(means), highest(means)
    return best if means[best].score > means[last].score + means[last].error else last


def _log_predictions(run: Run) -> None:
    """Have each validation of `run` leave what it predicted in the log, where a resumed run finds it again."""
    validate = run.trainer.validate
    assert validate is not None

    def logged(vectors: torch.Tensor) -> Validation:
        found = validate(vectors)
        if found.details is not None and found.details.probabilities is not None:
            each = found.details.probabilities.tolist()
            run.monitor.add("fold", run.trainer.step, predicted=found.predicted, probabilities=each)
        else:
            run.monitor.add("fold", run.trainer.step)
        return found

    run.trainer.validate = logged


def _event(trial: Trial, kind: str, step: int) -> dict[str, Any]:
    return next(e for e in trial.run.monitor.events if e["event"] == kind and e["step"] == step)


# --- the whole ------------------------------------------------------------------------------------------------------


def tune_few(
    backbone: Backbone,
    task: Task,
    config: TuneConfig,
    folds: int,
    *,
    folder: Path | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    baselines: Sequence[dict[str, Any]] = (),
    config_text: str | None = None,
) -> TuneResult:
    """What `tune` does with few rows: cross-validate in `folds` folds, then tune on all rows for the steps found.

    The prompt has the very vectors that a run over all rows has after so many of its steps. `validation` of the result
    is the report of all rows, each scored by the fold that it was kept out of.
    """

    def tell(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    settled = few_config(config, len(task.train))
    final = begin(backbone, task, settled, folder=folder, resume=resume, listeners=listeners, config_text=config_text)
    tell({"event": "folds", "folds": folds, "rows": len(task.train), "steps": final.trainer.steps})
    with interruptible() as asked:
        given: dict[str, Any] = {"patience": config.patience, "folder": folder, "tell": tell, "asked": asked}
        found = cross_validate(backbone, task, settled, folds, **given)
        if found is None:
            return finish(final, "interrupted")
        tell({"event": "cross-validation", **found.to_dict()})
        if not run_to([final], found.steps, asked):
            return finish(final, "interrupted")
    result = finish(final, "finished", baselines, validation=found.report)
    result.prompt.provenance["cross_validation"] = found.to_dict()
    if folder is not None:
        path = folder / "result.json"
        facts = {**json.loads(path.read_text(encoding="utf-8")), "cross_validation": found.to_dict()}
        write_atomic(path, json.dumps(facts, indent=2).encode())
    return result


def cross_validate(
    backbone: Backbone,
    task: Task,
    config: TuneConfig,
    folds: int,
    *,
    patience: int | None = None,
    folder: Path | None = None,
    tell: Tell = lambda event: None,
    asked: Callable[[], bool] = lambda: False,
) -> CrossValidation | None:
    """How many steps to tune on the training rows of `task`; None if interrupted. config: of `few_config`.

    folder: a run folder; the folds' runs go into it, and those that are there already are gone on with.
    """
    place = folder / FOLDER if folder is not None else None
    runs = Folds(backbone, task, config, folds, patience=patience, folder=place, tell=tell)
    return runs.run(asked)


def run_to(runs: Sequence[Run], step: int, asked: Callable[[], bool]) -> bool:
    """Train `runs` up to `step` of their schedule and end them there; False if interrupted. TrainingError as tune."""
    trials = [Trial("all rows", {}, run) for run in runs]
    for run in runs:
        if run.trainer.step >= step:  # resumed after its end
            run.monitor.look_back(run.trainer.step)
    for some in turns(trials):
        advance(some, step / some[0].steps, asked, _none_diverged)
        if any(trial.step < step for trial in some):
            return False
        for trial in some:
            if step < trial.steps:
                trial.log("end", reason="finished")
    return True
