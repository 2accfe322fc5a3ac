"""The any-order NELBO is a code length: enumerated over all sequences, masks and orders of tiny random models."""

import itertools
import math

import pytest
import torch

import train_mdlm as tm
from conftest import random_model, tiny_hp

V, L = 3, 4
EVERY = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, 4) all sequences
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


def chain_rule(model, x0, order):
    """(B,) code length that reveals one position after the other."""
    mask, nats = torch.ones(L, dtype=torch.bool), torch.zeros(len(x0), dtype=torch.float64)
    for i in order:
        nats += token_nll(model, x0, mask)[:, i]
        mask[i] = False
    return nats


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_hp())


def test_every_order_is_a_code_and_their_mean_is_the_nelbo(model):
    lengths = torch.stack([chain_rule(model, EVERY, order) for order in itertools.permutations(range(L))])
    assert torch.allclose(torch.exp(-lengths).sum(1), torch.ones(24, dtype=torch.float64), atol=1e-5)
    exact = enumerated_nelbo(model, EVERY)
    assert torch.allclose(lengths.mean(0), exact, atol=1e-5)
    # so the NELBO is itself a code length: by Jensen its probabilities sum to at most 1 (and here well below)
    assert torch.exp(-exact).sum() < 1


def test_masked_nll_is_the_sum_over_masked_positions(model):
    mask = torch.rand(81, L, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = (token_nll(model, EVERY, mask) * mask).sum(1)
    assert torch.allclose(tm.masked_nll(model, EVERY, mask), expected, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_nelbo_is_unbiased_within_four_standard_errors(model, passes):
    x0 = EVERY[[5, 17, 40, 77]]
    exact = enumerated_nelbo(model, x0)
    g = torch.Generator().manual_seed(passes)
    draws = torch.stack([tm.nelbo(model, x0, passes=passes, generator=g) for _ in range(500)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all() and ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_mask_sizes_are_evenly_spread_over_rows_and_passes(model, monkeypatch):
    seen = []
    monkeypatch.setattr(tm, "masked_nll", lambda model, x0, mask: seen.append(mask.sum(1)) or torch.zeros(len(x0)))
    x0 = torch.zeros(1000, 50, dtype=torch.int64)
    tm.nelbo(model, x0, passes=2, generator=torch.Generator().manual_seed(0))
    counts = torch.cat(seen).bincount(minlength=51)[1:]
    assert counts.sum() == 2000 and (counts - 40).abs().max() <= 4  # independent draws would miss by 6 at one sigma
    assert ((seen[0] - seen[1]).abs() - 25).abs().max() <= 1  # a row's two masks are half the range apart


def test_uniform_logits_cost_exactly_l_ln_v():
    model = random_model(tiny_hp())
    torch.nn.init.zeros_(model.tok_emb.weight)
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(tm.nelbo(model, EVERY, 2, generator), torch.tensor(L * math.log(V), dtype=torch.float64))


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
    many = x0.repeat(40, 1)
    draws = torch.cat([tm.tgrid_nelbo(model, many, points, lambda: torch.rand(40, L, generator=g)) for _ in range(50)])
    assert abs(draws.mean() - expected) < 4 * draws.std() / len(draws) ** 0.5
    assert expected > enumerated_nelbo(model, x0) + 5  # at L = 4 the forced mask at t = 0.001 costs a thousand weights


def test_causal_model_is_a_code():
    model = random_model(tiny_hp(objective="ar"))
    window = torch.cat([torch.full((81, 1), 2), EVERY], dim=1)
    nll = tm.causal_nll(model, window)
    assert nll.shape == (81, L) and abs(torch.exp(-nll.double().sum(1)).sum() - 1) < 1e-5


def test_split_score_is_the_ratio_with_its_standard_error(tiny_env):
    hp = tm.Hyperparameters.from_env(tiny_env)
    val = tm.TokenStream(hp.data_path, "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    score = tm.score_windows(lambda window, places: torch.tensor([1.0 + place for place in places]), val, luts, hp, 0)
    count = val.count_windows(32)
    windows = val.windows(range(count), 32)
    size = tm.count_bytes(windows[:, 1:], windows[:, 0], luts).double()
    bits = (1.0 + torch.arange(count)).double() / math.log(2)
    bpb = bits.sum() / size.sum()
    assert score.bpb == pytest.approx(bpb.item()) and score.bytes == size.sum() and score.seqs == count
    assert score.stderr == pytest.approx((((bits - bpb * size) ** 2).sum().sqrt() / size.sum()).item())
    assert score.loss == pytest.approx((1.0 + torch.arange(count)).mean().item() / 32)


def test_split_score_does_not_depend_on_the_batch(tiny_env):
    hp = tm.Hyperparameters.from_env(tiny_env)
    val = tm.TokenStream(hp.data_path, "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    model = random_model(hp, scale=0.1)
    scores = []
    for tokens in (32, 96, 4096):
        small = tm.dataclasses.replace(hp, val_batch_size=tokens)
        scores.append(tm.score_windows(tm.headline_estimator(model, small, 2), val, luts, small, 24).bpb)
    assert max(scores) - min(scores) < 1e-5 and tm.spaced(100, 4) == [0, 25, 50, 75] and tm.spaced(3, 0) == [0, 1, 2]


def test_zero_bytes_are_an_error(tiny_env):
    hp = tm.Hyperparameters.from_env(tiny_env)
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    empty = luts._replace(base_bytes=luts.base_bytes * 0, has_leading_space=luts.has_leading_space & False)
    with pytest.raises(ValueError, match="no bytes"):
        tm.score_windows(
            lambda window, places: torch.ones(len(places)), tm.TokenStream(hp.data_path, "val"), empty, hp, 4
        )


def test_mask_sizes_of_a_spaced_subset_are_evenly_spread(tiny_env, monkeypatch):
    """Whatever the spacing of the windows: 64 of 221 are strided, and their 64 sizes still fill 1..L evenly."""
    hp = tm.Hyperparameters.from_env(tiny_env)
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    seen = []
    monkeypatch.setattr(
        tm, "masked_nll", lambda model, x0, mask: seen.append(mask.sum(1)) or torch.ones(len(x0), dtype=torch.float64)
    )
    for wanted in (64, 96, 192):
        seen.clear()
        estimate = tm.headline_estimator(None, hp, 1)
        tm.score_windows(estimate, tm.TokenStream(hp.data_path, "val"), luts, hp, wanted)
        counts = torch.cat(seen).bincount(minlength=33)[1:]
        assert counts.sum() == wanted and (counts - wanted / 32).abs().max() <= 2
