"""Pretrain a tiny language model, as a second one to try defaults on where no model hub is within reach.

    python benchmarks/tiny_model.py --data FOLDER --out MODEL

GPT-2's architecture (learned positions, layer norm, fused attention weights: all that SmolLM2 has not), 6 layers of
width 256, a byte-level BPE vocabulary of 4,096 tokens made from the same texts: 5.9 million parameters. FOLDER holds
data sets of JSONL files; the model reads the texts of their train.jsonl, several passes, and never a label. About 50
minutes on one core. It is no good at anything; what counts is whether settings found on one model hold on a very
different one.

The result is written whole every 500 steps and at the end, for `--model MODEL` of every command.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from softprompt.atomic import write_folder

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 4096, 256, 6, 4, 512
END = "<|endoftext|>"
SETS = ("imdb", "agnews", "boolq", "sst2", "e2e", "rte", "wic", "clinc150", "banking77", "trec", "cr", "copa")
NOT_TEXT = {"label", "question_type"}
KEPT_EVERY = 500


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with imdb/train.jsonl and so on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model; must not exist")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps of 16 pieces of 128 tokens")
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists; expected a new folder")
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


def make_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    found.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token=END, eos_token=END, model_max_length=CONTEXT)


def make_model(vocabulary: int, end: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def pieces(stream: torch.Tensor, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """[size, length] tokens from anywhere in the stream, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - length, (size, 1), generator=generator)
        yield stream[starts + torch.arange(length)]


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_folder(out, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    lines = list(texts(args.data))
    tokenizer = make_tokenizer(lines)
    end = tokenizer.convert_tokens_to_ids(END)
    stream = torch.tensor([token for ids in tokenizer(lines)["input_ids"] for token in (end, *ids)])
    model = make_model(len(tokenizer), end)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(lines):,} texts, {len(stream):,} tokens; {size:,} parameters", flush=True)
    held, stream = stream[: 64 * 128].view(64, 128), stream[64 * 128 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps + 1, pct_start=0.05)
    begun = time.monotonic()
    for step, batch in zip(range(1, args.steps + 1), pieces(stream, 16, 128, seed=0)):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = step == args.steps
        if last or step % 50 == 0:
            left = (time.monotonic() - begun) / step * (args.steps - step)
            print(f"step {step}/{args.steps}, loss {loss.item():.3f}, {math.ceil(left / 60)} min left", flush=True)
        if last or step % KEPT_EVERY == 0:
            with torch.no_grad():
                unseen = model(held, labels=held).loss.item()
            save(model, tokenizer, args.out)
            print(f"kept in {args.out}; {unseen:.3f} nats a token on texts not trained on", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
