"""Which defaults? One setting at a time is changed from those that are shipped, on several tasks and models.

    python benchmarks/defaults.py --data FOLDER --out RESULTS
    python benchmarks/defaults.py --data FOLDER --out RESULTS --models smollm2-135m ./tiny --tasks trec --axes init

The tasks and their templates are those of recipes/compare_tasks.yaml. The base is a deep prompt behind the text, or
with --base prompt the embedding prompt at the front that `tune` makes by default. Each trial is a run of
`softprompt.tune` on the first 300 training rows of a random order, with 100 validation rows, scored on 500 test rows;
with --seeds 2 there are two runs of it, and so on. The axis learning_rate goes over a range of 30 times, from a fifth
of the default to six times it. The axis peft is PEFT's prompt tuning, with as many steps, over as wide a range around
the 3e-2 of its guide (an absolute number; see comparison/adapted.py for what it does).

RESULTS/MODEL.TASK.json is written after each trial; the same command goes on with the next one that is not there.
Seconds are of processor time, so that programs beside it count for little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from speed.facts import as_program, count, facts, keep, precision_named
from speed.tables import read_json

import softprompt as sp
from softprompt.attention import StateCache
from softprompt.comparison.adapted import PeftPrompt
from softprompt.comparison.cell import load_task
from softprompt.comparison.config import ComparisonConfig
from softprompt.comparison.places import behind
from softprompt.comparison.prompting import trained_numbers
from softprompt.comparison.protocol import Job
from softprompt.errors import SoftPromptError
from softprompt.evaluation.runner import Report, evaluate_prompt
from softprompt.plain_yaml import read_yaml
from softprompt.training.loop import planned_steps

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_tasks.yaml"
TASKS = ("trec", "sst2", "agnews", "uit_vsfc")
BASES = {
    "deep-behind": {"kind": "deep", "place": "behind"},
    "prompt": {"kind": "embedding", "place": "front"},
}
# What is changed, one at a time; the base's own value is left out. Cheap and telling ones first.
AXES: dict[str, list[dict[str, Any]]] = {
    "learning_rate": [{"learning_rate": rate} for rate in (0.01, 0.3, 0.02, 0.1)],
    "peft": [{"peft_learning_rate": rate} for rate in (0.006, 0.03, 0.18, 0.012, 0.06)],
    "epochs": [{"epochs": count} for count in (2, 4, 12)],
    "tokens": [{"tokens": count} for count in (5, 10, 50)],
    "init": [{"init": name} for name in ("examples", "random", "vocabulary", "labels")],
    "batch_size": [
        {"batch_size": 8, "epochs": 4},
        {"batch_size": 32, "epochs": 16},
    ],  # 300 rows: equal steps
    "schedule": [{"schedule": "cosine"}, {"schedule": "constant"}, {"warmup": 0.05}, {"warmup": 0.15}],
    "optimizer": [{"clip": 0.0}, {"weight_decay": 0.1}, {"optimizer": "adafactor"}],
    "reparametrisation": [{"reparametrisation": "residual"}],
    "guards": [{"norm_guard": 0.0}, {"norm_guard": 1.0}, {"average": 0.0}, {"rescue": False}],
    "place": [
        {"place": "front"},
        {"kind": "embedding"},
        {"kind": "embedding", "place": "front"},
        {"kind": "embedding", "reparametrisation": "residual"},
    ],
}
VALIDATION_ROWS = 100
KEPT_BYTES = 6 << 30  # states of test texts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder with trec/train.jsonl and so on")
    parser.add_argument("--out", required=True, type=Path, help="folder for one JSON file a model and task")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="aliases, hub ids or folders")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--base", default="deep-behind", choices=list(BASES), help="what is changed")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES), help="default: all")
    parser.add_argument("--rows", type=int, default=300, help="training rows")
    parser.add_argument("--test-rows", type=int, default=500, help="test rows")
    parser.add_argument("--seeds", type=count, default=1, help="runs of each trial")
    parser.add_argument("--precision", default="auto", type=precision_named, help="auto, float32 or bfloat16")
    parser.add_argument("--threads", type=int, help="default: all cores")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = known_tasks()
    if unknown := set(args.tasks) - set(known):
        raise SystemExit(f"there is no task {', '.join(sorted(unknown))} in {RECIPE}; it has {', '.join(known)}")
    base = BASES[args.base]
    axes = [axis for axis in args.axes if axis != "reparametrisation" or base["kind"] == "embedding"]  # deep has none
    changes = [("base", {}), *((axis, change) for axis in axes for change in AXES[axis])]
    trials = [{"axis": axis, "change": change, "seed": seed} for seed in range(args.seeds) for axis, change in changes]
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        tasks = {name: known[name] for name in args.tasks}
        config = ComparisonConfig(
            model=model, data=args.data, tasks=tasks, train_rows=args.rows, test_rows=args.test_rows
        )
        backbone = sp.Backbone.load(model, precision=args.precision)
        for name in args.tasks:
            file = args.out / f"{Path(model).name}.{name}.json"
            run_all(backbone, config, name, base, trials, file)
    return 0


def known_tasks() -> dict[str, Any]:
    """The recipe's classification tasks by name."""
    return {name: spec for name, spec in read_yaml(RECIPE, [])["tasks"].items() if "labels" in spec}


def run_all(
    backbone: sp.Backbone,
    config: ComparisonConfig,
    name: str,
    base: dict[str, str],
    trials: Sequence[dict[str, Any]],
    out: Path,
) -> None:
    """All trials of one task that are not in `out` yet; each is added to it."""
    model = Path(config.model[0]).name
    setting = {"task": name, "rows": config.train_rows, "test_rows": config.test_rows, "base": base}
    setting["precision"] = str(backbone.dtype).removeprefix("torch.")
    made = {**facts("defaults", model, "cpu", torch.get_num_threads()), **setting, "trials": kept_trials(out, setting)}
    done = [(trial["change"], trial["seed"]) for trial in made["trials"]]
    texts = StateCache(KEPT_BYTES)
    front = load_task(config, name)
    made["training_rows"] = len(front.train)  # a task may have fewer than were asked for
    tasks = {"front": front, "behind": front.with_template(behind(front.template))}
    for trial in trials:
        change, seed = trial["change"], trial["seed"]
        if (change, seed) in done:
            continue
        if trial["axis"] == "peft":
            result = trial | run_peft(backbone, front, change["peft_learning_rate"], seed)
        else:
            settings = {"validation_rows": VALIDATION_ROWS, "seed": seed, **base, **change}
            result = trial | run(backbone, tasks[settings.pop("place")], settings, texts)
        made["trials"].append(result)
        keep(made, str(out))
        told = result.get("error") or f"{result['score']:.3f}, loss {result['loss']:.3f}"
        print(f"{model} {name} {change or 'base'}, seed {seed}: {told}, {result['cpu_seconds']:.0f} s", flush=True)


def kept_trials(out: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """What `out` holds already. SystemExit where that was made with another setting."""
    if not out.exists():
        return []
    kept = read_json(out)
    if differing := [key for key in setting if kept[key] != setting[key]]:
        raise SystemExit(f"{out} was made with another {', '.join(differing)}; choose another --out")
    trials: list[dict[str, Any]] = kept["trials"]
    return trials


def run(backbone: sp.Backbone, task: sp.Task, settings: dict[str, Any], texts: StateCache) -> dict[str, Any]:
    """One run and its score on the test rows, or the one line that says why there is none."""
    begun = time.process_time()
    try:
        tuned = sp.tune(backbone, task, **settings)
    except SoftPromptError as error:
        return {"error": str(error), "cpu_seconds": time.process_time() - begun}
    if tuned.reason == "interrupted":
        raise SystemExit("interrupted; finished trials are kept, the same command goes on")
    seconds = time.process_time() - begun
    report = evaluate_prompt(backbone, task.test, tuned.prompt.vectors, texts=texts)
    return scored(report) | {
        "validation": tuned.validation.accuracy if tuned.validation else None,
        "steps": tuned.steps,
        "trained_parameters": trained_numbers(tuned.prompt, sp.TuneConfig().sink),
        "cpu_seconds": round(seconds, 1),
    }


def run_peft(backbone: sp.Backbone, task: sp.Task, rate: float, seed: int) -> dict[str, Any]:
    """The same by PEFT's prompt tuning, with as many steps as the base has."""
    begun = time.process_time()
    steps = planned_steps(sp.TuneConfig(kind="deep"), len(task.train))
    budget = {"epochs": None, "steps": steps, "batch_size": sp.TuneConfig().batch_size, "max_tokens": None}
    job = Job(backbone, task, seed, budget | {"validation_rows": VALIDATION_ROWS})
    method = PeftPrompt()
    with tempfile.TemporaryDirectory() as folder:
        try:
            trained = method.fit(job, rate, Path(folder))
        except SoftPromptError as error:
            return {"error": str(error), "cpu_seconds": time.process_time() - begun}
        seconds = time.process_time() - begun
        opened = method.open(job, Path(folder))
        report = opened.score(task.test)
        opened.close()
    return scored(report) | {
        "validation": trained.validation.score if trained.validation else None,
        "steps": steps,
        "trained_parameters": trained.parameters,
        "cpu_seconds": round(seconds, 1),
    }


def scored(report: Report) -> dict[str, Any]:
    low, high = report.interval
    return {"score": report.accuracy, "low": low, "high": high, "loss": report.loss}


if __name__ == "__main__":
    as_program(main)
