"""The sides of the tuning benchmark: each loads the model in its own process and takes steps over the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from softprompt import machine
from softprompt.attention import StateCache
from softprompt.backbone import PRECISIONS, Backbone
from softprompt.computation import loss_and_gradient
from softprompt.placement import Row, shared_length
from softprompt.prompt import by_token

from .cases import without_soft

LABEL_PAD = -100
Step = Callable[[int], tuple[float, "torch.Tensor | None"]]  # batch number -> summed loss, gradient [P, ...] if any
Made = tuple[Any, Step, dict[str, Any]]  # transformers' model, the step, facts to report


@dataclass(frozen=True)
class Setting:
    """Everything that a side needs to set itself up. more: of what a certain benchmark needs beyond this."""

    folder: str
    precision: str
    device: str
    tokens: int
    threads: int
    batches: tuple[tuple[Row, ...], ...]
    same_allocator: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def first_vectors(model: Any, tokens: int) -> torch.Tensor:
    """Embeddings of some ordinary tokens, the same on all sides: float32 [P, H]."""
    return model.get_input_embeddings().weight[first_ids(model, tokens)].detach().float().cpu()


def first_ids(model: Any, tokens: int) -> torch.Tensor:
    size = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(tokens) + min(1000, size // 3)) % size


@torch.no_grad()
def first_deep(model: Any, tokens: int) -> torch.Tensor:
    """Keys and values that the model itself gives those tokens: float32 [L, 2, K, P, D]."""
    ids = first_ids(model, tokens)[None].to(model.device)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    return torch.stack([torch.stack([each.keys[0], each.values[0]]) for each in layers]).float().cpu()


# --- ours -----------------------------------------------------------------------------------------------------------


def load_ours(setting: Setting) -> Backbone:
    backbone = Backbone.load(setting.folder, precision=setting.precision, device=setting.device)
    assert backbone.fast, backbone.why_plain
    return backbone


def step_of(backbone: Backbone, batches: Sequence[Sequence[Row]], vectors: torch.Tensor, cache: StateCache) -> Step:
    """Steps as `tune` takes them: one start for all rows, the default memory bound."""
    budget = machine.tokens_at_once(backbone.device)
    start = shared_length([row for batch in batches for row in batch])

    def step(number: int) -> tuple[float, torch.Tensor]:
        found = loss_and_gradient(
            backbone, batches[number], vectors, micro_batch_tokens=budget, start=start, cache=cache
        )
        return found.loss, by_token(found.gradient)

    return step


def softprompt(setting: Setting) -> Made:
    backbone = load_ours(setting)
    vectors = first_vectors(backbone.model, setting.tokens)
    return backbone.model, step_of(backbone, setting.batches, vectors, StateCache()), {}


def softprompt_deep(setting: Setting) -> Made:
    backbone = load_ours(setting)
    vectors = first_deep(backbone.model, setting.tokens)
    return backbone.model, step_of(backbone, setting.batches, vectors, StateCache()), {}


# --- PEFT's ---------------------------------------------------------------------------------------------------------


def load_base(setting: Setting) -> Any:
    from transformers import AutoModelForCausalLM

    if setting.same_allocator:
        machine.keep_freed_memory()
    return AutoModelForCausalLM.from_pretrained(setting.folder, dtype=PRECISIONS[setting.precision]).to(setting.device)


def peft_prompt_model(setting: Setting) -> tuple[Any, Any, torch.nn.Parameter]:
    """PEFT's prompt tuning with the vectors that all sides begin from: base, wrapped model, weight [P, H]."""
    from peft import PromptTuningConfig, get_peft_model

    base = load_base(setting)
    vectors = first_vectors(base, setting.tokens)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setting.tokens))
    model.to(setting.device)
    weight = model.prompt_encoder["default"].embedding.weight  # float32 in every precision, as ours
    with torch.no_grad():
        weight.copy_(vectors)
    return base, model, weight


def peft_prompt(setting: Setting) -> Made:
    base, model, weight = peft_prompt_model(setting)
    base.config.use_cache = False
    return base, _peft_step(model, [weight], setting, lambda: weight.grad), {}


def peft_prefix(setting: Setting) -> Made:
    from peft import PrefixTuningConfig, get_peft_model

    base = load_base(setting)
    vectors = first_deep(base, setting.tokens)
    layers, _, heads, _, size = vectors.shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=setting.tokens,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * size,
    )
    model = get_peft_model(base, config)
    model.to(setting.device)
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(by_token(vectors))
    return base, _peft_step(model, [weight], setting, lambda: weight.grad), {}


def peft_lora(setting: Setting) -> Made:
    from peft import LoraConfig, get_peft_model

    base = load_base(setting)
    base.config.use_cache = False
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16, lora_dropout=0.0)
    model = get_peft_model(base, config)
    model.to(setting.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return base, _peft_step(model, weights, setting, lambda: None), {}


def _peft_step(
    model: Any, weights: Sequence[Any], setting: Setting, gradient: Callable[[], torch.Tensor | None]
) -> Step:
    """PEFT's ordinary path: a right-padded batch with labels through the model's own loss, and backward."""
    model.train()
    batches = [right_padded(batch, setting.tokens, setting.device) for batch in setting.batches]

    def step(number: int) -> tuple[float, torch.Tensor | None]:
        for weight in weights:
            weight.grad = None
        loss = model(**batches[number]).loss * (batches[number]["labels"] != LABEL_PAD).sum()
        loss.backward()
        return float(loss.detach()), gradient()

    return step


def right_padded(rows: Sequence[Row], tokens: int, device: str) -> dict[str, torch.Tensor]:
    """What PEFT is given for rows with the soft prompt at the front: ids, mask and labels [B, T] without the prompt."""
    assert all(min(row.ids[tokens:]) >= 0 for row in rows), "PEFT places soft tokens at the front only"
    plain = [without_soft(row) for row in rows]
    width = max(len(row.ids) for row in plain)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), LABEL_PAD)
    for number, row in enumerate(plain):
        own = torch.tensor(row.ids)
        ids[number, : len(own)], mask[number, : len(own)] = own, 1
        labels[number, row.answer : len(own)] = own[row.answer :]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


# Side -> how it is made, and which tokens it cannot do without (cases.needed_tokens).
SIDES: dict[str, tuple[Callable[[Setting], Made], str]] = {
    "softprompt": (softprompt, "prompt"),
    "peft-prompt": (peft_prompt, "prompt"),
    "softprompt-deep": (softprompt_deep, "deep"),
    "peft-prefix": (peft_prefix, "deep"),
    "peft-lora": (peft_lora, "plain"),
}
SAME = (("softprompt", "peft-prompt"), ("softprompt-deep", "peft-prefix"))  # equal loss and gradient
