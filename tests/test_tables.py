"""What somebody adds to the script is one row of a table, and one function: it is offered, used,
stored and read back, and a name that is in no table is one clear line."""

import dataclasses
import math
import re

import pytest
import reference
import torch
from conftest import random_model, tiny_hp, val_split

import train_mdlm as tm


@pytest.fixture
def train(tiny_env, tmp_path, monkeypatch, capsys):
    """Trains, packs and scores with variables as keywords, as RUN_ID; what was printed."""
    monkeypatch.chdir(tmp_path)

    def call(run_id, **env):
        tm.run(tiny_env | dict(RUN_ID=run_id, ITERATIONS="3", FINAL_EVAL_MAX_SEQS="8") | env)
        return capsys.readouterr().out

    return call


def first_loss(printed):
    return float(re.search(r"^step:1/3 train_loss:(\S+)", printed, re.MULTILINE)[1])


def score_lines(printed):
    """What is behind the name of every score, by its name."""
    return dict(re.findall(r"^score:(\w+) (.*)$", printed, re.MULTILINE))


def bpb_of(line):
    return float(re.search(r"bpb:(\S+)", line)[1])


def offered(group, name):
    """Whether --help has a choice of this name."""
    return re.search(rf"(^ +|\| ){name}( \||$)", tm.help_text([group]), re.MULTILINE)


# ---- Noise


def double_weight(hp, probability, share):
    return torch.full_like(share, 2.0)


def test_a_loss_weight(train, monkeypatch):
    assert not offered("noise", "double")
    monkeypatch.setitem(tm.LOSS_WEIGHTS, "double", double_weight)
    assert offered("noise", "double")
    flat, double = (first_loss(train(name, LOSS_WEIGHT=name)) for name in ("flat", "double"))
    assert double == pytest.approx(2 * flat, abs=2e-4)


def test_a_distribution_of_mask_probabilities(train, monkeypatch):
    monkeypatch.setitem(tm.MASK_DISTS, "high", lambda hp, t: 0.6 + 0.3 * t)
    assert offered("noise", "high")
    assert "final_" in train("high", MASK_DIST="high", LOSS_WEIGHT="flat")
    hp = tiny_hp(mask_dist="high", train_seq_len=64, train_batch_tokens=64 * 32)
    probability, keys, _ = tm.draw_noise(hp, tm.seeded("cpu", "high"))
    mask, _, _ = tm.apply_noise(hp, torch.zeros(32, 64, dtype=torch.int64), probability, keys)
    assert 0.7 < mask.float().mean() < 0.8 and mask.sum() <= tm.scored_capacity(hp, 32)


def test_a_distribution_that_does_not_grow_is_found_out(train, monkeypatch):
    """The capacity is made from draws of 0, ½ and 1, for which this one masks nothing."""
    monkeypatch.setitem(tm.MASK_DISTS, "between", lambda hp, t: torch.sin(2 * torch.pi * t) ** 2)
    noise = dict(MASK_DIST="between", MASKING="count", LOSS_WEIGHT="flat")
    with pytest.raises(tm.InputError, match="masked tokens had no place .* MASK_DIST") as caught:
        train("between", TIME_SAMPLING="uniform", **noise)
    assert "\n" not in str(caught.value)


def test_a_way_to_draw_mask_times(train, monkeypatch):
    monkeypatch.setitem(tm.TIME_SAMPLINGS, "late", lambda u: 1 - u / 10)
    assert offered("noise", "late")
    assert "final_" in train("late", TIME_SAMPLING="late")
    times = tm.mask_probability(tiny_hp(time_sampling="late", mask_eps=0.0), torch.rand(16))
    assert 0.9 <= times.min() and times.max() <= 1


def test_a_way_to_mask(train, monkeypatch):
    """The tokens on the left, so that what it masks can be seen."""

    def mask_left(probability, keys, allowed):
        place = torch.arange(keys.shape[1]) / keys.shape[1]
        mask = (place < probability[:, None]) & allowed
        return mask, mask.sum(1) / allowed.sum(1)

    monkeypatch.setitem(tm.MASKINGS, "left", tm.Masking(mask_left, lambda rows, length: rows))
    assert offered("noise", "left")
    assert "final_" in train("left", MASKING="left")
    hp = tiny_hp(masking="left", train_seq_len=8, train_batch_tokens=32)
    keys = torch.rand(4, 8)
    x0 = torch.zeros(4, 8, dtype=torch.int64)
    mask, _, share = tm.apply_noise(hp, x0, torch.tensor([0.1, 0.5, 0.6, 1.0]), keys)
    assert mask.sum(1).tolist() == [1, 4, 5, 8] and share.tolist() == [0.125, 0.5, 0.625, 1.0]
    assert mask[1].tolist() == [True] * 4 + [False] * 4


# ---- Model


class Bag(tm.Model):
    """Every position by itself."""

    def build_trunk(self, hp):
        blocks = (torch.nn.ModuleDict({"mlp": tm.MLP(hp)}) for _ in range(hp.num_layers))
        self.blocks = torch.nn.ModuleList(blocks)

    def trunk(self, x, z, masked_fraction, view, positions):
        x = tm.select_positions(x, positions)
        for block in self.blocks:
            x = x + block["mlp"](tm.norm(x))
        return x


def test_a_backbone(train, monkeypatch):
    monkeypatch.setitem(tm.BACKBONES, "bag", Bag)
    assert offered("model", "bag")
    printed = train("bag", BACKBONE="bag", SCORES="l2r:8", NEIGHBORS="1")
    assert list(score_lines(printed)) == ["nelbo", "l2r"]
    model, hp = tm.load_artifact("logs/bag.mdlm")
    assert (
        type(model) is Bag
        and hp.backbone == "bag"
        and len(model.near.weight) == 2 * hp.embedding_rows
    )
    # It has no attention, and without neighbours no order matters.
    model = random_model(tiny_hp(backbone="bag"))
    x0 = reference.all_sequences(3, 4)
    blind = reference.token_nll(model, x0, torch.ones(4, dtype=torch.bool))
    for order in ("l2r", "confidence"):
        assert torch.allclose(tm.chain_rule(model, x0, order).double(), blind, atol=1e-5)
    monkeypatch.delitem(tm.BACKBONES, "bag")
    with pytest.raises(tm.InputError, match="logs/bag.mdlm: not an artifact .*BACKBONE=bag"):
        tm.load_artifact("logs/bag.mdlm")


def test_a_parameter_that_no_kind_knows_is_named(monkeypatch):
    class Odd(Bag):
        def build_trunk(self, hp):
            super().build_trunk(hp)
            self.odd = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setitem(tm.BACKBONES, "odd", Odd)
    with pytest.raises(tm.InputError, match="parameter odd fits no pattern in the table KINDS"):
        tm.by_kind(tm.outline_model(tiny_hp(backbone="odd")))


# ---- Scores


def score_right_to_left(model, windows):
    return tm.score_in_order(model, windows, torch.arange(windows.hp.train_seq_len).flip(0))


def right_to_left(model, hp, seqs):
    """Bits per byte of `seqs` windows, by definition."""
    val = val_split(hp)
    numbers = tm.evenly_spaced(val.stream.count_windows(32), seqs)
    windows = val.stream.windows(numbers, 32)
    nats = reference.one_by_one(model, windows[:, 1:], range(31, -1, -1)).sum().item()
    nbytes = tm.count_bytes(windows[:, 1:], windows[:, 0], val.luts).sum().item()
    return nats / math.log(2) / nbytes


def test_an_estimator(train, tiny_env, monkeypatch):
    """Its line has its own value, not another score's."""
    monkeypatch.setitem(tm.ESTIMATORS["mdlm"], "r2l", tm.Estimator(score_right_to_left, windows=6))
    lines = score_lines(train("r2l", SCORES="nelbo,r2l,l2r:6", QUANT_MODE="fp32"))
    assert list(lines) == ["nelbo", "r2l", "l2r"]
    model, hp = tm.load_artifact("logs/r2l.mdlm")
    paths = {name: tiny_env[name.upper()] for name in ("data_path", "tokenizer_path")}
    hp = dataclasses.replace(hp, **paths)
    assert " seqs:6 " in lines["r2l"]
    assert bpb_of(lines["r2l"]) == pytest.approx(right_to_left(model, hp, 6), abs=1e-3)
    assert bpb_of(lines["r2l"]) != bpb_of(lines["l2r"])
    again = dict(EVAL_ONLY="logs/r2l.mdlm", SCORES="r2l:3")
    lines = score_lines(train("again", **again))
    assert list(lines) == ["nelbo", "r2l"] and " seqs:3 " in lines["r2l"]
    assert bpb_of(lines["r2l"]) == pytest.approx(right_to_left(model, hp, 3), abs=1e-3)


def test_an_estimator_of_its_own_objective_only(train, monkeypatch):
    """Known, so no error; but it is not for this model, and no other score takes its place."""
    monkeypatch.setitem(tm.ESTIMATORS["mdlm"], "r2l", tm.Estimator(score_right_to_left, windows=6))
    lines = score_lines(train("ar", OBJECTIVE="ar", SCORES="r2l"))
    assert lines.keys() == {"r2l", "ar"} and lines["r2l"] == "is not for ar models"


def test_an_estimator_that_is_no_code_says_so(train, monkeypatch):
    row = tm.Estimator(score_right_to_left, windows=2, biased=True, prefixes=True)
    monkeypatch.setitem(tm.ESTIMATORS["mdlm"], "r2l", row)
    lines = score_lines(train("biased", SCORES="r2l"))
    assert lines["r2l"].startswith("biased:1 bpb:") and lines["nelbo"].startswith("bpb:")


# ---- Storage


def test_a_quantizer(tmp_path, monkeypatch):
    """Its grid has seven points, of which a weight gets the nearest."""
    int3 = tm.Quantizer(torch.int8, 3.0, torch.bfloat16)
    monkeypatch.setitem(tm.QUANTIZERS, "int3", int3)
    hp = tiny_hp(model_dim=64, quant_mode="int3,embed:int5")
    model, path = random_model(hp), tmp_path / "a.mdlm"
    info = tm.save_artifact(model, hp, path)
    assert info["label"].startswith("int3+int5+")
    back, _ = tm.load_artifact(path)
    for name, tensor in model.state_dict().items():
        stored = back.state_dict()[name]
        quantizer = tm.QUANTIZERS[hp.storages[tm.kind_of(name).name]]
        expected = reference.stored_weights(tensor, quantizer)
        assert torch.allclose(stored, expected, rtol=1e-6, atol=0), name
        if quantizer is int3:
            assert max(len(row.unique()) for row in stored) <= 7
    monkeypatch.delitem(tm.QUANTIZERS, "int3")
    with pytest.raises(tm.InputError, match="not an artifact"):
        tm.load_artifact(path)


def test_a_quantizer_in_a_run(train, monkeypatch):
    monkeypatch.setitem(tm.QUANTIZERS, "int3", tm.Quantizer(torch.int8, 3.0, torch.bfloat16))
    printed = train("int3", QUANT_MODE="int3", QUANT_CLIP="4", QUANT_FEEDBACK="1")
    assert re.search(r"^final_int3_\w+_roundtrip_exact val_loss:\d", printed, re.MULTILINE)
    model, _ = tm.load_artifact("logs/int3.mdlm")
    assert max(len(row.unique()) for row in model.blocks[0].mlp.fc.weight) <= 7


def test_a_packer(train, monkeypatch):
    """One that does not compress: it can be asked for, and is not the smallest of all."""
    stored = tm.Packer(pack=lambda raw: raw, unpack=lambda packed, limit: packed[:limit])
    monkeypatch.setitem(tm.PACKERS, "stored", stored)
    assert offered("export", "stored")
    assert re.search(r"^final_fp8_stored_roundtrip ", train("s", PACK="stored"), re.MULTILINE)
    hp = tiny_hp()
    kinds = tm.save_artifact(random_model(hp), hp, "a.mdlm")["kinds"]
    assert all(kind["packed_bytes"].keys() == tm.PACKERS.keys() for kind in kinds.values())
    assert kinds["matrix"]["packer"] != "stored"


# ---- Presets and unknown names


def test_a_preset(train, monkeypatch):
    monkeypatch.setitem(tm.PRESETS, "mine", dict(scores="l2r:2", loss_weight="flat"))
    assert offered("run", "mine") and "mine: flat" in tm.help_text(["noise"])
    assert "mine: l2r:2" in tm.help_text(["scoring"])
    assert first_loss(train("mine", PRESET="mine")) == first_loss(train("flat", LOSS_WEIGHT="flat"))
    assert tm.load_artifact("logs/mine.mdlm")[1].preset == "mine"
    assert tm.final_scores(tm.Hyperparameters(preset="mine")) == {"nelbo": 0, "l2r": 2}


ESTIMATORS = {name: row for rows in tm.ESTIMATORS.values() for name, row in rows.items()}


@pytest.mark.parametrize(
    "variable, table",
    [
        ("PRESET", tm.PRESETS),
        ("OBJECTIVE", ["mdlm", "ar"]),
        ("BACKBONE", tm.BACKBONES),
        ("MASK_DIST", tm.MASK_DISTS),
        ("MASKING", tm.MASKINGS),
        ("TIME_SAMPLING", tm.TIME_SAMPLINGS),
        ("LOSS_WEIGHT", tm.LOSS_WEIGHTS),
        ("QUANT_MODE", tm.QUANTIZERS),
        ("PACK", tm.PACKERS),
        ("SCORES", ESTIMATORS),
    ],
)
def test_an_unknown_name_is_one_line_with_the_known_ones(script, tiny_env, variable, table):
    done = script(**tiny_env | {variable: "nonsense"})
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train_mdlm.py: error: {variable}=nonsense")
    assert ", ".join(table) in done.stderr
