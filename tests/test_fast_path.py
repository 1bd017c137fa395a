"""Which models are computed in one line: decided by trying, in any precision, and told once."""

from __future__ import annotations

import pytest
import torch

from softprompt.backbone import Backbone
from softprompt.computation import loss_and_gradient
from softprompt.errors import BackboneError
from tiny_models import ARCHITECTURES, FAST, make_backbone, make_rows, random_vectors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_precision_does_not_change_the_decision(architecture, dtype):
    backbone = make_backbone(architecture, dtype)
    assert backbone.fast == (architecture in FAST), backbone.why_plain


def test_bfloat16_gives_float32s_gradient_up_to_rounding():
    rows, gradients = make_rows("front"), []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = make_backbone("llama", dtype)
        gradients.append(loss_and_gradient(backbone, rows, random_vectors(backbone).float()).gradient)
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.98


def break_model(backbone: Backbone) -> None:
    """Let a layer mix neighbouring tokens, as convolutions and state-space layers do."""
    mlp = backbone.model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def test_layers_that_mix_tokens_are_noticed_and_told_once():
    said: list[str] = []
    backbone = make_backbone("llama", torch.float32)
    backbone._report = said.append
    break_model(backbone)
    assert not backbone.fast and not backbone.fast
    assert len(said) == 1 and "computed plainly" in said[0] and "mix tokens" in said[0]


def test_a_window_that_only_the_mask_knows_is_noticed():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, max_position_embeddings=256,
        shared_expert_intermediate_size=64, use_sliding_window=True, sliding_window=40, max_window_layers=2,
    )  # fmt: skip
    assert not Backbone(hf.Qwen2MoeForCausalLM(config), None).fast


def test_a_model_that_reads_in_both_directions_is_refused():
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    backbone = Backbone(hf.BertLMHeadModel(config), None, "bert")
    with pytest.raises(BackboneError, match=r"bert \(BertLMHeadModel\) is not a causal model"):
        _ = backbone.fast


def test_unknown_kinds_of_layers_are_not_even_tried(monkeypatch):
    monkeypatch.setattr("softprompt.fast_path.sees_the_future", lambda backbone: False)  # the model cannot run
    backbone = make_backbone("qwen2", torch.float32)
    backbone.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not backbone.fast and "linear_attention" in backbone.why_plain


def test_a_small_copy_leaves_the_model_and_the_random_state_alone():
    backbone = make_backbone("mistral", torch.bfloat16)
    config, state = backbone.model.config.to_dict(), torch.random.get_rng_state()
    assert backbone.fast
    assert backbone.model.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)
