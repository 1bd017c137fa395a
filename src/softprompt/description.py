"""What `softprompt.json` says about a prompt: format version 1."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import PromptFormatError, TemplateError
from .prompt import SoftPrompt
from .remarks import remark
from .templates import Template

PROMPT_FILE = "softprompt.json"
FORMAT_VERSION = 1
DEEP = "deep"  # the key with the shape of a deep prompt
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "kind": str,
    "tokens": int,
    "width": int,
    "placement": str,
    "template": (dict, type(None)),
    "labels": (dict, type(None)),
    "base_model": str,
    "fingerprint": str,
    "tokenizer_hash": str,
    "sha256": str,
    "provenance": dict,
    "metrics": dict,
}


def description_bytes(prompt: SoftPrompt, sha256: str) -> bytes:
    """The content of `softprompt.json`. Nothing in it depends on when or where it is written."""
    template = prompt.template
    labels = dict(template.labels) if template is not None and template.labels else None
    description = {
        "format_version": FORMAT_VERSION,
        "kind": prompt.kind,
        "tokens": prompt.tokens,
        "width": prompt.width,
        "placement": template.placement if template is not None else "front",
        "template": template.to_dict() if template is not None else None,
        "labels": labels,
        "base_model": prompt.base_model,
        "fingerprint": prompt.fingerprint,
        "tokenizer_hash": prompt.tokenizer_hash,
        "sha256": sha256,
        "provenance": prompt.provenance,
        "metrics": prompt.metrics,
    }
    assert set(description) == set(_KEYS)
    if prompt.kind == "deep":
        description[DEEP] = {"layers": prompt.vectors.shape[0], "key_value_heads": prompt.vectors.shape[2]}
    return (json.dumps(plain(description), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(
        errors="replace"
    )


def check_description(described: dict[str, Any], where: Path) -> None:
    """Format version first (another one may have other keys), then every key and its type."""
    version = described.get("format_version")
    if type(version) is not int or version < 1:
        raise PromptFormatError(
            f"{where} has format_version {version!r}, expected {FORMAT_VERSION}: it is not of softprompt"
        )
    if version > FORMAT_VERSION:
        raise PromptFormatError(
            f"{where} is of format version {version}, this softprompt reads up to {FORMAT_VERSION}: upgrade it "
            "(pip install -U softprompt)"
        )
    for key, kinds in _KEYS.items():
        if key not in described:
            raise PromptFormatError(f"{where} has no {key!r}: it is damaged or was not written by softprompt")
        if not isinstance(described[key], kinds):
            raise PromptFormatError(f"{where} is damaged: {key!r} is a {type(described[key]).__name__}")
    if described["kind"] not in ("embedding", "deep"):
        raise PromptFormatError(
            f"{where} is a prompt of kind {described['kind']!r}, this softprompt knows 'embedding' and 'deep': "
            "upgrade it"
        )
    if described["kind"] == "deep":
        check_deep(described.get(DEEP), described["width"], where)
    unknown = sorted(set(described) - set(_KEYS) - ({DEEP} if described["kind"] == "deep" else set()))
    if unknown:
        remark(f"{where} has unknown keys, which are ignored: {', '.join(unknown)[:200]}")


def check_deep(shape: Any, width: int, where: Path) -> tuple[int, int]:
    """Layers and key-value heads of a deep prompt whose tokens have `width` = heads * size numbers in each place."""
    found = shape if isinstance(shape, dict) else {}
    layers, heads = found.get("layers"), found.get("key_value_heads")
    if type(layers) is not int or type(heads) is not int or layers < 1 or heads < 1 or width % heads:
        raise PromptFormatError(
            f"{where} is damaged: a deep prompt of width {width} with layers {layers!r} and key_value_heads {heads!r}"
        )
    return layers, heads


def read_template(described: dict[str, Any], where: Path) -> Template | None:
    template, placement = None, "front"
    if described["template"] is not None:
        try:
            template = Template.from_dict(described["template"])
            placement = template.placement
        except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise PromptFormatError(f"{where} is damaged: its template does not hold: {error}") from error
    if described["placement"] != placement:
        raise PromptFormatError(
            f"{where} is damaged: it says that the soft tokens stand {described['placement']!r}, its template "
            f"{placement!r}"
        )
    return template


def plain(value: Any) -> Any:
    """`value` as JSON can hold it; what is not plain data becomes text, as a tuned prompt is not to be lost over it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return str(value)
