"""What the tests of looking into prompts are made of: a tiny model that reads words, a task, and prompts for it."""

from __future__ import annotations

import dataclasses

import torch

from softprompt import SoftPrompt, Task, Template
from softprompt.backbone import Backbone
from tiny_models import make_backbone, make_reviews, make_tokenizer

TEMPLATE = Template.make("{soft}Review : {text} Sentiment :", "{label}", labels=["positive", "negative"])


def make_task(count: int = 24, template: Template = TEMPLATE) -> Task:
    rows = make_reviews(count)
    third = count // 3
    return Task.from_rows(rows[:third], rows[third : 2 * third], rows[2 * third :], template)


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> Backbone:
    return make_backbone(architecture, dtype, make_tokenizer())


def prompt_of(backbone: Backbone, vectors: torch.Tensor, template: Template | None = TEMPLATE) -> SoftPrompt:
    return SoftPrompt(vectors.float(), template, backbone.name, backbone.fingerprint)


def words_prompt(backbone: Backbone, text: str = "Classify the film as good or bad") -> SoftPrompt:
    """A prompt whose vectors are the embeddings of words."""
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt_of(backbone, backbone.embedding_table()[ids])


def deaf_to_first(dtype: torch.dtype = torch.float64) -> tuple[Backbone, torch.Tensor]:
    """A one-layer model, and a prompt [4, H] whose first token nobody but itself attends to.

    Keys read a number that only this token has, with a large negative weight, and every query is the same large number
    there (a bias): its attention logit is so low that its weight is exactly 0. Only the slowest turning pair of
    dimensions is used, so that positions change nothing.
    """
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    attention = model.model.layers[0].self_attn
    slow = [7, 15, 23, 31]  # dimension 7 of each head and its partner: the lowest frequency
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        attention.k_proj.weight[slow] = 0
        attention.k_proj.bias[slow] = 0
        attention.k_proj.weight[[7, 23], 0] = -1e3
        attention.q_proj.weight[slow] = 0
        attention.q_proj.bias[slow] = 0
        attention.q_proj.bias[[7, 23]] = 1e3
    backbone = Backbone(model.to(dtype), make_tokenizer(), "deaf")
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * backbone.embedding_rms
    vectors[:, 0] = 0
    vectors[0, 0] = float(vectors.norm(dim=1).mean())
    return backbone, vectors


def renamed(prompt: SoftPrompt, **changes: object) -> SoftPrompt:
    return dataclasses.replace(prompt, **changes)  # type: ignore[arg-type]
