"""Tuning: the one training loop.

A step takes a batch of examples in an order fixed by the seed, has their loss and the gradient of the soft prompt
computed (computation.py), and lets an optimiser move the vectors. Everything else here watches, keeps and resumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import StateCache
from ..backbone import Backbone
from ..computation import LossAndGradient, is_deep, keep_texts
from ..errors import TrainingError
from ..machine import text_bytes, tokens_at_once
from ..placement import Row, shared_length
from ..prompt import by_token
from .checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from .config import TuneConfig
from .monitor import Monitor, majority_warning, movement_warning
from .parameters import make_optimizer, make_parameters
from .rescue import Valley
from .schedule import learning_rate_factor
from .together import Course, GradientRequest
from .world import World

NO_GAIN = "no better score"
# By default: two passes, but not fewer steps than LEAST (two passes of 26 rows are 3 steps, which teach nothing), and
# up to MOST_EPOCHS where that makes no more than ENOUGH: 500 rows twice are 62 steps, and three to four times as many
# teach far more (docs/log.md).
EPOCHS, LEAST, ENOUGH = 2.0, 100, 250
MOST_EPOCHS = {"embedding": 6.0, "deep": 8.0}
# A deep prompt that starts fast is lost for many steps; one that starts slowly bears twice the learning rate.
WARMUP = {"embedding": 0.05, "deep": 0.3}


@dataclass
class Validation:
    """score: higher is better (accuracy, or minus the loss). predicted: classes, empty for free text. details: what
    the caller wants to find again for the best one. error: the score's standard error by the number of rows."""

    score: float
    loss: float
    metric: str
    predicted: list[str] = field(default_factory=list)
    details: Any = None
    error: float = 0.0

    def beats(self, score: float, loss: float) -> bool:
        """Whether this is better than the best so far: `score` the highest of all, `loss` that of the best.

        Scores of few rows are noise: a clearly higher one wins, and among scores within one standard error the lower
        loss does, which varies less.
        """
        if self.score > score + self.error:
            return True
        return self.score >= score - self.error and self.loss < loss


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of the examples of each step: one random order after another, cut into batches across their ends.

    Depends on its arguments alone, so a resumed run skips to its place and goes on with the same batches.
    """
    batch: list[int] = []
    epoch = 0
    while steps > 0:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        epoch += 1
        for index in order:
            batch.append(index)
            if len(batch) == min(batch_size, count):
                yield batch
                batch, steps = [], steps - 1
                if steps == 0:
                    return


def planned_steps(config: TuneConfig, count: int) -> int:
    """Optimiser steps of the whole run: `steps`, else `epochs`, else by the number of examples, `count`."""
    if config.steps:
        return config.steps

    def passes(epochs: float) -> int:
        return max(1, round(epochs * count / min(config.batch_size, count)))

    if config.epochs:
        return passes(config.epochs)
    return max(LEAST, passes(EPOCHS), min(ENOUGH, passes(MOST_EPOCHS[config.kind])))


class Trainer:
    """One run: parameters, optimiser, place in the data, best prompt so far.

    validate: scores a prompt [P, H]. save: keeps a checkpoint (called every so often, and whenever the run stops).
    stop: asked after each step; True ends the run after keeping a checkpoint (Ctrl-C). texts: where the states of texts
    that no soft token precedes are kept; where those of all rows do not fit, none are. sizes: a deep prompt by whose
    sizes `initial` is learned, if not by its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: Sequence[Row],
        initial: torch.Tensor,
        config: TuneConfig,
        *,
        validate: Callable[[torch.Tensor], Validation] | None,
        monitor: Monitor,
        save: Callable[[Checkpoint], None] = lambda checkpoint: None,
        stop: Callable[[], bool] = lambda: False,
        world: World | None = None,
        texts: StateCache | None = None,
        sizes: torch.Tensor | None = None,
    ):
        self.backbone, self.rows, self.config, self.monitor = backbone, rows, config, monitor
        self.validate, self.save, self.stop = validate, save, stop
        self.world = world or World()
        deep = is_deep(initial)
        self.unit = 1.0 if deep else backbone.embedding_rms
        self.start = shared_length(rows)
        self.texts = texts if texts is not None else StateCache(text_bytes())
        self.initial = initial
        # Only at the front does a deep prompt hold the sequence's first token.
        sink = config.sink if deep and all(row.ids[0] < 0 for row in rows[:1]) else 0
        self.parameters = make_parameters(initial, config.reparametrisation, self.unit, config.seed, sink, sizes)
        self.optimizer = make_optimizer(
            self.parameters, config.optimizer, config.learning_rate, config.weight_decay, self.unit
        )
        self.warmup = WARMUP[config.kind] if config.warmup is None else config.warmup
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = planned_steps(config, len(rows))
        self.step = 0
        self.best_score, self.best_loss = -math.inf, math.inf
        self.top_score = -math.inf  # of all validations; what "within one standard error" is measured from
        self.best_step = 0
        self.best = initial.clone()
        self.best_validation: Validation | None = None  # None also after resuming past it
        self.without_gain = 0
        self.texts_done = 0
        self.seconds = 0.0
        self.mean: torch.Tensor | None = None  # of the vectors over the last `average` of the steps, once it has begun
        self.averaged = 0  # steps in that mean
        self.valley = Valley(min(config.batch_size, len(rows)))
        self.rescues = 0  # how often the run went back to its lowest loss

    def course(self) -> Course:
        """Train to the end; returns why it ended: "finished", "no better score", or "interrupted"."""
        keep_texts(self.backbone, self.rows, self.start, self.texts, advance=self._texts_done)
        if self._without_gain():  # resumed after its end
            self.monitor.add("end", self.step, reason=NO_GAIN)
            return NO_GAIN
        order = batches(len(self.rows), self.config.batch_size, self.steps, self.config.seed)
        reason = "finished"
        for number, indices in enumerate(order):
            if number < self.step:
                continue  # done before the run was resumed
            yield from self._train_step(self.world.share([self.rows[i] for i in indices]), len(indices))
            if self.step % self._validation_interval() == 0 or self.step == self.steps:
                self._validate()
            if self._without_gain():
                reason = NO_GAIN
            elif self.stop() and self.step < self.steps:
                reason = "interrupted"
            last = self.step == self.steps or reason != "finished"
            if last or self.step % self.config.checkpoint_every == 0:
                self.save(self.checkpoint())
            if last:
                break
        self.monitor.add("end", self.step, reason=reason)
        return reason

    def _texts_done(self, count: int) -> None:
        self.texts_done += count
        self.monitor.tell("texts", self.step, rows=len(self.rows), done=self.texts_done)

    def _without_gain(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.without_gain >= patience and self.step < self.steps

    def _train_step(self, batch: Sequence[Row], examples: int) -> Generator[GradientRequest, LossAndGradient, None]:
        begun = time.perf_counter()
        vectors = self.parameters.vectors()
        request = self.request(batch, vectors.detach())
        before = time.perf_counter() - begun
        found = yield request
        begun = time.perf_counter() - before - request.seconds  # others may have had their turn meanwhile
        tokens = float(self.world.sum(torch.tensor(float(found.tokens))))
        loss = float(self.world.sum(torch.tensor(found.loss, dtype=torch.float64))) / tokens
        gradient = self.world.sum(found.gradient).to("cpu", torch.float32) / tokens
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            self._stop_at_nonsense(loss)
        if self.config.rescue:
            self.valley.note(loss, self.step, self.parameters.named_parameters())
        self.optimizer.zero_grad()
        vectors.backward(gradient)
        norm = self._clip()
        if self.valley.left:
            self._go_back()
        factor = learning_rate_factor(self.step, self.steps, self.warmup, self.config.schedule) * 0.5**self.rescues
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.parameters.guard(self.config.norm_guard)
        self.step += 1
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        current = self.parameters.vectors().detach()
        self._average(current)
        self.monitor.add(
            "step",
            self.step,
            loss=loss,
            learning_rate=self.config.learning_rate * factor,
            gradient_norm=norm,
            examples_per_second=examples / seconds,
            token_gradient_norms=_rounded(by_token(gradient).norm(dim=1) * self.unit),
            token_norms=_rounded(by_token(current).norm(dim=1)),
            seconds=round(self.seconds, 3),
        )
        self._look_after(current)

    def _average(self, current: torch.Tensor) -> None:
        """Keep the mean over the last `average` of the steps: where a step ends is by chance, their mean is steadier
        (Polyak and Juditsky 1992)."""
        if self.step > math.floor((1 - self.config.average) * self.steps):
            self.averaged += 1
            self.mean = current.clone() if self.mean is None else self.mean.lerp(current, 1 / self.averaged)

    def prompt(self) -> torch.Tensor:
        """The vectors to be scored and kept at this step: the mean so far, before its first step those of training. A
        copy: a checkpoint holds them as its best beside the mean itself, and no two tensors of a file share memory."""
        return (self.parameters.vectors().detach() if self.mean is None else self.mean).clone()

    def request(self, batch: Sequence[Row], vectors: torch.Tensor) -> GradientRequest:
        budget = self.config.micro_batch_tokens or tokens_at_once(self.backbone.device)
        return GradientRequest(batch, vectors, self.start, self.texts, budget)

    def _clip(self) -> float:
        """Clip all gradients together, measured in units of the embedding RMS; returns the norm before."""
        gradients = [p.grad for p in self.parameters.parameters() if p.grad is not None]
        norm = float(torch.stack([g.norm() for g in gradients]).norm()) * self.unit
        if self.config.clip and norm > self.config.clip:
            for gradient in gradients:
                gradient.mul_(self.config.clip / norm)
        return norm

    @torch.no_grad()
    def _go_back(self) -> None:
        """To where the loss was lowest, from there with half of the learning rate: this step's gradient, which is of
        where the run has come to, moves nothing."""
        valley = self.valley
        self.monitor.add(
            "warning",
            self.step,
            text=f"the loss rose from {valley.lowest:.2f} to {valley.mean:.2f} (means of {valley.window} steps): going "
            f"on from the vectors of step {valley.step} with half of the learning rate",
        )
        for name, parameter in self.parameters.named_parameters():
            parameter.copy_(valley.parameters[name])
            parameter.grad = None
        self.optimizer.state.clear()
        valley.recent = []
        self.mean, self.averaged = None, 0
        self.rescues += 1

    def _look_after(self, vectors: torch.Tensor) -> None:
        vectors, initial = by_token(vectors), by_token(self.initial)
        unit = float(initial.square().mean().sqrt()) if is_deep(self.initial) else self.unit
        text = movement_warning(vectors, initial, unit, self.step / self.steps)
        if text:
            self.monitor.warn_once(self.step, text.split("(")[0].split(" to ")[0], text)

    def _stop_at_nonsense(self, loss: float) -> None:
        self.monitor.add("end", self.step, reason="loss is not finite")
        raise TrainingError(
            f"the loss became {loss} at step {self.step + 1}; the last good checkpoint is kept. "
            "Try a smaller learning_rate (a tenth), or precision float32"
        )

    def _validation_interval(self) -> int:
        return self.config.validate_every or max(1, math.ceil(self.steps / 4))

    def _validate(self) -> None:
        if self.validate is None:
            self.best, self.best_step = self.prompt(), self.step
            return
        current = self.prompt()
        found = self.validate(current)
        self.monitor.add("validation", self.step, loss=found.loss, score=found.score, metric=found.metric)
        text = majority_warning(found.predicted, self.step / self.steps)
        if text:
            self.monitor.warn_once(self.step, "every validation row", text)
        better = found.beats(self.top_score, self.best_loss)
        self.top_score = max(self.top_score, found.score)
        if better:
            self.best_score, self.best_loss, self.best_validation = found.score, found.loss, found
            self.best_step, self.best, self.without_gain = self.step, current, 0
        else:
            self.without_gain += 1

    # --- keeping and going on -----------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """All that the rest of the run depends on."""
        tensors = {f"parameters.{name}": p.detach() for name, p in self.parameters.named_parameters()}
        tensors |= {"best": self.best, "initial": self.initial, **optimizer_tensors(self.optimizer)}
        tensors |= {} if self.mean is None else {"mean": self.mean}
        tensors |= self.valley.tensors()
        facts = {
            "step": self.step,
            "steps": self.steps,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "top_score": self.top_score if math.isfinite(self.top_score) else None,
            "best_step": self.best_step,
            "without_gain": self.without_gain,
            "seconds": self.seconds,
            "averaged": self.averaged,
            "rescues": self.rescues,
            "valley": self.valley.facts(),
        }
        return Checkpoint(tensors, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where `checkpoint` was taken; the rest of the run is then the same bit for bit."""
        tensors, facts = checkpoint.tensors, checkpoint.facts
        with torch.no_grad():
            for name, parameter in self.parameters.named_parameters():
                parameter.copy_(tensors[f"parameters.{name}"])
        restore_optimizer(self.optimizer, tensors)
        self.best, self.initial = tensors["best"], tensors["initial"]
        self.step, self.best_step = facts["step"], facts["best_step"]
        self.best_score = -math.inf if facts["best_score"] is None else facts["best_score"]
        self.best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
        self.top_score = -math.inf if facts["top_score"] is None else facts["top_score"]
        self.without_gain, self.seconds = facts["without_gain"], facts["seconds"]
        self.mean, self.averaged = tensors.get("mean"), facts["averaged"]
        self.rescues = facts["rescues"]
        self.valley.restore(tensors, facts["valley"])


def _rounded(values: torch.Tensor) -> list[float]:
    """Six significant digits: enough for a plot, and metrics.jsonl stays small."""
    return [float(f"{value:.6g}") for value in values.tolist()]
