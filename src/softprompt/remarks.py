"""Remarks on what is read: warnings, or lines of a list for whoever collects them, in any number of threads at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("softprompt_remarks", default=None)


def remark(text: str) -> None:
    """Warn of something that is not wrong enough to raise; within `remarks_collected` it goes into its list instead."""
    found = _collected.get()
    if found is None:
        warnings.warn(text, stacklevel=3)
    else:
        found.append(text)


@contextmanager
def remarks_collected() -> Iterator[list[str]]:
    """The remarks made inside, in this thread. (`warnings.catch_warnings` would change what all threads do.)"""
    found: list[str] = []
    before = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(before)
