"""The config of a comparison: plain data, one description per field, refused whole with all its mistakes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..config import parse_labels
from ..config_checks import device_problems
from ..errors import ConfigError, TemplateError
from ..plain_yaml import parse_yaml, read_yaml
from ..templates import Template
from ..training.config import TuneConfig
from .catalogue import METHODS, SOFT, unknown_method, wrong_metric

# What a config may set for each task and for all of them: the same budget for every method.
BUDGET = (
    *("train_rows", "validation_rows", "test_rows", "epochs", "steps", "batch_size", "max_tokens", "max_new_tokens"),
    *("shots", "shot_tokens"),
)
# What may be set for one method (settings: {lora: {rank: 4}}); soft prompts take the fields of TuneConfig.
OWN_BUDGET = ("epochs", "steps", "batch_size")  # instead of what all have; results.csv shows the steps
OWN_SETTINGS = {
    "lora": ("rank", "alpha", "dropout", "weight_decay", *OWN_BUDGET),
    "full": ("weight_decay", *OWN_BUDGET),
    "peft-prompt": ("tokens", "init_text", *OWN_BUDGET),
    "few-shot": (),
    "zero-shot": (),
}
SHARED = ("learning_rate", "max_tokens", "seed", "kind", "validation_rows")


class Budget(BaseModel):
    """Rows and steps. None in a task: that of the whole comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_rows: int | None = Field(None, ge=2, description="at most so many training rows, drawn by seed 0")
    validation_rows: int | None = Field(None, ge=1, description="at most so many validation rows, drawn by seed 0")
    test_rows: int | None = Field(None, ge=2, description="at most so many test rows, drawn by seed 0")
    epochs: float | None = Field(None, gt=0, description="passes over the training rows, unless steps is given")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    batch_size: int | None = Field(None, ge=1, description="examples an optimiser step")
    max_tokens: int | None = Field(None, ge=8, description="longest row in tokens; default: the model's context")
    max_new_tokens: int | None = Field(None, ge=1, description="longest free-text answer in tokens")
    shots: int | None = Field(None, ge=1, description="worked examples of few-shot; default: as many as fit")
    shot_tokens: int | None = Field(
        None, ge=8, description="longest context of few-shot in tokens; default: the model's context"
    )


DEFAULTS = {
    **{"train_rows": 2000, "validation_rows": 500, "test_rows": 1000, "epochs": 2.0, "batch_size": 16},
    "max_new_tokens": 64,
}


class TaskSpec(Budget):
    """One task: its files, its template, its score."""

    train: str = Field(description="training rows; a path below `data`")
    validation: str | None = Field(None, description="validation rows; default: a share of the training rows")
    test: str | None = Field(None, description="test rows; default: a share of the training rows")
    format: str | None = Field(None, description="format of the files, where their names do not tell")
    references: str | None = Field(None, description="column with a list of right texts")
    input: str | None = Field(None, description="text the model reads, with {column} fields and {soft}")
    chat: list[dict[str, str]] | None = Field(None, description="instead of input: turns")
    target: str = Field(description="what it is to answer")
    labels: list[str] | dict[str, str] | None = Field(None, description="classes, or class: label word")
    metric: str | None = Field(None, description="the score; default: accuracy, rouge_l for free text")
    methods: list[str] | None = Field(None, description="methods of this task; default: those of the comparison")

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        return parse_labels(value)

    def template(self) -> Template:
        """Raises TemplateError."""
        return Template.make(self.input, self.target, self.chat, self.labels)

    @property
    def score_name(self) -> str:
        return self.metric or ("accuracy" if self.labels is not None else "rouge_l")


class ComparisonConfig(Budget):
    """One comparison: models x tasks x methods x seeds, all with the same rows, template and budget."""

    model: list[str] = Field(description="models, one or a list: hub ids, folders, .gguf files, aliases")
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field("auto", description="of the model")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 or mps; default: what there is")
    threads: int | None = Field(None, ge=1, description="threads on the CPU; default: torch's choice")
    data: str = Field(".", description="folder that the paths of the tasks start from")
    out: str = Field("comparisons/comparison", description="results folder; finished cells in it are not run again")
    methods: list[str] = Field(
        ["zero-shot", "few-shot", "prompt", "deep", "lora", "peft-prompt", "full"], description="what is compared"
    )
    seeds: list[int] = Field([0], description="a list of seeds, or how many (from 0)")
    search: Literal["baselines", "all", "none"] = Field(
        "baselines",
        description="which methods try their grid of learning rates at the first seed: baselines (lora, full), all "
        "that train, or none (the middle one). Without a search soft prompts and peft-prompt take the one they ship",
    )
    learning_rates: dict[str, list[float]] = Field({}, description="other grids, by method; one value: no search")
    settings: dict[str, dict[str, Any]] = Field({}, description="settings by method, as {prompt: {tokens: 50}}")
    isolate: bool = Field(True, description="a process for each cell, so that its peak memory is its own")
    tasks: dict[str, TaskSpec] = Field(description="the tasks by name")

    @field_validator("model", "methods", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    def budget(self, task: str) -> dict[str, Any]:
        """Rows, steps and lengths of a task: its own, else the comparison's, else the defaults."""
        own, whole = self.tasks[task], self
        found = {}
        for key in BUDGET:
            value = getattr(own, key) if getattr(own, key) is not None else getattr(whole, key)
            found[key] = DEFAULTS.get(key) if value is None else value
        return found

    def budget_of(self, task: str, method: str) -> dict[str, Any]:
        """The budget of a task, with what its settings give the method of its own."""
        own = {key: value for key, value in self.settings.get(method, {}).items() if key in OWN_BUDGET}
        return self.budget(task) | ({"steps": None} if "epochs" in own else {}) | own

    def methods_of(self, task: str) -> list[str]:
        """The methods of a task, in the order of the comparison's list."""
        own = self.tasks[task].methods
        return self.methods if own is None else [name for name in self.methods if name in own]

    def rates(self, method: str) -> list[float]:
        """Learning rates to try at the first seed; [] for a method that trains nothing. 0: TuneConfig's default."""
        facts = METHODS[method]
        if method in self.learning_rates:
            return self.learning_rates[method]
        if not facts.trains:
            return []
        if self.search == "all" or (self.search == "baselines" and facts.shipped is None):
            return list(facts.rates)
        return [facts.rates[len(facts.rates) // 2] if facts.shipped is None else facts.shipped]


# --- reading and checking -------------------------------------------------------------------------------------------


def load_comparison(
    path: str | Path | None, overrides: Sequence[str] = (), *, only: Sequence[str] | None = None, **flags: Any
) -> ComparisonConfig:
    """A checked config: the YAML file, then `key=value` texts (tasks.sst2.epochs=1 reaches inside), then flags.

    only: names of the tasks that are wanted; the others are left out, and what they lack is no mistake.
    Raises ConfigError with every mistake that can be known before a row is read or a model is loaded.
    """
    problems: list[str] = []
    data = {} if path is None else read_yaml(Path(path), problems)
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            if equals:
                _put(data, key.strip().split("."), parse_yaml(value))
            else:
                problems.append(f"{text}: expected key=value, as epochs=1")
        except (yaml.YAMLError, TypeError):
            problems.append(f"{key}: cannot be set to {value!r}")
    data |= {key: value for key, value in flags.items() if value is not None}
    tasks = data.get("tasks")
    if only is not None and isinstance(tasks, dict):
        unknown = [name for name in only if name not in tasks]
        if unknown:
            raise ConfigError([*problems, f"tasks: no task {unknown[0]} in the config; it has {', '.join(tasks)}"])
        data["tasks"] = {name: tasks[name] for name in only}
    return check_comparison(data, problems)


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise TypeError(key)
    data[keys[-1]] = value


def check_comparison(data: Mapping[str, Any], problems: Sequence[str] = ()) -> ComparisonConfig:
    """A config from plain data. problems: mistakes found before, raised together with those found here."""
    found = list(problems)
    try:
        config = ComparisonConfig(**data)
    except ValidationError as error:
        raise ConfigError([*found, *(_in_words(each) for each in error.errors())]) from error
    except TypeError as error:  # a key that is no text
        raise ConfigError([*found, f"the config: {error}"]) from error
    for check in (_lists, _methods, _settings, _tasks):
        found += check(config)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return config


def _in_words(error: Mapping[str, Any]) -> str:
    place = [str(part) for part in error["loc"]]
    where = ".".join(place)
    owner = TaskSpec if len(place) > 2 and place[0] == "tasks" else ComparisonConfig
    if error["type"] == "extra_forbidden":
        near = get_close_matches(place[-1], owner.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(owner.model_fields)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; expected {owner.model_fields[place[-1]].description}"
    text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be").split(", unable")[0]
    return f"{where}: {text[0].lower()}{text[1:]}, found {error['input']!r:.120}"


def _lists(config: ComparisonConfig) -> Iterator[str]:
    for name in ("model", "methods", "seeds", "tasks"):
        values = getattr(config, name)
        if not values:
            yield f"{name}: the list is empty; expected {ComparisonConfig.model_fields[name].description}"
        elif len(set(values)) < len(values):
            yield f"{name}: {values} names something twice; name it once"
    yield from (f"seeds: {seed} is below 0; expected 0 or more" for seed in config.seeds if seed < 0)
    yield from device_problems(config.device)
    if not Path(config.data).is_dir():
        yield f"data: no folder {config.data}; give the folder with the tasks' files, as data=FOLDER"
    for name in config.model:
        if (name.startswith((".", "/", "~")) or name.endswith(".gguf")) and not Path(name).expanduser().exists():
            yield f"model: no file or folder {name}"


def _methods(config: ComparisonConfig) -> Iterator[str]:
    own = [name for task in config.tasks.values() for name in task.methods or []]
    for name in dict.fromkeys([*config.methods, *own, *config.learning_rates, *config.settings]):
        if name not in METHODS:
            yield unknown_method(name)
    for name, rates in config.learning_rates.items():
        if not rates or any(not rate > 0 for rate in rates):
            yield f"learning_rates.{name}: expected a list of numbers above 0, found {rates}"
        elif name in METHODS and not METHODS[name].trains:
            yield f"learning_rates.{name}: {name} trains nothing; leave it out"


def _settings(config: ComparisonConfig) -> Iterator[str]:
    for name, given in config.settings.items():
        if name not in METHODS:
            continue
        known = [key for key in TuneConfig.model_fields if key not in SHARED] if name in SOFT else OWN_SETTINGS[name]
        for key in given:
            if key in SHARED:
                yield f"settings.{name}.{key}: is the same for all methods, or given as learning_rates; set it there"
            elif key not in known:
                yield f"settings.{name}.{key}: unknown; known are {', '.join(known) or 'none'}"
        checked = known if name in SOFT else OWN_BUDGET
        try:
            TuneConfig(**{key: value for key, value in given.items() if key in checked})
        except ValidationError as error:
            yield from (f"settings.{name}.{_in_words(each)}" for each in error.errors())


def _tasks(config: ComparisonConfig) -> Iterator[str]:
    for name, task in config.tasks.items():
        if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
            yield f"tasks: '{name}' is no name for files; use letters, digits, - and _"
        for key in ("train", "validation", "test"):
            path = getattr(task, key)
            if path is not None and not (Path(config.data) / path).exists():
                yield f"tasks.{name}.{key}: no file {Path(config.data) / path}; data=FOLDER says where the data is"
        try:
            _ = task.template().placement
        except TemplateError as error:
            yield f"tasks.{name}: {error}"
        if wrong := wrong_metric(task.score_name, task.labels is not None):
            yield f"tasks.{name}: {wrong}"
        if task.methods is not None and not config.methods_of(name):
            yield f"tasks.{name}.methods: none of {', '.join(task.methods)} is among methods"
