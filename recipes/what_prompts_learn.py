"""Tune five prompts and look into all of them: what docs/what-prompts-learn.md is written from.

    python recipes/what_prompts_learn.py tune --data ../shared/data --out learned     # an hour on one core
    python recipes/what_prompts_learn.py look --data ../shared/data --out learned     # another one

The data folder holds trec/train.jsonl, trec/validation.jsonl, trec/test.jsonl and so on, each line a JSON object with
text and label; the movie reviews are those of `softprompt demo`. What is there already is not made again, so the same
command goes on after it was stopped. Every command that is run is printed and written to OUT/commands.txt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
# Fewer rows in smaller batches for the later ones: about as many steps, on a machine that had much else to do.
SHORT = {"batch_size": 8, "validation_rows": 50, "test_rows": 100}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"input": "{soft}Review: {text}\nSentiment:", "limit": 600},
    "reviews": {"input": "{soft}Review: {text}\nSentiment:", "limit": 600},
    "trec": {"input": "{soft}Question: {text}\nThe answer is a kind of:", "limit": 400, **SHORT, "validate_every": 50},
    "banking77": {  # 77 answers for each row that is scored: few rows are
        "input": "{soft}Question: {text}\nIntent:",
        "limit": 400,
        **SHORT,
        "validation_rows": 15,
        "validate_every": 50,
        "test_rows": 40,
    },
    "agnews": {
        "input": "{soft}News: {text}\nTopic:",
        "limit": 240,
        **SHORT,
        "validate_every": 30,
        "max_tokens": 160,
    },
    # As sst2, from vectors that are no words: to see what the starting text did.
    "sst2-random": {
        "input": "{soft}Review: {text}\nSentiment:",
        "limit": 320,
        **SHORT,
        "init": "random",
        "rows of": "sst2",
    },
}
COMMON = {"tokens": 20, "validation_rows": 100, "test_rows": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "look"])
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--out", type=Path, default=Path("learned"))
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, with commas")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only.split(","):
        (tune if given.what == "tune" else look)(name, given)
    if given.what == "look":
        compare(given)


def files(name: str, given: argparse.Namespace) -> dict[str, str]:
    """The three tables of a task."""
    if name == "reviews":
        from softprompt.demo_data import write_movie_reviews

        folder = given.out / "reviews-data"
        if not (folder / "test.csv").is_file():
            write_movie_reviews(folder)
        return {split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")}
    folder = given.data / TASKS[name].get("rows of", name)
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}


def tune(name: str, given: argparse.Namespace) -> None:
    import yaml

    if (given.out / "prompts" / name / "softprompt.json").is_file():
        return
    config = {"model": MODEL, **files(name, given), "target": " {label}", "labels": labels(name, given)}
    config |= {**COMMON, **TASKS[name], "out": str(given.out / "prompts" / name), "run": str(given.out / "runs" / name)}
    config.pop("rows of", None)
    path = given.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    softprompt(given, f"{name}-tuned", "tune", str(path))


def labels(name: str, given: argparse.Namespace) -> list[str]:
    if name == "reviews":
        return ["negative", "positive"]
    lines = Path(files(name, given)["train"]).read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["label"] for line in lines})


def look(name: str, given: argparse.Namespace) -> None:
    """Inspect, prune and discretize one prompt, on rows that it was not tuned on."""
    paths, many = files(name, given), name == "banking77"
    prompt, rows = str(given.out / "prompts" / name), ["--rows", "20" if many else "200"]
    scored = ["--data", paths["test"], *rows] + (["--changes", "left_out,first"] if many else [])
    report = ["--report", str(given.out / f"{name}.html"), "--run", str(given.out / "runs" / name)]
    softprompt(given, f"{name}-inspected", "inspect", prompt, *scored, *report)
    if many or name.endswith("-random"):
        return
    others = ["--validation", paths["validation"], "--test", paths["test"]]
    save = ["--out", str(given.out / "pruned" / name), "--overwrite"]
    softprompt(given, f"{name}-pruned", "prune", prompt, paths["train"], *others, "--rows", "200", *save)
    softprompt(given, f"{name}-text", "discretize", prompt, paths["train"], *others, "--test-rows", "300")


def compare(given: argparse.Namespace) -> None:
    """All prompts beside each other, and two that were tuned on the same rows."""
    prompts = given.out / "prompts"
    html = ["--report", str(given.out / "similarity.html")]
    tables = [part for name in TASKS for part in ("--data", f"{name}={files(name, given)['test']}")]
    softprompt(given, "similarity", "similarity", str(prompts), "--loss", "--rows", "20", *tables, *html)
    test = ["--data", files("sst2", given)["test"], "--rows", "300"]
    softprompt(given, "diff", "diff", str(prompts / "sst2"), str(prompts / "sst2-random"), *test)


def softprompt(given: argparse.Namespace, result: str, command: str, *arguments: str) -> None:
    """Run a command, keep its JSON; one that fails is told and costs the others nothing."""
    path = given.out / "results" / f"{result}.json"
    if path.is_file():
        return
    threads = [] if command == "tune" else ["--threads", str(given.threads)]
    words = ["softprompt", command, *arguments, *threads]
    if command == "tune":
        words.append(f"threads={given.threads}")
    print(shlex.join(words), flush=True)
    with (given.out / "commands.txt").open("a", encoding="utf-8") as file:
        file.write(shlex.join(words) + "\n")
    began = time.monotonic()
    call = [sys.executable, "-m", *words, "--json"]
    done = subprocess.run(call, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    print(f"{result}: exit {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_text(done.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
