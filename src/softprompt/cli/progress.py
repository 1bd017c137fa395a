"""Progress of a run and of an evaluation: a live bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .output import Output, duration

Shown = TypeVar("Shown", bound="RunProgress")
PLAIN_SECONDS = 5.0  # between lines where there is no terminal


class RunProgress:
    """Listens to the events of a run (see training/monitor.py); the bar, and what is told while texts are computed.

    begun: since when steps are counted, for the time left. told: when a line was last shown where there is no terminal.
    least_told: seconds that texts must take for their end to be told.
    """

    least_told = 0.0

    def __init__(self, out: Output):
        self.out = out
        self.begun = self.told = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._texts: Any = None
        self._texts_begun: float | None = None

    def __enter__(self: Shown) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_texts(self, event: dict[str, Any]) -> None:
        """Texts before the soft tokens, computed once before the first step or found on disk."""
        done, rows = event["done"], event["rows"]
        if self._texts_begun is None:
            self._texts_begun = time.monotonic()
        if self._bar is not None:
            if self._texts is None:
                self._texts = self._bar.add_task("texts", total=rows, told="computed once and kept")
            self._bar.update(self._texts, completed=done)
        ended = done == rows and time.monotonic() - self._texts_begun >= self.least_told
        if ended or (self._bar is None and time.monotonic() - self.told >= PLAIN_SECONDS):
            self.told = time.monotonic()
            self.out.note(f"texts computed once and kept: {done:,} of {rows:,}")
        if done == rows:
            self._end_texts()

    def _end_texts(self) -> None:
        """The time that texts take is no part of what a step takes."""
        if self._texts_begun is not None:
            self.begun += time.monotonic() - self._texts_begun
            self._texts_begun = None
        if self._texts is not None:
            self._bar.remove_task(self._texts)
            self._texts = None


class TuneProgress(RunProgress):
    """Listens to a run's events and shows them. Use as a context.

    resumed: the steps of the whole run that is gone on with, 0 for a new one.
    """

    def __init__(self, out: Output, resumed: int = 0):
        super().__init__(out)
        self.resumed = resumed
        self.steps, self.first = 0, 0
        self.validated: float | None = None
        self.latest: dict[str, Any] = {}
        self.rate = 0.0

    def _on_start(self, event: dict[str, Any]) -> None:
        self.out.note(f"soft prompt from {event['init']}")
        if event["cut_rows"]:
            self.out.warn(f"{event['cut_rows']:,} of {event['rows']:,} training rows were cut to fit; see max_tokens")
        self.out.note(f"{event['steps']:,} steps over {event['rows']:,} rows")
        self.begin(event["steps"], 0)

    def begin(self, steps: int, first: int) -> None:
        """Show progress over `steps`, of which `first` are done."""
        self.steps, self.first = steps, first
        self.begun = self.told = time.monotonic()
        if self.out.live:
            self._bar = _bar(self.out)
            self._task = self._bar.add_task("tuning", total=steps, completed=first, told="")
            self._bar.start()

    def _on_note(self, event: dict[str, Any]) -> None:
        self.out.note(event["text"])

    def _on_step(self, event: dict[str, Any]) -> None:
        if not self.latest and self.resumed:  # a resumed run tells its start no second time
            self.out.note(f"going on at step {event['step'] - 1} of {self.resumed}")
            self.begin(self.resumed, event["step"] - 1)
        self._end_texts()  # where there was no room for all of them
        self.latest = event
        speed = event["examples_per_second"]
        self.rate = speed if not self.rate else 0.9 * self.rate + 0.1 * speed
        if self._bar is not None:
            self._bar.update(self._task, completed=event["step"], told=self.words())
        elif not self.out.quiet and time.monotonic() - self.told >= PLAIN_SECONDS:
            self._tell()

    def _on_validation(self, event: dict[str, Any]) -> None:
        score = event["score"]
        self.validated = score
        shown = f"validation {event['metric']} {score:.3f}, loss {event['loss']:.3f}"
        self.out.note(f"step {event['step']}/{self.steps}: {shown}")

    def _on_warning(self, event: dict[str, Any]) -> None:
        self.out.warn(f"step {event['step']}: {event['text']}")

    def _on_end(self, event: dict[str, Any]) -> None:
        if self._bar is None and not self.out.quiet and self.latest:
            self._tell()
        self.__exit__()

    def _tell(self) -> None:
        self.told = time.monotonic()
        self.out.note(f"step {self.latest['step']}/{self.steps}: {self.words()}")

    def words(self) -> str:
        """loss, last validation score, learning rate, examples a second, time left."""
        latest = self.latest
        parts = [f"loss {latest['loss']:.3f}"]
        if self.validated is not None:
            parts.append(f"validation {self.validated:.3f}")
        parts += [f"learning rate {latest['learning_rate']:.2g}", f"{self.rate:.1f} examples/s"]
        return ", ".join([*parts, f"{duration(self.seconds_left())} left"])

    def seconds_left(self) -> float:
        """By the time that the steps of this session took, validations included."""
        done: int = self.latest["step"] - self.first
        left: int = self.steps - self.latest["step"]
        return (time.monotonic() - self.begun) / max(1, done) * left


def _bar(out: Output, transient: bool = False) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
    )
    # Notes and warnings printed while the bar is live go above it.
    return Progress(*columns, console=out.notes, redirect_stdout=False, refresh_per_second=4, transient=transient)


@contextmanager
def counting(out: Output, what: str) -> Iterator[Any]:
    """A callback (rows done, rows in all) that shows how far an evaluation is."""
    told = time.monotonic()
    if not out.live:

        def tell(done: int, total: int) -> None:
            nonlocal told
            if not out.quiet and time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                out.note(f"{what}: {done:,} of {total:,} rows")

        yield tell
        return
    with _bar(out, transient=True) as bar:
        task = bar.add_task(what, total=None, told="rows")
        yield lambda done, total: bar.update(task, completed=done, total=total)
