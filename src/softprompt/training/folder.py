"""The folder of a run: made ready before training, checked before a run is resumed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..atomic import write_atomic
from ..backbone import Backbone
from ..data import Task
from ..errors import ConfigError, OutputError
from .checkpoint import Checkpoint, load_checkpoint
from .config import TuneConfig

CHECKPOINT = "checkpoints/last.safetensors"
BEFORE = ("auto", "config.yaml")  # what `tune --auto` has written before the run begins
# Room for a checkpoint beside the one before, the log and the report; checked before hours are spent.
NEEDED_BYTES = 64 << 20


def record(backbone: Backbone, task: Task, config: TuneConfig) -> dict[str, Any]:
    """What a run is made of: written at its start, compared when it is resumed."""
    rows = json.dumps([list(task.train), list(task.validation)], sort_keys=True, ensure_ascii=False, default=str)
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint,
        "precision": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "template": task.template.to_dict(),
        "data": {**task.source, "rows": {s.name: len(s) for s in (task.train, task.validation, task.test)}},
        "data_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "tuning": config.model_dump(),
    }


def prepare(folder: Path | None, resume: bool, recorded: dict[str, Any], config_text: str | None) -> Checkpoint | None:
    """Make the run folder ready, or check that the one there can be resumed. All that can fail early fails here."""
    if folder is None:
        if resume:
            raise ConfigError("resume needs the run folder of the run to go on with")
        return None
    saved = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder for a run; choose another run folder")
    if resume:
        return _resumable(folder, saved, recorded)
    if folder.exists() and not saved.exists() and any(each.name not in BEFORE for each in folder.iterdir()):
        raise OutputError(f"{folder} holds something that is not a run; choose another run folder")
    if saved.exists():
        raise OutputError(f"{folder} holds a run already; go on with it (--resume) or choose another run folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < NEEDED_BYTES:
            raise OutputError(
                f"only {free >> 20} MiB free at {folder}, {NEEDED_BYTES >> 20} MiB are needed; make room first"
            )
        write_atomic(saved, json.dumps(recorded, indent=2, ensure_ascii=False, default=str).encode())
        (folder / "config.yaml").write_text(
            config_text
            or yaml.safe_dump(json.loads(saved.read_text(encoding="utf-8")), sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write to run folder {folder}: {error.strerror or error}; choose another") from error
    return None


def _resumable(folder: Path, saved: Path, recorded: dict[str, Any]) -> Checkpoint | None:
    if not saved.exists():
        raise OutputError(f"{folder} holds no run to resume (no run.json); start it without --resume")
    try:
        before = json.loads(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {saved}: {error}; start the run anew in another folder") from error
    now = json.loads(json.dumps(recorded, default=str))
    keys = ("fingerprint", "precision", "device", "template", "data_sha256", "tuning")
    # A run of an earlier version knows nothing of settings that came later: it had what is their default now.
    if isinstance(before.get("tuning"), dict):
        before["tuning"] = {**TuneConfig.model_validate({}).model_dump(mode="json"), **before["tuning"]}
    changed = [_change(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"the run in {folder} was started with another {', '.join(changed)}; "
            "resume it with what it was started with, or start a new run"
        )
    path = folder / CHECKPOINT
    return load_checkpoint(path) if path.exists() else None


def _change(key: str, before: Any, now: Any) -> str:
    """What has changed, the settings by name."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return key
    each = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return f"{key} ({'; '.join(each)})"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("softprompt", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
