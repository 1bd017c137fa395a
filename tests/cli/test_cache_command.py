"""`softprompt cache`, the line of doctor, and the bound of what is kept."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from cli_material import TEMPLATE, reviews, write_rows

from softprompt.config import load_config
from softprompt.doctor import doctor_facts
from softprompt.errors import ConfigError
from softprompt.text_store import folders

BEHIND = ("--input", "Review: {text}{soft}\nSentiment:", *TEMPLATE[2:])


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of kept texts, not made yet."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def make_shard(folder: Path, size: int, age: float, texts: int = 3, **about: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model": "me/tiny", "fingerprint": "f" * 16, "precision": "float32", "bits": None, "device": "cpu"}
    (folder / folders.ABOUT).write_text(json.dumps({**facts, **about}))
    path = folder / f"{os.urandom(6).hex()}-{texts}.safetensors"
    path.write_bytes(b"x" * size)
    used = time.time() - age
    os.utime(path, (used, used))
    return path


def test_tune_keeps_texts_and_cache_shows_and_clears_them(cli, model_folder, plain_report, texts, tmp_path) -> None:
    rows = write_rows(tmp_path / "reviews.jsonl", reviews(16))
    tune = ["tune", "--model", model_folder, "--train", rows, *BEHIND, "--tokens", "4", "--steps", "2", "--folds", "0"]
    called = cli(*tune, "--precision", "float32", "--text-cache", "disk", "--out", "p", "--run", "r", "--overwrite")
    assert called.code == 0, called.err
    assert "texts computed once and kept" in called.err
    assert "MB of texts kept on disk for later runs" in called.err and "softprompt cache clear" in called.err
    shown = cli("cache", "--json").json
    (kept,) = shown["models"]
    assert kept["model"] == model_folder and kept["precision"] == "float32" and kept["bits"] is None
    assert kept["texts"] >= 12 and shown["bytes"] == kept["bytes"] > 0 and kept["used"].endswith("Z")
    table = cli("cache")
    assert table.code == 0 and kept["fingerprint"] in table.out and str(texts) in table.out
    fact = next(fact for fact in doctor_facts() if fact.name == "kept texts")
    assert fact.value.startswith(f"{kept['texts']} (") and fact.problem is None
    cleared = cli("cache", "clear", "--model", kept["fingerprint"], "--json")
    assert cleared.code == 0 and cleared.json["texts"] == kept["texts"]
    assert cli("cache", "--json").json["models"] == [] and not list(texts.iterdir())


def test_nothing_is_kept(cli, texts) -> None:
    assert "no texts are kept" in cli("cache").out
    assert cli("cache", "clear").out == "there was nothing to remove\n"
    assert next(fact for fact in doctor_facts() if fact.name == "kept texts").value.startswith("0 (")


def test_clear_takes_one_model_of_several(cli, texts) -> None:
    make_shard(texts / "one", 10, 0)
    make_shard(texts / "two", 20, 0, model="HuggingFaceTB/SmolLM2-135M-Instruct", fingerprint="a")
    wrong = cli("cache", "clear", "--model", "three")
    assert wrong.code == 2 and "no texts of three are kept; there is HuggingFaceTB/" in wrong.err
    assert cli("cache", "clear", "--model", "smollm2-135m").out.startswith("removed 3 texts")
    assert [path.name for path in texts.iterdir()] == ["one"]


def test_wrong_use(cli, texts) -> None:
    called = cli("cache", "empty")
    assert (called.code, called.err) == (2, "error: cache: expected show or clear, found 'empty'\n")


def test_a_damaged_folder_is_shown_and_told_by_doctor(cli, texts) -> None:
    path = make_shard(texts / "one", 10, 0)
    (path.parent / folders.ABOUT).write_text("[]")
    (texts / "a file").write_text("not ours")
    called = cli("cache", "--json")
    assert called.code == 0 and called.json["models"][0]["problem"] == "its about.json is missing or damaged"
    problem = next(fact for fact in doctor_facts() if fact.name == "kept texts").problem
    assert problem and "softprompt cache clear" in problem
    assert cli("cache", "clear").code == 0 and (texts / "a file").exists()


def test_clear_removes_nothing_that_is_not_the_caches(cli, texts) -> None:
    make_shard(texts / "one", 10, 0)
    shard = make_shard(texts / "two", 10, 0)
    notes, novel = texts / "two" / "notes.txt", texts / "my novel" / "chapter 1.txt"
    notes.write_text("mine")
    novel.parent.mkdir()
    novel.write_text("mine too")
    assert len(cli("cache", "--json").json["models"]) == 2
    called = cli("cache", "clear")
    assert called.code == 0 and called.out.startswith("removed 6 texts")
    assert f"{notes.parent} holds files that are not the cache's; they were left" in called.err
    assert notes.read_text() == "mine" and novel.read_text() == "mine too"
    assert not shard.exists() and not (texts / "one").exists()


# --- the bound ------------------------------------------------------------------------------------------------------


def test_room_is_made_by_what_was_used_longest_ago(texts) -> None:
    old, used, new = (make_shard(texts / name, 100, age) for name, age in (("a", 300), ("b", 200), ("b", 100)))
    assert not folders.make_room(texts, 500, 550, {used})  # the used one cannot go
    assert old.exists() and new.exists()
    assert folders.make_room(texts, 340, 550, {used})
    assert not old.exists() and used.exists() and new.exists()
    assert not old.parent.exists()  # nothing was left in it
    assert folders.make_room(texts, 440, 550, {used})
    assert used.exists() and not new.exists()


def test_the_bound_is_a_fifth_of_the_disk_or_20_gb_and_does_not_shrink_as_it_fills(texts, monkeypatch) -> None:
    make_shard(texts / "a", 1000, 0)
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 9000)
    assert folders.bound(texts) == 2000
    assert folders.bound(texts, 0.5) == 500_000_000
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 10**15)
    assert folders.bound(texts) == 20_000_000_000


def test_some_of_the_disk_stays_free_whatever_the_bound(texts, monkeypatch) -> None:
    make_shard(texts / "a", 1000, 0)
    monkeypatch.setattr(folders, "free_bytes", lambda folder: folders.SPARE + 100)
    assert folders.room(texts, 10**12, set()) == 1100
    assert not folders.make_room(texts, 1101, 10**12, set())
    assert folders.make_room(texts, 1100, 10**12, set()) and not list(texts.rglob("*.safetensors"))


# --- the config -----------------------------------------------------------------------------------------------------


def test_wrong_settings_are_told_together(model_folder, tmp_path) -> None:
    rows = write_rows(tmp_path / "reviews.jsonl", reviews(4))
    given = [f"model={model_folder}", f"train={rows}", "input={text}{soft}:", "target= {label}"]
    with pytest.raises(ConfigError) as raised:
        load_config(None, [*given, "text_cache=dsk", "text_cache_bits=4", "text_cache_gb=0"])
    told = raised.value.problems
    assert [text.split(":")[0] for text in told] == ["text_cache", "text_cache_bits", "text_cache_gb"]
    assert "did you mean disk?" in told[0]
    config = load_config(None, [*given, "text_cache_bits=8", "text_cache_gb=1.5", "text_cache=disk"])
    assert (config.text_cache, config.text_cache_bits, config.text_cache_gb) == ("disk", 8, 1.5)
