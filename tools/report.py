"""Writes a page that shows a run: one HTML file for any browser, which needs no network.

    python tools/report.py logs/a.txt logs/b.txt [--samples samples.json] [--out report.html]

The logs are those of one system with several seeds; of a run that has not finished, only the
curve is shown. What needs the model is measured with the artifact, by default the .mdlm beside a
log: bits by share masked, the bits of every token of a held-out passage, and the score again.
It also writes the samples that are shown, unless --samples has what tools/sample.py --json wrote.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import report_page
import sampling
import torch
from report_page import Measured, Passage, Report, RunLog, Sample, Samples, Share, Token
from run_log import (
    HEADLINES,
    Curve,
    LogLines,
    Position,
    Run,
    lives,
    parse_log,
    parse_logs,
    read_curve,
    read_positions,
    read_scores,
    read_stored,
    whole_setting,
)

import train_mdlm as tm
from train_mdlm import InputError

WINDOWS = 128  # that are scored again
SHARES = 12  # of a window that are masked
PASSAGE_TOKENS = 256
PASS_TOKENS = 1 << 16  # of one call of the model
ORDERS = 16  # random ones, for every token of the passage
DRAWN = dict(mdlm=("ancestral", "confidence"), block=("causal", "entropy"), ar=("causal",))
DRAWN_CALLS = 64  # for a sample of masked diffusion
ABSENT = "Not measured: this page was made without the artifact of the run."
UNUSED = "Not measured: the artifact beside the log, or the text of its run, could not be used."
MOST_TOKENS = 1 << 16  # of a sample, and of the calls that made it
# Of all samples on a page; tokens as often as they are in a text or in a step. So it has 20 MB.
MOST_SHOWN = dict(samples=1 << 9, tokens=1 << 17, characters=1 << 22)


class Choice(NamedTuple):
    """What a report is made from, beside logs."""

    artifact: Path | None = None  # None: the one beside a log
    model: bool = True  # whether anything is measured
    data: str | None = None
    tokenizer: str | None = None
    seqs: int = WINDOWS
    window: int | None = None  # None: in the middle of the split
    samples: tuple[Path, ...] = ()


# ---- Logs


def has_finished(path: Path, curve: Curve) -> bool:
    """Whether a run got to its end; the oldest scripts did not say so."""
    source, bodies = lives(path)
    says_so = 'f"finished:{' in source
    ended = not says_so or bool(re.search("^finished:", bodies[-1], re.MULTILINE))
    return curve.final is not None and ended


def read_log(path: Path, curve: Curve, finished: bool) -> RunLog:
    if not finished:
        return RunLog(curve, None, [], {}, [])
    last = LogLines(lives(path)[1][-1], path)
    scores = read_scores(last)
    by_score = {score.name: read_positions(last, score.name) for score in scores}
    positions = {name: parts for name, parts in by_score.items() if parts}
    return RunLog(curve, parse_log(path), scores, positions, read_stored(last))


def read_logs(paths: list[Path]) -> list[RunLog]:
    """By seed, runs that have not finished last; InputError as `parse_logs` has it."""
    for path in paths:
        if not path.is_file():  # a pipe, for example, can be read only once
            found = "is no ordinary file" if path.exists() else "there is no such file"
            raise InputError(f"{path}: {found}")
    curves = {path: read_curve(path) for path in paths}
    finished = [path for path in paths if has_finished(path, curves[path])]
    parse_logs(finished)
    found = [read_log(path, curves[path], path in finished) for path in paths]
    return sorted(found, key=lambda log: log.run.seed if log.run else math.inf)


def default_title(logs: list[RunLog]) -> str:
    runs = [log.run for log in logs if log.run]
    if len(logs) == 1:
        return logs[0].curve.name
    return f"{runs[0].preset}, {len(logs)} runs" if runs else f"{len(logs)} runs"


# ---- Measurements


def window_tokens(val: tm.Split, hp: tm.Hyperparameters, seqs: int) -> torch.Tensor:
    """(n, 1 + L) evenly spaced windows of the split, the token before each first."""
    length = hp.train_seq_len
    numbers = tm.evenly_spaced(val.stream.count_windows(length), seqs)
    return val.stream.windows(numbers, length).to(val.luts.base_bytes.device)


def masked_counts(length: int) -> list[int]:
    """How many of so many tokens are masked, evenly spread from few to all but few."""
    if length <= SHARES:
        return list(range(1, length + 1))
    return [math.ceil(length * (n + 0.5) / SHARES) for n in range(SHARES)]


def masks_of(model: tm.Model, window: torch.Tensor, masked: int, seed: int) -> torch.Tensor:
    """(B, L) bool: so many random tokens of every window, or of its blocks, but no anchors."""
    allowed = tm.maskable(model.hp, window[:, 1:])
    length = model.block_size or allowed.shape[1]
    shape = (allowed.numel() // length, length)
    keys = torch.rand(shape, generator=tm.seeded("cpu", seed, "shares", masked))
    keys = torch.where(allowed.cpu().view(shape), keys, 2)
    return (tm.ranks(keys) < masked).view(allowed.shape).to(allowed.device) & allowed


def measure_shares(model: tm.Model, windows: torch.Tensor, seed: int) -> Iterator[Share]:
    """Bits of masked tokens, by how many are masked; windows are clusters of the errors."""
    length = model.block_size or windows.shape[1] - 1
    rows = max(PASS_TOKENS // windows.shape[1], 1)
    for masked in masked_counts(length):
        mask = masks_of(model, windows, masked, seed)
        nats = [
            tm.masked_nll(model, *parts).double().sum(1).cpu()
            for parts in zip(windows.split(rows), mask.split(rows), strict=True)
        ]
        bits = torch.cat(nats) / math.log(2)
        mean, stderr = tm.bits_per_byte(bits, mask.sum(1).double().cpu())
        yield Share(masked, length, mean, stderr)


def piece_of(sp, token: int) -> str:
    """A token as it reads; between angle brackets if it is no text by itself."""
    if not 0 <= token < sp.vocab_size():
        return f"⟨{token}⟩"
    piece = sp.id_to_piece(token)
    if sp.is_byte(token):
        value = int(piece[1:-1], 16)
        return chr(value) if value < 128 else f"⟨{value:02X}⟩"
    if sp.is_control(token) or sp.is_unknown(token):
        return f"⟨{piece.strip('<>')}⟩"
    return piece.replace("\u2581", " ")


def passage_windows(val: tm.Split, hp: tm.Hyperparameters, first: int | None) -> list[int]:
    """Numbers of neighbouring windows, from `first` or the middle of the split."""
    total = val.stream.count_windows(hp.train_seq_len)
    wanted = min(max(PASSAGE_TOKENS // hp.train_seq_len, 1), total)
    begin = total // 2 if first is None else first
    if not 0 <= begin < total:
        raise InputError(f"--window {begin}: the split has windows 0 to {total - 1}")
    begin = min(begin, total - wanted)
    return list(range(begin, begin + wanted))


def passage_length(hp: tm.Hyperparameters) -> int:
    """Tokens that are shown of a window: whole blocks."""
    length = min(hp.train_seq_len, PASSAGE_TOKENS)
    return max(length // (hp.block_size or 1), 1) * (hp.block_size or 1)


def measure_passages(
    model: tm.Model, val: tm.Split, sp, numbers: list[int], progress: common.Progress
) -> list[Passage]:
    """Bits of every token, left to right and over random orders; each passage is a window of its
    own, so its first token is predicted from nothing, or from the token before it."""
    hp = model.hp
    device = val.luts.base_bytes.device
    window = val.stream.windows(numbers, hp.train_seq_len)[:, : 1 + passage_length(hp)].to(device)
    x0, before = window[:, 1:], window[:, 0]

    def bits(**order) -> torch.Tensor:
        return (tm.chain_rule(model, x0, before=before, **order).double() / math.log(2)).cpu()

    left_to_right = bits()
    orders = []
    for seed in range(0 if hp.causal else ORDERS):
        progress(seed / ORDERS)
        orders.append(bits(order="random", seed=seed))
    progress(1)
    spread = None
    if orders:
        stacked = torch.stack(orders)
        spread = torch.stack([stacked.mean(0), stacked.amin(0), stacked.amax(0)], dim=-1)
    passages = []
    for row, number in enumerate(numbers):
        tokens = [
            Token(
                piece_of(sp, int(token)),
                left_to_right[row, place].item(),
                tuple(spread[row, place].tolist()) if orders else None,
            )
            for place, token in enumerate(x0[row].tolist())
        ]
        passages.append(Passage(number, tokens))
    return passages


def check_belongs(artifact: Path, hp: tm.Hyperparameters, run: Run) -> None:
    """InputError unless the artifact is the one that the log is about, as far as it says so."""
    size = artifact.stat().st_size
    if size != run.artifact_bytes:
        said = f"has {size:,} bytes, but the log says {run.artifact_bytes:,}"
        raise InputError(f"{artifact}: {said}: it is not the artifact of this run")
    for name in tm.STORED:
        logged = run.settings.get(name.upper())
        if logged is not None and hp.shown(name) != f"{name.upper()}={logged}":
            said = f"{hp.shown(name)}, but the log says {logged}"
            raise InputError(f"{artifact}: {said}: it is not the artifact of this run")


def check_text(val: tm.Split, hp: tm.Hyperparameters, run: Run) -> None:
    """InputError unless this is the validation text of the log."""
    for name, found, logged in (
        ("tokens", val.stream.total, run.val_tokens),
        ("bytes", val.stream.facts["bytes"], run.val_bytes),
    ):
        if logged is not None and found != logged:
            said = f"has {found:,} validation {name}, but the log says {logged:,}"
            raise InputError(f"{hp.data_path}: {said}: give the text of this run with --data")


def with_run_settings(hp: tm.Hyperparameters, run: Run) -> tm.Hyperparameters:
    """The hyperparameters of an artifact, which scores as its run did."""
    names = ("seed", "nelbo_passes", "chain_group")
    values = {name: whole_setting(run.settings, name.upper(), getattr(hp, name)) for name in names}
    return dataclasses.replace(hp, **values)


class Opened(NamedTuple):
    """An artifact, and the text that its run was scored on."""

    path: Path
    model: tm.Model
    hp: tm.Hyperparameters
    sp: object  # tokenizer
    val: tm.Split


def open_artifact(artifact: Path, log: RunLog, choice: Choice) -> Opened:
    """InputError if it is not the artifact of the run, or if the text is another one."""
    sampling.check_artifact(artifact)
    run, path = log.run, log.curve.path
    data = sampling.path_of(run, path, "DATA_PATH", choice.data)
    tokenizer = sampling.path_of(run, path, "TOKENIZER_PATH", choice.tokenizer)
    model, hp = common.load_model(artifact, data, tokenizer)
    check_belongs(artifact, hp, run)
    hp = with_run_settings(hp, run)
    sp, luts = sampling.load_tokenizer(hp, run, path, choice.tokenizer)
    val = tm.open_validation(hp, sp, luts)
    check_text(val, hp, run)
    return Opened(artifact, model, hp, sp, val)


def measure(opened: Opened, seqs: int, window: int | None, has_positions: bool) -> Measured:
    """What the model shows on `seqs` windows, and on the passage that begins with `window`."""
    path, model, hp, sp, val = opened
    numbers = passage_windows(val, hp, window)
    headline, _ = HEADLINES[hp.system]
    score, _ = tm.score_windows(headline, model, hp, val, seqs)
    shares = []
    if not hp.causal:
        rows = window_tokens(val, hp, seqs)
        shares = list(measure_shares(model, rows, hp.seed))
    return Measured(
        artifact=path.name,
        sha256=tm.file_sha256(path),
        score=headline,
        bpb=score.bpb,
        stderr=score.stderr,
        windows=score.seqs,
        shares=shares,
        positions={} if has_positions else measure_positions(model, hp, val, seqs),
        passages=measure_passages(model, val, sp, numbers, common.Progress("passage")),
        orders=ORDERS,
        block_size=model.block_size,
    )


def measure_positions(
    model: tm.Model, hp: tm.Hyperparameters, val: tm.Split, seqs: int
) -> dict[str, list[Position]]:
    """The first score of this kind of model that has positions."""
    estimators = tm.ESTIMATORS[hp.system]
    name = next(name for name, estimator in estimators.items() if estimator.prefixes)
    _, table = tm.score_windows(name, model, hp, val, seqs)
    return {
        name: [
            Position(tm.bucket_name(bucket, hp.train_seq_len), *tm.bits_per_byte(*part.unbind(1)))
            for bucket, part in enumerate(table.unbind(1))
        ]
    }


# ---- Samples


def require(holds: bool, path: Path, what: str) -> None:
    if not holds:
        raise InputError(f"{path}: {what}: not what tools/sample.py --json writes")


def is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300  # no NaN, and no endless integer


def read_step(step: object, length: int, path: Path) -> list[tuple[int, int]]:
    """Positions and tokens of one model call."""
    require(isinstance(step, dict), path, "a step is no object")
    positions, tokens = step.get("positions"), step.get("tokens")
    for name, values in (("positions", positions), ("tokens", tokens)):
        whole = isinstance(values, list) and all(type(value) is int for value in values)
        require(whole, path, f"the {name} of a step are no list of whole numbers")
    require(len(positions) == len(tokens), path, "a step has not one token for each position")
    inside = all(0 <= position < length for position in positions)
    require(inside, path, f"a step has a position outside 0 … {length - 1}")
    return list(zip(positions, tokens, strict=True))


def check_steps(
    steps: list[list[tuple[int, int]]],
    fixed: list[bool],
    tokens: list[int],
    mask_id: int,
    path: Path,
) -> None:
    """InputError unless the steps lead from what is given to the tokens."""
    for token in tokens:
        require(0 <= token < mask_id, path, f"{token} in the tokens of a sample is none")
    z = [token if given else mask_id for token, given in zip(tokens, fixed, strict=True)]
    for position, token in itertools.chain.from_iterable(steps):
        require(not fixed[position], path, "a step changes a position that is given")
        require(0 <= token <= mask_id, path, f"{token} in the tokens of a step is none")
        z[position] = token
    for position, (token, last) in enumerate(zip(tokens, z, strict=True)):
        found = f"token {token} at position {position} of a sample, but {last} after its steps"
        require(token == last, path, found)


def read_sample(value: object, length: int, mask_id: int, sp, path: Path) -> Sample:
    """`sp` is the tokenizer that made its tokens, or None."""
    require(isinstance(value, dict), path, "a sample is no object")
    fixed, tokens, pieces = (value.get(name) for name in ("prompt_or_template", "tokens", "pieces"))
    for name, values, kind in (
        ("prompt_or_template", fixed, bool),
        ("tokens", tokens, int),
        ("pieces", pieces, str),
    ):
        right = isinstance(values, list) and len(values) == length
        right = right and all(type(one) is kind for one in values)
        require(right, path, f"{name} of a sample is no list of {length} values")
    for name in ("seed", "calls"):
        whole = type(value.get(name)) is int and 0 <= value[name] < 2**63
        require(whole, path, f"{name} of a sample is no whole number from 0 to 2⁶³")
    bits = value.get("bits")
    numbers = is_number(value.get("seconds")) and (bits is None or is_number(bits))
    require(numbers, path, "seconds or bits of a sample are no numbers")
    steps = value.get("steps")
    few = isinstance(steps, list) and 0 < len(steps) <= MOST_TOKENS
    require(few, path, "steps of a sample is no list of model calls")

    def piece(position: int, token: int) -> str | None:
        if token == mask_id:
            return None
        if token == tokens[position] or sp is None:
            return pieces[position]
        return piece_of(sp, token)

    steps = [read_step(step, length, path) for step in steps]
    calls = value["calls"]
    require(calls == len(steps), path, f"{calls} calls of a sample, but {len(steps)} steps")
    check_steps(steps, fixed, tokens, mask_id, path)
    shown = [[(position, piece(position, token)) for position, token in step] for step in steps]
    return Sample(value["seed"], fixed, pieces, value["calls"], value["seconds"], bits, shown)


def read_samples(path: Path, sp) -> Samples:
    """InputError unless it is what tools/sample.py --json writes."""
    if path.is_dir() or not path.exists():  # it may be a pipe
        raise InputError(f"--samples {path}: {sampling.no_file(path)}")
    return samples_of(common.read_json(path), path, sp)


def samples_of(value: object, path: Path, sp) -> Samples:
    """Of what came from there, in the form of sampling.record."""
    require(isinstance(value, dict), path, "it is no object")
    version = value.get("version")
    known = sampling.RECORD_VERSION
    require(version == known, path, f"its version is {version!r}, not {known}")
    for name in ("artifact", "sampler"):
        require(isinstance(value.get(name), str), path, f"{name} is no text")
    length, mask_id = value.get("length"), value.get("mask_id")
    known = type(length) is int and 0 < length <= MOST_TOKENS and type(mask_id) is int
    require(known, path, "length or mask_id is no number that a sample can have")
    settings, samples = value.get("settings"), value.get("samples")
    require(isinstance(settings, dict), path, "settings is no object")
    require(isinstance(samples, list) and bool(samples), path, "samples is no list with samples")
    if sp is not None and sp.vocab_size() != mask_id:  # of another tokenizer
        sp = None
    read = [read_sample(sample, length, mask_id, sp, path) for sample in samples]
    return Samples(value["artifact"], value["sampler"], settings, read)


def draw_samples(opened: Opened) -> Iterator[Samples]:
    """Some of the artifact, in a few calls each."""
    loaded = sampling.Loaded(opened.path.name, opened.model, opened.hp, opened.sp, opened.val.luts)
    for name in DRAWN[opened.hp.system]:
        few = opened.hp.system == "mdlm" and opened.hp.train_seq_len > DRAWN_CALLS
        request = sampling.Request(sampler=name, steps=DRAWN_CALLS if few else None)
        record = sampling.record(loaded, request)
        for sample in record["samples"]:
            sample["seconds"] = 0.0  # so that the same files make the same page
        yield samples_of(record, opened.path, opened.sp)


def amounts(samples: Samples) -> collections.Counter:
    """What a page has to show, by the names of MOST_SHOWN."""
    heading = f"{samples.artifact}{samples.sampler}{samples.settings}"
    found = collections.Counter(samples=len(samples.samples), characters=len(heading))
    for sample in samples.samples:
        revealed = [piece or "" for step in sample.steps for _, piece in step]
        found["tokens"] += len(sample.pieces) + len(revealed) + len(sample.steps)
        found["characters"] += sum(map(len, itertools.chain(sample.pieces, revealed)))
    return found


def gather_samples(paths: list[Path], opened: Opened | None) -> list[Samples]:
    """Those in the files or, if none are given, some of the artifact; InputError if they are too
    many for a page."""
    if opened and not paths:
        return list(draw_samples(opened))
    gathered, shown = [], collections.Counter()
    for path in paths:
        gathered.append(read_samples(path, opened.sp if opened else None))
        shown += amounts(gathered[-1])
        for name, most in MOST_SHOWN.items():
            if shown[name] > most:
                found = f"with it the page would show {shown[name]:,} {name} of samples and steps"
                remedy = "give fewer or shorter samples"
                raise InputError(f"{path}: {found}, more than {most:,}: {remedy}")
    return gathered


# ---- The report


def find_artifact(logs: list[RunLog], given: Path | None) -> tuple[Path | None, RunLog | None]:
    """An artifact, and the log of its run: of the runs whose artifact is as long, the first."""
    finished = [log for log in logs if log.run]
    if given and not finished:
        raise InputError(f"{given}: none of the runs has finished, so it is of none of them")
    if given:
        size = given.stat().st_size if given.is_file() else 0
        same = [log for log in finished if log.run.artifact_bytes == size]
        return given, (same or finished)[0]
    for log in finished:
        beside = log.curve.path.with_suffix(".mdlm")
        if beside.is_file():
            return beside, log
    return None, None


def open_chosen(logs: list[RunLog], choice: Choice) -> tuple[Opened | None, str, str]:
    """The model to measure; None if there is none, or if the one beside a log cannot be used: then
    what the page says of it, and what the user should know."""
    if not choice.model:
        return None, ABSENT, ""
    artifact, log = find_artifact(logs, choice.artifact)
    if not artifact:
        finished = [str(log.curve.path) for log in logs if log.run]
        return None, ABSENT, f"no artifact beside {', '.join(finished)}" if finished else ""
    try:
        return open_artifact(artifact, log, choice), "", ""
    except InputError as error:
        if choice.artifact:
            raise
        return None, UNUSED, common.one_line(str(error))


def build(paths: list[Path], choice: Choice, title: str = "") -> Report:
    """All that the page shows; InputError for files that are wrong or do not belong together."""
    logs = read_logs(paths)
    opened, absent, reason = open_chosen(logs, choice)
    samples = gather_samples(list(choice.samples), opened)
    if reason:
        print(f"not measured: {reason}", file=sys.stderr)
    measured = None
    if opened:
        has_positions = any(log.positions for log in logs)
        measured = measure(opened, choice.seqs, choice.window, has_positions)
    return Report(title or default_title(logs), logs, measured, absent, samples)


def add_samples_option(parser: argparse.ArgumentParser) -> None:
    text = "what tools/sample.py --json wrote, to be shown; may be repeated"
    parser.add_argument("--samples", action="append", default=[], type=Path, help=text)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--artifact", type=Path, help="a .mdlm; default: the one beside a log")
    parser.add_argument("--logs-only", action="store_true", help="measure nothing")
    add_samples_option(parser)
    parser.add_argument("--window", type=int, help="first window of the passage; default: middle")
    common.add_seqs_option(parser, default=WINDOWS)
    common.add_data_options(parser, "that of the run or of its preset")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    arguments = parser.parse_args()
    if arguments.logs_only and arguments.artifact:
        raise InputError(f"--artifact {arguments.artifact} is not used with --logs-only")
    common.check_output(arguments.out, common.made_picture)
    choice = Choice(
        arguments.artifact,
        not arguments.logs_only,
        arguments.data,
        arguments.tokenizer,
        arguments.seqs,
        arguments.window,
        tuple(arguments.samples),
    )
    report = build(arguments.logs, choice)
    tm.write_file(arguments.out, report_page.page(report).encode())
    print(arguments.out)


if __name__ == "__main__":
    main()
