"""Prompts to and from a hub. The network is replaced where the hub's own client would use it; no hub was asked."""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from library_material import DESCRIPTION, PEFT, TENSOR, make, tree

from softprompt.errors import HubError, LibraryError, OutputError, PromptFormatError
from softprompt.library import Library
from softprompt.library.hub import check_repository, local_paths, pull, push
from softprompt.templates import Template

REAL_API, REAL_DOWNLOAD = huggingface_hub.HfApi, huggingface_hub.snapshot_download


@dataclass
class Hub:
    """Repositories in memory; every call is checked against the signature of the real one."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None
    downloaded: list[str] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    def _called(self, real: Any, *given: Any, **named: Any) -> None:
        inspect.signature(real).bind(*given, **named)
        if self.error is not None:
            raise self.error

    def create_repo(self, repo_id: str, **named: Any) -> str:
        self._called(REAL_API.create_repo, self, repo_id, **named)
        assert named["exist_ok"] and named["repo_type"] == "model"
        self.private.setdefault(repo_id, named["private"])
        self.repositories.setdefault(repo_id, {})
        return f"https://hub/{repo_id}"

    def upload_folder(self, **named: Any) -> None:
        self._called(REAL_API.upload_folder, self, **named)
        files = self.repositories[named["repo_id"]]
        for name in list(files):
            if any(fnmatch(name, pattern) for pattern in named["delete_patterns"]):
                del files[name]
        allowed = named["allow_patterns"]
        files |= {k: v for k, v in tree(named["folder_path"]).items() if any(fnmatch(k, p) for p in allowed)}

    def model_info(self, repo_id: str, **named: Any) -> Any:
        self._called(REAL_API.model_info, self, repo_id, **named)
        assert named["files_metadata"] and named["timeout"] > 0
        files = self.repositories[repo_id]
        siblings = [SimpleNamespace(rfilename=n, size=self.sizes.get(n, len(data))) for n, data in files.items()]
        return SimpleNamespace(sha=f"commit-of-{named['revision']}", siblings=siblings)

    def snapshot_download(self, repo_id: str, **named: Any) -> str:
        self._called(REAL_DOWNLOAD, repo_id, **named)
        assert named["revision"].startswith("commit-of-")
        for name, data in self.repositories[repo_id].items():
            if any(fnmatch(name, pattern) for pattern in named["allow_patterns"]):
                self.downloaded.append(name)
                (Path(named["local_dir"]) / name).write_bytes(data)
        (Path(named["local_dir"]) / ".cache").mkdir()
        self.during()
        return named["local_dir"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def library(tmp_path: Path) -> Library:
    make(1).save(tmp_path / "prompts" / "sentiment")
    return Library(tmp_path / "prompts")


def held(library: Library) -> set[str]:
    return {path.name for path in library.folder.iterdir()}


def test_there_and_back(hub: Hub, library: Library, tmp_path: Path) -> None:
    entry = library.find("sentiment")
    assert push(entry, "anna/sentiment") == "https://hub/anna/sentiment"
    assert set(hub.repositories["anna/sentiment"]) == {DESCRIPTION, TENSOR, PEFT, "README.md"}
    assert hub.private == {"anna/sentiment": True}
    other = Library(tmp_path / "other")
    pulled = pull("anna/sentiment", other, revision="v1")
    assert (pulled.folder, pulled.commit) == (other.folder / "sentiment", "commit-of-v1")
    assert other.find("sentiment").sha256 == entry.sha256
    assert tree(pulled.folder) == tree(entry.path)
    assert held(other) == {"sentiment"}


def test_what_is_uploaded(hub: Hub, library: Library, tmp_path: Path) -> None:
    folder = library.folder / "sentiment"
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    push(library.find("sentiment"), "anna/x", public=True)
    files = hub.repositories["anna/x"]
    assert set(files) == {DESCRIPTION, TENSOR, PEFT, "README.md"}
    assert hub.private == {"anna/x": False}
    card = files["README.md"].decode()
    assert "base_model: someone/model" in card and "3 tokens" in card and "Review: {text}" in card
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("my own words")
    push(library.find("sentiment"), "anna/x")
    assert hub.repositories["anna/x"]["README.md"] == b"my own words"


def test_a_prompt_that_peft_cannot_place_takes_its_file_away(hub: Hub, library: Library) -> None:
    behind = Template.make(input="Review: {text}{soft}", target=" {label}", labels=["bad", "good"])
    make(2, template=behind).save(library.folder / "behind")
    push(library.find("sentiment"), "anna/x")
    push(library.find("behind"), "anna/x")
    assert PEFT not in hub.repositories["anna/x"]


def test_a_prompt_that_has_changed_or_is_broken_is_not_uploaded(hub: Hub, library: Library) -> None:
    entry = library.find("sentiment")
    make(3).save(entry.path, overwrite=True)
    with pytest.raises(PromptFormatError, match="has changed since"):
        push(entry, "anna/x")
    (entry.path / TENSOR).write_bytes(b"")
    with pytest.raises(PromptFormatError, match="too few for safetensors"):
        push(library.scan().entries[0], "anna/x")
    assert hub.repositories == {}


def test_only_json_and_safetensors_are_downloaded(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/x")
    extra = ("modeling.py", "adapter_model.bin", "sub/softprompt.json", "tokenizer.json", ".gitattributes")
    hub.repositories["anna/x"] |= dict.fromkeys(extra, b"x")
    pulled = pull("anna/x", library, "mine")
    assert sorted(hub.downloaded) == [PEFT, TENSOR, DESCRIPTION]
    assert set(tree(pulled.folder)) == {PEFT, TENSOR, DESCRIPTION}


def test_an_adapter_of_peft(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/x")
    del hub.repositories["anna/x"][DESCRIPTION]
    assert pull("anna/x", library, "adapter").prompt.provenance["source"] == "peft"
    assert library.find("adapter").summary["tokens"] == 3


def test_names_and_versions(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/sentiment")
    with pytest.raises(LibraryError, match="has sentiment already"):
        pull("anna/sentiment", library)
    with pytest.raises(LibraryError, match="cannot be the name"):
        pull("anna/sentiment", library, "../x")
    assert hub.downloaded == []
    assert pull("anna/sentiment", library, new_version=True).folder.name == "sentiment@2"


def test_a_prompt_that_is_damaged_on_the_hub_does_not_get_into_the_library(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/x")
    hub.repositories["anna/x"][TENSOR] = hub.repositories["anna/x"][TENSOR][:-1] + b"\x01"
    with pytest.raises(PromptFormatError, match="was changed after the prompt was saved"):
        pull("anna/x", library, "mine")
    assert held(library) == {"sentiment"}


def test_a_repository_without_a_prompt(hub: Hub, library: Library) -> None:
    hub.repositories["anna/model"] = {"config.json": b"{}", "model.safetensors": b"x", PEFT: b"{}"}
    with pytest.raises(HubError, match=r"anna/model holds no prompt: expected adapter_model.safetensors and .*found "):
        pull("anna/model", library)
    assert hub.downloaded == []


@pytest.mark.parametrize(("name", "size"), [(TENSOR, 3 << 30), (DESCRIPTION, 11_000_000)])
def test_files_that_are_too_large_are_not_fetched(hub: Hub, library: Library, name: str, size: int) -> None:
    push(library.find("sentiment"), "anna/x")
    hub.sizes[name] = size
    with pytest.raises(HubError, match=f"{name} in anna/x has {size} bytes, at most"):
        pull("anna/x", library, "mine")
    assert hub.downloaded == []


@pytest.mark.parametrize("text", ["", "x", "a/b/c", "../x", "a/..", "/a", "a b/c", "https://hub/a", "a/b@c", "a--b/c"])
def test_what_is_not_a_repository(hub: Hub, library: Library, text: str) -> None:
    for act in (
        lambda: check_repository(text),
        lambda: push(library.find("sentiment"), text),
        lambda: pull(text, library, "mine"),
    ):
        with pytest.raises(LibraryError, match="is not a repository of a hub"):
            act()


def answer(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    client = importlib.import_module(errors.Response.__module__.split(".")[0])  # httpx or its successor
    response = client.Response(status, request=client.Request("GET", "https://hub/x"))
    return kind(f"{status} of the hub\nmore", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: ConnectionError("refused\nmore"), r"the hub \(.*\) cannot be reached: refused$"),
        (lambda: TimeoutError("no answer within 10 seconds"), "cannot be reached: no answer within 10 seconds"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (lambda: answer(errors.RepositoryNotFoundError, 404), "has no model repository anna/x, or it is private"),
        (lambda: answer(errors.GatedRepoError, 403), "anna/x is gated"),
        (lambda: answer(errors.RevisionNotFoundError, 404), "anna/x has no such revision"),
        (lambda: answer(errors.HfHubHTTPError, 401), "does not allow it for anna/x; log in"),
        (lambda: answer(errors.HfHubHTTPError, 500), "answered with an error: 500 of the hub$"),
        (lambda: errors.LocalTokenNotFoundError("no token"), "log in with `hf auth login`"),
    ],
)
def test_errors_of_the_hub(hub: Hub, library: Library, error: Callable[[], Exception], expected: str) -> None:
    hub.error = error()
    with pytest.raises(HubError, match=expected):
        push(library.find("sentiment"), "anna/x")
    with pytest.raises(HubError, match=expected):
        pull("anna/x", library, "mine")
    hub.error = None
    push(library.find("sentiment"), "anna/x")

    def fails() -> None:
        raise error()

    hub.during = fails
    with pytest.raises(HubError, match=expected):
        pull("anna/x", library, "mine")
    assert held(library) == {"sentiment"}


def test_a_full_disk_is_not_the_hub_s_fault(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/x")

    def full() -> None:
        raise OSError(28, "No space left on device")

    hub.during = full
    with pytest.raises(OutputError, match="no space left"):
        pull("anna/x", library, "mine")


def test_a_hub_that_is_not_there(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's real client, at an address where nobody listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("softprompt.library.hub.HUB_SECONDS", 0.5)
    with pytest.raises(HubError, match=r"the hub \(http://127.0.0.1:9\) cannot be reached: "):
        pull("anna/x", library, "mine")
    with pytest.raises(HubError, match=r"the hub \(http://127.0.0.1:9\) cannot be reached: "):
        push(library.find("sentiment"), "anna/x")
    assert held(library) == {"sentiment"}


def test_paths_of_this_machine() -> None:
    prompt = make(
        base_model="/home/anna/model",
        provenance={"run": {"train": {"file": "~/data.csv", "rows": 3}, "more": ["C:\\x", "a/b", "text / text", "/"]}},
    )
    assert local_paths(prompt) == ["/home/anna/model", "C:\\x", "~/data.csv"]
    assert local_paths(make()) == []


def test_nothing_is_left_when_it_is_interrupted(hub: Hub, library: Library) -> None:
    push(library.find("sentiment"), "anna/x")

    def interrupted() -> None:
        raise KeyboardInterrupt

    hub.during = interrupted
    with pytest.raises(KeyboardInterrupt):
        pull("anna/x", library, "mine")
    assert held(library) == {"sentiment"}
    shutil.rmtree(library.folder)
