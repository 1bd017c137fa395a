"""Every method on a tiny model: what it trains, that the backbone stays as it is, that its files are what is scored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison_material import make_config, the_cell, tiny_backbone

from softprompt.backbone import Backbone
from softprompt.comparison import adapted
from softprompt.comparison.catalogue import METHODS, SOFT
from softprompt.comparison.cell import load_task, make_method, run_cell
from softprompt.comparison.places import at_the_front, behind
from softprompt.comparison.prompting import shots_that_fit
from softprompt.comparison.protocol import Job
from softprompt.evaluation.runner import evaluate_prompt
from softprompt.templates import Template
from softprompt.training.config import TuneConfig
from softprompt.training.loop import planned_steps

ALL = list(METHODS)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def bytes_of(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def make_job(folder: Path, backbone: Backbone, method: str, **more: object) -> Job:
    config = make_config(folder, methods=[method], **more)
    given = config.settings.get(method, {})
    return Job(backbone, load_task(config, "reviews"), 0, config.budget("reviews"), given)


@pytest.mark.parametrize("name", ALL)
def test_a_cell_of_each_method(name: str, backbone: Backbone, tmp_path: Path) -> None:
    config = make_config(tmp_path, methods=[name])
    before = bytes_of(backbone)
    result = run_cell(config, the_cell(config, name), tmp_path / "work", backbone=backbone)
    assert bytes_of(backbone) == before, "the backbone changed"
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert result["status"] == "done"
    assert result["rows"] == 12 and len(result["each"]["predicted"]) == 12
    right = sum(t == p for t, p in zip(result["each"]["true"], result["each"]["predicted"], strict=True))
    assert result["score"] == pytest.approx(right / 12)
    assert result["low"] < result["score"] < result["high"] or result["score"] in (0.0, 1.0)
    assert (result["trained_parameters"] > 0) is METHODS[name].trains
    assert result["steps"] == (3 if METHODS[name].trains else 0)
    assert len(result["trials"]) == max(1, len(config.rates(name)))
    assert result["train_seconds"] <= result["search_seconds"] or not METHODS[name].trains
    json.dumps(result)


def test_trained_parameters_and_bytes_are_those_of_the_files(backbone: Backbone, tmp_path: Path) -> None:
    found = {}
    for name in ("prompt", "deep", "lora", "full", "zero-shot"):
        config = make_config(
            tmp_path / name, methods=[name], learning_rates={} if name == "zero-shot" else {name: [1e-3]}
        )
        found[name] = run_cell(config, the_cell(config, name), tmp_path / name / "work", backbone=backbone)
    layers, heads, size = backbone.state_shape
    assert found["prompt"]["trained_parameters"] == 4 * backbone.width
    assert found["deep"]["trained_parameters"] == layers * 2 * heads * 3 * size  # the first token rests
    assert found["full"]["trained_parameters"] == backbone.parameters
    linear = [m for n, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert found["lora"]["trained_parameters"] == sum(8 * (m.in_features + m.out_features) for m in linear)
    for name in ("prompt", "deep", "lora", "full"):
        assert found[name]["disk_bytes"] >= 4 * found[name]["trained_parameters"]
    assert found["zero-shot"]["disk_bytes"] == 0


@pytest.mark.parametrize("name", ["lora", "full", "peft-prompt", "prompt", "deep"])
def test_training_lowers_the_training_loss(name: str, backbone: Backbone, tmp_path: Path) -> None:
    rate = {"lora": 1e-2, "full": 3e-3, "peft-prompt": 3e-2}.get(name, 0.15)
    job = make_job(tmp_path, backbone, name, steps=25, learning_rates={name: [rate]})
    method, folder = make_method(name), tmp_path / "files"
    folder.mkdir()
    before = evaluate_prompt(backbone, job.task.train, None).loss
    method.fit(job, rate, folder)
    opened = method.open(job, folder)
    after = opened.score(job.task.train).loss
    opened.close()
    assert after < 0.9 * before
    assert evaluate_prompt(backbone, job.task.train, None).loss == pytest.approx(before)


def test_a_prompt_has_by_default_as_many_steps_as_tune_gives_it(backbone: Backbone, tmp_path: Path) -> None:
    config = make_config(tmp_path, methods=["deep"], steps=3, settings={"deep": {"epochs": None}})
    result = run_cell(config, the_cell(config, "deep"), tmp_path / "work", backbone=backbone)
    shipped = TuneConfig(kind="deep", batch_size=config.budget("reviews")["batch_size"])
    assert result["steps"] == planned_steps(shipped, result["train_rows"]) > 3


def test_warnings_of_a_run_are_told(backbone: Backbone, tmp_path: Path) -> None:
    told: list[str] = []
    job = replace(make_job(tmp_path, backbone, "prompt", steps=5), tell=told.append)
    make_method("prompt").fit(job, 1e-9, tmp_path)
    assert any(text.startswith("step ") and "hardly moved" in text for text in told)


def test_lora_is_scored_as_peft_itself_computes_it(backbone: Backbone, tmp_path: Path) -> None:
    from peft import PeftModel

    job = make_job(tmp_path, backbone, "lora", steps=5)
    method = make_method("lora")
    method.fit(job, 1e-2, tmp_path)
    opened = method.open(job, tmp_path)
    report = opened.score(job.task.test)
    opened.close()
    fresh = tiny_backbone()
    wrapped = PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter")).eval()
    words = [fresh.tokenizer(" " + word)["input_ids"][-1] for word in ("negative", "positive")]
    for row, probabilities in zip(job.task.test, report.probabilities, strict=True):
        ids = fresh.tokenizer(f"Review: {row['text']}\nSentiment:", return_tensors="pt")["input_ids"]
        logits = wrapped(input_ids=ids).logits[0, -1].log_softmax(0)[words]
        assert torch.allclose(logits.softmax(0), probabilities.float(), atol=1e-4)


def test_peft_prompt_is_scored_as_peft_itself_computes_it(backbone: Backbone, tmp_path: Path) -> None:
    from peft import PeftModel

    job = make_job(tmp_path, backbone, "peft-prompt", steps=5)
    method = make_method("peft-prompt")
    trained = method.fit(job, 3e-2, tmp_path)
    report = method.open(job, tmp_path).score(job.task.test)
    fresh = tiny_backbone()
    wrapped = PeftModel.from_pretrained(fresh.model, str(tmp_path / "prompt")).eval()
    words = [fresh.tokenizer(" " + word)["input_ids"][-1] for word in ("negative", "positive")]
    row = job.task.test[0]
    ids = fresh.tokenizer(f"Review: {row['text']}\nSentiment:", return_tensors="pt")["input_ids"]
    logits = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(0)[words]
    assert torch.allclose(logits.softmax(0), report.probabilities[0].float(), atol=1e-4)
    assert trained.settings["init_text"].startswith("Classify")


def test_as_many_shots_as_fit_and_not_one_more(backbone: Backbone, tmp_path: Path) -> None:
    job = make_job(tmp_path, backbone, "few-shot", max_tokens=None)
    few = shots_that_fit(job, 60)
    assert 1 <= few < shots_that_fit(job, 120) <= len(job.task.train)
    assert shots_that_fit(job, 100_000) == len(job.task.train)
    method = make_method("few-shot")
    job.budget["shot_tokens"] = 60
    trained = method.fit(job, None, tmp_path)
    assert trained.settings["shots"] == few
    assert method.open(job, tmp_path).score(job.task.test).cut_rows == 0
    job.budget["shot_tokens"] = 8
    assert "not one worked example" in method.why_not(job)


def test_a_model_too_large_for_full_fine_tuning_is_left_out(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted, "_free_bytes", lambda device: 1000)
    config = make_config(tmp_path, methods=["full"])
    result = run_cell(config, the_cell(config, "full"), tmp_path / "work", backbone=backbone)
    assert result["status"] == "left out"
    assert "GiB" in result["reason"] and "score" not in result


def test_the_better_learning_rate_is_taken_and_a_diverging_one_is_only_a_bad_one(
    backbone: Backbone, tmp_path: Path
) -> None:
    config = make_config(tmp_path, methods=["full"], learning_rates={"full": [1e-6, 3e-3, 1e30]}, steps=20)
    result = run_cell(config, the_cell(config, "full"), tmp_path / "work", backbone=backbone)
    trials = {trial["learning_rate"]: trial for trial in result["trials"]}
    assert set(trials) == {1e-6, 3e-3, 1e30}
    assert result["settings"]["learning_rate"] == 3e-3
    assert trials[3e-3]["loss"] < trials[1e-6]["loss"]
    assert result["validation"]["loss"] == trials[3e-3]["loss"]


def test_a_killed_search_goes_on_with_the_next_learning_rate(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, methods=["full"], learning_rates={"full": [3e-3, 1e-6]}, steps=10)
    cell, work = the_cell(config, "full"), tmp_path / "work"
    whole = run_cell(config, cell, tmp_path / "undisturbed", backbone=backbone)
    fitted: list[float | None] = []
    fit = adapted.Full.fit

    def watched(self, job, rate, folder):  # type: ignore[no-untyped-def]
        if len(fitted) == 1:
            fitted.append(rate)
            raise KeyboardInterrupt
        fitted.append(rate)
        return fit(self, job, rate, folder)

    monkeypatch.setattr(adapted.Full, "fit", watched)
    with pytest.raises(KeyboardInterrupt):
        run_cell(config, cell, work, backbone=backbone)
    again = run_cell(config, cell, work, backbone=backbone)
    assert fitted == [3e-3, 1e-6, 1e-6]  # the first was not trained a second time
    assert again["each"] == whole["each"]
    assert again["validation"] == pytest.approx(whole["validation"])


def test_moving_the_soft_tokens_leaves_the_text_as_it_is() -> None:
    template = Template.make("{soft}Premise: {a}\nClaim: {b}\nTrue:", " {label}", labels=["no", "yes"])
    row = {"a": "x", "b": "y"}
    moved = behind(template)
    assert moved is not None and moved.input == "Premise: {a}\nClaim: {b}\nTrue{soft}:"
    assert moved.placement == "behind"
    assert at_the_front(moved).placement == "front"
    assert moved.render_context(row) == template.render_context(row) == at_the_front(moved).render_context(row)
    chat = Template.make(None, " {label}", [("user", "{soft}{a}")], ["no", "yes"])
    assert behind(chat) is None


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("{a} is true", "{a} is{soft} true"),
        ("{a} = }}", "{a} ={soft} }}"),
        ("{a}\nKết luận", "{a}\nKết{soft} luận"),
        ("{a}:", "{a}{soft}:"),
        ("{a}", "{a}{soft}"),
        ("{a} Answer:\n", "{a} Answer{soft}:\n"),
    ],
)
def test_soft_tokens_are_moved_before_the_last_word_or_sign(text: str, moved: str) -> None:
    found = behind(Template.make("{soft}" + text, " {label}", labels=["no", "yes"]))
    assert found is not None and found.input == moved


def test_a_deep_prompt_inside_the_text_is_left_out(backbone: Backbone, tmp_path: Path) -> None:
    job = make_job(tmp_path, backbone, "deep")
    inside = Template.make("Review{soft} {text}\nSentiment:", " {label}", labels=["negative", "positive"])
    object.__setattr__(job.task, "template", inside)
    assert "front" in make_method("deep").why_not(job)
    assert set(SOFT) < set(METHODS)
