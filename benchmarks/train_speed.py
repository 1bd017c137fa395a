"""How fast is tuning, next to PEFT's prompt tuning, prefix tuning and LoRA?

    python benchmarks/train_speed.py --out speed.json          # all cases that this machine is fit for
    python benchmarks/train_speed.py --quick                   # a part: short texts, one timed step
    python benchmarks/train_speed.py --quick --only short-P20  # names hold what is given

A case is a kind of data (short: movie reviews of 31 tokens; long: IMDb, cut to 256 tokens; answers: E2E, whole
sentences as answers), 20 or 100 soft tokens and a precision, in batches of 16 in random order. All sides get the same
model, rows, batches and first vectors, and compute the loss summed over the label tokens of a batch and its gradient.
softprompt and peft-prompt do the same mathematics, and so do softprompt-deep and peft-prefix: that loss and gradient
are equal is asserted at every step. peft-lora (rank 8 on all linear layers) has no soft tokens.

Each side lives in a process of its own; they take turns step by step, the first turn changing hands, so that whatever
else the machine does meets all alike. Long texts are the exception: there the sides come one after the other, since
all together do not fit into 24 GiB. A first step, of a batch of its own, is not timed: memory that a process touches
for the first time may cost more than the step (a virtual machine may fetch it page by page), and a run has hundreds of
steps. On a busy machine the clock says little; the ratio of processor time, with one thread, says more.

PEFT's sides go their ordinary path: a right-padded batch with labels through `model(**batch).loss`, and `backward`;
so logits of all positions, as that path makes them. Where there is a choice they get the better one: batches are padded
before the clock runs, and no KV cache is kept that is not needed. `--same-allocator` also gives them our setting of the
C library's allocator (machine.keep_freed_memory), which is no part of PEFT.

Tokens are the rows' own, soft ones included, padding not. Utilisation is 4 x body parameters x tokens that must be
computed (cases.needed_tokens) / (seconds x what a matrix product of 512 x 576 x 1536 reaches in that precision before
the case, at best). Memory is each process's own: the highest resident memory during the steps over what was resident
after the model had been loaded, each weight touched, and what was freed meanwhile given back. On CUDA: of allocated
memory.

Cases in bfloat16 are left out, with the reason in the JSON, where matrix products in it are not faster than in float32
(a CPU without instructions for it takes 20 to 40 times as long), unless --only asks for bfloat16. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from speed.cases import BATCH, Case, chosen, encode, in_batches, needed_tokens, own_tokens, read_fields
from speed.compare import TOLERANCE, check_same, figures, ratio, take_steps
from speed.facts import as_program, body_parameters, facts, finish, matrix_peak
from speed.sides import SAME, SIDES, Setting, right_padded

from softprompt import machine, weights

__all__ = ["main", "right_padded"]
QUICK = 1  # timed step
QUICK_KIND = "short"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose names hold one of these")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--batch", type=int, default=BATCH, help="examples a step")
    parser.add_argument("--steps", type=int, help="timed steps of each side; default: by the kind of data")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK} timed step, and short texts unless --only says otherwise",
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for a case, about")
    parser.add_argument("--threads", type=int, default=machine.threads().cores)
    parser.add_argument("--device", default=machine.default_device().type)
    parser.add_argument("--same-allocator", action="store_true", help="give PEFT our allocator setting too")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object there too")
    return parser.parse_args(arguments)


def why_not(case: Case, peaks: dict[str, float], only: Sequence[str]) -> str:
    """Why a case makes no sense on this machine; empty if it does, or if `only` asks for its precision."""
    if any(case.precision in part for part in only):
        return ""
    if case.precision == "bfloat16" and peaks["bfloat16"] <= peaks["float32"]:
        return (
            f"bfloat16 is slower here ({peaks['bfloat16'] / 1e9:.3g} GFLOP/s) than float32 "
            f"({peaks['float32'] / 1e9:.3g} GFLOP/s), so nobody would use it"
        )
    return ""


def batches_of(case: Case, folder: str, steps: int, size: int) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = read_fields(case.data, (1 + steps) * size)
    return in_batches(encode(tokenizer, case.data.template, fields, case.tokens, case.data.room), size)


def measure(
    case: Case, setting: Setting, sides: Sequence[str], steps: int, body: int, peak: float, limit: float
) -> dict[str, Any]:
    """All sides over the batches of `setting`. Raises AssertionError where they do not agree."""
    makers = {name: (SIDES[name][0], setting) for name in sides}
    taken, told = take_steps(makers, steps, together=case.data.together, limit=limit)
    result: dict[str, Any] = {"name": case.name, "batch": len(setting.batches[-1]), "peak_gflops": round(peak / 1e9, 1)}
    result["steps"] = max(0, max(map(len, taken.values())) - 1)
    for name in sides:
        if not taken[name][1:]:
            result[name] = {"failed": told[name].get("failed", "no step was timed")}
            continue
        timed, kind = setting.batches[1 : len(taken[name])], SIDES[name][1]
        counted = (
            [len(b) for b in timed],
            [own_tokens(b, kind) for b in timed],
            [needed_tokens(b, kind) for b in timed],
        )
        result[name] = figures(taken[name], *counted, body, peak, told[name]["memory"])
    result["differences"] = check_same(taken, SAME, TOLERANCE[setting.precision])
    result["times_peft_prompt"] = {name: ratio(taken, name, "peft-prompt") for name in sides if name != "peft-prompt"}
    return result


def print_table(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "side", "ex/s", "tokens/s", "utilisation", "memory MB", "CPU ms/ex", "times PEFT (quartiles)")
    keys = ("examples_per_s", "tokens_per_s", "utilisation", "memory_over_model_mb", "processor_ms_per_example")
    for result in results:
        for name in (name for name in SIDES if name in result):
            side, found = result[name], result["times_peft_prompt"].get(name)
            said = (
                f"{found['median']:.2f} ({found['quartiles'][0]:.2f} to {found['quartiles'][1]:.2f})" if found else ""
            )
            table.add_row(result["name"], name, *(str(side.get(key, "failed")) for key in keys), said)
    Console(width=130).print(table)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    args = parse(arguments)
    document = facts("train_speed", args.model, args.device, args.threads)  # with the load that it begins with
    folder = str(weights.locate(args.model, report=say).folder)
    body = body_parameters(folder)
    document |= {"body_parameters": body, "same_allocator": args.same_allocator, "cases": [], "skipped": []}
    peaks: dict[str, float] = {}  # the best seen in this run: a moment in which others work would flatter a case
    for case in chosen(args.only or [QUICK_KIND] * args.quick):
        for name in {"float32", case.precision}:
            peaks[name] = max(peaks.get(name, 0.0), matrix_peak(name, args.device, args.threads))
        if reason := why_not(case, peaks, args.only):
            say(f"{case.name} is skipped: {reason}")
            document["skipped"].append({"name": case.name, "reason": reason})
            continue
        steps = args.steps or (QUICK if args.quick else case.data.steps)
        setting = Setting(folder, case.precision, args.device, case.tokens, args.threads, (), args.same_allocator)
        setting = replace(setting, batches=batches_of(case, folder, steps, args.batch))
        say(f"{case.name}: {steps} steps of {args.batch} rows on each side ...")
        document["cases"].append(measure(case, setting, args.sides, steps, body, peaks[case.precision], args.limit))
        print_table(document["cases"][-1:])
    finish(document, args.out)
    return 0


if __name__ == "__main__":
    as_program(main)
