"""Layers written out: the numbers and gradients of the model's own, and a model that is left as it was."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from softprompt import Backbone
from softprompt.attention import Pass
from softprompt.frozen_layers import Gated, Norm, Turned, frozen_layers, know_layers
from tiny_models import ARCHITECTURES, make_backbone, make_tokenizer

# What is computed here of each architecture, a layer; the others keep their own way.
KNOWN = {
    "llama": {"RMSNorm": 2, "MLP": 1, "Attention": 1},
    "mistral": {"RMSNorm": 2, "MLP": 1, "Attention": 1},
    "qwen2": {"RMSNorm": 2, "MLP": 1, "Attention": 1},
    "qwen3": {"RMSNorm": 4, "MLP": 1, "Attention": 1},
    "gemma3": {},
    "gpt2": {},
    "opt": {},
    "bloom": {},
}


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def replaced(model):
    """The modules that are computed otherwise inside, as they are there."""
    with frozen_layers(model):
        inside = [module for module in model.modules() if "forward" in module.__dict__]
    return [type(module).__name__ for module in inside]


def test_norm_is_its_formula_and_so_is_its_gradient():
    torch.manual_seed(0)
    x, weight = noise(1, 5, 12), torch.randn(12, dtype=torch.float64)
    own = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(Norm.apply(x, weight, 1e-3), own, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: Norm.apply(x, weight, 1e-3), (x,))


def test_gated_is_its_formula_and_so_is_its_gradient():
    torch.manual_seed(0)
    both = noise(1, 5, 12)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(Gated.apply(both), gate * torch.sigmoid(gate) * up, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(Gated.apply, (both,))


def test_turned_is_its_formula_and_so_is_its_gradient():
    torch.manual_seed(0)
    joined, angles = noise(5, 4 + 2 * 2, 6), torch.randn(5, 6, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()  # the halves differ, as no model's do: the formula does not need it
    query, key, value = joined.split([4, 2, 2], dim=1)

    def turned(x):
        return x * cos[:, None] + torch.cat([-x[..., 3:], x[..., :3]], dim=-1) * sin[:, None]

    own = torch.cat([turned(query), turned(key), value], dim=1)
    torch.testing.assert_close(Turned.apply(joined, cos, sin, 4 + 2), own, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: Turned.apply(x, cos, sin, 4 + 2), (joined,))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_modules_are_known_of_each_architecture(architecture):
    backbone = make_backbone(architecture, torch.float32)
    names = replaced(backbone.model)
    for kind, count in KNOWN[architecture].items():
        last = 1 if kind == "RMSNorm" else 0  # the one after the last layer
        assert sum(name.endswith(kind) for name in names) == count * backbone.layers + last
    assert bool(names) == bool(KNOWN[architecture])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [name for name, kinds in KNOWN.items() if kinds])
def test_a_pass_and_its_gradient_are_those_of_the_models_own_layers(architecture, dtype, monkeypatch):
    backbone = make_backbone(architecture, dtype)
    torch.manual_seed(0)
    x, weight = noise(11, backbone.width, dtype=dtype), torch.randn(11, backbone.width, dtype=dtype)
    rows, positions = [4, 7], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6])

    def computed():
        hidden = backbone.hidden(x, positions, Pass(rows))
        return hidden.detach(), torch.autograd.grad((hidden * weight).sum(), x)[0]

    ours = computed()
    monkeypatch.setattr("softprompt.backbone.frozen_layers", nullcontext)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for mine, own in zip(ours, computed(), strict=True):
        assert (mine - own).abs().max() <= tolerance * own.abs().max()


def test_weights_are_held_once_and_are_the_same_bytes():
    backbone = make_backbone("qwen2", torch.float32)
    plain = type(backbone.model)(backbone.model.config)
    plain.load_state_dict(backbone.model.state_dict())
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    wrapped = Backbone(plain, make_tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.model.state_dict().items())
    mlp, attention = wrapped.model.model.layers[0].mlp, wrapped.model.model.layers[0].self_attn
    for first, second in ((mlp.gate_proj, mlp.up_proj), (attention.q_proj, attention.k_proj)):
        assert first.weight.untyped_storage().data_ptr() == second.weight.untyped_storage().data_ptr()
        assert second.weight.data_ptr() == first.weight.data_ptr() + first.weight.nbytes
    assert attention.q_proj.bias.data_ptr() + attention.q_proj.bias.nbytes == attention.k_proj.bias.data_ptr()


def test_a_saved_and_a_copied_model_are_whole(tmp_path):
    model = make_backbone("llama", torch.float32).model
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    other = copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name])


def test_outside_nothing_is_changed_even_after_an_error():
    model = make_backbone("llama", torch.float32).model
    with pytest.raises(RuntimeError, match="meanwhile"), frozen_layers(model):
        raise RuntimeError("meanwhile")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_module_that_is_wrapped_later_keeps_its_say():
    backbone = make_backbone("llama")
    row, positions = torch.randn(5, backbone.width, dtype=torch.float64), torch.arange(5)
    before = backbone.hidden(row, positions, Pass([5]))
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, backbone.model)
    backbone.model.to(torch.float64)
    found = backbone.hidden(row, positions, Pass([5]))
    own = backbone.model.model(inputs_embeds=row[None], use_cache=False).last_hidden_state[0]
    assert (found - before).abs().max() > 1e-3
    assert (found - own).abs().max() <= 1e-6 * own.abs().max()


def test_weights_that_are_exchanged_or_watched_later_are_seen():
    backbone = make_backbone("llama")
    row, positions = torch.randn(5, backbone.width, dtype=torch.float64), torch.arange(5)
    gate = backbone.model.model.layers[1].mlp.gate_proj
    gate.weight.data = gate.weight * 2
    own = backbone.model.model(inputs_embeds=row[None], use_cache=False).last_hidden_state[0]
    assert (backbone.hidden(row, positions, Pass([5])) - own).abs().max() <= 1e-6 * own.abs().max()
    seen = []
    backbone.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *given: seen.append(1))
    backbone.hidden(row, positions, Pass([5]))
    assert seen == [1]


def test_a_module_that_only_looks_known_keeps_its_own_way():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.act_fn = nn.GELU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    odd = Odd().requires_grad_(False)
    know_layers(odd)
    assert replaced(odd) == []
    odd.act_fn = nn.SiLU()
    know_layers(odd)
    assert replaced(odd) == ["Odd"]
    odd.requires_grad_(True)  # its weights learn, and would get no gradient
    know_layers(odd)
    assert replaced(odd) == []
