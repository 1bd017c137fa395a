"""The prompt folder: what is written comes back, what is wrong is told, and a failed save loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import atomic
from softprompt.atomic import exchange, is_temporary, write_atomic
from softprompt.errors import OutputError, PromptFormatError
from softprompt.fileformat import check_output, is_prompt_folder, load_prompt, verify_prompt
from softprompt.library import list_prompts
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

DESCRIPTION, TENSOR, PEFT = "softprompt.json", "adapter_model.safetensors", "adapter_config.json"


def vectors(tokens: int = 3, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def front_template() -> Template:
    return Template.make(input="{soft}Review: {text}\nMood:", target=" {label}", labels={"0": "bad", "1": "good"})


def behind_template() -> Template:
    return Template.make(input="Review: {text}{soft}", target=" {label}", labels=["bad", "good"])


def make(template: Template | None = None, **changes: Any) -> SoftPrompt:
    fields: dict[str, Any] = {
        "template": template or front_template(),
        "base_model": "someone/model",
        "fingerprint": "f" * 16,
        "tokenizer_hash": "t" * 16,
        "provenance": {"seed": 1, "made": "2026-11-21T04:00:00+00:00"},
        "metrics": {"accuracy": 0.75},
    }
    return SoftPrompt(changes.pop("vectors", vectors()), **{**fields, **changes})


def edit(folder: Path, **changes: Any) -> None:
    """Change the description; a value of `...` takes the key away."""
    path = folder / DESCRIPTION
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not ...}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make().save(tmp_path / "mood")


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has renames only."""
    monkeypatch.setattr(atomic, "_exchanging", lambda: None)


# What is written comes back


@pytest.mark.parametrize("template", [front_template(), behind_template(), None])
def test_round_trip(tmp_path: Path, template: Template | None) -> None:
    prompt = make()
    prompt.template = template
    back = SoftPrompt.load(prompt.save(tmp_path / "p"))
    assert back.vectors.numpy().tobytes() == prompt.vectors.numpy().tobytes()
    for name in ("template", "base_model", "fingerprint", "tokenizer_hash", "provenance", "metrics", "kind"):
        assert getattr(back, name) == getattr(prompt, name), name
    assert verify_prompt(tmp_path / "p") == []


def test_same_prompt_same_bytes(tmp_path: Path) -> None:
    one, two = make().save(tmp_path / "one"), make().save(tmp_path / "two")
    assert sorted(os.listdir(one)) == sorted([DESCRIPTION, TENSOR, PEFT])
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))


def test_description_says_what_the_contract_lists(saved: Path) -> None:
    described = json.loads((saved / DESCRIPTION).read_text())
    assert described["format_version"] == 1
    assert described["placement"] == "front"
    assert described["labels"] == {"0": "bad", "1": "good"}
    assert {"kind", "template", "base_model", "fingerprint", "tokenizer_hash", "provenance", "metrics"} <= set(
        described
    )


def test_odd_settings_do_not_lose_a_prompt(tmp_path: Path) -> None:
    odd = {"path": Path("a/b"), "nan": float("nan"), "scores": torch.ones(2), "set": {1}, 3: (1, 2)}
    back = load_prompt(make(provenance=odd).save(tmp_path / "p"))
    assert back.provenance == {"path": "a/b", "nan": None, "scores": [1.0, 1.0], "set": "{1}", "3": [1, 2]}


def test_texts_of_any_language(tmp_path: Path) -> None:
    template = Template.make(input="{soft}评论：{text}", target="{label}", labels=["差", "好"])
    back = load_prompt(make(template).save(tmp_path / "提示 1"))
    assert back.template == template


def test_template_without_a_place_for_the_tokens(tmp_path: Path) -> None:
    with pytest.raises(PromptFormatError, match="has no place for soft tokens"):
        make(front_template().without_soft()).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("text", ["{bos}{soft}{text}", "a {soft}{text}", "{soft}{text}{soft}", "{text}"])
def test_other_places(tmp_path: Path, text: str) -> None:
    template = Template.make(input=text, target="{answer}")
    folder = make(template).save(tmp_path / "p")
    assert load_prompt(folder).template == template
    assert (folder / PEFT).exists() == (text == "{text}")


def test_chat(tmp_path: Path) -> None:
    chat = Template.make(chat=[("system", "Be {{brief}}."), ("user", "{soft}{text}")], target="{answer}")
    folder = make(chat).save(tmp_path / "p")
    assert load_prompt(folder).template == chat
    assert not (folder / PEFT).exists()


def test_only_a_front_prompt_is_a_peft_adapter(tmp_path: Path) -> None:
    folder = make().save(tmp_path / "p")
    assert (folder / PEFT).exists()
    make(behind_template()).save(folder, overwrite=True)
    assert not (folder / PEFT).exists()
    assert load_prompt(folder).template == behind_template()


# What is wrong is told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this softprompt reads up to 1: upgrade"),
        ({"format_version": 2, "kind": ..., "tokens": ...}, "upgrade"),
        ({"format_version": "1"}, "format_version '1', expected 1"),
        ({"format_version": True}, "format_version True, expected 1"),
        ({"format_version": ...}, "format_version None"),
        ({"kind": "wide"}, "kind 'wide', this softprompt knows 'embedding' and 'deep'"),
        ({"kind": "deep"}, "a deep prompt of width 8 with layers None"),
        ({"kind": "deep", "deep": {"layers": 2, "key_value_heads": 3}}, "width 8 with layers 2 and key_value_heads 3"),
        ({"kind": "deep", "deep": {"layers": 2, "key_value_heads": 4}}, "speaks of a tensor of shape"),
        ({"sha256": ...}, "has no 'sha256'"),
        ({"sha256": "0" * 64}, "was changed after the prompt was saved"),
        ({"tokens": 4}, r"speaks of a tensor of shape \[4, 8\], adapter_model.safetensors holds \[3, 8\]"),
        ({"width": "8"}, "'width' is a str"),
        ({"metrics": []}, "'metrics' is a list"),
        ({"placement": "behind"}, "stand 'behind', its template 'front'"),
        ({"template": {"input": "x", "nonsense": 1}}, "its template does not hold"),
        ({"template": None, "placement": "inside"}, "stand 'inside', its template 'front'"),
    ],
)
def test_wrong_description(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(PromptFormatError, match=message):
        load_prompt(saved)
    assert re.search(message, verify_prompt(saved)[0])


def test_unknown_keys_warn_and_work(saved: Path) -> None:
    edit(saved, colour="red")
    with pytest.warns(UserWarning, match="unknown keys, which are ignored: colour"):
        assert load_prompt(saved).tokens == 3
    assert "colour" in verify_prompt(saved)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1', "[" * 100_000, "\ufeff{}"])
def test_description_that_is_no_json(saved: Path, text: str) -> None:
    (saved / DESCRIPTION).write_text(text)
    with pytest.raises(PromptFormatError, match=r"softprompt.json (is damaged|has format_version None)"):
        load_prompt(saved)


def test_description_that_is_no_text(saved: Path) -> None:
    (saved / DESCRIPTION).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptFormatError, match="not valid JSON"):
        load_prompt(saved)


def test_huge_description(saved: Path) -> None:
    with open(saved / DESCRIPTION, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(PromptFormatError, match="larger than the 10000000 bytes"):
        load_prompt(saved)


def tensor_file(header: Any, data: bytes = b"\0" * 96, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (3, 8), dtype: Any = "F32", offsets: Any = (0, 96), name: str = "prompt_embeddings") -> Any:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"\x08\0\0", "has 3 bytes, too few"),
        (tensor_file(entry(), length=1 << 62), "header of 4611686018427387904 bytes, at most 10000000"),
        (tensor_file(entry(), length=5_000), "is truncated: its header takes 5008 bytes"),
        (tensor_file(entry(), b"\0" * 95), "is truncated: tensor 'prompt_embeddings' ends at byte"),
        (tensor_file(b"not json at all"), "not valid safetensors header"),
        (tensor_file(b"[1, 2, 3]"), "holds a list, expected an object"),
        (tensor_file(entry(name="weight")), "holds no tensor 'prompt_embeddings', found 'weight'"),
        (tensor_file({}), "holds no tensor 'prompt_embeddings', found none"),
        (tensor_file({**entry(), **entry(name="lm_head.weight")}), "other trained weights .'lm_head.weight'."),
        (tensor_file(entry(dtype="I32")), "holds I32 numbers, expected one of"),
        (tensor_file(entry(dtype=["F32"])), "entry 'prompt_embeddings' is not a tensor's"),
        (tensor_file(entry(shape=[24])), r"shape \[24\], expected \[tokens, width\]"),
        (tensor_file(entry(shape=[0, 8], offsets=[0, 0]), b""), r"shape \[0, 8\], expected"),
        (tensor_file(entry(shape=[2048, 8], offsets=[0, 65536]), b"\0" * 65536), "with 1 to 1024 tokens"),
        (tensor_file(entry(shape=[1, 300000], offsets=[0, 1200000]), b"\0" * 1200000), "width of 1 to 262144"),
        (tensor_file(entry(shape=[3, 9])), r"is F32 \[3, 9\] in 96 bytes"),
        (tensor_file(entry(shape=[1 << 40, 1 << 40])), "damaged safetensors header"),
        (tensor_file(entry(shape=[-3, -8])), "entry 'prompt_embeddings' is not a tensor's"),
        (tensor_file(entry(shape="38")), "entry 'prompt_embeddings' is not a tensor's"),
        (tensor_file(entry(offsets=[96, 0])), "entry 'prompt_embeddings' is not a tensor's"),
        (tensor_file({"prompt_embeddings": [1]}), "entry 'prompt_embeddings' is not a tensor's"),
        (tensor_file(entry(), b"\0" * 200), "not a valid safetensors file"),
        (tensor_file(entry(offsets=[8, 104]), b"\0" * 104), "not a valid safetensors file"),
    ],
)
def test_wrong_tensor_file(saved: Path, content: bytes, message: str) -> None:
    (saved / TENSOR).write_bytes(content)
    with pytest.raises(PromptFormatError, match=message):
        load_prompt(saved)


def test_huge_tensor_file(saved: Path) -> None:
    with open(saved / TENSOR, "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(PromptFormatError, match="larger than the"):
        load_prompt(saved)


def test_every_truncation_is_told(saved: Path) -> None:
    whole = (saved / TENSOR).read_bytes()
    for length in range(len(whole)):
        (saved / TENSOR).write_bytes(whole[:length])
        with pytest.raises(PromptFormatError, match=r"too few for safetensors|is truncated"):
            load_prompt(saved)


def test_every_changed_byte_is_told(saved: Path) -> None:
    whole = (saved / TENSOR).read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (saved / TENSOR).write_bytes(changed)
        with pytest.raises(PromptFormatError):
            load_prompt(saved)


def test_numbers_that_are_not_finite(saved: Path) -> None:
    content = tensor_file(entry(), struct.pack("<24f", *[0.0] * 9, float("nan"), *[0.0] * 14))
    (saved / TENSOR).write_bytes(content)
    edit(saved, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(PromptFormatError, match=r"1 of 3 soft tokens hold NaN or infinite numbers \(first: token 1\)"):
        load_prompt(saved)


def test_missing_parts(saved: Path, tmp_path: Path) -> None:
    (saved / TENSOR).rename(tmp_path / "elsewhere")
    with pytest.raises(
        PromptFormatError, match=r"has softprompt.json but no adapter_model.safetensors: it is half-copied"
    ):
        load_prompt(saved)
    (tmp_path / "elsewhere").rename(saved / TENSOR)
    for name in (DESCRIPTION, PEFT):
        (saved / name).unlink()
    with pytest.raises(
        PromptFormatError, match=r"half-copied: it holds neither softprompt.json nor adapter_config.json"
    ):
        load_prompt(saved)


def test_what_is_no_prompt_folder(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptFormatError, match=r"no prompt folder .*nowhere$"):
        load_prompt(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptFormatError, match="no prompt folder someone/adapter; an adapter on a hub"):
        load_prompt("someone/adapter")
    with pytest.raises(PromptFormatError, match="is a file: name the folder"):
        load_prompt(saved / TENSOR)
    with pytest.raises(PromptFormatError, match=r"is a folder of prompts \(mood\): name one of them"):
        load_prompt(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptFormatError, match="found nothing"):
        load_prompt(tmp_path / "empty")
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(PromptFormatError, match=r"not a prompt folder: .*found config.json, pytorch_model.bin"):
        load_prompt(tmp_path / "empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(saved: Path) -> None:
    (saved / TENSOR).unlink()
    os.mkfifo(saved / TENSOR)
    with pytest.raises(PromptFormatError):
        load_prompt(saved)
    (saved / DESCRIPTION).unlink()
    os.mkfifo(saved / DESCRIPTION)
    with pytest.raises(PromptFormatError, match=r"softprompt.json is not an ordinary file"):
        load_prompt(saved)


def test_stale_peft_file_is_told(saved: Path, tmp_path: Path) -> None:
    behind = make(behind_template()).save(tmp_path / "behind")
    (behind / PEFT).write_bytes((saved / PEFT).read_bytes())
    assert "must not be there" in verify_prompt(behind)[0]
    (saved / PEFT).write_text("{}")
    assert "describes an adapter of type None" in verify_prompt(saved)[0]
    (saved / PEFT).unlink()
    assert "is missing, so PEFT cannot load the prompt" in verify_prompt(saved)[0]


@pytest.mark.parametrize("name", [DESCRIPTION, TENSOR, PEFT])
def test_no_damage_makes_the_listing_fail(saved: Path, name: str) -> None:
    whole, chance = (saved / name).read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (saved / name).write_bytes(damaged)
        (summary,) = list_prompts(saved)
        json.dumps(summary)


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", [], {}, [[]], {"a": None}, True, None])
def test_no_value_in_the_description_makes_the_listing_fail(saved: Path, value: Any) -> None:
    described = json.loads((saved / DESCRIPTION).read_text())
    for key in described:
        edit(saved, **{**described, key: value})
        list_prompts(saved)
    for key in described["template"]:
        edit(saved, **{**described, "template": {**described["template"], key: value}})
        list_prompts(saved)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptFormatError):
        load_prompt("x" * 5000)
    with pytest.raises(OutputError, match="cannot write"):
        make().save("x" * 5000)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    with pytest.raises(PromptFormatError):
        load_prompt(tmp_path / "itself")
    with pytest.raises(OutputError, match="cannot write the prompt folder"):
        make().save(tmp_path / "itself", overwrite=True)


def test_half_characters_do_not_lose_a_prompt(tmp_path: Path) -> None:
    assert load_prompt(make(provenance={"text": "a\ud800"}).save(tmp_path / "p")).provenance == {"text": "a?"}


# A failed save loses nothing


def test_overwriting_is_asked_for(saved: Path) -> None:
    with pytest.raises(OutputError, match="already holds a prompt"):
        make().save(saved)
    make(vectors=vectors(5)).save(saved, overwrite=True)
    assert load_prompt(saved).tokens == 5
    assert os.listdir(saved.parent) == ["mood"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_something_else_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(OutputError, match=r"holds something that is not a prompt \(thesis.tex\)"):
        make().save(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputError, match="is a file"):
        make().save(tmp_path / "thesis.tex", overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"


def test_an_adapter_of_another_method_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / PEFT).write_text('{"peft_type": "LORA"}')
    with pytest.raises(OutputError, match="not a prompt"):
        make().save(tmp_path, overwrite=True)


def test_notes_beside_a_prompt_stay(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "plots").mkdir()
    (saved / "plots" / "loss.txt").write_text("1 0.5")
    make(vectors=vectors(5)).save(saved, overwrite=True)
    assert (saved / "README.md").read_text() == "mine"
    assert (saved / "plots" / "loss.txt").read_text() == "1 0.5"


def test_new_empty_and_linked_folders(tmp_path: Path) -> None:
    make().save(tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    make().save(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty", target_is_directory=True)
    make(vectors=vectors(5)).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_prompt(tmp_path / "empty").tokens == 5


def fail(number: int) -> Any:
    """A stand-in for a function of `os`; opening is refused for writing only."""
    real_open = os.open

    def failing(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > 1 and isinstance(arguments[1], int) and not arguments[1] & os.O_WRONLY:
            return real_open(*arguments, **options)
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("call", ["write", "open", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EBUSY])
def test_failed_save_leaves_the_old_prompt(
    saved: Path, monkeypatch: pytest.MonkeyPatch, no_exchange: None, call: str, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail(number))
        with pytest.raises(OutputError, match=r"cannot write .*mood") as told:
            make(vectors=vectors(5)).save(saved, overwrite=True)
    assert ("no space left" in str(told.value)) == (number == errno.ENOSPC)
    assert load_prompt(saved).tokens == 3
    assert verify_prompt(saved) == []
    assert os.listdir(saved.parent) == ["mood"]


def test_disk_that_fills_up_half_way(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [200]

    def write(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, bytes(data)[: left[0]])
        left[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OutputError, match="no space left for its 1 kB; free some, or choose another place"):
            make(vectors=vectors(5)).save(saved, overwrite=True)
    assert load_prompt(saved).tokens == 3
    assert os.listdir(saved.parent) == ["mood"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    assert verify_prompt(make().save(tmp_path / "p")) == []


def test_second_rename_fails(saved: Path, no_exchange: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OutputError):
            make(vectors=vectors(5)).save(saved, overwrite=True)
    assert load_prompt(saved).tokens == 3
    assert os.listdir(saved.parent) == ["mood"]


def test_interrupted_between_the_renames(saved: Path, no_exchange: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            make(vectors=vectors(5)).save(saved, overwrite=True)
    assert load_prompt(saved).tokens == 3
    assert os.listdir(saved.parent) == ["mood"]


def test_killed_between_the_renames(saved: Path, no_exchange: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            os._exit(9)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    child = os.fork()
    if child == 0:
        make(vectors=vectors(5)).save(saved, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert all(is_temporary(name) for name in os.listdir(saved.parent))
    assert list_prompts(saved.parent) == []
    with pytest.raises(PromptFormatError, match=r"an interrupted save left its old version: rename (.*) to it") as told:
        load_prompt(saved)
    old = re.search("rename (.*) to it", str(told.value))
    assert old is not None
    assert load_prompt(old[1]).tokens == 3


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="this system has renames only")
def test_folders_change_places_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make().save(tmp_path / "one"), make(vectors=vectors(5)).save(tmp_path / "two")
    if not exchange(one, two):
        pytest.skip("this file system has renames only")
    assert (load_prompt(one).tokens, load_prompt(two).tokens) == (5, 3)
    monkeypatch.setattr(os, "rename", fail(errno.EIO))  # not needed to replace a prompt
    make(vectors=vectors(4)).save(two, overwrite=True)
    assert load_prompt(two).tokens == 4
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_what_cannot_be_exchanged_is_left_alone(tmp_path: Path) -> None:
    one = make().save(tmp_path / "one")
    assert not exchange(one, tmp_path / "not there")
    assert not exchange(tmp_path / "not there", one)
    assert os.listdir(tmp_path) == ["one"] and load_prompt(one).tokens == 3


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_the_exchange_the_name_is_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if atomic._exchanging() is None:
        pytest.skip("this system has renames only")

    def killed(one: Path, two: Path) -> bool:
        if moment == "after":
            assert exchange(one, two)
        os._exit(9)

    monkeypatch.setattr(atomic, "exchange", killed)
    child = os.fork()
    if child == 0:
        make(vectors=vectors(5)).save(saved, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert load_prompt(saved).tokens == (3 if moment == "before" else 5)
    assert verify_prompt(saved) == []
    assert [prompt["name"] for prompt in list_prompts(saved.parent)] == ["mood"]


def test_threads_that_examine_prompts_at_once_do_not_mix_their_remarks(tmp_path: Path) -> None:
    folders = [make().save(tmp_path / f"p{i}") for i in range(4)]
    for i, folder in enumerate(folders):
        edit(folder, **{f"unknown{i}": 1})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(verify_prompt, folders * 50))
    assert all(len(lines) == 1 and f"unknown{i % 4}" in lines[0] for i, lines in enumerate(found))
    with pytest.warns(UserWarning, match="unknown0"):  # outside it is a warning as before
        load_prompt(folders[0])


def test_what_can_be_known_before_tuning(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "new" / "folder")
    check_output(saved, overwrite=True)
    with pytest.raises(OutputError, match="already holds a prompt"):
        check_output(saved)
    with pytest.raises(OutputError, match=r"softprompt.json is not a folder that one may write to|is a file"):
        check_output(saved / DESCRIPTION / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not a folder that one may write to"):
        check_output(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "result.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail(errno.ENOSPC))
        with pytest.raises(OutputError, match="no space left"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["result.json"]


def test_is_prompt_folder(tmp_path: Path, saved: Path) -> None:
    assert is_prompt_folder(saved)
    assert not is_prompt_folder(tmp_path)
    assert not is_prompt_folder(tmp_path / "nowhere")
    (saved / DESCRIPTION).write_text("broken")
    assert is_prompt_folder(saved)


# The listing


def test_listing(tmp_path: Path) -> None:
    make().save(tmp_path / "mood")
    make(behind_template(), metrics={"test": {"metric": "accuracy", "score": 0.5}}).save(tmp_path / "more" / "behind")
    broken = make().save(tmp_path / "more" / "broken")
    (broken / TENSOR).write_bytes(b"")
    half = make().save(tmp_path / "half")
    (half / DESCRIPTION).unlink()
    (half / PEFT).unlink()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / PEFT).write_text('{"peft_type": "LORA"}')
    (tmp_path / ".mood.softprompt-0123abcd.old").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")

    listed = {summary["name"]: summary for summary in list_prompts(tmp_path)}
    assert list(listed) == ["half", "mood", "more/behind", "more/broken"]
    mood = listed["mood"]
    assert mood["problems"] == []
    assert (mood["kind"], mood["tokens"], mood["width"], mood["placement"]) == ("embedding", 3, 8, "front")
    assert (mood["metric"], mood["score"], mood["base_model"]) == ("accuracy", 0.75, "someone/model")
    assert mood["made"] == "2026-11-21T04:00:00+00:00"
    assert mood["template"] == front_template().to_dict()
    assert mood["bytes"] == sum(path.stat().st_size for path in (tmp_path / "mood").iterdir())
    assert (listed["more/behind"]["placement"], listed["more/behind"]["score"]) == ("behind", 0.5)
    assert "too few for safetensors" in listed["more/broken"]["problems"][0]
    assert listed["more/broken"]["tokens"] is None
    assert "half-copied" in listed["half"]["problems"][0]
    json.dumps(list(listed.values()))


def test_listing_of_a_prompt_and_of_nothing(saved: Path, tmp_path: Path) -> None:
    assert [summary["name"] for summary in list_prompts(saved)] == ["mood"]
    assert list_prompts(tmp_path / "nowhere") == []
