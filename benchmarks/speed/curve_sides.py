"""The sides of the cost curves: one step of tuning at many sizes, and sweeps of several trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt import machine
from softprompt.attention import StateCache
from softprompt.computation import deep_from_tokens, keep_texts, loss_and_gradient
from softprompt.data import Task
from softprompt.placement import Row, shared_length

from .cases import REVIEW, encode
from .sides import Made, Setting, first_vectors, load_ours, peft_prompt_model, right_padded
from .suffix_sides import BEHIND, FRONT, template_of


@dataclass(frozen=True)
class Job:
    """One point of a curve: `rows` examples of `length` tokens each, `tokens` soft ones besides."""

    axis: str
    value: int
    rows: int
    length: int
    tokens: int


def rows_of(job: Job, tokenizer: Any, fields: Sequence[dict[str, str]], text: str) -> list[Row]:
    """Rows of exactly job.length tokens (template and answer included) without the soft ones, from long texts."""
    template = REVIEW if text == FRONT else template_of(text)
    rows = encode(tokenizer, template, fields, job.tokens, job.length)
    exact = [row for row in rows if len(row.ids) == job.length + job.tokens]
    assert exact, f"no text has {job.length} tokens"
    return [exact[i % len(exact)] for i in range(job.rows)]


def in_front(setting: Setting) -> Made:
    backbone = load_ours(setting)
    jobs, fields = setting.more["jobs"], setting.more["fields"]
    batches = [rows_of(job, backbone.tokenizer, fields, FRONT) for job in jobs]
    vectors = [first_vectors(backbone.model, job.tokens) for job in jobs]
    budget = machine.tokens_at_once(backbone.device)
    cache = StateCache()

    def step(number: int) -> tuple[float, None]:
        found = loss_and_gradient(backbone, batches[number], vectors[number], micro_batch_tokens=budget, cache=cache)
        return found.loss, None

    return backbone.model, step, {}


def behind(setting: Setting) -> Made:
    """Over kept texts; setting.more["kind"]: embedding or deep."""
    backbone = load_ours(setting)
    jobs, fields, deep = setting.more["jobs"], setting.more["fields"], setting.more["kind"] == "deep"
    batches = [rows_of(job, backbone.tokenizer, fields, BEHIND) for job in jobs]
    vectors = [first_vectors(backbone.model, job.tokens) for job in jobs]
    vectors = [deep_from_tokens(backbone, each) for each in vectors] if deep else vectors
    # Rows of one template begin alike; one start for all, so that states of a text serve every job that has it.
    start = shared_length([row for batch in batches for row in batch])
    texts = StateCache(machine.text_bytes())
    for batch in batches:
        assert keep_texts(backbone, batch, start, texts), "there is not memory enough for the texts of the curves"

    def step(number: int) -> tuple[float, None]:
        return loss_and_gradient(backbone, batches[number], vectors[number], start=start, cache=texts).loss, None

    return backbone.model, step, {}


def peft(setting: Setting) -> Made:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoTokenizer

    jobs, fields = setting.more["jobs"], setting.more["fields"]
    base, model, _ = peft_prompt_model(setting)
    base.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    del model
    models = {}
    for tokens in sorted({job.tokens for job in jobs}):  # the wrappers hold no weight but their prompt
        models[tokens] = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
        models[tokens].to(setting.device).train()
    batches = [right_padded(rows_of(job, tokenizer, fields, FRONT), job.tokens, setting.device) for job in jobs]

    def step(number: int) -> tuple[float, None]:
        wrapped = models[jobs[number].tokens]
        wrapped.zero_grad()
        loss = wrapped(**batches[number]).loss
        loss.backward()
        return float(loss.detach()), None

    return base, step, {}


def sweeps(setting: Setting) -> Made:
    """`softprompt.sweep` of K trials without halving; number: place in setting.more["sweeps"], (text, kind, K) each."""
    import softprompt as sp

    backbone, more = load_ours(setting), setting.more
    rows: list[dict[str, str]] = more["fields"]
    held = more["validation"]

    def step(number: int) -> tuple[float, torch.Tensor]:
        text, kind, trials = more["sweeps"][number]
        task = Task.from_rows(rows[held:], rows[:held], [], template_of(text))
        rates = [0.02 + 0.01 * trial for trial in range(trials)]
        result = sp.sweep(
            backbone,
            task,
            grid={"learning_rate": rates},
            halving=0,
            kind=kind,
            tokens=setting.tokens,
            batch_size=more["batch"],
            epochs=more["epochs"],
            max_tokens=more["room"],
            text_cache="memory",
        )
        return float(result.winner.score or 0.0), torch.tensor([len(result.trials)])

    return backbone.model, step, {}
