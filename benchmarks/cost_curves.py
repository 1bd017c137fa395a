"""What a row of tuning costs against soft tokens, batch, text length; and a sweep against its number of trials.

    python benchmarks/cost_curves.py --out curves.json

Texts are IMDb's, cut to exactly so many tokens. Loss and gradient of one step by four sides, each in a process of its
own, in turns: softprompt (in front of the text), suffix and deep-suffix (behind the text, over kept texts, so what an
epoch after the first costs), and peft-prompt. The curves have one point in common: 20 soft tokens, 8 rows of 32 tokens.

A sweep's cost is the time of `softprompt.sweep` over K trials without halving, of a soft prompt in front and of a deep
suffix, whose trials share the kept texts; beside K times the time of one trial. The last line is one JSON object;
plots.py draws it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from speed.cases import DATA, KINDS, read_fields
from speed.compare import alone, take_steps
from speed.curve_sides import Job, behind, in_front, peft, sweeps
from speed.facts import as_program, facts, finish, precision_named
from speed.sides import Setting
from speed.suffix_sides import BEHIND, FRONT

from softprompt import machine, weights
from softprompt.demo_data import movie_reviews

TOKENS, ROWS, LENGTH = 20, 8, 32
AXES = {
    "tokens": (5, 20, 50, 100, 200),
    "batch": (1, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
}
QUICK_AXES = {"tokens": (20, 100), "batch": (1, 8), "length": (32, 96)}
SIDES = {
    "softprompt": (in_front, ""),
    "suffix": (behind, "embedding"),
    "deep-suffix": (behind, "deep"),
    "peft-prompt": (peft, ""),
}
TRIALS = (1, 2, 4, 8)
SWEEP_ROWS, SWEEP_HELD = 48, 16


def jobs_of(axes: dict[str, tuple[int, ...]]) -> list[Job]:
    """The points of all curves; those that are the same computation stand once."""
    found = []
    for axis, values in axes.items():
        for value in values:
            sizes = {"rows": ROWS, "length": LENGTH, "tokens": TOKENS}
            sizes[{"batch": "rows"}.get(axis, axis)] = value
            found.append(Job(axis, value, **sizes))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--precision", default="auto", type=precision_named, help="auto, float32 or bfloat16")
    parser.add_argument("--passes", type=int, default=2, help="times that each point is measured; the least counts")
    parser.add_argument("--quick", action="store_true", help="two points of each curve, once, and few trials")
    parser.add_argument("--threads", type=int, default=machine.threads().cores)
    parser.add_argument("--device", default=machine.default_device().type)
    parser.add_argument("--out", metavar="FILE", help="write the JSON object there too")
    return parser.parse_args(arguments)


def long_texts() -> list[dict[str, str]]:
    """Texts of at least 256 tokens; without IMDb several reviews in one."""
    if (DATA / "imdb").is_dir():
        return [row for row in read_fields(KINDS["long"], 400) if len(row["text"]) > 1600][:48]
    rows = movie_reviews(train=960).train
    return [
        {"text": " ".join(row["text"] for row in rows[i : i + 20]), "label": rows[i]["label"]}
        for i in range(0, 960, 20)
    ]


def curves(args: argparse.Namespace, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    """{axis: {side: {value: ms a row}}}."""
    jobs = jobs_of(QUICK_AXES if args.quick else AXES)
    distinct = list(dict.fromkeys(replace(job, axis="", value=0) for job in jobs))
    warm = replace(distinct[0], axis="", value=0, rows=2)
    passes = 1 if args.quick else args.passes
    more = {"jobs": [warm, *distinct * passes], "fields": long_texts()}
    setting = Setting(folder, args.precision, args.device, TOKENS, args.threads, (), more=more)
    makers = {name: (make, replace(setting, more={**more, "kind": kind})) for name, (make, kind) in SIDES.items()}
    say(f"curves: {len(distinct)} points, {passes} times, on {len(makers)} sides ...")
    taken, told = take_steps(makers, len(distinct) * passes)
    found: dict[str, Any] = {axis: {name: {} for name in makers} for axis in AXES}
    for name, steps in taken.items():
        if not steps:
            raise SystemExit(f"{name} failed: {told[name].get('failed')}")
        for job in jobs:
            place = distinct.index(replace(job, axis="", value=0))
            seconds = min(step.seconds for step in steps[1 + place :: len(distinct)])
            found[job.axis][name][str(job.value)] = round(1000 * seconds / job.rows, 2)
    return {"curves": found, "common": {"tokens": TOKENS, "batch": ROWS, "length": LENGTH}}


def trial_curve(args: argparse.Namespace, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of sweeps: {way: {K: seconds}}. The first sweep warms up and is not counted."""
    counts = TRIALS[:2] if args.quick else TRIALS
    ways = {"softprompt": (FRONT, "embedding", counts[:2]), "deep-suffix": (BEHIND, "deep", counts)}
    jobs = [(text, kind, count, name) for name, (text, kind, some) in ways.items() for count in some]
    more = {
        "fields": [{"text": row["text"], "label": row["label"]} for row in movie_reviews(train=SWEEP_ROWS).train],
        "validation": SWEEP_HELD,
        "batch": 16,
        "epochs": 1 if args.quick else 4,
        "room": 128,
        "sweeps": [(FRONT, "embedding", 1), *((text, kind, count) for text, kind, count, _ in jobs)],
    }
    say(f"sweeps: {', '.join(f'{name} {count}' for *_, count, name in jobs)} trials ...")
    setting = Setting(folder, args.precision, args.device, TOKENS, args.threads, (), more=more)
    steps, _ = alone(sweeps, setting, range(len(more["sweeps"])))
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for (_, _, count, name), step in zip(jobs, steps[1:], strict=True):
        found[name][str(count)] = round(step.seconds, 2)
    return {"trials": found, "sweep": {"rows": SWEEP_ROWS - SWEEP_HELD, "epochs": more["epochs"]}}


def print_table(found: dict[str, Any]) -> None:
    for axis, sides in found["curves"].items():
        for name, points in sides.items():
            print(f"{axis:7} {name:12} " + "  ".join(f"{value}: {ms}" for value, ms in points.items()) + "  ms/row")
    for name, points in found["trials"].items():
        print(f"trials  {name:12} " + "  ".join(f"{count}: {seconds}" for count, seconds in points.items()) + "  s")


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    args = parse(arguments)
    document = facts("cost_curves", args.model, args.device, args.threads)
    folder = str(weights.locate(args.model, report=say).folder)
    document |= {"precision": args.precision} | curves(args, folder, say) | trial_curve(args, folder, say)
    print_table(document)
    finish(document, args.out)
    return 0


if __name__ == "__main__":
    as_program(main)
