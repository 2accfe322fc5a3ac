"""The script as its users run it, one and two processes, two groups, scoring again, errors; and a
run looked at from inside, in simulated time."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import math
import os
import pickle
import re
import resource
import signal
import socket
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare_text
import pytest
import torch
import torch.distributed as dist
from conftest import FAST_BFLOAT16, ROOT, Lines, run_python, tiny_hp, torchrun

import train_mdlm as tm

SCORES = list(tm.ESTIMATORS["mdlm"])
CPU = torch.device("cpu")
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


def test_run_trains_packs_reloads_and_scores(single, tiny_env):
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
    ):
        assert re.search(pattern, log, re.MULTILINE), pattern
    code = int(re.search(r"^Code size: (\d+)", log, re.MULTILINE)[1])
    model = int(re.search(r"^Serialized model \S+: (\d+)", log, re.MULTILINE)[1])
    assert code == len(source.encode()) and model == (folder / "logs/one.mdlm").stat().st_size
    assert f": {code + model} bytes\nfinal_" in log
    assert f" train_tokens:{tm.TokenStream(tiny_env['DATA_PATH'], 'train').total}\n" in log
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


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Hyperparameters and log of a run that has begun and ended at once."""
    monkeypatch.chdir(tmp_path)
    hp, log = tiny_hp(run_id="begun"), tm.Log(Path("logs/begun.txt"))
    tm.claim_run(hp, log)
    log("run_id:begun started:now log:logs/begun.txt", screen=False)
    log.lock.close()
    return hp, log.path


def test_scoring_leaves_an_unfinished_run_alone(begun):
    hp, path = begun
    with pytest.raises(tm.InputError, match="RUN_ID=begun was used before"):
        tm.claim_run(dataclasses.replace(hp, eval_only="a.mdlm"), tm.Log(path))
    tm.claim_run(hp, tm.Log(path))


def test_half_a_line_of_an_earlier_life_is_ended(begun):
    hp, path = begun
    with path.open("a") as file:
        file.write("step:3/12 train_lo")
    log = tm.Log(path)
    tm.claim_run(hp, log)
    log("run_id:begun again", screen=False)
    assert path.read_text().endswith("\nstep:3/12 train_lo\nrun_id:begun again\n")


def test_wall_clock_cap_stops_early_and_says_so(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    capped = dict(MAX_WALLCLOCK_SECONDS="1.5", ITERATIONS="100000", TRAIN_LOG_EVERY="0")
    printed = script(**tiny_env | capped).stdout
    early = r"^stopping_early: wallclock_cap train_time:(\d+)ms step:\d+/100000$"
    assert int(re.search(early, printed, re.MULTILINE)[1]) >= 1500


def test_over_the_size_limit_is_loud_and_still_finishes(tiny_env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "SIZE_LIMIT_BYTES", 90_000)
    tm.run(tiny_env | dict(ITERATIONS="1", RUN_ID="big"))
    log = (tmp_path / "logs/big.txt").read_text(encoding="utf-8")
    body = log.split("\n" + "=" * 100 + "\n")[1]
    over = r"^OVER BUDGET: Total submission size fp8\+\S+ is \d+ bytes, \d+ more than allowed$"
    assert re.search(over, body, re.MULTILINE) and "_exact" in body


# ---- What does not change a run


def test_the_same_run_gives_the_same_artifact(single, tiny_env, tmp_path):
    env = tiny_env | dict(RUN_ID="twin", WARMUP_STEPS="2")
    run_python("train_mdlm.py", cwd=tmp_path, **env)
    twin = (tmp_path / "logs/twin.mdlm").read_bytes()
    assert twin == (single[0] / "logs/one.mdlm").read_bytes()


def test_accumulation_does_not_change_the_run(single, tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "FAST_BFLOAT16", FAST_BFLOAT16)  # as in the run it is compared with
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


# ---- Inside a run


class Seconds:
    """A clock that only passes when it is told to."""

    def __init__(self):
        self.now = 1000.0
        self.perf_counter = self.monotonic = lambda: self.now

    def longer(self, act, seconds):
        """`act`, which then takes so many seconds."""

        def call(*arguments, **options):
            self.now += seconds
            return act(*arguments, **options)

        return call


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(some, others, **tolerance):
    return all(torch.allclose(some[name], others[name], **tolerance) for name in others)


class Ring(tm.TokenStream):
    """A split whose digest is what a test says."""

    data = 7
    digest = property(lambda self: self.data, lambda self, value: None)


SCORE, SAVE = tm.score_windows, tm.write_checkpoint  # which a `Watched` run replaces


class Watched:
    """A tiny run in this process: what every step and every validation got, in simulated time.

    A step takes 10 s, the warm-up 70, a checkpoint 300 and a validation 1000.
    """

    def __init__(self, folder, monkeypatch, **overrides):
        small = dict(vocab_size=7, compute_dtype="float32", run_id="w", ema_decay=0.0)
        often = dict(train_log_every=1, val_loss_every=0, checkpoint_every=0.0, warmup_steps=0)
        length = dict(iterations=12, warmdown_iters=6, max_wallclock_seconds=0.0)
        self.hp = tiny_hp(**(small | often | length | overrides))
        sizes = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0, 0])
        luts = tm.ByteTables(sizes, sizes > 3, sizes == 0, keeps_space=False)
        self.val = tm.Split(tm.TokenStream(folder, "val"), luts)
        self.log, self.time = Lines(), Seconds()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(tm, "on_signals", lambda handler: None)
        monkeypatch.setattr(tm.time, "perf_counter", self.time.perf_counter)
        self.trainer = tm.Trainer(self.hp, Ring(folder, "train"), CPU, self.log)
        self.first_windows, self.steps, self.live, self.validations = [], [], [], []
        self.watch(monkeypatch)

    def watch(self, monkeypatch):
        trainer, windows = self.trainer, self.trainer.stream.windows
        average, warm_up = trainer.average_if_due, trainer.warm_up
        step, optimizer_step = trainer.step, trainer.optimizer.step

        def windows_noted(numbers, length, stride=0):
            self.first_windows.append(numbers[0])
            return windows(numbers, length, stride)

        def step_noted(number, scale):
            self.steps.append((number, scale))
            return optimizer_step(number, scale)

        def average_noted():
            average()
            self.live.append(weights_of(trainer.model))

        def score_noted(name, model, hp, split, seqs, *note):
            found = SCORE(name, model, hp, split, seqs, *note)
            about = dict(name=name, passes=hp.nelbo_passes, seqs=seqs, score=found[0])
            self.validations.append(about | dict(weights=weights_of(model)))
            return found

        trainer.stream.windows = windows_noted
        trainer.step = self.time.longer(step, 10.0)
        trainer.optimizer.step = step_noted
        trainer.average_if_due = average_noted
        trainer.warm_up = self.time.longer(warm_up, 70.0)
        monkeypatch.setattr(tm, "score_windows", self.time.longer(score_noted, 1000.0))
        monkeypatch.setattr(tm, "write_checkpoint", self.time.longer(SAVE, 300.0))

    def train(self):
        self.model = tm.train(self.trainer, self.val)
        return self


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Makes a `Watched` run on random tokens, with hyperparameters as keywords."""
    g = np.random.default_rng(0)
    for split, count in (("train", 500), ("val", 90)):
        path = tmp_path / f"fineweb_{split}_000000.bin"
        prepare_text.write_shard(path, g.integers(1, 7, count))
    return functools.partial(Watched, tmp_path, monkeypatch)


def test_every_step_takes_the_next_windows_at_its_own_rate(watched):
    """In micro-batches of two rows; the first one is read once before, to find its place."""
    run = watched(micro_batch_tokens=8).train()
    assert run.first_windows == [0, *range(0, 12 * 4, 2)]
    assert [number for number, _ in run.steps] == list(range(12))
    scales = [min((12 - step) / 6, 1.0) for step in range(12)]
    assert [scale for _, scale in run.steps] == pytest.approx(scales)
    assert not run.log.found("^checkpoint:")  # CHECKPOINT_EVERY=0: only when stopped


def test_rates_and_the_end_follow_the_clock(watched):
    """35 s are four steps of 10 s; the rates of a longer run fall with the time that is left."""
    run = watched(max_wallclock_seconds=35.0, iterations=100).train()
    assert len(run.steps) == 4 and run.trainer.progress.train_ms == 40_000
    early = "stopping_early: wallclock_cap train_time:40000ms step:4/100"
    assert early in run.log.lines
    run = watched(max_wallclock_seconds=140.0, iterations=100, warmdown_iters=4).train()
    assert [scale for _, scale in run.steps] == pytest.approx([1.0] * 11 + [0.75, 0.5, 0.25])
    run = watched(max_wallclock_seconds=120.0, iterations=1000, ema_decay=0.8, ema_start_frac=0.25)
    run.train()  # 12 steps, averaged from a quarter of the time on
    assert len(run.steps) == 12 and run.trainer.optimizer.averages == 10
    exact = watched(max_wallclock_seconds=30.0, iterations=3).train()
    assert not exact.log.found("^stopping_early")


def test_the_host_is_one_step_ahead_at_most(watched):
    """Before each step it waits for the one before, so that its clock is that of the device."""
    run, calls = watched(iterations=2), []
    run.trainer.step_done = SimpleNamespace(
        synchronize=lambda: calls.append("wait"), record=lambda: calls.append("record")
    )
    run.train()
    assert calls == ["wait", "record"] * 2


def averages(weights, decay):
    """The average after each of the steps."""
    found = [weights[0]]
    for later in weights[1:]:
        before = found[-1]
        found.append({n: decay * before[n] + (1 - decay) * later[n] for n in later})
    return found


def test_the_average_is_what_is_validated_and_kept(watched):
    """From the third of 12 steps on, which is where a quarter of the run is done."""
    run = watched(ema_decay=0.8, ema_start_frac=0.25, val_loss_every=2).train()
    expected = [*run.live[:2], *averages(run.live[2:], 0.8)]
    assert len(run.live) == 12 and not equal(expected[-1], run.live[-1], atol=1e-4)
    seen = [about["weights"] for about in run.validations]
    for step, weights in zip(range(2, 13, 2), seen, strict=True):
        assert equal(weights, expected[step - 1], atol=1e-6), step
    assert equal(weights_of(run.model), expected[-1], atol=1e-6)


def test_without_an_average_the_last_weights_are_kept(watched):
    run = watched(ema_decay=0.0, ema_start_frac=0.0).train()
    assert (
        equal(weights_of(run.model), run.live[-1], atol=0) and run.trainer.optimizer.averages == 0
    )


def test_pauses_are_not_training_time(watched):
    run = watched(val_loss_every=5, checkpoint_every=45.0, warmup_steps=1).train()
    assert run.log.found(
        r"^step:(\d+)/12 train_loss:\S+ train_time:(\d+)ms step_avg:10000.00ms$"
    ) == [(str(step), str(10_000 * step)) for step in range(1, 13)]
    saved = run.log.found(r"^checkpoint:logs/w.000000(\d\d).ckpt time:(\d+)ms$")
    assert saved == [("05", "300000"), ("10", "300000"), ("12", "300000")]
    left = sorted(path.name for path in Path("logs").iterdir())
    assert left == ["w.00000010.ckpt", "w.00000012.ckpt"]
    pauses = "warm-up 80.0 s, checkpoints 900.0 s, validation 3000.0 s"
    assert f"Training time: 120.0 s; not counted: {pauses}" in run.log.lines


def test_a_pause_begins_and_ends_when_the_device_is_idle(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda device=None: seen.append("wait"))
    clock = tm.Clock(CPU)
    seen.clear()
    with clock.paused("validation"):
        seen.append("work")
    assert seen == ["wait", "work", "wait"]


def test_the_step_that_is_still_running_is_training_time(watched, monkeypatch):
    """A device that needs 5 s more for each step than the host, which waits for it in pauses."""
    run = watched(iterations=3, warmup_steps=0)
    step, left = run.trainer.step, []

    def step_begun(*arguments):
        left.append(5.0)
        return step(*arguments)

    def synchronize(device=None):
        run.time.now += sum(left)
        left.clear()

    run.trainer.step = step_begun
    monkeypatch.setattr(torch.cpu, "synchronize", synchronize)
    run.train()
    assert run.trainer.progress.train_ms == 45_000
    assert run.log.found(r"^step:3/3 (\w+):\S+ .*train_time:45000ms") == ["train_loss", "val_loss"]
    assert run.log.found("^Training time: 45.0 s; ")


def test_budgets_of_time_that_a_run_exceeds_are_said(watched, monkeypatch):
    run = watched(iterations=61, scores="").train()
    assert "OVER BUDGET: Training time is 610.0 s, 9.0 more than allowed" in run.log.lines
    score = tm.Score(
        bpb=1.0, stderr=0.1, loss=1.0, seqs=9, tokens=36, bytes=36, ms=5.0, boundary_bits=0.0
    )
    found = score, torch.ones(1, 1, 2)
    monkeypatch.setattr(tm, "score_windows", run.time.longer(lambda *_: found, 601.0))
    tm.score_model(tm.Artifact(run.model, run.hp, "fp8+lzma"), run.hp, run.val, run.log)
    assert run.log.lines[-1] == "OVER BUDGET: Evaluation time is 601.0 s, 1.0 more than allowed"


def test_memory_is_in_mib():
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert int(tm.peak_memory(CPU).split()[0]) == pytest.approx(kib / 1024, abs=20)


def test_a_resumed_run_goes_on_where_it_was(watched):
    """In time, data, rates and averages, with the same weights at the end."""
    whole = watched(ema_decay=0.8, checkpoint_every=50.0).train()
    Path("logs/w.00000012.ckpt").unlink()
    again = watched(ema_decay=0.8, checkpoint_every=50.0)
    again.trainer.resume()
    again.train()
    assert again.steps == whole.steps[10:] and again.first_windows[1:] == [40, 44]
    assert again.trainer.progress.train_ms == 120_000
    assert equal(weights_of(again.model), weights_of(whole.model), atol=0)
    assert "Training time: 120.0 s; not counted: warm-up 70.0 s" in "\n".join(again.log.lines)


def test_skipped_steps_are_those_of_all_lives(watched):
    knobs = dict(checkpoint_every=50.0, iterations=5, skip_nonfinite=3)
    run = watched(**knobs)
    run.trainer.optimizer.counts[1] = 2
    run.train()
    again = watched(**knobs)
    again.trainer.resume()
    assert again.trainer.optimizer.counts.tolist() == [5, 2]


def test_validations_are_short_and_logged_as_they_are(watched):
    run = watched(val_loss_every=4, eval_max_seqs=9, nelbo_passes=3).train()
    lines = run.log.found(
        r"^step:(\d+)/12 val_loss:(\S+) val_bpb:(\S+) stderr:(\S+) seqs:9 train_time:(\d+)ms"
    )
    assert [int(step) for step, *_ in lines] == [4, 8, 12]
    for (step, *figures, ms), about in zip(lines, run.validations, strict=True):
        score = about["score"]
        assert (about["name"], about["passes"], about["seqs"]) == ("nelbo", 1, 9)
        wanted = [score.loss, score.bpb, score.stderr]
        assert [float(figure) for figure in figures] == pytest.approx(wanted, abs=5.1e-5)
        assert int(ms) == 10_000 * int(step)


@pytest.mark.parametrize("every, steps", [(0, []), (4, [*range(1, 11), 12]), (5, range(1, 11))])
def test_log_lines_are_of_the_first_ten_steps_and_then_every_so_often(watched, every, steps):
    run = watched(train_log_every=every).train()
    found = run.log.found(r"^step:(\d+)/12 train_loss:")
    assert [int(step) for step in found] == list(steps)


def test_the_logged_loss_is_that_of_the_step(watched):
    """Σ weight · nll over the tokens of the batch, by the weights before the step."""
    run = watched(iterations=1)
    trainer, expected = run.trainer, 0.0
    for batch in trainer.batches(0):
        logits = trainer.model(batch.z, batch.masked_fraction).detach().double().flatten(0, 1)
        nll = -logits.log_softmax(-1)[batch.positions, batch.targets]
        expected += (nll * batch.weights).sum().item() / 16
    run.train()
    (loss,) = run.log.found(r"^step:1/1 train_loss:(\S+) ")
    assert float(loss) == pytest.approx(expected, abs=5.1e-5)


def test_a_warm_up_leaves_nothing_behind(watched):
    """Not even of a step that was not finite, or of a token that found no place."""
    run = watched(warmup_steps=3)
    optimizer, twin = run.trainer.optimizer, watched().trainer.optimizer
    optimizer.first_bad[0], optimizer.dropped[...] = 5.0, 2.0
    run.trainer.capacity = 1
    run.trainer.warm_up()
    assert [number for number, _ in run.steps] == [0, 1, 2]
    assert optimizer.first_bad[0] == 5.0 and optimizer.dropped == 2.0
    for name in ("state", "counts", "grads"):
        assert torch.equal(getattr(optimizer, name), getattr(twin, name)), name
    assert optimizer.averages == 0


@pytest.mark.parametrize("block", [0, 2])
def test_a_restart_validates_what_was_not_validated(watched, block):
    """A checkpoint is made before the validation of its step."""
    watched = functools.partial(watched, block_size=block, ema_decay=0.8, ema_start_frac=0.5)
    whole = watched(val_loss_every=4, checkpoint_every=40.0)
    whole.train()
    saved = whole.trainer.progress
    again = watched(val_loss_every=4, checkpoint_every=40.0)
    Path("logs/w.00000012.ckpt").unlink()
    again.trainer.resume()
    assert again.trainer.optimizer.averages == 3
    assert again.log.found(r"^resumed:logs/w.00000008.ckpt step:8/12 train_time:80000ms$")
    again.train()
    assert [about["score"].bpb for about in again.validations] == [
        about["score"].bpb for about in whole.validations[1:]
    ]
    assert again.trainer.progress == saved


def test_what_is_packed_is_the_average_and_what_is_scored_is_the_file(watched):
    storage = dict(quant_mode="int4,embed:fp32", quant_feedback=2)
    run = watched(ema_decay=0.8, ema_start_frac=0.0, iterations=5, micro_batch_tokens=8, **storage)
    artifact = tm.train_and_pack(run.trainer, run.val)
    average = averages(run.live, 0.8)[-1]
    assert torch.allclose(artifact.model.tok_emb.weight, average["tok_emb.weight"], atol=1e-6)
    assert run.first_windows[-4:] == [0, 2, 4, 6]  # the batches for the error feedback
    predicted = tm.predicted_bytes(run.hp)
    line = f"Predicted submission size: {predicted} bytes for normal weights"
    assert line in run.log.lines
    on_disk = weights_of(tm.load_artifact("logs/w.mdlm")[0])
    assert equal(weights_of(artifact.model), on_disk, atol=0)
    matrix = artifact.model.blocks[0].mlp.fc.weight
    assert all(len(row.unique()) <= 15 for row in matrix)  # as stored, not as trained
    parameters = sum(p.numel() for p in run.trainer.model.parameters())
    assert f"model_params:{parameters}" in run.log.lines
    assert "world_size:1 grad_accum_steps:2 compute_dtype:float32" in run.log.lines
    trained = trained_model(run.hp, average)
    moments = tm.input_moments(trained, itertools.chain(*map(run.trainer.batches, (0, 1))))
    tm.save_artifact(trained, run.hp, "expected.mdlm", moments)
    assert equal(on_disk, weights_of(tm.load_artifact("expected.mdlm")[0]), atol=1e-6)


def trained_model(hp, weights):
    """A model with these weights."""
    model = tm.build_model(hp)
    model.load_state_dict(weights)
    return model


def test_steps_that_are_not_finite_are_allowed_as_often_as_asked(watched):
    """Each is told of once; the one too many ends the run, and so do bad weights."""
    run = watched(skip_nonfinite=2)
    trainer, optimizer = run.trainer, run.trainer.optimizer
    for number in (1, 2):
        optimizer.grads[0] = math.nan
        trainer.progress.step = number
        optimizer.step(number, 1.0)
        trainer.check()
        trainer.check()
    bad = r"^step:(\d) not finite: loss 0.0, gradients: matrix \(\S+, …\); skipped:(\d)$"
    assert run.log.found(bad) == [("1", "1"), ("2", "2")]
    optimizer.grads[0] = math.inf
    optimizer.step(3, 1.0)
    with pytest.raises(tm.InputError, match="step:3 not finite: .*; skipped:3; lower the learning"):
        trainer.check()
    optimizer.first_bad.zero_()
    trainer.check()
    optimizer.state[3, 0] = math.inf  # in the average
    with pytest.raises(tm.InputError, match="step:2 the weights are not finite"):
        trainer.check()


def second_signal():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("told_to_stop", "ends"),
    [
        (lambda: True, contextlib.nullcontext()),
        (second_signal, pytest.raises(KeyboardInterrupt)),
    ],
)
def test_a_validation_ends_at_once_where_all_processes_agree(watched, told_to_stop, ends):
    """Not for what happens to one of them, such as a second signal; the weights are back then."""
    run = watched(ema_decay=0.5)
    optimizer = run.trainer.optimizer
    optimizer.update_average()
    optimizer.weights += 1
    before = optimizer.weights.clone()
    with ends:
        run.trainer.validate(run.val, told_to_stop)
    assert torch.equal(optimizer.weights, before) and not run.log.found("val_bpb")


def test_nothing_is_validated_or_saved_that_was_not_checked(watched):
    for act in ("validate", "save"):
        run = watched()
        run.trainer.optimizer.dropped += 2
        arguments = [run.val, lambda fraction: None] if act == "validate" else []
        with pytest.raises(tm.InputError, match="2 masked tokens had no place"):
            getattr(run.trainer, act)(*arguments)
        assert not run.log.lines and not Path("logs").exists()


def test_other_data_end_a_restart(watched):
    watched(checkpoint_every=50.0, iterations=5).train()
    again = watched(checkpoint_every=50.0, iterations=5)
    again.trainer.stream.data = 8
    with pytest.raises(tm.InputError, match="00000005.ckpt was made with other shards"):
        again.trainer.resume()
    again.trainer.stream.data = 7
    again.trainer.resume()
    assert again.trainer.progress.step == 5


def test_what_changes_the_result_may_not_change_in_a_restart(watched):
    run = watched()
    state = dict(state=None, counts=None, averages=0, data=0)
    checkpoint = tm.Checkpoint(run.hp, tm.Progress(), **state)
    result = dict(num_layers=2, mask_mean=0.3, iterations=13, seed=5, beta1=0.8, ema_decay=0.7)
    work = dict(data_path="x", micro_batch_tokens=4, quant_mode="int4", scores="", run_id="x")
    work |= dict(val_loss_every=3, compile="off", nelbo_passes=1)
    for changes, matters in ((result, True), (work, False)):
        for name, value in changes.items():
            found = checkpoint.changed_settings(dataclasses.replace(run.hp, **{name: value}))
            assert found == ([run.hp.shown(name)] if matters else []), name


def test_hyperparameters_of_a_run_are_resolved(monkeypatch):
    """The dtype is what the device does, the RUN_ID tells time and preset; an artifact's predictor
    stays as it is, whatever the preset."""
    monkeypatch.setattr(tm.time, "strftime", lambda form: "now")
    golf = tm.Hyperparameters(preset="golf")
    found = tm.resolve_hyperparameters(dict(PRESET="golf"), CPU)
    assert (found.run_id, found.compute_dtype) == (f"now-{os.getpid()}_golf", "float32")
    assert dataclasses.replace(found, run_id="", compute_dtype="auto") == golf
    given = dict(PRESET="golf", RUN_ID="x", COMPUTE_DTYPE="bfloat16")
    expected = dataclasses.replace(golf, run_id="x", compute_dtype="bfloat16")
    assert tm.resolve_hyperparameters(given, CPU) == expected
    stored = tm.Hyperparameters(preset="llada", num_layers=2, compute_dtype="bfloat16")
    env = dict(EVAL_ONLY="a.mdlm", RUN_ID="e", SCORES="l2r")
    expected = dataclasses.replace(stored, eval_only="a.mdlm", run_id="e", scores="l2r")
    for more in ({}, dict(COMPUTE_DTYPE="auto"), dict(NUM_LAYERS="2")):
        artifact = tm.Artifact(None, stored, "fp8+lzma")
        assert tm.resolve_hyperparameters(env | more, CPU, artifact) == expected


def test_what_is_asked_of_an_artifact_is_measured_by_its_own_values():
    """Not by those of the default preset."""
    stored = tm.Hyperparameters(preset="block", train_seq_len=96)
    artifact = tm.Artifact(None, stored, "fp8+lzma")
    env = dict(EVAL_ONLY="a.mdlm", RUN_ID="e")
    found = tm.resolve_hyperparameters(env | dict(BLOCK_SIZE="6"), CPU, artifact)
    assert (found.block_size, found.train_seq_len) == (6, 96)
    for name, value in (("BLOCK_SIZE", "0"), ("COMPUTE_DTYPE", "bfloat16"), ("NUM_LAYERS", "9")):
        with pytest.raises(
            tm.InputError, match=f"^{name}={value}, but a.mdlm was made with {name}"
        ):
            tm.resolve_hyperparameters(env | {name: value}, CPU, artifact)
    with pytest.raises(tm.InputError, match="BLOCK_SIZE=5 must divide TRAIN_SEQ_LEN=96"):
        tm.resolve_hyperparameters(env | dict(BLOCK_SIZE="5"), CPU, artifact)


def test_log_lines_of_an_artifact_have_its_figures(watched, tmp_path, monkeypatch):
    run = watched()
    about = dict(storage="int7", packer="lzma", entropy_bits=3000.0)
    kinds = dict(
        matrix=about | dict(bytes=500, weights=800, packed_bytes=dict(zlib=510, lzma=500)),
        gain=dict(about, storage="fp16", bytes=300, weights=150, packed_bytes=dict(lzma=300)),
    )
    made = dict(artifact_bytes=950, label="int7+lzma", kinds=kinds)
    monkeypatch.setattr(tm, "save_artifact", lambda *what: made if what == given else None)
    given = ("model", run.hp, tmp_path / "a.mdlm", "moments")
    tm.write_artifact("model", "moments", run.hp, tmp_path / "a.mdlm", run.log)
    code = (ROOT / "train_mdlm.py").stat().st_size
    assert run.log.lines == [
        "kind:matrix storage:int7 weights:800 bytes:500 bits_per_weight:5.000 entropy:3.750 "
        "zlib:510 lzma:500",
        "kind:gain storage:fp16 weights:150 bytes:300 bits_per_weight:16.000 entropy:20.000 "
        "lzma:300",
        f"Code size: {code} bytes",
        "Serialized model int7+lzma: 950 bytes (8.000 bits per weight)",
        f"Total submission size int7+lzma: {code + 950} bytes",
    ]


def test_a_budget_is_over_if_it_is_more_than_its_limit(watched):
    log = watched().log
    log.budget("Training time", 601.0, 601.0, "s", "; not counted: nothing")
    log.budget("Evaluation time", 601.25, 600.0, "s")
    assert log.lines == [
        "Training time: 601.0 s; not counted: nothing",
        "Evaluation time: 601.2 s",
        "OVER BUDGET: Evaluation time is 601.2 s, 1.2 more than allowed",
    ]


# ---- Two processes, looked at from inside


def in_two_processes(work, folder):
    """[work(0), work(1)], in two forked processes that are a group."""
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            status = 1
            try:
                meeting = dict(init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
                dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **meeting)
                (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [0, 0]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize("block", [0, 2])
def test_two_processes_share_a_batch_and_take_one_step(watched, tmp_path, block):
    """Of micro-batches of one row: which rows; and loss, weights and moments are those of one
    process."""
    small = dict(micro_batch_tokens=4, tie_embeddings=False, num_layers=4, block_size=block)

    def step_twice(rank):
        run = watched(**small)
        trainer = run.trainer
        losses = [trainer.step(number, 1.0).item() for number in (0, 1)]
        moments = tm.input_moments(trainer.model, trainer.batches(2))
        return run.first_windows, losses, trainer.optimizer.state, moments

    alone = step_twice(None)
    pair = in_two_processes(step_twice, tmp_path)
    assert [rows for rows, *_ in pair] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert alone[0] == list(range(12))
    for _, losses, state, moments in pair:
        assert losses == pytest.approx(alone[1], abs=1e-5)
        assert torch.allclose(state, alone[2], atol=1e-4)
        assert moments.keys() == alone[3].keys() and equal(moments, alone[3], rtol=1e-3)


def test_two_processes_agree_on_time_signals_and_files(watched, tmp_path):
    def agree(rank):
        run = watched()
        clock = tm.Clock(CPU)
        run.time.now += 2.0 + 4.0 * rank
        before = clock.read()
        if rank == 1:
            clock.stop()
        found = [before, clock.read(), tm.on_first_process(lambda: f"of {rank}")]
        with pytest.raises(tm.InputError, match="gone: cannot be read or written"):
            tm.on_first_process((tmp_path / "gone").read_bytes if rank == 0 else None)
        return found

    for found in in_two_processes(agree, tmp_path):
        assert found == [(4000.0, False), (4000.0, True), "of 0"]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_two_processes_share_the_matrices_of_muon(tmp_path, count):
    """Also if there are fewer matrices than processes."""
    stack = torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0))
    for found in in_two_processes(lambda rank: tm.orthogonalize_shared(stack, 5), tmp_path):
        assert torch.allclose(found, tm.orthogonalize(stack, 5), atol=1e-6)


def test_one_process_that_is_told_to_stop_stops_all(watched, tmp_path):
    """Where all are at the same place: their next collective is the same one."""

    def stop_one(rank):
        run = watched()
        model = run.trainer.model
        with pytest.raises(tm.ToldToStop):
            tm.score_windows("nelbo", model, run.hp, run.val, 0, lambda: rank == 1)
        return tm.all_reduce(torch.ones(3)).tolist()

    assert in_two_processes(stop_one, tmp_path) == [[2.0] * 3] * 2


def test_the_first_process_says_where_a_run_goes_on(watched, tmp_path):
    """The other one may be on a machine without checkpoints."""
    knobs = dict(checkpoint_every=50.0, iterations=5)
    watched(**knobs).train()
    (tmp_path / "there").mkdir()

    def resume(rank):
        run = watched(**knobs)
        if rank:
            os.chdir(tmp_path / "there")
        run.trainer.resume()
        return run.trainer.progress.step

    assert in_two_processes(resume, tmp_path) == [5, 5]


def test_the_hardware_line_counts_processes(tmp_path):
    for found in in_two_processes(lambda rank: tm.hardware(CPU), tmp_path):
        assert found.startswith("2xCPU_")


def test_two_processes_score_every_window_once(watched, tmp_path):
    """Each its own share of them, and both get the same score."""
    hp = dict(anchor_bos=True, val_batch_size=24)

    def score(rank):
        run = watched(**hp)
        seen, batches = [], tm.WindowPlan.batches

        def noted(plan, split):
            assert plan.rows == (6 if rank is None else 3)  # VAL_BATCH_SIZE is that of all
            for batch, windows in batches(plan, split):
                seen.extend(windows.places)
                yield batch, windows

        tm.WindowPlan.batches = noted
        try:
            found, table = tm.score_windows("l2r", run.trainer.model, run.hp, run.val, 0)
        finally:
            tm.WindowPlan.batches = batches
        return seen, found._replace(ms=0), table

    seen, alone, table = score(None)
    pair = in_two_processes(score, tmp_path)
    assert seen == list(range(22)) and alone.boundary_bits > 0
    assert sorted(pair[0][0] + pair[1][0]) == seen and abs(len(pair[0][0]) - 11) <= 3
    for _, together, own in pair:
        assert together == pytest.approx(alone, rel=1e-6) and torch.allclose(own, table, rtol=1e-5)


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
        (RuntimeError("shapes\ndiffer"), "RuntimeError: shapes differ"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_reason_of_an_end_is_the_right_one(error, text):
    assert tm.explain(error).startswith(text)
    assert bool(tm.foreseen(error)) is ("shapes" not in text)


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
    run_id = f"lost{os.getpid()}"
    env = tiny_env | dict(ITERATIONS="1000000", RUN_ID=run_id)
    process = torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, **env)
    for line in process.stdout:
        if line.startswith("step:5/"):
            break
    wanted = {b"LOCAL_RANK=1", f"RUN_ID={run_id}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted <= set(path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # ended meanwhile, or another user's
            continue
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "final_" not in rest
    assert not list((tmp_path / "logs").glob("*.mdlm"))
    log = (tmp_path / f"logs/{run_id}.txt").read_text(encoding="utf-8")
    ends = "another process of the group is lost: |stopped by a signal"
    assert re.search(rf"^error: rank:0 ({ends})", log, re.MULTILINE)


def test_why_a_process_is_lost_is_all_in_its_line(monkeypatch):
    def collective():
        raise RuntimeError("NCCL error in: file.cpp:1\nLast error:\nno room in /dev/shm")

    monkeypatch.setattr(tm, "world_size", lambda: 2)
    with pytest.raises(tm.InputError) as stop:
        tm.run_collective(collective)
    lost = "another process of the group is lost: "
    assert (
        tm.foreseen(stop.value)
        == f"{lost}NCCL error in: file.cpp:1 Last error: no room in /dev/shm"
    )


def test_a_diverged_run_prints_no_score(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    rates = dict.fromkeys(("SCALAR_LR", "TIED_EMBED_LR", "MATRIX_LR"), "1e12")
    done = script(**tiny_env | rates | dict(ITERATIONS="20"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not finite" in done.stderr or "not a finite number" in done.stderr
    assert "val_bpb:nan" not in done.stdout and "final_" not in done.stdout


def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch):
    """A driver that is too old for torch would otherwise end in a run on CPUs."""
    exists = os.path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl" or exists(path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(tm.InputError, match="torch cannot use the GPUs here: .*CUDA_VISIBLE_DEV"):
        tm.start_processes()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert tm.start_processes() == torch.device("cpu")
