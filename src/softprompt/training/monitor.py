"""Watch a run: keep what happened, line by line, and say when something is going wrong and what to try."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError

Listener = Callable[[dict[str, Any]], None]


class Monitor:
    """Collects events in memory, appends them to `metrics.jsonl`, and passes them on to listeners.

    Events are plain dicts with "event" (step, validation, warning, end) and "step". A resumed run drops the events
    after its checkpoint, so that the file reads as if nothing had happened.
    """

    def __init__(self, path: Path | None, listeners: tuple[Listener, ...] = ()):
        self.path, self.listeners = path, listeners
        self.events: list[dict[str, Any]] = []
        self._file: Any = None

    def open(self, resumed_at: int | None) -> None:
        """Begin the file anew, or, when resuming, keep its events up to that step."""
        if self.path is None:
            return
        if resumed_at is not None and self.path.exists():
            self.events = [e for e in read_events(self.path) if e["step"] <= resumed_at and e["event"] != "end"]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(e) + "\n" for e in self.events), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def look_back(self, step: int) -> None:
        """Read the events up to that step, where nothing is to be added to them."""
        if self.path is not None and self.path.exists():
            self.events = [e for e in read_events(self.path) if e["step"] <= step]

    def add(self, event: str, step: int, **facts: Any) -> None:
        entry = {"event": event, "step": step, **facts}
        self.events.append(entry)
        if self._file:
            try:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
            except OSError as error:
                raise OutputError(
                    f"cannot write {self.path}: {error.strerror or error}; the last checkpoint is kept: "
                    "make room and resume the run"
                ) from error
        for listener in self.listeners:
            listener(entry)

    def tell(self, event: str, step: int, **facts: Any) -> None:
        """Tell the listeners something that is no part of the run's history."""
        for listener in self.listeners:
            listener({"event": event, "step": step, **facts})

    def warn_once(self, step: int, beginning: str, text: str) -> None:
        """Warn, unless a warning with that `beginning` stands already; the numbers in it change from step to step."""
        assert text.startswith(beginning)
        if not any(e["event"] == "warning" and e["text"].startswith(beginning) for e in self.events):
            self.add("warning", step, text=text)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def movement_warning(vectors: torch.Tensor, initial: torch.Tensor, unit: float, share_done: float) -> str | None:
    """Whether the vectors [P, H] have hardly moved from `initial`, or have exploded; None if all is well.

    unit: RMS of the embedding table. share_done: share of the run's steps that is done, 0 to 1.
    """
    moved = float((vectors - initial).square().mean().sqrt()) / unit
    size = float(vectors.square().mean(dim=1).sqrt().max()) / unit
    if size > 100:
        return (
            f"a soft token has grown to {size:,.0f} times the size of the vocabulary's embeddings; "
            "try a smaller learning_rate (a tenth) or a clip of 0.1"
        )
    if share_done >= 0.2 and moved < 0.01:
        return (
            f"the soft tokens have hardly moved (by {moved:.2%} of the vocabulary's RMS); "
            "try a larger learning_rate (ten times), and see that the answers vary"
        )
    return None


def majority_warning(predicted: list[str], share_done: float) -> str | None:
    """Whether all validation rows were given the same class, once half of the run is done; at first many are."""
    if share_done >= 0.5 and len(predicted) >= 10 and len(set(predicted)) == 1:
        return (
            f"every validation row was classified as '{predicted[0]}'; try more steps, another learning_rate "
            "(a third or three times), init=labels, or look at the template and the label words"
        )
    return None
