"""tools/sample_bench.py: measures of text with known answers, gaps as they are scored, a bench."""

import json
import math
import os
import signal

import pytest
import sample_bench
import sampling
import torch
from conftest import random_model

import train_mdlm as tm

WINDOW = 16


def tiny(env, **overrides):
    """A random model with its tokenizer; twice the same for the same hyperparameters."""
    shape = dict(vocab_size=384, train_seq_len=WINDOW, compute_dtype="float32")
    widths = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
    paths = dict(tokenizer_path=env["TOKENIZER_PATH"], data_path=env["DATA_PATH"])
    return random_model(tm.Hyperparameters(**shape, **widths, **paths, **overrides), scale=0.3)


@pytest.fixture(scope="module")
def artifacts(tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    paths = {}
    for name, system in dict(mdlm={}, block=dict(block_size=4), ar=dict(objective="ar")).items():
        paths[name] = folder / f"{name}.mdlm"
        model = tiny(tiny_env, **system)
        tm.save_artifact(model, model.hp, paths[name])
    return paths


@pytest.fixture(scope="module")
def loaded(artifacts, tiny_env):
    env = (tiny_env["TOKENIZER_PATH"], tiny_env["DATA_PATH"])
    return {name: sampling.load(path, *env) for name, path in artifacts.items()}


@pytest.fixture(scope="module")
def bench(loaded):
    return sample_bench.Bench(loaded["mdlm"], loaded["ar"], sampling.Request(num=6, batch=4))


@pytest.fixture(scope="module")
def windows(bench):
    return sample_bench.held_out_windows(bench)


def test_measures_of_text():
    assert sample_bench.entropy_of(torch.tensor([5, 7, 5, 7])) == pytest.approx(1)
    assert sample_bench.entropy_of(torch.tensor([3, 3, 3])) == 0
    texts = [[1, 2, 1, 2], [1, 2, 3, 4]]  # pairs 12 21 12, 12 23 34
    assert sample_bench.distinct_share(texts, 2) == pytest.approx(4 / 6)
    assert sample_bench.repeated_share(texts, 2) == pytest.approx((1 / 3 + 0) / 2)


def test_perplexity_is_that_of_the_causal_score(bench, windows):
    found = sample_bench.quality(bench, windows)
    nats = tm.causal_nll(bench.judge.model, tm.with_before(windows)).double().mean(1)
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()))
    expected = math.exp(nats.mean()) * nats.std().item() / math.sqrt(6)
    assert found["stderr"] == pytest.approx(expected)


@pytest.mark.parametrize("calls", [5, 16])
def test_gamma_gives_so_many_calls(bench, calls):
    request = bench.request._replace(sampler="eb")
    gamma = sample_bench.gamma_for(bench, request, calls)
    found = list(sampling.draw(bench.loaded, request._replace(gamma=gamma, num=4)))
    assert sample_bench.mean_calls(found) == pytest.approx(calls, rel=0.1)


def test_the_search_for_gamma_says_what_it_tries(bench, monkeypatch, capsys):
    """Before each try, because that may take long."""
    tries, draw = [], sampling.draw

    def noted(loaded, request):
        tries.append((request.gamma, capsys.readouterr().out))
        return draw(loaded, request)

    monkeypatch.setattr(sampling, "draw", noted)
    sample_bench.gamma_for(bench, bench.request._replace(sampler="eb"), 5)
    assert tries[0][0] == 1
    for gamma, said in tries:
        assert said == f"eb: looking for 5 calls, trying gamma {gamma:g}\n"


@pytest.mark.parametrize("length", [1, 3])
def test_true_tokens_of_a_gap_cost_what_the_scores_say(loaded, bench, windows, length):
    start = (WINDOW - length) // 2
    gap = slice(start, start + length)
    outside = [i for i in range(WINDOW) if not gap.start <= i < gap.stop]
    around = torch.tensor([*outside, *range(gap.start, gap.stop)])
    mdlm, judge = loaded["mdlm"].model, loaded["ar"].model
    expected = {
        "both sides, l2r": tm.chain_rule(mdlm, windows, around),
        "left side, l2r": tm.chain_rule(mdlm, windows),
        "judge, left to right": tm.causal_nll(judge, tm.with_before(windows)),
    }
    for way in sample_bench.fillings(bench):
        found = sample_bench.measure_gaps(bench, way, windows, length)
        assert found["gap"] == length and 0 <= found["exact_match"] <= 1
        if way.name in expected:
            bits = expected[way.name][:, gap].double().sum(1) / math.log(2)
            assert found["bits"] == pytest.approx(bits.mean().item(), abs=1e-3)


def test_gaps_of_blocks(loaded, windows):
    """What is to the right in the same block is seen, what is behind that is not."""
    bench = sample_bench.Bench(loaded["block"], loaded["ar"], sampling.Request(num=6, batch=4))
    both, left = (
        next(way for way in sample_bench.fillings(bench) if way.name == name)
        for name in ("both sides, l2r", "left side, l2r")
    )
    measured = [sample_bench.measure_gaps(bench, way, windows, 3)["bits"] for way in (both, left)]
    assert measured[0] != pytest.approx(measured[1], abs=1e-3)  # the gap ends inside a block
    nats = tm.chain_rule(bench.loaded.model, windows)[:, 6:9].double().sum(1)
    assert measured[1] == pytest.approx(nats.mean().item() / math.log(2), abs=1e-3)
    measured = [sample_bench.measure_gaps(bench, way, windows, 8)["bits"] for way in (both, left)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)  # it ends where a block ends


def test_what_it_would_write_itself_is_an_exact_match(bench, windows):
    for way in sample_bench.fillings(bench):
        gap = slice(6, 10)
        own = sample_bench.fill(way, windows, gap, sampling.Rows).z[:, gap]
        text = windows.clone()
        text[:, gap] = own
        assert sample_bench.measure_gaps(bench, way, text, 4)["exact_match"] == 1
        text[:3, gap] = (own[:3] + 1) % 384
        assert sample_bench.measure_gaps(bench, way, text, 4)["exact_match"] == 0.5


# ---- The command


@pytest.fixture
def call(tool, artifacts, tiny_env, monkeypatch):
    for name in ("TOKENIZER_PATH", "DATA_PATH"):
        monkeypatch.setenv(name, tiny_env[name])
    options = ("--num", 4, "--batch", 2, "--calls", "4,8", "--gaps", "1,4")

    def run(name, judge, out, *arguments):
        paths = (artifacts[name], "--judge", artifacts[judge], "--out", out)
        return tool(sample_bench, *paths, *options, *arguments)

    return run


@pytest.mark.parametrize("name", ["mdlm", "block", "ar"])
def test_a_bench(call, tmp_path, name):
    done = call(name, "ar", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "sample_bench.json").read_text())
    rows = report["samplers"]
    known = [key for key, row in sampling.SAMPLERS.items() if name in row.systems]
    assert list(dict.fromkeys(row["sampler"] for row in rows)) == known
    for row in rows:
        expected = [16] if row["sampler"] == "causal" else [4, 8]
        assert len([other for other in rows if other["sampler"] == row["sampler"]]) == len(expected)
        if row["sampler"] in ("l2r", "random", "confidence"):
            assert row["calls"] == row["settings"]["steps"] in expected
        assert row["perplexity"] > 1 and row["tokens_per_second"] > 0
    assert {row["gap"] for row in report["gaps"]} == {1, 4}
    table = (tmp_path / "README.md").read_text()
    assert done.stdout.endswith(table) and "| held-out text |" in table
    assert (tmp_path / "sample_bench.png").read_bytes()[:4] == b"\x89PNG"
    if name == "ar":
        assert call(name, "ar", tmp_path).returncode == 0  # its own files are replaced


def stop_in_call(monkeypatch, name, number):
    """Ctrl-C at the beginning of that call of a function of the tool."""
    function, calls = getattr(sample_bench, name), []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments)

    monkeypatch.setattr(sample_bench, name, stopped)


def rows_of(out):
    """Those of samplers and of gaps, without their times."""
    report = json.loads((out / "sample_bench.json").read_text())
    for row in report["samplers"]:
        del row["tokens_per_second"]
    return report["samplers"], report["gaps"]


@pytest.mark.parametrize("name, number, samplers, gaps", [
    ("measure", 3, 2, 0),
    ("gamma_for", 2, 3, 0),
    ("measure_gaps", 4, 4, 3),
])  # fmt: skip
def test_ctrl_c_keeps_what_is_finished(call, tmp_path, monkeypatch, name, number, samplers, gaps):
    chosen = ("--samplers", "l2r,eb")  # 4 rows, and 8 of gaps
    with monkeypatch.context() as patch:
        stop_in_call(patch, name, number)
        done = call("mdlm", "ar", tmp_path, *chosen)
    assert (done.returncode, done.stderr) == (2, "sample_bench.py: error: stopped by Ctrl-C\n")
    found = rows_of(tmp_path)
    text = (tmp_path / "README.md").read_text()
    missing = 12 - samplers - gaps
    assert text.endswith(f"\nInterrupted: {missing} of 12 rows are missing.\n")
    assert done.stdout.endswith(text) and text.count("Gaps in the middle") == bool(gaps)
    assert (tmp_path / "sample_bench.png").read_bytes()[:4] == b"\x89PNG"
    assert call("mdlm", "ar", tmp_path, *chosen).returncode == 0  # what is not whole is replaced
    assert "Interrupted" not in (tmp_path / "README.md").read_text()
    whole = rows_of(tmp_path)
    assert found == (whole[0][:samplers], whole[1][:gaps])


def test_ctrl_c_before_the_first_row_replaces_nothing(call, tmp_path, monkeypatch):
    chosen = ("--samplers", "l2r", "--calls", "4")
    assert call("mdlm", "ar", tmp_path, *chosen).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    stop_in_call(monkeypatch, "measure", 1)
    done = call("mdlm", "ar", tmp_path, *chosen)
    assert (done.returncode, done.stderr) == (2, "sample_bench.py: error: stopped by Ctrl-C\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and before


@pytest.mark.parametrize("judge, arguments, parts", [
    ("mdlm", (), ["--judge", "no causal model"]),
    ("ar", ("--num", 1), ["--num 1", "2 windows"]),
    ("ar", ("--num", 10**6), ["--num 1000000", "validation split has"]),
    ("ar", ("--calls", "8,few"), ["--calls"]),
    ("ar", ("--gaps", "1,16"), ["--gaps 1,16", "have to be shorter", "mdlm.mdlm has 16 tokens"]),
    ("ar", ("--gaps", "0,3"), ["--gaps 0,3", "0 is not between 1 and"]),
    ("ar", ("--calls", "9" * 5000), ["--calls 999", "whole numbers separated by commas"]),
    ("ar", ("--calls", "4,17000"), ["17000 is not between 1 and 16384"]),
    ("ar", ("--calls", "17,99"), ["--calls 17,99: none of them is possible", "take 1 to 16"]),
    ("ar", ("--samplers", "l2r,,eb"), ["--samplers l2r,,eb: takes names separated by commas"]),
    ("ar", ("--samplers", "l2r,causal"), ["--sampler causal", "no causal half"]),
    ("ar", ("--temperature", -1), ["--temperature"]),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line(call, tmp_path, judge, arguments, parts):
    done = call("mdlm", judge, tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["README.md", "sample_bench.json", "sample_bench.png"])
def test_a_symbolic_link_is_left_alone(call, tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "absent")
    done = call("mdlm", "ar", tmp_path)
    assert done.returncode == 2 and f"{name}: is a symbolic link" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_blocks_need_calls_of_their_own(call, tmp_path):
    done = call("block", "ar", tmp_path, "--calls", "2,3", "--samplers", "causal,eb")
    assert done.returncode == 2 and "--calls 2,3: none of them is possible" in done.stderr
    assert "16 tokens of block.mdlm take 4 to 16" in done.stderr
    done = call("block", "ar", tmp_path, "--calls", "2", "--samplers", "causal, causal")
    assert done.returncode == 0 and done.stdout.count("| causal |") == 1


@pytest.mark.parametrize("name", ["README.md", "sample_bench.json", "sample_bench.png"])
def test_what_it_did_not_make_is_left_alone(call, tmp_path, name):
    (tmp_path / name).write_text("mine")
    done = call("mdlm", "ar", tmp_path)
    assert done.returncode == 2 and name in done.stderr
    assert (tmp_path / name).read_text() == "mine"
