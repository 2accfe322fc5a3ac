"""Turns the logs of one or more seeds into a record folder, and checks such a folder again.

    python tools/make_record.py logs/a.txt logs/b.txt logs/c.txt --name MDLM_demo \\
        --author "A. Name" --github-id name --blurb "what was done"
    python tools/make_record.py --check records/track_non_record_16mb/2026-01-31_MDLM_demo

Writes <out>/<track>/<date>_<name>/ with README.md, submission.json, report.html, the logs, the
script as it ran and requirements.txt, and the same submission.json beside <out>, at the root of the
project. Every number is read from the logs; report.html is what tools/report.py makes of them, and
of the artifact beside a log and of --samples, if there are any.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
import statistics
from pathlib import Path

import common
import report
import report_page
from run_log import (
    BIASED,
    Run,
    over_budget,
    parse_log,
    parse_logs,
)

import train_mdlm as tm
from train_mdlm import SIZE_LIMIT_BYTES, InputError

# All else in submission.json comes from the logs and from requirements.txt.
TYPED = ("author", "github_id", "name", "blurb", "track")
# Fields of submission.json with the SHA-256 of files that do not follow from the logs
DIGESTS = {"requirements.txt": "requirements_sha256", "report.html": "report_sha256"}
# Of the requirements.txt that the records have whose submission.json does not name it
EARLIER_REQUIREMENTS = "2e7b9d82a76672ac9745545231846afa0f5ef9553fc5e6a4cba43b1067ca15e7"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- What follows from them


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


def submission(runs: list[Run], typed: dict[str, str], files: dict[str, str]) -> dict:
    """submission.json: the challenge's fields, and digests; `files` are those of the files that do
    not follow from the logs, by field, without those that an earlier record lacks.

    Sizes and times are the largest of the seeds, scores their mean.
    """
    first = runs[0]
    bpbs = [run.val_bpb for run in runs]
    digests = dict(script_sha256=sha256(first.source.encode()))
    if first.tokenizer_sha256:
        digests["tokenizer_sha256"] = first.tokenizer_sha256
        digests |= dict(val_tokens=first.val_tokens, val_bytes=first.val_bytes)
    digests |= files
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
        **digests,
        over_budget=over_budget(runs),
    )


def other_scores(runs: list[Run]) -> list[str]:
    """Means of the scores beside the headline that all seeds have, with their windows."""
    found = []
    for name, (_, windows) in runs[0].others.items():
        if all(name in run.others for run in runs):
            mean = statistics.mean(run.others[name][0] for run in runs)
            biased = ", biased: no code length" if name in BIASED else ""
            found.append(f"{name} {mean:.4f} ({windows:,} windows{biased})")
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
    if first.tokenizer_sha256:
        lines.append(
            f"- the whole split: {first.val_tokens:,} tokens, {first.val_bytes:,} bytes; tokenizer "
            f"SHA-256 `{first.tokenizer_sha256}`"
        )
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
    if "report_sha256" in facts:
        lines += ["", "[report.html](report.html), opened in a browser, shows the runs."]
    lines += ["", notes(runs), "", "```bash", *commands(runs), "```", ""]
    return "\n".join(lines)


def contents(runs: list[Run], typed: dict[str, str], files: dict[str, str]) -> dict[str, str]:
    """File name → text of everything in the folder that follows from the logs."""
    facts = submission(runs, typed, files)
    return {
        "submission.json": common.to_json(facts, indent=2) + "\n",
        "README.md": readme(runs, facts),
        "train_mdlm.py": runs[0].source,
    }


# ---- Record folders


def is_submission(value: object) -> bool:
    """Whether this is what make_record.py writes into submission.json."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(name), str) for name in (*TYPED, "script_sha256"))


def made_submission(path: Path) -> bool:
    """Whether make_record.py made this file."""
    with contextlib.suppress(InputError):
        return is_submission(common.read_json(path))
    return False


def check_typed(typed: dict[str, str]) -> None:
    """InputError for what cannot be in a record."""
    for name in ("name", "track"):
        if not re.fullmatch(r"[\w+-][\w.+-]*", typed[name]):
            allowed = "letters, digits and . _ + - only, and no dot at the beginning"
            raise InputError(f"--{name} {typed[name]!r} becomes a folder: {allowed}")
    for name, text in typed.items():
        if text != text.encode(errors="replace").decode() or "\r" in text:
            raise InputError(f"--{name.replace('_', '-')} {text!r}: is not plain text in UTF-8")


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """All of the files or nothing."""
    written = []
    try:
        for name, text in files.items():
            tm.write_file(folder / name, text.encode())
            written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink()
        with contextlib.suppress(OSError):  # it is not there, or not empty
            folder.rmdir()
        raise


def make(logs: list[Path], typed: dict[str, str], out: Path, samples: list[Path]) -> Path:
    """Writes the folder of a record; its place."""
    check_typed(typed)
    runs = parse_logs(logs)
    date = max(run.date for run in runs)
    folder = out / typed["track"] / f"{date}_{typed['name']}"
    if folder.exists():
        raise InputError(f"{folder} is there already; move it away or choose another --name")
    common.check_output(folder / "submission.json", lambda path: False)
    beside = out.parent / "submission.json"
    common.check_output(beside, made_submission)
    shown = report.build(logs, report.Choice(samples=tuple(samples)), typed["name"])
    kept = {
        "requirements.txt": (common.ROOT / "requirements.txt").read_text(encoding="utf-8"),
        "report.html": report_page.page(shown),
    }
    digests = {DIGESTS[name]: sha256(text.encode()) for name, text in kept.items()}
    files = contents(runs, typed, digests) | kept
    for path in logs:
        files[log_name(parse_log(path))] = path.read_text(encoding="utf-8")
    write_folder(folder, files)
    tm.write_file(beside, files["submission.json"].encode())
    return folder


def log_name(run: Run) -> str:
    """Of the log in the folder of a record."""
    return f"train_seed{run.seed}.log"


def shown(value: object) -> str:
    """For a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_digests(folder: Path, stated: dict) -> dict[str, str]:
    """Those that submission.json has of DIGESTS; InputError if a file has another one."""
    digests = {field: stated[field] for field in DIGESTS.values() if field in stated}
    named = {"requirements_sha256": EARLIER_REQUIREMENTS} | digests
    for name, field in DIGESTS.items():
        path = folder / name
        if field not in named and path.exists():
            raise InputError(f"{path}: submission.json says nothing of it")
        if field in named and (not path.is_file() or sha256(path.read_bytes()) != named[field]):
            raise InputError(f"{path}: is not the file that the record was made with")
    return digests


def check_report(path: Path, logs: list[Path]) -> None:
    """InputError if the page states other figures than the logs."""
    stated = report_page.stated_figures(path.read_text(encoding="utf-8"))
    if stated != report_page.figures(report.read_logs(logs)):
        raise InputError(f"{path}: its figures are not those of the logs")


def check(folder: Path) -> None:
    """InputError unless everything in the folder follows from its logs."""
    logs = sorted(folder.glob("train_seed*.log"))
    if not logs:
        raise InputError(f"{folder}: no train_seed*.log")
    path = folder / "submission.json"
    stated = common.read_json(path)
    if not is_submission(stated):
        wanted = ", ".join((*TYPED, "script_sha256"))
        raise InputError(f"{path}: is not that of a record: no object with texts for {wanted}")
    runs = parse_logs(logs)
    names = sorted(map(log_name, runs))
    if names != [log.name for log in logs]:
        raise InputError(f"{folder}: its logs are those of {', '.join(names)}")
    digests = check_digests(folder, stated)
    if "report_sha256" in digests:
        check_report(folder / "report.html", logs)
    typed = {name: stated[name] for name in TYPED}
    check_typed(typed)
    derived = submission(runs, typed, digests)
    for name in derived.keys() | stated.keys():
        if stated.get(name) != derived.get(name):
            said = f"the logs say {shown(derived.get(name))}"
            raise InputError(f"{path}: {name} is {shown(stated.get(name))}, {said}")
    for name, text in contents(runs, typed, digests).items():
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
    report.add_samples_option(parser)
    parser.add_argument("--track", default="track_non_record_16mb")
    parser.add_argument("--out", type=Path, default=common.ROOT / "records")
    arguments = parser.parse_args()
    if arguments.check and arguments.logs:
        raise InputError(f"{arguments.logs[0]}: --check FOLDER takes no logs beside the folder")
    if arguments.check:
        check(arguments.check)
        print(f"{arguments.check}: everything follows from the logs")
        return
    if not arguments.logs or not arguments.name:
        raise InputError("give logs and --name, or --check FOLDER")
    typed = {name: getattr(arguments, name) for name in TYPED}
    folder = make(arguments.logs, typed, arguments.out, arguments.samples)
    check(folder)
    print(folder)


if __name__ == "__main__":
    main()
