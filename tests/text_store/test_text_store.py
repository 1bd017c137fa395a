"""Texts on disk: the same bytes as in memory, found again by another run, never those of another model or text."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

import softprompt as sp
from softprompt import computation
from softprompt.attention import StateCache, States
from softprompt.computation import keep_texts, loss_and_gradient
from softprompt.placement import Row, shared_length
from softprompt.text_store import folders, store
from softprompt.text_store.eight_bit import decode, encode
from softprompt.text_store.shards import owner_of
from softprompt.text_store.store import TextStore
from tiny_models import make_backbone, make_reviews, make_rows, make_tokenizer, random_vectors

BEHIND = "Review : {text} {soft} \n Sentiment :"
SETTINGS = dict(tokens=4, steps=6, batch_size=6, learning_rate=0.5, validate_every=3, init="random")


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float64, make_tokenizer())


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_store(backbone, tmp_path, said):
    """A store as a new run has it, by default one that keeps nothing in memory."""

    def make(**settings):
        given = {"mode": "disk", "root": tmp_path / "texts", "max_bytes": 0, "say": said.append, **settings}
        return TextStore(given.pop("backbone", backbone), **given)

    return make


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many texts are computed from now on, call by call."""
    real, counts = computation._compute_texts, []

    def counting(backbone, rows, *more):
        counts.append(len(rows))
        return real(backbone, rows, *more)

    monkeypatch.setattr(computation, "_compute_texts", counting)
    return counts


ROWS = make_rows("behind")
START = shared_length(ROWS)


def gradient(backbone, cache, rows=ROWS):
    return loss_and_gradient(backbone, rows, random_vectors(backbone), start=START, cache=cache).gradient


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# --- the same as memory ---------------------------------------------------------------------------------------------


def test_the_first_row_may_begin_with_a_soft_token(backbone):
    texts = StateCache()
    assert keep_texts(backbone, [Row((-1, -2, 5, 6), 3), Row((7, 8, -1, -2, 5, 6), 5)], 0, texts)
    assert ("text", 0, (7, 8)) in texts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_texts_from_disk_are_those_from_memory_to_the_bit(make_store, computed, dtype):
    backbone = make_backbone("llama", dtype)
    memory = StateCache()
    assert keep_texts(backbone, ROWS, START, memory)
    wanted = gradient(backbone, memory)
    first = make_store(backbone=backbone)
    assert keep_texts(backbone, ROWS, START, first)
    assert torch.equal(gradient(backbone, first), wanted)
    computed.clear()
    second = make_store(backbone=backbone, mode="auto")
    assert keep_texts(backbone, ROWS, START, second)
    assert torch.equal(gradient(backbone, second), wanted) and wanted.abs().max() > 0
    assert not computed


def test_memory_holds_what_it_can_and_the_disk_the_rest(make_store, backbone, computed):
    size = keep_size(backbone)
    texts = make_store(max_bytes=size // 2)
    assert keep_texts(backbone, ROWS, START, texts)
    held = texts.max_bytes - texts.room
    assert 0 < held <= size // 2
    computed.clear()
    reference = StateCache()
    keep_texts(backbone, ROWS, START, reference)
    computed.clear()
    assert torch.equal(gradient(backbone, texts), gradient(backbone, reference)) and not computed


def keep_size(backbone) -> int:
    cache = StateCache()
    keep_texts(backbone, ROWS, START, cache)
    return cache.max_bytes - cache.room


def test_a_text_is_found_whatever_comes_before_it_is_called_shared(make_store, backbone, computed):
    keep_texts(backbone, ROWS, 1, make_store())
    computed.clear()
    texts = make_store()
    assert keep_texts(backbone, ROWS, 2, texts) and not computed
    reference = StateCache()
    keep_texts(backbone, ROWS, 2, reference)
    vectors = random_vectors(backbone)
    found, wanted = (loss_and_gradient(backbone, ROWS, vectors, start=2, cache=c) for c in (texts, reference))
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=0, atol=1e-10)


# --- runs -----------------------------------------------------------------------------------------------------------


def make_task(input: str = BEHIND, target: str = " {label}", count: int = 30) -> sp.Task:
    template = sp.Template.make(input, target, labels=["negative", "positive"])
    return sp.Task.from_rows(make_reviews(count), make_reviews(12, 1), [], template)


@pytest.fixture
def cache_here(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def test_a_second_run_computes_no_text_and_gets_the_same_vectors(backbone, cache_here, computed):
    plain = sp.tune(backbone, make_task(), text_cache="memory", **SETTINGS)
    assert computed and not cache_here.exists()
    first = sp.tune(backbone, make_task(), text_cache="disk", **SETTINGS)
    assert shards(cache_here)
    computed.clear()
    second = sp.tune(backbone, make_task(), text_cache="disk", **SETTINGS)
    assert not computed
    for result in (first, second):
        assert torch.equal(result.prompt.vectors, plain.prompt.vectors)
        assert result.validation.loss == plain.validation.loss


def test_a_deep_prompt_and_another_task_find_the_same_texts(backbone, cache_here, computed):
    sp.tune(backbone, make_task(), text_cache="disk", **SETTINGS)
    computed.clear()
    sp.tune(backbone, make_task(), text_cache="disk", kind="deep", **SETTINGS)
    sp.tune(backbone, make_task("Review : {text} {soft} \n good or bad :"), text_cache="disk", **SETTINGS)
    assert not computed
    sp.tune(backbone, make_task("text : {text} {soft} \n Sentiment :"), text_cache="disk", **SETTINGS)
    assert sum(computed) == 30 + 12  # another template, so other texts


def test_only_new_rows_are_computed(backbone, cache_here, computed):
    sp.tune(backbone, make_task(), text_cache="disk", **SETTINGS)
    computed.clear()
    changed = make_task(count=33)  # three more
    changed.train[0]["text"] += " w5"
    sp.tune(backbone, changed, text_cache="disk", **SETTINGS)
    assert sum(computed) == 4


def test_a_sweep_finds_what_tune_has_kept(backbone, cache_here, computed):
    sp.tune(backbone, make_task(), text_cache="disk", **SETTINGS)
    computed.clear()
    settings = {key: value for key, value in SETTINGS.items() if key != "learning_rate"}
    sp.sweep(backbone, make_task(), grid={"learning_rate": [0.2, 0.5]}, text_cache="disk", **settings)
    assert not computed


def test_off_computes_texts_at_each_step_and_gets_the_same(backbone, cache_here, computed):
    kept = sp.tune(backbone, make_task(), text_cache="memory", **SETTINGS)
    assert sum(computed) == 30 + 12
    computed.clear()
    off = sp.tune(backbone, make_task(), text_cache="off", **SETTINGS)
    assert sum(computed) == SETTINGS["steps"] * SETTINGS["batch_size"] and not cache_here.exists()
    torch.testing.assert_close(off.prompt.vectors, kept.prompt.vectors, rtol=0, atol=1e-5)


def test_events_tell_how_many_texts_are_there(backbone, cache_here):
    for _ in range(2):
        heard = []
        sp.tune(backbone, make_task(), text_cache="disk", listen=heard.append, **SETTINGS)
        told = [event["done"] for event in heard if event["event"] == "texts"]
        assert told[0] == 0 and told[-1] == 30 and told == sorted(told)


# --- whose texts ----------------------------------------------------------------------------------------------------


def test_another_model_precision_or_configuration_has_its_own_texts(backbone):
    known = owner_of(backbone)
    assert owner_of(make_backbone("llama", torch.float64)).key == known.key
    others = [owner_of(make_backbone("llama", torch.float32)), owner_of(backbone, 8), owner_of(make_backbone("qwen2"))]
    turned = make_backbone("llama")
    turned.model.config.rms_norm_eps *= 2
    nudged = make_backbone("llama")
    with torch.no_grad():
        nudged.model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-9
    others += [owner_of(turned), owner_of(nudged)]
    assert len({known.key, *(other.key for other in others)}) == 6


def test_files_of_another_model_are_not_used(make_store, backbone, computed, said):
    other = make_backbone("llama", torch.float64)
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(1.5)
    theirs, mine = make_store(backbone=other), make_store()
    keep_texts(other, ROWS, START, theirs)
    folder = owner_of(backbone).folder(theirs.root)
    owner_of(other).folder(theirs.root).rename(folder)
    computed.clear()
    assert keep_texts(backbone, ROWS, START, mine)
    assert sum(computed) == len(ROWS)
    assert len(said) == 1 and "another model" in said[0] and "softprompt cache clear" in said[0]
    reference = StateCache()
    keep_texts(backbone, ROWS, START, reference)
    assert torch.equal(gradient(backbone, mine), gradient(backbone, reference))


def test_texts_of_a_hash_that_says_nothing_of_tokens_before_are_told_apart(make_store, backbone):
    texts = make_store()
    keep_texts(backbone, ROWS, START, texts)
    row = ROWS[0]
    end = row.ids.index(-1)
    assert ("text", START, row.ids[:end]) in texts
    for changed in ((9, *row.ids[1:end]), row.ids[: end - 1], (*row.ids[:end], 5)):
        assert ("text", START, changed) not in texts and texts.get(("text", START, changed)) is None
    assert ("text", 0, row.ids[:end]) not in texts  # the tokens before START have not been kept


# --- damage ---------------------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def write_nonsense(path: Path) -> None:
    path.write_bytes(b"\xff" * 5000)


def wrong_shapes(path: Path) -> None:
    """A sound file of the same names whose tensors are others."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    save_file({name: torch.zeros(3, dtype=torch.float64) for name in names}, path, metadata)


@pytest.mark.parametrize("harm", [cut_short, empty, flip_a_bit, write_nonsense, wrong_shapes])
def test_damaged_files_are_computed_again_and_told_once(make_store, backbone, computed, said, harm):
    keep_texts(backbone, ROWS, START, make_store())
    for path in shards(make_store().root):
        harm(path)
    computed.clear()
    texts = make_store()
    assert keep_texts(backbone, ROWS, START, texts)
    assert sum(computed) > 0
    assert len(said) == 1 and "is damaged" in said[0] and "computed again" in said[0]
    reference = StateCache()
    keep_texts(backbone, ROWS, START, reference)
    assert torch.equal(gradient(backbone, texts), gradient(backbone, reference))
    computed.clear()
    said.clear()
    assert keep_texts(backbone, ROWS, START, make_store()) and not computed and not said  # written anew


def test_a_file_removed_while_it_is_used_is_still_there_for_its_reader(make_store, backbone, computed):
    keep_texts(backbone, ROWS, START, make_store())
    texts = make_store()
    keep_texts(backbone, ROWS, START, texts)
    wanted = gradient(backbone, texts)
    for path in shards(texts.root):
        path.unlink()
    computed.clear()
    assert torch.equal(gradient(backbone, texts), wanted) and not computed


def test_a_file_removed_before_it_is_read_is_computed_again(make_store, backbone, computed, said):
    keep_texts(backbone, ROWS, START, make_store())
    texts = make_store()
    assert texts.shards is not None
    for path in shards(texts.root):
        path.unlink()
    computed.clear()
    assert keep_texts(backbone, ROWS, START, texts) and sum(computed) == len(ROWS) and not said


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_kill_leaves_whole_shards_and_the_next_run_goes_on_behind_them(make_store, backbone, computed, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1)  # one for each batch
    replace, times = os.replace, []

    def killed(*paths):
        if str(paths[1]).endswith(".safetensors"):
            times.append(paths)
            if len(times) == 3:
                raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_texts(backbone, ROWS, START, make_store(), micro_batch_tokens=14)
    whole = sum(kept.texts for kept in folders.kept_models(make_store().root))
    assert 0 < whole < len(ROWS)
    computed.clear()
    texts = make_store()
    keep_texts(backbone, ROWS, START, texts, micro_batch_tokens=14)
    assert sum(computed) == len(ROWS) - whole
    reference = StateCache()
    keep_texts(backbone, ROWS, START, reference, micro_batch_tokens=14)
    assert torch.equal(gradient(backbone, texts), gradient(backbone, reference))  # the same batches, so the same bits


def test_what_killed_processes_left_is_removed_once_it_is_old(make_store, backbone):
    texts = make_store()
    keep_texts(backbone, ROWS, START, texts)
    folder = texts.shards.folder
    old, new = (folder / f".x.softprompt-{digit * 8}.new" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"half")
    hours_ago = time.time() - 3 * folders.STALE_SECONDS
    os.utime(old, (hours_ago, hours_ago))
    assert make_store().shards is not None
    assert not old.exists() and new.exists()


def test_without_space_it_goes_on_and_says_so(make_store, backbone, monkeypatch, said):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("softprompt.text_store.shards._write", full)
    texts = make_store(max_bytes=1 << 30)
    assert keep_texts(backbone, ROWS, START, texts)  # memory has them
    nowhere = make_store()
    assert not keep_texts(backbone, ROWS, START, nowhere)
    assert len(said) == 2 and all("no space left" in text and "going on without" in text for text in said)
    assert not list(texts.root.rglob("*.new"))
    torch.testing.assert_close(gradient(backbone, nowhere), gradient(backbone, texts), rtol=0, atol=1e-10)


def test_what_does_not_fit_anywhere_is_not_computed_and_told_once(make_store, backbone, computed, said):
    texts = make_store(gigabytes=1e-6)
    for _ in range(2):
        assert not keep_texts(backbone, ROWS, START, texts)
    assert not computed and len(said) == 1
    assert "do not fit into memory (0.0 MB) or on disk (0.0 MB)" in said[0] and "text_cache_bits=8" in said[0]


def test_a_folder_that_cannot_be_read_is_told_and_memory_used(make_store, backbone, monkeypatch, said):
    texts = make_store(max_bytes=1 << 30)
    keep_texts(backbone, ROWS, START, texts)
    real = os.scandir

    def scandir(path):
        if "texts" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert keep_texts(backbone, ROWS, START, make_store(max_bytes=1 << 30))
    assert len(said) == 1 and "Permission denied" in said[0] and "SOFTPROMPT_CACHE" in said[0]


def test_a_file_where_the_folder_should_be(make_store, backbone, tmp_path, said):
    (tmp_path / "texts").write_text("not a folder")
    assert keep_texts(backbone, ROWS, START, make_store(max_bytes=1 << 30))
    assert len(said) == 1 and "cannot write" in said[0]


def test_the_files_are_for_their_owner_only(make_store, backbone):
    texts = make_store()
    keep_texts(backbone, ROWS, START, texts)
    assert texts.shards.folder.stat().st_mode & 0o077 == 0


# --- auto -----------------------------------------------------------------------------------------------------------


class Clock:
    """Each text takes a second to compute; writing takes `write` seconds."""

    def __init__(self, monkeypatch, write: float = 0.0):
        self.now = 0.0
        monkeypatch.setattr(store.time, "perf_counter", lambda: self.now)
        compute, writing = computation._compute_texts, store.Shards.write

        def computing(backbone, rows, *more):
            self.now += len(rows)
            return compute(backbone, rows, *more)

        def slow(*given):
            self.now += write
            writing(*given)

        monkeypatch.setattr(computation, "_compute_texts", computing)
        monkeypatch.setattr(store.Shards, "write", slow)


@pytest.mark.parametrize(("seconds", "written"), [(4.0, True), (6.0, False)])
def test_auto_writes_what_takes_long_to_compute(make_store, backbone, monkeypatch, seconds, written):
    Clock(monkeypatch)
    monkeypatch.setattr(store, "WORTH_SECONDS", seconds)  # the five texts take five
    texts = make_store(mode="auto", max_bytes=1 << 30)
    assert keep_texts(backbone, ROWS, START, texts)
    assert bool(shards(texts.root)) == written


def test_auto_stops_writing_to_a_slow_disk(make_store, backbone, monkeypatch, said):
    monkeypatch.setattr(store, "WORTH_SECONDS", 1.0)
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    Clock(monkeypatch, write=3.0)
    texts = make_store(mode="auto", max_bytes=1 << 30)
    assert keep_texts(backbone, ROWS, START, texts, micro_batch_tokens=14)
    assert len(shards(texts.root)) == 1
    assert len(said) == 1 and "writing to" in said[0] and "took 3.0 s" in said[0]


def test_auto_takes_the_disk_where_memory_does_not_suffice(make_store, backbone):
    texts = make_store(mode="auto", max_bytes=100)
    assert keep_texts(backbone, ROWS, START, texts)
    assert shards(texts.root)


def test_a_prompt_at_the_front_looks_at_no_disk(backbone, cache_here, monkeypatch):
    monkeypatch.setattr(store, "Shards", lambda *_: pytest.fail("the disk was looked at"))
    sp.tune(backbone, make_task("Review : {text} \n Sentiment :"), text_cache="disk", **SETTINGS)


# --- 8 bits ---------------------------------------------------------------------------------------------------------


def test_eight_bits_are_near_and_small():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 1, 2, 9, 16, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    coded = encode(States.of_packed(numbers))
    back = decode(coded, torch.float32, "cpu").packed
    largest = numbers.abs().amax(dim=-1, keepdim=True)
    assert ((back - numbers).abs() <= largest / 253).all()
    assert float((back - numbers).norm() / numbers.norm()) < 0.01
    assert coded.nbytes() == numbers.numel() + 4 * numbers.numel() // 16


def test_eight_bits_of_nothing_and_of_infinities():
    zeros = torch.zeros(2, 1, 1, 3, 4)
    assert torch.equal(decode(encode(States.of_packed(zeros)), torch.float32, "cpu").packed, zeros)
    tiny = torch.full((2, 1, 1, 1, 4), 1e-42)
    assert decode(encode(States.of_packed(tiny)), torch.float32, "cpu").packed.isfinite().all()
    assert decode(encode(States.of_packed(zeros + torch.inf)), torch.float32, "cpu").packed.isnan().all()


def test_eight_bits_change_the_loss_little_and_memory_and_disk_alike(make_store, backbone, computed):
    reference = StateCache()
    keep_texts(backbone, ROWS, START, reference)
    wanted = gradient(backbone, reference)
    memory, first = make_store(mode="memory", bits=8, max_bytes=1 << 30), make_store(bits=8)
    for texts in (memory, first):
        assert keep_texts(backbone, ROWS, START, texts)
    computed.clear()
    second = make_store(bits=8)
    assert keep_texts(backbone, ROWS, START, second) and not computed
    found = gradient(backbone, memory)
    assert torch.equal(gradient(backbone, first), found) and torch.equal(gradient(backbone, second), found)
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < 0.02
    held = reference.max_bytes - reference.room
    assert memory.max_bytes - memory.room < 0.3 * held  # 1 + 4/8 bytes in place of 8, and the shared text


def test_texts_before_no_soft_token_are_found(make_store, backbone, computed):
    """The template without its prompt reads the same texts."""
    rows = [Row((*row.ids[: row.answer], 5, *row.ids[row.answer :]), row.answer + 1) for row in ROWS]
    start = shared_length(rows)
    keep_texts(backbone, rows, start, make_store())
    without = [Row(tuple(i for i in row.ids if i >= 0), row.answer - sum(i < 0 for i in row.ids)) for row in rows]
    computed.clear()
    assert keep_texts(backbone, without, start, make_store()) and not computed


def test_trainer_warns_in_its_log_when_texts_find_no_place(backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "text_bytes", lambda: 0)
    result = sp.tune(backbone, make_task(), text_cache="memory", **SETTINGS)
    warnings = [event["text"] for event in result.history if event["event"] == "warning"]
    assert any("computed at each step" in text and "text_cache=auto" in text for text in warnings)
