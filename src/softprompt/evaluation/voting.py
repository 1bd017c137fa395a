"""Several prompts of one task asked together: each text goes through the model once, in one batch for all of them.

Lester et al. 2021 (arXiv:2104.08691, section 6) tune prompts with different seeds and let the majority decide: an
ensemble costs one model and some more soft tokens. The rows of all members stand in one line. What they have in common
is computed once: constant text, and a text before the soft tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import Pass, StateCache, States
from ..backbone import Backbone
from ..computation import before_rows, embed_of_owners, is_deep, keep_texts, micro_batches, shared_states
from ..data import Split, Task
from ..encoding import Encoder
from ..errors import ConfigError, DataError
from ..placement import Row, in_line
from ..prompt import SoftPrompt
from ..templates import Template
from .metrics import ClassificationScores, classification_scores
from .runner import Progress, Report, constant_length, label_prior, make_encoder
from .scoring import LabelTree, label_tree, score_labels, tree_scores

Ids = tuple[int, ...]
ANY_SIZE = 1 << 50  # bytes: of the texts of one batch all are kept


@dataclass
class EnsembleReport:
    """What several prompts say about the same rows, each alone and together.

    members: the report of each. averaged: by the mean of their probabilities. majority: by their votes (a tie goes to
    the class with the higher mean probability). best: the member with the best validation score when it was tuned, None
    where that is not known.
    """

    members: list[Report]
    averaged: Report
    majority: ClassificationScores
    majority_predicted: list[str]
    best: int | None = None
    names: list[str] = field(default_factory=list)

    @property
    def mean_accuracy(self) -> float:
        """The mean of the members' accuracies."""
        return sum(report.accuracy for report in self.members) / len(self.members)

    @property
    def best_here(self) -> int:
        """The member with the highest accuracy on these very rows: chosen in hindsight, so its score is too high."""
        return max(range(len(self.members)), key=lambda i: (self.members[i].accuracy, -self.members[i].loss, -i))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; at the top the scores of the averaged probabilities."""
        each = [
            {"name": name, **report.to_dict(brief=True)} for name, report in zip(self.names, self.members, strict=True)
        ]
        return {
            **self.averaged.to_dict(),
            "majority": self.majority.to_dict(),
            "members": each,
            "mean_accuracy": self.mean_accuracy,
            "best": None if self.best is None else self.names[self.best],
            "best_here": self.names[self.best_here],
        }


def evaluate_ensemble(
    backbone: Backbone,
    data: Task | Split,
    prompts: Sequence[SoftPrompt],
    *,
    names: Sequence[str] = (),
    calibrate: bool = False,
    max_tokens: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> EnsembleReport:
    """Evaluate several prompts of one task with labels on a task's test split, or on a split, and let them vote.

    Where all prompts have one template the split's template is used, as `evaluate` does; else each prompt's own, which
    must have the same classes. Raises ConfigError (classes differ, no prompts), DataError (no rows, free text),
    BackboneMismatchError.
    """
    begun = time.perf_counter()
    split = data.test if isinstance(data, Task) else data
    templates = _templates(split, prompts)
    for prompt in prompts:
        backbone.check(prompt, force=force)
    if not len(split):
        raise DataError(f"the {split.name} split has no rows to evaluate on; give a file for it, or a share")
    raw, prior, cut = _scores(backbone, list(split), prompts, templates, max_tokens, calibrate, progress)
    seconds = time.perf_counter() - begun
    inputs = [split.template.without_soft().render_context(fields) for fields in split]
    report = _Reporter(split, inputs, cut, {"shots": 0, "prompt": True, "calibrated": calibrate}, seconds)
    adjusted = raw - prior
    probabilities = torch.softmax(adjusted, dim=2)  # [K, R, C]
    mixed = raw.logsumexp(dim=0) - math.log(len(prompts))  # of the mean probability
    predicted, shares = _majority(probabilities)
    majority = [report.classes[i] for i in predicted.tolist()]
    return EnsembleReport(
        members=[report(each, p) for each, p in zip(raw, probabilities, strict=True)],
        averaged=report(mixed, probabilities.mean(dim=0)),
        majority=classification_scores(split.labels, majority, shares.numpy(), report.classes),
        majority_predicted=majority,
        best=best_by_validation(prompts),
        names=list(names) or [str(number) for number in range(1, len(prompts) + 1)],
    )


def mean_probabilities(
    backbone: Backbone,
    prompts: Sequence[SoftPrompt],
    rows: Sequence[dict[str, Any]],
    templates: Sequence[Template],
    calibrate: bool = False,
) -> torch.Tensor:
    """The members' mean probability of each class for rows of fields: [R, C]."""
    raw, prior, _ = _scores(backbone, rows, prompts, templates, None, calibrate, None)
    return torch.softmax(raw - prior, dim=2).mean(dim=0)


def best_by_validation(prompts: Sequence[SoftPrompt]) -> int | None:
    """Which prompt had the best validation score when it was tuned (then: the lower loss); None if one has none."""
    found = [prompt.metrics.get("validation") or {} for prompt in prompts]
    scores = [each.get("accuracy", each.get("score")) for each in found]
    if any(score is None for score in scores):
        return None
    return min(range(len(prompts)), key=lambda i: (-float(scores[i] or 0), float(found[i].get("loss", 0.0)), i))


def _templates(split: Split, prompts: Sequence[SoftPrompt]) -> list[Template]:
    if not prompts:
        raise ConfigError("there are no prompts to let vote; name at least one")
    if split.template.labels is None:
        raise DataError("prompts can only vote on a task with labels; evaluate prompts of free text one by one")
    own = [prompt.template for prompt in prompts]
    alike = all(template == own[0] for template in own)
    templates = [split.template if alike or template is None else template for template in own]
    for template in templates:
        if template.classes != split.template.classes or template.label_field != split.template.label_field:
            raise ConfigError(
                "the prompts are of tasks with different classes and cannot vote: found "
                f"{', '.join(template.classes[:8]) or 'free text'} beside {', '.join(split.template.classes[:8])}; "
                "name prompts of one task"
            )
    return templates


@dataclass
class _Reporter:
    """Makes reports out of scores [R, C] about the rows of one split."""

    split: Split
    inputs: list[str]
    cut: int
    setting: dict[str, Any]
    seconds: float

    @property
    def classes(self) -> list[str]:
        return list(self.split.template.classes)

    def __call__(self, raw: torch.Tensor, probabilities: torch.Tensor) -> Report:
        true, classes = self.split.labels, self.classes
        right = torch.tensor([classes.index(label) for label in true])
        predicted = [classes[i] for i in probabilities.argmax(dim=1).tolist()]
        scores = classification_scores(true, predicted, probabilities.numpy(), classes)
        loss = float(-raw.gather(1, right[:, None]).mean())
        report = Report(scores, None, loss, true, predicted, self.inputs, probabilities, self.cut, self.seconds)
        report.setting = dict(self.setting)
        return report


def _majority(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, R, C] -> the class with most votes [R], and the share of the votes of each class [R, C]."""
    classes = probabilities.shape[2]
    votes = torch.nn.functional.one_hot(probabilities.argmax(dim=2), classes).sum(dim=0)  # [R, C]
    # A mean probability is at most one vote, and one whole vote only where all voted for that class anyway.
    return (votes + probabilities.mean(dim=0)).argmax(dim=1), votes.double() / len(probabilities)


# --- one batch for all members --------------------------------------------------------------------------------------


def _scores(
    backbone: Backbone,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[SoftPrompt],
    templates: Sequence[Template],
    max_tokens: int | None,
    calibrate: bool,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """log p of each label for each prompt and row [K, R, C], what calibration takes off [K, 1, C], rows cut.

    Prompts of one template, kind and length are asked in one batch; others after them.
    """
    groups: dict[Any, list[int]] = {}
    for index, (prompt, template) in enumerate(zip(prompts, templates, strict=True)):
        groups.setdefault((template, prompt.kind, prompt.tokens), []).append(index)
    raw = torch.empty(len(prompts), len(rows), len(templates[0].classes), dtype=torch.float64)
    prior = torch.zeros(len(prompts), 1, len(templates[0].classes), dtype=torch.float64)
    done, cut = 0, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done // len(groups), len(rows))

    for (template, _, tokens), members in groups.items():
        encoder = make_encoder(backbone, template, tokens, max_tokens)
        contexts = [encoder.context(fields) for fields in rows]
        cut = max(cut, sum(1 for context in contexts if context.cut))
        vectors = [prompts[index].vectors for index in members]
        raw[members] = member_scores(backbone, encoder, [c.ids for c in contexts], vectors, advance=advance)
        if calibrate:
            prior[members] = torch.stack([label_prior(backbone, encoder, each) for each in vectors])
    return raw, prior, cut


@torch.no_grad()
def member_scores(
    backbone: Backbone,
    encoder: Encoder,
    contexts: Sequence[Ids],
    members: Sequence[torch.Tensor],
    *,
    micro_batch_tokens: int = 1024,
    advance: Callable[[int], None] | None = None,
    texts: StateCache | None = None,
) -> torch.Tensor:
    """log p(label word c | context r with the soft prompt k): [K, R, C].

    members: K prompts of one kind and length. advance: called with contexts finished. texts: where states of texts
    before the soft tokens are kept; without it they are computed once for all members, batch by batch.
    """
    rows = [Row(tuple(ids), len(ids)) for ids in contexts]
    answers, done = encoder.answers(), advance or (lambda count: None)
    start = constant_length(encoder, rows)
    if not backbone.fast:
        ids = [row.ids for row in rows]
        alone = [score_labels(backbone, ids, answers, vectors, start=start) for vectors in members]
        done(len(rows))
        return torch.stack(alone)
    kept = texts if texts is not None and keep_texts(backbone, rows, start, texts) else None
    stack = torch.stack([vectors.to(backbone.device) for vectors in members])
    fronts = shared_states(backbone, rows[0].ids[:start], stack, backbone.states)
    tree = label_tree(answers)
    scores = torch.empty(len(members), len(rows), len(answers), dtype=torch.float64)
    places = {id(row): index for index, row in enumerate(rows)}
    for batch in micro_batches(rows, start, max(1, micro_batch_tokens // len(members)), extra=len(tree.tokens)):
        found = _batch_scores(backbone, batch, start, fronts, stack, tree, kept)
        scores[:, [places[id(row)] for row in batch]] = found.view(len(members), len(batch), -1)
        done(len(batch))
    return scores


def _batch_scores(
    backbone: Backbone,
    batch: list[Row],
    start: int,
    fronts: States,
    members: torch.Tensor,
    tree: LabelTree,
    texts: StateCache | None,
) -> torch.Tensor:
    """[K * R, C]: the rows of the first member, those of the second, and so on, in one line. fronts: what stands before
    the rows of each member (or, the same for all, of one)."""
    if texts is None:
        texts = StateCache(ANY_SIZE)
        keep_texts(backbone, batch, start, texts)
    rows = batch * len(members)
    owners = torch.arange(len(members), device=backbone.device).repeat_interleave(len(batch))
    front = fronts.of_rows(owners) if fronts.rows > 1 else fronts
    deep = members[owners] if is_deep(members) else None
    before, starts = before_rows(backbone, rows, start, front, deep, texts)
    line = in_line(rows, starts, backbone.device)
    passed = Pass(line.lengths, before, record=bool(tree.tokens), device=backbone.device)
    whose = owners.repeat_interleave(torch.tensor(line.lengths, device=backbone.device))
    embeddings = embed_of_owners(backbone, line.ids, whose, members)
    hidden = backbone.hidden(embeddings, line.positions, passed, line.scored)
    return tree_scores(backbone, hidden, passed, [len(row.ids) for row in rows], tree)
