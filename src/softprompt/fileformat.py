"""The prompt folder: `softprompt.json`, `adapter_model.safetensors`, and for a prompt at the front PEFT's file too.

Reading never unpickles, imports, downloads or runs anything. Writing replaces a folder as a whole or leaves it alone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .atomic import leftovers, write_atomic, write_folder
from .description import (
    DEEP,
    FORMAT_VERSION,
    PROMPT_FILE,
    check_deep,
    check_description,
    description_bytes,
    read_template,
)
from .errors import OutputError, PromptFormatError
from .peft_format import (
    CONFIG_FILE,
    PICKLE_FILE,
    PICKLES,
    READABLE,
    adapter_config_bytes,
    adapter_type,
    find_adapter,
    pickle_refusal,
    read_adapter,
)
from .prompt import SoftPrompt, from_tokens
from .remarks import remarks_collected
from .templates import Template
from .tensorfile import TENSOR_FILE, parse_tensor, read_bytes, read_json, tensor_bytes

__all__ = [
    "FORMAT_VERSION",
    "PROMPT_FILE",
    "check_output",
    "examine_prompt",
    "is_prompt_folder",
    "load_prompt",
    "save_prompt",
    "verify_prompt",
    "write_atomic",
]

_OURS = (PROMPT_FILE, TENSOR_FILE, CONFIG_FILE, PICKLE_FILE)


def save_prompt(prompt: SoftPrompt, folder: str | Path, overwrite: bool = False) -> Path:
    """Write `prompt` as the prompt folder `folder` and return its path.

    The folder appears, or is replaced, as a whole; what else it holds (a README) stays in it.
    Raises OutputError when it holds something that is not a prompt, or a prompt and `overwrite` is False, or when it
    cannot be written (no space, no permission): an old prompt is then still there, whole. Raises PromptFormatError when
    the template has no place for soft tokens.
    """
    check_output(folder, overwrite)
    if prompt.template is not None and prompt.template.soft_count == 0:
        raise PromptFormatError(
            "the prompt's template has no place for soft tokens: save it with the one it was tuned in"
        )
    tensor = tensor_bytes(prompt.vectors)
    files = {TENSOR_FILE: tensor, PROMPT_FILE: description_bytes(prompt, hashlib.sha256(tensor).hexdigest())}
    if is_at_front(prompt.template):
        files[CONFIG_FILE] = adapter_config_bytes(prompt)
    return write_folder(folder, files, stale=_OURS)


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Raise the OutputError that `save_prompt` would raise, as far as it can be known now (before hours of tuning)."""
    folder = Path(folder)
    try:
        held = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
    except NotADirectoryError:
        raise OutputError(f"{folder} is a file: choose another name for the prompt folder") from None
    except OSError as error:
        raise OutputError(f"cannot write the prompt folder {folder}: {error.strerror or error}") from error
    if held and not is_prompt_folder(folder):
        raise OutputError(
            f"{folder} holds something that is not a prompt ({', '.join(held[:3])}): choose another folder"
        )
    if held and not overwrite:
        raise OutputError(f"{folder} already holds a prompt: choose another folder, or allow it to be overwritten")
    above = Path(os.path.realpath(folder)).parent
    while not os.path.lexists(above):
        above = above.parent
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write the prompt folder {folder}: {above} is not a folder that one may write to")


def load_prompt(folder: str | Path) -> SoftPrompt:
    """Read a prompt folder, or a PEFT prompt-tuning, P-tuning, prefix-tuning or cartridge adapter of a causal model.

    Unknown keys are warned of and ignored. Raises PromptFormatError: not a prompt, half-written, tampered with, of
    another format version, of the wrong shape, not finite, pickled.
    """
    folder = Path(folder)
    try:
        return _load(folder)
    except OSError as error:
        raise PromptFormatError(f"cannot read {folder}: {error.strerror or error}") from error


def _load(folder: Path) -> SoftPrompt:
    if os.path.isfile(folder):
        if folder.name.endswith(PICKLES):
            raise pickle_refusal(folder)
        raise PromptFormatError(f"{folder} is a file: name the folder of the prompt, not a file in it")
    if not os.path.isdir(folder):
        raise _not_there(folder)
    if os.path.lexists(folder / PROMPT_FILE):  # whatever it is: never past it to PEFT's file, which has no checksum
        return _read_own(folder)
    adapter = find_adapter(folder)
    if adapter is not None:
        return read_adapter(adapter)
    raise _no_prompt(folder)


def verify_prompt(folder: str | Path) -> list[str]:
    """Everything that is wrong with the prompt folder, one line each; empty when it is sound. Never raises."""
    return examine_prompt(folder)[1]


def examine_prompt(folder: str | Path) -> tuple[SoftPrompt | None, list[str]]:
    """The prompt in `folder`, None if it cannot be read, and everything that is wrong with it. Never raises."""
    folder = Path(folder)
    prompt, problems = None, []
    with remarks_collected() as remarks:
        try:
            prompt = load_prompt(folder)
            if os.path.isfile(folder / PROMPT_FILE):
                problems += _peft_problems(prompt, folder)
        except PromptFormatError as error:
            problems.append(str(error))
    return prompt, [*problems, *remarks]


def is_prompt_folder(path: str | Path) -> bool:
    """True if `path` is a folder that says it holds a prompt, ours or PEFT's, be it whole or broken."""
    path = Path(path)
    return os.path.isfile(path / PROMPT_FILE) or adapter_type(path) in READABLE


def is_at_front(template: Template | None) -> bool:
    """True if all soft tokens stand before everything else, which is the only place that PEFT knows."""
    return template is None or template.placement == "front"


def _read_own(folder: Path) -> SoftPrompt:
    where = folder / PROMPT_FILE
    described = read_json(where)
    check_description(described, where)
    if not os.path.isfile(folder / TENSOR_FILE):
        raise PromptFormatError(f"{folder} has {PROMPT_FILE} but no {TENSOR_FILE}: it is half-copied, copy it again")
    data = read_bytes(folder / TENSOR_FILE)
    vectors = parse_tensor(data, folder / TENSOR_FILE)
    expected = [described["tokens"], described["width"]]
    layers, heads = 0, 0
    if described["kind"] == "deep":
        layers, heads = check_deep(described[DEEP], described["width"], where)
        expected[1] *= layers * 2
    if list(vectors.shape) != expected:
        raise PromptFormatError(
            f"{where} speaks of a tensor of shape {expected}, {TENSOR_FILE} holds {list(vectors.shape)}"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != described["sha256"]:
        raise PromptFormatError(
            f"{folder / TENSOR_FILE} was changed after the prompt was saved (sha256 {found[:12]}..., not "
            f"{described['sha256'][:12]}...): take the prompt from where it came from again"
        )
    return SoftPrompt(
        from_tokens(vectors, layers, heads) if layers else vectors,
        template=read_template(described, where),
        **{key: described[key] for key in ("base_model", "fingerprint", "tokenizer_hash", "provenance", "metrics")},
    )


def _peft_problems(prompt: SoftPrompt, folder: Path) -> list[str]:
    """What PEFT would read wrongly, or not at all, from a folder that we read well."""
    where = folder / CONFIG_FILE
    if not is_at_front(prompt.template):
        return [f"{where} must not be there: PEFT would put the prompt at the front"] if os.path.exists(where) else []
    if not os.path.exists(where):
        return [f"{where} is missing, so PEFT cannot load the prompt: save it again"]
    try:
        read_adapter(folder)
    except PromptFormatError as error:
        return [str(error)]
    return []


def _no_prompt(folder: Path) -> PromptFormatError:
    """The error for a folder with neither our description nor PEFT's."""
    names = sorted(os.listdir(folder))
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and TENSOR_FILE not in names and "config.json" not in names:  # that one is in a model's folder
        return pickle_refusal(folder / pickles[0])
    prompts = [name for name in names if is_prompt_folder(folder / name)]
    if prompts:
        return PromptFormatError(f"{folder} is a folder of prompts ({', '.join(prompts[:8])}): name one of them")
    half = "it is half-copied: " if TENSOR_FILE in names else ""
    return PromptFormatError(
        f"{folder} is not a prompt folder: {half}it holds neither {PROMPT_FILE} nor {CONFIG_FILE}, "
        f"found {', '.join(names[:5]) or 'nothing'}"
    )


def _not_there(folder: Path) -> PromptFormatError:
    old = leftovers(folder)
    if old:
        return PromptFormatError(
            f"no folder {folder}, but an interrupted save left its old version: rename {old[-1]} to it"
        )
    hub = "" if folder.is_absolute() or len(folder.parts) != 2 else "; an adapter on a hub is to be downloaded first"
    return PromptFormatError(f"no prompt folder {folder}{hub}")
