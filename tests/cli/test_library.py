"""`softprompt list`, `rename`, `remove`, `copy`, `verify`, `push`, `pull`, and `tune --new-version`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_material import TEMPLATE, Called

import softprompt.library.hub
from softprompt import Library, SoftPrompt, Template
from softprompt.errors import HubError
from softprompt.library.hub import Pulled

Cli = Callable[..., Called]


def make(seed: int = 0, **changes: Any) -> SoftPrompt:
    template = Template.make(input="{soft}Review: {text}", target=" {label}", labels=["bad", "good"])
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    fields = {"template": template, "base_model": "someone/model", "metrics": {"accuracy": 0.75}}
    return SoftPrompt(vectors, **{**fields, **changes})


@pytest.fixture
def library(cli: Cli) -> Library:
    """prompts/sentiment in two versions and prompts/topic, in the folder that the commands are called in."""
    made = Library("prompts")
    made.save(make(1), "sentiment")
    made.save(make(2), "sentiment", new_version=True)
    made.save(make(3), "topic")
    return made


def held() -> list[str]:
    return sorted(os.listdir("prompts"))


# --- list and verify -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
def test_list(cli: Cli) -> None:
    called = cli("list")
    assert called.code == 0, called.err
    lines = [" ".join(line.split()) for line in called.out.splitlines()]
    for expected in (
        r"prompt task kind tokens placement model score made size",
        r"sentiment bad, good embedding 3 front someone/model accuracy 0.750 \d{4}-\d\d-\d\d \d kB",
        r"sentiment@2 \* bad, good embedding 3 .*",
        r"topic bad, good embedding 3 .*",
    ):
        assert any(re.fullmatch(expected, line) for line in lines), called.out
    found = cli("list", "--json").json["prompts"]
    assert [(each["name"], each["version"], each["newest"]) for each in found] == [
        *(("sentiment", 1, False), ("sentiment@2", 2, True), ("topic", 1, True))
    ]
    assert {each["task"] for each in found} == {"bad, good"}


@pytest.mark.usefixtures("library")
def test_list_when_the_newest_is_broken(cli: Cli) -> None:
    Path("prompts/sentiment@2/adapter_model.safetensors").unlink()
    called = cli("list")
    assert "sentiment *" in called.out and "sentiment@2 (broken)" in called.out


def test_verify(cli: Cli, library: Library) -> None:
    called = cli("verify")
    assert (called.code, called.out) == (0, "3 prompts, nothing wrong\n")
    found = cli("verify", "prompts", "--json").json
    assert found["sound"] is True
    assert [each["sha256"] for each in found["prompts"]] == [entry.sha256 for entry in library.scan()]
    (library.folder / "topic" / "softprompt.json").write_text("{}")
    (library.folder / "half").mkdir()
    called = cli("verify")
    assert called.code == 1
    assert re.search(r"topic: .*format_version", called.out) and re.search(r"half: .*found nothing", called.out)
    assert called.out.endswith("4 prompts, 2 with something wrong\n")
    called = cli("verify", "--json")
    assert (called.code, called.json["sound"]) == (1, False)


@pytest.mark.usefixtures("library")
def test_verify_tells_of_what_interrupted_writes_left(cli: Cli) -> None:
    Path("prompts/.topic.softprompt-0123abcd.new").mkdir()
    called = cli("verify")
    assert called.code == 0
    assert "half-written, being written now or left by an interrupted write" in called.out
    assert cli("verify", "--json").json["leftovers"] == ["prompts/.topic.softprompt-0123abcd.new"]
    Path("prompts/topic").rename("prompts/.topic.softprompt-0123abcd.old")
    called = cli("verify")
    assert called.code == 1
    assert "an interrupted save left topic as prompts/.topic.softprompt-0123abcd.old: rename it back" in called.out


@pytest.mark.usefixtures("library")
def test_verify_one_prompt(cli: Cli) -> None:
    Path("prompts/topic/adapter_config.json").unlink()
    assert cli("verify", "prompts/sentiment").out == "1 prompt, nothing wrong\n"
    called = cli("verify", "prompts/topic")
    assert called.code == 1 and "PEFT cannot load" in called.out
    called = cli("verify", "nowhere")
    assert called.code == 1 and "cannot read the library nowhere: No such file" in called.err


# --- rename, remove, copy --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "arguments", [("sentiment", "mood"), ("prompts/sentiment/", "mood"), ("sentiment", "prompts/mood")]
)
def test_rename(cli: Cli, arguments: tuple[str, str]) -> None:
    called = cli("rename", *arguments, "--json")
    assert called.code == 0, called.err
    assert called.json["renamed"] == [
        {"from": "prompts/sentiment", "to": "prompts/mood"},
        {"from": "prompts/sentiment@2", "to": "prompts/mood@2"},
    ]
    assert held() == ["mood", "mood@2", "topic"]
    assert cli("rename", "mood@2", "news").out == "prompts/mood@2 is now prompts/news\n"


@pytest.mark.usefixtures("library")
def test_remove_asks(cli: Cli) -> None:
    for answer in ("n\n", "\n", ""):
        called = cli("remove", "topic", stdin=answer)
        assert called.code == 1
        assert "remove prompts/topic for good?" in called.err and "nothing was removed" in called.err
    assert held() == ["sentiment", "sentiment@2", "topic"]
    assert cli("remove", "topic", stdin="y\n").out == "removed prompts/topic\n"
    called = cli("remove", "sentiment", "--yes")
    assert called.code == 1 and "has 2 versions (sentiment, sentiment@2)" in called.err
    assert held() == ["sentiment", "sentiment@2"]
    called = cli("remove", "sentiment", "--json")
    assert called.code == 1
    called = cli("remove", "sentiment@2", "--json")
    assert called.code == 2 and "with --json give --yes" in called.err
    called = cli("remove", "sentiment", "--all-versions", "--yes", "--json")
    assert called.json == {"removed": ["prompts/sentiment", "prompts/sentiment@2"]}
    assert held() == []


def test_copy(cli: Cli, library: Library) -> None:
    assert cli("copy", "sentiment@1", "sentiment", "--new-version").out == "copied to prompts/sentiment@3\n"
    assert torch.equal(library.get("sentiment").vectors, make(1).vectors)
    assert cli("copy", "prompts/topic", "other/topic", "--json").json == {"prompt": "other/topic"}
    assert Library("other").find("topic").sha256 == library.find("topic").sha256
    assert cli("copy", "topic", "again", "--library", "other").code == 0
    assert sorted(os.listdir("other")) == ["again", "topic"]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["rename", "nothing", "x"], 1, "no prompt 'nothing' in prompts; it has sentiment"),
        (["rename", "topic", "sentiment"], 1, "prompts has sentiment, sentiment@2 already"),
        (["rename", "topic", "a b"], 1, "'a b' cannot be the name of a prompt"),
        (["rename", "topic", "other/topic"], 2, "is in another folder than topic; copy the prompt"),
        (["rename", "topic", "base"], 1, "cannot be called 'base'"),
        (["copy", "topic", ".."], 1, "cannot be the name of a prompt"),
        (["copy", "topic", "topic"], 1, "prompts has topic already"),
        (["copy", "prompts/topic", "x", "--library", "other"], 2, "has a path already; leave out --library other"),
        (["remove", "nowhere/secret", "--yes"], 1, "cannot read the library"),
        (["remove", "prompts", "--yes"], 1, "no prompt 'prompts' in prompts"),
        (["remove", "topic", "--library", "nowhere", "-y"], 1, "cannot read the library nowhere"),
        (["push", "topic", "x"], 1, "'x' is not a repository of a hub; expected USER/NAME"),
        (["push", "nothing", "a/b"], 1, "no prompt 'nothing'"),
        (["pull", "x"], 1, "'x' is not a repository of a hub"),
        (["pull", "anna/topic"], 1, "prompts has topic already"),
    ],
)
def test_mistakes(cli: Cli, arguments: list[str], code: int, expected: str) -> None:
    called = cli(*arguments)
    assert (called.code, called.out) == (code, "")
    assert called.err.startswith("error: ") and expected in called.err
    assert held() == ["sentiment", "sentiment@2", "topic"]


# --- push and pull ---------------------------------------------------------------------------------------------------


def test_push(cli: Cli, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.save(make(4, base_model="/home/anna/model"), "local")
    given = []

    def push(entry: Any, repository: str, **settings: Any) -> str:
        given.append((entry.reference, repository, settings["public"], settings["message"]))
        return f"https://hub/{repository}"

    monkeypatch.setattr(softprompt.library.hub, "push", push)
    called = cli("push", "sentiment", "anna/x")
    assert (called.out, called.err) == ("prompts/sentiment@2 is at https://hub/anna/x\n", "")
    called = cli("push", "prompts/local", "anna/y", "--public", "--message", "first", "--json")
    assert called.json["address"] == "https://hub/anna/y"
    assert "paths of this machine, which readers will see: /home/anna/model" in called.json["warnings"][0]
    assert given == [("sentiment@2", "anna/x", False, ""), ("local@1", "anna/y", True, "first")]


def test_pull(cli: Cli, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def pull(repository: str, to: Library, name: str, **settings: Any) -> Pulled:
        given.append((repository, str(to.folder), name, settings["revision"], settings["new_version"]))
        return Pulled(to.folder / "x", "abc", make(template=None))

    monkeypatch.setattr(softprompt.library.hub, "pull", pull)
    called = cli("pull", "anna/x")
    assert called.out == "3 soft tokens for someone/model: prompts/x\n"
    assert "it has no template" in called.err
    cli("pull", "anna/x", "mood", "--library", "lib", "--new-version")
    assert cli("pull", "anna/x", "lib/mood", "--revision", "v1", "--json").json["commit"] == "abc"
    assert given == [
        ("anna/x", "prompts", "", None, False),
        ("anna/x", "lib", "mood", None, True),
        ("anna/x", "lib", "mood", "v1", False),
    ]


def test_a_hub_that_fails(cli: Cli, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_: Any, **__: Any) -> Pulled:
        raise HubError("the hub (x) cannot be reached: refused")

    monkeypatch.setattr(softprompt.library.hub, "pull", pull)
    called = cli("pull", "anna/x")
    assert (called.code, called.err) == (1, "error: the hub (x) cannot be reached: refused\n")


# --- tune --new-version ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_report")
def test_tuning_a_new_version(cli: Cli, model_folder: str, train_file: Path) -> None:
    arguments = ["tune", "--model", model_folder, "--train", train_file, *TEMPLATE, "--tokens", 2, "--steps", 1]
    arguments += ["--precision", "float32", "--out", "prompts/mood"]
    assert cli(*arguments, "--new-version", "--json").json["prompt"] == "prompts/mood"
    before = {path.name: path.read_bytes() for path in Path("prompts/mood").iterdir()}
    refused = cli(*arguments)
    assert refused.code == 2
    assert "already holds a prompt" in refused.err and "--new-version to keep both" in refused.err
    called = cli(*arguments, "--new-version", "--seed", 1)
    assert called.code == 0, called.err
    assert "prompt saved in prompts/mood@2" in called.err
    assert held() == ["mood", "mood@2"]
    assert {path.name: path.read_bytes() for path in Path("prompts/mood").iterdir()} == before
    assert Library("prompts").find("mood").version == 2
    both = cli(*arguments, "--new-version", "--overwrite")
    assert both.code == 2 and "give one of the two" in both.err


@pytest.mark.parametrize("name", ["rename", "remove", "copy", "verify", "push", "pull"])
def test_help(cli: Cli, name: str) -> None:
    called = cli(name, "--help")
    assert called.code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in called.out
