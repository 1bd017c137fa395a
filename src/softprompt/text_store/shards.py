"""The files with texts of one model: found by what they were computed from, read as memory maps, checked, written.

A shard is a safetensors file with one entry for each text, named by a hash of its token ids and by the token at which
its states begin. It says whose it is and holds a checksum of every entry, so that a damaged or foreign file is found
and its texts are computed anew. The checksum is against accidents: whoever can write into the cache of a user can also
write checksums. Reading runs no code, whatever a file holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..atomic import output_error, temporary_sibling, write_atomic
from ..attention import States
from ..backbone import Backbone
from . import folders

FORMAT = "softprompt texts 1"
SAMPLE = 256  # numbers of each parameter that tell one model from another
NAME = re.compile(r"([0-9a-f]{32})\.(\d{1,9})")
# What differs between copies of one model, or does not change what it computes.
INCIDENTAL = (
    *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("_attn_implementation", "attn_implementation", "use_cache"),
)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Owner:
    """Whose states they are. key: of all that they depend on besides the text, 16 hex digits. shape: (L, K, D)."""

    key: str
    model: str
    fingerprint: str
    dtype: torch.dtype
    device: str
    bits: int | None
    shape: tuple[int, int, int]

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def folder(self, root: Path) -> Path:
        name = re.sub(r"[^a-z0-9.]+", "-", self.model.lower().rstrip("/").rpartition("/")[2])[:40].strip("-.")
        return root / f"{name or 'model'}-{self.key}"

    def about(self) -> dict[str, Any]:
        names = ("key", "model", "fingerprint", "precision", "device", "bits")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}}


def owner_of(backbone: Backbone, bits: int | None = None) -> Owner:
    """Whose states those of `backbone` are. Raises BackboneError: layers whose states differ in shape.

    Of more weights than the fingerprint has, in their own precision, with the whole configuration and the version of
    transformers: states are used without a further look, so that a model which differs at all must not meet them.
    """
    import transformers

    config = {name: value for name, value in backbone.text_config.to_dict().items() if name not in INCIDENTAL}
    known = [FORMAT, transformers.__version__, backbone.fingerprint, str(backbone.dtype), backbone.device.type, bits]
    digest = hashlib.sha256(json.dumps([*known, config], sort_keys=True, default=str).encode())
    for name, parameter in sorted(backbone.model.named_parameters()):
        flat = parameter.detach().flatten()
        count = min(SAMPLE, flat.numel())
        index = torch.arange(count, device=flat.device) * max(0, flat.numel() - 1) // max(1, count - 1)
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + _bytes(flat[index].cpu()))
    return Owner(
        digest.hexdigest()[:16],
        backbone.name,
        backbone.fingerprint,
        backbone.dtype,
        backbone.device.type,
        bits,
        backbone.state_shape,
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they lie in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of(ids: Ids) -> str:
    """32 hex digits that stand for a text with everything before it."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest()


class Shards:
    """The shards of one model in a folder. say: called with a line when something is wrong, once for each thing.

    Raises OSError where the folder cannot be read; afterwards nothing raises but `write`.
    """

    def __init__(self, root: Path, owner: Owner, say: Callable[[str], None], gigabytes: float | None = None):
        self.root, self.owner, self.say = root, owner, say
        self.folder = owner.folder(root)
        self.most = folders.bound(root, gigabytes)
        self.used: set[Path] = set()  # by this process: they make no room for others
        self._index: dict[str, list[tuple[int, Path]]] = {}  # hash of a text -> first tokens, and where they lie
        self._open: dict[Path, Any] = {}
        self._checks: dict[Path, dict[str, int]] = {}
        self._sound: set[tuple[Path, str]] = set()
        self._said: set[str] = set()
        if self.folder.is_dir():
            folders.remove_leftovers(self.folder)
            for shard in folders.shards_of(self.folder):
                self._look_into(shard.path)

    def __contains__(self, text: tuple[int, Ids]) -> bool:
        return self._find(*text) is not None

    @property
    def room(self) -> int:
        """Bytes that can be written, others' shards making room."""
        try:
            return folders.room(self.root, self.most, self.used)
        except OSError:
            return 0

    def get(self, start: int, ids: Ids) -> States | None:
        """The states of ids[start:], parts of the mapped file; None if they are not there or damaged.

        With 8 bits: codes and scales (see eight_bit.py).
        """
        found = self._find(start, ids)
        if found is None:
            return None
        first, path, name = found
        tensors = self._read(path, name, len(ids) - first)
        if tensors is None:
            return None
        cut = [tensor[:, :, :, start - first :] for tensor in tensors]
        return States.of_packed(cut[0]) if self.owner.bits is None else States([cut[0]], [cut[1]])

    def write(self, texts: Sequence[tuple[int, Ids, Sequence[torch.Tensor]]]) -> None:
        """Write a shard of texts: first token, ids, and the tensors that `get` gives back.

        Under a temporary name, renamed. Not forced to the disk: what a crash of the machine spoils fails its check.
        Raises OutputError: no space, not allowed.
        """
        tensors: dict[str, torch.Tensor] = {}
        for start, ids, parts in texts:
            name = f"{digest_of(ids)}.{start}"
            tensors |= {f"{name}.{number}": part.cpu().contiguous() for number, part in enumerate(parts)}
        checks = {name: zlib.crc32(_bytes(tensor)) for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "key": self.owner.key, "checks": json.dumps(checks)}
        path = self.folder / f"{secrets.token_hex(6)}-{len(texts)}.safetensors"
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if not folders.make_room(self.root, size, self.most, self.used):
                raise OSError(28, "no space left within the bound of the cache")  # ENOSPC
            _make(self.folder)
            _write(path, safetensors.torch.save(tensors, metadata=metadata))
            if not (self.folder / folders.ABOUT).exists():
                write_atomic(self.folder / folders.ABOUT, json.dumps(self.owner.about(), indent=2).encode())
        except OSError as error:
            raise output_error(path, error, size) from error
        self._look_into(path)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _find(self, start: int, ids: Ids) -> tuple[int, Path, str] | None:
        """Where the states of ids[start:] lie, perhaps with those of tokens before `start`."""
        digest = digest_of(ids)
        for first, path in self._index.get(digest, ()):
            if first <= start:
                return first, path, f"{digest}.{first}"
        return None

    def _look_into(self, path: Path) -> None:
        """Add what a shard holds to the index. A damaged one is removed, one of another model left alone."""
        try:
            with safe_open(path, framework="pt") as file:
                about, names = file.metadata() or {}, list(file.keys())
            checks = json.loads(about.get("checks", "{}"))
            if not isinstance(checks, dict):
                raise ValueError("no checksums")
        except FileNotFoundError:  # another process has just made room
            return
        except (SafetensorError, ValueError, RecursionError) as error:
            self._damaged(path, str(error))
            return
        except OSError as error:
            self._say_once("unreadable", f"{path} cannot be read ({error.strerror or error})")
            return
        if about.get("format") != FORMAT or about.get("key") != self.owner.key:
            self._say_once(
                "foreign",
                f"{path} holds texts of another model or another version, and is not used; "
                "`softprompt cache clear` removes it",
            )
            return
        self._checks[path] = checks
        for name in {name.rpartition(".")[0] for name in names}:
            if named := NAME.fullmatch(name):
                self._index.setdefault(named[1], []).append((int(named[2]), path))

    def _read(self, path: Path, name: str, tokens: int) -> list[torch.Tensor] | None:
        """The tensors of an entry, checked when first read."""
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
                self.used.add(path)
                with contextlib.suppress(OSError):  # a cache that may only be read is used all the same
                    os.utime(path)
            found = [self._open[path].get_tensor(f"{name}.{number}") for number in range(len(self._shapes(tokens)))]
        except (SafetensorError, OSError) as error:
            self._forget(path)
            if not isinstance(error, FileNotFoundError):
                self._damaged(path, str(error))
            return None
        if (path, name) not in self._sound:
            if not self._is_sound(path, name, found, tokens):
                self._damaged(path, "its content is not what was written")
                return None
            self._sound.add((path, name))
        return found

    def _shapes(self, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        layers, heads, size = self.owner.shape
        whole = (2 * layers, 1, heads, tokens)
        if self.owner.bits is None:
            return [((*whole, size), self.owner.dtype)]
        return [((*whole, size), torch.int8), ((*whole, 1), torch.float32)]

    def _is_sound(self, path: Path, name: str, found: list[torch.Tensor], tokens: int) -> bool:
        if [(tuple(tensor.shape), tensor.dtype) for tensor in found] != self._shapes(tokens):
            return False
        checks = self._checks[path]
        return all(zlib.crc32(_bytes(t)) == checks.get(f"{name}.{number}") for number, t in enumerate(found))

    def _damaged(self, path: Path, why: str) -> None:
        self._forget(path)
        with contextlib.suppress(OSError):
            path.unlink()
        self._say_once(
            "damaged",
            f"{path} is damaged ({why}) and was removed; its texts are computed again, and so are those of other "
            "files like it",
        )

    def _forget(self, path: Path) -> None:
        self._open.pop(path, None)
        self.used.discard(path)
        for digest, places in list(self._index.items()):
            left = [place for place in places if place[1] != path]
            if left:
                self._index[digest] = left
            else:
                del self._index[digest]

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(text)


def _make(folder: Path) -> None:
    """Make a folder that only its owner can read: texts can be guessed from their states."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, data: bytes) -> None:
    temporary = temporary_sibling(path, "new")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
