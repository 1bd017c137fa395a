"""`prune` and `discretize`: what they keep, find and compare, on models and prompts made for it."""

from __future__ import annotations

import pytest
import torch
from inspect_material import TEMPLATE, deaf_to_first, make_model, make_task, prompt_of, renamed, words_prompt

import softprompt as sp
from softprompt import SoftPrompt, Template
from softprompt.computation import deep_from_tokens
from softprompt.errors import ConfigError
from softprompt.inspection.discretize import hard_template, search
from softprompt.inspection.measuring import row_scores
from softprompt.inspection.nearest import Neighbour
from softprompt.templates import Template as RealTemplate


def test_the_token_without_influence_is_the_first_to_go() -> None:
    backbone, vectors = deaf_to_first()
    task = make_task()
    costs = [abs(cost) for cost in sp.prune(backbone, task, prompt_of(backbone, vectors), steps=0).importance.of_token]
    assert costs[0] == min(costs)
    found = sp.prune(backbone, task, prompt_of(backbone, vectors), lengths=[3, 1], steps=0)
    assert [each.tokens for each in found.lengths] == [3, 1]
    for each in found.lengths:
        assert each.kept == tuple(sorted(found.order[: each.tokens]))
        assert torch.equal(each.prompt.vectors, vectors[list(each.kept)].float())
        assert each.tuned is None
        assert each.cut.loss == pytest.approx(row_scores(backbone, task.validation, each.prompt.vectors).loss)
    assert found.to_dict()["importance"] == found.importance.of_token


def test_the_shortest_that_is_no_worse_is_chosen() -> None:
    """Two copies of a one-token prompt at which nothing looks: without them nothing changes."""
    backbone, vectors = deaf_to_first()
    task = make_task()
    silent = vectors[:1].repeat(3, 1)
    found = sp.prune(backbone, task, prompt_of(backbone, silent), lengths=[2, 1], steps=0)
    assert found.chosen == 1 and found.prompt.tokens == 1
    assert found.prompt.provenance["pruned"] == {"from_tokens": 3, "kept": [0], "steps": 0}
    assert found.test is not None and found.test[2].difference == pytest.approx(0, abs=1e-9)
    assert found.test[2].p == 1.0


@pytest.mark.parametrize("kind", ["embedding", "deep"])
def test_what_is_left_is_tuned_again_and_the_better_one_is_kept(kind: str) -> None:
    backbone, task = make_model(dtype=torch.float32), make_task()
    prompt = words_prompt(backbone, "Classify the film as good or bad")
    if kind == "deep":
        prompt = renamed(prompt, vectors=deep_from_tokens(backbone, prompt.vectors))
    said: set[str] = set()
    found = sp.prune(
        backbone, task, prompt, lengths=[3], steps=4, batch_size=4, progress=lambda what, done, total: said.add(what)
    )
    (each,) = found.lengths
    assert each.tuned is not None and each.prompt.tokens == 3 and each.prompt.kind == kind
    assert each.scores.main_loss == min(each.cut.main_loss, each.tuned.main_loss)
    again = row_scores(backbone, task.validation, each.prompt.vectors)
    assert again.loss == pytest.approx(each.scores.loss, rel=1e-5)
    assert "3 tokens, tuning" in said and "importance" in said


def test_lengths_and_rows_that_are_wrong() -> None:
    backbone, task = make_model(), make_task()
    prompt = words_prompt(backbone)
    for wrong in ([0], [7], []):
        with pytest.raises(ConfigError, match="lengths: expected numbers from 1 to 6"):
            sp.prune(backbone, task, prompt, lengths=wrong)
    from dataclasses import replace

    with pytest.raises(ConfigError, match="no validation rows"):
        sp.prune(backbone, replace(task, validation=task.validation.take(0)), prompt)


# --- discretize -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_words_reads_as_these_words_and_scores_the_same() -> None:
    """Words of whole tokens stay the same tokens when typed, so nothing is lost."""
    backbone, task = make_model(), make_task()
    text = "Classify the film as good or bad"
    found = sp.discretize(backbone, task, words_prompt(backbone, text), rounds=0)
    assert found.ids == backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    soft, *others = found.lines
    read = next(line for line in others if line.name == "nearest words")
    assert read.text is not None and read.against is not None
    spaced = sp.discretize(backbone, task, words_prompt(backbone, text), rounds=0, text=text + " ")
    written = next(line for line in spaced.lines if line.name == "hand-written text")
    assert written.against is not None
    assert written.against.difference == pytest.approx(0, abs=1e-6)
    assert written.scores.accuracy == soft.scores.accuracy


def test_the_search_never_ends_worse_and_finds_what_is_better() -> None:
    backbone, task = make_model(), make_task()
    table = backbone.embedding_table()
    sample = task.train
    losses = {i: row_scores(backbone, sample, table[[i]]).main_loss for i in range(5, 25)}
    order = sorted(losses, key=losses.__getitem__)
    near = [[Neighbour("", order[10], 1.0), Neighbour("", order[0], 0.9), Neighbour("", order[5], 0.8)]]
    ids, scored = search(backbone, sample, table, near, rounds=2)
    assert ids == [order[0]]
    assert scored == 1 + 2 + 2
    two = [near[0], [Neighbour("", order[3], 1.0), Neighbour("", order[7], 0.5)]]
    ids, _ = search(backbone, sample, table, two, rounds=1)
    before = row_scores(backbone, sample, table[[order[10], order[3]]]).main_loss
    assert row_scores(backbone, sample, table[ids]).main_loss <= before


def test_all_are_compared_on_the_same_rows() -> None:
    backbone, task = make_model(), make_task()
    result = sp.tune(backbone, task, tokens=3, steps=2, init_text="good or bad")
    found = sp.discretize(backbone, task, result.prompt, rounds=1, candidates=3, test_rows=4)
    names = [line.name for line in found.lines]
    assert names[:3] == ["soft prompt", "zero-shot (template alone)", "hand-written text"]
    assert found.lines[2].text == "good or bad"
    assert "nearest words" in names
    assert {len(line.scores.losses) for line in found.lines} == {4}
    assert found.lines[0].against is None and found.lines[1].against is not None
    zero_shot = row_scores(backbone, task.test.take(4, seed=0), None)
    assert found.lines[1].scores.loss == pytest.approx(zero_shot.loss)
    assert found.text in [line.text for line in found.lines]


def test_a_deep_prompt_has_no_words() -> None:
    backbone, task = make_model(), make_task()
    deep = SoftPrompt(deep_from_tokens(backbone, torch.randn(3, 32)), TEMPLATE)
    with pytest.raises(ConfigError, match="stands in no vocabulary"):
        sp.discretize(backbone, task, deep)


def test_text_is_typed_where_the_soft_tokens_stand() -> None:
    make = RealTemplate.make
    assert hard_template(make("a {soft}b {x}", "{y}"), "t{u").render_context({"x": "1"}) == "a t{ub 1"
    assert hard_template(make("b {x}", "{y}"), "t ").render_context({"x": "1"}) == "t b 1"
    assert (
        hard_template(make("{soft}{x}{soft}!", "{y}"), "one two three").render_context({"x": "-"}) == "one two-three!"
    )
    chat = Template.make(chat=[{"role": "user", "content": "{soft}Hi {x}"}], target="{y}")
    assert hard_template(chat, "Oh ").render_context({"x": "1"}) == "Oh Hi 1"
    unmarked = Template.make(chat=[{"role": "user", "content": "Hi {x}"}], target="{y}")
    assert hard_template(unmarked, "Oh ").render_context({"x": "1"}) == "Oh Hi 1"
