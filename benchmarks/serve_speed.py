"""How fast is serving many tasks from one model, next to PEFT with `set_adapter`?

    python benchmarks/serve_speed.py                      # about half an hour on two cores
    python benchmarks/serve_speed.py --quick              # about three minutes
    python benchmarks/serve_speed.py --page RESULT.json   # measures nothing: fills docs/serving.md from an earlier run

Three parts, each with its table; the last line is JSON.

1. Throughput of the engine, saturated: the same texts, for other numbers of tasks and other mixes of them, as Punica
   has them (Chen et al. 2024): identical (all requests for one task), distinct (no two for the same task, as far as
   there are tasks), uniform and skewed (Zipf). All mixes are under way at once, each in an engine of its own, and take
   turns step by step, so that what else the machine does meets all alike; the figure is the median of `--rounds`
   rounds with its interval, and beside it stands processor time. The prompts' states are there from a first pass.
2. The same requests through PEFT's prompt tuning with `--peft-tasks` adapters in one model, in the order in which they
   come (set_adapter, generate), and as the best that PEFT allows: all requests of a task in one padded batch. Both
   sides in one run, in turns, on the same model, texts and vectors; that the tokens are the same is checked.
3. A server on a free port under open-loop load from a client of ours in a process of its own, at half and nine tenths
   of what the engine can do, and at ten times that: time to first token and between tokens at p50, p95 and p99 of the
   requests that were accepted, and how many were.

Vectors are random numbers of the size of embeddings, and answers end after `--max-tokens` tokens: what the model says
has no influence on how long it takes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed.facts import as_program, facts, finish, keep
from speed.serve_load import under_load
from speed.serve_tables import lines
from speed.tables import put, read_json

from softprompt import weights
from softprompt.backbone import Backbone
from softprompt.engine.engine import Engine, EngineLimits
from softprompt.engine.requests import Request, Settings
from softprompt.engine.tasks import Task
from softprompt.evaluation.intervals import sign_test
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
INPUT, TARGET, LABELS = "{soft}Review: {text}\nSentiment:", " {label}", ["negative", "positive"]
MIXES = ("uniform", "skewed", "distinct")
ZIPF = 1.1
PROMPT_BYTES = 4 << 30


# --- what is asked for ----------------------------------------------------------------------------------------------


def make_prompts(backbone: Backbone, count: int, tokens: int, target: str = TARGET) -> list[SoftPrompt]:
    generator = torch.Generator().manual_seed(0)
    template = Template.make(INPUT, target, labels=LABELS if target == TARGET else None)
    size = (count, tokens, backbone.width)
    vectors = torch.randn(size, generator=generator) * backbone.embedding_rms
    return [SoftPrompt(each, template, backbone.name, backbone.fingerprint) for each in vectors]


def make_tasks(backbone: Backbone, prompts: Sequence[SoftPrompt]) -> list[Task]:
    return [Task(backbone, prompt, f"task{i}") for i, prompt in enumerate(prompts)]


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


def make_requests(
    tasks: Sequence[Task], chosen: Sequence[int], texts: Sequence[str], max_tokens: int, kind: str
) -> list[Request]:
    settings = Settings(max_new_tokens=max_tokens, ignore_end=True)
    made = [tasks[task].from_text(text, settings) for task, text in zip(chosen, texts, strict=True)]
    return [tasks[t].scored(request) for t, request in zip(chosen, made, strict=True)] if kind == "classify" else made


def read_texts(count: int, words: int) -> list[str]:
    from softprompt.demo_data import movie_reviews

    return [" ".join(row["text"].split()[:words]) for row in movie_reviews(train=count).train]


# --- 1: the engine --------------------------------------------------------------------------------------------------


def run_engine(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of each request, when all have ended."""
    ids = engine.submit(requests)
    found: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            found[event.id] += [token.id for token in event.tokens]
    return [found[id] for id in ids]


def limits(args: argparse.Namespace, waiting: int) -> EngineLimits:
    return EngineLimits(args.rows, max(256, waiting), args.step_tokens, prompt_bytes=PROMPT_BYTES)


def throughput(
    engine: Engine, tasks: Sequence[Task], args: argparse.Namespace, texts: Sequence[str], kind: str
) -> list[dict[str, Any]]:
    cells = [("identical", 1), *((mix, count) for count in args.tasks if count > 1 for mix in MIXES)]
    engines = [twin(engine) for _ in cells]
    walls: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    used: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    asked: dict[tuple[str, int], set[int]] = {cell: set() for cell in cells}
    for turn in range(args.rounds):
        sets = []
        for mix, count in cells:
            # Each round asks for the next tasks, so that over the rounds all of them are asked for.
            chosen = [(task + turn * len(texts)) % count for task in assign(mix, len(texts), count)]
            asked[mix, count].update(chosen)
            sets.append(make_requests(tasks, chosen, texts, args.max_tokens, kind))
        for cell, (wall, processor) in zip(cells, step_by_step(engines, sets), strict=True):
            walls[cell].append(wall)
            used[cell].append(processor)
    return [
        {
            "mix": mix,
            "tasks": count,
            "tasks_asked_for": len(asked[mix, count]),
            "rounds": args.rounds,
            "requests_per_second": len(texts) / statistics.median(walls[mix, count]),
            **compared("of_one_task", walls, cells[0], (mix, count)),
            **compared("of_one_task_by_processor_time", used, cells[0], (mix, count)),
        }
        for mix, count in cells
    ]


def twin(engine: Engine) -> Engine:
    """An engine of its own over the same model and the same kept states of prompts."""
    other = Engine(engine.backbone, engine.limits)
    other.prefixes = engine.prefixes
    return other


def step_by_step(engines: Sequence[Engine], sets: Sequence[Sequence[Request]]) -> list[tuple[float, float]]:
    """(seconds by the clock, of processor time) of each engine for its requests, all of them under way together.

    The engines take turns step by step, each time another one first: whatever the machine does for longer than a
    fraction of a second meets all alike. As whole runs, one after the other, equal ones differed by up to 10 %.
    """
    seconds = [(0.0, 0.0)] * len(engines)
    for engine, requests in zip(engines, sets, strict=True):
        engine.submit(requests)
    turn = 0
    while any(engine.busy for engine in engines):
        turn += 1
        for place in range(len(engines)):
            index = (place + turn) % len(engines)
            if engines[index].busy:
                wall, processor = timed(engines[index].step)
                seconds[index] = (seconds[index][0] + wall, seconds[index][1] + processor)
    return seconds


def compared(
    name: str, seconds: dict[tuple[str, int], list[float]], one: tuple[str, int], other: tuple[str, int]
) -> dict[str, float]:
    """Speed as a share of that with one task: the median over the rounds, each compared within itself, and the 95 %
    interval of that median by the sign test (between two of the ordered values; no assumption about their spread). Of
    fewer than six rounds it is no more than their range."""
    shares = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
    outside = 0
    while sign_test(outside, len(shares)) <= 0.05:
        outside += 1
    outside = max(0, outside - 1)
    return {name: statistics.median(shares), f"{name}_low": shares[outside], f"{name}_high": shares[-1 - outside]}


def compute_prompts(engine: Engine, tasks: Sequence[Task]) -> None:
    """Warm up, and have each prompt's states computed and kept, as they are after a task's first request."""
    shortest = make_requests(tasks, range(len(tasks)), ["."] * len(tasks), 1, "classify")
    for begin in range(0, len(tasks), 256):
        run_engine(engine, shortest[begin : begin + 256])


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time in all threads."""
    begun, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - used


# --- 2: PEFT --------------------------------------------------------------------------------------------------------


def peft_side(
    backbone: Backbone, folder: str, prompts: Sequence[SoftPrompt], kind: str
) -> Callable[[int, Sequence[Sequence[int]], int], list[list[int]]]:
    """A function (task, rows of ids, tokens) -> the answers, by PEFT with as many adapters as there are prompts."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=backbone.dtype, attn_implementation="sdpa")

    def config() -> PromptTuningConfig:
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompts[0].tokens)

    model = get_peft_model(base, config(), adapter_name="task0").eval()
    for i in range(1, len(prompts)):
        model.add_adapter(f"task{i}", config())
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT's own doing
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        return [each[width:] if len(each) > max_tokens else each for each in out.tolist()]

    return answer


def against_peft(
    engine: Engine, tasks: Sequence[Task], folder: str, args: argparse.Namespace, texts: Sequence[str], kind: str
) -> dict[str, Any]:
    chosen = assign("uniform", len(texts), args.peft_tasks)
    requests = make_requests(tasks, chosen, texts, args.max_tokens, kind)
    rows = [[token for token in request.ids if token >= 0] for request in requests]
    prompts = [task.prompt for task in tasks[: args.peft_tasks] if task.prompt is not None]
    answer = peft_side(engine.backbone, folder, prompts, kind)
    few = min(len(texts), args.peft_requests)
    groups: dict[int, list[int]] = {}
    for i in range(few):
        groups.setdefault(chosen[i], []).append(i)

    def one_by_one() -> list[list[int]]:
        return [answer(chosen[i], [rows[i]], args.max_tokens)[0] for i in range(few)]

    def by_task() -> None:
        for task, members in groups.items():
            answer(task, [rows[i] for i in members], args.max_tokens)

    same = None
    if kind == "generate":
        same = sum(a == b for a, b in zip(run_engine(engine, requests), one_by_one())) / few
    sides = {
        "softprompt": (lambda: run_engine(engine, requests), len(texts)),
        "peft": (one_by_one, few),
        "peft_by_task": (by_task, few),
    }
    walls: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.peft_rounds):
        for name, (work, count) in sides.items():
            wall, processor = timed(work)
            walls[name].append(wall / count)
            used[name].append(processor / count)
    return {
        "tasks": args.peft_tasks,
        "requests_per_second": {name: 1 / statistics.median(each) for name, each in walls.items()},
        **{f"times_{name}": ratio(walls, name) for name in ("peft", "peft_by_task")},
        **{f"times_{name}_by_processor_time": ratio(used, name) for name in ("peft", "peft_by_task")},
        "same_tokens": same,
    }


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["softprompt"], strict=True))


# --- 3: the server --------------------------------------------------------------------------------------------------


def server_load(
    backbone: Backbone, args: argparse.Namespace, texts: Sequence[str], capacity: float
) -> list[dict[str, Any]]:
    from softprompt.server.run import make_service
    from softprompt.server.settings import ServerSettings

    chosen = assign("skewed", len(texts), args.server_tasks)
    calls = [(f"task{task}", text) for task, text in zip(chosen, texts, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        # Texts are written, not labels chosen.
        for i, prompt in enumerate(make_prompts(backbone, args.server_tasks, args.tokens, " {answer}")):
            prompt.save(Path(folder) / f"task{i}")
        engine = EngineLimits(args.rows, args.rows, args.step_tokens, prompt_bytes=PROMPT_BYTES)
        service = make_service(backbone, folder, ServerSettings(port=0, watch=0), engine)
        return under_load(service, calls, args.max_tokens, capacity, args.server_requests)


def capacity_of(found: dict[str, Any], otherwise: float) -> float:
    """Requests a second of the engine that writes texts, from the part that keeps it busiest among those measured."""
    if "beside_peft" in found:
        return float(found["beside_peft"]["generate"]["requests_per_second"]["softprompt"])
    if "throughput" in found:
        return float(found["throughput"]["generate"][-1]["requests_per_second"])
    return otherwise


# --- output ---------------------------------------------------------------------------------------------------------


def tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


def fill(found: dict[str, Any], page: Path = PAGE) -> None:
    page.write_text(put(page.read_text(encoding="utf-8"), lines(found), "serving", str(page)), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=20, help="soft tokens of each task")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 500])
    parser.add_argument("--requests", type=int, nargs=2, default=[64, 96], help="texts to continue, and to classify")
    parser.add_argument("--words", type=int, default=12, help="of each text")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6, help="of the throughput of the engine")
    parser.add_argument("--rows", type=int, default=EngineLimits.rows)
    parser.add_argument("--step-tokens", type=int, default=128)
    parser.add_argument("--peft-tasks", type=int, default=100)
    parser.add_argument("--beside-peft", type=int, nargs=2, default=[128, 128], help="the same, of ours beside PEFT")
    parser.add_argument("--peft-requests", type=int, default=12, help="of these, that PEFT answers in each round")
    parser.add_argument("--peft-rounds", type=int, default=4)
    parser.add_argument("--server-tasks", type=int, default=100)
    parser.add_argument("--capacity", type=float, default=4.0, help="requests/s of the engine, if not measured here")
    parser.add_argument("--server-requests", type=int, default=192)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer tasks and requests, one round")
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--page", help="fill docs/serving.md from this JSON, and measure nothing")
    args = parser.parse_args(arguments)
    if args.quick:
        args.requests, args.rounds, args.tasks, args.peft_rounds = [24, 60], 1, [1, 50], 1
        args.beside_peft = [24, 60]
        args.peft_tasks, args.peft_requests, args.server_tasks, args.server_requests = 20, 6, 20, 16
    return args


PARTS = ["throughput", "peft", "server"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.page:
        fill(read_json(Path(args.page)))
        return 0
    torch.set_num_threads(args.threads or torch.get_num_threads())
    found = facts("serve_speed", args.model, "cpu", torch.get_num_threads())
    found["settings"] = {name: value for name, value in vars(args).items() if name not in ("page", "out", "parts")}
    folder = str(weights.locate(args.model, report=print).folder)
    backbone = Backbone.load(args.model, precision=args.precision, device="cpu")
    texts = read_texts(max(*args.requests, *args.beside_peft, args.server_requests), args.words)
    count = max(*(args.tasks if "throughput" in args.parts else [1]), args.peft_tasks)
    tasks = make_tasks(backbone, make_prompts(backbone, count, args.tokens))
    engine = Engine(backbone, limits(args, len(texts)))
    if {"throughput", "peft"} & set(args.parts):
        compute_prompts(engine, tasks)
    for kind, count, beside in zip(("generate", "classify"), args.requests, args.beside_peft, strict=True):
        if "throughput" in args.parts:
            tell(f"throughput, {kind}: {args.rounds} rounds of {count} requests for each mix")
            found.setdefault("throughput", {})[kind] = throughput(engine, tasks, args, texts[:count], kind)
            keep(found, args.out)
        if "peft" in args.parts:
            tell(f"beside PEFT, {kind}: {args.peft_rounds} rounds of {beside} requests, {args.peft_requests} for PEFT")
            found.setdefault("beside_peft", {})[kind] = against_peft(engine, tasks, folder, args, texts[:beside], kind)
            keep(found, args.out)
    if "server" in args.parts:
        tell(f"server: {args.server_requests} requests at each load")
        found["server"] = server_load(backbone, args, texts, capacity_of(found, args.capacity))
    print("\n".join(lines(found)))
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    as_program(main)
