"""What `softprompt doctor` tells: what was found on this machine, what is wrong, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import gguf_cache, machine, weights
from .text_store import folders

GIGABYTE = 1e9
SMALLEST_MEMORY = 2 * GIGABYTE  # what tuning on a model of 135 M weights takes
SMALLEST_DISK = 2 * GIGABYTE
OPTIONAL = {"gguf": "reading .gguf files: pip install 'softprompt[gguf]'", "peft": "`softprompt compare`"}


@dataclass(frozen=True)
class Fact:
    """One thing that was found. problem: what is wrong and what to do, or None."""

    name: str
    value: str
    problem: str | None = None


def doctor_facts() -> list[Fact]:
    """Everything worth knowing when something does not work. Never raises: a check that fails is itself a fact."""
    facts: list[Fact] = []
    for check in (_versions, _device, _precision, _threads, _memory, _models, _disk):
        facts += _guarded(check)
    return facts


def _guarded(check: Callable[[], Iterator[Fact]]) -> list[Fact]:
    try:
        return list(check())
    except Exception as error:  # looking at a machine must not crash, whatever is odd about it
        problem = f"this check failed: {type(error).__name__}: {error}"
        return [Fact(check.__name__.strip("_"), "unknown", problem)]


def _versions() -> Iterator[Fact]:
    from packaging.requirements import Requirement

    python = platform.python_version()
    known = (3, 10) <= tuple(int(part) for part in python.split(".")[:2]) < (3, 14)
    yield Fact("python", f"{python} ({platform.system()} {platform.machine()})", None if known else "not 3.10 to 3.13")
    try:
        yield Fact("softprompt", metadata.version("softprompt"))
        required = [Requirement(line) for line in metadata.requires("softprompt") or ()]
    except metadata.PackageNotFoundError:
        yield Fact("softprompt", "not installed, used from its source", "install it: pip install -e .")
        required = []
    for need in required:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _package(need.name, str(need.specifier), need.specifier.contains)
    for name, use in OPTIONAL.items():
        yield Fact(name, _version(name) or f"not installed; needed for {use}")


def _package(name: str, wanted: str, fits: Callable[[str], bool]) -> Fact:
    found = _version(name)
    if found is None:
        return Fact(name, "not installed", f"needed ({wanted}): pip install '{name}{wanted}'")
    return Fact(name, found, None if fits(found) else f"expected {wanted}: pip install '{name}{wanted}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[Fact]:
    device = machine.default_device()
    if device.type != "cuda":
        yield Fact("device", device.type)
        return
    free, total = torch.cuda.mem_get_info()
    sizes = f"{total / GIGABYTE:.0f} GB, {free / GIGABYTE:.0f} GB free"
    full = None if free > SMALLEST_MEMORY else "another process fills it: stop that one, or use --device cpu"
    yield Fact("device", f"cuda: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {sizes}", full)


def _precision() -> Iterator[Fact]:
    choice = machine.probe_precision()
    yield Fact("precision", f"{str(choice.dtype).removeprefix('torch.')}: {choice.reason}")


def _threads() -> Iterator[Fact]:
    found = machine.threads()
    problem = None
    if found.used > found.cores:
        problem = f"more threads than processors make each other wait: set OMP_NUM_THREADS={found.cores}"
    yield Fact("threads", f"{found.used} on {found.cores} processors", problem)


def _memory() -> Iterator[Fact]:
    found = machine.memory()
    if found.total is None:
        yield Fact("memory", "the system does not say")
        return
    free = found.total if found.available is None else found.available
    little = f"less than {SMALLEST_MEMORY / GIGABYTE:.0f} GB free: close other programs, or lower micro_batch_tokens"
    value = f"{found.total / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB free"
    yield Fact("memory", value, None if free >= SMALLEST_MEMORY else little)


def _models() -> Iterator[Fact]:
    from huggingface_hub import constants

    yield _folder_fact("hub cache", Path(constants.HF_HUB_CACHE))
    yield Fact(
        "hub", "not asked, HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "asked when a model is needed"
    )
    yield _folder_fact("own cache", gguf_cache.cache_folder())
    yield _texts()
    for alias, known in weights.ALIASES.items():
        found = weights.package_file(known.package, known.file)
        need = None if _version("gguf") else "its weights cannot be read without gguf: pip install 'softprompt[gguf]'"
        if found is None:
            yield Fact(alias, f"the package {known.package} is not installed; it comes from the hub, if at all")
        else:
            yield Fact(alias, f"{found} ({found.stat().st_size / 1e6:.0f} MB)", need)


def _texts() -> Fact:
    """The texts that are kept on disk, which are part of the own cache."""
    root = folders.texts_folder()
    kept = folders.kept_models(root)
    problem = next((f"{each.folder} {each.problem}: `softprompt cache clear`" for each in kept if each.problem), None)
    if problem:
        return Fact("kept texts", f"in {root}", problem)
    size, texts = sum(each.bytes for each in kept), sum(each.texts for each in kept)
    held, most = folders.size_in_words(size), folders.size_in_words(folders.bound(root))
    return Fact("kept texts", f"{texts:,} ({held}, at most {most}; see `softprompt cache`)")


def _folder_fact(name: str, folder: Path) -> Fact:
    """A cache folder: its size, and whether it can be written."""
    nearest = _nearest(folder)
    problem = (
        None if os.access(nearest, os.W_OK) else f"{nearest} cannot be written: change its permissions or the path"
    )
    if not folder.is_dir():
        return Fact(name, f"{folder} (not made yet)", problem)
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return Fact(name, f"{folder} ({size / 1e6:.0f} MB)", problem)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _disk() -> Iterator[Fact]:
    for name, folder in (("disk of the cache", gguf_cache.cache_folder()), ("disk of this folder", Path.cwd())):
        free = shutil.disk_usage(_nearest(folder)).free
        little = f"less than {SMALLEST_DISK / GIGABYTE:.0f} GB free: a converted model and its runs may not fit"
        yield Fact(name, f"{free / GIGABYTE:.1f} GB free", None if free >= SMALLEST_DISK else little)
