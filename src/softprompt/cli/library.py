"""`softprompt rename`, `remove`, `copy` and `verify`: the prompts of a library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .command import FAILED, command
from .output import Output

if TYPE_CHECKING:
    from ..library import Entry

DEFAULT = Path("prompts")
LIBRARY = Annotated[
    Path | None, typer.Option(help="Folder of prompts; default: prompts, or where a NAME with a path says.")
]
NAME = Annotated[str, typer.Argument(help="NAME, NAME@VERSION, or the same with a path: prompts/sentiment.")]
NEW_VERSION = Annotated[bool, typer.Option("--new-version", help="If the name is taken: save as NAME@2, NAME@3, ...")]


def located(name: str, library: Path | None, otherwise: Path = DEFAULT) -> tuple[Path, str]:
    """The library and the name in it of a NAME that may have a path."""
    folder, bare = os.path.split(name.rstrip("/" + os.sep))
    if not folder:
        return library or otherwise, bare
    if library is not None and Path(folder).resolve() != library.resolve():
        raise ConfigError(f"{name}: has a path already; leave out --library {library}")
    return Path(folder), bare


@command
def rename(
    out: Output,
    name: NAME,
    new: Annotated[str, typer.Argument(help="The new NAME, or NAME@VERSION.")],
    library: LIBRARY = None,
) -> None:
    """Give a prompt another name: NAME with all its versions, or only the version NAME@VERSION."""
    from ..library import Library

    folder, old = located(name, library)
    other, wanted = located(new, None, folder)
    if other.resolve() != folder.resolve():
        raise ConfigError(f"{new}: is in another folder than {name}; copy the prompt, then remove the old one")
    made = Library(folder)
    before = made.select(old, all_versions=True)
    after = made.rename(old, wanted)
    for source, target in zip(before, after):
        out.show(f"{source} is now {target}")
    out.document({"renamed": [{"from": str(source), "to": str(target)} for source, target in zip(before, after)]})


@command
def remove(
    out: Output,
    name: NAME,
    library: LIBRARY = None,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Remove NAME with all its versions, if it has several.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a prompt folder for good. Asks before it does."""
    from ..library import Library

    folder, wanted = located(name, library)
    made = Library(folder)
    found = made.select(wanted, all_versions)
    if not yes:
        _ask(out, found)
    removed = made.remove(wanted, all_versions=all_versions)
    for path in removed:
        out.show(f"removed {path}")
    out.document({"removed": [str(path) for path in removed]})


def _ask(out: Output, found: list[Path]) -> None:
    """Exit unless somebody says yes."""
    if out.json:
        raise ConfigError("remove: asks before it removes; with --json give --yes")
    what = ", ".join(map(str, found))
    out.notes.print(f"remove {what} for good? [y/N] ", end="", markup=False, highlight=False, soft_wrap=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):  # nothing, if nobody is there
        out.notes.print("nothing was removed (--yes removes without asking)", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED)


@command
def copy(
    out: Output,
    name: NAME,
    new: Annotated[str, typer.Argument(help="NAME or NAME@VERSION of the copy; with a path: in another library.")],
    library: LIBRARY = None,
    new_version: NEW_VERSION = False,
) -> None:
    """Copy a prompt folder. `softprompt copy NAME@1 NAME --new-version` makes an old version the newest again."""
    from ..library import Library

    folder, source = located(name, library)
    other, target = located(new, None, folder)
    made = Library(folder).copy(source, target, new_version=new_version, to=Library(other))
    out.show(f"copied to {made}")
    out.document({"prompt": str(made)})


@command
def verify(
    out: Output, folder: Annotated[Path, typer.Argument(help="Folder of prompts, or one prompt.")] = DEFAULT
) -> None:
    """Read every prompt folder in FOLDER whole and check it. Exits with 1 if anything is wrong.

    Also tells what writes that were interrupted have left behind. With --json also the hash of each prompt, by which
    two machines can be compared.
    """
    scan, left = _verified(folder)
    wrong = 0
    for entry in scan:
        wrong += bool(lines := [*entry.problems, *entry.remarks])
        for line in lines:
            out.show(f"{entry.path.name}: {line}")
    count = f"{len(scan)} prompt{'s' * (len(scan) != 1)}"
    out.show(f"{count}, {wrong} with something wrong" if wrong else f"{count}, nothing wrong")
    if left:
        names = ", ".join(path.name for path in left[:5]) + (f" and {len(left) - 5} more" if left[5:] else "")
        out.show(f"half-written, being written now or left by an interrupted write (then remove them): {names}")
    prompts = [_checked(entry) for entry in scan]
    out.document({"folder": str(folder), "sound": not wrong, "prompts": prompts, "leftovers": list(map(str, left))})
    if wrong:
        raise typer.Exit(FAILED)


def _verified(folder: Path) -> tuple[list[Entry], list[Path]]:
    from ..errors import OutputError
    from ..fileformat import is_prompt_folder
    from ..library import Library
    from ..library.names import split_version

    if is_prompt_folder(folder):
        whole = Path(os.path.abspath(folder))
        entries = Library(whole.parent).verify(split_version(whole.name)[0])
        return [entry for entry in entries if entry.path == whole], []
    library = Library(folder)
    scan = library.verify()
    if scan.problem:
        raise OutputError(scan.problem)
    return list(scan), library.leftovers()


def _checked(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "version": entry.version,
        "path": str(entry.path),
        "sha256": entry.sha256,
        "problems": [*entry.problems, *entry.remarks],
    }
