"""tools/quant_table.py: what it prints is what packing, reloading and scoring by hand give."""

import dataclasses
import json
from pathlib import Path

import common
import pytest
import quant_table
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm


def test_rows_are_configurations():
    hp = tiny_hp()
    for row, expected in {
        "int6": ("int6", 0.0, 0),
        "int7,embed:int8@10": ("int7,embed:int8", 10.0, 0),
        "fp8+3": ("fp8", 0.0, 3),
        "int7@2.5+64": ("int7", 2.5, 64),
    }.items():
        found = quant_table.configure(hp, row)
        assert (found.quant_mode, found.quant_clip, found.quant_feedback) == expected
    for wrong in ("", "@5", "int7@", "int7+", "int9", "int7@x"):
        with pytest.raises(ValueError):
            quant_table.configure(hp, wrong)


@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_figures(tiny_env, tmp_path, tool, monkeypatch, objective):
    """The cost of a row against two scores that are computed here: of a fine grid nothing, of a
    coarse one something."""
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.setenv(name, tiny_env[name])
    hp = tiny_hp(
        objective=objective,
        vocab_size=384,
        train_seq_len=32,
        train_batch_tokens=128,
        quant_mode="fp32,gain:fp32",
        nelbo_passes=1,
    )
    model = random_model(hp, scale=0.2)
    path = tmp_path / "a.mdlm"
    out = tmp_path / "table.json"
    tm.save_artifact(model, hp, path)
    rows = ["fp32", "int4", "int4+2"]
    options = ["--rows", *rows, "--seqs", "24", "--batch", "4", "--out", out]
    done = tool(quant_table, path, *options)
    assert done.returncode == 0, done.stderr
    given, fine, coarse, with_feedback = json.loads(out.read_text())
    assert given["seqs"] == 24
    assert [found["row"] for found in (fine, coarse, with_feedback)] == rows
    assert all(f"| {row} |" in done.stdout for row in rows)
    assert fine["error"] == 0 and abs(fine["cost"]) < 5e-6
    val = common.open_validation(common.with_paths(hp))
    _, table = tm.score_windows(hp.headline, model, hp, val, 24)
    bits, nbytes = table.sum(1).unbind(1)
    assert given["bpb"] == pytest.approx(tm.bits_per_byte(bits, nbytes)[0], abs=1e-5)
    int4 = dataclasses.replace(hp, quant_mode="int4")
    two_steps = dataclasses.replace(common.with_paths(hp), iterations=2)
    stream = tm.TokenStream(two_steps.data_path, "train")
    capacity = tm.scored_capacity(two_steps, 4)
    batches = (
        tm.training_batch(two_steps, stream, step, range(4), capacity, torch.device("cpu"))
        for step in range(2)
    )
    for figures, moments in ((with_feedback, tm.input_moments(model, batches)), (coarse, {})):
        info = tm.save_artifact(model, int4, tmp_path / "b.mdlm", moments)
        packed, _ = tm.load_artifact(tmp_path / "b.mdlm")
        _, table = tm.score_windows(hp.headline, packed, hp, val, 24)
        cost, stderr = tm.bits_per_byte(table.sum(1)[:, 0] - bits, nbytes)
        assert cost != 0
        assert figures["cost"] == pytest.approx(cost, abs=1e-6)
        assert figures["stderr"] == pytest.approx(stderr, abs=1e-6)
        assert figures["artifact_bytes"] == info["artifact_bytes"]
    kinds = [kind for name, kind in info["kinds"].items() if name != "gain"]
    weights = sum(kind["weights"] for kind in kinds)
    bits = {name: sum(kind["packed_bytes"][name] for kind in kinds) for name in coarse["packers"]}
    assert coarse["packers"] == {name: 8 * size / weights for name, size in bits.items()}
    entropy = sum(kind["entropy_bits"] for kind in kinds) / weights
    assert coarse["entropy"] == pytest.approx(entropy)
    lost = whole = 0.0
    for (name, given), stored in zip(model.named_parameters(), packed.parameters(), strict=True):
        if not tm.kind_of(name).storage:
            lost += (given - stored).square().sum().item()
            whole += given.square().sum().item()
    assert coarse["error"] == pytest.approx(lost / whole)
    assert with_feedback["error"] != coarse["error"]


def test_rows_that_were_measured_are_kept(tiny_env, tmp_path, tool, monkeypatch):
    for name, value in tiny_env.items():
        monkeypatch.setenv(name, value)
    hp = tm.Hyperparameters.from_env(tiny_env | dict(QUANT_MODE="fp32,gain:fp32"))
    artifact, out = tmp_path / "a.mdlm", tmp_path / "table.json"
    tm.save_artifact(tm.build_model(hp), hp, artifact)
    save, saved = tm.save_artifact, []

    def interrupted(*arguments):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*arguments))
        return saved[0]

    monkeypatch.setattr(tm, "save_artifact", interrupted)
    arguments = (artifact, "--seqs", 8, "--rows", "int8", "int4", "--out", out)
    done = tool(quant_table, *arguments)
    assert done.returncode == 2
    assert [row["row"] for row in json.loads(out.read_text())] == ["as given", "int8"]
    assert "table.json: 1 rows are missing" in done.stdout
    whole = json.dumps([dict(row="as given"), dict(row="int8"), dict(row="int4")])
    out.write_text(whole)
    assert tool(quant_table, *arguments).returncode == 2 and out.read_text() == whole


def test_missing_training_shards_are_found_before_the_first_row(tiny_env, tmp_path, tool):
    hp = tm.Hyperparameters.from_env(tiny_env)
    data = tmp_path / "val"
    data.mkdir()
    for path in Path(hp.data_path).glob("*val*"):
        (data / path.name).symlink_to(path.resolve())
    artifact = tmp_path / "a.mdlm"
    tm.save_artifact(tm.build_model(hp), hp, artifact)
    paths = ("--data", data, "--tokenizer", hp.tokenizer_path)
    done = tool(quant_table, artifact, "--seqs", 8, "--rows", "int8", "int8@10+4", *paths)
    assert done.returncode == 2 and "no train shards" in done.stderr and "int8" not in done.stdout


@pytest.mark.parametrize("options", [[], ["--batch", "0"], ["--seqs", "-1"], ["--seqs", "1"]])
def test_wrong_input_is_one_line(tool, options):
    done = tool(quant_table, "missing.mdlm", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("quant_table.py: error: ") and done.stderr.count("\n") == 1
