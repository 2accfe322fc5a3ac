"""Runs the script over a grid of hyperparameters and seeds, and tells what differs.

    PRESET=demo python tools/sweep.py NUM_HEADS=2,4,8 MASK_EPS=0.001,0.1 --seeds 1337,42,2026 \\
        --out sweeps/heads

Every combination is a row, every seed a run. NUM_HEADS=NUM_KV_HEADS=2,4 gives both the same value,
and MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat changes both at once. What is set in the
environment holds for all runs; values with commas in them, such as SCORES=nelbo,l2r:64, can be
given there only.

Runs go one after the other, or --jobs of them side by side, or one on each of the GPUs that --gpus
names. Logs and artifacts are kept under OUT/logs. A run that is finished there is not run again,
and one that was interrupted goes on from its last checkpoint, if the script is still the same;
otherwise it begins anew, and its old files get other names. A run that failed is noted, the others
go on, and a second call tries it again. When the sweep is stopped (Ctrl-C, SIGTERM, SIGHUP)
its runs write their checkpoints and end with it; the same command goes on from there.

Afterwards, or at once with --report, there are three files:

    OUT/README.md     the table: mean and standard deviation over seeds, and differences to the
                      first row that trains on as many tokens, paired by seed, with standard errors
    OUT/results.json  the same for programs
    OUT/plot.png      a picture: of scores over training tokens if ITERATIONS is in the grid

With --beside, the rows of an earlier results.json come first in the table, the picture and the
comparisons. Rows are compared only if val_bpb is the same score, of the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import common
from run_log import HEADLINES, Run, parse_log

import train_mdlm as tm
from train_mdlm import Hyperparameters, InputError

SCRIPT = common.ROOT / "train_mdlm.py"
KNOBS = {spec.name.upper() for spec in dataclasses.fields(Hyperparameters)}
NOT_IN_A_GRID = {"SEED", "RUN_ID", "EVAL_ONLY"}
GRACE_SECONDS = 60.0  # that a run has to finish its step and write a checkpoint when it is stopped

Row = dict[str, str]  # value by NAME, as it will be in the environment
Scores = dict[int, float]  # bits per byte by seed


# ---- The grid


def parse_axis(argument: str) -> list[Row]:
    """The values of NAME=a,b,c, NAME=NAME=a,b,c or NAME/NAME=a/b,c/d, in turn; InputError for what
    is none of them."""
    *heads, values = argument.split("=")
    names = [name for head in heads for name in head.split("/")]
    joined = len(names) > len(heads)  # by /
    tied = len(heads) > 1  # by =
    choices = values.split(",")
    twice = len(set(names)) < len(names) or len(set(choices)) < len(choices)
    if not names or not values or twice or (tied and joined) or NOT_IN_A_GRID & {*names}:
        form = "NAME=value,value,… once for each hyperparameter and no value twice"
        raise InputError(f"{argument}: give {form}; seeds with --seeds")
    for name in names:
        if name not in KNOBS:
            reason = "is not a hyperparameter of train_mdlm.py; see train_mdlm.py --help"
            raise InputError(f"{name} {reason}")
    if "SCORES" in names or ("QUANT_MODE" in names and ":" in values):
        reason = "a grid is split at commas, which are part of such a value"
        raise InputError(f"{argument}: {reason}; set it in the environment, for all runs")
    rows = []
    for choice in choices:
        parts = choice.split("/") if joined else [choice] * len(names)
        if len(parts) != len(names):
            raise InputError(f"{argument}: {choice} is not one value for each of {'/'.join(names)}")
        rows.append(dict(zip(names, parts, strict=True)))
    return rows


def parse_grid(arguments: Sequence[str]) -> list[Row]:
    """The rows of a grid, one for each combination; InputError for what the script would refuse."""
    axes = [parse_axis(argument) for argument in arguments]
    seen: set[str] = set()
    for argument, axis in zip(arguments, axes, strict=True):
        if seen & axis[0].keys():
            raise InputError(f"{argument}: give every hyperparameter once")
        seen |= axis[0].keys()
    rows = []
    for parts in itertools.product(*axes):
        row = {}
        for part in parts:
            row |= part
        rows.append(row)
    return rows


def label(row: Row) -> str:
    return "+".join(f"{name}={value}" for name, value in row.items()) or "as-it-is"


# ---- Runs


class Processes:
    """The runs that are going on, each in a process group of its own, which none outlives."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running: list[subprocess.Popen] = []
        self.ended = False

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """Runs a command; InputError if `end` was called."""
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
        with self.lock:
            if self.ended:
                raise InputError("the sweep was stopped")
            process = subprocess.Popen(command, start_new_session=True, **pipes, **options)
            self.running.append(process)
        printed = process.communicate()
        with self.lock:
            self.running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, *printed)

    def signal(self, number: int) -> None:
        """Sends a signal to every process of every run."""
        for process in self.running:
            with contextlib.suppress(OSError):  # it has ended
                os.killpg(process.pid, number)

    def end(self) -> None:
        """Stops all runs and starts no other; a second Ctrl-C does not wait for checkpoints."""
        with self.lock:
            self.ended = True
            if not self.running:
                return
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("stopping the runs; they write their checkpoints", flush=True)
            try:
                self.signal(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_SECONDS
                for process in self.running:
                    process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.signal(signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the script: a row of the grid and a seed, with its log in out/logs."""

    row: Row
    seed: int
    out: Path

    @property
    def run_id(self) -> str:
        return re.sub(r"[^\w.+=@-]", "-", f"{label(self.row)}_seed{self.seed}")

    def environment(self) -> dict[str, str]:
        """With absolute paths, because it runs in another folder.

        InputError if the values do not fit together.
        """
        env = {**os.environ, **self.row, "SEED": str(self.seed), "RUN_ID": self.run_id}
        hp = Hyperparameters.from_env(env)
        for name in ("data_path", "tokenizer_path"):
            env[name.upper()] = str(Path(getattr(hp, name)).resolve())
        return env

    def hyperparameters(self) -> Hyperparameters:
        """InputError if the values do not fit together."""
        return Hyperparameters.from_env(self.environment())

    def begun(self) -> Path | None:
        """The log, finished or not, if there is one with these hyperparameters."""
        path = self.out / "logs" / f"{self.run_id}.txt"
        try:
            hp = self.hyperparameters()
            text = path.read_text(encoding="utf-8")
        except (InputError, OSError, UnicodeDecodeError):
            return None
        resolved = re.findall(r"^hyperparameters: .*$", text, re.MULTILINE)
        if not resolved:
            return None
        for spec in dataclasses.fields(hp):
            settled = spec.name == "compute_dtype"  # auto becomes what the device does
            if not settled and f" {hp.shown(spec.name)} " not in f"{resolved[-1]} ":
                return None
        return path

    def finished(self) -> Run | None:
        """What the log says; None if there is no finished one with these hyperparameters."""
        path = self.begun()
        try:
            return parse_log(path) if path else None
        except InputError:
            return None

    def goes_on(self) -> bool:
        """Whether the log is that of an interrupted run of this script. One that is finished, and
        still no result, is not."""
        path = self.begun()
        text = path.read_text(encoding="utf-8") if path else ""
        return text.startswith(SCRIPT.read_text(encoding="utf-8")) and "\nfinished:" not in text

    def set_aside(self) -> None:
        """Renames what another run left under this name; nothing is replaced. InputError if that
        is still going on."""
        left = list((self.out / "logs").glob(f"{self.run_id}.*"))
        for old in left:
            names = (f"set-aside-{number}-{old.name}" for number in itertools.count(1))
            new = next(new for name in names if not (new := old.with_name(name)).exists())
            with common.sole_use(old):
                old.rename(new)
        if left:
            print(f"{self.run_id}: begins anew; what was there is set-aside-… now", flush=True)

    def run(self, processes: int, gpu: str | None, group: Processes) -> str:
        """Runs the script; returns the reason if it failed, else an empty string."""
        try:
            env = self.environment()
        except InputError as error:
            return str(error)
        if not self.goes_on():
            self.set_aside()
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, str(SCRIPT)]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*torchrun, f"--nproc_per_node={processes}"]
        done = group.run(command, cwd=self.out, env=env)
        if done.returncode == 0:
            if not self.finished():
                return self.fault_of_log()
            for checkpoint in (self.out / "logs").glob(f"{self.run_id}.*.ckpt"):
                checkpoint.unlink()
            return ""
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        reason, *_ = [*errors, *lines, f"exit status {done.returncode}"]
        return reason.strip()

    def fault_of_log(self) -> str:
        """Why the log of a run that went well does not count."""
        path = self.out / "logs" / f"{self.run_id}.txt"
        try:
            parse_log(path)
        except (InputError, OSError) as error:
            return tm.explain(error)
        return f"{path}: is of other settings"


def run_all(jobs: list[Job], processes: int, lanes: list[str | None]) -> dict[str, str]:
    """Runs what is not finished, side by side in the lanes (GPUs, or None).

    Returns the reasons of what failed, by run.
    """
    free_lanes: Queue[str | None] = Queue()
    for lane in lanes:
        free_lanes.put(lane)
    failed: dict[str, str] = {}
    group = Processes()
    lock = threading.Lock()

    def run_one(job: Job) -> None:
        if job.finished():
            print(f"{job.run_id}: finished before", flush=True)
            return
        gpu = free_lanes.get()
        try:
            reason = job.run(processes, gpu, group)
        except (InputError, OSError) as error:
            reason = tm.explain(error)
        finally:
            free_lanes.put(gpu)
        facts = job.finished()
        with lock:
            if group.ended:
                return
            if reason:
                failed[job.run_id] = reason
                print(f"{job.run_id}: FAILED: {reason}", flush=True)
            else:
                print(f"{job.run_id}: val_bpb {facts.val_bpb:.4f}", flush=True)

    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            for future in as_completed([pool.submit(run_one, job) for job in jobs]):
                future.result()
        except BaseException as error:
            group.end()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                remedy = "the same command goes on from here, --report tells what is finished"
                raise InputError(f"{error}; {remedy}") from None
            raise
    return failed


# ---- What they found


def against(values: Scores, first: Scores) -> dict[str, float | None]:
    """Mean and deviation over seeds; mean difference to `first`, paired by seed, and its standard
    error. None where there are too few seeds."""
    found = dict.fromkeys(("mean", "std", "difference", "difference_stderr"))
    differences = [values[seed] - first[seed] for seed in values.keys() & first.keys()]
    if values:
        found["mean"] = statistics.fmean(values.values())
    if len(values) > 1:
        found["std"] = statistics.stdev(values.values())
    if differences:
        found["difference"] = statistics.fmean(differences)
    if len(differences) > 1:
        found["difference_stderr"] = statistics.stdev(differences) / len(differences) ** 0.5
    return found


def read_results(path: Path) -> list[dict]:
    """The rows of an earlier results.json; InputError if that is something else."""
    numbers = "mean std params total_bytes train_seconds tokens planned_tokens".split()
    kinds = dict.fromkeys(numbers, (int, float, type(None)))
    kinds |= dict(label=str, row=dict, others_against=dict, scripts=list, cut=bool)
    kinds |= dict(first=(str, type(None)))

    def by_seed(values: dict[str, float]) -> Scores:
        return {int(seed): float(bpb) for seed, bpb in values.items()}

    try:
        rows = common.read_json(path)["rows"]
        for row in rows:
            row["val_bpb"] = by_seed(row["val_bpb"])
            row["others"] = {name: by_seed(values) for name, values in row["others"].items()}
            if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                raise TypeError
            table([row], {})  # which reads all that a table needs
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = "a results.json of this version of tools/sweep.py"
        raise InputError(f"{path}: is not {wanted}") from None
    return rows


def summarize(row: Row, seeds: list[int], out: Path, before: list[dict]) -> dict:
    """The entry of a row in results.json, compared with the first one of `before` that trains on
    as many tokens."""
    jobs = [Job(row, seed, out) for seed in seeds]
    runs = {job.seed: run for job in jobs if (run := job.finished())}
    planned_tokens = first = None
    with contextlib.suppress(InputError):  # then the row is empty
        hp = jobs[0].hyperparameters()
        planned_tokens = hp.iterations * hp.train_batch_tokens
        text = text_of(runs)
        alike = (
            old
            for old in before
            if old["planned_tokens"] == planned_tokens and same_text(old.get("text"), text)
        )
        first = next(alike, None)
    bpb = {seed: run.val_bpb for seed, run in runs.items()}
    compared_bpb = first["val_bpb"] if first else bpb
    others = scores_of_all(runs)
    others_against = {}
    for name, values in others.items():
        compared = first["others"].get(name, {}) if first else values
        others_against[name] = against(values, compared)
    found = dict(
        label=label(row),
        row=row,
        planned_tokens=planned_tokens,
        val_bpb=bpb,
        others=others,
        **against(bpb, compared_bpb),
        others_against=others_against,
        first=first["label"] if first else None,
        params=None,
        total_bytes=None,
        train_seconds=None,
        cut=False,
        tokens=None,
        scripts=[],
        text=text_of(runs),
    )
    if runs:
        logs = list(runs.values())
        steps = [run.step_stop for run in logs]
        found |= dict(
            params=logs[0].params,
            total_bytes=max(run.total_bytes for run in logs),
            train_seconds=statistics.fmean(run.train_seconds for run in logs),
            cut=min(steps) < hp.iterations,
            tokens=max(steps) * hp.train_batch_tokens,
            scripts=sorted({hashlib.sha256(run.source.encode()).hexdigest() for run in logs}),
        )
    return found


def text_of(runs: dict[int, Run]) -> dict | None:
    """What the runs of a row were scored on, and which score val_bpb is; None if there are no runs,
    or if they differ in that."""
    names = ("dataset", "tokenizer_sha256", "val_tokens", "val_bytes")
    texts = [
        {name: getattr(run, name) for name in names} | dict(score=HEADLINES[run.system][0])
        for run in runs.values()
    ]
    return texts[0] if texts and all(text == texts[0] for text in texts) else None


def same_text(first: dict | None, second: dict | None) -> bool:
    """Whether two rows may be compared: as far as is known, with the same score of one text."""
    if not first or not second:
        return True
    return all(
        not first[name] or not second.get(name) or first[name] == second[name] for name in first
    )


def scores_of_all(runs: dict[int, Run]) -> dict[str, Scores]:
    """By name the scores beside the headline that all runs have, each by seed."""
    if not runs:
        return {}
    names = set.intersection(*(set(run.others) for run in runs.values()))
    found = {}
    for name in sorted(names):
        found[name] = {seed: run.others[name][0] for seed, run in runs.items()}
    return found


# ---- Table and picture

TABLE_BEGINS = "|  | val_bpb | std. dev. |"


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def paired(facts: dict) -> str:
    """The difference to the first row, as `against` found it."""
    difference = number(facts.get("difference"), "+.4f")
    return f"{difference} ± {number(facts.get('difference_stderr'))}"


def other_names(found: list[dict]) -> list[str]:
    """The scores beside val_bpb that some row has."""
    return sorted({name for row in found for name in row["others"]})


def table(found: list[dict], failed: dict[str, str]) -> str:
    """Markdown: a line a row, then what failed."""
    names = other_names(found)
    heads = ["", "val_bpb", "std. dev.", "seeds", "− first row, paired"]
    for name in names:
        heads += [name, f"{name} − first row, paired"]
    heads += ["parameters", "code + artifact", "training"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found:
        is_first = not row["first"]
        cells = [row["label"], number(row["mean"]), number(row["std"]), str(len(row["val_bpb"]))]
        cells.append("" if is_first else paired(row))
        for name in names:
            facts = row["others_against"].get(name, {})
            cells.append(number(facts.get("mean")))
            cells.append("" if is_first else paired(facts))
        cells.append(number(row["params"], ","))
        cells.append(number(row["total_bytes"], ","))
        cells.append(number(row["train_seconds"], ".0f") + " s")
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["cut"] for row in found):
        lines += ["", "Not all runs made all of their steps: some met the wall clock first."]
    if len({script for row in found for script in row["scripts"]}) > 1:
        lines += ["", "Not all runs are of the same script: it was changed between them."]
    texts = [row["text"] for row in found if row.get("text")]
    if any(not same_text(first, second) for first, second in itertools.combinations(texts, 2)):
        reason = "Not all rows are scored on the same text, or val_bpb is not the same score"
        lines += ["", f"{reason}: those are not compared."]
    for name, reason in failed.items():
        lines += ["", f"Failed: {name}: {reason}"]
    return "\n".join(lines) + "\n"


def draw_rows(found: list[dict], figure) -> None:
    """A column of seeds for each row, and their mean and standard deviation."""
    axes = figure.subplots()
    for place, row in enumerate(found):
        bpbs = list(row["val_bpb"].values())
        axes.scatter([place] * len(bpbs), bpbs, color="C0", s=14, alpha=0.6)
        if row["mean"] is not None:
            style = dict(color="black", marker="o", capsize=3)
            axes.errorbar([place + 0.12], [row["mean"]], yerr=[row["std"] or 0.0], **style)
    labels = [row["label"].replace("+", "\n") for row in found]
    axes.set_xticks(range(len(found)), labels, fontsize=8, parse_math=False)
    axes.set(ylabel="val_bpb: seeds, and mean ± standard deviation")
    axes.grid(alpha=0.3, axis="y")


def draw_horizons(found: list[dict], figure) -> None:
    """Scores over training tokens: a panel a score, a line for rows that differ in length only, a
    band for seeds."""
    names = ["val_bpb", *other_names(found)]
    lines: dict[str, list[dict]] = {}
    for row in found:
        rest = {name: value for name, value in row["row"].items() if name != "ITERATIONS"}
        lines.setdefault(common.plain_label(label(rest)), []).append(row)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        for text, rows in lines.items():
            draw_line(axes, text, rows, name)
        ylabel = f"{name}, bits per byte: mean and range of seeds"
        axes.set(xlabel="training tokens", ylabel=ylabel)
        if axes.lines:
            axes.set_xscale("log")
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")


def draw_line(axes, text: str, rows: list[dict], name: str) -> None:
    """The score `name` of some rows over their training tokens."""
    points = []
    for row in rows:
        values = row["val_bpb"] if name == "val_bpb" else row["others"].get(name)
        if values:
            points.append((row["tokens"], list(values.values())))
    if not points:
        return
    tokens, seeds = zip(*sorted(points), strict=True)
    means = [statistics.fmean(values) for values in seeds]
    (line,) = axes.plot(tokens, means, marker="o", label=text)
    lowest = [min(values) for values in seeds]
    highest = [max(values) for values in seeds]
    axes.fill_between(tokens, lowest, highest, color=line.get_color(), alpha=0.25)


def draw(found: list[dict], path: Path) -> None:
    if any("ITERATIONS" in row["row"] for row in found):
        figure = common.new_figure(5.5 * (1 + len(other_names(found))), 4.2)
        draw_horizons(found, figure)
    else:
        figure = common.new_figure(max(4.0, 1.2 * len(found)), 4)
        draw_rows(found, figure)
    common.save_figure(figure, path)


# ---- Command line


def listed_seeds(text: str) -> list[int]:
    return common.whole_numbers("--seeds", text, 0, 2**63 - 1)


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("grid", nargs="+", metavar="NAME=a,b,c")
    parser.add_argument("--seeds", default="1337", help="separated by commas")
    out_help = "folder of the logs and of the table"
    parser.add_argument("--out", type=Path, required=True, help=out_help)
    jobs_help = "runs side by side, with OMP_NUM_THREADS each"
    parser.add_argument("--jobs", type=int, default=1, help=jobs_help)
    gpus_help = "numbers of GPUs, separated by commas: one run on each at a time"
    parser.add_argument("--gpus", default="", help=gpus_help)
    beside_help = "results.json of an earlier sweep, whose rows come first"
    parser.add_argument("--beside", type=Path, help=beside_help)
    report_help = "run nothing, only tell of what is finished"
    parser.add_argument("--report", action="store_true", help=report_help)
    nproc_help = "processes a run (torchrun)"
    parser.add_argument("--nproc", type=int, default=1, help=nproc_help)
    return parser.parse_intermixed_args()


def choose_lanes(arguments: argparse.Namespace) -> list[str | None]:
    """What runs go side by side on: GPUs, or None as often as there are --jobs."""
    if arguments.nproc < 1 or arguments.jobs < 1:
        raise InputError("--nproc and --jobs are at least 1")
    if not arguments.gpus:
        return [None] * arguments.jobs
    gpus = common.whole_numbers("--gpus", arguments.gpus, 0, 1000)
    if arguments.nproc > 1 and len(gpus) > 1:
        raise InputError("with several processes a run --gpus is one number")
    if arguments.jobs > 1:
        raise InputError("--gpus has one run on each GPU, so --jobs does not go with it")
    return [str(gpu) for gpu in gpus]


def check_names(rows: list[Row]) -> None:
    """InputError if the runs of two rows would have the same log."""
    named: dict[str, Row] = {}
    for row in rows:
        other = named.setdefault(Job(row, 0, Path()).run_id, row)
        if other is not row:
            both = f"{label(other)} and {label(row)}"
            raise InputError(f"{both}: their logs would have the same name; give them two --out")


def check_readme(out: Path, begins: str) -> None:
    """InputError if --out has a README.md that does not begin as ours does."""
    readme = out / "README.md"
    if readme.exists() and not common.read_small(readme).startswith(begins.encode()):
        remedy = "this tool did not write; give another folder"
        raise InputError(f"--out {out}: has a README.md that {remedy}")


def check_folder(out: Path) -> None:
    """InputError if --out has something that a sweep would replace, and none wrote."""
    if (out / "results.json").exists():
        read_results(out / "results.json")
    check_readme(out, TABLE_BEGINS)
    common.check_picture(out / "plot.png")


@common.run_tool
def main() -> None:
    arguments = parse_arguments()
    out = arguments.out
    seeds = listed_seeds(arguments.seeds)
    lanes = choose_lanes(arguments)
    rows = parse_grid(arguments.grid)
    found = read_results(arguments.beside) if arguments.beside else []
    check_names(rows)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    failed = {}
    if not arguments.report:
        jobs = [Job(row, seed, out) for seed in seeds for row in rows]
        with common.sole_use(out):
            failed = run_all(jobs, arguments.nproc, lanes)
    for row in rows:
        found.append(summarize(row, seeds, out, found))
    text = table(found, failed)
    results = common.to_json(dict(rows=found, failed=failed), indent=2) + "\n"
    tm.write_file(out / "README.md", text.encode())
    tm.write_file(out / "results.json", results.encode())
    draw(found, out / "plot.png")
    print(text, end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
