"""`prune`: drop the soft tokens that do not matter, tune what is left briefly, and show the score against the length.

Which tokens matter is measured by leaving each out (importance.py), as XPrompt (Ma et al. 2022, arXiv:2210.04457) drops
tokens and rewinds; what is left is tuned on for some steps, because the tokens had learned to work together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..computation import prompt_length
from ..data import Task
from ..errors import ConfigError
from ..prompt import SoftPrompt
from .importance import Importance, importance
from .measuring import Paired, RowScores, paired, row_scores, without
from .plots import Figure

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Length:
    """A prompt of `tokens` tokens: which of the old ones were kept, how it scores at once and after tuning again.

    against: A is the whole prompt, B the better of both by its loss (among the labels). prompt: it.
    """

    tokens: int
    kept: tuple[int, ...]
    cut: RowScores
    tuned: RowScores | None
    against: Paired
    prompt: SoftPrompt

    @property
    def scores(self) -> RowScores:
        """Of the better of both."""
        return _better(self.cut, self.tuned)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "kept": list(self.kept),
            "cut": self.cut.to_dict(),
            "tuned": self.tuned.to_dict() if self.tuned else None,
            "against_whole": self.against.to_dict(),
        }


@dataclass(frozen=True)
class Pruned:
    """prompt: the shortest that is not worse. order: tokens, the most important first. lengths: longest first.

    test: the scores of the whole and of the chosen prompt on the task's test rows, None without any.
    """

    prompt: SoftPrompt
    whole: RowScores
    order: list[int]
    importance: Importance
    lengths: list[Length]
    chosen: int
    test: tuple[RowScores, RowScores, Paired] | None = None

    def picture(self) -> Figure:
        """The loss against the length, at once and after tuning again."""
        from .pictures import length_curve

        what = "loss" if self.whole.choices is None else "loss among the labels"
        whole = (len(self.order), self.whole.main_loss)
        cut = [whole, *((each.tokens, each.cut.main_loss) for each in self.lengths)]
        tuned = [(each.tokens, each.tuned.main_loss) for each in self.lengths if each.tuned]
        lines: dict[str, tuple[list[int], list[float], None]] = {
            name: ([x for x, _ in points], [y for _, y in points], None)
            for name, points in (("at once", cut), ("tuned again", tuned))
        }
        drawn = length_curve("lengths", lines, "soft tokens kept", what, "")
        assert drawn is not None
        return drawn

    def to_dict(self) -> dict[str, Any]:
        test = self.test
        return {
            "tokens": self.chosen,
            "whole": self.whole.to_dict(),
            "order": self.order,
            "importance": self.importance.of_token,
            "lengths": [length.to_dict() for length in self.lengths],
            "test": None
            if test is None
            else {"whole": test[0].to_dict(), "pruned": test[1].to_dict(), "difference": test[2].to_dict()},
        }


def prune(
    backbone: Backbone,
    task: Task,
    prompt: SoftPrompt,
    *,
    lengths: Sequence[int] | None = None,
    steps: int = 50,
    rows: int = 200,
    learning_rate: float | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Stage | None = None,
) -> Pruned:
    """Find the shortest part of `prompt` that scores no worse.

    Tokens are ranked by what leaving each out costs on up to `rows` validation rows; for each of `lengths` (default:
    3/4, 1/2, 1/4 and 1/8 of P) the most important ones are kept in their order, and tuned again for `steps` on the
    training rows (0: not at all) at `learning_rate` (default: half of the usual). Chosen is the shortest whose mean
    loss is not above that of the whole prompt by more than one standard error of their difference, else the whole.

    Raises ConfigError (lengths), DataError (no validation or training rows), BackboneMismatchError.
    """
    backbone.check(prompt)
    tokens = prompt_length(prompt.vectors)
    wanted = _lengths(lengths, tokens)
    if not len(task.validation):
        raise ConfigError("prune: no validation rows; give a file for them, or a share")
    sample = task.validation.take(rows, seed=seed)

    def stage(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    ranked = importance(
        backbone, sample, prompt.vectors, parts=("left_out",), max_tokens=max_tokens, progress=stage("importance")
    )
    costs = ranked.of_token
    order = sorted(range(tokens), key=lambda i: (-costs[i], i))
    found = []
    for size in wanted:
        kept = tuple(sorted(order[:size]))
        cut = replace(
            prompt, vectors=_vectors(backbone, prompt, kept), metrics={}, provenance=_made(prompt, kept, steps)
        )
        before = row_scores(
            backbone, sample, cut.vectors, max_tokens=max_tokens, progress=stage(f"{size} tokens, as they are")
        )
        after = None
        if steps:
            again = _tuned(backbone, task, cut, steps, learning_rate, batch_size, max_tokens, seed, stage)
            after = row_scores(
                backbone, sample, again.vectors, max_tokens=max_tokens, progress=stage(f"{size} tokens, tuned")
            )
            cut = again if _better(before, after) is after else cut
        found.append(Length(size, kept, before, after, paired(ranked.whole, _better(before, after)), cut))
    good = [each for each in found if _no_worse(each.against)]
    best = min(good, key=lambda each: each.tokens) if good else None
    chosen = best.prompt if best else prompt
    test = _test(backbone, task, prompt, chosen, max_tokens, stage("test")) if len(task.test) else None
    return Pruned(chosen, ranked.whole, order, ranked, found, best.tokens if best else tokens, test)


def _lengths(lengths: Sequence[int] | None, tokens: int) -> list[int]:
    if lengths is None:
        lengths = [tokens * share // 8 for share in (6, 4, 2, 1)]
        return sorted({size for size in lengths if 0 < size < tokens}, reverse=True)
    wrong = [size for size in lengths if not 1 <= size < tokens]
    if wrong or not lengths:
        raise ConfigError(
            f"lengths: expected numbers from 1 to {tokens - 1}, found {', '.join(map(str, wrong)) or 'none'}"
        )
    return sorted(set(lengths), reverse=True)


def _vectors(backbone: Backbone, prompt: SoftPrompt, kept: tuple[int, ...]) -> Any:
    vectors = without(backbone, prompt.vectors, kept)
    assert vectors is not None
    return vectors


def _better(cut: RowScores, tuned: RowScores | None) -> RowScores:
    return tuned if tuned is not None and tuned.main_loss <= cut.main_loss else cut


def _no_worse(against: Paired) -> bool:
    slack = against.error if against.error == against.error else 0.0
    return against.difference <= slack + 1e-9  # rounding


def _made(prompt: SoftPrompt, kept: tuple[int, ...], steps: int) -> dict[str, Any]:
    """The provenance of the whole prompt goes along: it says which data and model this one came from."""
    return {**prompt.provenance, "pruned": {"from_tokens": prompt.tokens, "kept": list(kept), "steps": steps}}


def _tuned(
    backbone: Backbone,
    task: Task,
    cut: SoftPrompt,
    steps: int,
    learning_rate: float | None,
    batch_size: int,
    max_tokens: int | None,
    seed: int,
    stage: Callable[[str], Callable[[int, int], None] | None],
) -> SoftPrompt:
    """The shorter prompt tuned again from where it is; validation during tuning is left to the scoring afterwards."""
    from ..training.config import TuneConfig
    from ..training.run import tune

    usual: float = TuneConfig.model_fields["learning_rate"].default
    told = stage(f"{cut.tokens} tokens, tuning")

    def listen(event: dict[str, Any]) -> None:
        if told is not None and event["event"] == "step":
            told(event["step"], steps)

    with tempfile.TemporaryDirectory(prefix="softprompt-prune-") as folder:
        start = cut.save(Path(folder) / "start")
        settings: dict[str, Any] = {"tokens": cut.tokens, "init": f"prompt:{start}", "kind": cut.kind, "steps": steps}
        settings |= {"batch_size": batch_size, "max_tokens": max_tokens, "seed": seed, "folds": 0}
        settings["learning_rate"] = learning_rate or usual / 2
        silent = replace(task, validation=replace(task.validation, rows=()))
        result = tune(backbone, silent, listen=listen, **settings)
    return replace(cut, vectors=result.prompt.vectors)


def _test(
    backbone: Backbone,
    task: Task,
    whole: SoftPrompt,
    chosen: SoftPrompt,
    max_tokens: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[RowScores, RowScores, Paired]:
    a, b = (
        row_scores(backbone, task.test, prompt.vectors, max_tokens=max_tokens, progress=progress)
        for prompt in (whole, chosen)
    )
    return a, b, paired(a, b)
