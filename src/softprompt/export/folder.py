"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic import output_error, temporary_sibling
from .collect import check_new


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` to write into; renamed to `out` at the end, removed if anything went wrong.

    Raises OutputError when `out` is there and not an empty folder, or cannot be written.
    """
    target = Path(os.path.realpath(out))
    check_new(target, "folder")
    temporary = temporary_sibling(target, "new")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        raise output_error(target, error, 0) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """The same for a single file."""
    target = Path(os.path.realpath(out))
    check_new(target, "file")
    temporary = temporary_sibling(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        raise output_error(target, error, 0) from error
    finally:
        temporary.unlink(missing_ok=True)
