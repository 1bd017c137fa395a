"""Start from another task's prompt: the idea of SPoT (Vu et al. 2022, arXiv:2110.07904).

SPoT picks the source by how similar the prompts of the two tasks are, which takes a tuned prompt of the new task first.
Here every candidate is simply tried: its loss on rows of the new task (the cross-task loss of `softprompt similarity`)
says how good a start it is, at the price of a short evaluation each, and the ordinary start is one of the candidates.
Of a library too large for that, prompts are put in groups of like ones (SPoT's pooled cosine): the middle one of each
is tried, then the others of the group that did best.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backbone import Backbone
from ..computation import deep_from_tokens, is_deep, prompt_length
from ..data import Split, Task
from ..errors import BackboneMismatchError, ConfigError, PromptFormatError
from ..evaluation.runner import evaluate_prompt
from ..fileformat import is_prompt_folder, load_prompt

log = logging.getLogger(__name__)
ROWS = 64  # of the new task that each candidate is tried on
MOST_TRIED = 16  # prompts; a larger library is tried by groups of like ones, at most half of it for the groups
AUTO = "auto:"


@dataclass(frozen=True)
class Candidate:
    """A possible start: where it is from, its vectors (already of the right length), its loss on the new task."""

    name: str
    vectors: torch.Tensor
    loss: float


def fitted(vectors: torch.Tensor, tokens: int) -> torch.Tensor:
    """`vectors` of a prompt of either kind repeated or cut to `tokens` tokens."""
    times = -(-tokens // prompt_length(vectors))
    if is_deep(vectors):
        return vectors.repeat(1, 1, 1, times, 1)[:, :, :, :tokens].clone()
    return vectors.repeat(times, 1)[:tokens].clone()


def best_start(
    backbone: Backbone, task: Task, library: str | Path, ordinary: torch.Tensor, max_tokens: int | None = None
) -> tuple[torch.Tensor, str]:
    """The start with the lowest loss on rows of `task`: a prompt of `library`, or `ordinary`; and why, in words.

    A deep prompt may start from an embedding prompt, by the states that the model gives it. Prompts of another model,
    deep ones where embeddings are tuned, and broken ones are passed over. Raises ConfigError if `library` is no folder.
    """
    folder = Path(library)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {library} of prompts to start from; name one, as init=auto:prompts")
    rows = (task.validation if len(task.validation) else task.train).take(ROWS, seed=0)
    tried = [Candidate("the ordinary start", ordinary, _loss(backbone, rows, ordinary, max_tokens))]
    found = [(path, _usable(backbone, path, ordinary)) for path in sorted(folder.iterdir()) if is_prompt_folder(path)]
    usable = [(str(path), vectors) for path, vectors in found if vectors is not None]
    tried += _try(backbone, rows, usable, max_tokens)
    best = min(tried, key=lambda each: each.loss)
    losses = ", ".join(f"{each.name} {each.loss:.3f}" for each in sorted(tried, key=lambda each: each.loss)[:4])
    sifted = f"; {len(usable)} prompts, by groups of like ones" if len(usable) >= len(tried) else ""
    return (
        best.vectors,
        f"{best.name}, the best of {len(tried)} starts on {len(rows)} rows of the task (loss: {losses}{sifted})",
    )


def _try(
    backbone: Backbone, rows: Split, usable: list[tuple[str, torch.Tensor]], max_tokens: int | None
) -> list[Candidate]:
    """Candidates with their loss: all of them, or of more than MOST_TRIED the middle ones of groups of like prompts,
    then those of the best group that are most like its middle one."""

    def tried(number: int) -> Candidate:
        name, vectors = usable[number]
        return Candidate(name, vectors, _loss(backbone, rows, vectors, max_tokens))

    if len(usable) <= MOST_TRIED:
        return [tried(number) for number in range(len(usable))]
    from ..inspection.grouping import groups

    alike = groups([vectors for _, vectors in usable], MOST_TRIED // 2)
    middle = [tried(group[0]) for group in alike]
    best = min(range(len(alike)), key=lambda number: middle[number].loss)
    return middle + [tried(number) for number in alike[best][1 : 1 + MOST_TRIED - len(middle)]]


def _usable(backbone: Backbone, path: Path, like: torch.Tensor) -> torch.Tensor | None:
    try:
        prompt = load_prompt(path)
        backbone.check(prompt)
    except (PromptFormatError, BackboneMismatchError) as error:
        log.info("not started from %s: %s", path, error)
        return None
    vectors = fitted(prompt.vectors, prompt_length(like))
    if is_deep(like) and not is_deep(vectors):
        vectors = deep_from_tokens(backbone, vectors)
    return vectors.to(like.dtype) if vectors.ndim == like.ndim else None


def _loss(backbone: Backbone, rows: Split, vectors: torch.Tensor, max_tokens: int | None) -> float:
    return evaluate_prompt(backbone, rows, vectors, max_tokens=max_tokens, text_scores=False).loss
