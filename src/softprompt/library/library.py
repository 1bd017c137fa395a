"""A folder of prompt folders: look at it, look one up, add, rename, copy and remove.

There is no index: the folders are all there is, so that a library can be copied, synchronised or put under version
control as it is. Every change is one rename of a whole folder, so that other processes may read and write meanwhile.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..atomic import is_temporary, output_error, place_new, temporary_sibling
from ..errors import LibraryError, OutputError, PromptFormatError
from ..fileformat import load_prompt, save_prompt
from ..prompt import SoftPrompt
from .names import check_name, folder_name, next_version, split_version
from .scanning import FILES, TRIES, Entry, Reader, Scan, candidates, content_hash, identity, settle

Folders = list[Path]  # a method of the class below is called list
Rows = list[dict[str, Any]]


class Library:
    """The prompts in `folder`, each a prompt folder directly in it: `sentiment`, its second version `sentiment@2`.

    A reference is `name`, which means the newest version that can be used, or `name@version`. It is only ever looked up
    among the folders that are there. Nothing is read until it is asked for; the folder need not exist yet. May be used
    from several threads, and while other processes change the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._reader = Reader(self.folder)
        self._lock = threading.Lock()

    # --- looking ----------------------------------------------------------------------------------------------------

    def scan(self, fingerprint: str = "") -> Scan:
        """All prompts, the unusable ones with the reasons. Never raises. Cheap where nothing has changed.

        fingerprint: that of a backbone; a prompt that was tuned for another one is then unusable.
        """
        return self._scan(fingerprint)

    def verify(self, name: str | None = None) -> Scan:
        """The same, with every file read anew whatever is remembered; only the versions of `name`, if it is given."""
        return self._scan(fresh=True, only=name)

    def leftovers(self) -> Folders:
        """What is being written now, or was by a process that was killed; in that case it can be removed."""
        return [self.folder / name for name in _held(self.folder) if is_temporary(name)]

    def list(self) -> Rows:
        """Plain data for each prompt: name, version, newest, path, sha256, problems, and what `summarise` says."""
        keys = ("name", "version", "newest", "sha256")
        return [
            {
                **{key: getattr(entry, key) for key in keys},
                "path": str(entry.path),
                **entry.summary,
                "problems": [*entry.problems, *entry.remarks],
            }
            for entry in self.scan()
        ]

    def find(self, reference: str, fingerprint: str = "") -> Entry:
        """The entry that `name` or `name@version` means. Raises LibraryError: no such prompt, or it cannot be used."""
        name, version = check_name(reference)
        scan = self._scan(fingerprint, only=name)
        found = scan.find(reference)
        if found is not None:
            return found
        for entry in scan:
            if version in (None, entry.version):
                raise LibraryError(f"'{reference}' cannot be used: {entry.problems[0]}")
        if scan.problem:
            raise LibraryError(scan.problem)
        raise self._unknown(reference)

    def get(self, reference: str) -> SoftPrompt:
        """Read the prompt that `name` or `name@version` means. Raises LibraryError, PromptFormatError."""
        return self.take(reference)[1]

    def take(self, reference: str, fingerprint: str = "") -> tuple[Entry, SoftPrompt]:
        """`find` and `load` together, done again when the prompt is replaced between the two. Raises as these do."""
        for _ in range(TRIES):
            entry = self.find(reference, fingerprint)
            try:
                return entry, self.load(entry)
            except PromptFormatError:  # replaced meanwhile: look once more
                continue
        entry = self.find(reference, fingerprint)
        return entry, self.load(entry)

    def load(self, entry: Entry) -> SoftPrompt:
        """Read the prompt of an entry, exactly as it was when scanned: `entry.sha256` is the hash of what is returned.

        Raises PromptFormatError when it has changed since, or is not usable: scan again.
        """
        if not entry.usable:
            raise PromptFormatError(entry.problems[0])
        prompt = load_prompt(entry.path) if identity(entry.path) == entry.identity else None
        if prompt is None or content_hash(entry.path) != entry.sha256 or identity(entry.path) != entry.identity:
            raise PromptFormatError(f"{entry.path} has changed since the library was looked through: do it again")
        return prompt

    # --- changing ---------------------------------------------------------------------------------------------------

    def save(self, prompt: SoftPrompt, reference: str, *, new_version: bool = False) -> Path:
        """Write `prompt` as `name` (its first version), `name@version`, or with `new_version` as a further version.

        Returns the folder. Replaces nothing. Raises LibraryError (the name is taken or cannot be one), OutputError.
        """
        return self.place(lambda folder: save_prompt(prompt, folder), reference, new_version=new_version)

    def copy(self, source: str, target: str, *, new_version: bool = False, to: Library | None = None) -> Path:
        """Copy the prompt folder that `source` means, with what else it holds; `target` and errors as for `save`.

        to: another library that the copy goes to. `copy("sentiment@1", "sentiment", new_version=True)` makes an old
        version the newest again.
        """
        entry = self.find(source)

        def build(folder: Path) -> None:
            _copy_tree(entry.path, folder)
            if content_hash(folder) != entry.sha256:
                raise LibraryError(f"{entry.path} was changed while it was copied: try again")

        return (to or self).place(build, target, new_version=new_version)

    def rename(self, old: str, new: str) -> Folders:
        """Give a prompt with all its versions, or with `old` as `name@version` that one, another name; the new folders.

        Raises LibraryError when there is no `old`, or something is called `new`. If it fails nothing is renamed.
        """
        folders = self.select(old, all_versions=True)
        name, version = check_name(new)
        base = split_version(folders[0].name)[0]
        whole = old == base
        if whole and version is not None and len(folders) > 1:
            raise LibraryError(
                f"'{old}' has {len(folders)} versions, which cannot all become '{new}'; name one of them"
            )
        if name != base:
            self._check_free(name, version)
            self._check_case(name, leave=base)
        keep = whole and version is None
        targets = [
            self.folder / (name + each.name[len(base) :] if keep else folder_name(name, version or 1))
            for each in folders
        ]
        _rename_all(folders, targets)
        return targets

    def remove(self, reference: str, *, all_versions: bool = False) -> Folders:
        """Remove a prompt folder with all that it holds; of a link, the link. Returns what is gone.

        Raises LibraryError: there is none, or several versions and `all_versions` is not given.
        """
        folders = self.select(reference, all_versions)
        for folder in folders:
            if folder.is_symlink():
                folder.unlink(missing_ok=True)
                continue
            aside = temporary_sibling(folder, "new")  # vanishes at once, however long it takes to remove it
            try:
                os.rename(folder, aside)
                shutil.rmtree(aside)
            except OSError as error:
                raise output_error(folder, error, 0) from error
        return folders

    def select(self, reference: str, all_versions: bool = False) -> Folders:
        """The folders that `rename` and `remove` change: broken ones too, and by the folder's own name whatever it is.

        Raises LibraryError: there is none, or several versions and `all_versions` is not given.
        """
        try:
            names = candidates(self.folder)
        except OSError as error:
            raise LibraryError(f"cannot read the library {self.folder}: {error.strerror or error}") from error
        name, version = split_version(reference)
        versions = [each for each in names if split_version(each)[0] == name]
        if version is not None:  # sentiment@1 is a folder of that name, or else the folder sentiment
            found = [each for each in versions if each == reference]
            found = found or [each for each in versions if (split_version(each)[1] or 1) == version]
        else:
            found = sorted(versions, key=lambda each: split_version(each)[1] or 1)
        if not found:
            raise self._unknown(reference)
        if len(found) > 1 and not all_versions:
            raise LibraryError(
                f"'{reference}' has {len(found)} versions ({', '.join(found)}); name one (the first as {name}@1), or "
                "ask for all versions"
            )
        return [self.folder / each for each in found]

    def place(self, build: Callable[[Path], object], reference: str, *, new_version: bool = False) -> Path:
        """Have `build(folder)` make a prompt folder under a temporary name and put it into the library, as `save` does.

        Raises what `build` raises, LibraryError and OutputError; nothing is then left behind.
        """
        name, version = self.check_new(reference, new_version=new_version)
        temporary = temporary_sibling(self.folder / folder_name(name, version or 1), "new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            build(temporary)
            return self._put(temporary, name, version, new_version)
        except OSError as error:
            raise output_error(self.folder / name, error, 0) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def check_new(self, reference: str, *, new_version: bool = False) -> tuple[str, int | None]:
        """Raise the LibraryError that `save` would raise, as far as it can be known now; name and version."""
        name, version = check_name(reference)
        if new_version and version is not None:
            raise LibraryError(f"'{reference}' is one version already; give the name alone for a new version")
        if not new_version:
            self._check_free(name, version)
        self._check_case(name)
        return name, version

    # --- parts ------------------------------------------------------------------------------------------------------

    def _scan(self, fingerprint: str = "", fresh: bool = False, only: str | None = None) -> Scan:
        with self._lock:
            entries, problem = self._reader.scan(fresh, only)
        return Scan.of(settle(entries, fingerprint), problem)

    def _put(self, temporary: Path, name: str, version: int | None, new_version: bool) -> Path:
        while True:
            first = self.folder / folder_name(name, version or 1)
            target = next_version(first) if new_version else first
            if place_new(temporary, target):
                return target
            if not new_version:  # somebody else was faster
                raise LibraryError(f"{self.folder} has a prompt '{target.name}' already; choose another name")

    def _check_free(self, name: str, version: int | None) -> None:
        """Raise LibraryError if the name, or with a version that version of it, is taken."""
        held = [each for each in _held(self.folder) if split_version(each)[0] == name]
        if version is not None:
            held = [each for each in held if (split_version(each)[1] or 1) == version]
        if held:
            raise LibraryError(
                f"{self.folder} has {', '.join(held)} already; choose another name, or make it a new version"
            )

    def _check_case(self, name: str, leave: str = "") -> None:
        """Raise LibraryError if another name differs in case only: on many file systems the two would be one."""
        for each in _held(self.folder):
            other = split_version(each)[0]
            if other not in (name, leave) and other.lower() == name.lower():
                raise LibraryError(
                    f"{self.folder} has '{other}', which on some machines is the same name as '{name}'; choose another"
                )

    def _unknown(self, reference: str) -> LibraryError:
        known = [name for name in _held(self.folder) if not name.startswith(".")]
        near = get_close_matches(reference, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known[:8]) or 'none'}"
        return LibraryError(f"no prompt {reference[:140]!r} in {self.folder}{hint}")


def _held(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _rename_all(sources: list[Path], targets: list[Path]) -> None:
    """Rename each to its target, the newest version first; undo it all if one cannot be renamed."""
    done: list[tuple[Path, Path]] = []
    for source, target in reversed(list(zip(sources, targets))):
        why = "it is there already"
        try:
            placed = source == target or place_new(source, target) or _only_case(source, target)
        except OutputError as error:
            placed, why = False, str(error)
        if not placed:
            for before, after in done:
                place_new(after, before)
            raise LibraryError(f"cannot rename {source} to {target}: {why}")
        done.append((source, target))


def _only_case(source: Path, target: Path) -> bool:
    """Rename mood to Mood where the file system takes the two for one."""
    if source.name.lower() != target.name.lower() or not os.path.samefile(source, target):
        return False
    os.rename(source, target)
    return True


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files and folders. Of links only those that are a prompt's own files (known to stay in the library)."""
    target.mkdir()
    for entry in os.scandir(source):
        if is_temporary(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            _copy_tree(source / entry.name, target / entry.name)
        elif entry.is_file(follow_symlinks=entry.name in FILES):
            shutil.copyfile(source / entry.name, target / entry.name)
            _sync(target / entry.name)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
