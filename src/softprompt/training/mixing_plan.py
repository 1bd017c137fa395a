"""The config of `softprompt mix`: that of `tune` with a `tasks:` section. Refused whole, without torch or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig, check_config, gather
from ..errors import ConfigError

TEMPERATURE = 2.0
CAP = 1 << 16  # rows
# What each task says for itself, or for all of them outside of the section.
OWN = (
    *("train", "validation", "test", "format", "shares", "stratify", "group_by", "limit", "references"),
    *("input", "target", "chat", "labels"),
)
MIXED = ("temperature", "cap")
TEMPLATE = ("input", "chat")  # one of the two: a task's own takes the place of either outside


@dataclass(frozen=True)
class MixConfig:
    """base: what is not of a task (model, tuning, folders). tasks: the whole config of each task."""

    base: RunConfig
    tasks: dict[str, RunConfig]
    given: dict[str, dict[str, Any]]
    temperature: float = TEMPERATURE
    cap: int = CAP

    def to_yaml(self) -> str:
        """As a config file that `load_mix` reads back to the same."""
        shared = yaml.safe_load(self.base.to_yaml())
        plain = {key: value for key, value in shared.items() if key not in (*OWN, "from_prompt")}
        plain |= {"temperature": self.temperature, "cap": self.cap, "tasks": self.given}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def load_mix(
    path: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> MixConfig:
    """A checked mixture: the YAML file, over it `key=value` overrides, over those flags, as `load_config` does it.

    `tasks` is a mapping of name to the task's table, template and labels; such a setting outside of it holds for all
    tasks that do not have their own. Raises ConfigError with every mistake that can be known before a model is loaded.
    """
    problems: list[str] = []
    data = gather(path, overrides, flags, problems)
    tasks = _tasks(data.pop("tasks", None), problems)
    numbers = {key: _number(key, data.pop(key, None), problems) for key in MIXED}
    for key, what in (
        ("auto", "compares settings"),
        ("folds", "finds the steps"),
        ("ensemble", "tunes prompts"),
    ):
        if data.get(key):
            problems.append(f"{key}: {what} of one task; leave it out of a mixture")
            del data[key]
    name = data.get("name") or (Path(str(data["out"])).name if data.get("out") else "source")
    checked, found = {}, dict.fromkeys(problems)
    for own, given in tasks.items():
        try:
            checked[own] = check_config({**_without(data, given), **given, "name": name})
        except ConfigError as error:
            for text in error.problems:
                found.setdefault(_placed(own, text), None)
    if isinstance(data.get("init"), str):
        found |= dict.fromkeys(unmixable(data["init"]))
    if not tasks and not problems:
        found["tasks: missing; give at least two, as tasks: {sst2: {train: ..., input: ..., target: ...}}"] = None
    if found:
        raise ConfigError(list(found))
    base = next(iter(checked.values()))
    temperature, cap = numbers["temperature"] or TEMPERATURE, int(numbers["cap"] or CAP)
    plain = {own: _as_given(config) for own, config in checked.items()}
    return MixConfig(base, checked, plain, temperature, cap)


def unmixable(init: str) -> list[str]:
    """What is wrong with an initialiser for a mixture."""
    if init == "examples" or init.startswith("auto:"):
        return [f"init: {init} looks at the rows of one task; use text, labels, vocabulary, random or prompt:PATH"]
    return []


def _without(data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings outside, without the input where the task has chat turns of its own, and the other way round."""
    left = dict(data)
    if any(given.get(key) is not None for key in TEMPLATE):
        for key in TEMPLATE:
            left.pop(key, None)
    return left


def _placed(task: str, problem: str) -> str:
    """A mistake with the task's name before it if it is in what the task says, once for all tasks if it is not."""
    key = problem.partition(":")[0]
    return f"tasks.{task}.{problem}" if key in (*OWN, "template") else problem


def _as_given(config: RunConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    return {key: data[key] for key in OWN if data[key] is not None}


def _tasks(found: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(given, Mapping) for given in found.values()):
        problems.append(f"tasks: must be settings by name, as sst2: {{train: ..., input: ...}}, found {found!r:.80}")
        return {}
    if len(found) < 2:
        problems.append(f"tasks: a mixture has at least two, found {len(found)}; tune a single one with tune")
    tasks = {}
    for name, given in found.items():
        wrong = [key for key in given if key not in OWN]
        problems += [
            f"tasks.{name}.{key}: is not of a task, whose settings are {', '.join(OWN)}; put it outside of tasks"
            for key in wrong
        ]
        tasks[str(name)] = {str(key): value for key, value in given.items() if key not in wrong}
    return tasks


def _number(key: str, value: Any, problems: list[str]) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    whole = key == "temperature" or number == int(number) if number == number and abs(number) != float("inf") else False
    if not (number >= 1 and whole and number != float("inf")):
        kind = "a number" if key == "temperature" else "a whole number of rows"
        problems.append(f"{key}: must be {kind} of at least 1, found {value!r:.40}")
        return None
    return number
