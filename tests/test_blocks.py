"""Block diffusion: what each token sees, code lengths enumerated, noise by block, and a run."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import bench
import compare
import make_record
import numpy as np
import prepare_text
import published
import pytest
import reference
import run_log
import sweep
import torch
from conftest import body_of, random_model, run_python, tiny_hp, torchrun, val_split
from reference import total_probability
from torch.nn.attention.flex_attention import create_block_mask

import train_mdlm as tm

V, L = 3, 4
EVERY = reference.all_sequences(V, L)  # (81, 4)
SOME = EVERY[[5, 17, 40, 77]]
SIZES = (1, 2, 4)
CPU = torch.device("cpu")


def scored_in(model, size):
    """The model, with the blocks of a score."""
    model.block_size = size
    return model


def code(model, x, before, size):
    """The code of a window by its definition."""
    return reference.BlockCode(model, [before, *x], size)


def predictions(model, noisy, window):
    """Logits (B, 2L, V) for noisy tokens (B, L), and for the tokens after the clean ones."""
    all_of_them = torch.arange(noisy.numel())
    z, at, view = tm.beside_clean(model.hp, model.block_size, noisy, all_of_them, window)
    logits = model.head(model.hidden(z, view=view))
    own = logits.flatten(0, 1)[at].unflatten(0, noisy.shape)
    return torch.cat([own, logits[:, -noisy.shape[1] :]], dim=1)


# ---- What a token sees


@pytest.mark.parametrize("length, block", [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3)])
def test_the_mask_is_that_of_the_definition(length, block):
    hp = tm.Hyperparameters()
    view = tm.block_view(hp, block, torch.arange(length), length)
    row = reference.halves(length, block)
    for table, expected in zip(
        view.rotary, tm.rotary_table(hp, torch.tensor(row.places)), strict=True
    ):
        assert torch.equal(table, expected)
    noisy = len(view.mask)
    assert noisy == length // block * (block + 1) and view.causal
    assert np.array_equal(view.mask.numpy(), row.sees[:noisy])
    assert np.array_equal(np.tri(length, dtype=bool), row.sees[noisy:, noisy:])
    assert not row.sees[noisy:, :noisy].any()


@pytest.mark.parametrize("neighbors", [0, 2])
@pytest.mark.parametrize("block", SIZES)
def test_one_pass_predicts_each_block_from_the_clean_past_and_itself(block, neighbors):
    """Against forward passes in float64 that have nothing else in their input."""
    hp = tiny_hp(block_size=block, neighbors=neighbors, num_layers=4)
    model = random_model(hp)
    window = torch.tensor([2, 0, 1, 1, 2])
    for mask in itertools.product([False, True], repeat=L):
        noisy = torch.where(torch.tensor(mask), hp.mask_id, window[1:])
        found = predictions(model, noisy[None], window[None])[0].detach().numpy()
        for start in range(0, L, block):
            past, own = window[: start + 1].numpy(), noisy[start : start + block].numpy()
            expected = reference.block_logits(model, past, own)
            np.testing.assert_allclose(found[start : start + block], expected, atol=1e-4)
        sees = np.tri(L, dtype=bool)
        row = reference.Row(np.arange(L), sees)
        clean = reference.unet_logits(model, window[:-1].numpy(), row)
        np.testing.assert_allclose(found[L:], clean, atol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_noisy_blocks_that_are_left_out_change_nothing_for_the_others(share):
    hp = tiny_hp(
        block_size=2, neighbors=3, block_share=share, train_seq_len=8, train_batch_tokens=8
    )
    model = random_model(hp)
    window = torch.tensor([[2, 0, 1, 1, 2, 0, 0, 2, 1]])
    noisy = window[:, 1:].masked_fill(torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]).bool(), hp.mask_id)
    expected = predictions(model, noisy, window)
    seen = set()
    for step in range(60):
        _, _, columns = tm.draw_noise(hp, tm.seeded("cpu", step))
        assert len(columns) == 8 * share and columns.equal(columns.sort().values)
        assert (columns[1::2] == columns[::2] + 1).all() and (columns[::2] % 2 == 0).all()
        seen.add(tuple(columns.tolist()))
        own = torch.arange(len(columns))
        z, at, view = tm.beside_clean(hp, 2, noisy[:, columns], own, window, columns)
        at = torch.cat([at, torch.arange(z.shape[1])[-8:]])
        found = model.head(model.hidden(z, view=view))[:, at]
        kept = torch.cat([columns, torch.arange(8, 16)])
        assert torch.allclose(found, expected[:, kept], atol=1e-5)
    assert len(seen) == math.comb(4, round(4 * share))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [2, 4])
def test_the_attention_of_gpus_sees_the_same(heads):
    """`flex_attention`, here not compiled and without gradients, against the masked product."""
    view = tm.block_view(tm.Hyperparameters(), 3, torch.tensor([3, 4, 5, 9, 10, 11]), 12)
    mask = view.mask
    tiles = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, *mask.shape, CPU)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 20, 8, generator=g) for n in (4, heads, heads))
    with torch.no_grad():
        found = tm.attend(q, k, v, view._replace(tiles=tiles))
        assert torch.allclose(found, tm.attend(q, k, v, view), atol=1e-5)


def test_the_clean_half_alone_is_the_causal_model():
    for neighbors in (0, 2):
        model = random_model(tiny_hp(block_size=2, neighbors=neighbors))
        window = tm.with_before(EVERY, 2)
        logits = predictions(model, torch.full_like(EVERY, V), window)[:, L:]
        expected = -logits.log_softmax(-1).gather(-1, EVERY[..., None])[..., 0]
        assert torch.allclose(tm.causal_nll(model, window), expected, atol=1e-5)


def sees_a_token(model, z, window, column):
    """(V + 1,) bool: whether the logits in a column of `predictions` depend on the embeddings of
    each token, MASK last; every token of the window is another one."""
    model.zero_grad()
    logits = predictions(model, z[None], window[None])[0, column]
    (logits * torch.linspace(1, 2, len(logits))).sum().backward()
    moved = model.tok_emb.weight.grad.abs().sum(1)
    if model.hp.neighbors:
        near = model.near.weight.grad.abs().sum(1)
        moved = moved + near.view(-1, len(moved)).sum(0)
    return moved > 0


@pytest.mark.parametrize("neighbors", [0, 3])
@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_no_gradient_comes_from_what_a_decoder_does_not_have(block, neighbors):
    """Exactly none; and one comes from all that it has. A block of 8 is the whole window."""
    shape = dict(vocab_size=9, train_seq_len=8, train_batch_tokens=8, tie_embeddings=False)
    model = random_model(tiny_hp(block_size=block, neighbors=neighbors, **shape))
    window = torch.tensor([4, 0, 7, 3, 8, 1, 6, 2, 5])
    g = torch.Generator().manual_seed(block)
    for _ in range(3):
        mask = torch.rand(8, generator=g) < 0.5
        z = torch.where(mask, 9, window[1:])
        for i in range(8):
            start = i // block * block
            known = set(window[: start + 1].tolist())
            known |= set(z[start : start + block].tolist())
            found = sees_a_token(model, z, window, i)
            assert set(found.nonzero()[:, 0].tolist()) == known
            found = sees_a_token(model, z, window, 8 + i)
            assert set(found.nonzero()[:, 0].tolist()) == set(window[: i + 1].tolist())


@pytest.mark.parametrize("size", SIZES)
def test_no_prediction_changes_with_a_token_that_is_revealed_later(size):
    """Bit for bit; and some prediction of what is revealed after it does change."""
    model = scored_in(random_model(tiny_hp(block_size=4, neighbors=2)), size)
    for order, group in itertools.product(([0, 1, 2, 3], [2, 1, 3, 0]), (1, 2)):
        order = torch.tensor(order)
        place = order.argsort().view(-1, size)
        call = place.argsort(1).argsort(1) // group + size * torch.arange(L // size)[:, None]
        call = call.flatten()  # which call of the decoder predicts a position
        nats = tm.chain_rule(model, EVERY, order, group)
        for i in range(L):
            other = EVERY.clone()
            other[:, i] = (other[:, i] + 1) % V
            changed = tm.chain_rule(model, other, order, group) != nats
            kept = (call <= call[i]) & (torch.arange(L) != i)
            assert not changed[:, kept].any()
            later = call > call[i]
            assert changed[:, later].any() or not later.any()
    causal = tm.causal_nll(model, tm.with_before(EVERY))
    other = tm.causal_nll(model, tm.with_before((EVERY + torch.tensor([0, 0, 1, 0])) % V))
    assert torch.equal(causal[:, :2], other[:, :2]) and (causal[:, 3] != other[:, 3]).any()


# ---- Code lengths


@pytest.mark.parametrize("neighbors", [0, 2])
@pytest.mark.parametrize("size", SIZES)
def test_every_score_that_is_a_code_sums_to_one(size, neighbors):
    """Over all sequences, after each token that may be before the window."""
    model = scored_in(random_model(tiny_hp(block_size=4, neighbors=neighbors)), size)
    for before in range(V):
        window = tm.with_before(EVERY, before)
        assert total_probability(tm.causal_nll(model, window)) == pytest.approx(1, abs=1e-5)
        for order, group in itertools.product(("l2r", "random", "confidence"), (1, 2, 9)):
            nats = tm.chain_rule(model, EVERY, order, group, before=before)
            assert total_probability(nats) == pytest.approx(1, abs=1e-5), (order, group)


def test_a_score_may_have_other_blocks_than_training():
    """Weights know nothing of blocks: those of another model, taken over, give the same."""
    for size in SIZES:
        trained, other = (random_model(tiny_hp(block_size=b)) for b in (4, size))
        assert trained.block_size == 4
        found = tm.chain_rule(scored_in(trained, size), EVERY)
        assert torch.equal(found, tm.chain_rule(other, EVERY))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_chain_rule_is_its_definition(size, group):
    model = scored_in(random_model(tiny_hp(block_size=4, neighbors=1)), size)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        found = tm.chain_rule(model, SOME, torch.tensor(order), group, before=2)
        place = np.argsort(order)
        expected = [code(model, x, 2, size).in_order(place, group) for x in SOME]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert torch.equal(
        tm.chain_rule(model, SOME, torch.arange(L), group), tm.chain_rule(model, SOME, "l2r", group)
    )


@pytest.mark.parametrize("size", SIZES)
def test_confidence_reveals_the_surest_position_of_a_block_first(size):
    model = scored_in(random_model(tiny_hp(block_size=4)), size)
    found = tm.chain_rule(model, SOME, "confidence", before=0)
    for x, nats in zip(SOME, found, strict=True):
        window = torch.tensor([0, *x])
        for start in range(0, L, size):
            z = torch.full((size,), V)
            while (z == V).any():
                logits = reference.block_logits(model, window[: start + 1].numpy(), z.numpy())
                logp = torch.from_numpy(logits).log_softmax(-1)
                surest = int(logp.amax(-1).masked_fill(z != V, -math.inf).argmax())
                z[surest] = x[start + surest]
                expected = -logp[surest, z[surest]].item()
                assert nats[start + surest].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_bound_is_the_mean_over_all_orders_inside_blocks(size):
    model = scored_in(random_model(tiny_hp(block_size=4)), size)
    exact = torch.tensor([code(model, x, 1, size).mean_of_all_orders() for x in SOME])
    orders = itertools.permutations(range(L))
    lengths = [tm.chain_rule(model, SOME, torch.tensor(order)).double().sum(1) for order in orders]
    assert torch.allclose(torch.stack(lengths).mean(0), exact.double(), atol=1e-5)
    for passes in (1, 3):
        g = torch.Generator().manual_seed(passes)
        many = SOME.repeat(20, 1)
        draws = [tm.nelbo(model, many, passes, g).view(20, 4).mean(0) for _ in range(60)]
        draws = torch.stack(draws)
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - exact).abs() < 4 * error + 1e-5).all()
        assert (error > 0).all() or size == 1
    if size == 1:  # one order: the bound is the code
        assert torch.allclose(tm.nelbo(model, SOME), lengths[0], atol=1e-5)


def test_the_bound_spreads_its_mask_sizes_over_all_blocks(monkeypatch):
    """Of neighbouring windows too: numbers of one golden sequence, block after block."""
    seen = []

    def masked_nll(model, window, mask):
        seen.append(mask.view(-1, 8).sum(1))
        return torch.zeros(mask.shape)

    monkeypatch.setattr(tm, "masked_nll", masked_nll)
    hp = tiny_hp(train_seq_len=32, train_batch_tokens=32, block_size=8)
    model, x0 = random_model(hp), torch.zeros(60, 32, dtype=torch.int64)
    tm.nelbo(model, x0, 1, torch.Generator().manual_seed(0))
    counts = torch.cat(seen).bincount(minlength=9)[1:]
    assert counts.sum() == 240 and (counts - 30).abs().max() <= 2


# ---- Noise and batches


def hp_of(**overrides):
    shape = dict(vocab_size=7, train_seq_len=16, train_batch_tokens=24 * 16)
    widths = dict(num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1)
    whole = dict(preset="block", block_share=1.0, causal_weight=1.0, shuffle=False)
    return tm.Hyperparameters(**(whole | shape | widths | overrides))


@pytest.fixture
def stream(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 7, 2000)
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    return tm.TokenStream(tmp_path, "train")


@pytest.mark.parametrize("block", [1, 2, 4, 16])
def test_every_block_has_a_count_of_its_own_on_the_lattice(block):
    """1 … b masked tokens, each weighing b / count; all counts equally often in a global batch."""
    hp = hp_of(block_size=block)
    blocks = 24 * 16 // block
    assert (hp.noise_length, hp.noise_rows) == (block, blocks)
    probability, keys, _ = tm.draw_noise(hp, tm.seeded("cpu", 0))
    assert probability.shape == (blocks,) and keys.shape == (24, 16)
    assert keys.unique().numel() == keys.numel()
    strata = ((probability - hp.mask_eps) / (1 - hp.mask_eps) * blocks).long()
    assert sorted(strata.tolist()) == list(range(blocks))
    x0 = torch.full((24, 16), 5)
    batch = tm.masked_batch(hp, x0, probability, keys, 24 * 16)
    counts = (batch.z == hp.mask_id).view(blocks, block).sum(1)
    assert torch.equal(counts, (probability * block).ceil().long())
    spread = counts.bincount(minlength=block + 1)[1:]
    assert spread.sum() == blocks and (spread - blocks / block).abs().max() <= 1.5
    used = batch.weights > 0
    weights = block / counts[batch.positions[used] // block]
    assert torch.allclose(batch.weights[used], weights.float())
    assert torch.equal(batch.targets[used], x0.flatten()[batch.positions[used]])


@pytest.mark.parametrize("block", [0, 16])
def test_a_single_block_is_noisy_whatever_its_share(block):
    assert hp_of(block_size=block, block_share=0.5).noisy_blocks == 1


@pytest.mark.parametrize("masking", tm.MASKINGS)
@pytest.mark.parametrize("sampling", tm.TIME_SAMPLINGS)
def test_no_masked_token_is_ever_dropped(masking, sampling):
    x0 = torch.full((24, 16), 5)
    for block, dist in itertools.product((1, 2, 16), tm.MASK_DISTS):
        hp = hp_of(block_size=block, masking=masking, time_sampling=sampling, mask_dist=dist)
        for rows, seed in itertools.product((1, 3, 24), range(8)):
            capacity = tm.scored_capacity(hp, rows)
            probability, keys, _ = tm.draw_noise(hp, tm.seeded("cpu", seed))
            parts = zip(probability.view(24 // rows, -1), keys.split(rows), strict=True)
            for part, own_keys in parts:
                assert tm.masked_batch(hp, x0[:rows], part, own_keys, capacity).dropped == 0


def test_capacity_saves_work_with_blocks_too():
    """5/8 of the noisy tokens are masked on average, and what a count is rounded up by is paid
    for."""
    hp = tm.Hyperparameters(preset="block")
    noisy = 64 * hp.noisy_blocks * 4
    assert noisy == 64 * 512 and tm.scored_capacity(hp, 64) < 0.76 * noisy


def test_a_batch_scores_masked_tokens_and_every_clean_one(stream):
    """In one input: noisy blocks, each after the token before it, and clean tokens; a token is
    predicted where the one before it is."""
    hp = hp_of(causal_weight=0.25)
    capacity = tm.scored_capacity(hp, 6)
    batch = tm.training_batch(hp, stream, 1, range(6, 12), capacity, CPU)
    window = stream.windows(range(30, 36), 16)
    blocks, clean = batch.z.split([20, 16], dim=1)
    assert torch.equal(clean, window[:, :-1]) and batch.tokens == 6 * 16
    before, noisy = blocks.view(6, 4, 5).tensor_split([1], dim=2)
    assert torch.equal(before[..., 0], window[:, [0, 4, 8, 12]])
    noisy = noisy.flatten(1)
    assert torch.equal(noisy[noisy != 7], window[:, 1:][noisy != 7])
    assert len(batch.positions) == len(batch.weights) == capacity + 6 * 16
    scored = {}
    for position, target, weight in zip(*(x.tolist() for x in batch[1:4]), strict=True):
        if weight:
            scored[divmod(position, 36)] = (target, weight)
    counts = (noisy == 7).view(6, 4, 4).sum(2)
    expected = {}
    for row, i in itertools.product(range(6), range(16)):
        target = int(window[row, 1 + i])
        expected[row, 20 + i] = (target, 0.25)
        if noisy[row, i] == 7:
            expected[row, i // 4 * 5 + i % 4] = (
                target,
                pytest.approx(4 / counts[row, i // 4].item()),
            )
    assert scored == expected


def test_a_step_masks_a_share_of_the_blocks(stream):
    """The others stand in the clean half alone; loss and gradients are those of a whole batch
    without the tokens that are not masked."""
    hp = hp_of(block_share=0.5, causal_weight=0.25)
    assert (hp.noisy_blocks, hp.noise_rows) == (2, 48)
    batch = tm.training_batch(hp, stream, 1, range(6), tm.scored_capacity(hp, 6), CPU)
    window = stream.windows(range(24, 30), 16)
    _, _, columns = tm.draw_noise(hp, tm.seeded("cpu", hp.seed, "train", 1))
    assert batch.z.shape == (6, 26) and torch.equal(batch.z[:, 10:], window[:, :-1])
    assert batch.tokens == 6 * 16 and batch.dropped == 0
    few = tm.training_batch(hp, stream, 1, range(6), 5, CPU)
    assert few.dropped == (batch.z == hp.mask_id).sum() - 5
    before, noisy = batch.z[:, :10].view(6, 2, 5).tensor_split([1], dim=2)
    assert torch.equal(before[..., 0], window[:, columns[::4]])
    noisy = noisy.flatten(1)
    masked = noisy == 7
    assert torch.equal(noisy[~masked], window[:, 1 + columns][~masked])
    model = random_model(hp, scale=0.3)
    expected = 0.25 * tm.causal_nll(model, window).sum().item()
    mask = torch.zeros(6, 16, dtype=torch.bool)
    mask[:, columns] = masked
    nats = tm.masked_nll(model, window, mask)[:, columns].view(6, 2, 4)
    expected += (4 / masked.view(6, 2, 4).sum(2) * nats.sum(2)).sum().item()
    assert tm.batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_bound_and_the_weighted_causal_loss(stream):
    hp = hp_of(causal_weight=0.25, block_size=4)
    model = random_model(hp, scale=0.3)
    batch = tm.training_batch(hp, stream, 0, range(3), tm.scored_capacity(hp, 3), CPU)
    expected = 0.0
    for row, window in enumerate(stream.windows(range(3), 16)):
        mask = (batch.z[row, :20].view(4, 5)[:, 1:] == 7).flatten().tolist()
        blocks = reference.BlockCode(model, window, 4)
        for start in blocks.starts:
            own = tuple(mask[start - 1 : start + 3])
            expected += 4 / sum(own) * float((blocks.nats(start, own) * own).sum())
    causal = tm.causal_nll(model, stream.windows(range(3), 16)).sum().item()
    assert tm.batch_loss(model, batch).item() == pytest.approx(expected + 0.25 * causal, rel=1e-5)


def test_two_micro_batches_are_one(stream):
    hp = hp_of()
    model = random_model(hp, scale=0.3)
    grads = []
    for parts in ([range(24)], [range(12), range(12, 24)]):
        model.zero_grad()
        for rows in parts:
            capacity = tm.scored_capacity(hp, len(rows))
            tm.batch_loss(model, tm.training_batch(hp, stream, 3, rows, capacity, CPU)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3) and grads[0].abs().max() > 1


def test_without_blocks_nothing_is_new(stream):
    hp = dataclasses.replace(hp_of(), block_size=0)
    assert (hp.system, hp.headline, hp.noise_rows) == ("mdlm", "nelbo", 24)
    assert (hp_of().system, hp_of().headline, hp_of().noise_rows) == ("block", "l2r", 96)
    batch = tm.training_batch(hp, stream, 0, range(24), tm.scored_capacity(hp, 24), CPU)
    assert batch.z.shape == (24, 16) and len(batch.positions) == tm.scored_capacity(hp, 24)
    model = random_model(tiny_hp())
    x0 = SOME
    for before in (0, 2):
        window = tm.with_before(x0, before)
        mask = torch.ones_like(x0, dtype=torch.bool)
        assert torch.equal(
            tm.masked_nll(model, window, mask), tm.masked_nll(model, tm.with_before(x0), mask)
        )


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(objective="ar"), "OBJECTIVE=ar, BLOCK_SIZE and"),
        (dict(backbone="dit"), ".*BACKBONE=dit.* do not mix"),
        (dict(doc_chunks=True), ".*DOC_CHUNKS.* do not mix"),
        (dict(anchor_bos=True), ".*ANCHOR_BOS.* do not mix"),
        (dict(block_size=5), "BLOCK_SIZE=5 must divide TRAIN_SEQ_LEN=16"),
        (dict(block_size=32), "BLOCK_SIZE=32 must divide TRAIN_SEQ_LEN=16"),
    ],
)
def test_what_does_not_go_together_is_one_line(given, message):
    with pytest.raises(tm.InputError, match=f"^{message}") as caught:
        hp_of(**given)
    assert "\n" not in str(caught.value)


# ---- A run, and its tools


BLOCKS = dict(PRESET="block", BLOCK_SIZE="4", NEIGHBORS="1", QUANT_FEEDBACK="1", MATRIX_LR="0.1")


def score_lines(text):
    """Name → bits per byte of every final score."""
    return {name: float(bpb) for name, bpb in re.findall(r"^score:(\w+) bpb:(\S+)", text, re.M)}


@pytest.fixture(scope="module")
def trained(tiny_env, tmp_path_factory):
    """The folder of two equal runs, of one process and of two."""
    folder = tmp_path_factory.mktemp("blocks")
    env = tiny_env | BLOCKS | dict(SCORES="l2r,nelbo,ar:16", CAUSAL_WEIGHT="0.5")
    pair = torchrun("--standalone", "--nproc_per_node=2", cwd=folder, RUN_ID="pair", **env)
    run_python("train_mdlm.py", cwd=folder, RUN_ID="one", **env)
    printed, _ = pair.communicate(timeout=300)
    assert pair.returncode == 0, printed
    return folder


def test_two_processes_train_the_same_model(trained):
    figures = []
    for name in ("one", "pair"):
        log = body_of(trained / f"logs/{name}.txt")
        figures.append([float(loss) for loss in re.findall(r"train_loss:(\S+)", log)])
        figures[-1] += score_lines(log).values()
    assert len(figures[0]) == 12 + 3 and figures[0][11] < figures[0][0]
    assert figures[1] == pytest.approx(figures[0], abs=5e-3)


def test_a_run_with_blocks_trains_packs_and_is_scored_again(trained, tiny_env, monkeypatch, script):
    """In the same blocks, and in others that BLOCK_SIZE names: by definition."""
    monkeypatch.chdir(trained)
    log = body_of(trained / "logs/one.txt")
    assert list(score_lines(log)) == ["l2r", "nelbo", "ar"]
    model, hp = tm.load_artifact("logs/one.mdlm")
    assert hp.block_size == 4 == model.block_size and hp.preset == "block"
    paths = {name: tiny_env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    again = dict(EVAL_ONLY="logs/one.mdlm", RUN_ID="again", SCORES="nelbo,ar:16") | paths
    found = score_lines(script(**again).stdout)
    assert found == pytest.approx(score_lines(log), abs=1.1e-4)
    names = "confidence:3,random:3,tstep,l2r:3"
    other = dict(RUN_ID="other", BLOCK_SIZE="8", SCORES=names)
    printed = script(**again | other).stdout
    found = score_lines(printed)
    assert "score:tstep is not for block models" in printed
    assert list(found) == ["l2r", "confidence", "random"]
    val = val_split(dataclasses.replace(hp, **{k.lower(): v for k, v in paths.items()}))
    window = val.stream.windows(tm.evenly_spaced(val.stream.count_windows(32), 3), 32)
    nbytes = tm.count_bytes(window[:, 1:], window[:, 0], val.luts).sum()
    for size, order in itertools.product((8, 4), ("l2r", "confidence")):
        nats = tm.chain_rule(scored_in(model, size), window[:, 1:], order, before=window[:, 0])
        bpb = (nats.double().sum() / math.log(2) / nbytes).item()
        assert (abs(bpb - found[order]) < 1e-4) is (size == 8)
    hp = dataclasses.replace(hp, block_size=1, nelbo_passes=1)
    bound, chain = (
        tm.score_windows(name, scored_in(model, 1), hp, val, 3)[0] for name in ("nelbo", "l2r")
    )
    assert bound.bpb == pytest.approx(chain.bpb, rel=1e-5)


@pytest.mark.parametrize(
    "made_with, asked",
    [("BLOCK_SIZE=4", "0"), ("BLOCK_SIZE=0", "4")],
)
def test_an_artifact_has_blocks_or_none(trained, tiny_env, monkeypatch, script, made_with, asked):
    """Weights that were trained without blocks know nothing of a clean half, and vice versa."""
    monkeypatch.chdir(trained)
    artifact = "logs/one.mdlm"
    if made_with == "BLOCK_SIZE=0":
        artifact = "logs/plain.mdlm"
        hp = tm.Hyperparameters.from_env(tiny_env)
        tm.save_artifact(random_model(hp, scale=0.1), hp, artifact)
    env = {name: tiny_env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    done = script(EVAL_ONLY=artifact, RUN_ID="refused", BLOCK_SIZE=asked, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout
    assert f"BLOCK_SIZE={asked}, but {artifact} was made with {made_with}" in done.stderr


@pytest.mark.parametrize("preset, block", [("block", 0), ("block", 2), ("mdlm", 2), ("golf", 0)])
def test_an_artifact_has_its_blocks_whatever_its_preset(tmp_path, preset, block):
    hp = tiny_hp(preset=preset, block_size=block)
    model = random_model(hp)
    tm.save_artifact(model, dataclasses.replace(hp, quant_mode="fp32"), tmp_path / "a.mdlm")
    back, back_hp = tm.load_artifact(tmp_path / "a.mdlm")
    assert back_hp.block_size == block == back.block_size and back_hp.system == hp.system
    assert torch.allclose(tm.chain_rule(back, SOME), tm.chain_rule(model, SOME), atol=1e-2)


def test_a_record_names_what_its_number_is(trained, tmp_path, tool):
    log = trained / "logs/one.txt"
    run = run_log.parse_log(log)
    assert run.system == "block" and list(run.others) == ["nelbo", "ar"]
    assert sweep.scores_of_all({run.seed: run}).keys() == {"nelbo", "ar"}
    assert run.val_bpb == pytest.approx(score_lines(body_of(log))["l2r"], abs=1e-4)
    done = tool(make_record, log, "--name", "blocks", "--out", tmp_path / "records")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    facts = json.loads((folder / "submission.json").read_text())
    expected = "code length of a block diffusion model from left to right, exact bytes, "
    assert facts["val_bpb_estimator"] == expected + "weights read back from disk"
    readme = (folder / "README.md").read_text()
    assert "other scores, mean over seeds, bits per byte: nelbo " in readme
    assert "BLOCK_SIZE=4" in readme


def test_blocks_are_compared_with_windows_and_causal_models(trained, tiny_env, monkeypatch, tool):
    monkeypatch.chdir(trained)
    hp = tm.Hyperparameters.from_env(tiny_env | dict(OBJECTIVE="ar"))
    tm.save_artifact(random_model(hp, scale=0.1), hp, "logs/ar.mdlm")
    options = ["--data", hp.data_path, "--tokenizer", hp.tokenizer_path, "--seqs", "3"]
    scores, length = compare.measure(
        [Path("logs/one.mdlm"), Path("logs/ar.mdlm")], hp.data_path, hp.tokenizer_path, 3
    )
    (first, _), (second, _) = scores
    assert length == 32 and first.bytes == second.bytes
    model, _ = tm.load_artifact("logs/one.mdlm")
    val = val_split(hp)
    window = val.stream.windows(tm.evenly_spaced(val.stream.count_windows(32), 3), 32)
    nats = tm.chain_rule(model, window[:, 1:], before=window[:, 0]).double().sum().item()
    assert first.bpb == pytest.approx(nats / math.log(2) / first.bytes, rel=1e-5)
    done = tool(published, "logs/one.mdlm", *options)
    assert done.returncode == 2 and "without blocks" in done.stderr
    done = tool(bench, "scores", "logs/one.mdlm", "--budget", "4", *options)
    assert done.returncode == 0 and "NELBO, 4 passes" in done.stdout
    assert "T-step" not in done.stdout
