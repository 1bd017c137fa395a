"""Markdown tables of what the benchmarks measured, for the README and docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def read_json(path: Path) -> Found:
    """The whole file as an object, or its last line that is one. SystemExit if there is none."""
    text = path.read_text(encoding="utf-8")
    for candidate in (text, *reversed(text.splitlines())):
        try:
            found = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    raise SystemExit(f"{path} holds no JSON object; expected the output of a benchmark or of softprompt demo --json")


def put(text: str, lines: list[str], name: str, where: str) -> str:
    """`text` with `lines` between its markers <!-- name --> and <!-- /name -->. SystemExit if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{where} has no markers {begin} and {end}")
    return f"{before}{begin}\n{chr(10).join(lines)}\n{end}{after}"


def machine_of(found: Found) -> str:
    """Machine, versions and commit of a benchmark's document, in brackets."""
    place = found["cpu"] if found["device"] == "cpu" else f"{found['device']} ({found['cpu']})"
    return (
        f"({place}, {found['threads']} threads; torch {found['torch']}, transformers {found['transformers']}, "
        f"PEFT {found['peft']}; commit {found['commit']})"
    )


def speed_lines(found: Found) -> list[str]:
    """Examples a second, utilisation and memory of all sides. found: the JSON of train_speed.py."""
    lines = [
        f"Tuning on {found['model']}, batches of {found['cases'][0]['batch']}, both sides in one run, with equal loss",
        f"and gradient {machine_of(found)}:",
        "",
        "| case | softprompt, examples/s | PEFT prompt, examples/s | times as fast (quartiles) | PEFT LoRA, examples/s "
        "| utilisation, softprompt and PEFT | memory over the model, softprompt and PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        ours, theirs, lora = (case.get(name, {}) for name in ("softprompt", "peft-prompt", "peft-lora"))
        speed = [number(side.get("examples_per_s"), 2) for side in (ours, theirs, lora)]
        used = ", ".join(number(side.get("utilisation"), 2) for side in (ours, theirs))
        memory = ", ".join(megabytes(side.get("memory_over_model_mb")) for side in (ours, theirs))
        ratio = ratio_text(case["times_peft_prompt"].get("softprompt"))
        lines.append(f"| {case['name']} | {speed[0]} | {speed[1]} | {ratio} | {speed[2]} | {used} | {memory} |")
    return lines + skipped_lines(found)


def deep_lines(found: Found) -> list[str]:
    """Deep prompts beside PEFT's prefix tuning, the same mathematics. found: as for `speed_lines`."""
    lines = [
        "| case | deep prompt, examples/s | PEFT prefix tuning, examples/s | memory over the model, both |",
        "|---|---|---|---|",
    ]
    for case in found["cases"]:
        ours, theirs = (case.get(name, {}) for name in ("softprompt-deep", "peft-prefix"))
        speed = " | ".join(number(side.get("examples_per_s"), 2) for side in (ours, theirs))
        memory = ", ".join(megabytes(side.get("memory_over_model_mb")) for side in (ours, theirs))
        lines.append(f"| {case['name']} | {speed} | {memory} |")
    return lines


def skipped_lines(found: Found) -> list[str]:
    """One sentence for the cases that were left out, by reason."""
    reasons: dict[str, list[str]] = {}
    for each in found.get("skipped", []):
        reasons.setdefault(each["reason"].split(" (")[0], []).append(each["name"])
    return [line for reason, names in reasons.items() for line in ("", f"Left out: {', '.join(names)} ({reason}).")]


def number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def megabytes(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f} MB"


def ratio_text(found: Found | None) -> str:
    if not found:
        return "?"
    return f"{found['median']:.2f} ({found['quartiles'][0]:.2f} to {found['quartiles'][1]:.2f})"
