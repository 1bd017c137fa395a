"""Run all speed benchmarks one after the other, keep what they measured, and fill docs/performance.md with it.

    python benchmarks/all.py                 # all, about half an hour on two cores
    python benchmarks/all.py --quick         # a few minutes; leaves the kept results and the page as they are
    python benchmarks/all.py suffix_speed    # some of them

The results go to docs/results/speed/NAME.json, the pictures to docs/pictures/. A benchmark that fails is told at the
end, and the others are run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import performance_page

HERE = Path(__file__).parent
# Name -> what it is run with, besides --out and --quick.
BENCHMARKS = {
    "train_speed": [],
    "suffix_speed": ["--goal"],
    "inference_speed": [],
    "cost_curves": [],
}
NOT_QUICK = {"--goal"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a part of each; nothing is kept")
    parser.add_argument("--threads", type=int, help="threads of each side; default: all cores")
    args = parser.parse_args(arguments)
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; expected {', '.join(BENCHMARKS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.quick else performance_page.RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        failed = [name for name in args.names or BENCHMARKS if not run(name, folder, args.quick, args.threads)]
    if not args.quick:
        performance_page.fill()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, folder: Path, quick: bool, threads: int | None) -> bool:
    given = [each for each in BENCHMARKS[name] if not (quick and each in NOT_QUICK)]
    given += ["--quick"] * quick + (["--threads", str(threads)] if threads else [])
    print(f"== {name} {' '.join(given)}", flush=True)
    begun = time.monotonic()
    command = [sys.executable, str(HERE / f"{name}.py"), *given, "--out", str(folder / f"{name}.json")]
    done = subprocess.run(command, check=False).returncode == 0
    print(f"== {name}: {time.monotonic() - begun:.0f} s", flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())
