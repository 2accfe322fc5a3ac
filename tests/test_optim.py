"""Muon against an SVD, the optimizer against PyTorch's, average and schedules in closed form."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm


def newton_schulz(singular_values):
    """What five iterations of the quintic make of them."""
    s = singular_values
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 24), (2, 24, 6)])
def test_orthogonalize_against_svd(shape):
    """Newton-Schulz keeps the singular vectors."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for g, x in zip(stack, tm.orthogonalize(stack, 5), strict=True):
        u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
        s = newton_schulz(s / g.double().norm())
        assert torch.allclose(x.double(), u @ torch.diag(s) @ vt, atol=1e-4)
        assert s.min() > 0.3 and s.max() < 1.3


def test_batched_equals_one_by_one():
    stack = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.cat([tm.orthogonalize(matrix[None], 5) for matrix in stack])
    assert torch.allclose(tm.orthogonalize(stack, 5), one_by_one, atol=1e-5)
    assert torch.equal(tm.orthogonalize_shared(stack, 5), tm.orthogonalize(stack, 5))


# ---- Steps


TOKENS = torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(0))


def clipped_gradients(*models):
    """Gives all of them the same gradients; those of the last one are clipped by PyTorch."""
    for model in models:
        (model(TOKENS).logsumexp(-1).sum() * 30).backward()
    torch.nn.utils.clip_grad_norm_(models[-1].parameters(), 1.0)


def test_three_steps_equal_separate_optimizers():
    """Muon written out per matrix, and torch.optim.Adam per tensor, on the same gradients."""
    hp = tiny_hp(
        tie_embeddings=False,
        muon_momentum_warmup_steps=2,
        muon_backend_steps=3,
        head_lr=0.1,
        beta1=0.8,
        beta2=0.9,
        adam_eps=1e-4,
    )
    model = random_model(hp)
    other = copy.deepcopy(model)
    optimizer = tm.Optimizer(model, hp)
    rates = {"embed": hp.embed_lr, "head": hp.head_lr, "gain": hp.scalar_lr}
    named = dict(other.named_parameters())
    groups, velocity = [], {}
    for name, p in named.items():
        kind = tm.kind_of(name)
        if kind.optimizer == "adamw":
            groups.append(dict(params=[p], lr=0.5 * rates[kind.name]))
        else:
            velocity[name] = torch.zeros_like(p)
    adam = torch.optim.Adam(groups, betas=(0.8, 0.9), eps=1e-4)
    assert len(velocity) == 3 * 6
    for step, momentum in enumerate((0.85, 0.9, 0.95)):
        clipped_gradients(model, other)
        optimizer.step(step, 0.5)
        adam.step()
        with torch.no_grad():
            for name, v in velocity.items():
                p = named[name]
                v.mul_(momentum).add_(p.grad)
                update = tm.orthogonalize((p.grad + momentum * v)[None], 3)[0]
                p -= 0.5 * hp.matrix_lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        other.zero_grad()
        for name, p in model.named_parameters():
            assert torch.allclose(p, named[name], atol=1e-5), (step, name)
            assert p.grad.abs().max() == 0


@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0, 1e6])
def test_gradients_are_a_token_and_no_longer_than_the_limit(limit):
    """What a first step makes of them, as first moments: of all groups together, and whatever the
    loss was. (The updates themselves hardly depend on the length of a first gradient.)"""
    hp = tiny_hp(grad_clip_norm=limit, optimizer="adamw")
    model = random_model(hp)
    optimizer = tm.Optimizer(model, hp)
    model(TOKENS).logsumexp(-1).sum().backward()
    optimizer.sums += torch.tensor([20.0, 1e5, 0.0])  # tokens, loss, dropped
    grads = optimizer.grads[:-3].clone() / 20
    share = min(limit / grads.norm().item(), 1.0) if limit else 1.0
    assert share < 1 or limit != 1.0
    assert optimizer.step(0, 1.0) == 5000
    assert torch.allclose(optimizer.state[1], (1 - hp.beta1) * share * grads, rtol=1e-4, atol=1e-9)
    second = (1 - hp.beta2) * (share * grads).square()
    assert torch.allclose(optimizer.state[2], second, rtol=1e-4, atol=1e-12)


def test_a_skipped_step_is_no_step():
    """The steps after it are those of a run without it, to the last bit."""
    states = []
    for bad in ((), (1, 3)):
        hp = tiny_hp(weight_decay=0.1)
        model = random_model(hp)
        optimizer = tm.Optimizer(model, hp)
        for number in range(5):
            if number in bad:
                model(TOKENS).sum().backward()
                optimizer.grads[7] = math.inf
                optimizer.step(number, 1.0)
            model(TOKENS).logsumexp(-1).sum().backward()
            optimizer.step(number, 1.0)
        assert optimizer.counts.tolist() == [5, len(bad)]
        assert optimizer.first_bad[0] == (2 if bad else 0)  # the first of two
        states.append(optimizer.state.clone())
    assert torch.equal(*states)


def rate_name(name, parameter):
    """The knob that is the learning rate of a parameter of a DiT with a head of its own."""
    if name == "tok_emb.weight":
        return "embed_lr"
    if name == "lm_head.weight":
        return "head_lr"
    return "matrix_lr" if parameter.dim() == 2 else "scalar_lr"


@pytest.mark.parametrize("decay_on", ["matrices", "all"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weight_decay_is_decoupled_and_for_the_kinds_that_were_named(decay_on, kind):
    """AdamW of PyTorch per tensor on the same gradients; Muon's matrices shrink by lr·decay before
    the update."""
    rates = dict(matrix_lr=0.01, embed_lr=0.02, head_lr=0.03, scalar_lr=0.04)
    decay = dict(weight_decay=0.5, weight_decay_on=decay_on)
    hp = tiny_hp(backbone="dit", tie_embeddings=False, optimizer=kind, **decay, **rates)
    model = random_model(hp)
    other = copy.deepcopy(model)
    optimizer, named = tm.Optimizer(model, hp), dict(other.named_parameters())
    groups, by_muon = [], set()
    for name, p in named.items():
        rate = rate_name(name, p)
        decays = decay_on == "all" or rate in ("matrix_lr", "head_lr")
        if kind == "muon" and rate == "matrix_lr":
            by_muon.add(name)
        else:
            lr, weight_decay = 0.5 * rates[rate], 0.5 if decays else 0.0
            groups.append(dict(params=[p], lr=lr, weight_decay=weight_decay))
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        clipped_gradients(model, other)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(step, 0.5)
        adamw.step()
        other.zero_grad()
        for name, p in model.named_parameters():
            if name in by_muon:
                update = (1 - 0.5 * 0.01 * 0.5) * before[name] - p
                small, large = sorted(p.shape)
                size = update.norm() / (0.5 * 0.01 * small**0.5)
                assert 0.001 < size < 2 * (large / small) ** 0.5
                named[name].data.copy_(p)
            else:
                assert torch.allclose(p, named[name], atol=1e-5), (step, name)


def test_parameters_are_views_of_one_buffer_in_every_kind():
    model = random_model(tiny_hp())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tm.Optimizer(model, tiny_hp())
    start = optimizer.weights.data_ptr()
    end = start + 4 * len(optimizer.weights)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and start <= p.data_ptr() < end
    optimizer.weights.zero_()
    assert all(p.abs().max() == 0 for p in model.parameters())


def three_steps(optimizer, model):
    z = torch.tensor([[0, 3, 1, 3]])
    for step in range(3):
        model(z).logsumexp(-1).sum().backward()
        optimizer.step(step, 1.0)


def test_the_flat_state_is_all_there_is():
    """Put back as it was, it takes the same steps again."""
    hp = tiny_hp()
    model = random_model(hp)
    optimizer = tm.Optimizer(model, hp)
    kept = [(x, x.clone()) for x in (optimizer.state, optimizer.counts)]
    three_steps(optimizer, model)
    first = optimizer.state.clone()
    for x, before in kept:
        x.copy_(before)
    three_steps(optimizer, model)
    assert torch.equal(optimizer.state, first) and optimizer.counts.tolist() == [3, 0]


POISONED = {"matrix": "blocks.0.mlp.fc.weight", "embed": "tok_emb.weight"}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", *POISONED])
@pytest.mark.parametrize("before", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing(poison, place, before):
    """Whether it is the first step, when Adam has no moments yet, or a later one."""
    hp = tiny_hp(weight_decay=0.1)
    model = random_model(hp)
    optimizer = tm.Optimizer(model, hp)
    if before:
        three_steps(optimizer, model)
    kept = optimizer.state.clone()
    model(torch.tensor([[0, 3, 1, 3]])).sum().backward()
    if place == "loss":
        optimizer.sums[1] = poison
    else:
        dict(model.named_parameters())[POISONED[place]].grad[1, 1] = poison
    optimizer.step(before, 1.0)
    assert torch.equal(optimizer.state, kept) and optimizer.counts.tolist() == [before, 1]
    assert optimizer.grads.abs().max() == 0
    step, *norms, loss = optimizer.first_bad.tolist()
    pairs = zip(optimizer.groups, norms, strict=True)
    bad = [group.name.split()[0] for group, norm in pairs if not math.isfinite(norm)]
    assert step == before + 1 and math.isfinite(loss) == bool(bad)
    assert bad == ([] if place == "loss" else [place])
    three_steps(optimizer, model)
    assert optimizer.state.isfinite().all() and optimizer.first_bad[0] == step


def test_sums_of_micro_batches_end_in_the_loss_a_token():
    hp = tiny_hp()
    optimizer = tm.Optimizer(tm.build_model(hp), hp)
    assert optimizer.sums.data_ptr() == optimizer.grads[-3:].data_ptr() and len(optimizer.sums) == 3
    for tokens_loss_dropped in ((8, 12.0, 0), (4, 6.0, 3)):
        optimizer.sums += torch.tensor(tokens_loss_dropped)
    assert optimizer.sums.tolist() == [12, 18, 3]
    assert optimizer.step(0, 1.0) == 1.5 and optimizer.dropped == 3
    assert optimizer.sums.tolist() == [0, 0, 0]
    optimizer.step(1, 1.0)
    assert optimizer.dropped == 3  # over all steps


# ---- Average


def averaged(decay):
    """An optimizer, and a function that gives its weights a value and averages it in."""
    hp = tiny_hp(ema_decay=decay)
    optimizer = tm.Optimizer(tm.build_model(hp), hp)

    def update(w):
        optimizer.weights.copy_(w)
        optimizer.update_average()

    return optimizer, update


def test_average_in_closed_form():
    (optimizer, update), d = averaged(0.9), 0.9
    before = optimizer.weights.clone()
    optimizer.swap_average()  # nothing to swap with yet
    assert torch.equal(optimizer.weights, before)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    weights = [torch.randn(len(before), generator=generator) for generator in generators]
    for w in weights:
        update(w)
    later = sum(d ** (5 - i) * weights[i] for i in range(1, 6))
    expected = d**5 * weights[0] + (1 - d) * later
    assert torch.allclose(optimizer.average, expected, atol=1e-6)
    optimizer.swap_average()
    assert torch.allclose(optimizer.weights, expected, atol=1e-6)
    optimizer.swap_average()
    assert torch.equal(optimizer.weights, weights[-1])


def test_the_average_moves_where_bfloat16_would_freeze():
    optimizer, update = averaged(0.999)
    update(torch.ones_like(optimizer.weights))
    for _ in range(1000):
        update(torch.full_like(optimizer.weights, 1.0078125))  # what bfloat16 makes of 1.01
    assert optimizer.average.dtype == torch.float32 and optimizer.average[0] > 1.004


# ---- Schedules


def test_learning_rate_schedules():
    hp = tm.Hyperparameters(iterations=100, warmdown_iters=40, max_wallclock_seconds=0)
    assert [tm.lr_scale(hp, step, 0.0) for step in (0, 60, 80, 100)] == [1.0, 1.0, 0.5, 0.0]
    timed = dataclasses.replace(hp, max_wallclock_seconds=10.0)  # 100 ms a step: 100 steps fit
    assert tm.lr_scale(timed, 50, 5_000.0) == 1.0
    # 180 ms a step: 5.6 steps are left
    assert tm.lr_scale(timed, 50, 9_000.0) == pytest.approx(1_000 / 180 / 40)
    # The mean of fewer than ten steps says nothing, because the first ones are slow.
    assert tm.lr_scale(timed, 9, 9_000.0) == 1.0 and tm.lr_scale(timed, 10, 9_000.0) < 0.1
    assert tm.run_fraction(timed, 50, 9_000.0) == 0.9
    assert tm.run_fraction(timed, 95, 9_000.0) == 0.95
    assert tm.run_fraction(hp, 50, 1e9) == 0.5 and tm.run_fraction(timed, 0, 11_000.0) == 1.0


def test_a_decay_that_is_a_share_of_the_run_follows_its_length():
    """Of the steps, or of the clock if that comes first; WARMDOWN_ITERS, if given, wins."""
    shape = dict(warmdown_iters=0, warmdown_frac=0.4, min_lr_frac=0.1, max_wallclock_seconds=0)
    for iterations in (100, 1000):
        hp = tm.Hyperparameters(iterations=iterations, **shape)
        scales = [tm.lr_scale(hp, round(share * iterations), 0.0) for share in (0, 0.6, 0.8, 1)]
        assert scales == pytest.approx([1.0, 1.0, 0.55, 0.1])
    timed = dataclasses.replace(hp, max_wallclock_seconds=10.0)
    # 2 of 10 s are left, of 4 s of decay
    assert tm.lr_scale(timed, 50, 8_000.0) == pytest.approx(0.55)
    assert tm.Hyperparameters(warmdown_frac=0.4).warmdown_iters == 0  # what is given counts
    given = dataclasses.replace(hp, warmdown_iters=10)
    assert tm.lr_scale(given, 995, 0.0) == pytest.approx(0.55)
    assert tm.lr_scale(dataclasses.replace(hp, warmdown_frac=0.0), 999, 0.0) == 1.0


def test_the_published_schedule_of_the_diffusion_transformer():
    """PR 1106: 300 steps up, constant, 1,500 steps down a cosine to a tenth."""

    def published(step):
        if step < 300:
            return (step + 1) / 300
        left = min((6000 - step) / 1500, 1.0)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (1 - left)))

    for preset in ("llada", "eos"):
        hp = tm.Hyperparameters(preset=preset, max_wallclock_seconds=0)
        for step in (0, 1, 299, 300, 3000, 4499, 4500, 5000, 5999):
            assert tm.lr_scale(hp, step, 0.0) == pytest.approx(published(step))
    # 50 ms a step: 2,000 steps fit
    capped = tm.Hyperparameters(preset="llada", max_wallclock_seconds=100.0)
    assert tm.lr_scale(capped, 400, 20_000.0) == 1.0
    assert tm.lr_scale(capped, 1250, 62_500.0) == pytest.approx(published(5250))


DECAYS = [dict(warmdown_iters=6), dict(warmdown_frac=0.5), dict(warmdown_frac=0.0)]


@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_learning_rate_is_a_number_at_any_step_and_time(decay, shape):
    """Also when the clock stands still, when no step is wanted, and when the time is long over."""
    for iterations, cap in itertools.product((0, 1, 12, 10**6), (0.0, 1e-9, 0.001, 600.0)):
        run = dict(iterations=iterations, max_wallclock_seconds=cap, lr_warmup_steps=3)
        hp = tm.Hyperparameters(warmdown_shape=shape, min_lr_frac=0.1, **run, **decay)
        for step in (0, 1, 9, 10, 11, 12, 500, 10**6):
            for elapsed_ms in (0.0, 1e-9, 1e-3, 1.0, 599_999.0, 600_000.0, 1e12):
                scale = tm.lr_scale(hp, step, elapsed_ms)
                assert math.isfinite(scale) and 0 < scale <= 1
                assert 0 <= tm.run_fraction(hp, step, elapsed_ms) <= 1


def test_momentum_rises_to_its_end_and_stays_there():
    warm = dict(muon_momentum=0.95, muon_momentum_warmup_start=0.75)
    hp = tiny_hp(muon_momentum_warmup_steps=10, **warm)
    found = [tm.muon_momentum(hp, step) for step in (0, 5, 10, 11, 1000)]
    assert found == pytest.approx([0.75, 0.85, 0.95, 0.95, 0.95])
    assert tm.muon_momentum(tiny_hp(muon_momentum_warmup_steps=0, **warm), 0) == 0.95


# ---- Learning rates


RATES = ("matrix_lr", "tied_embed_lr", "embed_lr", "head_lr", "scalar_lr")


def rates_of(hp):
    """Learning rate by kind of parameter."""
    return {kind.name: tm.learning_rate(hp, kind) for kind in tm.KINDS}


def test_rates_of_adamw_follow_the_square_root_of_the_batch():
    given = dict(matrix=0.02, embed=0.05, near=0.6, head=0.008, gain=0.04)
    assert rates_of(tiny_hp()) == given  # ADAM_BATCH_TOKENS=0: whatever the batch
    assert rates_of(tiny_hp(train_batch_tokens=64)) == given
    assert rates_of(tiny_hp(tie_embeddings=False)) == given | dict(embed=0.6)
    batch = tiny_hp().train_batch_tokens
    hp = tiny_hp(adam_batch_tokens=4 * batch)
    halved = dict(matrix=0.02, embed=0.025, near=0.3, head=0.004, gain=0.02)
    assert rates_of(hp) == pytest.approx(halved)
    assert [getattr(hp, name) for name in RATES] == [0.02, 0.05, 0.6, 0.008, 0.04]  # as given
    adamw = dataclasses.replace(hp, optimizer="adamw")
    assert rates_of(adamw) == pytest.approx(halved)  # of a matrix it is Muon's, whoever steps
    assert rates_of(dataclasses.replace(hp, scalar_lr=0.08))["gain"] == pytest.approx(0.04)


def test_another_batch_has_other_rates():
    """Whichever way the configuration was made."""
    batch = tiny_hp().train_batch_tokens
    hp = tiny_hp(adam_batch_tokens=4 * batch)
    for factor in (1, 4, 16):
        replaced = dataclasses.replace(hp, train_batch_tokens=factor * batch)
        made = tiny_hp(adam_batch_tokens=4 * batch, train_batch_tokens=factor * batch)
        assert replaced == made and rates_of(replaced) == rates_of(made)
        assert rates_of(replaced)["gain"] == pytest.approx(0.04 * (factor / 4) ** 0.5)
        assert rates_of(replaced)["matrix"] == 0.02
    assert rates_of(dataclasses.replace(hp, seed=2)) == rates_of(hp)  # not twice


def test_the_optimizer_steps_at_these_rates():
    hp = tiny_hp(adam_batch_tokens=4 * tiny_hp().train_batch_tokens, neighbors=1)
    for changed in (hp, dataclasses.replace(hp, train_batch_tokens=4 * hp.train_batch_tokens)):
        rates = rates_of(changed)
        groups = tm.Optimizer(tm.build_model(changed), changed).groups
        found = {(group.name.split()[0], group.muon): group.lr for group in groups}
        kinds = ("matrix", "embed", "near", "gain")  # a tied embedding is its own head
        assert found == {(kind, kind == "matrix"): rates[kind] for kind in kinds}


def test_the_demo_has_the_rates_of_golf_for_its_batch():
    golf, demo = (rates_of(tm.Hyperparameters(preset=name)) for name in ("golf", "demo"))
    assert golf["embed"] == 0.05 and golf["matrix"] == demo["matrix"]
    # 4,096 tokens are 524,288 / 128; the rates of tables were searched for small batches
    for kind, times in dict(embed=4, near=2, head=1, gain=1).items():
        assert demo[kind] == pytest.approx(times * golf[kind] / 128**0.5)
