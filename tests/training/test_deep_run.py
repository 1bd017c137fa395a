"""Tuning deep prompts end to end on a tiny model."""

from __future__ import annotations

import pytest
import torch
from test_run import SETTINGS, make_task

import softprompt as sp
from softprompt.computation import deep_from_tokens
from softprompt.errors import BackboneMismatchError, ConfigError
from softprompt.evaluation.runner import make_encoder
from softprompt.placement import Row
from softprompt.training.parameters import KEYS, VALUES, make_optimizer, make_parameters
from softprompt.training.run import _text_states
from tiny_models import make_backbone, make_tokenizer

DEEP = {**SETTINGS, "kind": "deep"}
FRONT, BEHIND = "Review : {text} \n Sentiment :", "Review : {text} \n {soft} Sentiment :"


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float32, make_tokenizer())


@pytest.mark.parametrize("input", [FRONT, BEHIND])
def test_the_loss_falls_and_only_the_prompt_changed(backbone, input):
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    result = sp.tune(backbone, make_task(input=input), **{**DEEP, "steps": 80})
    assert ("keys turned away" in result.history[0]["init"]) is (input == BEHIND)
    losses = [e["loss"] for e in result.history if e["event"] == "step"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.named_parameters())
    assert result.prompt.kind == "deep" and result.prompt.vectors.shape == (3, 2, 2, 4, 8)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(("shape", "reparametrisation"), [((3, 2, 2, 4, 8), "none"), ((4, 8), "residual")])
def test_a_first_step_is_about_the_learning_rate_long(optimizer, shape, reparametrisation):
    """In units of the start's size: neither optimiser may forget that, and zeros are a start like any other."""
    initial, gradient = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rms = 0.1
    parameters = make_parameters(initial * rms, reparametrisation, rms, 0)
    found = make_optimizer(parameters, optimizer, 0.05, 0.0, rms)
    before = {name: parameter.clone() for name, parameter in parameters.named_parameters()}
    parameters.vectors().backward(gradient)
    found.step()
    units = {"delta": 1.0, "embedding": rms, "scale": 0.1}  # a network has a tenth of the rate
    for name in units.keys() & before.keys():
        moved = (parameters.get_parameter(name) - before[name]).detach().square().mean().sqrt()
        assert 0.6 * 0.05 * units[name] < float(moved) < 1.3 * 0.05 * units[name], name


def test_keys_and_values_are_learned_in_their_own_units_by_layer():
    initial = torch.randn(3, 2, 2, 4, 8) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1, 1)
    parameters = make_parameters(initial, "none", 1.0, 0, sink=1)
    torch.testing.assert_close(parameters.vectors(), initial)
    with torch.no_grad():
        parameters.delta += 0.5  # what Adam would call a step of 0.5
    moved = parameters.vectors().detach() - initial
    assert bool((moved[:, :, :, 0] == 0).all())
    size = initial[:, :, :, 1:].square().mean(dim=(2, 3, 4)).sqrt()  # [L, 2]
    expected = 0.5 * size * torch.tensor([KEYS, VALUES])
    torch.testing.assert_close(moved[:, :, :, 1:], expected[:, :, None, None, None].expand(3, 2, 2, 3, 8))


def test_the_norm_guard_holds_each_token_near_its_start(backbone):
    """In each layer and head, its keys and its values; a token that moves less is left alone."""

    def moved(**settings) -> torch.Tensor:
        given = {**DEEP, "steps": 6, "warmup": 0.0, "average": 0.0, **settings}
        task = make_task(input=BEHIND)
        result = sp.tune(backbone, task, **given)
        states = _text_states(backbone, task, sp.TuneConfig(**given))  # the start before it is turned away
        scale = make_parameters(states, "none", 1.0, 0).scale
        return ((result.prompt.vectors - result.initial) / scale).square().mean(dim=-1).sqrt()  # [L, 2, K, P]

    free, held = (moved(learning_rate=2.0, norm_guard=limit) for limit in (0.0, 0.25))
    assert free.min() > 0.25
    torch.testing.assert_close(held, torch.full_like(held, 0.25))
    assert 0 < moved(learning_rate=0.001).max() < 0.01
    torch.testing.assert_close(moved(learning_rate=0.001), moved(learning_rate=0.001, norm_guard=0.0))


def test_a_deep_prompt_starts_more_slowly(backbone):
    def rates(**settings):
        result = sp.tune(backbone, make_task(input=BEHIND), **{**DEEP, "steps": 20, **settings})
        return [event["learning_rate"] for event in result.history if event["event"] == "step"]

    deep, embedding = rates(), rates(kind="embedding")
    assert deep.index(max(deep)) == 6 and embedding.index(max(embedding)) == 1
    assert rates(warmup=0.05) == embedding


@pytest.mark.parametrize(("input", "sink", "still"), [(FRONT, 1, 1), (FRONT, 0, 0), (BEHIND, 1, 0)])
def test_only_at_the_front_the_first_tokens_are_a_sink(backbone, input, sink, still):
    result = sp.tune(backbone, make_task(input=input), **DEEP, sink=sink)
    moved = (result.prompt.vectors - result.initial).abs().amax(dim=(0, 1, 2, 4)) > 0
    assert moved.tolist() == [place >= still for place in range(4)]


@pytest.mark.parametrize("input", [FRONT, BEHIND])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, input):
    backbone = make_backbone("llama", torch.float32, make_tokenizer())
    whole = sp.tune(backbone, make_task(input=input), run_folder=tmp_path / "whole", **DEEP)

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sp.tune(backbone, make_task(input=input), run_folder=tmp_path / "cut", listen=interrupt, **DEEP)
    fresh = make_backbone("llama", torch.float32, make_tokenizer())
    resumed = sp.tune(fresh, make_task(input=input), run_folder=tmp_path / "cut", resume=True, **DEEP)
    assert torch.equal(resumed.prompt.vectors, whole.prompt.vectors)


def test_saved_loaded_and_used(backbone, tmp_path):
    task = make_task(input=BEHIND)
    result = sp.tune(backbone, task, run_folder=tmp_path / "run", **DEEP)
    prompt = sp.SoftPrompt.load(result.prompt.save(tmp_path / "prompt"))
    assert torch.equal(prompt.vectors, result.prompt.vectors) and prompt.template == task.template
    assert not (tmp_path / "prompt" / "adapter_config.json").exists()  # PEFT knows the front only
    rows = list(task.test)
    together = sp.classify(backbone, prompt, rows)
    alone = [sp.classify(backbone, prompt, [row])[0] for row in rows]
    assert [a.label for a in together] == [a.label for a in alone]
    assert sp.evaluate(backbone, task, prompt).accuracy == sp.evaluate(backbone, task, result.prompt).accuracy
    assert len(sp.generate(backbone, prompt, rows[:3], max_new_tokens=4)) == 3
    assert result.report is not None and result.report.exists()
    other = make_backbone("gpt2", torch.float32, make_tokenizer())
    with pytest.raises(BackboneMismatchError, match="layers, key-value heads"):
        sp.classify(other, prompt, rows)


def test_starts_as_the_text_that_it_is_made_of(backbone):
    task = make_task()
    text = "Classify the text as good"
    result = sp.tune(backbone, task, **{**DEEP, "init": "text", "init_text": text, "tokens": 5, "steps": 1})
    encoder = make_encoder(backbone, task.template, 5)
    row = encoder.context(next(iter(task.test))).ids
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    from softprompt.computation import answer_log_probability

    deep = answer_log_probability(backbone, [Row((*row, 7), len(row))], result.initial)
    plain = answer_log_probability(backbone, [Row((*ids, *row[5:], 7), len(row))], None)
    assert deep == pytest.approx(plain, rel=1e-4)


def test_starts_from_examples_and_from_other_prompts(backbone, tmp_path):
    task = make_task()
    embedding = sp.tune(backbone, task, **{**SETTINGS, "init": "examples"})
    assert "Review" in next(e["init"] for e in embedding.history if e["event"] == "start")
    embedding.prompt.save(tmp_path / "embedding")
    deep = sp.tune(backbone, task, **{**DEEP, "init": f"prompt:{tmp_path / 'embedding'}"})
    assert torch.equal(deep.initial, deep_from_tokens(backbone, embedding.prompt.vectors))
    deep.prompt.save(tmp_path / "deep")
    longer = sp.tune(backbone, task, **{**DEEP, "init": f"prompt:{tmp_path / 'deep'}", "tokens": 6, "steps": 1})
    assert torch.equal(longer.initial[:, :, :, :4], deep.prompt.vectors)
    assert torch.equal(longer.initial[:, :, :, 4:], deep.prompt.vectors[:, :, :, :2])
    with pytest.raises(ConfigError, match="only a deep prompt can start from it"):
        sp.tune(backbone, task, **{**SETTINGS, "init": f"prompt:{tmp_path / 'deep'}"})


def test_from_a_deep_prompt_steps_are_as_long_as_from_a_text(backbone, tmp_path):
    """Its own values may be many times larger, and Adam's first step is the learning rate in units of size."""
    task, once = make_task(input=BEHIND), {**DEEP, "init": "text", "steps": 1, "warmup": 0.0, "learning_rate": 0.01}
    from_text = sp.tune(backbone, task, **once)
    large = sp.SoftPrompt.load(from_text.prompt.save(tmp_path / "small"))
    large.vectors = large.vectors * 10
    large.save(tmp_path / "large")
    from_large = sp.tune(backbone, task, **{**once, "init": f"prompt:{tmp_path / 'large'}"})
    moved = [(run.prompt.vectors - run.initial).abs().amax(dim=(2, 3, 4)) for run in (from_text, from_large)]  # [L, 2]
    torch.testing.assert_close(moved[1], moved[0], rtol=0.02, atol=0)
