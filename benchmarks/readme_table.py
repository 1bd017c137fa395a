"""Put measured figures into the README, between its markers, with the commit and the machine they come from.

    python benchmarks/train_speed.py | tee speed.txt
    softprompt demo --json > demo.json
    python benchmarks/readme_table.py speed.txt --demo demo.json

Of each file the last line that is a JSON object counts (a demo's document may fill the whole file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def read_json(path: Path) -> dict[str, Any]:
    """The whole file as an object, or its last line that is one."""
    text = path.read_text(encoding="utf-8")
    for candidate in (text, *reversed(text.splitlines())):
        try:
            found = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    raise SystemExit(f"{path} holds no JSON object; expected the output of train_speed.py or of softprompt demo --json")


def speed_lines(found: dict[str, Any]) -> list[str]:
    """Both sides' figures as a table. found: the JSON line of train_speed.py."""
    batch = found["results"][0]["batch"]
    lines = [
        f"Tuning speed on {found['model']}, {found['data']}, batches of {batch}, both sides in one run and in turns,",
        f"with equal loss and gradient ({found['device']}, {found['cpu']}, {found['threads']} threads; "
        f"torch {found['torch']}, transformers {found['transformers']}, PEFT {found['peft']}; "
        f"commit {found['commit']}):",
        "",
        "| precision | soft tokens | PEFT, examples/s | softprompt, examples/s | ratio (quartiles) "
        "| peak memory, PEFT and softprompt |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["results"]:
        low, high = each["ratio_quartiles"]
        peaks = [each[side]["peak_memory_mb"] for side in ("peft", "ours")]
        memory = [f"{peak} MB" if peak else "?" for peak in peaks]
        lines.append(
            f"| {each['precision']} | {each['tokens']} | {each['peft']['examples_per_second']:.2f} "
            f"| {each['ours']['examples_per_second']:.2f} | {each['ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {memory[0]}, {memory[1]} |"
        )
    return lines


def demo_lines(found: dict[str, Any], commit: str, machine: str) -> list[str]:
    """The demo's scores as a table. found: the document of `softprompt demo --json`."""
    scores = found["scores"]
    rows, minutes = next(iter(scores.values()))["rows"], found["total_seconds"] / 60
    where = ", ".join(part for part in (machine, f"commit {commit}") if part)
    lines = [
        f"`make demo`: accuracy on {rows:,} unseen reviews; {minutes:.1f} minutes in all ({where}):",
        "",
        "| | accuracy | 95 % interval |",
        "|---|---|---|",
    ]
    for name, score in scores.items():
        low, high = score["interval"]
        lines.append(f"| {name} | {score['accuracy']:.3f} | {low:.3f} to {high:.3f} |")
    return lines


def put(text: str, lines: list[str]) -> str:
    """`text` with `lines` between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} has no markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("speed", type=Path, nargs="?", help="what train_speed.py printed")
    parser.add_argument("--demo", type=Path, help="what `softprompt demo --json` printed")
    args = parser.parse_args()
    if args.speed is None and args.demo is None:
        parser.error("give what train_speed.py printed, --demo, or both")
    lines, machine = [], ""
    described = ["git", "-C", str(README.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    if args.speed:
        speed = read_json(args.speed)
        lines, machine = speed_lines(speed), f"{speed['cpu']}, {speed['threads']} threads"
    if args.demo:
        lines += ([""] if lines else []) + demo_lines(read_json(args.demo), commit, machine)
    README.write_text(put(README.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
