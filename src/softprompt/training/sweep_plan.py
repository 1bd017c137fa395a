"""What a sweep tries and when it drops what: plain data, checked without torch or a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from math import ceil, floor, log, prod
from typing import Any

from .config import TuneConfig

# What may differ between trials: all that says how to tune, and `input`, which says where the soft tokens stand.
# `init_text` goes with init; the rest of TuneConfig changes no result, or is the run's and not a trial's.
KEPT = (
    *("tensorboard", "folds", "checkpoint_every", "micro_batch_tokens", "validation_rows"),
    *("text_cache", "text_cache_bits", "text_cache_gb"),
)
SWEPT = ("input", *(key for key in TuneConfig.model_fields if key not in KEPT))
SECTION = ("grid", "trials", "halving")
HALVING = 3
MOST_TRIALS = 1_000
# No trial is judged before this share of its steps: most of what came before was warm-up.
EARLIEST = 0.1

Settings = dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """trials: the settings of each that differ from the base config. halving: at each rung one in so many goes on; 0
    lets all run to the end. grid, listed: as they were given, for the record."""

    trials: tuple[Settings, ...]
    halving: int = HALVING
    grid: Mapping[str, Any] | None = None
    listed: Sequence[Mapping[str, Any]] | None = None

    def section(self) -> dict[str, Any]:
        """As the `sweep:` section of a config."""
        given = {"grid": self.grid and dict(self.grid), "trials": self.listed and [dict(each) for each in self.listed]}
        return {**{key: value for key, value in given.items() if value}, "halving": self.halving}

    def keys(self) -> list[str]:
        """What differs between trials, in the order in which it was given."""
        return list(dict.fromkeys(key for settings in self.trials for key in settings))


def make_plan(
    grid: Any = None, trials: Any = None, halving: Any = HALVING, problems: list[str] | None = None
) -> SweepPlan:
    """The plan of `grid` (all combinations of its values) and `trials` (one after the other), without repetitions.

    Mistakes in their form go to `problems`, one line each; their values are checked with the settings of tuning.
    """
    found = problems if problems is not None else []
    axes = _axes(grid, found)
    listed = _listed(trials, found)
    every = _halving(halving, found)
    count = (prod(len(values) for values in axes.values()) if axes else 0) + len(listed)
    if count > MOST_TRIALS:
        found.append(f"sweep: {count:,} trials are more than {MOST_TRIALS:,}; give fewer values")
        return SweepPlan((), every)
    combined = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []
    made = list({_same(settings): settings for settings in [*combined, *listed]}.values())
    if not made and grid is None and trials is None:
        found.append("sweep: has no trials; give a grid, as grid: {learning_rate: [0.02, 0.05]}, or a list of trials")
    return SweepPlan(tuple(made), every, axes or None, listed or None)


def _same(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _axes(grid: Any, problems: list[str]) -> dict[str, list[Any]]:
    if grid is None:
        return {}
    if not isinstance(grid, Mapping):
        problems.append(f"sweep.grid: must be lists of values by setting, found {grid!r:.80}")
        return {}
    axes = {}
    for key, values in grid.items():
        problems += _unknown(f"sweep.grid.{key}", str(key), SWEPT)
        if not isinstance(values, (list, tuple)):
            problems.append(f"sweep.grid.{key}: must be a list of values, found {values!r:.80}")
        elif not values:
            problems.append(f"sweep.grid.{key}: is an empty list; give values, or leave {key} out")
        elif key in SWEPT:
            axes[str(key)] = list(values)
    if not grid:
        problems.append("sweep.grid: is empty; give values, as grid: {learning_rate: [0.02, 0.05]}")
    return axes


def _listed(trials: Any, problems: list[str]) -> list[Settings]:
    if trials is None:
        return []
    if not isinstance(trials, (list, tuple)) or not all(isinstance(each, Mapping) for each in trials):
        problems.append(f"sweep.trials: must be a list of settings, each {{learning_rate: ...}}, found {trials!r:.80}")
        return []
    if not trials:
        problems.append("sweep.trials: is an empty list; give settings, as trials: [{learning_rate: 0.05}]")
    for number, each in enumerate(trials, 1):
        for key in each:
            problems += _unknown(f"sweep.trials[{number}].{key}", str(key), SWEPT)
    return [{str(key): value for key, value in each.items() if key in SWEPT} for each in trials]


def _halving(value: Any, problems: list[str]) -> int:
    if value in (False, 0, 1, "off"):
        return 0
    if isinstance(value, int) and value is not True and value > 1:
        return value
    problems.append(f"sweep.halving: must be a whole number above 1 (one in so many goes on) or off, found {value!r}")
    return HALVING


def _unknown(where: str, key: str, known: Sequence[str]) -> list[str]:
    if key in known:
        return []
    if key in KEPT:
        return [f"{where}: is the same for all trials; set it outside of the sweep section"]
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    return [f"{where}: not a setting that can be swept; {f'did you mean {near[0]}?' if near else _known(known)}"]


def _known(known: Sequence[str]) -> str:
    return f"known are {', '.join(known)}"


def plan_of_section(section: Any, problems: list[str]) -> SweepPlan:
    """The plan that the `sweep:` section of a config describes; mistakes go to `problems`."""
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        problems.append(f"sweep: must be a section with grid or trials, found {section!r:.80}")
        return SweepPlan(())
    for key in section:
        if key not in SECTION:
            near = get_close_matches(str(key), SECTION, n=1, cutoff=0.5)
            problems.append(f"sweep.{key}: unknown key; {f'did you mean {near[0]}?' if near else _known(SECTION)}")
    return make_plan(section.get("grid"), section.get("trials"), section.get("halving", HALVING), problems)


def rungs(trials: int, halving: int) -> list[float]:
    """Shares of the steps after which losers are dropped: ..., 1/9, 1/3 for halving=3; none if it is off.

    Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): so many rungs that about one trial of `trials`
    is left for the last stretch.
    """
    if halving < 2 or trials < halving:
        return []
    most = floor(log(trials, halving) + 1e-9)
    return [halving**-k for k in range(most, 0, -1) if halving**-k >= EARLIEST]


def kept(entered: int, halving: int) -> int:
    """How many of the trials that entered a stretch go on after its rung."""
    return ceil(entered / halving)


def expected_runs(trials: int, halving: int) -> float:
    """What a sweep costs, in whole runs: 9 trials with halving=3 take 9/9 + 3 * 2/9 + 2/3 = 2.33."""
    cost, before, left = 0.0, 0.0, trials
    for share in [*rungs(trials, halving), 1.0]:
        cost += left * (share - before)
        before, left = share, kept(left, halving) if share < 1 else left
    return cost
