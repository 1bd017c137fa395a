"""One step of many requests: their next tokens in one line through the model, and the logits that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention import States
from ..backbone import Backbone
from ..computation import deep_states
from ..losses import PIECE
from ..placement import embed_with_soft
from ..rotary import moved
from .attending import Several, Single, hidden_states
from .running import Running
from .slots import Pool, Slot, SlotCache


@dataclass(eq=False)
class Piece:
    """So many next tokens of a request; with the tree of its labels behind them if they end its context.

    begin: where they stand in the line.
    """

    row: Running
    count: int
    begin: int = -1

    @property
    def ends(self) -> bool:
        return self.row.done + self.count == len(self.row.ids)

    @property
    def nodes(self) -> tuple[int, ...]:
        return self.row.tree.tokens if self.row.tree and self.ends else ()

    @property
    def slot(self) -> Slot:
        assert self.row.slot is not None
        return self.row.slot


def skip_deep(backbone: Backbone, row: Running, slots: SlotCache) -> None:
    """Put a deep prompt that comes next into the slot: its keys and values are there, nothing is computed."""
    assert row.slot is not None and row.request.vectors is not None
    place = torch.tensor([row.done], device=backbone.device)
    states = moved(backbone, deep_states(backbone, row.request.vectors), place)
    row.slot = slots.reserve(row.slot, row.done + states.size)
    row.slot.write(States(states.keys, states.values))


def compute(backbone: Backbone, pieces: list[Piece], slots: SlotCache) -> dict[int, torch.Tensor]:
    """Run the pieces through the model and into their slots.

    Returns, by request, the hidden states of the tokens whose logits are wanted: [1 + nodes, H] where a piece ends its
    request's context (the last token's, then those of the nodes of the label tree). A request that writes has one.
    """
    for piece in pieces:
        wanted = piece.row.done + piece.count + len(piece.nodes)
        piece.row.slot = slots.reserve(piece.slot, wanted)
    parts, line = _arrange(pieces)
    ids = torch.tensor([token for piece in line for token in _ids(piece)], device=backbone.device)
    positions = torch.tensor([place for piece in line for place in _positions(piece)], device=backbone.device)
    hidden = hidden_states(backbone, _embed(backbone, ids, line), positions, parts)
    found = {}
    for piece in line:
        piece.slot.length += piece.count
        if piece.slot.length == len(piece.row.ids):
            last = piece.begin + piece.count - 1
            nodes = len(piece.row.tree.tokens) if piece.row.tree else 0
            found[piece.row.id] = hidden[last : last + 1 + nodes]
    return found


def _arrange(pieces: list[Piece]) -> tuple[list[Single | Several], list[Piece]]:
    """The parts that attention computes, and the pieces in the order of the line."""
    single: dict[Pool, list[Piece]] = {}
    several = []
    for piece in pieces:
        if piece.count == 1 and not piece.nodes:
            single.setdefault(piece.slot.pool, []).append(piece)
        else:
            several.append(piece)
    parts: list[Single | Several] = []
    line: list[Piece] = []
    at = 0
    for pool, group in single.items():
        group.sort(key=lambda piece: piece.slot.row)
        parts.append(Single(pool, [piece.slot for piece in group], at))
        for piece in group:
            piece.begin, at = at, at + 1
        line += group
    for piece in several:
        tree = piece.row.tree
        nodes = (tree.parents, tree.depths) if tree and piece.nodes else ()
        parts.append(Several(piece.slot, at, piece.count, *nodes))
        piece.begin, at = at, at + piece.count + len(piece.nodes)
        line.append(piece)
    return parts, line


def _ids(piece: Piece) -> list[int]:
    done = piece.row.done
    return [*piece.row.ids[done : done + piece.count], *piece.nodes]


def _positions(piece: Piece) -> list[int]:
    end = piece.row.done + piece.count
    depths = piece.row.tree.depths if piece.row.tree and piece.nodes else ()
    return [*range(piece.row.done, end), *(end + depth for depth in depths)]


def _embed(backbone: Backbone, ids: torch.Tensor, line: Sequence[Piece]) -> torch.Tensor:
    """Embeddings of the line, soft tokens from the vectors of each request's own prompt: [N, H]."""
    embeddings: torch.Tensor = backbone.embed(ids.clamp(min=0))
    for piece in line:
        row = piece.row
        if row.deep or row.request.vectors is None or row.done >= len(row.request.ids):
            continue
        own = ids[piece.begin : piece.begin + piece.count]
        if any(token < 0 for token in row.ids[row.done : row.done + piece.count]):
            vectors = row.request.vectors.to(backbone.device)
            embeddings[piece.begin : piece.begin + piece.count] = embed_with_soft(own, vectors, backbone.embed)
    return embeddings


def logits_in_pieces(backbone: Backbone, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of several [n, H] at once: a product with the whole vocabulary is faster the fewer times it is done."""
    most = max(1, PIECE // backbone.vocab_size)
    found: list[torch.Tensor] = []
    group: list[torch.Tensor] = []
    for index, each in enumerate(states):
        group.append(each)
        full = sum(map(len, group)) >= most or index == len(states) - 1
        if full:
            sizes = list(map(len, group))
            whole = torch.cat([backbone.head(part) for part in torch.cat(group).split(most)])
            found += whole.split(sizes)
            group = []
    return found


def label_scores(row: Running, logits: torch.Tensor) -> tuple[float, ...]:
    """log p(label | context) of each label from logits [1 + nodes, V], natural logarithm."""
    assert row.tree is not None
    precise = logits.to(torch.promote_types(torch.float32, logits.dtype))
    pairs = [pair for path in row.tree.steps for pair in path]
    nodes = torch.tensor([node + 1 for node, _ in pairs], device=logits.device)
    tokens = torch.tensor([token for _, token in pairs], device=logits.device)
    each = (precise[nodes, tokens] - precise.logsumexp(dim=-1)[nodes]).cpu().double()
    return tuple(float(part.sum()) for part in each.split([len(path) for path in row.tree.steps]))
