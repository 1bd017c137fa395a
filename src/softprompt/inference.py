"""Use a tuned prompt: classes with probabilities, generated text, and the loss and gradient for whoever doubts us."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backbone import Backbone
from .computation import LossAndGradient, prompt_length
from .computation import loss_and_gradient as compute_loss_and_gradient
from .data import Split
from .encoding import Encoder
from .errors import ConfigError, DataError, TemplateError
from .evaluation.generation import Sampling
from .evaluation.runner import generate_texts, label_prior, label_scores, make_encoder, stream_texts
from .prompt import SoftPrompt
from .templates import Template

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Classified:
    """label: the most probable class. probabilities: class -> probability, in the template's order."""

    label: str
    probabilities: dict[str, float]


def _template(prompt: SoftPrompt, template: Template | None) -> Template:
    found = template or prompt.template
    if found is None:
        raise TemplateError("this prompt came without a template (it is from elsewhere); give input and target texts")
    return found


def _encoder(
    backbone: Backbone, prompt: SoftPrompt, rows: Sequence[Fields], template: Template | None, force: bool
) -> Encoder:
    backbone.check(prompt, force=force)
    encoder = make_encoder(backbone, _template(prompt, template), prompt.tokens)
    for number, row in enumerate(rows):
        missing = [name for name in encoder.template.fields if name not in row]
        if missing:
            raise DataError(
                f"row {number + 1} has no column '{missing[0]}' that the prompt's template needs; it has {sorted(row)}"
            )
    return encoder


def classify(
    backbone: Backbone,
    prompt: SoftPrompt | Sequence[SoftPrompt],
    rows: Iterable[Fields],
    *,
    template: Template | None = None,
    calibrate: bool = False,
    force: bool = False,
) -> list[Classified]:
    """The class of each row of fields, with the probabilities of all classes.

    prompt: several prompts of one task are asked together, and the mean of their probabilities decides (an ensemble).
    template: for a prompt that came without one. calibrate: see `evaluate`. Raises BackboneMismatchError,
    TemplateError (no template, or one without labels), DataError (a field is missing), ConfigError (no prompts).
    """
    given = list(rows)
    if not isinstance(prompt, SoftPrompt):
        return _classify_together(backbone, prompt, given, template, calibrate, force)
    encoder = _encoder(backbone, prompt, given, template, force)
    if encoder.template.labels is None:
        raise TemplateError("this prompt's task has no labels; use generate")
    if not given:
        return []
    contexts = [encoder.context(row).ids for row in given]
    scores = label_scores(backbone, encoder, contexts, prompt.vectors)
    if calibrate:
        scores = scores - label_prior(backbone, encoder, prompt.vectors)
    return _classified(encoder.template, torch.softmax(scores, dim=1))


def _classified(template: Template, probabilities: torch.Tensor) -> list[Classified]:
    classes = template.classes
    return [
        Classified(classes[int(each.argmax())], dict(zip(classes, each.tolist(), strict=True)))
        for each in probabilities
    ]


def _classify_together(
    backbone: Backbone,
    prompts: Sequence[SoftPrompt],
    rows: list[Fields],
    template: Template | None,
    calibrate: bool,
    force: bool,
) -> list[Classified]:
    from .evaluation.voting import mean_probabilities

    if not prompts:
        raise ConfigError("there are no prompts to let vote; give at least one")
    templates = [_encoder(backbone, each, rows, template, force).template for each in prompts]
    if any(each.labels is None or each.classes != templates[0].classes for each in templates):
        raise TemplateError("only prompts of tasks with the same labels can be asked together")
    if not rows:
        return []
    found = mean_probabilities(backbone, prompts, [dict(row) for row in rows], templates, calibrate)
    return _classified(templates[0], found)


def generate(
    backbone: Backbone,
    prompt: SoftPrompt,
    rows: Iterable[Fields],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    template: Template | None = None,
    force: bool = False,
) -> list[str]:
    """A generated text for each row of fields: greedy at temperature 0, else sampled with top_p and a seed.

    Batches and their order never change an answer. Raises as `classify`, and ConfigError for impossible settings.
    """
    given = list(rows)
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed)
    encoder = _encoder(backbone, prompt, given, template, force)
    return generate_texts(backbone, encoder, list(map(dict, given)), prompt.vectors, sampling) if given else []


def stream(
    backbone: Backbone,
    prompt: SoftPrompt,
    row: Fields,
    *,
    sampling: Sampling | None = None,
    template: Template | None = None,
    force: bool = False,
) -> Iterator[str]:
    """The generated text of one row, piece by piece as it comes; pieces are whole characters."""
    encoder = _encoder(backbone, prompt, [row], template, force)
    for _, piece in stream_texts(backbone, encoder, [dict(row)], prompt.vectors, sampling or Sampling()):
        yield piece


def loss_and_gradient(
    backbone: Backbone,
    split: Split,
    prompt: SoftPrompt | torch.Tensor,
    *,
    exact_reference: bool = False,
    micro_batch_tokens: int = 1024,
    max_tokens: int | None = None,
) -> LossAndGradient:
    """Cross-entropy summed over all label tokens of `split`, their number, and d loss / d vectors.

    prompt: a SoftPrompt, or vectors ([P, H], or [L, 2, K, P, D] for a deep prompt) of any precision. exact_reference:
    by the plain concatenation of every row.
    """
    vectors = prompt.vectors if isinstance(prompt, SoftPrompt) else prompt
    encoder = make_encoder(backbone, split.template, prompt_length(vectors), max_tokens)
    rows = [encoder.row(fields)[0] for fields in split]
    return compute_loss_and_gradient(
        backbone, rows, vectors, exact_reference=exact_reference, micro_batch_tokens=micro_batch_tokens
    )
