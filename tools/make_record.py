"""Turns the logs of one or more seeds into a record folder, and checks such a folder again.

    python tools/make_record.py logs/a.txt logs/b.txt logs/c.txt --name MDLM_demo --author "A. Name" --github-id name \\
        --blurb "what was done"
    python tools/make_record.py --check records/track_non_record_16mb/2026-01-31_MDLM_demo

Writes <out>/<track>/<date>_<name>/ with README.md, submission.json, the logs, the script as it ran and
requirements.txt, and the same submission.json at the root of the project. Every number is read from the logs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_mdlm import BUDGET_SECONDS, SIZE_LIMIT_BYTES, InputError  # noqa: E402

SEPARATOR = "\n" + "=" * 100 + "\n"
ESTIMATORS = {"nelbo": "any-order NELBO, exact bytes, weights read back from disk",
              "ar": "autoregressive code length, exact bytes, weights read back from disk"}
TYPED = ("author", "github_id", "name", "blurb", "track")  # everything else in submission.json comes from the logs


def find(pattern: str, body: str, path: Path, what: str) -> re.Match:
    """The last match of a log line; InputError says what the log lacks."""
    matches = list(re.finditer(pattern, body, re.MULTILINE))
    if not matches:
        raise InputError(f"{path}: no {what} in this log; the run did not finish, or it is not a log of train_mdlm.py")
    return matches[-1]


def lives(path: Path) -> tuple[str, list[str]]:
    """The script's source, and the lines of each life of a run, several if it was interrupted and resumed; without
    those before it began again from nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    source, separator, body = text.partition(SEPARATOR)
    if not separator:
        raise InputError(f"{path}: not a log of train_mdlm.py (it does not begin with the script's source)")
    if SEPARATOR in body:
        raise InputError(f"{path}: the script was changed between two lives of this run")
    if len(set(re.findall(r"^run_id:(\S+)", body, re.MULTILINE))) != 1:
        raise InputError(f"{path}: holds more than one run")
    bodies = re.split(r"^(?=run_id:)", body, flags=re.MULTILINE)[1:]
    begin = max(i for i, life in enumerate(bodies) if i == 0 or not re.search(r"^resumed:", life, re.MULTILINE))
    return source, bodies[begin:]


def parse_log(path: Path) -> dict:
    """What one run's log says: source text, hyperparameters, sizes, times and the headline score."""
    source, bodies = lives(path)
    machines = {find(r"^hardware:(\S+)", body, path, "hardware line")[1]: None for body in bodies}
    skipped = re.findall(r"^step:\d+ not finite: .*skipped:(\d+)$", "".join(bodies), re.MULTILINE)
    body = bodies[-1]  # the last life has the last validation, the sizes and the scores
    start = find(r"^run_id:\S+ started:(\d{4}-\d\d-\d\d)\S*", body, path, "start line")
    machine = find(r"^hardware:(\S+) torch:(\S+)", body, path, "hardware line")
    data = find(r"^dataset:(\S+)", body, path, "dataset line")
    resolved = find(r"^hyperparameters: (.+)$", body, path, "hyperparameters")[1]
    knobs = dict(token.split("=", 1) for token in resolved.split())
    last = find(r"^step:(\d+)/\d+ val_loss:\S+ .*train_time:(\d+)ms", body, path, "last validation")
    model = find(r"^Serialized model (\S+): (\d+) bytes", body, path, "artifact size")
    score = find(r"^final_(\S+)_roundtrip val_loss:\S+ val_bpb:\S+ stderr:(\S+) eval_time:", body, path, "score")
    exact = find(r"^final_\S+_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", body, path, "exact score")
    counted = find(r"^score:(nelbo|ar) .*seqs:(\d+) tokens:(\d+) bytes:(\d+)", body, path, "score line")
    scores = re.findall(r"^score:(\w+) (?:biased:1 )?bpb:(\S+) .*seqs:(\d+) .*time:(\d+)ms", body, re.MULTILINE)
    return dict(
        source=source, seed=int(knobs["SEED"]), date=start[1], hardware=" and ".join(machines).replace("_", " "),
        torch=machine[2], lives=len(bodies), skipped_steps=max(map(int, skipped), default=0),
        dataset=data[1], preset=knobs["PRESET"], overridden=find(r"^overridden: (.+)$", body, path, "overrides")[1],
        params=int(find(r"^model_params:(\d+)", body, path, "parameter count")[1]),
        world_size=int(find(r"^world_size:(\d+)", body, path, "world size")[1]),
        step_stop=int(last[1]), train_seconds=int(last[2]) / 1000, label=model[1],
        eval_seconds=sum(int(ms) for *_, ms in scores) / 1000,
        others={name: (float(bpb), int(seqs)) for name, bpb, seqs, _ in scores if name not in ESTIMATORS},
        artifact_bytes=int(model[2]), code_bytes=int(find(r"^Code size: (\d+) bytes", body, path, "code size")[1]),
        total_bytes=int(find(r"^Total submission size \S+: (\d+) bytes", body, path, "total size")[1]),
        val_loss=float(exact[1]), val_bpb=float(exact[2]), stderr=float(score[2]), estimator=ESTIMATORS[counted[1]],
        seqs=int(counted[2]), tokens=int(counted[3]), bytes=int(counted[4]))


def parse_logs(paths: list[Path]) -> list[dict]:
    """The runs, by seed; InputError unless they are one script on one data set and machine with distinct seeds."""
    runs = sorted((parse_log(path) for path in paths), key=lambda run: run["seed"])
    for same in ("source", "dataset", "hardware", "torch", "preset", "world_size", "params", "estimator"):
        if len({run[same] for run in runs}) > 1:
            raise InputError(f"the logs differ in {same}: one record is one system")
    if len({run["seed"] for run in runs}) < len(runs):
        raise InputError("two of the logs have the same seed")
    for run in runs:
        summed = run["code_bytes"] + run["artifact_bytes"]
        if run["code_bytes"] != len(run["source"].encode()) or run["total_bytes"] != summed:
            raise InputError(f"the sizes in the log of seed {run['seed']} do not add up")
    return runs


def over_budget(runs: list[dict]) -> list[str]:
    """What the challenge's rules would not allow, a sentence each."""
    size, train, evaluate = (max(run[key] for run in runs) for key in ("total_bytes", "train_seconds", "eval_seconds"))
    return [f"{name} is {value:,.0f} {unit}, more than the {limit:,.0f} allowed" for name, value, limit, unit in (
        ("code + artifact", size, SIZE_LIMIT_BYTES, "bytes"), ("training", train, BUDGET_SECONDS + 1, "s"),
        ("evaluation", evaluate, BUDGET_SECONDS, "s")) if value > limit]


def submission(runs: list[dict], typed: dict) -> dict:
    """submission.json: the challenge's fields. Sizes and times are the largest of the seeds, scores their mean."""
    bpbs = [run["val_bpb"] for run in runs]
    return typed | dict(
        date=max(run["date"] for run in runs), dataset=runs[0]["dataset"], val_bpb_estimator=runs[0]["estimator"],
        val_loss=round(statistics.mean(run["val_loss"] for run in runs), 8), val_bpb=round(statistics.mean(bpbs), 8),
        val_bpb_std=round(statistics.stdev(bpbs), 8) if len(runs) > 1 else None, seeds=[run["seed"] for run in runs],
        seed_results={str(run["seed"]): dict(
            val_loss=run["val_loss"], val_bpb=run["val_bpb"], val_bpb_stderr=run["stderr"],
            bytes_model=run["artifact_bytes"], step_stop=run["step_stop"], wallclock_seconds=run["train_seconds"],
            eval_seconds=run["eval_seconds"],
            **{name: run[name] for name, usual in (("lives", 1), ("skipped_steps", 0)) if run[name] != usual})
            for run in runs},
        bytes_total=max(run["total_bytes"] for run in runs), bytes_code=runs[0]["code_bytes"],
        step_stop=max(run["step_stop"] for run in runs), wallclock_seconds=max(run["train_seconds"] for run in runs),
        eval_seconds=max(run["eval_seconds"] for run in runs), model_params=runs[0]["params"],
        hardware=runs[0]["hardware"], pytorch_version=runs[0]["torch"],
        script_sha256=hashlib.sha256(runs[0]["source"].encode()).hexdigest(),
        over_budget=over_budget(runs))


def readme(runs: list[dict], facts: dict) -> str:
    """README.md of the record."""
    first = runs[0]
    settings = " ".join(token for token in first["overridden"].split() if not token.startswith(("SEED=", "RUN_ID=")))
    settings = "" if settings == "nothing" else settings + " "
    spread = f" ± {facts['val_bpb_std']:.4f} (standard deviation over seeds)" if len(runs) > 1 else " (one seed)"
    rows = [f"| {run['seed']} | {run['val_bpb']:.4f} | {run['stderr']:.4f} | {run['val_loss']:.4f} | "
            f"{run['step_stop']} | {run['train_seconds']:.0f} s | {run['eval_seconds']:.0f} s | "
            f"{run['artifact_bytes']:,} |" for run in runs]
    others = [f"{name} {statistics.mean(run['others'][name][0] for run in runs):.4f} ({seqs:,} windows)"
              for name, (_, seqs) in first["others"].items() if all(name in run["others"] for run in runs)]
    warnings = [f"**OVER BUDGET: {warning}.**" for warning in facts["over_budget"]]
    notes = [f"Seed {run['seed']} was interrupted and resumed, in {run['lives']} lives." for run in runs
             if run["lives"] > 1]
    notes += [f"Seed {run['seed']} skipped {run['skipped_steps']} steps with gradients that were not finite."
              for run in runs if run["skipped_steps"]]
    return "\n".join([
        f"# {facts['name']}", "", facts["blurb"], "", *[line for warning in warnings for line in (warning, "")],
        f"**val_bpb {facts['val_bpb']:.4f}**{spread}", "",
        f"- data set: `{first['dataset']}`, {first['seqs']:,} validation windows, {first['tokens']:,} tokens, "
        f"{first['bytes']:,} bytes",
        f"- what the number is: {first['estimator']}",
        *([f"- other scores, mean over seeds, bits per byte: {', '.join(others)}"] if others else []),
        f"- hardware: {first['hardware']}, torch {first['torch']}",
        f"- {first['params']:,} parameters, {first['label']}; code + artifact {facts['bytes_total']:,} bytes of "
        f"{SIZE_LIMIT_BYTES:,}", "",
        "| seed | val_bpb | std. error | val_loss | steps | training | evaluation | artifact bytes |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
        " ".join(["The standard error is that of the score as an estimate from these windows.", *notes]), "",
        "```bash",
        *(f"{settings}SEED={run['seed']} torchrun --standalone --nproc_per_node={run['world_size']} train_mdlm.py"
          for run in runs), "```", ""])


def contents(runs: list[dict], typed: dict) -> dict[str, str]:
    """File name → text of everything in the folder that follows from the logs."""
    facts = submission(runs, typed)
    return {"submission.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "README.md": readme(runs, facts),
            "train_mdlm.py": runs[0]["source"]}


def make(arguments: argparse.Namespace) -> Path:
    runs = parse_logs(arguments.logs)
    typed = {name: getattr(arguments, name) for name in TYPED}
    for name in ("name", "track"):
        if not re.fullmatch(r"[\w.+-]+", typed[name]):
            raise InputError(f"--{name} {typed[name]!r} becomes a folder: letters, digits and . _ + - only")
    files = contents(runs, typed)
    folder = arguments.out / typed["track"] / f"{max(run['date'] for run in runs)}_{typed['name']}"
    if folder.exists():
        raise InputError(f"{folder} is there already; move it away or choose another --name")
    folder.mkdir(parents=True)
    for path in arguments.logs:
        text = path.read_text(encoding="utf-8")
        (folder / f"train_seed{parse_log(path)['seed']}.log").write_text(text, encoding="utf-8")
    files["requirements.txt"] = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (arguments.out.parent / "submission.json").write_text(files["submission.json"], encoding="utf-8")
    return folder


def check(folder: Path) -> None:
    """InputError unless everything in the folder follows from its logs."""
    logs = sorted(folder.glob("train_seed*.log"))
    if not logs:
        raise InputError(f"{folder}: no train_seed*.log")
    try:
        stated = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        typed = {name: stated[name] for name in TYPED}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}/submission.json: {error!r}") from None
    runs = parse_logs(logs)
    derived = submission(runs, typed)
    for name in derived.keys() | stated.keys():
        if stated.get(name) != derived.get(name):
            raise InputError(f"{folder}/submission.json: {name} is {stated.get(name)!r}, "
                             f"the logs say {derived.get(name)!r}")
    for name, text in contents(runs, typed).items():
        try:
            same = (folder / name).read_text(encoding="utf-8") == text
        except OSError:
            same = False
        if not same:
            raise InputError(f"{folder}/{name}: is not what the logs say it was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, help="logs of finished runs, one a seed")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="verify a record folder and write nothing")
    parser.add_argument("--name", help="of the record; part of the folder's name")
    parser.add_argument("--author", default="")
    parser.add_argument("--github-id", default="")
    parser.add_argument("--blurb", default="", help="a sentence or two on what was done")
    parser.add_argument("--track", default="track_non_record_16mb")
    parser.add_argument("--out", type=Path, default=ROOT / "records")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            check(arguments.check)
            print(f"{arguments.check}: everything follows from the logs")
        elif not arguments.logs or not arguments.name:
            raise InputError("give logs and --name, or --check FOLDER")
        else:
            folder = make(arguments)
            check(folder)
            print(folder)
    except InputError as error:
        print(f"make_record.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
