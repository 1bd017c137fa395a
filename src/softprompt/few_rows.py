"""Matrix products of few rows with frozen weights, on a CPU with several threads.

A step that writes one token for each of 16 requests multiplies 16 rows with every weight. torch asks its BLAS for
`x @ W.T`, which shares work among threads badly when x is short: `(W @ x.T).T` is the same product, needs no copy of
anything, and takes a fifth to a third less time up to about a hundred rows (docs/log.md has the figures). With one
thread, or more rows, nothing is gained; in half precision, where another library multiplies, nothing below about 24
rows, where it takes up to twice the time. The result lies transposed in memory: logits, which are searched row by row
afterwards, are better computed in the ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

FEWEST, FEWEST_HALF, MOST = 2, 24, 96  # rows between which it is the faster way
_layers: WeakKeyDictionary[nn.Module, list[nn.Linear]] = WeakKeyDictionary()  # of each model, looked for once


@contextmanager
def few_rows_at_once(model: nn.Module) -> Iterator[None]:
    """Within it the linear layers of `model` take few rows by `product`. For one thread at a time.

    Only layers that are exactly torch's own are touched, so whatever wraps or replaces one keeps its say.
    """
    layers = _linear_layers(model) if _gains(model) else []
    for layer in layers:  # straight into the instance: nn.Module's own way of setting costs more than some products
        layer.__dict__["forward"] = functools.partial(product, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What `layer` gives for x: [..., I] -> [..., O]."""
    rows = x.numel() // x.shape[-1]
    fewest = FEWEST_HALF if x.element_size() < 4 else FEWEST
    if x.device.type != "cpu" or not fewest <= rows <= MOST or torch.get_num_threads() == 1:
        return nn.functional.linear(x, layer.weight, layer.bias)
    found = (layer.weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
    return found if layer.bias is None else found + layer.bias


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Kept, since a walk through a model takes as long as one of its products. Layers that come later go plainly."""
    if model not in _layers:
        _layers[model] = [module for module in model.modules() if type(module) is nn.Linear]
    return _layers[model]


def _gains(model: nn.Module) -> bool:
    return torch.get_num_threads() > 1 and next(model.parameters()).device.type == "cpu"
