"""Runs the script over a grid of hyperparameters and seeds, and tells what differs.

    PRESET=demo python tools/sweep.py NUM_HEADS=2,4,8 MASK_EPS=0.001,0.1 --seeds 1337,42,2026 --out sweeps/heads

Every combination is a row, every seed a run. NUM_HEADS=NUM_KV_HEADS=2,4 gives both the same value, and
MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat changes both at once. What is set in the environment holds for all. Runs
go one after the other, or --jobs of them side by side, or one on each of the GPUs that --gpus names. Logs and artifacts
are kept under OUT/logs; a run that is finished there is not run again, one that was interrupted goes on from its last
checkpoint, a run that failed is noted and the others go on, and a second call tries it again. Afterwards, or at once
with --report, OUT/README.md holds the table (mean and standard deviation over seeds, and differences to the first row
that trains on as many tokens, paired by seed, with their standard errors), OUT/results.json the same for programs,
OUT/plot.png a picture: of scores over training tokens if ITERATIONS is in the grid. With --beside, the rows of an
earlier results.json come first, in the table, the picture and the comparisons: they have to be scored on the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from make_record import parse_log  # noqa: E402
from train_mdlm import Hyperparameters, InputError  # noqa: E402

SCRIPT = ROOT / "train_mdlm.py"


def parse_grid(arguments: list[str]) -> list[dict[str, str]]:
    """The rows of a grid given as NAME=a,b,c, NAME=NAME=a,b,c or NAME/NAME=a/b,c/d …; InputError for what the script
    would refuse."""
    grid, axes = [], []
    known = {field.upper() for field in Hyperparameters.__dataclass_fields__}
    for argument in arguments:
        *heads, values = argument.split("=")
        names = [name for head in heads for name in head.split("/")]
        tied_and_joined = len(heads) > 1 and len(names) > len(heads)
        repeated = len(set(names)) < len(names) or set(names) & {*grid, "SEED", "RUN_ID", "EVAL_ONLY"}
        if not names or not values or tied_and_joined or repeated or len(set(values.split(","))) <= values.count(","):
            raise InputError(f"{argument}: give NAME=value,value,… once for each hyperparameter and no value "
                             "twice; seeds with --seeds")
        for name in set(names) - known:
            raise InputError(f"{name} is not a hyperparameter of train_mdlm.py; see train_mdlm.py --help")
        split = [value.split("/") if "/" in heads[0] else [value] * len(names) for value in values.split(",")]
        for parts in split:
            if len(parts) != len(names):
                raise InputError(f"{argument}: {'/'.join(parts)} is not one value for each of {'/'.join(names)}")
        axes.append([dict(zip(names, parts, strict=True)) for parts in split])
        grid += names
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]


def label(row: dict[str, str]) -> str:
    return "+".join(f"{name}={value}" for name, value in row.items()) or "as-it-is"


def run_id(row: dict[str, str], seed: int) -> str:
    return re.sub(r"[^\w.+=@-]", "-", f"{label(row)}_seed{seed}")


def environment(row: dict[str, str], seed: int) -> dict[str, str]:
    """Of a run, with absolute paths, because it runs in another folder; InputError for what does not fit together."""
    env = {**os.environ, **row, "SEED": str(seed), "RUN_ID": run_id(row, seed)}
    hp = Hyperparameters.from_env(env)
    return env | {name.upper(): str(Path(getattr(hp, name)).resolve()) for name in ("data_path", "tokenizer_path")}


def begun(row: dict[str, str], seed: int, out: Path) -> Path | None:
    """The log of a run, finished or not, if there is one with these hyperparameters."""
    try:
        hp, path = Hyperparameters.from_env(environment(row, seed)), out / "logs" / f"{run_id(row, seed)}.txt"
        *_, resolved = re.findall(r"^hyperparameters: .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (InputError, OSError, ValueError):
        return None
    settled = ("compute_dtype",)  # auto becomes what the device does
    wanted = [hp.shown(name) for name in hp.__dataclass_fields__ if name not in settled]
    return path if all(f" {setting} " in resolved + " " for setting in wanted) else None


def finished(row: dict[str, str], seed: int, out: Path) -> dict | None:
    """What the log of a run says, or None if there is no finished one with these hyperparameters."""
    try:
        return parse_log(path) if (path := begun(row, seed, out)) else None
    except InputError:
        return None


def run(row: dict[str, str], seed: int, out: Path, processes: int, gpu: str | None) -> str:
    """Runs one configuration; returns the reason if it failed, else an empty string."""
    try:
        env = environment(row, seed)
    except InputError as error:
        return str(error)
    if not begun(row, seed, out):
        for old in out.glob(f"logs/{env['RUN_ID']}.*"):  # of other settings
            old.replace(old.with_name(f"set-aside-{old.name}"))
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, str(SCRIPT)], cwd=out, env=env, capture_output=True, text=True)
    if done.returncode == 0 and finished(row, seed, out):
        for checkpoint in out.glob(f"logs/{env['RUN_ID']}.*.ckpt"):
            checkpoint.unlink()
        return ""
    reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    return (reasons or [f"exit status {done.returncode}"])[0].strip()


def run_all(rows: list[dict], seeds: list[int], out: Path, processes: int, lanes: list[str | None]) -> dict[str, str]:
    """Runs what is not finished, side by side in the lanes (GPUs, or None); the reasons of what failed, by run."""
    places, failed, lock = Queue(), {}, threading.Lock()
    for lane in lanes:
        places.put(lane)

    def one(job: tuple[dict, int]) -> None:
        row, seed = job
        if finished(row, seed, out):
            print(f"{run_id(row, seed)}: finished before", flush=True)
            return
        gpu = places.get()
        try:
            reason = run(row, seed, out, processes, gpu)
        finally:
            places.put(gpu)
        facts = finished(row, seed, out)
        with lock:
            if reason:
                failed[run_id(row, seed)] = reason
            print(f"{run_id(row, seed)}: " + (f"FAILED: {reason}" if reason else f"val_bpb {facts['val_bpb']:.4f}"),
                  flush=True)

    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(one, [(row, seed) for seed in seeds for row in rows]))
    return failed


def against(values: dict[int, float], first: dict[int, float]) -> dict[str, float | None]:
    """Mean and deviation over seeds; mean difference to `first`, paired by seed, and its standard error."""
    differences = [values[seed] - first[seed] for seed in values.keys() & first.keys()]
    return dict(
        mean=statistics.fmean(values.values()) if values else None,
        std=statistics.stdev(values.values()) if len(values) > 1 else None,
        difference=statistics.fmean(differences) if differences else None,
        difference_stderr=statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None)


def read_results(path: Path) -> list[dict]:
    """The rows of an earlier results.json; InputError if that is something else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            row["val_bpb"] = {int(seed): bpb for seed, bpb in row["val_bpb"].items()}
            row["others"] = {name: {int(seed): bpb for seed, bpb in values.items()}
                             for name, values in row["others"].items()}
            if {"label", "row", "planned_tokens", "others_against", "mean", "tokens", "cut", "scripts"} - row.keys():
                raise ValueError
        return rows
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not a results.json of tools/sweep.py") from None


def summary(rows: list[dict], seeds: list[int], out: Path, earlier: list[dict]) -> list[dict]:
    """A dictionary a row: label, val_bpb and other scores by seed, what `against` says of val_bpb, sizes and times."""
    found = list(earlier)
    for row in rows:
        runs = {seed: facts for seed in seeds if (facts := finished(row, seed, out))}
        bpb = {seed: facts["val_bpb"] for seed, facts in runs.items()}
        names = set.intersection(*(set(facts["others"]) for facts in runs.values())) if runs else set()
        try:
            hp = Hyperparameters.from_env(environment(row, seeds[0]))
            planned = hp.iterations * hp.train_batch_tokens
        except InputError:
            hp, planned = None, None
        first = next((old for old in found if planned and old["planned_tokens"] == planned), None)
        others = {name: {seed: facts["others"][name][0] for seed, facts in runs.items()} for name in sorted(names)}
        found.append(dict(
            label=label(row), row=row, planned_tokens=planned, val_bpb=bpb, others=others,
            **against(bpb, first["val_bpb"] if first else bpb),
            others_against={name: against(values, first["others"].get(name, {}) if first else values)
                            for name, values in others.items()},
            first=first["label"] if first else None,
            params=next((facts["params"] for facts in runs.values()), None),
            total_bytes=max((facts["total_bytes"] for facts in runs.values()), default=None),
            train_seconds=statistics.fmean(facts["train_seconds"] for facts in runs.values()) if runs else None,
            cut=any(facts["step_stop"] < hp.iterations for facts in runs.values()),
            tokens=max(facts["step_stop"] for facts in runs.values()) * hp.train_batch_tokens if runs else None,
            scripts=sorted({hashlib.sha256(facts["source"].encode()).hexdigest() for facts in runs.values()})))
    return found


def table(found: list[dict], failed: dict[str, str]) -> str:
    """Markdown: a line a row, then what failed."""
    def number(value: float | None, form: str = ".4f") -> str:
        return "–" if value is None else format(value, form)

    def paired(facts: dict) -> str:
        return f"{number(facts.get('difference'), '+.4f')} ± {number(facts.get('difference_stderr'))}"

    names = sorted({name for row in found for name in row["others"]})
    heads = ["", "val_bpb", "std. dev.", "seeds", "− first row, paired",
             *(head for name in names for head in (name, f"{name} − first row, paired")), "parameters",
             "code + artifact", "training"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found:
        others = [row["others_against"].get(name, {}) for name in names]
        cells = [row["label"], number(row["mean"]), number(row["std"]), str(len(row["val_bpb"])),
                 paired(row) if row["first"] else "",
                 *(cell for facts in others for cell in (number(facts.get("mean")),
                                                         paired(facts) if row["first"] else "")),
                 number(row["params"], ","), number(row["total_bytes"], ","),
                 number(row["train_seconds"], ".0f") + " s"]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["cut"] for row in found):
        lines += ["", "Not all runs made all of their steps: some met the wall clock first."]
    if len({script for row in found for script in row["scripts"]}) > 1:
        lines += ["", "Not all runs are of the same script: it was changed between them."]
    return "\n".join(lines + [f"\nFailed: {name}: {reason}" for name, reason in failed.items()]) + "\n"


def draw_rows(found: list[dict], figure) -> None:
    """A column of seeds for each row, and their mean and standard deviation."""
    axes = figure.subplots()
    for at, row in enumerate(found):
        axes.scatter([at] * len(row["val_bpb"]), list(row["val_bpb"].values()), color="C0", s=14, alpha=0.6)
        if row["mean"] is not None:
            axes.errorbar([at + 0.12], [row["mean"]], yerr=[row["std"] or 0.0], color="black", marker="o", capsize=3)
    axes.set_xticks(range(len(found)), [row["label"].replace("+", "\n") for row in found], fontsize=8)
    axes.set(ylabel="val_bpb: seeds, and mean ± standard deviation")
    axes.grid(alpha=0.3, axis="y")


def draw_horizons(found: list[dict], figure) -> None:
    """Scores over training tokens: a panel a score, a line for rows that differ in length only, a band for seeds."""
    names = ["val_bpb", *sorted({name for row in found for name in row["others"]})]
    lines = {}
    for row in found:
        rest = {name: value for name, value in row["row"].items() if name != "ITERATIONS"}
        lines.setdefault(label(rest), []).append(row)
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for text, rows in lines.items():
            scored = sorted((row["tokens"], list(values.values())) for row in rows
                            if (values := row["val_bpb"] if name == "val_bpb" else row["others"].get(name)))
            if not scored:
                continue
            tokens, seeds = [at for at, _ in scored], [values for _, values in scored]
            line, = axes.plot(tokens, [statistics.fmean(values) for values in seeds], marker="o", label=text)
            axes.fill_between(tokens, list(map(min, seeds)), list(map(max, seeds)), color=line.get_color(), alpha=0.25)
        axes.set(xlabel="training tokens", ylabel=f"{name}, bits per byte: mean and range of seeds")
        if axes.lines:
            axes.set_xscale("log")
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")


def draw(found: list[dict], out: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    horizons = any("ITERATIONS" in row["row"] for row in found)
    panels = 1 + len({name for row in found for name in row["others"]})
    size = (5.5 * panels, 4.2) if horizons else (max(4.0, 1.2 * len(found)), 4)
    figure = pyplot.figure(figsize=size, layout="constrained")
    (draw_horizons if horizons else draw_rows)(found, figure)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", metavar="NAME=a,b,c")
    parser.add_argument("--seeds", default="1337", help="separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and of the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, with OMP_NUM_THREADS each")
    parser.add_argument("--gpus", default="", help="numbers of GPUs, separated by commas: one run on each at a time")
    parser.add_argument("--beside", type=Path, help="results.json of an earlier sweep, whose rows come first")
    parser.add_argument("--report", action="store_true", help="run nothing, only tell of what is finished")
    parser.add_argument("--nproc", type=int, default=1, help="processes a run (torchrun)")
    arguments = parser.parse_intermixed_args()
    try:
        if not re.fullmatch(r"\d+(,\d+)*", arguments.seeds) or not re.fullmatch(r"(\d+(,\d+)*)?", arguments.gpus):
            raise InputError("--seeds and --gpus take whole numbers separated by commas")
        if min(arguments.nproc, arguments.jobs) < 1 or (arguments.nproc > 1 and "," in arguments.gpus):
            raise InputError("--nproc and --jobs are at least 1, and with several processes a run --gpus is one "
                             "number")
        if arguments.gpus and arguments.jobs > 1:
            raise InputError("--gpus has one run on each GPU, so --jobs does not go with it")
        rows, seeds = parse_grid(arguments.grid), sorted({int(seed) for seed in arguments.seeds.split(",")})
        earlier = read_results(arguments.beside) if arguments.beside else []
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{arguments.out}: cannot be made: {error.strerror}") from None
        lanes = arguments.gpus.split(",") if arguments.gpus else [None] * arguments.jobs
        failed = {} if arguments.report else run_all(rows, seeds, arguments.out, arguments.nproc, lanes)
        found = summary(rows, seeds, arguments.out, earlier)
        (arguments.out / "README.md").write_text(table(found, failed), encoding="utf-8")
        results = json.dumps(dict(rows=found, failed=failed), indent=2) + "\n"
        (arguments.out / "results.json").write_text(results, encoding="utf-8")
        draw(found, arguments.out / "plot.png")
        print(table(found, failed), end="")
    except InputError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
