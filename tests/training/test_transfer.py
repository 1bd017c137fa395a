"""Starting from another task's prompt."""

from __future__ import annotations

import pytest
import torch
from test_run import SETTINGS, make_task

import softprompt as sp
from softprompt.computation import deep_from_tokens
from softprompt.errors import ConfigError
from softprompt.training import transfer
from softprompt.training.transfer import ROWS, best_start, fitted
from tiny_models import make_backbone, make_tokenizer


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("llama", torch.float32, make_tokenizer())


@pytest.fixture(scope="module")
def library(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    task = make_task()
    sp.tune(backbone, task, **{**SETTINGS, "steps": 60, "learning_rate": 2.0}).prompt.save(folder / "good")
    sp.SoftPrompt(torch.randn(4, 32) * 20, task.template).save(folder / "noise")
    sp.SoftPrompt(torch.randn(4, 48), task.template).save(folder / "of another model")
    (folder / "broken").mkdir()
    (folder / "broken" / "softprompt.json").write_text("{")
    return folder


def test_of_a_library_the_prompt_with_the_lowest_loss_is_taken(backbone, library):
    task = make_task()
    ordinary = torch.zeros(6, 32)
    vectors, said = best_start(backbone, task, library, ordinary)
    good = sp.SoftPrompt.load(library / "good").vectors
    assert torch.equal(vectors, torch.cat([good, good[:2]]))
    assert said.startswith(f"{library / 'good'}, the best of 3 starts on {min(ROWS, 12)} rows") and "noise" in said


def test_the_ordinary_start_wins_where_it_is_better(backbone, library):
    good = sp.SoftPrompt.load(library / "good").vectors
    vectors, said = best_start(backbone, make_task(), library, good)
    assert torch.equal(vectors, good) and said.startswith("the ordinary start")


def test_tune_starts_from_the_best_of_the_library(backbone, library):
    result = sp.tune(backbone, make_task(), **{**SETTINGS, "init": f"auto:{library}", "steps": 1})
    assert torch.equal(result.initial, sp.SoftPrompt.load(library / "good").vectors)
    deep = sp.tune(backbone, make_task(), **{**SETTINGS, "init": f"auto:{library}", "steps": 1, "kind": "deep"})
    assert "the best of 3 starts" in next(e["init"] for e in deep.history if e["event"] == "start")


def test_a_deep_prompt_starts_from_embeddings_by_their_states_but_not_the_other_way(backbone, library, tmp_path):
    good = sp.SoftPrompt.load(library / "good").vectors
    silent = torch.zeros_like(deep_from_tokens(backbone, good))
    vectors, said = best_start(backbone, make_task(), library, silent)
    assert torch.equal(vectors, deep_from_tokens(backbone, good)) and said.startswith(str(library / "good"))
    sp.SoftPrompt(vectors, make_task().template).save(tmp_path / "deep")
    assert "the best of 1 starts" in best_start(backbone, make_task(), tmp_path, torch.zeros(4, 32))[1]


def test_of_a_large_library_like_prompts_are_tried_together(backbone, library, tmp_path, monkeypatch):
    """30 prompts in three heaps: the best is found with at most MOST_TRIED of them scored."""
    torch.manual_seed(0)
    good, task = sp.SoftPrompt.load(library / "good").vectors, make_task()
    heaps = [good, torch.randn(4, 32), torch.randn(4, 32)]
    for number in range(30):
        vectors = heaps[number % 3] + 0.02 * torch.randn(4, 32)
        sp.SoftPrompt(vectors, task.template).save(tmp_path / f"prompt{number:02d}")
    scored = []
    whole = transfer._loss
    monkeypatch.setattr(transfer, "_loss", lambda *given: scored.append(1) or whole(*given))
    vectors, said = best_start(backbone, task, tmp_path, torch.zeros(4, 32))
    assert len(scored) <= 1 + transfer.MOST_TRIED and "30 prompts, by groups of like ones" in said
    assert torch.nn.functional.cosine_similarity(vectors.mean(0), good.mean(0), dim=0) > 0.99


def test_no_library(backbone, tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        best_start(backbone, make_task(), tmp_path / "none", torch.zeros(4, 32))


def test_fitted():
    deep = torch.arange(2 * 2 * 1 * 3 * 2.0).view(2, 2, 1, 3, 2)
    assert torch.equal(fitted(deep, 2), deep[:, :, :, :2])
    assert torch.equal(fitted(deep, 5)[:, :, :, 3:], deep[:, :, :, :2])
    assert fitted(torch.zeros(3, 4), 7).shape == (7, 4)
