"""The config of `softprompt sweep`: that of `tune` with a `sweep:` section. Refused whole, without torch or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig, check_config, gather
from ..errors import ConfigError
from ..plain_yaml import parse_yaml
from .sweep_plan import SECTION, SweepPlan, plan_of_section

# In place of tables that have been looked at: not a file, so that nothing is read.
UNREAD = {"train": "x", "validation": None, "test": None, "format": None}


@dataclass(frozen=True)
class SweepConfig:
    """base: what all trials have in common. plan: what differs."""

    base: RunConfig
    plan: SweepPlan

    def to_yaml(self) -> str:
        """As a config file that `load_sweep` reads back to the same."""
        section = yaml.safe_dump({"sweep": self.plan.section()}, sort_keys=False, allow_unicode=True, width=120)
        return self.base.to_yaml() + section

    def of_trial(self, settings: Mapping[str, Any]) -> RunConfig:
        """The config of one trial, as `softprompt tune` takes it."""
        return RunConfig(**{**self.base.model_dump(), **settings, "resume": None})


def load_sweep(
    path: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> SweepConfig:
    """A checked sweep: the YAML file, over it `key=value` overrides, over those flags, as `load_config` does it.

    grid, trials and halving may be given beside the settings of tuning, as YAML. Raises ConfigError with every mistake
    that can be known before a model is loaded.
    """
    problems: list[str] = []
    above = dict(flags or {})
    section = {key: above.pop(key) for key in SECTION if above.get(key) is not None}
    mine = [text for text in overrides if text.partition("=")[0] in SECTION]
    section = {**dict(text.split("=", 1) for text in mine), **section}
    data = gather(path, [text for text in overrides if text not in mine], above, problems)
    found = data.pop("sweep", None)
    if not section:
        plan = plan_of_section(found, problems)
    else:
        given = {key: _from_text(key, value, problems) for key, value in section.items()}
        plan = plan_of_section({**(found if isinstance(found, Mapping) else {}), **given}, problems)
    return check_sweep(data, plan, problems)


def _from_text(key: str, value: Any, problems: list[str]) -> Any:
    try:
        return parse_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        problems.append(f"{key}: cannot read {value!r} as YAML: {getattr(error, 'problem', None) or error}")
        return None


def check_sweep(data: Mapping[str, Any], plan: SweepPlan, problems: Sequence[str] = ()) -> SweepConfig:
    """The base config and every trial checked, all mistakes told at once, each once. Raises ConfigError."""
    found = list(problems)
    data = dict(data)
    everywhere = bool(plan.trials) and all("input" in own for own in plan.trials)
    if data.get("input") is None and data.get("chat") is None and everywhere:
        data["input"] = plan.trials[0]["input"]  # what every trial gives need not stand in the base
    base = _try(data, found)
    if base is not None and base.validation is None and not base.shares[1]:
        found.append("validation: a sweep compares trials by validation rows; give a file or a share of the rows")
    if base is not None and base.auto:
        found.append("auto: is for tune; a sweep says itself what it tries")
    if base is not None and (base.ensemble or base.folds):
        found.append(f"{'ensemble' if base.ensemble else 'folds'}: is for tune; leave it out of a sweep")
    found += _trial_problems(data, plan, found)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    assert base is not None
    return SweepConfig(base, SweepPlan(_settled(base, plan), plan.halving, plan.grid, plan.listed))


def _try(data: Mapping[str, Any], found: list[str]) -> RunConfig | None:
    try:
        return check_config(data)
    except ConfigError as error:
        found += error.problems
        return None


def _trial_problems(base: Mapping[str, Any], plan: SweepPlan, known: Sequence[str]) -> list[str]:
    """Mistakes that only trials have, each told of the first. Tables are read again only for another input."""
    found: dict[str, str] = {}
    seen = {base.get("input")}
    for settings in plan.trials:
        data = {**base, **settings, "overwrite": True, "new_version": False, "resume": None}
        data.pop("run", None)  # the folders of the base have been looked at
        if data.get("input") in seen:
            data |= {key: value for key, value in UNREAD.items() if data.get(key)}
        seen.add(data.get("input"))
        problems: list[str] = []
        _try(data, problems)
        found = {text: f"sweep trial {_named(settings)}: {text}" for text in problems if text not in known} | found
    return list(found.values())


def _named(settings: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _settled(base: RunConfig, plan: SweepPlan) -> tuple[dict[str, Any], ...]:
    """The settings of trials as their fields hold them: 1 given for a learning rate is 1.0."""
    plain = base.model_dump(exclude={"resume"})
    wholes = [RunConfig(**{**plain, **settings}) for settings in plan.trials]
    return tuple({key: getattr(whole, key) for key in each} for whole, each in zip(wholes, plan.trials, strict=True))
