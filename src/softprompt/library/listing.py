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
from ..tensorfile import TENSOR_FILE

MAX_DEPTH = 6  # folders below the one that is listed; keeps a listing of / from taking for ever
_SCORES = ("score", "accuracy", "balanced_accuracy", "macro_f1", "exact_match", "rouge_l", "chrf", "bleu")


def list_prompts(folder: str | Path) -> list[dict[str, Any]]:
    """One summary (plain data) for every prompt folder in and below `folder`, by name.

    Keys: name (path below `folder`), path, kind, tokens, width, placement, template (as a dict, or None), base_model,
    metric, score, made (ISO date), bytes (of the files in it), problems (list of lines, empty when sound). What cannot
    be told of a broken prompt is None. Unreadable folders, adapters of other methods and temporaries are passed over.
    """
    folder = Path(folder)
    return [_summary(path, folder) for path in _prompt_folders(folder, MAX_DEPTH)]


def _prompt_folders(folder: Path, depth: int) -> Iterator[Path]:
    if _looks_like_prompt(folder):
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
        path = folder / entry.name
        if not entry.is_symlink():
            yield from _prompt_folders(path, depth - 1)
        elif _looks_like_prompt(path):  # a link to a prompt is one; below a link there may be a loop
            yield path


def _looks_like_prompt(folder: Path) -> bool:
    """A prompt, or what was to be one. Adapters that are not made of soft tokens (LoRA) are none."""
    kind = adapter_type(folder)
    if kind is None or os.path.lexists(folder / PROMPT_FILE):
        return any(os.path.lexists(folder / name) for name in (PROMPT_FILE, TENSOR_FILE))
    return kind == "" or kind.endswith(("TUNING", "CPT", "CARTRIDGE"))


def _summary(path: Path, folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = dict.fromkeys(
        ("kind", "tokens", "width", "placement", "template", "base_model", "metric", "score")
    )
    made = None
    prompt, problems = examine_prompt(path)
    if prompt is not None:
        template = prompt.template
        summary.update(kind=prompt.kind, tokens=prompt.tokens, width=prompt.width, base_model=prompt.base_model)
        summary["placement"] = template.placement if template is not None else "front"
        summary["template"] = template.to_dict() if template is not None else None
        summary["metric"], summary["score"] = _score(prompt.metrics)
        made = prompt.provenance.get("made")
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    return {
        "name": name or str(path),
        "path": str(path),
        **summary,
        "made": made if isinstance(made, str) else _modified(path),
        "bytes": _size(path),
        "problems": problems,
    }


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
