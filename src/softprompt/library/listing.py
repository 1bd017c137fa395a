"""What prompts there are below a folder, broken ones included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..atomic import is_temporary
from ..fileformat import PROMPT_FILE, examine_prompt
from ..peft_format import CONFIG_FILE, adapter_type
from ..prompt import SoftPrompt
from ..templates import Template
from ..tensorfile import TENSOR_FILE
from .names import split_version

MAX_DEPTH = 6  # folders below the one that is listed; keeps a listing of / from taking for ever
_SCORES = ("score", "accuracy", "balanced_accuracy", "macro_f1", "exact_match", "rouge_l", "chrf", "bleu")
_KEYS = (
    *("task", "kind", "tokens", "width", "placement", "template", "base_model", "fingerprint"),
    *("metric", "score", "made", "bytes"),
)


MEMBERS = "members"  # in an ensemble's folder (training/ensemble.py): parts of one prompt, not listed by themselves


def list_prompts(folder: str | Path) -> list[dict[str, Any]]:
    """One summary (plain data) for every prompt folder in and below `folder`, by name.

    Keys: name (path below `folder`), path, version, newest (of the versions of its name, as far as they can be read),
    problems (list of lines, empty when sound) and those of `summarise`. Unreadable folders, adapters of other methods
    and temporaries are passed over.
    """
    folder = Path(folder)
    found = [_summary(path, folder) for path in _prompt_folders(folder, MAX_DEPTH)]
    newest: dict[str, int] = {}
    for each in found:
        if each["tokens"] is not None:
            key = split_version(each["path"])[0]
            newest[key] = max(each["version"], newest.get(key, 0))
    for each in found:
        each["newest"] = each["tokens"] is not None and newest[split_version(each["path"])[0]] == each["version"]
    return found


def summarise(path: Path, prompt: SoftPrompt | None) -> dict[str, Any]:
    """What a listing says of the prompt in the folder `path`, None if it could not be read; plain data.

    Keys: task (its classes, or what kind of text it answers with), kind, tokens, width, placement, template (as a dict,
    or None), base_model, fingerprint, metric, score, made (ISO date), bytes (of the files in the folder). What cannot
    be told of a broken prompt is None.
    """
    summary: dict[str, Any] = dict.fromkeys(_KEYS)
    made = None
    if prompt is not None:
        template = prompt.template
        summary.update({key: getattr(prompt, key) for key in ("kind", "tokens", "width", "base_model", "fingerprint")})
        summary["task"] = _task(template)
        summary["placement"] = template.placement if template is not None else "front"
        summary["template"] = template.to_dict() if template is not None else None
        summary["metric"], summary["score"] = _score(prompt.metrics)
        made = prompt.provenance.get("made")
    return {**summary, "made": made if isinstance(made, str) else _modified(path), "bytes": _size(path)}


def _prompt_folders(folder: Path, depth: int) -> Iterator[Path]:
    prompt = looks_like_prompt(folder)
    if prompt:
        yield folder
    if depth == 0:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or is_temporary(entry.name) or not os.path.isdir(entry):
            continue
        if prompt and entry.name == MEMBERS:
            continue
        path = folder / entry.name
        if not entry.is_symlink():
            yield from _prompt_folders(path, depth - 1)
        elif looks_like_prompt(path):  # a link to a prompt is one; below a link there may be a loop
            yield path


def looks_like_prompt(folder: Path, unclear: bool = False) -> bool:
    """A prompt, or what was to be one. Adapters that are not made of soft tokens (LoRA) are none.

    unclear: what an empty folder is, and one that cannot be read, or was put out of the way at this moment.
    """
    try:
        held = os.listdir(folder)  # once: a folder may be replaced between two looks
    except OSError:
        return unclear
    if PROMPT_FILE in held or not held:
        return bool(held) or unclear
    if CONFIG_FILE in held and (kind := adapter_type(folder)) is not None:
        return kind == "" or kind.endswith(("TUNING", "CPT", "CARTRIDGE"))
    return TENSOR_FILE in held


def _summary(path: Path, folder: Path) -> dict[str, Any]:
    prompt, problems = examine_prompt(path)
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    version = split_version(path.name)[1] or 1
    return {
        "name": name or str(path),
        "path": str(path),
        "version": version,
        **summarise(path, prompt),
        "problems": problems,
    }


def _task(template: Template | None) -> str:
    """What the prompt is for, in some words: its classes, or free text."""
    if template is None:
        return ""
    if template.classes:
        more = f" and {len(template.classes) - 4} more" if len(template.classes) > 4 else ""
        return ", ".join(template.classes[:4]) + more
    return "free text"


def _score(metrics: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The main score, which may stand one level down, under the split that it was measured on (test first)."""
    for part in (metrics, metrics.get("test"), metrics.get("validation")):
        if not isinstance(part, Mapping):
            continue
        for name in _SCORES:
            value = part.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return (str(part.get("metric", name)) if name == "score" else name), float(value)
    return None, None


def _modified(path: Path) -> str | None:
    for name in (PROMPT_FILE, TENSOR_FILE, CONFIG_FILE):
        try:
            seconds = os.stat(path / name).st_mtime
        except OSError:
            continue
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
    return None


def _size(path: Path) -> int:
    """Bytes of the files in the folder itself."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    except OSError:
        return 0
