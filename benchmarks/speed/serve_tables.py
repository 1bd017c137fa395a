"""The tables of docs/serving.md. found: the JSON of serve_speed.py."""

from __future__ import annotations

from typing import Any

from .tables import Found, machine_of, number

KINDS = {"generate": "texts of {max_tokens} tokens written", "classify": "labels chosen"}
SIDES = {"softprompt": "softprompt", "peft": "PEFT, `set_adapter` for each", "peft_by_task": "PEFT, sorted by task"}


def lines(found: Found) -> list[str]:
    settings = found["settings"]
    made = [
        f"{found['model']}, {settings['precision']}, {settings['tokens']} soft tokens a task, texts of",
        f"{settings['words']} words, up to {settings['rows']} at once {machine_of(found)},",
        f"load of the machine before it {found['load']}.",
    ]
    for kind, said in KINDS.items():
        if kind in found.get("throughput", {}):
            made += ["", f"Requests a second of the engine, {said.format(**settings)}:", ""]
            made += throughput_lines(found["throughput"][kind])
    if "beside_peft" in found:
        made += ["", f"Beside PEFT with {settings['peft_tasks']} adapters in one model:", "", *peft_lines(found)]
    if "server" in found:
        made += ["", f"The server with {settings['server_tasks']} tasks (skewed) under open-loop load:", ""]
        made += server_lines(found["server"])
    return made


def throughput_lines(rows: list[dict[str, Any]]) -> list[str]:
    made = [
        "| tasks (asked for) | mix | requests/s | speed beside one task (95 %) | the same by processor time |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        tasks = f"{row['tasks']} ({row['tasks_asked_for']})"
        figures = (_with_interval(row, name) for name in ("of_one_task", "of_one_task_by_processor_time"))
        made.append(f"| {tasks} | {row['mix']} | {number(row['requests_per_second'], 2)} | {' | '.join(figures)} |")
    return made


def _with_interval(row: dict[str, Any], name: str) -> str:
    middle, low, high = (number(row[key], 2) for key in (name, f"{name}_low", f"{name}_high"))
    return middle if row["tasks"] == 1 else f"{middle} ({low} to {high})"


def peft_lines(found: Found) -> list[str]:
    made = [
        "| | requests/s | softprompt is so many times as fast | the same by processor time | same tokens |",
        "|---|---|---|---|---|",
    ]
    for kind, side in found["beside_peft"].items():
        for name, said in SIDES.items():
            rate = number(side["requests_per_second"][name], 2)
            times = number(side.get(f"times_{name}"), 1) if name != "softprompt" else ""
            used = number(side.get(f"times_{name}_by_processor_time"), 1) if name != "softprompt" else ""
            same = f"{side['same_tokens']:.0%}" if name == "peft" and side["same_tokens"] is not None else ""
            made.append(f"| {kind}: {said} | {rate} | {times} | {used} | {same} |")
    return made


def server_lines(rows: list[dict[str, Any]]) -> list[str]:
    made = [
        "| offered, share of what the engine can do | offered/s | served/s | accepted | refused with 429 "
        "| first token, ms, p50/p95/p99 | between tokens, ms | whole answer, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(_three(row[name]) for name in ("first_token_ms", "between_tokens_ms", "whole_ms"))
        shares = " | ".join(f"{row[name]:.0%}" for name in ("accepted", "refused_with_429"))
        rates = " | ".join(number(row[name], 1) for name in ("share_of_capacity", "offered_per_second"))
        made.append(f"| {rates} | {number(row['served_per_second'], 1)} | {shares} | {times} |")
    return made


def _three(found: dict[str, float | None]) -> str:
    return " / ".join(number(found[name], 0) for name in ("p50", "p95", "p99"))
