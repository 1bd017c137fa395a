"""The report: complete, bare and hostile runs all give a page that parses, fetches nothing and runs nothing."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.errors import OutputError
from softprompt.evaluation.metrics import classification_scores, text_scores
from softprompt.inspection.report import write_report
from softprompt.prompt import SoftPrompt

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(1)> --> ]]> $x$ \x00\x1b\u202e {{ 7*7 }} &amp;"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects tags, attributes, ids and the text that is shown."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


class Tokenizer:
    def __init__(self, size: int, text: str = " word"):
        self.size, self.text = size, text

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int]) -> str:
        return f"{self.text}{ids[0]}"

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


def make_events(tokens: int, steps: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    events: list[dict[str, Any]] = [
        {
            "event": "step",
            "step": step,
            "loss": math.exp(-step / steps),
            "learning_rate": 0.05,
            "gradient_norm": 1.0,
            "examples_per_second": 90.0,
            "token_gradient_norms": generator.random(tokens).tolist(),
            "token_norms": generator.random(tokens).tolist(),
        }
        for step in range(1, steps + 1)
    ]
    events.append({"event": "validation", "step": steps, "loss": 0.5, "score": 0.8, "metric": "accuracy"})
    events += [{"event": "warning", "step": step, "text": "3 soft tokens do not move"} for step in (2, 5)]
    return [*events, {"event": "end", "step": steps, "reason": "all steps done"}]


def full(path: Path, *, tokens: int = 4, steps: int = 30, classes: int = 3, text: str = "a text", **more: Any) -> Page:
    """Write a report with everything in it, `text` standing for every text of the data, and read it back."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 8, generator=generator)
    initial = torch.randn(tokens, 8, generator=generator)
    template: Any = SimpleNamespace(
        input="{soft}" + text, target=" {label}", chat=None, labels=((text, "yes"), ("b", "no")), placement="front"
    )
    names = [f"{text}{i}" for i in range(classes)]
    true = [names[i % classes] for i in range(200)]
    predicted = [name if i % 5 else names[0] for i, name in enumerate(true)]
    options: dict[str, Any] = {
        "title": text,
        "config": {"train": text, "nested": {"list": [1, text], "none": None}},
        "events": make_events(tokens, steps),
        "prompt": SoftPrompt(initial + 0.1, template=template, base_model=text),
        "table": table,
        "tokenizer": Tokenizer(60, text),
        "initial": initial,
        "scores": classification_scores(true, predicted, None, names).to_dict(),
        "mistakes": [
            {"text": text * 9, "true": text, "predicted": text, "probability": 0.5 + i / 100} for i in range(30)
        ],
        "examples": [{"text": text, "predicted": text, "references": [text, text]}],
        "baselines": [{"name": text, "score": 0.4, "low": 0.3, "high": 0.5}],
        "versions": {"torch": "2.13.0"},
    }
    return Page(write_report(path / "report.html", **{**options, **more}).read_text(encoding="utf-8"))


def test_everything_is_in_a_full_report(tmp_path: Path) -> None:
    page = full(tmp_path)
    shown = " ".join(page.text.split())
    for part in ("Result", "Warnings", "Classes", "Mistakes", "Tuning", "Soft tokens", "Nearest words", "Settings"):
        assert f"#{part.lower().replace(' ', '-')}" in page.values("href"), part
    assert "87.0 %" in shown
    assert "3 soft tokens do not move (step 2, 2 times)" in shown
    assert "best at step 30 (80.0 %)" in shown
    assert "ended all steps done" in shown
    assert "nested.list" in shown
    assert "torch 2.13.0" in shown
    assert "Not in this report" not in shown
    assert shown.index("79.0 %") < shown.index("60.0 %"), "the surest mistake comes first"
    assert "(20 of 30 given)" in shown


def test_the_page_is_self_contained_and_valid(tmp_path: Path) -> None:
    page = full(tmp_path, classes=20)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    links = page.values("href") + page.values("src") + page.values("xlink:href")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in links:
        assert link.startswith(("#", "data:image/png;base64,")), link
        assert not link.startswith("#") or link[1:] in ids, link
    used = re.findall(r"url\(#([^)]*)\)", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert used
    assert set(used) <= set(ids)
    assert any(label.startswith("Heat map") for label in page.values("aria-label"))
    assert page.values("role").count("img") == len(re.findall("<figure", (tmp_path / "report.html").read_text("utf-8")))


@pytest.mark.parametrize("classes", [3, 20])
def test_texts_of_the_data_cannot_inject_anything(tmp_path: Path, classes: int) -> None:
    page = full(tmp_path, text=EVIL, classes=classes)
    assert not page.tags & {"script", "img"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page.text
    assert "49" not in re.findall(r"\{\{.*?\}\}", page.text)
    assert "default-src 'none'" in " ".join(page.values("content"))


def test_a_prompt_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "new" / "r.html", title="imported", config={}, events=[], prompt=SoftPrompt(torch.ones(1, 4))
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "svg" not in page.tags
    assert "Not in this report: scores (nothing was evaluated)" in page.text
    assert "1 token of width 4" in page.text
    for part in ("nan", "None", "not known%"):
        assert part not in page.text


@pytest.mark.parametrize(
    "more",
    [
        {"scores": None},
        {"initial": None},
        {"initial": torch.ones(2, 8)},
        {"table": None},
        {"table": torch.ones(5, 9)},
        {"table": torch.zeros(5, 8)},
        {"tokenizer": None},
        {"events": [{"event": "step", "step": 1, "loss": math.nan}, {"event": "step"}, {}]},
        {"events": make_events(4, 1)},
        {"events": make_events(9, 3)},
        {"events": [{"event": "step", "step": 1, "token_norms": [0.0] * 4, "token_gradient_norms": [0.0] * 4}]},
        {"events": [{"event": "step", "step": s, "token_gradient_norms": [math.nan, 0, 0, s]} for s in (1, 2)]},
        {"scores": {"accuracy": 0.5}},
        {"scores": {"something_new": 3}},
        {"scores": classification_scores(["a"], ["a"], None, ("a",)).to_dict()},
        {"scores": text_scores([""], [["x"]]).to_dict()},
        {"mistakes": [{}], "examples": [{}], "baselines": [{}]},
        {"tokens": 1},
        {"tokens": 1024, "steps": 3},
        {"classes": 300},
    ],
    ids=lambda more: "-".join(more)[:30],
)
def test_any_part_may_be_missing_or_odd(tmp_path: Path, more: dict[str, Any]) -> None:
    drawn = {"tokens", "table", "initial"} & set(more)  # the others do not change the figures, which take a second
    page = full(tmp_path, **({} if drawn else {"events": []}) | more)
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)


def test_free_texts_in_chinese(tmp_path: Path) -> None:
    text = text_scores(["今天天气很好", "不"], [["今天天气不错"], ["是"]], 2.0).to_dict()
    page = full(
        tmp_path, text="今天", scores=text, baselines=[{"name": "zero-shot", "score": 0.1, "low": 0, "high": 0.2}]
    )
    shown = " ".join(page.text.split())
    assert "ROUGE-L on 2 rows" in shown
    assert "bits per token 2.000" in shown
    assert "今天" in shown


def test_the_headline_names_the_rows_that_were_scored(tmp_path: Path) -> None:
    scores = classification_scores(["a", "b"] * 60, ["a"] * 120, None, ("a", "b")).to_dict()
    shown = {
        split: " ".join(full(tmp_path, events=[], scores=scores | {"split": split}).text.split())
        for split in ("validation", "test")
    }
    assert "on 120 validation rows" in shown["validation"]
    assert "leans to the good side" in shown["validation"]
    assert "on 120 test rows" in shown["test"]
    assert "leans to the good side" not in shown["test"]
    assert "Every row was given the same answer" in shown["test"]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    full(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    full(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_an_unwritable_place_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path, title="", config={}, events=[], prompt=SoftPrompt(torch.ones(1, 4)))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_it_in_light_and_dark(tmp_path: Path) -> None:
    from matplotlib.image import imread

    full(tmp_path)
    corners = []
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    for scheme in ("1", "0"):
        shot = tmp_path / f"{scheme}.png"
        place = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--window-size=900,1200"]
        mode = [f"--blink-settings=preferredColorScheme={scheme}", (tmp_path / "report.html").as_uri()]
        command = ["chromium", "--headless", "--no-sandbox", "--disable-sync", *quiet.split(), *place, *mode]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        corners.append(imread(shot)[2, 2, :3].mean())
    assert corners[0] > 0.95
    assert corners[1] < 0.2
