"""Tiny random models with real tokenizers, and prompts at every placement, for the tests of exports."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from softprompt.backbone import Backbone
from softprompt.evaluation.generation import Sampling, generate_tokens
from softprompt.evaluation.runner import make_encoder
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template
from tiny_models import ARCHITECTURES

TEXTS = ("a fine film", "Hello 中文 x", "nothing much at all, and yet it moves. It's 22/7")
TEMPLATES = {
    "front": ("{soft}Review: {text}\nSentiment:", 4),
    "after_bos": ("{bos}{soft}Review: {text}\nSentiment:", 3),
    "behind": ("Review: {text}\n{soft}Sentiment:", 5),
    "divided": ("{soft}Review: {text}{soft} Sentiment:", 5),
}


def tiny_backbone(
    architecture: str, tokenizer: Any, *, tied: bool = True, padding: int = 0, dtype: torch.dtype = torch.float32
) -> Backbone:
    """A random model for a real tokenizer, its tables `padding` rows larger than the vocabulary."""
    kind, make = ARCHITECTURES[architecture]
    config = make()
    config.vocab_size, config.tie_word_embeddings = len(tokenizer) + padding, tied
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.mul_(4)
        if padding:  # rows that no token uses, which a trained model never says
            head = model.get_output_embeddings().weight
            head[-padding:] = head[:-padding].mean(dim=0)
    model.tie_weights()
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return Backbone(model.to(dtype), tokenizer, architecture)


def make_prompts(backbone: Backbone, *names: str) -> dict[str, SoftPrompt]:
    """A prompt for each of TEMPLATES (or those named), named after its placement."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, (text, tokens) in TEMPLATES.items():
        vectors = torch.randn(tokens, backbone.width, generator=generator) * backbone.embedding_rms * 2
        made[name] = SoftPrompt(vectors, Template.make(text, " {answer}"), base_model=backbone.name)
    return {name: made[name] for name in names or TEMPLATES}


def our_tokens(backbone: Backbone, prompt: SoftPrompt, text: str, count: int = 12) -> list[int]:
    """What we generate greedily."""
    assert prompt.template is not None
    context = make_encoder(backbone, prompt.template, prompt.tokens).context({"text": text}).ids
    return [token for _, token in generate_tokens(backbone, [context], prompt.vectors, Sampling(count))]


def reload(folder: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of an export, as transformers loads them."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, hf.AutoTokenizer.from_pretrained(folder)


def written_ids(tokenizer: Any, said: dict[str, Any], text: str) -> list[int]:
    """Token ids of a text written as the export says."""
    return tokenizer(said["text"].replace("{text}", text), add_special_tokens=said["add_special_tokens"]).input_ids
