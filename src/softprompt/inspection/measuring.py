"""What a prompt does on rows, row by row, so that two prompts can be compared on the same rows (paired)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backbone import Backbone
from ..computation import (
    contexts_hidden,
    is_deep,
    micro_batches,
    plain_answers,
    plain_batches,
    prompt_length,
    shared_states,
)
from ..data import Split
from ..encoding import Encoder
from ..errors import DataError
from ..evaluation.intervals import bootstrap, sign_test
from ..evaluation.runner import label_scores, make_encoder
from ..losses import PIECE, log_probabilities
from ..placement import Row, shared_length

Array = NDArray[Any]
Progress = Callable[[int, int], None]  # rows done, rows in all
MICRO_BATCH = 1024


@dataclass(frozen=True)
class RowScores:
    """losses: [N], -log p(right answer | context) of each row in nats, for free text per token of the answer.

    right: [N] of bool, whether the answer was right; None for free text. predicted: the classes, [] for free text.
    choices: [N], -log p(right label | context, it is one of the labels): what is left of the loss when the model need
    not know that it has to answer with a label. It is what accuracy follows; None for free text.
    """

    losses: Array
    right: Array | None
    predicted: list[str]
    choices: Array | None = None

    @property
    def loss(self) -> float:
        """Mean of `losses`, as the evaluator gives it."""
        return float(self.losses.mean())

    @property
    def main(self) -> Array:
        """What prompts are compared by: the loss among the labels, for free text the loss."""
        return self.losses if self.choices is None else self.choices

    @property
    def main_loss(self) -> float:
        return float(self.main.mean())

    @property
    def accuracy(self) -> float | None:
        return None if self.right is None else float(self.right.mean())

    def to_dict(self) -> dict[str, Any]:
        labels = None if self.choices is None else self.main_loss
        return {"rows": len(self.losses), "loss": self.loss, "label_loss": labels, "accuracy": self.accuracy}


def row_scores(
    backbone: Backbone,
    split: Split,
    vectors: Tensor | None,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> RowScores:
    """The loss of each row of `split`, and for classes whether it was answered rightly.

    vectors: [P, H], a deep prompt [L, 2, K, P, D], or None for the template as plain text. Raises DataError (no rows).
    """
    if not len(split):
        raise DataError(f"the {split.name} split has no rows to look at; give a file for it, or a share")
    encoder = make_encoder(backbone, split.template, prompt_length(vectors), max_tokens)
    if split.template.labels is None:
        return RowScores(_text_losses(backbone, encoder, split, vectors, progress), None, [])
    classes = list(split.template.classes)
    contexts = [encoder.context(fields).ids for fields in split]
    scores = label_scores(backbone, encoder, contexts, vectors, progress)  # [N, C]
    true = [classes.index(label) for label in split.labels]
    guesses = scores.argmax(dim=1).tolist()
    scores, place = scores.double(), torch.tensor(true)[:, None]
    losses, choices = (-part.gather(1, place)[:, 0].numpy() for part in (scores, scores.log_softmax(dim=1)))
    right = np.array([guess == label for guess, label in zip(guesses, true, strict=True)])
    return RowScores(losses, right, [classes[i] for i in guesses], choices)


def _text_losses(
    backbone: Backbone, encoder: Encoder, split: Split, vectors: Tensor | None, progress: Progress | None
) -> Array:
    """Mean loss over the tokens of each row's answer: [N]."""
    rows = [encoder.row(fields)[0] for fields in split]
    found: dict[int, float] = {}
    for batch, values in _answer_log_probabilities(backbone, rows, vectors):
        at = 0
        for row in batch:
            size = len(row.ids) - row.answer
            found[id(row)] = -float(values[at : at + size].mean())
            at += size
        if progress:
            progress(len(found), len(rows))
    return np.array([found[id(row)] for row in rows])


@torch.no_grad()
def _answer_log_probabilities(backbone: Backbone, rows: Sequence[Row], vectors: Tensor | None) -> Any:
    """Yield (rows of a batch, log-probabilities of all tokens of their answers in order, float64)."""
    if not backbone.fast:
        for batch in plain_batches(backbone, rows, MICRO_BATCH):
            yield batch, log_probabilities(*plain_answers(backbone, batch, vectors)).double().cpu()
        return
    start = shared_length(rows)
    shared = shared_states(backbone, rows[0].ids[:start], vectors, backbone.states)
    at_once = max(1, PIECE // backbone.vocab_size)
    for batch in micro_batches(rows, start, MICRO_BATCH):
        hidden, line, _, _ = contexts_hidden(backbone, batch, start, shared, vectors)
        pieces = zip(hidden.split(at_once), line.targets.split(at_once), strict=True)
        yield batch, torch.cat([log_probabilities(backbone.head(h), t).double().cpu() for h, t in pieces])


@dataclass(frozen=True)
class Paired:
    """How A and B differ on the same rows; a difference is B minus A.

    difference, interval: mean difference of the loss (of that among the labels, where there are labels) and its 95 %
    bootstrap interval over rows (None: not known). error: standard error of that mean. answer_difference, answer_error:
    the same of the loss of the whole answer, which also counts knowing that a label is wanted. only_a, only_b: rows
    that only one of both answers rightly. p: McNemar's exact two-sided test of those; None for free text.
    accuracy_difference: of the shares answered rightly.
    """

    rows: int
    difference: float
    error: float
    interval: tuple[float, float] | None
    only_a: int | None = None
    only_b: int | None = None
    accuracy_difference: float | None = None
    p: float | None = None
    answer_difference: float = math.nan
    answer_error: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "answer_loss_difference": self.answer_difference,
            "answer_loss_difference_error": self.answer_error,
            "loss_difference": self.difference,
            "loss_difference_error": self.error,
            "loss_difference_interval": self.interval,
            "only_a_right": self.only_a,
            "only_b_right": self.only_b,
            "accuracy_difference": self.accuracy_difference,
            "mcnemar_p": self.p,
        }


def paired(a: RowScores, b: RowScores, *, seed: int = 0) -> Paired:
    """Compare two results on the same rows in the same order. Raises ValueError for a different number of rows."""
    if len(a.losses) != len(b.losses):
        raise ValueError(f"paired scores need the same rows, found {len(a.losses)} and {len(b.losses)}")
    same = (a.choices is None) == (b.choices is None)
    gaps = b.main - a.main if same else b.losses - a.losses
    whole = b.losses - a.losses
    found = Paired(
        len(gaps),
        float(gaps.mean()),
        _standard_error(gaps),
        bootstrap(gaps, seed=seed),
        answer_difference=float(whole.mean()),
        answer_error=_standard_error(whole),
    )
    if a.right is None or b.right is None:
        return found
    only_a, only_b = int((a.right & ~b.right).sum()), int((b.right & ~a.right).sum())
    change = (only_b - only_a) / len(gaps)
    return replace(found, only_a=only_a, only_b=only_b, accuracy_difference=change, p=mcnemar(only_a, only_b))


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test (McNemar 1947; Dietterich 1998): are both as often right?

    Rows that both answer rightly, or both wrongly, say nothing. Of the others, were A and B alike, each would fall to
    either side like a coin: p = min(1, 2 * P(Binomial(a + b, 1/2) <= min(a, b))). 1 where there are no such rows.
    """
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    return sign_test(fewer, tosses)


def without(backbone: Backbone, vectors: Tensor, kept: Sequence[int]) -> Tensor | None:
    """The prompt that has only the tokens `kept`, in that order; None if that is none.

    The keys of a deep prompt are turned to their new positions where the model turns keys by position.
    """
    if not kept:
        return None
    if not is_deep(vectors):
        return vectors[list(kept)]
    chosen = vectors[:, :, :, list(kept)].clone()
    from ..attention import States
    from ..rotary import can_move, moved

    if not can_move(backbone):
        return chosen
    for new, old in enumerate(kept):
        if new == old:
            continue
        one = chosen[:, :, :, new : new + 1].to(backbone.device)
        states = States([layer[0][None] for layer in one], [layer[1][None] for layer in one])
        turned = moved(backbone, states, torch.tensor([new - old], device=backbone.device))
        chosen[:, 0, :, new] = torch.stack([key[0, :, 0] for key in turned.keys]).to(chosen)
    return chosen
