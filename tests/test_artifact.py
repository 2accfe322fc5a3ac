"""Packing: what is written is what is read, and nothing else is accepted."""

import hashlib
import json
import struct
import zlib

import pytest
import torch

import train_mdlm as tm
from conftest import random_model, tiny_hp


@pytest.mark.parametrize("pack", ["zlib", "lzma", "zstd", "auto"])
@pytest.mark.parametrize("quant_mode", ["fp8", "fp16", "fp32"])
def test_round_trip(tmp_path, pack, quant_mode):
    hp = tiny_hp(pack=pack, quant_mode=quant_mode, tie_embeddings=False)
    model = random_model(hp)
    info = tm.save_artifact(model, hp, tmp_path / "a.mdlm")
    assert info["artifact_bytes"] == (tmp_path / "a.mdlm").stat().st_size == 32 + min(info["packed_bytes"].values())
    assert info["label"].startswith(quant_mode + "+") and (pack == "auto" or info["label"] == f"{quant_mode}+{pack}")
    back, back_hp = tm.load_artifact(tmp_path / "a.mdlm")
    assert all(getattr(back_hp, name) == getattr(hp, name) for name in tm.stored_fields())
    for name, tensor in model.state_dict().items():
        storage = "fp16" if tm.kind_of(name).name == "gain" else quant_mode
        assert torch.equal(back.state_dict()[name], tensor.to(tm.STORAGES[storage]).float()), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mdlm"]


def test_a_single_layer_has_no_skips_and_still_comes_back(tmp_path):
    hp = tiny_hp(num_layers=1)
    model = random_model(hp)
    tm.save_artifact(model, hp, tmp_path / "a.mdlm")
    assert tm.load_artifact(tmp_path / "a.mdlm")[0].skip_weights.shape == (0, 8)


def test_auto_takes_the_smallest(tmp_path):
    info = tm.save_artifact(random_model(tiny_hp()), tiny_hp(), tmp_path / "a.mdlm")
    assert set(info["packed_bytes"]) == {"zlib", "lzma", "zstd"}
    assert info["packed_bytes"][info["label"].split("+")[1]] + 32 == info["artifact_bytes"]


def test_without_zstandard(tmp_path, monkeypatch):
    hp = tiny_hp(pack="zstd")
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    monkeypatch.setattr(tm, "zstandard", None)
    assert set(tm.save_artifact(random_model(tiny_hp()), tiny_hp(), tmp_path / "b.mdlm")["packed_bytes"]) == {
        "zlib",
        "lzma",
    }
    for action in (
        lambda: tm.save_artifact(random_model(hp), hp, tmp_path / "c.mdlm"),
        lambda: tm.load_artifact(tmp_path / "a.mdlm"),
    ):
        with pytest.raises(ValueError, match="pip install"):
            action()


def test_fp8_saturates_instead_of_becoming_nan(tmp_path):
    hp = tiny_hp()
    model = random_model(hp)
    with torch.no_grad():
        model.tok_emb.weight[0, 0], model.tok_emb.weight[0, 1] = 1e4, -1e4
    tm.save_artifact(model, hp, tmp_path / "a.mdlm")
    assert tm.load_artifact(tmp_path / "a.mdlm")[0].tok_emb.weight[0, :2].tolist() == [448.0, -448.0]


def signed(packed):
    return packed + hashlib.sha256(packed).digest()


def refused(path):
    with pytest.raises(ValueError) as caught:
        tm.load_artifact(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_flipped_byte_and_truncation_is_refused(tmp_path):
    for pack in ("zlib", "lzma", "zstd"):
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


def test_foreign_files_and_edited_headers_are_refused(tmp_path):
    path = tmp_path / "x"
    refused(path)
    for content in (
        b"",
        b"hello",
        zlib.compress(b"hello", 9),
        *(signed(zlib.compress(x, 9)) for x in (b"hello", b"MDLMgolf" + b"\xff" * 4)),
    ):
        path.write_bytes(content)
        refused(path)
    hp = tiny_hp(pack="zlib")
    tm.save_artifact(random_model(hp), hp, path)
    raw = zlib.decompress(path.read_bytes()[:-32])
    size = struct.unpack("<I", raw[8:12])[0]
    header, body = json.loads(raw[12 : 12 + size]), raw[12 + size :]
    for edit in (
        lambda h: h["hyperparameters"].update(num_layers=2),
        lambda h: h["hyperparameters"].update(extra=1),
        lambda h: h["tensors"][0].update(shape=[1 << 40]),
        lambda h: h["tensors"].pop(),
        lambda h: h["tensors"][0].update(offset=4),
        lambda h: h.update(version=99),
        lambda h: h.clear(),
        lambda h: h["tensors"][0].update(name="evil"),
        lambda h: h["tensors"][0].update(shape=[-1, -8]),
    ):
        edited = json.loads(json.dumps(header))
        edit(edited)
        blob = json.dumps(edited).encode()
        blob = b"MDLMgolf" + struct.pack("<I", len(blob)) + blob + body
        path.write_bytes(signed(zlib.compress(blob, 9)))
        refused(path)


def test_published_model_fits_the_limit(tmp_path):
    """Random weights of the published shape and of trained size compress to some 6.1 bits each: they fit."""
    model = tm.build_model(tm.Hyperparameters())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    info = tm.save_artifact(model, tm.Hyperparameters(pack="lzma"), tmp_path / "a.mdlm")
    assert 14.0e6 < info["artifact_bytes"] < 16.0e6 and info["label"] == "fp8+lzma"
