"""How fast is serving many tasks from one model, next to PEFT with `set_adapter`?

    python benchmarks/serve_speed.py                      # throughput, PEFT, and the server under load
    python benchmarks/serve_speed.py --quick

Three parts, each with its table; the last line is JSON.

1. Throughput of the engine, saturated: the same texts, each of them another number of tasks and another mix of them, as
   Punica has them (Chen et al. 2024): identical (all requests of one task), distinct (no two of the same task, as far
   as there are tasks), uniform and skewed (Zipf). Every setting is run `--rounds` times in turn, so that what else the
   machine does meets all alike, and the median is taken. The prompts' states are kept from a first pass (`--cold` adds
   a run without them).
2. The same requests through PEFT's prompt tuning, `--peft-tasks` adapters in one model: in the order in which they come
   (set_adapter, generate), and as the best that PEFT allows, all requests of a task in one padded batch. Both sides in
   one run, in turns, on the same model, texts and vectors; that the tokens are the same is checked.
3. A server on a free port under open-loop load from a client of ours: requests come at random times (Poisson) whatever
   the server does, at half and at most of what it can do, and at ten times that. Time to first token and between tokens
   at p50, p95, p99, of the requests that were accepted, and how many were.

Vectors are random numbers of the size of embeddings, and answers end after `--max-tokens` tokens: what the model says
has no influence on how long it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt import weights
from softprompt.backbone import Backbone
from softprompt.demo_data import movie_reviews
from softprompt.engine.engine import Engine, EngineLimits
from softprompt.engine.requests import Request, Settings
from softprompt.engine.tasks import Task
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

INPUT, TARGET, LABELS = "{soft}Review: {text}\nSentiment:", " {label}", ["negative", "positive"]
MIXES = ("identical", "uniform", "skewed", "distinct")
ZIPF = 1.1


# --- what is asked for ----------------------------------------------------------------------------------------------


def make_prompts(backbone: Backbone, tasks: int, tokens: int) -> list[SoftPrompt]:
    generator = torch.Generator().manual_seed(0)
    template = Template.make(INPUT, TARGET, labels=LABELS)
    return [
        SoftPrompt(
            torch.randn(tokens, backbone.width, generator=generator) * backbone.embedding_rms,
            template,
            backbone.name,
            backbone.fingerprint,
        )
        for _ in range(tasks)
    ]


def assign(mix: str, requests: int, tasks: int) -> list[int]:
    """The task of each request."""
    draw = random.Random(1)
    if mix == "identical":
        return [0] * requests
    if mix == "distinct":
        return [i % tasks for i in range(requests)]
    if mix == "uniform":
        return [draw.randrange(tasks) for _ in range(requests)]
    return draw.choices(range(tasks), [1 / (rank + 1) ** ZIPF for rank in range(tasks)], k=requests)


def make_requests(tasks: Sequence[Task], chosen: Sequence[int], texts: Sequence[str], settings: Settings, kind: str):
    made = [tasks[task].from_text(text, settings) for task, text in zip(chosen, texts, strict=True)]
    return [tasks[t].scored(request) for t, request in zip(chosen, made, strict=True)] if kind == "classify" else made


# --- 1: the engine --------------------------------------------------------------------------------------------------


def run_engine(engine: Engine, requests: Sequence[Request]) -> tuple[float, dict[int, list[int]], list[int]]:
    """Seconds until all have ended, their tokens by id, and the ids in the order of `requests`."""
    begun = time.perf_counter()
    ids = engine.submit(requests)
    found: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            found[event.id] += [token.id for token in event.tokens]
    return time.perf_counter() - begun, found, ids


def throughput(backbone: Backbone, args: argparse.Namespace, texts: Sequence[str], kind: str) -> list[dict[str, Any]]:
    prompts = make_prompts(backbone, max(args.tasks), args.tokens)
    tasks = [Task(backbone, prompt, f"task{i}") for i, prompt in enumerate(prompts)]
    settings = Settings(max_new_tokens=args.max_tokens, ignore_end=True)
    cells = [("identical", 1)] + [(mix, count) for count in args.tasks if count > 1 for mix in MIXES[1:]]
    engine = Engine(backbone, limits(args, len(texts)))
    sets = {cell: make_requests(tasks, assign(cell[0], len(texts), cell[1]), texts, settings, kind) for cell in cells}
    cold = {}
    for cell in cells:  # warms up, and computes every prompt
        fresh = Engine(backbone, limits(args, len(texts))) if args.cold else engine
        cold[cell] = run_engine(fresh, sets[cell])[0]
        if args.cold:
            run_engine(engine, sets[cell])
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for turn in range(args.rounds):
        for cell in cells if turn % 2 == 0 else cells[::-1]:
            seconds[cell].append(run_engine(engine, sets[cell])[0])
    found = []
    for cell in cells:
        median = statistics.median(seconds[cell])
        row = {"kind": kind, "mix": cell[0], "tasks": cell[1], "requests_per_second": len(texts) / median}
        found.append(row | ({"cold_requests_per_second": len(texts) / cold[cell]} if args.cold else {}))
    for row in found:
        row["of_one_task"] = row["requests_per_second"] / found[0]["requests_per_second"]
    return found


def limits(args: argparse.Namespace, waiting: int) -> EngineLimits:
    return EngineLimits(args.rows, max(256, waiting), args.step_tokens, prompt_bytes=4 << 30)


# --- 2: PEFT --------------------------------------------------------------------------------------------------------


def peft_sides(backbone: Backbone, folder: str, prompts: Sequence[SoftPrompt], kind: str) -> Callable[..., Any]:
    """A function (task, rows of ids) -> the answers, by PEFT with as many adapters as there are prompts."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=backbone.dtype, attn_implementation="sdpa")
    tokens = prompts[0].tokens
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    model = get_peft_model(base, config, adapter_name="task0").eval()
    for i in range(1, len(prompts)):
        model.add_adapter(f"task{i}", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            model.prompt_encoder[f"task{i}"].embedding.weight.copy_(prompt.vectors)
    labels = [backbone.tokenizer(" " + label, add_special_tokens=False)["input_ids"][0] for label in LABELS]
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def answer(task: int, rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        model.set_adapter(f"task{task}")
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])  # generate wants padding on the left
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        if kind == "classify":
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            return [[int(each)] for each in logits[:, labels].argmax(dim=1)]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        return out[:, width:].tolist()

    return answer


def against_peft(
    backbone: Backbone, folder: str, args: argparse.Namespace, texts: Sequence[str], kind: str
) -> dict[str, Any]:
    prompts = make_prompts(backbone, args.peft_tasks, args.tokens)
    tasks = [Task(backbone, prompt, f"task{i}") for i, prompt in enumerate(prompts)]
    chosen = assign("uniform", len(texts), args.peft_tasks)
    settings = Settings(max_new_tokens=args.max_tokens, ignore_end=True)
    requests = make_requests(tasks, chosen, texts, settings, kind)
    rows = [request.ids[args.tokens :] for request in requests]
    answer = peft_sides(backbone, folder, prompts, kind)
    engine = Engine(backbone, limits(args, len(texts)))
    few = min(len(texts), args.peft_requests)

    def one_by_one() -> list[list[int]]:
        return [answer(chosen[i], [rows[i]], args.max_tokens)[0] for i in range(few)]

    def by_task() -> None:
        groups: dict[int, list[int]] = {}
        for i, task in enumerate(chosen):
            groups.setdefault(task, []).append(i)
        for task, members in groups.items():
            answer(task, [rows[i] for i in members], args.max_tokens)

    _, tokens, ids = run_engine(engine, requests)
    theirs = one_by_one()
    agree = sum(tokens[ids[i]] == theirs[i] for i in range(few)) / few if kind == "generate" else None
    times: dict[str, list[float]] = {"ours": [], "peft": [], "peft_by_task": []}
    for _ in range(args.rounds):
        times["ours"].append(run_engine(engine, requests)[0] / len(texts))
        times["peft"].append(timed(one_by_one) / few)
        times["peft_by_task"].append(timed(by_task) / len(texts))
    rates = {name: 1 / statistics.median(values) for name, values in times.items()}
    return {
        "kind": kind,
        "tasks": args.peft_tasks,
        **{f"{name}_requests_per_second": rate for name, rate in rates.items()},
        "times_peft": rates["ours"] / rates["peft"],
        "times_peft_by_task": rates["ours"] / rates["peft_by_task"],
        "same_tokens": agree,
    }


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# --- 3: the server --------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One request as the client saw it. tokens: when each came, in seconds since it was sent."""

    status: int
    tokens: list[float]
    whole: float


async def open_loop(
    url: str, rate: float, calls: Sequence[tuple[str, str]], max_tokens: int
) -> tuple[float, list[Call]]:
    """Send the calls (model, text) at random times, `rate` a second in the mean, whatever becomes of them."""
    import httpx

    draw = random.Random(2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def one(model: str, text: str) -> Call:
            body = {"model": model, "prompt": text, "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
                    "temperature": 0}  # fmt: skip
            begun = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=body) as got:
                lines = (line async for line in got.aiter_lines() if line.startswith("data: {"))
                tokens = [time.perf_counter() - begun async for _ in lines]
            return Call(
                got.status_code, tokens[:-1], time.perf_counter() - begun
            )  # the last one only says why it ended

        begun, sent = time.perf_counter(), []
        for model, text in calls:
            sent.append(asyncio.ensure_future(one(model, text)))
            await asyncio.sleep(draw.expovariate(rate))
        found = list(await asyncio.gather(*sent))
        return time.perf_counter() - begun, found


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(values)
    return {
        f"p{p}": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else None
        for p in (50, 95, 99)
    }


def under_load(backbone: Backbone, args: argparse.Namespace, texts: Sequence[str], capacity: float) -> list[dict]:
    """Open-loop load at several rates; capacity: requests a second that the engine alone can do."""
    from softprompt.server.run import Server, make_service
    from softprompt.server.settings import ServerSettings

    count = args.server_tasks
    template = Template.make(INPUT, " {answer}")  # texts are written, not labels chosen
    with tempfile.TemporaryDirectory() as folder:
        for i, prompt in enumerate(make_prompts(backbone, count, args.tokens)):
            SoftPrompt(prompt.vectors, template, backbone.name, backbone.fingerprint).save(Path(folder) / f"task{i}")
        engine = EngineLimits(args.rows, args.rows, args.step_tokens, prompt_bytes=4 << 30)
        server = Server(make_service(backbone, folder, ServerSettings(port=0, watch=0), engine))
        with server.bound() as (url, sockets):
            thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
            thread.start()
            found = []
            for share in (0.5, 0.5, 0.9, 10.0):
                chosen = assign("skewed", len(texts), count)
                calls = [(f"task{task}", text) for task, text in zip(chosen, texts, strict=True)]
                seconds, answers = asyncio.run(open_loop(url, share * capacity, calls, args.max_tokens))
                good = [call for call in answers if call.status == 200]
                gaps = [b - a for call in good for a, b in zip(call.tokens, call.tokens[1:])]
                found.append(
                    {
                        "offered_per_second": share * capacity,
                        "share_of_capacity": share,
                        "served_per_second": len(good) / seconds,
                        "accepted": len(good) / len(answers),
                        "refused_with_429": sum(call.status == 429 for call in answers) / len(answers),
                        "first_token_ms": percentiles([call.tokens[0] for call in good if call.tokens]),
                        "between_tokens_ms": percentiles(gaps),
                    }
                )
            server.should_exit = True
            thread.join()
    return found[1:]  # the first one warms up


# --- output ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    flat = [flatten(row) for row in rows]
    shown = Table(title=title)
    for name in flat[0]:
        shown.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for row in flat:
        shown.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(shown)


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name} {k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def facts(args: argparse.Namespace) -> dict[str, Any]:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": "serve_speed",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: value for name, value in vars(args).items() if name != "data"},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=20, help="soft tokens of each task")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100, 500])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=["generate", "classify"])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--peft-tasks", type=int, default=100)
    parser.add_argument("--peft-requests", type=int, default=40, help="that PEFT answers one by one in each round")
    parser.add_argument("--server-tasks", type=int, default=100)
    parser.add_argument("--parts", nargs="+", default=["throughput", "peft", "server"])
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    args = parser.parse_args(arguments)
    if args.quick:
        args.requests, args.rounds, args.tasks = min(args.requests, 24), 1, [1, 24]
        args.peft_tasks, args.peft_requests, args.server_tasks = 12, 6, 8
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = facts(args)
    folder = str(weights.locate(args.model, report=print).folder)
    backbone = Backbone.load(args.model, precision=args.precision, device="cpu", report=print)
    texts = [row["text"] for row in movie_reviews(train=args.requests).train]
    results: dict[str, Any] = {}
    for kind in args.kinds:
        if "throughput" in args.parts:
            results[f"throughput_{kind}"] = throughput(backbone, args, texts, kind)
            table(results[f"throughput_{kind}"], f"engine, {kind}, {len(texts)} requests")
        if "peft" in args.parts:
            results[f"peft_{kind}"] = against_peft(backbone, folder, args, texts, kind)
            table([results[f"peft_{kind}"]], f"PEFT, {kind}")
    if "server" in args.parts:
        known = results.get("throughput_generate")
        capacity = known[-1]["requests_per_second"] if known else 4.0
        results["server"] = under_load(backbone, args, texts, capacity)
        table(results["server"], f"server, {args.server_tasks} tasks, skewed")
    print(json.dumps({**about, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
