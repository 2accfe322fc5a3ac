"""ANCHOR_BOS: what is always visible is neither predicted nor free; every score, enumerated."""

import dataclasses
import itertools
import math

import pytest
import reference
import torch
from conftest import random_model, tiny_hp, val_split

import train_mdlm as tm

V, L = 4, 4
EVERY = reference.all_sequences(V, L)  # (256, 4), with 0 to 4 anchors
FREE = EVERY != tm.BOS_ID
SCORES = tm.ESTIMATORS["mdlm"]


@pytest.fixture(scope="module", params=["unet", "dit"])
def model(request):
    """The U-Net, or a DiT that finds the noise level itself: the scores must hold for both."""
    hp = tiny_hp(vocab_size=V, anchor_bos=True, backbone=request.param, num_kv_heads=2)
    return random_model(hp, scale=0.3)


@pytest.mark.parametrize("order", ["l2r", "random", "confidence", (2, 0, 3, 1)])
@pytest.mark.parametrize("group", [1, 3])
def test_a_chain_rule_reveals_the_free_tokens_and_charges_the_anchors(model, order, group):
    named = torch.tensor(order) if isinstance(order, tuple) else order
    nats = tm.chain_rule(model, EVERY, named, group).double()
    assert (nats[~FREE] == 0).all() and (nats[FREE] > 0).all()
    # Given where the anchors are, the rest is a code over all tokens; <s> is predicted in vain.
    probability = torch.exp(-nats.sum(1))
    places = FREE.long() @ (2 ** torch.arange(L))
    given = torch.zeros(16, dtype=torch.float64).index_add_(0, places, probability)
    assert (given <= 1 + 1e-6).all() and given[0] == 1 and (given[1:] > 0.02).all()
    anchors = (~FREE).sum(1).tolist()
    paid = torch.tensor([2 ** -tm.boundary_bits(n, L) for n in anchors], dtype=torch.float64)
    assert 0.02 < (probability * paid).sum() <= 1 + 1e-6
    if isinstance(order, tuple) and group == 1:
        assert torch.allclose(nats, reference.one_by_one(model, EVERY, order), atol=1e-5)


def test_places_of_anchors_are_a_code():
    for length in (1, 4, 9):
        counts = range(length + 1)
        total = sum(math.comb(length, n) * 2 ** -tm.boundary_bits(n, length) for n in counts)
        assert total == pytest.approx(1)


def test_nelbo_is_the_mean_over_the_masks_of_free_tokens(model):
    exact = reference.enumerated_nelbo(model, EVERY)
    assert (exact[(~FREE).all(1)] == 0).all()
    g = torch.Generator().manual_seed(0)
    some = [0, 1, 5, 85, 27, 130, 211, 255]  # with 0 to 4 anchors
    many = EVERY[some].repeat(64, 1)
    for passes in (1, 3):
        draws = [tm.nelbo(model, many, passes, g).view(64, -1).mean(0) for _ in range(25)]
        draws = torch.stack(draws)
        error = (draws.mean(0) - exact[some]) / (draws.std(0) / 5).clamp(min=1e-5)
        assert error.abs().max() < 5
    orders = [torch.tensor(order) for order in itertools.permutations(range(L))]
    lengths = [tm.chain_rule(model, EVERY, order).double().sum(1) for order in orders]
    mean = torch.stack(lengths).mean(0)
    assert torch.allclose(mean, exact, atol=1e-5)  # the same identity as without anchors


def test_the_t_step_bound_masks_free_tokens_only(model):
    steps = 3
    exact = reference.enumerated_tstep(model, EVERY, steps)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([tm.discrete_elbo(model, EVERY, steps, g) for _ in range(60)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 60**0.5).clamp(min=1e-5)
    assert error.abs().max() < 5 and error.square().mean() < 1.5


@pytest.mark.parametrize("name", SCORES)
def test_split_scores_pay_for_the_places_once(tiny_env, name):
    """Counted by hand from the shard; the rest is what the same windows cost without paying."""
    few = dict(TSTEP_STEPS="2", FINAL_EVAL_T_SAMPLES="2", STRIDE="8", CHAIN_GROUP="8")
    hp = tm.Hyperparameters.from_env(tiny_env | few | dict(ANCHOR_BOS="1"))
    model, val = random_model(hp, scale=0.1), val_split(hp)
    sliding = name.startswith("sliding")
    seqs = 0 if sliding or name == "nelbo" else 40
    score, table = tm.score_windows(name, model, hp, val, seqs)
    stride = 8 if sliding else 32
    tokens = torch.from_numpy(val.stream.read(0, val.stream.total).astype("int64"))
    places, anchors = [], 0
    for n in tm.evenly_spaced(1 + (val.stream.total - 33) // stride, seqs):
        first = 32 - stride if sliding and n else 0
        part = tokens[1 + n * stride + first : 33 + n * stride]
        count = int((part == tm.BOS_ID).sum())
        places.append(math.log2(len(part) + 1) + math.log2(math.comb(len(part), count)))
        anchors += count
    bits, own = sum(places), table[..., 0].sum(1) + torch.tensor(places, dtype=torch.float64)
    assert anchors >= 2 and score.boundary_bits == pytest.approx(bits)
    assert score.bpb * score.bytes == pytest.approx(table[..., 0].sum().item() + bits)
    assert score.loss * score.tokens == pytest.approx(score.bpb * score.bytes * math.log(2))
    assert f"boundary_bits:{bits:.1f} " in score.line()
    assert score.stderr == pytest.approx(tm.bits_per_byte(own, table[..., 1].sum(1))[1])
    without = random_model(dataclasses.replace(hp, anchor_bos=False), scale=0.1)
    plain, _ = tm.score_windows(name, without, without.hp, val, seqs)
    assert plain.boundary_bits == 0 and "boundary" not in plain.line()
    assert plain.bytes == score.bytes
