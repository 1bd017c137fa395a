"""The config of a comparison: all its mistakes at once, each with what to do, before anything heavy is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison_material import make_config, settings, write_jsonl, write_reviews

from softprompt.comparison import places
from softprompt.comparison.catalogue import METHODS, SOFT
from softprompt.comparison.cell import make_method
from softprompt.comparison.config import OWN_SETTINGS, check_comparison, load_comparison
from softprompt.comparison.run import plan
from softprompt.errors import ConfigError
from softprompt.training.config import TuneConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def problems(folder: Path, **changes: Any) -> list[str]:
    write_reviews(folder)
    data = settings(folder)
    task = changes.pop("task", {})
    data["tasks"]["reviews"] |= task
    with pytest.raises(ConfigError) as raised:
        plan(check_comparison({**data, **changes}))
    return raised.value.problems


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["lorra"]}, "unknown method 'lorra'; did you mean lora?"),
        ({"methods": ["zzz"]}, "unknown method 'zzz'; known are zero-shot"),
        ({"methods": ["lora", "lora"]}, "names something twice"),
        ({"methods": []}, "methods: the list is empty"),
        ({"task": {"metric": "bleu"}}, "metric 'bleu' does not fit a task with labels; expected accuracy"),
        ({"task": {"labels": None, "metric": "accuracy"}}, "does not fit a task of free text; expected rouge_l"),
        ({"task": {"train": "nowhere.jsonl"}}, "tasks.reviews.train: no file"),
        ({"task": {"input": "{soft}{nowhere}"}}, "has no column 'nowhere'"),
        ({"task": {"inptu": "x"}}, "tasks.reviews.inptu: unknown key; did you mean input?"),
        ({"task": {"input": "{text"}}, "tasks.reviews: '{' at character"),
        ({"data": "/nowhere"}, "data: no folder /nowhere"),
        ({"model": "/nowhere/model"}, "model: no file or folder"),
        ({"epochz": 3}, "epochz: unknown key; did you mean epochs?"),
        ({"seeds": [0, -1]}, "seeds: -1 is below 0"),
        ({"settings": {"prompt": {"learning_rate": 1}}}, "is the same for all methods, or given as learning_rates"),
        ({"settings": {"lora": {"epochs": -1}}}, "settings.lora.epochs: must be greater than 0, found -1"),
        ({"settings": {"zero-shot": {"epochs": 1}}}, "settings.zero-shot.epochs: unknown"),
        ({"settings": {"prompt": {"tokens": 0}}}, "settings.prompt.tokens"),
        ({"settings": {"lora": {"rnak": 4}}}, "settings.lora.rnak: unknown; known are rank"),
        ({"learning_rates": {"lora": []}}, "learning_rates.lora: expected a list of numbers above 0"),
        ({"learning_rates": {"zero-shot": [1]}}, "zero-shot trains nothing"),
        ({"device": "gpu"}, "device: expected cpu"),
        (
            {"test_rows": 2, "task": {"labels": {"negative": "a", "positive": "b", "mixed": "c"}}},
            "2 test rows are fewer",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = problems(tmp_path, **changes)
    assert any(said in line for line in found), found
    assert all("\n" not in line for line in found)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, methods=["lorra"], seeds=[-1], task={"metric": "bleu", "train": "no.jsonl"})
    assert len(found) == 4


def test_mistakes_in_the_rows_of_several_tasks_are_told_at_once(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    data = settings(tmp_path)
    task = data["tasks"]["reviews"]
    write_jsonl(tmp_path / "odd.jsonl", [{"text": "w1", "label": "odd"}, {"text": "w2", "label": "negative"}])
    data["tasks"] = {"a": {**task, "train": "odd.jsonl"}, "b": {**task, "test": "odd.jsonl"}}
    with pytest.raises(ConfigError) as raised:
        plan(check_comparison(data))
    assert [line.split(":")[0] for line in raised.value.problems] == ["tasks.a", "tasks.b"]


def test_file_then_key_values_then_flags(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**settings(tmp_path), "batch_size": 2, "seeds": 3}))
    config = load_comparison(path, ["batch_size=5", "tasks.reviews.epochs=7", "methods=[lora]"], out=None, seeds=2)
    assert config.batch_size == 5 and config.seeds == [0, 1] and config.methods == ["lora"]
    assert config.budget("reviews")["epochs"] == 7
    assert config.budget("reviews")["train_rows"] == 2000
    with pytest.raises(ConfigError, match="expected key=value"):
        load_comparison(path, ["epochs"])
    with pytest.raises(ConfigError, match="cannot be set"):
        load_comparison(path, ["batch_size.x=1"])


def test_only_the_tasks_that_are_wanted_need_their_files(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    given = settings(tmp_path)
    ((name, task),) = given["tasks"].items()
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**given, "tasks": {"other": {**task, "test": "missing.jsonl"}, name: task}}))
    assert list(load_comparison(path, only=[name]).tasks) == [name]
    with pytest.raises(ConfigError, match=r"other\.test: no file .*missing\.jsonl"):
        load_comparison(path)
    with pytest.raises(ConfigError, match="no task third in the config; it has other, ") as raised:
        load_comparison(path, only=[name, "third"])
    assert len(raised.value.problems) == 1


def test_where_a_prompt_stands_is_part_of_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results made with the soft tokens in another place are not taken for today's."""

    def digests() -> dict[str, str]:
        config = make_config(tmp_path, methods=["lora", "deep", "deep-behind"])
        return {cell.method: cell.digest for cell in plan(config)}

    before = digests()
    monkeypatch.setattr(places, "LAST_WORD", re.compile("$"))
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"deep-behind"}


def test_a_task_may_have_its_own_budget_and_fewer_methods(tmp_path: Path) -> None:
    config = make_config(tmp_path, methods=["zero-shot", "lora", "full"])
    config.tasks["reviews"].__dict__.update(methods=["full", "zero-shot"], batch_size=3)
    assert config.methods_of("reviews") == ["zero-shot", "full"]
    assert config.budget("reviews")["batch_size"] == 3


def test_a_method_may_have_its_own_number_of_steps(tmp_path: Path) -> None:
    config = make_config(tmp_path, methods=["lora", "deep"], steps=3, settings={"deep": {"epochs": 6, "tokens": 4}})
    task = next(iter(config.tasks))
    assert (config.budget_of(task, "lora")["steps"], config.budget_of(task, "lora")["epochs"]) == (3, 2.0)
    own = config.budget_of(task, "deep")
    assert (own["steps"], own["epochs"]) == (None, 6) and "tokens" not in own


def test_which_learning_rates_are_tried(tmp_path: Path) -> None:
    def rates(**more: Any) -> dict[str, list[float]]:
        config = make_config(tmp_path, methods=list(METHODS), **more)
        return {name: config.rates(name) for name in METHODS}

    searched = rates()
    assert len(searched["lora"]) == len(searched["full"]) == 3
    assert searched["prompt"] == searched["deep"] == [0.0] and searched["peft-prompt"] == [3e-2]
    assert searched["zero-shot"] == searched["few-shot"] == []
    sizes = {len(found) for found in rates(search="all").values()}
    assert sizes == {0, 3}  # an equal cost for all that train
    assert {len(found) for found in rates(search="none").values()} == {0, 1}
    assert rates(learning_rates={"lora": [1e-5]})["lora"] == [1e-5]


def test_every_method_can_be_made_and_set() -> None:
    assert all(make_method(name) for name in METHODS)
    assert set(OWN_SETTINGS) | set(SOFT) == set(METHODS)
    assert TuneConfig(kind="deep").kind == "deep"


def test_the_config_in_the_docs_is_sound(tmp_path: Path) -> None:
    page = (RECIPES.parent / "docs/compare.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yml\n(.*?)```", page, re.DOTALL)
    rows = "".join(f"w{i},{'negative' if i % 2 else 'positive'}\n" for i in range(40))
    (tmp_path / "reviews.csv").write_text("text,label\n" + rows)
    (tmp_path / "compare.yaml").write_text(block)
    assert len(plan(load_comparison(tmp_path / "compare.yaml", data=str(tmp_path)))) == 1 + 4 * 3


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("compare*.yaml")))
def test_the_recipes_are_sound_but_for_their_data(recipe: str, tmp_path: Path) -> None:
    """Every key, template, metric and method; the data itself is not part of the product."""
    with pytest.raises(ConfigError) as raised:
        load_comparison(RECIPES / recipe, [], data=str(tmp_path))
    assert raised.value.problems
    assert all(": no file" in line for line in raised.value.problems), raised.value.problems
