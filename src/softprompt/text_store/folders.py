"""The folders of the text cache: what they hold, how large they may grow, what goes first. Nothing here loads torch.

    texts/NAME-KEY/about.json               whose texts these are
    texts/NAME-KEY/HEX-COUNT.safetensors    a shard of COUNT texts

A shard's time of modification is when it was last used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import is_temporary
from ..gguf_cache import cache_folder

ABOUT = "about.json"
GIGABYTE = 1e9
MOST_GB = 20.0
SHARE = 5  # one part in so many of the disk that is free (or holds texts already)
SPARE = 500_000_000  # bytes that stay free on the disk, whatever else is allowed
STALE_SECONDS = 3600.0  # a shard is written within seconds; what is half-written for longer was left by a kill
_SHARD = re.compile(r"[0-9a-f]{12}-(\d{1,9})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """A file with texts. used: when it was last used, in seconds since 1970."""

    path: Path
    texts: int
    bytes: int
    used: float


@dataclass(frozen=True)
class Kept:
    """What is kept of one model in one precision on one kind of device. problem: what is wrong with it, or ''."""

    folder: Path
    model: str
    fingerprint: str
    precision: str
    bits: int | None
    device: str
    texts: int
    bytes: int
    shards: int
    used: float | None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the time as text."""
        used = None if self.used is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.used))
        return {**vars(self), "folder": str(self.folder), "used": used}


def size_in_words(count: int) -> str:
    """Bytes as '1.2 GB', below one GB as '34.5 MB'."""
    return f"{count / GIGABYTE:,.1f} GB" if count >= GIGABYTE else f"{1000 * count / GIGABYTE:,.1f} MB"


def texts_folder() -> Path:
    """Where texts are kept: `texts` in softprompt's cache folder ($SOFTPROMPT_CACHE or ~/.cache/softprompt)."""
    return cache_folder() / "texts"


def shards_of(folder: Path) -> list[Shard]:
    """The shards in one model's folder, those used longest ago first. Raises OSError."""
    found = []
    for entry in os.scandir(folder):
        named = _SHARD.fullmatch(entry.name)
        if named is None or not entry.is_file(follow_symlinks=False):
            continue
        try:
            facts = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # another process has just made room
            continue
        found.append(Shard(Path(entry.path), int(named[1]), facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda shard: (shard.used, shard.path))


def _folders(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            try:
                names = [each.name for each in os.scandir(entry.path)]
            except OSError:
                names = []  # whoever looks into it will say why not
            if not names or any(_ours(name) for name in names):
                yield Path(entry.path)


def _ours(name: str) -> bool:
    """Whether a file of this name is one that the cache writes."""
    return name == ABOUT or _SHARD.fullmatch(name) is not None or is_temporary(name)


def all_shards(root: Path) -> list[Shard]:
    """The shards of all models, those used longest ago first. Raises OSError."""
    found = [shard for folder in _folders(root) for shard in shards_of(folder)]
    return sorted(found, key=lambda shard: (shard.used, shard.path))


def kept_models(root: Path | None = None) -> list[Kept]:
    """What is kept, model by model, the one used last first. Looking never fails: `problem` says what is wrong."""
    root = texts_folder() if root is None else root
    try:
        found = [_kept(folder) for folder in _folders(root)]
    except OSError as error:
        return [Kept(root, "unknown", "", "", None, "", 0, 0, 0, None, f"cannot be read: {error.strerror or error}")]
    return sorted(found, key=lambda kept: (-(kept.used or 0), str(kept.folder)))


def _kept(folder: Path) -> Kept:
    about, problem = _about(folder)
    try:
        shards = shards_of(folder)
    except OSError as error:
        shards, problem = [], f"cannot be read: {error.strerror or error}"
    texts, size = sum(shard.texts for shard in shards), sum(shard.bytes for shard in shards)
    model, fingerprint, precision, device = (
        str(about.get(name) or "unknown") for name in ("model", "fingerprint", "precision", "device")
    )
    bits = about["bits"] if isinstance(about.get("bits"), int) else None
    used = max((shard.used for shard in shards), default=None)
    return Kept(folder, model, fingerprint, precision, bits, device, texts, size, len(shards), used, problem)


def _about(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        with open(folder / ABOUT, "rb") as file:
            found = json.loads(file.read(1 << 16))
    except (OSError, ValueError, RecursionError):
        found = None
    return (found, "") if isinstance(found, dict) else ({}, f"its {ABOUT} is missing or damaged")


def clear(kept: list[Kept]) -> list[Path]:
    """Remove what is kept, and of each folder nothing else; returns the folders in which something else lay, which
    stay. A run that is using it computes again. Raises OSError."""
    left = []
    for each in kept:
        for entry in list(os.scandir(each.folder)):
            if _ours(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
        if any(os.scandir(each.folder)):
            left.append(each.folder)
        else:
            each.folder.rmdir()
    return left


# --- size -----------------------------------------------------------------------------------------------------------


def free_bytes(folder: Path) -> int:
    """What is free where `folder` is, or will be. Raises OSError."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def bound(root: Path, gigabytes: float | None = None) -> int:
    """Bytes that all texts may take together: `gigabytes`, or the smaller of 20 GB and a fifth of the free disk.

    What texts take already counts as free, so that the bound does not shrink as they grow. Raises OSError.
    """
    if gigabytes is not None:
        return int(gigabytes * GIGABYTE)
    held = sum(shard.bytes for shard in all_shards(root))
    return int(min(MOST_GB * GIGABYTE, (free_bytes(root) + held) // SHARE))


def room(root: Path, most: int, used: set[Path]) -> int:
    """Bytes that could be written under the bound `most`, shards other than those in `used` making room for it."""
    shards = all_shards(root)
    mine = sum(shard.bytes for shard in shards if shard.path in used)
    others = sum(shard.bytes for shard in shards) - mine
    return max(0, min(most - mine, free_bytes(root) + others - SPARE))


def make_room(root: Path, needed: int, most: int, used: set[Path]) -> bool:
    """Remove shards used longest ago, but none in `used`, until `needed` bytes fit. False if they cannot."""
    if needed > room(root, most, used):
        return False
    shards = all_shards(root)
    held, free = sum(shard.bytes for shard in shards), free_bytes(root)
    for shard in shards:
        if held + needed <= most and free >= needed + SPARE:
            break
        if shard.path not in used:
            shard.path.unlink(missing_ok=True)
            held, free = held - shard.bytes, free + shard.bytes
            _remove_if_empty(shard.path.parent)
    return True


def _remove_if_empty(folder: Path) -> None:
    if {entry.name for entry in os.scandir(folder)} <= {ABOUT}:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have half-written in one model's folder. Raises OSError."""
    for entry in os.scandir(folder):
        try:
            if is_temporary(entry.name) and time.time() - entry.stat().st_mtime > STALE_SECONDS:
                os.unlink(entry.path)
        except (FileNotFoundError, PermissionError):  # another process was quicker, or the cache may only be read
            pass
