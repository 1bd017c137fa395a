"""A whole comparison: finished cells stay, others go on after a kill, failures are marked and the rest runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from comparison_material import make_config, settings, tiny_backbone, write_reviews

from softprompt.backbone import Backbone
from softprompt.comparison import cell as cells
from softprompt.comparison import run as running
from softprompt.comparison.config import check_comparison
from softprompt.comparison.run import Clock, Progress, compare, plan
from softprompt.comparison.store import Store, slug
from softprompt.errors import ConfigError, OutputError, TrainingError


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    made = tiny_backbone()
    monkeypatch.setattr(Backbone, "load", staticmethod(lambda name, **_: made))
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out/cells").glob("*.json")}


def test_finished_cells_are_not_run_again(tmp_path: Path, backbone: Backbone) -> None:
    config = make_config(tmp_path, methods=["zero-shot", "prompt"], seeds=[0, 1])
    events: list[Progress] = []
    results = compare(config, listen=events.append)
    assert [(r["method"], r["seed"]) for r in results] == [("zero-shot", 0), ("prompt", 0), ("prompt", 1)]
    assert all(r["status"] == "done" for r in results)
    assert not any((tmp_path / "out/work").iterdir())
    before, events[:] = files(tmp_path), []
    assert compare(config, listen=events.append) == results
    assert files(tmp_path) == before
    assert [e.event for e in events] == ["start", "finish"] and events[0].to_do == 0
    more = make_config(tmp_path, methods=["zero-shot", "prompt", "deep"], seeds=[0, 1])
    compare(more, listen=events.append)
    assert [e.cell.name for e in events if e.event == "begin" and e.cell] == [
        "reviews.tiny.deep.seed0",
        "reviews.tiny.deep.seed1",
    ]


def test_a_killed_comparison_goes_on(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, methods=["zero-shot", "few-shot", "prompt"])
    real, ran = cells.run_cell, []

    def killed(config: Any, cell: Any, *more: Any, **keys: Any) -> Any:
        ran.append(cell.method)
        if ran == ["zero-shot", "few-shot"]:
            raise KeyboardInterrupt
        return real(config, cell, *more, **keys)

    monkeypatch.setattr(cells, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    assert list(files(tmp_path)) == ["reviews.tiny.zero-shot.seed0.json"]
    results = compare(config)
    assert ran == ["zero-shot", "few-shot", "few-shot", "prompt"]
    assert [r["status"] for r in results] == ["done"] * 3


def test_a_cell_that_fails_is_marked_and_tried_again(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, methods=["zero-shot", "prompt", "deep"])
    real = cells.run_cell

    def failing(config: Any, cell: Any, *more: Any, **keys: Any) -> Any:
        if cell.method == "prompt":
            raise TrainingError("the loss became nan")
        return real(config, cell, *more, **keys)

    monkeypatch.setattr(cells, "run_cell", failing)
    results = {r["method"]: r for r in compare(config)}
    assert results["prompt"]["status"] == "failed" and results["prompt"]["reason"] == "the loss became nan"
    assert results["zero-shot"]["status"] == results["deep"]["status"] == "done"
    monkeypatch.setattr(cells, "run_cell", real)
    assert [r["status"] for r in compare(config)] == ["done"] * 3


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path, backbone: Backbone) -> None:
    compare(make_config(tmp_path, methods=["prompt"]))
    other = make_config(tmp_path, methods=["prompt"], steps=2)
    with pytest.raises(ConfigError, match="results of other rows or settings"):
        compare(other)
    assert compare(other, run=False) == []
    (result,) = compare(other, again=True)
    assert result["steps"] == 2


def test_other_seeds_take_the_learning_rate_that_the_first_one_found(tmp_path: Path, backbone: Backbone) -> None:
    config = make_config(tmp_path, methods=["full"], seeds=[0, 1], learning_rates={"full": [1e-7, 3e-3]}, steps=15)
    first, second = compare(config)
    assert len(first["trials"]) == 2 and not first["chosen_elsewhere"]
    assert [t["learning_rate"] for t in second["trials"]] == [first["settings"]["learning_rate"]]
    assert second["chosen_elsewhere"]


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, backbone: Backbone) -> None:
    config = make_config(tmp_path)
    with Store(config.out).alone(), pytest.raises(OutputError, match="in use by another comparison"):
        compare(config)


def test_a_damaged_cell_is_run_again(tmp_path: Path, backbone: Backbone) -> None:
    config = make_config(tmp_path)
    compare(config)
    path = tmp_path / "out/cells/reviews.tiny.zero-shot.seed0.json"
    path.write_bytes(path.read_bytes()[:100])
    assert [r["status"] for r in compare(config)] == ["done"]


def test_no_text_of_the_data_is_in_a_cell(tmp_path: Path, backbone: Backbone) -> None:
    config = make_config(tmp_path)
    compare(config)
    (written,) = files(tmp_path).values()
    texts = [json.loads(line)["text"] for line in (tmp_path / "reviews/test.jsonl").read_text().splitlines()]
    assert not any(text in written.decode() for text in texts)


def test_time_left_by_what_finished_cells_took(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    data = settings(tmp_path, methods=["zero-shot", "prompt"], seeds=[0, 1])
    data["tasks"]["other"] = data["tasks"]["reviews"]
    config = check_comparison(data)
    planned = plan(config)
    store = Store(config.out)
    assert Clock(store, planned).left() is None
    for cell, seconds in zip(planned, (10.0, 100.0), strict=False):  # reviews zero-shot, reviews prompt
        store.write(cell, {**cell.__dict__, "status": "done", "cell_seconds": seconds})
    # other zero-shot 10, other prompt 100, both prompts of seed 1 100
    assert Clock(store, planned[2:]).left() == pytest.approx(310)
    assert Clock(store, planned[2:]).left(spent=4) == pytest.approx(306)


def test_names_of_models_for_files() -> None:
    assert slug("smollm2-135m") == "smollm2-135m"
    assert slug("a/model") != slug("b/model")
    assert "/" not in slug("../models/My Model.gguf")


# --- in processes of their own --------------------------------------------------------------------------------------


def test_a_process_that_dies_is_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, isolate=True)
    code = "import os, signal; print('begun', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    script = tmp_path / "dies.py"
    script.write_text(code)
    real = running.subprocess.Popen
    monkeypatch.setattr(
        running.subprocess, "Popen", lambda command, **keys: real([sys.executable, str(script)], **keys)
    )
    said: list[str] = []
    (result,) = compare(config, listen=lambda progress: said.append(progress.text))
    assert result["status"] == "failed" and "lack of memory" in result["reason"]
    assert "begun" in said
