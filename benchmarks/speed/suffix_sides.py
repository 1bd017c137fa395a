"""The sides of the suffix benchmark: whole short runs of tuning, of which the time of each step is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from softprompt.data import Task
from softprompt.encoding import Encoder
from softprompt.placement import Row
from softprompt.templates import Template
from softprompt.training.loop import batches
from softprompt.training.run import begin

from .sides import LABEL_PAD, Made, Setting, load_ours, peft_prompt_model, right_padded

LABELS = ["negative", "positive"]
FRONT = "{soft}Review: {text}\nSentiment:"
BEHIND = "Review: {text}\n{soft}Sentiment:"
RUN, CHECK = 0, 1  # what a side can be asked for by number
CHECKED = 2  # rows of the check of exactness
PEFT_RATE = 3e-2  # of PEFT's guide to prompt tuning


def template_of(text: str) -> Template:
    return Template.make(text, " {label}", labels=LABELS)


def encoded(setting: Setting, tokenizer: Any) -> list[Row]:
    """The rows of setting.more, cut so that text, template and answer take at most `room` tokens."""
    more = setting.more
    encoder = Encoder(template_of(more["input"]), tokenizer, setting.tokens, more["room"] + setting.tokens)
    return [encoder.row(fields)[0] for fields in more["rows"]]


def tuned(setting: Setting) -> Made:
    """Ours. RUN: a run of `tune` over setting.more's rows; the array is [seconds of the texts, of step 1, of step 2,
    ...].

    CHECK: the largest relative differences of loss and gradient from the plain concatenation, over a few rows.
    """
    import softprompt as sp

    more, backbone = setting.more, load_ours(setting)
    room = more["room"] + setting.tokens
    task = Task.from_rows(more["rows"], [], [], template_of(more["input"]))

    config = sp.TuneConfig(
        kind=more["kind"],
        tokens=setting.tokens,
        batch_size=more["batch"],
        epochs=more["epochs"],
        max_tokens=room,
        text_cache="memory",  # nothing of an earlier run
    )

    def run() -> tuple[float, torch.Tensor]:
        clock = Clock()
        # The parts of `tune`, which would cross-validate so few rows.
        begin(backbone, task, config, listeners=(clock,)).go_on(lambda: False)
        return clock.loss, torch.tensor([clock.texts, *clock.steps])

    def check() -> tuple[float, torch.Tensor]:
        from softprompt.computation import deep_from_tokens

        from .sides import first_vectors

        vectors = first_vectors(backbone.model, setting.tokens)
        vectors = deep_from_tokens(backbone, vectors) if more["kind"] == "deep" else vectors
        split = task.train.take(CHECKED)
        fast, plain = (
            sp.loss_and_gradient(backbone, split, vectors, exact_reference=exact, max_tokens=room)
            for exact in (False, True)
        )
        loss = abs(fast.loss - plain.loss) / abs(plain.loss)
        gradient = float((fast.gradient - plain.gradient).norm() / plain.gradient.norm())
        return fast.loss, torch.tensor([loss, gradient])

    return backbone.model, lambda number: check() if number == CHECK else run(), {}


class Clock:
    """Listens to a run. texts: seconds until the texts before the soft tokens were kept; steps: of each step."""

    def __init__(self) -> None:
        self.texts, self.loss = 0.0, 0.0
        self.steps: list[float] = []
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.perf_counter()
        if event["event"] == "texts":
            self.texts += now - self._last
        elif event["event"] == "step":
            self.steps.append(now - self._last)
            self.loss = event["loss"]
        self._last = now


def peft_tuned(setting: Setting) -> Made:
    """PEFT's prompt tuning over the same rows in the same order, with AdamW: the array is [0, seconds of each step]."""
    from transformers import AutoTokenizer

    base, model, weight = peft_prompt_model(setting)
    base.config.use_cache = False
    more = setting.more
    rows = encoded(setting, AutoTokenizer.from_pretrained(setting.folder))
    size = more["batch"]
    order = list(batches(len(rows), size, int(more["epochs"] * len(rows) / size), 0))
    step = training_step(model, weight, setting)

    def run(number: int) -> tuple[float, torch.Tensor]:
        losses, seconds = [], [0.0]
        for indices in order:
            begun = time.perf_counter()
            losses.append(step([rows[i] for i in indices]))
            seconds.append(time.perf_counter() - begun)
        return losses[-1], torch.tensor(seconds)

    return base, run, {}


def training_step(model: Any, weight: torch.nn.Parameter, setting: Setting) -> Callable[[Sequence[Row]], float]:
    optimizer = torch.optim.AdamW([weight], lr=PEFT_RATE)
    model.train()

    def step(rows: Sequence[Row]) -> float:
        batch = right_padded(rows, setting.tokens, setting.device)
        assert bool((batch["labels"] != LABEL_PAD).any())
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
