"""Turn a GGUF file into an ordinary model folder, once, and keep it under the hash of the file's content."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BackboneError
from .model_folder import check_model_folder, missing_files

Report = Callable[[str], None]

VERSION = 1  # of the way of converting: raised when the same file is to be converted anew
BYTES_A_WEIGHT = 4  # float32
# Texts whose tokens have to be the same before and after: words, digits, code, spaces, other scripts, special tokens.
PROBES = (
    "Hello world, it's 2026 and 3.14159 isn't 22/7.",
    "  two spaces,\ttab,\n\nnew lines \r\n and trailing  ",
    "def f(x):\n    return {'a': [x ** 2, None]}\n",
    "Ünïcödé, 中文字符, العربية, русский, 👩‍👩‍👧 ½ № e\u0301",
    "<s>[INST] <|im_start|>user\nhi<|im_end|>\n<|endoftext|></s><bos><eos>",
)


def cache_folder() -> Path:
    """Where converted models are kept: $SOFTPROMPT_CACHE, else $XDG_CACHE_HOME/softprompt, else ~/.cache/softprompt."""
    if own := os.environ.get("SOFTPROMPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "softprompt"


def convert_once(path: Path, base_model_id: str, report: Report) -> Path:
    """Return a folder with the model of the GGUF file `path` as float32 safetensors, and its tokenizer.

    The folder is made on the first call and found again by the file's SHA-256 after that. It appears under its name
    only when it is whole, so a killed process leaves nothing half-made, and of two processes one waits for the other.
    Raises BackboneError: the file cannot be read as a model, is not a causal one, or there is no place for the result.
    """
    key = f"{path.stem}-{_digest(path)[:16]}-v{VERSION}"
    folder = cache_folder() / "models" / key
    if not missing_files(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{key}.lock", report):
            if missing_files(folder):  # still: another process may have made it while we waited
                _convert(path, folder, base_model_id, report)
    except OSError as error:
        raise BackboneError(
            f"cannot keep the converted model in {folder.parent}: {error}; "
            "set SOFTPROMPT_CACHE to a folder with space that can be written"
        ) from error
    return folder


@contextmanager
def _alone(lock_file: Path, report: Report) -> Iterator[None]:
    """One process at a time. The lock is the kernel's, so a killed process does not keep it."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that is converting the same model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _convert(path: Path, folder: Path, base_model_id: str, report: Report) -> None:
    """Convert into a temporary sibling of `folder`, check it, and rename it into place. The caller holds the lock."""
    for stale in folder.parent.glob(f".{folder.name}.part-*"):  # what killed processes left; nobody else writes them
        shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        report(f"the converted model {folder} is damaged: {', '.join(missing_files(folder))} missing; making it anew")
    report(f"converting {path.name} once to {folder} (half a minute for 135 M weights)")
    begun = time.monotonic()
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    try:
        _write_model(path, partial, base_model_id)
        check_model_folder(partial, path.name)
        if folder.exists():
            shutil.rmtree(folder)
        _let_others_read(partial)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"converted in {time.monotonic() - begun:.0f} s; from now on it loads from there")


def _let_others_read(folder: Path) -> None:
    """Give a folder and its files ordinary permissions: temporary folders and safetensors files start private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _write_model(path: Path, folder: Path, base_model_id: str) -> None:
    """De-quantise the file and save model and tokenizer into `folder`."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BackboneError("reading a .gguf file needs the package gguf: pip install 'softprompt[gguf]'") from error
    with _quiet():
        try:
            tokenizer, model = _read_gguf(path)
        except (MemoryError, BackboneError):
            raise
        except Exception as error:  # transformers raises anything at all on a file that it does not understand
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(f"cannot read {path} as a causal language model: {first}") from error
        _check_space(folder, sum(parameter.numel() for parameter in model.parameters()))
        _forget_gguf(model, base_model_id)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_tokenizer(tokenizer, folder, path)


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """The tokenizer and the float32 model of a GGUF file, as transformers makes them."""
    import torch
    import transformers

    files = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep some architectures packed unless told otherwise
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **files)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), dtype=torch.float32, device_map=None, **files, **unpack
    )
    return tokenizer, model


def _check_space(folder: Path, weights: int) -> None:
    needed, free = weights * BYTES_A_WEIGHT * 1.02, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"no space: the model takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")


def _forget_gguf(model: Any, base_model_id: str) -> None:
    """Make a de-quantised model an ordinary one: transformers refuses to save it while it still says gguf."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.config._name_or_path = base_model_id


def _check_tokenizer(tokenizer: Any, folder: Path, path: Path) -> None:
    """Raise BackboneError unless the saved tokenizer gives the tokens, special ones too, that the file's own gives."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    same = (
        saved.special_tokens_map == tokenizer.special_tokens_map
        and saved.chat_template == tokenizer.chat_template
        and len(saved) == len(tokenizer)
        and all(saved(text).input_ids == tokenizer(text).input_ids for text in PROBES)
        and all(saved.decode(saved(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids) for text in PROBES)
    )
    if not same:
        raise BackboneError(f"the tokenizer of {path} does not survive being saved; use the model's hub id or folder")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of other libraries: a line of ours says what is being done."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    bars, tqdm = logging.is_progress_bar_enabled(), getattr(gguf_reader, "tqdm", None)
    logging.disable_progress_bar()
    gguf_reader.tqdm = lambda items, **_: items  # this one does not ask transformers' own switch
    try:
        yield
    finally:
        gguf_reader.tqdm = tqdm
        if bars:
            logging.enable_progress_bar()
