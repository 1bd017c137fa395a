"""PEFT's adapter folders: `adapter_config.json` beside the same safetensors file that we write.

PEFT puts its soft tokens before everything else, BOS included, so only a prompt that stands at the front can be handed
to it. Layout as of PEFT 0.21.2; a P-tuning adapter holds what its encoder gave out, so that it reads like any other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .description import PROMPT_FILE, plain
from .errors import PromptFormatError
from .prompt import SoftPrompt, from_tokens
from .remarks import remark
from .tensorfile import TENSOR_FILE, parse_tensor, read_bytes, read_json

CONFIG_FILE = "adapter_config.json"
PICKLE_FILE = "adapter_model.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PEFT_VERSION = "0.21.2"
_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_type": "PROMPT_TUNING",
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": "CAUSAL_LM",
    "token_dim": None,
}
_PROMPT_TUNING: dict[str, Any] = {
    **_COMMON,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
_PREFIX_TUNING: dict[str, Any] = {
    **_COMMON,
    "encoder_hidden_size": None,
    "init_weights": None,
    "peft_type": "PREFIX_TUNING",
    "prefix_projection": False,
}
_P_TUNING_KEYS = {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
_KNOWN = {
    "PROMPT_TUNING": set(_PROMPT_TUNING),
    "P_TUNING": set(_COMMON) | _P_TUNING_KEYS,
    "PREFIX_TUNING": set(_PREFIX_TUNING),
    "CARTRIDGE": set(_COMMON) | {"num_frozen_tokens"},
}
READABLE = tuple(_KNOWN)
_DEEP = ("PREFIX_TUNING", "CARTRIDGE")  # [P, L * 2 * K * D], token_dim = K * D, num_attention_heads = K


def adapter_type(folder: Path) -> str | None:
    """The `peft_type` of the adapter in `folder` itself; None if there is none, "" if it cannot be told."""
    if not os.path.isfile(folder / CONFIG_FILE):
        return None
    try:
        return str(read_json(folder / CONFIG_FILE).get("peft_type", ""))
    except PromptFormatError:
        return ""


def find_adapter(folder: Path) -> Path | None:
    """The folder that holds the adapter: `folder`, or the one subfolder with one (PEFT puts adapters of another name
    than "default" there). None if there is none. Raises PromptFormatError when there are several to choose from."""
    if os.path.isfile(folder / CONFIG_FILE):
        return folder
    inside = sorted(entry for entry in folder.iterdir() if os.path.isfile(entry / CONFIG_FILE))
    found = [entry for entry in inside if not os.path.isfile(entry / PROMPT_FILE)]  # ours has its own description
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found[:8])
        raise PromptFormatError(f"{folder} holds {len(found)} adapters ({names}): name the folder of one of them")
    return found[0] if found else None


def read_adapter(folder: Path) -> SoftPrompt:
    """The soft prompt of the PEFT adapter in `folder` itself, its configuration kept in provenance["peft"].

    Of that file `trust_remote_code`, `tokenizer_kwargs` and `auto_mapping` are never acted upon.
    Raises PromptFormatError: not an adapter that is a soft prompt of a causal model, pickled, damaged.
    """
    config = read_json(folder / CONFIG_FILE)
    _check_config(config, folder / CONFIG_FILE)
    if not os.path.isfile(folder / TENSOR_FILE):
        raise _no_tensors(folder)
    vectors = parse_tensor(read_bytes(folder / TENSOR_FILE), folder / TENSOR_FILE)
    layers, heads = _deep_shape(config, folder / CONFIG_FILE) if config["peft_type"] in _DEEP else (0, 0)
    width = (config.get("token_dim") or 0) * (2 * layers if layers else 1)
    expected = [config["num_virtual_tokens"], width or vectors.shape[1]]
    if list(vectors.shape) != expected:
        raise PromptFormatError(
            f"{folder / CONFIG_FILE} speaks of {expected[0]} tokens of width {expected[1]}, but the tensor has "
            f"{vectors.shape[0]} of width {vectors.shape[1]}: the two files do not belong together"
        )
    name = config.get("base_model_name_or_path")
    return SoftPrompt(
        from_tokens(vectors, layers, heads) if layers else vectors,
        base_model=name if isinstance(name, str) else "",
        provenance={"source": "peft", "peft": _without_remote_code(config)},
    )


def _deep_shape(config: dict[str, Any], where: Path) -> tuple[int, int]:
    """Layers and key-value heads of a prefix-tuning adapter."""
    found = [config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim")]
    numbers = [n for n in found if type(n) is int and n > 0]
    if len(numbers) < 3 or numbers[2] % numbers[1]:
        raise PromptFormatError(
            f"{where} has num_layers {found[0]!r}, num_attention_heads {found[1]!r} and token_dim {found[2]!r}, "
            "expected whole numbers of which the second divides the third"
        )
    return numbers[0], numbers[1]


def adapter_config(prompt: SoftPrompt) -> dict[str, Any]:
    """What `adapter_config.json` of a prompt that stands at the front says.

    For a prompt that came from PEFT this is what it said there, less what PEFT does not know and `auto_mapping` (which
    names a module to import); otherwise the configuration of a new prompt-tuning adapter.
    """
    original = prompt.provenance.get("peft")
    if isinstance(original, dict) and _describes(original, prompt):
        kept = {key: value for key, value in original.items() if key in _KNOWN[original["peft_type"]]}
        fixed = {"auto_mapping": None, "inference_mode": True, "task_type": "CAUSAL_LM", "peft_version": PEFT_VERSION}
        return {**kept, **fixed}
    shape = prompt.provenance.get("architecture")
    shape = shape if isinstance(shape, dict) else {}
    if prompt.kind == "deep":
        return {
            **_PREFIX_TUNING,
            "base_model_name_or_path": prompt.base_model or None,
            "encoder_hidden_size": prompt.width,
            "num_attention_heads": prompt.vectors.shape[2],
            "num_layers": prompt.vectors.shape[0],
            "num_virtual_tokens": prompt.tokens,
            "token_dim": prompt.width,
        }
    return {
        **_PROMPT_TUNING,
        "base_model_name_or_path": prompt.base_model or None,
        "num_attention_heads": shape.get("num_attention_heads"),  # PEFT fills in what is null from the model
        "num_layers": shape.get("num_layers"),
        "num_virtual_tokens": prompt.tokens,
        "token_dim": prompt.width,
    }


def adapter_config_bytes(prompt: SoftPrompt) -> bytes:
    """`adapter_config(prompt)` as PEFT lays its file out."""
    return json.dumps(plain(adapter_config(prompt)), indent=2, sort_keys=True).encode()


def pickle_refusal(path: Path) -> PromptFormatError:
    """The error for a pickled file, with the two lines by which its owner can convert it."""
    target = path.parent / TENSOR_FILE
    return PromptFormatError(
        f"{path} is a pickle, which can run code when it is read: refused; if you trust it, convert it yourself:\n"
        f"  import torch; tensors = torch.load({str(path)!r}, map_location='cpu', weights_only=True)\n"
        "  import safetensors.torch; safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, "
        f"{str(target)!r}, metadata={{'format': 'pt'}})"
    )


def _check_config(config: dict[str, Any], where: Path) -> None:
    """Refuse what is not a soft prompt of a causal model; warn of what we do not know."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise PromptFormatError(
            f"{where} describes an adapter of type {kind!r}: only {', '.join(_KNOWN)} adapters can be read"
        )
    if task not in (None, "CAUSAL_LM"):
        raise PromptFormatError(
            f"{where} is for the task type {task!r}: only those of causal models (CAUSAL_LM) can be used so far"
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise PromptFormatError(
            f"{where} has prompts for {config['num_transformer_submodules']!r} models, expected 1 (causal)"
        )
    tokens, width = config.get("num_virtual_tokens"), config.get("token_dim")
    if type(tokens) is not int or (width is not None and type(width) is not int):
        raise PromptFormatError(
            f"{where} has num_virtual_tokens {tokens!r} and token_dim {width!r}, expected whole numbers"
        )
    if config.get("modules_to_save"):
        raise PromptFormatError(
            f"{where} names other trained modules ({config['modules_to_save']!r:.100}): only adapters that consist of "
            "the prompt alone can be used"
        )
    if task is None:
        remark(f"{where} names no task type: taken as the prompt of a causal model")
    unknown = sorted(set(config) - _KNOWN[kind])
    if unknown:
        remark(f"{where} has unknown keys, which are ignored: {', '.join(unknown)[:200]}")


def _no_tensors(folder: Path) -> PromptFormatError:
    pickles = sorted(name for name in os.listdir(folder) if name.endswith(PICKLES))
    if pickles:
        return pickle_refusal(folder / (PICKLE_FILE if PICKLE_FILE in pickles else pickles[0]))
    return PromptFormatError(f"{folder} has {CONFIG_FILE} but no {TENSOR_FILE}: it is half-copied, copy it again")


def _describes(original: dict[str, Any], prompt: SoftPrompt) -> bool:
    """True if PEFT's configuration is one we can write again, and for a prompt of this shape."""
    shape = (original.get("num_virtual_tokens"), original.get("token_dim"))
    if original.get("peft_type") not in _KNOWN or (original["peft_type"] in _DEEP) != (prompt.kind == "deep"):
        return False
    return shape in ((prompt.tokens, prompt.width), (prompt.tokens, None))


def _without_remote_code(config: dict[str, Any]) -> dict[str, Any]:
    arguments = config.get("tokenizer_kwargs")
    if not isinstance(arguments, dict):
        return config
    return {**config, "tokenizer_kwargs": {k: v for k, v in arguments.items() if k != "trust_remote_code"} or None}
