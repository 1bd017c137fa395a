"""A tiny model, prompts of every kind in a folder, and a real server in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import torch
import transformers as hf

from softprompt.backbone import Backbone
from softprompt.engine.engine import EngineLimits
from softprompt.prompt import SoftPrompt
from softprompt.server.run import Server, make_service
from softprompt.server.settings import Limits, ServerSettings
from softprompt.templates import Template
from tiny_tokenizers import byte_level

SENTIMENT = Template.make("{soft}Review: {text}\nSentiment:", " {label}", labels=["negative", "positive"])
TOPIC = Template.make("{text}\nTopic:{soft}", " {label}", labels={"1": "sport", "2": "science", "3": "state affairs"})
MOOD = Template.make("{text}\nMood:{soft}", " {label}", labels=["calm", "cross"])
WRITER = Template.make("{bos}{soft}Facts: {facts}\nText:", " {text}")
CHATTY = Template.make(chat=[("system", "Be brief."), ("user", "{soft}{question}")], target="{answer}")
PAIRS = Template.make("{soft}{first}\n{second}\nSame:", " {label}", labels=["no", "yes"])


def make_backbone(context: int = 256, seed: int = 0) -> Backbone:
    """A Llama of random weights with a byte-level tokenizer that has a chat template."""
    tokenizer = byte_level()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(6)
    return Backbone(model, tokenizer, "tiny")


def make_prompt(backbone: Backbone, template: Template | None, seed: int = 0, deep: bool = False) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    if deep:
        layers, heads, size = backbone.state_shape
        vectors = torch.randn(layers, 2, heads, 4, size, generator=generator)
    else:
        vectors = torch.randn(3 + seed % 3, backbone.width, generator=generator) * backbone.embedding_rms
    return SoftPrompt(vectors, template, backbone.name, backbone.fingerprint, backbone.tokenizer_hash)


def make_library(backbone: Backbone, folder: Path) -> Path:
    """sentiment (two versions), topic and mood behind the text, writer, chatty, pairs, deep, and bare (no template)."""
    made = {
        "sentiment": (SENTIMENT, 1),
        "sentiment@2": (SENTIMENT, 2),
        "topic": (TOPIC, 3),
        "mood": (MOOD, 4),
        "writer": (WRITER, 5),
        "chatty": (CHATTY, 6),
        "pairs": (PAIRS, 7),
    }
    for name, (template, seed) in made.items():
        make_prompt(backbone, template, seed).save(folder / name)
    make_prompt(backbone, SENTIMENT, 8, deep=True).save(folder / "deep")
    make_prompt(backbone, None, 9).save(folder / "bare")
    return folder


@contextmanager
def serving(
    backbone: Backbone, folder: Path, limits: Limits | None = None, engine: EngineLimits | None = None, **settings
) -> Iterator[SimpleNamespace]:
    """A server on a free port in a thread: url, service, server, client (httpx)."""
    chosen = ServerSettings(port=0, limits=limits or Limits(), **{"watch": 0, **settings})
    service = make_service(backbone, str(folder), chosen, engine)
    server = Server(service)
    with server.bound() as (url, sockets):
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        thread.start()
        with httpx.Client(base_url=url, timeout=60) as client:
            until(lambda: server.started)
            try:
                yield SimpleNamespace(url=url, service=service, server=server, client=client, thread=thread)
            finally:
                server.should_exit = True
                thread.join(120)
                assert not thread.is_alive()


def until(condition, seconds: float = 60.0) -> None:
    """Wait for a condition that another thread brings about; fails if it never does."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("it did not happen")


def at_rest(service) -> bool:
    """Nothing is left of any request."""
    engine = service.engine
    return not (
        engine._rows
        or engine._queue.items()
        or engine._parked
        or engine.prefixes._building
        or engine.prefixes._of_groups
        or (engine.slots and engine.slots.rows)
        or service._queues
        or service.active
    )
