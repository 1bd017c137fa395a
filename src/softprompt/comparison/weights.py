"""Methods that train weights of the model or of an adapter in it: one small loop, with the batches of `tune`.

AdamW, the same warm-up and linear decay, loss at the answer's tokens alone, gradient clipped, four validations of which
the best counts. The linear output layer is applied only where a token is scored, which PEFT's users mostly do without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from ..attention import StateCache
from ..backbone import Backbone
from ..computation import micro_batches
from ..errors import DataError, TrainingError
from ..evaluation.runner import evaluate_prompt, make_encoder
from ..losses import summed_cross_entropy
from ..placement import Row, in_rectangle
from ..training.loop import Validation, batches, planned_steps
from ..training.run import encode_rows
from ..training.schedule import learning_rate_factor
from .places import at_the_front
from .protocol import Job, Trained, as_validation

Loss = Callable[[Sequence[Row]], torch.Tensor]  # summed cross-entropy of the answers of some rows, with its graph
CLIP, WARMUP = 1.0, 0.05
# Tokens of a micro-batch, whose rows are of like length: on a CPU little padding counts more than large products (16
# rows of SST-2 by LoRA on one thread: 2.2 examples/s in one rectangle, 3.4 in groups of 128 tokens).
ROOM, ROOM_PER_CPU_THREAD = 4096, 128
VALIDATIONS = 4


def train(
    job: Job,
    parameters: Sequence[torch.nn.Parameter],
    loss_of: Loss,
    validate: Callable[[], Validation],
    learning_rate: float,
    *,
    weight_decay: float,
    warmup: float = WARMUP,
    clip: float = CLIP,
) -> Trained:
    """Train `parameters`; they end as they were at the best validation. Raises TrainingError (a loss not finite)."""
    config = job.tune_config()
    rows, _ = encode_rows(make_encoder(job.backbone, job.task.template, 0, job.budget["max_tokens"]), job.task.train)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=False)
    steps = planned_steps(config, len(rows))
    best: Validation | None = None
    kept: list[torch.Tensor] = []
    top, seconds, examples = -math.inf, 0.0, 0
    room = ROOM_PER_CPU_THREAD * torch.get_num_threads() if job.backbone.device.type == "cpu" else ROOM
    for step, indices in enumerate(batches(len(rows), config.batch_size, steps, job.seed), 1):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step - 1, steps, warmup, "linear")
        loss = _step(optimizer, parameters, micro_batches([rows[i] for i in indices], 0, room), loss_of, clip)
        seconds, examples = seconds + time.perf_counter() - begun, examples + len(indices)
        job.tell(f"step {step}/{steps}, loss {loss:.3f}, {examples / seconds:.1f} examples/s")
        if step == steps or (len(job.task.validation) and step % max(1, math.ceil(steps / VALIDATIONS)) == 0):
            found = validate() if len(job.task.validation) else None
            if best is None or found is None or found.beats(top, best.loss):
                best, kept = found, [p.detach().clone() for p in parameters]
            top = max(top, found.score) if found else top
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    counted = sum(p.numel() for p in parameters)
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup, "clip": clip}
    return Trained(counted, steps, examples, seconds, best, settings)


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    parts: Iterable[Sequence[Row]],
    loss_of: Loss,
    clip: float,
) -> float:
    """One optimiser step over micro-batches; returns the mean loss of an answer token."""
    micro = list(parts)
    tokens = sum(len(row.ids) - row.answer for rows in micro for row in rows)
    optimizer.zero_grad()
    total = 0.0
    for rows in micro:
        loss = loss_of(rows) / tokens
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise TrainingError(f"the loss became {total}; this learning rate is too large here")
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return total


def answer_loss(backbone: Backbone, rows: Sequence[Row]) -> torch.Tensor:
    """Summed cross-entropy of the answers by the model's own forward over right-padded rows, head where needed."""
    grid = in_rectangle(rows, backbone.device)
    hidden = backbone.model.base_model(input_ids=grid.ids, attention_mask=grid.mask, use_cache=False).last_hidden_state
    return summed_cross_entropy(backbone.head(hidden[grid.scored]), grid.targets)


def validator(
    job: Job, backbone: Backbone, vectors: Callable[[], torch.Tensor] | None = None
) -> Callable[[], Validation]:
    """Scores the validation rows with the weights, or the soft prompt, as they are at the moment."""
    split = job.validation if vectors is None else replace(job.validation, template=at_the_front(job.task.template))

    def validate() -> Validation:
        backbone.states = StateCache()  # what was kept came from other weights
        now = None if vectors is None else vectors()
        limit = job.budget["max_tokens"]
        try:
            report = evaluate_prompt(backbone, split, now, max_tokens=limit, text_scores=False)
        except DataError as error:  # no row is new: only its probabilities can be wrong
            raise TrainingError(
                f"the weights are not finite ({error}); this learning rate is too large here"
            ) from error
        if not math.isfinite(report.loss):
            raise TrainingError(f"the validation loss became {report.loss}; this learning rate is too large here")
        return as_validation(report)

    return validate
