"""Writing so that whoever looks sees the old state or the new one, never a half of either."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from .errors import OutputError

_TEMPORARY = re.compile(r"^\..*\.softprompt-[0-9a-f]{8}\.(new|old)$")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h of macOS


def is_temporary(name: str) -> bool:
    """True for the name of a file or folder that an interrupted write may have left behind."""
    return _TEMPORARY.match(name) is not None


def temporary_sibling(path: Path, ending: str) -> Path:
    """A new hidden name beside `path`, hence on the same file system, so that it can be renamed into place."""
    # Names are at most 255 bytes on common file systems, and a character takes up to four.
    return path.parent / f".{path.name[:50]}.softprompt-{secrets.token_hex(4)}.{ending}"


def original_name(name: str) -> str | None:
    """.sentiment.softprompt-0123abcd.old -> sentiment, whose old version it is (cut at 50 characters); else None."""
    return name[1:-24] if is_temporary(name) and name.endswith(".old") else None


def leftovers(path: Path) -> list[Path]:
    """Old versions of `path` that a save killed between its two renames has left beside it."""
    pattern = re.compile(re.escape(f".{path.name[:50]}.softprompt-") + r"[0-9a-f]{8}\.old")
    try:
        return sorted(path.parent / name for name in os.listdir(path.parent) if pattern.fullmatch(name))
    except OSError:
        return []


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to the file `path` under a temporary name and rename it into place.

    Raises OutputError (no space, not writable); what stood there before is then untouched.
    """
    path = Path(path)
    temporary = temporary_sibling(path, "new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, data)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error, len(data)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: str | Path, files: Mapping[str, bytes], stale: Iterable[str] = ()) -> Path:
    """Write `files` (name -> content) as the folder `folder`, replacing one that is there as a whole.

    Other things that the old folder holds are carried over, except those named in `stale`.
    Raises OutputError (no space, not writable); the old folder is then still whole and in its place.
    """
    target = Path(os.path.realpath(folder))  # a link to a folder stays a link: what it points to is replaced
    temporary = temporary_sibling(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(temporary)  # not Path.mkdir, which before Python 3.11 keeps a reference that tests cannot exchange
        if target.is_dir():
            _carry_over(target, temporary, {*files, *stale})
        for name, data in files.items():
            _write_synced(temporary / name, data)
        _sync_folder(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise output_error(target, error, sum(map(len, files.values()))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def place_new(folder: Path, target: Path) -> bool:
    """Rename `folder` to `target`, on the same file system, unless something is there: then False, nothing is changed.

    Of several processes that place a folder under one name at once, one gets it. Raises OutputError (not writable).
    """
    try:
        if os.path.lexists(target):
            return False
        os.rename(folder, target)  # onto a folder with something in it, which may have come meanwhile, it fails
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise output_error(target, error, 0) from error
    return True


def output_error(path: Path, error: OSError, size: int) -> OutputError:
    """The error to raise when `size` bytes could not be written to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"no space left for its {max(1, size // 1024)} kB; free some, or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "not allowed to write there; choose another place or change the permissions"
    elif error.errno in (errno.EBUSY, errno.EXDEV):
        advice = "it is a mount point, which cannot be replaced as a whole; choose a folder inside it"
    else:
        advice = f"{error.strerror or error}; choose another place"
    return OutputError(f"cannot write {path}: {advice}")


def _write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk: a rename may otherwise reach the disk before the bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry_over(old: Path, new: Path, without: set[str]) -> None:
    """Copy what is not ours (a README, notes) from the old folder to the new one."""
    for entry in old.iterdir():
        if entry.name in without:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _swap(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`, if there is one; if that fails `target` is as it was.

    Where the system can, the two change places in one call (`new` is then the old folder), so that `target` is never
    missing and a kill at any moment loses nothing. Elsewhere it takes two renames.
    """
    if not target.exists():
        os.rename(new, target)
    elif not exchange(new, target):
        _swap_by_renames(new, target)
    _sync_folder(target.parent)


def _swap_by_renames(new: Path, target: Path) -> None:
    old = temporary_sibling(target, "old")
    try:
        os.rename(target, old)
        os.rename(new, target)
    except BaseException:  # Ctrl-C too
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, two: Path) -> bool:
    """Let two files or folders of one file system change places in one call of the system.

    False, with nothing changed, where the system or the file system cannot (Windows, some network file systems), or
    for any other reason that a rename tells of better.
    """
    call = _exchanging()
    return call is not None and call(os.fsencode(one), os.fsencode(two)) == 0


@cache
def _exchanging() -> Callable[[bytes, bytes], int] | None:
    """The function of the C library that exchanges two paths (0: done), if there is one."""
    if not sys.platform.startswith(("linux", "darwin")):
        return None
    try:
        import ctypes

        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            swap = library.renamex_np
            swap.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
            return lambda one, two: int(swap(one, two, _RENAME_SWAP))
        renameat2 = library.renameat2  # since glibc 2.28
        renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    except (ImportError, OSError, AttributeError):
        return None
    return lambda one, two: int(renameat2(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE))


def _sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot sync folders; the data itself has been synced
        pass
    finally:
        os.close(descriptor)
