"""How fast are evaluation and generation with a soft prompt, next to PEFT?

    python benchmarks/inference_speed.py --out inference.json

Evaluation: movie reviews of the test films, two label words. `softprompt.evaluate` as one call, beside PEFT in batches
of 16 right-padded rows in two ways: peft-logits compares the label words' tokens behind one forward of each text, which
is right for label words of one token; peft-labels computes each label word behind each text, as one must for any label
words and as evaluation harnesses do. That all give the same probabilities and the same classes is asserted.

Generation: 64 rows of E2E, 32 new tokens each (nothing ends an answer earlier), greedy. `softprompt.generate` beside
PEFT's `generate` on a left-padded batch. PEFT 0.21 puts the prompt before the padding and numbers positions through it,
so in such a batch most rows get another answer than alone; how many is told. That ours are the answers of PEFT's
`generate` to each row alone is asserted for some of the rows in float32; in bfloat16, where rounding decides between
words that are about as likely, how many are the same is told.

The prompt is the embeddings of an instruction, the same on all sides. Each side lives in a process of its own; they
take turns over the same rows. The first turn, of few rows, is not timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from speed.cases import KINDS, read_fields
from speed.compare import Steps, alone, ratio, take_steps
from speed.facts import as_program, facts, finish, precision_named
from speed.inference_sides import EVALUATION, GENERATION, Maker
from speed.sides import Setting

from softprompt import machine, weights
from softprompt.demo_data import movie_reviews

TOKENS, NEW_TOKENS, ALONE = 20, 32, 6
# Largest difference of a probability; classes that lie closer together than that may differ.
NEAR = {"float32": 1e-3, "bfloat16": 0.1}
TARGETS = {"evaluation": 5, "generation": 3}  # times PEFT (issue 3)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--precision", default="auto", type=precision_named, help="auto, float32 or bfloat16")
    parser.add_argument("--rows", type=int, default=128, help="reviews a turn")
    parser.add_argument("--generate-rows", type=int, default=64, help="rows to be answered a turn")
    parser.add_argument("--turns", type=int, default=2, help="timed turns of each side")
    parser.add_argument("--quick", action="store_true", help="one turn of 64 reviews, one of generation")
    parser.add_argument("--only", choices=sorted(TARGETS), help="one of the two")
    parser.add_argument("--threads", type=int, default=machine.threads().cores)
    parser.add_argument("--device", default=machine.default_device().type)
    parser.add_argument("--out", metavar="FILE", help="write the JSON object there too")
    return parser.parse_args(arguments)


def parts(rows: Sequence[Any], warm: int, size: int) -> list[list[Any]]:
    """A few rows to warm up with, then parts of `size`."""
    rest = rows[warm:]
    return [list(rows[:warm]), *(list(rest[i : i + size]) for i in range(0, len(rest), size))]


def told(taken: Steps, sizes: Sequence[int], memory: Mapping[str, Mapping[str, Any]], times: str) -> dict[str, Any]:
    """Medians over the timed turns of each side, and ours over that of each other side."""
    found: dict[str, Any] = {}
    for name, steps in taken.items():
        if not steps[1:]:
            raise SystemExit(f"{name} failed: {memory[name].get('failed', 'no turn was timed')}")
        rates = [size / step.seconds for size, step in zip(sizes[1:], steps[1:], strict=True)]
        peak = memory[name]["memory"]
        found[name] = {
            "examples_per_s": round(statistics.median(rates), 3),
            "ms_per_row": round(1000 / statistics.median(rates), 2),
            "memory_over_model_mb": None if peak is None else round(peak / 1e6),
        }
    found["times"] = {name: ratio(taken, "softprompt", name) for name in taken if name != "softprompt"}
    return {**found, "rows": sizes[-1], "turns": len(sizes) - 1, "target": TARGETS[times]}


def evaluation(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    turns, size = (1, 64) if args.quick else (args.turns, args.rows)
    rows = movie_reviews(train=16, validation=16, test=min(2000, 8 + turns * size)).test
    split = parts(rows, 8, size)
    setting = replace(setting, more={"parts": split})
    taken, memory = take_steps({name: (make, setting) for name, make in EVALUATION.items()}, turns)
    found = told(taken, [len(part) for part in split[: turns + 1]], memory, "evaluation")
    found["largest_difference"] = check_probabilities(taken, NEAR[args.precision])
    return found


def check_probabilities(taken: Steps, near: float) -> dict[str, float]:
    """Assert that all sides give the probabilities and classes of ours; the largest differences by side."""
    found = {}
    for name in taken:
        if name == "softprompt":
            continue
        most = 0.0
        for mine, theirs in zip(taken["softprompt"], taken[name], strict=True):
            difference = np.abs(mine.array - theirs.array).max(axis=1)
            most = max(most, float(difference.max()))
            ordered = np.sort(mine.array, axis=1)
            clear = ordered[:, -1] - ordered[:, -2] > 2 * near
            same = mine.array.argmax(axis=1) == theirs.array.argmax(axis=1)
            assert most <= near, f"a probability differs from that of {name} by {most:.2e}"
            assert bool(same[clear].all()), f"{int((~same[clear]).sum())} classes differ from those of {name}"
        found[name] = float(f"{most:.2e}")
    return found


def generation(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    turns, size = (1 if args.quick else args.turns), args.generate_rows
    fields = [{"mr": row["mr"], "ref": row["ref"]} for row in read_fields(KINDS["answers"], 8 + turns * size)]
    split = parts(fields, 8, size)
    setting = replace(setting, more={"parts": split, "new_tokens": NEW_TOKENS})
    makers: dict[str, tuple[Maker, Setting]] = {name: (make, setting) for name, make in GENERATION.items()}
    taken, memory = take_steps(makers, turns)
    found = told(taken, [len(part) for part in split], memory, "generation")
    numbers = range(len(split), len(split) + min(ALONE, len(split[0])))
    single, _ = alone(*makers["peft"], list(numbers))
    mine = [text.strip() for text in taken["softprompt"][0].array]
    of_each = list(zip(mine, (each.array[0].strip() for each in single), strict=False))
    for ours, theirs in of_each if args.precision == "float32" else []:
        assert ours == theirs, f"our answer {ours!r} is not PEFT's to the row alone, {theirs!r}"
    found["same_as_peft_alone"] = f"{sum(ours == theirs for ours, theirs in of_each)} of {len(of_each)}"
    pairs = [
        (a.strip(), b.strip())
        for x, y in zip(taken["softprompt"], taken["peft"], strict=True)
        for a, b in zip(x.array, y.array, strict=True)
    ]
    found["same_as_peft_in_its_batch"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    return {**found, "new_tokens": NEW_TOKENS}


def print_table(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "side", "ex/s", "ms/row", "memory MB", "ours is so many times as fast", "target")
    for what in (name for name in TARGETS if name in document):
        found = document[what]
        for name in (key for key, side in found.items() if isinstance(side, dict) and "ms_per_row" in side):
            side, times = found[name], found["times"].get(name)
            figures = [str(side[key]) for key in ("examples_per_s", "ms_per_row", "memory_over_model_mb")]
            table.add_row(what, name, *figures, str(times["median"]) if times else "", str(TARGETS[what]))
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    args = parse(arguments)
    document = facts("inference_speed", args.model, args.device, args.threads)
    folder = str(weights.locate(args.model, report=say).folder)
    setting = Setting(folder, args.precision, args.device, TOKENS, args.threads, ())
    document |= {"precision": args.precision, "tokens": TOKENS}
    for name, measure in (("evaluation", evaluation), ("generation", generation)):
        if args.only in (None, name):
            say(f"{name} ...")
            document[name] = measure(args, setting)
    print_table(document)
    finish(document, args.out)
    return 0


if __name__ == "__main__":
    as_program(main)
