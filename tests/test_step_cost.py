"""tools/step_cost.py: what it predicts follows from the counts, by hand.

The counts themselves are in test_cuda_paths.py.
"""

import collections
import json
import subprocess
import sys

import absent_gpu
import common
import lowering
import pytest
import step_cost
import torch
from conftest import ROOT
from lowering import Counts, Kernel
from step_cost import GPUS, Machine, Rates

import train_mdlm as tm
from train_mdlm import InputError

RATES = Rates(
    matmul=500.0,
    attention=400.0,
    flex=200.0,
    memory=2.0,
    link=100.0,
    start=3.0,
    collective=20.0,
    compiled_launch=4.0,
    eager_launch=7.0,
)
H100 = Machine(GPUS["H100"], RATES, processes=4)


def kernel(part="loss", kind="fused", name="", compiled=True, flops=0, nbytes=0, head_dim=0):
    return Kernel(part, kind, name, compiled, flops, nbytes, head_dim)


def counts_of(kernels: dict, **changes) -> Counts:
    facts = dict(graphs=dict(loss=1), peak_bytes=9 * 10**9, host_reads=0)
    facts |= dict(tokens=1000, micro_batches=1)
    return Counts(collections.Counter(kernels), **(facts | changes))


# ---- A kernel


@pytest.mark.parametrize(
    "found, expected",
    [
        # 10^12 FLOP at 500 TFLOP/s are 2 ms, 10^9 bytes at 2 TB/s half of one
        (kernel(kind="matrix product", flops=10**12, nbytes=10**9), 2e-3 + 3e-6),
        (kernel(kind="matrix product", flops=10**11, nbytes=10**9), 0.5e-3 + 3e-6),
        (kernel(nbytes=4 * 10**9), 2e-3 + 3e-6),
        (kernel(), 3e-6),
        # heads of 72 are padded to 128
        (kernel(kind="attention", flops=9 * 10**11, head_dim=72), 4e-3 + 3e-6),
        (kernel(kind="attention", flops=9 * 10**11, head_dim=64), 2.25e-3 + 3e-6),
        (kernel(kind="flex attention", flops=9 * 10**11, head_dim=128), 4.5e-3 + 3e-6),
        # a ring of 4: all-reduce sends 2 · 3/4 of the bytes, all-gather 3/4, at 100 GB/s
        (kernel(kind="collective", name="all_reduce", nbytes=10**8), 1.5e-3 + 20e-6),
        (kernel(kind="collective", name="all_gather_into_tensor", nbytes=10**8), 0.75e-3 + 20e-6),
    ],
)
def test_a_kernel_takes_as_long_as_its_tightest_limit(found, expected):
    assert H100.device_seconds(found) == pytest.approx(expected)


def test_heads_that_are_wider_than_every_kernel_are_not_padded():
    wide = kernel(kind="attention", flops=10**12, head_dim=300)
    assert H100.padded(wide) == 10**12
    assert H100._replace(gpu=GPUS["A100"]).padded(wide._replace(head_dim=72)) == 96 / 72 * 10**12


def test_the_rates_assumed_are_shares_of_the_data_sheet():
    """On an H100 about 600 TFLOP/s of matrix products and 2.75 TB/s of fused kernels."""
    for gpu in GPUS.values():
        rates = step_cost.assumed_rates(gpu)
        assert 0 < rates.flex < rates.attention < rates.matmul < gpu.tflops
        assert 0.7 * gpu.memory_tbps < rates.memory < gpu.memory_tbps
        assert 0 < rates.link < gpu.link_gbps
    h100 = step_cost.assumed_rates(GPUS["H100"])
    assert h100.matmul == pytest.approx(600, rel=0.02)
    assert h100.memory == pytest.approx(2.75, rel=0.01)


# ---- A step

STEP = {
    kernel(kind="matrix product", flops=10**12, nbytes=10**9): 3,
    kernel("gradients", "matrix product", flops=10**12): 6,
    kernel(kind="attention", flops=9 * 10**11, head_dim=72): 1,
    kernel("gradients", "attention", flops=225 * 10**10, head_dim=72): 1,
    kernel(nbytes=2 * 10**9): 4,
    kernel("gradients", "eager", compiled=False): 10,
    kernel("optimizer", "matrix product", compiled=False, flops=10**10): 5,
    kernel("average", "eager", compiled=False, nbytes=10**9): 1,
    kernel("optimizer", "collective", "all_reduce", compiled=False, nbytes=10**8): 1,
    kernel("batch", "eager", compiled=False): 7,
}


def test_the_parts_are_disjoint_and_add_up():
    counts = counts_of(STEP)
    found = step_cost.predict(counts, H100)
    assert sum(part.kernels for part in found.parts) == counts.kernels.total()
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.device_seconds)
    parts = {part.title: part for part in found.parts}
    products = parts["matrix products"]
    assert (products.kernels, products.flops, products.nbytes) == (9, 9e12, 3e9)
    assert products.seconds == pytest.approx(9 * (2e-3 + 3e-6))
    assert parts["attention"].seconds == pytest.approx(4e-3 + 10e-3 + 2 * 3e-6)
    assert parts["optimizer"].kernels == 6
    assert parts["collectives"].seconds == pytest.approx(1.52e-3)
    assert [parts[name].bound for name in ("matrix products", "fused kernels", "batch")] == [
        "compute",
        "memory",
        "start",
    ]


def test_tokens_and_the_share_of_the_peak_follow_from_the_time():
    """Backward counts as two forwards, and padding and the optimizer not at all."""
    found = step_cost.predict(counts_of(STEP), H100)
    assert found.seconds == found.device_seconds > found.host_seconds
    assert found.tokens_per_s == pytest.approx(4 * 1000 / found.seconds)
    useful = 9e12 + 3 * 9e11
    assert found.share_of_peak == pytest.approx(useful / found.seconds / 989.4e12)
    assert found.memory_gb == 11 and found.fits


def test_a_step_of_small_kernels_waits_for_the_host():
    small = {kernel(compiled=False): 100, kernel(): 100}
    found = step_cost.predict(counts_of(small), H100)
    assert found.device_seconds == pytest.approx(200 * 3e-6)
    assert found.seconds == found.host_seconds == pytest.approx(100 * 7e-6 + 100 * 4e-6)


def test_what_does_not_fit_is_said():
    counts = counts_of(STEP, peak_bytes=23 * 10**9)
    machine = Machine(GPUS["4090"], RATES, 8)
    found = step_cost.predict(counts, machine)
    assert not found.fits
    assert "25.0 of 24: DOES NOT FIT" in step_cost.speed_table({"4090": found}, 8)


# ---- The command


@pytest.fixture
def counted(monkeypatch):
    """Instead of half a minute of counting; what was asked for."""
    asked = []

    def count_step(hp, processes):
        asked.append((hp, processes))
        return counts_of(STEP, tokens=hp.train_batch_tokens // processes)

    monkeypatch.setattr(lowering, "count_step", count_step)
    return asked


def test_tables_are_markdown(tool, counted):
    done = tool(step_cost, "golf", "NUM_LAYERS=2", "--gpu", "H100", "A10G", "--gpus", "4")
    assert done.returncode == 0, done.stderr
    [(hp, processes)] = counted
    assert (hp.preset, hp.num_layers, processes) == ("golf", 2, 4)
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in tables] == [7] * 10 + [9] * 4 + [6] * 5
    assert "ms on H100" in tables[0] and tables[9].startswith("| all | 39 |")
    assert "| 4 x H100 |" in done.stdout and "| 4 x A10G |" in done.stdout


def test_json_has_every_kernel_and_figure(tool, counted):
    done = tool(step_cost, "mdlm", "--gpus", "4", "--json", "--rates", "matmul=500", "memory=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hyperparameters"]["model_dim"] == 576
    assert sum(kernel["times"] for kernel in found["counts"]["kernels"]) == 39
    parts = {part["title"]: part for part in found["predictions"]["H100"]["parts"]}
    start = 1e-6 * step_cost.assumed_rates(GPUS["H100"]).start
    assert parts["matrix products"]["seconds"] == pytest.approx(9 * (2e-3 + start))


@pytest.mark.slow
def test_the_command_counts_and_predicts(tool):
    pytest.importorskip("triton", reason="needs triton: requirements-dev.txt")
    if not absent_gpu.compiler():
        pytest.skip("needs Linux and g++")
    done = tool(step_cost, "demo", "NUM_LAYERS=2", "--gpus", "1", "--gpu", "A10G")
    assert done.returncode == 0, done.stderr
    assert "compiled graphs: 1 loss + 1 gradients" in done.stdout
    assert "host reads: 0" in done.stdout and "| 1 x A10G |" in done.stdout


@pytest.mark.parametrize(
    "options, reason",
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["mdlm", "NUM_LAYERS"], "NUM_LAYERS: give hyperparameters as KNOB=value"),
        (["mdlm", "NUM_LAYER=2"], "unknown hyperparameter num_layer (did you mean num_layers?)"),
        (["mdlm", "NUM_LAYERS=x"], "NUM_LAYERS=x is not a whole number"),
        (["mdlm", "PRESET=golf"], "PRESET=golf: the preset is the first argument"),
        (["mdlm", "--gpu", "B300"], "invalid choice: 'B300'"),
        (["mdlm", "--gpus", "0"], "--gpus 0: give 1 to 1024"),
        (["mdlm", "--rates", "speed=3"], "--rates speed=3: give matmul, "),
        (["mdlm", "--rates", "matmul=fast"], "fast is no positive number"),
        (["mdlm", "--rates", "matmul"], "nothing is no positive number"),
        (["mdlm", "--gpu", "H100", "A100", "--rates", "matmul=3"], "those of one GPU"),
    ],
)
def test_wrong_input_is_one_line(tool, counted, options, reason):
    done = tool(step_cost, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("step_cost.py: error: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert not counted


# ---- What it needs


def test_a_missing_triton_is_one_line(monkeypatch, tool):
    monkeypatch.setitem(sys.modules, "triton", None)
    done = tool(step_cost, "demo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the package triton is missing: pip install -r requirements-dev.txt" in done.stderr


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C.. compiler on Linux: install g"):
        absent_gpu.library(tmp_path)


def test_a_step_that_the_script_refuses_is_its_own_line(monkeypatch):
    """The child's last line."""
    refused = "lowering.py: error: MICRO_BATCH_TOKENS=9 is less than one sequence\n"
    done = subprocess.CompletedProcess([], 2, "", "a warning\n" + refused)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(InputError, match="^MICRO_BATCH_TOKENS=9 is less"):
        lowering.count_steps([lowering.Request({}, 1)], ROOT / "absent_gpu.so")


# ---- How it is counted


def test_memory_is_that_of_the_storages_that_live():
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory = lowering.Memory()
    with FakeTensorMode():
        first = torch.empty(1000, device="cuda")
        view = first.narrow(0, 10, 5)
        memory.hold([first, view, torch.empty(50), None])
        assert memory.live_bytes == memory.peak_bytes == 4000
        second = torch.empty(500, device="cuda", dtype=torch.bfloat16)
        memory.hold([second])
        assert memory.live_bytes == 5000
        del first
        assert memory.live_bytes == 5000
        del view
        assert memory.live_bytes == 1000
        del second
    assert (memory.live_bytes, memory.peak_bytes) == (0, 5000)


def test_operations_are_counted_with_what_they_read_and_write():
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = lowering.Recorder()
    recorder.begin(tm.Hyperparameters(), 1)
    with FakeTensorMode(), lowering.Eager(recorder):
        a, b = (torch.empty(8, 16, device="cuda") for _ in range(2))
        recorder.kernels.clear()
        c = a + b
        c.add_(1)
        c.zero_()
        a.narrow(0, 0, 7) @ b.T
        a.expand(4, 8, 16) + 1
        a.index_select(0, torch.empty(2, dtype=torch.int64, device="cuda"))
        torch.empty(3) + 1  # on the CPU
    bytes_of = collections.defaultdict(list)
    for found, times in recorder.kernels.items():
        bytes_of[found.name] += [found.nbytes] * times
    assert bytes_of["aten.add.Tensor"] == [3 * 512, 512 + 4 * 512]
    assert bytes_of["aten.add_.Tensor"] == [2 * 512]
    assert bytes_of["aten.zero_.default"] == [512]
    assert bytes_of["aten.index_select.default"] == [2 * 2 * 64 + 2 * 8]
    [product] = [k for k in recorder.kernels if k.kind == "matrix product"]
    assert (product.flops, product.nbytes) == (2 * 7 * 16 * 8, 4 * (7 * 16 + 8 * 16 + 7 * 8))
    assert len(recorder.kernels) == 6


def test_masks_of_blocks_leave_tiles_out():
    assert lowering.mask_density(tm.Hyperparameters()) == 1
    block = tm.Hyperparameters(preset="block")
    assert 0.5 < lowering.mask_density(block) < 0.7  # of what noisy tokens may see
    whole = tm.Hyperparameters(preset="block", block_size=1024, block_share=1.0)
    # x_0 and 1024 noisy tokens see themselves, and none of the clean ones: 9 x 9 tiles
    assert lowering.mask_density(whole) == pytest.approx(81 * 128**2 / (1025 * 2049))


def test_the_files_are_beside_the_tool():
    assert absent_gpu.SOURCE.is_file() and absent_gpu.SOURCE.parent == common.TOOLS


# ---- Scores


def test_positions_of_a_window():
    """Every call of the model for it, times its length."""
    of = step_cost.positions_of_a_window
    golf = of(tm.Hyperparameters("golf", nelbo_passes=3, stride=16, chain_group=2, tstep_steps=5))
    expected = dict(nelbo=3 * 1024, l2r=512 * 1024, random=512 * 1024, confidence=512 * 1024)
    expected |= dict(
        sliding=8 * 1024, sliding_nelbo=3 * 1024, ar=1024, tstep=5 * 1024, tgrid=256 * 1024
    )
    assert golf == expected
    block = of(tm.Hyperparameters("block", nelbo_passes=3, train_seq_len=64))
    assert (block["l2r"], block["nelbo"], block["ar"]) == (4 * 144, 3 * 144, 64)
    assert of(tm.Hyperparameters("ar"))["sliding"] == 1024


def test_scores_take_the_time_of_forward_passes():
    """1,000 tokens forward take 2 ms and a start, so 2.003 µs each; four GPUs share them."""
    forward, backward = kernel(nbytes=4 * 10**9), kernel(part="gradients", nbytes=8 * 10**9)
    counts = counts_of({forward: 1, backward: 1})
    hp = tm.Hyperparameters("golf", scores="nelbo:100,l2r:8", final_eval_max_seqs=100)
    assert step_cost.forward_seconds(hp, counts, H100) == pytest.approx(2.003e-6)
    block = tm.Hyperparameters("block")  # 1.625 positions for each token
    assert step_cost.forward_seconds(block, counts, H100) == pytest.approx(2.003e-6 / 1.625)
    table = step_cost.score_table(hp, counts, {"H100": H100})
    each = 2.003e-6 / 4
    nelbo, l2r = 100 * 4 * 1024, 8 * 1024 * 1024
    assert table.splitlines()[2:] == [
        f"| nelbo | 100 | 0.00 | {nelbo * each:.0f} |",
        f"| l2r | 8 | 0.01 | {l2r * each:.0f} |",
        f"| all |  | 0.01 | {(nelbo + l2r) * each:.0f} |",
    ]
    assert "s on 4 x H100" in table.splitlines()[0]
