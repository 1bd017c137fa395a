"""Attention over rows of different lengths that share what stands before them: the one layer that must know of rows.

All other layers of a transformer treat each token alone, so the tokens of all rows of a batch can stand in one line
[1, N, H] with no padding at all. Only attention has to know which token belongs to which row. transformers lets a model
call an attention function registered by name; the one here computes, for every row r,

    keys and values seen by r  =  [ pieces that stand before r, one after the other | own tokens of r, causal ]

A piece is the same for all rows and computed once (a constant text, the soft prompt), or belongs to a row (a text that
no soft token precedes, computed once for ever). What all rows share can also be computed in the same pass, at the
beginning of the line (`lead`). Softmax over the joined scores is exactly the attention over the concatenation; nothing
is approximate.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from .line_attention import APART, Block, Call, Places, alike, attend

NAME = "softprompt_rows"
# Scores of one layer that are kept for the backward pass: 16 MiB in float32. Longer rows take fused attention.
LONG = 1 << 22


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that this function does not compute; the plain path does."""


@dataclass
class States:
    """Keys and values of C tokens in each of L layers, as cached by the model (after rotary embedding).

    keys, values: L tensors [R, K, C, D]; R rows (1 where all rows share them), K key-value heads, D head size.
    lengths: how many of the C tokens are real in each row (rows are padded on the right); None: all of them.
    packed: [2 L, R, K, C, D] of which keys, then values are parts, where they are; copied with one call, not 2 L.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: torch.Tensor | None = None
    packed: torch.Tensor | None = None

    @staticmethod
    def of_packed(packed: torch.Tensor, lengths: torch.Tensor | None = None) -> States:
        """States that are parts of one tensor [2 L, R, K, C, D]: keys of all layers, then values."""
        keys, values = packed.split(len(packed) // 2)
        return States(list(keys.unbind()), list(values.unbind()), lengths, packed)

    @property
    def size(self) -> int:
        """C, tokens of the longest row."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def rows(self) -> int:
        """R."""
        return self.keys[0].shape[0] if self.keys else 1

    @property
    def shared(self) -> bool:
        """Whether these are of one row, the same for all."""
        return self.rows == 1

    def of_rows(self, index: torch.Tensor) -> States:
        """The states of some of the rows."""
        lengths = None if self.lengths is None else self.lengths[index]
        return States([k[index] for k in self.keys], [v[index] for v in self.values], lengths)

    def expanded(self, rows: int) -> States:
        """The states of one row as those of so many; states of as many rows as they are."""
        if not self.keys or self.rows == rows:
            return self
        keys = [k.expand(rows, -1, -1, -1) for k in self.keys]
        return States(keys, [v.expand(rows, -1, -1, -1) for v in self.values], self.lengths)

    def detached(self) -> States:
        """The same numbers as leaves that collect gradients: where the split backward pass is cut."""
        keys = [k.detach().requires_grad_() for k in self.keys]
        return States(keys, [v.detach().requires_grad_() for v in self.values], self.lengths)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def join(parts: Sequence[States]) -> States:
    """States of consecutive pieces of one sequence (or of several, of equal length), as those of the whole."""
    parts = [p for p in parts if p.size]
    if len(parts) <= 1:
        return parts[0] if parts else States([], [])
    keys = [torch.cat(layer, dim=2) for layer in zip(*(p.keys for p in parts), strict=True)]
    return States(keys, [torch.cat(layer, dim=2) for layer in zip(*(p.values for p in parts), strict=True)])


@dataclass
class Pass:
    """One pass of a model over R rows whose own tokens stand in one line.

    lengths: own tokens of each row. before: what stands before them, one piece after the other, each either the same
    for all rows (States of one row) or each row's own (States of R rows). record: keep the own keys and values of each
    layer in `recorded`. parents: own tokens form a tree (the same in every row) in which each sees its ancestors only;
    -1 at the root. lead: so many tokens at the beginning of the line are no row: they stand before every row, after
    all of `before`, and are computed in the same pass. see: called in each layer with its number, its scaled queries
    [1, H, N, D] and its number of key-value heads.
    """

    lengths: Sequence[int]
    before: Sequence[States] = ()
    record: bool = False
    device: torch.device | str = "cpu"
    parents: Sequence[int] | None = None
    lead: int = 0
    see: Callable[[int, torch.Tensor, int], None] | None = None
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = [states for states in self.before if states.size]
        same = all(states.shared for states in self.before)
        assert not self.lead or same, "a lead follows what all rows share"
        self._begins = list(itertools.accumulate(self.lengths, initial=self.lead))
        # Rows with pieces of their own stay together, so that those need not be copied.
        groups = alike(self.lengths, self.lead) if same and self.parents is None else [list(range(len(self.lengths)))]
        self.blocks = [self._block(group) for group in groups]
        if self.lead:
            self._add_lead()
        self._places: dict[tuple[int, int], Places] = {}

    def _block(self, group: Sequence[int]) -> Block:
        lengths = torch.tensor([self.lengths[row] for row in group])
        begins = torch.tensor([self._begins[row] for row in group])
        own = torch.arange(int(lengths.max()))[None]
        real = own < lengths[:, None]
        return self._made((begins[:, None] + own).masked_fill(~real, 0), real, self.lead)

    def _add_lead(self) -> None:
        """The lead's own queries: one more row of a block that is wide enough, where that is less work than a further
        block, or a block of their own."""
        own = torch.arange(self.lead)[None]
        wide = [i for i, b in enumerate(self.blocks) if self.lead <= b.width and b.width * b.own <= APART]
        if not wide or self.parents is not None:
            self.blocks.append(self._made(own, torch.ones_like(own, dtype=torch.bool), lead=0))
            return
        block = self.blocks[wide[-1]]
        row = nn.functional.pad(own, (0, block.width - self.lead))
        real = torch.arange(block.width)[None] < self.lead
        tokens, real = torch.cat([block.tokens, row]), torch.cat([block.real, real])
        self.blocks[wide[-1]] = self._made(tokens, real, self.lead, has_lead=True)

    def _made(self, tokens: torch.Tensor, real: torch.Tensor, lead: int, has_lead: bool = False) -> Block:
        sizes = [(states.size, states.lengths) for states in self.before]
        return Block(tokens, real, sizes, lead, self.parents, torch.device(self.device), has_lead)

    def places(self, heads: int, kv_heads: int) -> Places:
        """Where queries and keys of a layer with so many heads go; the same for all such layers."""
        if (heads, kv_heads) not in self._places:
            self._places[heads, kv_heads] = Places(self.blocks, heads, kv_heads)
        return self._places[heads, kv_heads]

    def states(self) -> States:
        """The recorded keys and values, one row of own tokens padded to [R, K, T, D] per layer."""
        whole = self._block(range(len(self.lengths)))
        place = whole.tokens.flatten().to(self.device)

        def rows(line: torch.Tensor) -> torch.Tensor:  # [1, K, N, D] -> [R, K, T, D]
            found = line[0].transpose(0, 1).index_select(0, place)
            return found.view(whole.rows, whole.width, *found.shape[1:]).transpose(1, 2)

        keys, values = ([rows(self.recorded[i][kind]) for i in range(len(self.recorded))] for kind in (0, 1))
        full = bool(whole.real.all())
        return States(keys, values, None if full else torch.as_tensor(self.lengths, device=self.device))


class StateCache:
    """States that never change for a backbone (no soft token before them), kept up to a bound of bytes, oldest out.

    Keys hold all token ids (and a digest of the vectors) that the states come from, so nothing that differs can ever be
    confused. One cache belongs to one backbone.
    """

    def __init__(self, max_bytes: int = 1 << 30):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, States] = OrderedDict()
        self._bytes = 0

    @property
    def room(self) -> int:
        """Bytes that can be put without putting anything out."""
        return self.max_bytes - self._bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> States | None:
        with one_at_a_time:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, states: States) -> None:
        size = states.nbytes()
        with one_at_a_time:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = states
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes()

    def clear(self) -> None:
        """Forget everything that is kept in memory."""
        with one_at_a_time:
            self._kept.clear()
            self._bytes = 0

    # What `keep_texts` tells a cache while it puts the texts of a data set; text_store/store.py does more with it.

    def plan(self, tokens: int, sample: States) -> bool:
        """Whether there is room for so many tokens of texts. sample: states of one row, which tell the size."""
        return tokens * sample.nbytes() // sample.size <= self.room

    def end_batch(self) -> None:
        """Called after each batch of texts that were computed together."""

    def finish(self) -> bool:
        """Called after the last of the texts that were planned. False if some of them could not be kept."""
        return True


_active = threading.local()
# Which attention a model calls is a setting of the whole model, so passes of several threads take turns.
one_at_a_time = threading.RLock()
_KNOWN = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions"}


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, N, D]
    key: torch.Tensor,  # [1, K, N, D]
    value: torch.Tensor,  # [1, K, N, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer in place of its own attention. Returns [1, N, heads, D]."""
    if query.shape[0] != 1:
        raise UnsupportedAttentionError(f"{type(module).__name__} asks its attention for several lines")
    sizes = key.shape[-1], value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    joined = torch.cat([_filled(x[0], max(sizes)) for x in (query, key, value)]).transpose(0, 1)
    found = joined_attention(module, joined, query.shape[1], scale, sliding_window, softcap, sizes, **kwargs)
    return found[None, ..., : sizes[1]], None


def joined_attention(
    module: nn.Module,
    joined: torch.Tensor,
    heads: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sizes: tuple[int | None, int | None] = (None, None),
    **kwargs: Any,
) -> torch.Tensor:
    """The same of queries, keys and values side by side: [N, heads + 2 K, D] -> [N, heads, D].

    sizes: what of D is keys and what is values, where one of them is filled up with zeros.
    """
    rows: Pass | None = getattr(_active, "rows", None)
    strange = [name for name, given in kwargs.items() if name not in _KNOWN and given is not None]
    if rows is None or strange:
        raise UnsupportedAttentionError(f"{type(module).__name__} asks its attention for {strange or 'a mask'}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    size, kv_heads = joined.shape[-1], (joined.shape[1] - heads) // 2
    scale = size**-0.5 if scaling is None else scaling
    query, key, value = joined.transpose(0, 1)[None].split([heads, kv_heads, kv_heads], dim=1)
    if rows.record:
        # Copies, so that nothing holds the queries any longer than they are needed.
        rows.recorded[layer] = (key[..., : sizes[0]].contiguous(), value[..., : sizes[1]].contiguous())
    if rows.see:
        rows.see(layer, query[..., : sizes[0]] * scale, kv_heads)
    pieces = [(_filled(states.keys[layer], size), _filled(states.values[layer], size)) for states in rows.before]
    call = Call(rows.blocks, rows.places(heads, kv_heads), scale, sliding_window, softcap)
    most = max(block.rows * block.width * block.total for block in rows.blocks)
    fused = softcap is None and heads * most > LONG
    return attend(joined, pieces, call, fused)


def _filled(states: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - states.shape[-1]
    return nn.functional.pad(states, (0, missing)) if missing else states


AttentionInterface.register(NAME, rows_attention)


@contextmanager
def rows_in_line(model: Any, rows: Pass) -> Iterator[Pass]:
    """Within it `model` computes the rows of `rows` (its inputs have the shape [1, N, ...]); nothing else changes."""
    config = model.config
    with one_at_a_time:
        before = config._attn_implementation
        config._attn_implementation = NAME
        _active.rows = rows
        try:
            yield rows
        finally:
            config._attn_implementation = before
            _active.rows = None
