"""From diffusion to autoregression: bits per byte by block length, at equal steps and equal time.

    PRESET=demo python tools/frontier.py --steps 500 --seeds 1337,42,2026 --out sweeps/frontier

Trains models of one size: `golf`, `block` with every length of --blocks, and OBJECTIVE=ar. Their
steps are timed in turn, in this process, and all but `golf` are trained twice: for as many steps,
and for as many as take `golf`'s time. What PRESET and other variables set holds for all of them; to
that each adds what makes it `golf`, `block` or causal.

OUT/logs has the runs, as of tools/sweep.py: what is finished there is not run again, and what was
interrupted goes on. OUT/times.json has the times; what is missing there is measured. OUT/README.md
is the table, OUT/frontier.json the same for programs, OUT/frontier.png the picture.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import common
import sweep
import torch
from run_log import HEADLINES

import train_mdlm as tm
from train_mdlm import InputError

RECIPE = ("block_size", "block_share", "causal_weight", "mask_dist", "loss_weight")
TABLE_BEGINS, EQUAL_TIME = "Equal steps", "Equal time"
ROUNDS, STEPS = 6, 3  # of timing: the fastest of so many rounds of so many steps
SCORES = {"l2r": "left to right", "ar": "causal, one call", "nelbo": "bound"}


class Model(NamedTuple):
    """One of the compared models."""

    name: str
    row: sweep.Row
    block: int  # its length; 0: the whole window

    def calls(self, length: int) -> float:
        """Model calls per token that the score from left to right takes."""
        return 1 / length if "OBJECTIVE" in self.row else (self.block or length) / length


def compared(blocks: list[int]) -> list[Model]:
    """`golf` first, `ar` last."""
    golf, block = (tm.Hyperparameters(preset=name) for name in ("golf", "block"))
    models = [Model("golf", recipe(golf), 0)]
    models += [Model(f"{b}", recipe(block) | dict(BLOCK_SIZE=str(b)), b) for b in blocks]
    return [*models, Model("ar", recipe(golf) | dict(OBJECTIVE="ar"), 1)]


def recipe(hp: tm.Hyperparameters) -> sweep.Row:
    return {name.upper(): str(getattr(hp, name)) for name in RECIPE}


def with_steps(model: Model, steps: int) -> sweep.Row:
    return model.row | dict(ITERATIONS=str(steps))


# ---- Time


def settings_of(models: list[Model], out: Path) -> dict:
    """Settings of the training that all models share; times of other ones are not theirs."""
    hp = sweep.Job(models[0].row, 1337, out).hyperparameters()
    names = {spec.name for spec in tm.KNOBS if spec.metadata["group"] in tm.RESULT_GROUPS}
    names -= {"seed", "iterations", "max_wallclock_seconds"}
    return {name: getattr(hp, name) for name in sorted(names | {"compile", "micro_batch_tokens"})}


def measure_times(models: list[Model], out: Path) -> dict[str, float]:
    """Milliseconds of a training step of each model, by name."""
    hps = [sweep.Job(model.row, 1337, out).hyperparameters() for model in models]
    tokenizer, luts = common.load_tokenizer(hps[0])
    stream = tm.open_training(hps[0], tokenizer, luts)
    trainers = [tm.Trainer(hp, stream, common.device(), tm.Log()) for hp in hps]
    limit = torch._dynamo.config.recompile_limit  # of variants of one function: the loss
    with torch._dynamo.config.patch(recompile_limit=limit + len(models)):
        for trainer in trainers:
            trainer.step(0, 1.0)
    fastest = [float("inf")] * len(models)
    clock = tm.Clock(common.device())
    for _ in range(ROUNDS):
        for i, trainer in enumerate(trainers):
            since = clock.now()
            for step in range(STEPS):
                trainer.step(step, 1.0)
            fastest[i] = min(fastest[i], 1000 * (clock.now() - since) / STEPS)
    return {model.name: ms for model, ms in zip(models, fastest, strict=True)}


def read_times(path: Path, settings: dict) -> dict[str, float]:
    """What OUT/times.json has, or nothing; InputError if it is damaged, or of other settings."""
    if not path.exists():
        return {}
    times = common.read_json(path)
    measured_with = times.pop("settings", settings) if isinstance(times, dict) else None
    if not isinstance(measured_with, dict) or not all(map(is_time, times.values())):
        raise InputError(f"{path}: has not the times of steps; remove it")
    for name, value in settings.items():
        if measured_with.get(name) != value:
            then = f"{name.upper()}={measured_with.get(name)}"
            raise InputError(f"{path}: was measured with {then}, not {value}; give another --out")
    return times


def is_time(value: object) -> bool:
    return type(value) in (int, float) and 1e-3 <= value <= 1e9


def step_times(models: list[Model], out: Path, measure: bool = True) -> dict[str, float]:
    """Those of OUT/times.json. What is missing there is measured beside `golf`, and added in
    proportion to its time; InputError if that is not to be done."""
    path, settings = out / "times.json", settings_of(models, out)
    times = read_times(path, settings)
    golf, *others = models
    missing = [model for model in others if model.name not in times]
    if golf.name not in times:
        times, missing = {}, others
    if missing and not measure:
        names = ", ".join(model.name for model in missing)
        raise InputError(f"{path}: has not the times of {names}; without --report it gets them")
    if missing:
        measured = measure_times([golf, *missing], out)
        scale = times.get(golf.name, measured[golf.name]) / measured[golf.name]
        times = {name: scale * ms for name, ms in measured.items()} | times
        tm.write_file(path, common.to_json(times | dict(settings=settings), indent=2).encode())
    return times


def plan_steps(models: list[Model], times: dict, steps: int) -> dict[str, dict[str, int]]:
    """Steps of each model, by title of the table: as many as `golf`, and in its time."""
    equal_time = {model.name: steps * times[models[0].name] / times[model.name] for model in models}
    return {
        TABLE_BEGINS: {model.name: steps for model in models},
        EQUAL_TIME: {name: max(round(wanted), 1) for name, wanted in equal_time.items()},
    }


def planned_jobs(models: list[Model], plans: dict, seeds: list[int], out: Path) -> list[sweep.Job]:
    """Each run once."""
    jobs = [
        sweep.Job(with_steps(model, steps[model.name]), seed, out)
        for seed in seeds
        for steps in plans.values()
        for model in models
    ]
    return list({job.run_id: job for job in jobs}.values())


# ---- Figures


def found_for(model: Model, steps: int, seeds: list[int], out: Path) -> dict[str, sweep.Scores]:
    """Bits per byte by score and seed, of what is finished."""
    found: dict[str, sweep.Scores] = {name: {} for name in SCORES}
    for seed in seeds:
        run = sweep.Job(with_steps(model, steps), seed, out).finished()
        if run:
            found[HEADLINES[run.system][0]][seed] = run.val_bpb
            for name in SCORES.keys() & run.others.keys():
                found[name][seed] = run.others[name][0]
    return found


def summarize(
    models: list[Model], steps: dict[str, int], times: dict, seeds: list[int], out: Path
) -> list[dict]:
    """A row for each model: its scores, and how far that from left to right, for `ar` its only one,
    is from that of `golf`, the first, paired by seed."""
    length = sweep.Job(models[0].row, 1337, out).hyperparameters().train_seq_len
    golf = found_for(models[0], steps[models[0].name], seeds, out)["l2r"]
    rows = []
    for model in models:
        scores = found_for(model, steps[model.name], seeds, out)
        ordered = scores["l2r"] or scores["ar"]
        rows.append(
            dict(
                model=model.name,
                steps=steps[model.name],
                step_ms=times[model.name],
                calls_per_token=model.calls(length),
                scores=scores,
                left_to_right=sweep.against(ordered, golf),
            )
        )
    return rows


def mean_and_deviation(values: sweep.Scores) -> str:
    facts = sweep.against(values, values)
    return f"{sweep.number(facts['mean'])} ± {sweep.number(facts['std'])}" if values else "–"


def table(title: str, rows: list[dict]) -> str:
    heads = ["block length", "steps", "time of a step", "calls per token", *SCORES.values()]
    heads += ["left to right − golf, paired"]
    lines = [f"{title}:", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    golf_ms = rows[0]["step_ms"]
    for row in rows:
        cells = [row["model"], f"{row['steps']:,}", f"{row['step_ms'] / golf_ms:.2f}"]
        cells.append(f"{row['calls_per_token']:.3g}")
        cells += [mean_and_deviation(row["scores"][name]) for name in SCORES]
        cells.append("" if row is rows[0] else sweep.paired(row["left_to_right"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(parts: dict[str, list[dict]], path: Path) -> None:
    figure = common.new_figure(5.5 * len(parts), 4.2)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for (title, rows), axes in zip(parts.items(), panels, strict=True):
        rows = [rows[-1], *rows[1:-1], rows[0]]  # from causal to the whole window
        for name, text in SCORES.items():
            points = [(i, list(row["scores"][name].values())) for i, row in enumerate(rows)]
            points = [(i, values) for i, values in points if values]
            if not points:
                continue
            places, seeds = zip(*points, strict=True)
            means = [statistics.fmean(values) for values in seeds]
            deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in seeds]
            axes.errorbar(places, means, yerr=deviations, marker="o", capsize=3, label=text)
        axes.set_xticks(range(len(rows)), [row["model"] for row in rows])
        axes.set(title=title, xlabel="block length", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    common.save_figure(figure, path)


# ---- Command line


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--steps", type=int, required=True, help="of golf")
    parser.add_argument("--blocks", default="1,2,4,8,16,32,128", help="block lengths")
    parser.add_argument("--seeds", default="1337", help="separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and the table")
    common.add_seqs_option(parser, 512)
    jobs_help = "runs side by side, with OMP_NUM_THREADS each"
    parser.add_argument("--jobs", type=int, default=1, help=jobs_help)
    report_help = "run nothing, only tell of what is finished"
    parser.add_argument("--report", action="store_true", help=report_help)
    return parser.parse_args()


@common.run_tool
def main() -> None:
    arguments = parse_arguments()
    out, seqs = arguments.out, arguments.seqs
    seeds = sweep.listed_seeds(arguments.seeds)
    models = compared(common.whole_numbers("--blocks", arguments.blocks, 1, 2**20))
    if arguments.steps < 1 or arguments.jobs < 1:
        raise InputError("--steps and --jobs are at least 1")
    sweep.check_readme(out, TABLE_BEGINS)
    common.check_output(out / "frontier.json", common.made_object(TABLE_BEGINS, EQUAL_TIME))
    common.check_picture(out / "frontier.png")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MAX_WALLCLOCK_SECONDS", "0")
    os.environ["FINAL_EVAL_MAX_SEQS"] = str(seqs)
    os.environ["SCORES"] = ",".join(f"{name}:{seqs}" for name in SCORES)
    failed = {}
    with contextlib.nullcontext() if arguments.report else common.sole_use(out):
        times = step_times(models, out, measure=not arguments.report)
        plans = plan_steps(models, times, arguments.steps)
        if not arguments.report:
            jobs = planned_jobs(models, plans, seeds, out)
            failed = sweep.run_all(jobs, 1, [None] * arguments.jobs)
    parts = {title: summarize(models, steps, times, seeds, out) for title, steps in plans.items()}
    text = "\n".join(table(title, rows) for title, rows in parts.items())
    text += "".join(f"\nFailed: {name}: {reason}\n" for name, reason in failed.items())
    tm.write_file(out / "README.md", text.encode())
    tm.write_file(out / "frontier.json", common.to_json(parts, indent=2).encode())
    draw(parts, out / "frontier.png")
    print(text, end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
