"""`softprompt demo`: the main job from start to end on a real model and real movie reviews."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import FAILED, command
from .output import Output, duration, interval
from .progress import TuneProgress, counting

if TYPE_CHECKING:
    from ..attention import StateCache
    from ..backbone import Backbone
    from ..data import Task
    from ..evaluation.runner import Report
    from ..prompt import SoftPrompt
    from ..training.run import TuneResult

MODEL = "smollm2-135m"
# The soft tokens stand behind the review: what the model makes of a review is then computed once.
INPUT = "Review: {text}\nSentiment{soft}:"
TARGET = " {label}"
LABELS = ["negative", "positive"]
SETTINGS: dict[str, Any] = {
    "kind": "deep",
    "tokens": 20,
    "epochs": 2.0,
    "batch_size": 32,
    "text_cache": "memory",  # a demo leaves no gigabytes behind
    "text_cache_bits": 8,  # and stays within 4 GB of memory
    "validate_every": 63,
    "validation_rows": 150,
    "init_text": "Classify the movie review as positive or negative. Sentiment of the review: positive or negative?",
}
SHOTS = 4
# The three reviews of the README.
REVIEWS = (
    "A warm, funny and quietly devastating film; I left the cinema grateful.",
    "Two hours of noise in search of a story.",
    "The cast does what it can, but the jokes were old when the century was young.",
)


@command
def demo(
    out: Output,
    folder: Annotated[Path, typer.Option(help="Where the data, the run and the prompt go.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Another model than the demo's.")] = MODEL,
    train_rows: Annotated[int, typer.Option(min=50, help="Reviews to tune on.")] = 2000,
    test_rows: Annotated[int, typer.Option(min=20, help="Unseen reviews to score.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and tuning.")] = 0,
) -> None:
    """Tune a prompt that tells good film reviews from bad ones, and see what it is worth.

    2,000 reviews, a model of 135 million weights that never change, a deep prompt of 20 soft tokens; on two cores
    about two minutes where the CPU has bfloat16 products, six where it has not.
    """
    from ..attention import StateCache
    from ..machine import text_bytes
    from ..training.run import write_run_report

    clock = _Clock()
    task = _data(out, folder, train_rows, test_rows, seed)
    clock.lap("data")
    backbone = _load(out, model)
    clock.lap("model")
    result, run_folder = _tune(out, backbone, task, folder, model, seed)
    clock.lap("tuning")
    out.note(
        f"\nBefore and after, on {len(task.test):,} unseen reviews: the same template without and with the soft prompt"
    )
    texts = StateCache(text_bytes())  # each review is read once for the prompt and for its absence
    after = _score(out, backbone, task, result.prompt, 0, "soft prompt", texts)
    clock.lap("soft prompt")
    zero = _score(out, backbone, task, None, 0, "zero-shot", texts)
    clock.lap("zero-shot")
    few = _score(out, backbone, task, None, SHOTS, f"{SHOTS}-shot")
    clock.lap(f"{SHOTS}-shot")
    prompt_folder = folder / "prompts" / "sentiment"
    result.prompt.metrics["test"] = after.to_dict(brief=True)
    result.prompt.save(prompt_folder, overwrite=True)
    write_run_report(backbone, result, after, "test", _baselines({"zero-shot": zero, f"{SHOTS}-shot": few}))
    reports = {"zero-shot": zero, f"{SHOTS}-shot": few, "soft prompt": after}
    _show_scores(out, reports, clock)
    said = _show_reviews(out, backbone, result.prompt)
    files = {"prompt": prompt_folder, "run": run_folder, "report": result.report, "data": folder / "data"}
    _show_files(out, files, model)
    out.document(
        {
            "scores": {name: report.to_dict() for name, report in reports.items()},
            "seconds": clock.laps,
            "total_seconds": clock.total(),
            "reviews": said,
            "files": {name: str(path) for name, path in files.items() if path},
        }
    )


class _Clock:
    """How long each part took."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self.last, 2)
        self.last = now

    def total(self) -> float:
        return round(time.monotonic() - self.begun, 2)


def _data(out: Output, folder: Path, train_rows: int, test_rows: int, seed: int) -> Task:
    from ..data import Task
    from ..demo_data import write_movie_reviews

    files = write_movie_reviews(folder / "data", train=train_rows, test=test_rows, seed=seed)
    task = Task.load(
        files["train"],
        validation=files["validation"],
        test=files["test"],
        input=INPUT,
        target=TARGET,
        labels=LABELS,
        name="sentiment",
    )
    for split in (task.train, task.validation, task.test):
        films = len({row["movie"] for row in split})
        out.note(f"{split.name}: {len(split):,} reviews of {films} films ({files[split.name]})")
    out.note("no film stands in two of them")
    return task


def _load(out: Output, model: str) -> Backbone:
    from ..backbone import Backbone

    return Backbone.load(model, report=out.note)


def _score(
    out: Output,
    backbone: Backbone,
    task: Task,
    prompt: SoftPrompt | None,
    shots: int,
    name: str,
    texts: StateCache | None = None,
) -> Report:
    from ..evaluation.runner import evaluate_prompt, pick_shots
    from .scores import in_one_line

    vectors = None if prompt is None else prompt.vectors
    worked = pick_shots(task.train, shots, seed=0)
    with counting(out, name) as progress:
        report = evaluate_prompt(backbone, task.test, vectors, worked=worked, progress=progress, texts=texts)
    out.note(f"{name}: {in_one_line(report)}, {duration(report.seconds)}")
    return report


def _tune(out: Output, backbone: Backbone, task: Task, folder: Path, model: str, seed: int) -> tuple[TuneResult, Path]:
    from ..config import RunConfig, free_run
    from ..training.run import tune

    run_folder = Path(free_run(folder / "runs" / "sentiment"))
    settings: dict[str, Any] = {
        **{split: str(folder / "data" / f"{split}.csv") for split in ("train", "validation", "test")},
        **{"model": model, "input": INPUT, "target": TARGET, "labels": LABELS, "seed": seed, "name": "sentiment"},
        **{"out": str(folder / "prompts" / "sentiment"), "run": str(run_folder), "overwrite": True},
        **SETTINGS,
    }
    config = RunConfig(**settings)
    out.note(f"\nTuning {config.tokens} soft tokens; the model itself never changes")
    with TuneProgress(out) as progress:
        result = tune(
            backbone, task, config.tuning(), run_folder=run_folder, listen=progress, config_text=config.to_yaml()
        )
    if result.reason == "interrupted":
        out.notes.print(f"interrupted; go on with: softprompt tune --resume {run_folder}", markup=False)
        raise typer.Exit(FAILED)
    return result, run_folder


def _show_scores(out: Output, reports: dict[str, Report], clock: _Clock) -> None:
    from .scores import table

    shown = table("", "accuracy", "95 % interval", "time")
    for name, report in reports.items():
        shown.add_row(name, f"{report.accuracy:.3f}", interval(report.interval), duration(clock.laps[name]))
    majority = next(iter(reports.values())).scores
    if majority is not None:
        shown.add_row(f"always '{majority.majority_class}'", f"{majority.majority_score:.3f}", "", "")
    out.show(f"\n{len(next(iter(reports.values())).true):,} unseen reviews", shown)
    others = ", ".join(f"{name} {duration(clock.laps[name])}" for name in ("data", "model", "tuning"))
    out.show(f"{others}; {duration(clock.total())} in all", "")


def _baselines(reports: dict[str, Report]) -> list[dict[str, Any]]:
    return [
        {"name": name, "score": report.accuracy, "low": report.interval[0], "high": report.interval[1]}
        for name, report in reports.items()
    ]


def _show_reviews(out: Output, backbone: Backbone, prompt: SoftPrompt) -> list[dict[str, Any]]:
    from ..inference import classify

    answers = classify(backbone, prompt, [{"text": text} for text in REVIEWS])
    for text, answer in zip(REVIEWS, answers, strict=True):
        out.show(f"{answer.label} ({answer.probabilities[answer.label]:.2f})  {text}")
    return [
        {"text": t, "label": a.label, "probabilities": a.probabilities} for t, a in zip(REVIEWS, answers, strict=True)
    ]


def _show_files(out: Output, files: dict[str, Path | None], model: str) -> None:
    out.show("")
    for name, path in files.items():
        if path is not None:
            size = (
                f" ({sum(f.stat().st_size for f in path.iterdir() if f.is_file()) / 1000:.0f} kB)"
                if name == "prompt"
                else ""
            )
            out.show(f"{name:<8}{path}{size}")
    prompt = files["prompt"]
    out.show(
        "",
        "go on with:",
        f'  softprompt run {prompt} "{REVIEWS[0]}"',
        f"  softprompt evaluate {prompt} {files['data']}/test.csv",
        f"  softprompt tune {files['run']}/config.yaml tokens=50 out=prompts/sentiment-50 run=runs/sentiment-50",
    )
