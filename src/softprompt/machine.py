"""What this machine has, and how best to compute on it: device, precision, threads, memory."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PROBE_SECONDS = 0.25  # the most that the precision probe takes
WORTH_IT = 1.3  # bfloat16 rounds more, so it has to be this many times as fast as float32
SMALL, LARGE = (32, 256, 256), (128, 576, 1536)  # rows, inputs, outputs of the layers that are timed
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Precision:
    """The precision to compute in, and one line that says why."""

    dtype: torch.dtype
    reason: str


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory for this process, a container's limit included; None where the system does not say."""

    total: int | None
    available: int | None


@dataclass(frozen=True)
class Threads:
    """used: threads that torch computes with. cores: processors that this process may use, a quota included."""

    used: int
    cores: int


def default_device() -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def tokens_at_once(device: torch.device) -> int:
    """How many tokens of a batch are best computed together where a gradient is wanted.

    On a CPU a thousand fill the matrix products already; with four thousand what is kept for the gradient leaves its
    caches, and a step on long texts takes half as long again, in twice the memory (docs/log.md). An accelerator has
    more units to fill; not measured on one.
    """
    return 1024 if device.type == "cpu" else 4096


def probe_precision(device: torch.device | str | None = None) -> Precision:
    """Choose float32 or bfloat16 for `device`, on a CPU by timing both for at most a quarter of a second.

    bfloat16 is several times faster than float32 on processors with instructions for it, and ten to hundreds of times
    slower on others.
    """
    device = torch.device(device) if device is not None else default_device()
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"{torch.cuda.get_device_name(device)} computes in bfloat16")
        return Precision(torch.float32, f"{torch.cuda.get_device_name(device)} does not compute in bfloat16")
    if device.type != "cpu":
        return Precision(torch.float32, f"the safe choice on {device.type}")
    return _probe_cpu()


def _probe_cpu() -> Precision:
    """Time a small layer, and a large one only if it can be afforded: bfloat16 may be hundreds of times slower.

    One thread and its own processor time are measured, so that other programs running at the moment decide nothing.
    """
    deadline = time.perf_counter() + PROBE_SECONDS * 0.8  # the rest is for what the last measurement overruns
    used = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        float32, bfloat16 = (_time_layer(dtype, SMALL, deadline) for dtype in (torch.float32, torch.bfloat16))
        expected = bfloat16 * math.prod(LARGE) / math.prod(SMALL)
        affordable = time.perf_counter() + 3 * expected < deadline
        if affordable:
            float32, bfloat16 = (_time_layer(dtype, LARGE, deadline) for dtype in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(used)
    return _choose(float32 / bfloat16, affordable)


def _choose(gain: float, measured_large: bool) -> Precision:
    """gain: how many times as fast as float32 bfloat16 is. A small layer alone is no ground for taking bfloat16."""
    if gain < 1:
        return Precision(torch.float32, f"bfloat16 was measured {1 / gain:.1f} times slower on this CPU")
    if gain < WORTH_IT or not measured_large:
        return Precision(torch.float32, f"bfloat16 was measured only {gain:.1f} times as fast on this CPU")
    return Precision(torch.bfloat16, f"measured {gain:.1f} times as fast as float32 on this CPU")


def _time_layer(dtype: torch.dtype, shape: tuple[int, int, int], deadline: float) -> float:
    """The least seconds of some passes of a frozen linear layer, forward and back to its input.

    The first pass, in which libraries set themselves up, counts only when the deadline has come by then.
    """
    rows, inputs, outputs = shape
    x = torch.ones(rows, inputs, dtype=dtype)
    weight = torch.full((outputs, inputs), 0.01, dtype=dtype)
    best = _pass(x, weight)
    for attempt in range(6):
        if time.perf_counter() + best > deadline:
            break
        seconds = _pass(x, weight)
        best = seconds if attempt == 0 else min(best, seconds)
    return max(best, 1e-9)


def _pass(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of this thread's processor time for x [N, I] through weight [O, I] and back."""
    begun = time.thread_time()
    with torch.inference_mode():
        torch.nn.functional.linear(x, weight) @ weight
    return time.thread_time() - begun


def keep_freed_memory() -> bool:
    """Make the C library keep large freed blocks for the next tensor instead of giving them back to the kernel.

    By default glibc maps every large tensor anew, and the kernel zeroes all its pages, at every step. Returns whether
    it was done: only with glibc, elsewhere nothing happens. The process then keeps its peak of memory until it ends.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    never = 2**31 - 1
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, never), mallopt(top_pad, 64 << 20)])


def memory() -> Memory:
    """Main memory: what there is and what is free, whichever is less of the machine's and the container's."""
    total, available = _machine_memory()
    limit, free = _container_memory()
    return Memory(_least(total, limit), _least(available, free))


def text_bytes() -> int:
    """Memory to keep the states of texts in: a quarter of all there is, 1 GiB where the system does not say.

    Not of what is free now: the same run must keep the same texts when it is resumed.
    """
    total = memory().total
    return 1 << 30 if total is None else total // 4


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _machine_memory() -> tuple[int | None, int | None]:
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        facts = {line[0]: int(line[1]) * 1024 for line in lines if len(line) >= 2}
        return facts.get("MemTotal:"), facts.get("MemAvailable:")
    except (OSError, ValueError):
        pass
    try:  # macOS says how much there is, though not how much is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _container_memory() -> tuple[int | None, int | None]:
    """Limit and free bytes of the strictest control group that this process is in, version 2 or 1."""
    limits, frees = [], []
    for folder in _cgroup_folders("memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or limit >= 2**60:  # version 1 writes a huge number for 'no limit'
            continue
        limits.append(limit)
        if used is not None:
            frees.append(max(0, limit - used + _file_cache(folder)))
    return _least(*limits), _least(*frees)


def _file_cache(folder: Path) -> int:
    """Bytes that a control group uses for cached files, which the kernel gives back when they are needed."""
    try:
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def _cgroup_folders(controller: str) -> list[Path]:
    """The folders of this process's control groups, from its own up to the root, as far as they can be seen."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names == "" or controller in names.split(","):
            root = CGROUPS if names == "" else CGROUPS / controller
            own = root / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or 'max'
        return None


def threads() -> Threads:
    """How many threads torch uses, and how many processors there are for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return Threads(torch.get_num_threads(), max(1, min(cores, round(quota)) if quota else cores))


def _cpu_quota() -> float | None:
    """Processors that a container may use at a time, None where it is not limited."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota, period = str(_number(folder / "cpu.cfs_quota_us")), str(_number(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
