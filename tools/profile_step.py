"""Measures a training step where it runs: its time, its kernels, and what runs the attention.

    PRESET=golf torchrun --standalone --nproc_per_node=8 tools/profile_step.py
    PRESET=golf torchrun --standalone --nproc_per_node=8 tools/profile_step.py --predicted 38.0

The hyperparameters are those of the script, from the environment; so is the data. Nothing is
written. The first process prints the mean time of --steps steps at the pace of training, tokens per
second, and the slowest kernels of one more step. tools/step_cost.py predicts that time without a
GPU; --predicted shows how far it is off.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import NamedTuple

import common
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

import train_mdlm as tm
from train_mdlm import InputError

ATTENTION = r"flash|fmha|cudnn.*(sdpa|attention)|attention|flex"  # in the names of kernels
NAME_WIDTH = 60


class Kernel(NamedTuple):
    """What the device, or the CPU, did under one name in a step."""

    name: str
    ms: float
    calls: int


def train_step(trainer: tm.Trainer, step: int) -> None:
    """At a learning rate of 0; with the average of the weights, which the last part of a run has
    and tools/step_cost.py counts."""
    trainer.step(step, 0.0)
    if trainer.hp.ema_decay:
        trainer.optimizer.update_average()


def mean_ms(trainer: tm.Trainer, steps: int) -> float:
    """Milliseconds of a step at the pace of `tm.train`: the host goes on while the device works,
    reads the clock after each step, and waits for all of them only at the end."""
    clock = tm.Clock(trainer.device)  # waits for what the device still does
    for step in range(steps):
        train_step(trainer, step)
        clock.read()
    return 1000 * (clock.now() - clock.started) / steps


def kernels_of_a_step(trainer: tm.Trainer) -> list[Kernel]:
    """The slowest first."""
    on_gpu = trainer.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        train_step(trainer, 0)
        if on_gpu:
            torch.cuda.synchronize(trainer.device)
    found = []
    for event in profile.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us:  # the host's launches take no time of the device
            found.append(Kernel(event.key, us / 1000, event.count))
    return sorted(found, key=lambda kernel: -kernel.ms)


def kernel_table(kernels: list[Kernel], rows: int) -> str:
    """Markdown, with a row for the rest and one for all of them."""
    total = sum(kernel.ms for kernel in kernels)
    rest = kernels[rows:]
    shown = kernels[:rows]
    if rest:
        summed = sum(kernel.ms for kernel in rest)
        shown.append(Kernel("all others", summed, sum(kernel.calls for kernel in rest)))
    shown.append(Kernel("all", total, sum(kernel.calls for kernel in kernels)))
    lines = ["| kernel | calls | ms | share |", "|---|---|---|---|"]
    for kernel in shown:
        name = common.one_line(kernel.name).replace("|", "/")[:NAME_WIDTH]
        share = 100 * kernel.ms / total if total else 0.0
        lines.append(f"| {name} | {kernel.calls} | {kernel.ms:.2f} | {share:.0f} % |")
    return "\n".join(lines)


def attention_kernels(kernels: list[Kernel]) -> str:
    names = [kernel.name for kernel in kernels if re.search(ATTENTION, kernel.name, re.IGNORECASE)]
    return ", ".join(common.one_line(name)[:NAME_WIDTH] for name in names[:4]) or "none found"


def speed_lines(ms: float, hp: tm.Hyperparameters, predicted: float | None) -> list[str]:
    steps = 1000 * tm.BUDGET_SECONDS / ms
    tokens = hp.train_batch_tokens
    lines = [
        f"step:{ms:.2f}ms tokens_per_s:{1000 * tokens / ms:,.0f}",
        f"steps in {tm.BUDGET_SECONDS:.0f} s:{steps:,.0f} tokens:{steps * tokens / 1e9:.2f} G",
    ]
    if predicted:
        lines.append(f"predicted:{predicted:.2f}ms measured/predicted:{ms / predicted:.2f}")
    return lines


def positive(text: str) -> float:
    """An argument that is a number of milliseconds."""
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text, re.ASCII) or not float(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of milliseconds")
    return float(text)


def profiled(arguments: argparse.Namespace) -> str:
    """All that is printed."""
    device = tm.start_processes()
    if path := os.environ.get("EVAL_ONLY"):
        raise InputError(f"EVAL_ONLY={path}: a step of training is measured; unset it")
    hp = tm.resolve_hyperparameters(os.environ, device)
    tm.check_memory(hp, device)
    tokenizer, luts = common.load_tokenizer(hp)
    stream = tm.open_training(hp, tokenizer, luts)
    trainer = tm.Trainer(hp, stream, device, tm.Log())
    mean_ms(trainer, 3)  # compiles
    ms = mean_ms(trainer, arguments.steps)
    kernels = kernels_of_a_step(trainer)
    lines = [
        f"{hp.preset} on {tm.hardware(device)}, torch {torch.__version__}: "
        f"{hp.train_batch_tokens:,} tokens a step, {len(trainer.micros)} micro-batches",
        *speed_lines(ms, hp, arguments.predicted),
        f"memory:{tm.peak_memory(device)}",
        f"attention: {attention_kernels(kernels)}",
        "",
        kernel_table(kernels, arguments.rows),
    ]
    return "\n".join(lines)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--rows", type=int, default=25, help="of the table of kernels")
    predicted_help = "milliseconds of a step, by tools/step_cost.py"
    parser.add_argument("--predicted", type=positive, metavar="MS", help=predicted_help)
    arguments = parser.parse_args()
    for name in ("steps", "rows"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: give 1 or more")
    text = profiled(arguments)
    if tm.rank() == 0:
        print(text)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
