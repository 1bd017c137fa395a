"""Put measured figures into the README, between its markers, with the commit and the machine they come from.

    python benchmarks/train_speed.py --out speed.json
    softprompt demo --json > demo.json
    python benchmarks/readme_table.py speed.json --demo demo.json

Of each file the last line that is a JSON object counts (a demo's document may fill the whole file).
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from speed.tables import put as put_between
from speed.tables import read_json, speed_lines

README = Path(__file__).parents[1] / "README.md"


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
    return put_between(text, lines, "figures", str(README))


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
