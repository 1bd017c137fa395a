"""What prompts in a library are called, and in which folder a version of one stands. No torch, nothing is opened.

Version 1 of `sentiment` is the folder `sentiment`, version N the folder `sentiment@N`: a library made before there were
versions is one in which every prompt has version 1.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..atomic import original_name
from ..errors import LibraryError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED = ("base",)  # what a server calls the model without a prompt
_VERSIONED = re.compile(r"(.*)@([1-9][0-9]{0,8})", re.DOTALL)


def split_version(text: str) -> tuple[str, int | None]:
    """sentiment@2 -> (sentiment, 2), sentiment -> (sentiment, None). Anything is taken; see `check_name`."""
    found = _VERSIONED.fullmatch(text)
    return (found[1], int(found[2])) if found else (text, None)


def folder_name(name: str, version: int) -> str:
    """The name of the folder that holds a version."""
    return name if version == 1 else f"{name}@{version}"


def name_problem(name: str) -> str:
    """Why `name` (without a version) cannot be the name of a prompt, or ''."""
    if not NAME.fullmatch(name):
        return (
            f"{name[:140]!r} cannot be the name of a prompt; a name has 1 to 128 letters, digits and . _ - and begins "
            "with a letter or a digit"
        )
    if name in RESERVED:
        return f"a prompt cannot be called '{name}', as servers call the model without a prompt that; rename it"
    return ""


def check_name(text: str) -> tuple[str, int | None]:
    """Name and version (None if not given) of a text such as `sentiment@2`. Raises LibraryError."""
    name, version = split_version(text)
    if problem := name_problem(name):
        raise LibraryError(problem)
    return name, version


def next_version(folder: str | Path) -> Path:
    """Where a further version of the prompt folder `folder` goes: prompts/sentiment@2 if prompts/sentiment is there.

    `folder` itself where there is no version yet. Versions that are broken, or were left half-replaced by a save that
    was killed, keep their numbers.
    """
    folder = Path(folder)
    name, _ = split_version(folder.name)
    try:
        held = os.listdir(folder.parent)
    except OSError:
        held = []
    parts = [split_version(original_name(each) or each) for each in held]
    versions = [version or 1 for found, version in parts if found == name]
    return folder.with_name(folder_name(name, max(versions) + 1)) if versions else folder
