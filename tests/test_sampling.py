"""tools/sampling.py: what is drawn has the model's probabilities, and costs what is said."""

import itertools
import math

import numpy as np
import pytest
import reference
import sampling
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm

V, L = 3, 3
EVERY = reference.all_sequences(V, L)  # (27, 3)
ORDERS = list(itertools.permutations(range(L)))
DRAWS = 4000
CHI_SQUARE = 54.05  # exceeded with probability 0.001 for 26 degrees of freedom
MASKED = [name for name, row in sampling.SAMPLERS.items() if "mdlm" in row.systems]
EXACT = [name for name in MASKED if sampling.SAMPLERS[name].exact]


def model_of(seed=0, scale=0.5, **overrides):
    shape = dict(train_seq_len=L, train_batch_tokens=12)
    return random_model(tiny_hp(**(shape | overrides)), seed=seed, scale=scale)


def written(model, sampler, rows=1, tokens=None, luts=None, **options):
    """The rows that a sampler has written, of all tokens or of a template (B, N)."""
    if tokens is None:
        tokens = torch.full((rows, model.hp.train_seq_len), model.hp.mask_id)
    template = sampling.template_of_tokens(tokens, model.hp.mask_id)
    found = sampling.Rows(model, template, sampling.Request(sampler=sampler, **options), luts)
    for _ in sampling.write(found):
        pass
    return found


def chi_square(tokens, probability):
    """Of drawn rows (n, L) against the probabilities (27,) of EVERY."""
    number = (tokens * V ** torch.arange(L - 1, -1, -1)).sum(1)
    expected = len(tokens) * probability
    return ((number.bincount(minlength=V**L) - expected) ** 2 / expected).sum().item()


def probabilities(nats):
    """(27,) of code lengths (27, L) of EVERY."""
    found = torch.exp(-nats.double().sum(1))
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    return found


def any_order(model):
    """(27,): the mean over all orders."""
    nats = [tm.chain_rule(model, EVERY, torch.tensor(order)) for order in ORDERS]
    return torch.stack([probabilities(one) for one in nats]).mean(0)


def in_steps(model, steps):
    """(27,) of ancestral sampling: each position is revealed in one of `steps`, independently."""
    nll = {
        tuple(mask.tolist()): reference.token_nll(model, EVERY, mask)
        for mask in reference.all_masks(L)
    }
    found = torch.zeros(len(EVERY), dtype=torch.float64)
    for when in itertools.product(range(steps), repeat=L):
        nats = torch.zeros(len(EVERY), dtype=torch.float64)
        for now in set(when):
            masked = tuple(step >= now for step in when)
            nats += nll[masked][:, [step == now for step in when]].sum(1)
        found += torch.exp(-nats) / steps**L
    return found


# ---- Probability of what is drawn


@pytest.mark.parametrize("sampler", ["l2r", "confidence"])
def test_an_order_draws_from_its_chain_rule(sampler):
    model = model_of()
    drawn = written(model, sampler, DRAWS).z
    expected = probabilities(tm.chain_rule(model, EVERY, sampler))
    assert chi_square(drawn, expected) < CHI_SQUARE
    assert chi_square(drawn, torch.full((27,), 1 / 27)) > 3 * CHI_SQUARE


@pytest.mark.parametrize("sampler", ["l2r", "confidence", "random"])
def test_several_positions_a_call_draw_from_the_chain_rule_of_groups(sampler):
    model = model_of()
    drawn = written(model, sampler, DRAWS, steps=1).z
    expected = probabilities(tm.chain_rule(model, EVERY, "l2r", L))
    assert chi_square(drawn, expected) < CHI_SQUARE
    assert chi_square(drawn, any_order(model)) > CHI_SQUARE


def test_any_order_one_token_a_call_draws_from_the_mean_of_all_orders():
    model = model_of()
    drawn = written(model, "random", DRAWS).z
    assert chi_square(drawn, any_order(model)) < CHI_SQUARE
    assert chi_square(drawn, in_steps(model, 1)) > CHI_SQUARE


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ancestral_sampling_has_the_probabilities_of_its_steps(steps):
    model = model_of()
    drawn = written(model, "ancestral", DRAWS, steps=steps).z
    assert chi_square(drawn, in_steps(model, steps)) < CHI_SQUARE
    assert chi_square(drawn, any_order(model)) > CHI_SQUARE


def test_ancestral_sampling_approaches_any_order_as_the_steps_grow():
    model = model_of()
    limit = any_order(model)
    far = [(in_steps(model, steps) - limit).abs().sum().item() for steps in (1, 2, 4, 8)]
    assert far == sorted(far, reverse=True) and far[3] < far[0] / 4
    assert chi_square(written(model, "ancestral", DRAWS, steps=32).z, limit) < CHI_SQUARE


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("system", [dict(objective="ar"), dict(block_size=1), dict(block_size=3)])
def test_causal_drawing(system, cache):
    model = model_of(seed=2, **system)
    drawn = written(model, "causal", DRAWS, cache=cache).z
    window = tm.with_before(EVERY)
    assert chi_square(drawn, probabilities(tm.causal_nll(model, window))) < CHI_SQUARE
    assert chi_square(drawn, torch.full((27,), 1 / 27)) > 3 * CHI_SQUARE


@pytest.mark.parametrize("sampler", ["l2r", "confidence"])
def test_blocks_draw_from_their_chain_rule(sampler):
    model = model_of(block_size=2, train_seq_len=4)
    drawn = written(model, sampler, DRAWS).z
    every = reference.all_sequences(V, 4)
    number = (drawn * V ** torch.arange(3, -1, -1)).sum(1).bincount(minlength=81)
    expected = DRAWS * torch.exp(-tm.chain_rule(model, every, sampler).double().sum(1))
    assert ((number - expected) ** 2 / expected).sum() < 124.8  # p = 0.001 for 80


def test_tokens_of_a_gap_have_the_probability_given_the_rest():
    model = model_of()
    tokens = torch.tensor([[2, V, 0]]).expand(DRAWS, -1)
    drawn = written(model, "l2r", tokens=tokens).z
    assert (drawn[:, 0] == 2).all() and (drawn[:, 2] == 0).all()
    p = model(tokens[:1])[0, 1].double().softmax(-1)
    expected = DRAWS * p
    found = drawn[:, 1].bincount(minlength=V)
    assert ((found - expected) ** 2 / expected).sum() < 13.8  # p = 0.001 for 2


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(temperature=0.5), [0.16 / 0.26, 0.09 / 0.26, 0.01 / 0.26]),
        (dict(top_p=0.6), [4 / 7, 3 / 7, 0]),
        (dict(top_p=0.3), [1.0, 0, 0]),
        (dict(temperature=0), [1.0, 0, 0]),
    ],
)
def test_temperature_and_nucleus(options, expected):
    """Of probabilities 0.4, 0.3, 0.1, and 0.2 for <s>, which an anchored model may not draw."""
    model = model_of(vocab_size=4, anchor_bos=True)
    rows = written(model, "l2r", DRAWS, torch.full((DRAWS, 1), 4), **options)
    logp = torch.tensor([0.4, 0.2, 0.3, 0.1]).log().expand(DRAWS, 1, 4)
    columns = torch.zeros(DRAWS, 1, dtype=torch.int64)
    asked = torch.ones(DRAWS, 1, dtype=torch.bool)
    drawn = rows.draw(columns, sampling.Prediction(columns, asked, logp))
    share = drawn.flatten().bincount(minlength=4) / DRAWS
    assert share[1] == 0
    assert torch.allclose(share[[0, 2, 3]], torch.tensor(expected), atol=0.03)


def test_noise_is_float64_and_belongs_to_its_row():
    rows = written(model_of(), "l2r", 3)
    asked = torch.tensor([[True, True], [True, False], [False, False]])
    noise = rows.gumbel(asked)
    assert noise.dtype == torch.float64 and noise[asked].isfinite().all()
    assert (noise[~asked] == -math.inf).all()
    other = written(model_of(), "l2r", 1, seed=1).gumbel(asked[1:2])
    assert torch.equal(noise[1], other[0])


# ---- Orders and costs


def replayed(rows):
    """For each row and model call: what was masked before, what the call revealed, and the rest of
    the step, which was taken back."""
    mask_id = rows.hp.mask_id
    for row, steps in enumerate(rows.steps):
        z = torch.where(rows.fixed, rows.z[row], mask_id)
        for step in steps:
            before = z.clone()
            pairs = list(zip(step["positions"], step["tokens"], strict=True))
            revealed = [(position, token) for position, token in pairs if token != mask_id]
            for position, token in pairs:
                z[position] = token
            yield row, before, revealed, pairs[len(revealed) :]
        assert torch.equal(z, rows.z[row])


LONG = dict(vocab_size=7, train_seq_len=12, train_batch_tokens=12, num_layers=4)
TEMPLATE = torch.tensor([[7, 7, 3, 7, 7, 7, 0, 2, 7, 7, 7, 5]]).expand(4, -1)


@pytest.mark.parametrize("system", [{}, dict(block_size=4), dict(backbone="dit")])
@pytest.mark.parametrize("sampler", MASKED)
def test_every_step_is_told_and_fixed_tokens_never_change(sampler, system):
    model = model_of(**LONG | system)
    for options in ({}, {} if sampler == "eb" else dict(steps=6)):
        rows = written(model, sampler, tokens=TEMPLATE, **options)
        fixed = TEMPLATE[0] != 7
        assert torch.equal(rows.z[:, fixed], TEMPLATE[:, fixed])
        assert (rows.z < 7).all() and len({tuple(row) for row in rows.z.tolist()}) > 1
        for _, before, revealed, taken_back in replayed(rows):
            positions = [position for position, _ in revealed]
            assert revealed and (before[positions] == 7).all()
            assert sampler == "remdm" or not taken_back
            assert not fixed[[position for position, _ in taken_back]].any()
        calls = [len(steps) for steps in rows.steps]
        assert max(calls) <= (6 if options else 8) or sampler == "remdm"


@pytest.mark.parametrize("sampler", ["l2r", "maskgit", "ancestral", "remdm"])
@pytest.mark.parametrize(
    ("system", "length", "steps"),
    [
        (dict(block_size=4), 11, 3),  # the last block is shorter
        (dict(block_size=3), 12, 6),
        (dict(block_size=4), 27, 10),
        (dict(block_size=1), 12, 12),
        ({}, 31, 7),  # windows of 12, then of 6 new tokens
        ({}, 30, 17),
    ],
)
def test_a_text_never_takes_more_calls_than_steps(sampler, system, length, steps):
    model = model_of(**LONG | system)
    tokens = torch.full((2, length), 7)
    rows = written(model, sampler, tokens=tokens, steps=steps)
    assert (rows.z < 7).all() and sum(rows.calls.values()) == steps
    most = max(len(taken) for taken in rows.steps)
    assert steps - 1 <= most <= steps if sampler == "l2r" else most <= steps


def test_calls_are_divided_by_what_is_left_to_fill():
    hp = model_of(**LONG, block_size=4).hp
    masked = torch.tensor([False] * 4 + [True] * 4 + [False, True, True, False])
    assert sampling.divide_calls(hp, masked, 6) == {8: 3, 12: 3}
    assert sampling.divide_calls(hp, masked, 5) == {8: 3, 12: 2}
    assert sampling.divide_calls(hp, masked, 0) == {}


@pytest.mark.parametrize("sampler", EXACT)
def test_bits_are_what_the_model_gives_the_revealed_tokens(sampler):
    model = model_of(**LONG)
    options = {} if sampler == "eb" else dict(steps=5)
    rows = written(model, sampler, tokens=TEMPLATE, temperature=0.7, top_p=0.9, **options)
    nats = torch.zeros(len(rows.z), dtype=torch.float64)
    for row, before, revealed, _ in replayed(rows):
        nll = reference.token_nll(model, rows.z[row][None], (before == 7)[None])[0]
        nats[row] += sum(nll[position] for position, _ in revealed)
    assert torch.allclose(rows.nats, nats, atol=1e-4)


@pytest.mark.parametrize("system", [{}, dict(block_size=4), dict(backbone="dit")])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_bits_are_those_of_the_scores(system, group):
    model = model_of(**LONG | system)
    for sampler in ("l2r", "confidence"):
        rows = written(model, sampler, 5, steps=12 // group)
        expected = tm.chain_rule(model, rows.z, sampler, group).double().sum(1)
        assert torch.allclose(rows.nats, expected, atol=1e-4)
    rows = written(model, "random", 5, steps=12 // group)
    order = torch.tensor([sum((s["positions"] for s in steps), []) for steps in rows.steps])
    expected = tm.chain_rule(model, rows.z, order, group).double().sum(1)
    assert torch.allclose(rows.nats, expected, atol=1e-4)


def test_bits_of_causal_samples():
    model = model_of(**LONG, objective="ar")
    rows = written(model, "causal", 5)
    assert torch.allclose(rows.nats, tm.chain_rule(model, rows.z).double().sum(1), atol=1e-4)


def plain_scores(logits):
    """By sampler, of the logits (V,) of a position: the larger, the earlier."""
    p = np.exp(logits - logits.max())
    p = np.sort(p / p.sum())
    return dict(confidence=np.log(p[-1]), margin=p[-1] - p[-2], entropy=(p * np.log(p)).sum())


@pytest.mark.parametrize("sampler", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("steps", [8, 3])
def test_the_most_certain_positions_come_first(sampler, steps):
    model = model_of(**LONG)
    orders = set()
    for row, before, revealed, _ in replayed(written(model, sampler, tokens=TEMPLATE, steps=steps)):
        logits = reference.unet_logits(model, before.numpy())
        scores = {i: plain_scores(logits[i])[sampler] for i in range(12) if before[i] == 7}
        best = sorted(scores, key=scores.get, reverse=True)[: len(revealed)]
        assert sorted(best) == sorted(position for position, _ in revealed)
        orders.add((row, tuple(best)))
    assert len(orders) > 4


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_entropies_are_bounded(gamma):
    """All but the largest add up to gamma at most, and one more would be too many."""
    model = model_of(**LONG)
    counts = []
    for _, before, revealed, _ in replayed(written(model, "eb", tokens=TEMPLATE, gamma=gamma)):
        logits = reference.unet_logits(model, before.numpy())
        entropies = {i: -plain_scores(logits[i])["entropy"] for i in range(12) if before[i] == 7}
        smallest = sorted(entropies, key=entropies.get)
        counts.append(len(revealed))
        assert set(smallest[: len(revealed)]) == {position for position, _ in revealed}
        total = np.cumsum([entropies[i] for i in smallest])
        assert len(revealed) == 1 or total[len(revealed) - 2] <= gamma + 1e-5
        assert len(revealed) == len(smallest) or total[len(revealed) - 1] > gamma - 1e-5
    assert (max(counts) == 1) == (gamma == 0)


def test_one_bound_for_all_is_one_call():
    rows = written(model_of(**LONG), "eb", tokens=TEMPLATE, gamma=100.0)
    assert [len(steps) for steps in rows.steps] == [1] * 4


def test_maskgit_keeps_the_most_probable_of_the_tokens_it_drew():
    model = model_of(**LONG)
    rows = written(model, "maskgit", tokens=TEMPLATE, steps=4, temperature=0)
    assert sampling.cosine_counts(8, 4) == [1, 2, 2, 3]
    for _, before, revealed, _ in replayed(rows):
        logits = reference.unet_logits(model, before.numpy())
        scores = {i: plain_scores(logits[i])["confidence"] for i in range(12) if before[i] == 7}
        best = sorted(scores, key=scores.get, reverse=True)[: len(revealed)]
        assert {(i, int(logits[i].argmax())) for i in best} == set(revealed)
    assert [len(step["positions"]) for step in rows.steps[0]] == [1, 2, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 7, 128])
@pytest.mark.parametrize("calls", [1, 3, 128, 999])
def test_shares_add_up(count, calls):
    for counts in (sampling.shares(count, calls), sampling.cosine_counts(count, calls)):
        assert sum(counts) == count and min(counts) >= 1 and len(counts) <= min(count, calls)
    assert max(sampling.shares(count, calls)) - min(sampling.shares(count, calls)) <= 1


# ---- Ancestral steps, remasking


def test_steps_that_reveal_nothing_are_no_calls():
    model = model_of(**LONG)
    rows = written(model, "ancestral", 500, steps=8)
    calls = np.array([len(steps) for steps in rows.steps])
    expected = 8 * (1 - (7 / 8) ** 12)  # steps that at least one of 12 positions falls into
    assert abs(calls.mean() - expected) < 4 * calls.std() / math.sqrt(500)


def test_remasking_never_is_ancestral_sampling():
    model = model_of(**LONG)
    plain = written(model, "ancestral", 5, steps=9)
    without = written(model, "remdm", 5, steps=9, eta=0.0)
    assert torch.equal(plain.z, without.z) and plain.steps == without.steps


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_tokens_are_masked_again_as_often_as_they_should(eta):
    """In each step a position is unmasked with probability α_t, which remasking keeps, and taken
    back with probability σ."""
    model, steps = model_of(**LONG), 10
    rows = written(model, "remdm", 500, steps=steps, eta=eta)
    again = [sum(step["tokens"].count(7) for step in own) for own in rows.steps]
    expected = 0.0
    for i in range(1, steps):
        alpha_t, alpha_s = 1 - i / steps, 1 - (i - 1) / steps
        expected += 12 * alpha_t * min(eta, (1 - alpha_s) / alpha_t)
    assert abs(np.mean(again) - expected) < 4 * np.std(again) / math.sqrt(500)


# ---- Caches, batches, lengths


@pytest.mark.parametrize("sampler", list(sampling.SAMPLERS))
@pytest.mark.parametrize("system", [dict(block_size=4), dict(block_size=4, neighbors=2)])
def test_with_and_without_a_cache_the_same_tokens_are_drawn(sampler, system):
    model = model_of(**LONG | system)
    # Longer than the window, and the last block is shorter than the others
    tokens = torch.cat([TEMPLATE, torch.full((4, 11), 7)], dim=1)
    kept, computed = (written(model, sampler, tokens=tokens, cache=c) for c in (True, False))
    assert torch.equal(kept.z, computed.z) and kept.steps == computed.steps
    assert torch.allclose(kept.nats, computed.nats, atol=1e-4)


@pytest.mark.parametrize("sampler", MASKED)
@pytest.mark.parametrize("system", [{}, dict(block_size=4)])
def test_company_makes_no_difference(sampler, system):
    model = model_of(**LONG | system)
    together = written(model, sampler, tokens=TEMPLATE)
    for row in range(4):
        alone = written(model, sampler, tokens=TEMPLATE[:1], seed=row)
        assert torch.equal(alone.z[0], together.z[row]) and alone.steps[0] == together.steps[row]


@pytest.mark.parametrize("length", [13, 18, 31])
def test_beyond_the_window_causal_text_goes_on_with_half_a_window_of_context(length):
    model = model_of(**LONG, objective="ar")
    rows = written(model, "causal", tokens=torch.full((3, length), 7))
    expected, stop = tm.chain_rule(model, rows.z[:, :12]).double().sum(1), 12
    while stop < length:
        window = rows.z[:, stop - 7 : stop + 6]  # a token before it, 6 of context, 6 at most
        expected += tm.causal_nll(model, window)[:, 6:].double().sum(1)
        stop += 6
    assert torch.allclose(rows.nats, expected, atol=1e-4)
    assert [len(steps) for steps in rows.steps] == [length] * 3


def test_beyond_the_window_blocks_go_on_with_whole_blocks_of_context():
    model = model_of(**LONG, block_size=4)
    rows = written(model, "l2r", tokens=torch.full((3, 20), 7))
    nats = tm.chain_rule(model, rows.z[:, :12]).double().sum(1)
    second = tm.chain_rule(model, rows.z[:, 8:], before=rows.z[:, 7])
    assert torch.allclose(rows.nats, nats + second[:, 4:].double().sum(1), atol=1e-4)


def test_shorter_windows_and_anchors():
    model = model_of(**LONG, anchor_bos=True)
    rows = written(model, "l2r", 300, torch.full((300, 5), 7))
    assert rows.z.shape == (300, 5) and (rows.z != tm.BOS_ID).all()
    expected = tm.chain_rule(model, rows.z).double().sum(1)
    assert torch.allclose(rows.nats, expected, atol=1e-4)


def test_predictions_that_are_no_numbers_are_refused():
    model = model_of()
    with torch.no_grad():
        model.tok_emb.weight.fill_(math.nan)
    with pytest.raises(tm.InputError, match="not finite"):
        written(model, "l2r")
