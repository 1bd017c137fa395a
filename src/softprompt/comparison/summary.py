"""From cells to lines: one for task, model and method, with its seeds put together and the paired test."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .catalogue import METHODS, PERCENT
from .paired import compare_pair, mean_score
from .store import DONE

Cell = dict[str, Any]
# What is averaged over the seeds of a line.
COSTS = (
    *("train_seconds", "search_seconds", "examples_per_second", "switch_seconds", "inference_seconds"),
    *("added_inference_seconds", "energy_joules", "processor_seconds"),
)
LARGEST = ("trained_parameters", "disk_bytes", "peak_memory_bytes", "memory_before_bytes")
CSV_COLUMNS = (
    *("task", "model", "method", "status", "metric", "score", "low", "high", "seeds", "seed_sd", "best", "test", "p"),
    *("difference", "difference_low", "difference_high", "trained_parameters", "disk_bytes", "peak_memory_bytes"),
    *("memory_before_bytes", "train_seconds", "search_seconds", "processor_seconds", "examples_per_second"),
    "switch_seconds",
    *("inference_seconds", "added_inference_seconds", "energy_joules", "train_rows", "test_rows", "steps"),
    *("model_parameters", "learning_rate", "reason"),
)


def summarise(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """One line for each task, model and method, in the order of the cells' tasks and of the catalogue's methods."""
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["model"]), {}).setdefault(cell["method"], []).append(cell)
    lines = []
    for methods in groups.values():
        done = {name: [c for c in some if c["status"] == DONE] for name, some in methods.items()}
        done = {name: sorted(some, key=lambda cell: cell["seed"]) for name, some in done.items() if some}
        best = max(done, key=lambda name: mean_score(done[name])["score"]) if done else None
        lines += [
            _line(methods[name], done.get(name, []), done[best] if best else [], name == best)
            for name in sorted(methods, key=list(METHODS).index)
        ]
    return lines


def _line(cells: Sequence[Cell], done: Sequence[Cell], best: Sequence[Cell], is_best: bool) -> dict[str, Any]:
    first = cells[0]
    head = {key: first[key] for key in ("task", "model", "method", "metric")}
    if not done:
        return {**head, "status": first["status"], "reason": first.get("reason", ""), "seeds": 0, "best": False}
    line = {**head, "status": DONE, **mean_score(done), "seeds": len(done), "best": is_best}
    line |= {key: _mean(cell.get(key) for cell in done) for key in COSTS}
    line |= {key: max((c[key] for c in done if c.get(key) is not None), default=None) for key in LARGEST}
    line |= {"train_rows": done[0]["train_rows"], "test_rows": done[0]["rows"], "steps": done[0]["steps"]}
    line |= {"model_parameters": done[0]["model_parameters"], "settings": done[0]["settings"]}
    line["learning_rate"] = done[0]["settings"].get("learning_rate")
    line["trials"] = done[0]["trials"] if len(done[0]["trials"]) > 1 else []
    line["scores"] = [cell["score"] for cell in done]
    missing = [cell["reason"] for cell in cells if cell["status"] != DONE]
    line["reason"] = missing[0] if missing else ""
    pair = {} if is_best else compare_pair(best, done)
    line |= {"test": pair.get("test"), "p": pair.get("p"), "difference": pair.get("difference")}
    return {**line, "difference_low": pair.get("low"), "difference_high": pair.get("high")}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def averages(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model's and method's means over the tasks that all of the model's methods with results have done.

    chrf and bleu are counted in hundredths, so that all scores lie between 0 and 1. A method that has results for less
    than half of the tasks (full fine-tuning on three, say) does not narrow the others, and gets no average.
    """
    found = []
    for model in dict.fromkeys(line["model"] for line in lines):
        tasks = {name: _done(lines, model, name) for name in METHODS}
        kept, shared = _in_common(tasks)
        found += [_average(lines, model, name, shared) for name in kept if shared]
    return found


def averages_by_size(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for several models, over tasks that are the same for all of them, smallest model first.

    The tasks are those that all methods with results in every model have done in every model, but for methods with few
    results as in `averages`. A method that only some models have (the others being too large for it) stands at these.
    """
    models = list(dict.fromkeys(line["model"] for line in lines))
    done = {(model, name): _done(lines, model, name) for model in models for name in METHODS}
    everywhere = {name: set.intersection(*(done[model, name] for model in models)) for name in METHODS if models}
    _, shared = _in_common(everywhere)
    found = [_average(lines, *key, shared) for key, tasks in done.items() if shared and shared <= tasks]
    return sorted(found, key=lambda line: (line["model_parameters"], line["model"]))


def _done(lines: Sequence[dict[str, Any]], model: str, method: str) -> set[str]:
    return {x["task"] for x in lines if (x["model"], x["method"], x["status"]) == (model, method, DONE)}


def _in_common(tasks: Mapping[str, set[str]]) -> tuple[list[str], set[str]]:
    """The methods with more than half as many tasks as the one with most, and the tasks that all of these have."""
    most = max((len(some) for some in tasks.values()), default=0)
    kept = [name for name, some in tasks.items() if 2 * len(some) > most]
    return kept, set.intersection(*(tasks[name] for name in kept)) if kept else set()


def _average(lines: Sequence[dict[str, Any]], model: str, method: str, tasks: set[str]) -> dict[str, Any]:
    some = [x for x in lines if (x["model"], x["method"]) == (model, method) and x["task"] in tasks]
    return {
        "model": model,
        "method": method,
        "model_parameters": some[0]["model_parameters"],
        "tasks": len(some),
        "score": sum(as_share(line) for line in some) / len(some),
        **{key: _mean(line[key] for line in some) for key in (*COSTS, *LARGEST)},
    }


def as_share(line: dict[str, Any], key: str = "score") -> float:
    """A score, or an end of its interval (`low`, `high`), between 0 and 1."""
    return float(line[key]) / (100 if line["metric"] in PERCENT else 1)


def to_csv(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as a table for other programs."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def document(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What summary.json holds: every line under "cells", and the averages over tasks."""
    return {"cells": list(lines), "averages": averages(lines)}
