"""Two doors to the same training: the flat recipe gives the losses and the vectors of `softprompt.tune` to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import softprompt as sp
from softprompt.machine import tokens_at_once
from softprompt.training.loop import WARMUP
from tiny_models import make_backbone

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from train_flat import train

TEXT = ["a", "bad", "dull", "film", "fine", "good", "great", "is", "poor", "so", "the", "very"]
WORDS = [*TEXT, "review", ":", "negative", "positive", "classify", "as", "or"]
FRONT = dict(input="{soft}review: {text} is", target=" {label}", labels=["negative", "positive"])
TASKS = {
    "front": FRONT,
    "behind": {**FRONT, "input": "review: {text} is{soft}"},
    "free text": {**FRONT, "labels": None},
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_task(kind: str, rows: int = 40, validation: int = 12) -> sp.Task:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(rows + validation):
        length = int(torch.randint(1, 9, (), generator=generator))
        text = " ".join(TEXT[i] for i in torch.randint(0, len(TEXT), (length,), generator=generator))
        made.append({"text": text, "label": "positive" if number % 3 else "negative"})
    return sp.Task.from_rows(made[:rows], made[rows:], [], sp.Template.make(**TASKS[kind]))


@pytest.mark.parametrize("architecture", ["llama", "bloom"])  # the fast path and the plain one
@pytest.mark.parametrize("kind", TASKS)
def test_same_losses_and_same_vectors_as_tune(kind, architecture, tokenizer):
    task, settings = make_task(kind), dict(tokens=4, epochs=2.5, batch_size=9, learning_rate=0.5, seed=3)
    configured = sp.tune(make_backbone(architecture, torch.float32, tokenizer), task, **settings)
    lines = []
    vectors, losses = train(make_backbone(architecture, torch.float32, tokenizer), task, **settings, say=lines.append)
    assert losses == [event["loss"] for event in configured.history if event["event"] == "step"]
    assert len(losses) == configured.steps == 11
    assert torch.equal(vectors, configured.prompt.vectors)
    assert len(lines) == 5


def test_without_validation_the_last_vectors_are_taken(tokenizer):
    task = make_task("front", validation=0)
    configured = sp.tune(make_backbone("llama", torch.float32, tokenizer), task, tokens=4, folds=0)
    vectors, _ = train(make_backbone("llama", torch.float32, tokenizer), task, tokens=4, say=lambda line: None)
    assert torch.equal(vectors, configured.prompt.vectors)


def test_the_defaults_are_tunes():
    from inspect import signature

    defaults = {
        name: p.default for name, p in signature(train).parameters.items() if name in sp.TuneConfig.model_fields
    }
    assert len(defaults) == 10
    assert defaults.pop("warmup") == WARMUP["embedding"]
    assert defaults.pop("micro_batch_tokens") == tokens_at_once(torch.device("cpu"))
    assert defaults == {name: sp.TuneConfig.model_fields[name].default for name in defaults}


def test_it_is_a_recipe_to_read():
    text = Path(train.__code__.co_filename).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert "\nclass " not in text
