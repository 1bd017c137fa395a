"""RMS norm, gated MLP and rotary attention of a frozen model, in fewer passes over memory.

What a Llama-like model does between its matrix products is cheap to count and slow to do: left to autograd, a norm is
13 small operations and 20 more in its gradient, a rotation 10 and 20, most of them a pass over the tokens. Here each of
them is one function with its gradient written out, in fewer passes, and linear layers that read the same input
(queries, keys and values; gate and up) are one product, their weights being parts of one tensor, so that nothing is
held twice.

Only modules that are known by their parts and that give the same numbers on noise are computed so; all others keep
their own way, and so does everything outside `frozen_layers`, the plain reference above all. Weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention import joined_attention, rows_attention
from .few_rows import product

NOTED = "softprompt_noted"  # the attention that is called while a module is tried
POSITIONS = [0, 1, 5, 11]  # of the noise on which a module is tried
# Of the largest number: two right computations in half precision differ by some units of their last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 0.03


class Norm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467): [..., H] -> [..., H].

    Squares are added up in float32 at least, as transformers does.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        precise = x.to(torch.promote_types(torch.float32, x.dtype))
        rms = torch.linalg.vector_norm(precise, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        scale = torch.rsqrt(rms.square_().add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        precise = x.to(scale.dtype)
        weighted = (gradient * weight).to(scale.dtype)
        along = (weighted * precise).sum(-1, keepdim=True).mul_(scale**3 / -x.shape[-1])
        return weighted.mul_(scale).addcmul_(precise, along).to(x.dtype), None, None


class Gated(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate and up side by side: [..., 2 I] -> [..., I].

    silu(gate) is computed again in the backward pass, so I numbers a token and layer less are kept.
    """

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        of_gate, of_up = found.chunk(2, dim=-1)
        active = nn.functional.silu(gate)
        torch.mul(gradient, active, out=of_up)
        torch.mul(gradient, up, out=active)
        torch.ops.aten.silu_backward.grad_input(active, gate, grad_input=of_gate)
        return found


class Turned(torch.autograd.Function):
    """Queries, keys and values side by side, the first two turned by their tokens' positions.

    Rotary embedding (Su et al. 2021, arXiv:2104.09864) as Llama lays it out, the second half of a head beside the
    first: joined [N, J, D], of which `turned` heads are turned, and cos, sin [N, D] -> [N, J, D].
    """

    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> torch.Tensor:
        half = joined.shape[-1] // 2
        signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)[:, None]
        ctx.save_for_backward(cos[:, None], signed)
        ctx.turned = turned
        return _turn(joined, cos[:, None], signed, turned)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        back = signed.roll(signed.shape[-1] // 2, dims=-1)  # a turn's transpose
        return _turn(gradient, cos, back, ctx.turned), None, None, None


def _turn(joined: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, turned: int) -> torch.Tensor:
    found = torch.empty_like(joined)
    states, others = joined.split([turned, joined.shape[1] - turned], dim=1)
    first, rest = found.split([turned, joined.shape[1] - turned], dim=1)
    torch.mul(states, cos, out=first)
    first.addcmul_(states.roll(states.shape[-1] // 2, dims=-1), signed)
    rest.copy_(others)
    return found


@dataclass(frozen=True)
class _Known:
    """A module that is computed here. parts: its linear layers, by name, whose weights are parts of `whole`."""

    module: nn.Module
    forward: Callable[..., Any]
    parts: dict[str, nn.Linear]
    whole: nn.Linear | None = None

    def stands(self) -> bool:
        """Whether the module still has the parts it had: nothing has wrapped, replaced or moved one."""
        if self.whole is None:
            return True
        mine, first = self.module._modules, next(iter(self.parts.values()))
        same = all(mine.get(name) is part and not _hooked(part) for name, part in self.parts.items())
        return same and first.weight.data_ptr() == self.whole.weight.data_ptr()


_known: WeakKeyDictionary[nn.Module, list[_Known]] = WeakKeyDictionary()  # of each model, looked for once


@contextmanager
def frozen_layers(model: nn.Module) -> Iterator[None]:
    """Within it the modules of `model` that are known are computed as said above. For one thread at a time."""
    if not all(known.stands() for known in _known.get(model, [])):
        know_layers(model)
    before = []
    layers = _known.get(model, [])
    for known in layers:  # straight into the instance, which is quicker than nn.Module's own way of setting
        before.append(known.module.__dict__.get("forward"))
        known.module.__dict__["forward"] = known.forward
    try:
        yield
    finally:
        for known, forward in zip(layers, before, strict=True):
            if forward is None:
                del known.module.__dict__["forward"]
            else:
                known.module.__dict__["forward"] = forward


@torch.no_grad()
def know_layers(model: nn.Module) -> None:
    """Find the modules of a model that can be computed so, and let them share weights: once, when it is loaded."""
    found = _known[model] = []
    for module in model.modules():
        if any(parameter.is_meta or parameter.requires_grad for parameter in module.parameters()):
            continue  # weights that are elsewhere, or that learn
        if hasattr(module, "_hf_hook"):  # accelerate's way of bringing weights when they are needed
            continue
        for known_of in (_norm, _mlp, _attention):
            try:
                known = known_of(module, model)
            except Exception:  # whatever an unusual module does when it is tried: it keeps its own way
                continue
            if known:
                found.append(known)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    tolerance = TOLERANCE.get(theirs.dtype, HALF_TOLERANCE)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _noise(width: int, like: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(1, len(POSITIONS), width, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


def _norm(module: nn.Module, model: nn.Module) -> _Known | None:
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or not isinstance(weight, torch.Tensor):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return Norm.apply(x, module.weight, eps)

    noise = _noise(len(weight), weight)
    return _Known(module, forward, {}) if _same(forward(noise), module(noise)) else None


def _mlp(module: nn.Module, model: nn.Module) -> _Known | None:
    parts = _linear(module, ("gate_proj", "up_proj", "down_proj"))
    if not parts or set(module._modules) - set(parts) != {"act_fn"}:
        return None
    down = parts.pop("down_proj")
    whole = _whole(list(parts.values()))

    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = down(Gated.apply(product(whole, x)))
        return found

    noise = _noise(whole.in_features, whole.weight)
    if not _same(forward(noise), module(noise)):
        return None
    _share(whole, list(parts.values()))
    return _Known(module, forward, parts, whole)


def _attention(module: nn.Module, model: nn.Module) -> _Known | None:
    parts = _linear(module, ("q_proj", "k_proj", "v_proj", "o_proj"))
    rotary = getattr(getattr(model, "base_model", None), "rotary_emb", None)
    norms = set(module._modules) - set(parts)
    if not parts or norms not in (set(), {"q_norm", "k_norm"}) or rotary is None:
        return None
    out = parts.pop("o_proj")
    whole, size = _whole(list(parts.values())), int(module.head_dim)  # type: ignore[arg-type]
    heads = parts["q_proj"].out_features // size
    sizes = [heads, *[parts["k_proj"].out_features // size] * 2]
    config: Any = module.config
    asked: dict[str, Any] = {}  # what the module itself asks its attention for

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if past_key_values is not None or hidden_states.shape[0] != 1:
            raise ValueError("tokens in one line and no cache are expected here; this is a bug in softprompt")
        joined = product(whole, hidden_states[0]).unflatten(-1, (-1, size))
        if norms:
            query, key, value = joined.split(sizes, dim=1)
            joined = torch.cat([module.q_norm(query), module.k_norm(key), value], dim=1)  # type: ignore[operator]
        turned = Turned.apply(joined, position_embeddings[0][0], position_embeddings[1][0], sum(sizes[:2]))
        attend, weights = ALL_ATTENTION_FUNCTIONS[config._attn_implementation], None
        if attend is rows_attention:  # which can do without the three being cut apart
            seen = joined_attention(module, turned, heads, **{**asked, **more})
        else:
            query, key, value = turned.transpose(0, 1)[None].split(sizes, dim=1)
            seen, weights = attend(module, query, key, value, attention_mask, **{**asked, **more})
        return out(seen.reshape(1, -1, out.in_features)), weights

    noise = _noise(whole.in_features, whole.weight)
    turns = rotary(noise, torch.tensor([POSITIONS], device=noise.device))
    calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = []
    before, config._attn_implementation = config._attn_implementation, NOTED
    _notes.append(calls)
    try:
        theirs = module(hidden_states=noise, position_embeddings=turns, attention_mask=None, past_key_values=None)[0]
        asked.update(calls[0][1])
        ours = forward(noise, turns)[0]
    finally:
        config._attn_implementation = before
        _notes.pop()
    (given, of_theirs), (mine, of_mine) = calls
    if of_theirs != of_mine or not all(map(_same, (*mine, ours), (*given, theirs))):
        return None
    _share(whole, list(parts.values()))
    return _Known(module, forward, parts, whole)


_notes: list[list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]] = []


def _noted(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **asked: Any
) -> tuple[torch.Tensor, None]:
    """An attention that writes down what it is given, and gives back the queries."""
    _notes[-1].append(((query, key, value), asked))
    return query.transpose(1, 2), None


AttentionInterface.register(NOTED, _noted)


def _linear(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of a module by name; none of them if one is missing, watched or not exactly torch's own."""
    found = {name: part for name in names if type(part := module._modules.get(name)) is nn.Linear}
    return found if len(found) == len(names) and not any(map(_hooked, found.values())) else {}


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _whole(parts: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that gives what `parts` give, side by side."""
    biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "some have a bias and some have none"
    outputs = sum(part.out_features for part in parts)
    whole = nn.Linear(parts[0].in_features, outputs, bias=bool(biases), device="meta")
    whole.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if biases:
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return whole


def _share(whole: nn.Linear, parts: Sequence[nn.Linear]) -> None:
    """Let the weights of `parts` be parts of `whole`'s weight: the same bytes, held once."""
    sizes = [part.out_features for part in parts]
    for part, weight in zip(parts, whole.weight.split(sizes), strict=True):
        part.weight.data = weight
    if whole.bias is not None:
        for part, bias in zip(parts, whole.bias.split(sizes), strict=True):
            part.bias.data = bias
