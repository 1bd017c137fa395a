"""The safetensors file of a prompt, and the JSON beside it: read with limits, nothing in them trusted.

Files come from strangers. Sizes are checked before anything is allocated, a file is read once (so that what was hashed
is what is used), and neither pickle nor any code is involved.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .errors import PromptFormatError
from .prompt import MAX_TOKENS, by_token

TENSOR_FILE = "adapter_model.safetensors"
TENSOR_NAME = "prompt_embeddings"
MAX_HEADER = 10_000_000  # bytes; a real one has about a hundred
MAX_JSON = 10_000_000  # bytes
MAX_WIDTH = 262_144  # of a deep prompt for the largest model we know of (126 layers, keys and values of 1,024)
_ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_FILE = 8 + MAX_HEADER + MAX_TOKENS * MAX_WIDTH * 8


def tensor_bytes(vectors: torch.Tensor) -> bytes:
    """The content of a safetensors file with the float32 vectors [P, H], byte for byte what PEFT writes.

    A deep prompt is written as PEFT's prefix tuning writes it, [P, L * 2 * K * D].
    """
    return safetensors.torch.save({TENSOR_NAME: by_token(vectors).contiguous()}, metadata={"format": "pt"})


def parse_tensor(data: bytes, where: Path) -> torch.Tensor:
    """The vectors [P, H] in the content `data` of the safetensors file `where`. Raises PromptFormatError."""
    _check_entry(_header(data, where), where)
    try:
        return safetensors.torch.load(data)[TENSOR_NAME]
    except Exception as error:  # whatever that library may find that our own check does not look at
        raise PromptFormatError(f"{where} is not a valid safetensors file: {error}") from error


def _header(data: bytes, where: Path) -> dict[str, Any]:
    """The entries of the header, once the sizes fit each other."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10:
        raise PromptFormatError(f"{where} has {len(data)} bytes, too few for safetensors: copy the file again")
    if length > MAX_HEADER:
        raise PromptFormatError(
            f"{where} announces a header of {length} bytes, at most {MAX_HEADER} are read: it is damaged"
        )
    if 8 + length > len(data):
        raise PromptFormatError(
            f"{where} is truncated: its header takes {8 + length} bytes, the file has {len(data)}: copy the file again"
        )
    header = parse_json(data[8 : 8 + length], where, "safetensors header")
    header.pop("__metadata__", None)
    begins = 8 + length
    for name, entry in header.items():
        end = begins + _end(name, entry, where)
        if end > len(data):
            raise PromptFormatError(
                f"{where} is truncated: tensor {name!r} ends at byte {end}, the file has {len(data)}: "
                "copy the file again"
            )
    return header


def _end(name: str, entry: Any, where: Path) -> int:
    """Where the tensor of a header entry ends, counted from the end of the header; the size must fit its shape."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise PromptFormatError(f"{where} has a damaged safetensors header: entry {name!r} is not a tensor's")
    size = _ITEM_SIZE.get(dtype)
    if size is not None and math.prod(shape) * size != end - begin:
        raise PromptFormatError(
            f"{where} has a damaged safetensors header: {name!r} is {dtype} {shape} in {end - begin} bytes"
        )
    return int(end)


def _check_entry(header: dict[str, Any], where: Path) -> None:
    """There is one tensor, of the right name, type and number of dimensions."""
    if TENSOR_NAME not in header:
        raise PromptFormatError(
            f"{where} holds no tensor {TENSOR_NAME!r}, found {_some(header)}: it is not a soft prompt"
        )
    others = [name for name in header if name != TENSOR_NAME]
    if others:
        raise PromptFormatError(
            f"{where} also holds other trained weights ({_some(others)}), without which the prompt would give wrong "
            "answers: only adapters that consist of the prompt alone can be used"
        )
    dtype, shape = header[TENSOR_NAME]["dtype"], header[TENSOR_NAME]["shape"]
    if dtype not in _ITEM_SIZE:
        raise PromptFormatError(f"{where} holds {dtype} numbers, expected one of {', '.join(_ITEM_SIZE)}")
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_TOKENS or not 1 <= shape[1] <= MAX_WIDTH:
        raise PromptFormatError(
            f"{where} holds a tensor of shape {shape}, expected [tokens, width] with 1 to {MAX_TOKENS} tokens and a "
            f"width of 1 to {MAX_WIDTH}"
        )


def _some(names: Any) -> str:
    names = list(names)
    return (
        ", ".join(repr(name)[:60] for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        or "none"
    )


def read_bytes(path: Path, limit: int = _MAX_FILE) -> bytes:
    """The content of an ordinary file of at most `limit` bytes. Raises PromptFormatError."""
    try:
        # Not a pipe or device, on which opening or reading may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PromptFormatError(f"{path} is not an ordinary file")
        with open(path, "rb") as file:
            data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    except OSError as error:
        raise PromptFormatError(f"cannot read {path}: {error.strerror or error}") from error
    if data is None or len(data) > limit:
        raise PromptFormatError(f"{path} is larger than the {limit} bytes that such a file has at most")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises PromptFormatError."""
    return parse_json(read_bytes(path, MAX_JSON), path, "JSON")


def parse_json(data: bytes, where: Path, what: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises PromptFormatError; `what` names in it what the data should have been."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PromptFormatError(f"{where} is damaged: not valid {what} ({error})") from error
    if not isinstance(value, dict):
        raise PromptFormatError(f"{where} is damaged: its {what} holds a {type(value).__name__}, expected an object")
    return value
