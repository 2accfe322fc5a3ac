"""Muon against an SVD, the flat optimizer against PyTorch's, EMA and schedules against closed forms."""

import copy
import math

import pytest
import torch

import train_mdlm as tm
from conftest import random_model, tiny_hp


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 24), (2, 24, 6)])
def test_orthogonalize_against_svd(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    out = tm.orthogonalize(stack, 5)
    for g, x in zip(stack, out):
        u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
        # Newton-Schulz keeps the singular vectors and maps each singular value through the quintic five times
        s = s / g.double().norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert torch.allclose(x.double(), u @ torch.diag(s) @ vt, atol=1e-4)
        assert s.min() > 0.3 and s.max() < 1.3


def test_batched_equals_one_by_one():
    stack = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        tm.orthogonalize(stack, 5), torch.cat([tm.orthogonalize(m[None], 5) for m in stack]), atol=1e-5
    )


def test_three_steps_equal_separate_optimizers():
    """Muon written out per matrix, and torch.optim.Adam per tensor, on the same gradients."""
    hp = tiny_hp(tie_embeddings=False, muon_momentum_warmup_steps=2, head_lr=0.1)
    model = random_model(hp)
    other = copy.deepcopy(model)
    optimizer = tm.Optimizer(model, hp)
    rates = {"embed": hp.embed_lr, "head": hp.head_lr, "gain": hp.scalar_lr}
    named = dict(other.named_parameters())
    adam = torch.optim.Adam(
        [
            dict(params=[p], lr=0.5 * rates[tm.kind_of(n).name])
            for n, p in named.items()
            if tm.kind_of(n).optimizer == "adamw"
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    velocity = {n: torch.zeros_like(p) for n, p in named.items() if tm.kind_of(n).optimizer == "muon"}
    assert len(velocity) == 3 * 6
    z = torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(0))
    for step, momentum in enumerate((0.85, 0.9, 0.95)):
        for m in (model, other):
            (m(z).logsumexp(-1).sum() * 30).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step(step, 0.5)
        adam.step()
        with torch.no_grad():
            for name, v in velocity.items():
                p = named[name]
                v.mul_(momentum).add_(p.grad)
                update = tm.orthogonalize((p.grad + momentum * v)[None], 5)[0]
                p -= 0.5 * hp.matrix_lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        other.zero_grad()
        for name, p in model.named_parameters():
            assert torch.allclose(p, named[name], atol=1e-5), (step, name)
            assert p.grad.abs().max() == 0


@pytest.mark.parametrize("decay_on", ["matrices", "all"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weight_decay_is_decoupled_and_for_the_kinds_that_were_named(decay_on, kind):
    """AdamW of PyTorch per tensor on the same gradients; Muon's matrices shrink by lr·decay before the update."""
    rates = dict(matrix_lr=0.01, embed_lr=0.02, head_lr=0.03, scalar_lr=0.04)
    hp = tiny_hp(
        backbone="dit", tie_embeddings=False, optimizer=kind, weight_decay=0.5, weight_decay_on=decay_on, **rates
    )
    model = random_model(hp)
    other, z = copy.deepcopy(model), torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(0))
    optimizer, named, groups = tm.Optimizer(model, hp), dict(other.named_parameters()), []
    for name, p in named.items():
        matrix = p.dim() == 2 and not name.startswith(("tok_emb", "lm_head"))
        if not (matrix and kind == "muon"):
            lr = rates[
                "matrix_lr" if matrix else "embed_lr" if "emb.w" in name else "head_lr" if p.dim() == 2 else "scalar_lr"
            ]
            decays = decay_on == "all" or matrix or name == "lm_head.weight"
            groups.append(dict(params=[p], lr=0.5 * lr, weight_decay=0.5 if decays else 0.0))
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        for m in (model, other):
            (m(z).logsumexp(-1).sum() * 30).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(step, 0.5)
        adamw.step()
        other.zero_grad()
        for name, p in model.named_parameters():
            if kind == "muon" and tm.kind_of(name).name == "matrix":
                update = (1 - 0.5 * 0.01 * 0.5) * before[name] - p
                assert (
                    0.001
                    < update.norm() / (0.5 * 0.01 * min(p.shape) ** 0.5)
                    < 2 * (max(p.shape) / min(p.shape)) ** 0.5
                )
                named[name].data.copy_(p)
            else:
                assert torch.allclose(p, named[name], atol=1e-5), (step, name)


def test_parameters_are_views_of_one_buffer_in_every_kind():
    model = random_model(tiny_hp())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tm.Optimizer(model, tiny_hp())
    start, end = optimizer.weights.data_ptr(), optimizer.weights.data_ptr() + 4 * len(optimizer.weights)
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


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "matrix", "embed"])
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
        optimizer.grads[-1] = poison
    else:
        dict(model.named_parameters())[{"matrix": "blocks.0.mlp.fc.weight", "embed": "tok_emb.weight"}[place]].grad[
            1, 1
        ] = poison
    optimizer.step(before, 1.0)
    assert torch.equal(optimizer.state, kept) and optimizer.counts.tolist() == [before, 1]
    assert optimizer.grads.abs().max() == 0
    step, *norms, loss = optimizer.first_bad.tolist()
    bad = [name.split()[0] for name, norm in zip(optimizer.names, norms, strict=True) if not math.isfinite(norm)]
    assert step == before + 1 and bad == ([place] if place != "loss" else []) and math.isfinite(loss) == bool(bad)
    three_steps(optimizer, model)
    assert optimizer.state.isfinite().all() and optimizer.first_bad[0] == step


def averaged(decay):
    """An optimizer, and a function that gives its weights a value and averages it in."""
    hp = tiny_hp(ema_decay=decay)
    optimizer = tm.Optimizer(tm.build_model(hp), hp)

    def update(w):
        optimizer.weights.copy_(w)
        optimizer.update_average()

    return optimizer, update


def test_ema_closed_form():
    (optimizer, update), d = averaged(0.9), 0.9
    before = optimizer.weights.clone()
    optimizer.swap_average()  # nothing to swap with yet
    assert torch.equal(optimizer.weights, before)
    weights = [torch.randn(len(before), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for w in weights:
        update(w)
    expected = d**5 * weights[0] + (1 - d) * sum(d ** (5 - i) * weights[i] for i in range(1, 6))
    assert torch.allclose(optimizer.average, expected, atol=1e-6)
    optimizer.swap_average()
    assert torch.allclose(optimizer.weights, expected, atol=1e-6)
    optimizer.swap_average()
    assert torch.equal(optimizer.weights, weights[-1])


def test_ema_moves_where_bfloat16_would_freeze():
    optimizer, update = averaged(0.999)
    update(torch.ones_like(optimizer.weights))
    for _ in range(1000):
        update(torch.full_like(optimizer.weights, 1.0078125))  # what bfloat16 makes of 1.01
    assert optimizer.average.dtype == torch.float32 and optimizer.average[0] > 1.004


def test_learning_rate_schedules():
    hp = tm.Hyperparameters(iterations=100, warmdown_iters=40, max_wallclock_seconds=0)
    assert [tm.lr_scale(hp, s, 0.0) for s in (0, 60, 80, 100)] == [1.0, 1.0, 0.5, 0.0]
    timed = tm.dataclasses.replace(hp, max_wallclock_seconds=10.0)  # 100 ms a step: 100 steps fit
    assert tm.lr_scale(timed, 50, 5_000.0) == 1.0
    assert tm.lr_scale(timed, 50, 9_000.0) == pytest.approx(1_000 / 180 / 40)  # 180 ms a step: 5.6 steps are left
    assert tm.progress(timed, 50, 9_000.0) == 0.9 and tm.progress(timed, 95, 9_000.0) == 0.95
    assert tm.progress(hp, 50, 1e9) == 0.5 and tm.progress(timed, 0, 11_000.0) == 1.0


def test_a_decay_that_is_a_share_of_the_run_follows_its_length():
    """Of the steps, or of the clock if that comes first; WARMDOWN_ITERS, if given, wins."""
    for iterations in (100, 1000):
        hp = tm.Hyperparameters(
            iterations=iterations, warmdown_iters=0, warmdown_frac=0.4, min_lr_frac=0.1, max_wallclock_seconds=0
        )
        scales = [tm.lr_scale(hp, round(share * iterations), 0.0) for share in (0, 0.6, 0.8, 1)]
        assert scales == pytest.approx([1.0, 1.0, 0.55, 0.1])
    timed = tm.dataclasses.replace(hp, max_wallclock_seconds=10.0)
    assert tm.lr_scale(timed, 50, 8_000.0) == pytest.approx(0.55)  # 2 of 10 s are left, of 4 s of decay
    cycles = tm.dataclasses.replace(hp, lr_cycle_steps=250)
    assert [tm.lr_scale(cycles, step, 0.0) for step in (250, 450, 500)] == pytest.approx([1.0, 0.55, 1.0])
    assert tm.Hyperparameters(warmdown_frac=0.4).warmdown_iters == 0  # what is given counts
    assert tm.lr_scale(tm.dataclasses.replace(hp, warmdown_iters=10), 995, 0.0) == pytest.approx(0.55)
    assert tm.lr_scale(tm.dataclasses.replace(hp, warmdown_frac=0.0), 999, 0.0) == 1.0


def test_rates_of_adam_follow_the_square_root_of_the_batch_unless_they_are_given():
    def rates(hp):
        return [hp.matrix_lr, hp.tied_embed_lr, hp.embed_lr, hp.head_lr, hp.scalar_lr]

    given = rates(tiny_hp())
    assert given == [0.02, 0.05, 0.6, 0.008, 0.04]  # ADAM_BATCH_TOKENS=0
    hp = tiny_hp(adam_batch_tokens=4 * tiny_hp().train_batch_tokens)
    assert rates(hp) == pytest.approx([0.02, 0.025, 0.3, 0.004, 0.02])
    assert {lr for muon, lr, *_ in tm.Optimizer(tm.build_model(hp), hp).groups if not muon} == {0.025, 0.02}
    near = tm.dataclasses.replace(hp, neighbors=1)
    assert {lr for muon, lr, *_ in tm.Optimizer(tm.build_model(near), near).groups if not muon} == {0.025, 0.3, 0.02}
    assert rates(tm.dataclasses.replace(hp, seed=2)) == rates(hp)  # not twice
    assert tiny_hp(adam_batch_tokens=64, scalar_lr=0.04).scalar_lr == 0.04
    golf, demo = (tm.Hyperparameters(preset=name) for name in ("golf", "demo"))
    assert golf.tied_embed_lr == 0.05 and demo.tied_embed_lr == 0.05 / 16  # 2,048 tokens are 524,288 / 16²


def test_the_published_schedule_of_the_diffusion_transformer():
    """PR 1106: 300 steps up, constant, 1,500 steps down a cosine to a tenth; PR 1241 does it again for each 6,000."""

    def published(step):
        if step < 300:
            return (step + 1) / 300
        left = min((6000 - step) / 1500, 1.0)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (1 - left)))

    llada = tm.Hyperparameters(preset="llada", max_wallclock_seconds=0)
    eos = tm.Hyperparameters(preset="eos", max_wallclock_seconds=0, iterations=18_000)
    for step in (0, 1, 299, 300, 3000, 4499, 4500, 5000, 5999):
        assert tm.lr_scale(llada, step, 0.0) == pytest.approx(published(step))
        for cycle in range(3):
            assert tm.lr_scale(eos, cycle * 6000 + step, 0.0) == pytest.approx(published(step))
    capped = tm.dataclasses.replace(llada, max_wallclock_seconds=100.0)  # 50 ms a step: 2,000 steps fit
    assert tm.lr_scale(capped, 400, 20_000.0) == 1.0
    assert tm.lr_scale(capped, 1250, 62_500.0) == pytest.approx(published(5250))
