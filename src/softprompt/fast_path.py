"""Whether a model may be computed with rows in one line: found out by trying, never assumed.

Whether tokens mix only in the attention function that attention.py replaces is a question of structure and not
of its weights. In float32 and float64 the model itself is asked. In lower precision the answer would drown in rounding
(two right computations of SmolLM2-135M in bfloat16 differ by 4 % of the largest logit, and on some inputs by 80 %), so
there a small float32 model of the same class and configuration is asked instead.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from .attention import Pass, UnsupportedAttentionError

if TYPE_CHECKING:
    from .backbone import Backbone

# Layer types whose only mixing of tokens is the attention function.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
SHARED, LENGTHS = 3, (4, 7, 5)
# What our own attention raises, and what models raise that do not call it as expected.
EXPECTED = (UnsupportedAttentionError, TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError)


def why_not_in_line(backbone: Backbone) -> str:
    """Empty if rows in one line give what the plain model gives, else the reason, in words."""
    strange = set(getattr(backbone.text_config, "layer_types", None) or ()) - KNOWN_LAYERS
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}"
    if backbone.dtype in (torch.float32, torch.float64):
        found = _compare(backbone)
        # A window longer than the rows that are tried shows only in a model with a short one.
        if found or not getattr(backbone.text_config, "sliding_window", None):
            return found
    elif not _head_is_right(backbone):
        return "its logits are not its output layer's"
    try:
        small = _small_copy(backbone)
    except Exception as error:  # whatever an unusual configuration does
        return f"no small model of its kind could be made to try it on: {str(error) or type(error).__name__}"
    return _compare(small)


@torch.no_grad()
def _compare(backbone: Backbone) -> str:
    """Logits of rows of noise behind a shared beginning, in one line and plainly, in float32 or float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHARED + sum(LENGTHS), backbone.width, generator=generator) * max(backbone.embedding_rms, 1e-6)
    noise = noise.to(backbone.device, backbone.dtype)
    try:
        ours = _in_line(backbone, noise)
    except EXPECTED as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    tolerance = 1e-6 if backbone.dtype == torch.float64 else 1e-3
    for piece, logits in zip(noise[SHARED:].split(LENGTHS), ours, strict=True):
        theirs = _plainly(backbone, torch.cat([noise[:SHARED], piece]))[SHARED:]
        if not (theirs - logits).abs().max() <= tolerance * (theirs - theirs.mean()).abs().max():  # NaN is no
            return "its layers mix tokens in a way that shared states do not give"
    return ""


def _in_line(backbone: Backbone, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = Pass([SHARED], record=True, device=backbone.device)
    backbone.hidden(noise[:SHARED], torch.arange(SHARED, device=backbone.device), first)
    rows = Pass(LENGTHS, [first.states()], device=backbone.device)
    positions = torch.cat([torch.arange(SHARED, SHARED + n) for n in LENGTHS]).to(backbone.device)
    logits = backbone.head(backbone.hidden(noise[SHARED:], positions, rows))
    return tuple(logits.split(LENGTHS))


def _plainly(backbone: Backbone, row: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(1, len(row), dtype=torch.long, device=backbone.device)
    positions = torch.arange(len(row), device=backbone.device)[None]
    return backbone.plain_logits(row[None], mask, positions)[0]


@torch.no_grad()
def sees_the_future(backbone: Backbone) -> bool:
    """Whether a token changes the logits before it, as in models that read in both directions."""
    ids = torch.arange(3, 8, device=backbone.device) % backbone.vocab_size
    other = ids.clone()
    other[-1] = (ids[-1] + 7) % backbone.vocab_size
    one, two = (_plainly(backbone, backbone.embed(given))[:-1] for given in (ids, other))
    return bool((one - two).abs().max() > 1e-4 * (one - one.mean()).abs().max())


@torch.no_grad()
def _head_is_right(backbone: Backbone) -> bool:
    """Whether the output layer applied to the model's last hidden states gives the model's logits."""
    ids = torch.arange(8, device=backbone.device) % backbone.vocab_size
    row = backbone.embed(ids)
    theirs = _plainly(backbone, row)
    ours = backbone.head(backbone.model.base_model(inputs_embeds=row[None], use_cache=False).last_hidden_state[0])
    return bool((theirs - ours).abs().max() <= 0.02 * theirs.abs().max())


def _small_copy(backbone: Backbone) -> Backbone:
    """A random float32 model of the same class on the CPU: few layers (all types), a small vocabulary and MLP."""
    from .backbone import Backbone

    config = copy.deepcopy(backbone.text_config)
    types = getattr(config, "layer_types", None)
    layers = 2 if not types else max(2, *(types.index(kind) + 1 for kind in set(types)))
    small: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": 64, "dtype": torch.float32}
    small |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    small |= {key: 64 for key in ("intermediate_size", "moe_intermediate_size") if getattr(config, key, None)}
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = 6  # shorter than the rows that are tried, so that it matters
    if types:
        small["layer_types"] = list(types)[:layers]
    for key, value in small.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(backbone.model)(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)  # attention far from uniform, so that a wrong mask shows
    return Backbone(model, backbone.tokenizer, backbone.name)
