"""Evaluate a prompt, or the same template without one, on a split: what it says, and how sure the figure is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import StateCache
from ..backbone import Backbone
from ..computation import answer_log_probability, keep_texts, prompt_length
from ..data import Split, Task
from ..encoding import Encoder
from ..errors import ConfigError, DataError
from ..placement import Row, shared_length
from ..prompt import SoftPrompt
from ..templates import Template
from .generation import Sampling, TextStream, generate_tokens
from .metrics import ClassificationScores, TextScores, classification_scores, text_scores
from .scoring import score_labels

Ids = tuple[int, ...]
Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass
class Report:
    """What was measured on a split.

    scores: for a task with labels; texts: for free text (None until asked for). loss: mean over rows of the negative
    log-probability of the right answer (natural logarithm, summed over its tokens; for free text per token).
    true, predicted: one per row. probabilities: [N, C] over the labels, None for free text. cut_rows: rows shortened.
    """

    scores: ClassificationScores | None
    texts: TextScores | None
    loss: float
    true: list[str]
    predicted: list[str]
    inputs: list[str]
    probabilities: torch.Tensor | None = None
    cut_rows: int = 0
    seconds: float = 0.0
    setting: dict[str, Any] = field(default_factory=dict)

    def _classes(self) -> ClassificationScores:
        if self.scores is None:
            raise AttributeError("a task of free text has no accuracy; see .texts")
        return self.scores

    @property
    def accuracy(self) -> float:
        return self._classes().accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson)."""
        return self._classes().interval

    @property
    def macro_f1(self) -> float:
        return self._classes().macro_f1

    @property
    def balanced_accuracy(self) -> float:
        return self._classes().balanced_accuracy

    @property
    def confusion(self) -> list[list[int]]:
        return self._classes().confusion

    def to_dict(self, brief: bool = False) -> dict[str, Any]:
        """Plain data. brief: the headline figures only."""
        scores = (self.scores or self.texts).to_dict() if (self.scores or self.texts) else {}  # type: ignore[union-attr]
        if brief:
            keys = ("accuracy", "interval", "macro_f1", "majority_score", "rows", "exact_match", "rouge_l", "bleu")
            scores = {key: scores[key] for key in keys if key in scores}
        return {
            **scores,
            "loss": self.loss,
            "cut_rows": self.cut_rows,
            "seconds": round(self.seconds, 2),
            **self.setting,
        }

    def mistakes(self, most: int = 20) -> list[dict[str, Any]]:
        """The most confident mistakes: text, true, predicted, probability of what was predicted."""
        if self.probabilities is None:
            return []
        best = self.probabilities.max(dim=1).values.tolist()
        wrong = [i for i, (t, p) in enumerate(zip(self.true, self.predicted, strict=True)) if t != p]
        wrong.sort(key=lambda i: -best[i])
        return [
            {"text": self.inputs[i], "true": self.true[i], "predicted": self.predicted[i], "probability": best[i]}
            for i in wrong[:most]
        ]

    def examples(self, most: int = 10) -> list[dict[str, Any]]:
        """The first rows of a free-text task: text, expected, predicted."""
        if self.scores is not None or not self.predicted:
            return []
        rows = zip(self.inputs, self.true, self.predicted, strict=True)
        return [{"text": text, "true": true, "predicted": said} for text, true, said in list(rows)[:most]]


def evaluate(
    backbone: Backbone,
    data: Task | Split,
    prompt: SoftPrompt | None = None,
    *,
    shots: int = 0,
    examples: Split | None = None,
    calibrate: bool = False,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Evaluate `prompt` on a task's test split, or on a split; without a prompt the same template as plain text.

    shots: so many worked examples before each text, taken from `examples` (default: the task's training split) with
    `seed`, classes in turn. calibrate: divide each label's probability by what the label gets for the text "N/A" (Zhao
    et al. 2021, arXiv:2102.09690). sampling: how free text is generated. force: use a prompt of another model of the
    same width. Raises BackboneMismatchError, DataError, ConfigError.
    """
    split = data.test if isinstance(data, Task) else data
    if prompt is not None:
        backbone.check(prompt, force=force)
    if shots and examples is None:
        if not isinstance(data, Task):
            raise ConfigError("shots need examples: give the task, or a split to take them from")
        examples = data.train
    worked = pick_shots(examples, shots, seed) if shots and examples is not None else []
    return evaluate_prompt(
        backbone,
        split,
        None if prompt is None else prompt.vectors,
        worked=worked,
        calibrate=calibrate,
        sampling=sampling,
        max_tokens=max_tokens,
        progress=progress,
    )


def pick_shots(examples: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows by seed; classes take turns, so that few examples show them all."""
    rows = list(examples)
    if count > len(rows):
        raise DataError(f"{count} shots were asked for, there are only {len(rows)} training rows")
    random.Random(seed).shuffle(rows)
    label = examples.template.label_field
    if label is None:
        return rows[:count]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row[label]), []).append(row)
    picked: list[dict[str, Any]] = []
    while len(picked) < count:
        for name in sorted(groups):
            if groups[name] and len(picked) < count:
                picked.append(groups[name].pop())
    return picked


def make_encoder(
    backbone: Backbone,
    template: Template,
    tokens: int,
    max_tokens: int | None = None,
    worked: Sequence[dict[str, Any]] = (),
) -> Encoder:
    """An encoder for `tokens` soft tokens (0: the template as plain text), with worked examples before the text."""
    limit = min(max_tokens or backbone.context_length, backbone.context_length)
    return Encoder(template, backbone.tokenizer, tokens, limit, worked)


def constant_length(encoder: Encoder, rows: Sequence[Row]) -> int:
    """How many leading tokens are the same whatever the fields say: what is computed once and kept.

    Found by encoding two made-up rows that differ from the first letter on; it holds for any rows of the template.
    """
    fields = encoder.template.fields
    made_up = [encoder.context(dict.fromkeys(fields, text)).ids for text in ("0", "x")]
    return shared_length([*rows, *(Row(ids, len(ids)) for ids in made_up)])


def evaluate_prompt(
    backbone: Backbone,
    split: Split,
    vectors: torch.Tensor | None,
    *,
    worked: Sequence[dict[str, Any]] = (),
    calibrate: bool = False,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    text_scores: bool = True,
    progress: Progress | None = None,
    texts: StateCache | None = None,
) -> Report:
    """`evaluate` for bare vectors (None: no prompt). text_scores False: of free text only the loss.

    texts: where the states of texts before the soft tokens are kept for the next time the same rows are scored.
    """
    if not len(split):
        raise DataError(f"the {split.name} split has no rows to evaluate on; give a file for it, or a share")
    begun = time.perf_counter()
    encoder = make_encoder(backbone, split.template, prompt_length(vectors), max_tokens, worked)
    contexts = [encoder.context(fields) for fields in split]
    inputs = [split.template.without_soft().render_context(fields) for fields in split]
    setting = {"shots": len(worked), "prompt": vectors is not None, "calibrated": calibrate}
    if split.template.labels is not None:
        report = _evaluate_classes(
            backbone, split, encoder, [c.ids for c in contexts], vectors, calibrate, progress, texts
        )
    else:
        sampling = (sampling or Sampling()) if text_scores else None
        report = _evaluate_text(backbone, split, encoder, vectors, sampling, progress, texts)
    report.inputs, report.setting = inputs, setting
    report.cut_rows = sum(1 for c in contexts if c.cut)
    report.seconds = time.perf_counter() - begun
    return report


def label_scores(
    backbone: Backbone,
    encoder: Encoder,
    contexts: Sequence[Ids],
    vectors: torch.Tensor | None,
    progress: Progress | None = None,
    texts: StateCache | None = None,
) -> torch.Tensor:
    """log p(label words | context): [N, C]. texts: see `evaluate_prompt`."""
    rows = [Row(tuple(ids), len(ids)) for ids in contexts]
    start = constant_length(encoder, rows)
    kept = texts if texts is not None and keep_texts(backbone, rows, start, texts) else None
    answers = encoder.answers()
    finished = 0

    def advance(count: int) -> None:
        nonlocal finished
        finished += count
        if progress:
            progress(finished, len(rows))

    ids = [row.ids for row in rows]
    return score_labels(backbone, ids, answers, vectors, start=start, advance=advance, texts=kept)


def label_prior(backbone: Backbone, encoder: Encoder, vectors: torch.Tensor | None) -> torch.Tensor:
    """log p(label words | the context of the text "N/A"): [1, C] (Zhao et al. 2021, arXiv:2102.09690)."""
    empty = encoder.context(dict.fromkeys(encoder.template.fields, "N/A")).ids
    return score_labels(backbone, [empty], encoder.answers(), vectors)


def _evaluate_classes(
    backbone: Backbone,
    split: Split,
    encoder: Encoder,
    contexts: Sequence[Ids],
    vectors: torch.Tensor | None,
    calibrate: bool,
    progress: Progress | None,
    texts: StateCache | None,
) -> Report:
    classes = list(split.template.classes)
    raw = label_scores(backbone, encoder, contexts, vectors, progress, texts)
    scores = raw - label_prior(backbone, encoder, vectors) if calibrate else raw
    probabilities = torch.softmax(scores, dim=1)
    true = split.labels
    predicted = [classes[i] for i in scores.argmax(dim=1).tolist()]
    right = torch.tensor([classes.index(label) for label in true])
    loss = float(-raw.gather(1, right[:, None]).mean())
    measured = classification_scores(true, predicted, probabilities.numpy(), classes)
    return Report(measured, None, loss, true, predicted, [], probabilities)


def _evaluate_text(
    backbone: Backbone,
    split: Split,
    encoder: Encoder,
    vectors: torch.Tensor | None,
    sampling: Sampling | None,
    progress: Progress | None,
    texts: StateCache | None,
) -> Report:
    rows = [encoder.row(fields)[0] for fields in split]
    kept = texts if texts is not None and keep_texts(backbone, rows, shared_length(rows), texts) else None
    loss = answer_loss(backbone, rows, vectors, kept)
    true = [split.template.render_target(fields).strip() for fields in split]
    if sampling is None:
        return Report(None, None, loss, true, [], [])
    said = generate_texts(backbone, encoder, list(split), vectors, sampling, progress)
    column = split.references
    references = [list(row[column]) if column else [target] for row, target in zip(split, true, strict=True)]
    bits = loss / float(torch.log(torch.tensor(2.0)))
    return Report(None, text_scores([text.strip() for text in said], references, bits), loss, true, said, [])


@torch.no_grad()
def answer_loss(
    backbone: Backbone, rows: Sequence[Row], vectors: torch.Tensor | None, texts: StateCache | None = None
) -> float:
    """Mean over all answer tokens of -log p(token | what stands before it), natural logarithm."""
    total = answer_log_probability(backbone, rows, vectors, cache=texts)
    return -total / sum(len(row.ids) - row.answer for row in rows)


def generate_texts(
    backbone: Backbone,
    encoder: Encoder,
    rows: Sequence[dict[str, Any]],
    vectors: torch.Tensor | None,
    sampling: Sampling,
    progress: Progress | None = None,
) -> list[str]:
    """One generated text a row."""
    texts = ["" for _ in rows]
    begun: set[int] = set()
    for index, piece in stream_texts(backbone, encoder, rows, vectors, sampling):
        texts[index] += piece
        begun.add(index)
        if progress:
            progress(len(begun), len(rows))
    return texts


def stream_texts(
    backbone: Backbone,
    encoder: Encoder,
    rows: Sequence[dict[str, Any]],
    vectors: torch.Tensor | None,
    sampling: Sampling,
) -> Any:
    """Yield (row, new text) as it comes; what was held back (see TextStream) is yielded at the end."""
    streams = [TextStream(backbone.tokenizer, sampling.stop) for _ in rows]
    # Room for the answer, but never by cutting more than half of what there is to read.
    room = min(sampling.max_new_tokens, (encoder.max_tokens or backbone.context_length) // 2)
    contexts = [encoder.context(fields, room).ids for fields in rows]
    start = constant_length(encoder, [Row(ids, len(ids)) for ids in contexts])
    tokens = generate_tokens(backbone, contexts, vectors, sampling, ends=end_tokens(backbone, encoder), start=start)
    stopped: bool | None = None
    while True:
        try:
            index, token = tokens.send(stopped)  # type: ignore[attr-defined]
        except StopIteration:
            break
        piece = streams[index].add(token)
        stopped = streams[index].stopped
        if piece:
            yield index, piece
    for index, stream in enumerate(streams):
        if piece := stream.finish():
            yield index, piece


def end_tokens(backbone: Backbone, encoder: Encoder) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the generation config's, and what the template trains as the end."""
    found = {backbone.tokenizer.eos_token_id, *encoder.end[-1:]}
    configured = getattr(backbone.model.generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return sorted(token for token in found if token is not None)
