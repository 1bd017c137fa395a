"""One cell: train with each learning rate, take the best by validation, score its files, measure what it costs.

`python -m softprompt.comparison.cell JOB.json` runs it in a process of its own, so that its peak memory is its own and
a cell that the system kills takes nothing else along.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..data import Task
from ..errors import ConfigError, SoftPromptError, TrainingError
from ..evaluation.runner import Report
from ..training.folder import versions
from ..training.loop import Validation
from .config import OWN_BUDGET, ComparisonConfig
from .measure import Meter, disk_bytes, inference_seconds, machine, switch
from .paired import row_values
from .protocol import Job, Method, Opened, Tell, Trained
from .store import DONE, FAILED, LEFT_OUT, Cell, write_cell


def make_method(name: str) -> Method:
    """The method of that name (catalogue.METHODS)."""
    from .adapted import Full, Lora, PeftPrompt
    from .prompting import FewShot, Soft, ZeroShot

    made: dict[str, Method] = {
        "zero-shot": ZeroShot(),
        "few-shot": FewShot(),
        "prompt": Soft("embedding"),
        "prompt-behind": Soft("embedding", behind=True),
        "deep": Soft("deep"),
        "deep-behind": Soft("deep", behind=True),
        "lora": Lora(),
        "peft-prompt": PeftPrompt(),
        "full": Full(),
    }
    return made[name]


def load_task(config: ComparisonConfig, name: str) -> Task:
    """The rows of a task, drawn by seed 0 whatever the seed of the cell. Raises DataError, and ConfigError for fewer
    test rows than classes."""
    spec, budget = config.tasks[name], config.budget(name)
    paths: dict[str, Any] = {key: getattr(spec, key) for key in ("train", "validation", "test")}
    given: dict[str, Any] = {key: path and str(Path(config.data) / path) for key, path in paths.items()}
    given |= {"template": spec.template(), "format": spec.format, "name": name}
    apart = spec.references is not None and spec.test is not None  # then only the test rows need the references
    task = Task.load(**given, references=None if apart else spec.references, limit=budget["train_rows"])
    if apart:
        whole = Task.load(**{**given, "train": None, "validation": None}, references=spec.references)
        task = replace(task, test=whole.test, source=_with_references(task.source, whole.source))
    test = task.test.take(budget["test_rows"], seed=0)
    classes = len(task.template.classes)
    if not len(test):
        raise ConfigError(f"tasks.{name}: there are no test rows; give a file for them, or a share")
    if len(test) < classes:
        raise ConfigError(f"tasks.{name}: {len(test)} test rows are fewer than its {classes} classes; give more")
    return replace(task, test=test)


def _with_references(source: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """The record of the rows, with the hash of the test rows that hold the references."""
    return {**source, "sha256": {**source["sha256"], "test": test["sha256"]["test"]}}


def run_cell(
    config: ComparisonConfig,
    cell: Cell,
    work: Path,
    rate: float | None = None,
    backbone: Backbone | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """The result of a cell as plain data. work: folder for what is done so far, so that a killed search goes on.

    rate: a learning rate that was found at another seed, in place of a search. backbone: else the cell's own is loaded.
    """
    begun = time.perf_counter()
    head = {**asdict(cell), "format": 1, "metric": config.tasks[cell.task].score_name}
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    backbone = backbone or Backbone.load(cell.model, precision=config.precision, device=config.device, report=tell)
    budget = config.budget_of(cell.task, cell.method)
    own = {key: value for key, value in config.settings.get(cell.method, {}).items() if key not in OWN_BUDGET}
    job = Job(backbone, load_task(config, cell.task), cell.seed, budget, own, tell)
    method = make_method(cell.method)
    facts = {**head, "model_parameters": backbone.parameters, "train_rows": len(job.task.train)}
    facts |= {"fingerprint": backbone.fingerprint, "precision_used": str(backbone.dtype).removeprefix("torch.")}
    reason = method.why_not(job)
    if reason:
        return {**facts, "status": LEFT_OUT, "reason": reason}
    _ = backbone.fast  # found out before anything is timed
    work.mkdir(parents=True, exist_ok=True)
    with Meter(backbone.device) as meter:
        trials, trained = _search(method, job, config.rates(cell.method) if rate is None else [rate], work)
    result = {**facts, **_training(trained, trials, meter), "chosen_elsewhere": rate is not None}
    bare = inference_seconds(job, Opened(backbone, max_tokens=budget["max_tokens"]))
    opened, seconds = switch(method, job, work / "best")
    try:
        ours = inference_seconds(job, opened)
        result |= {"switch_seconds": seconds, "disk_bytes": disk_bytes(work / "best")}
        result |= {"inference_seconds": ours, "added_inference_seconds": ours - bare}
        tell(f"scoring {len(job.task.test):,} test rows")
        report = opened.score(job.task.test, budget["max_new_tokens"])
        result |= _scored(report, job, head["metric"])
    finally:
        opened.close()
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    ended = {"versions": versions(), "machine": machine(), "made": made, "cell_seconds": time.perf_counter() - begun}
    return {**result, **ended, "status": DONE}


def _search(method: Method, job: Job, rates: list[float], work: Path) -> tuple[list[dict[str, Any]], Trained]:
    """Train once for each learning rate, keep the files of the best in work/best. What was tried already is known."""
    notes = work / "trials.json"
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {"trials": [], "best": None}
    trials, best = known["trials"], known["best"]
    top = max((t["score"] for t in trials if t["score"] is not None), default=float("-inf"))
    tried: list[float | None] = [*rates] or [None]
    for rate in tried:
        if any(trial["learning_rate"] == rate for trial in trials):
            continue
        job.tell(f"learning rate {rate:g}" if rate else "making ready")
        folder = work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun = time.process_time()
        try:
            trained = method.fit(job, rate, folder)
        except TrainingError as error:  # diverged: a learning rate like another, only a bad one
            trials.append({"learning_rate": rate, "score": None, "loss": None, "seconds": None, "error": str(error)})
            continue
        finally:
            _note(notes, trials, best)
        found = trained.validation or Validation(0.0, 0.0, "none")
        took = {"seconds": trained.seconds, "processor_seconds": time.process_time() - begun}
        trials.append({"learning_rate": rate, "score": found.score, "loss": found.loss, **took})
        if best is None or found.beats(top, best["validation"]["loss"]):
            shutil.rmtree(work / "best", ignore_errors=True)
            folder.rename(work / "best")
            best = {**asdict(trained), "validation": asdict(found)}
        top = max(top, found.score)
        _note(notes, trials, best)
    if best is None:
        raise TrainingError(f"no learning rate of {rates} gave a finite loss; give smaller ones in learning_rates")
    return trials, Trained(**{**best, "validation": Validation(**best["validation"])})


def _note(path: Path, trials: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
    from ..atomic import write_atomic

    write_atomic(path, json.dumps({"trials": trials, "best": best}, default=str).encode())


def _training(trained: Trained, trials: list[dict[str, Any]], meter: Meter) -> dict[str, Any]:
    searched = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    processor = [trial["processor_seconds"] for trial in trials if trial.get("processor_seconds") is not None]
    return {
        "trained_parameters": trained.parameters,
        "steps": trained.steps,
        "train_seconds": trained.seconds,
        "search_seconds": sum(searched),
        "processor_seconds": sum(processor) / len(processor) if processor else None,
        "examples_per_second": trained.examples / trained.seconds if trained.seconds else None,
        "validation": {"score": trained.validation.score, "loss": trained.validation.loss}
        if trained.validation
        else None,
        "trials": trials,
        "settings": trained.settings,
        "peak_memory_bytes": meter.peak_bytes,
        "memory_before_bytes": meter.before_bytes,
        "energy_joules": meter.joules,
    }


def _scored(report: Report, job: Job, metric: str) -> dict[str, Any]:
    """The score with its interval, and what each row adds, for paired tests. No text of the data is kept."""
    scores = (report.scores or report.texts).to_dict()  # type: ignore[union-attr]
    if report.scores is not None:
        interval = {"accuracy": "interval"}.get(metric, f"{metric}_interval")
        bounds = scores[interval]
    else:
        bounds = scores["intervals"][metric]
    low, high = bounds if bounds else (None, None)
    brief = {key: value for key, value in scores.items() if key not in ("confusion", "per_class", "signatures")}
    return {
        "score": scores[metric],
        "low": low,
        "high": high,
        "rows": len(report.true),
        "cut_rows": report.cut_rows,
        "loss": report.loss,
        "scores": brief,
        "each": row_values(report, job.task.test, metric),
        "test_seconds": report.seconds,
    }


def failed(cell: Cell, metric: str, reason: str) -> dict[str, Any]:
    """What is written about a cell that went wrong; it is tried again the next time."""
    return {**asdict(cell), "format": 1, "metric": metric, "status": FAILED, "reason": reason}


def main(arguments: list[str]) -> int:
    """Run the cell that a job file describes and write its result; lines about what is going on go to stdout."""
    given = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    config, cell = ComparisonConfig(**given["config"]), Cell(**given["cell"])

    def tell(text: str) -> None:
        print(text, flush=True)

    try:
        result = run_cell(config, cell, Path(given["work"]), given["rate"], tell=tell)
    except SoftPromptError as error:
        result = failed(cell, config.tasks[cell.task].score_name, str(error))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        result = failed(
            cell, config.tasks[cell.task].score_name, f"out of memory: {' '.join(str(error).split())[:200]}"
        )
    write_cell(Path(given["result"]), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
