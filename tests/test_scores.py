"""Every score is the length of a code: enumerated over all sequences, masks and orders of tiny random models."""

import dataclasses
import itertools
import math
import re
import time

import pytest
import torch
import torch.nn.functional as F

import codec
import train_mdlm as tm
from conftest import random_model, tiny_hp

V, L = 3, 4
EVERY = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, 4) all sequences
ORDERS = list(itertools.permutations(range(L)))
SUBSETS = [
    torch.tensor([i in chosen for i in range(L)])
    for k in range(1, L + 1)
    for chosen in itertools.combinations(range(L), k)
]


def token_nll(model, x0, mask):
    """(B, L) float64 −ln p(x_i | visible) of every position, straight from the model's logits."""
    logits = model(torch.where(mask, model.hp.mask_id, x0)).detach().double()
    return -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]


def enumerated_nelbo(model, x0):
    """(B,) mean over k of the mean over all masks of k positions of (L/k)·Σ_masked nll."""
    nats = torch.zeros(len(x0), dtype=torch.float64)
    for mask in SUBSETS:
        k = int(mask.sum())
        nats += (token_nll(model, x0, mask) * mask).sum(1) * (L / k) / math.comb(L, k) / L
    return nats


def enumerated_tstep(model, x0, steps, eps=1e-3):
    """(B,) the T-step bound with α_i = 1 − (1 − ε)·i/T, every mask with its probability."""
    nats = torch.full((len(x0),), eps * L * math.log(V), dtype=torch.float64)
    alpha = [1 - (1 - eps) * i / steps for i in range(steps + 1)]
    for mask in SUBSETS:
        k, nll = int(mask.sum()), (token_nll(model, x0, mask) * mask).sum(1)
        nats += nll * sum(
            (alpha[i - 1] - alpha[i]) / (1 - alpha[i]) * (1 - alpha[i]) ** k * alpha[i] ** (L - k)
            for i in range(1, steps + 1)
        )
    return nats


def one_by_one(model, x0, order):
    """(B, L) the chain rule as it is defined: one position after the other, one sequence after the other."""
    nats = torch.zeros(x0.shape, dtype=torch.float64)
    for row in range(len(x0)):
        mask = torch.ones(x0.shape[1], dtype=torch.bool)
        for i in order:
            nats[row, i] = token_nll(model, x0[row : row + 1], mask)[0, i]
            mask[i] = False
    return nats


def total_probability(nats):
    return torch.exp(-nats.double().sum(1)).sum().item()


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_hp())


@pytest.fixture(scope="module")
def split(tiny_env):
    """A real validation split with its byte tables, and a random model for it."""
    hp = tm.Hyperparameters.from_env(tiny_env)
    val = tm.TokenStream(hp.data_path, "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    return hp, val, luts, random_model(hp, scale=0.1)


# ---- chain rules


def test_every_order_is_a_code_and_their_mean_is_the_nelbo(model):
    lengths = torch.stack([tm.chain_rule(model, EVERY, torch.tensor(order)).double().sum(1) for order in ORDERS])
    assert torch.allclose(torch.exp(-lengths).sum(1), torch.ones(24, dtype=torch.float64), atol=1e-5)
    exact = enumerated_nelbo(model, EVERY)
    assert torch.allclose(lengths.mean(0), exact, atol=1e-5)
    # so the NELBO is itself a code length: by Jensen its probabilities sum to at most 1 (and here well below)
    assert torch.exp(-exact).sum() < 1


@pytest.mark.parametrize("order", ["l2r", "random", "confidence"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 9])
def test_every_named_order_and_group_size_sums_to_one(model, order, group):
    assert total_probability(tm.chain_rule(model, EVERY, order, group)) == pytest.approx(1, abs=1e-5)


def test_scores_that_cheat_do_not_sum_to_one(model):
    """Pseudo-likelihood (each token sees all others), and a confidence that looks at the hidden token."""
    pseudo = torch.zeros(EVERY.shape, dtype=torch.float64)
    for i in range(L):
        pseudo[:, i] = token_nll(model, EVERY, torch.arange(L) == i)[:, i]
    assert abs(total_probability(pseudo) - 1) > 0.05
    mask, peeking = torch.ones_like(EVERY, dtype=torch.bool), torch.zeros(len(EVERY), dtype=torch.float64)
    for _ in range(L):
        nll = token_nll(model, EVERY, mask).masked_fill(~mask, math.inf)
        cheapest = nll.min(1)
        peeking += cheapest.values
        mask[torch.arange(81), cheapest.indices] = False
    assert torch.exp(-peeking).sum() > 1.05


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_chain_rule_is_its_definition(model, order):
    expected = one_by_one(model, EVERY[::9], order)
    assert torch.allclose(tm.chain_rule(model, EVERY[::9], torch.tensor(order)).double(), expected, atol=1e-5)
    if order == (0, 1, 2, 3):
        assert torch.equal(tm.chain_rule(model, EVERY[::9]), tm.chain_rule(model, EVERY[::9], torch.tensor(order)))


def test_rows_may_have_orders_of_their_own(model):
    orders = torch.tensor(ORDERS)
    x0 = EVERY[40].expand(24, L)
    together = tm.chain_rule(model, x0, orders)
    for row in range(24):
        assert torch.allclose(together[row], tm.chain_rule(model, x0[:1], orders[row])[0], atol=1e-6)


@pytest.mark.parametrize("order", ["l2r", "random", "confidence"])
def test_a_group_is_predicted_from_what_was_revealed_before_it(model, order):
    """With one group of all positions the tokens are independent given nothing: the all-masked prediction."""
    blind = token_nll(model, EVERY, torch.ones(L, dtype=torch.bool))
    assert torch.allclose(tm.chain_rule(model, EVERY, order, L).double(), blind, atol=1e-5)


def test_confidence_reveals_the_surest_position_first(model):
    x0 = EVERY[::7]
    nats = tm.chain_rule(model, x0, "confidence")
    for row in range(len(x0)):
        mask, expected = torch.ones(L, dtype=torch.bool), torch.zeros(L)
        while mask.any():
            logp = model(torch.where(mask, model.hp.mask_id, x0[row])[None])[0].detach().log_softmax(-1)
            sure = logp.amax(-1).masked_fill(~mask, -math.inf)
            surest = int((sure > sure.max() - 1e-5).int().argmax())  # when all is masked, all positions are alike
            expected[surest] = -logp[surest, x0[row, surest]]
            mask[surest] = False
        assert torch.allclose(nats[row], expected, atol=1e-5)


def test_confidence_does_not_depend_on_hidden_tokens_ties_or_company():
    hp = tiny_hp(vocab_size=5, train_seq_len=16, train_batch_tokens=64)
    model = random_model(hp)
    x0 = torch.randint(0, 5, (23, 16), generator=torch.Generator().manual_seed(0))
    whole = tm.chain_rule(model, x0, "confidence")
    shuffled = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(tm.chain_rule(model, x0[shuffled], "confidence"), whole[shuffled], atol=1e-5)
    for row in (0, 7, 22):
        assert torch.allclose(tm.chain_rule(model, x0[row : row + 1], "confidence")[0], whole[row], atol=1e-5)
    # the first position to be revealed is the same for all sequences: nothing is visible yet
    z = torch.full_like(x0, hp.mask_id)
    first, _ = next(iter(tm.reveal_surest(model, z)))
    assert (first == first[0]).all()
    # a model without attention is equally sure everywhere: ties go from left to right
    with torch.no_grad():
        for block in model.blocks:
            block.attn_scale.zero_()
    z, seen = torch.full_like(x0, hp.mask_id), []
    for at, _ in tm.reveal_surest(model, z, 3):
        seen.append(at[0])
        z.scatter_(1, at, x0.gather(1, at))
    assert torch.cat(seen).tolist() == list(range(16))


def test_random_order_depends_on_the_public_seed_only(model):
    a, b = tm.chain_rule(model, EVERY, "random", seed=1), tm.chain_rule(model, EVERY, "random", seed=1)
    assert torch.equal(a, b)
    assert any(not torch.allclose(a, tm.chain_rule(model, EVERY, "random", seed=seed)) for seed in (2, 3, 4))


def test_unknown_orders_are_refused(model):
    with pytest.raises(ValueError, match="r2l is not an order"):
        tm.chain_rule(model, EVERY, "r2l")
    with pytest.raises(ValueError, match="left to right"):
        tm.chain_rule(random_model(tiny_hp(objective="ar")), EVERY, "random")


def test_causal_model_is_a_code_however_it_is_computed():
    model = random_model(tiny_hp(objective="ar"))
    window = torch.cat([torch.full((81, 1), 2), EVERY], dim=1)
    nll = tm.causal_nll(model, window)
    assert nll.shape == (81, L) and total_probability(nll) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(tm.chain_rule(model, EVERY, before=2), nll)
    z, stepwise = torch.full_like(EVERY, V), torch.zeros(81, L)
    for at, logp in codec.reveal_in_order(model, z, torch.arange(L).expand(81, L), 1):  # as a decoder does it
        tokens = EVERY.gather(1, at)
        stepwise.scatter_(1, at, -logp.gather(2, tokens[..., None])[..., 0])
        z.scatter_(1, at, tokens)
    assert torch.allclose(stepwise, tm.chain_rule(model, EVERY), atol=1e-5)


def test_boundaries_that_are_always_visible_are_paid_for(model):
    """With 0 for a boundary that is never masked: the rest alone overflows 1, with the positions paid it is a code."""
    free, paid = 0.0, 0.0
    for x in EVERY:
        anchors = x == 0
        steps = torch.where(anchors, -1, anchors.logical_not().cumsum(0) - 1)
        nats = tm.ordered_nll(model, x[None], steps[None])
        assert (nats[0][anchors] == 0).all()
        bits = nats.double().sum().item() / math.log(2)
        free += 2**-bits
        paid += 2 ** -(bits + tm.boundary_bits(int(anchors.sum()), L))
    assert free > 1 and paid < 1
    everywhere = [2 ** -tm.boundary_bits(n, L) * math.comb(L, n) for n in range(L + 1)]
    assert sum(everywhere) == pytest.approx(1) and tm.boundary_bits(0, 1023) == 10


def test_scored_positions_alone_go_through_the_last_mlp_and_the_head():
    """A model call for one position of 64 spends its last MLP and its head on one position, and is faster for it."""
    hp = tiny_hp(vocab_size=384, train_seq_len=64, train_batch_tokens=256, model_dim=32)
    model = random_model(hp)
    seen = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    x0 = torch.randint(0, 384, (2, 64))
    tm.chain_rule(model, x0)
    assert sum(seen) == 2 * 64 and len(seen) == 2 * 64 * 64 // 2048
    h = model.hidden(x0, at=torch.tensor([3, 70]))
    assert torch.allclose(h, model.hidden(x0).flatten(0, 1)[[3, 70]], atol=1e-6)


# ---- bounds


def test_masked_nll_is_that_of_the_masked_positions(model):
    mask = torch.rand(81, L, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.allclose(tm.masked_nll(model, EVERY, mask).double(), token_nll(model, EVERY, mask) * mask, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_nelbo_is_unbiased_within_four_standard_errors(model, passes):
    x0 = EVERY[[5, 17, 40, 77]]
    exact = enumerated_nelbo(model, x0)
    g = torch.Generator().manual_seed(passes)
    many = x0.repeat(20, 1)  # rows of one call share a lattice: the calls are the independent draws
    draws = torch.stack([tm.nelbo(model, many, passes=passes, generator=g).view(20, 4).mean(0) for _ in range(60)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all() and ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_weights_of_the_nelbo_are_exact():
    """Σ_k P(k)·weight(k)·k = Σ_k L/k·k/L = L for every number of passes: the weights average to those of uniform k."""
    length, fine = 7, 20_000
    times = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    for passes in (1, 2, 4):
        covered = torch.zeros(length, dtype=torch.float64)
        for mask, weight in tm.nelbo_masks(
            passes, times, lambda: torch.rand(fine, length), torch.ones(fine, length, dtype=torch.bool)
        ):
            covered.index_add_(0, mask.sum(1) - 1, weight / fine)
        expected = 1 / torch.arange(1, length + 1, dtype=torch.float64)  # (L/k)/L for each k
        assert torch.allclose(covered, expected, rtol=2e-3)


def test_mask_sizes_are_evenly_spread_and_arcs_do_not_overlap(monkeypatch):
    seen = []
    hp = tiny_hp(train_seq_len=50, train_batch_tokens=200)
    monkeypatch.setattr(tm, "masked_nll", lambda model, x0, mask: seen.append(mask) or torch.zeros(x0.shape))
    x0 = torch.zeros(1000, 50, dtype=torch.int64)
    tm.nelbo(random_model(hp), x0, passes=2, generator=torch.Generator().manual_seed(0))
    counts = torch.cat([mask.sum(1) for mask in seen]).bincount(minlength=51)[1:]
    k = torch.arange(1, 51)
    expected = 2000 * ((k / 50) ** (2 / 3) - ((k - 1) / 50) ** (2 / 3))
    assert counts.sum() == 2000 and (counts - expected).abs().max() <= 4  # independent draws miss by 9 at one sigma
    small = seen[0].sum(1) + seen[1].sum(1) <= 50
    assert small.any() and not (seen[0] & seen[1])[small].any()


def test_uniform_logits_cost_exactly_l_ln_v():
    model = random_model(tiny_hp())
    torch.nn.init.zeros_(model.tok_emb.weight)
    exact = torch.tensor(L * math.log(V), dtype=torch.float64)
    for order in ("l2r", "random", "confidence"):
        assert torch.allclose(tm.chain_rule(model, EVERY, order).double().sum(1), exact)
    # one mask of k of L positions, weighted, is L·ln V on average over k
    g = torch.Generator().manual_seed(0)
    assert tm.nelbo(model, EVERY.repeat(50, 1), 4, g).mean().item() == pytest.approx(exact.item(), rel=5e-3)
    many = tm.discrete_elbo(model, EVERY.repeat(50, 1), 8, g)
    assert many.mean().item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_discrete_elbo_is_unbiased(model, steps):
    x0 = EVERY[[5, 17, 40, 77]]
    g = torch.Generator().manual_seed(steps)
    draws = tm.discrete_elbo(model, x0.repeat(800, 1), steps=steps, generator=g).view(800, 4)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - enumerated_tstep(model, x0, steps)).abs() < 4 * error + 1e-9).all()


def test_tstep_bound_decreases_towards_the_nelbo():
    """For a model that has learnt: sequences that alternate. Summed over them, so that it is the data's code length."""
    model = random_model(tiny_hp(), scale=0.1)
    x0 = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [2, 2, 2, 2], [1, 2, 1, 2]])
    adam, g = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(0)
    for _ in range(150):
        mask = torch.rand(64, L, generator=g) < torch.rand(64, 1, generator=g)
        rows = x0.repeat(16, 1)
        loss = F.cross_entropy(model(torch.where(mask, V, rows))[mask], rows[mask])
        adam.zero_grad()
        loss.backward()
        adam.step()
    exact = enumerated_nelbo(model, x0).sum()
    bounds = [enumerated_tstep(model, x0, steps).sum() for steps in (1, 2, 4, 8, 16, 64, 512)]
    assert all(later < earlier for earlier, later in itertools.pairwise(bounds))
    assert exact < bounds[-1] < exact * 1.01 and bounds[0] > exact * 1.2


def test_tgrid_overstates_by_its_forced_masks(model):
    """PR 1699's estimator converges to its own expectation, which is not the NELBO."""
    x0, points, eps = EVERY[[40]], 8, 1e-3
    expected = 0.0
    for t in torch.linspace(eps, 1, points).tolist():
        for mask in SUBSETS:
            if t < 0.01:  # position 0 is always masked: probability of the rest only
                probability = 0.0 if not mask[0] else t ** (int(mask.sum()) - 1) * (1 - t) ** (L - int(mask.sum()))
            else:
                probability = t ** int(mask.sum()) * (1 - t) ** (L - int(mask.sum()))
            expected += (1 - eps) / points / t * probability * float((token_nll(model, x0, mask) * mask).sum())
    g = torch.Generator().manual_seed(0)
    many = x0.repeat(2000, 1)
    draws = tm.weighted_nll(model, many, tm.tgrid_masks(points, lambda: torch.rand(2000, L, generator=g)))
    assert abs(draws.mean() - expected) < 4 * draws.std() / len(draws) ** 0.5
    assert expected > enumerated_nelbo(model, x0) + 5  # at L = 4 the forced mask at t = 0.001 costs a thousand weights


# ---- scores of a split


def test_split_score_is_the_ratio_with_its_standard_error(split, monkeypatch):
    hp, val, luts, _ = split
    monkeypatch.setattr(tm, "window_nats", lambda *rest: torch.tensor([1.0 + place for place in rest[-1]]))
    score, _ = tm.score_windows("nelbo", None, hp, val, luts, 0)
    count = val.count_windows(32)
    windows = val.windows(range(count), 32)
    size = tm.count_bytes(windows[:, 1:], windows[:, 0], luts).double()
    bits = (1.0 + torch.arange(count)).double() / math.log(2)
    bpb = bits.sum() / size.sum()
    assert score.bpb == pytest.approx(bpb.item()) and score.bytes == size.sum() and score.seqs == count
    assert score.stderr == pytest.approx((((bits - bpb * size) ** 2).sum().sqrt() / size.sum()).item())
    assert score.loss == pytest.approx((1.0 + torch.arange(count)).mean().item() / 32)


def test_standard_errors_cover_the_truth():
    """Repeated draws of windows from a population: the ratio misses the population's by 4 stderr at most, and its
    spread over the draws is what stderr says."""
    g = torch.Generator().manual_seed(0)
    size = torch.randint(40, 120, (20_000,), generator=g).double()
    bits = size * (2 + 0.3 * torch.randn(20_000, generator=g)) + 5 * torch.randn(20_000, generator=g)
    truth = bits.sum() / size.sum()
    found = []
    for _ in range(400):
        chosen = torch.randint(0, 20_000, (200,), generator=g)
        found.append(tm.ratio(bits[chosen], size[chosen]))
    bpb, stderr = torch.tensor(found, dtype=torch.float64).T
    assert ((bpb - truth).abs() < 4 * stderr).all() and stderr.mean() == pytest.approx(bpb.std().item(), rel=0.1)


def definition(name, model, hp, window, visible):
    """(B, L) nats of the scored tokens of one score, written down naively; `visible` tokens are free context."""
    x0, length = window[:, 1:], hp.train_seq_len
    if name == "l2r":
        return one_by_one(model, x0, range(length))
    nats = torch.zeros(x0.shape, dtype=torch.float64)
    for i in range(visible, length):
        nats[:, i] = token_nll(model, x0, torch.arange(length) >= i)[:, i]
    return nats


@pytest.mark.parametrize("name", ["l2r", "sliding"])
def test_split_scores_are_their_definitions(split, name):
    hp, val, luts, model = split
    hp = dataclasses.replace(hp, stride=8)
    score, table = tm.score_windows(name, model, hp, val, luts, 5)
    stride = 8 if name == "sliding" else 32
    bits = nbytes = tokens = 0
    for n in tm.spaced(1 + (val.total - 1 - 32) // stride, 5):
        window = torch.from_numpy(val.read(n * stride, 33).astype("int64"))[None]
        visible = 32 - stride
        bits += definition(name, model, hp, window, visible)[:, visible:].sum().item() / math.log(2)
        nbytes += int(tm.count_bytes(window[0, 1 + visible :], window[0, visible], luts))
        tokens += 32 - visible
    assert score.bpb == pytest.approx(bits / nbytes, rel=1e-5)
    assert (score.bytes, score.tokens) == (nbytes, tokens)
    if name == "l2r":  # by position: 0, 1, 2-3, 4-7, 8-15, 16-31
        assert table.shape == (5, 6, 2) and [tm.bucket_name(b, 32) for b in range(6)][2:4] == ["2-3", "4-7"]
        assert table[..., 1].sum() == nbytes and (table[..., 0] > 0).all()


def test_prefix_lines_are_the_score_by_position(split, tmp_path):
    hp, val, luts, model = split
    hp = dataclasses.replace(hp, scores="l2r", l2r_seqs=6, final_eval_max_seqs=8)
    tm.save_artifact(model, dataclasses.replace(hp, quant_mode="fp32"), tmp_path / "a.mdlm")
    lines = []

    class Log:
        progress = staticmethod(lambda *rest: None)
        __call__ = staticmethod(lambda line, screen=True: lines.append(line))

    stored, _, label = tm.read_artifact(tmp_path / "a.mdlm")
    tm.score_model(stored, label, hp, val, luts, Log())
    found = dict(re.findall(r"^prefix:(\S+) bpb:(\S+) ", "\n".join(lines), re.MULTILINE))
    window = val.windows(tm.spaced(val.count_windows(32), 6), 32)
    bits = tm.chain_rule(model, window[:, 1:]).double().sum(0) / math.log(2)
    size = tm.token_bytes(window[:, 1:], window[:, 0], luts).sum(0)
    for name, at in {"0": slice(0, 1), "1": slice(1, 2), "2-3": slice(2, 4), "16-31": slice(16, 32)}.items():
        assert float(found[name]) == pytest.approx((bits[at].sum() / size[at].sum()).item(), abs=2e-3)
    assert len(found) == 6


def test_sliding_windows_of_a_causal_model(split):
    hp, val, luts, _ = split
    hp = dataclasses.replace(hp, objective="ar", stride=8)
    model = random_model(hp, scale=0.1)
    stream = tm.TokenStream(hp.data_path, "val")
    stream.total = 1000
    score, _ = tm.score_windows("sliding", model, hp, stream, luts, 0)
    assert score.tokens == 32 + (score.seqs - 1) * 8 and score.seqs == 1 + (999 - 32) // 8
    first = torch.from_numpy(val.read(0, 32 + 8 * (score.seqs - 1) + 1).astype("int64"))
    assert score.bytes == tm.count_bytes(first[1:], first[0], luts)  # every token once
    bits = 0.0
    for n in range(score.seqs):
        window = first[n * 8 : n * 8 + 33]
        nll = F.cross_entropy(model(window[None, :-1])[0].detach(), window[1:], reduction="none").double()
        bits += (nll if n == 0 else nll[-8:]).sum().item() / math.log(2)
    assert score.bpb == pytest.approx(bits / score.bytes, rel=1e-5)


@pytest.mark.parametrize("name", tm.SCORE_NAMES)
def test_split_scores_do_not_depend_on_the_batch(split, name):
    hp, val, luts, model = split
    hp = dataclasses.replace(hp, tstep_steps=3, final_eval_t_samples=3, stride=16)
    scores = []
    for tokens in (32, 96, 4096):
        small = dataclasses.replace(hp, val_batch_size=tokens)
        scores.append(tm.score_windows(name, model, small, val, luts, 19)[0])
    assert max(s.bpb for s in scores) - min(s.bpb for s in scores) < 1e-5
    assert len({(s.seqs, s.tokens, s.bytes) for s in scores}) == 1
    assert tm.spaced(100, 4) == [0, 25, 50, 75] and tm.spaced(3, 0) == [0, 1, 2]


@pytest.mark.parametrize(
    "name, group, calls",
    [("nelbo", 1, 4), ("tstep", 1, 7), ("tgrid", 1, 9), ("random", 3, 11), ("confidence", 3, 11), ("l2r", 4, 8)],
)
def test_how_often_a_window_goes_through_the_model(split, name, group, calls):
    hp, val, luts, _ = split
    hp = dataclasses.replace(hp, tstep_steps=7, final_eval_t_samples=9, chain_group=group, train_seq_len=32)
    model = random_model(hp, scale=0.1)
    rows, hidden = [], model.hidden
    model.hidden = lambda z, *rest, **named: rows.append(len(z)) or hidden(z, *rest, **named)
    assert tm.score_windows(name, model, hp, val, luts, 6)[0].tokens == 6 * 32
    assert sum(rows) == 6 * calls


def test_zero_bytes_are_an_error(split, monkeypatch):
    hp, val, luts, _ = split
    empty = luts._replace(base_bytes=luts.base_bytes * 0, has_leading_space=luts.has_leading_space & False)
    monkeypatch.setattr(tm, "window_nats", lambda *rest: torch.ones(len(rest[-1])))
    with pytest.raises(ValueError, match="no bytes"):
        tm.score_windows("nelbo", None, hp, val, empty, 4)


def test_mask_sizes_of_a_spaced_subset_are_evenly_spread(split, monkeypatch):
    """Whatever the spacing of the windows: 64 of 221 are strided, and their 64 sizes still fill the strata evenly."""
    hp, val, luts, model = split
    seen = []
    monkeypatch.setattr(tm, "masked_nll", lambda model, x0, mask: seen.append(mask.sum(1)) or torch.ones(x0.shape))
    for wanted in (64, 96, 192):
        seen.clear()
        tm.score_windows("nelbo", model, dataclasses.replace(hp, nelbo_passes=1), val, luts, wanted)
        counts = torch.cat(seen).bincount(minlength=33)[1:]
        assert counts.sum() == wanted and (counts - wanted / 32).abs().max() <= 2


def test_chain_rule_is_faster_than_the_naive_loop():
    """Against a loop over positions with full logits; a ratio in one process, and a loose one: machines are noisy."""
    hp = tm.Hyperparameters(preset="demo")
    model = random_model(hp, scale=0.1)
    x0 = torch.randint(0, 1024, (2, 128), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def naive():
        nats = torch.zeros(x0.shape)
        for i in range(128):
            logits = model(torch.where(torch.arange(128) >= i, hp.mask_id, x0))
            nats[:, i] = F.cross_entropy(logits[:, i], x0[:, i], reduction="none")
        return nats

    def best(f):
        times = []
        for _ in range(2):
            started = time.perf_counter()
            result = f()
            times.append(time.perf_counter() - started)
        return min(times), result

    (slow, expected), (fast, found) = best(naive), best(lambda: tm.chain_rule(model, x0))
    assert torch.allclose(found, expected, atol=1e-4) and fast < slow
