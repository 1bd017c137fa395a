"""A library of prompts: names, versions, and changes that lose nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from library_material import DESCRIPTION, TENSOR, make, tree

import softprompt.library.library as module
from softprompt.atomic import temporary_sibling
from softprompt.errors import LibraryError, OutputError, PromptFormatError
from softprompt.library import Library
from softprompt.library.names import check_name, folder_name, next_version, split_version


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """sentiment in two versions, topic in one."""
    made = Library(tmp_path / "prompts")
    made.save(make(1), "sentiment")
    made.save(make(2), "sentiment", new_version=True)
    made.save(make(3), "topic")
    return made


def held(library: Library) -> list[str]:
    return sorted(os.listdir(library.folder))


# --- names -----------------------------------------------------------------------------------------------------------

WRONG = ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "-a", ".a", "_a", "a b", "a\n", "a@", "a@0", "a@02", "a@-1", "ä"]
WRONG += ["a" * 129, "a@2@3", "a@x", "%2e%2e", "a\0", "@2", "base", "base@2", "a@1000000000000"]


@pytest.mark.parametrize("name", WRONG)
def test_names_that_cannot_be(library: Library, name: str) -> None:
    before = held(library)
    for act in (
        lambda: check_name(name),
        lambda: library.find(name),
        lambda: library.save(make(), name),
        lambda: library.save(make(), name, new_version=True),
        lambda: library.copy("topic", name),
        lambda: library.rename("topic", name),
        lambda: library.remove(name),
        lambda: library.rename(name, "other"),
    ):
        with pytest.raises(LibraryError):
            act()
    assert held(library) == before
    assert library.scan().find(name) is None


@pytest.mark.parametrize("name", ["a", "7", "A.b-c_d", "a" * 128, "a..b"])
def test_names_that_can(library: Library, name: str) -> None:
    assert library.save(make(), name) == library.folder / name
    assert library.find(name).version == 1
    assert library.save(make(), name, new_version=True) == library.folder / f"{name}@2"


def test_versions_in_names() -> None:
    assert [split_version(text) for text in ("a", "a@2", "a@b@12", "a@02", "a@0")] == [
        *(("a", None), ("a", 2), ("a@b", 12), ("a@02", None), ("a@0", None))
    ]
    assert [folder_name("a", version) for version in (1, 2)] == ["a", "a@2"]


def test_the_folder_of_the_next_version(tmp_path: Path) -> None:
    assert next_version(tmp_path / "none" / "a") == tmp_path / "none" / "a"
    for name, expected in [("a", "a@2"), ("a@2", "a@3"), ("a@7", "a@8"), ("ab@20", "a@8"), (".a@9.new", "a@8")]:
        (tmp_path / name).mkdir()
        assert next_version(tmp_path / "a").name == next_version(tmp_path / "a@2").name == expected
    temporary_sibling(tmp_path / "a@30", "old").mkdir()
    assert next_version(tmp_path / "a").name == "a@31"


def test_a_name_that_differs_in_case_only_is_another_machine_s_same(library: Library) -> None:
    for act in (
        lambda: library.save(make(), "Topic"),
        lambda: library.copy("sentiment", "TOPIC", new_version=True),
        lambda: library.rename("sentiment", "Topic"),
    ):
        with pytest.raises(LibraryError, match="on some machines is the same name"):
            act()
    assert library.rename("topic", "Topic") == [library.folder / "Topic"]


# --- looking up ------------------------------------------------------------------------------------------------------


def test_a_name_means_its_newest_version(library: Library) -> None:
    assert held(library) == ["sentiment", "sentiment@2", "topic"]
    assert torch.equal(library.get("sentiment").vectors, make(2).vectors)
    assert torch.equal(library.get("sentiment@2").vectors, make(2).vectors)
    assert torch.equal(library.get("sentiment@1").vectors, make(1).vectors)
    assert (library.find("topic").reference, library.find("topic").newest) == ("topic@1", True)
    assert not library.find("sentiment@1").newest


def test_a_library_from_before_there_were_versions(tmp_path: Path) -> None:
    make(5).save(tmp_path / "mood")
    assert torch.equal(Library(tmp_path).get("mood").vectors, make(5).vectors)
    assert [entry.reference for entry in Library(tmp_path).scan()] == ["mood@1"]


def test_the_newest_version_that_can_be_used(library: Library) -> None:
    (library.folder / "sentiment@2" / TENSOR).write_bytes(b"half")
    assert library.find("sentiment").version == 1
    with pytest.raises(LibraryError, match=r"'sentiment@2' cannot be used: .*too few for safetensors"):
        library.get("sentiment@2")
    (library.folder / "sentiment" / DESCRIPTION).unlink()
    (library.folder / "sentiment" / "adapter_config.json").unlink()
    with pytest.raises(LibraryError, match=r"'sentiment' cannot be used: .*half-copied"):
        library.get("sentiment")


def test_what_is_not_there(library: Library, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"no prompt 'sentimant' in .*; did you mean sentiment\?"):
        library.get("sentimant")
    with pytest.raises(LibraryError, match=r"no prompt 'x' in .*; it has sentiment, sentiment@2, topic"):
        library.get("x")
    with pytest.raises(LibraryError, match="no prompt 'topic@2'"):
        library.get("topic@2")
    with pytest.raises(LibraryError, match=r"cannot read the library .*nowhere: No such file"):
        Library(tmp_path / "nowhere").get("x")
    with pytest.raises(LibraryError, match=r"cannot read the library .*nowhere: No such file"):
        Library(tmp_path / "nowhere").remove("x")


def test_an_entry_that_has_changed_is_not_loaded(library: Library) -> None:
    entry = library.find("topic")
    assert torch.equal(library.load(entry).vectors, make(3).vectors)
    make(4).save(entry.path, overwrite=True)
    with pytest.raises(PromptFormatError, match="has changed since"):
        library.load(entry)
    assert torch.equal(library.get("topic").vectors, make(4).vectors)
    shutil.rmtree(entry.path)
    with pytest.raises(PromptFormatError, match="has changed since"):
        library.load(entry)


def test_get_looks_again_when_the_prompt_is_replaced_meanwhile(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [library.find("topic")]
    make(4).save(library.folder / "topic", overwrite=True)
    find = Library.find
    monkeypatch.setattr(Library, "find", lambda self, *given: entries.pop() if entries else find(self, *given))
    entry, prompt = library.take("topic")
    assert torch.equal(prompt.vectors, make(4).vectors)
    assert entry.sha256 == find(library, "topic").sha256


def test_taking_a_prompt_for_one_model(library: Library) -> None:
    make(4, fingerprint="e" * 16).save(library.folder / "topic@2")
    assert library.take("topic")[0].version == 2
    assert library.take("topic", "f" * 16)[0].version == 1
    with pytest.raises(LibraryError, match="not for this one"):
        library.take("topic@2", "f" * 16)


def test_list_is_plain_data(library: Library) -> None:
    make(8).save(library.folder / "broken")
    (library.folder / "broken" / TENSOR).write_bytes(b"")
    rows = {Path(row["path"]).name: row for row in library.list()}
    assert list(rows) == ["broken", "sentiment", "sentiment@2", "topic"]
    second = rows["sentiment@2"]
    assert (second["name"], second["version"], second["newest"]) == ("sentiment", 2, True)
    assert (second["task"], second["kind"], second["tokens"], second["width"]) == ("bad, good", "embedding", 3, 8)
    assert (second["base_model"], second["fingerprint"]) == ("someone/model", "f" * 16)
    assert (second["metric"], second["score"], second["made"]) == ("accuracy", 0.75, "2026-11-21T04:00:00+00:00")
    assert second["bytes"] == sum(map(len, tree(library.folder / "sentiment@2").values()))
    assert second["problems"] == [] and len(second["sha256"]) == 64
    assert rows["broken"]["problems"] and rows["broken"]["tokens"] is None and not rows["broken"]["newest"]
    json.dumps(list(rows.values()))


# --- saving and copying ----------------------------------------------------------------------------------------------


def test_saving_never_replaces(library: Library) -> None:
    before = tree(library.folder)
    for name in ("sentiment", "sentiment@2", "sentiment@1", "topic"):
        with pytest.raises(LibraryError, match=r"already; choose another name, or make it a new version"):
            library.save(make(9), name)
    with pytest.raises(LibraryError, match="is one version already"):
        library.save(make(9), "sentiment@3", new_version=True)
    assert library.save(make(9), "sentiment@7") == library.folder / "sentiment@7"
    assert library.save(make(9), "sentiment", new_version=True) == library.folder / "sentiment@8"
    assert {name: data for name, data in tree(library.folder).items() if name in before} == before


def test_a_broken_version_keeps_its_number(library: Library) -> None:
    (library.folder / "topic@2").mkdir()
    assert library.save(make(), "topic", new_version=True).name == "topic@3"


def test_of_two_savers_of_a_new_version_each_gets_one(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(folder: Path) -> Path:  # between the look and the rename the other one comes
        found = next_version(folder)
        monkeypatch.setattr(module, "next_version", next_version)
        library.save(make(5), "topic", new_version=True)
        return found

    monkeypatch.setattr(module, "next_version", slow)
    assert library.save(make(6), "topic", new_version=True).name == "topic@3"
    assert torch.equal(library.get("topic@2").vectors, make(5).vectors)
    assert torch.equal(library.get("topic@3").vectors, make(6).vectors)


def test_of_two_savers_of_a_name_the_second_is_told(library: Library) -> None:
    def build(folder: Path) -> None:
        make(1).save(folder)
        make(2).save(library.folder / "new")

    with pytest.raises(LibraryError, match="has a prompt 'new' already"):
        library.place(build, "new")
    assert torch.equal(library.get("new").vectors, make(2).vectors)
    assert held(library) == ["new", "sentiment", "sentiment@2", "topic"]


def test_a_save_that_fails_leaves_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(library.folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="no space left"):
            library.save(make(), "topic", new_version=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OutputError, match="no space left"):
            library.copy("topic", "other")
    assert tree(library.folder) == before
    assert held(library) == ["sentiment", "sentiment@2", "topic"]


def test_copy(library: Library, tmp_path: Path) -> None:
    topic = library.folder / "topic"
    (topic / "README.md").write_text("what it is for")
    (topic / "notes").mkdir()
    (topic / "notes" / "a.txt").write_text("a")
    (tmp_path / "secret").write_text("s")
    (topic / "notes" / "link").symlink_to(tmp_path / "secret")
    made = library.copy("topic", "other")
    expected = {name: data for name, data in tree(topic).items() if name != "notes/link"}
    assert tree(made) == expected
    assert library.find("other").sha256 == library.find("topic").sha256
    with pytest.raises(LibraryError, match="already"):
        library.copy("topic", "other")
    with pytest.raises(LibraryError, match="already"):
        library.copy("topic", "topic")


def test_copy_of_an_old_version_makes_it_the_newest(library: Library) -> None:
    assert library.copy("sentiment@1", "sentiment", new_version=True).name == "sentiment@3"
    assert torch.equal(library.get("sentiment").vectors, make(1).vectors)
    assert library.copy("sentiment", "first") == library.folder / "first"
    assert torch.equal(library.get("first").vectors, make(1).vectors)


def test_a_copy_of_what_changes_meanwhile_is_refused(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = module._copy_tree

    def changed(source: Path, target: Path) -> None:
        make(9).save(source, overwrite=True)
        copy(source, target)

    monkeypatch.setattr(module, "_copy_tree", changed)
    with pytest.raises(LibraryError, match="changed while it was copied"):
        library.copy("topic", "other")
    assert "other" not in held(library)


# --- renaming and removing -------------------------------------------------------------------------------------------


def test_rename_takes_all_versions_along(library: Library) -> None:
    before = tree(library.folder / "sentiment@2")
    assert [path.name for path in library.rename("sentiment", "mood")] == ["mood", "mood@2"]
    assert held(library) == ["mood", "mood@2", "topic"]
    assert tree(library.folder / "mood@2") == before


def test_rename_one_version(library: Library) -> None:
    assert library.rename("sentiment@2", "mood") == [library.folder / "mood"]
    assert library.rename("sentiment@1", "topic@5") == [library.folder / "topic@5"]
    assert library.rename("topic@5", "topic@2") == [library.folder / "topic@2"]
    assert held(library) == ["mood", "topic", "topic@2"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("topic", "sentiment", "has sentiment, sentiment@2 already"),
        ("topic", "sentiment@2", "has sentiment@2 already"),
        ("sentiment@2", "topic", "has topic already"),
        ("sentiment@2", "sentiment", "cannot rename .* it is there already"),
        ("sentiment", "mood@3", "has 2 versions, which cannot all become 'mood@3'"),
        ("none", "mood", "no prompt 'none'"),
    ],
)
def test_renames_that_are_refused(library: Library, old: str, new: str, expected: str) -> None:
    before = tree(library.folder)
    with pytest.raises(LibraryError, match=expected):
        library.rename(old, new)
    assert tree(library.folder) == before


def test_a_rename_that_fails_half_way_is_undone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = os.rename, tree(library.folder)

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == "sentiment":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(LibraryError, match="not allowed to write there"):
        library.rename("sentiment", "mood")
    assert tree(library.folder) == before


def test_remove(library: Library) -> None:
    with pytest.raises(LibraryError, match=r"has 2 versions \(sentiment, sentiment@2\)"):
        library.remove("sentiment")
    assert library.remove("sentiment@1") == [library.folder / "sentiment"]
    assert held(library) == ["sentiment@2", "topic"]
    assert torch.equal(library.get("sentiment").vectors, make(2).vectors)
    assert library.remove("sentiment") == [library.folder / "sentiment@2"]
    assert library.save(make(), "topic", new_version=True)
    assert len(library.remove("topic", all_versions=True)) == 2
    assert held(library) == []


def test_broken_and_badly_named_folders_can_be_renamed_and_removed(library: Library) -> None:
    make(4).save(library.folder / "my prompt!")
    make(5).save(library.folder / "base")
    (library.folder / "half").mkdir()
    assert library.rename("my prompt!", "mine") == [library.folder / "mine"]
    assert library.rename("base", "basis") == [library.folder / "basis"]
    assert library.remove("half") == [library.folder / "half"]
    assert torch.equal(library.get("mine").vectors, make(4).vectors)


def test_a_second_folder_of_version_1(library: Library) -> None:
    make(4).save(library.folder / "topic@1")
    assert torch.equal(library.get("topic@1").vectors, make(3).vectors)
    assert library.rename("topic@1", "topic@2") == [library.folder / "topic@2"]
    assert torch.equal(library.get("topic").vectors, make(4).vectors)


def test_what_is_no_prompt_is_left_alone(library: Library) -> None:
    (library.folder / "notes").mkdir()
    (library.folder / "notes" / "a.txt").write_text("a")
    (library.folder / "file").write_text("a")
    for name in ("notes", "file", "../prompts/topic", ".", ".."):
        with pytest.raises(LibraryError, match="no prompt"):
            library.remove(name)
    assert (library.folder / "notes" / "a.txt").read_text() == "a"


def test_of_a_link_the_link_is_removed(library: Library) -> None:
    (library.folder / "alias").symlink_to("topic")
    assert torch.equal(library.get("alias").vectors, make(3).vectors)
    copied = library.copy("alias", "real")
    assert not copied.is_symlink() and tree(copied) == tree(library.folder / "topic")
    library.rename("alias", "nickname")
    library.remove("nickname")
    assert torch.equal(library.get("topic").vectors, make(3).vectors)
    assert held(library) == ["real", "sentiment", "sentiment@2", "topic"]


def test_the_folder_moves_as_it_is(library: Library, tmp_path: Path) -> None:
    hashes = {entry.reference: entry.sha256 for entry in library.scan()}
    for text in tree(library.folder).values():
        assert str(tmp_path).encode() not in text
    moved = shutil.move(library.folder, tmp_path / "elsewhere")
    assert {entry.reference: entry.sha256 for entry in Library(moved).scan()} == hashes
    assert all(entry.usable and not entry.remarks for entry in Library(moved).verify())
