"""Everything a run needs to go on, in one file that is replaced as a whole: tensors and, in its header, plain JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import OutputError, TrainingError

FORMAT = 4  # 4: with the vectors of the lowest loss


@dataclass
class Checkpoint:
    """tensors: by name, any shapes. facts: plain JSON data (step, best score, settings, ...)."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write to a temporary name, flush to the disk, rename. A failure leaves the old file. Raises OutputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"softprompt": json.dumps({"format": FORMAT, **checkpoint.facts})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write checkpoint {path}: {error}; the one before is unharmed") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; no code in it can run. Raises TrainingError if it is not one, or of another format."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("softprompt", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise TrainingError(f"cannot read checkpoint {path}: {error}; start the run anew without --resume") from error
    if facts.pop("format", None) != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of format {FORMAT}; start the run anew without --resume")
    return Checkpoint(tensors, facts)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors: `optimizer.<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give back what `optimizer_tensors` took."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    given = optimizer.state_dict()
    given["state"] = state
    optimizer.load_state_dict(given)
