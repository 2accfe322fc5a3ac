"""ANCHOR_BOS: what is always visible is neither predicted nor free; every score against its definition, enumerated."""

import dataclasses
import itertools
import math

import pytest
import torch

import train_mdlm as tm
from conftest import random_model, tiny_hp

V, L = 4, 4
EVERY = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (256, 4), with 0 to 4 anchors


@pytest.fixture(scope="module", params=["unet", "dit"])
def model(request):
    """The U-Net, or a DiT that finds the noise level itself: the scores must hold for both."""
    hp = tiny_hp(vocab_size=V, anchor_bos=True, backbone=request.param, num_kv_heads=2)
    return random_model(hp, scale=0.3)


def free_of(x0):
    return x0 != tm.BOS_ID


def token_nll(model, x0, mask):
    logits = model(torch.where(mask, model.hp.mask_id, x0)).detach().double()
    return -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]


def subsets():
    return [torch.tensor(bits) for bits in itertools.product([False, True], repeat=L)]


@pytest.mark.parametrize("order", ["l2r", "random", "confidence", (2, 0, 3, 1)])
@pytest.mark.parametrize("group", [1, 3])
def test_a_chain_rule_reveals_the_free_tokens_and_charges_the_anchors(model, order, group):
    named = torch.tensor(order) if isinstance(order, tuple) else order
    nats = tm.chain_rule(model, EVERY, named, group).double()
    assert (nats[~free_of(EVERY)] == 0).all() and (nats[free_of(EVERY)] > 0).all()
    # given where the anchors are, the rest is a code over all tokens; <s> itself is predicted in vain
    places = free_of(EVERY).long() @ (2 ** torch.arange(L))
    given = torch.zeros(16, dtype=torch.float64).index_add_(0, places, torch.exp(-nats.sum(1)))
    assert (given <= 1 + 1e-6).all() and given[0] == 1 and (given[1:] > 0.02).all()
    paid = torch.tensor([2 ** -tm.boundary_bits(int(n), L) for n in (~free_of(EVERY)).sum(1)], dtype=torch.float64)
    assert 0.02 < (torch.exp(-nats.sum(1)) * paid).sum() <= 1 + 1e-6
    if isinstance(order, tuple) and group == 1:
        expected = torch.zeros(EVERY.shape, dtype=torch.float64)
        mask = free_of(EVERY)
        for i in order:
            expected[:, i] = token_nll(model, EVERY, mask)[:, i] * mask[:, i]
            mask[:, i] = False
        assert torch.allclose(nats, expected, atol=1e-5)


def test_places_of_anchors_are_a_code():
    for length in (1, 4, 9):
        total = sum(math.comb(length, n) * 2 ** -tm.boundary_bits(n, length) for n in range(length + 1))
        assert total == pytest.approx(1)


def enumerated_nelbo(model, x0):
    """(B,) mean over k = 1..n and over the masks of k of a row's n free tokens of (n/k)·Σ nll."""
    nats, free = torch.zeros(len(x0), dtype=torch.float64), free_of(x0)
    n = free.sum(1)
    for mask in subsets():
        k = int(mask.sum())
        fits = (free | ~mask).all(1) & (k > 0)
        share = torch.tensor([math.comb(int(m), k) for m in n]).clamp(min=1)
        nats += torch.where(fits, (token_nll(model, x0, free & mask) * (free & mask)).sum(1) / max(k, 1) / share, 0)
    return nats


def test_nelbo_is_the_mean_over_the_masks_of_free_tokens(model):
    exact = enumerated_nelbo(model, EVERY)
    assert (exact[(EVERY == tm.BOS_ID).all(1)] == 0).all()
    g, some = torch.Generator().manual_seed(0), [0, 1, 5, 85, 27, 130, 211, 255]  # 0 to 4 anchors
    for passes in (1, 3):
        many = EVERY[some].repeat(64, 1)
        draws = torch.stack([tm.nelbo(model, many, passes, g).view(64, -1).mean(0) for _ in range(25)])
        error = (draws.mean(0) - exact[some]) / (draws.std(0) / 5).clamp(min=1e-5)
        assert error.abs().max() < 5
    orders = [torch.tensor(order) for order in itertools.permutations(range(L))]
    lengths = torch.stack([tm.chain_rule(model, EVERY, order).double().sum(1) for order in orders])
    assert torch.allclose(lengths.mean(0), exact, atol=1e-5)  # the same identity as without anchors


def test_the_t_step_bound_masks_free_tokens_only(model):
    steps, eps, free = 3, 1e-3, free_of(EVERY)
    n = free.sum(1)
    exact = eps * math.log(V) * n.double()
    for i in range(1, steps + 1):
        p = (1 - eps) * i / steps
        for mask in subsets():
            hit = (free & mask).sum(1)
            chance = p**hit * (1 - p) ** (n - hit) * (free | ~mask).all(1)
            exact += chance / i * (token_nll(model, EVERY, free & mask) * (free & mask)).sum(1)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([tm.discrete_elbo(model, EVERY, steps, g) for _ in range(60)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 60**0.5).clamp(min=1e-5)
    assert error.abs().max() < 5 and error.square().mean() < 1.5


@pytest.mark.parametrize("name", tm.SCORE_NAMES)
def test_split_scores_pay_for_the_places_once(tiny_env, name):
    """Counted by hand from the shard; the rest is what the same windows cost with the places left free."""
    values = tiny_env | dict(ANCHOR_BOS="1", TSTEP_STEPS="2", FINAL_EVAL_T_SAMPLES="2", STRIDE="8", CHAIN_GROUP="8")
    hp = tm.Hyperparameters.from_env(values)
    model, val = random_model(hp, scale=0.1), tm.TokenStream(hp.data_path, "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    seqs = 0 if name in ("nelbo", "sliding") else 40
    score, table = tm.score_windows(name, model, hp, val, luts, seqs)
    stride = 8 if name == "sliding" else 32
    tokens, bits, anchors = torch.from_numpy(val.read(0, val.total).astype("int64")), 0.0, 0
    numbers = tm.spaced(1 + (val.total - 33) // stride, seqs)
    for n in numbers:
        whole = name != "sliding" or n == 0
        part = tokens[1 + n * stride + (0 if whole else 32 - stride) : 33 + n * stride]
        count = int((part == 1).sum())
        bits += math.log2(len(part) + 1) + math.log2(math.comb(len(part), count))
        anchors += count
    assert anchors >= 2 and score.boundary_bits == pytest.approx(bits)
    assert score.bpb * score.bytes == pytest.approx(table[..., 0].sum().item() + bits)
    assert f"boundary_bits:{bits:.1f} " in score.line()
    without = random_model(dataclasses.replace(hp, anchor_bos=False), scale=0.1)
    plain = tm.score_windows(name, without, without.hp, val, luts, seqs)[0]
    assert plain.boundary_bits == 0 and "boundary" not in plain.line() and plain.bytes == score.bytes
