"""Several runs step by step: all ask for their gradients, and those that can share a pass are answered by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from ..backbone import Backbone
from ..computation import LossAndGradient
from ..shared_passes import losses_and_gradients
from .loop import Course, Question
from .sweep_trial import Trial


def worthwhile(backbone: Backbone) -> bool:
    """Whether runs are faster together. Not on a CPU, where the matrix products of one batch keep all cores at work: a
    pass of two trials takes as long as two passes (docs/log.md). An accelerator waits for its next operation."""
    return backbone.device.type != "cpu"


def turns(trials: Sequence[Trial], together: bool) -> list[list[Trial]]:
    """Which of `trials` are advanced together, group after group."""
    return [list(trials)] if together else [[trial] for trial in trials]


def advance(trials: Sequence[Trial], share: float, asked: Callable[[], bool]) -> None:
    """Train each of `trials`, which have one backbone, up to `share` of its steps or until `asked` says to stop. Their
    steps share passes; a loss that is not finite ends one trial and not the others."""
    backbone = trials[0].run.backbone
    with ExitStack() as stack:
        courses = [stack.enter_context(closing(trial.course(share, asked))) for trial in trials]
        waiting = _still_asking([(course, None) for course in courses])
        while waiting:
            answers = answer_all(backbone, [question for _, question in waiting])
            waiting = _still_asking([(course, found) for (course, _), found in zip(waiting, answers, strict=True)])


def _still_asking(told: Sequence[tuple[Course, Any]]) -> list[tuple[Course, Question]]:
    """The next question of each course that has not ended, told the answer to its last (None at its beginning)."""
    found = []
    for course, answer in told:
        try:
            found.append((course, course.send(answer)))
        except StopIteration:
            continue
    return found


def answer_all(backbone: Backbone, questions: Sequence[Question]) -> list[LossAndGradient]:
    """The answers to `questions`, in their order. Those of prompts of one shape behind the same first tokens share."""
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        begins = question.rows[0].ids[: question.start]
        alike = (begins, question.vectors.shape, id(question.cache), question.micro_batch_tokens)
        groups.setdefault(alike, []).append(number)
    answers: dict[int, LossAndGradient] = {}
    for numbers in groups.values():
        some = [questions[number] for number in numbers]
        found = losses_and_gradients(
            backbone,
            [question.rows for question in some],
            [question.vectors for question in some],
            micro_batch_tokens=some[0].micro_batch_tokens,
            start=some[0].start,
            cache=some[0].cache,
        )
        answers.update(zip(numbers, found, strict=True))
    return [answers[number] for number in range(len(questions))]
