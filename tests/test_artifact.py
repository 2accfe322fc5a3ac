"""Packing: what is written is what is read, and nothing else is accepted."""

import dataclasses
import hashlib
import json
import lzma
import math
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import reference
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm

GRIDS = [name for name, quantizer in tm.QUANTIZERS.items() if quantizer.dtype == torch.int8]


def small_hp(**overrides):
    """Rows of 64 weights: enough of them for statistics."""
    shape = dict(vocab_size=32, model_dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
    return tiny_hp(**shape, **overrides)


def gaussian_model(hp, seed=0):
    model = tm.build_model(hp)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return model


def squared_error(rows, codes, scales):
    return (codes.float() * scales.float() - rows).square().mean().item()


# ---- What is stored


@pytest.mark.parametrize("pack", ["zlib", "huffman", "lzma", "zstd", "auto"])
@pytest.mark.parametrize(
    "quant_mode", ["fp8", "fp16", "fp32", "int6", "int4,head:fp8_row", "embed:int8,matrix:int5"]
)
def test_round_trip(tmp_path, pack, quant_mode):
    hp = small_hp(pack=pack, quant_mode=quant_mode, tie_embeddings=False)
    model = gaussian_model(hp)
    path = tmp_path / "a.mdlm"
    info = tm.save_artifact(model, hp, path)
    assert info["artifact_bytes"] == path.stat().st_size
    for kind in info["kinds"].values():
        sizes = kind["packed_bytes"]
        assert sizes.keys() == (tm.PACKERS.keys() if pack == "auto" else {pack})
        assert kind["bytes"] == min(sizes.values()) == sizes[kind["packer"]]
    back, back_hp = tm.load_artifact(path)
    assert all(getattr(back_hp, name) == getattr(hp, name) for name in tm.STORED)
    for name, tensor in model.state_dict().items():
        storage = hp.storages[tm.kind_of(name).name]
        expected = reference.stored_weights(tensor, tm.QUANTIZERS[storage])
        assert torch.allclose(back.state_dict()[name], expected, rtol=1e-6, atol=0), name
    label = info["label"].split("+")
    matrices = {hp.storages[kind] for kind in ("matrix", "embed", "head")}
    assert set(label) & tm.QUANTIZERS.keys() == matrices
    assert pack == "auto" or label[-1] == pack
    assert [other.name for other in tmp_path.iterdir()] == ["a.mdlm"]


def test_storages_by_kind():
    def said(text):
        return tm.Hyperparameters(quant_mode=text).storages

    kinds = ("matrix", "embed", "near", "head", "gain")
    for text, storages in {
        "int6": "int6 int6 int6 int6 fp16",
        "int7, embed:int8": "int7 int8 int7 int7 fp16",
        "embed:int8,gain:fp32": "fp8 int8 fp8 fp8 fp32",
    }.items():
        assert said(text) == dict(zip(kinds, storages.split(), strict=True))
    unknown = ["int3", "embedding:int8", "embed:int9", "a:b:c"]
    unfinished = ["", "int6,", "embed:", ":"]
    twice = ["int6,int7", "embed:int8,embed:int4"]
    for wrong in unknown + unfinished + twice:
        with pytest.raises(tm.InputError, match="QUANT_MODE"):
            said(wrong)


def test_a_clip_that_leaves_nothing_is_refused():
    with pytest.raises(tm.InputError, match="QUANT_CLIP=16.5 is not between 0 and 16"):
        tm.Hyperparameters(quant_clip=16.5, quant_mode="int4")


def test_the_coarsest_grid_allowed_can_be_read_back(tmp_path):
    """Loading wants a bit for each weight; Gaussian ones have more even on the widest steps."""
    coarse = dict(quant_mode="int4", quant_clip=16.0, pack="lzma")
    hp = tm.Hyperparameters(preset="demo", model_dim=256, **coarse)
    info = tm.save_artifact(gaussian_model(hp), hp, tmp_path / "a.mdlm")
    weights = sum(kind["weights"] for kind in info["kinds"].values())
    assert weights > 2**20 and weights < 8 * info["artifact_bytes"] < 1.5 * weights
    tm.load_artifact(tmp_path / "a.mdlm")


def test_extreme_rows_stay_finite():
    spike = 1e18 * torch.eye(64)[0]
    rows = [torch.zeros(64), torch.full((64,), 1e-38), torch.full((64,), 3.3), spike]
    rows = torch.stack(rows)
    for name, quantizer in tm.QUANTIZERS.items():
        for clip in (0.0, 0.01, 10.0):
            for moments in (None, torch.zeros(64, 64), torch.ones(64, 64), 1e30 * torch.eye(64)):
                codes, scales = tm.quantize(rows, quantizer, clip, moments)
                assert (codes.float() * scales.float()).isfinite().all(), (name, clip)


def test_uniform_grids_have_the_error_of_rounding():
    """Of Gaussian rows: Δ²/12 where nothing is clipped, else the published optimum (Max 1960)."""
    rows = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    for bits in (6, 7, 8):
        quantizer = tm.QUANTIZERS[f"int{bits}"]
        scales = tm.row_scales(rows, quantizer, 8.0)
        step = 8.0 / quantizer.largest
        assert torch.allclose(scales, torch.full((64, 1), step), rtol=0.06)
        error = squared_error(rows, tm.to_codes(rows / scales, quantizer), scales)
        assert error == pytest.approx(step**2 / 12, rel=0.02)
    optimum = {4: 0.01154, 5: 0.003495}  # uniform, 16 and 32 levels; ours have one level less
    for bits, published in optimum.items():
        quantizer = tm.QUANTIZERS[f"int{bits}"]
        scales = tm.row_scales(rows, quantizer, 0.0)
        error = squared_error(rows, tm.to_codes(rows / scales, quantizer), scales)
        assert published < error < published * (1 + 3 / 2**bits)


def test_the_published_densities():
    """Zero-order entropy: int7 clipped at 5σ needs 5.7 bits at a smaller error than e4m3's 6.47,
    int6 4.7."""
    rows = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2))
    found = {}
    for storage, clip in (("fp8", 0.0), ("int7", 5.0), ("int6", 5.0)):
        codes, scales = tm.quantize(rows, tm.QUANTIZERS[storage], clip, None)
        density = tm.entropy_bits(tm.to_planes([codes])) / rows.numel()
        found[storage] = density, squared_error(rows, codes, scales)
    assert found["fp8"][0] == pytest.approx(6.47, abs=0.03)
    assert found["int7"][0] == pytest.approx(5.70, abs=0.02) and found["int7"][1] < found["fp8"][1]
    assert found["int6"][0] == pytest.approx(4.70, abs=0.03)


@pytest.mark.parametrize("storage", GRIDS)
def test_packed_codes_are_within_one_percent_of_their_entropy(storage):
    rows = torch.randn(1024, 512, generator=torch.Generator().manual_seed(3))
    hp = tiny_hp(quant_clip=10.0 if storage in ("int7", "int8") else 5.0)
    blob, facts = tm.pack_kind({"": rows}, storage, hp)
    assert 0.999 < 8 * len(blob) / facts["entropy_bits"] < (1.03 if storage == "int4" else 1.01)


def test_entropy_of_known_planes():
    planes = tm.to_planes([torch.tensor([0, 1, 2, 3] * 64, dtype=torch.int16)])
    assert planes.shape == (2, 256) and tm.entropy_bits(planes) == pytest.approx(2 * 256)


def test_planes_come_back():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        x = torch.randn(37, generator=torch.Generator().manual_seed(4)).mul(9).to(dtype)
        raw = tm.to_planes([x[:20], x[20:]]).tobytes()
        assert torch.equal(tm.from_planes(raw, dtype, 37), x.float())
        with pytest.raises(ValueError):
            tm.from_planes(raw + b"\0", dtype, 37)


def test_error_feedback_keeps_outputs():
    """Correlated inputs: the error of the outputs falls to less than a third; white inputs: codes
    are the nearest."""
    g = torch.Generator().manual_seed(5)
    weights = torch.randn(96, 64, generator=g)
    common = torch.randn(4096, 16, generator=g) @ torch.randn(16, 64, generator=g)
    x = common + 0.1 * torch.randn(4096, 64, generator=g)
    quantizer = tm.QUANTIZERS["int4"]

    def output_error(moments):
        codes, scales = tm.quantize(weights, quantizer, 0.0, moments)
        return ((codes.float() * scales.float() - weights) @ x.T).square().mean().item()

    assert output_error(x.T @ x) < output_error(None) / 3
    nearest = tm.quantize(weights, quantizer, 0.0, None)[0]
    for moments in (torch.eye(64), torch.zeros(64, 64)):  # the latter of inputs never seen
        assert torch.equal(tm.quantize(weights, quantizer, 0.0, moments)[0], nearest)


def test_input_moments_are_those_of_the_inputs():
    """Of the first matrix: of the normalised embeddings; of the head: of the hidden states."""
    hp = tiny_hp(num_layers=2)
    model = random_model(hp)
    z = torch.randint(0, 4, (5, 4), generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([1, 7, 18])
    unused = dict.fromkeys(("targets", "weights", "tokens", "dropped", "masked_fraction"))
    batch = tm.Batch(z=z, positions=positions, **unused)
    moments = tm.input_moments(model, [batch, batch])
    block, x = model.blocks[0], tm.norm(model.tok_emb(z))
    x = tm.norm(block.resid_mix[0] * x + block.resid_mix[1] * x).flatten(0, 1)
    first = moments["blocks.0.attn.c_q.weight"]
    assert torch.allclose(first, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    h = model.hidden(z, None, positions)
    untied = tm.build_model(dataclasses.replace(model.hp, tie_embeddings=False))
    untied.load_state_dict(model.state_dict(), strict=False)
    head = tm.input_moments(untied, [batch, batch])["lm_head.weight"]
    assert torch.allclose(head, 2 * h.T @ h, rtol=1e-4, atol=1e-4)
    matrices = {name for name, _ in model.named_parameters() if tm.kind_of(name).name == "matrix"}
    assert moments.keys() == matrices  # a tied embedding is an input too
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_predicted_size_is_that_of_a_gaussian_model(tmp_path):
    code = len(Path(tm.__file__).read_bytes())
    for mode in ("fp8", "int6", "int7,embed:int8", "fp16"):
        hp = small_hp(quant_mode=mode, mlp_mult=16)
        actual = tm.save_artifact(gaussian_model(hp), hp, tmp_path / "a.mdlm")["artifact_bytes"]
        assert tm.predicted_bytes(hp) - code == pytest.approx(actual, rel=0.06)


def test_a_single_layer_has_no_skips_and_still_comes_back(tmp_path):
    hp = tiny_hp(num_layers=1)
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    assert tm.load_artifact(tmp_path / "a.mdlm")[0].skip_weights.shape == (0, 8)


def test_without_zstandard(tmp_path, monkeypatch):
    hp = tiny_hp(pack="zstd")
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    monkeypatch.setattr(tm, "zstandard", None)
    kinds = tm.save_artifact(random_model(tiny_hp()), tiny_hp(), tmp_path / "b.mdlm")["kinds"]
    assert kinds["matrix"]["packed_bytes"].keys() == {"zlib", "huffman", "lzma"}
    for action in (lambda: tiny_hp(pack="zstd"), lambda: tm.load_artifact(tmp_path / "a.mdlm")):
        with pytest.raises(tm.InputError, match="pip install"):
            action()


def test_fp8_saturates_instead_of_becoming_nan(tmp_path):
    hp = tiny_hp()
    model = random_model(hp)
    with torch.no_grad():
        model.tok_emb.weight[0, 0], model.tok_emb.weight[0, 1] = 1e4, -1e4
        model.skip_weights[0, 0] = 1e30
    tm.save_artifact(model, hp, tmp_path / "a.mdlm")
    back = tm.load_artifact(tmp_path / "a.mdlm")[0]
    assert back.tok_emb.weight[0, :2].tolist() == [448.0, -448.0]
    assert back.skip_weights[0, 0] == 65504


def test_moments_that_overflowed_are_refused(tmp_path):
    moments = {"tok_emb.weight": torch.full((8, 8), math.inf)}
    with pytest.raises(tm.InputError, match=r"tok_emb\.weight .*not finite"):
        tm.save_artifact(random_model(tiny_hp()), tiny_hp(), tmp_path / "a.mdlm", moments)


def test_a_diverged_model_is_not_written(tmp_path):
    for bad in (math.nan, math.inf):
        model = random_model(tiny_hp())
        with torch.no_grad():
            model.blocks[1].mlp.fc.weight[0, 0] = bad
        with pytest.raises(tm.InputError, match=r"blocks\.1\.mlp\.fc\.weight .*not finite"):
            tm.save_artifact(model, tiny_hp(), tmp_path / "a.mdlm")
    assert not list(tmp_path.iterdir())


KNOBS = dict(  # values of those that define the predictor, and how it is stored
    objective=["mdlm", "ar"],
    backbone=["unet", "dit"],
    vocab_size=[2, 17, 300],
    doc_chunks=[False, True],
    anchor_bos=[False, True],
    train_seq_len=[1, 2, 33],
    num_layers=[1, 2, 5],
    model_dim=[2, 8, 32],
    num_heads=[1, 2, 4],
    num_kv_heads=[1, 2],
    mlp_mult=[1, 3],
    tie_embeddings=[False, True],
    neighbors=[0, 1, 5, 64],
    neighbor_dim=[1, 8, 32],
    rope_base=[1.0, 1e4],
    logit_softcap=[0.0, 30.0],
    qk_gain_init=[0.0, 1.5],
    tied_embed_init_std=[0.0, 0.05],
    quant_mode=["fp8", "int4", "int7,embed:int8", "fp32,near:fp8_row", "fp16,gain:fp32"],
    quant_clip=[2.0, 16.0, 0.0],
    pack=["auto", *tm.PACKERS],
    block_size=[0, 0, 1, 3],
)


def any_hp(seed):
    """Values of all these knobs that go together."""
    rng = random.Random(seed)
    while True:
        try:
            return tm.Hyperparameters(**{name: rng.choice(KNOBS[name]) for name in KNOBS})
        except tm.InputError:
            continue


def test_what_is_saved_is_read_whatever_the_knobs(tmp_path):
    """Of models that were not trained: many of their weights are zeros, which pack to nothing."""
    stored = set(tm.STORED)
    assert stored - {"preset", "compute_dtype"} <= KNOBS.keys()  # a new knob belongs into the table
    path, filled = tmp_path / "a.mdlm", 0
    for seed in range(40):
        hp = any_hp(seed)
        model = tm.build_model(hp)
        info = tm.save_artifact(model, hp, path)
        back, back_hp = tm.load_artifact(path)
        assert all(getattr(back_hp, name) == getattr(hp, name) for name in tm.STORED)
        for kind, named in tm.by_kind(model).items():
            quantizer = tm.QUANTIZERS[hp.storages[kind.name]]
            for name, weight in named.items():
                codes, scales = tm.quantize(weight, quantizer, hp.quant_clip, None)
                expected = (codes.float() * scales.float()).view(weight.shape)
                assert torch.equal(back.state_dict()[name], expected)
        packed = sum(kind["bytes"] for kind in info["kinds"].values())
        filled += info["artifact_bytes"] > packed + 5_000
    assert filled  # some were filled up to a bit a weight


def test_a_small_file_claims_no_large_model(tmp_path):
    """Zeros that would unpack to all of its weights; the same zeros are read from a larger file."""
    hp = tm.Hyperparameters(
        num_layers=1, model_dim=256, num_heads=4, neighbors=64, neighbor_dim=256, pack="lzma"
    )
    model = tm.build_model(hp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    path = tmp_path / "a.mdlm"
    tm.save_artifact(model, hp, path)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights > 30_000_000 and path.stat().st_size * 8 > weights - 2**16
    header, body = split(path.read_bytes())
    path.write_bytes(joined(header, body))  # without the spaces
    assert path.stat().st_size < 100_000 and "less than a bit" in refused(path)


def test_writing_leaves_the_former_file_alone_until_all_is_there(tmp_path, monkeypatch):
    path = tmp_path / "a.mdlm"
    tm.write_file(path, b"old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tm.os, "fsync", no_space)
    with pytest.raises(tm.InputError, match="a.mdlm: cannot be written: No space left on device"):
        tm.write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("preset", ["mdlm", "mdlm16"])
def test_full_size_models_fit_the_limit(tmp_path, preset):
    """With weights as dense as Gaussian ones, which trained ones are nearly."""
    hp = tm.Hyperparameters(preset=preset, pack="huffman")
    info = tm.save_artifact(gaussian_model(hp), hp, tmp_path / "a.mdlm")
    total = info["artifact_bytes"] + len(Path(tm.__file__).read_bytes())
    assert 15.2e6 < total < 16.0e6 and total == pytest.approx(tm.predicted_bytes(hp), rel=0.01)


# ---- What is refused


def signed(data):
    return data + hashlib.sha256(data).digest()


def split(data):
    """Header and body of an artifact, without its checksum."""
    end = 12 + int.from_bytes(data[8:12], "little")
    return json.loads(data[12:end]), data[end:-32]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return signed(b"MDLMgolf" + len(text).to_bytes(4, "little") + text + body)


def refused(path):
    """What is wrong with the file, in one line that names it."""
    with pytest.raises(tm.InputError) as caught:
        tm.load_artifact(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_checksums():
    sealed = tm.sealed(b"text")
    assert sealed == signed(b"text") and tm.unsealed(sealed) == b"text"
    for damaged in (b"", b"text", sealed[:-1], sealed + b"\0", b"T" + sealed[1:]):
        assert tm.unsealed(damaged) is None
    assert tm.unsealed(tm.sealed(b"")) == b""


def test_weights_that_are_not_finite_are_not_read(tmp_path):
    hp = tiny_hp(quant_mode="fp32", pack="zlib", num_layers=1)
    path = tmp_path / "a.mdlm"
    tm.save_artifact(random_model(hp), hp, path)
    header, body = split(path.read_bytes())
    size = header["kinds"]["matrix"][2]
    raw = bytearray(zlib.decompress(body[:size]))
    raw[0 :: len(raw) // 4] = b"\xff" * 4  # one byte of each plane: not a number
    packed = zlib.compress(raw)
    header["kinds"]["matrix"][2] = len(packed)
    path.write_bytes(joined(header, packed + body[size:]))
    refused(path)


def test_every_flipped_byte_and_truncation_is_refused(tmp_path):
    for pack in tm.PACKERS:
        hp = tiny_hp(pack=pack, num_layers=1)
        tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
        good = (tmp_path / "a.mdlm").read_bytes()
        bad = tmp_path / "bad.mdlm"
        for at in range(0, len(good), 7):
            bad.write_bytes(good[:at])
            refused(bad)
            bad.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            refused(bad)
        for longer in (good + b"\0", good + good, good[:-1]):
            bad.write_bytes(longer)
            refused(bad)
        bad.write_bytes(good)
        tm.load_artifact(bad)


FOREIGN = [
    b"",
    b"hello",
    b"MDLMgolf",
    signed(b"MDLMgolf"),
    signed(b"MDLMgolf\xff\xff\xff\xff{}"),
    zlib.compress(b"hello", 9),
    joined(b"[" * 100_000, b""),
    joined(b"1" * 9_999, b""),
]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x"
    refused(path)  # it does not exist
    for content in FOREIGN:
        path.write_bytes(content)
        refused(path)


MATRIX_ENTRIES = [  # storage, packer, and instead of a number what makes one of the true number
    ("fp32", "zlib", lambda size: size),
    ("int6", "zlib", lambda size: -1),
    ("int6", "zlib", lambda size: 1e3),
    ("int6", "zlib"),
    ("int6", "lzma", lambda size: size),
    ("int6", "pickle", lambda size: size),
]
SHAPES = [
    dict(num_layers=2),
    dict(num_layers=10**6),
    dict(num_layers=200, model_dim=2, num_heads=1),
    dict(model_dim=1 << 40),
    dict(vocab_size=60_000, model_dim=1 << 16),
    dict(extra=1),
    dict(data_path="/etc"),
]


def test_edited_headers_are_refused(tmp_path):
    hp = tiny_hp(pack="zlib", quant_mode="int6")
    path = tmp_path / "x"
    tm.save_artifact(random_model(hp), hp, path)
    header, body = split(path.read_bytes())
    shape, kinds = header["hyperparameters"], header["kinds"]
    edits = [dict(hyperparameters=shape | change) for change in SHAPES]
    less = {name: value for name, value in shape.items() if name != "rope_base"}
    edits.append(dict(hyperparameters=less))
    for storage, packer, *size in MATRIX_ENTRIES:
        entry = [storage, packer, *(change(kinds["matrix"][2]) for change in size)]
        edits.append(dict(kinds=kinds | dict(matrix=entry)))
    edits.append(dict(kinds=kinds | dict(head=["int6", "zlib", 0])))
    edits.append(dict(kinds={name: entry for name, entry in kinds.items() if name != "gain"}))
    edits.append(dict(version=99))
    for edit in edits:
        path.write_bytes(joined(header | edit, body))
        refused(path)
    path.write_bytes(joined({}, body))
    refused(path)
    path.write_bytes(joined(header, body))
    tm.load_artifact(path)  # this way of writing it is not what is refused


def test_the_message_says_what_is_wrong(tmp_path):
    hp = tiny_hp(pack="zlib", quant_mode="int6")
    path = tmp_path / "x"
    tm.save_artifact(random_model(hp), hp, path)
    header, body = split(path.read_bytes())
    without_gain = {name: entry for name, entry in header["kinds"].items() if name != "gain"}
    for content, message in (
        (b"hello", "it begins with something else"),
        (path.read_bytes()[:-1], "checksum mismatch"),
        (joined(header | dict(version=99), body), "its format is version 99"),
        (joined(header | dict(hyperparameters={}), body), "it has other hyperparameters"),
        (joined(header | dict(kinds=without_gain), body), "it has other kinds of parameters"),
        (joined(header, body + b"\0"), "its parts do not fill it"),
    ):
        path.write_bytes(content)
        assert message in refused(path)


VALUES = [0, 1, -1, 2, 7, 10**9, 1e300, None, True, "", "int8", "fp8", "zlib", "lzma", [], {}]


def mutations(good, count, seed):
    """Damaged artifacts, most of them with a checksum that is right again."""
    g, (header, body) = random.Random(seed), split(good)
    text = json.dumps(header).encode()
    for number in range(count):
        way, data = number % 6, bytearray(good)
        if way == 0:  # flipped bits, the checksum as it was
            for _ in range(g.randrange(1, 4)):
                data[g.randrange(len(data))] ^= 1 << g.randrange(8)
        elif way == 1:
            del data[g.randrange(len(data)) :]
        elif way == 2:  # a piece of the file somewhere else
            at, start, size = g.randrange(len(data)), g.randrange(len(data)), g.randrange(1, 64)
            data[at : at + size] = data[start : start + size]
        elif way == 3:  # damaged text of the header
            broken = bytearray(text)
            for _ in range(g.randrange(1, 3)):
                broken[g.randrange(len(broken))] = g.randrange(256)
            data = joined(bytes(broken), body)
        elif way == 4:  # another value in the header
            edited = json.loads(text)
            where = edited[g.choice(["hyperparameters", "kinds"])]
            key = g.choice(list(where))
            if isinstance(where[key], list) and g.random() < 0.8:
                where[key][g.randrange(3)] = g.choice(VALUES)
            else:
                where[key] = g.choice(VALUES)
            data = joined(edited, body)
        else:  # truncated body
            data = joined(text, body[: g.randrange(len(body))])
        yield bytes(data)


@pytest.mark.parametrize(
    "system",
    [
        dict(pack="huffman", quant_mode="int6,embed:int8"),
        dict(pack="lzma", quant_mode="fp32", backbone="dit"),
        dict(pack="zstd", quant_mode="int5,head:fp16", tie_embeddings=False),
        dict(pack="zlib", quant_mode="fp8_row", doc_chunks=True, anchor_bos=True),
        dict(pack="auto", quant_mode="fp8", objective="ar"),
    ],
    ids=str,
)
def test_fuzz(tmp_path, system):
    """Thousands of damaged files end in an InputError or in the same weights, nothing else."""
    hp = tiny_hp(num_layers=1, **system)
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    good = (tmp_path / "a.mdlm").read_bytes()
    weights, kept = tm.unpack_artifact(good, "good").model.state_dict(), 0
    for data in mutations(good, 1500, seed=len(str(system))):
        try:
            state = tm.unpack_artifact(data, "mutated").model.state_dict()
        except tm.InputError as error:
            assert str(error).startswith("mutated: ") and "\n" not in str(error)
        else:
            kept += 1
            assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert 0 < kept < 300


LOAD_ALL = """
import sys
sys.path.insert(0, {root!r})
import train_mdlm as tm

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10

for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    before = memory("VmRSS")
    try:
        tm.load_artifact(path)
        print("loaded")
    except tm.InputError as error:
        print(error)
    print(memory("VmHWM") - before)
"""


def wide_dictionary():
    """A small .xz file whose block wants a dictionary of 4 GiB."""
    data = bytearray(lzma.compress(bytes(99), preset=0))
    size = 4 * (data[12] + 1)  # of the block header, whose last four bytes are its checksum
    data[data.index(b"\x21\x01", 12, 12 + size) + 2] = 40
    data[12 + size - 4 : 12 + size] = zlib.crc32(data[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(data)


def test_hostile_files_cost_no_memory(tmp_path):
    """Small files that claim large models, unpack to far more than they may, or ask for gigabytes
    to be unpacked in."""
    hp = tiny_hp(num_layers=1, quant_mode="int6")
    sound = tmp_path / "a.mdlm"
    tm.save_artifact(random_model(hp), hp, sound)
    header, _ = split(sound.read_bytes())
    zeros = bytes(200 << 20)
    bombs = [
        ("zlib", zlib.compress(zeros, 1)),
        ("huffman", tm.deflate(bytes(1 << 20), zlib.Z_HUFFMAN_ONLY)),
        ("lzma", lzma.compress(zeros, preset=0)),
        ("lzma", wide_dictionary()),
        ("zstd", tm.zstandard.ZstdCompressor(level=1).compress(zeros)),
    ]
    del zeros
    large = header["hyperparameters"] | dict(num_layers=64, model_dim=4096)
    files = [joined(header | dict(hyperparameters=large), bytes(1000))]
    for packer, bomb in bombs:
        kinds = {kind: [entry[0], packer, len(bomb)] for kind, entry in header["kinds"].items()}
        files.append(joined(header | dict(kinds=kinds), bomb * len(kinds)))
    paths = [tmp_path / f"{number}.mdlm" for number in range(len(files))]
    for bad, data in zip(paths, files, strict=True):
        bad.write_bytes(data)
        assert len(data) < 4 << 20
    code = LOAD_ALL.format(root=str(Path(tm.__file__).parent))
    arguments = [str(sound), *map(str, paths)]  # a sound one first, because torch itself grows
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    loaded, _, *lines = done.stdout.splitlines()
    assert loaded == "loaded" and len(lines) == 2 * len(files), done.stderr
    for number, (message, grown) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        assert "not an artifact" in message, (number, message)
        assert int(grown) < 24, (number, grown)


def test_unpacking_asks_for_no_more_memory_than_the_content():
    with pytest.raises(lzma.LZMAError, match="[Mm]emory"):
        tm.PACKERS["lzma"].unpack(wide_dictionary(), 1000)
    wide_frame = bytes.fromhex("28b52ffd00a8") + bytes(64)  # with a window of 2 GiB
    with pytest.raises(tm.zstandard.ZstdError, match="memory"):
        tm.PACKERS["zstd"].unpack(wide_frame, 1000)


def test_large_kinds_are_packed_only_by_what_can_win(monkeypatch):
    """Which packers can, a sample says; the others would take a minute at full size."""
    codes = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    hp = tm.Hyperparameters(quant_clip=10.0)
    whole, facts = tm.pack_kind({"": codes}, "int7", hp)
    packed = facts["packed_bytes"]
    assert set(packed) == {"zlib", "huffman", "lzma", "zstd"} and len(whole) == min(packed.values())
    monkeypatch.setattr(tm, "SAMPLE_BYTES", 100_000)
    best, facts = tm.pack_kind({"": codes}, "int7", hp)
    near = {name for name, size in packed.items() if size < 1.005 * len(whole)}
    far = {name for name, size in packed.items() if size > 1.02 * len(whole)}
    assert best == whole and near <= set(facts["packed_bytes"]) and far
    assert not far & set(facts["packed_bytes"])
