"""`softprompt serve`: what it refuses before a model is loaded. What it serves is tested in tests/server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_material import Called

from softprompt import SoftPrompt

Cli = Callable[..., Called]
KEY = "a-key-of-some-length"


def test_all_mistakes_are_told_at_once(cli: Cli) -> None:
    Path("short").write_text("secret\n")
    given = ("--host", "0.0.0.0", "--port", 99999, "--key-file", "nowhere", "--admin-key-file", "short", "--watch", 1)
    called = cli("serve", "prompts", *given)
    assert called.code == 2
    for expected in (
        "folder: no folder prompts",
        "key-file: cannot read nowhere: No such file",
        "admin-key-file: the key in line 1 needs 16 or more",
        "port: expected 0 to 65535, found 99999",
    ):
        assert expected in called.err
    assert "a key is needed" not in called.err and "secret" not in called.err


def test_beyond_this_machine_a_key_is_needed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts").mkdir()
    assert "so a key is needed; give --key-file" in cli("serve", "prompts", "--host", "0.0.0.0").err
    monkeypatch.setenv("SOFTPROMPT_API_KEYS", f"{KEY}-1,{KEY}-2")
    Path("admin").write_text(f"{KEY}-2\n")
    called = cli("serve", "prompts", "--host", "0.0.0.0", "--admin-key-file", "admin")
    assert called.code == 2 and "an admin key is also a key for everybody" in called.err


def test_the_model_that_the_prompts_name(cli: Cli) -> None:
    Path("prompts").mkdir()
    assert "the prompts in prompts name none; give --model" in cli("serve", "prompts").err
    for name in ("one", "two"):
        SoftPrompt(torch.zeros(2, 4), base_model=f"someone/{name}").save(f"prompts/{name}")
    logger = logging.getLogger("softprompt")
    before = (list(logger.handlers), logger.propagate, logger.level)
    called = cli("serve", "prompts")
    assert called.code == 2 and "name someone/one, someone/two; give --model" in called.err
    assert (logger.handlers, logger.propagate, logger.level) == before  # nothing logs to a stream that is gone
