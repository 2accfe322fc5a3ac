"""What a training step costs on a GPU that is not here: kernels, FLOPs, bytes, time and memory.

    python tools/step_cost.py mdlm
    python tools/step_cost.py golf NUM_HEADS=9 NUM_KV_HEADS=3 --gpu H100 A100
    python tools/step_cost.py mdlm --gpu H100 --rates matmul=650 memory=2.9

Kernels, FLOPs and bytes are counted: the step of the script itself goes through the compiler
(tools/lowering.py). How fast a GPU does them is assumed: the data sheet's peak times an efficiency,
as in GPUS and EFFICIENCIES below. docs/speed.md says more of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import common
import lowering
import published
import torch
from lowering import Counts, Kernel

import train_mdlm as tm
from train_mdlm import InputError


class Gpu(NamedTuple):
    """As its data sheet has it."""

    tflops: float  # dense bfloat16 products with float32 sums
    memory_tbps: float
    memory_gb: float
    link_gbps: float  # to other GPUs, in each direction
    head_widths: tuple[int, ...]  # for which there are attention kernels; a head is padded to one
    source: str


HOPPER = (64, 128, 256)  # cuDNN's kernels
AMPERE = (32, 64, 96, 128, 192, 256)  # those of FlashAttention 2
GPUS = {
    "H100": Gpu(989.4, 3.35, 80, 450, HOPPER, "NVIDIA H100 data sheet, SXM"),
    "H200": Gpu(989.4, 4.8, 141, 450, HOPPER, "NVIDIA H200 data sheet, SXM"),
    "A100": Gpu(311.8, 2.039, 80, 300, AMPERE, "NVIDIA A100 data sheet, SXM, 80 GB"),
    "4090": Gpu(165.2, 1.008, 24, 32, AMPERE, "NVIDIA Ada GPU architecture paper; PCIe 4.0 x16"),
    "A10G": Gpu(70.0, 0.6, 24, 32, AMPERE, "NVIDIA A10G data sheet; PCIe 4.0 x16"),
}
RESERVED_GB = 2.0  # CUDA context, libraries, communication buffers


class Rates(NamedTuple):
    """What a GPU reaches."""

    matmul: float  # TFLOP/s of matrix products
    attention: float  # TFLOP/s of fused attention, padding included
    flex: float  # TFLOP/s of flex attention, padding included
    memory: float  # TB/s of all other kernels
    link: float  # GB/s of collectives
    start: float  # µs that each kernel takes besides
    collective: float  # µs that each collective takes besides
    compiled_launch: float  # µs of the host for a kernel of a compiled graph
    eager_launch: float  # µs of the host for another operation


EFFICIENCIES = dict(matmul=0.61, attention=0.43, flex=0.3)  # of the data sheet's FLOP/s
MEMORY_EFFICIENCY = 0.82
LINK_EFFICIENCY = 0.65
LATENCIES = dict(start=2.5, collective=25.0, compiled_launch=3.5, eager_launch=6.0)


def assumed_rates(gpu: Gpu) -> Rates:
    products = {name: share * gpu.tflops for name, share in EFFICIENCIES.items()}
    memory = MEMORY_EFFICIENCY * gpu.memory_tbps
    return Rates(**products, memory=memory, link=LINK_EFFICIENCY * gpu.link_gbps, **LATENCIES)


# ---- Time


PRODUCTS = {"matrix product": "matmul", "attention": "attention", "flex attention": "flex"}


class Machine(NamedTuple):
    """GPUs that share a step."""

    gpu: Gpu
    rates: Rates
    processes: int

    def padded(self, kernel: Kernel) -> float:
        """FLOPs of a kernel with those for padding."""
        if not kernel.head_dim:
            return kernel.flops
        fitting = [width for width in self.gpu.head_widths if width >= kernel.head_dim]
        return kernel.flops * min(fitting, default=kernel.head_dim) / kernel.head_dim

    def seconds(self, kernel: Kernel) -> dict[str, float]:
        """What a kernel would take if only one thing limited it, and its start."""
        rates = self.rates
        if kernel.kind == "collective":
            # A ring: all-reduce sends everything twice, the others once.
            sends = 2 if "reduce" in kernel.name else 1
            sent = sends * (self.processes - 1) / self.processes * kernel.nbytes
            return dict(link=sent / (1e9 * rates.link), start=1e-6 * rates.collective)
        if kernel.kind == "copy":
            return dict(link=kernel.nbytes / 20e9, start=1e-6 * rates.start)
        limits = dict(memory=kernel.nbytes / (1e12 * rates.memory), start=1e-6 * rates.start)
        if kernel.kind in PRODUCTS:
            rate = getattr(rates, PRODUCTS[kernel.kind])
            limits["compute"] = self.padded(kernel) / (1e12 * rate)
        return limits

    def device_seconds(self, kernel: Kernel) -> float:
        limits = self.seconds(kernel)
        return limits.pop("start") + max(limits.values())

    def host_seconds(self, kernel: Kernel) -> float:
        rates = self.rates
        return 1e-6 * (rates.compiled_launch if kernel.compiled else rates.eager_launch)


# ---- Parts

COMPILED_PARTS = ("loss", "gradients")
TITLES = {
    "matrix product": "matrix products",
    "attention": "attention",
    "flex attention": "flex attention",
    "fused": "fused kernels",
    "scatter": "scattered sums: embeddings, selected rows",
    "eager": "not compiled",
}


def part_of(kernel: Kernel) -> str:
    """The row of the table that a kernel is in."""
    if kernel.kind == "collective":
        return "collectives"
    if kernel.part in COMPILED_PARTS:
        return TITLES[kernel.kind]
    return {"average": "optimizer"}.get(kernel.part, kernel.part)


class Part(NamedTuple):
    """A row of the table."""

    title: str
    kernels: int
    flops: float
    nbytes: float
    seconds: float
    bound: str  # what most of the time goes to


def parts_of(counts: Counts, machine: Machine) -> list[Part]:
    order = [*TITLES.values(), "optimizer", "collectives", "batch"]
    found = []
    for title in order:
        own = {k: times for k, times in counts.kernels.items() if part_of(k) == title}
        if not own:
            continue

        def total(figure: Callable[[Kernel], float], own=own) -> float:
            return sum(times * figure(kernel) for kernel, times in own.items())

        spent = dict.fromkeys(("compute", "memory", "link", "start"), 0.0)
        for kernel, times in own.items():
            limits = machine.seconds(kernel)
            spent["start"] += times * limits.pop("start")
            largest = max(limits, key=limits.get)
            spent[largest] += times * limits[largest]
        part = Part(
            title=title,
            kernels=sum(own.values()),
            flops=total(lambda kernel: kernel.flops),
            nbytes=total(lambda kernel: kernel.nbytes),
            seconds=total(machine.device_seconds),
            bound=max(spent, key=spent.get),
        )
        found.append(part)
    return found


def useful_flops(counts: Counts) -> float:
    """Of the matrix products and the attention of the loss: backward counts as two forwards, so
    that what it does again is not useful."""
    total = 0.0
    for kernel, times in counts.kernels.items():
        if kernel.part in COMPILED_PARTS and kernel.kind == "matrix product":
            total += times * kernel.flops
        if kernel.part == "loss" and "attention" in kernel.kind:
            total += times * 3 * kernel.flops
    return total


class Prediction(NamedTuple):
    """Of a step on one machine."""

    parts: list[Part]
    device_seconds: float
    host_seconds: float
    seconds: float  # of the slower of both
    tokens_per_s: float  # of all GPUs
    share_of_peak: float
    memory_gb: float
    fits: bool


def predict(counts: Counts, machine: Machine) -> Prediction:
    parts = parts_of(counts, machine)
    device = sum(part.seconds for part in parts)
    launches = counts.kernels.items()
    host = sum(times * machine.host_seconds(kernel) for kernel, times in launches)
    seconds = max(device, host)
    memory = counts.peak_bytes / 1e9 + RESERVED_GB
    return Prediction(
        parts=parts,
        device_seconds=device,
        host_seconds=host,
        seconds=seconds,
        tokens_per_s=machine.processes * counts.tokens / seconds,
        share_of_peak=useful_flops(counts) / seconds / (1e12 * machine.gpu.tflops),
        memory_gb=memory,
        fits=memory <= machine.gpu.memory_gb,
    )


# ---- What is printed


def parts_table(name: str, found: Prediction) -> str:
    """Markdown: a row for each part, on the GPU of that name."""
    whole = Part(
        title="all",
        kernels=sum(part.kernels for part in found.parts),
        flops=sum(part.flops for part in found.parts),
        nbytes=sum(part.nbytes for part in found.parts),
        seconds=found.device_seconds,
        bound="",
    )
    lines = [
        f"| part | kernels | TFLOP | GB | ms on {name} | bound by |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {part.title} | {part.kernels} | {part.flops / 1e12:.2f} | {part.nbytes / 1e9:.2f} "
        f"| {1000 * part.seconds:.2f} | {part.bound} |"
        for part in [*found.parts, whole]
    ]
    return "\n".join(lines)


def speed_table(predictions: dict[str, Prediction], processes: int) -> str:
    """Markdown: a row for each GPU."""
    lines = [
        "| GPUs | ms per step | host ms | tokens/s | share of peak | steps in 600 s "
        "| tokens in 600 s | GB of memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    budget = tm.BUDGET_SECONDS
    for name, found in predictions.items():
        memory = f"{found.memory_gb:.1f} of {GPUS[name].memory_gb:.0f}"
        cells = [
            f"{processes} x {name}",
            f"{1000 * found.seconds:.1f}",
            f"{1000 * found.host_seconds:.1f}",
            f"{found.tokens_per_s / 1e6:.2f} M",
            f"{100 * found.share_of_peak:.0f} %",
            f"{budget / found.seconds:,.0f}",
            f"{budget * found.tokens_per_s / 1e9:.2f} G",
            memory if found.fits else f"{memory}: DOES NOT FIT",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- Scores


# Tokens of the challenge's validation split by vocabulary. The larger ones are in published logs.
SPLIT_TOKENS = {1024: published.TOKENS, 4096: 45_508_608, 8192: 40_540_160}


def positions_of_a_window(hp: tm.Hyperparameters) -> dict[str, int]:
    """How many go through the model for each score of a window."""
    length = hp.train_seq_len
    width = length
    if hp.block_size:  # noisy tokens, one more for each block, and clean ones
        width = 2 * length + length // hp.block_size
    in_order = width * tm.ceil_div(hp.block_size or length, hp.chain_group)
    sliding = length * tm.ceil_div(min(hp.stride, length), hp.chain_group)
    return dict(
        nelbo=width * hp.nelbo_passes,
        l2r=in_order,
        random=in_order,
        confidence=in_order,
        sliding=length if hp.causal else sliding,
        sliding_nelbo=length * hp.nelbo_passes,
        ar=length,
        tstep=length * hp.tstep_steps,
        tgrid=length * (hp.final_eval_t_samples or 256),
    )


def forward_seconds(hp: tm.Hyperparameters, counts: Counts, machine: Machine) -> float:
    """Of a position, on one GPU: the forward half of the loss."""
    noisy = hp.noisy_blocks * (hp.block_size + 1) if hp.block_size else 0
    positions = counts.tokens * (1 + noisy / hp.train_seq_len)
    forward = {kernel: n for kernel, n in counts.kernels.items() if kernel.part == "loss"}
    return sum(n * machine.device_seconds(kernel) for kernel, n in forward.items()) / positions


def score_table(hp: tm.Hyperparameters, counts: Counts, machines: dict[str, Machine]) -> str:
    """Markdown: a row for each of the preset's scores, on the challenge's validation split."""
    heads = ["score", "windows", "G positions"]
    heads += [f"s on {machine.processes} x {name}" for name, machine in machines.items()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    each, total = positions_of_a_window(hp), 0
    seconds = [
        forward_seconds(hp, counts, machine) / machine.processes for machine in machines.values()
    ]
    for name, windows in tm.final_scores(hp).items():
        split = SPLIT_TOKENS.get(hp.vocab_size, published.TOKENS)
        windows = windows or split // hp.train_seq_len
        cells = [name, f"{windows:,}"]
        lines.append(score_row(cells, windows * each[name], seconds))
        total += windows * each[name]
    return "\n".join([*lines, score_row(["all", ""], total, seconds)])


def score_row(names: list[str], positions: int, seconds: list[float]) -> str:
    """`seconds` a position, by machine."""
    cells = [*names, f"{positions / 1e9:.2f}", *(f"{positions * each:.0f}" for each in seconds)]
    return f"| {' | '.join(cells)} |"


# ---- Report


def report(hp: tm.Hyperparameters, counts: Counts, predictions: dict[str, Prediction]) -> str:
    """Markdown."""
    processes = hp.train_batch_tokens // counts.tokens
    kinds = [kernel.kind for kernel in counts.kernels.elements()]
    graphs = " + ".join(f"{times} {part}" for part, times in counts.graphs.items())
    facts = (
        f"{hp.preset}: {processes} x {counts.tokens:,} tokens a step",
        f"micro-batches: {counts.micro_batches}",
        f"compiled graphs: {graphs or 'none'}",
        f"collectives: {kinds.count('collective')}",
        f"copies to the GPU: {kinds.count('copy')}",
        f"host reads: {counts.host_reads}",
        f"torch {torch.__version__}",
    )
    name, first = next(iter(predictions.items()))
    tables = parts_table(name, first), speed_table(predictions, processes)
    return "\n\n".join(["; ".join(facts), *tables])


def to_json(hp: tm.Hyperparameters, counts: Counts, predictions: dict[str, Prediction]) -> str:
    kernels = [{**kernel._asdict(), "times": n} for kernel, n in counts.kernels.items()]
    predicted = {}
    for name, found in predictions.items():
        parts = [part._asdict() for part in found.parts]
        predicted[name] = {**found._asdict(), "parts": parts}
    value = dict(
        hyperparameters=vars(hp),
        counts={**counts._asdict(), "kernels": kernels},
        predictions=predicted,
    )
    return common.to_json(value, indent=1)


# ---- Command line


def parse_knobs(preset: str, knobs: list[str]) -> tm.Hyperparameters:
    """Of a preset, changed by KNOB=value."""
    values = {}
    for knob in knobs:
        name, equals, value = knob.partition("=")
        if not equals:
            raise InputError(f"{knob}: give hyperparameters as KNOB=value")
        if name.lower() == "preset":
            raise InputError(f"{knob}: the preset is the first argument")
        values[name.lower()] = value
    if "eval_only" in values:
        raise InputError(f"EVAL_ONLY={values['eval_only']}: a step of training is counted")
    return tm.Hyperparameters(preset, **values)


def change_rates(rates: Rates, changes: list[str]) -> Rates:
    """Changed by name=value."""
    for change in changes:
        name, _, value = change.partition("=")
        if name not in Rates._fields:
            raise InputError(f"--rates {change}: give {', '.join(Rates._fields)} as name=value")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < 1e9:
            raise InputError(f"--rates {change}: {value or 'nothing'} is no positive number")
        rates = rates._replace(**{name: number})
    return rates


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("preset", choices=tm.PRESETS)
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value", help="as the script has them")
    parser.add_argument(
        "--gpu", nargs="+", choices=GPUS, default=["H100"], help="the parts are those of the first"
    )
    parser.add_argument("--gpus", type=int, default=8, help="how many share a step")
    rates_help = f"instead of those assumed, for one GPU: {', '.join(Rates._fields)}"
    parser.add_argument("--rates", nargs="+", default=[], metavar="NAME=VALUE", help=rates_help)
    parser.add_argument("--json", action="store_true", help="every kernel and figure as JSON")
    arguments = parser.parse_args()
    if not 1 <= arguments.gpus <= 1024:
        raise InputError(f"--gpus {arguments.gpus}: give 1 to 1024")
    if arguments.rates and len(arguments.gpu) > 1:
        raise InputError(f"--rates are those of one GPU, not of {', '.join(arguments.gpu)}")
    hp = parse_knobs(arguments.preset, arguments.knobs)
    machines = {}
    for name in arguments.gpu:
        rates = change_rates(assumed_rates(GPUS[name]), arguments.rates)
        machines[name] = Machine(GPUS[name], rates, arguments.gpus)
    counts = lowering.count_step(hp, arguments.gpus)
    predictions = {name: predict(counts, machine) for name, machine in machines.items()}
    if arguments.json:
        print(to_json(hp, counts, predictions))
        return
    print(report(hp, counts, predictions))
    print(f"\n{score_table(hp, counts, machines)}")


if __name__ == "__main__":
    main()
