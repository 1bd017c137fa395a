"""benchmarks/serve_speed.py: its three parts on a tiny model, and the page that it fills."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "cli")]
import serve_speed  # noqa: E402
from cli_material import make_model  # noqa: E402
from speed.serve_tables import lines  # noqa: E402

SHORT = [
    *("--tasks", "1", "3", "--requests", "4", "4", "--rounds", "1", "--max-tokens", "3"),
    *("--rows", "4", "--tokens", "2", "--peft-tasks", "2", "--peft-rounds", "1", "--peft-requests", "3"),
    *("--beside-peft", "4", "4", "--server-tasks", "2", "--server-requests", "4"),
]


def test_mixes() -> None:
    assert serve_speed.assign("identical", 4, 9) == [0] * 4
    assert serve_speed.assign("distinct", 4, 3) == [0, 1, 2, 0]
    uniform, skewed = (serve_speed.assign(mix, 1000, 100) for mix in ("uniform", "skewed"))
    assert len(set(uniform)) == 100 and skewed.count(0) > 5 * uniform.count(0)


def test_all_parts_on_a_tiny_model(tmp_path, monkeypatch) -> None:
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(serve_speed, "read_texts", lambda count, words: [f"a film {i}" for i in range(count)])
    out = tmp_path / "out.json"
    assert serve_speed.main(["--model", str(folder), "--out", str(out), *SHORT]) == 0
    found = json.loads(out.read_text())
    assert [row["mix"] for row in found["throughput"]["generate"]] == ["identical", "uniform", "skewed", "distinct"]
    assert found["throughput"]["classify"][-1]["tasks_asked_for"] == 3
    assert found["beside_peft"]["generate"]["same_tokens"] == 1.0
    assert [row["share_of_capacity"] for row in found["server"]] == [0.5, 0.9, 10.0]
    assert all(row["accepted"] + row["refused_with_429"] == 1 for row in found["server"])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- serving -->\nold\n<!-- /serving -->\nafter\n")
    serve_speed.fill(found, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "\n".join(lines(found)) in text and "| 3 (3) | distinct |" in text
