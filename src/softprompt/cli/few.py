"""What `softprompt tune` does and says where there are few rows: cross-validation in place of a few rows set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from .output import Output
from .progress import TuneProgress
from .sweep import SweepProgress

if TYPE_CHECKING:
    from ..data import Task

OF_ONE_FOLD = ("validation", "warning")  # whose rows are too few to speak of


def few_task(config: RunConfig, task: Task) -> Task | None:
    """`task`, loaded by the config, with its validation rows for training and folds, where that is to be done.

    That is where nothing says otherwise (no validation file, shares as they are by default, `folds` not 0) and its one
    table has few rows; these are then all trained on. Where `folds` asks for it, with however many rows; the test share
    of a larger table stays apart.
    """
    from ..data import Task
    from ..training.few import FEW, folds_of

    usual = tuple(config.shares) == RunConfig.model_fields["shares"].default
    if config.validation is not None or not usual or config.folds == 0 or config.auto:
        return None
    carved = (task.train, task.validation) if config.test else (task.train, task.validation, task.test)
    # With `limit` the table has more rows than were taken.
    few = sum(map(len, carved)) < FEW and config.limit is None
    if not few and not config.folds:
        return None
    first, second, third = config.shares
    shares = (1.0, 0.0, 0.0) if few or config.test else (first + second, 0.0, third)
    whole = Task.load(**{**config.task_options(), "shares": shares})
    return whole if folds_of(whole, config.tuning()) else None


class FewProgress:
    """Shows the folds as a sweep's trials are shown, then the run over all rows; use as a context."""

    def __init__(self, out: Output, resumed: int = 0):
        self.out = out
        self.whole = TuneProgress(out, resumed)
        self.folds = SweepProgress(out)
        self.folding = False

    def __enter__(self) -> FewProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.folds.__exit__()
        self.whole.__exit__()

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event'].replace('-', '_')}", None)
        if handler is not None:
            handler(event)
        elif "trial" in event:
            if not (self.folding and event["event"] in OF_ONE_FOLD):
                self.folds(event)
        else:
            self.whole(event)

    def _on_folds(self, event: dict[str, Any]) -> None:
        self.folding = True
        self.out.note(
            f"{event['rows']} training rows and none for validation: how good prompts of them are, and after how many "
            f"steps, is found by cross-validation in {event['folds']} folds; then one is tuned on all rows "
            "(--folds 0 turns this off)"
        )
        names = [{"trial": str(number), "settings": {}} for number in range(1, event["folds"] + 1)]
        self.folds({"event": "sweep", "trials": names, "steps": event["folds"] * event["steps"], "done": 0})

    def _on_fold_mean(self, event: dict[str, Any]) -> None:
        self.out.note(f"step {event['step']}, mean of folds: score {event['score']:.3f}, loss {event['loss']:.3f}")

    def _on_cross_validation(self, event: dict[str, Any]) -> None:
        self.folding = False
        self.folds.__exit__()
        self.out.note(in_words(event))


def in_words(found: dict[str, Any]) -> str:
    """What cross-validation found, with how little is known: `found` as of CrossValidation.to_dict."""
    score = f"{found['metric']} {found['score']:.3f}"
    if found.get("interval"):
        low, high = found["interval"]
        score += f" (95 % interval {low:.2f} to {high:.2f}: {found['rows']} rows tell no more)"
    return (
        f"cross-validation: {score} after {found['steps']} of {found['planned']} steps; tuning on all "
        f"{found['rows']} rows for {found['steps']} steps"
    )
