"""The log-probability of each label word given each text, with everything shared that rows or labels have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..attention import Pass, StateCache, States
from ..backbone import Backbone
from ..computation import contexts_hidden, known_tokens, micro_batches, plain_answers, plain_batches, shared_states
from ..losses import PIECE, log_probabilities
from ..placement import Row, shared_length

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LabelTree:
    """The tokens of all label words as one tree, so that what labels have in common is computed once.

    parents: for each node (a token that is followed by another one in some label) the node before it, -1 at the root.
    tokens, depths: of the nodes. steps: for each label the pairs (node or -1, next token) whose log-probabilities add
    up to the label's.
    """

    tokens: Ids
    parents: Ids
    depths: Ids
    steps: tuple[tuple[tuple[int, int], ...], ...]


def label_tree(answers: Sequence[Ids]) -> LabelTree:
    """Build the tree of label words; each is at least one token long."""
    nodes: dict[Ids, int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    steps = []
    for answer in answers:
        path: list[tuple[int, int]] = []
        at = -1
        for depth, token in enumerate(answer):
            path.append((at, token))
            if depth == len(answer) - 1:
                break
            if answer[: depth + 1] not in nodes:
                nodes[answer[: depth + 1]] = len(tokens)
                tokens.append(token)
                parents.append(at)
                depths.append(depth)
            at = nodes[answer[: depth + 1]]
        steps.append(tuple(path))
    return LabelTree(tuple(tokens), tuple(parents), tuple(depths), tuple(steps))


@torch.no_grad()
def score_labels(
    backbone: Backbone,
    contexts: Sequence[Ids],
    answers: Sequence[Ids],
    vectors: torch.Tensor | None,
    *,
    start: int | None = None,
    micro_batch_tokens: int = 1024,
    exact_reference: bool = False,
    advance: Callable[[int], None] | None = None,
    texts: StateCache | None = None,
) -> torch.Tensor:
    """log p(answer c | context r), summed over the tokens of the answer, natural logarithm: float [R, C].

    start: tokens at the front that every context has in common; by default what these contexts have in common.
    exact_reference: every context with every answer by plain concatenation. advance: called with rows finished.
    texts: where `keep_texts` has put the texts before the soft tokens.
    """
    rows = [Row(tuple(ids), len(ids)) for ids in contexts]
    done = advance or (lambda count: None)
    if exact_reference or not backbone.fast:
        return _plain_scores(backbone, rows, answers, vectors, micro_batch_tokens, done)
    tree = label_tree(answers)
    start = shared_length(rows) if start is None else start
    shared = shared_states(backbone, rows[0].ids[:start], vectors, backbone.states)
    scores = torch.empty(len(rows), len(answers), dtype=torch.float64)
    places = {id(row): index for index, row in enumerate(rows)}
    known = known_tokens(start, vectors, texts)
    for batch in micro_batches(rows, start, micro_batch_tokens, extra=len(tree.tokens), known=known):
        where = [places[id(row)] for row in batch]
        scores[where] = _batch_scores(backbone, batch, start, shared, vectors, tree, texts)
        done(len(batch))
    return scores


def _batch_scores(
    backbone: Backbone,
    batch: list[Row],
    start: int,
    shared: States,
    vectors: torch.Tensor | None,
    tree: LabelTree,
    texts: StateCache | None,
) -> torch.Tensor:
    hidden, _, rows, _ = contexts_hidden(backbone, batch, start, shared, vectors, texts, record=bool(tree.tokens))
    return tree_scores(backbone, hidden, rows, [len(row.ids) for row in batch], tree)


def tree_scores(
    backbone: Backbone, hidden: torch.Tensor, rows: Pass, ends: Sequence[int], tree: LabelTree
) -> torch.Tensor:
    """log p of each label after each row of a pass: [R, C]. hidden: [R, H], what predicts the token after a context;
    rows: the pass that gave it, recorded where labels have several tokens; ends: tokens of each context."""
    states = [hidden[:, None]]  # [R, 1, H]: what predicts the first token of each label
    if tree.tokens:
        count = len(ends)
        ids = torch.tensor(tree.tokens * count, device=backbone.device)
        depths = torch.tensor(tree.depths, device=backbone.device)
        before = [*rows.before, rows.states()]
        branches = Pass([len(tree.tokens)] * count, before, device=backbone.device, parents=tree.parents)
        positions = (torch.tensor(ends, device=backbone.device)[:, None] + depths).flatten()
        states.append(backbone.hidden(backbone.embed(ids), positions, branches).view(count, len(tree.tokens), -1))
    return _sum_steps(backbone, torch.cat(states, dim=1), tree)


def _sum_steps(backbone: Backbone, states: torch.Tensor, tree: LabelTree) -> torch.Tensor:
    """states [R, 1 + nodes, H] -> [R, C]. The head is applied to few rows at a time."""
    pairs = sorted({pair for path in tree.steps for pair in path})
    column = {pair: index for index, pair in enumerate(pairs)}
    nodes = torch.tensor([node + 1 for node, _ in pairs], device=states.device)
    tokens = torch.tensor([token for _, token in pairs], device=states.device)
    at_once = max(1, PIECE // (backbone.vocab_size * states.shape[1]))
    found = []
    for piece in states.split(at_once):
        logits = backbone.head(piece).to(torch.promote_types(torch.float32, piece.dtype))  # [r, 1 + nodes, V]
        chosen = logits[:, nodes, tokens] - logits.logsumexp(dim=-1)[:, nodes]
        found.append(chosen.cpu().double())
    each = torch.cat(found)  # [R, pairs]
    return torch.stack([each[:, [column[pair] for pair in path]].sum(dim=1) for path in tree.steps], dim=1)


def _plain_scores(
    backbone: Backbone,
    rows: list[Row],
    answers: Sequence[Ids],
    vectors: torch.Tensor | None,
    budget: int,
    done: Callable[[int], None],
) -> torch.Tensor:
    scores = torch.empty(len(rows), len(answers), dtype=torch.float64)
    for index, row in enumerate(rows):
        whole = [Row(row.ids + answer, row.answer) for answer in answers]
        column = {id(each): c for c, each in enumerate(whole)}
        for batch in plain_batches(backbone, whole, budget):
            each = log_probabilities(*plain_answers(backbone, batch, vectors)).cpu().double()
            sizes = [len(one.ids) - one.answer for one in batch]
            for one, part in zip(batch, each.split(sizes), strict=True):
                scores[index, column[id(one)]] = part.sum()
        done(1)
    return scores
