"""Device, precision, threads, memory, and what the doctor makes of them."""

from __future__ import annotations

import threading
import time
from collections import namedtuple

import pytest
import torch

from softprompt import doctor, machine


def test_probe_is_quick_and_leaves_the_threads_alone():
    used = torch.get_num_threads()
    machine.probe_precision("cpu")
    begun = time.thread_time()
    choice = machine.probe_precision(torch.device("cpu"))
    assert time.thread_time() - begun < machine.PROBE_SECONDS + 0.05
    assert torch.get_num_threads() == used
    assert choice.dtype in (torch.float32, torch.bfloat16)
    assert choice.reason.endswith("on this CPU")


def test_probe_gives_up_early_where_bfloat16_is_hundreds_of_times_slower(monkeypatch):
    timed = []

    def slow(dtype, shape, deadline):
        timed.append((dtype, shape))
        return 0.02 if dtype == torch.bfloat16 else 1e-4

    monkeypatch.setattr(machine, "_time_layer", slow)
    choice = machine.probe_precision("cpu")
    assert (choice.dtype, choice.reason) == (torch.float32, "bfloat16 was measured 200.0 times slower on this CPU")
    assert {shape for _, shape in timed} == {machine.SMALL}


@pytest.mark.parametrize(
    ("gain", "large", "dtype"),
    [(4.0, True, torch.bfloat16), (4.0, False, torch.float32), (1.2, True, torch.float32), (0.1, True, torch.float32)],
)
def test_choice(gain, large, dtype):
    assert machine._choose(gain, large).dtype == dtype


def test_precision_of_other_devices(monkeypatch):
    assert machine.probe_precision("mps").dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert machine.probe_precision("cuda") == machine.Precision(torch.bfloat16, "A card computes in bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert machine.probe_precision("cuda").dtype == torch.float32


def test_default_device_prefers_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.default_device().type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.default_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.default_device().type == "cuda"


def test_freed_memory_is_kept_only_with_glibc(monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))  # as with musl
    assert machine.keep_freed_memory() is False
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    assert machine.keep_freed_memory() is False


def test_memory_of_this_machine():
    found = machine.memory()
    assert found.total is None or (0 < (found.available or 1) <= found.total)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/box/inner\n", {"box/memory.max": "1000", "box/memory.current": "900", "box/inner/memory.max": "max"}),
        (
            "4:cpu,memory:/box\n0::/\n",
            {"memory/box/memory.limit_in_bytes": "1000", "memory/box/memory.usage_in_bytes": "900"},
        ),
    ],
)
def test_memory_limit_of_a_container(tmp_path, monkeypatch, groups, files):
    _fake_cgroups(tmp_path, monkeypatch, groups, files)
    assert machine._container_memory() == (1000, 100)
    found = machine.memory()
    assert (found.total, found.available) == (1000, 100)


def test_memory_limit_counts_cached_files_as_free_and_no_limit_as_none(tmp_path, monkeypatch):
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 50\n"}
    _fake_cgroups(tmp_path, monkeypatch, "0::/\n", files)
    assert machine._container_memory() == (1000, 150)
    (tmp_path / "groups" / "memory.max").write_text(str(2**63 - 4096))
    assert machine._container_memory() == (None, None)


def test_processor_quota_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    _fake_cgroups(tmp_path, monkeypatch, "0::/box\n", {"box/cpu.max": "150000 100000", "cpu.max": "max 100000"})
    assert machine.threads() == machine.Threads(torch.get_num_threads(), 2)
    _fake_cgroups(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "10000 100000"})
    assert machine.threads().cores == 1


def _fake_cgroups(tmp_path, monkeypatch, groups, files):
    """Control groups as Linux shows them, in a folder of ours."""
    root = tmp_path / "groups"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    listing = tmp_path / "cgroup"
    listing.write_text(groups)
    real = machine.Path
    monkeypatch.setattr(
        machine, "Path", lambda path, *rest: listing if path == "/proc/self/cgroup" else real(path, *rest)
    )
    monkeypatch.setattr(machine, "CGROUPS", root)


def test_doctor_tells_all_and_finds_no_fault_here():
    facts = {fact.name: fact for fact in doctor.doctor_facts()}
    assert {"python", "device", "precision", "threads", "memory", "hub cache", "own cache", "smollm2-135m"} <= set(
        facts
    )
    assert facts["device"].problem is None
    assert "processors" in facts["threads"].value
    assert facts["precision"].value.startswith(("float32: ", "bfloat16: "))


def test_doctor_names_problems_and_what_to_do(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine, "threads", lambda: machine.Threads(8, 2))
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(4_000_000_000, 500_000_000))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    problems = {fact.name: fact.problem for fact in doctor.doctor_facts() if fact.problem}
    assert problems["threads"].endswith("set OMP_NUM_THREADS=2")
    assert problems["memory"].startswith("less than 2 GB free")
    assert problems["disk of the cache"].startswith("less than 2 GB free")
    assert f"{tmp_path} cannot be written" in problems["own cache"]


def test_doctor_compares_versions():
    old = doctor._package("torch", ">=99", lambda version: False)
    assert old.problem == "expected >=99: pip install 'torch>=99'"
    missing = doctor._package("no-such-package", ">=1", lambda version: True)
    assert (missing.value, missing.problem) == ("not installed", "needed (>=1): pip install 'no-such-package>=1'")


def test_doctor_survives_a_check_that_fails(monkeypatch):
    def broken():
        raise RuntimeError("driver gone")

    monkeypatch.setattr(machine, "threads", broken)
    facts = {fact.name: fact for fact in doctor.doctor_facts()}
    assert facts["threads"].problem == "this check failed: RuntimeError: driver gone"
    assert "memory" in facts


def test_probe_takes_one_thread_at_a_time_without_deadlock():
    """Two servers in one process may ask at once."""
    both = [threading.Thread(target=machine.probe_precision, args=("cpu",)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(10)
    assert not any(thread.is_alive() for thread in both)
