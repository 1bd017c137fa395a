"""One trial of a sweep: a run like that of `tune`, trained a stretch at a time, judged, and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..atomic import write_atomic
from ..errors import TrainingError
from ..prompt import SoftPrompt
from .config import TuneConfig
from .loop import NO_GAIN, Validation
from .run import Run, prompt_of
from .together import Course, follow, sharing_pays

RUNNING, FINISHED, DROPPED, DIVERGED = "running", "finished", "dropped", "diverged"
STATES = (RUNNING, FINISHED, DROPPED, DIVERGED)


@dataclass
class Trial:
    """name: its number, as its folder is called. settings: what it does not share with all others. state: running,
    finished (also where `patience` ended it), dropped at a rung, or diverged. why: of a trial that diverged. prompt:
    its best vectors by validation, once it has ended; None if it diverged before it was validated."""

    name: str
    settings: dict[str, Any]
    run: Run
    state: str = RUNNING
    why: str = ""
    prompt: SoftPrompt | None = None
    exhausted: bool = field(default=False, repr=False)  # ended by patience, before its last step

    @property
    def config(self) -> TuneConfig:
        return self.run.config

    @property
    def score(self) -> float | None:
        """Its best validation score (accuracy, or minus the loss); None before the first, and for a diverged trial."""
        return self._known(self.run.trainer.best_score)

    @property
    def loss(self) -> float | None:
        """The validation loss of the vectors that have `score`."""
        return self._known(self.run.trainer.best_loss)

    def _known(self, value: float) -> float | None:
        return value if math.isfinite(value) and self.state != DIVERGED else None

    @property
    def step(self) -> int:
        return self.run.trainer.step

    @property
    def steps(self) -> int:
        return self.run.trainer.steps

    @property
    def rank(self) -> tuple[float, float, str]:
        """Best first: by validation score, then by loss, then in the order in which they were given."""
        return _order(self.score, self.loss, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        trainer = self.run.trainer
        facts: dict[str, Any] = {"trial": self.name, "settings": self.settings, "state": self.state}
        facts |= {"score": self.score, "loss": self.loss, "step": self.step, "steps": self.steps}
        facts |= {"best_step": trainer.best_step, "seconds": round(trainer.seconds, 3)}
        facts |= {"why": self.why} if self.why else {}
        return facts | ({"folder": str(self.run.folder)} if self.run.folder else {})

    # --- training ---------------------------------------------------------------------------------------------------

    def target(self, share: float) -> int:
        """The step at which `share` of its steps is done."""
        return max(1, round(share * self.steps))

    def course(self, share: float, asked: Callable[[], bool]) -> Course:
        """Train up to `share` of the steps, or until `asked` says to stop. A loss that is not finite ends the trial."""
        target, trainer = self.target(share), self.run.trainer
        if trainer.step >= target or self.exhausted:
            return ""
        try:
            reason = yield from self.run.course(lambda: asked() or trainer.step >= target)
        except TrainingError as error:
            self.state, self.why = DIVERGED, str(error)
            return ""
        self.exhausted = reason == NO_GAIN
        if reason == "interrupted":
            self.run.monitor.events.pop()  # its "end" is none: the next stretch goes on
        return reason

    def judge(self) -> Validation | None:
        """The validation of its vectors as they are now; None if that is not finite, which ends the trial.

        Where the run has not validated at this step by itself this is done beside it, so that a trial stays what `tune`
        would have made of it: which vectors are its best does not depend on where it was judged.
        """
        trainer = self.run.trainer
        if self.exhausted:
            return Validation(trainer.best_score, trainer.best_loss, "")
        for event in self.run.monitor.events:
            if event["event"] in ("validation", "rung") and event["step"] == trainer.step:
                return Validation(event["score"], event["loss"], event["metric"], error=event.get("error", 0.0))
        assert trainer.validate is not None
        try:
            found = trainer.validate(trainer.prompt())
        except TrainingError as error:
            self.state, self.why = DIVERGED, str(error)
            return None
        self.log("rung", loss=found.loss, score=found.score, metric=found.metric, error=found.error)
        return found

    def drop(self, found: Validation) -> None:
        """End it at a rung where it was judged to be `found`: this is its last validation, so it may be its best."""
        trainer = self.run.trainer
        if found.beats(trainer.top_score, trainer.best_loss):
            trainer.best, trainer.best_step = trainer.prompt(), trainer.step
            trainer.best_score, trainer.best_loss, trainer.best_validation = found.score, found.loss, None
        self.log("end", reason=DROPPED)
        self.state = DROPPED

    def log(self, event: str, **facts: Any) -> None:
        """Add an event to the run's log, between two stretches."""
        self.run.monitor.open(self.step)
        try:
            self.run.monitor.add(event, self.step, **facts)
        finally:
            self.run.monitor.close()

    # --- keeping ----------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Once it has ended: make its prompt, and write it into its folder with what came out."""
        folder = self.run.folder
        if self.state != DIVERGED or self.run.trainer.best_step:
            self.prompt = prompt_of(self.run, self.state)
            if self.score is not None:
                self.prompt.metrics["validation"] = {"score": self.score, "loss": self.loss}
        if folder is None:
            return
        if self.prompt is not None:
            self.prompt.save(folder / "prompt", overwrite=True)
        write_atomic(folder / "result.json", json.dumps(self.to_dict(), indent=2).encode())


def turns(trials: Sequence[Trial], together: bool | None = None) -> list[list[Trial]]:
    """Which of `trials`, which have one backbone, are advanced together, group after group; None: where it pays."""
    if together is None:
        together = sharing_pays(trials[0].run.backbone)
    return [list(trials)] if together else [[trial] for trial in trials]


def advance(
    trials: Sequence[Trial],
    share: float,
    asked: Callable[[], bool],
    ended: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Train each of `trials`, which have one backbone, up to `share` of its steps or until `asked` says to stop. Their
    steps share passes. A loss that is not finite ends one trial and not the others. ended: told of each trial when its
    stretch is over."""
    courses = [trial.course(share, asked) for trial in trials]
    follow(courses, trials[0].run.backbone, lambda number: ended(trials[number]))


def _order(score: float | None, loss: float | None, name: str) -> tuple[float, float, str]:
    return -score if score is not None else math.inf, loss if loss is not None else math.inf, name


def best_first(scores: dict[str, Validation]) -> list[str]:
    """Names of trials by score, then loss, then name."""
    return sorted(scores, key=lambda name: _order(scores[name].score, scores[name].loss, name))


def finite(validate: Callable[[torch.Tensor], Validation]) -> Callable[[torch.Tensor], Validation]:
    """`validate`, raising TrainingError where the loss is not a finite number: such vectors must never be the best."""

    def check(vectors: torch.Tensor) -> Validation:
        found = validate(vectors)
        if not math.isfinite(found.loss):
            raise TrainingError(f"the validation loss became {found.loss}; try a smaller learning_rate (a tenth)")
        return found

    return check
