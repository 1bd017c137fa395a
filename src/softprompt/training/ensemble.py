"""Ensembles: K prompts of one task, tuned over one frozen model with K seeds, kept in one folder, asked together.

Lester et al. 2021 (arXiv:2104.08691, section 6). A member is the run of `tune` with its seed. The folder is that
of an ordinary prompt, the best member by validation, so that everything that takes a prompt takes it; the members lie
in `members/` inside it, and `evaluate` lets them vote.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..data import Task
from ..errors import ConfigError, PromptFormatError
from ..evaluation.runner import Report
from ..prompt import SoftPrompt
from .config import TuneConfig
from .few import CrossValidation, cross_validate, few_config, folds_of, run_to
from .folder import prepare, record
from .monitor import Listener
from .run import interruptible, prompt_of, settle
from .sweep import begin_all, sweep
from .sweep_plan import SweepPlan
from .sweep_trial import FINISHED, Trial

FOLDER = "members"  # inside the prompt folder
KEY = "ensemble"  # in the provenance of the prompt folder; without it what FOLDER holds is not looked at
LEAST, MOST = 2, 32


@dataclass
class EnsembleResult:
    """prompts: the members, in the order of their seeds. best: which of them had the best validation score (the first
    where nothing was validated). validation: its report. reason: "finished" or "interrupted"."""

    prompts: list[SoftPrompt]
    best: int
    reason: str
    validation: Report | None = None
    run_folder: Path | None = None
    seconds: float = 0.0
    steps: int = 0
    members: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompt(self) -> SoftPrompt:
        """The single best member."""
        return self.prompts[self.best]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the best member as the prompt folder `folder`, and all members into `members/` there."""
        return save_ensemble(self.prompts, self.best, folder, overwrite)


def tune_ensemble(
    backbone: Backbone,
    task: Task,
    config: TuneConfig | None = None,
    *,
    size: int = 3,
    run_folder: str | Path | None = None,
    resume: bool = False,
    listen: Listener | Sequence[Listener] = (),
    config_text: str | None = None,
    **settings: Any,
) -> EnsembleResult:
    """Tune `size` prompts for `task` with seeds from config.seed on, over one frozen `backbone`.

    Each member has the vectors that `tune` gives with its seed (see `sweep` for where passes are shared). With few rows
    and none for validation the number of steps is found once, by cross-validation, for all members. The other arguments
    are those of `tune`. Raises ConfigError (settings), DataError (no rows; many rows and none for validation),
    OutputError, TrainingError.
    """
    if not LEAST <= size <= MOST:
        raise ConfigError(f"an ensemble has {LEAST} to {MOST} members, found {size}")
    config = settle(config, settings)
    plan = SweepPlan(tuple({"seed": config.seed + number} for number in range(size)), 0)
    folder = Path(run_folder) if run_folder is not None else None
    folds = folds_of(task, config)
    if folds:
        return _tune_few(backbone, task, config, plan, folds, folder, resume, listen, config_text)
    given: dict[str, Any] = {"run_folder": folder, "resume": resume, "listen": listen, "config_text": config_text}
    found = sweep(backbone, task, config, trials=plan.trials, halving=0, **given)
    trials = sorted(found.trials, key=lambda trial: trial.name)
    if found.reason == "interrupted":
        prompts = [trial.prompt or prompt_of(trial.run, found.reason) for trial in trials]
    else:
        prompts = [trial.prompt for trial in trials if trial.prompt is not None]
        trials = [trial for trial in trials if trial.prompt is not None]
    return EnsembleResult(
        prompts,
        trials.index(found.winner),
        found.reason,
        found.validation,
        folder,
        found.seconds,
        sum(trial.step for trial in trials),
        [trial.to_dict() for trial in trials],
    )


def _tune_few(
    backbone: Backbone,
    task: Task,
    config: TuneConfig,
    plan: SweepPlan,
    folds: int,
    folder: Path | None,
    resume: bool,
    listen: Listener | Sequence[Listener],
    config_text: str | None,
) -> EnsembleResult:
    """Members over all rows for the number of steps that cross-validation finds. None of them is known to be better."""
    listeners = (listen,) if callable(listen) else tuple(listen)

    def tell(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    settled = few_config(config, len(task.train))
    prepare(folder, resume, {**record(backbone, task, settled), KEY: len(plan.trials)}, config_text)
    configs = [settled.model_copy(update={**own, "tensorboard": False}) for own in plan.trials]
    trials = begin_all(backbone, [task] * len(configs), plan, configs, folder, resume, tell)
    tell({"event": "folds", "folds": folds, "rows": len(task.train), "steps": trials[0].steps})
    with interruptible() as asked:
        found = cross_validate(
            backbone, task, settled, folds, patience=config.patience, folder=folder, tell=tell, asked=asked
        )
        if found is not None:
            tell({"event": "cross-validation", **found.to_dict()})
            ended = run_to([trial.run for trial in trials], found.steps, asked)
    if found is None or not ended:
        return EnsembleResult([prompt_of(trial.run, "interrupted") for trial in trials], 0, "interrupted")
    prompts = [_finished(trial, found) for trial in trials]
    seconds = sum(trial.run.trainer.seconds for trial in trials)
    facts = [trial.to_dict() for trial in trials]
    return EnsembleResult(prompts, 0, "finished", found.report, folder, seconds, found.steps * len(trials), facts)


def _finished(trial: Trial, found: CrossValidation) -> SoftPrompt:
    """Its prompt, written into its folder as a sweep writes that of a trial."""
    trial.state = FINISHED
    trial.keep()
    assert trial.prompt is not None
    trial.prompt.provenance["cross_validation"] = found.to_dict()
    return trial.prompt


# --- the folder -----------------------------------------------------------------------------------------------------


def save_ensemble(prompts: Sequence[SoftPrompt], best: int, folder: str | Path, overwrite: bool = False) -> Path:
    """Write prompt `best` as the prompt folder `folder`, and all of `prompts` into `members/` there.

    Raises OutputError as `save_prompt` does.
    """
    folder = Path(folder)
    width = max(2, len(str(len(prompts))))
    names = [f"{number:0{width}}" for number in range(1, len(prompts) + 1)]
    prompts[best].provenance[KEY] = {"members": names, "best": names[best]}
    path = prompts[best].save(folder, overwrite=overwrite)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of an ensemble that was there before
    for name, prompt in zip(names, prompts, strict=True):
        provenance = {key: value for key, value in prompt.provenance.items() if key != KEY}
        member = SoftPrompt(
            prompt.vectors,
            prompt.template,
            prompt.base_model,
            prompt.fingerprint,
            prompt.tokenizer_hash,
            provenance,
            prompt.metrics,
        )
        member.save(folder / FOLDER / name)
    return path


def load_members(folder: str | Path) -> dict[str, SoftPrompt]:
    """The members of an ensemble by name; {} if the prompt in `folder` is none, or is only its best member, as the
    copies are that `pull` and `prune` make.

    Raises PromptFormatError: no prompt, or one of whose members some are missing or broken.
    """
    made = SoftPrompt.load(folder).provenance.get(KEY)
    names = made.get("members") if isinstance(made, dict) else None
    if not names:
        return {}
    if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(r"\d+", name) for name in names):
        raise PromptFormatError(f"{folder} names its members as no ensemble does ({names!r:.60}); tune it anew")
    inside = Path(folder) / FOLDER
    return {name: SoftPrompt.load(inside / name) for name in names} if inside.is_dir() else {}
