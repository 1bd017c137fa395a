"""How fast is an epoch after the first, where the soft tokens stand behind the text and the texts are computed once?

    python benchmarks/suffix_speed.py --out suffix.json
    python benchmarks/suffix_speed.py --goal              # and the time to a validation accuracy of 0.83

Reviews of IMDb, cut to 256 tokens, in batches of 16, tuned in four ways, each by whole runs in a process of its own:

    suffix        a soft prompt behind the text, over kept texts (softprompt.tune)
    deep-suffix   keys and values in each layer behind the text, over kept texts (softprompt.tune)
    softprompt    a soft prompt in front of the text, our exact path (softprompt.tune)
    peft-prompt   PEFT's prompt tuning: loss, backward, AdamW

What is timed is a step as it is taken in a run, optimiser and log included. The first two are given several epochs; the
first epoch is not timed, and what keeping the texts took is told apart. The other two cost the same in each epoch;
their first step is not timed. All cost is by the row, so that few rows are enough. That the fast way of each of ours is
equal to the plain concatenation is asserted, on a few rows.

--goal: from the start of `softprompt.tune` to the first validation with an accuracy of 0.83 on the movie reviews, with
a deep suffix, keeping texts and validating included; beside it PEFT with transformers' Trainer at the learning rate of
PEFT's guide, 3e-2, each for a bounded time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from speed.cases import DATA, KINDS, Data, read_fields
from speed.compare import TOLERANCE, alone
from speed.facts import as_program, facts, finish, precision_named
from speed.goal import GOAL, goal_figures
from speed.process import Taken
from speed.sides import Setting
from speed.suffix_sides import BEHIND, CHECK, FRONT, RUN, peft_tuned, tuned

from softprompt import machine, weights

TOKENS, BATCH = 20, 16
# Side -> how it is made, input, kind, epochs over the kept rows (None: few rows, one epoch).
WAYS = {
    "suffix": (tuned, BEHIND, "embedding", True),
    "deep-suffix": (tuned, BEHIND, "deep", True),
    "softprompt": (tuned, FRONT, "embedding", False),
    "peft-prompt": (peft_tuned, FRONT, "embedding", False),
}
# How many times as fast an epoch after the first is to be as that of softprompt and peft-prompt (issue 3).
TARGETS = {"suffix": {"softprompt": 10, "peft-prompt": 30}, "deep-suffix": {"softprompt": 20, "peft-prompt": 60}}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--precision", default="auto", type=precision_named, help="auto, float32 or bfloat16")
    parser.add_argument("--rows", type=int, default=48, help="rows whose texts are kept")
    parser.add_argument("--epochs", type=int, default=7, help="epochs over kept texts, of which the first is not timed")
    parser.add_argument("--steps", type=int, default=3, help="steps without kept texts, the first is not timed")
    parser.add_argument("--quick", action="store_true", help="16 rows, 4 epochs, 2 steps of 8 rows")
    parser.add_argument("--goal", action="store_true", help=f"also the time to a validation accuracy of {GOAL}")
    parser.add_argument("--only-goal", action="store_true", help="that alone")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each side of the goal")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of ours for the goal")
    parser.add_argument("--threads", type=int, default=machine.threads().cores)
    parser.add_argument("--device", default=machine.default_device().type)
    parser.add_argument("--out", metavar="FILE", help="write the JSON object there too")
    return parser.parse_args(arguments)


def material(rows: int) -> tuple[list[dict[str, str]], Data]:
    """Rows with both classes among them; movie reviews where IMDb is not there."""
    data = KINDS["long"] if (DATA / "imdb").is_dir() else KINDS["short"]
    return [{"text": row["text"], "label": row["label"]} for row in read_fields(data, rows)], data


def setting_of(args: argparse.Namespace, folder: str, name: str) -> Setting:
    _, text, kind, kept = WAYS[name]
    batch = BATCH // 2 if args.quick and not kept else BATCH
    rows, data = material((16 if args.quick else args.rows) if kept else batch * (2 if args.quick else args.steps))
    epochs = (4 if args.quick else args.epochs) if kept else 1
    more = {"rows": rows, "room": data.room, "input": text, "kind": kind, "batch": batch, "epochs": epochs}
    return Setting(folder, args.precision, args.device, TOKENS, args.threads, (), more=more)


def side_figures(taken: Taken, setting: Setting, kept: bool, memory: int | None) -> dict[str, Any]:
    """Of one run: array [seconds of the texts, of each step]."""
    more, (texts, *steps) = setting.more, taken.array.tolist()
    rows, batch = len(more["rows"]), more["batch"]
    in_epoch = rows // batch
    # Epochs of equal batches; across their ends a batch may mix two, which costs the same.
    timed = steps[in_epoch:] if kept else steps[1:]
    size = in_epoch if kept else 1
    parts = [timed[i : i + size] for i in range(0, len(timed) - size + 1, size)]
    seconds = statistics.median(sum(part) / (size * batch) for part in parts)
    found = {
        "ms_per_row": round(1000 * seconds, 2),
        "examples_per_s": round(1 / seconds, 3),
        "timed_steps": len(timed),
        "batch": batch,
        "memory_over_model_mb": None if memory is None else round(memory / 1e6),
    }
    return {**found, "texts_ms_per_row": round(1000 * texts / rows, 1)} if kept else found


def measure(args: argparse.Namespace, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name, (make, _, _, kept) in WAYS.items():
        setting = setting_of(args, folder, name)
        ours = make is tuned
        say(f"{name}: {len(setting.more['rows'])} rows, {setting.more['epochs']} epochs ...")
        taken, memory = alone(make, setting, [RUN, CHECK] if ours else [RUN])
        sides[name] = side_figures(taken[0], setting, kept, memory)
        if ours:
            loss, gradient = taken[1].array.tolist()
            allowed = TOLERANCE[args.precision]
            assert loss <= allowed[0], f"{name}: the loss differs from the plain concatenation's by {loss:.2e}"
            assert gradient <= allowed[1], f"{name}: the gradient differs by {gradient:.2e}"
            sides[name]["difference_from_plain"] = {"loss": float(f"{loss:.2e}"), "gradient": float(f"{gradient:.2e}")}
        say(f"{name}: {sides[name]['ms_per_row']} ms a row")
    speed = {name: side["examples_per_s"] for name, side in sides.items()}
    times = {name: {other: round(speed[name] / speed[other], 2) for other in TARGETS[name]} for name in TARGETS}
    return {"tokens": TOKENS, "precision": args.precision, "sides": sides, "times": times, "targets": TARGETS}


def print_table(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("side", "ms/row", "ex/s", "texts, once, ms/row", "times softprompt in front", "times PEFT")
    for name, side in document["sides"].items():
        times = document["times"].get(name, {})
        figures = [side["ms_per_row"], side["examples_per_s"], side.get("texts_ms_per_row", "")]
        table.add_row(name, *map(str, [*figures, times.get("softprompt", ""), times.get("peft-prompt", "")]))
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    args = parse(arguments)
    document = facts("suffix_speed", args.model, args.device, args.threads)
    folder = str(weights.locate(args.model, report=say).folder)
    if not args.only_goal:
        document |= measure(args, folder, say)
        print_table(document)
    if args.goal or args.only_goal:
        document["goal"] = goal_figures(args, folder, say)
    finish(document, args.out)
    return 0


if __name__ == "__main__":
    as_program(main)
