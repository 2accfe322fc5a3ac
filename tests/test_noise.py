"""Mask times, masks and batches: their distributions, and that a batch depends on (seed, step)."""

import dataclasses
import itertools
import math
from statistics import NormalDist

import numpy as np
import prepare_text
import pytest
import torch
from conftest import random_model

import train_mdlm as tm

NOISE = [
    spec.name
    for spec in dataclasses.fields(tm.Hyperparameters)
    if spec.metadata["group"] == "noise"
]
CPU = torch.device("cpu")


def masks_of(hp, step, seed=0):
    """Mask (B, L) and weights (B,) of a global batch without PAD and anchors."""
    x0 = torch.full((hp.batch_rows, hp.train_seq_len), 5)
    probability, keys, _ = tm.draw_noise(hp, tm.seeded("cpu", seed, step))
    mask, weight, _ = tm.apply_noise(hp, x0, probability, keys)
    return mask, weight


def hp_of(**overrides):
    shape = dict(vocab_size=384, train_seq_len=32, train_batch_tokens=32 * 24)
    demo = dict(preset="demo", mask_dist="uniform", shuffle=False)
    return tm.Hyperparameters(**(demo | shape | overrides))


def test_every_key_has_random_numbers_of_its_own():
    keys = [(1, "train", 23), (12, "train", 3), (1, "train2", 3), (1, "train", 2, 3), (1, "train")]
    draws = [torch.rand(4, generator=tm.seeded("cpu", *key)) for key in keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)
    assert torch.equal(torch.rand(4, generator=tm.seeded("cpu", *keys[0])), draws[0])


# ---- Mask times and probabilities


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 24, 512])
def test_stratified_times_hit_every_stratum_once(rows):
    u = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    t = tm.TIME_SAMPLINGS["stratified"](u)
    assert sorted((t * rows).long().tolist()) == list(range(rows))
    assert 0 <= t.min() and t.max() < 1


def test_stratified_times_are_all_at_the_same_place_in_their_strata():
    u = torch.rand(24, generator=torch.Generator().manual_seed(0))
    t = tm.TIME_SAMPLINGS["stratified"](u).double().sort().values
    assert torch.allclose(t * 24 - torch.arange(24), u[0].double().expand(24), atol=1e-5)


def test_any_slice_of_stratified_times_is_balanced():
    t = tm.TIME_SAMPLINGS["stratified"](torch.full((512,), 0.5))
    for rows in (8, 16, 64, 256):  # what a rank or a micro-batch gets
        means = t.view(-1, rows).mean(1)
        assert (means - 0.5).abs().max() < 2 / rows  # independent draws: 0.3 / sqrt(rows)


def test_antithetic_and_uniform_times():
    u = torch.rand(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tm.TIME_SAMPLINGS["uniform"](u), u)
    pairs = tm.TIME_SAMPLINGS["antithetic"](u).view(-1, 2)
    assert torch.allclose(pairs.sum(1), torch.ones(12))


def test_normal_mask_probabilities_are_the_quantiles_of_a_normal_distribution():
    """Exactly so when stratified; what lies outside of [MASK_EPS, MASK_MAX] lies on its ends."""
    normal = dict(mask_dist="normal", mask_mean=0.4, mask_std=0.3)
    hp = hp_of(mask_eps=0.05, mask_max=0.75, **normal)
    drawn = tm.mask_probability(hp, torch.full((24,), 0.5)).sort().values
    quantiles = [NormalDist(0.4, 0.3).inv_cdf((i + 0.5) / 24) for i in range(24)]
    clamped = [min(max(quantile, 0.05), 0.75) for quantile in quantiles]
    assert drawn.tolist() == pytest.approx(clamped, abs=1e-6)
    assert (drawn == 0.05).sum() == 3 and (drawn == 0.75).sum() == 3  # Φ(−0.35 / 0.3) = 0.12 of 24
    for u in (0.0, 1.0):  # the ends of the normal distribution are infinite
        for sampling in tm.TIME_SAMPLINGS:
            other = dataclasses.replace(hp, time_sampling=sampling)
            ends = tm.mask_probability(other, torch.full((24,), u))
            assert ends.isfinite().all() and 0.05 <= ends.min() and ends.max() <= 0.75


@pytest.mark.parametrize("dist", tm.MASK_DISTS)
def test_mask_probabilities_grow_with_the_time(dist):
    """From MASK_EPS to MASK_MAX: a late time hides more."""
    hp = hp_of(mask_dist=dist, mask_eps=0.05, mask_max=0.85, mask_mean=0.4, mask_std=0.2)
    found = tm.MASK_DISTS[dist](hp, torch.linspace(0, 1, 9))
    assert (found.diff() > 0).all() and [found[0], found[-1]] == pytest.approx([0.05, 0.85])


# ---- Masks and weights


@pytest.mark.parametrize("sampling", tm.TIME_SAMPLINGS)
@pytest.mark.parametrize("masking", tm.MASKINGS)
def test_masks_have_the_promised_probability_and_weight(sampling, masking):
    noise = dict(mask_eps=0.1, mask_max=0.9, loss_weight="elbo")
    hp = hp_of(time_sampling=sampling, masking=masking, **noise)
    masks, weights = zip(*(masks_of(hp, step) for step in range(300)), strict=True)
    masks, weights = torch.stack(masks).float(), torch.stack(weights)
    assert abs(masks.mean() - 0.5) < 0.03
    assert (masks.mean((0, 1)) - 0.5).abs().max() < 0.06  # every position alike
    # The weight is 1 / probability: the weighted mask averages to 1.
    assert abs((masks.mean(2) * weights).mean() - 1) < 0.02
    if masking == "count":
        assert torch.allclose(masks.sum(2) * weights, torch.tensor(32.0))
    _, flat = masks_of(hp_of(loss_weight="flat"), 0)
    assert torch.equal(flat, torch.ones(24))


def test_the_recipe_of_golf_scores_half_of_the_tokens_at_most():
    for preset in ("golf", "demo"):
        hp = tm.Hyperparameters(preset=preset)
        mask, weight = masks_of(hp_of(**{name: getattr(hp, name) for name in NOISE}), 0)
        assert (weight == 1).all()
        assert abs(mask.float().mean() - hp.mask_mean - 0.5 / 32) < 0.02
        assert tm.scored_capacity(hp, 16) <= 0.5 * 16 * hp.train_seq_len


def test_weights_are_clamped():
    clamped = dict(masking="bernoulli", loss_weight="elbo", weight_clamp=3.0)
    _, weight = masks_of(hp_of(mask_eps=0.001, **clamped), 0)
    assert weight.max() == 3.0


@pytest.mark.parametrize("clamp", [1.0, 3.0, 1000.0])
def test_loss_weights_in_closed_form(clamp):
    """elbo is of the share that was masked, dsigma of the probability that was drawn."""
    noise = dict(masking="count", mask_eps=0.1, mask_max=0.6, weight_clamp=clamp)
    probability = torch.tensor([0.05, 0.25, 0.6, 0.55])
    keys = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    x0 = torch.full((4, 10), 5)
    shares = torch.tensor([0.1, 0.3, 0.6, 0.6])
    expected = dict(elbo=1 / shares, dsigma=0.5 / (1 - probability), flat=torch.ones(4))
    for name, weights in expected.items():
        hp = hp_of(loss_weight=name, **noise)
        mask, found, share = tm.apply_noise(hp, x0, probability, keys)
        assert torch.allclose(share, shares) and torch.allclose(mask.float().mean(1), shares)
        assert torch.allclose(found, weights.clamp(max=clamp)), name


def test_the_smallest_keys_are_masked_even_with_ties():
    keys = torch.tensor([[0.3, 0.1, 0.2, 0.4], [0.5, 0.5, 0.5, 0.5]])
    mask, _ = tm.count_mask(torch.tensor([0.5, 0.75]), keys, keys < 1)
    assert mask[0].tolist() == [False, True, True, False] and mask[1].sum() == 3


def test_the_published_weight_does_not_explode_for_short_documents():
    """dsigma is of the probability that was drawn: counts that round up to all tokens do not meet
    the clamp."""
    for tokens in (1, 5, 50):
        means = {}
        for masking in ("count", "bernoulli"):
            hp = tm.Hyperparameters(preset="llada", masking=masking)
            g = torch.Generator().manual_seed(0)
            probability = 0.999 * torch.rand(4000, generator=g)
            keys = torch.rand(4000, tokens, generator=g)
            x0 = torch.full((4000, tokens), 5)
            mask, weight, _ = tm.apply_noise(hp, x0, probability, keys)
            means[masking] = (mask.float().mean(1) * weight).mean().item()
        assert means["count"] < 2 * means["bernoulli"] < 30


# ---- Capacity


@pytest.mark.parametrize("sampling", tm.TIME_SAMPLINGS)
@pytest.mark.parametrize("mean, std", [(0.45, 0.15), (0.45, 0.1), (0.9, 0.4), (0.1, 0.4)])
def test_capacity_holds_for_every_draw_of_a_normal_distribution(sampling, mean, std):
    """The largest sum of any micro-batch, over a grid of draws, is within what it was made from."""
    normal = dict(mask_dist="normal", mask_mean=mean, mask_std=std, mask_eps=0.0)
    hp = hp_of(time_sampling=sampling, masking="count", **normal)
    # Pairs of independent draws, and one without its other half; stratified rows share one.
    for rows in (2, 3):
        capacity = tm.scored_capacity(hp, rows)
        independent = 1 if sampling == "stratified" else rows
        for draws in itertools.product(torch.linspace(0, 1, 11).tolist(), repeat=independent):
            u = torch.tensor(draws).repeat(24 // len(draws))
            most = tm.mask_probability(hp, u).view(-1, rows).sum(1).max().item()
            assert capacity >= min(most * 32 + rows - 1e-3, rows * 32)


@pytest.mark.parametrize("sampling", tm.TIME_SAMPLINGS)
@pytest.mark.parametrize("masking", tm.MASKINGS)
@pytest.mark.parametrize("rows", [24, 8, 3, 2])
def test_capacity_is_never_exceeded(sampling, masking, rows):
    hp = hp_of(time_sampling=sampling, masking=masking)
    capacity = tm.scored_capacity(hp, rows)
    counts = [masks_of(hp, step, seed=1)[0].view(-1, rows * 32).sum(1) for step in range(500)]
    assert torch.cat(counts).max() <= capacity <= rows * 32


@pytest.mark.parametrize("masking", tm.MASKINGS)
@pytest.mark.parametrize("dist", tm.MASK_DISTS)
def test_a_run_drops_no_masked_token(tiny_env, masking, dist):
    """Every masked token has its place in the batch, with its weight, in any division."""
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    for sampling in tm.TIME_SAMPLINGS:
        hp = hp_of(masking=masking, mask_dist=dist, time_sampling=sampling)
        for step in range(20):
            for size in (24, 3):
                capacity = tm.scored_capacity(hp, size)
                rows = range(step % 8 * 3, step % 8 * 3 + 3) if size == 3 else range(24)
                batch = tm.training_batch(hp, stream, step, rows, capacity, CPU)
                masked = (batch.z == hp.mask_id).flatten()
                assert batch.dropped == 0 and len(batch.positions) == capacity
                scored = batch.positions[batch.weights > 0]
                assert torch.equal(scored.sort().values, masked.nonzero()[:, 0])


def test_what_finds_no_place_is_counted(tiny_env):
    hp = hp_of(masking="count")
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    whole = tm.training_batch(hp, stream, 0, range(24), 24 * 32, CPU)
    masked = int((whole.z == hp.mask_id).sum())
    for capacity in (masked, masked - 1, 5):
        batch = tm.training_batch(hp, stream, 0, range(24), capacity, CPU)
        assert batch.dropped == masked - capacity and len(batch.positions) == capacity
        assert torch.equal(batch.z, whole.z) and batch.tokens == whole.tokens
    causal = hp_of(objective="ar")
    batch = tm.training_batch(causal, stream, 0, range(24), 24 * 32, CPU)
    assert batch.dropped == 0 and batch.positions is None  # all
    assert len(batch.targets) == tm.scored_capacity(causal, 24)


def test_capacity_saves_work_at_the_published_shape():
    for overrides in ({}, dict(masking="count")):
        assert tm.scored_capacity(tm.Hyperparameters(**overrides), 64) < 0.53 * 64 * 1024


def test_compact_lists_the_masked_positions():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    positions, used = tm.compact(mask, 4)
    assert positions[used].tolist() == [0, 2, 5] and used.tolist() == [True, True, True, False]


# ---- Batches and loss


def original(batch):
    """The tokens of a batch before they were hidden, in order."""
    x0, scored = batch.z.flatten().clone(), batch.weights > 0
    x0[batch.positions[scored]] = batch.targets[scored]
    return x0.tolist()


@pytest.mark.parametrize("rows", [[range(6)], [range(0, 2), range(2, 4), range(4, 6)]], ids=len)
@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_step_after_step_reads_the_split_from_front_to_back(tmp_path, objective, rows):
    """Every token once, as it stands in the shards, and then again from the first one on."""
    for number, part in enumerate(np.split(np.arange(300), [130, 140])):
        prepare_text.write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", part)
    stream = tm.TokenStream(tmp_path, "train")
    hp = hp_of(objective=objective, train_seq_len=8, train_batch_tokens=6 * 8, mask_eps=0.0)
    read = []
    for step in range(20):
        for part in rows:
            batch = tm.training_batch(hp, stream, step, part, 8 * len(part), CPU)
            read += batch.targets.tolist() if objective == "ar" else original(batch)
            if objective == "ar":
                assert batch.z.flatten().tolist() == [
                    (token - 1) % 300 for token in read[-8 * len(part) :]
                ]
    assert read == [(1 + i) % 300 for i in range(20 * 6 * 8)]
    assert [stream.count_windows(299, 1), stream.count_windows(400, 5)] == [1, 0]


@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_a_batch_depends_on_seed_and_step_only(tiny_env, objective):
    hp = hp_of(objective=objective, seed=7)
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    whole = tm.training_batch(hp, stream, 5, range(24), 24 * 32, CPU)
    parts = {
        first: tm.training_batch(hp, stream, 5, range(first, first + 8), 8 * 32, CPU)
        for first in (0, 8, 16)
    }
    assert torch.equal(torch.cat([part.z for part in parts.values()]), whole.z)

    def scored(batch, first_row=0):
        """Position in the global batch, target and weight of what counts."""
        used = batch.weights > 0
        positions = torch.arange(batch.z.numel()) if objective == "ar" else batch.positions
        columns = (positions + first_row * 32, batch.targets, batch.weights)
        return list(zip(*(column[used].tolist() for column in columns), strict=True))

    together = itertools.chain(*(scored(part, first) for first, part in parts.items()))
    assert list(together) == scored(whole)
    other = hp_of(objective=objective, seed=8)
    other = tm.training_batch(other, stream, 5, range(24), 24 * 32, CPU)
    assert torch.equal(other.z, whole.z) is (objective == "ar")


def test_every_step_and_every_row_has_a_mask_of_its_own(tmp_path):
    """Half of the tokens masked: any two masks differ in about half of the places."""
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(300))
    stream = tm.TokenStream(tmp_path, "train")
    half = dict(mask_eps=0.4999, mask_max=0.5001, masking="bernoulli")
    hp = hp_of(train_seq_len=64, train_batch_tokens=4 * 64, **half)
    masks = []
    for step in range(4):
        for rows in (range(0, 2), range(2, 4)):
            batch = tm.training_batch(hp, stream, step, rows, 2 * 64, CPU)
            masks += list(batch.z == hp.mask_id)
    assert len(masks) == 16
    for one, other in itertools.combinations(masks, 2):
        assert 12 < (one != other).sum() < 52  # 5 sigma


@pytest.mark.parametrize("masking", tm.MASKINGS)
@pytest.mark.parametrize("backbone", tm.BACKBONES)
def test_the_loss_is_the_weighted_nll_of_a_model_that_is_told_the_noise(
    tmp_path, backbone, masking
):
    """The probability that was drawn, where masks are Bernoulli; the share, where it is exact."""
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(300))
    stream = tm.TokenStream(tmp_path, "train")
    small = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, neighbors=0)
    small |= dict(train_seq_len=8, train_batch_tokens=4 * 8, loss_weight="elbo")
    hp = hp_of(backbone=backbone, masking=masking, **small)
    model = random_model(hp, scale=0.3)
    batch = tm.training_batch(hp, stream, 0, range(4), 4 * 8, CPU)
    told, _, _ = tm.draw_noise(hp, tm.seeded("cpu", hp.seed, "train", 0))
    if masking == "count":
        told = (told * 8).ceil() / 8
    x0 = stream.windows(range(4), 8)[:, 1:]
    with torch.no_grad():
        logp = model(batch.z, told).double().log_softmax(-1)
    nll = -logp.gather(-1, x0[..., None])[..., 0] * (batch.z == hp.mask_id)
    expected = (nll.sum(1) / told.double()).sum().item()
    assert tm.batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_uniform_model_is_the_uniform_code(tiny_env):
    """ELBO weights and exact counts: every row pays L·ln V however many tokens are masked."""
    hp = hp_of(loss_weight="elbo", mask_eps=0.0)
    model = tm.build_model(hp)
    torch.nn.init.zeros_(model.tok_emb.weight)
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    batch = tm.training_batch(hp, stream, 0, range(24), tm.scored_capacity(hp, 24), CPU)
    assert batch.tokens == 24 * 32
    assert abs(tm.batch_loss(model, batch).item() / (24 * 32) - math.log(384)) < 1e-5


@pytest.mark.parametrize("system", [{}, dict(objective="ar"), dict(block_size=4)])
def test_the_loss_compiles_to_one_static_graph_with_the_same_gradients(tiny_env, system):
    """What GPUs run, up to the code generator: one graph for all steps, gradients in the flat
    buffer."""
    hp = hp_of(num_layers=2, model_dim=32, compute_dtype="float32", **system)
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    trainer = tm.Trainer(hp, stream, CPU, tm.Log())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(tm.batch_loss, backend=backend, dynamic=False, fullgraph=True)
    for step in range(3):
        (batch,) = trainer.batches(step)
        grads = []
        for loss in (tm.batch_loss, compiled):
            trainer.optimizer.grads.zero_()
            loss(trainer.model, batch).backward()
            grads.append(trainer.optimizer.grads.clone())
        assert torch.allclose(*grads, atol=1e-7 * 24 * 32) and grads[0].abs().max() > 0
    assert len(graphs) == 1
