"""How alike the prompts of a library are: SPoT's measures, matching tokens, nearest words, loss on each other's rows.

SPoT (Vu et al. 2022, arXiv:2110.07904, section 3) takes the similarity of task prompts for the similarity of tasks, and
finds with it the prompt to start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..backbone import Backbone
from ..data import Split
from ..errors import ConfigError, SoftPromptError
from ..prompt import SoftPrompt, by_token
from .measuring import row_scores
from .nearest import nearest_tokens
from .words import nearness

Array = NDArray[Any]
MEASURES = {
    "pooled": "cosine of the mean vectors (SPoT)",
    "tokens": "mean cosine over all pairs of tokens (SPoT)",
    "matched": "mean cosine of the tokens, each matched with its best partner",
    "words": "nearest words in common, as a share of all (Jaccard)",
}
Told = Callable[[int, int], None]


@dataclass
class Similarity:
    """matrices: [N, N] by measure, NaN where two prompts cannot be compared. order: the rows as the clusters have them.

    loss: [N, N] or None, the mean loss of prompt i on the rows of task j. left_out: prompts that could not be read, or
    notes on what is missing, with the reason.
    """

    names: list[str]
    matrices: dict[str, Array]
    order: list[int]
    loss: Array | None = None
    accuracy: Array | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def nearest(self, name: str, measure: str = "matched") -> list[tuple[str, float]]:
        """The other prompts from the most to the least alike. Raises ConfigError for a name or measure not there."""
        if name not in self.names:
            raise ConfigError(f"no prompt '{name}' was compared; there are {', '.join(self.names)}")
        if measure not in self.matrices:
            raise ConfigError(f"measure: expected {', '.join(self.matrices)}, found '{measure}'")
        at = self.names.index(name)
        row = self.matrices[measure][at]
        found = [(other, float(row[j])) for j, other in enumerate(self.names) if j != at and not math.isnan(row[j])]
        return sorted(found, key=lambda pair: -pair[1])

    def to_dict(self) -> dict[str, Any]:
        tables = {name: _plain(matrix) for name, matrix in self.matrices.items()}
        return {
            "prompts": self.names,
            "order": self.order,
            "measures": tables,
            "loss": None if self.loss is None else _plain(self.loss),
            "accuracy": None if self.accuracy is None else _plain(self.accuracy),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }


def similarity(
    prompts: str | Path | Mapping[str, SoftPrompt] | Sequence[SoftPrompt],
    backbone: Backbone | None = None,
    *,
    data: Mapping[str, Split] | None = None,
    words: int = 10,
    progress: Told | None = None,
) -> Similarity:
    """Compare prompts: a library folder, a mapping of names to prompts, or prompts.

    backbone: for the overlap of the `words` nearest words (also needed for `data`). data: rows of some of the tasks by
    the prompt's name; each prompt is then scored on each of them, with that task's own template. progress: called with
    (rows scored, rows in all). Raises ConfigError: no prompts, data without a backbone.
    """
    found, left_out = _collect(prompts)
    if not found:
        raise ConfigError("no prompts to compare" + "".join(f"; {name}: {why}" for name, why in left_out))
    if data and backbone is None:
        raise ConfigError("the loss of one prompt on another one's rows needs the model: give a backbone")
    names = list(found)
    flat = [by_token(prompt.vectors).float() for prompt in found.values()]
    alike = _comparable(list(found.values()))
    matrices = {
        "pooled": pooled_matrix(flat, alike),
        "tokens": _pairs(flat, alike, lambda a, b: float(nearness(a, b, "cosine").nanmean())),
        "matched": _pairs(flat, alike, matched),
    }
    if backbone is not None:
        matrices["words"] = _word_overlap(backbone, list(found.values()), words)
    made = Similarity(names, matrices, cluster(matrices["matched"]), left_out=left_out)
    if data and backbone is not None:
        made.loss, made.accuracy = _crossed(backbone, found, data, left_out, progress)
    return made


def _collect(prompts: Any) -> tuple[dict[str, SoftPrompt], list[tuple[str, str]]]:
    if isinstance(prompts, Mapping):
        return dict(prompts), []
    if not isinstance(prompts, (str, Path)):
        return {f"prompt {i}": prompt for i, prompt in enumerate(prompts, 1)}, []
    from ..library import list_prompts

    if not Path(prompts).is_dir():
        raise ConfigError(f"no folder {prompts}; expected a folder of prompts")
    found: dict[str, SoftPrompt] = {}
    left_out = []
    for each in list_prompts(prompts):
        try:
            found[each["name"]] = SoftPrompt.load(each["path"])
        except SoftPromptError as error:
            left_out.append((each["name"], str(error)))
    return found, left_out


def _comparable(prompts: Sequence[SoftPrompt]) -> Callable[[int, int], bool]:
    def alike(i: int, j: int) -> bool:
        a, b = prompts[i], prompts[j]
        same = not a.fingerprint or not b.fingerprint or a.fingerprint == b.fingerprint
        return a.kind == b.kind and by_token(a.vectors).shape[1] == by_token(b.vectors).shape[1] and same

    return alike


def _pairs(
    flat: Sequence[Tensor], alike: Callable[[int, int], bool], measure: Callable[[Tensor, Tensor], float]
) -> Array:
    matrix = np.full((len(flat), len(flat)), np.nan)
    for i in range(len(flat)):
        for j in range(i, len(flat)):
            if alike(i, j):
                matrix[i, j] = matrix[j, i] = measure(flat[i], flat[j])
    return matrix


def pooled_matrix(flat: Sequence[Tensor], alike: Callable[[int, int], bool] = lambda i, j: True) -> Array:
    """Cosine of the mean vectors of each pair (SPoT): tokens [P, H] of each prompt -> [N, N], NaN where not alike."""
    means = [tokens.mean(dim=0) for tokens in flat]
    return _pairs(means, alike, _cosine)


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else math.nan


def matched(a: Tensor, b: Tensor) -> float:
    """Mean cosine over min(P, Q) pairs of tokens [P, H], [Q, H], paired so that it is largest (Kuhn 1955).

    1 for equal prompts, also when their tokens stand in another order.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = nearness(a, b, "cosine").nan_to_num(-1.0).double().numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return float(cosines[rows, columns].mean())


def _word_overlap(backbone: Backbone, prompts: Sequence[SoftPrompt], k: int) -> Array:
    """|A and B| / |A or B| of the sets of the k words nearest to each token, by cosine: [N, N]."""
    table = backbone.embedding_table()
    sets: list[set[int] | None] = []
    for prompt in prompts:
        if prompt.vectors.ndim != 2 or prompt.width != table.shape[1]:
            sets.append(None)
            continue
        near = nearest_tokens(prompt.vectors, table, backbone.tokenizer, k)
        sets.append({word.id for row in near for word in row})
    matrix = np.full((len(sets), len(sets)), np.nan)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            if a is not None and b is not None and (a or b):
                matrix[i, j] = len(a & b) / len(a | b)
    return matrix


def _crossed(
    backbone: Backbone,
    prompts: Mapping[str, SoftPrompt],
    data: Mapping[str, Split],
    left_out: list[tuple[str, str]],
    progress: Told | None,
) -> tuple[Array, Array]:
    """Loss and accuracy of prompt i on the rows of task j, with the template of task j: [N, N], NaN without rows."""
    names = list(prompts)
    loss, accuracy = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    total, done = len(names) * sum(len(split) for split in data.values()), 0
    for j, task in enumerate(names):
        if task not in data:
            continue
        for i, name in enumerate(names):
            told = None if progress is None else _shifted(progress, done, total)
            try:
                backbone.check(prompts[name])
                scores = row_scores(backbone, data[task], prompts[name].vectors, progress=told)
                loss[i, j] = scores.loss
                accuracy[i, j] = math.nan if scores.accuracy is None else scores.accuracy
            except SoftPromptError as error:
                left_out.append((f"{name} on {task}", str(error)))
            done += len(data[task])
    return loss, accuracy


def _shifted(progress: Told, done: int, total: int) -> Told:
    return lambda rows, _: progress(done + rows, total)


def cluster(matrix: Array) -> list[int]:
    """Rows in the order of the leaves of average linkage (Sokal and Michener 1958) over 1 - similarity."""
    if len(matrix) < 3:
        return list(range(len(matrix)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.where(np.isnan(matrix), 2.0, 1 - matrix)
    distance = np.clip((distance + distance.T) / 2, 0, 2)
    np.fill_diagonal(distance, 0.0)
    return [int(i) for i in leaves_list(linkage(squareform(distance, checks=False), "average"))]


def _plain(matrix: Array) -> list[list[float | None]]:
    return [[None if math.isnan(value) else float(value) for value in row] for row in matrix]
