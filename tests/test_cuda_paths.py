"""What the script does on GPUs, found out without one.

Two ways, both in child processes that have the library of tools/absent_gpu.py, which g++ compiles:
`pretend_cuda.py` runs the script on tensors that say they are on CUDA; tools/lowering.py takes its
step through the compiler as for an H100, which needs the package triton.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import absent_gpu
import pytest

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(
    not shutil.which(COMPILER), reason=f"needs a C++ compiler: there is no {COMPILER}"
)
needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="needs triton: requirements-dev.txt"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return absent_gpu.library(tmp_path_factory.mktemp("absent_gpu"))


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


def pretend(library: Path, runs: list[Run], file: Path, processes: int = 1) -> dict:
    """Does the runs one after the other; the outcomes of each on each process, by name."""
    file.write_text(json.dumps([run._asdict() for run in runs]))
    for run in runs:
        Path(run.folder).mkdir(exist_ok=True)
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
    return {
        run.name: [
            Outcome(**json.loads(Path(run.folder, f"{run.name}.{rank}.json").read_text()))
            for rank in range(processes)
        ]
        for run in runs
    }


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
        "+ torch.arange(length, device=chosen.device)",
        "+ torch.arange(length)",
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
        "table[batch].index_add_(1, bucket, columns.cpu())",
        "table[batch].index_add_(1, bucket, columns)",
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
        ".unfold(0, 1 + length, length).contiguous()",
        ".unfold(0, 1 + length, length)",
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
def outcomes(library, tiny_env, tmp_path_factory):
    """Of all runs of one process."""
    folder = tmp_path_factory.mktemp("pretend")
    runs = [
        Run(name, str(folder / name), quiet(tiny_env, **changes))
        for name, changes in SYSTEMS.items()
    ]
    saving = quiet(tiny_env, **SYSTEMS["mdlm"], CHECKPOINT_EVERY="1e-6")
    runs.append(Run("stopped", str(folder / "again"), saving, stop_before=2))
    runs.append(Run("resumed", str(folder / "again"), saving))
    for number, fault in enumerate(FAULTS):
        env, own = quiet(tiny_env, PRESET="mdlm"), str(folder / f"fault{number}")
        edits = [(fault.old, fault.new)]
        runs.append(Run(fault.name, own, env, edits, fault.stop_before))
    return folder, pretend(library, runs, folder / "runs.json")


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_script_runs_on_one_device_to_its_last_score(outcomes, system):
    folder, found = outcomes
    [outcome] = found[system]
    assert outcome.error == ""
    log = (folder / system / "logs/run.txt").read_text()
    assert re.search("^finished:run", log, re.MULTILINE)
    scores = [item.partition(":")[0] for item in SYSTEMS[system].get("SCORES", "nelbo").split(",")]
    bpbs = dict(re.findall(r"^score:(\w+) .*?bpb:(\S+)", log, re.MULTILINE))
    assert all(0 < float(bpbs[score]) < 100 for score in scores)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_never_waits_for_the_device(outcomes, system):
    """A copy from pinned memory for each micro-batch, and nothing else."""
    _, found = outcomes
    [outcome] = found[system]
    first, *others = outcome.steps()
    micro_batches = 2 if "MICRO_BATCH_TOKENS" in SYSTEMS[system] else 1
    assert others == [["free copy to the device"] * micro_batches] * 2
    assert set(first) == {"free copy to the device"}


def test_a_resumed_run_ends_in_the_same_bytes(outcomes):
    folder, found = outcomes
    [stopped], [resumed] = found["stopped"], found["resumed"]
    assert stopped.error.startswith("KeyboardInterrupt") and resumed.error == ""
    assert "resumed:logs/run.00000002.ckpt step:2/4" in (folder / "again/logs/run.txt").read_text()
    straight, again = (folder / name / "logs/run.mdlm" for name in ("mdlm", "again"))
    assert straight.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_of_devices_is_noticed(outcomes, fault):
    _, found = outcomes
    [outcome] = found[fault.name]
    events = [event for step in outcome.steps()[1:] for event in step]
    assert fault.noted in "\n".join([*events, outcome.error])


# ---- Two processes

UNEQUAL = ("        all_reduce(self.grads)\n", "        rank() or all_reduce(self.grads)\n")
NOT_CONTIGUOUS = ("    all_reduce(table)\n", "    all_reduce(table.transpose(0, 1))\n")


@pytest.fixture(scope="session")
def two_processes(library, tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretend2")
    env = quiet(tiny_env, PRESET="mdlm", EMA_DECAY="0.9")
    runs = [
        Run("sound", str(folder / "sound"), env),
        Run("unequal", str(folder / "unequal"), env, [UNEQUAL]),
        Run("not contiguous", str(folder / "strided"), env, [NOT_CONTIGUOUS]),
    ]
    return folder, pretend(library, runs, folder / "runs.json", processes=2)


def test_two_processes_share_a_step(two_processes):
    """Its collectives are one of all gradients and one for each shape of Muon's matrices; the clock
    asks through the host."""
    folder, found = two_processes
    assert [outcome.error for outcome in found["sound"]] == ["", ""]
    first, second = (outcome.steps()[1:] for outcome in found["sound"])
    assert first == second
    for step in first:
        kinds = Counter(re.sub(r"(collective \S+ \w+) .*", r"\1", event) for event in step)
        assert kinds.pop("free copy to the device") == 1
        assert kinds.pop("collective all_reduce gloo") == 1
        assert sum(kinds.values()) == 1 + 4 and all("nccl" in kind for kind in kinds)
    assert "finished:run" in (folder / "sound/logs/run.txt").read_text()


def test_a_collective_that_one_process_leaves_out_is_noticed(two_processes):
    _, found = two_processes
    for outcome in found["unequal"]:
        assert re.search(r"collective \d+ is .* here and .* on the other process", outcome.error)


def test_a_collective_of_a_view_is_noticed(two_processes):
    _, found = two_processes
    assert all("which are not contiguous" in outcome.error for outcome in found["not contiguous"])
