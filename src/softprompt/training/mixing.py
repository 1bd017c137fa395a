"""Several tasks into one shared prompt: a source from which the prompt of each task, or of a new one, can start.

Multi-task prompt tuning as in SPoT (Vu et al. 2022, arXiv:2110.07904, section 3): rows of all tasks are mixed, each in
its own template with its own labels, and one prompt learns from all. How often a task comes up follows Raffel et al.
2020 (arXiv:1910.10683, section 3.5.2): with n rows in proportion to min(n, cap) ** (1 / temperature).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_atomic
from ..backbone import Backbone
from ..computation import keep_texts
from ..data import Split, Task
from ..errors import ConfigError, DataError
from ..evaluation.runner import Report, evaluate_prompt
from ..initialisers import instruction
from ..placement import Row, shared_length
from ..prompt import SoftPrompt
from ..text_store.store import open_texts
from .config import TuneConfig
from .loop import Validation, planned_steps
from .mixing_plan import CAP, TEMPERATURE, unmixable
from .monitor import Listener
from .run import Run, begin, encode_task, finish, interruptible, settle

MARK = "mixture"  # in the provenance of the prompt


@dataclass
class MixResult:
    """prompt: the shared prompt, best by the mean of the tasks' validation scores. tasks: the report of each task on
    its validation rows (those that have some). shares: how often each came up. reason: why the run ended."""

    prompt: SoftPrompt
    tasks: dict[str, Report]
    shares: dict[str, float]
    history: list[dict[str, Any]]
    reason: str
    run_folder: Path | None = None
    steps: int = 0
    seconds: float = 0.0
    report: Path | None = None
    cut_rows: dict[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The mean score: of accuracies, or with a task of free text minus the mean loss. None without validation."""
        return _mean(list(self.tasks.values())).score if self.tasks else None


def mix(
    backbone: Backbone,
    tasks: Mapping[str, Task] | Sequence[Task],
    config: TuneConfig | None = None,
    *,
    temperature: float = TEMPERATURE,
    cap: int = CAP,
    run_folder: str | Path | None = None,
    resume: bool = False,
    listen: Listener | Sequence[Listener] = (),
    config_text: str | None = None,
    **settings: Any,
) -> MixResult:
    """Tune one soft prompt on several tasks at once.

    tasks: by name (a list takes their own names). A task with n training rows makes up a share of the rows in
    proportion to min(n, cap) ** (1 / temperature): 1 in proportion to size, larger ones nearer to equal shares.
    epochs counts passes over the rows of all tasks, each task's at most `cap`. The prompt carries the template of the
    first task; all are in its provenance. The other arguments are those of `tune`.

    After each validation the log has a "task" event for each task. Raises ConfigError (settings, fewer than two tasks),
    DataError (rows), OutputError, TrainingError.
    """
    config = settle(config, settings)
    named = _named(tasks)
    _check_settings(temperature, cap, config)
    folder = Path(run_folder) if run_folder is not None else None
    listeners = (listen,) if callable(listen) else tuple(listen)
    mixed = Mixture(backbone, named, config, temperature, cap)
    run = mixed.begin(folder, resume, listeners, config_text)
    with interruptible() as asked:
        reason = run.go_on(asked)
    return mixed.finish(run, reason)


def shares_of(sizes: Mapping[str, int], temperature: float = TEMPERATURE, cap: int = CAP) -> dict[str, float]:
    """The share of each task in a mixture of tasks with so many rows each; they sum to 1."""
    weights = {name: min(size, cap) ** (1 / temperature) for name, size in sizes.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def draws(sizes: Mapping[str, int], shares: Mapping[str, float], count: int, seed: int) -> list[tuple[str, int]]:
    """`count` rows of a mixture as (task, index): each task's share of them as nearly as whole rows allow, its own rows
    in turn in random orders, so that none comes up a second time before all have come up once."""
    quotas = _whole({name: share * count for name, share in shares.items()}, count)
    drawn: list[tuple[str, int]] = []
    for place, (name, size) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        taken: list[int] = []
        while len(taken) < quotas[name]:
            taken += torch.randperm(size, generator=generator).tolist()
        drawn += [(name, index) for index in taken[: quotas[name]]]
    return drawn


def _whole(parts: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers near `parts` that sum to `count`: the largest remainders are rounded up."""
    found = {name: math.floor(part) for name, part in parts.items()}
    by_rest = sorted(parts, key=lambda name: found[name] - parts[name])
    for name in by_rest[: count - sum(found.values())]:
        found[name] += 1
    return found


def _named(tasks: Mapping[str, Task] | Sequence[Task]) -> dict[str, Task]:
    named = dict(tasks) if isinstance(tasks, Mapping) else {task.name: task for task in tasks}
    if len(named) < len(tasks):
        raise ConfigError("two tasks have the same name; give them as a mapping of name to task")
    if len(named) < 2:
        raise ConfigError(f"a mixture has at least two tasks, found {len(named)}; tune a single one with tune")
    empty = [name for name, task in named.items() if not len(task.train)]
    if empty:
        raise DataError(f"the training split of {', '.join(empty)} has no rows; give more data or another share")
    return named


def _check_settings(temperature: float, cap: int, config: TuneConfig) -> None:
    problems = []
    if not temperature >= 1 or math.isinf(temperature):
        problems.append(f"temperature: must be a number of at least 1, found {temperature!r}")
    if cap < 1:
        problems.append(f"cap: must be at least 1 row, found {cap!r}")
    if config.folds:
        problems.append("folds: is for tune; a mixture is compared by the validation rows of its tasks")
    problems += unmixable(config.init)
    if problems:
        raise ConfigError(problems)


@dataclass
class Mixture:
    """Tasks on their way into one prompt: what they are mixed of, and how they are validated."""

    backbone: Backbone
    tasks: dict[str, Task]
    config: TuneConfig
    temperature: float
    cap: int

    def __post_init__(self) -> None:
        self.sizes = {name: len(task.train) for name, task in self.tasks.items()}
        self.shares = shares_of(self.sizes, self.temperature, self.cap)
        count = sum(min(size, self.cap) for size in self.sizes.values())
        self.steps, self.batch_size = planned_steps(self.config, count), min(self.config.batch_size, count)
        self.cut: dict[str, int] = {}
        self.texts = open_texts(self.backbone, self.config)

    def rows(self) -> tuple[list[Row], int]:
        """The rows of the whole run, and how many of the tables' rows had to be cut to fit."""
        rows: dict[str, list[Row]] = {}
        for name, task in self.tasks.items():
            rows[name], self.cut[name] = encode_task(self.backbone, task, self.config)
        drawn = draws(self.sizes, self.shares, self.steps * self.batch_size, self.config.seed)
        found = [rows[name][index] for name, index in drawn]
        # Rows that begin with text first: by the first row `keep_texts` tells how large states are.
        found.sort(key=lambda row: row.ids[0] < 0)
        # Each text is computed once, however often its row comes up; the run then finds all of them there.
        once = list(dict.fromkeys(found))
        keep_texts(self.backbone, once, shared_length(once), self.texts)
        return found, sum(self.cut.values())

    def begin(self, folder: Path | None, resume: bool, listeners: Sequence[Listener], config_text: str | None) -> Run:
        """A run over the mixture. Everything that can fail before the first step fails here."""
        encoded = self.rows()  # of the whole run: once through them is all of it
        settled: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size}
        if self.config.init == "text" and self.config.init_text is None:
            settled["init_text"] = " ".join(instruction(task.template) for task in self.tasks.values())
        run = begin(
            self.backbone,
            self.record(),
            self.config.model_copy(update=settled),
            folder=folder,
            resume=resume,
            listeners=listeners,
            config_text=config_text,
            texts=self.texts,
            encoded=encoded,
        )
        self.run = run
        if any(len(task.validation) for task in self.tasks.values()):
            run.trainer.validate = self.validate
        return run

    def record(self) -> Task:
        """All of it as one task: for the record, by which a resumed run knows that it is the same, never encoded."""
        first = next(iter(self.tasks.values()))
        listed = {split: self._listed(split) for split in ("train", "validation", "test")}
        source = {MARK: self.facts(), "tasks": {name: task.source for name, task in self.tasks.items()}}
        splits = {name: Split(name, rows, first.template) for name, rows in listed.items()}
        return Task(first.template, **splits, name="mixture", source=source)

    def _listed(self, split: str) -> tuple[dict[str, Any], ...]:
        facts, rows = self.facts(), []
        for name, task in self.tasks.items():
            marks = [json.dumps([name, facts["tasks"][name], self.temperature, self.cap], sort_keys=True)]
            rows += [{**row, MARK: marks.pop() if marks else name} for row in getattr(task, split)]
        return tuple(rows)

    def facts(self) -> dict[str, Any]:
        """What is mixed, and how, as plain data."""
        each = {
            name: {"rows": self.sizes[name], "share": self.shares[name], "template": task.template.to_dict()}
            for name, task in self.tasks.items()
        }
        return {"tasks": each, "temperature": self.temperature, "cap": self.cap}

    # --- validation -------------------------------------------------------------------------------------------------

    def reports(self, vectors: torch.Tensor, text_scores: bool = False) -> dict[str, Report]:
        """The report of each task that has validation rows."""
        return {
            name: evaluate_prompt(
                self.backbone,
                task.validation.take(self.config.validation_rows, seed=0),
                vectors,
                max_tokens=self.config.max_tokens,
                text_scores=text_scores,
                texts=self.texts,
            )
            for name, task in self.tasks.items()
            if len(task.validation)
        }

    def validate(self, vectors: torch.Tensor) -> Validation:
        """The mean over tasks, which all count alike; each task's own score goes to the log."""
        reports = self.reports(vectors)
        for name, report in reports.items():
            score = {"accuracy": report.accuracy} if report.scores is not None else {}
            self.run.monitor.add("task", self.run.trainer.step, task=name, loss=report.loss, **score)
        return replace(_mean(list(reports.values())), details=reports)

    def finish(self, run: Run, reason: str) -> MixResult:
        """What came out, with the scores of all tasks, report.html and result.json."""
        plain = replace(run, task=replace(run.task, validation=replace(run.task.validation, rows=())))
        result = finish(plain, reason)
        best = run.trainer.best_validation
        reports: dict[str, Report] = {}
        if reason != "interrupted":
            free = any(task.template.labels is None and len(task.validation) for task in self.tasks.values())
            known = best.details if best is not None and not free else None
            reports = known or self.reports(result.prompt.vectors, text_scores=True)
        prompt = result.prompt
        prompt.provenance[MARK] = self.facts()
        found = MixResult(
            prompt,
            reports,
            self.shares,
            result.history,
            reason,
            run.folder,
            result.steps,
            result.seconds,
            result.report,
            self.cut,
        )
        if reports:
            each = {name: report.to_dict(brief=True) for name, report in reports.items()}
            prompt.metrics["validation"] = {"metric": "mean score", "score": found.mean, "tasks": each}
        if run.folder and reason != "interrupted":
            path = run.folder / "result.json"
            facts = {**json.loads(path.read_text(encoding="utf-8")), "validation": prompt.metrics.get("validation")}
            write_atomic(path, json.dumps(facts, indent=2).encode())
        return found


def _mean(reports: Sequence[Report]) -> Validation:
    """Accuracies are averaged where all tasks have labels; minus the loss where one is of free text."""
    count = len(reports)
    loss = sum(report.loss for report in reports) / count
    if any(report.scores is None for report in reports):
        return Validation(-loss, loss, "minus mean loss")
    accuracies = [(report.accuracy, len(report.true)) for report in reports]
    error = sum(a * (1 - a) / rows for a, rows in accuracies) ** 0.5 / count
    return Validation(sum(a for a, _ in accuracies) / count, loss, "mean accuracy", error=error)
