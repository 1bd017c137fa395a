"""What a cell costs besides its score: peak memory, energy, bytes on disk, seconds to switch and to answer."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

from ..attention import StateCache
from ..data import Split
from .protocol import Job, Method, Opened

POWERCAP = Path("/sys/class/powercap")
INFERENCE_ROWS = 32


class Meter:
    """Within it peak memory and energy are measured; both are None where the machine cannot tell.

    Memory is the largest that this process held at a time, model and libraries included, or on a GPU the largest that
    torch had allocated there. Energy is that of the whole processor package (RAPL) or of the whole GPU that computes
    (NVML, where the package nvidia-ml-py is installed), so of all that runs on it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_bytes: int | None = None
        self.before_bytes: int | None = None
        self.joules: float | None = None

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before_bytes = int(torch.cuda.memory_allocated(self.device))
        else:
            self._resettable = _reset_peak()
            self.before_bytes = _status_bytes("VmRSS")
        self._energy = self._spent_so_far()
        return self

    def _spent_so_far(self) -> dict[str, tuple[int, int]] | None:
        return gpu_energy(self.device) if self.device.type == "cuda" else energy()

    def __exit__(self, *_: object) -> None:
        after = self._spent_so_far()
        if self._energy and after and set(after) == set(self._energy):
            self.joules = sum(_spent(self._energy[zone], after[zone]) for zone in after)
        if self.device.type == "cuda":
            self.peak_bytes = int(torch.cuda.max_memory_allocated(self.device))
        elif self._resettable:
            self.peak_bytes = _status_bytes("VmHWM")


def _reset_peak() -> bool:
    """Let the kernel forget this process's peak; False where it cannot, whose peak would then be that of loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def energy(root: Path | None = None) -> dict[str, tuple[int, int]] | None:
    """Microjoules spent so far and where the counter wraps, by processor package; None without readable counters."""
    found = {}
    for zone in sorted((root or POWERCAP).glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # a part of a package
            continue
        try:
            largest = int((zone / "max_energy_range_uj").read_text())
            found[zone.name] = (int((zone / "energy_uj").read_text()), largest)
        except (OSError, ValueError):
            return None
    return found or None


def gpu_energy(device: torch.device) -> dict[str, tuple[int, int]] | None:
    """Microjoules that the GPU has spent so far; its counter does not wrap. None where NVML cannot tell."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(name))
    except Exception:  # not installed, no driver, a card without the counter: NVML raises errors of its own
        return None
    return {name: (int(millijoules) * 1000, 0)}


def _spent(before: tuple[int, int], after: tuple[int, int]) -> float:
    used = after[0] - before[0]
    return (used if used >= 0 else used + after[1]) / 1e6


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def switch(method: Method, job: Job, folder: Path) -> tuple[Opened, float]:
    """Open a method, and the seconds from its files to its first answered row, nothing of the task being kept yet."""
    first = job.task.test.take(1)
    job.backbone.states = StateCache()
    begun = time.perf_counter()
    opened = method.open(job, folder)
    opened.score(first, text_scores=False)
    return opened, time.perf_counter() - begun


def inference_seconds(job: Job, opened: Opened) -> float:
    """Seconds a row of label scoring (for free text: of its loss), the better of two turns; constant text is kept."""
    rows = job.task.test.take(INFERENCE_ROWS, seed=0)
    opened.score(rows.take(2), text_scores=False)
    return min(_seconds(opened, rows) for _ in range(2)) / len(rows)


def _seconds(opened: Opened, rows: Split) -> float:
    begun = time.perf_counter()
    opened.score(rows, text_scores=False)
    return time.perf_counter() - begun


def machine() -> dict[str, Any]:
    """What the figures of time depend on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
