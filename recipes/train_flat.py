"""Tuning a soft prompt, flat: everything that happens, in the order in which it happens, in one file.

    python recipes/train_flat.py --model smollm2-135m --train reviews.csv --labels negative positive \\
        --input "{soft}Review: {text}\\nSentiment:" --target " {label}" --out prompts/sentiment

`softprompt.tune` does the same with a run folder, checkpoints, warnings, a way back for a run that gets lost, and a
report around it; that both give the same losses and vectors, bit for bit, is tested (tests/test_train_flat.py).
Read this one, use that one. What makes it fast is not here but in `loss_and_gradient` (src/softprompt/computation.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from softprompt import Backbone, SoftPrompt, Task
from softprompt.attention import StateCache
from softprompt.computation import keep_texts, loss_and_gradient
from softprompt.encoding import Encoder
from softprompt.evaluation.runner import evaluate_prompt
from softprompt.initialisers import initialise
from softprompt.placement import shared_length


def train(
    backbone: Backbone,
    task: Task,
    *,
    tokens: int = 20,  # P
    init: str = "text",
    learning_rate: float = 0.05,  # in units of the embedding table's RMS
    warmup: float = 0.05,  # share of the steps in which the learning rate rises
    clip: float = 1.0,  # largest gradient norm, for vectors measured in that unit
    epochs: float | None = None,  # 2, or up to 6 for 250 steps, and at least 100 steps
    batch_size: int = 16,
    micro_batch_tokens: int = 1024,  # bounds the memory, changes no result
    validation_rows: int = 500,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[torch.Tensor, list[float]]:
    """The best vectors [P, H] by validation (without a validation split the last ones), and the loss of each step."""
    # Every example becomes token ids once; soft token i is the id -(i + 1), so its place is part of the row.
    encoder = Encoder(task.template, backbone.tokenizer, tokens, backbone.context_length)
    rows = [encoder.row(fields)[0] for fields in task.train]
    batch_size = min(batch_size, len(rows))
    once = len(rows) / batch_size
    steps = max(1, round(epochs * once)) if epochs else max(100, round(2 * once), min(250, round(6 * once)))
    validation = task.validation.take(validation_rows, seed=0)

    # The vectors are all that is learned. Adam moves every number by about its learning rate at each step, whatever the
    # gradient's size, so the learning rate is given in the size that the model's own embeddings have.
    unit = backbone.embedding_rms
    generator = torch.Generator().manual_seed(seed)
    vectors, how = initialise(
        init,
        table=backbone.embedding_table(),  # [V, H]
        tokenizer=backbone.tokenizer,
        tokens=tokens,
        generator=generator,
        template=task.template,
    )
    vectors = torch.nn.Parameter(vectors.float())  # [P, H]
    optimizer = torch.optim.AdamW([vectors], lr=learning_rate * unit, weight_decay=0.0, foreach=False)
    say(f"{len(rows)} rows, {steps} steps of {batch_size}, {tokens} soft tokens, {how}")

    # What the model makes of a token depends on what stands before it alone. So what all rows begin with is computed
    # once a step for the whole batch, and a row's text that no soft token precedes once for the whole run.
    start, texts = shared_length(rows), StateCache()
    keep_texts(backbone, rows, start, texts)

    losses: list[float] = []
    best = mean = vectors.detach().clone()
    top_score, best_loss = -math.inf, math.inf
    rising = math.ceil(warmup * steps)
    order: list[int] = []  # examples still to come
    epoch = 0
    for step in range(steps):
        # A batch: the next examples of one random order after another.
        while len(order) < batch_size:
            shuffled = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order += torch.randperm(len(rows), generator=shuffled).tolist()
            epoch += 1
        batch, order = [rows[i] for i in order[:batch_size]], order[batch_size:]

        # Loss and gradient, summed over the label tokens of the batch, so every label token weighs the same.
        now = vectors.detach()
        found = loss_and_gradient(backbone, batch, now, micro_batch_tokens=micro_batch_tokens, start=start, cache=texts)
        losses.append(found.loss / found.tokens)
        vectors.grad = found.gradient.to("cpu", torch.float32) / found.tokens  # [P, H]
        if not (math.isfinite(losses[-1]) and bool(torch.isfinite(vectors.grad).all())):
            raise SystemExit(f"the loss became {losses[-1]} at step {step + 1}; try a smaller learning rate")
        norm = float(vectors.grad.norm()) * unit
        if norm > clip:
            vectors.grad.mul_(clip / norm)

        # Linear warm-up, then linear decay towards zero.
        factor = (step + 1) / (rising + 1) if step < rising else (steps - step) / (steps - rising + 1)
        optimizer.param_groups[0]["lr"] = learning_rate * unit * factor
        optimizer.step()

        # Where a step ends is by chance: what counts is the mean over the last quarter of the steps.
        mean = mean.lerp(vectors.detach(), 1 / max(1, step + 1 - 3 * steps // 4))

        # Four times in a run, that is judged on rows that are not trained on.
        if (step + 1) % math.ceil(steps / 4) == 0 or step + 1 == steps:
            if not len(validation):
                best = mean
                continue
            report = evaluate_prompt(backbone, validation, mean, text_scores=False)
            score = report.accuracy if report.scores else -report.loss
            error = (score * (1 - score) / len(validation)) ** 0.5 if report.scores else 0.0
            # A clearly higher score wins; among scores within one standard error, which are noise, the lower loss.
            if score > top_score + error or (score >= top_score - error and report.loss < best_loss):
                best, best_loss = mean, report.loss
            top_score = max(top_score, score)
            say(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}  validation {score:.4f}")
    return best, losses


def main() -> None:
    parser = argparse.ArgumentParser(description="tune a soft prompt, in one flat file")
    parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder, .gguf file or alias")
    parser.add_argument("--train", required=True, help="a table of examples; validation and test are carved from it")
    parser.add_argument("--input", required=True, help="text with {columns}, and {soft} where the soft tokens stand")
    parser.add_argument("--target", required=True, help="the answer, for instance ' {label}'")
    parser.add_argument("--labels", nargs="+", help="the classes; leave out for free text")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for the prompt")
    args = parser.parse_args()
    backbone = Backbone.load(args.model, report=print)
    texts = {name: text.replace("\\n", "\n") for name, text in (("input", args.input), ("target", args.target))}
    task = Task.load(args.train, **texts, labels=args.labels, seed=args.seed)
    settings = dict(tokens=args.tokens, epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed)
    vectors, _ = train(backbone, task, **settings)
    prompt = SoftPrompt(vectors, task.template, backbone.name, backbone.fingerprint, backbone.tokenizer_hash)
    prompt.provenance["architecture"] = backbone.architecture
    if len(task.test):
        print(f"test: {evaluate_prompt(backbone, task.test, vectors).to_dict(brief=True)}")
    print(f"wrote {prompt.save(args.out)}")


if __name__ == "__main__":
    main()
