"""What does a good source prompt save? A task with few rows, from its instruction and from another task's prompt.

    python benchmarks/transfer.py --data FOLDER --out docs/results/transfer/cr.json
    python benchmarks/transfer.py --data FOLDER --out FILE --source trec --source-rows 1000 --target agnews --rows 32

SPoT's question (Vu et al. 2022, arXiv:2110.07904). The source prompt is tuned once and kept in --work; it is scored on
the target as it is ("rows 0"), then tuned on 32, 100 and 1,000 rows of the target, beside runs of as many rows that
start as `softprompt tune` does by default. Tasks and templates are those of recipes/compare_tasks.yaml, the prompts
are deep ones behind the text, all settings are the defaults. Who has 32 rows has none to choose by, so nothing is
validated and the end of each run counts. Every run is scored on the same test rows.

The file is written after each run; the same command goes on with the next one that is not there. Seconds are of
processor time, so that programs beside it count for little.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from defaults import KEPT_BYTES, RECIPE, kept_trials, known_tasks, run
from speed.facts import as_program, count, facts, keep, precision_named

import softprompt as sp
from softprompt.attention import StateCache
from softprompt.comparison.cell import load_task
from softprompt.comparison.config import ComparisonConfig
from softprompt.comparison.places import behind
from softprompt.evaluation.runner import evaluate_prompt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder with sst2/train.jsonl and so on")
    parser.add_argument("--out", required=True, type=Path, help="JSON file of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), help="folder for the source prompt")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--source", default="sst2", help="task of the source prompt")
    parser.add_argument("--target", default="cr", help="task with few rows")
    parser.add_argument("--source-rows", type=int, default=2000, help="training rows of the source")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 100, 1000], help="training rows of the target")
    parser.add_argument("--seeds", type=count, default=2, help="draws of the target's rows")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--precision", default="auto", type=precision_named, help="auto, float32 or bfloat16")
    parser.add_argument("--threads", type=int, help="default: all cores")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = {
        key: getattr(args, key) for key in ("model", "precision", "source", "source_rows", "target", "test_rows")
    }
    trials = kept_trials(args.out, setting)
    made = {**facts("transfer", args.model, "cpu", torch.get_num_threads()), **setting, "trials": trials}
    task = load(args, args.target, max(args.rows))
    if max(args.rows) > len(task.train):
        raise SystemExit(f"{args.target} has {len(task.train)} training rows, {max(args.rows)} were asked for")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    backbone = sp.Backbone.load(args.model, precision=args.precision)
    source, texts = source_prompt(backbone, args), StateCache(KEPT_BYTES)
    done = [{key: trial[key] for key in ("rows", "start", "seed")} for trial in trials]
    for trial in plan(args.rows, args.seeds):
        if trial in done:
            continue
        told = trial | one(backbone, task, trial, source, texts)
        trials.append(told)
        keep(made, str(args.out))
        print(f"{trial}: {told.get('error') or round(told['score'], 3)}, {told['cpu_seconds']:.0f} s", flush=True)
    return 0


def load(args: argparse.Namespace, name: str, rows: int) -> sp.Task:
    """A task of the recipe, its soft tokens behind the text."""
    known = known_tasks()
    if name not in known:
        raise SystemExit(f"there is no classification task {name} in {RECIPE}; it has {', '.join(known)}")
    config = ComparisonConfig(
        model=args.model, data=args.data, tasks={name: known[name]}, train_rows=rows, test_rows=args.test_rows
    )
    task = load_task(config, name)
    return task.with_template(behind(task.template))


def source_prompt(backbone: sp.Backbone, args: argparse.Namespace) -> Path:
    """The source task's prompt in the folder for work; tuned where it is not there yet."""
    path: Path = args.work / f"{args.source}-{args.source_rows}"
    if not path.exists():
        print(f"tuning the source prompt on {args.source_rows:,} rows of {args.source}", flush=True)
        tuned = sp.tune(backbone, load(args, args.source, args.source_rows), kind="deep")
        if tuned.reason == "interrupted":
            raise SystemExit("interrupted; the same command begins with the source prompt anew")
        tuned.prompt.save(path)
    return path


def plan(rows: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """The source prompt as it is, then each number of rows from both starts, one seed after the other."""
    made: list[dict[str, Any]] = [{"rows": 0, "start": "source", "seed": 0}]
    for seed in range(seeds):
        made += [{"rows": count, "start": start, "seed": seed} for count in rows for start in ("text", "source")]
    return made


def one(backbone: sp.Backbone, task: sp.Task, trial: dict[str, Any], source: Path, texts: StateCache) -> dict[str, Any]:
    if not trial["rows"]:
        report = evaluate_prompt(backbone, task.test, sp.SoftPrompt.load(source).vectors, texts=texts)
        low, high = report.interval
        return {"score": report.accuracy, "low": low, "high": high, "loss": report.loss, "cpu_seconds": 0.0}
    none = replace(task.validation, rows=())
    few = replace(task, train=task.train.take(trial["rows"], seed=trial["seed"]), validation=none)
    settings: dict[str, Any] = {"kind": "deep", "seed": trial["seed"], "folds": 0}
    settings |= {"init": f"prompt:{source}"} if trial["start"] == "source" else {}
    return run(backbone, few, settings, texts)


if __name__ == "__main__":
    as_program(main)
