"""What every method is, whatever it trains: `fit` leaves a task's files in a folder, `open` scores rows from them.

That a method is always scored from its files, by a fresh `open`, is what makes the comparison honest: what is on the
disk is what is measured, what it takes to switch to it is timed on the way, and no state of training can leak in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..backbone import Backbone
from ..data import Split, Task
from ..evaluation.generation import Sampling
from ..evaluation.runner import Report, evaluate_prompt
from ..templates import Template
from ..training.config import TuneConfig
from ..training.loop import Validation

Tell = Callable[[str], None]


@dataclass
class Job:
    """What a method gets: the backbone, the task with its rows already drawn, a seed, the budget that all methods
    share (config.BUDGET), and its own settings. tell: takes a line about what is going on."""

    backbone: Backbone
    task: Task
    seed: int
    budget: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    tell: Tell = lambda text: None

    @property
    def validation(self) -> Split:
        return self.task.validation.take(self.budget["validation_rows"], seed=0)

    def tune_config(self, **more: Any) -> TuneConfig:
        """The shared budget in the words of tuning."""
        keys = ("epochs", "steps", "batch_size", "max_tokens", "validation_rows")
        return TuneConfig(**{key: self.budget[key] for key in keys}, seed=self.seed, **more)


@dataclass
class Trained:
    """What training took and gave. seconds: of the optimiser steps and what they need, without validation. settings:
    all that it was trained with."""

    parameters: int = 0
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    validation: Validation | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Opened:
    """A method ready for rows. backbone: the model, or a model around it that was adapted. vectors: of a soft prompt.
    worked: examples before the text. template: None is the task's own. close: gives the model back as it was."""

    backbone: Backbone
    vectors: torch.Tensor | None = None
    worked: Sequence[dict[str, Any]] = ()
    template: Template | None = None
    max_tokens: int | None = None
    close: Callable[[], None] = lambda: None

    def score(self, split: Split, max_new_tokens: int = 64, text_scores: bool = True) -> Report:
        """Score rows with the one evaluator that serves every method."""
        return evaluate_prompt(
            self.backbone,
            split if self.template is None else replace(split, template=self.template),
            self.vectors,
            worked=self.worked,
            sampling=Sampling(max_new_tokens),
            max_tokens=self.max_tokens,
            text_scores=text_scores,
        )


class Method(Protocol):
    """A way to make a model do a task."""

    def why_not(self, job: Job) -> str:
        """Why it cannot be run here (too little memory, a template that it cannot do); "" if it can."""

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        """Learn the task from its training rows, leave its files in `folder` and the backbone unchanged."""

    def open(self, job: Job, folder: Path) -> Opened:
        """Make ready from the files that `fit` left."""


def as_validation(report: Report) -> Validation:
    """How good a state is, by validation rows; as `tune` judges its prompts."""
    if report.scores is None:
        return Validation(-report.loss, report.loss, "minus loss")
    error = (report.accuracy * (1 - report.accuracy) / len(report.true)) ** 0.5
    return Validation(report.accuracy, report.loss, "accuracy", error=error)


def around(job: Job, model: Any) -> Backbone:
    """A backbone around an adapted model of the same architecture, frozen, with no soft prompt."""
    base = job.backbone
    fast = base.fast  # found out once, on the model as it came
    made = Backbone(model, base.tokenizer, base.name)
    made._fast, made.why_plain = fast, base.why_plain
    return made
