"""Whether a folder holds a whole causal language model, judged without loading its weights or running its code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from .errors import BackboneError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_model_folder(folder: Path, name: str = "") -> None:
    """Raise BackboneError unless `folder` holds a whole causal language model, judged without loading weights."""
    name = name or str(folder)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{name} is not a model folder: it has no config.json{_what_else(folder)}")
    if missing := missing_files(folder):
        raise BackboneError(f"the model {name} is incomplete, it lacks {', '.join(missing)}")
    _check_causal(_read_json(folder / "config.json", name), name)


def _what_else(folder: Path) -> str:
    """A hint at what a folder without config.json is, to stand behind an error."""
    if any((folder / file).is_file() for file in ("softprompt.json", "adapter_config.json")):
        return "; it looks like a prompt or adapter: give the model that it was made for, and this as the prompt"
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"; to use the GGUF file in it, give {ggufs[0]}"
    return ""


def missing_files(folder: Path) -> list[str]:
    """What a model folder lacks: configuration, tokenizer, safetensors weights (every shard, whole)."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    return missing + _missing_weights(folder)


def _missing_weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index, str(folder)).get("weight_map", {}).values()))
        return [shard for shard in shards if not _is_whole(folder / shard)]
    if _is_whole(folder / "model.safetensors"):
        return []
    if (folder / "model.safetensors").exists():
        return ["the end of model.safetensors"]
    if any(folder.glob("*.bin")):
        return ["model.safetensors (it has pickled weights, *.bin, which are not read: convert them to safetensors)"]
    return ["model.safetensors"]


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says. Reads the header only."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                return False
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False
    return bool(8 + length + max(ends, default=0) == size)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {path.name} of {name}: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"cannot read {path.name} of {name}: expected a JSON object")
    return content


def _check_causal(config: dict[str, Any], name: str) -> None:
    """Raise BackboneError unless a config.json is one of a causal language model that transformers itself knows."""
    from transformers.models.auto import modeling_auto

    causal: dict[str, Any] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind = config.get("model_type")
    classes = [str(entry) for entry in config.get("architectures") or ()]
    found = f"{name} is a {'/'.join(classes) or 'model'} (model type {kind})"
    if config.get("is_encoder_decoder"):
        raise BackboneError(f"{found}, an encoder-decoder; expected a causal language model")
    if kind not in causal and "auto_map" in config:
        raise BackboneError(f"{found} with code of its own, which is never run; expected one that transformers knows")
    if kind not in causal:
        raise BackboneError(f"{found}; expected a causal language model")
    if kind in encoders and not config.get("is_decoder"):
        raise BackboneError(f"{found}, an encoder that reads text in both directions; expected a causal language model")
    # A classifier's or an embedder's weights have no output layer: transformers would make up a random one.
    if classes and not any(entry in _class_names(causal) or entry.endswith("Model") for entry in classes):
        raise BackboneError(f"{found}, without the output layer of a causal language model; expected one with it")


def _class_names(mapping: dict[str, Any]) -> set[str]:
    values = [(value,) if isinstance(value, str) else tuple(value) for value in mapping.values()]
    return {name for names in values for name in names}
