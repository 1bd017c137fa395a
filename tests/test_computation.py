"""The fast path is the plain concatenation: same loss, same gradient, in float64, for every architecture."""

from __future__ import annotations

import pytest
import torch

from softprompt import attention
from softprompt.attention import Pass, StateCache
from softprompt.computation import answer_log_probability, keep_texts, loss_and_gradient, micro_batches
from softprompt.losses import losses_of_hidden, summed_cross_entropy
from softprompt.placement import Row, in_line, in_rectangle, shared_length
from tiny_models import ARCHITECTURES, FAST, PLACEMENTS, make_backbone, make_rows, random_vectors


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def backbone(request):
    return make_backbone(request.param)


def test_fast_where_promised(backbone):
    assert backbone.fast == (backbone.name in FAST), backbone.why_plain


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("budget", [1000, 20])
def test_loss_and_gradient_equal_plain_concatenation(backbone, placement, budget):
    rows, vectors = make_rows(placement), random_vectors(backbone)
    plain = loss_and_gradient(backbone, rows, vectors, exact_reference=True)
    cache = StateCache()
    keep_texts(backbone, rows, shared_length(rows), cache)
    for _ in range(2):  # the second time with the constant text from the cache, too
        fast = loss_and_gradient(backbone, rows, vectors, micro_batch_tokens=budget, cache=cache)
        assert fast.tokens == plain.tokens == 11
        assert fast.loss == pytest.approx(plain.loss, abs=1e-10)
        torch.testing.assert_close(fast.gradient, plain.gradient, rtol=0, atol=1e-10)
    assert plain.gradient.abs().max() > 1e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_plain_gradient_is_the_slope_of_the_loss(backbone, placement):
    rows, vectors = make_rows(placement), random_vectors(backbone)
    gradient = loss_and_gradient(backbone, rows, vectors).gradient
    direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    ahead = loss_and_gradient(backbone, rows, vectors + step * direction, exact_reference=True).loss
    behind = loss_and_gradient(backbone, rows, vectors - step * direction, exact_reference=True).loss
    slope = float((gradient * direction).sum())
    # Bloom's own GELU has a rounded derivative (0.1070322243), hence the tolerance.
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fused_attention_for_long_rows_gives_the_same(backbone, placement, monkeypatch):
    monkeypatch.setattr(attention, "LONG", 0)
    rows, vectors = make_rows(placement), random_vectors(backbone)
    plain = loss_and_gradient(backbone, rows, vectors, exact_reference=True)
    fast = loss_and_gradient(backbone, rows, vectors)
    assert fast.loss == pytest.approx(plain.loss, abs=1e-10)
    torch.testing.assert_close(fast.gradient, plain.gradient, rtol=0, atol=1e-10)


def test_threads_take_turns_on_one_model():
    from concurrent.futures import ThreadPoolExecutor

    backbone = make_backbone("llama")
    rows, vectors = make_rows("inside"), random_vectors(backbone)
    before, right = backbone.model.config._attn_implementation, loss_and_gradient(backbone, rows, vectors).loss
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: loss_and_gradient(backbone, rows, vectors).loss, range(60)))
    assert found == pytest.approx([right] * 60, abs=1e-10)
    assert backbone.model.config._attn_implementation == before


def test_a_batch_is_the_sum_of_its_rows(backbone):
    rows, vectors = make_rows("front"), random_vectors(backbone)
    whole = loss_and_gradient(backbone, rows, vectors)
    parts = [loss_and_gradient(backbone, [row], vectors) for row in rows]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), abs=1e-10)
    torch.testing.assert_close(whole.gradient, sum(part.gradient for part in parts), rtol=0, atol=1e-10)


def test_log_probability_is_minus_the_loss(backbone):
    rows, vectors = make_rows("inside"), random_vectors(backbone)
    loss = loss_and_gradient(backbone, rows, vectors, exact_reference=True).loss
    assert answer_log_probability(backbone, rows, vectors) == pytest.approx(-loss, abs=1e-10)
    assert answer_log_probability(backbone, rows, vectors, exact_reference=True) == pytest.approx(-loss, abs=1e-10)


def test_a_prompt_made_of_a_texts_embeddings_is_that_text(backbone):
    text = [11, 12, 13, 14, 15]
    hard = [Row((*text, *row.ids[5:]), row.answer) for row in make_rows("front")]
    with torch.no_grad():
        vectors = backbone.embed(torch.tensor(text))
    soft = answer_log_probability(backbone, make_rows("front"), vectors)
    assert soft == pytest.approx(answer_log_probability(backbone, hard, None), abs=1e-10)


def test_no_byte_of_the_model_changes():
    backbone = make_backbone("llama")
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    loss_and_gradient(backbone, make_rows("divided"), random_vectors(backbone))
    loss_and_gradient(backbone, make_rows("divided"), random_vectors(backbone), exact_reference=True)
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and not parameter.requires_grad
    assert not backbone.model.training


def test_the_models_attention_is_given_back():
    backbone = make_backbone("llama")
    before = backbone.model.config._attn_implementation
    loss_and_gradient(backbone, make_rows("front"), random_vectors(backbone))
    assert backbone.model.config._attn_implementation == before


def test_shared_length_stops_before_the_last_context_token():
    same = [Row((1, 2, 3, 4), 3), Row((1, 2, 3, 5), 3)]
    assert shared_length(same) == 2
    assert shared_length([Row((1, 2, 9), 2), Row((1, 3, 9), 2)]) == 1
    assert shared_length([Row((7, 2, 9), 2), Row((1, 3, 9), 2)]) == 0


def test_kept_texts_are_used_and_right(monkeypatch):
    from softprompt import computation

    backbone = make_backbone("llama")
    rows, vectors, cache = make_rows("behind"), random_vectors(backbone), StateCache()
    start = shared_length(rows)
    assert keep_texts(backbone, rows, start, cache)
    monkeypatch.setattr(computation, "_compute_texts", lambda *a: pytest.fail("computed again"))
    plain = loss_and_gradient(backbone, rows, vectors, exact_reference=True)
    for batch in (rows, rows[1:2], rows[2:]):  # also where a batch has more in common than the whole data set
        kept = loss_and_gradient(backbone, batch, vectors, start=start, cache=cache)
        alone = loss_and_gradient(backbone, batch, vectors, exact_reference=True)
        torch.testing.assert_close(kept.gradient, alone.gradient, rtol=0, atol=1e-10)
    assert plain.loss > 0


def test_texts_are_not_kept_where_they_do_not_fit_or_do_not_exist():
    backbone = make_backbone("llama")
    rows = make_rows("behind")
    assert not keep_texts(backbone, rows, shared_length(rows), StateCache(max_bytes=1000))
    front = make_rows("front")
    assert not keep_texts(backbone, front, shared_length(front), StateCache())


def test_the_cache_keeps_to_its_bound():
    def make_states():
        return attention.States([torch.zeros(1, 1, 4, 8)], [torch.zeros(1, 1, 4, 8)])

    cache = StateCache(max_bytes=600)  # two of 256 bytes
    for key in "abc":
        cache.put(key, make_states())
    assert cache.get("a") is None and cache.get("b") is not None and cache.get("c") is not None
    cache.get("b")
    cache.put("d", make_states())
    assert cache.get("c") is None and cache.get("b") is not None


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = make_rows("front") * 3
    found = list(micro_batches(rows, 5, 40))
    assert sorted(id(r) for b in found for r in b) == sorted(id(r) for r in rows)
    assert all(len(b) == 1 or sum(len(r.ids) - 5 for r in b) <= 40 for b in found)


def test_line_and_rectangle_score_the_same_tokens():
    rows = make_rows("divided")
    line, grid = in_line(rows, [0] * len(rows)), in_rectangle(rows)
    assert line.targets.tolist() == grid.targets.tolist()
    assert line.ids[line.scored].tolist() == grid.ids[grid.scored].tolist()
    assert line.positions[line.scored].tolist() == grid.scored[1].tolist()


def test_loss_in_pieces_is_the_whole_loss(monkeypatch):
    monkeypatch.setattr("softprompt.losses.PIECE", 50)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 20).double()
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 20, (11,))
    whole = summed_cross_entropy(head(hidden), targets)
    whole.backward()
    losses, gradient = losses_of_hidden(hidden.detach(), targets, head, 20)
    assert float(losses.sum()) == pytest.approx(float(whole.detach()), abs=1e-10)
    torch.testing.assert_close(gradient, hidden.grad, rtol=0, atol=1e-12)


def test_the_last_mlp_computes_only_what_is_wanted(backbone):
    if not backbone.fast:
        pytest.skip("the plain path leaves the model as it is")
    ids = torch.arange(3, 12)
    places = torch.arange(9)
    whole = backbone.hidden(backbone.embed(ids), places, Pass([9]))
    seen = []
    mlp = backbone._last_mlp
    hook = mlp.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1])) if mlp else None
    wanted = torch.tensor([8, 2])
    torch.testing.assert_close(backbone.hidden(backbone.embed(ids), places, Pass([9]), wanted), whole[wanted])
    assert backbone.hidden(backbone.embed(ids), places, Pass([9]), wanted[:0]).shape == (0, whole.shape[1])
    if hook:
        hook.remove()
        assert seen == [2, 0]
    assert (mlp is None) == (backbone.name == "opt")  # whose layer has no module for it
    torch.testing.assert_close(backbone.hidden(backbone.embed(ids), places, Pass([9])), whole)


@pytest.mark.parametrize("fast", [True, False])
def test_a_template_without_its_prompt_finds_the_texts_that_its_prompt_has_kept(monkeypatch, fast):
    from softprompt import computation

    backbone = make_backbone("llama" if fast else "bloom")
    rows = [Row((*row.ids[: row.answer], 5, *row.ids[row.answer :]), row.answer + 1) for row in make_rows("behind")]
    start, cache = shared_length(rows), StateCache()
    assert keep_texts(backbone, rows, start, cache) == fast
    without = [Row(tuple(i for i in row.ids if i >= 0), row.answer - sum(i < 0 for i in row.ids)) for row in rows]
    want = answer_log_probability(backbone, without, None, exact_reference=True)
    monkeypatch.setattr(computation, "_compute_texts", lambda *a: pytest.fail("computed again"))
    assert keep_texts(backbone, without, start, cache) == fast
    assert answer_log_probability(backbone, without, None, cache=cache) == pytest.approx(want, abs=1e-10)
