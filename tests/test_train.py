"""The script as its users run it: one and two processes, two groups, scoring again, errors."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_text
import pytest
from conftest import ROOT, clean_env, run_python, torchrun

import train_mdlm as tm

SCORES = list(tm.ESTIMATORS["mdlm"])
PREFIXES = ["0", "1", "2-3", "4-7", "8-15", "16-31"]


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"train_loss:(\S+)", text)]


def exact(text: str) -> list[float]:
    found = re.search(r"_exact val_loss:(\S+) val_bpb:(\S+)", text)
    return [float(figure) for figure in found.groups()]


def finish(*processes) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def single(tiny_env, tmp_path_factory):
    """One run of one process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run_python("train_mdlm.py", cwd=folder, RUN_ID="one", **tiny_env).stdout


# ---- A run, and scoring it again


def test_run_trains_packs_reloads_and_scores(single):
    folder, printed = single
    log = (folder / "logs/one.txt").read_text(encoding="utf-8")
    source = (ROOT / "train_mdlm.py").read_text(encoding="utf-8")
    assert log.startswith(source + "\n" + "=" * 100 + "\n")
    for pattern in (
        r"^model_params:\d+$",
        r"^world_size:1 grad_accum_steps:1 ",
        r"^hyperparameters: .*ITERATIONS=12 ",
        r"^overridden: .*VOCAB_SIZE=384",
        r"^step:12/12 train_loss:\S+ train_time:\d+ms step_avg:\S+ms$",
        r"^step:12/12 val_loss:\S+ val_bpb:\S+ ",
        r"^peak memory allocated: \d+ MiB",
        r"^Code size: (\d+) bytes$",
        r"^Serialized model fp8\+\w+: \d+ bytes",
        r"^Total submission size fp8\+\w+: \d+ bytes$",
        r"^final_fp8_\w+_roundtrip val_loss:\S+ val_bpb:\S+ stderr:\S+ eval_time:\d+ms$",
        r"^final_fp8_\w+_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
        r"^score:nelbo bpb:\S+ stderr:\S+ seqs:\d+ tokens:\d+ bytes:\d+ time:\d+ms "
        r"tokens_per_s:\d+$",
        r"^ema:started step:2 ",
    ):
        assert re.search(pattern, log, re.MULTILINE), pattern
    code = int(re.search(r"^Code size: (\d+)", log, re.MULTILINE)[1])
    model = int(re.search(r"^Serialized model \S+: (\d+)", log, re.MULTILINE)[1])
    assert code == len(source.encode()) and model == (folder / "logs/one.mdlm").stat().st_size
    assert f": {code + model} bytes\nfinal_" in log
    assert losses(printed)[-1] < losses(printed)[0] and "\r" not in printed
    left = sorted(path.name for path in (folder / "logs").iterdir())
    assert left == ["one.00000012.ckpt", "one.mdlm", "one.txt"]


def test_eval_only_gives_the_same_score(single, tiny_env):
    folder, printed = single
    names = ("DATA_PATH", "TOKENIZER_PATH", "VAL_BATCH_SIZE", "SCORES")
    env = {name: tiny_env[name] for name in names}
    env |= dict(EVAL_ONLY="logs/one.mdlm", RUN_ID="again", FINAL_EVAL_T_SAMPLES="8")
    again = run_python("train_mdlm.py", cwd=folder, **env).stdout
    assert exact(again) == pytest.approx(exact(printed), abs=1e-6)
    assert re.search(r"^score:tgrid biased:1 bpb:", again, re.MULTILINE)
    assert "train_loss" not in again


def all_scores(windows) -> dict[str, str]:
    """Environment of all scores of so many windows, each in little time."""
    names = ",".join(f"{name}:{windows}" for name in SCORES)
    return dict(SCORES=names, STRIDE="8", TSTEP_STEPS="4")


def scores(text: str) -> dict:
    """Name → figures of every score line; the biased one says so."""
    found = re.findall(
        r"^score:(\w+) (?:biased:1 )?bpb:(\S+) stderr:(\S+) seqs:(\d+) tokens:(\d+) bytes:(\d+) ",
        text,
        re.MULTILINE,
    )
    return {name: [float(figure) for figure in figures] for name, *figures in found}


def test_all_scores_of_one_and_of_two_processes_are_the_same(single, tiny_env):
    folder, _ = single
    env = {name: tiny_env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} | all_scores(40)
    env |= dict(EVAL_ONLY="logs/one.mdlm", FINAL_EVAL_T_SAMPLES="5")
    pair = torchrun("--standalone", "--nproc_per_node=2", cwd=folder, RUN_ID="pair", **env)
    small = dict(RUN_ID="alone", VAL_BATCH_SIZE="128")
    alone = run_python("train_mdlm.py", cwd=folder, **small, **env).stdout
    (printed,) = finish(pair)
    assert list(scores(alone)) == SCORES
    for name, figures in scores(alone).items():
        assert scores(printed)[name] == pytest.approx(figures, abs=1.01e-4), name
    log = (folder / "logs/alone.txt").read_text(encoding="utf-8")
    assert re.findall(r"^prefix:(\S+) bpb:\d+\.\d{4} stderr:", log, re.MULTILINE) == PREFIXES


def test_a_causal_model_has_two_scores(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    causal = dict(OBJECTIVE="ar", FINAL_EVAL_MAX_SEQS="40")
    found = scores(script(**tiny_env | all_scores(40) | causal).stdout)
    assert list(found) == ["ar", "sliding"] and found["ar"][2] == 40
    assert found["sliding"][3] == 40 * 8  # 8 new tokens a window


def test_eval_only_refuses_a_shape_that_the_artifact_does_not_have(
    single, tiny_env, monkeypatch, script
):
    monkeypatch.chdir(single[0])
    done = script(EVAL_ONLY="logs/one.mdlm", RUN_ID="other", **tiny_env | dict(NUM_LAYERS="5"))
    message = "NUM_LAYERS=5, but logs/one.mdlm was made with NUM_LAYERS=3"
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not Path("logs/other.txt").exists()


def test_a_used_run_id_is_refused(single, tiny_env, monkeypatch, script):
    monkeypatch.chdir(single[0])
    before = Path("logs/one.txt").read_bytes()
    done = script(RUN_ID="one", **tiny_env)
    assert done.returncode == 2 and "RUN_ID=one was used before" in done.stderr
    assert Path("logs/one.txt").read_bytes() == before


def test_wall_clock_cap_stops_early_and_says_so(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    capped = dict(MAX_WALLCLOCK_SECONDS="1.5", ITERATIONS="100000", TRAIN_LOG_EVERY="0")
    printed = script(**tiny_env | capped).stdout
    early = r"^stopping_early: wallclock_cap train_time:1[5-9]\d\dms step:\d+/100000$"
    assert re.search(early, printed, re.MULTILINE)


def test_over_the_size_limit_is_loud_and_still_finishes(tiny_env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "SIZE_LIMIT_BYTES", 90_000)
    tm.run(tiny_env | dict(ITERATIONS="1", RUN_ID="big"))
    log = (tmp_path / "logs/big.txt").read_text(encoding="utf-8")
    body = log.split("\n" + "=" * 100 + "\n")[1]
    over = r"^OVER BUDGET: Total submission size fp8\+\S+ is \d+ bytes, \d+ more than allowed$"
    assert re.search(over, body, re.MULTILINE) and "_exact" in body


def test_progress_bar_on_a_terminal_only(tiny_env, tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_mdlm.py")],
        cwd=tmp_path,
        stdout=follower,
        stderr=follower,
        env=clean_env(**(tiny_env | dict(ITERATIONS="60", TRAIN_LOG_EVERY="0"))),
    )
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 4096):
            shown += piece
    except OSError:  # the other end is closed: the run is over
        pass
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(r"train █+░* +\d+ %", text) and "final_fp8" in text


# ---- What does not change a run


def test_the_same_run_gives_the_same_artifact(single, tiny_env, tmp_path):
    env = tiny_env | dict(RUN_ID="twin", WARMUP_STEPS="2")
    run_python("train_mdlm.py", cwd=tmp_path, **env)
    twin = (tmp_path / "logs/twin.mdlm").read_bytes()
    assert twin == (single[0] / "logs/one.mdlm").read_bytes()


def test_accumulation_does_not_change_the_run(single, tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    printed = script(MICRO_BATCH_TOKENS="128", **tiny_env).stdout
    assert "grad_accum_steps:4" in printed
    assert losses(printed) == pytest.approx(losses(single[1]), abs=2e-3)
    assert exact(printed)[1] == pytest.approx(exact(single[1])[1], abs=0.02)


def test_two_processes_do_not_change_the_run(single, tiny_env, tmp_path):
    (printed,) = finish(torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, **tiny_env))
    assert "world_size:2 grad_accum_steps:1" in printed
    assert printed.count("step:1/12 train_loss") == 1
    assert losses(printed) == pytest.approx(losses(single[1]), abs=2e-3)
    assert exact(printed)[1] == pytest.approx(exact(single[1])[1], abs=0.02)


def test_two_groups_on_one_machine_train_one_model(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend=c10d", "--rdzv_id=pair", f"--rdzv_endpoint=127.0.0.1:{port}"]
    groups, env = [], tiny_env | dict(OBJECTIVE="ar")
    for group in ("0", "1"):
        (tmp_path / group).mkdir()
        options = ["--nnodes=2", "--nproc_per_node=1", *meeting]
        groups.append(torchrun(*options, cwd=tmp_path / group, **env))
    alone = script(**env).stdout
    outputs = finish(*groups)
    # The rendezvous numbers the groups as they arrive.
    first = outputs[0] if "train_loss" in outputs[0] else outputs[1]
    assert "world_size:2" in first and sum("train_loss" in output for output in outputs) == 1
    assert losses(first) == pytest.approx(losses(alone), abs=2e-3) and "score:ar " in alone


# ---- What ends a run


def test_a_folder_that_cannot_be_written_is_named(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    Path("logs").write_text("a file")
    done = script(**tiny_env)
    assert done.returncode == 2 and "logs: cannot be read or written" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def wrong_data(tmp_path_factory):
    """Folders without shards, with a damaged one, and with a token beyond the vocabulary."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("empty", "bad", "big"):
        (folder / name).mkdir()
    damaged = folder / "bad/fineweb_val_000000.bin"
    prepare_text.write_shard(damaged, np.arange(100))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    prepare_text.write_shard(folder / "big/fineweb_val_000000.bin", np.arange(100))
    prepare_text.write_shard(folder / "big/fineweb_train_000000.bin", np.full(100, 500))
    return folder


BAD_SHARD = "bad/fineweb_val_000000.bin"


@pytest.mark.parametrize(
    "change, message",
    [
        ("DATA_PATH=empty", "python data/prepare_text.py --source docs"),
        (
            "TOKENIZER_PATH=missing.model",
            "TOKENIZER_PATH=missing.model: there is no SentencePiece model",
        ),
        (f"TOKENIZER_PATH={BAD_SHARD}", f"{BAD_SHARD}: there is no SentencePiece model"),
        ("VOCAB_SIZE=512", "has 384 pieces, but VOCAB_SIZE=512"),
        ("DATA_PATH=bad", f"{BAD_SHARD}: truncated or damaged"),
        (
            "DATA_PATH=big",
            "big/fineweb_train_000000.bin: holds token 500, but VOCAB_SIZE=384",
        ),
        (
            "TRAIN_SEQ_LEN=16384 TRAIN_BATCH_TOKENS=16384",
            "less than a window of TRAIN_SEQ_LEN=16384",
        ),
        ("MICRO_BATCH_TOKENS=16", "MICRO_BATCH_TOKENS=16 is less than one sequence"),
        (
            "TRAIN_BATCH_TOKENS=1000",
            "TRAIN_BATCH_TOKENS=1000 is no multiple of 32: TRAIN_SEQ_LEN=32 ",
        ),
        (f"EVAL_ONLY={BAD_SHARD}", "not an artifact"),
        ("SCORES=nelbo,r2l", "SCORES=nelbo,r2l: r2l is not one of nelbo, l2r"),
    ],
)
def test_what_is_wrong_is_said_before_training(
    tiny_env, wrong_data, tmp_path, monkeypatch, script, change, message
):
    monkeypatch.chdir(tmp_path)
    for folder in wrong_data.iterdir():
        Path(folder.name).symlink_to(folder)
    done = script(**tiny_env | dict(item.split("=", 1) for item in change.split()))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    "error, text",
    [
        (tm.InputError("no shards in DATA_PATH=./memory"), "no shards in DATA_PATH=./memory"),
        (RuntimeError("[enforce fail] can't allocate memory: 10 bytes"), "out of memory: lower "),
        (MemoryError(), "out of memory: lower MICRO_BATCH_TOKENS"),
        (
            OSError(28, "No space left on device", "logs/memory"),
            "logs/memory: cannot be read or written: No space left",
        ),
        (KeyboardInterrupt(), "stopped by a signal"),
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')"),
            "torch.compile finds no C++",
        ),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            "torch.compile finds no C++ compiler",
        ),
        (RuntimeError("shapes\ndiffer"), "shapes differ"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_reason_of_an_end_is_the_right_one(error, text):
    assert tm.explain(error).startswith(text)
    assert bool(tm.foreseen(error)) is (text != "shapes differ")


FORESEEN = {"CUDA out of memory": True, "shapes\ndiffer": False}


@pytest.mark.parametrize("text, foreseen", FORESEEN.items())
def test_only_what_somebody_foresaw_ends_without_a_traceback(monkeypatch, capsys, text, foreseen):
    def broken(env):
        raise RuntimeError(text)

    monkeypatch.setattr(tm, "run", broken)
    monkeypatch.setattr(tm, "on_signals", lambda handler: None)
    monkeypatch.setattr("sys.argv", ["train_mdlm.py"])
    with pytest.raises(SystemExit if foreseen else RuntimeError):
        tm.main()
    assert capsys.readouterr().err.count("out of memory: lower") == foreseen


def test_a_world_that_does_not_divide_the_batch_is_refused(tiny_env, tmp_path):
    env = tiny_env | dict(TRAIN_BATCH_TOKENS=str(32 * 5))
    process = torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, **env)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    message = "TRAIN_BATCH_TOKENS=160 is no multiple of 64: TRAIN_SEQ_LEN=32 "
    assert output.count(message) == 1


def test_a_killed_process_ends_the_group(tiny_env, tmp_path):
    """Within a minute, with a status that is not 0; nothing is scored."""
    env = tiny_env | dict(ITERATIONS="1000000", RUN_ID="lost")
    process = torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, **env)
    for line in process.stdout:
        if line.startswith("step:5/"):
            break
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if {b"LOCAL_RANK=1", b"RUN_ID=lost"} <= set(path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # ended meanwhile, or another user's
            continue
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "final_" not in rest
    assert not list((tmp_path / "logs").glob("*.mdlm"))
    log = (tmp_path / "logs/lost.txt").read_text(encoding="utf-8")
    ends = "another process of the group is lost: |stopped by a signal"
    assert re.search(rf"^error: rank:0 ({ends})", log, re.MULTILINE)


def test_a_diverged_run_prints_no_score(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    rates = dict.fromkeys(("SCALAR_LR", "TIED_EMBED_LR", "MATRIX_LR"), "1e12")
    done = script(**tiny_env | rates | dict(ITERATIONS="20"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not finite" in done.stderr or "not a finite number" in done.stderr
    assert "val_bpb:nan" not in done.stdout and "final_" not in done.stdout
