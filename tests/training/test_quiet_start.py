"""A deep prompt behind the text starts turned away from what the template's tail asks."""

from __future__ import annotations

import math

import pytest
import torch
from test_run import SETTINGS, make_task

import softprompt as sp
from softprompt.errors import BackboneError
from softprompt.placement import first_soft
from softprompt.rotary import turned_by
from softprompt.training import quiet_start
from softprompt.training.quiet_start import quiet, tail_queries
from softprompt.training.run import encode_task
from tiny_models import make_backbone, make_tokenizer

BEHIND = "Review : {text} {soft} \n Sentiment :"
TOKENS = 4


def start(kind, input=BEHIND):
    backbone = make_backbone(kind, torch.float64, make_tokenizer())
    config = sp.TuneConfig(**{**SETTINGS, "kind": "deep", "tokens": TOKENS})
    rows, _ = encode_task(backbone, make_task(input=input), config)
    heads = backbone.text_config.num_key_value_heads
    size = backbone.text_config.hidden_size // backbone.text_config.num_attention_heads
    layers = backbone.text_config.num_hidden_layers
    return backbone, rows, torch.randn(layers, 2, heads, TOKENS, size, dtype=torch.float64)


def test_scores_fall_by_half_the_logarithm_of_the_number_of_tokens(monkeypatch):
    monkeypatch.setattr(quiet_start, "RIDGE", 0.0)
    monkeypatch.setattr(quiet_start, "ROWS", 1)  # fewer queries than numbers in one, so that all can be met
    backbone, rows, vectors = start("llama")
    found = quiet(backbone, rows, vectors)
    queries = tail_queries(backbone, rows[:1], TOKENS).double()
    added = torch.einsum("lknd,lkpd->lkpn", queries, found[:, 0] - vectors[:, 0])
    torch.testing.assert_close(added, torch.full_like(added, -math.log(TOKENS) / 2), rtol=0, atol=1e-6)
    assert torch.equal(found[:, 1], vectors[:, 1])  # what it says is still said


def test_no_other_shift_comes_nearer():
    queries = torch.randn(2, 3, 50, 8, dtype=torch.float64) + 1
    best = quiet_start.away(queries, 1.5)

    def missed(shift):
        met = torch.einsum("lknd,lkd->lkn", queries, shift)
        size = queries.square().sum(-1).mean(-1) / 8  # [L, K]
        return ((met + 1.5) ** 2).mean() + quiet_start.RIDGE * (size * shift.square().sum(-1)).mean()

    assert all(missed(best) < missed(best + 0.01 * torch.randn_like(best)) for _ in range(20))


def test_the_queries_are_those_of_the_tail_where_the_prompt_lets_it_stand():
    """Of the first layer, whose queries depend on the tail's tokens alone: by hand, at the positions behind a prompt
    that begins at 0."""
    backbone, rows, vectors = start("llama")
    layer = backbone.model.model.layers[0]
    tail = torch.tensor(rows[0].ids[first_soft(rows[0].ids) + TOKENS : rows[0].answer])
    kv_heads, size = vectors.shape[2], vectors.shape[4]
    asked = layer.self_attn.q_proj(layer.input_layernorm(backbone.embed(tail))).view(len(tail), -1, size)
    asked = asked.transpose(0, 1)[None] * size**-0.5  # [1, H, T, D]
    each = [turned_by(backbone, 0, asked[:, :, t : t + 1], torch.tensor([TOKENS + t])) for t in range(len(tail))]
    by_hand = torch.cat(each, dim=2)[0].reshape(kv_heads, -1, size)
    found = tail_queries(backbone, rows[:1], TOKENS)[0]
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("input", ["{soft} Review : {text} \n Sentiment :", "Review : {soft} {text} \n Sentiment :"])
def test_before_the_text_it_stays_as_it_is(input):
    backbone, rows, vectors = start("llama", input)
    assert quiet(backbone, rows, vectors) is vectors


def test_a_prompt_that_is_started_from_is_not_turned(tmp_path):
    backbone, task = make_backbone("llama", torch.float32, make_tokenizer()), make_task(input=BEHIND)
    settings = {**SETTINGS, "kind": "deep", "tokens": TOKENS, "steps": 1}
    tuned = sp.tune(backbone, task, **settings)
    tuned.prompt.save(tmp_path / "prompt")
    again = sp.tune(backbone, task, **{**settings, "init": f"prompt:{tmp_path / 'prompt'}"})
    assert torch.equal(again.initial, tuned.prompt.vectors)


def test_a_model_whose_keys_cannot_stand_there_is_refused_as_ever():
    backbone = make_backbone("bloom", torch.float32, make_tokenizer())
    with pytest.raises(BackboneError, match="a deep prompt can only stand"):
        sp.tune(backbone, make_task(input=BEHIND), **{**SETTINGS, "kind": "deep", "tokens": TOKENS, "steps": 1})
