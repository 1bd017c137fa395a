"""A GGUF model as plain parts: metadata and tensors, read from a file and written to one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackboneError, OutputError

Value = tuple[Any, Any, Any]  # value, its type, the type of an array's items (or None)


@dataclass
class Source:
    """architecture: llama.cpp's name of it. fields: key -> value with types, in order. tensors: name -> (data, type).

    data: as the `gguf` package holds it, rows first; bytes for packed types.
    """

    architecture: str
    fields: dict[str, Value]
    tensors: dict[str, tuple[np.ndarray[Any, Any], Any]]

    def value(self, key: str, default: Any = None) -> Any:
        return self.fields[key][0] if key in self.fields else default

    def set(self, key: str, value: Any, kind: Any, item: Any = None) -> None:
        self.fields[key] = (value, kind, item)

    def rows(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as float32 [rows, ...]. Raises BackboneError for a type that the package cannot unpack."""
        gguf = need_gguf()
        data, kind = self.tensors[name]
        try:
            unpacked: np.ndarray[Any, Any] = gguf.quants.dequantize(np.ascontiguousarray(data), kind)
        except NotImplementedError as error:
            raise BackboneError(f"{name} is packed as {kind.name}, which the package gguf cannot unpack") from error
        return unpacked


def need_gguf() -> Any:
    """The package gguf, or BackboneError with the line that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise BackboneError("GGUF files need the package gguf: pip install 'softprompt[gguf]'") from error
    return gguf


def read_gguf(path: Path) -> Source:
    """All of a GGUF file; tensors stay on the disk until they are used. Raises BackboneError."""
    gguf = need_gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BackboneError(f"cannot read {path} as GGUF: {error}") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise BackboneError(f"{path} is a big-endian GGUF file; convert it first (gguf-convert-endian)")
    fields: dict[str, Value] = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        item = field.types[-1] if len(field.types) > 1 else None
        fields[key] = (field.contents(), field.types[0], item)
    if int((fields.get("split.count") or (0, 0, 0))[0]) > 1:
        raise BackboneError(f"{path} is one of several parts; join them first (llama-gguf-split --merge)")
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return Source(str(fields["general.architecture"][0]), fields, tensors)


def write_gguf(source: Source, path: Path) -> None:
    """Write all of `source` to the file `path`."""
    gguf = need_gguf()
    try:
        writer = gguf.GGUFWriter(path, source.architecture)
        writer.data_alignment = int(source.value("general.alignment", writer.data_alignment))
        array = gguf.GGUFValueType.ARRAY
        for key, (value, kind, item) in source.fields.items():
            if key != "general.architecture" and not (kind == array and len(value) == 0):
                writer.add_key_value(key, value, kind, sub_type=item)
        for name, (data, kind) in source.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def packed(rows: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any] | None:
    """float32 rows in the type `kind`; None where the package cannot do that."""
    gguf = need_gguf()
    try:
        data: np.ndarray[Any, Any] = gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), kind)
    except (NotImplementedError, ValueError):
        return None
    return data


def is_plain(kind: Any) -> bool:
    """Whether a type holds numbers as they are, and not in blocks of a common scale."""
    return re.fullmatch(r"B?F\d+", kind.name) is not None
