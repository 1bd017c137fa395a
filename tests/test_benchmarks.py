"""The speed benchmarks: what they count, what they refuse, and that their sides compute the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "cli")]
import all as all_benchmarks  # noqa: E402
import cost_curves  # noqa: E402
import inference_speed  # noqa: E402
import performance_page  # noqa: E402
import plots  # noqa: E402
import suffix_speed  # noqa: E402
import train_speed  # noqa: E402
from cli_material import make_model, reviews  # noqa: E402
from speed import curve_sides, goal, inference_sides, suffix_sides  # noqa: E402
from speed.cases import CASES, Case, chosen, needed_tokens, own_tokens  # noqa: E402
from speed.compare import check_same, figures  # noqa: E402
from speed.process import Taken  # noqa: E402
from speed.sides import SIDES, Setting  # noqa: E402

from softprompt.encoding import Encoder  # noqa: E402
from softprompt.placement import Row  # noqa: E402

FRONT_ROWS = [Row((-1, -2, 5, 6, 7, 8), 5), Row((-1, -2, 5, 9, 8), 4)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = make_model(tmp_path_factory.mktemp("model"))
    return Setting(str(folder), "float32", "cpu", 2, torch.get_num_threads(), ())


# --- what is counted ------------------------------------------------------------------------------------------------


def test_cases_are_chosen_by_what_their_names_hold() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == 12 and "short-P20-bfloat16" in names
    assert [case.name for case in chosen(["long-P100"])] == ["long-P100-float32", "long-P100-bfloat16"]
    with pytest.raises(SystemExit, match="no case is named nothing"):
        chosen(["nothing"])


def test_bfloat16_is_left_out_where_it_is_slow_unless_it_is_asked_for() -> None:
    slow, fast = {"float32": 100e9, "bfloat16": 10e9}, {"float32": 100e9, "bfloat16": 300e9}
    case = Case("short", 20, "bfloat16")
    assert "slower here" in train_speed.why_not(case, slow, ["short-P20"])
    assert train_speed.why_not(case, slow, ["short-P20-bfloat16"]) == ""
    assert train_speed.why_not(case, fast, []) == train_speed.why_not(Case("short", 20, "float32"), slow, []) == ""


def test_tokens_that_are_needed_and_the_rows_own() -> None:
    # Shared: the two soft tokens and token 5. Own: 6 and 7; 9. An answer's last token predicts nothing.
    assert needed_tokens(FRONT_ROWS, "prompt") == 3 + 2 + 1
    assert needed_tokens(FRONT_ROWS, "deep") == 1 + 2 + 1
    assert needed_tokens(FRONT_ROWS, "plain") == 1 + 2 + 1
    assert own_tokens(FRONT_ROWS, "prompt") == 11 and own_tokens(FRONT_ROWS, "plain") == 7


def test_figures_leave_the_first_step_out() -> None:
    steps = [Taken(100.0, 100.0, 1.0), Taken(2.0, 3.0, 1.0), Taken(4.0, 5.0, 1.0), Taken(2.0, 4.0, 1.0)]
    found = figures(steps, [4, 4, 4], [40, 40, 40], [20, 20, 20], body=10, peak=400.0, memory=5_000_000)
    assert found["examples_per_s"] == 2.0 and found["tokens_per_s"] == 20.0
    assert found["utilisation"] == 4 * 10 * 20 / (2.0 * 400)
    assert found["memory_over_model_mb"] == 5 and found["processor_ms_per_example"] == 1000.0


def test_sides_that_differ_are_an_error() -> None:
    one, other = Taken(1, 1, 2.0, np.ones(3)), Taken(1, 1, 2.0, np.array([1.0, 1.0, 2.0]))
    same = check_same({"a": [one], "b": [one]}, [("a", "b")], (1e-6, 1e-6))
    assert same == {"a = b": {"loss": 0.0, "gradient": 0.0}}
    with pytest.raises(AssertionError, match="gradients differ"):
        check_same({"a": [one], "b": [other]}, [("a", "b")], (1e-6, 1e-3))
    with pytest.raises(AssertionError, match="losses of a and b"):
        check_same({"a": [one], "b": [Taken(1, 1, 3.0, np.ones(3))]}, [("a", "b")], (1e-6, 1e-3))


def test_an_epoch_after_the_first_is_what_counts() -> None:
    kept = Taken(0, 0, 0.0, np.array([8.0, 9.0, 9.0, 1.0, 3.0, 2.0, 4.0, 1.0, 3.0]))
    bare = Setting("", "", "", 1, 1, (), more={"rows": [None] * 4, "batch": 2})
    found = suffix_speed.side_figures(kept, bare, True, None)
    assert found["ms_per_row"] == 1000.0 and found["texts_ms_per_row"] == 2000.0 and found["timed_steps"] == 6
    front = suffix_speed.side_figures(replace(kept, array=np.array([0.0, 9.0, 4.0, 4.0])), bare, False, 1)
    assert front["ms_per_row"] == 2000.0 and "texts_ms_per_row" not in front


def test_points_of_the_curves_vary_one_thing() -> None:
    jobs = cost_curves.jobs_of({"tokens": (5, 20), "batch": (1,), "length": (64,)})
    assert [(job.rows, job.length, job.tokens) for job in jobs] == [(8, 32, 5), (8, 32, 20), (1, 32, 20), (8, 64, 20)]


# --- what is computed -----------------------------------------------------------------------------------------------


def test_all_sides_of_tuning_take_the_same_steps(setting: Setting) -> None:
    ids = [(-1, -2, 40, 41, 42, 50), (-1, -2, 40, 43, 51), (-1, -2, 44, 52)]
    rows = tuple(Row(each, len(each) - 1) for each in ids)
    taken = {}
    for name, (make, _) in SIDES.items():
        _, step, _ = make(replace(setting, batches=(rows,)))
        loss, gradient = step(0)
        taken[name] = [Taken(1, 1, loss, None if gradient is None else gradient.double().numpy())]
    found = check_same(taken, train_speed.SAME, (1e-5, 1e-4))
    assert len(found) == 2
    assert taken["peft-lora"][0].array is None and taken["peft-lora"][0].loss > 0


def test_tuning_over_kept_texts_is_timed_and_exact(setting: Setting) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in reviews(8)]
    more = {"rows": rows, "room": 60, "batch": 4, "epochs": 2, "input": suffix_sides.BEHIND, "kind": "deep"}
    _, step, _ = suffix_sides.tuned(replace(setting, more=more))
    _, seconds = step(suffix_sides.RUN)
    assert len(seconds) == 1 + 4 and bool((seconds > 0).all())
    _, differences = step(suffix_sides.CHECK)
    assert float(differences.max()) < 1e-4
    _, theirs, _ = suffix_sides.peft_tuned(replace(setting, more={**more, "input": suffix_sides.FRONT}))
    assert len(theirs(0)[1]) == 1 + 4


def test_evaluation_gives_the_same_probabilities(setting: Setting) -> None:
    setting = replace(setting, more={"parts": [reviews(6)]})
    taken = {
        name: [Taken(1, 1, 0.0, inference_sides.EVALUATION[name](setting)[1](0)[1].double().numpy())]
        for name in ("softprompt", "peft-labels")
    }
    assert inference_speed.check_probabilities(taken, 1e-4)["peft-labels"] < 1e-4
    wrong = Taken(1, 1, 0.0, 1 - taken["softprompt"][0].array)
    with pytest.raises(AssertionError, match="differs from that of peft-labels"):
        inference_speed.check_probabilities({**taken, "peft-labels": [wrong]}, 1e-4)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generation_gives_pefts_answers_to_rows_alone(setting: Setting) -> None:
    fields = [
        {"mr": f"name[{name}], area[{area}]", "ref": "-"} for name, area in (("Cotto", "city"), ("Mill", "river"))
    ]
    setting = replace(setting, more={"parts": [fields], "new_tokens": 4})
    _, ours, _ = inference_sides.our_generation(setting)
    _, theirs, _ = inference_sides.peft_generation(setting)
    assert ours(0)[1] == [theirs(1)[1][0], theirs(2)[1][0]]
    assert any(text for text in ours(0)[1])


def test_rows_of_the_curves_have_the_length_that_is_asked_for(setting: Setting) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    fields = [{"text": "a film " * 20, "label": "positive"}]
    for text in (suffix_sides.FRONT, suffix_sides.BEHIND):
        rows = curve_sides.rows_of(curve_sides.Job("tokens", 2, 3, 40, 2), tokenizer, fields, text)
        assert [len(row.ids) for row in rows] == [42] * 3
    with pytest.raises(AssertionError, match="no text has 300 tokens"):
        curve_sides.rows_of(curve_sides.Job("length", 300, 1, 300, 2), tokenizer, fields, suffix_sides.FRONT)


def test_the_goal_ends_the_run_when_it_is_reached_or_time_is_up() -> None:
    watch = goal.Watch(limit=1e9)
    watch({"event": "validation", "score": 0.5, "step": 3})
    with pytest.raises(goal.Enough):
        watch({"event": "validation", "score": 0.9, "step": 6})
    told = watch.told(6, 96)
    assert told["best_accuracy"] == 0.9 and told["reached_after_s"] is not None and len(told["validations"]) == 2
    late = goal.Watch(limit=-1.0)
    with pytest.raises(goal.Enough):
        late({"event": "step", "step": 1})
    assert late.told(1, 16)["reached_after_s"] is None
    assert goal.settings(["tokens=10", "learning_rate=0.1", "input={soft}x"]) == {
        "tokens": 10,
        "learning_rate": 0.1,
        "input": "{soft}x",
    }


@pytest.mark.filterwarnings("ignore")  # the Trainer's own, about threads and pinned memory
@pytest.mark.parametrize("side", ["ours", "peft"])
def test_both_sides_of_the_goal_are_scored_until_their_time_is_up(
    setting: Setting, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goal, "TRAIN", 16)
    monkeypatch.setattr(goal, "VALIDATION", 8)
    monkeypatch.setattr(goal, "GOAL", 2.0)
    more = {**goal.OURS, "tokens": 2, "train": 16, "epochs": 1, "batch_size": 4, "validate_every": 2, "limit": 60.0}
    _, run, _ = getattr(goal, side)(replace(setting, more=more))
    told = run(0)[1]
    assert told["steps"] == (4 if side == "ours" else 6) and told["reached_after_s"] is None
    assert told["rows_seen"] == told["steps"] * (4 if side == "ours" else 8)
    assert 0 <= told["best_accuracy"] <= 1 and told["validations"][-1]["step"] == told["steps"]


def test_peft_is_scored_by_the_label_words_tokens(setting: Setting) -> None:
    """The goal's accuracy of PEFT's model is that of its own logits, row by row."""
    from speed.sides import peft_prompt_model
    from transformers import AutoTokenizer

    _, model, _ = peft_prompt_model(setting)
    encoder = Encoder(suffix_sides.template_of(suffix_sides.FRONT), AutoTokenizer.from_pretrained(setting.folder), 2)
    rows = [encoder.row(row)[0] for row in reviews(5)]
    words = [50, 60]
    right = 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids[2 : row.answer]])).logits[0, -1]
            right += words[int(logits[words].argmax())] == row.ids[row.answer]
    assert goal._accuracy(model, rows, words, setting) == right / len(rows)


# --- what is shown --------------------------------------------------------------------------------------------------

FACTS = {"cpu": "a cpu", "device": "cpu", "threads": 2, "torch": "2", "transformers": "5", "peft": "0", "commit": "abc"}


def test_the_page_is_filled_and_says_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    side = {"ms_per_row": 2.0, "examples_per_s": 500.0, "memory_over_model_mb": 3}
    ratio = {"median": 6.25, "quartiles": [6.0, 6.5], "processor": 6.0}
    found = {**FACTS, "precision": "float32", "tokens": 20}
    found["evaluation"] = {"softprompt": side, "peft-logits": side, "times": {"peft-logits": ratio}, "target": 5}
    (tmp_path / "inference_speed.json").write_text(json.dumps(found), encoding="utf-8")
    performance_page.fill(page, tmp_path, tmp_path / "pictures")
    text = page.read_text(encoding="utf-8")
    assert "6.25 (6.00 to 6.50) | 5" in text and "commit abc" in text
    assert "Not measured yet: `python benchmarks/all.py train_speed`" in text
    performance_page.fill(page, tmp_path, tmp_path / "pictures")
    assert page.read_text(encoding="utf-8") == text


def test_all_benchmarks_run_though_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called, filled = [], []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        called.append(command)
        return SimpleNamespace(returncode=int("suffix_speed.py" in command[1]))

    monkeypatch.setattr(all_benchmarks.subprocess, "run", run)
    monkeypatch.setattr(performance_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(performance_page, "fill", lambda: filled.append(True))
    assert all_benchmarks.main([]) == 1
    assert [Path(command[1]).stem for command in called] == list(all_benchmarks.BENCHMARKS)
    assert all(Path(command[1]).is_file() for command in called) and filled == [True]
    assert "--goal" in called[1] and str(tmp_path / "results" / "suffix_speed.json") in called[1]
    assert all_benchmarks.main(["--quick", "suffix_speed", "--threads", "1"]) == 1
    assert "--goal" not in called[-1] and {"--quick", "--threads", "1"} <= set(called[-1])
    assert len(called) == 5 and filled == [True]
    with pytest.raises(SystemExit):
        all_benchmarks.main(["nothing"])


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    points = {"softprompt": {"5": 3.0, "20": 3.5}, "peft-prompt": {"5": 9.0, "20": 12.0}}
    found = {
        "curves": dict.fromkeys(("tokens", "batch", "length"), points),
        "common": {"tokens": 20, "batch": 8, "length": 32},
        "trials": {"softprompt": {"1": 10.0, "2": 20.0}, "deep-suffix": {"1": 6.0, "4": 9.0}},
    }
    first = [path.read_bytes() for path in plots.draw(found, tmp_path / "one")]
    assert [path.read_bytes() for path in plots.draw(found, tmp_path / "two")] == first
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        f"speed-{name}.svg" for name in ("batch", "length", "tokens", "trials")
    ]
    assert b"PEFT prompt tuning" in first[0] and b"trials of a sweep" in first[-1]
