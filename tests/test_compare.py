"""tools/compare.py, tools/bench.py and tools/common.py: figures follow from the definitions."""

import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import bench
import common
import compare
import pytest
import torch
from conftest import random_model, run_python, tiny_hp

import train_mdlm as tm


@pytest.fixture(scope="module")
def artifacts(tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    changes = {
        "demo": dict(preset="demo"),
        "mdlm": {},
        "ar": dict(objective="ar"),
        "words": {},
        "short": dict(train_seq_len=16, train_batch_tokens=64),
    }
    for name, overrides in changes.items():
        hp = dataclasses.replace(tm.Hyperparameters.from_env(tiny_env), **overrides)
        if name == "words":
            hp = dataclasses.replace(hp, vocab_size=512)
        tm.save_artifact(random_model(hp, scale=0.2), hp, folder / f"{name}.mdlm")
    return folder


def where(env):
    return ["--data", env["DATA_PATH"], "--tokenizer", env["TOKENIZER_PATH"]]


def test_paired_difference_by_position(artifacts, tiny_env):
    names = ["mdlm.mdlm", "ar.mdlm"]
    options = [*where(tiny_env), "--seqs", "9"]
    done = run_python("tools/compare.py", *names, *options, cwd=artifacts)
    row_pattern = r"^\| (\S+) \| (\d+) \| (\S+) ± \S+ \| (\S+) ± \S+ \| (\S+) ± (\S+) \|"
    found = re.findall(row_pattern, done.stdout, re.MULTILINE)
    buckets = {
        "0": slice(0, 1),
        "1": slice(1, 2),
        "2-3": slice(2, 4),
        "4-7": slice(4, 8),
        "8-15": slice(8, 16),
        "16-31": slice(16, 32),
        "all": slice(0, 32),
    }
    assert [row[0] for row in found] == list(buckets)
    assert (artifacts / "compare.png").read_bytes().startswith(b"\x89PNG")
    val = tm.TokenStream(tiny_env["DATA_PATH"], "val")
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(tiny_env["TOKENIZER_PATH"], 384), 384)
    window = val.windows(tm.evenly_spaced(val.count_windows(32), 9), 32)
    size = tm.token_bytes(window[:, 1:], window[:, 0], luts).double()
    masked, _ = tm.load_artifact(artifacts / "mdlm.mdlm")
    causal, _ = tm.load_artifact(artifacts / "ar.mdlm")
    masked_bits = tm.chain_rule(masked, window[:, 1:]).double() / math.log(2)
    causal_bits = tm.causal_nll(causal, window).double() / math.log(2)
    for positions, tokens, *figures in found:
        at = buckets[positions]
        nbytes = size[:, at].sum(1)
        first = masked_bits[:, at].sum(1)
        second = causal_bits[:, at].sum(1)
        difference = (first - second).sum() / nbytes.sum()
        stderr = ((first - second - difference * nbytes) ** 2).sum().sqrt() / nbytes.sum()
        expected = [first.sum() / nbytes.sum(), second.sum() / nbytes.sum(), difference, stderr]
        assert int(tokens) == 9 * (at.stop - at.start)
        assert list(map(float, figures)) == pytest.approx([x.item() for x in expected], abs=6e-4)


def test_artifacts_that_cannot_be_compared(artifacts, tiny_env, tool):
    for name, message in [
        ("words.mdlm", "VOCAB_SIZE=512, but"),
        ("short.mdlm", "TRAIN_SEQ_LEN=16, but"),
        ("absent.mdlm", "absent.mdlm: there is no such file"),
    ]:
        done = tool(compare, artifacts / "mdlm.mdlm", artifacts / name, *where(tiny_env))
        assert done.returncode == 2
        assert done.stderr.startswith("compare.py: error: ") and message in done.stderr
        assert done.stderr.count("\n") == 1


def test_artifacts_of_two_texts_cannot_be_compared(artifacts, tiny_env, tool, monkeypatch):
    """Presets name their data and tokenizer; options and variables hold for both artifacts."""
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.delenv(name, raising=False)
    pair = [artifacts / "mdlm.mdlm", artifacts / "demo.mdlm"]
    for options, message in [
        ([], "TOKENIZER_PATH=./data/tokenizers/docs_4096_bpe.model, but"),
        (where(tiny_env)[2:], "DATA_PATH=./data/datasets/docs_sp4096, but"),
    ]:
        done = tool(compare, *pair, *options)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{pair[1]}: {message} {pair[0]} has" in done.stderr
    scores, _ = compare.measure(pair, tiny_env["DATA_PATH"], tiny_env["TOKENIZER_PATH"], 2)
    assert [score.seqs for score, _ in scores] == [2, 2]


def test_scores_of_different_bytes_cannot_be_compared(artifacts, tiny_env):
    paths = [artifacts / "mdlm.mdlm"] * 2
    scores, _ = compare.measure(paths, tiny_env["DATA_PATH"], tiny_env["TOKENIZER_PATH"], 2)
    (score, first), (_, second) = scores
    second = second.clone()
    second[0, 0, 1] += 1
    for other in ((score, second), (score._replace(tokens=63), first)):
        with pytest.raises(tm.InputError, match="scored on different text: 2 windows"):
            compare.check_same_windows([(score, first), other])


def test_both_are_measured_on_the_same_windows_or_not_at_all(artifacts, tiny_env, monkeypatch):
    score_windows, asked = tm.score_windows, iter([2, 3])

    def another_number(name, model, hp, val, seqs):
        return score_windows(name, model, hp, val, next(asked))

    monkeypatch.setattr(tm, "score_windows", another_number)
    pair = [artifacts / "mdlm.mdlm", artifacts / "ar.mdlm"]
    with pytest.raises(tm.InputError, match="different text: 2 windows, .* and 3 windows"):
        compare.measure(pair, tiny_env["DATA_PATH"], tiny_env["TOKENIZER_PATH"], 2)


def test_equal_artifacts_do_not_differ(artifacts, tiny_env):
    paths = [artifacts / "mdlm.mdlm"] * 2
    scores, length = compare.measure(paths, tiny_env["DATA_PATH"], tiny_env["TOKENIZER_PATH"], 3)
    (_, first), (_, second) = scores
    assert torch.equal(first, second)
    for row in compare.compare_positions(first, second, length):
        assert row.difference == (0.0, 0.0) and row.first == row.second


def test_bench_puts_the_estimators_side_by_side(artifacts, tiny_env, tool):
    arguments = ["--seqs", "4", "--budget", "64", *where(tiny_env)]
    done = tool(bench, "scores", artifacts / "mdlm.mdlm", *arguments)
    row_pattern = r"^\| (\D.*?) \| (\d+) \| \S+ \| (\S+) ± (\S+) \| .* \| (\d+) \|$"
    rows = re.findall(row_pattern, done.stdout, re.MULTILINE)
    calls = {name: int(calls) for name, calls, *_ in rows}
    assert calls["NELBO, 4 passes"] == 4
    assert calls["T-step, T = 128"] == 128
    assert calls["t-grid, 256 points"] == 256
    often = 0
    for name, _, off, error, repetitions in rows:
        if name.startswith("NELBO") and int(repetitions) >= 16:
            often += 1
            assert abs(float(off)) < 5 * float(error)
    assert often == 3
    done = tool(bench, "scores", artifacts / "ar.mdlm", *where(tiny_env))
    assert done.returncode == 2 and "nothing to compare" in done.stderr


def test_figures_of_bench(monkeypatch):
    """Four repetitions of the exact score, 2.0 and 2.2 in turn, and three of each estimator."""
    bpbs = iter([2.0, 2.2, 2.0, 2.2, *[2.5, 2.6, 2.7] * len(bench.VARIANTS)])
    asked = []

    def score_windows(name, model, hp, val, seqs):
        asked.append((name, hp.seed, seqs, hp.nelbo_passes, hp.tstep_steps))
        return tm.Score(next(bpbs), 0.0, 0.0, 9, 36, 36, 5.0, 0.0), None

    monkeypatch.setattr(tm, "score_windows", score_windows)
    val = SimpleNamespace(stream=SimpleNamespace(count_windows=lambda length: 36))
    title, _, _, _, *rows = bench.Bench(None, tiny_hp(), val, 9).table(3).splitlines()
    stderr = (4 * 0.1**2 / 3 / 4) ** 0.5
    passes = 4 * bench.REFERENCE_PASSES
    assert title == (
        f"exact any-order NELBO: 2.1000 ± {stderr:.4f} bpb on 9 of 36 windows ({passes} passes)"
    )
    off = f"+0.5000 ± {(0.1**2 / 3 + stderr**2) ** 0.5:.4f}"
    for variant, row in zip(bench.VARIANTS, rows, strict=True):
        figures = f"{variant.calls} | 2.6000 | {off} | 0.1000 | 0.0500 | 5 | 3 |"
        assert row == f"| {variant.label} | {figures}"
    assert [seed for _, seed, *_ in asked] == list(range(4 + 3 * len(bench.VARIANTS)))
    assert asked[0] == ("nelbo", 0, 9, bench.REFERENCE_PASSES, 128)
    assert asked[4][3] == 1 and asked[-6][::4] == ("tstep", 128)


# ---- common.py


def test_paths_are_those_of_the_option_or_the_environment_or_the_preset(monkeypatch):
    hp = tm.Hyperparameters(data_path="preset's", tokenizer_path="preset's.model")
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert common.with_paths(hp) == hp
    monkeypatch.setenv("DATA_PATH", "environment's")
    found = common.with_paths(hp, tokenizer="option's.model")
    assert (found.data_path, found.tokenizer_path) == ("environment's", "option's.model")
    assert common.with_paths(hp, data="option's").data_path == "option's"
    monkeypatch.setenv("TOKENIZER_PATH", "environment's.model")
    assert common.with_paths(hp).tokenizer_path == "environment's.model"
    found = common.with_paths(hp, tokenizer="option's.model")
    assert found.tokenizer_path == "option's.model"


def test_progress_is_shown_on_terminals_only(monkeypatch, capsys):
    """In one line, which is empty in the end; each per cent once."""
    for terminal, expected in ((False, ""), (True, "\r\x1b[Kw 0 %\r\x1b[Kw 50 %\r\x1b[K")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        progress = common.Progress("w")
        for done in (0.0, 0.5, 0.501, 1.0):
            progress(done)
        assert capsys.readouterr().out == expected


def test_errors_of_a_tool_are_one_line(tmp_path, capsys):
    def read_nothing():
        (tmp_path / "absent").read_text()

    def interrupted():
        raise KeyboardInterrupt

    def needs_something():
        common.require("a_package_that_is_not_there.part")

    for main, message in [
        (read_nothing, "absent: cannot be read or written: No such file or directory"),
        (interrupted, "stopped by Ctrl-C"),
        (needs_something, "the package a_package_that_is_not_there is missing: pip install"),
    ]:
        with pytest.raises(SystemExit) as stop:
            common.run_tool(main)()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("test_compare.py: error: ")
        assert message in error and error.count("\n") == 1


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    figure = common.new_figure(2, 1)
    figure.subplots().plot([1, 2])
    common.save_figure(figure, tmp_path / "new/curve.svg")
    assert "<svg" in (tmp_path / "new/curve.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="curve.docx: the picture cannot be written"):
        common.save_figure(figure, tmp_path / "curve.docx")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
