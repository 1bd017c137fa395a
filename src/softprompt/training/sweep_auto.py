"""What `tune --auto` tries before it tunes: a few learning rates and initialisers, for a fraction of the steps."""

from __future__ import annotations

from typing import Any

from ..data import Task
from .config import TuneConfig
from .loop import planned_steps

FOLDER = "auto"  # inside the run folder
FACTORS = (0.3, 1.0, 3.0)  # of the learning rate
SHARE = 0.2  # of the run's steps that a trial has, of which losers do a third
ROWS = 200  # for validation: enough to tell a learning rate that fails from one that works


def auto_trials(config: TuneConfig, task: Task) -> list[dict[str, Any]]:
    """Three learning rates around the one that is set, each with one or two initialisers.

    A start that was chosen by hand (init_text, prompt:PATH and the like) is kept.
    """
    inits = [config.init]
    if config.init_text is None and ":" not in config.init:
        others = ("text", "labels") if task.template.labels else ("text", "vocabulary")
        inits.append(next(init for init in others if init != config.init))
    rates = [float(f"{config.learning_rate * factor:.2g}") for factor in FACTORS]
    return [{"learning_rate": rate, "init": init} for rate in rates for init in inits]


def auto_config(config: TuneConfig, task: Task) -> TuneConfig:
    """`config` for a fraction of its steps, validated at their end only."""
    steps = max(1, round(SHARE * planned_steps(config, len(task.train))))
    rows = min(ROWS, config.validation_rows)
    more = {"steps": steps, "validate_every": steps, "validation_rows": rows, "patience": None, "tensorboard": False}
    return config.model_copy(update=more)
