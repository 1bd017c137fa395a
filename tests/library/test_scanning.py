"""One look at a library: what is there, what is wrong, while others write."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from library_material import DESCRIPTION, PEFT, TENSOR, make

import softprompt.library.scanning as scanning
from softprompt.atomic import temporary_sibling
from softprompt.errors import PromptFormatError
from softprompt.library import Entry, Library, Scan

LATER = 3 * scanning.SETTLED


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "PAUSE", 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """sentiment in two versions, topic in one."""
    for seed, name in enumerate(("sentiment", "sentiment@2", "topic")):
        make(seed).save(tmp_path / "prompts" / name)
    return tmp_path / "prompts"


def by_folder(scan: Scan) -> dict[str, Entry]:
    return {entry.path.name: entry for entry in scan}


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are really read."""
    names: list[str] = []
    real = scanning.examine_prompt

    def examine(folder: Path) -> Any:
        names.append(Path(folder).name)
        return real(folder)

    monkeypatch.setattr(scanning, "examine_prompt", examine)
    return names


def test_what_is_found(root: Path) -> None:
    scan = Library(root).scan()
    assert [entry.reference for entry in scan] == ["sentiment@1", "sentiment@2", "topic@1"]
    assert [entry.newest for entry in scan] == [False, True, True]
    assert scan.problem == "" and len(scan) == 3 and all(entry.usable for entry in scan)
    assert scan.find("sentiment") is scan.find("sentiment@2") is scan.entries[1]
    assert scan.find("nothing") is scan.find("../topic") is scan.find("") is None
    assert scan.entries[2].path == root / "topic"
    assert hash(scan.entries[0]) != hash(scan.entries[1])


def test_the_content_hash(root: Path) -> None:
    folder = root / "topic"
    digests = [hashlib.sha256((folder / name).read_bytes()).digest() for name in (DESCRIPTION, TENSOR)]
    expected = hashlib.sha256(b"".join(digests)).hexdigest()
    library = Library(root)
    assert library.scan().find("topic").sha256 == expected
    (folder / "README.md").write_text("about it")
    assert library.verify().find("topic").sha256 == expected
    make(2, metrics={"accuracy": 0.5}).save(folder, overwrite=True)
    assert library.scan().find("topic").sha256 != expected


def test_an_adapter_of_peft(root: Path) -> None:
    (root / "topic" / DESCRIPTION).unlink()
    entry = Library(root).scan().find("topic")
    assert entry is not None and entry.sha256
    (root / "topic" / PEFT).write_text((root / "topic" / PEFT).read_text() + "\n")
    assert Library(root).scan().find("topic").sha256 != entry.sha256


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_half_written_folders(root: Path) -> None:
    (root / "topic" / TENSOR).write_bytes((root / "topic" / TENSOR).read_bytes()[:-5])
    (root / "sentiment" / TENSOR).unlink()
    (root / "empty").mkdir()
    make().save(root / "tensor")
    (root / "tensor" / DESCRIPTION).unlink()
    (root / "tensor" / PEFT).unlink()
    make().save(root / "swapped")
    shutil.copyfile(root / "sentiment@2" / TENSOR, root / "swapped" / TENSOR)
    found = by_folder(Library(root).scan())
    for name, expected in {
        "topic": "is truncated",
        "sentiment": "half-copied",
        "empty": "found nothing",
        "tensor": "half-copied",
        "swapped": "was changed after the prompt was saved",
    }.items():
        assert expected in found[name].problems[0]
        assert not found[name].usable and not found[name].newest
    assert Library(root).scan().find("sentiment").version == 2
    assert Library(root).scan().find("topic") is None


def test_prompts_for_another_model(root: Path) -> None:
    make(7, fingerprint="e" * 16, base_model="other/model").save(root / "topic@2")
    make(8, fingerprint="").save(root / "unknown")
    library = Library(root)
    assert library.scan().find("topic").version == 2
    scan = library.scan(fingerprint="f" * 16)
    assert scan.find("topic").version == 1
    assert scan.find("unknown") is not None
    told = "topic@2 is for other/model (fingerprint eeeeeeeeeeeeeeee), not for this one (ffffffffffffffff)"
    assert by_folder(scan)["topic@2"].problems == (told,)
    assert library.scan().find("topic").version == 2


def test_two_folders_of_one_version(root: Path) -> None:
    make(9).save(root / "topic@1")
    library = Library(root)
    found = by_folder(library.scan())
    assert found["topic@1"].problems == ("topic@1 and topic are both version 1 of 'topic'; rename or remove topic@1",)
    assert library.scan().find("topic").path == library.scan().find("topic@1").path == root / "topic"
    shutil.rmtree(root / "topic")
    assert library.scan().find("topic").path == root / "topic@1"


@pytest.mark.parametrize("name", ["my prompt", "-x", "a@02", "a@0", "ü", "base", "a" * 129])
def test_folders_that_are_not_called_as_a_prompt(root: Path, name: str) -> None:
    make().save(root / name)
    scan = Library(root).scan()
    (entry,) = (entry for entry in scan if not entry.usable)
    assert entry.path.name == name
    assert "cannot be" in entry.problems[0]
    assert scan.find(name) is scan.find(entry.reference) is None
    assert len(scan) == 4


def test_links_that_lead_out_are_not_read(
    root: Path, tmp_path: Path, examined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = make(5).save(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in (DESCRIPTION, TENSOR, PEFT):
        (root / "files" / name).symlink_to(outside / name)
    (root / "deeper").mkdir()
    (root / "deeper" / DESCRIPTION).symlink_to("/etc/passwd")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "loop").symlink_to("loop")
    (root / "alias").symlink_to("topic")
    found = by_folder(Library(root).scan())
    for name in ("link", "files", "deeper"):
        assert "leads out of the library" in found[name].problems[0]
        assert found[name].sha256 == "" and not found[name].summary
    assert "leads nowhere" in found["nowhere"].problems[0]
    assert found["alias"].usable and found["alias"].sha256 == found["topic"].sha256
    assert set(examined) == {"sentiment", "sentiment@2", "topic", "alias"}


def test_a_library_that_is_itself_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert len(Library(tmp_path / "link").scan()) == 3
    assert all(entry.usable for entry in Library(tmp_path / "link").scan())


def test_a_library_that_cannot_be_read(tmp_path: Path) -> None:
    scan = Library(tmp_path / "nowhere").scan()
    assert len(scan) == 0 and "No such file" in scan.problem
    (tmp_path / "file").write_text("")
    assert "Not a directory" in Library(tmp_path / "file").scan().problem


def test_what_is_passed_over(root: Path) -> None:
    (root / "README.md").write_text("a")
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("a")
    (root / "lora").mkdir()
    (root / "lora" / PEFT).write_text('{"peft_type": "LORA"}')
    (root / ".git").mkdir()
    make().save(root / "deeper" / "one")
    for ending in ("new", "old"):
        make().save(temporary_sibling(root / "topic", ending))
    (temporary_sibling(root / "coming", "new")).mkdir()
    assert len(Library(root).scan()) == 3


@pytest.mark.parametrize("name", [DESCRIPTION, TENSOR, PEFT])
def test_a_pipe_for_a_file_does_not_hang(root: Path, name: str) -> None:
    (root / "topic" / name).unlink()
    os.mkfifo(root / "topic" / name)
    entry = by_folder(Library(root).scan())["topic"]
    assert bool(entry.remarks) == (name == PEFT)
    assert bool(entry.problems) == (name != PEFT)


def test_what_is_wrong_without_harm(root: Path) -> None:
    (root / "topic" / PEFT).unlink()
    entry = Library(root).scan().find("topic")
    assert entry is not None and entry.problems == ()
    assert "PEFT cannot load the prompt" in entry.remarks[0]


def test_a_save_that_was_killed_between_its_renames(root: Path) -> None:
    aside = temporary_sibling(root / "sentiment@2", "old")
    (root / "sentiment@2").rename(aside)
    library = Library(root)
    (entry,) = (entry for entry in library.scan() if not entry.usable)
    assert entry.reference == "sentiment@2"
    assert entry.problems == (
        f"an interrupted save left sentiment@2 as {root / aside.name}: rename it back to sentiment@2",
    )
    assert library.scan().find("sentiment").version == 1
    aside.rename(root / "sentiment@2")
    assert library.scan().find("sentiment").version == 2


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_only_what_has_changed_is_read_again(root: Path, examined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns() + LATER
    monkeypatch.setattr(scanning.time, "time_ns", lambda: now)
    library = Library(root)
    first = library.scan()
    assert examined == ["sentiment", "sentiment@2", "topic"]
    assert library.scan() == first and len(examined) == 3
    make(9).save(root / "topic", overwrite=True)
    assert library.scan().find("topic").sha256 != first.find("topic").sha256
    assert examined[3:] == ["topic"]
    library.verify()
    assert len(examined) == 7
    shutil.rmtree(root / "topic")
    assert library.scan().find("topic") is None


def test_what_was_written_a_moment_ago_is_read_again(
    root: Path, examined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within a tick of the file system's clock would otherwise look like one."""
    now = max(path.stat().st_ctime_ns for path in root.rglob("*")) + scanning.SETTLED // 2
    monkeypatch.setattr(scanning.time, "time_ns", lambda: now)
    library = Library(root)
    assert library.scan() == library.scan()
    assert len(examined) == 6


def test_a_change_in_place_is_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time_ns() + LATER
    monkeypatch.setattr(scanning.time, "time_ns", lambda: later)
    library = Library(root)
    before = library.scan().find("topic")
    text = (root / "topic" / DESCRIPTION).read_text()
    (root / "topic" / DESCRIPTION).write_text(text.replace("0.75", "0.85"))
    after = library.scan().find("topic")
    assert before.sha256 != after.sha256
    assert after.summary["score"] == 0.85


# --- while others write ----------------------------------------------------------------------------------------------


def test_a_folder_replaced_while_it_is_read_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = scanning.examine_prompt, [3]

    def examine(folder: Path) -> Any:
        found = real(folder)
        if folder.name == "topic" and left[0]:
            left[0] -= 1
            make(20 + left[0]).save(folder, overwrite=True)
        return found

    monkeypatch.setattr(scanning, "examine_prompt", examine)
    library = Library(root)
    entry = library.scan().find("topic")
    assert left == [0]
    assert torch.equal(library.load(entry).vectors, make(20).vectors)


def test_a_folder_that_changes_all_the_time_is_told_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1000))
    monkeypatch.setattr(scanning, "identity", lambda folder: ((False, 0, 0), (False, next(count))))
    assert ["changes while it is read" in entry.problems[0] for entry in Library(root).scan()] == [True] * 3


def test_a_name_between_the_two_renames_of_a_save_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = temporary_sibling(root / "topic", "old")
    (root / "topic").rename(aside)

    def meanwhile(seconds: float) -> None:
        if aside.exists():
            make(9).save(root / "topic")
            shutil.rmtree(aside)

    monkeypatch.setattr(scanning.time, "sleep", meanwhile)
    scan = Library(root).scan()
    assert [entry.usable for entry in scan] == [True] * 3
    assert torch.equal(Library(root).load(scan.find("topic")).vectors, make(9).vectors)


def test_a_folder_that_goes_while_it_is_read_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scanning.examine_prompt

    def examine(folder: Path) -> Any:
        shutil.rmtree(root / "topic", ignore_errors=True)
        return real(folder)

    monkeypatch.setattr(scanning, "examine_prompt", examine)
    assert [entry.reference for entry in Library(root).scan()] == ["sentiment@1", "sentiment@2"]


def test_a_prompt_replaced_in_a_loop_is_always_the_old_or_the_new(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "PAUSE", 0.002)
    monkeypatch.setattr(scanning, "TRIES", 500)
    known = {make(seed).vectors.numpy().tobytes() for seed in (1, 2, 3)}
    over = threading.Event()

    def replace() -> None:
        count = 0
        while not over.is_set():
            make(2 + count % 2).save(root / "sentiment@2", overwrite=True)
            count += 1

    writer = threading.Thread(target=replace)
    make(1).save(root / "sentiment@2", overwrite=True)
    writer.start()
    try:
        library, read = Library(root), 0
        for _ in range(40):
            scan = library.scan()
            assert [entry.reference for entry in scan if entry.usable] == ["sentiment@1", "sentiment@2", "topic@1"]
            try:
                prompt = library.load(scan.find("sentiment"))
            except PromptFormatError:
                continue  # replaced since
            read += 1
            assert prompt.vectors.numpy().tobytes() in known
    finally:
        over.set()
        writer.join()
    assert torch.equal(library.get("sentiment").vectors, library.get("sentiment@2").vectors)
