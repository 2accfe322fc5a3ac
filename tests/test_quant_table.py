"""tools/quant_table.py: what it prints is what packing, reloading and scoring by hand give."""

import dataclasses
import json
import sys

import pytest
import torch

import train_mdlm as tm
from conftest import ROOT, random_model, tiny_hp

sys.path.insert(0, str(ROOT / "tools"))
import quant_table  # noqa: E402


def test_rows_are_configurations():
    hp = tiny_hp()
    found = [quant_table.configure(hp, text) for text in ("int6", "int7,embed:int8@10", "fp8+3", "int7@2.5+64")]
    assert [(c.quant_mode, c.quant_clip, c.quant_feedback) for c in found] == [
        ("int6", 0.0, 0),
        ("int7,embed:int8", 10.0, 0),
        ("fp8", 0.0, 3),
        ("int7", 2.5, 64),
    ]
    for wrong in ("", "@5", "int7@", "int7+", "int9", "int7@x"):
        with pytest.raises(ValueError):
            quant_table.configure(hp, wrong)


def test_figures(tiny_env, tmp_path, monkeypatch, capsys):
    """The cost of a row against the two scores computed here; a fine grid costs nothing, a coarse one something."""
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.setenv(name, tiny_env[name])
    hp = tiny_hp(vocab_size=384, train_seq_len=32, train_batch_tokens=128, quant_mode="fp32,gain:fp32", nelbo_passes=1)
    model, path, out = random_model(hp, scale=0.2), tmp_path / "a.mdlm", tmp_path / "table.json"
    tm.save_artifact(model, hp, path)
    rows = ["fp32", "int4", "int4+2"]
    arguments = ["quant_table.py", str(path), "--rows", *rows, "--seqs", "24", "--batch", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    quant_table.main()
    given, *results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert given["seqs"] == 24 and [r["row"] for r in results] == rows and all(f"| {row} |" in printed for row in rows)
    assert results[0]["error"] == 0 and abs(results[0]["cost"]) < 5e-6
    hp = dataclasses.replace(hp, data_path=tiny_env["DATA_PATH"], tokenizer_path=tiny_env["TOKENIZER_PATH"])
    val, luts = tm.open_validation(hp, torch.device("cpu"))
    bits = tm.score_windows("nelbo", model, hp, val, luts, 24)[1].sum(1)
    assert given["bpb"] == pytest.approx(tm.ratio(*bits.unbind(1))[0], abs=1e-5)
    coarse = dataclasses.replace(hp, quant_mode="int4")
    info = tm.save_artifact(model, coarse, tmp_path / "b.mdlm")
    packed = tm.load_artifact(tmp_path / "b.mdlm")[0]
    other = tm.score_windows("nelbo", packed, hp, val, luts, 24)[1].sum(1)
    cost, stderr = tm.ratio(other[:, 0] - bits[:, 0], bits[:, 1])
    assert results[1]["cost"] == pytest.approx(cost, abs=1e-6) and results[1]["stderr"] == pytest.approx(
        stderr, abs=1e-6
    )
    assert results[1]["artifact_bytes"] == info["artifact_bytes"] and cost != 0
    assert results[2]["error"] != results[1]["error"]


def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    for arguments in (["missing.mdlm"], ["missing.mdlm", "--batch", "0"], ["missing.mdlm", "--seqs", "-1"]):
        monkeypatch.setattr(sys, "argv", ["quant_table.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            quant_table.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("quant_table.py: error: ")
