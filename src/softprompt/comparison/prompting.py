"""Methods that leave the model alone: zero-shot, few-shot, soft prompts and deep prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..encoding import Encoder
from ..evaluation.runner import pick_shots
from ..fileformat import load_prompt
from ..prompt import SoftPrompt
from ..templates import Template
from ..training.loop import Validation
from .places import behind
from .protocol import Job, Opened, Trained

SHOTS_FILE = "shots.json"


class ZeroShot:
    """The template as plain text. It has no files."""

    def why_not(self, job: Job) -> str:
        return ""

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        return Trained()

    def open(self, job: Job, folder: Path) -> Opened:
        return Opened(job.backbone, max_tokens=job.budget["max_tokens"])


class FewShot:
    """Worked examples before the text: as many as the context holds beside the longest test row, drawn by seed."""

    def why_not(self, job: Job) -> str:
        limit = _shot_tokens(job)
        return "" if shots_that_fit(job, limit) else f"not one worked example fits into {limit} tokens"

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        count = shots_that_fit(job, _shot_tokens(job))
        worked = pick_shots(job.task.train, count, job.seed)
        columns = [*job.task.template.fields, *job.task.template.target_fields]
        rows = [{name: row[name] for name in columns} for row in worked]
        (folder / SHOTS_FILE).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return Trained(settings={"shots": count, "shot_tokens": _shot_tokens(job)})

    def open(self, job: Job, folder: Path) -> Opened:
        worked = json.loads((folder / SHOTS_FILE).read_text(encoding="utf-8"))
        return Opened(job.backbone, worked=worked, max_tokens=_shot_tokens(job))


def _shot_tokens(job: Job) -> int:
    length = job.backbone.context_length
    return min(job.budget["shot_tokens"] or length, length)


def shots_that_fit(job: Job, limit: int) -> int:
    """The most worked examples with which no test row has to be cut to `limit` tokens; by bisection."""
    template, backbone = job.task.template, job.backbone
    plain = Encoder(template, backbone.tokenizer, 0)
    rows = sorted(job.task.test, key=lambda row: -len(plain.context(row).ids))[:1]
    room = job.budget["max_new_tokens"] if template.labels is None else None

    def fits(count: int) -> bool:
        worked = pick_shots(job.task.train, count, job.seed)
        encoder = Encoder(template, backbone.tokenizer, 0, None, worked)
        longest = max(len(answer) for answer in encoder.answers()) if room is None else room
        return all(len(encoder.context(row).ids) + longest <= limit for row in rows)

    low, high = 0, 1
    while high <= len(job.task.train) and fits(high):
        low, high = high, high * 2
    high = min(high, len(job.task.train) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    asked = job.budget["shots"]
    return low if asked is None else min(low, asked)


class Soft:
    """A soft prompt as `softprompt tune` makes it. kind: embedding or deep. behind: moved behind the last field."""

    def __init__(self, kind: str, behind: bool = False):
        self.kind, self.behind = kind, behind

    def why_not(self, job: Job) -> str:
        template = self._template(job)
        if template is None:
            return "the soft tokens cannot be moved behind the last field of a chat"
        if self.kind == "deep" and (template.soft_count > 1 or template.placement not in ("front", "behind")):
            return f"a deep prompt stands at the front or directly behind the text, not {template.placement}"
        return ""

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        from ..training.run import tune

        # What an earlier run has computed would be no fair start.
        given: dict[str, Any] = {"folds": 0, "text_cache": "memory", **job.settings, "kind": self.kind}
        if learning_rate:
            given["learning_rate"] = learning_rate
        config = job.tune_config(**given)
        clock = TextClock()

        def warn(event: dict[str, Any]) -> None:
            if event["event"] == "warning":
                job.tell(f"step {event['step']}: {event['text']}")

        result = tune(job.backbone, self._task(job), config, listen=(clock, warn))
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        prompt = result.prompt
        prompt.save(folder / "prompt")
        return Trained(
            parameters=trained_numbers(prompt, config.sink),
            steps=result.steps,
            examples=result.steps * min(config.batch_size, len(job.task.train)),
            seconds=result.seconds + clock.seconds,
            validation=_best(result.history, prompt.provenance["step"]),
            settings=config.model_dump(exclude_defaults=True)
            | {key: getattr(config, key) for key in ("kind", "tokens", "learning_rate", "init")},
        )

    def open(self, job: Job, folder: Path) -> Opened:
        vectors = load_prompt(folder / "prompt").vectors
        return Opened(job.backbone, vectors, template=self._template(job), max_tokens=job.budget["max_tokens"])

    def _template(self, job: Job) -> Template | None:
        return behind(job.task.template) if self.behind else job.task.template

    def _task(self, job: Job) -> Any:
        template = self._template(job)
        assert template is not None, "asked why_not before"
        return job.task.with_template(template)


def trained_numbers(prompt: SoftPrompt, sink: int) -> int:
    """How many numbers of a prompt are trained: all but the sink of a deep prompt at the front, if that has more."""
    rests = prompt.kind == "deep" and prompt.template is not None and prompt.template.placement == "front"
    moving = prompt.tokens - sink if rests and prompt.tokens > sink else prompt.tokens
    return prompt.vectors.numel() // prompt.tokens * moving


class TextClock:
    """Listens to a run: the seconds in which texts before the soft tokens were computed, before the first step."""

    def __init__(self) -> None:
        self.seconds, self._begun = 0.0, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._begun = time.perf_counter()
        elif event["event"] == "step" and self._begun:
            self.seconds = max(0.0, time.perf_counter() - self._begun - event["seconds"])
            self._begun = 0.0


def _best(history: list[dict[str, Any]], step: int) -> Validation | None:
    for event in history:
        if event["event"] == "validation" and event["step"] == step:
            return Validation(event["score"], event["loss"], event["metric"])
    return None
