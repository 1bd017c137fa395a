"""One look at a library: which prompts are there, what they hold (by hash), and what is wrong. Nothing raises.

Other processes may write into the folder meanwhile. They do it under temporary names, which are passed over, and by
renaming whole folders; what was read is only believed if the files were the same ones before and after reading.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..atomic import leftovers, original_name
from ..description import PROMPT_FILE
from ..errors import PromptFormatError
from ..fileformat import examine_prompt
from ..peft_format import CONFIG_FILE
from ..tensorfile import TENSOR_FILE, read_bytes
from .listing import looks_like_prompt, summarise
from .names import folder_name, name_problem, split_version

FILES = (PROMPT_FILE, TENSOR_FILE, CONFIG_FILE)
TRIES = 20
PAUSE = 0.005  # seconds before a folder that changed while it was read is read again; a replacement takes less
SETTLED = 2_000_000_000  # ns; two writes in place within a tick of the file system's clock leave the same times
Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A prompt folder of a library, as it was found.

    name, version: what it is asked for by, `name@version`; of a folder that has no proper name, the folder's name.
    sha256: of the description and the tensors together (see `content_hash`); "" when they cannot be read. Two entries
    with equal hashes answer alike. problems: why it cannot be used, a line each, for logs (they name paths); empty when
    it can. remarks: what is wrong with it otherwise (PEFT's file is missing, unknown keys). newest: whether plain
    `name` means this one: the highest version that can be used. summary: see `listing.summarise`.
    """

    name: str
    version: int
    path: Path
    sha256: str = ""
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    newest: bool = False
    summary: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    identity: Identity | None = field(default=None, repr=False, compare=False)

    @property
    def usable(self) -> bool:
        return not self.problems

    @property
    def reference(self) -> str:
        """name@version, which names it for as long as it is there."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Scan:
    """What a library held at one moment: its entries by name and version, the unusable ones too. It never changes.

    problem: why the folder itself could not be read, or "".
    """

    entries: tuple[Entry, ...] = ()
    problem: str = ""
    _names: Mapping[str, Entry] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(entries: Iterable[Entry], problem: str = "") -> Scan:
        made = tuple(sorted(entries, key=lambda entry: (entry.name, entry.version, entry.path.name)))
        names = {entry.reference: entry for entry in made if entry.usable}
        names |= {entry.name: entry for entry in made if entry.newest}
        return Scan(made, problem, names)

    def find(self, reference: str) -> Entry | None:
        """The usable entry that `name` or `name@version` means. The text is looked up, never made part of a path."""
        return self._names.get(reference)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def content_hash(folder: Path) -> str:
    """sha256 (hex) of the sha256 of `softprompt.json` (of `adapter_config.json` where there is none, in an adapter of
    PEFT's) followed by the sha256 of `adapter_model.safetensors`. Raises PromptFormatError when one cannot be read."""
    described = PROMPT_FILE if os.path.lexists(folder / PROMPT_FILE) else CONFIG_FILE
    parts = [hashlib.sha256(read_bytes(folder / name)).digest() for name in (described, TENSOR_FILE)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def identity(folder: Path) -> Identity | None:
    """What changes when a prompt's files are replaced or written to, cheaply found. None if there is no such folder."""
    about = _about(folder)
    # Of the folder only what it is: its times also change with what else it holds.
    return None if about is None else (about[:3], *(_about(folder / name) for name in FILES))


def _about(path: Path) -> Identity | None:
    """Whether it is a link, device, inode, and of a file also size and times; of a link, those of what it leads to."""
    try:
        about = os.lstat(path)
        linked = stat.S_ISLNK(about.st_mode)
        if linked:
            about = os.stat(path)
    except OSError:
        return None
    return linked, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def candidates(root: Path) -> list[str]:
    """The names of the folders in a library that are prompts, or were to be (empty folders, links that lead nowhere).

    Raises OSError.
    """
    return [name for name in sorted(os.listdir(root)) if not name.startswith(".") and _is_candidate(root / name)]


def _is_candidate(path: Path) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return True  # it was there when the library was listed: perhaps it is being replaced
    if stat.S_ISLNK(mode) and not os.path.exists(path):
        return True
    folder = os.path.isdir(path) if stat.S_ISLNK(mode) else stat.S_ISDIR(mode)
    return folder and looks_like_prompt(path, unclear=True)


def _put_aside(listed: list[str]) -> dict[str, str]:
    """Folder name -> hidden name of its old version, for prompts whose new version is not in place (yet)."""
    found = {original_name(name): name for name in listed}
    # The hidden name holds the first 50 characters of the other.
    return {
        name: aside
        for name, aside in found.items()
        if name and name not in listed and not (len(name) == 50 and any(each.startswith(name) for each in listed))
    }


class Reader:
    """Reads the prompt folders of one library, and remembers what is in those whose files have not changed."""

    def __init__(self, root: Path):
        self.root = root
        self._kept: dict[str, Entry] = {}

    def scan(self, fresh: bool, only: str | None = None) -> tuple[list[Entry], str]:
        """The entries (of the name `only`, or all) and why the folder could not be read. fresh: read all anew."""
        try:
            names, aside = self._settled_names()
        except OSError as error:
            return [], f"cannot read the library {self.root}: {error.strerror or error}"
        if only is None:
            self._kept = {name: entry for name, entry in self._kept.items() if name in names}
        else:
            names = [name for name in names if split_version(name)[0] == only]
            aside = {name: old for name, old in aside.items() if split_version(name)[0] == only}
        found = [entry for name in sorted(names) if (entry := self._read(name, fresh)) is not None]
        return [*found, *(_interrupted(self.root, name, old) for name, old in aside.items())], ""

    def _settled_names(self) -> tuple[list[str], dict[str, str]]:
        """What is in the library, and what a save that was killed between its two renames has put aside.

        One that is alive needs a moment between them: a name that is missing meanwhile is waited for.
        """
        for _ in range(TRIES):
            listed = os.listdir(self.root)
            aside = _put_aside(listed)
            if not aside:
                break
            time.sleep(PAUSE)
        return [name for name in listed if not name.startswith(".")], aside

    def _read(self, name: str, fresh: bool) -> Entry | None:
        """The entry of one folder; None if it is gone, or never was a prompt."""
        entry = _named(self.root, name)
        for _ in range(TRIES):
            before, now = identity(entry.path), time.time_ns()
            kept = self._kept.get(name)
            if before is not None and kept is not None and kept.identity == before and not fresh:
                return _with(kept, *entry.problems)
            if before is not None:
                if not _is_candidate(entry.path):
                    return None
                if outside := _leads_outside(self.root, entry.path, before):  # not a byte of it is read
                    return _with(entry, outside)
                made = replace(_examine(replace(entry, problems=())), identity=before)
                if identity(entry.path) == before:
                    if _settled(before, now):
                        self._kept[name] = made
                    return _with(made, *entry.problems)
            time.sleep(PAUSE)
        if not os.path.lexists(entry.path):
            aside = leftovers(entry.path)  # a save that needs longer than that between its two renames, or was killed
            return _interrupted(self.root, name, aside[-1].name) if aside else None
        why = "it leads nowhere" if entry.path.is_symlink() else "it changes while it is read; try again"
        return _with(entry, f"cannot read {entry.path}: {why}")


def _with(entry: Entry, *problems: str) -> Entry:
    return replace(entry, problems=(*entry.problems, *problems))


def _named(root: Path, folder: str) -> Entry:
    """The entry of a folder before anything in it has been looked at."""
    name, version = split_version(folder)
    if problem := name_problem(name):
        return Entry(folder, 1, root / folder, problems=(problem,))
    if version == 1 and os.path.isdir(root / name):
        problem = f"{folder} and {name} are both version 1 of '{name}'; rename or remove {folder}"
        return Entry(name, 1, root / folder, problems=(problem,))
    return Entry(name, version or 1, root / folder)


def _examine(entry: Entry) -> Entry:
    prompt, problems = examine_prompt(entry.path)
    try:
        sha256 = content_hash(entry.path)
    except PromptFormatError as error:
        sha256 = ""
        problems = problems or [str(error)]
    summary = summarise(entry.path, prompt)
    if prompt is None or not sha256:
        return replace(entry, sha256=sha256, problems=tuple(problems), summary=summary)
    return replace(entry, sha256=sha256, remarks=tuple(problems), summary=summary)


def _settled(found: Identity, now: int) -> bool:
    """Whether the files were last written so long before `now` that any later write shows in their times."""
    return all(now - max(each[4:]) > SETTLED for each in found[1:] if each is not None)


def _leads_outside(root: Path, path: Path, found: Identity) -> str:
    """What is wrong if the folder, or one of its files, is a link to something that is not in the library; or ''."""
    paths = (path, *(path / name for name in FILES))
    linked = [
        each for each, about in zip(paths, found) if about is None or about[0]
    ]  # None: a link that leads nowhere?
    inside = os.path.realpath(root) if linked else ""
    for each in linked:
        if os.path.commonpath([inside, os.path.realpath(each)]) != inside:
            return f"{each} is a link that leads out of the library; put a copy of the prompt there instead"
    return ""


def _interrupted(root: Path, name: str, aside: str) -> Entry:
    base, version = split_version(name)
    problem = f"an interrupted save left {name} as {root / aside}: rename it back to {name}"
    return Entry(base, version or 1, root / aside, problems=(problem,))


def settle(entries: Iterable[Entry], fingerprint: str = "") -> list[Entry]:
    """With `fingerprint`, mark what is for another model; then mark the newest usable version of each name."""
    made = [_for_model(entry, fingerprint) if fingerprint else entry for entry in entries]
    newest: dict[str, int] = {}
    for entry in made:
        if entry.usable:
            newest[entry.name] = max(entry.version, newest.get(entry.name, 0))
    return [replace(entry, newest=entry.usable and newest[entry.name] == entry.version) for entry in made]


def _for_model(entry: Entry, fingerprint: str) -> Entry:
    theirs = entry.summary.get("fingerprint")
    if not theirs or theirs == fingerprint:
        return entry
    problem = (
        f"{folder_name(entry.name, entry.version)} is for {entry.summary.get('base_model') or 'an unnamed model'} "
        f"(fingerprint {theirs}), not for this one ({fingerprint})"
    )
    return _with(entry, problem)
