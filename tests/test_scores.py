"""Every score is the length of a code: enumerated over all sequences, masks and orders of tiny
random models."""

import dataclasses
import functools
import itertools
import math
import re
from types import SimpleNamespace

import decoding
import numpy as np
import prepare_text
import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import Lines, random_model, tiny_hp, val_split
from reference import enumerated_nelbo, enumerated_tstep, one_by_one, token_nll, total_probability

import train_mdlm as tm

V, L = 3, 4
EVERY = reference.all_sequences(V, L)  # (81, 4)
ORDERS = list(itertools.permutations(range(L)))
SCORES = tm.ESTIMATORS["mdlm"]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_hp())


@pytest.fixture(scope="module")
def split(tiny_env):
    """Hyperparameters, a real validation split with its byte tables, and a random model for it."""
    hp = tm.Hyperparameters.from_env(tiny_env)
    return hp, val_split(hp), random_model(hp, scale=0.1)


# ---- Chain rules


def test_every_order_is_a_code_and_their_mean_is_the_nelbo(model):
    lengths = [tm.chain_rule(model, EVERY, torch.tensor(order)).double().sum(1) for order in ORDERS]
    lengths = torch.stack(lengths)
    ones = torch.ones(24, dtype=torch.float64)
    assert torch.allclose(torch.exp(-lengths).sum(1), ones, atol=1e-5)
    exact = enumerated_nelbo(model, EVERY)
    assert torch.allclose(lengths.mean(0), exact, atol=1e-5)
    # So the NELBO is itself a code length: by Jensen its probabilities sum to at most 1.
    assert torch.exp(-exact).sum() < 1


@pytest.mark.parametrize("order", ["l2r", "random", "confidence"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 9])
def test_every_named_order_and_group_size_sums_to_one(model, order, group):
    nats = tm.chain_rule(model, EVERY, order, group)
    assert total_probability(nats) == pytest.approx(1, abs=1e-5)


def test_scores_that_cheat_do_not_sum_to_one(model):
    """Pseudo-likelihood (each token sees all others), and a confidence that looks at the hidden
    token."""
    pseudo = torch.zeros(EVERY.shape, dtype=torch.float64)
    for i in range(L):
        pseudo[:, i] = token_nll(model, EVERY, torch.arange(L) == i)[:, i]
    assert abs(total_probability(pseudo) - 1) > 0.05
    mask = torch.ones_like(EVERY, dtype=torch.bool)
    peeking = torch.zeros(len(EVERY), dtype=torch.float64)
    for _ in range(L):
        nll = token_nll(model, EVERY, mask).masked_fill(~mask, math.inf)
        cheapest = nll.min(1)
        peeking += cheapest.values
        mask[torch.arange(81), cheapest.indices] = False
    assert torch.exp(-peeking).sum() > 1.05


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_chain_rule_is_its_definition(model, order):
    x0 = EVERY[::9]
    found = tm.chain_rule(model, x0, torch.tensor(order))
    expected = torch.cat([one_by_one(model, row, order) for row in x0.split(1)])
    assert torch.allclose(found.double(), expected, atol=1e-5)
    if order == (0, 1, 2, 3):
        assert torch.equal(tm.chain_rule(model, x0), found)


def test_rows_may_have_orders_of_their_own(model):
    orders = torch.tensor(ORDERS)
    x0 = EVERY[40].expand(24, L)
    together = tm.chain_rule(model, x0, orders)
    for row, order in enumerate(orders):
        assert torch.allclose(together[row], tm.chain_rule(model, x0[:1], order)[0], atol=1e-6)


@pytest.mark.parametrize("order", ["l2r", "random", "confidence"])
def test_a_group_is_predicted_from_what_was_revealed_before_it(model, order):
    """With one group of all positions the tokens are independent: the all-masked prediction."""
    blind = token_nll(model, EVERY, torch.ones(L, dtype=torch.bool))
    assert torch.allclose(tm.chain_rule(model, EVERY, order, L).double(), blind, atol=1e-5)


def test_confidence_reveals_the_surest_position_first(model):
    x0 = EVERY[::7]
    expected = torch.stack([reference.surest_first(model, row) for row in x0])
    assert torch.allclose(tm.chain_rule(model, x0, "confidence"), expected, atol=1e-5)
    found = tm.confidence_nll(model, tm.with_before(x0))
    assert torch.equal(found, tm.chain_rule(model, x0, "confidence"))


def test_confidence_does_not_depend_on_hidden_tokens_ties_or_company():
    hp = tiny_hp(vocab_size=5, train_seq_len=16, train_batch_tokens=64)
    model = random_model(hp)
    x0 = torch.randint(0, 5, (23, 16), generator=torch.Generator().manual_seed(0))
    whole = tm.chain_rule(model, x0, "confidence")
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    shuffled = tm.chain_rule(model, x0[order], "confidence")
    assert torch.allclose(shuffled, whole[order], atol=1e-5)
    for row in (0, 7, 22):
        alone = tm.chain_rule(model, x0[row : row + 1], "confidence")[0]
        assert torch.allclose(alone, whole[row], atol=1e-5)
    # The first position to be revealed is the same for all sequences: nothing is visible yet.
    z = torch.full_like(x0, hp.mask_id)
    first, _ = next(iter(tm.reveal_surest(model, z, model.hidden)))
    assert (first == first[0]).all()
    # A model without attention is equally sure everywhere: ties go from left to right.
    with torch.no_grad():
        for block in model.blocks:
            block.attn_scale.zero_()
    z, seen = torch.full_like(x0, hp.mask_id), []
    for positions, _ in tm.reveal_surest(model, z, model.hidden, 3):
        seen.append(positions[0])
        z.scatter_(1, positions, x0.gather(1, positions))
    assert torch.cat(seen).tolist() == list(range(16))


@pytest.mark.parametrize(("ahead", "first"), [(1e-5, 0), (1e-3, 1)])
def test_positions_that_are_almost_equally_sure_are_revealed_from_left_to_right(ahead, first):
    """So that rounding, which depends on the machine, does not change an order."""
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    logp[1, 0] += ahead
    model = SimpleNamespace(hp=tiny_hp(), head=lambda positions: logp[positions])
    z = torch.full((1, 2), V)
    positions, _ = next(tm.reveal_surest(model, z, lambda z, positions: positions))
    assert positions.item() == first


def test_random_order_depends_on_the_public_seed_only(model):
    a, b, *others = (tm.chain_rule(model, EVERY, "random", seed=seed) for seed in (1, 1, 2, 3, 4))
    assert torch.equal(a, b)
    assert any(not torch.allclose(a, other) for other in others)


def test_unknown_orders_are_refused(model):
    with pytest.raises(tm.InputError, match="r2l is not an order"):
        tm.chain_rule(model, EVERY, "r2l")
    causal = random_model(tiny_hp(objective="ar"))
    for order in (dict(order="random"), dict(order=torch.arange(L)), dict(group=2)):
        with pytest.raises(tm.InputError, match="l2r and group 1"):
            tm.chain_rule(causal, EVERY, **order)


def test_causal_model_is_a_code_however_it_is_computed():
    model = random_model(tiny_hp(objective="ar"))
    window = torch.cat([torch.full((81, 1), 2), EVERY], dim=1)
    nll = tm.causal_nll(model, window)
    assert nll.shape == (81, L) and total_probability(nll) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(tm.chain_rule(model, EVERY, before=2), nll)
    z, stepwise = torch.full_like(EVERY, V), torch.zeros(81, L)
    before = torch.full((81,), tm.BOS_ID)
    twin = decoding.cached(model)
    for positions, logp in decoding.reveal_causally(twin, z, before):  # as a decoder does it
        tokens = EVERY.gather(1, positions)
        stepwise.scatter_(1, positions, -logp.gather(2, tokens[..., None])[..., 0])
        z.scatter_(1, positions, tokens)
    assert torch.allclose(stepwise, tm.chain_rule(model, EVERY), atol=1e-5)


def test_boundaries_that_are_always_visible_are_paid_for():
    """With 0 for a boundary that is never masked: the rest alone overflows 1, with the positions
    paid it is a code."""
    free, paid = 0.0, 0.0
    anchors = EVERY == tm.BOS_ID
    nats = tm.chain_rule(random_model(tiny_hp(anchor_bos=True)), EVERY)
    assert (nats[anchors] == 0).all()
    for bits, count in zip(nats.double().sum(1) / math.log(2), anchors.sum(1), strict=True):
        free += 2 ** -bits.item()
        paid += 2 ** -(bits.item() + tm.boundary_bits(int(count), L))
    assert free > 1 and paid < 1
    everywhere = [2 ** -tm.boundary_bits(n, L) * math.comb(L, n) for n in range(L + 1)]
    assert sum(everywhere) == pytest.approx(1) and tm.boundary_bits(0, 1023) == 10


def test_scored_positions_alone_go_through_the_last_mlp_and_the_head():
    """A model call for one position of 64 spends its last MLP and its head on one position."""
    hp = tiny_hp(vocab_size=384, train_seq_len=64, train_batch_tokens=256, model_dim=32)
    model = random_model(hp)
    seen = []

    def count(module, inputs, output):
        seen.append(output.shape[:-1].numel())

    model.blocks[-1].mlp.register_forward_hook(count)
    x0 = torch.randint(0, 384, (2, 64))
    tm.chain_rule(model, x0)
    assert sum(seen) == 2 * 64 and len(seen) == 2 * 64 * 64 // 2048
    h = model.hidden(x0, positions=torch.tensor([3, 70]))
    assert torch.allclose(h, model.hidden(x0).flatten(0, 1)[[3, 70]], atol=1e-6)


# ---- Bounds


def test_masked_nll_is_that_of_the_masked_positions(model):
    mask = torch.rand(81, L, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = token_nll(model, EVERY, mask) * mask
    assert torch.allclose(
        tm.masked_nll(model, tm.with_before(EVERY), mask).double(), expected, atol=1e-5
    )


def test_keys_go_on_and_belong_to_their_rows():
    """From one generator; or from one for each row, whoever is beside it."""
    keys = tm.random_keys((3, 5), torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        assert torch.equal(next(keys), torch.rand(3, 5, generator=g))

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together, alone = (tm.random_keys((len(s), 5), generators(s)) for s in ((7, 8, 9), (8,)))
    for _ in range(3):
        assert torch.equal(next(together)[1:2], next(alone))


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_nelbo_is_unbiased_within_four_standard_errors(model, passes):
    x0 = EVERY[[5, 17, 40, 77]]
    exact = enumerated_nelbo(model, x0)
    g = torch.Generator().manual_seed(passes)
    many = x0.repeat(20, 1)  # rows of one call share a lattice: the calls are independent draws
    draws = [tm.nelbo(model, many, passes, g).view(20, 4).mean(0) for _ in range(60)]
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all() and ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_weights_of_the_nelbo_are_exact():
    """Σ_k P(k)·weight(k)·k = Σ_k L/k·k/L = L for every number of passes: the weights average to
    those of uniform k."""
    length, fine = 7, 20_000
    times = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    allowed = torch.ones(fine, length, dtype=torch.bool)
    for passes in (1, 2, 4):
        covered = torch.zeros(length, dtype=torch.float64)
        for mask, weight in tm.nelbo_masks(passes, times, torch.rand(fine, length), allowed):
            covered.index_add_(0, mask.sum(1) - 1, weight / fine)
        expected = 1 / torch.arange(1, length + 1, dtype=torch.float64)  # (L/k)/L for each k
        assert torch.allclose(covered, expected, rtol=2e-3)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_masks_of_the_nelbo_in_closed_form(passes):
    """Sizes and weights of every pass of every row, in plain Python; masks lie end to end in the
    order of the keys. The second and third of four passes run backwards."""
    g = torch.Generator().manual_seed(passes)
    times = torch.rand(40, generator=g, dtype=torch.float64)
    keys, allowed = torch.rand(40, 9, generator=g), torch.rand(40, 9, generator=g) < 0.8
    allowed[:, 0] = True
    found = list(tm.nelbo_masks(passes, times, keys, allowed))
    power = 1.5 if passes > 1 else 1.0
    for row in range(40):
        places = [i for i in keys[row].argsort().tolist() if allowed[row, i]]
        n, begin = len(places), 0
        for i, (masks, weights) in enumerate(found):
            t = 1 - times[row].item() if i in (1, 2) else times[row].item()
            k = min(1 + int(n * ((i + t) / passes) ** power), n)
            chance = (k / n) ** (1 / power) - ((k - 1) / n) ** (1 / power)
            assert weights[row].item() == pytest.approx(1 / (k * chance * passes))
            arc = {places[(begin + j) % n] for j in range(k)}
            assert set(masks[row].nonzero()[:, 0].tolist()) == arc
            begin += k


def test_mask_sizes_are_evenly_spread_and_arcs_do_not_overlap(monkeypatch):
    seen = []

    def masked_nll(model, window, mask):
        seen.append(mask)
        return torch.zeros(mask.shape)

    monkeypatch.setattr(tm, "masked_nll", masked_nll)
    model = random_model(tiny_hp(train_seq_len=50, train_batch_tokens=200))
    x0 = torch.zeros(1000, 50, dtype=torch.int64)
    tm.nelbo(model, x0, passes=2, generator=torch.Generator().manual_seed(0))
    counts = torch.cat([mask.sum(1) for mask in seen]).bincount(minlength=51)[1:]
    k = torch.arange(1, 51)
    expected = 2000 * ((k / 50) ** (2 / 3) - ((k - 1) / 50) ** (2 / 3))
    # Independent draws miss by 9 at one sigma.
    assert counts.sum() == 2000 and (counts - expected).abs().max() <= 4
    small = seen[0].sum(1) + seen[1].sum(1) <= 50
    assert small.any() and not (seen[0] & seen[1])[small].any()


def test_uniform_logits_cost_exactly_l_ln_v():
    model = random_model(tiny_hp())
    torch.nn.init.zeros_(model.tok_emb.weight)
    exact = torch.tensor(L * math.log(V), dtype=torch.float64)
    for order in ("l2r", "random", "confidence"):
        assert torch.allclose(tm.chain_rule(model, EVERY, order).double().sum(1), exact)
    # One mask of k of L positions, weighted, is L·ln V on average over k.
    g = torch.Generator().manual_seed(0)
    many = EVERY.repeat(50, 1)
    assert tm.nelbo(model, many, 4, g).mean().item() == pytest.approx(exact.item(), rel=5e-3)
    bound = tm.discrete_elbo(model, many, 8, g)
    assert bound.mean().item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_discrete_elbo_is_unbiased(model, steps):
    x0 = EVERY[[5, 17, 40, 77]]
    g = torch.Generator().manual_seed(steps)
    draws = tm.discrete_elbo(model, x0.repeat(800, 1), steps=steps, generator=g).view(800, 4)
    error = draws.std(0) / len(draws) ** 0.5
    exact = enumerated_tstep(model, x0, steps)
    assert ((draws.mean(0) - exact).abs() < 4 * error + 1e-9).all()


def test_the_t_step_bound_pays_for_what_its_last_step_leaves_visible(monkeypatch):
    """For a model that is certain of every token it is ε·ln V for each that may be masked: neither
    PAD nor, with ANCHOR_BOS, <s>."""
    monkeypatch.setattr(tm, "masked_nll", lambda model, window, mask: torch.zeros(mask.shape))
    x0 = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1], [2, 2, 4, 4]])  # PAD is 4
    for anchors, free in ((False, [4, 4, 2]), (True, [3, 0, 2])):
        model = random_model(tiny_hp(anchor_bos=anchors, doc_chunks=True))
        expected = 1e-3 * math.log(V) * torch.tensor(free, dtype=torch.float64)
        for steps in (1, 5):
            assert torch.allclose(tm.discrete_elbo(model, x0, steps), expected, rtol=1e-6)


def test_masks_of_the_t_step_bound_and_of_the_grid_are_the_published_ones():
    """Steps i = 1 … T mask with (1 − ε)·i/T and weigh 1/i; the grid's points are at t, and weigh
    (1 − ε)/(points·t)."""
    keys = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    found = [
        (int(mask.sum()), weight) for mask, weight in tm.tstep_masks(3, itertools.repeat(keys))
    ]
    assert found == [(333, 1), (666, 1 / 2), (999, 1 / 3)]
    keys = itertools.repeat(keys.flip(1))
    grid = [(int(mask.sum()), weight) for mask, weight in tm.tgrid_masks(4, keys)]
    assert [masked for masked, _ in grid] == [2, 334, 667, 1000]  # at first also token 0
    assert [weight for _, weight in grid] == pytest.approx(
        [0.999 / 4 / t for t in (0.001, 0.334, 0.667, 1.0)]
    )


def test_tgrid_overstates_by_its_forced_masks(model):
    """PR 1699's estimator converges to its own expectation, which is not the NELBO."""
    x0, points, eps = EVERY[[40]], 8, 1e-3
    expected = 0.0
    for t in torch.linspace(eps, 1, points).tolist():
        for mask in reference.all_masks(L):
            k = int(mask.sum())
            probability = t**k * (1 - t) ** (L - k)
            if t < 0.01:  # position 0 is always masked: the probability of the rest only
                probability = t ** (k - 1) * (1 - t) ** (L - k) if mask[0] else 0.0
            nll = float(reference.masked_sum(model, x0, mask))
            expected += (1 - eps) / points / t * probability * nll
    many = x0.repeat(2000, 1)
    keys = tm.random_keys(many.shape, torch.Generator().manual_seed(0))
    draws = tm.weighted_nll(model, tm.with_before(many), tm.tgrid_masks(points, keys))
    assert abs(draws.mean() - expected) < 4 * draws.std() / len(draws) ** 0.5
    # At L = 4 the forced mask at t = 0.001 costs a thousand weights.
    assert expected > enumerated_nelbo(model, x0) + 5


# ---- Scores of a split


def test_split_score_is_the_ratio_with_its_standard_error(split, monkeypatch):
    hp, val, _ = split

    def nats(model, windows):
        return torch.tensor([1.0 + place for place in windows.places])

    monkeypatch.setitem(SCORES, "nelbo", tm.Estimator(nats))
    score, table = tm.score_windows("nelbo", None, hp, val, 0)
    count = val.stream.count_windows(32)
    windows = val.stream.windows(range(count), 32)
    size = tm.count_bytes(windows[:, 1:], windows[:, 0], val.luts).double()
    bits = (1.0 + torch.arange(count)).double() / math.log(2)
    bpb = bits.sum() / size.sum()
    stderr = ((bits - bpb * size) ** 2).sum().sqrt() / size.sum()
    assert score.bpb == pytest.approx(bpb.item()) and score.stderr == pytest.approx(stderr.item())
    assert score.bytes == size.sum() and score.seqs == count
    assert score.loss == pytest.approx((1.0 + torch.arange(count)).mean().item() / 32)
    # Nats that are not by position are all in the first bucket.
    assert torch.allclose(table[:, 0, 0], bits) and not table[:, 1:, 0].any()


class Pieces:
    """A tokenizer of which only the pieces are known."""

    pieces = ["<unk>", "<s>", "<0x41>", "unused", "\u2581the", "the", "\u2581\u2581", "é", "\u2581"]

    def __init__(self, keeps_space):
        self.keeps_space = keeps_space
        self.id_to_piece = self.pieces.__getitem__
        self.vocab_size = lambda: len(self.pieces)
        kinds = dict(is_unknown=0, is_control=1, is_byte=2, is_unused=3)
        for kind, token in kinds.items():
            setattr(self, kind, functools.partial(int.__eq__, token))

    def decode(self, tokens):
        text = "".join(self.pieces[token].replace("\u2581", " ") for token in tokens)
        return text if self.keeps_space else text.removeprefix(" ")


@pytest.mark.parametrize("keeps_space", [False, True])
def test_byte_tables_of_every_kind_of_piece(keeps_space):
    """And of MASK and PAD, which stand for no text; tables may be longer than the vocabulary."""
    luts = tm.build_sentencepiece_luts(Pieces(keeps_space), 9)
    assert luts.base_bytes.tolist() == [0, 0, 1, 0, 3, 3, 1, 2, 0, 0, 0]
    assert luts.has_leading_space.nonzero().flatten().tolist() == [4, 6, 8]
    assert luts.is_boundary.nonzero().flatten().tolist() == [0, 1, 3, 9, 10]
    assert luts.keeps_space is keeps_space
    text = [4, 5, 7, 6, 2, 8, 1, 4, 0, 4]
    space = int(keeps_space)
    sizes = [3 + space, 3, 2, 2, 1, 1, 0, 3 + space, 0, 3 + space]
    assert tm.token_bytes(text, 1, luts).tolist() == sizes
    assert tm.token_bytes([text, text], torch.tensor([5, 9]), luts)[:, 0].tolist() == [4, 3 + space]
    assert tm.count_bytes(text, 1, luts) == sum(sizes)
    assert len(tm.build_sentencepiece_luts(Pieces(keeps_space), 5).base_bytes) == 9


@pytest.mark.parametrize("keeps_space", [False, True])
@pytest.mark.parametrize("name", ["nelbo", "sliding", "sliding_nelbo"])
def test_the_bytes_of_a_window_depend_on_the_token_before_it(
    tmp_path, monkeypatch, name, keeps_space
):
    """With a tokenizer that, as the challenge's, drops the space of a first piece: a window that
    begins inside a document keeps it."""
    tokens = [0, 2, 2, 0, 1, 2, 0, 1, 1, 2, 2, 2, 0, 2, 1, 0, 2]  # <s> is 1
    prepare_text.write_shard(tmp_path / "fineweb_val_000000.bin", np.array(tokens))
    size, space = torch.tensor([3, 0, 5, 0, 0]), torch.tensor([False, False, True, False, False])
    luts = tm.ByteTables(size, space, size == 0, keeps_space)
    hp = tiny_hp(stride=2)
    nothing = SCORES[name]._replace(nats=lambda model, windows: torch.zeros(len(windows.places)))
    monkeypatch.setitem(SCORES, name, nothing)
    val = tm.Split(tm.TokenStream(tmp_path, "val"), luts)
    score, table = tm.score_windows(name, None, hp, val, 0)

    def by_hand(i):
        """Bytes of token i, which is not the first of the split."""
        begins = tokens[i] == 2 and (keeps_space or tokens[i - 1] != 1)
        return {0: 3, 1: 0, 2: 5}[tokens[i]] + begins

    assert score.bytes == sum(map(by_hand, range(1, 17)))
    first = [1, 5, 9, 13] if name == "nelbo" else [1, 3, 5, 7, 9, 11, 13]
    for window, start in enumerate(first):
        begin = start if name == "nelbo" or start == 1 else start + 2
        assert table[window, :, 1].sum() == sum(map(by_hand, range(begin, start + 4)))


def test_standard_errors_cover_the_truth():
    """Repeated draws of windows from a population: the ratio misses the population's by 4 stderr at
    most, and its spread over the draws is what stderr says."""
    g = torch.Generator().manual_seed(0)
    size = torch.randint(40, 120, (20_000,), generator=g).double()
    by_byte, by_window = torch.randn(2, 20_000, generator=g).double()
    bits = size * (2 + 0.3 * by_byte) + 5 * by_window
    truth = bits.sum() / size.sum()
    found = []
    for _ in range(400):
        chosen = torch.randint(0, 20_000, (200,), generator=g)
        found.append(tm.bits_per_byte(bits[chosen], size[chosen]))
    bpb, stderr = torch.tensor(found, dtype=torch.float64).T
    assert ((bpb - truth).abs() < 4 * stderr).all()
    assert stderr.mean() == pytest.approx(bpb.std().item(), rel=0.1)
    assert math.isnan(tm.bits_per_byte(bits[:1], size[:1])[1])  # one window says nothing of spread


def definition(name, model, x0, visible, group):
    """(B, L) nats of the scored tokens, written down naively; `visible` tokens are free context."""
    length = x0.shape[1]
    if name == "l2r":
        return one_by_one(model, x0, range(length))
    nats = torch.zeros(x0.shape, dtype=torch.float64)
    for i in range(visible, length):
        first = i - (i - visible) % group
        nats[:, i] = token_nll(model, x0, torch.arange(length) >= first)[:, i]
    return nats


@pytest.mark.parametrize(("name", "group"), [("l2r", 1), ("sliding", 1), ("sliding", 5)])
def test_split_scores_are_their_definitions(split, name, group):
    hp, val, model = split
    hp = dataclasses.replace(hp, stride=8, chain_group=group)
    score, table = tm.score_windows(name, model, hp, val, 5)
    stride = 8 if name == "sliding" else 32
    visible = 32 - stride
    bits = nbytes = tokens = 0
    for n in tm.evenly_spaced(1 + (val.stream.total - 1 - 32) // stride, 5):
        window = torch.from_numpy(val.stream.read(n * stride, 33).astype("int64"))
        nats = definition(name, model, window[None, 1:], visible, group)
        bits += nats[:, visible:].sum().item() / math.log(2)
        nbytes += int(tm.count_bytes(window[1 + visible :], window[visible], val.luts))
        tokens += 32 - visible
    assert score.bpb == pytest.approx(bits / nbytes, rel=1e-5)
    assert (score.bytes, score.tokens) == (nbytes, tokens)
    if name == "l2r":  # by position
        names = [tm.bucket_name(bucket, 32) for bucket in range(6)]
        assert names == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
        assert table.shape == (5, 6, 2) and (table[..., 0] > 0).all()
        assert table[..., 1].sum() == nbytes


@pytest.mark.parametrize("block", [0, 4])
def test_every_score_of_a_split_is_the_one_of_its_name(split, block):
    """The functions that the other tests prove, on three windows."""
    hp, val, _ = split
    hp = dataclasses.replace(hp, block_size=block)
    model = random_model(hp, scale=0.2)
    window = val.stream.windows(tm.evenly_spaced(val.stream.count_windows(32), 3), 32)
    x0, before = window[:, 1:], window[:, 0]

    def keys(name):
        rows = [tm.seeded("cpu", hp.seed, name, n) for n in range(3)]
        return torch.stack([torch.rand(32, generator=row) for row in rows])

    generator = tm.seeded("cpu", hp.seed, "nelbo offset")
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    lattice = (hp.nelbo_passes, torch.arange(3), offset, keys("nelbo"))
    everything = torch.ones_like(x0, dtype=torch.bool)
    nats = dict(
        l2r=tm.chain_rule(model, x0, before=before),
        confidence=tm.chain_rule(model, x0, "confidence", before=before),
        random=tm.chain_rule(model, x0, keys("random").argsort(-1), before=before),
        ar=tm.causal_nll(model, window),
        nelbo=tm.any_order_nll(model, window, everything, *lattice),
    )
    bits = {name: each.double().sum().item() / math.log(2) for name, each in nats.items()}
    assert len({round(each, 1) for each in bits.values()}) == 5  # told apart
    for name in bits.keys() & tm.ESTIMATORS[hp.system].keys():
        _, table = tm.score_windows(name, model, hp, val, 3)
        assert table[..., 0].sum().item() == pytest.approx(bits[name], rel=1e-5), name


@pytest.mark.parametrize("passes", [1, 3])
def test_the_bound_of_overlapping_windows_pays_for_what_it_scores(split, monkeypatch, passes):
    """If every masked token costs a nat, so does every scored one, whatever the masks."""
    hp, val, model = split
    hp = dataclasses.replace(hp, stride=8, nelbo_passes=passes, val_batch_size=96)
    seen = []

    def masked_nll(model, window, mask):
        seen.append((window, mask))
        return mask.float()

    monkeypatch.setattr(tm, "masked_nll", masked_nll)
    score, table = tm.score_windows("sliding_nelbo", model, hp, val, 5)
    if passes == 1:
        assert table[..., 0].sum().item() * math.log(2) == pytest.approx(score.tokens)
    assert score.tokens == 5 * 8 and len(seen) == 2 * passes
    assert not any(mask[:, :-8].any() for _, mask in seen)
    numbers = tm.evenly_spaced(1 + (val.stream.total - 1 - 32) // 8, 5)
    windows = torch.cat([window for window, _ in seen[::passes]])
    assert torch.equal(windows, val.stream.windows(numbers, 32, 8))


def test_prefix_lines_are_the_score_by_position(split, tmp_path):
    hp, val, model = split
    hp = dataclasses.replace(hp, scores="l2r:6", final_eval_max_seqs=8)
    tm.save_artifact(model, dataclasses.replace(hp, quant_mode="fp32"), tmp_path / "a.mdlm")
    log = Lines()
    tm.score_model(tm.read_artifact(tmp_path / "a.mdlm"), hp, val, log)
    found = re.findall(r"^prefix:(\S+) bpb:(\S+) ", "\n".join(log.lines), re.MULTILINE)
    window = val.stream.windows(tm.evenly_spaced(val.stream.count_windows(32), 6), 32)
    bits = tm.chain_rule(model, window[:, 1:]).double().sum(0) / math.log(2)
    size = tm.token_bytes(window[:, 1:], window[:, 0], val.luts).sum(0)
    ends = [0, 1, 2, 4, 8, 16, 32]
    for (name, bpb), first, end in zip(found, ends[:-1], ends[1:], strict=True):
        assert name == (f"{first}-{end - 1}" if end > first + 1 else f"{first}")
        expected = (bits[first:end].sum() / size[first:end].sum()).item()
        assert float(bpb) == pytest.approx(expected, abs=2e-3)


def test_score_lines_have_the_figures_of_the_score(split, tmp_path, monkeypatch):
    """Each figure has a value of its own."""
    hp, val, model = split
    hp = dataclasses.replace(hp, scores="l2r:3,tgrid:2", final_eval_max_seqs=4)
    rounded = dataclasses.replace(hp, compute_dtype="bfloat16")
    tm.save_artifact(model, rounded, tmp_path / "a.mdlm")
    now, asked = [0.0], []
    scores = dict(
        nelbo=tm.Score(1.23456789, 0.02, 2.3456789, 11, 500, 1600, 4000.0, 0.0),
        l2r=tm.Score(1.5, 0.03, 2.5, 12, 600, 1700, 8000.0, 340.0),
        tgrid=tm.Score(1.25, math.nan, 2.25, 1, 32, 100, 1000.0, 0.0),
    )

    def score_windows(name, model, hp, split, seqs):
        now[0] += 30.04
        asked.append((name, seqs, hp.nelbo_passes))
        assert model.compute_dtype == torch.bfloat16  # as the artifact says
        return scores[name], torch.ones(3, 1, 2)

    monkeypatch.setattr(tm, "score_windows", score_windows)
    monkeypatch.setattr(tm.time, "perf_counter", lambda: now[0])
    log = Lines()
    artifact = tm.read_artifact(tmp_path / "a.mdlm")._replace(label="int7+lzma")
    tm.score_model(artifact, hp, val, log)
    assert asked == [("nelbo", 4, 4), ("l2r", 3, 4), ("tgrid", 2, 4)]
    assert log.lines == [
        "final_int7_lzma_roundtrip val_loss:2.3457 val_bpb:1.2346 stderr:0.0200 eval_time:4000ms",
        "final_int7_lzma_roundtrip_exact val_loss:2.34567890 val_bpb:1.23456789",
        "score:nelbo bpb:1.2346 stderr:0.0200 seqs:11 tokens:500 bytes:1600 time:4000ms "
        "tokens_per_s:125",
        "score:l2r bpb:1.5000 stderr:0.0300 seqs:12 tokens:600 bytes:1700 time:8000ms "
        "tokens_per_s:75 boundary_bits:340.0 boundary_bpb:0.2000",
        "prefix:0 bpb:1.0000 stderr:0.0000",
        "score:tgrid biased:1 bpb:1.2500 stderr:nan seqs:1 tokens:32 bytes:100 time:1000ms "
        "tokens_per_s:32",
        "Evaluation time: 90.1 s",
    ]


def test_every_score_is_printed_once_the_headline_first(split, tmp_path):
    hp, val, model = split
    hp = dataclasses.replace(hp, scores="tgrid:2,l2r:3,ar", final_eval_max_seqs=4)
    tm.save_artifact(model, hp, tmp_path / "a.mdlm")
    log = Lines()
    tm.score_model(tm.read_artifact(tmp_path / "a.mdlm"), hp, val, log)
    lines = [line for line in log.lines if line.startswith("score:")]
    assert lines[0] == "score:ar is not for mdlm models"
    starts = [(line.split(" stderr")[0].split(":")[1], line) for line in lines[1:]]
    assert [start for start, _ in starts] == ["nelbo bpb", "tgrid biased", "l2r bpb"]
    assert [re.search(r" seqs:(\d+)", line)[1] for line in lines[1:]] == ["4", "2", "3"]


@pytest.mark.parametrize("preset", ["ar", "block", "golf"])
def test_the_grid_of_pr_1699_is_asked_for_by_its_variable(preset):
    """What a model has no score for is asked for all the same, so that `score_model` says so."""
    hp = tm.Hyperparameters(preset, final_eval_t_samples=256, final_eval_max_seqs=9)
    assert hp.requested_scores["tgrid"] == 9
    assert tm.final_scores(hp).get("tgrid") == (9 if preset == "golf" else None)
    named = dataclasses.replace(hp, scores="tgrid:5")
    assert named.requested_scores == {"tgrid": 5}


def test_sliding_windows_of_a_causal_model(split):
    hp, val, _ = split
    hp = dataclasses.replace(hp, objective="ar", stride=8)
    model = random_model(hp, scale=0.1)
    stream = tm.TokenStream(hp.data_path, "val")
    stream.total = 1000
    score, _ = tm.score_windows("sliding", model, hp, val._replace(stream=stream), 0)
    assert score.tokens == 32 + (score.seqs - 1) * 8 and score.seqs == 1 + (999 - 32) // 8
    count = 32 + 8 * (score.seqs - 1) + 1
    tokens = torch.from_numpy(val.stream.read(0, count).astype("int64"))
    # Every token once
    assert score.bytes == tm.count_bytes(tokens[1:], tokens[0], val.luts)
    bits = 0.0
    for n in range(score.seqs):
        window = tokens[n * 8 : n * 8 + 33]
        logits = model(window[None, :-1])[0].detach()
        nll = F.cross_entropy(logits, window[1:], reduction="none").double()
        bits += (nll if n == 0 else nll[-8:]).sum().item() / math.log(2)
    assert score.bpb == pytest.approx(bits / score.bytes, rel=1e-5)


def test_the_bound_of_the_scored_half_is_the_mean_over_its_orders():
    """After a clean half, and exact: both orders of two tokens, each token given what is left."""
    model = random_model(tiny_hp())
    window = torch.tensor([[1, 0, 2, 2, 1]])
    scored = torch.tensor([[False, False, True, True]])

    def bits_of(*hidden):
        mask = torch.tensor([[position in hidden for position in range(4)]])
        return tm.masked_nll(model, window, mask)[0].tolist()

    both, first, second = bits_of(2, 3), bits_of(2), bits_of(3)
    exact = (both[2] + second[3] + both[3] + first[2]) / 2
    rows = 4000
    keys = torch.rand(rows, 4, generator=torch.Generator().manual_seed(0))
    for passes in (1, 3):
        nats = tm.any_order_nll(
            model, window.expand(rows, -1), scored, passes, torch.arange(rows), 0.3, keys
        )
        assert nats.mean().item() == pytest.approx(exact, abs=4 * (nats.std() / rows**0.5).item())
        assert nats.std() < 0.5 * exact


@pytest.mark.parametrize("name", SCORES)
def test_split_scores_do_not_depend_on_the_batch(split, name):
    hp, val, model = split
    hp = dataclasses.replace(hp, tstep_steps=3, final_eval_t_samples=3, stride=16)
    scores = []
    for tokens in (32, 96, 4096):
        small = dataclasses.replace(hp, val_batch_size=tokens)
        scores.append(tm.score_windows(name, model, small, val, 19)[0])
    assert max(s.bpb for s in scores) - min(s.bpb for s in scores) < 1e-5
    assert len({(s.seqs, s.tokens, s.bytes) for s in scores}) == 1


def test_plans_of_windows(split):
    """Rows of one call: as many as fit, in the memory of a process too, and always 16 where
    rounding could change the order. A stride is at most a window."""
    hp, val, _ = split
    names = ("nelbo", "tstep", "l2r", "random", "sliding", "confidence")
    for tokens, rows in (
        (16, [1, 1, 1, 1, 1, 16]),
        (64, [2] * 5 + [16]),
        (4096, [40] * 5 + [16]),
    ):
        small = dataclasses.replace(hp, val_batch_size=tokens)
        plans = [tm.WindowPlan(SCORES[name], small, val.stream, 40) for name in names]
        assert [plan.rows for plan in plans] == rows
    passes = dataclasses.replace(hp, val_batch_size=4096, micro_batch_tokens=70)
    assert tm.WindowPlan(SCORES["nelbo"], passes, val.stream, 40).rows == 2
    for stride, used in ((8, 8), (32, 32), (100, 32)):
        plan = tm.WindowPlan(
            SCORES["sliding"], dataclasses.replace(hp, stride=stride), val.stream, 0
        )
        assert plan.stride == used and plan.scored_tokens[:2] == [32, used]
        some = tm.WindowPlan(SCORES["sliding"], plan.hp, val.stream, 3)
        assert some.scored_tokens == [used] * 3 and some.numbers[0] == 0


def test_scores_of_one_name_are_planned_alike():
    table = tm.ESTIMATORS
    for name in ("confidence", "random"):
        assert table["block"][name] == SCORES[name]
    assert table["ar"]["sliding"].windows == 4096
    by_position = [
        (system, name) for system, rows in table.items() for name in rows if rows[name].prefixes
    ]
    assert by_position == [("mdlm", "l2r"), ("ar", "ar"), ("block", "l2r"), ("block", "ar")]


def test_buckets_are_named_by_their_positions():
    assert [tm.bucket_name(bucket, 20) for bucket in range(6)] == (
        ["0", "1", "2-3", "4-7", "8-15", "16-19"]
    )
    assert tm.bucket_name(5, 17) == "16" and tm.bucket_name(1, 2) == "1"


def test_windows_are_evenly_spaced():
    assert tm.evenly_spaced(100, 4) == [0, 25, 50, 75] and tm.evenly_spaced(3, 0) == [0, 1, 2]
    assert tm.evenly_spaced(3, 7) == [0, 1, 2] and tm.evenly_spaced(7, 3) == [0, 2, 4]


@pytest.mark.parametrize(
    "name, group, calls",
    [
        ("nelbo", 1, 4),
        ("tstep", 1, 7),
        ("tgrid", 1, 9),
        ("random", 3, 11),
        ("confidence", 3, 11),
        ("l2r", 4, 8),
    ],
)
def test_how_often_a_window_goes_through_the_model(split, name, group, calls):
    hp, val, _ = split
    hp = dataclasses.replace(hp, tstep_steps=7, final_eval_t_samples=9, chain_group=group)
    model = random_model(hp, scale=0.1)
    rows, hidden = [], model.hidden

    def counted(z, *rest, **named):
        rows.append(len(z))
        return hidden(z, *rest, **named)

    model.hidden = counted
    assert tm.score_windows(name, model, hp, val, 6)[0].tokens == 6 * 32
    assert sum(rows) == 6 * calls


def windows_of(places, **overrides):
    """Windows of four tokens at these places of a score; two of each are context."""
    tokens = torch.arange(5).expand(len(places), 5) % V
    scored = torch.tensor([False, False, True, True]).expand(len(places), 4)
    return tm.Windows(tiny_hp(**overrides), tokens, scored, places)


def noted(monkeypatch, name, result=0.0):
    """The arguments of calls of a function of the script, which is not called."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        return result

    monkeypatch.setattr(tm, name, call)
    return calls


def test_orders_of_the_chain_rule_scores(monkeypatch):
    """What is masked when a position is predicted; CHAIN_GROUP positions share one call, context
    has none."""

    def masked_nll(model, window, mask, scored):
        return mask.sum(1, keepdim=True).float() * scored

    monkeypatch.setattr(tm, "masked_nll", masked_nll)
    windows = windows_of(range(3), train_seq_len=4)
    model = SimpleNamespace(hp=windows.hp, block_size=0)
    found = tm.score_left_to_right(model, windows)
    assert found.tolist() == [[0, 0, 2, 1]] * 3
    windows = windows._replace(scored=torch.ones(3, 4, dtype=torch.bool))
    assert tm.score_left_to_right(model, windows).tolist() == [[4, 3, 2, 1]] * 3
    whole = torch.ones(24, 4, dtype=torch.bool)
    left = {}  # masked positions, by group and seed
    for group, seed in ((1, 0), (1, 1), (3, 0)):
        values = dict(seed=seed, chain_group=group, train_seq_len=4)
        many = windows_of(range(24), **values)._replace(scored=whole)
        left[group, seed] = tm.score_random_order(model, many)
    assert all(sorted(row.tolist()) == [1, 2, 3, 4] for row in left[1, 0])
    assert len(set(map(tuple, left[1, 0].tolist()))) > 8  # of 24 draws of 24 orders
    assert not torch.equal(left[1, 0], left[1, 1])
    assert torch.equal(left[3, 0], torch.where(left[1, 0] > 1, 4, 1))
    later = windows_of(range(5, 7), seed=0, train_seq_len=4)
    found = tm.score_random_order(model, later._replace(scored=whole[:2]))
    assert torch.equal(found, left[1, 0][5:7])  # whatever else is in the batch


def test_scores_take_their_settings_from_their_knobs(monkeypatch):
    windows = windows_of(range(2, 4), chain_group=3, tstep_steps=7, nelbo_passes=5)
    confidence = noted(monkeypatch, "confidence_nll")
    tm.score_by_confidence("model", windows)
    assert confidence[0][2] == 3
    grid, weighted = noted(monkeypatch, "tgrid_masks"), noted(monkeypatch, "weighted_nll")
    tm.score_tgrid("model", windows)
    tm.score_tgrid("model", windows_of(range(2), final_eval_t_samples=9))
    assert [points for points, _ in grid] == [256, 9] and len(weighted) == 2
    tstep = noted(monkeypatch, "discrete_elbo")
    tm.score_tstep("model", windows)
    assert tstep[0][2] == 7 and len(tstep[0][3]) == 2


def test_mask_times_of_the_nelbo_are_a_lattice_at_a_random_place(monkeypatch):
    """The place depends on the seed, the point on the window; keys are each window's own."""
    calls = noted(monkeypatch, "nelbo_masks")
    noted(monkeypatch, "weighted_nll")
    model = SimpleNamespace(hp=tiny_hp(), block_size=0)
    for seed in range(8):
        tm.score_nelbo(model, windows_of(range(4, 7), seed=seed, nelbo_passes=5))
        tm.score_nelbo(model, windows_of(range(5, 6), seed=seed))
    golden = (math.sqrt(5) - 1) / 2
    places = []
    for found, by_itself in zip(calls[::2], calls[1::2], strict=True):
        (passes, times, keys, _), (_, alone, key, _) = found, by_itself
        offset = (times[0] - 4 * golden) % 1
        places.append(offset.item())
        assert passes == 5 and torch.allclose(
            times, (offset + torch.arange(4, 7).double() * golden) % 1
        )
        assert torch.equal(times[1:2], alone) and torch.equal(keys[1:2], key)
        assert keys.unique().numel() == keys.numel()
    assert max(places) - min(places) > 0.5 and min(places) > 1e-6


def constant(nats):
    """An estimator that needs no model."""
    return tm.Estimator(lambda model, windows: torch.full((len(windows.places),), nats))


def test_zero_bytes_are_an_error(split, monkeypatch):
    hp, val, _ = split
    luts = val.luts
    nothing = dict(base_bytes=luts.base_bytes * 0, has_leading_space=luts.has_leading_space & False)
    monkeypatch.setitem(SCORES, "nelbo", constant(1.0))
    with pytest.raises(tm.InputError, match="no bytes"):
        tm.score_windows("nelbo", None, hp, val._replace(luts=luts._replace(**nothing)), 4)


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(split, monkeypatch, nats):
    hp, val, _ = split
    monkeypatch.setitem(SCORES, "tstep", constant(nats))
    with pytest.raises(tm.InputError, match="the tstep score is not a finite number"):
        tm.score_windows("tstep", None, hp, val, 4)


def test_mask_sizes_of_a_spaced_subset_are_evenly_spread(split, monkeypatch):
    """Whatever the spacing of the windows: 64 of 221 are strided, and their 64 sizes still fill the
    strata evenly."""
    hp, val, model = split
    seen = []

    def masked_nll(model, window, mask):
        seen.append(mask.sum(1))
        return torch.ones(mask.shape)

    monkeypatch.setattr(tm, "masked_nll", masked_nll)
    once = dataclasses.replace(hp, nelbo_passes=1)
    for wanted in (64, 96, 192):
        seen.clear()
        tm.score_windows("nelbo", model, once, val, wanted)
        counts = torch.cat(seen).bincount(minlength=33)[1:]
        assert counts.sum() == wanted and (counts - wanted / 32).abs().max() <= 2


@pytest.mark.parametrize(
    "system, names",
    [
        (
            dict(neighbors=1),
            ("nelbo", "l2r", "sliding", "sliding_nelbo", "confidence", "random", "tstep", "tgrid"),
        ),
        (dict(objective="ar"), ("ar", "sliding")),
        (dict(block_size=4), ("l2r", "ar", "nelbo", "confidence", "random")),
        (dict(backbone="dit", doc_chunks=True), ("nelbo", "l2r")),
    ],
    ids=["mdlm", "ar", "block", "dit"],
)
def test_compiled_scores_are_the_same(system, names, split, monkeypatch):
    """Few graphs for all shapes: from 8 on, torch would compile no more. Without the generation of
    code, which takes minutes."""
    hp, val, _ = split
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    backend = functools.partial(torch.compile, backend=count)
    monkeypatch.setattr(torch, "compile", backend)
    settings = dict(scores=",".join(f"{name}:5" for name in names), final_eval_max_seqs=5)
    settings |= dict(val_batch_size=3 * hp.train_seq_len, tstep_steps=3, final_eval_t_samples=0)
    hp = dataclasses.replace(hp, **settings, **system)
    found = []
    for compile_knob in ("off", "on"):
        own = dataclasses.replace(hp, compile=compile_knob)
        model = random_model(own)
        log = Lines()
        tm.score_model(tm.Artifact(model, own, "fp32"), own, val, log)
        found.append(log.found(r"^score:(\w+) .*?bpb:(\S+) "))
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert {name for name, _ in found[0]} == set(names) and 0 < len(graphs) < 8
    for (_, plain), (_, compiled) in zip(*found, strict=True):
        assert float(plain) == pytest.approx(float(compiled), abs=2e-4)
