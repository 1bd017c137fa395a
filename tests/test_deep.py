"""Deep prompts: keys and values in each layer. Every fast path equals transformers' own cache, in float64."""

from __future__ import annotations

import pytest
import torch

from softprompt.attention import Pass, StateCache
from softprompt.computation import (
    answer_log_probability,
    deep_from_tokens,
    is_deep,
    keep_texts,
    loss_and_gradient,
    prompt_length,
)
from softprompt.errors import BackboneError, TemplateError
from softprompt.evaluation.generation import Sampling, generate_tokens
from softprompt.evaluation.scoring import score_labels
from softprompt.placement import Row, shared_length
from softprompt.rotary import can_move, moved
from tiny_models import ARCHITECTURES, FAST, make_backbone, make_rows, random_ids

PLACEMENTS = ("front", "after_bos", "inside")
TOKENS = 5


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def backbone(request):
    return make_backbone(request.param)


def states_of(backbone, ids):
    """Keys and values of a text at the front, as a deep prompt [L, 2, K, P, D]."""
    line = torch.tensor(ids)[None]
    out = backbone.model(input_ids=line, attention_mask=torch.ones_like(line), use_cache=True)
    layers = out.past_key_values.layers
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]).detach()


def deep_vectors(backbone, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = states_of(backbone, random_ids(tokens, generator))
    return states * (1 + 0.3 * torch.randn(states.shape, generator=generator, dtype=torch.float64))


def placements(backbone):
    return PLACEMENTS if backbone.fast else ("front",)


def test_what_kind_a_tensor_is(backbone):
    deep = deep_vectors(backbone)
    assert is_deep(deep) and prompt_length(deep) == TOKENS
    assert not is_deep(torch.zeros(3, 4)) and prompt_length(torch.zeros(3, 4)) == 3
    assert not is_deep(None) and prompt_length(None) == 0


@pytest.mark.parametrize("budget", [1000, 20])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loss_and_gradient_equal_the_models_own_cache(backbone, placement, budget):
    if placement not in placements(backbone):
        pytest.skip("only at the front without the fast path")
    rows, vectors = make_rows(placement), deep_vectors(backbone)
    plain = loss_and_gradient(backbone, rows, vectors, exact_reference=True)
    cache = StateCache()
    keep_texts(backbone, rows, shared_length(rows), cache)
    for given in (cache, None):
        fast = loss_and_gradient(backbone, rows, vectors, micro_batch_tokens=budget, cache=given)
        assert fast.loss == pytest.approx(plain.loss, abs=1e-10)
        assert fast.gradient.shape == vectors.shape
        torch.testing.assert_close(fast.gradient, plain.gradient, rtol=0, atol=1e-10)
    assert (plain.gradient.abs().amax(dim=(2, 3, 4)) > 1e-6).all()  # every layer's keys and values learn
    logs = answer_log_probability(backbone, rows, vectors, cache=cache)
    assert logs == pytest.approx(-plain.loss, abs=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_is_the_slope_of_the_loss(backbone, placement):
    if placement not in placements(backbone):
        pytest.skip("only at the front without the fast path")
    rows, vectors = make_rows(placement), deep_vectors(backbone)
    gradient = loss_and_gradient(backbone, rows, vectors).gradient
    direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ahead, behind = (
        loss_and_gradient(backbone, rows, vectors + step * direction, exact_reference=True).loss
        for step in (1e-6, -1e-6)
    )
    assert (ahead - behind) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scores_equal_the_models_own_cache(backbone, placement):
    if placement not in placements(backbone):
        pytest.skip("only at the front without the fast path")
    vectors = deep_vectors(backbone)
    contexts = [row.ids[: row.answer] for row in make_rows(placement)]
    answers = [(7,), (8, 9), (8, 10, 11)]
    plain = score_labels(backbone, contexts, answers, vectors, exact_reference=True)
    rows = [Row(ids, len(ids)) for ids in contexts]
    texts = StateCache()
    keep_texts(backbone, rows, shared_length(rows), texts)
    for kept in (None, texts):
        fast = score_labels(backbone, contexts, answers, vectors, texts=kept, micro_batch_tokens=40)
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_in_a_batch_equals_each_row_alone_and_the_plain_path(backbone, placement):
    if placement not in placements(backbone):
        pytest.skip("only at the front without the fast path")
    vectors = deep_vectors(backbone)
    contexts = [row.ids[: row.answer] for row in make_rows(placement)]
    together = _written(backbone, contexts, vectors)
    alone = [_written(backbone, [ids], vectors)[0] for ids in contexts]
    assert together == alone and all(len(tokens) == 6 for tokens in together)
    fast, backbone._fast = backbone.fast, False
    try:
        assert _written(backbone, contexts, vectors) == together
    finally:
        backbone._fast = fast


def _written(backbone, contexts, vectors):
    texts = [[] for _ in contexts]
    for row, token in generate_tokens(backbone, contexts, vectors, Sampling(max_new_tokens=6)):
        texts[row].append(token)
    return texts


def test_the_states_of_a_text_are_that_text(backbone):
    text = random_ids(TOKENS, torch.Generator().manual_seed(5))
    rows = make_rows("front")
    with_text = [Row((*text, *row.ids[TOKENS:]), row.answer) for row in rows]
    deep = answer_log_probability(backbone, rows, states_of(backbone, text))
    assert deep == pytest.approx(answer_log_probability(backbone, with_text, None), abs=1e-9)


@pytest.mark.parametrize("name", FAST)
def test_keys_move_as_the_model_moves_them(name):
    backbone = make_backbone(name)
    assert can_move(backbone)
    one = backbone.embed(torch.tensor([5])).detach()
    at = []
    for place in (0, 11):
        rows = Pass([1], record=True)
        backbone.hidden(one, torch.tensor([place]), rows)
        at.append(rows.states())
    if name in ("gpt2", "opt"):  # learned positions: nothing turns the keys
        torch.testing.assert_close(moved(backbone, at[0], torch.tensor([11])).keys[0], at[0].keys[0])
    else:
        for ours, theirs in zip(moved(backbone, at[0], torch.tensor([3, 11])).keys, at[1].keys, strict=True):
            torch.testing.assert_close(ours[1:], theirs, rtol=0, atol=1e-5)  # rotary angles are float32 numbers
            assert not torch.allclose(ours[:1], theirs, atol=1e-3)


def test_where_keys_cannot_move_the_front_is_the_only_place():
    backbone = make_backbone("bloom")
    vectors = deep_vectors(backbone)
    with pytest.raises(BackboneError, match="only stand at the very front"):
        loss_and_gradient(backbone, make_rows("inside"), vectors)


@pytest.mark.parametrize("placement", ["front", "behind"])
def test_something_must_be_read_after_a_deep_prompt(backbone, placement):
    vectors = deep_vectors(backbone)
    soft = tuple(-(i + 1) for i in range(TOKENS))
    text = () if placement == "front" else (7, 9)
    rows = [Row((*text, *soft, 5), len(text) + TOKENS), Row((*text[::-1], *soft, 6), len(text) + TOKENS)]
    for exact in (False, True):
        with pytest.raises((TemplateError, BackboneError), match=r"text between|only stand at the very front"):
            loss_and_gradient(backbone, rows, vectors, exact_reference=exact)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_more_tokens_than_the_models_own_cache_keeps_are_refused(name):
    backbone = make_backbone(name)
    vectors = torch.randn(12, backbone.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert deep_from_tokens(backbone, vectors).shape[3] == 12  # the fast path keeps all, and cuts the window itself
    backbone._fast = False
    with pytest.raises(BackboneError, match=r"keeps no more than 7 tokens .* a deep prompt of 12 needs them all"):
        deep_from_tokens(backbone, vectors)
