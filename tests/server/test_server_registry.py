"""Which prompts are served, look by look at a folder that others change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from server_material import SENTIMENT, TOPIC, make_backbone, make_prompt

from softprompt.library import Library
from softprompt.library.library import Library as RealLibrary
from softprompt.prompt import SoftPrompt
from softprompt.server.registry import Registry
from softprompt.templates import Template


@pytest.fixture
def folder(backbone, tmp_path) -> Path:
    make_prompt(backbone, SENTIMENT, 1).save(tmp_path / "sentiment")
    make_prompt(backbone, TOPIC, 3).save(tmp_path / "topic")
    return tmp_path


@pytest.fixture
def registry(backbone, folder) -> Registry:
    made = Registry(backbone, Library(folder))
    made.refresh()
    return made


def half_copied(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def changed_after_it_was_saved(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def put_aside_by_a_save_that_was_killed(folder: Path) -> None:
    folder.rename(folder.parent / f".{folder.name}.softprompt-0123abcd.old")


def linked_out_of_the_library(folder: Path) -> None:
    outside = folder.parent.parent / f"{folder.parent.name}-outside"
    folder.rename(outside)
    folder.symlink_to(outside)


BREAKS = [
    half_copied,
    changed_after_it_was_saved,
    empty,
    put_aside_by_a_save_that_was_killed,
    linked_out_of_the_library,
]


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_prompt_that_breaks_is_served_as_it_was(backbone, registry, folder, caplog, break_it):
    before = registry.find("sentiment")
    with caplog.at_level("WARNING", "softprompt.server"):
        break_it(folder / "sentiment")
        for _ in range(2):
            registry.refresh()
    assert registry.find("sentiment") is registry.find("sentiment@1") is before
    assert list(registry.now.skipped) == list(registry.now.told) == list(registry.now.kept) == ["sentiment@1"]
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("prompt sentiment@1 is served as it was before: ")
    assert Registry(backbone, Library(folder)).refresh().tasks.keys() == {"base", "topic", "topic@1"}  # a new process
    if (folder / "sentiment").is_symlink():
        (folder / "sentiment").unlink()
    make_prompt(backbone, SENTIMENT, 5).save(folder / "sentiment", overwrite=True)
    registry.refresh()
    assert registry.find("sentiment") is not before and not registry.now.skipped


def test_what_is_gone_or_is_for_another_model_is_dropped(registry, folder):
    shutil.rmtree(folder / "topic")
    make_prompt(make_backbone(seed=1), SENTIMENT, 1).save(folder / "sentiment", overwrite=True)
    found = registry.refresh()
    assert found.tasks.keys() == {"base"}
    assert "is for tiny" in found.skipped["sentiment@1"]
    assert found.told == {"sentiment@1": "it is for another model"} and not found.kept


def test_a_newer_version_that_breaks_is_kept_and_one_that_never_could_be_used_is_not(backbone, registry, folder):
    make_prompt(backbone, SENTIMENT, 2).save(folder / "sentiment@2")
    second = registry.refresh().tasks["sentiment"]
    assert second.version == 2
    half_copied(folder / "sentiment@2")
    make_prompt(backbone, SENTIMENT, 3).save(folder / "sentiment@3")
    half_copied(folder / "sentiment@3")
    found = registry.refresh()
    assert found.tasks["sentiment"] is found.tasks["sentiment@2"] is second
    assert "sentiment@3" not in found.tasks and set(found.skipped) == {"sentiment@2", "sentiment@3"}


def test_two_folders_of_one_version_do_not_hold_up_a_change(backbone, registry, folder):
    shutil.copytree(folder / "topic", folder / "topic@1")
    make_prompt(backbone, TOPIC, 4).save(folder / "topic", overwrite=True)
    found = registry.refresh()
    assert torch.equal(found.tasks["topic@1"].vectors, make_prompt(backbone, TOPIC, 4).vectors)
    assert list(found.skipped) == ["topic@1"] and not found.kept
    assert found.told == {"topic@1": "another folder is the same version"}


def test_each_reason_is_told_without_a_path(backbone, registry, folder):
    make_prompt(backbone, SENTIMENT, 1).save(folder / "my prompt")
    labels = Template.make("{soft}{text}", "{label}", labels=[" good", " good indeed"])
    SoftPrompt(torch.zeros(2, 7), labels, "x", "").save(folder / "narrow")
    (folder / "empty").mkdir()
    assert registry.refresh().told == {
        "my prompt@1": "its folder is not called as a prompt can be",
        "narrow@1": "it does not fit the model",
        "empty@1": "its files cannot be read, or are not whole",
    }


def test_a_prompt_that_is_replaced_between_look_and_reading(backbone, registry, folder, monkeypatch):
    real, replaced = RealLibrary.load, []

    def load(self, entry):
        if not replaced:
            replaced.append(make_prompt(backbone, SENTIMENT, 4).save(folder / "sentiment", overwrite=True))
        return real(self, entry)

    make_prompt(backbone, SENTIMENT, 2).save(folder / "sentiment", overwrite=True)
    monkeypatch.setattr(RealLibrary, "load", load)
    found = registry.refresh()
    assert replaced and not found.skipped
    assert torch.equal(found.tasks["sentiment"].vectors, make_prompt(backbone, SENTIMENT, 4).vectors)


def test_a_library_that_cannot_be_read_keeps_what_is_served(registry, folder):
    before = registry.now.tasks
    folder.rename(folder.parent / "away")
    found = registry.refresh()
    assert found.tasks == before and "cannot read the library" in found.problem
