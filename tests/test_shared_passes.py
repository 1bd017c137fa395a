"""Prompts that share a pass have each its own loss and gradient: those of its batch alone, in float64."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from softprompt import shared_passes
from softprompt.attention import StateCache
from softprompt.backbone import Backbone
from softprompt.computation import keep_texts, loss_and_gradient
from softprompt.placement import shared_length
from softprompt.rotary import can_move
from softprompt.shared_passes import losses_and_gradients
from test_deep import PLACEMENTS as DEEP_PLACEMENTS
from test_deep import deep_vectors
from tiny_models import ARCHITECTURES, PLACEMENTS, make_backbone, make_rows, random_vectors


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def backbone(request):
    return make_backbone(request.param)


def make_prompts(backbone, kind):
    if kind == "deep":
        return [deep_vectors(backbone, seed=seed) for seed in (0, 1, 2)]
    return [random_vectors(backbone) * factor for factor in (1.0, -0.7, 1.4)]


def check(found, backbone, batches, prompts):
    for each, batch, vectors in zip(found, batches, prompts, strict=True):
        alone = loss_and_gradient(backbone, batch, vectors, exact_reference=True)
        assert each.loss == pytest.approx(alone.loss, abs=1e-10)
        assert each.tokens == alone.tokens
        torch.testing.assert_close(each.gradient, alone.gradient, rtol=0, atol=1e-10)


CASES = [*(("embedding", placement) for placement in PLACEMENTS), *(("deep", each) for each in DEEP_PLACEMENTS)]


@pytest.mark.parametrize(("kind", "placement"), CASES)
@pytest.mark.parametrize("budget", [1000, 20])
def test_each_has_the_gradient_of_its_batch_alone(backbone, kind, placement, budget):
    if kind == "deep" and not backbone.fast and placement != "front":
        pytest.skip("only at the front without the fast path")
    rows, prompts = make_rows(placement), make_prompts(backbone, kind)
    batches = [rows, rows[1:], [rows[2], rows[0]]]  # rows in common, of other numbers, in another order
    cache = StateCache()
    keep_texts(backbone, rows, shared_length(rows), cache)
    for given in (cache, None):
        found = losses_and_gradients(backbone, batches, prompts, micro_batch_tokens=budget, cache=given)
        check(found, backbone, batches, prompts)


@pytest.mark.parametrize("kind", ["embedding", "deep"])
def test_they_share_the_pass(kind, monkeypatch):
    backbone = make_backbone("llama")
    prompts, rows = make_prompts(backbone, kind), make_rows("front")
    losses_and_gradients(backbone, [rows] * 3, prompts)  # the model has been tried out by now
    passes = []
    real = backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda *given: passes.append(given[2]) or real(*given))
    losses_and_gradients(backbone, [rows] * 3, prompts)
    assert [len(each.lengths) for each in passes] == [3, 3 * len(rows)]  # what stands before, all rows


def test_a_prompt_that_is_not_finite_spoils_no_other():
    backbone = make_backbone("llama")
    rows, prompts = make_rows("behind"), make_prompts(backbone, "embedding")
    prompts[1] = prompts[1] * float("nan")
    found = losses_and_gradients(backbone, [rows] * 3, prompts)
    assert found[1].loss != found[1].loss
    check([found[0], found[2]], backbone, [rows] * 2, [prompts[0], prompts[2]])


def test_deep_prompts_in_front_of_a_model_whose_keys_do_not_turn():
    config = hf.GlmConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    backbone = Backbone(hf.GlmForCausalLM(config).double(), None, "glm")
    assert backbone.fast and not can_move(backbone)
    rows, prompts = make_rows("front"), [deep_vectors(backbone, seed=seed) for seed in (0, 1)]
    check(losses_and_gradients(backbone, [rows, rows], prompts), backbone, [rows, rows], prompts)


@pytest.mark.parametrize("fits", [1, 2])
def test_where_memory_is_short_halves_are_computed(fits, monkeypatch):
    backbone = make_backbone("llama")
    real, sizes = shared_passes._together, []

    def short(backbone, batches, prompts, *given):
        sizes.append(len(prompts))
        if len(prompts) > fits:
            raise torch.OutOfMemoryError
        return real(backbone, batches, prompts, *given)

    monkeypatch.setattr(shared_passes, "_together", short)
    rows, prompts = make_rows("front"), make_prompts(backbone, "embedding")
    prompts = [*prompts, prompts[0] * 2]
    check(losses_and_gradients(backbone, [rows] * 4, prompts), backbone, [rows] * 4, prompts)
    assert sizes == [4, 2, 2]  # and where two are too many, one by one in the ordinary way


def test_no_more_prompts_than_the_bound_of_tokens(monkeypatch):
    backbone = make_backbone("llama")
    real, sizes = shared_passes._together, []
    monkeypatch.setattr(shared_passes, "_together", lambda *given: sizes.append(len(given[2])) or real(*given))
    rows, prompts = make_rows("front"), make_prompts(backbone, "embedding")
    found = losses_and_gradients(backbone, [rows] * 3, prompts, micro_batch_tokens=2 * shared_length(rows))
    check(found, backbone, [rows] * 3, prompts)
    assert sizes == [2]


def test_one_alone_takes_the_ordinary_way(monkeypatch):
    backbone = make_backbone("llama")
    monkeypatch.setattr(shared_passes, "_together", lambda *given: pytest.fail("nothing is shared"))
    rows, prompts = make_rows("inside"), make_prompts(backbone, "embedding")
    check(losses_and_gradients(backbone, [rows], prompts[:1]), backbone, [rows], prompts[:1])
