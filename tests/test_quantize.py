"""Grids, scales and error feedback, each against its definition in float64."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def feedback_by_definition(rows, scales, moments, largest):
    """Codes (R, C): after each column, those to come take over its error as far as they can, which
    is the regression of its input on theirs."""
    damped = moments + 0.01 * moments.diagonal().mean() * np.eye(len(moments))
    left = list(np.argsort(-moments.diagonal(), kind="stable"))
    rows, codes = rows.copy(), np.zeros_like(rows)
    while left:
        now, *left = left
        codes[:, now] = np.clip(np.round(rows[:, now] / scales), -largest, largest)
        if left:
            inner = damped[np.ix_(left, left)]
            share = np.linalg.solve(inner, damped[left, now])
            rows[:, left] += np.outer(rows[:, now] - codes[:, now] * scales, share)
    return codes


@pytest.mark.parametrize("storage", ["int4", "int7"])
def test_error_feedback_is_the_regression_on_what_is_not_rounded_yet(storage):
    """The largest inputs first; each row has a scale of its own."""
    quantizer = tm.QUANTIZERS[storage]
    mixed = gaussian(40, 12, seed=1) @ (gaussian(12, 12, seed=2) * torch.linspace(0.3, 2, 12))
    moments = mixed.T @ mixed
    rows = gaussian(9, 12) * torch.linspace(0.5, 3, 9)[:, None]
    scales = tm.row_scales(rows, quantizer, 3.0)
    codes = tm.feed_back(rows, scales, quantizer, moments).double().numpy()
    exact = rows.double().numpy(), scales[:, 0].double().numpy(), moments.double().numpy()
    expected = feedback_by_definition(*exact, quantizer.largest)
    nearest = tm.to_codes(rows / scales, quantizer).double().numpy()
    assert np.mean(codes != expected) < 0.02 < np.mean(nearest != expected)
    assert torch.equal(rows, gaussian(9, 12) * torch.linspace(0.5, 3, 9)[:, None])  # untouched


def test_grids_are_as_wide_as_their_codes():
    """As many whole numbers above 0 as below; the widest number of a format of PyTorch."""
    for name, quantizer in tm.QUANTIZERS.items():
        if quantizer.dtype == torch.int8:
            assert quantizer.largest == 2 ** (int(name.removeprefix("int")) - 1) - 1
        elif quantizer.dtype != torch.float32:
            assert quantizer.largest == torch.finfo(quantizer.dtype).max
        assert tm.to_codes(torch.tensor([1e9, -1e9]), quantizer).float().tolist() == (
            [quantizer.largest, -quantizer.largest] if name != "fp32" else [1e9, -1e9]
        )


def test_a_clip_is_in_root_mean_squares_of_its_row():
    rows = torch.tensor([[3.0, 4.0, 0.0, 0.0], [30.0, -40.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    for storage in ("int4", "int7", "fp8_row"):
        quantizer = tm.QUANTIZERS[storage]
        scales = tm.row_scales(rows, quantizer, 2.0)[:, 0]
        expected = 2.0 * torch.tensor([2.5, 25.0, 1.0]) / quantizer.largest
        assert torch.equal(scales, expected.to(quantizer.scale).float())


def test_without_a_clip_the_scale_has_the_least_squared_error_of_forty():
    rows = gaussian(5, 300) * torch.tensor([1, 1, 1, 1, 1e-3])[:, None]
    rows[1, 0] = 40.0  # one far out is worth cutting off
    rows[2] = rows[2].sign()
    quantizer = tm.QUANTIZERS["int5"]
    found = tm.row_scales(rows, quantizer, 0.0)[:, 0]
    for row, scale in zip(rows, found, strict=True):
        tried = [0.96**n * row.abs().max() / 15 for n in range(40)]
        tried = torch.stack(tried).to(torch.bfloat16).double()[:, None]
        codes = (row / tried).round().clamp(-15, 15)
        errors = (codes * tried - row.double()).square().sum(1)
        assert scale == tried[errors.argmin(), 0].float()
    assert found[1] < 40 / 15 and 15 * found[2] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("mode", ["int6", "fp8_row", "int4,embed:int8"])
def test_clip_and_moments_are_those_of_the_parameter(tmp_path, mode):
    """What is read back is each matrix, quantized with QUANT_CLIP and its own moments."""
    hp = tiny_hp(quant_mode=mode, quant_clip=3.0, model_dim=16, tie_embeddings=False)
    model = random_model(hp)
    moments = {}
    for seed, (name, weight) in enumerate(model.named_parameters()):
        if tm.kind_of(name).name in ("matrix", "head"):
            x = gaussian(50, weight.shape[-1], seed=seed) @ gaussian(*2 * weight.shape[-1:])
            moments[name] = x.T @ x
    tm.save_artifact(model, hp, tmp_path / "a.mdlm", moments)
    back = tm.load_artifact(tmp_path / "a.mdlm")[0].state_dict()
    for name, weight in model.named_parameters():
        quantizer = tm.QUANTIZERS[hp.storages[tm.kind_of(name).name]]
        codes, scales = tm.quantize(weight, quantizer, 3.0, moments.get(name))
        expected = (codes.float() * scales.float()).view(weight.shape)
        assert torch.allclose(back[name], expected, rtol=1e-6, atol=0), name
        if name in moments:
            plain, _ = tm.quantize(weight, quantizer, 3.0, None)
            assert not torch.equal(plain.float(), codes.float()), name


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_moments_are_of_all_batches_as_the_model_is_told_of_their_noise(backbone):
    """Of the last layer, what goes into it, at the scored positions."""
    hp = tiny_hp(backbone=backbone, tie_embeddings=False, num_kv_heads=2)
    model, unused = random_model(hp, scale=0.3), dict.fromkeys(("targets", "weights", "tokens"))
    batches = []
    for seed, told in enumerate((0.2, 0.9)):
        z = torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(seed))
        share = torch.full((3,), told)
        places = torch.tensor([1, 6, 11])
        batches.append(
            tm.Batch(z=z, positions=places, masked_fraction=share, dropped=None, **unused)
        )
    found = tm.input_moments(model, batches)
    kept = []
    model.blocks[-1].mlp.proj.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    hidden = [model.hidden(batch.z, batch.masked_fraction, batch.positions) for batch in batches]
    head = found.pop("lm_head.weight")
    assert torch.allclose(head, sum(h.T @ h for h in hidden), rtol=1e-4, atol=1e-5)
    last = found.pop(f"blocks.{hp.num_layers - 1}.mlp.proj.weight")
    assert torch.allclose(last, sum(x.T @ x for x in kept), rtol=1e-4, atol=1e-4)
    assert "tok_emb.weight" not in found


def test_an_artifact_names_its_preset_and_what_defines_the_predictor(tmp_path):
    """And nothing of how it was trained."""
    hp = tiny_hp()
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    data = (tmp_path / "a.mdlm").read_bytes()
    header = json.loads(data[12 : 12 + int.from_bytes(data[8:12], "little")])
    specs = dataclasses.fields(tm.Hyperparameters)
    names = ["preset", *(spec.name for spec in specs if spec.metadata["group"] == "model")]
    assert header["hyperparameters"] == {name: getattr(hp, name) for name in names}
    assert {"mask_mean", "seed", "matrix_lr", "data_path"}.isdisjoint(names)


def test_facts_of_a_kind_are_counted(tmp_path):
    """Weights, bytes and entropy, from the codes themselves."""
    hp = tiny_hp(quant_mode="int5", pack="zlib", num_layers=2)
    model = random_model(hp)
    kinds = tm.save_artifact(model, hp, tmp_path / "a.mdlm")["kinds"]
    for kind, named in tm.by_kind(model).items():
        assert kinds[kind.name]["weights"] == sum(weight.numel() for weight in named.values())
    quantizer = tm.QUANTIZERS["int5"]
    coded = [tm.quantize(w, quantizer, 0.0, None) for w in tm.by_kind(model)[tm.KINDS[0]].values()]
    planes = [torch.cat([codes.flatten() for codes, _ in coded]).numpy().view(np.uint8)]
    scales = torch.cat([scales.flatten() for _, scales in coded]).view(torch.uint8).view(-1, 2)
    planes += [scales[:, 0].numpy(), scales[:, 1].numpy()]
    bits = 0.0
    for plane in planes:
        share = np.bincount(plane) / len(plane)
        bits -= len(plane) * sum(p * np.log2(p) for p in share if p)
    assert kinds["matrix"]["entropy_bits"] == pytest.approx(bits)
    coarse = dataclasses.replace(hp, quant_clip=12.0)
    again = tm.save_artifact(model, coarse, tmp_path / "b.mdlm")["kinds"]
    assert again["matrix"]["entropy_bits"] < 0.8 * bits
