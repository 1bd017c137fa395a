"""Attention from the answer's position: against transformers' eager attention over the whole row, and by hand."""

from __future__ import annotations

import pytest
import torch
from inspect_material import deaf_to_first, make_model, make_task

from softprompt.attention import one_at_a_time
from softprompt.backbone import _softmax_in_float64
from softprompt.computation import deep_from_tokens
from softprompt.inspection.attending import answer_attention, last_attention
from softprompt.placement import embed_with_soft
from softprompt.templates import Template
from tiny_models import FAST, random_ids, random_vectors


def row(placement: str) -> tuple[int, ...]:
    text = random_ids(14, torch.Generator().manual_seed(3))
    soft = [-(i + 1) for i in range(5)]
    return tuple({"front": [*soft, *text], "behind": [1, *text, *soft], "inside": [1, *text[:6], *soft, 7]}[placement])


@pytest.mark.parametrize("placement", ["front", "behind", "inside"])
@pytest.mark.parametrize("architecture", [*FAST, "bloom"])
def test_equals_eager_attention_over_the_whole_row(architecture: str, placement: str) -> None:
    backbone = make_model(architecture)
    vectors, ids = random_vectors(backbone), row(placement)
    found = last_attention(backbone, ids, vectors)
    line = torch.tensor(ids)[None]
    with torch.no_grad(), one_at_a_time, _softmax_in_float64():
        backbone.model.set_attn_implementation("eager")
        embeddings = embed_with_soft(line, vectors, backbone.embed)
        whole = backbone.model(inputs_embeds=embeddings, output_attentions=True, use_cache=False).attentions
    expected = torch.stack([layer[0, :, -1] for layer in whole])
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found.sum(dim=-1), torch.ones_like(found[..., 0]))


def test_equals_queries_times_keys_by_hand() -> None:
    """The last layer of a GPT-2, whose queries and keys are one linear map of what enters its attention."""
    backbone = make_model("gpt2")
    vectors, ids = random_vectors(backbone), row("front")
    block = backbone.model.transformer.h[-1].attn
    entered: list[torch.Tensor] = []
    hook = block.c_attn.register_forward_hook(lambda module, inputs, output: entered.append(output.detach()))
    line = torch.tensor(ids)[None]
    with torch.no_grad():
        backbone.model(inputs_embeds=embed_with_soft(line, vectors, backbone.embed), use_cache=False)
    hook.remove()
    query, key, _ = entered[0].split(32, dim=2)
    query, key = (x.view(1, len(ids), 4, 8).transpose(1, 2)[0] for x in (query, key))
    expected = torch.softmax(query[:, -1:] @ key.transpose(1, 2) / 8**0.5, dim=-1)[:, 0]
    assert torch.allclose(last_attention(backbone, ids, vectors)[-1], expected, atol=1e-12)


@pytest.mark.parametrize("placement", ["front", "inside"])
def test_a_deep_prompt_of_words_gets_the_attention_of_these_words(placement: str) -> None:
    """The states that the model itself gives the prompt's vectors at the front, as a deep prompt there."""
    backbone = make_model()
    vectors, ids = random_vectors(backbone), row(placement)
    deep = deep_from_tokens(backbone, vectors)
    found = last_attention(backbone, ids, deep)
    assert torch.allclose(found.sum(dim=-1), torch.ones_like(found[..., 0]))
    if placement == "front":
        assert torch.allclose(found, last_attention(backbone, ids, vectors), atol=1e-10)


def test_what_nobody_attends_to_has_none() -> None:
    backbone, vectors = deaf_to_first()
    split = make_task().test
    found = answer_attention(backbone, split, vectors)
    assert found.tokens.shape == (1, 4) and found.heads.shape == (1, 2, 4)
    assert float(found.tokens[0, 0]) == 0
    assert (found.tokens[0, 1:] > 0).all()
    assert found.rows == len(split)
    assert 0 < found.fair < 0.2


def test_the_model_is_left_as_it_was() -> None:
    backbone = make_model()
    before = backbone.model.config._attn_implementation
    last_attention(backbone, row("front"), random_vectors(backbone))
    assert backbone.model.config._attn_implementation == before


def test_soft_tokens_in_several_places_keep_their_numbers() -> None:
    template = Template.make("{soft}Review : {text} {soft}Sentiment :", "{label}", labels=["positive", "negative"])
    backbone, split = make_model(), make_task(template=template).test.take(1)
    vectors = random_vectors(backbone, 4)
    from softprompt.evaluation.runner import make_encoder

    ids = make_encoder(backbone, template, 4).context(split[0]).ids
    whole = last_attention(backbone, ids, vectors).mean(dim=1)
    found = answer_attention(backbone, split, vectors)
    for token in range(4):
        assert torch.allclose(found.tokens[:, token], whole[:, ids.index(-token - 1)].float())
