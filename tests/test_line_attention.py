"""Attention of rows in line, and its written-out gradient, beside attention row by row through autograd."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.attention import Pass, States, rows_attention, rows_in_line
from softprompt.line_attention import APART, Call, alike, attend

HEADS, KV_HEADS, SIZE = 4, 2, 8
SCALE = 0.3
TREE = (-1, 0, 0, 2, -1)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def piece(rows, size, lengths=None):
    return States([noise(rows, KV_HEADS, size, SIZE)], [noise(rows, KV_HEADS, size, SIZE)], lengths)


def reference(query, key, value, rows, window, softcap):
    """One row after another: [N, H, D]. A token sees what stands before its row, the lead, and its own ancestors."""
    outs = []
    begin, leads = 0, [(rows.lead, None, 0)] if rows.lead else []
    pieces = [*leads, *((length, r, rows.lead) for r, length in enumerate(rows.lengths))]
    for length, row, lead in pieces:
        keys, values = [], []
        for states in rows.before:
            mine = 0 if states.shared or row is None else row
            real = states.size if states.lengths is None else int(states.lengths[mine])
            keys.append(states.keys[0][mine, :, :real])
            values.append(states.values[0][mine, :, :real])
        keys += [key[:, :lead], key[:, begin : begin + length]]
        values += [value[:, :lead], value[:, begin : begin + length]]
        outs.append(one_row(query[:, begin : begin + length], torch.cat(keys, 1), torch.cat(values, 1), rows.parents,
                            window, softcap))  # fmt: skip
        begin += length
    return torch.cat(outs)


def one_row(query, keys, values, parents, window, softcap):
    length, before = query.shape[1], keys.shape[1] - query.shape[1]
    outs = []
    for t in range(length):
        own, node = [], t
        while node >= 0:
            own.insert(0, node)
            node = node - 1 if parents is None else parents[node]
        seen = [*range(before), *(before + node for node in own)]
        seen = seen if window is None else seen[-window:]
        heads = [h * KV_HEADS // HEADS for h in range(HEADS)]
        scores = torch.einsum("hd,hsd->hs", query[:, t], keys[heads][:, seen]) * SCALE
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        outs.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), values[heads][:, seen]))
    return torch.stack(outs)


CASES = {
    "alone": {"lengths": [5, 1, 3]},
    "blocks of unlike length": {"lengths": [2, 9, 8, 1, 7, 3]},
    "behind what all share": {"lengths": [4, 4], "before": [(1, 3), (1, 2)]},
    "behind a lead": {"lengths": [9, 2, 3], "lead": 4},
    "behind a lead that is longer than all": {"lengths": [9, 2, 3], "lead": 12},
    "behind a lead, of unlike length": {"lengths": [90, 2, 3, 80, 1], "lead": 2},
    "behind a lead behind what all share": {"lengths": [9, 2, 3], "before": [(1, 3)], "lead": 4},
    "few, behind what all share": {"lengths": [3, 2], "before": [(1, 3), (2, 4, (4, 1))]},
    "behind pieces of their own": {"lengths": [5, 1, 3], "before": [(1, 2), (3, 4, (4, 1, 0)), (3, 2)]},
    "a tree": {"lengths": [5, 5], "before": [(1, 2)], "parents": TREE},
    "one token": {"lengths": [1, 1, 1], "before": [(3, 4)]},
}


@pytest.mark.parametrize("more", [{}, {"window": 3}, {"softcap": 0.7}], ids=["full", "window", "softcap"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_attention_row_by_row(case, more):
    torch.manual_seed(0)
    given = dict(CASES[case])
    states = [piece(rows, size, *map(torch.tensor, rest)) for rows, size, *rest in given.pop("before", [])]
    rows = Pass(before=states, **given)
    count = sum(rows.lengths) + rows.lead
    joined = noise(count, HEADS + 2 * KV_HEADS, SIZE)
    query, key, value = joined.transpose(0, 1).split([HEADS, KV_HEADS, KV_HEADS])
    leaves = [joined, *(tensor for s in states for tensor in (s.keys[0], s.values[0]))]
    window, softcap = more.get("window"), more.get("softcap")
    call = Call(rows.blocks, rows.places(HEADS, KV_HEADS), SCALE, window, softcap)
    wanted = reference(query, key, value, rows, window, softcap)
    weight = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weight).sum(), leaves)
    pieces = [(s.keys[0], s.values[0]) for s in states]
    for fused in (False, True) if softcap is None else (False,):
        found = attend(joined, pieces, call, fused)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        for mine, right in zip(torch.autograd.grad((found * weight).sum(), leaves), gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(0, 100))
def test_rows_of_like_length_are_together(lengths, lead):
    groups = alike(lengths, lead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        of_group = [lengths[row] for row in group]
        assert of_group == sorted(of_group, reverse=True)
    firsts = [lengths[group[0]] for group in groups]
    assert firsts == sorted(set(firsts), reverse=True)


def test_a_further_group_is_made_where_it_spares_more_than_it_costs():
    assert alike([40, 40, 10, 10]) == [[0, 1, 2, 3]]
    assert APART < 2 * (200 * 200 - 100 * 100)
    assert alike([200, 100, 200, 100]) == [[0, 2], [1, 3]]
    assert alike([40, 10], lead=1000) == [[0], [1]]


def test_a_lead_is_a_row_of_a_block_that_is_wide_enough():
    assert [(block.rows, block.width, block.has_lead) for block in Pass([9, 2], lead=4).blocks] == [(3, 9, True)]
    assert [(block.rows, block.width) for block in Pass([9, 2], lead=10).blocks] == [(2, 9), (1, 10)]
    assert [(block.rows, block.width) for block in Pass([500], lead=10).blocks] == [(1, 500), (1, 10)]


@pytest.mark.parametrize("length", [2, 9], ids=["apart", "side by side"])
def test_pieces_that_need_no_gradient_get_none(length):
    torch.manual_seed(0)
    fixed, learned = piece(1, 3), piece(1, 2)
    fixed = States([fixed.keys[0].detach()], [fixed.values[0].detach()])
    rows = Pass([length, length], [fixed, learned])
    line = noise(2 * length, HEADS + 2 * KV_HEADS, SIZE)
    pieces = [(s.keys[0], s.values[0]) for s in (fixed, learned)]
    attend(line, pieces, Call(rows.blocks, rows.places(HEADS, KV_HEADS), SCALE), False).sum().backward()
    assert fixed.keys[0].grad is None and learned.keys[0].grad.abs().sum() > 0


@pytest.mark.parametrize(("size", "value_size"), [(8, 6), (6, 8)])
def test_values_may_be_of_another_size_than_keys(size, value_size):
    torch.manual_seed(0)
    before = States([noise(1, KV_HEADS, 3, size)], [noise(1, KV_HEADS, 3, value_size)])
    rows = Pass([5, 2], [before], record=True)
    query, key, value = noise(HEADS, 7, size), noise(KV_HEADS, 7, size), noise(KV_HEADS, 7, value_size)
    wanted = reference(query, key, value, rows, None, None)
    layer, model = SimpleNamespace(layer_idx=0), SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    with rows_in_line(model, rows):
        found, _ = rows_attention(layer, query[None], key[None], value[None], None, SCALE)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
    leaves, weight = [query, key, value, before.keys[0], before.values[0]], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * weight).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad((found[0] * weight).sum(), leaves), right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert rows.states().keys[0].shape == (2, KV_HEADS, 5, size)
    assert rows.states().values[0].shape == (2, KV_HEADS, 5, value_size)
