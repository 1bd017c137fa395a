"""Lines, averages, files and the page, from cells."""

from __future__ import annotations

import csv
import io
import json
import mmap
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.comparison.catalogue import METHODS
from softprompt.comparison.figures import ORDER, all_figures
from softprompt.comparison.measure import Meter, energy, gpu_energy
from softprompt.comparison.report import at_edge, number, p_value, seconds, shown, size, write_results
from softprompt.comparison.store import write_cell
from softprompt.comparison.summary import averages, averages_by_size, summarise, to_csv


def make_cell(method: str, accuracy: float, task: str = "sst2", model: str = "m", seed: int = 0, **more: Any) -> Any:
    rows = 100
    true = np.arange(rows) % 2
    predicted = np.where(np.arange(rows) < round(rows * accuracy), true, 1 - true)
    return {
        **{"task": task, "model": model, "method": method, "seed": seed, "digest": "x", "status": "done"},
        **{"metric": "accuracy", "score": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "rows": rows},
        "each": {"classes": 2, "true": true.tolist(), "predicted": predicted.tolist()},
        **{"train_rows": 50, "steps": 10, "model_parameters": 1_000_000, "trained_parameters": 4000},
        **{"train_seconds": 10.0 + seed, "search_seconds": 30.0, "examples_per_second": 16.0},
        **{"switch_seconds": 0.01, "inference_seconds": 0.02, "added_inference_seconds": 0.001},
        **{"energy_joules": None, "disk_bytes": 16_000, "peak_memory_bytes": 5e8, "memory_before_bytes": 4e8},
        "settings": {"learning_rate": 0.05},
        "trials": [{"learning_rate": 0.05, "score": 0.9, "loss": 0.1, "seconds": 10.0}],
        "machine": {"processor": "cpu <1>", "threads": 2, "gpu": None, "system": "Linux"},
        **more,
    }


def without(method: str, status: str = "left out", reason: str = "needs 9 GiB <b>", **more: Any) -> dict[str, Any]:
    head = {"task": "sst2", "model": "m", "method": method, "seed": 0, "digest": "x", "metric": "accuracy"}
    return {**head, "status": status, "reason": reason, **more}


def test_a_line_has_all_seeds_and_is_compared_with_the_best() -> None:
    cells = [make_cell("lora", 0.9), make_cell("lora", 0.94, seed=1), make_cell("zero-shot", 0.5), without("full")]
    lines = {line["method"]: line for line in summarise(cells)}
    assert lines["lora"]["score"] == pytest.approx(0.92) and lines["lora"]["seeds"] == 2
    assert lines["lora"]["best"] and lines["lora"]["p"] is None
    assert lines["lora"]["train_seconds"] == pytest.approx(10.5)
    assert not lines["zero-shot"]["best"] and lines["zero-shot"]["p"] < 1e-6
    assert lines["zero-shot"]["difference"] == pytest.approx(-0.42)
    assert lines["full"]["status"] == "left out" and "GiB" in lines["full"]["reason"]


def test_averages_are_over_tasks_that_all_have_and_few_results_narrow_nothing() -> None:
    cells = [make_cell(m, 0.8, task) for m in ("prompt", "lora") for task in ("a", "b", "c")]
    cells += [make_cell("prompt", 0.2, "d"), make_cell("full", 0.99, "a")]
    found = {line["method"]: line for line in averages(summarise(cells))}
    assert set(found) == {"prompt", "lora"}
    assert found["prompt"]["tasks"] == 3 and found["prompt"]["score"] == pytest.approx(0.8)


def test_scores_in_hundredths_are_averaged_as_shares() -> None:
    cells = [make_cell("lora", 0.8, "a"), make_cell("lora", 0.5, "b", metric="chrf", score=60.0)]
    cells[1]["each"] = {"values": [60.0] * 100}
    assert averages(summarise(cells))[0]["score"] == pytest.approx(0.7)


def test_the_view_by_size_takes_the_tasks_that_all_models_have() -> None:
    cells = [make_cell("prompt", 0.6, "a", "small"), make_cell("prompt", 0.1, "b", "small")]
    cells += [make_cell("prompt", 0.9, "a", "large", model_parameters=5_000_000)]
    shown = [(line["model"], line["score"]) for line in averages_by_size(summarise(cells))]
    assert shown == [("small", pytest.approx(0.6)), ("large", pytest.approx(0.9))]
    assert "sizes" in all_figures(summarise(cells))
    assert "sizes" not in all_figures(summarise(cells[:2]))


def test_the_view_by_size_has_the_same_tasks_for_all_and_methods_that_one_model_has() -> None:
    cells = [make_cell(m, 0.5, task, "small") for m in ("deep", "lora") for task in ("a", "b", "c")]
    large: dict[str, Any] = {"model": "large", "model_parameters": 5_000_000}
    cells += [make_cell("deep", 0.8, task, **large) for task in ("a", "b", "c")]
    cells += [make_cell("lora", 0.7, task, **large) for task in ("b", "c", "d")]
    cells += [make_cell("full", 0.6, task, "small") for task in ("b", "c")]  # the large one does not fit
    cells += [make_cell("prompt", 0.6, "a", "small"), make_cell("prompt", 0.6, "a", **large)]  # too few to narrow
    found = averages_by_size(summarise(cells))
    assert {(line["model"], line["method"], line["tasks"]) for line in found} == {
        *(("small", method, 2) for method in ("deep", "lora", "full")),
        *(("large", method, 2) for method in ("deep", "lora")),
    }


@pytest.mark.parametrize(
    ("tried", "told"),
    [([0.05], ""), ([0.02, 0.05, 0.1], ""), ([0.02, 0.05], "the highest tried"), ([0.05, 0.1], "the lowest tried")],
)
def test_a_best_learning_rate_at_the_edge_of_those_tried_is_told(tried: list[float], told: str) -> None:
    trials = [{"learning_rate": rate, "score": 0.9, "loss": 0.1, "seconds": 1.0} for rate in tried]
    (line,) = summarise([make_cell("lora", 0.9, trials=trials)])
    assert at_edge(line) == told
    assert shown(line)["rate"] == (f"0.05, {told}" if told else "0.05")
    (line,) = summarise([make_cell("zero-shot", 0.5, trials=[], settings={})])
    assert at_edge(line) == shown(line)["rate"] == ""


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def test_files_that_are_written(tmp_path: Path) -> None:
    grid = [{"learning_rate": 1e-4, "score": 0.8}, {"learning_rate": 1e30, "score": None}]
    cells = [make_cell("deep", 0.9), make_cell("lora", 0.8, trials=grid), make_cell("zero-shot", 0.5), without("full")]
    cells[2] |= {"trained_parameters": 0, "train_seconds": 0.0, "examples_per_second": None, "settings": {}}
    lines = write_results(tmp_path, cells, "tasks & more")
    document = json.loads((tmp_path / "summary.json").read_text())
    assert len(document["cells"]) == len(lines) == 4
    needed = {"task", "model", "method", "score", "low", "high", "seeds", "train_rows", "trained_parameters"}
    assert needed | {"train_seconds", "settings"} <= set(document["cells"][0])
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["method"] for row in table] == [line["method"] for line in lines]
    assert (tmp_path / "figures/scores.svg").read_text().startswith("<?xml")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags and page.tags.count("svg") >= 2
    assert "tasks &amp; more" in text and "needs 9 GiB &lt;b&gt;" in text and "diverged" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text and "src=" not in text


TABLES = ("scores", "targets", "costs", "sizes")


def test_cells_of_several_folders_go_into_one_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "docs/results"))
    import make_summary

    for folder, cells in {
        "night1": [make_cell("lora", 0.8), make_cell("deep", 0.7), without("full", "failed")],
        "night2": [make_cell("lora", 0.9, seed=1), make_cell("deep", 0.75)],
        "night3": [make_cell("deep", 0.4, model="small", model_parameters=5_000)],
    }.items():
        for cell in cells:
            write_cell(tmp_path / folder / "cells" / f"{cell['model']}.{cell['method']}{cell['seed']}.json", cell)
    page = tmp_path / "accuracy.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in (*TABLES, "defaults", "transfer")))
    nights = [str(tmp_path / f"night{number}") for number in (1, 2, 3)]
    assert make_summary.main(nights, tmp_path, page) == 0
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    lines = {line["method"]: line for line in cells if line["model"] == "m"}
    assert lines["lora"]["seeds"] == 2 and lines["lora"]["score"] == pytest.approx(0.85)
    assert lines["deep"]["seeds"] == 1 and lines["deep"]["score"] == 0.75
    text = page.read_text()
    assert "old" not in text and "**85.0**" in text and "failed" in text
    assert "| deep | -10.0 on 1 tasks |" in text and "| ? on 0 tasks |" in text
    assert "| small | 5,000 | 1 | 40.0 |  |\n| m | 1,000,000 | 1 | 75.0 | 85.0 |" in text and "40.0 (" not in text
    assert make_summary.main([str(tmp_path / "nowhere")], tmp_path, page) == 2
    kept = tmp_path / "kept"
    assert make_summary.main(["--keep", *nights], kept, page) == 0 and page.read_text() == text
    assert make_summary.main([], kept, page) == 0 and page.read_text() == text
    scores = [
        ("base", {}, 0, 0.9),
        ("base", {}, 1, 0.8),
        ("base", {}, 2, 0.1),
    ]  # the third seed has not come to the end
    for rate, of_seeds in {0.3: (0.8, 0.7), 0.01: (0.85, 0.65)}.items():
        scores += [("learning_rate", {"learning_rate": rate}, seed, s) for seed, s in enumerate(of_seeds)]
    scores += [("peft", {"peft_learning_rate": rate}, 0, s) for rate, s in [(0.1, 0.6), (0.02, 0.5)]]
    trials = [dict(zip(("axis", "change", "seed", "score"), each, strict=True)) for each in scores]
    trials += [{"axis": "tokens", "change": {"tokens": 900}, "seed": 0, "error": "too long"}]
    (kept / "defaults").mkdir()
    facts = {"task": "trec", "model": "tiny", "rows": 2000, "trials": trials}
    (kept / "defaults" / "tiny.trec.json").write_text(json.dumps(facts))
    (kept / "transfer").mkdir()
    tried = [(0, "source", 0, 0.8), (32, "text", 0, 0.5), (32, "source", 0, 0.8), (32, "text", 1, 0.7)]
    found = [dict(zip(("rows", "start", "seed", "score"), each, strict=True)) for each in tried]
    (kept / "transfer" / "cr.json").write_text(json.dumps({"source": "sst2", "target": "cr", "trials": found}))
    assert make_summary.main([], kept, page) == 0
    assert "| 0 |  | 80.0 | 1 |\n| 32 | 60.0 | 80.0 | 2 |\n" in page.read_text()
    table = page.read_text().partition("<!-- defaults -->\n")[2]
    assert table.startswith(
        "| task, model, training rows | learning_rate 0.01 | default | learning_rate 0.3 | best less worst | seeds |\n"
        "|---|---|---|---|---|---|\n"
        "| trec, tiny, 2000 | 75.0 | 85.0 | 75.0 | 10.0 | 2 |\n\n"
    )
    assert "| peft_learning_rate 0.02 | peft_learning_rate 0.1 |" in table
    assert "| trec, tiny, 2000 | 50.0 | 60.0 | 10.0 | 1 |\n" in table
    assert "| trec, tiny, 2000 | 60.0 | too long | 0.0 | 3 |\n<!--" in table


def test_nothing_finished_still_gives_files(tmp_path: Path) -> None:
    write_results(tmp_path, [without("full"), without("lora", "failed", "the loss became nan")])
    assert "the loss became nan" in (tmp_path / "report.html").read_text()
    assert to_csv(summarise([])).startswith("task,model,method")


def test_numbers_as_texts() -> None:
    assert [number(0.84731), number(61.349)] == ["0.8473", "61.35"]
    assert [p_value(None), p_value(0.0001), p_value(0.04)] == ["", "< 0.001", "0.040"]
    assert [size(None), size(512), size(46_080), size(5.4e8), size(2e9)] == [
        "",
        "512 B",
        "46.1 kB",
        "540.0 MB",
        "2.0 GB",
    ]
    assert [seconds(0.012), seconds(3.4), seconds(312), seconds(9000)] == ["12 ms", "3.4 s", "5.2 min", "2.5 h"]


def test_every_method_has_a_colour() -> None:
    assert set(ORDER) == set(METHODS)


# --- what the machine can tell --------------------------------------------------------------------------------------


def write_zone(root: Path, name: str, used: int, largest: int = 1000) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "energy_uj").write_text(str(used))
    (root / name / "max_energy_range_uj").write_text(str(largest))


def test_energy_of_all_packages_and_a_counter_that_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt.comparison import measure

    monkeypatch.setattr(measure, "POWERCAP", tmp_path)
    assert energy() is None
    write_zone(tmp_path, "intel-rapl:0", 900)
    write_zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0
    write_zone(tmp_path, "intel-rapl:1", 100)
    with Meter(torch.device("cpu")) as meter:
        write_zone(tmp_path, "intel-rapl:0", 50)
        write_zone(tmp_path, "intel-rapl:1", 400)
    assert meter.joules == pytest.approx((150 + 300) / 1e6)


def test_the_peak_of_memory_is_that_of_what_is_measured() -> None:
    def use(size: int) -> None:  # fresh pages from the kernel, since an allocator may hand out what it has kept
        with mmap.mmap(-1, size) as memory:
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1

    use(1 << 28)  # 256 MiB that are gone before
    with Meter(torch.device("cpu")) as meter:
        use(1 << 26)  # 64 MiB
    if meter.peak_bytes is None or meter.before_bytes is None:
        pytest.skip("this system does not tell a process's peak of memory")
    assert 60 << 20 < meter.peak_bytes - meter.before_bytes < 200 << 20


def test_energy_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the processor's. No GPU here: what NVML would be asked and answer is played."""
    from types import SimpleNamespace

    device, spent = torch.device("cuda"), iter([5_000, 7_500])
    assert gpu_energy(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    known = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-12-34": "the card"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(spent) if handle == "the card" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", known)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    with Meter(device) as meter:
        pass
    assert meter.joules == pytest.approx(2.5)
