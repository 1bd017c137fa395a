"""Which defaults? One setting at a time is changed from those that are shipped, on several tasks and models.

    python benchmarks/defaults.py --data FOLDER --out RESULTS
    python benchmarks/defaults.py --data FOLDER --out RESULTS --models smollm2-135m ./tiny --tasks trec --axes init

The tasks and their templates are those of recipes/compare_tasks.yaml, the base is a deep prompt behind the text. Each
trial is a run of `softprompt.tune` on the first 300 training rows of a random order, with 100 validation rows, scored
on 500 test rows. The axis learning_rate goes over a range of 30 times, from a fifth of the default to six times it.

RESULTS/MODEL.TASK.json is written after each trial; the same command goes on with the next one that is not there. The
tables of docs/accuracy.md are made from docs/results/defaults by docs/results/make_summary.py. Seconds are of
processor time, so that programs beside it count for little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed.facts import facts, keep

import softprompt as sp
from softprompt.attention import StateCache
from softprompt.comparison.config import TaskSpec
from softprompt.comparison.prompting import behind
from softprompt.errors import SoftPromptError
from softprompt.evaluation.runner import evaluate_prompt
from softprompt.plain_yaml import read_yaml

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_tasks.yaml"
TASKS = ("trec", "sst2", "agnews", "uit_vsfc")
BASE = {"kind": "deep", "place": "behind"}
# What is changed, one at a time; the base's own value is left out. Cheap and telling ones first.
AXES: dict[str, list[dict[str, Any]]] = {
    "learning_rate": [{"learning_rate": rate} for rate in (0.01, 0.02, 0.1, 0.15, 0.3)],
    "epochs": [{"epochs": count} for count in (2, 3, 12)],
    "tokens": [{"tokens": count} for count in (5, 10, 50)],
    "init": [{"init": name} for name in ("examples", "random", "vocabulary", "labels")],
    "batch_size": [{"batch_size": 8, "epochs": 3}, {"batch_size": 32, "epochs": 12}],  # equal numbers of steps
    "schedule": [{"schedule": "cosine"}, {"schedule": "constant"}, {"warmup": 0.0}, {"warmup": 0.2}],
    "optimizer": [{"clip": 0.0}, {"weight_decay": 0.1}, {"optimizer": "adafactor"}],
    "seed": [{"seed": 1}, {"seed": 2}],
    "place": [
        {"place": "front"},
        {"kind": "embedding"},
        {"kind": "embedding", "place": "front"},
        {"kind": "embedding", "reparametrisation": "residual"},
    ],
}
KEPT_BYTES = 6 << 30  # states of test texts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder with trec/train.jsonl and so on")
    parser.add_argument("--out", required=True, type=Path, help="folder for one JSON file a model and task")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="aliases, hub ids or folders")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES), help="default: all")
    parser.add_argument("--rows", type=int, default=300, help="training rows")
    parser.add_argument("--test-rows", type=int, default=500, help="test rows")
    parser.add_argument("--threads", type=int, help="default: all cores")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = read_yaml(RECIPE, [])["tasks"]
    if unknown := set(args.tasks) - set(known):
        raise SystemExit(f"there is no task {', '.join(sorted(unknown))} in {RECIPE}; it has {', '.join(known)}")
    trials = [{"axis": "base", "change": {}}]
    trials += [{"axis": axis, "change": change} for axis in args.axes for change in AXES[axis]]
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        backbone = sp.Backbone.load(model, precision="float32")
        for name in args.tasks:
            document = f"{Path(model).name}.{name}.json"
            run_all(
                backbone, TaskSpec(**known[name]), Path(args.data), trials, args, args.out / document, (model, name)
            )
    return 0


def run_all(
    backbone: sp.Backbone,
    spec: TaskSpec,
    data: Path,
    trials: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    out: Path,
    named: tuple[str, str],
) -> None:
    """All trials of one task that are not in `out` yet; each is added to it."""
    setting = {"task": named[1], "rows": args.rows, "test_rows": args.test_rows, "base": BASE}
    made = {**facts("defaults", Path(named[0]).name, "cpu", torch.get_num_threads()), **setting, "trials": []}
    if out.exists():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if differing := [key for key in setting if kept[key] != setting[key]]:
            raise SystemExit(f"{out} was made with another {', '.join(differing)}; choose another --out")
        made["trials"] = kept["trials"]
    done = [trial["change"] for trial in made["trials"]]
    texts = StateCache(KEPT_BYTES)
    tasks: dict[str, sp.Task] = {}
    for trial in trials:
        if trial["change"] in done:
            continue
        settings = {**BASE, **trial["change"]}
        place = settings.pop("place")
        if place not in tasks:
            tasks[place] = load(spec, data, place, args)
        result = trial | run(backbone, tasks[place], settings, texts)
        made["trials"].append(result)
        keep(made, str(out))
        told = (
            "failed: " + result["error"] if "error" in result else f"{result['score']:.3f}, loss {result['loss']:.3f}"
        )
        print(f"{named[0]} {named[1]} {trial['change'] or 'base'}: {told}, {result['cpu_seconds']:.0f} s", flush=True)


def load(spec: TaskSpec, data: Path, place: str, args: argparse.Namespace) -> sp.Task:
    template = spec.template()
    if place == "behind":
        template = behind(template)
    task = sp.Task.load(
        data / spec.train,
        validation=data / spec.validation,
        test=data / spec.test,
        input=template.input,
        target=spec.target,
        labels=spec.labels,
    )
    return replace(
        task,
        train=task.train.take(args.rows, seed=0),
        validation=task.validation.take(100, seed=0),
        test=task.test.take(args.test_rows, seed=0),
    )


def run(backbone: sp.Backbone, task: sp.Task, settings: dict[str, Any], texts: StateCache) -> dict[str, Any]:
    """One run and its score on the test rows, or the one line that says why there is none."""
    begun = time.process_time()
    try:
        tuned = sp.tune(backbone, task, **settings)
    except SoftPromptError as error:
        return {"error": str(error), "cpu_seconds": time.process_time() - begun}
    seconds = time.process_time() - begun
    report = evaluate_prompt(backbone, task.test, tuned.prompt.vectors, texts=texts)
    low, high = report.interval
    return {
        "score": report.accuracy,
        "low": low,
        "high": high,
        "loss": report.loss,
        "validation": tuned.validation.accuracy if tuned.validation else None,
        "trained_parameters": tuned.prompt.vectors.numel(),
        "cpu_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
