"""`inspect`: everything that can be said of one prompt with what is at hand. Looking never crashes: what cannot be told
is left out, and a note says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..data import Split
from ..errors import SoftPromptError
from ..fileformat import load_prompt
from ..prompt import SoftPrompt, by_token
from . import words as meaning
from .attending import Attention, answer_attention
from .deep import DeepView, look_inside
from .history import Array, at_steps, thin, token_series
from .importance import Importance, importance
from .measuring import Progress
from .nearest import MEASURES, Lengths, Neighbour, movement, nearest_tokens, vocabulary_lengths
from .projection import Projection, project
from .starting import initial_vectors, run_events

ROWS, NEIGHBOURS = 100, 5
MOST_STEPS = 400  # of the gradients in the JSON
Stage = Callable[[str, int, int], None]  # what is measured, rows done, rows in all


@dataclass
class Inspection:
    """What was seen of a prompt; a part is None or empty where it could not be, and `notes` say why.

    norms: [P]. near: by measure, P lists of neighbours. yardsticks: what is near, by measure. moved: distance and
    cosine from the start of each token. start: how the start is known. begun: the word nearest to each token's start.
    events: of the run. deep: of a deep prompt.
    """

    name: str
    prompt: SoftPrompt
    notes: list[str] = field(default_factory=list)
    norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    lengths: Lengths | None = None
    near: dict[str, list[list[Neighbour]]] = field(default_factory=dict)
    yardsticks: dict[str, meaning.Yardstick] = field(default_factory=dict)
    vocabulary: meaning.Vocabulary | None = None
    clusters: meaning.Clusters | None = None
    initial: Tensor | None = None
    start: str = ""
    begun: list[str] = field(default_factory=list)
    moved: list[tuple[float, float | None]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    importance: Importance | None = None
    attention: Attention | None = None
    projection: Projection | None = None
    deep: DeepView | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        from dataclasses import asdict

        prompt = self.prompt
        return {
            "name": self.name,
            "kind": prompt.kind,
            "tokens": prompt.tokens,
            "width": prompt.width,
            "base_model": prompt.base_model or None,
            "template": prompt.template.to_dict() if prompt.template is not None else None,
            "metrics": prompt.metrics,
            "notes": self.notes,
            "norms": self.norms.tolist(),
            "vocabulary_norms": self.lengths._asdict() if self.lengths else None,
            "nearest": {m: [[word._asdict() for word in row] for row in near] for m, near in self.near.items()},
            "yardsticks": {measure: asdict(found) for measure, found in self.yardsticks.items()},
            "words": self.vocabulary.to_dict() if self.vocabulary else None,
            "clusters": asdict(self.clusters) if self.clusters else None,
            "start": self.start or None,
            "started_as": self.begun,
            "movement": [{"distance": d, "cosine": c} for d, c in self.moved],
            "importance": self.importance.to_dict() if self.importance else None,
            "attention": self.attention.to_dict() if self.attention else None,
            "gradients": self._gradients(),
            "deep": self.deep.to_dict() if self.deep else None,
            "projection": self.projection.to_dict() if self.projection else None,
        }

    def gradient_history(self) -> tuple[Array, Array]:
        """(steps [S], gradient norm of each soft token [S, P]) as the run wrote them; S is 0 without a run."""
        return token_series(at_steps(self.events, "step"), "token_gradient_norms", self.prompt.tokens)

    def _gradients(self) -> dict[str, Any] | None:
        """Means over neighbouring steps where there are very many."""
        steps, norms = thin(*self.gradient_history(), MOST_STEPS)
        plain = [[None if math.isnan(value) else value for value in row] for row in norms.tolist()]
        return {"steps": [int(step) for step in steps], "norms": plain} if len(steps) else None

    def save(self, path: str | Path) -> Path:
        """Write the report: one HTML file that needs nothing else. Raises OutputError."""
        from .inspect_page import write_inspections

        return write_inspections(path, [self])


def inspect(
    prompt: SoftPrompt | str | Path,
    backbone: Backbone | None = None,
    data: Split | None = None,
    *,
    run: str | Path | None = None,
    name: str = "",
    neighbours: int = NEIGHBOURS,
    rows: int = ROWS,
    attention: bool = True,
    changes: Sequence[str] = ("left_out", "first", "shuffled"),
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Stage | None = None,
) -> Inspection:
    """Look into a prompt, or a prompt folder, with what there is.

    backbone: for the nearest words (its embedding table; no forward pass) and everything below. data: rows, of which
    `rows` are drawn by `seed` to measure how much each token matters and where the answer looks; both run the model.
    run: the run folder, for the gradients and the vectors before tuning. changes: which of left_out, first and shuffled
    to measure, () for none. progress: called with (what, rows done, rows in all).

    Never raises for what is missing or does not fit; `notes` tell. Raises PromptFormatError for a folder that holds no
    prompt. The measures are defined in docs/inspect.md.
    """
    if not isinstance(prompt, SoftPrompt):
        name = name or Path(prompt).name
        prompt = load_prompt(prompt)
    found = Inspection(name or "prompt", prompt, norms=by_token(prompt.vectors).norm(dim=1))
    folder = Path(run) if run is not None else None
    found.events = run_events(folder)
    usable = _fits(found, backbone)
    table = backbone.embedding_table() if backbone is not None and prompt.kind == "embedding" and usable else None
    found.initial, found.start = initial_vectors(prompt, table, backbone, folder)
    if found.initial is None:
        found.notes.append(f"movement from the start: {found.start}")
        found.start = ""
    sample = data.take(rows, seed=seed) if data is not None else None
    found.moved = movement(prompt.vectors, found.initial)
    if prompt.kind == "embedding":
        _attempt(found, "projection", lambda: _project(found, table, backbone))
        if table is not None and backbone is not None:
            _look_at_words(found, table, backbone.tokenizer, neighbours, data)
    else:
        _attempt(found, "layers", lambda: _look_at_layers(found, backbone if usable else None, neighbours))
    if sample is None or backbone is None or not usable:
        found.notes.append("importance and attention: no rows or no model to measure them with")
        return found
    _measure(found, backbone, sample, attention, changes, max_tokens, seed, progress)
    return found


def _attempt(found: Inspection, what: str, look: Callable[[], None]) -> None:
    """One part of the view; a failure is noted and costs nothing else."""
    try:
        look()
    except SoftPromptError as error:
        found.notes.append(f"{what}: {error}")
    except Exception as error:  # other people's prompts and models: a part that fails must not cost the others
        found.notes.append(f"{what}: failed ({type(error).__name__}: {' '.join(str(error).split())})")


def _fits(found: Inspection, backbone: Backbone | None) -> bool:
    """Whether the model can be used with this prompt; another model of the same width can, and it is noted."""
    if found.prompt.template is None:
        found.notes.append("template: the prompt came without one")
    if not found.prompt.provenance:
        found.notes.append("provenance: how it was made is not recorded")
    if backbone is None:
        found.notes.append("nearest words: the model was not given")
        return False
    try:
        backbone.check(found.prompt, force=True)
    except SoftPromptError as error:
        found.notes.append(f"the model does not fit: {error}")
        return False
    if found.prompt.fingerprint and found.prompt.fingerprint != backbone.fingerprint:
        found.notes.append(f"it was tuned for another model of the same width ({found.prompt.base_model or 'unnamed'})")
    return True


def _look_at_words(found: Inspection, table: Tensor, tokenizer: Any, k: int, data: Split | None) -> None:
    vectors = found.prompt.vectors

    def look() -> None:
        found.lengths = vocabulary_lengths(table)
        for measure in MEASURES:
            found.near[measure] = nearest_tokens(vectors, table, tokenizer, k, measure)
            stick = meaning.yardstick(vectors, table, tokenizer, measure)
            if stick is not None:
                found.yardsticks[measure] = stick
        near = found.near["cosine"]
        if found.moved and found.initial is not None:
            begun = nearest_tokens(found.initial, table, tokenizer, 1)
            found.begun = [row[0].text if row else "" for row in begun]
        found.vocabulary = meaning.vocabulary(near, found.prompt, table, tokenizer, found.initial, data)
        found.clusters = meaning.clusters(near, table, tokenizer)

    _attempt(found, "nearest words", look)


def _project(found: Inspection, table: Tensor | None, backbone: Backbone | None) -> None:
    shown = {found.name: found.prompt.vectors}
    if found.moved and found.initial is not None:
        shown["its start"] = found.initial
    found.projection = project(shown, table, backbone.tokenizer if backbone is not None else None)


def _look_at_layers(found: Inspection, backbone: Backbone | None, k: int) -> None:
    found.deep = look_inside(found.prompt.vectors, found.initial, backbone, k, found.notes)


def _measure(
    found: Inspection,
    backbone: Backbone,
    sample: Split,
    attention: bool,
    changes: Sequence[str],
    max_tokens: int | None,
    seed: int,
    progress: Stage | None,
) -> None:
    vectors = found.prompt.vectors

    def stage(what: str) -> Progress | None:
        if progress is None:
            return None
        told = progress
        return lambda done, total: told(what, done, total)

    def changed() -> None:
        found.importance = importance(
            backbone,
            sample,
            vectors,
            parts=changes,
            max_tokens=max_tokens,
            seed=seed,
            progress=stage("importance"),
        )

    def looked() -> None:
        found.attention = answer_attention(
            backbone, sample, vectors, max_tokens=max_tokens, progress=stage("attention")
        )

    if changes:
        _attempt(found, "importance", changed)
    if attention:
        _attempt(found, "attention", looked)
