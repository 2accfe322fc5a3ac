"""The forward pass against the equations written out in float64, and the published shapes."""

import dataclasses
import json
import zlib

import numpy as np
import pytest
import reference
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---- U-Net


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
    shape = dict(vocab_size=11, train_seq_len=9, train_batch_tokens=9)
    shape |= dict(num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2)
    hp = tm.Hyperparameters(**(shape | overrides))
    model = random_model(hp, scale=0.3)
    tokens = hp.vocab_size + (hp.objective == "mdlm")
    z = torch.randint(0, tokens, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(z, torch.tensor([0.5, 0.5]))
    assert logits.shape == (2, 9, 11) and logits.dtype == torch.float32
    for row, ids in zip(logits.detach().numpy(), z.numpy(), strict=True):
        np.testing.assert_allclose(row, reference.unet_logits(model, ids), atol=1e-4)


def test_published_shapes_and_names():
    model = tm.build_model(tm.Hyperparameters())
    assert parameters_of(model) == 19_190_656  # PR 1699
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
    assert parameters_of(baseline) == 17_059_912  # the challenge's 9 layers of 512
    assert baseline.tok_emb.weight.shape == (1024, 512)
    assert baseline.skip_weights.shape == (4, 512)


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (tm.build_model(tiny_hp(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["tok_emb.weight"], c["tok_emb.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_of_the_unet(tied):
    """Blocks begin as nothing: gains of 1, matrices into the residual stream of 0."""
    hp = tm.Hyperparameters(
        tie_embeddings=tied, neighbors=1, qk_gain_init=1.25, tied_embed_init_std=0.02, num_layers=2
    )
    found = tm.build_model(hp).state_dict()
    std = found.pop("tok_emb.weight").std().item()
    assert std == pytest.approx(0.02 if tied else 1.0, rel=0.01)
    for name, value in found.items():
        if name.endswith(("attn_scale", "mlp_scale", "skip_weights", "q_gain")):
            assert (value == (1.25 if "q_gain" in name else 1.0)).all(), name
        elif name.endswith("resid_mix"):
            assert (value[0] == 1).all() and (value[1] == 0).all(), name
        elif name.endswith(".proj.weight") or name in ("near.weight", "lm_head.weight"):
            assert (value == 0).all(), name
        else:  # PyTorch's uniform distribution
            reach = value.shape[1] ** -0.5
            assert 0.95 * reach < value.abs().max() <= reach, name


def test_initial_weights_of_the_dit():
    """All at random, its head too."""
    found = tm.build_model(tm.Hyperparameters(preset="llada", num_layers=1)).state_dict()
    assert found.pop("tok_emb.weight").std().item() == pytest.approx(1.0, rel=0.01)
    for name, value in found.items():
        reach = (found[name.replace("bias", "weight")].shape[1]) ** -0.5
        assert 0.9 * reach < value.abs().max() <= reach, name


def test_causal_model_does_not_look_ahead_and_mdlm_does():
    z = torch.tensor([[0, 1, 2, 0]])
    changed = torch.tensor([[0, 1, 2, 1]])
    for objective, same in (("ar", True), ("mdlm", False)):
        model = random_model(tiny_hp(objective=objective, neighbors=2))
        assert torch.equal(model(z)[:, :3], model(changed)[:, :3]) is same


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_neighbours_start_as_nothing_and_reach_as_far_as_they_are_told(backbone):
    hp = tiny_hp(backbone=backbone, neighbors=2, objective="mdlm")
    model, without = map(tm.build_model, (hp, dataclasses.replace(hp, neighbors=0)))
    assert not any(name.startswith("near") for name in without.state_dict())
    z = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    told = torch.tensor([0.5])
    assert torch.equal(model(z, told), without(z, told))
    assert model.near.weight.shape == (4 * (hp.vocab_size + 1), hp.neighbor_dim)
    for block in model.blocks:  # what is left is the input
        for branch in (block.attn, block.mlp):
            torch.nn.init.zeros_(branch.proj.weight)
    torch.nn.init.normal_(model.near.weight)
    other = z.clone()
    other[0, 3] = 1
    moved = (model(z, told) != model(other, told)).any(-1)[0]
    assert moved.tolist() == [False, True, True, True, True, True, False]


def test_training_on_a_cpu_rounds_factors_and_scoring_does_not(monkeypatch):
    """As if it multiplied fast in bfloat16: 8 bits of a factor are left, but for small matrices."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=g), torch.randn(7, 64, generator=g)
    exact = torch.nn.functional.linear(x, weight)
    monkeypatch.setattr(tm, "FAST_BFLOAT16", True)
    rounded = tm.multiply(x, weight)
    assert rounded.dtype == torch.float32
    assert 1e-3 < (rounded - exact).abs().max() < 0.2
    assert torch.equal(tm.multiply(x[:, :32], weight[:, :32]), x[:, :32] @ weight[:, :32].T)
    with torch.no_grad():
        assert torch.equal(tm.multiply(x, weight), exact)
    monkeypatch.setattr(tm, "FAST_BFLOAT16", False)
    assert torch.equal(tm.multiply(x, weight), exact)


def test_bfloat16_activations_stay_close():
    shape = dict(vocab_size=50, train_seq_len=16, train_batch_tokens=16)
    model = random_model(tm.Hyperparameters(num_layers=2, model_dim=64, **shape), scale=0.02)
    z = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = model(z)
    model.compute_dtype = torch.bfloat16
    assert (model(z) - exact).abs().max() < 0.1
    assert model(z).dtype == torch.float32 and model.hidden(z).dtype == torch.bfloat16


def test_an_outline_has_the_shapes_of_the_model_and_no_weights():
    for preset in tm.PRESETS:
        hp = tm.Hyperparameters(preset=preset, num_layers=2)
        outline, model = tm.outline_model(hp), tm.build_model(hp)
        shapes = [
            {name: parameter.shape for name, parameter in either.named_parameters()}
            for either in (outline, model)
        ]
        assert shapes[0] == shapes[1]
        assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}


def claiming(hp, size):
    """An artifact whose header claims a model of `hp`, each kind of parameter in `size` bytes."""
    kinds = ("matrix", "embed", "gain")
    header = dict(
        version=tm.FORMAT_VERSION,
        hyperparameters={name: getattr(hp, name) for name in tm.STORED},
        kinds={kind: ["int8", "zlib", size] for kind in kinds},
    )
    text = json.dumps(header).encode()
    body = zlib.compress(bytes(size))[:size].ljust(size, b"\0") * len(kinds)
    return tm.sealed(b"MDLMgolf" + len(text).to_bytes(4, "little") + text + body)


def test_a_file_that_claims_a_huge_model_is_refused_before_anything_is_unpacked(monkeypatch):
    """Terabytes of weights: nobody is asked for so much memory, whether or not there is any."""
    asked = []

    def unpack(packed, limit):
        asked.append(limit)
        raise ValueError

    monkeypatch.setitem(tm.PACKERS, "zlib", tm.Packer(tm.deflate, unpack))
    with pytest.raises(tm.InputError, match="small: not an artifact"):
        tm.unpack_artifact(claiming(tiny_hp(), 100), "small")
    assert asked and max(asked) < 10_000  # so this is where it would be noticed
    asked.clear()
    huge = tm.Hyperparameters(num_layers=200, model_dim=65_536)
    with pytest.raises(tm.InputError, match="huge: not an artifact"):
        tm.unpack_artifact(claiming(huge, 1000), "huge")
    assert max(asked, default=0) < 2**32


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_lack_of_memory_says_nothing_against_an_artifact(monkeypatch, error):
    def unpack(packed, limit):
        raise error

    monkeypatch.setitem(tm.PACKERS, "zlib", tm.Packer(tm.deflate, unpack))
    with pytest.raises(type(error)):
        tm.unpack_artifact(claiming(tiny_hp(), 100), "small")


# ---- DiT


def dit_hp(**overrides):
    """PRESET=llada, or eos, at a size for which float64 loops take no time."""
    values = dict(preset="llada", vocab_size=23, train_seq_len=12, train_batch_tokens=48)
    values |= dict(num_layers=3, model_dim=24, num_heads=2, num_kv_heads=2)
    return tm.Hyperparameters(**(values | overrides))


def test_the_dit_is_the_published_stack():
    model = random_model(dit_hp(), scale=0.2)
    z = torch.randint(0, 24, (4, 12), generator=torch.Generator().manual_seed(1))
    told = torch.tensor([0.05, 0.4, 0.8, 0.99])
    pairs = zip(z, told, strict=True)
    expected = np.stack([reference.dit_logits(model, row.numpy(), t.item()) for row, t in pairs])
    largest = np.abs(expected).max()
    assert np.abs(model(z, told).detach().numpy() - expected).max() < 1e-4 * largest
    assert not torch.allclose(model(z, told), model(z, told.flip(0)), atol=1e-3)  # it listens
    positions = torch.tensor([3, 17, 40, 41])
    picked = model.head(model.hidden(z, told, positions))
    assert torch.allclose(picked, model(z, told).flatten(0, 1)[positions], atol=1e-5)
    with torch.autocast("cpu", enabled=False):
        model.compute_dtype = torch.bfloat16
        rounded = model(z, told).float()
        assert (rounded - torch.from_numpy(expected)).abs().mean() < 0.05 * largest


def test_the_dit_is_told_no_noise_that_training_never_shows():
    features = tm.noise_features(torch.tensor([1.0, 0.9995, 0.999, 0.99]))
    most = features[2]  # MASK_MAX
    assert torch.allclose(features[:2], most.expand(2, -1), atol=1e-3)
    assert not torch.allclose(features[3], most, atol=0.1)


def test_the_dit_finds_the_noise_level_itself():
    """Without being told: the masked share of what may be masked, so neither of PAD nor, with
    ANCHOR_BOS, of <s>."""
    z = torch.tensor([[23, 23, 5, 1, 1, 7, 8, 9, 23, 2, 24, 24], [4] * 12, [23] * 12])
    for preset, share in (("llada", 3 / 10), ("eos", 3 / 8)):
        model = random_model(dit_hp(preset=preset, doc_chunks=True))
        told = torch.tensor([share, 0.0, 1.0])
        assert torch.allclose(model(z), model(z, told), atol=1e-6)
    assert torch.isfinite(model(torch.full((1, 12), 24))).all()  # nothing but PAD


def test_the_dit_has_the_designs_names_and_the_unet_nothing_of_it():
    names = {name for name, _ in tm.build_model(dit_hp()).named_parameters()}
    matrices = "attn.c_q attn.c_k attn.c_v attn.proj mlp.fc mlp.proj attn_mod mlp_mod".split()
    block = {f"{matrix}.weight" for matrix in matrices} | {"attn_mod.bias", "mlp_mod.bias"}
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    expected |= {f"time_embed.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert names == expected | {"tok_emb.weight", "lm_head.weight"}
    unet = {name for name, _ in tm.build_model(tiny_hp()).named_parameters()}
    assert not any("mod" in name or "time" in name for name in unet)
    for preset, rows in (("llada", 24), ("eos", 25)):
        assert tm.build_model(dit_hp(preset=preset)).tok_emb.weight.shape == (rows, 24)


def test_published_parameter_counts_of_the_dit():
    """About 33 M: 11 blocks of 10·D² and two modulations, embedding, head, and noise embedding."""
    d, c = 512, 128
    block = 10 * d * d + 2 * (c * 2 * d + 2 * d)
    noise = c * 4 * c + 4 * c + 4 * c * c + c
    for preset, rows in (("llada", 1025), ("eos", 1026)):
        model = tm.build_model(tm.Hyperparameters(preset=preset))
        assert parameters_of(model) == 11 * block + 1024 * d + noise + rows * d
