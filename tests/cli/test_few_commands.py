"""Few rows, ensembles and several tasks on the command line, on a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_material import TEMPLATE, Called, reviews, write_rows

from softprompt import SoftPrompt
from softprompt.config import RunConfig, load_config
from softprompt.errors import ConfigError
from softprompt.training.mixing_plan import CAP, load_mix

Cli = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("plain_report")
QUICK = ("--tokens", 3, "--steps", 3, "--precision", "float32", "--batch-size", 8)


@pytest.fixture
def tune(cli: Cli, model_folder: str) -> Cli:
    def call(rows: int, *more: object) -> Called:
        train = write_rows(Path("reviews.jsonl"), reviews(rows))
        return cli("tune", "--model", model_folder, "--train", train, *TEMPLATE, *QUICK, *more)

    return call


# --- few rows -------------------------------------------------------------------------------------------------------


def test_few_rows_are_cross_validated_and_all_of_them_tuned_on(tune: Cli) -> None:
    called = tune(20, "--json")
    assert called.code == 0, called.err
    assert "20 training rows and none for validation: how good prompts of them are" in called.err
    assert "--folds 0 turns this off" in called.err and "20 rows tell no more" in called.err
    assert "rows: 20 train, 0 validation, 0 test" in called.err and "last vectors" not in called.err
    found = called.json["cross_validation"]
    assert found["folds"] == 5 and found["rows"] == 20 and called.json["steps"] == found["steps"] <= 3
    assert called.json["validation"]["cross_validated"] == 5 and called.json["test"] is None
    assert SoftPrompt.load("prompts/reviews").provenance["cross_validation"]["steps"] == found["steps"]
    assert sorted(os.listdir("runs/reviews/folds/trials")) == ["01", "02", "03", "04", "05"]


def test_what_turns_it_off(tune: Cli) -> None:
    assert "rows: 16 train, 2 validation, 2 test" in tune(20, "--folds", 0).err
    assert "rows: 10 train, 5 validation, 5 test" in tune(20, "--shares", "0.5,0.25,0.25", "--out", "two").err
    write_rows(Path("more.jsonl"), reviews(4))
    assert "0 train" not in tune(20, "--validation", "more.jsonl", "--out", "three").err
    assert "cross-validation" not in tune(110, "--out", "four", "--steps", 1).err


def test_folds_of_many_rows_and_a_test_share(tune: Cli) -> None:
    called = tune(110, "--folds", 2, "--steps", 1)
    assert called.code == 0, called.err
    assert "rows: 99 train, 0 validation, 11 test" in called.err and "cross-validation, 2 folds" in called.out


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("folds=1",), "folds: one fold leaves no rows to tune on; give at least 2, or 0 for none"),
        (("folds=3", "validation=reviews.jsonl"), "folds: are for tuning without validation rows"),
        (("folds=3", "auto=true"), "folds: auto compares by validation rows"),
        (("folds=-1",), "folds: must be greater than or equal to 0"),
        (("ensemble=1",), "ensemble: must be greater than or equal to 2"),
        (("ensemble=3", "labels=null"), "ensemble: prompts vote on labels"),
        (("tasks=x",), "tasks: is for several tasks at once, `softprompt mix`"),
    ],
)
def test_wrong_settings(cli: Cli, model_folder: str, train_file: Path, settings: tuple[str, ...], problem: str) -> None:
    given = [f"model={model_folder}", f"train={train_file}", f"input={TEMPLATE[1]}", "target= {label}"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*given, "labels=negative,positive", *settings])
    assert any(text.startswith(problem) for text in caught.value.problems), caught.value.problems


# --- ensembles ------------------------------------------------------------------------------------------------------


def test_an_ensemble_from_start_to_votes(tune: Cli, cli: Cli) -> None:
    called = tune(40, "--ensemble", 2, "--shares", "0.5,0.25,0.25")
    assert called.code == 0, called.err
    for told in ("majority vote", "averaged probabilities", "mean of these", "best by validation"):
        assert told in called.out
    prompt = SoftPrompt.load("prompts/reviews")
    assert prompt.provenance["ensemble"]["members"] == ["01", "02"]
    assert prompt.metrics["ensemble_test"]["rows"] == 10
    found = cli("evaluate", "prompts/reviews", "reviews.jsonl", "--json").json
    assert found["split"] == "test" and found["rows"] == 10
    assert [each["name"] for each in found["members"]] == ["01", "02"]
    assert found["majority"]["accuracy"] == prompt.metrics["ensemble_test"]["majority"]
    members = [f"prompts/reviews/members/{name}" for name in ("01", "02")]
    same = cli("evaluate", *members, "reviews.jsonl", "--json").json
    assert same["accuracy"] == found["accuracy"] and same["best"] in members
    alone = cli("evaluate", members[0], "reviews.jsonl", "--json").json
    assert alone["accuracy"] == found["members"][0]["accuracy"] and "members" not in alone

    def positive(prompt: str) -> float:
        return cli("run", prompt, "good film", "--json").json["rows"][0]["probabilities"]["positive"]

    mean = (positive(members[0]) + positive(members[1])) / 2
    assert positive("prompts/reviews") == pytest.approx(mean, abs=1e-6) and positive(members[0]) != positive(members[1])
    alone, best = Path("alone"), members[int(prompt.provenance["ensemble"]["best"]) - 1]
    shutil.copytree("prompts/reviews", alone, ignore=shutil.ignore_patterns("members"))  # as `pull` leaves it
    assert positive(str(alone)) == positive(best)
    assert "majority vote" not in cli("evaluate", alone, "reviews.jsonl").out
    assert [each["name"] for each in cli("list", "prompts", "--json").json["prompts"]] == ["reviews"]
    shown = cli("evaluate", "prompts/reviews", "reviews.jsonl", "--mistakes", 2)
    assert "majority vote" in shown.out and "predicted" in shown.out


def test_votes_that_cannot_be(tune: Cli, cli: Cli) -> None:
    tune(40, "--ensemble", 2, "--shares", "0.5,0.25,0.25", "--steps", 1)
    member = "prompts/reviews/members/01"
    called = cli("evaluate", member, member, "reviews.jsonl")
    assert called.code == 2 and "named twice" in called.err
    called = cli("evaluate", "prompts/reviews", "reviews.jsonl", "--shots", 2)
    assert called.code == 2 and "shots: are for a single prompt" in called.err
    assert cli("evaluate", "prompts/reviews").code == 2
    assert cli("evaluate", "a", "b", "reviews.jsonl", "--no-prompt").code == 2


# --- several tasks --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(cli: Cli, model_folder: str) -> dict[str, object]:
    """A sound mixture, standing in mix.yaml too."""
    write_rows(Path("a.jsonl"), reviews(40))
    write_rows(Path("b.jsonl"), [{"said": row["text"], "mood": row["label"]} for row in reviews(20)])
    tasks = {
        "a": {"train": "a.jsonl", "input": TEMPLATE[1], "target": TEMPLATE[3], "labels": ["negative", "positive"]},
        "b": {"train": "b.jsonl", "chat": [{"role": "user", "content": "{soft}{said}"}], "target": "{mood}"},
    }
    data: dict[str, object] = {"model": model_folder, "tokens": 3, "steps": 4, "batch_size": 8, "tasks": tasks}
    data |= {"precision": "float32", "shares": [0.5, 0.25, 0.25], "max_new_tokens": 2}
    write(data)
    return data


def write(data: dict[str, object]) -> None:
    Path("mix.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def problems(*settings: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_mix("mix.yaml", settings)
    return error.value.problems


def test_mix_and_tune_from_it(cli: Cli, config: dict[str, object], model_folder: str) -> None:
    called = cli("mix", "mix.yaml", "temperature=1", "--json")
    assert called.code == 0, called.err
    assert "a: 20 train, 10 validation, 10 test; 66.7% of the mixture" in called.err
    found = called.json
    assert found["prompt"] == "prompts/source" and set(found["validation"]) == set(found["test"]) == {"a", "b"}
    kept = SoftPrompt.load("prompts/source")
    assert kept.metrics["test"]["tasks"]["a"]["accuracy"] == found["test"]["a"]["accuracy"]
    assert load_mix("runs/source/config.yaml", ["run=again", "out=new"]).temperature == 1.0
    resumed = cli("mix", "--resume", "runs/source", "--overwrite", "--json")
    assert resumed.code == 0, resumed.err
    again = SoftPrompt.load("prompts/source")
    assert again.vectors.numpy().tobytes() == kept.vectors.numpy().tobytes()
    given = ("--model", model_folder, "--train", "a.jsonl", *TEMPLATE, *QUICK, "--folds", 0)
    called = cli("tune", *given, "--from", "prompts/source", "--out", "prompts/a")
    assert called.code == 0 and "prompts/source" in called.err
    shown = cli("mix", "mix.yaml", "out=prompts/second", "--temperature", "4")
    assert "mean validation score" in shown.out and "--from prompts/second" in shown.out


def test_the_config_of_a_mixture(config: dict[str, object]) -> None:
    found = load_mix("mix.yaml", ["cap=5"])
    assert (found.temperature, found.cap, list(found.tasks)) == (2.0, 5, ["a", "b"])
    assert load_mix("mix.yaml").cap == CAP
    assert found.tasks["b"].labels is None and found.tasks["b"].input is None
    assert found.base.out == "prompts/source" and found.base.shares == (0.5, 0.25, 0.25)
    Path("again.yaml").write_text(found.to_yaml())
    again = load_mix("again.yaml")
    assert again.tasks == found.tasks and again.cap == 5
    assert set(load_mix("mix.yaml", ["labels=negative,positive", "target=x {mood}"]).tasks["b"].labels or ()) == {
        "negative",
        "positive",
    }


def test_all_mistakes_of_a_mixture_at_once(config: dict[str, object]) -> None:
    tasks = json.loads(json.dumps(config["tasks"]))
    tasks["a"]["input"] = "{soft}{txt}"
    tasks["a"]["tokens"] = 5
    tasks["b"]["train"] = "none.jsonl"
    write(
        {
            **config,
            "tasks": tasks,
            "temperature": 0.5,
            "cap": 1.5,
            "learning_rate": -1,
            "auto": True,
            "init": "examples",
        }
    )
    found = problems()
    for beginning in (
        "tasks.a.tokens: is not of a task",
        "tasks.b.train: no file none.jsonl",
        "temperature: must be a number of at least 1, found 0.5",
        "cap: must be a whole number of rows of at least 1, found 1.5",
        "learning_rate: must be greater than 0",
        "auto: compares settings of one task",
        "init: examples looks at the rows of one task",
    ):
        assert sum(text.startswith(beginning) for text in found) == 1, (beginning, found)
    assert any("'txt'" in text for text in found)


def test_no_mixture(config: dict[str, object]) -> None:
    write({**config, "tasks": {"a": config["tasks"]["a"]}})  # type: ignore[index]
    assert problems() == ["tasks: a mixture has at least two, found 1; tune a single one with tune"]
    write({key: value for key, value in config.items() if key != "tasks"})
    assert problems()[0].startswith("tasks: missing; give at least two")
    write({**config, "tasks": ["a", "b"]})
    assert problems()[0].startswith("tasks: must be settings by name")


def test_the_bound_that_is_told_is_the_bound() -> None:
    from softprompt.training.few import FEW, FOLDS

    told = RunConfig.model_fields["folds"].description or ""
    assert f"default: {FOLDS} where" in told and f"fewer than {FEW} rows" in told
