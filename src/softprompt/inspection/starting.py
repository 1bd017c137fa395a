"""Where a prompt started: the vectors before tuning, from the run's checkpoint or made again from its provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import SoftPromptError
from ..initialisers import initialise
from ..prompt import SoftPrompt
from ..training.checkpoint import load_checkpoint
from ..training.folder import CHECKPOINT
from ..training.monitor import read_events


def initial_vectors(
    prompt: SoftPrompt, table: Tensor | None, backbone: Backbone | None, run: Path | None
) -> tuple[Tensor | None, str]:
    """The vectors before tuning, of the prompt's shape, and how they are known; (None, why not) otherwise.

    The initialisers give the same vectors for the same seed, so what a prompt was tuned from can be made again from
    its recorded settings and the same model's embedding table [V, H]. Nothing is read but the run folder.
    """
    if run is not None and (run / CHECKPOINT).is_file():
        try:
            found = load_checkpoint(run / CHECKPOINT).tensors.get("initial")
        except SoftPromptError:
            found = None
        if found is not None and found.shape == prompt.vectors.shape:
            return found.float(), "the run's checkpoint"
    tuning = _tuning(prompt)
    if not tuning:
        return None, "how the prompt was made is not known"
    if prompt.kind != "embedding":
        return None, "where a deep prompt started is only in its run folder; give it (--run)"
    if table is None or backbone is None or (prompt.fingerprint and prompt.fingerprint != backbone.fingerprint):
        return None, "the model that it was tuned on was not given"
    if str(tuning.get("init", "")).startswith("prompt"):
        return None, "it did not start from words; give its run folder"
    try:
        vectors, said = initialise(
            str(tuning.get("init", "text")),
            table=table,
            tokenizer=backbone.tokenizer,
            tokens=prompt.tokens,
            generator=torch.Generator().manual_seed(int(tuning.get("seed") or 0)),
            template=prompt.template,
            init_text=tuning.get("init_text"),
        )
    except (SoftPromptError, TypeError, ValueError) as error:
        return None, str(error)
    return (
        (vectors, said) if int(tuning.get("tokens") or 0) == prompt.tokens else (None, "its tokens were changed later")
    )


def _tuning(prompt: SoftPrompt) -> dict[str, Any]:
    run = prompt.provenance.get("run")
    tuning = run.get("tuning") if isinstance(run, dict) else None
    return tuning if isinstance(tuning, dict) else {}


def written_text(prompt: SoftPrompt) -> str | None:
    """The text that the prompt started from, None if it did not start from one."""
    from ..initialisers import instruction

    tuning = _tuning(prompt)
    if not tuning or tuning.get("init") != "text":
        return None
    text = tuning.get("init_text")
    return text if isinstance(text, str) and text.strip() else instruction(prompt.template)


def run_events(run: Path | None) -> list[dict[str, Any]]:
    """The events of a run folder, [] where there are none to be read."""
    try:
        return read_events(run / "metrics.jsonl") if run is not None else []
    except (OSError, UnicodeDecodeError):
        return []
