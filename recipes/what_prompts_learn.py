"""Tune five prompts and look into all of them: what docs/what-prompts-learn.md is written from.

    python recipes/what_prompts_learn.py tune --data ../shared/data --out learned     # an hour on one core
    python recipes/what_prompts_learn.py look --data ../shared/data --out learned     # another one
    python recipes/what_prompts_learn.py deep --out learned --demo demo          # after `softprompt demo --folder demo`
    python recipes/what_prompts_learn.py publish --out learned                   # tables, docs/results/inspect

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
        "limit": 240,
        **SHORT,
        "validation_rows": 12,
        "validate_every": 60,
        "test_rows": 40,
    },
    "agnews": {
        "input": "{soft}News: {text}\nTopic:",
        "limit": 160,
        **SHORT,
        "validate_every": 20,
        "max_tokens": 160,
    },
    # As sst2, from vectors that are no words: to see what the starting text did.
    "sst2-random": {
        "input": "{soft}Review: {text}\nSentiment:",
        "limit": 240,
        **SHORT,
        "init": "random",
        "rows of": "sst2",
    },
}
ROWS = {"agnews": 16, "banking77": 12}  # that importance and attention are measured on; others 32
SMALLER = ("projection", "report", "run", "prompt", "made")  # left out of what is published: large, or names of files
CONTROLS = ("sst2-random",)  # in a folder of their own, not among the prompts that are compared
COMMON = {"tokens": 20, "validation_rows": 100, "test_rows": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "look", "deep", "publish"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets")
    parser.add_argument("--out", type=Path, default=Path("learned"))
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, with commas")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the demo, for deep")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what in ("publish", "deep"):
        (publish if given.what == "publish" else deep)(given)
        return
    for name in given.only.split(","):
        (tune if given.what == "tune" else look)(name, given)
    if given.what == "look":
        compare(given)
        changes(given)


def files(name: str, given: argparse.Namespace) -> dict[str, str]:
    """The three tables of a task."""
    if name == "reviews":
        from softprompt.demo_data import write_movie_reviews

        made = given.out / "reviews-data"
        if not (made / "test.csv").is_file():
            write_movie_reviews(made)
        return {split: str(made / f"{split}.csv") for split in ("train", "validation", "test")}
    there = given.data / TASKS[name].get("rows of", name)
    return {split: str(there / f"{split}.jsonl") for split in ("train", "validation", "test")}


def folder(name: str, given: argparse.Namespace) -> Path:
    return given.out / ("controls" if name in CONTROLS else "prompts") / name


def tune(name: str, given: argparse.Namespace) -> None:
    import yaml

    if (folder(name, given) / "softprompt.json").is_file():
        return
    config = {"model": MODEL, **files(name, given), "target": " {label}", "labels": labels(name, given)}
    config |= {**COMMON, **TASKS[name], "out": str(folder(name, given)), "run": str(given.out / "runs" / name)}
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
    """Inspect one prompt on rows that it was not tuned on; read the first one off as text, and make it shorter."""
    paths, prompt = files(name, given), str(folder(name, given))
    rows = ["--rows", str(ROWS.get(name, 32)), "--changes", "left_out,first"]
    kept = ["--report", str(given.out / f"{name}.html"), "--pictures", str(given.out / "pictures")]
    run = ["--run", str(given.out / "runs" / name)]
    softprompt(given, f"{name}-inspected", "inspect", prompt, "--data", paths["test"], *rows, *kept, *run)
    if name != "sst2":
        return
    others = ["--validation", paths["validation"], "--test", paths["test"], "--test-rows", "100"]
    search = ["--candidates", "3", "--rounds", "1", "--rows", "24"]
    softprompt(given, f"{name}-text", "discretize", prompt, paths["train"], *others, *search)
    shorter = ["--rows", "40", "--steps", "20", "--lengths", "10,5,2", "--out", str(given.out / "pruned" / name)]
    picture = ["--picture", str(given.out / "pictures" / f"{name}-lengths.svg"), "--overwrite"]
    softprompt(given, f"{name}-pruned", "prune", prompt, paths["train"], *others, *shorter, *picture)


def compare(given: argparse.Namespace) -> None:
    """All prompts beside each other, and two that were tuned for the same task."""
    prompts = given.out / "prompts"
    kept = ["--report", str(given.out / "similarity.html"), "--pictures", str(given.out / "pictures")]
    softprompt(given, "similarity", "similarity", str(prompts), *kept)
    scored = [name for name in TASKS if name not in CONTROLS]
    tables = [part for name in scored for part in ("--data", f"{name}={files(name, given)['test']}")]
    softprompt(given, "crossed", "similarity", str(prompts), "--loss", "--rows", "12", *tables, *kept[2:])
    test = ["--data", files("sst2", given)["test"], "--rows", "100"]
    softprompt(given, "diff", "diff", str(prompts / "sst2"), str(prompts / "reviews"), *test)
    softprompt(given, "diff-pruned", "diff", str(prompts / "sst2"), str(given.out / "pruned" / "sst2"), *test)


def changes(given: argparse.Namespace) -> None:
    """What tuning added to the vectors, apart from what they started as: how alike, and which words it points to."""
    import torch

    import softprompt as sp
    from softprompt.inspection.nearest import nearest_tokens

    backbone = sp.Backbone.load(MODEL, precision="float32")
    table = backbone.embedding_table()
    names = [name for name in TASKS if (folder(name, given) / "softprompt.json").is_file()]
    looked = {n: sp.inspect(folder(n, given), backbone, run=given.out / "runs" / n) for n in names}
    moved = {n: each.prompt.vectors - each.initial for n, each in looked.items() if each.initial is not None}
    for name, each in looked.items():
        text = json.dumps(each.to_dict(), ensure_ascii=False)
        (given.out / "results" / f"{name}-words.json").write_text(text, encoding="utf-8")
    noise = torch.randn(20, backbone.width, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity

    def words(vectors: torch.Tensor) -> list[list[tuple[str, float]]]:
        near = nearest_tokens(vectors, table, backbone.tokenizer, 5)
        return [[(word.text, round(word.similarity, 3)) for word in row] for row in near]

    found = {
        "words": {name: words(vectors) for name, vectors in moved.items()},
        "words_of_noise": words(noise),
        "pooled": {
            a: {b: float(cosine(x.mean(0), y.mean(0), dim=0)) for b, y in moved.items()} for a, x in moved.items()
        },
        "token_by_token": {a: {b: float(cosine(x, y).mean()) for b, y in moved.items()} for a, x in moved.items()},
        "size": {n: float((x.norm(dim=1) / looked[n].initial.norm(dim=1)).mean()) for n, x in moved.items()},
    }
    (given.out / "results" / "changes.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def deep(given: argparse.Namespace) -> None:
    """What the values of the demo's deep prompt say before and after tuning, and of what tuning added."""
    import torch

    import softprompt as sp
    from softprompt.inspection.lens import value_words

    backbone = sp.Backbone.load(MODEL, precision="float32")
    found = sp.inspect(given.demo / "prompts" / "sentiment", backbone, run=given.demo / "runs" / "sentiment")
    if found.initial is None or found.deep is None:
        sys.exit(f"no deep prompt with its run in {given.demo}: " + "; ".join(found.notes))
    vectors, start = found.prompt.vectors, found.initial
    added = vectors - start
    noise = torch.randn(added.shape, generator=torch.Generator().manual_seed(0))
    noise = noise * added.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    of_labels, of_films = ("negativ", "positiv"), ("movie", "film", "review", "cinema", "actor")
    looked = {"start": start, "tuned": vectors, "added": added, "noise of the same lengths": noise}
    said = {what: value_words(backbone, states, 5) for what, states in looked.items()}

    def places(what: str, stems: tuple[str, ...]) -> list[tuple[int, int, str]]:
        return [
            (layer, token, word.text)
            for layer, tokens in enumerate(said[what])
            for token, row in enumerate(tokens)
            for word in row
            if word.text.strip().lower().startswith(stems)
        ]

    tokens = vectors.shape[3]
    same = [sum(a[i][0].id == b[i][0].id for i in range(tokens)) / tokens for a, b in zip(said["start"], said["tuned"])]
    result = {
        "labels": {what: places(what, of_labels) for what in said},
        "films": {what: places(what, of_films) for what in said},
        "first_word_as_at_the_start": same,
        "moved": [[float(part.mean()) for part in layer] for layer in found.deep.moved],
    }
    (given.out / "results" / "deep-values.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


def publish(given: argparse.Namespace) -> None:
    """Copy the small results, without the points of the projection, and print the tables of the page."""
    kept = Path(__file__).parents[1] / "docs" / "results" / "inspect"
    kept.mkdir(parents=True, exist_ok=True)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (given.out / "results").glob("*.json")}
    for name, document in sorted(found.items()):
        small = {key: value for key, value in document.items() if key not in SMALLER}
        for part in ("nearest",) if isinstance(small.get("nearest"), dict) else ():
            small[part] = {"cosine": small[part]["cosine"]}
        for split in ("validation", "test"):
            for part in ("per_class", "confusion", "classes"):
                small.get(split, {}).pop(part, None)
        text = json.dumps(rounded(small), ensure_ascii=False).replace(f"{given.out}/", "learned/")
        (kept / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(
        "| prompt | rows, steps | test accuracy | still the start's word | cosine with start | tightness | by chance |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in TASKS:
        tuned, seen = found.get(f"{name}-tuned"), found.get(f"{name}-words")
        if not tuned or not seen:
            continue
        test, cosines = tuned["test"], [each["cosine"] for each in seen["movement"]]
        low, high = test["interval"]
        print(
            f"| {name} | {TASKS[name]['limit']}, {tuned['steps']} | {test['accuracy']:.3f} ({low:.3f} to {high:.3f}, "
            f"{test['rows']} rows) | {seen['words']['survived_share']:.0%} | {sum(cosines) / len(cosines):.3f} "
            f"({min(cosines):.3f} to {max(cosines):.3f}) | {seen['clusters']['tightness']:.2f} | "
            f"{seen['clusters']['by_chance']:.2f} |"
        )


def rounded(value: Any) -> Any:
    """Floats to four figures: enough to read, and a tenth of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return {key: rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


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
