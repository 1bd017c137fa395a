"""Few rows through linear layers: another order of the same product, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softprompt import few_rows
from tiny_models import make_backbone


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, few_rows.MOST, few_rows.MOST + 1])
def test_product_and_its_gradient_are_the_layers_own(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(1, rows, 12, dtype=torch.float64, requires_grad=True)
    ours, own = few_rows.product(layer, x), layer(x)
    weight = torch.randn_like(own)
    assert ours.shape == own.shape
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, own)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_layers_are_as_they_were_afterwards_even_after_an_error(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = make_backbone("llama").model
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen = []

    def failing():
        with few_rows.few_rows_at_once(model):
            seen.extend("forward" in layer.__dict__ for layer in linear)
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        failing()
    assert seen and all(seen)
    assert not any("forward" in layer.__dict__ for layer in linear)


def test_only_torchs_own_layers_are_touched_and_only_with_several_threads(monkeypatch):
    class Wrapped(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Wrapped(4, 4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with few_rows.few_rows_at_once(model):
        assert ["forward" in layer.__dict__ for layer in model] == [True, False]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with few_rows.few_rows_at_once(model):
        assert not any("forward" in layer.__dict__ for layer in model)
