"""For all tests: nothing is left in the cache of whoever runs them."""

from __future__ import annotations

import importlib
import math

import pytest


@pytest.fixture(autouse=True)
def no_texts_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """`text_cache=auto` writes what takes long to compute; on a busy machine that may be anything."""
    monkeypatch.setattr("softprompt.text_store.store.WORTH_SECONDS", math.inf)


@pytest.fixture(autouse=True)
def no_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawings of report.html take many times as long as a tiny run; tests/inspection has them drawn."""
    if "inspection" not in request.path.parts:
        importlib.import_module("softprompt.inspection.pictures")  # takes _render by name, so before it is exchanged
        monkeypatch.setattr("softprompt.inspection.plots._render", lambda name, draw, size: f'<svg id="{name}"></svg>')
