"""tools/profile_step.py: what it prints follows from the times, by hand; one run on the CPU."""

import os
import re
from types import SimpleNamespace

import profile_step
import pytest
import torch
from conftest import clean_env
from profile_step import Kernel

import train_mdlm as tm


class PretendGpu:
    """A host of 1 ms and a device of 10 ms a step, and the trainer that uses both. The host waits
    for the step before the last, as `tm.Trainer` does."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch, ema_decay=0.0):
        self.hp = SimpleNamespace(ema_decay=ema_decay)
        self.now = self.done = 0.0  # seconds, of the host and of the last step
        self.log = []
        self.optimizer = SimpleNamespace(update_average=lambda: self.log.append("average"))
        monkeypatch.setattr(tm.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        read = tm.Clock.read

        def read_and_log(clock):
            self.log.append("read")
            return read(clock)

        monkeypatch.setattr(tm.Clock, "read", read_and_log)

    def synchronize(self, device):
        self.log.append("wait")
        self.now = max(self.now, self.done)

    def step(self, step, scale):
        self.log.append(f"step {step} at {scale}")
        before, self.now = self.done, self.now + 0.001
        self.done = max(self.now, before) + 0.010
        self.now = max(self.now, before)


# ---- Time


def test_only_what_the_device_did_is_a_kernel(monkeypatch):
    """The profiler also tells of the host's launches, as often as of kernels, without a time."""
    names = {"kernel": 3000.0, "cudaLaunchKernel": 0.0}
    events = [SimpleNamespace(key=k, self_device_time_total=us, count=7) for k, us in names.items()]

    class Profile:
        def __enter__(self):
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    found = profile_step.kernels_of_a_step(PretendGpu(monkeypatch))
    assert found == [Kernel("kernel", 3.0, 7)]


def test_the_mean_is_that_of_training_where_the_host_runs_ahead(monkeypatch):
    """Only the first step waits for the host. If the host waited after each, it would be 11 ms."""
    gpu = PretendGpu(monkeypatch)
    gpu.done = 5.0  # what was before is not measured
    assert profile_step.mean_ms(gpu, 20) == pytest.approx((1 + 20 * 10) / 20)


def test_each_step_reads_the_clock_and_the_ends_wait(monkeypatch):
    gpu = PretendGpu(monkeypatch)
    profile_step.mean_ms(gpu, 2)
    assert gpu.log == ["wait", "step 0 at 0.0", "read", "step 1 at 0.0", "read", "wait"]


def test_the_average_is_a_part_of_the_step_where_there_is_one(monkeypatch):
    gpu = PretendGpu(monkeypatch, ema_decay=0.9)
    profile_step.train_step(gpu, 3)
    assert gpu.log == ["step 3 at 0.0", "average"]


def test_speed_follows_from_the_time():
    hp = tm.Hyperparameters(train_batch_tokens=65_536)
    assert profile_step.speed_lines(40.0, hp, None) == [
        "step:40.00ms tokens_per_s:1,638,400",
        "steps in 600 s:15,000 tokens:0.98 G",
    ]
    predicted = profile_step.speed_lines(40.0, hp, 50.0)[2]
    assert predicted == "predicted:50.00ms measured/predicted:0.80"


# ---- Kernels

KERNELS = [Kernel("cudnn_sdpa_bprop", 6.0, 8), Kernel("a|b\n", 3.0, 2), Kernel("fmha", 1.0, 1)]


def test_the_table_has_the_rest_and_the_sum():
    assert profile_step.kernel_table(KERNELS, 1).splitlines()[2:] == [
        "| cudnn_sdpa_bprop | 8 | 6.00 | 60 % |",
        "| all others | 3 | 4.00 | 40 % |",
        "| all | 11 | 10.00 | 100 % |",
    ]
    assert "| a/b | 2 | 3.00 | 30 % |" in profile_step.kernel_table(KERNELS, 3)
    assert "all others" not in profile_step.kernel_table(KERNELS, 3)


def test_kernels_of_attention_are_known_by_their_names():
    assert profile_step.attention_kernels(KERNELS) == "cudnn_sdpa_bprop, fmha"
    assert profile_step.attention_kernels(KERNELS[1:2]) == "none found"


# ---- The command


@pytest.fixture
def tiny(monkeypatch, tiny_env, tmp_path):
    monkeypatch.setattr(os, "environ", clean_env(**tiny_env))
    monkeypatch.chdir(tmp_path)
    return os.environ


def test_a_step_on_the_cpu(tool, tiny, tmp_path):
    done = tool(profile_step, "--steps", 2, "--rows", 3, "--predicted", "20.5")
    assert done.returncode == 0, done.stderr
    first, speed, *_ = done.stdout.splitlines()
    assert first.startswith("mdlm on 1xCPU") and "512 tokens a step, 1 micro-batches" in first
    ms, tokens_per_s = re.fullmatch(r"step:([\d.]+)ms tokens_per_s:([\d,]+)", speed).groups()
    expected = 1000 * 512 / float(ms)
    assert float(tokens_per_s.replace(",", "")) == pytest.approx(expected, rel=0.01)
    ratio = re.search(r"predicted:20.50ms measured/predicted:([\d.]+)", done.stdout)[1]
    assert float(ratio) == pytest.approx(float(ms) / 20.5, abs=0.006)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 + 2 and table[-1].startswith("| all |")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--steps", 0], "--steps 0: give 1 or more"),
        (["--rows", 0], "--rows 0: give 1 or more"),
        (["--predicted", "fast"], "fast is no number of milliseconds"),
        (["--predicted", "0"], "0 is no number of milliseconds"),
    ],
)
def test_wrong_input_is_one_line(tool, tiny, options, reason):
    done = tool(profile_step, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("profile_step.py: error: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_scoring_alone_has_no_step(tool, tiny):
    tiny["EVAL_ONLY"] = "some.mdlm"
    done = tool(profile_step)
    assert done.returncode == 2
    assert "EVAL_ONLY=some.mdlm: a step of training is measured; unset it" in done.stderr
