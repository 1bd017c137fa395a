"""Make a second model where no hub is within reach: one with half of its layers, trained on until it reads again.

    python benchmarks/half_model.py --data FOLDER --out MODEL --minutes 25

Of the layers the first two fifths and the last tenth stay (those that are left out hurt least behind the middle: Gromov
et al. 2024, arXiv:2403.17887): of SmolLM2-135M 15 of 30, 81 million parameters. These then go on learning to predict
the next token of the texts of several data sets, embeddings excepted, for so many minutes. FOLDER holds the data sets
as JSONL files; of their train.jsonl texts are read, and never a label.

The result is written whole every so often and at the end, for `--model MODEL` of every command. A model made from
nothing in the same time was tried first and could not be prompted at all (docs/log.md).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from speed.facts import as_program, count

from softprompt import machine, weights
from softprompt.atomic import write_folder

FIRST, LAST = 0.4, 0.1  # of the layers
SETS = ("imdb", "agnews", "boolq", "sst2", "rte", "clinc150", "banking77", "trec", "cr")
NOT_TEXT = {"label", "question_type"}
ROWS, LENGTH = 8, 256  # of a step
RATE, WARMUP = 3e-4, 0.05
KEPT_EVERY = 300.0  # seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with imdb/train.jsonl and so on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model; must not exist")
    parser.add_argument("--model", default="smollm2-135m", help="Llama's architecture: an alias, hub id or folder")
    parser.add_argument("--minutes", type=float, default=25.0, help="of training")
    parser.add_argument("--threads", type=count, help="default: all cores")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists; expected a new folder")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, found {args.minutes:g}")
    missing = [str(file) for file in files(args.data) if not file.is_file()]
    if missing:
        parser.error(f"there is no {', '.join(missing)}; expected the train.jsonl of each data set in --data")
    return args


def files(folder: Path) -> list[Path]:
    return [folder / name / "train.jsonl" for name in SETS]


def texts(folder: Path) -> Iterator[str]:
    """The texts of all rows, one row as one text, in the order of the files; labels are left out."""
    for file in files(folder):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield "\n".join(value for key, value in row.items() if key not in NOT_TEXT and isinstance(value, str))


def kept_layers(count: int) -> list[int]:
    """Which of `count` layers stay: 0 to 11 and 27 to 29 of 30."""
    first, last = max(1, round(FIRST * count)), max(1, round(LAST * count))
    return [*range(first), *range(count - last, count)]


def half(model: Any) -> Any:
    """`model` with half of its layers, numbered anew; everything but its embeddings learns."""
    layers = model.model.layers
    kept = kept_layers(len(layers))
    model.model.layers = torch.nn.ModuleList([layers[index] for index in kept])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    return model


def pieces(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """[ROWS, LENGTH] tokens from anywhere in the stream, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - LENGTH, (ROWS, 1), generator=generator)
        yield stream[starts + torch.arange(LENGTH)]


def factor(done: float) -> float:
    """Of the learning rate, when so much of the time has passed: a linear rise, then a cosine to zero."""
    return done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def save(model: Any, tokenizer: Any, out: Path) -> None:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_folder(out, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


@torch.no_grad()
def unseen_loss(model: Any, held: torch.Tensor, precision: torch.dtype) -> float:
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        return sum(float(model(part, labels=part).loss) for part in held.split(ROWS)) / len(held.split(ROWS))


def main(arguments: Sequence[str] | None = None) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine.keep_freed_memory()
    folder = str(weights.locate(args.model, report=print).folder)
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    lines = list(texts(args.data))
    stream = torch.tensor([t for ids in tokenizer(lines)["input_ids"] for t in (*ids, tokenizer.eos_token_id)])
    held, stream = stream[: 4 * ROWS * LENGTH].view(-1, LENGTH), stream[4 * ROWS * LENGTH :]
    precision = machine.probe_precision("cpu").dtype
    before = unseen_loss(whole, held, precision)
    model = half(whole.float())
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(lines):,} texts, {len(stream):,} tokens; {size:,} parameters; {precision}", flush=True)
    print(f"whole model {before:.3f} nats a token, half {unseen_loss(model, held, precision):.3f}", flush=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    begun, kept, done = time.monotonic(), time.monotonic(), 0.0
    for step, batch in enumerate(pieces(stream, seed=0), 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(done)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        done = (time.monotonic() - begun) / (60 * args.minutes)
        if step % 20 == 0:
            left = math.ceil(max(0.0, 1 - done) * args.minutes)
            print(f"step {step}, loss {loss.item():.3f}, {left} min left", flush=True)
        if done >= 1 or time.monotonic() - kept > KEPT_EVERY:
            kept = time.monotonic()
            save(model, tokenizer, args.out)
            print(
                f"kept in {args.out}; {unseen_loss(model, held, precision):.3f} nats a token, not trained on",
                flush=True,
            )
        if done >= 1:
            return 0
    return 0


if __name__ == "__main__":
    as_program(main)
