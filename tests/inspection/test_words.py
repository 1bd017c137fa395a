"""What nearest words mean, on prompts that are made of words."""

from __future__ import annotations

import pytest
import torch
from inspect_material import make_model, make_task, prompt_of, words_prompt

from softprompt import Task, Template
from softprompt.inspection import words
from softprompt.inspection.inspecting import inspect
from softprompt.inspection.nearest import MEASURES, nearest_tokens
from softprompt.inspection.projection import project


def test_a_prompt_that_is_words_finds_these_words_first() -> None:
    backbone = make_model()
    text = ["Classify", "the", "film", "as", "good", "or", "bad"]
    found = inspect(words_prompt(backbone, " ".join(text)), backbone)
    assert [row[0].text for row in found.near["cosine"]] == text
    assert [row[0].similarity for row in found.near["cosine"]] == pytest.approx([1.0] * 7, abs=1e-5)
    assert [row[0].text for row in found.near["euclidean"]] == text
    assert [row[0].similarity for row in found.near["euclidean"]] == pytest.approx([0.0] * 7, abs=1e-2)


def test_the_yardstick_is_the_distance_of_words_from_each_other() -> None:
    backbone = make_model()
    table = backbone.embedding_table()
    for measure in MEASURES:
        stick = words.yardstick(table[5:8], table, backbone.tokenizer, measure)
        assert stick is not None
        assert stick.words[0] <= stick.words[1] <= stick.words[2]
        better = stick.words[1] < stick.chance[1] if measure == "euclidean" else stick.words[1] > stick.chance[1]
        assert better, measure
    doubled = torch.cat([table, table])  # every word has a twin at cosine 1

    class Twice:
        all_special_ids, added_tokens_decoder = (), {}

        def __len__(self) -> int:
            return len(doubled)

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"word{token}"

        def decode(self, ids: list[int]) -> str:
            return f"word{ids[0]}"

    stick = words.yardstick(table[5:8], doubled, Twice(), "cosine")
    assert stick is not None and stick.words == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)


def test_what_survived_repeats_and_belongs_to_the_task() -> None:
    backbone, task = make_model(), make_task()
    table, ids = backbone.embedding_table(), backbone.tokenizer.convert_tokens_to_ids
    prompt = prompt_of(backbone, table[[ids("positive"), ids("film"), ids("film"), ids("good")]])
    start = table[[ids("positive"), ids("plot"), ids("film"), ids("good")]]
    near = nearest_tokens(prompt.vectors, table, backbone.tokenizer, k=1)
    found = words.vocabulary(near, prompt, table, backbone.tokenizer, start, task.test)
    assert found.survived == [(0, "positive"), (2, "film"), (3, "good")]
    assert found.survived_share == 0.75
    assert found.repeated == [("film", [1, 2])]
    assert found.labels == {"positive": [0], "negative": []}
    assert found.frequent is not None and found.frequent["good"] == [3]
    assert found.distinct == 0.75


def test_neighbours_that_are_one_word_are_a_tight_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 16, generator=generator)
    table[:5] = torch.randn(1, 16, generator=generator) + 0.01 * torch.randn(5, 16, generator=generator)
    near = nearest_tokens(table[:1], table, None, k=5)
    assert {word.id for word in near[0]} == set(range(5))
    found = words.clusters(near, table, None)
    assert found.tightness is not None and found.by_chance is not None
    assert found.tightness > 0.99 > 0.5 > found.by_chance


def test_words_of_one_stem_are_told() -> None:
    from softprompt.inspection.nearest import Neighbour

    row = [Neighbour(text, i, 0.5) for i, text in enumerate(["Technology", " technologies", "plot", "TECHNO"])]
    assert words.clusters([row], torch.eye(4), None).same_stem == 0.75


def test_frequent_words_are_those_of_the_rows() -> None:
    template = Template.make("{text}", "{label}", labels=["a", "b"])
    rows = [
        {"text": "the film the film", "label": "a"},
        {"text": "a film", "label": "b"},
        {"text": "dull", "label": "b"},
    ]
    task = Task.from_rows([], [], rows, template)
    assert words.frequent_words(task.test) == ["film"]  # in two rows; "the" stands in one, however often


# --- two dimensions -------------------------------------------------------------------------------------------------


def test_two_groups_of_directions_stand_apart_on_the_first_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(12)
    axis[3] = 5.0
    one = axis + 0.1 * torch.randn(6, 12, generator=generator)
    two = -axis + 0.1 * torch.randn(4, 12, generator=generator)
    found = project({"one": one, "two": 100 * two})  # lengths do not count
    assert found is not None
    assert (found.prompts["one"][:, 0] > 0.7).all() and (found.prompts["two"][:, 0] < -0.7).all()
    assert found.explained[0] > 0.95


def test_the_vocabulary_is_in_the_picture_and_too_little_gives_none() -> None:
    backbone = make_model()
    prompt = words_prompt(backbone)
    found = project({"a": prompt.vectors}, backbone.embedding_table(), backbone.tokenizer)
    assert found is not None and len(found.words) == len(found.word_texts) > 50
    again = project({"a": prompt.vectors}, backbone.embedding_table(), backbone.tokenizer)
    assert again is not None and (again.words == found.words).all()
    assert project({"a": prompt.vectors[:1]}) is None
    assert project({"a": torch.ones(5, 4)}) is None
