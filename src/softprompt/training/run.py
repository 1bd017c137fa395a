"""`tune`: from a backbone and a task to a tuned prompt, with a run folder that can be resumed."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..attention import StateCache
from ..backbone import Backbone
from ..computation import deep_from_tokens
from ..data import Split, Task
from ..encoding import Encoder
from ..errors import ConfigError, DataError
from ..evaluation.runner import Report, evaluate_prompt, pick_shots
from ..fileformat import load_prompt
from ..initialisers import check_init, initialise
from ..placement import Row
from ..prompt import SoftPrompt
from ..text_store.store import open_texts
from .checkpoint import Checkpoint, save_checkpoint
from .config import TuneConfig
from .folder import CHECKPOINT, prepare, record, versions
from .loop import Trainer, Validation
from .monitor import Listener, Monitor
from .quiet_start import quiet
from .together import Course, follow
from .transfer import AUTO, best_start, fitted

log = logging.getLogger(__name__)


@dataclass
class TuneResult:
    """prompt: the best by validation. history: every event of the run. validation: its report on the validation split
    (None without one). report: path of report.html, or None without a run folder. reason: why the run ended."""

    prompt: SoftPrompt
    history: list[dict[str, Any]]
    validation: Report | None
    report: Path | None
    reason: str
    run_folder: Path | None = None
    steps: int = 0
    seconds: float = 0.0
    cut_rows: int = 0
    initial: torch.Tensor | None = None
    recorded: dict[str, Any] = field(default_factory=dict)


def tune(
    backbone: Backbone,
    task: Task,
    config: TuneConfig | None = None,
    *,
    run_folder: str | Path | None = None,
    resume: bool = False,
    listen: Listener | Sequence[Listener] = (),
    baselines: Sequence[dict[str, Any]] = (),
    config_text: str | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune a soft prompt for `task` on the frozen `backbone`.

    settings: fields of TuneConfig, as keywords (`tokens=20`), in place of or over `config`. run_folder: where the
    run's settings, log, checkpoints and report go; without one nothing is written. resume: go on from the run
    folder's checkpoint; the result is bit for bit that of the undisturbed run. listen: called with each event.
    config_text: the config.yaml that the run was started from, kept as it is in the run folder. baselines: other
    scores for the report to show beside the prompt's, each {name, score, low, high}. With few rows and none for
    validation, the number of steps is found by cross-validation first (see `TuneConfig.folds` and few.py).

    Raises ConfigError (settings), DataError (rows), OutputError (folder), TrainingError (a loss that is not finite).
    """
    config = settle(config, settings)
    folder = Path(run_folder) if run_folder is not None else None
    listeners = (listen,) if callable(listen) else tuple(listen)
    given: dict[str, Any] = {"folder": folder, "resume": resume, "listeners": listeners, "config_text": config_text}
    from .few import folds_of, tune_few  # which is made of the parts of this file

    if folds := folds_of(task, config):
        return tune_few(backbone, task, config, folds, baselines=baselines, **given)
    run = begin(backbone, task, config, **given)
    with interruptible() as stop:
        reason = run.go_on(stop)
    run.trainer.texts.clear()  # these are gigabytes, and a reference cycle may keep the run until Python looks for it
    return finish(run, reason, baselines)


@dataclass
class Run:
    """A run that is ready to train: what `tune` makes once, and a sweep once for each of its trials.

    resumed: whether it goes on from what its folder holds. note: what the initialiser did.
    """

    backbone: Backbone
    task: Task
    config: TuneConfig
    folder: Path | None
    recorded: dict[str, Any]
    trainer: Trainer
    monitor: Monitor
    resumed: bool
    cut: int = 0
    note: str = ""

    def go_on(self, stop: Callable[[], bool]) -> str:
        """Train until the end or until `stop` says so after a step; returns why it ended (see `Trainer.course`)."""
        return follow([self.course(stop)], self.backbone)[0]

    def course(self, stop: Callable[[], bool]) -> Course:
        """The same for whoever computes what its steps ask for."""
        trainer, monitor = self.trainer, self.monitor
        trainer.stop = stop
        try:
            monitor.open(trainer.step if self.resumed else None)
            if not self.resumed:
                start = {"steps": trainer.steps, "rows": len(trainer.rows), "cut_rows": self.cut, "init": self.note}
                monitor.add("start", 0, **start)
            self.resumed = True
            return (yield from trainer.course())
        finally:
            monitor.close()


def begin(
    backbone: Backbone,
    task: Task,
    config: TuneConfig,
    *,
    folder: Path | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    config_text: str | None = None,
    texts: StateCache | None = None,
    encoded: tuple[list[Row], int] | None = None,
) -> Run:
    """Make a run ready: everything that can fail before the first step fails here.

    texts: where the states of texts before any soft token are kept, which runs of one backbone may share. encoded: the
    training rows as `encode_task` gives them, if that has been done for another run.
    """
    backbone.model.eval()  # no dropout, whatever the caller did with the model
    check_init(config.init)
    rows, cut = encoded or encode_task(backbone, task, config)
    recorded = record(backbone, task, config)
    checkpoint = prepare(folder, resume, recorded, config_text)
    initial, note = _initial(backbone, task, config, checkpoint, rows)
    monitor = Monitor(folder / "metrics.jsonl" if folder else None, (*listeners, *_tensorboard(folder, config)))
    if texts is None:
        texts = open_texts(
            backbone,
            config,
            say=lambda text: monitor.warn_once(0, text, text),
            tell=lambda text: monitor.tell("note", 0, text=text),
        )
    trainer = Trainer(
        backbone,
        rows,
        initial,
        config,
        validate=_validator(backbone, task, config, texts),
        monitor=monitor,
        save=(lambda found: save_checkpoint(found, folder / CHECKPOINT)) if folder else (lambda found: None),
        texts=texts,
        sizes=_text_states(backbone, task, config),
    )
    if checkpoint:
        trainer.restore(checkpoint)
    return Run(backbone, task, config, folder, recorded, trainer, monitor, checkpoint is not None, cut, note)


def encode_task(backbone: Backbone, task: Task, config: TuneConfig) -> tuple[list[Row], int]:
    """The training rows as ids, and how many had to be cut. Raises DataError (no rows), ConfigError (no room)."""
    if not len(task.train):
        raise DataError("the training split has no rows; give more data or another share")
    return encode_rows(_encoder(backbone, task, config), task.train)


def settle(config: TuneConfig | None, settings: dict[str, Any]) -> TuneConfig:
    from pydantic import ValidationError

    try:
        return TuneConfig(**{**(config.model_dump() if config else {}), **settings})
    except ValidationError as error:
        raise ConfigError(
            [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, found {e['input']!r}" for e in error.errors()]
        ) from error


def _encoder(backbone: Backbone, task: Task, config: TuneConfig) -> Encoder:
    limit = min(config.max_tokens or backbone.context_length, backbone.context_length)
    if config.tokens >= limit:
        raise ConfigError(
            f"{config.tokens} soft tokens leave no room for text in {limit} tokens; use fewer, or a larger max_tokens"
        )
    return Encoder(task.template, backbone.tokenizer, config.tokens, limit)


def encode_rows(encoder: Encoder, split: Split) -> tuple[list[Row], int]:
    """Every example as ids, and how many had to be cut to fit."""
    encoded = [encoder.row(fields) for fields in split]
    return [row for row, _ in encoded], sum(1 for _, cut in encoded if cut)


def _initial(
    backbone: Backbone, task: Task, config: TuneConfig, checkpoint: Checkpoint | None, rows: Sequence[Row]
) -> tuple[torch.Tensor, str]:
    if checkpoint:
        return checkpoint.tensors["initial"], "from the checkpoint"
    start = _deep_start(config)
    if start is not None:
        return start
    library = config.init.removeprefix(AUTO) if config.init.startswith(AUTO) else None
    vectors, said = initialise(
        "text" if library else config.init,
        table=backbone.embedding_table(),
        tokenizer=backbone.tokenizer,
        tokens=config.tokens,
        generator=torch.Generator().manual_seed(config.seed),
        template=task.template,
        init_text=config.init_text,
        examples=_examples(task, config) if config.init == "examples" else None,
    )
    if config.kind == "deep":
        vectors, said = deep_from_tokens(backbone, vectors), f"keys and values that the model gives {said}"
        if not config.init.startswith("prompt:"):
            loud, vectors = vectors, quiet(backbone, rows, vectors)
            said += "" if vectors is loud else ", keys turned away from what the template's tail asks"
    return best_start(backbone, task, library, vectors, config.max_tokens) if library else (vectors, said)


def _text_states(backbone: Backbone, task: Task, config: TuneConfig) -> torch.Tensor | None:
    """What a deep prompt's numbers are learned in units of: the states of the text that it starts from, as they are
    before they are turned away. Where it starts from another prompt, the states of the task's instruction: a tuned
    prompt's values are larger than any text's, and steps in units of them would be too long."""
    if config.kind != "deep":
        return None
    told = {"init": "text"} if config.init.startswith(("prompt:", AUTO)) else {}
    return _initial(backbone, task, config.model_copy(update=told), None, ())[0]


def _examples(task: Task, config: TuneConfig) -> str:
    """Training rows as text, classes in turn, more than enough of them for P tokens."""
    plain = task.template.without_soft()
    picked = pick_shots(task.train, min(len(task.train), config.tokens), config.seed)
    return "\n\n".join(plain.render_context(row) + plain.render_target(row) for row in picked)


def _deep_start(config: TuneConfig) -> tuple[torch.Tensor, str] | None:
    """A deep prompt named by init=prompt:PATH, its tokens repeated or cut to P; None if it is not deep."""
    path = config.init.removeprefix("prompt:")
    if config.kind != "deep" or path == config.init:
        return None
    prompt = load_prompt(path.strip())
    if prompt.kind != "deep":
        return None
    return fitted(prompt.vectors, config.tokens), f"the deep prompt {path.strip()}"


def _validator(
    backbone: Backbone, task: Task, config: TuneConfig, texts: StateCache
) -> Callable[[torch.Tensor], Validation] | None:
    if not len(task.validation):
        return None
    split = task.validation.take(config.validation_rows, seed=0)

    def validate(vectors: torch.Tensor) -> Validation:
        report = evaluate_prompt(backbone, split, vectors, max_tokens=config.max_tokens, text_scores=False, texts=texts)
        if report.scores is None:
            return Validation(-report.loss, report.loss, "minus loss")
        error = (report.accuracy * (1 - report.accuracy) / len(split)) ** 0.5
        return Validation(report.accuracy, report.loss, "accuracy", report.predicted, report, error)

    return validate


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C (or SIGTERM) asks the run to stop after its step; the second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(folder: Path | None, config: TuneConfig) -> list[Listener]:
    if not config.tensorboard:
        return []
    if folder is None:
        raise ConfigError("tensorboard events need a run folder to be written to")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed; pip install tensorboard, or leave tensorboard off") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(event: dict[str, Any]) -> None:
        names = {"step": ("loss", "learning_rate", "gradient_norm"), "validation": ("loss", "score")}
        for name in names.get(event["event"], ()):
            writer.add_scalar(f"{event['event']}/{name}", event[name], event["step"])
        if event["event"] == "end":
            writer.close()

    return [write]


# --- the end --------------------------------------------------------------------------------------------------------


def finish(
    run: Run, reason: str, baselines: Sequence[dict[str, Any]] = (), validation: Report | None = None
) -> TuneResult:
    """What came out of a run, with its validation scores, report.html and result.json.

    validation: its report, for a run that has no validation rows of its own.
    """
    trainer, task, config, folder = run.trainer, run.task, run.config, run.folder
    prompt = prompt_of(run, reason)
    page = None
    scored = "validation" if validation is None else "cross-validation"
    if validation is not None:
        prompt.metrics["validation"] = validation.to_dict(brief=True)
    elif reason != "interrupted" and len(task.validation):
        found = trainer.best_validation
        validation = found.details if found else None
        if validation is None:  # free text has only been scored by its loss so far, or the best is from before resuming
            split = task.validation.take(config.validation_rows, seed=0)
            validation = evaluate_prompt(run.backbone, split, prompt.vectors, max_tokens=config.max_tokens)
        prompt.metrics["validation"] = validation.to_dict(brief=True)
    if folder and reason != "interrupted":
        events = run.monitor.events
        page = _write_page(
            folder, run.backbone, prompt, trainer.initial, events, run.recorded, validation, baselines, scored
        )
        summary = {"reason": reason, "steps": trainer.step, "best_step": trainer.best_step, "seconds": trainer.seconds}
        summary["validation"] = prompt.metrics.get("validation")
        (folder / "result.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return TuneResult(
        prompt,
        run.monitor.events,
        validation,
        page,
        reason,
        folder,
        trainer.step,
        trainer.seconds,
        run.cut,
        trainer.initial,
        run.recorded,
    )


def prompt_of(run: Run, reason: str) -> SoftPrompt:
    """The best vectors of a run so far, or the last where nothing was validated, with where they came from."""
    trainer, backbone = run.trainer, run.backbone
    step = trainer.best_step or trainer.step
    provenance = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "architecture": backbone.architecture,
        "run": run.recorded,
        "versions": versions(),
        "step": step,
        "steps": trainer.steps,
        "ended": reason,
        "seconds": round(trainer.seconds, 1),
    }
    vectors = trainer.best if trainer.best_step else trainer.prompt()
    return SoftPrompt(
        vectors.clone(), run.task.template, backbone.name, backbone.fingerprint, backbone.tokenizer_hash, provenance
    )


def write_run_report(
    backbone: Backbone, result: TuneResult, report: Report, split: str, baselines: Sequence[dict[str, Any]] = ()
) -> Path | None:
    """Write the report.html of a run anew, with the scores of `split` (say test) in place of validation's."""
    if result.run_folder is None:
        return None
    return _write_page(
        result.run_folder,
        backbone,
        result.prompt,
        result.initial,
        result.history,
        result.recorded,
        report,
        baselines,
        split,
    )


def _write_page(
    folder: Path,
    backbone: Backbone,
    prompt: SoftPrompt,
    initial: torch.Tensor | None,
    events: list[dict[str, Any]],
    recorded: dict[str, Any],
    report: Report | None,
    baselines: Sequence[dict[str, Any]] = (),
    split: str = "validation",
) -> Path | None:
    """report.html of a run, or None: looking must never cost a result, so a failure here is only told."""
    from ..inspection.report import write_report

    scores = {**report.to_dict(), "split": split} if report else None
    try:
        return write_report(
            folder / "report.html",
            title=folder.name,
            config=recorded,
            events=events,
            prompt=prompt,
            table=backbone.embedding_table(),
            tokenizer=backbone.tokenizer,
            initial=initial,
            scores=scores,
            mistakes=report.mistakes() if report else [],
            examples=report.examples() if report else [],
            baselines=list(baselines),
        )
    except Exception as error:
        log.warning("the report could not be written (%s); the prompt is not lost", error, exc_info=True)
        return None
