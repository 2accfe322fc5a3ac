"""What the script does on GPUs, found out without one.

Two ways, both in child processes that have the library of tools/absent_gpu.py, which g++ compiles:
`pretend_cuda.py` runs the script on tensors that say they are on CUDA; tools/lowering.py takes its
step through the compiler as for an H100, which needs the package triton.
"""

import fcntl
import importlib.util
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import absent_gpu
import lowering
import pytest

import train_mdlm as tm

pytestmark = pytest.mark.skipif(not absent_gpu.compiler(), reason="needs Linux and g++")
needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs triton: requirements-dev.txt"
)


def once(tmp_path_factory, name: str, work: Callable[[Path], None]) -> Path:
    """The folder in which work(folder) was done, by whichever worker of pytest came first."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            work(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return once(tmp_path_factory, "library", absent_gpu.library) / "absent_gpu.so"


# ---- As if on CUDA


class Run(NamedTuple):
    """What a program is asked for: see pretend_cuda.py."""

    name: str
    folder: str
    env: dict
    edits: list = []  # noqa: RUF012
    stop_before: int | None = None


class Outcome(NamedTuple):
    """What a run has noted, and the error that ended it."""

    events: list[str]
    error: str

    def steps(self) -> list[list[str]]:
        """What happens from the beginning of each step to that of the next."""
        begins = [place for place, event in enumerate(self.events) if event == "step"]
        return [self.events[begin + 1 : end] for begin, end in itertools.pairwise(begins)]


def pretend(library: Path, folder: Path, runs: list[Run], processes: int = 1) -> None:
    """Does the runs one after the other; each leaves an outcome for each process."""
    file = folder / "runs.json"
    asked = [run._replace(folder=str(folder / run.folder))._asdict() for run in runs]
    file.write_text(json.dumps(asked))
    for run in runs:
        (folder / run.folder).mkdir(exist_ok=True)
    program = Path(__file__).with_name("pretend_cuda.py")
    children = [
        subprocess.Popen(
            [sys.executable, program, file, str(rank), str(processes)],
            env=absent_gpu.environment(library),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    for child in children:
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output


def outcome_in(folder: Path, name: str, rank: int = 0) -> Outcome:
    return Outcome(**json.loads((folder / f"{name}.{rank}.json").read_text()))


MASKED = "nelbo,l2r:2,sliding:2,confidence:2,random:2,tstep:2,tgrid:2"
SYSTEMS = {
    "golf": dict(PRESET="golf", QUANT_FEEDBACK="1", SCORES=MASKED, FINAL_EVAL_T_SAMPLES="2"),
    "mdlm": dict(PRESET="mdlm", EMA_DECAY="0.9", MICRO_BATCH_TOKENS="256"),
    "documents": dict(PRESET="eos", SCORES="nelbo,l2r:2,tstep:2"),
    "ar": dict(PRESET="ar", SCORES="ar,sliding:2"),
    "block": dict(PRESET="block", SCORES="l2r:2,ar:2,nelbo:2,confidence:2,random:2"),
}


def quiet(tiny_env: dict, **changes) -> dict:
    """Environment of a run of some steps between which nothing is due."""
    nothing_due = dict(TRAIN_LOG_EVERY="0", VAL_LOSS_EVERY="0", CHECKPOINT_EVERY="0")
    small = dict(NUM_LAYERS="2", MODEL_DIM="16", NUM_HEADS="2", NUM_KV_HEADS="1", ITERATIONS="4")
    scored = dict(FINAL_EVAL_MAX_SEQS="4", EVAL_MAX_SEQS="4", TSTEP_STEPS="4", NELBO_PASSES="1")
    fixed = dict(COMPILE="off", COMPUTE_DTYPE="auto", RUN_ID="run")
    return tiny_env | nothing_due | small | scored | fixed | changes


class Fault(NamedTuple):
    """An edit of the script that a GPU would punish, and what is noted of it."""

    name: str
    old: str
    new: str
    noted: str
    stop_before: int | None = 3


FAULTS = (
    Fault(
        "a tensor on the CPU in the step",
        "torch.arange(len(u), device=u.device)",
        "torch.arange(len(u))",
        "operands on two devices: aten.add.Tensor",
    ),
    Fault(
        "a generator on the CPU",
        'draw_noise(hp, seeded(device, hp.seed, "train", step))',
        'draw_noise(hp, seeded("cpu", hp.seed, "train", step))',
        "operands on two devices",
    ),
    Fault(
        "numbers of a generator on the device for the CPU",
        "draw = functools.partial(torch.rand, generator=generator, device=generator.device)",
        "draw = functools.partial(torch.rand, generator=generator)",
        "a tensor on None of a generator on cuda",
    ),
    Fault(
        "scores on the device in a table on the CPU",
        "table[batch, :, :2].index_add_(1, bucket, columns.cpu())",
        "table[batch, :, :2].index_add_(1, bucket, columns)",
        "operands on two devices: aten.index_add_",
        stop_before=None,
    ),
    Fault(
        "the loss read in every step",
        "        progress.step += 1\n",
        "        progress.step += 1\n        loss.item()\n",
        "host read aten._local_scalar_dense.default",
    ),
    Fault(
        "a mask whose size is read",
        "    return (nll * batch.weights).sum()\n",
        "    used = batch.weights > 0\n    return (nll[used] * batch.weights[used]).sum()\n",
        "host read aten.index.Tensor of a mask",
    ),
    Fault(
        "a window that is not contiguous when it is pinned",
        "    window = stream.windows(numbers, hp.train_seq_len)\n",
        "    window = stream.windows(numbers, hp.train_seq_len).mT.contiguous().mT\n",
        "waiting copy to the device",
    ),
    Fault(
        "a window that is not pinned",
        "window.pin_memory().to(device, non_blocking=True)",
        "window.to(device, non_blocking=True)",
        "waiting copy to the device",
    ),
)


@pytest.fixture(scope="session")
def one_process(library, tiny_env, tmp_path_factory):
    """The folder of all runs of one process."""
    runs = [Run(name, name, quiet(tiny_env, **changes)) for name, changes in SYSTEMS.items()]
    saving = quiet(tiny_env, **SYSTEMS["mdlm"], CHECKPOINT_EVERY="1e-6")
    runs.append(Run("stopped", "again", saving, stop_before=2))
    runs.append(Run("resumed", "again", saving))
    for fault in FAULTS:
        env, edits = quiet(tiny_env, PRESET="mdlm"), [(fault.old, fault.new)]
        runs.append(Run(fault.name, fault.name, env, edits, fault.stop_before))
    return once(tmp_path_factory, "one", lambda folder: pretend(library, folder, runs))


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_script_runs_on_one_device_to_its_last_score(one_process, system):
    folder = one_process / system
    assert outcome_in(folder, system).error == ""
    log = (folder / "logs/run.txt").read_text()
    assert re.search("^finished:run", log, re.MULTILINE)
    scores = [item.partition(":")[0] for item in SYSTEMS[system].get("SCORES", "nelbo").split(",")]
    bpbs = dict(re.findall(r"^score:(\w+) .*?bpb:(\S+)", log, re.MULTILINE))
    assert all(0 < float(bpbs[score]) < 100 for score in scores)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_never_waits_for_the_device(one_process, system):
    """A copy from pinned memory for each micro-batch, and nothing else."""
    first, *others = outcome_in(one_process / system, system).steps()
    micro_batches = 2 if "MICRO_BATCH_TOKENS" in SYSTEMS[system] else 1
    assert others == [["free copy to the device"] * micro_batches] * 2
    assert set(first) == {"free copy to the device"}


def test_a_resumed_run_ends_in_the_same_bytes(one_process):
    straight, again = one_process / "mdlm", one_process / "again"
    assert outcome_in(again, "stopped").error.startswith("KeyboardInterrupt")
    assert outcome_in(again, "resumed").error == ""
    assert "resumed:logs/run.00000002.ckpt step:2/4" in (again / "logs/run.txt").read_text()
    artifacts = [(folder / "logs/run.mdlm").read_bytes() for folder in (straight, again)]
    assert artifacts[0] == artifacts[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_of_devices_is_noticed(one_process, fault):
    outcome = outcome_in(one_process / fault.name, fault.name)
    events = [event for step in outcome.steps()[1:] for event in step]
    assert fault.noted in "\n".join([*events, outcome.error])


# ---- Two processes

UNEQUAL = ("        all_reduce(self.grads)\n", "        rank() or all_reduce(self.grads)\n")
NOT_CONTIGUOUS = ("    all_reduce(table)\n", "    all_reduce(table.transpose(0, 1))\n")


@pytest.fixture(scope="session")
def two_processes(library, tiny_env, tmp_path_factory):
    """The folder of all runs of two processes."""
    env = quiet(tiny_env, PRESET="mdlm", EMA_DECAY="0.9")
    runs = [
        Run("sound", "sound", env),
        Run("unequal", "unequal", env, [UNEQUAL]),
        Run("strided", "strided", env, [NOT_CONTIGUOUS]),
    ]
    return once(tmp_path_factory, "two", lambda folder: pretend(library, folder, runs, 2))


def outcomes_of_both(two_processes, name: str) -> list[Outcome]:
    return [outcome_in(two_processes / name, name, rank) for rank in range(2)]


def test_two_processes_share_a_step(two_processes):
    """Its collectives are one of all gradients and one for each shape of Muon's matrices; the clock
    asks through the host."""
    outcomes = outcomes_of_both(two_processes, "sound")
    assert [outcome.error for outcome in outcomes] == ["", ""]
    first, second = (outcome.steps()[1:] for outcome in outcomes)
    assert first == second
    for step in first:
        kinds = Counter(re.sub(r"(collective \S+ \w+) .*", r"\1", event) for event in step)
        assert kinds.pop("free copy to the device") == 1
        assert kinds.pop("collective all_reduce gloo") == 1
        assert sum(kinds.values()) == 1 + 4 and all("nccl" in kind for kind in kinds)
    assert "finished:run" in (two_processes / "sound/logs/run.txt").read_text()


def test_a_collective_that_one_process_leaves_out_is_noticed(two_processes):
    for outcome in outcomes_of_both(two_processes, "unequal"):
        assert re.search(r"collective \d+ is .* here and .* on the other process", outcome.error)


def test_a_collective_of_a_view_is_noticed(two_processes):
    for outcome in outcomes_of_both(two_processes, "strided"):
        assert "which are not contiguous" in outcome.error


# ---- Through the compiler

GPUS = 8  # that share a batch of the preset's size
QUICK = ("mdlm", "block")


def two_layers(preset: str) -> tm.Hyperparameters:
    return tm.Hyperparameters(preset=preset, num_layers=2)


@pytest.fixture(scope="session")
def lowered(library, tmp_path_factory):
    """Counts of a step of two layers, by preset."""

    def count(folder, presets):
        requests = [lowering.Request(vars(two_layers(preset)), GPUS, True) for preset in presets]
        for preset, counts in zip(presets, lowering.count_steps(requests, library), strict=True):
            (folder / preset).write_bytes(pickle.dumps(counts))

    def counts_of(preset):
        presets = QUICK if preset in QUICK else [preset]
        folder = once(tmp_path_factory, presets[0], lambda folder: count(folder, presets))
        return pickle.loads((folder / preset).read_bytes())

    return counts_of


def every_preset(function):
    """The test for each preset; the slower ones are marked."""
    presets = [
        pytest.param(preset, marks=() if preset in QUICK else pytest.mark.slow)
        for preset in tm.PRESETS
    ]
    return needs_triton(pytest.mark.parametrize("preset", presets)(function))


def total(counts: lowering.Counts, figure: str, **wanted) -> int:
    """Σ times · figure of the kernels whose part, kind or name is as wanted."""
    return sum(
        times * (1 if figure == "times" else getattr(kernel, figure))
        for kernel, times in counts.kernels.items()
        if all(getattr(kernel, name) == value for name, value in wanted.items())
    )


@every_preset
def test_the_loss_is_one_graph_forward_and_one_backward(lowered, preset):
    counts = lowered(preset)
    assert (counts.graphs["loss"], counts.graphs["gradients"]) == (1, 1)
    assert total(counts, "times", part="loss", compiled=False) == 0


@every_preset
def test_a_pass_of_scoring_is_one_graph(lowered, preset):
    assert lowered(preset).graphs["score"] == 1


@every_preset
def test_a_compiled_step_never_waits_for_the_device(lowered, preset):
    counts = lowered(preset)
    assert counts.host_reads == 0
    assert total(counts, "times", kind="copy") == counts.micro_batches


@every_preset
def test_the_arithmetic_is_that_of_the_matrices(lowered, preset):
    """The last MLP and the head work at scored positions only; backward does each product twice."""
    hp, counts = two_layers(preset), lowered(preset)
    rows = counts.tokens // hp.train_seq_len
    width, length = hp.model_dim, hp.train_seq_len
    scored = tm.scored_capacity(hp, rows)
    if hp.block_size:
        length += hp.noisy_blocks * (hp.block_size + 1)
        scored += counts.tokens
    kv_width = hp.num_kv_heads * hp.head_dim
    qkv, out = width * (width + 2 * kv_width), width * width
    mlp, head = 2 * hp.mlp_mult * width * width, width * hp.vocab_size
    near = len(hp.neighbor_offsets) * hp.neighbor_dim * width
    products = rows * length * (near + 2 * qkv + out + mlp) + scored * (out + mlp + head)
    for part, each in (("loss", 1), ("gradients", 2)):
        found = total(counts, "flops", part=part, kind="matrix product")
        noise = 2e-3 if hp.backbone == "dit" else 0  # what tells it of the noise is not above
        assert found == pytest.approx(2 * each * products, rel=noise or 1e-9)


@every_preset
def test_attention_is_fused_and_leaves_empty_tiles_out(lowered, preset):
    hp, counts = two_layers(preset), lowered(preset)
    for part in ("loss", "gradients"):
        assert total(counts, "times", part=part, kind="attention") == 2
        flex = total(counts, "times", part=part, kind="flex attention")
        assert flex == (2 if hp.block_size else 0)
    length = hp.train_seq_len
    whole = 2 * 4 * counts.tokens * length * hp.model_dim
    found = total(counts, "flops", part="loss", kind="attention")
    assert found == (whole / 2 if hp.causal or hp.block_size else whole)
    assert total(counts, "flops", part="gradients", kind="attention") == 2.5 * found
    if hp.block_size:  # 0.625 rows see their block and the clean ones before it, tiles of 128
        found = total(counts, "flops", part="loss", kind="flex attention")
        assert 0.5 * 0.625 * 1.625 * whole < found < 0.7 * 0.625 * 1.625 * whole


@needs_triton
def test_few_noisy_tokens_with_grouped_heads_have_a_kernel(library):
    """For 80 queries flex attention would choose another kernel, of which it then has none."""
    hp = tm.Hyperparameters(preset="demo", num_layers=1, block_size=4, block_share=0.5)
    assert hp.noisy_blocks * (hp.block_size + 1) == 80 and hp.num_heads == 2 * hp.num_kv_heads
    [counts] = lowering.count_steps([lowering.Request(vars(hp), GPUS, True)], library)
    for part in ("loss", "gradients"):
        assert total(counts, "times", part=part, kind="flex attention") == 1


class Ceiling(NamedTuple):
    """The most that a step of two layers may take; whoever needs less lowers it."""

    products: int  # kernels
    forward: int  # other compiled kernels
    backward: int
    launches: int  # of all
    gigabytes: float  # of compiled kernels
    peak_gigabytes: float


MDLM = Ceiling(27, 26, 36, 392, 14.9, 2.6)
LLADA = Ceiling(44, 30, 48, 339, 2.06, 0.46)
CEILINGS = {
    "mdlm": MDLM,
    "mdlm16": MDLM,
    "golf": Ceiling(30, 30, 40, 471, 17.2, 3.0),
    "block": Ceiling(30, 47, 44, 534, 38.7, 6.8),
    "llada": LLADA,
    "eos": LLADA,
    "ar": Ceiling(27, 25, 33, 341, 14.8, 2.6),
    "demo": Ceiling(30, 29, 37, 466, 0.065, 0.093),
}


@every_preset
def test_kernels_and_bytes_stay_below_their_ceilings(lowered, preset):
    counts = lowered(preset)
    found = Ceiling(
        products=total(counts, "times", kind="matrix product", compiled=True),
        forward=total(counts, "times", part="loss", kind="fused"),
        backward=total(counts, "times", part="gradients", kind="fused")
        + total(counts, "times", part="gradients", kind="scatter"),
        launches=total(counts, "times"),
        gigabytes=total(counts, "nbytes", compiled=True) / 1e9,
        peak_gigabytes=counts.peak_bytes / 1e9,
    )
    for name, ceiling in CEILINGS[preset]._asdict().items():
        assert getattr(found, name) <= ceiling, f"{name} of {found}"
