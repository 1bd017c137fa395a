"""What is learned: the vectors themselves, or a small network that gives them and is folded away at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class PromptParameters(nn.Module):
    """The trainable parameters behind a soft prompt; `vectors()` gives the prompt [P, H] with its graph."""

    def __init__(self, initial: torch.Tensor):
        super().__init__()
        self.embedding = nn.Parameter(initial.detach().clone().float())  # [P, H]

    def vectors(self) -> torch.Tensor:
        return self.embedding

    def guard(self, limit: float) -> None:
        """Embedding prompts move freely."""


class ResidualPromptParameters(PromptParameters):
    """vectors = e + LayerNorm(up(relu(down(e)))), as in Razdaibiedina et al. 2023 (arXiv:2305.03937), equation 3.

    One network is shared by all soft tokens. Its last scale starts at zero, so that training starts at the initialiser.
    """

    def __init__(self, initial: torch.Tensor, bottleneck: int, unit: float, seed: int):
        super().__init__(initial)
        width = initial.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.unit = unit  # RMS of the embedding table: the network works on numbers of size one
        self.down = nn.Parameter(torch.randn(width, bottleneck, generator=generator) * width**-0.5)
        self.up = nn.Parameter(torch.randn(bottleneck, width, generator=generator) * bottleneck**-0.5)
        self.scale = nn.Parameter(torch.zeros(width))

    def vectors(self) -> torch.Tensor:
        inner = torch.relu(self.embedding / self.unit @ self.down) @ self.up  # [P, H]
        normed = nn.functional.layer_norm(inner, inner.shape[-1:])
        return self.embedding + self.unit * self.scale * normed

    def network(self) -> Iterator[nn.Parameter]:
        yield from (self.down, self.up, self.scale)


# How far a deep prompt's keys and values go for one learning rate, in units of their RMS. Keys that move fast saturate
# the attention and are lost for many steps; values may, and must, move much faster. By sweeps, docs/log.md.
KEYS, VALUES = 0.6, 8.0


class DeepPromptParameters(nn.Module):
    """A deep prompt [L, 2, K, P, D] as its start plus what is learned, in units of its size in each place.

    Keys are many times larger than values and both grow with depth, so one learning rate serves only numbers that
    are all of one size: the unit is the RMS of `sizes`, a deep prompt of a text (by default the start itself), over
    the tokens of a layer's keys, or values, times KEYS or VALUES. The first `sink` tokens never move: much of every
    query's attention rests on the first token of a sequence, whatever it is (Xiao et al. 2024, arXiv:2309.17453).
    """

    def __init__(self, initial: torch.Tensor, sink: int, sizes: torch.Tensor | None = None):
        super().__init__()
        sizes = initial if sizes is None else sizes
        self.delta = nn.Parameter(torch.zeros_like(initial, dtype=torch.float32))
        learned = sizes[:, :, :, sink:] if sizes.shape[3] > sink else sizes
        unit = learned.float().square().mean(dim=(2, 3, 4), keepdim=True).sqrt().clamp(min=1e-6)  # [L, 2, 1, 1, 1]
        unit = unit * torch.tensor([KEYS, VALUES]).view(1, 2, 1, 1, 1)
        free = torch.ones(initial.shape[3], 1)
        free[:sink] = 0
        self.initial = initial.detach().clone().float()
        self.scale = unit * free  # [L, 2, 1, P, 1]

    def vectors(self) -> torch.Tensor:
        return self.initial + self.scale * self.delta

    def guard(self, limit: float) -> None:
        """Bring each token's keys, and values, of a head back to at most `limit` (RMS) from their start; 0: nothing.

        A step that is too large then ends at the edge of a ball in which the model still works, and the run recovers
        as the learning rate decays; without it such a prompt silences its text and has no gradient left to return by.
        """
        if limit:
            with torch.no_grad():
                moved = self.delta.square().mean(dim=-1, keepdim=True).sqrt()  # [L, 2, K, P, 1]
                self.delta.mul_((limit / moved).clamp(max=1))


Parameters = PromptParameters | DeepPromptParameters


def make_parameters(
    initial: torch.Tensor,
    reparametrisation: str,
    unit: float,
    seed: int,
    sink: int = 0,
    sizes: torch.Tensor | None = None,
) -> Parameters:
    """`none`: the vectors. `residual`: through a network with a bottleneck of 128. sink, sizes: of a deep prompt."""
    if initial.ndim == 5:
        return DeepPromptParameters(initial, sink, sizes)
    if reparametrisation == "residual":
        return ResidualPromptParameters(initial, min(128, initial.shape[1]), unit, seed)
    return PromptParameters(initial)


def make_optimizer(
    parameters: Parameters, name: str, learning_rate: float, weight_decay: float, unit: float
) -> torch.optim.Optimizer:
    """AdamW or Adafactor with a learning rate in units of the embedding table's RMS.

    Adam moves each number by about its learning rate, so for the vectors it is multiplied by the RMS; the residual
    network and a deep prompt work on numbers of size one and are not. torch's Adafactor multiplies it with the RMS of
    each parameter itself, which is right for vectors; what begins at zero would never leave it, so there the RMS counts
    as at least one.
    """
    deep = isinstance(parameters, DeepPromptParameters)
    learned, unit = (parameters.delta, 1.0) if deep else (parameters.embedding, unit)
    network = list(parameters.network()) if isinstance(parameters, ResidualPromptParameters) else []
    adam = name == "adamw"
    groups: list[dict[str, Any]] = [{"params": [learned], "lr": learning_rate * (unit if adam else 1.0)}]
    if network:
        groups.append({"params": network, "lr": learning_rate * 0.1})
    if adam:
        return torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=False)
    for group, least in zip(groups, (1.0 if deep else 1e-3, 1.0)):
        group["eps"] = (None, least)
    return torch.optim.Adafactor(groups, weight_decay=weight_decay)
