"""States in 8 bits: for each layer, head and token, whole numbers from -127 to 127 and one scale.

Round-to-nearest with the largest number of each D at 127 (symmetric absmax quantisation, as for activations in Dettmers
et al. 2022, arXiv:2208.07339, section 2). The error of a number is at most 1/254 of the largest of its D. A token takes
1 + 4/D bytes a number in place of 2 or 4.
"""

from __future__ import annotations

import torch

from ..attention import States


def packed(states: States) -> torch.Tensor:
    """States of one row as one tensor [2 L, 1, K, C, D]: keys of all layers, then values."""
    return torch.stack([*states.keys, *states.values]) if states.packed is None else states.packed


def encode(states: States) -> States:
    """The codes (int8 [2 L, 1, K, C, D]) and scales (float32 [2 L, 1, K, C, 1]) of states, in place of keys and values.

    What cannot be coded, because it is not finite, comes back from `decode` as not a number.
    """
    numbers = packed(states).float()
    scales = numbers.abs().amax(dim=-1, keepdim=True) / 127
    codes = (numbers / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return States([codes.nan_to_num(0.0).clamp(-127, 127).to(torch.int8)], [scales])


def decode(coded: States, dtype: torch.dtype, device: torch.device | str) -> States:
    """The states that `encode` has coded."""
    (codes,), (scales,) = coded.keys, coded.values
    return States.of_packed((codes.to(device).float() * scales.to(device)).to(dtype))
