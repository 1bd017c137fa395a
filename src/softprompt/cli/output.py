"""Where a command's words go: results to stdout, what it is doing to stderr, with --json one document to stdout."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 160


@dataclass
class Output:
    """json: one JSON document on stdout and nothing else there. quiet: results and warnings only. debug: tracebacks."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    warned: list[str] = field(default_factory=list)

    @cached_property
    def notes(self) -> Console:
        """The console for what is going on (stderr); one for all, so that lines go above a live bar."""
        return _console(sys.stderr)

    @property
    def live(self) -> bool:
        """Whether a progress bar can be drawn."""
        return not self.quiet and self.notes.is_terminal

    def note(self, text: str) -> None:
        """A line about what is being done."""
        if not self.quiet:
            self.notes.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that is shown whatever the settings."""
        self.warned.append(text)
        self.notes.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True, style="yellow")

    def show(self, *things: Any) -> None:
        """Results for people: texts or rich's tables."""
        if self.json:
            return
        console = _console(sys.stdout)
        for thing in things:
            console.print(thing, markup=False, highlight=False, soft_wrap=isinstance(thing, str))

    def write(self, text: str) -> None:
        """Text as it is, at once."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def document(self, data: Any) -> None:
        """The result for machines."""
        if self.json:
            if self.warned and isinstance(data, dict):
                data = {**data, "warnings": self.warned}
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()

    def fail(self, error: BaseException, lines: list[str]) -> None:
        """What went wrong: a line each on stderr, and the JSON document."""
        for line in lines:
            self.notes.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
        self.document({"error": str(error) or type(error).__name__, "problems": lines})


def _console(file: Any) -> Console:
    from rich.console import Console

    # Into a file or a pipe tables take the room that they need.
    return Console(file=file, width=None if file.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH)


def interval(bounds: Any) -> str:
    """A 95 % interval as '0.81 to 0.86', or '' where there is none."""
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


def duration(seconds: float) -> str:
    """3725 -> '1 h 02 min', 75 -> '1 min 15 s', 3.2 -> '3.2 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
