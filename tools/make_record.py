"""Turns the logs of one or more seeds into a record folder, and checks such a folder again.

    python tools/make_record.py logs/a.txt logs/b.txt logs/c.txt --name MDLM_demo \\
        --author "A. Name" --github-id name --blurb "what was done"
    python tools/make_record.py --check records/track_non_record_16mb/2026-01-31_MDLM_demo

Writes <out>/<track>/<date>_<name>/ with README.md, submission.json, the logs, the script as it ran
and requirements.txt, and the same submission.json beside <out>, at the root of the project. Every
number is read from the logs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import common

import train_mdlm as tm
from train_mdlm import BUDGET_SECONDS, SIZE_LIMIT_BYTES, InputError

SEPARATOR = "\n" + "=" * 100 + "\n"  # between the source of the script and the log
HEADLINES = {  # what the score behind val_bpb is
    "nelbo": "any-order NELBO, exact bytes, weights read back from disk",
    "ar": "autoregressive code length, exact bytes, weights read back from disk",
}
# All else in submission.json comes from the logs.
TYPED = ("author", "github_id", "name", "blurb", "track")
# What has to be the same for all seeds
ONE_SYSTEM = "source dataset hardware torch preset world_size params estimator".split()


# ---- Logs


class Run(NamedTuple):
    """What the log of one finished run says."""

    source: str  # of the script
    seed: int
    preset: str
    overridden: dict[str, str]  # what was set by hand: value by NAME
    date: str
    hardware: str
    torch: str
    world_size: int
    dataset: str
    params: int
    lives: int  # more than one if it was interrupted
    skipped_steps: int
    step_stop: int
    train_seconds: float
    eval_seconds: float
    storage: str
    artifact_bytes: int
    code_bytes: int
    total_bytes: int
    val_loss: float
    val_bpb: float
    stderr: float
    estimator: str
    seqs: int
    tokens: int
    bytes: int
    others: dict[str, tuple[float, int]]  # bits per byte and windows of the other scores


def lives(path: Path) -> tuple[str, list[str]]:
    """The script's source, and the lines of each life of a run: several if it was interrupted and
    resumed, without those before it began again from nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    source, separator, body = text.partition(SEPARATOR)
    if not separator:
        reason = "it does not begin with the script's source"
        raise InputError(f"{path}: not a log of train_mdlm.py ({reason})")
    if SEPARATOR in body:
        raise InputError(f"{path}: the script was changed between two lives of this run")
    if len(set(re.findall(r"^run_id:(\S+)", body, re.MULTILINE))) != 1:
        raise InputError(f"{path}: holds more than one run")
    bodies = re.split(r"^(?=run_id:)", body, flags=re.MULTILINE)[1:]
    begin = 0
    for number, life in enumerate(bodies):
        if not re.search(r"^resumed:", life, re.MULTILINE):
            begin = number
    return source, bodies[begin:]


class LogLines:
    """The lines of one life of a run, to be searched."""

    def __init__(self, body: str, path: Path):
        self.body = body
        self.path = path

    def find(self, pattern: str, what: str) -> tuple[str, ...]:
        """The groups of the last line that fits; InputError says `what` the log lacks."""
        matches = list(re.finditer(pattern, self.body, re.MULTILINE))
        if not matches:
            unfinished = "the run did not finish, or it is not a log of train_mdlm.py"
            raise InputError(f"{self.path}: no {what} in this log; {unfinished}")
        return matches[-1].groups()

    def find_one(self, pattern: str, what: str) -> str:
        (group,) = self.find(pattern, what)
        return group


def parse_settings(text: str) -> dict[str, str]:
    """Value by NAME of settings as the log has them; values may have spaces in them."""
    settings = re.split(r" (?=[A-Z][A-Z0-9_]*=)", text)
    return dict(setting.split("=", 1) for setting in settings)


def hardware_of(bodies: list[str], path: Path) -> str:
    """What all lives of a run were on."""
    machines = []
    for life in bodies:
        machine = LogLines(life, path).find_one(r"^hardware:(\S+)", "hardware line")
        if machine not in machines:
            machines.append(machine)
    return " and ".join(machines).replace("_", " ")


def skipped_steps(bodies: list[str]) -> int:
    """How many steps were skipped because their gradients were not finite."""
    pattern = r"^step:\d+ not finite: .*skipped:(\d+)$"
    totals = re.findall(pattern, "".join(bodies), re.MULTILINE)
    return max(map(int, totals), default=0)


def parse_log(path: Path) -> Run:
    """What the log of a finished run says; InputError if something is missing."""
    source, bodies = lives(path)
    # The last life has the last validation, the sizes and the scores.
    last_life = LogLines(bodies[-1], path)
    find = last_life.find
    find_one = last_life.find_one
    given = find_one(r"^overridden: (.+)$", "overrides")
    step_stop, train_ms = find(
        r"^step:(\d+)/\d+ val_loss:\S+ .*train_time:(\d+)ms", "last validation"
    )
    storage, artifact_bytes = find(r"^Serialized model (\S+): (\d+) bytes", "artifact size")
    stderr = find_one(
        r"^final_\S+_roundtrip val_loss:\S+ val_bpb:\S+ stderr:(\S+) eval_time:", "score"
    )
    val_loss, val_bpb = find(
        r"^final_\S+_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", "exact score"
    )
    headline, seqs, tokens, nbytes = find(
        r"^score:(nelbo|ar) .*seqs:(\d+) tokens:(\d+) bytes:(\d+)", "score line"
    )
    scored = r"^score:(\w+) (?:biased:1 )?bpb:(\S+) .*seqs:(\d+) .*time:(\d+)ms"
    scores = re.findall(scored, last_life.body, re.MULTILINE)
    return Run(
        source=source,
        seed=int(find_one(r"^hyperparameters: .*? SEED=(\d+)", "seed")),
        preset=find_one(r"^hyperparameters: PRESET=(\S+)", "preset"),
        overridden={} if given == "nothing" else parse_settings(given),
        date=find_one(r"^run_id:\S+ started:(\d{4}-\d\d-\d\d)", "start line"),
        hardware=hardware_of(bodies, path),
        torch=find_one(r"^hardware:\S+ torch:(\S+)", "hardware line"),
        world_size=int(find_one(r"^world_size:(\d+)", "world size")),
        dataset=find_one(r"^dataset:(\S+)", "dataset line"),
        params=int(find_one(r"^model_params:(\d+)", "parameter count")),
        lives=len(bodies),
        skipped_steps=skipped_steps(bodies),
        step_stop=int(step_stop),
        train_seconds=int(train_ms) / 1000,
        eval_seconds=sum(int(ms) for _, _, _, ms in scores) / 1000,
        storage=storage,
        artifact_bytes=int(artifact_bytes),
        code_bytes=int(find_one(r"^Code size: (\d+) bytes", "code size")),
        total_bytes=int(find_one(r"^Total submission size \S+: (\d+) bytes", "total size")),
        val_loss=float(val_loss),
        val_bpb=float(val_bpb),
        stderr=float(stderr),
        estimator=HEADLINES[headline],
        seqs=int(seqs),
        tokens=int(tokens),
        bytes=int(nbytes),
        others={
            name: (float(bpb), int(windows))
            for name, bpb, windows, _ in scores
            if name not in HEADLINES
        },
    )


def parse_logs(paths: list[Path]) -> list[Run]:
    """The runs, by seed; InputError unless they are those of one system with different seeds."""
    runs = sorted((parse_log(path) for path in paths), key=lambda run: run.seed)
    for name in ONE_SYSTEM:
        if len({getattr(run, name) for run in runs}) > 1:
            raise InputError(f"the logs differ in {name}: one record is one system")
    if len({run.seed for run in runs}) < len(runs):
        raise InputError("two of the logs have the same seed")
    for run in runs:
        adds_up = run.total_bytes == run.code_bytes + run.artifact_bytes
        if run.code_bytes != len(run.source.encode()) or not adds_up:
            raise InputError(f"the sizes in the log of seed {run.seed} do not add up")
    return runs


# ---- What follows from them


def over_budget(runs: list[Run]) -> list[str]:
    """What the challenge's rules would not allow, a sentence each."""
    total_bytes = max(run.total_bytes for run in runs)
    train_seconds = max(run.train_seconds for run in runs)
    eval_seconds = max(run.eval_seconds for run in runs)
    budgets = (
        ("code + artifact", total_bytes, SIZE_LIMIT_BYTES, "bytes"),
        ("training", train_seconds, BUDGET_SECONDS + 1, "s"),
        ("evaluation", eval_seconds, BUDGET_SECONDS, "s"),
    )
    return [
        f"{name} is {value:,.0f} {unit}, more than the {limit:,.0f} allowed"
        for name, value, limit, unit in budgets
        if value > limit
    ]


def seed_result(run: Run) -> dict:
    """The entry of one seed in submission.json."""
    result = dict(
        val_loss=run.val_loss,
        val_bpb=run.val_bpb,
        val_bpb_stderr=run.stderr,
        bytes_model=run.artifact_bytes,
        step_stop=run.step_stop,
        wallclock_seconds=run.train_seconds,
        eval_seconds=run.eval_seconds,
    )
    if run.lives > 1:
        result["lives"] = run.lives
    if run.skipped_steps:
        result["skipped_steps"] = run.skipped_steps
    return result


def submission(runs: list[Run], typed: dict[str, str]) -> dict:
    """submission.json: the challenge's fields.

    Sizes and times are the largest of the seeds, scores their mean.
    """
    first = runs[0]
    bpbs = [run.val_bpb for run in runs]
    return typed | dict(
        date=max(run.date for run in runs),
        dataset=first.dataset,
        val_bpb_estimator=first.estimator,
        val_loss=round(statistics.mean(run.val_loss for run in runs), 8),
        val_bpb=round(statistics.mean(bpbs), 8),
        val_bpb_std=round(statistics.stdev(bpbs), 8) if len(runs) > 1 else None,
        seeds=[run.seed for run in runs],
        seed_results={str(run.seed): seed_result(run) for run in runs},
        bytes_total=max(run.total_bytes for run in runs),
        bytes_code=first.code_bytes,
        step_stop=max(run.step_stop for run in runs),
        wallclock_seconds=max(run.train_seconds for run in runs),
        eval_seconds=max(run.eval_seconds for run in runs),
        model_params=first.params,
        hardware=first.hardware,
        pytorch_version=first.torch,
        script_sha256=hashlib.sha256(first.source.encode()).hexdigest(),
        over_budget=over_budget(runs),
    )


def other_scores(runs: list[Run]) -> list[str]:
    """Means of the scores beside the headline that all seeds have, with their windows."""
    found = []
    for name, (_, windows) in runs[0].others.items():
        if all(name in run.others for run in runs):
            mean = statistics.mean(run.others[name][0] for run in runs)
            found.append(f"{name} {mean:.4f} ({windows:,} windows)")
    return found


def notes(runs: list[Run]) -> str:
    """What a reader of the table has to know."""
    sentences = ["The standard error is that of the score as an estimate from these windows."]
    for run in runs:
        if run.lives > 1:
            sentences.append(f"Seed {run.seed} was interrupted and resumed, in {run.lives} lives.")
    for run in runs:
        if run.skipped_steps:
            skipped = f"skipped {run.skipped_steps} steps"
            sentences.append(f"Seed {run.seed} {skipped} with gradients that were not finite.")
    return " ".join(sentences)


def commands(runs: list[Run]) -> list[str]:
    """How to run it again, a line for each seed."""
    settings = [
        f"{name}={shlex.quote(value)}"
        for name, value in runs[0].overridden.items()
        if name not in ("SEED", "RUN_ID")
    ]
    torchrun = f"torchrun --standalone --nproc_per_node={runs[0].world_size} train_mdlm.py"
    return [" ".join([*settings, f"SEED={run.seed}", torchrun]) for run in runs]


def readme(runs: list[Run], facts: dict) -> str:
    """README.md of the record."""
    first = runs[0]
    spread = " (one seed)"
    if len(runs) > 1:
        spread = f" ± {facts['val_bpb_std']:.4f} (standard deviation over seeds)"
    lines = [f"# {facts['name']}", "", facts["blurb"], ""]
    for warning in facts["over_budget"]:
        lines += [f"**OVER BUDGET: {warning}.**", ""]
    lines += [
        f"**val_bpb {facts['val_bpb']:.4f}**{spread}",
        "",
        f"- data set: `{first.dataset}`, {first.seqs:,} validation windows, {first.tokens:,} "
        f"tokens, {first.bytes:,} bytes",
        f"- what the number is: {first.estimator}",
    ]
    others = other_scores(runs)
    if others:
        lines.append(f"- other scores, mean over seeds, bits per byte: {', '.join(others)}")
    lines += [
        f"- hardware: {first.hardware}, torch {first.torch}",
        f"- {first.params:,} parameters, {first.storage}; code + artifact "
        f"{facts['bytes_total']:,} bytes of {SIZE_LIMIT_BYTES:,}",
        "",
        "| seed | val_bpb | std. error | val_loss | steps | training | evaluation "
        "| artifact bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append(
            f"| {run.seed} | {run.val_bpb:.4f} | {run.stderr:.4f} | {run.val_loss:.4f} "
            f"| {run.step_stop} | {run.train_seconds:.0f} s | {run.eval_seconds:.0f} s "
            f"| {run.artifact_bytes:,} |"
        )
    lines += ["", notes(runs), "", "```bash", *commands(runs), "```", ""]
    return "\n".join(lines)


def contents(runs: list[Run], typed: dict[str, str]) -> dict[str, str]:
    """File name → text of everything in the folder that follows from the logs."""
    facts = submission(runs, typed)
    return {
        "submission.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        "README.md": readme(runs, facts),
        "train_mdlm.py": runs[0].source,
    }


# ---- Record folders


def make(logs: list[Path], typed: dict[str, str], out: Path) -> Path:
    """Writes the folder of a record; its place."""
    runs = parse_logs(logs)
    for name in ("name", "track"):
        if not re.fullmatch(r"[\w.+-]+", typed[name]):
            allowed = "letters, digits and . _ + - only"
            raise InputError(f"--{name} {typed[name]!r} becomes a folder: {allowed}")
    files = contents(runs, typed)
    date = max(run.date for run in runs)
    folder = out / typed["track"] / f"{date}_{typed['name']}"
    if folder.exists():
        raise InputError(f"{folder} is there already; move it away or choose another --name")
    for path in logs:
        files[f"train_seed{parse_log(path).seed}.log"] = path.read_text(encoding="utf-8")
    requirements = common.ROOT / "requirements.txt"
    files["requirements.txt"] = requirements.read_text(encoding="utf-8")
    for name, text in files.items():
        tm.write_file(folder / name, text.encode())
    tm.write_file(out.parent / "submission.json", files["submission.json"].encode())
    return folder


def check(folder: Path) -> None:
    """InputError unless everything in the folder follows from its logs."""
    logs = sorted(folder.glob("train_seed*.log"))
    if not logs:
        raise InputError(f"{folder}: no train_seed*.log")
    path = folder / "submission.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        typed = {name: stated[name] for name in TYPED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {error!r}") from None
    runs = parse_logs(logs)
    derived = submission(runs, typed)
    for name in derived.keys() | stated.keys():
        if stated.get(name) != derived.get(name):
            difference = f"{name} is {stated.get(name)!r}, the logs say {derived.get(name)!r}"
            raise InputError(f"{path}: {difference}")
    for name, text in contents(runs, typed).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            raise InputError(f"{path}: is not what the logs say it was")


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("logs", nargs="*", type=Path, help="logs of finished runs, one a seed")
    check_help = "verify a record folder and write nothing"
    parser.add_argument("--check", type=Path, metavar="FOLDER", help=check_help)
    parser.add_argument("--name", help="of the record; part of the folder's name")
    parser.add_argument("--author", default="")
    parser.add_argument("--github-id", default="")
    parser.add_argument("--blurb", default="", help="a sentence or two on what was done")
    parser.add_argument("--track", default="track_non_record_16mb")
    parser.add_argument("--out", type=Path, default=common.ROOT / "records")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
        print(f"{arguments.check}: everything follows from the logs")
        return
    if not arguments.logs or not arguments.name:
        raise InputError("give logs and --name, or --check FOLDER")
    typed = {name: getattr(arguments, name) for name in TYPED}
    folder = make(arguments.logs, typed, arguments.out)
    check(folder)
    print(folder)


if __name__ == "__main__":
    main()
