"""Time to a validation accuracy: our deep suffix over kept texts, and PEFT's prompt tuning with the Trainer."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from softprompt.backbone import PRECISIONS
from softprompt.data import Task
from softprompt.demo_data import movie_reviews
from softprompt.encoding import Encoder

from .compare import alone
from .sides import Made, Setting, load_ours, right_padded
from .suffix_sides import BEHIND, FRONT, PEFT_RATE, template_of

GOAL = 0.83
TRAIN, VALIDATION = 1000, 300
# Settings of `softprompt.tune` for the goal, all others its defaults; --set changes them.
OURS: dict[str, Any] = {
    "input": BEHIND,
    "kind": "deep",
    "tokens": 20,
    "train": TRAIN,
    "batch_size": 16,
    "validate_every": 20,
    "text_cache": "memory",  # nothing of an earlier run
}
PEFT_TEXT = "Classify the movie review as positive or negative. Sentiment of the review: positive or negative?"
PEFT = {"tokens": 20, "batch_size": 8, "epochs": 3, "learning_rate": PEFT_RATE}


class Enough(Exception):
    """Ends a run from inside: the goal is reached, or the time is up."""


class Watch:
    """The validations of a run by the clock, until one reaches the goal or the time is up."""

    def __init__(self, limit: float):
        self.begun, self.limit = time.perf_counter(), limit
        self.found: list[dict[str, float]] = []
        self.texts = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def validated(self, accuracy: float, step: int) -> None:
        self.found.append({"seconds": round(self.seconds, 1), "step": step, "accuracy": round(accuracy, 4)})
        if accuracy >= GOAL:
            raise Enough

    def __call__(self, event: dict[str, Any]) -> None:
        """What `softprompt.tune` tells."""
        if event["event"] == "texts":
            self.texts = self.seconds
        if event["event"] == "validation":
            self.validated(event["score"], event["step"])
        if self.seconds > self.limit:
            raise Enough

    def told(self, step: int, rows: int) -> dict[str, Any]:
        best = max((each["accuracy"] for each in self.found), default=None)
        reached = best is not None and best >= GOAL
        return {
            "reached_after_s": self.found[-1]["seconds"] if reached else None,
            "seconds": round(self.seconds, 1),
            "best_accuracy": best,
            "steps": step,
            "rows_seen": rows,
            "validations": self.found,
        }


def ours(setting: Setting) -> Made:
    import softprompt as sp

    backbone, more = load_ours(setting), dict(setting.more)
    data = movie_reviews(train=int(more.pop("train")), validation=VALIDATION, test=2)
    task = Task.from_rows(data.train, data.validation, [], template_of(str(more.pop("input"))))
    limit = more.pop("limit")

    def run(number: int) -> tuple[float, Any]:
        watch, steps = Watch(limit), [0]

        def listen(event: dict[str, Any]) -> None:
            steps[0] = max(steps[0], event["step"])
            watch(event)

        with contextlib.suppress(Enough):
            sp.tune(backbone, task, listen=listen, validation_rows=VALIDATION, **more)
        told = watch.told(steps[0], steps[0] * int(more["batch_size"]))
        return 0.0, {**told, "texts_s": round(watch.texts, 1)}

    return backbone.model, run, {}


def peft(setting: Setting) -> Made:
    """PEFT as its guide has it: text to start from, AdamW at 3e-2 falling linearly, transformers' Trainer."""
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more, data = setting.more, movie_reviews(train=TRAIN, validation=VALIDATION, test=2)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=PRECISIONS[setting.precision]).to(setting.device)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=PEFT_TEXT,
        num_virtual_tokens=setting.tokens,
        tokenizer_name_or_path=setting.folder,
    )
    model = get_peft_model(base, config).to(setting.device)
    encoder = Encoder(template_of(FRONT), tokenizer, setting.tokens)
    rows, held = ([encoder.row(r)[0] for r in some] for some in (data.train, data.validation))
    words = [answer[0] for answer in encoder.answers()]

    def run(number: int) -> tuple[float, Any]:
        watch = Watch(more["limit"])
        trainer = _trainer(model, rows, setting, lambda: _accuracy(model, held, words, setting), watch)
        with contextlib.suppress(Enough):
            trainer.train()
        step = trainer.state.global_step
        if not watch.found or watch.found[-1]["step"] < step:  # how far it came when its time was up
            seconds = round(watch.seconds, 1)
            watch.found.append({"seconds": seconds, "step": step, "accuracy": _accuracy(model, held, words, setting)})
        return 0.0, watch.told(step, step * PEFT["batch_size"])

    return base, run, {}


def _trainer(model: Any, rows: Sequence[Any], setting: Setting, score: Callable[[], float], watch: Watch) -> Any:
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % max(1, state.max_steps // 8) == 0:
                watch.validated(score(), state.global_step)
            if watch.seconds > watch.limit:
                raise Enough

    given = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="softprompt-goal-"),
        per_device_train_batch_size=PEFT["batch_size"],
        num_train_epochs=PEFT["epochs"],
        learning_rate=PEFT["learning_rate"],
        lr_scheduler_type="linear",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=setting.device == "cpu",
        seed=0,
    )

    def collate(batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        return right_padded(batch, setting.tokens, "cpu")

    return Trainer(model=model, args=given, train_dataset=list(rows), data_collator=collate, callbacks=[Look()])


@torch.no_grad()
def _accuracy(model: Any, rows: Sequence[Any], words: Sequence[int], setting: Setting) -> float:
    """By the first token of the label words, from logits at the last token of each context."""
    model.eval()
    right = 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for i in range(0, len(ordered), 16):
        some = ordered[i : i + 16]
        batch = right_padded(some, setting.tokens, setting.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, each in zip(some, logits, strict=True):
            said = words[int(each[row.answer - 1, list(words)].argmax())]
            right += said == row.ids[row.answer]
    model.train()
    return right / len(rows)


def goal_figures(args: argparse.Namespace, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides, one after the other, each until it is there or its time is up."""
    chosen = {**OURS, **settings(args.set), "limit": args.limit}
    say(f"goal: accuracy {GOAL} on {VALIDATION} validation reviews, ours, for at most {args.limit:.0f} s ...")
    bare = Setting(folder, args.precision, args.device, int(chosen["tokens"]), args.threads, (), more=chosen)
    mine, _ = alone(ours, bare, [0])
    say(f"goal: {brief(mine[0].array)}; now PEFT with its Trainer, for at most {args.limit:.0f} s ...")
    other = Setting(folder, args.precision, args.device, PEFT["tokens"], args.threads, (), more={"limit": args.limit})
    theirs, _ = alone(peft, other, [0])
    say(f"goal: PEFT: {brief(theirs[0].array)}")
    return {
        "accuracy": GOAL,
        "target_s": 60,
        "validation_rows": VALIDATION,
        "settings": chosen,
        "peft_settings": PEFT,
        "softprompt": mine[0].array,
        "peft-prompt": theirs[0].array,
    }


def brief(found: dict[str, Any]) -> str:
    reached = found["reached_after_s"]
    if reached is not None:
        return f"reached after {reached} s, {found['rows_seen']} rows"
    return f"not reached in {found['seconds']} s, {found['rows_seen']} rows; best {found['best_accuracy']}"


def settings(given: Sequence[str]) -> dict[str, Any]:
    """name=value as numbers where they are numbers. SystemExit for anything else than name=value."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise SystemExit(f"--set {each}: expected name=value")
        found[name] = _number(value)
    return found


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
