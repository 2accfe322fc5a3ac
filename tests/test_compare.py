"""tools/compare.py and tools/bench.py: their figures follow from the definitions."""

import math
import re

import pytest
import torch

import bench
import compare
import train_mdlm as tm
from conftest import random_model, run_python


@pytest.fixture(scope="module")
def artifacts(tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name, overrides in {
        "mdlm": {},
        "ar": dict(objective="ar"),
        "short": dict(train_seq_len=16, train_batch_tokens=64),
    }.items():
        hp = tm.dataclasses.replace(tm.Hyperparameters.from_env(tiny_env), **overrides)
        tm.save_artifact(random_model(hp, scale=0.2), hp, folder / f"{name}.mdlm")
    return folder


def where(env):
    return ["--data", env["DATA_PATH"], "--tokenizer", env["TOKENIZER_PATH"]]


def test_paired_difference_by_position(artifacts, tiny_env):
    done = run_python("tools/compare.py", "mdlm.mdlm", "ar.mdlm", *where(tiny_env), "--seqs", "9", cwd=artifacts)
    found = re.findall(r"^\| (\S+) \| (\d+) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \|", done.stdout, re.M)
    assert [row[0] for row in found] == ["0", "1", "2-3", "4-7", "8-15", "16-31", "all"]
    assert (artifacts / "compare.png").read_bytes().startswith(b"\x89PNG")
    hp = tm.Hyperparameters.from_env(tiny_env)
    val = tm.TokenStream(hp.data_path, "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    window = val.windows(tm.spaced(val.count_windows(32), 9), 32)
    size = tm.token_bytes(window[:, 1:], window[:, 0], luts).double()
    a = tm.chain_rule(tm.load_artifact(artifacts / "mdlm.mdlm")[0], window[:, 1:]).double() / math.log(2)
    b = tm.causal_nll(tm.load_artifact(artifacts / "ar.mdlm")[0], window).double() / math.log(2)
    for row, at in zip(
        found, [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8), slice(8, 16), slice(16, 32), slice(0, 32)]
    ):
        nbytes, first, second = size[:, at].sum(1), a[:, at].sum(1), b[:, at].sum(1)
        difference = (first - second).sum() / nbytes.sum()
        stderr = ((first - second - difference * nbytes) ** 2).sum().sqrt() / nbytes.sum()
        assert int(row[1]) == 9 * (at.stop - at.start)
        expected = [first.sum() / nbytes.sum(), second.sum() / nbytes.sum(), difference, stderr]
        assert [float(row[i]) for i in (2, 4, 6, 7)] == pytest.approx([x.item() for x in expected], abs=6e-4)


def test_artifacts_that_cannot_be_compared(artifacts, tiny_env, tool):
    for names, message in [
        (("mdlm.mdlm", "short.mdlm"), "TRAIN_SEQ_LEN=16"),
        (("mdlm.mdlm", "absent.mdlm"), "absent.mdlm: cannot be read"),
    ]:
        done = tool(compare, *(artifacts / name for name in names), *where(tiny_env))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_equal_artifacts_do_not_differ(artifacts, tiny_env):
    path = artifacts / "mdlm.mdlm"
    scores, length = compare.measure([path, path], tiny_env["DATA_PATH"], tiny_env["TOKENIZER_PATH"], 3)
    for row in compare.rows(scores[0][1], scores[1][1], length):
        assert row[6:] == (0.0, 0.0) and row[2] == row[4]
    assert torch.equal(scores[0][1], scores[1][1])


def test_bench_puts_the_estimators_side_by_side(artifacts, tiny_env, tool):
    arguments = ["--seqs", "4", "--budget", "64", *where(tiny_env)]
    done = tool(bench, "scores", artifacts / "mdlm.mdlm", *arguments)
    rows = re.findall(r"^\| (\D.*?) \| (\d+) \| (\S+) \| (\S+) ± (\S+) \| .* \| (\d+) \|$", done.stdout, re.M)
    calls = {name: int(calls) for name, calls, *_ in rows}
    assert calls["NELBO, 4 passes"] == 4 and calls["T-step, T = 128"] == 128 and calls["t-grid, 256 points"] == 256
    for name, _, _, off, error, repetitions in rows:
        if name.startswith("NELBO") and int(repetitions) >= 16:
            assert abs(float(off)) < 5 * float(error)
    assert sum(int(row[5]) >= 16 for row in rows if row[0].startswith("NELBO")) == 3
    done = tool(bench, "scores", artifacts / "ar.mdlm", *where(tiny_env))
    assert done.returncode == 2 and "nothing to compare" in done.stderr
