"""The forward pass against the equations written out in float64, and the published shapes."""

import numpy as np
import pytest
import torch

import train_mdlm as tm
from conftest import random_model, tiny_hp


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + tm.NORM_EPS)


def rotate(x, base):
    """x (L, head_dim): pairs (i, i + half) turned by position · base^(−2i/head_dim)."""
    length, dim = x.shape
    angle = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    turned = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * np.exp(-1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def reference_logits(model, z):
    """Logits (L, V) of one sequence, from the state dict, in float64."""
    hp, w = model.hp, {name: value.double().numpy() for name, value in model.state_dict().items()}
    x = rms(w["tok_emb.weight"][z])
    for i in range(len(z)):
        for offset in range(-hp.neighbors, 1 if hp.objective == "ar" else hp.neighbors + 1):
            if offset and 0 <= i + offset < len(z):
                x[i] += w[f"near.{offset}.weight"][z[i + offset]]
    x_emb = x
    encoder, skips = hp.num_layers // 2, []
    for i in range(hp.num_layers):

        def p(name, i=i):
            return w[f"blocks.{i}.{name}"]

        if i >= encoder and skips:
            x = x + w["skip_weights"][i - encoder] * skips.pop()
        x = p("resid_mix")[0] * x + p("resid_mix")[1] * x_emb
        h, heads = rms(x), []
        for head in range(hp.num_heads):
            kv, d = head * hp.num_kv_heads // hp.num_heads, hp.head_dim
            q = (
                rotate(rms(h @ p("attn.c_q.weight")[head * d : (head + 1) * d].T), hp.rope_base)
                * p("attn.q_gain")[head]
            )
            k = rotate(rms(h @ p("attn.c_k.weight")[kv * d : (kv + 1) * d].T), hp.rope_base)
            scores = q @ k.T / np.sqrt(d)
            if hp.objective == "ar":
                scores = np.where(np.tri(len(z), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ (h @ p("attn.c_v.weight")[kv * d : (kv + 1) * d].T))
        x = x + p("attn_scale") * (np.concatenate(heads, 1) @ p("attn.proj.weight").T)
        x = x + p("mlp_scale") * (np.maximum(rms(x) @ p("mlp.fc.weight").T, 0) ** 2 @ p("mlp.proj.weight").T)
        if i < encoder:
            skips.append(x)
    head = w["tok_emb.weight"][: hp.vocab_size] if hp.tie_embeddings else w["lm_head.weight"]
    logits = rms(x) @ head.T
    return hp.logit_softcap * np.tanh(logits / hp.logit_softcap) if hp.logit_softcap else logits


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(objective="ar"),
        dict(num_layers=1),
        dict(num_layers=4, num_kv_heads=4),
        dict(num_kv_heads=1),
        dict(tie_embeddings=False),
        dict(logit_softcap=0.0),
        dict(mlp_mult=3, rope_base=50.0),
        dict(neighbors=2),
        dict(neighbors=12, objective="ar"),  # further than the window is long
    ],
)
def test_forward_equals_the_equations_in_float64(overrides):
    hp = tm.Hyperparameters(
        **(
            dict(
                vocab_size=11,
                train_seq_len=9,
                train_batch_tokens=9,
                num_layers=3,
                model_dim=24,
                num_heads=4,
                num_kv_heads=2,
            )
            | overrides
        )
    )
    model = random_model(hp, scale=0.3)
    z = torch.randint(0, 11 + (hp.objective == "mdlm"), (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(z, torch.tensor([0.5, 0.5]))
    assert logits.shape == (2, 9, 11) and logits.dtype == torch.float32
    for row, ids in zip(logits.detach().numpy(), z.numpy()):
        np.testing.assert_allclose(row, reference_logits(model, ids), atol=1e-4)


def test_published_shapes_and_names():
    model = tm.build_model(tm.Hyperparameters())
    assert sum(p.numel() for p in model.parameters()) == 19_190_656  # PR 1699
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    block = {
        "attn.c_q.weight": (576, 576),
        "attn.c_k.weight": (288, 576),
        "attn.c_v.weight": (288, 576),
        "attn.proj.weight": (576, 576),
        "attn.q_gain": (8,),
        "mlp.fc.weight": (1152, 576),
        "mlp.proj.weight": (576, 1152),
        "attn_scale": (576,),
        "mlp_scale": (576,),
        "resid_mix": (2, 576),
    }
    expected = {f"blocks.{i}.{name}": shape for i in range(8) for name, shape in block.items()}
    assert shapes == expected | {"tok_emb.weight": (1025, 576), "skip_weights": (4, 576)}
    assert set(model.state_dict()) == set(shapes)
    baseline = tm.build_model(tm.Hyperparameters(preset="ar"))
    assert sum(p.numel() for p in baseline.parameters()) == 17_059_912  # the challenge's 9 layers of 512
    assert baseline.tok_emb.weight.shape == (1024, 512) and baseline.skip_weights.shape == (4, 512)


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (tm.build_model(tiny_hp(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(
        a["tok_emb.weight"], c["tok_emb.weight"]
    )


def test_causal_model_does_not_look_ahead_and_mdlm_does():
    z = torch.tensor([[0, 1, 2, 0]])
    changed = torch.tensor([[0, 1, 2, 1]])
    for objective, same in (("ar", True), ("mdlm", False)):
        model = random_model(tiny_hp(objective=objective, neighbors=2))
        assert torch.equal(model(z)[:, :3], model(changed)[:, :3]) is same


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_neighbours_start_as_nothing_and_reach_as_far_as_they_are_told(backbone):
    hp = tiny_hp(backbone=backbone, neighbors=2, objective="mdlm")
    model, without = tm.build_model(hp), tm.build_model(tm.dataclasses.replace(hp, neighbors=0))
    assert not any(name.startswith("near") for name in without.state_dict())
    z = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    told = torch.tensor([0.5])
    assert torch.equal(model(z, told), without(z, told))
    assert sorted(model.near) == ["-1", "-2", "1", "2"]
    rows = {tuple(e.weight.shape) for e in model.near.values()}
    assert rows == {(hp.vocab_size + 1, hp.model_dim)}
    for block in model.blocks:  # what is left is the input
        for branch in (block.attn, block.mlp):
            torch.nn.init.zeros_(branch.proj.weight)
    for embedding in model.near.values():
        torch.nn.init.normal_(embedding.weight)
    other = z.clone()
    other[0, 3] = 1
    moved = (model(z, told) != model(other, told)).any(-1)[0]
    assert moved.tolist() == [False, True, True, True, True, True, False]


def test_bfloat16_activations_stay_close():
    model = random_model(
        tm.Hyperparameters(vocab_size=50, train_seq_len=16, train_batch_tokens=16, num_layers=2, model_dim=64),
        scale=0.02,
    )
    z = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = model(z)
    model.compute_dtype = torch.bfloat16
    assert (model(z) - exact).abs().max() < 0.1


def reference_dit(model, z, masked_fraction):
    """PR 1106's stack for one sequence, in float64: logits (L, V)."""
    hp, w = model.hp, {name: value.double().numpy() for name, value in model.state_dict().items()}

    def silu(x):
        return x / (1 + np.exp(-x))

    sigma = -np.log(1 - masked_fraction)
    angle = sigma * np.exp(-np.log(10_000) * np.arange(64) / 64)
    c = np.concatenate([np.sin(angle), np.cos(angle)])
    c = silu(w["time_embed.0.weight"] @ c + w["time_embed.0.bias"])
    c = silu(w["time_embed.2.weight"] @ c + w["time_embed.2.bias"])
    x = w["tok_emb.weight"][z]
    for i in range(hp.num_layers):

        def p(name, i=i):
            return w[f"blocks.{i}.{name}"]

        def modulated(x, name, p=p):
            scale, shift = np.split(p(f"{name}.weight") @ c + p(f"{name}.bias"), 2)
            return rms(x) * (1 + scale) + shift

        h, d, heads = modulated(x, "attn_mod"), hp.head_dim, []
        for head in range(hp.num_heads):
            q, k, v = (h @ p(f"attn.c_{part}.weight")[head * d : (head + 1) * d].T for part in "qkv")
            scores = rms(rotate(q, hp.rope_base)) @ rms(rotate(k, hp.rope_base)).T / np.sqrt(d)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, 1) @ p("attn.proj.weight").T
        x = x + np.maximum(modulated(x, "mlp_mod") @ p("mlp.fc.weight").T, 0) ** 2 @ p("mlp.proj.weight").T
    return rms(x) @ w["lm_head.weight"].T


def dit_hp(**overrides):
    """PRESET=llada, or eos, at a size for which float64 loops take no time."""
    values = dict(preset="llada", vocab_size=23, train_seq_len=12, num_layers=3, model_dim=24, num_heads=2)
    return tm.Hyperparameters(**(values | dict(num_kv_heads=2, train_batch_tokens=48) | overrides))


def test_the_dit_is_the_published_stack():
    model = random_model(dit_hp(), scale=0.2)
    z = torch.randint(0, 24, (4, 12), generator=torch.Generator().manual_seed(1))
    told = torch.tensor([0.05, 0.4, 0.8, 0.99])
    expected = np.stack([reference_dit(model, row.numpy(), t.item()) for row, t in zip(z, told)])
    assert np.abs(model(z, told).detach().numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert not torch.allclose(model(z, told), model(z, told.flip(0)), atol=1e-3)  # it listens
    at = torch.tensor([3, 17, 40, 41])
    picked = model.head(model.hidden(z, told, at))
    assert torch.allclose(picked, model(z, told).flatten(0, 1)[at], atol=1e-5)
    with torch.autocast("cpu", enabled=False):
        model.compute_dtype = torch.bfloat16
        assert (model(z, told).float() - torch.from_numpy(expected)).abs().mean() < 0.05 * np.abs(expected).max()


def test_the_dit_finds_the_noise_level_itself():
    """Without being told: the masked share of what may be masked, so neither PAD nor, with ANCHOR_BOS, <s>."""
    z = torch.tensor([[23, 23, 5, 1, 1, 7, 8, 9, 23, 2, 24, 24], [4] * 12, [23] * 12])
    for preset, share in (("llada", 3 / 10), ("eos", 3 / 8)):
        hp = dit_hp(preset=preset, doc_chunks=True)
        model = random_model(hp)
        assert torch.allclose(model(z), model(z, torch.tensor([share, 0.0, 1.0])), atol=1e-6)
    assert torch.isfinite(model(torch.full((1, 12), 24))).all()  # nothing but PAD


def test_the_dit_has_the_designs_names_and_the_unet_nothing_of_it():
    names = {name for name, _ in tm.build_model(dit_hp()).named_parameters()}
    block = {"attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight", "mlp.fc.weight"}
    block |= {"mlp.proj.weight"} | {f"{kind}_mod.{part}" for kind in ("attn", "mlp") for part in ("weight", "bias")}
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block} | {"tok_emb.weight", "lm_head.weight"}
    assert names == expected | {f"time_embed.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    unet = {name for name, _ in tm.build_model(tiny_hp()).named_parameters()}
    assert not any("mod" in name or "time" in name for name in unet)
    for preset, rows in (("llada", 24), ("eos", 25)):
        assert tm.build_model(dit_hp(preset=preset)).tok_emb.weight.shape == (rows, 24)


def test_published_parameter_counts_of_the_dit():
    """About 33 M: 11 blocks of 10·D² and two modulations, embedding and head, the noise embedding."""
    d, c = 512, 128
    shared = 11 * (10 * d * d + 2 * (c * 2 * d + 2 * d)) + 1024 * d + c * 4 * c + 4 * c + 4 * c * c + c
    for preset, rows in (("llada", 1025), ("eos", 1026)):
        model = tm.build_model(tm.Hyperparameters(preset=preset))
        assert sum(p.numel() for p in model.parameters()) == shared + rows * d
