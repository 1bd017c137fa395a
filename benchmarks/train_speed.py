"""How fast is tuning, next to PEFT's prompt tuning?

    python benchmarks/train_speed.py                      # P=20 and P=100, float32 and bfloat16
    python benchmarks/train_speed.py --quick --precision float32 --tokens 20

Both sides get the same model, rows, batches (16 in random order), precision and vectors, and compute the same thing:
the loss summed over the label tokens of a batch and its gradient for the soft prompt. That they do is asserted on a
first batch before anything is timed, and again at every timed step. Each side lives in a process of its own; they take
turns step by step, the first turn changing hands, so that whatever else the machine does meets both alike, and a ratio
is taken of the two times of one batch. On a busy machine the clock says little (two threads that wait for each other
wait for other programs too): `--threads 1` and the ratio of processor time say more.

PEFT's side is its ordinary path: a right-padded batch with labels through `model(**batch).loss`, and `backward`. Where
there is a choice it gets the better one: batches are padded before the clock runs, and the model keeps no KV cache.
`--same-allocator` also gives it our setting of the C library's allocator (machine.keep_freed_memory), which is no part
of PEFT. Tokens are the rows' own, soft ones included, padding not; both sides are credited with the same number.

Peak memory is each process's own: the highest resident memory during the steps (VmHWM, reset before them) over what was
resident after the model had been loaded, each of its weights touched, and what was freed meanwhile given back to the
system (malloc_trim; our allocator setting would otherwise hide it). On CUDA: the same of allocated memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from numpy.linalg import norm

from softprompt import machine, weights
from softprompt.attention import StateCache
from softprompt.backbone import PRECISIONS, Backbone
from softprompt.computation import loss_and_gradient
from softprompt.demo_data import movie_reviews
from softprompt.encoding import Encoder
from softprompt.placement import Row, shared_length
from softprompt.templates import Template
from softprompt.training.config import TuneConfig

TEMPLATE = dict(input="{soft}Review: {text}\nSentiment:", target=" {label}")
QUICK = 2  # timed steps
# Largest difference of loss and gradient, relative to PEFT's. bfloat16 keeps 8 bits, and the two sides round and add
# in different orders through all layers: 0.01 and 0.06 were seen with SmolLM2-135M, 1e-6 and 3e-6 in float32.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.15), "float64": (1e-9, 1e-8)}
PAUSE = 0.02  # seconds between turns, in which the threads of the side that just worked go to sleep


@dataclass(frozen=True)
class Setting:
    """What one comparison is about; everything a side needs to set itself up."""

    folder: str
    precision: str
    device: str
    tokens: int
    threads: int
    same_allocator: bool
    batches: tuple[tuple[Row, ...], ...]


Step = Callable[[int], tuple[float, torch.Tensor]]  # batch number -> summed loss, gradient [P, H]


# --- the two sides --------------------------------------------------------------------------------------------------


def first_vectors(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Embeddings of some ordinary tokens, the same on both sides: [V, H] -> [P, H]."""
    return table[1000 : 1000 + tokens].clone()


def ours(setting: Setting) -> tuple[Any, Step]:
    backbone = Backbone.load(setting.folder, precision=setting.precision, device=setting.device, report=print)
    vectors = first_vectors(backbone.embedding_table(), setting.tokens)
    budget = int(TuneConfig.model_fields["micro_batch_tokens"].default)
    start, cache = shared_length([row for batch in setting.batches for row in batch]), StateCache()  # as in tune
    assert backbone.fast, backbone.why_plain

    def step(number: int) -> tuple[float, torch.Tensor]:
        found = loss_and_gradient(
            backbone, setting.batches[number], vectors, micro_batch_tokens=budget, start=start, cache=cache
        )
        return found.loss, found.gradient

    return backbone.model, step


def peft(setting: Setting) -> tuple[Any, Step]:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if setting.same_allocator:
        machine.keep_freed_memory()
    base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=PRECISIONS[setting.precision])
    base.config.use_cache = False
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setting.tokens))
    model.to(setting.device).train()
    weight = model.prompt_encoder["default"].embedding.weight  # float32 in every precision, as ours
    with torch.no_grad():
        weight.copy_(first_vectors(base.get_input_embeddings().weight.float().cpu(), setting.tokens))
    batches = [right_padded(batch, setting.tokens, setting.device) for batch in setting.batches]

    def step(number: int) -> tuple[float, torch.Tensor]:
        weight.grad = None
        loss = model(**batches[number]).loss * (batches[number]["labels"] != -100).sum()
        loss.backward()
        return float(loss.detach()), weight.grad

    return base, step


def right_padded(rows: Sequence[Row], tokens: int, device: str) -> dict[str, torch.Tensor]:
    """What PEFT is given for rows with the soft prompt at the front: ids, mask and labels [B, T] without the prompt."""
    width = max(len(row.ids) for row in rows) - tokens
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for number, row in enumerate(rows):
        own = torch.tensor(row.ids[tokens:])
        assert bool((own >= 0).all()), "PEFT places soft tokens at the front only"
        ids[number, : len(own)], mask[number, : len(own)] = own, 1
        labels[number, row.answer - tokens : len(own)] = own[row.answer - tokens :]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


SIDES = {"ours": ours, "peft": peft}


# --- a side in its own process --------------------------------------------------------------------------------------


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Load one side, then do what the parent asks for: ("step", batch number), ("memory",), or ("end",)."""
    torch.set_num_threads(setting.threads)
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        model, step = SIDES[name](setting)
        touch(model)
        base = resident(setting.device, fresh=True)
        pipe.send("ready")
        while True:
            asked, *number = pipe.recv()
            if asked == "end":
                return
            if asked == "memory":
                pipe.send(None if base is None else resident(setting.device)[1] - base[0])  # type: ignore[index]
                continue
            begun, used = time.perf_counter(), time.process_time()
            loss, gradient = step(*number)
            if setting.device == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - begun, time.process_time() - used)
            pipe.send((seconds, loss, gradient.double().cpu().numpy()))
    except Exception as error:
        pipe.send(error)
        raise


def touch(model: torch.nn.Module) -> None:
    """Read every weight, since those mapped from a file become resident only then; give back what has been freed."""
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].sum()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only with glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident(device: str, fresh: bool = False) -> tuple[int, int] | None:
    """Bytes in use now, and the most since `fresh` was asked for; None where the system does not say."""
    if device == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return None


class Side:
    """The parent's end of one side."""

    def __init__(self, name: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, setting, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        time.sleep(PAUSE)
        return answer

    def end(self) -> None:
        self.pipe.send(("end",))
        self.process.join()


# --- the comparison -------------------------------------------------------------------------------------------------


def compare(setting: Setting, steps: int) -> dict[str, Any]:
    """Both sides over the same batches, taking turns. Raises AssertionError where they do not agree."""
    sides = {name: Side(name, setting) for name in SIDES}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}  # of the clock, of processors
    differences = []
    for number in range(steps + 1):
        found = {name: sides[name].ask("step", number) for name in sorted(sides, reverse=number % 2 == 0)}
        differences.append(agree(found["ours"][1:], found["peft"][1:], setting.precision, number))
        if number:  # the first batch only warms up
            for name in sides:
                seconds[name].append(found[name][0])
    memory = {name: side.ask("memory") for name, side in sides.items()}
    for side in sides.values():
        side.end()
    timed = setting.batches[1 : steps + 1]
    pairs = list(zip(seconds["ours"], seconds["peft"], strict=True))
    ratios = [theirs[0] / mine[0] for mine, theirs in pairs]
    quarters = statistics.quantiles(ratios, n=4) if steps > 1 else ratios * 3
    return {
        "precision": setting.precision,
        "tokens": setting.tokens,
        "batch": len(timed[0]),
        "steps": steps,
        **{name: figures(seconds[name], timed, memory[name]) for name in sides},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
        "processor_ratio": round(statistics.median(theirs[1] / mine[1] for mine, theirs in pairs), 3),
        "memory_ratio": round(memory["ours"] / memory["peft"], 3) if memory["ours"] and memory["peft"] else None,
        "loss_difference": float(f"{max(loss for loss, _ in differences):.2e}"),
        "gradient_difference": float(f"{max(gradient for _, gradient in differences):.2e}"),
    }


def agree(ours: Sequence[Any], peft: Sequence[Any], precision: str, number: int) -> tuple[float, float]:
    """Relative differences of loss and gradient of one batch; AssertionError if more than the precision explains."""
    loss, gradient = (abs(ours[0] - peft[0]) / abs(peft[0]), float(norm(ours[1] - peft[1]) / norm(peft[1])))
    most_loss, most_gradient = TOLERANCE[precision]
    assert loss <= most_loss, f"batch {number}: loss {ours[0]} here, {peft[0]} in PEFT"
    assert gradient <= most_gradient, f"batch {number}: the gradients differ by {gradient:.2e} of their norm"
    return loss, gradient


def figures(seconds: list[tuple[float, float]], batches: Sequence[Sequence[Row]], memory: int | None) -> dict[str, Any]:
    """Medians over the steps. A step's tokens are the rows' own with the soft ones, without padding."""
    tokens = [sum(len(row.ids) for row in batch) for batch in batches]
    clock, processors = zip(*seconds, strict=True)
    return {
        "examples_per_second": round(statistics.median(len(b) / s for b, s in zip(batches, clock, strict=True)), 3),
        "tokens_per_second": round(statistics.median(t / s for t, s in zip(tokens, clock, strict=True)), 1),
        "ms_per_example": round(1000 * sum(clock) / sum(map(len, batches)), 1),
        "processor_ms_per_example": round(1000 * sum(processors) / sum(map(len, batches)), 1),
        "peak_memory_mb": None if memory is None else round(memory / 1e6),
    }


# --- rows, facts, printing ------------------------------------------------------------------------------------------


def read_rows(data: str | None, count: int) -> list[dict[str, str]]:
    """`count` rows with text and label: the movie reviews, or the lines of a jsonl file over and over."""
    if data is None:
        return movie_reviews(train=max(count, 16)).train[:count]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [{key: str(rows[order[i % len(rows)]][key]) for key in ("text", "label")} for i in range(count)]


def encode(folder: str, rows: Sequence[dict[str, str]], tokens: int, size: int) -> tuple[tuple[Row, ...], ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template.make(**TEMPLATE, labels=sorted({row["label"] for row in rows}))
    encoder = Encoder(template, tokenizer, tokens, 1024)
    encoded = [encoder.row(row)[0] for row in rows]
    return tuple(tuple(encoded[i : i + size]) for i in range(0, len(encoded), size))


def facts(args: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    here = Path(__file__).parent
    described = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": "train_speed",
        "commit": commit or None,
        "model": args.model,
        "data": args.data or "movie reviews",
        "device": args.device,
        "threads": args.threads,
        "same_allocator": args.same_allocator,
        "cpu": cpu_name(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "precision", "P", "side", *("ex/s", "tokens/s", "ms/ex", "CPU ms/ex", "peak MB"), "times PEFT (quartiles)"
    )
    for result in results:
        for name in SIDES:
            side = result[name]
            low, high = result["ratio_quartiles"]
            found = f"{result['ratio']:.2f} ({low:.2f} to {high:.2f})"
            ratio = found if name == "ours" else f"CPU time: {result['processor_ratio']:.2f}"
            numbers = [str(side[key]) for key in side]
            table.add_row(result["precision"], str(result["tokens"]), name, *numbers, ratio)
    Console(width=110).print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--data", help="jsonl with text and label; default: the movie reviews")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=sorted(TOLERANCE))
    parser.add_argument("--tokens", nargs="+", type=int, default=[20, 100], help="soft tokens P")
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side and setting")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} timed steps")
    parser.add_argument("--threads", type=int, default=machine.threads().cores)
    parser.add_argument("--device", default=machine.default_device().type)
    parser.add_argument("--same-allocator", action="store_true", help="give PEFT our allocator setting too")
    args = parser.parse_args(arguments)
    args.steps = QUICK if args.quick else args.steps
    return args


def feasible(precision: str, args: argparse.Namespace) -> tuple[int, int]:
    """Timed steps and batch; next to none, with a warning, where bfloat16 takes half a minute an example."""
    if precision == "bfloat16" and args.device == "cpu":
        choice = machine.probe_precision("cpu")
        if choice.dtype != torch.bfloat16:
            print(f"warning: {choice.reason}, so nobody would use it here; one step of 2 rows is timed, in minutes")
            return 1, min(2, args.batch)
    return args.steps, args.batch


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    about = facts(args)  # before the work: the commit and the load that it begins with
    folder = str(weights.locate(args.model, report=print).folder)
    rows = read_rows(args.data, (args.steps + 1) * args.batch)
    results = []
    for precision in args.precision:
        steps, size = feasible(precision, args)
        for tokens in args.tokens:
            batches = encode(folder, rows, tokens, size)[: steps + 1]
            setting = Setting(folder, precision, args.device, tokens, args.threads, args.same_allocator, batches)
            print(f"{precision}, {tokens} soft tokens, {steps} steps of {size} rows on each side ...", flush=True)
            results.append(compare(setting, steps))
    print_table(results)
    print(json.dumps({**about, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
