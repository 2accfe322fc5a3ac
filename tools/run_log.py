"""What the log of a finished run says, and whether its figures agree with one another.

A log has most of its figures twice: rounded and exact, in milliseconds and in seconds, as parts and
as their sum. `parse_log` believes no log in which they differ. Which lines a log has to have, the
source of the script at its beginning says: older scripts wrote fewer of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import common  # noqa: F401 (it says where train_mdlm.py is)

import train_mdlm as tm
from train_mdlm import BUDGET_SECONDS, SIZE_LIMIT_BYTES, InputError

SEPARATOR = "\n" + "=" * 100 + "\n"  # between the source of the script and the log
HEADLINES = {  # by kind of model: the score behind val_bpb, and what it is
    "mdlm": ("nelbo", "any-order NELBO, exact bytes, weights read back from disk"),
    "ar": ("ar", "autoregressive code length, exact bytes, weights read back from disk"),
    "block": (
        "l2r",
        "code length of a block diffusion model from left to right, exact bytes, weights read back "
        "from disk",
    ),
}
# Scores that are not the length of a code
BIASED = {name for table in tm.ESTIMATORS.values() for name, row in table.items() if row.biased}
UNFINISHED = "the run did not finish, or it is not a log of train_mdlm.py"
WHOLE = r"\d{1,15}"
REAL = r"-?\d{1,15}\.\d{1,9}"
PIECE_BYTES = 256  # a token has at most
HEADER_BYTES = (100, 10_000)  # of an artifact, with its checksum
PAUSE_SECONDS = 5.0  # between two scores, at most


def settings_of(*groups: str) -> set[str]:
    """Names of hyperparameters."""
    specs = dataclasses.fields(tm.Hyperparameters)
    return {spec.name.upper() for spec in specs if spec.metadata["group"] in groups}


# What has to be the same for all seeds
ONE_SYSTEM = """
    source dataset tokenizer_sha256 val_tokens val_bytes hardware torch preset world_size params
    estimator seqs tokens bytes
""".split()
# What may differ between runs of one system, and what between lives of a run
OWN_SETTINGS = {"SEED", "RUN_ID"} | settings_of("data", "execution")
RESULT_SETTINGS = settings_of(*tm.RESULT_GROUPS)


class Printed(NamedTuple):
    """A number as a log has it, and by how much it may have been rounded."""

    value: float
    slack: float

    @classmethod
    def of(cls, text: str) -> Printed:
        decimals = len(text.partition(".")[2])
        return cls(float(text), 0.5 * 10.0**-decimals)

    def agrees(self, other: float, slack: float = 0.0) -> bool:
        """Whether it may be `other`, which is right up to `slack`."""
        return abs(self.value - other) <= self.slack + slack + 1e-9 * abs(other)


class ScoreLine(NamedTuple):
    """A line on a final score."""

    name: str
    bpb: str
    stderr: str
    seqs: int
    tokens: int
    bytes: int
    ms: int
    speed: Printed
    boundary_bits: str
    boundary_bpb: str


class Run(NamedTuple):
    """What the log of one finished run says."""

    source: str  # of the script
    run_id: str
    seed: int
    preset: str
    settings: dict[str, str]  # all hyperparameters: value by NAME
    overridden: dict[str, str]  # what was set by hand
    date: str
    hardware: str
    torch: str
    world_size: int
    dataset: str
    tokenizer_sha256: str  # empty in older logs
    val_tokens: int  # of the split
    val_bytes: int | None  # None in older logs
    val_windows: int
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
    stderr: float  # NaN if there is one window
    estimator: str
    seqs: int
    tokens: int
    bytes: int
    others: dict[str, tuple[float, int]]  # bits per byte and windows of the other scores

    @property
    def system(self) -> str:
        return system_of(self.settings)


# ---- Lines


def lives(path: Path) -> tuple[str, list[str]]:
    """The script's source, and the lines of each life of a run: several if it was interrupted and
    resumed, without those before it began again from nothing, and those that ended before they
    went on."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        remedy = "give the .txt that a run wrote beside its artifact"
        raise InputError(f"{path}: is no log of a run, and no text: {remedy}") from None
    source, separator, body = text.partition(SEPARATOR)
    if not separator:
        reason = "it does not begin with the script's source"
        raise InputError(f"{path}: not a log of train_mdlm.py ({reason})")
    if SEPARATOR in body:
        raise InputError(f"{path}: the script was changed between two lives of this run")
    if len(set(re.findall(r"^run_id:(\S+)", body, re.MULTILINE))) != 1:
        raise InputError(f"{path}: holds more than one run")
    bodies = re.split(r"^(?=run_id:)", body, flags=re.MULTILINE)[1:]
    begun = [body for body in bodies if re.search(r"^(?:resumed|step):", body, re.MULTILINE)]
    bodies = begun or bodies[-1:]
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

    def find_all(self, pattern: str) -> list[tuple[str, ...]]:
        """The groups of every line that fits; those that did not take part are empty."""
        matches = re.finditer(pattern, self.body, re.MULTILINE | re.ASCII)
        return [match.groups(default="") for match in matches]

    def find(self, pattern: str, what: str) -> tuple[str, ...]:
        """The groups of the last line that fits; InputError says `what` the log lacks."""
        found = self.find_all(pattern)
        if not found:
            raise InputError(f"{self.path}: no {what} in this log; {UNFINISHED}")
        return found[-1]

    def find_only(self, pattern: str, what: str) -> tuple[str, ...]:
        """The groups of the line that fits; InputError if there are several."""
        if len(self.find_all(pattern)) > 1:
            raise InputError(f"{self.path}: more than one {what} in this log; a run writes one")
        return self.find(pattern, what)

    def text(self, pattern: str, what: str) -> str:
        (group,) = self.find_only(pattern, what)
        return group

    def number(self, name: str, what: str) -> int:
        return int(self.text(rf"^{name}({WHOLE})(?: |$)", what))


def parse_settings(text: str) -> dict[str, str]:
    """Value by NAME of settings as the log has them; values may have spaces in them."""
    parts = [part.partition("=") for part in re.split(r" (?=[A-Z][A-Z0-9_]*=)", text)]
    return {name: value for name, _, value in parts}


def read_settings(life: LogLines) -> dict[str, str]:
    return parse_settings(life.text(r"^hyperparameters: (PRESET=.*)$", "hyperparameters line"))


def whole_setting(settings: dict[str, str], name: str, otherwise: int) -> int:
    """A setting that is a whole number; `otherwise` if it is missing, or something else."""
    text = settings.get(name, "")
    return int(text) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else otherwise


def system_of(settings: dict[str, str]) -> str:
    """The kind of model, one of HEADLINES; older logs know no blocks."""
    if settings.get("BLOCK_SIZE", "0") != "0":
        return "block"
    return "ar" if settings.get("OBJECTIVE") == "ar" else "mdlm"


def read_overridden(life: LogLines) -> dict[str, str]:
    given = life.text(r"^overridden: (nothing|[A-Z].*=.*)$", "line on what was overridden")
    return {} if given == "nothing" else parse_settings(given)


def hardware_of(all_lives: list[LogLines]) -> str:
    """What all lives of a run were on."""
    machines = [life.text(r"^hardware:(\S+) ", "hardware line") for life in all_lives]
    return " and ".join(dict.fromkeys(machines)).replace("_", " ")


def skipped_steps(all_lives: list[LogLines]) -> int:
    """How many steps were skipped because their gradients were not finite."""
    pattern = rf"^step:\d+ not finite: .*skipped:({WHOLE})$"
    totals = [int(total) for life in all_lives for (total,) in life.find_all(pattern)]
    return max(totals, default=0)


def read_scores(life: LogLines) -> list[ScoreLine]:
    pattern = (
        rf"^score:(\w+) (?:biased:1 )?bpb:({REAL}) stderr:({REAL}|nan) seqs:({WHOLE}) "
        rf"tokens:({WHOLE}) bytes:({WHOLE}) time:({WHOLE})ms (?:calls:{WHOLE} )?"
        rf"tokens_per_s:({WHOLE})(?: boundary_bits:({REAL}) boundary_bpb:({REAL}))?$"
    )
    found = []
    for name, bpb, stderr, seqs, tokens, nbytes, ms, speed, *boundary in life.find_all(pattern):
        counts = map(int, (seqs, tokens, nbytes, ms))
        found.append(ScoreLine(name, bpb, stderr, *counts, Printed.of(speed), *boundary))
    marked = life.find_all(r"^score:(\w+) (biased:1 )?bpb:")
    right = all(bool(mark) == (name in BIASED) for name, mark in marked)
    if len(found) != len(marked) or not right:
        raise InputError(f"{life.path}: a line on a score is not as train_mdlm.py writes it")
    return found


def find_headline(scores: list[ScoreLine], system: str, path: Path) -> ScoreLine:
    """The score behind val_bpb; InputError unless there is one."""
    name, _ = HEADLINES[system]
    found = [score for score in scores if score.name == name]
    if len(found) != 1:
        raise InputError(f"{path}: has {len(found)} scores {name}, not one; {UNFINISHED}")
    return found[0]


def read_dataset(life: LogLines) -> tuple[str, ...]:
    """Its name, the digest of the tokenizer, tokens, bytes and windows of the split."""
    numbers = rf"val_tokens:({WHOLE})(?: val_bytes:({WHOLE}))? val_windows:({WHOLE})"
    pattern = rf"^dataset:(.*?)(?: tokenizer_sha256:([0-9a-f]{{64}}))? {numbers}(?: |$)"
    return life.find_only(pattern, "dataset line")


class Stored(NamedTuple):
    """A line on how a kind of parameter is stored."""

    kind: str
    storage: str
    weights: int
    bytes: int
    bits: Printed  # of a weight
    packed_bytes: dict[str, int]  # with each packer that was tried


def read_stored(life: LogLines) -> list[Stored]:
    """By kind of parameter; nothing in older logs."""
    pattern = (
        rf"^kind:(\w+) storage:(\S+) weights:({WHOLE}) bytes:({WHOLE}) bits_per_weight:({REAL}) "
        rf"entropy:{REAL}((?: \w+:{WHOLE})+)$"
    )
    found = []
    for kind, storage, weights, size, bits, packers in life.find_all(pattern):
        sizes = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", packers)}
        found.append(Stored(kind, storage, int(weights), int(size), Printed.of(bits), sizes))
    return found


class Position(NamedTuple):
    """A score in a range of positions of the window, for example 4-7."""

    positions: str
    bpb: float
    stderr: float


def read_positions(life: LogLines, score: str) -> list[Position]:
    """Of one score, from left to right; nothing for a score without positions."""
    line = rf"prefix:(\S+) bpb:({REAL}) stderr:({REAL}|nan)\n"
    lines = life.find_all(rf"^score:{score} .*\n((?:prefix:.*\n)+)")
    return [
        Position(positions, float(bpb), float(stderr))
        for (text,) in lines
        for positions, bpb, stderr in re.findall(line, text)
    ]


class Point(NamedTuple):
    """How far a run was at a line of its log."""

    step: int
    planned: int  # steps
    ms: int
    average: str  # ms of a step, where the line has it


def read_points(life: LogLines) -> list[Point]:
    """Of the lines on steps, and of the line on where this life began."""
    pattern = (
        rf"^(?:resumed:.+ )?step:({WHOLE})/({WHOLE}) (?:\w+:\S+ )*?train_time:({WHOLE})ms"
        rf"(?: step_avg:({REAL})ms)?"
    )
    found = life.find_all(pattern)
    for (line,) in life.find_all(r"^((?:resumed:.+ )?step:\d+/.*)(?=\n.)"):
        if not re.match(pattern, line):  # the last line of a life may be half a line
            raise InputError(f"{life.path}: {line[:60]}: is not as train_mdlm.py writes it")
    return [
        Point(int(step), int(planned), int(ms), average) for step, planned, ms, average in found
    ]


def parse_log(path: Path) -> Run:
    """What the log of a finished run says; InputError if something is missing, or if its figures
    do not agree with one another."""
    source, bodies = lives(path)
    all_lives = [LogLines(body, path) for body in bodies]
    last = all_lives[-1]  # it has the last validation, the sizes and the scores
    scores = read_scores(last)
    settings = read_settings(last)
    system = system_of(settings)
    headline = find_headline(scores, system, path)
    dataset, tokenizer, val_tokens, val_bytes, val_windows = read_dataset(last)
    storage, artifact_bytes = last.find_only(
        rf"^Serialized model (\S+): ({WHOLE}) bytes", "artifact size"
    )
    exact = rf"^final_\S+_roundtrip_exact val_loss:({REAL}) val_bpb:({REAL})$"
    val_loss, val_bpb = last.find_only(exact, "exact score")
    end = read_points(last)[-1:] or [Point(0, 0, 0, "")]
    run = Run(
        source=source,
        run_id=last.text(r"^run_id:(\S+)", "start line"),
        seed=whole_setting(settings, "SEED", -1),
        preset=settings["PRESET"],
        settings=settings,
        overridden=read_overridden(last),
        date=last.text(r"^run_id:\S+ started:(\d{4}-\d\d-\d\d)T", "start line"),
        hardware=hardware_of(all_lives),
        torch=last.text(r"^hardware:\S+ torch:(\S+)", "hardware line"),
        world_size=last.number("world_size:", "world size"),
        dataset=dataset,
        tokenizer_sha256=tokenizer,
        val_tokens=int(val_tokens),
        val_bytes=int(val_bytes) if val_bytes else None,
        val_windows=int(val_windows),
        params=last.number("model_params:", "parameter count"),
        lives=len(bodies),
        skipped_steps=skipped_steps(all_lives),
        step_stop=end[0].step,
        train_seconds=end[0].ms / 1000,
        eval_seconds=sum(score.ms for score in scores) / 1000,
        storage=storage,
        artifact_bytes=int(artifact_bytes),
        code_bytes=last.number("Code size: ", "code size"),
        total_bytes=last.number(r"Total submission size \S+: ", "total size"),
        val_loss=float(val_loss),
        val_bpb=float(val_bpb),
        stderr=float(headline.stderr),
        estimator=HEADLINES[system][1],
        seqs=headline.seqs,
        tokens=headline.tokens,
        bytes=headline.bytes,
        others={
            score.name: (float(score.bpb), score.seqs) for score in scores if score is not headline
        },
    )
    for fault in faults(run, all_lives, scores):
        raise InputError(f"{path}: {fault}")
    return run


def parse_logs(paths: list[Path]) -> list[Run]:
    """The runs, by seed; InputError unless they are those of one system with different seeds."""
    runs = sorted((parse_log(path) for path in paths), key=lambda run: run.seed)
    for name in ONE_SYSTEM:
        if len({getattr(run, name) for run in runs}) > 1:
            raise InputError(f"the logs differ in {name}: one record is one system")
    settings = [run.settings for run in runs]
    for name in sorted(set().union(*settings) - OWN_SETTINGS):
        values = list(dict.fromkeys(each.get(name) for each in settings))
        if len(values) > 1:
            raise InputError(f"the logs differ in {name} ({values}): one record is one system")
    for first, second in itertools.pairwise(runs):
        if first.seed == second.seed:
            both = f"{first.run_id} and {second.run_id}"
            raise InputError(f"two of the logs, {both}, have the same seed, {first.seed}")
    for run in runs:
        if not math.isfinite(run.stderr):
            remedy = "score more windows (FINAL_EVAL_MAX_SEQS)"
            raise InputError(
                f"run_id:{run.run_id} was scored on {run.seqs} window, so its score has no "
                f"standard error: {remedy}"
            )
    return runs


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


class Curve(NamedTuple):
    """What a log says about the course of its run."""

    path: Path
    planned: int  # steps
    steps: list[int]  # of every validation
    seconds: list[float]  # of training until then
    bpb: list[float]
    final: float | None  # bits per byte read back from disk; None if the run did not get there

    @property
    def name(self) -> str:
        return self.path.stem


def read_curve(path: Path) -> Curve:
    """Of a log, also of a run that has not finished; InputError if nothing was validated."""
    points: dict[int, tuple[int, float, float]] = {}  # steps planned, seconds and bpb by step
    body = ""
    for body in lives(path)[1]:
        resumed = re.search(rf"^resumed:.+ step:({WHOLE})/", body, re.MULTILINE)
        last_kept = int(resumed[1]) if resumed else -1
        points = {step: point for step, point in points.items() if step <= last_kept}
        pattern = (
            rf"^step:({WHOLE})/({WHOLE}) val_loss:\S+ val_bpb:({REAL}) .*train_time:({WHOLE})ms"
        )
        for step, planned, bpb, ms in re.findall(pattern, body, re.MULTILINE):
            points[int(step)] = (int(planned), int(ms) / 1000, float(bpb))
    if not points:
        raise InputError(f"{path}: no validation in this log")
    planned, seconds, bpb = map(list, zip(*points.values(), strict=True))
    final = re.search(
        rf"^final_\S+_roundtrip_exact val_loss:\S+ val_bpb:({REAL})$", body, re.MULTILINE
    )
    exact = float(final[1]) if final else None
    return Curve(path, planned[-1], [*points], seconds, bpb, exact)


# ---- Whether the figures agree. A fault is a sentence on two figures that do not.


def faults(run: Run, all_lives: list[LogLines], scores: list[ScoreLine]) -> Iterator[str]:
    last = all_lives[-1]
    yield from faults_of_beginning(run, all_lives)
    yield from faults_of_times(run, all_lives)
    yield from faults_of_validations(run, last)
    yield from faults_of_sizes(run, last)
    yield from faults_of_headline(run, last, scores)
    for score in scores:
        yield from faults_of_score(run, score)
    yield from faults_of_text(run, scores)
    yield from faults_of_evaluation(run, last, scores)
    yield from faults_of_end(run, last)


def writes(run: Run, text: str) -> bool:
    """Whether the script of this run has a line that begins so."""
    return text in run.source


def faults_of_beginning(run: Run, all_lives: list[LogLines]) -> Iterator[str]:
    """Settings, and what follows from them; they are the same in every life."""
    if run.settings.get("RUN_ID") != run.run_id or run.settings.get("EVAL_ONLY"):
        yield f"the hyperparameters are not those of training run_id:{run.run_id}"
    if run.seed < 0:
        yield "the hyperparameters have no SEED"
    if Path(run.settings.get("DATA_PATH", "")).name != run.dataset:
        yield f"dataset:{run.dataset} is not the folder DATA_PATH={run.settings.get('DATA_PATH')}"
    first = {name: read_settings(all_lives[0]).get(name) for name in RESULT_SETTINGS}
    for life in all_lives:
        settings = read_settings(life)
        for name, value in read_overridden(life).items():
            if settings.get(name) != value:
                yield f"overridden: {name}={value}, but the hyperparameters have another value"
        for name, value in first.items():
            if settings.get(name) != value:
                yield f"{name} is not the same in all lives of the run"
        dtype = life.text(r"^world_size:.* compute_dtype:(\S+)$", "world size")
        if dtype != settings.get("COMPUTE_DTYPE", dtype):
            yield f"compute_dtype:{dtype} is not COMPUTE_DTYPE={settings['COMPUTE_DTYPE']}"
        hardware = life.text(r"^hardware:(\S+) ", "hardware line")
        processes = life.number("world_size:", "world size")
        if not hardware.startswith(f"{processes}x"):
            yield f"world_size:{processes} is not that of hardware:{hardware}"
        if life.number("model_params:", "parameter count") != run.params:
            yield f"model_params:{run.params} is not the same in all lives of the run"
    if len({life.text(r"^(dataset:.*)$", "dataset line") for life in all_lives}) > 1:
        yield "the dataset is not the same in all lives of the run"


def faults_of_times(run: Run, all_lives: list[LogLines]) -> Iterator[str]:
    """Steps and training time, which goes on from life to life."""
    kept: list[Point] = []
    for life in all_lives:
        points = read_points(life)
        if not points:
            yield "a life of the run has no step"
            return
        kept = [point for point in kept if point.step <= points[0].step] + points
        for point in points:
            planned = read_settings(life).get("ITERATIONS")
            if str(point.planned) != planned or point.step > point.planned:
                yield f"step:{point.step}/{point.planned} is not a step of ITERATIONS={planned}"
            steps = max(point.step, 1)
            if point.average and not Printed.of(point.average).agrees(
                point.ms / steps, slack=0.5 / steps
            ):
                yield (
                    f"step:{point.step} has train_time:{point.ms}ms, but step_avg:{point.average}ms"
                )
    for before, after in itertools.pairwise(kept):
        if after.step < before.step or after.ms < before.ms - 1:
            yield (
                f"step:{after.step} train_time:{after.ms}ms comes after "
                f"step:{before.step} train_time:{before.ms}ms"
            )
        if after.step == before.step and after.ms > before.ms + 1:
            yield f"step:{after.step} has train_time:{before.ms}ms and train_time:{after.ms}ms"
    yield from faults_of_stop(run, all_lives[-1])


def faults_of_stop(run: Run, last: LogLines) -> Iterator[str]:
    """Where training ended, and the total of its time."""
    ms = round(1000 * run.train_seconds)
    planned = whole_setting(run.settings, "ITERATIONS", 0)
    stops = last.find_all(rf"^stopping_early: \S+ train_time:({WHOLE})ms step:({WHOLE})/{WHOLE}$")
    if run.step_stop < planned and stops != [(str(ms), str(run.step_stop))]:
        yield (
            f"the last step is {run.step_stop} of {planned}, and no line says that the run "
            f"stopped early there, after {ms} ms"
        )
    if run.step_stop == planned and stops:
        yield f"a line says that the run stopped early, but it made all {planned} steps"
    limit = run.settings.get("MAX_WALLCLOCK_SECONDS", "")
    if stops and re.fullmatch(REAL, limit) and ms < 1000 * float(limit) - 1:
        yield f"the run stopped early after {ms} ms, before MAX_WALLCLOCK_SECONDS={limit}"
    if writes(run, '"Training time"'):
        total = last.text(rf"^Training time: ({REAL}) s; ", "training time")
        if not Printed.of(total).agrees(run.train_seconds, slack=0.0005):
            yield f"Training time: {total} s is not the last train_time:{ms}ms"


def faults_of_validations(run: Run, last: LogLines) -> Iterator[str]:
    """All of them have the same windows, so loss and bits per byte are in proportion."""
    validation = rf"^step:({WHOLE})/{WHOLE} val_loss:({REAL}) val_bpb:({REAL}) .*seqs:({WHOLE}) "
    found = last.find_all(validation)
    if not found or int(found[-1][0]) != run.step_stop:
        yield f"the run did not finish: no validation after its last step, {run.step_stop}"
    lowest, highest = 0.0, math.inf
    wanted = windows_of(run, "EVAL_MAX_SEQS")
    for step, loss, bpb, seqs in found:
        nats, bits = Printed.of(loss), Printed.of(bpb)
        if bits.value <= bits.slack:
            continue
        lowest = max(lowest, (nats.value - nats.slack) / (bits.value + bits.slack))
        highest = min(highest, (nats.value + nats.slack) / (bits.value - bits.slack))
        if lowest > highest:
            figures = f"val_loss:{loss} val_bpb:{bpb}"
            yield f"step:{step} has {figures}, in another proportion than the validations before"
        if wanted and int(seqs) != wanted:
            yield f"step:{step} was validated on seqs:{seqs}, not on {wanted}"


def windows_of(run: Run, setting: str) -> int:
    """How many windows a setting asks for; 0 if it is not there."""
    asked = whole_setting(run.settings, setting, -1)
    return 0 if asked < 0 else min(asked or run.val_windows, run.val_windows)


def faults_of_sizes(run: Run, last: LogLines) -> Iterator[str]:
    """Bytes of the code, of the artifact and of its parts."""
    adds_up = run.total_bytes == run.code_bytes + run.artifact_bytes
    if run.code_bytes != len(run.source.encode()) or not adds_up:
        yield f"the sizes in the log of seed {run.seed} do not add up"
    label = last.text(r"^Total submission size (\S+): ", "total size")
    final = last.text(r"^final_(\S+)_roundtrip_exact ", "exact score")
    if not label == run.storage == final.replace("_", "+"):
        yield f"the artifact is called {run.storage}, {label} and {final}"
    if not writes(run, 'f"kind:{'):
        return
    kinds = read_stored(last)
    if sum(stored.weights for stored in kinds) != run.params:
        yield f"the kinds of parameters do not have model_params:{run.params} weights together"
        return
    for _, _, weights, size, bits, packed_bytes in kinds:
        if not bits.agrees(8 * size / max(weights, 1)):
            yield f"bytes:{size} of weights:{weights} are not bits_per_weight:{bits.value:.3f}"
        if size not in packed_bytes.values():
            yield f"bytes:{size} of a kind of parameters is the size with none of its packers"
    least, most = HEADER_BYTES
    header = run.artifact_bytes - sum(stored.bytes for stored in kinds)
    bits = last.text(rf"^Serialized model .* \(({REAL}) bits per weight\)$", "artifact size")
    whole = 8 * run.artifact_bytes / max(run.params, 1)
    if not least <= header <= most or not Printed.of(bits).agrees(whole):
        yield f"the artifact of {run.artifact_bytes} bytes is not the sum of its parts"


def faults_of_headline(run: Run, last: LogLines, scores: list[ScoreLine]) -> Iterator[str]:
    """val_bpb in all the lines that have it."""
    headline = find_headline(scores, run.system, last.path)
    loss, bpb, stderr, ms = last.find_only(
        rf"^final_\S+_roundtrip val_loss:({REAL}) val_bpb:({REAL}) stderr:({REAL}|nan) "
        rf"eval_time:({WHOLE})ms$",
        "score",
    )
    slack = 0.5e-8  # of the exact ones
    if not Printed.of(loss).agrees(run.val_loss, slack):
        yield f"val_loss:{loss} is not the exact val_loss:{run.val_loss:.8f}"
    if not Printed.of(bpb).agrees(run.val_bpb, slack):
        yield f"val_bpb:{bpb} is not the exact val_bpb:{run.val_bpb:.8f}"
    if (headline.bpb, headline.stderr, str(headline.ms)) != (bpb, stderr, ms):
        yield f"score:{headline.name} has other figures than val_bpb:{bpb} stderr:{stderr}"
    bits_per_nat = run.tokens / (math.log(2) * max(run.bytes, 1))
    exact = Printed(run.val_bpb, slack)
    if not exact.agrees(run.val_loss * bits_per_nat, slack * bits_per_nat):
        yield (
            f"val_bpb:{run.val_bpb:.8f} is not val_loss:{run.val_loss:.8f} · "
            f"{run.tokens} tokens / (ln 2 · {run.bytes} bytes)"
        )
    for score in scores:
        if score.name not in tm.ESTIMATORS[run.system]:
            yield f"score:{score.name} is not for {run.system} models"


def asked_windows(run: Run, score: ScoreLine) -> int:
    """Windows of a score, as far as the settings say; 0 where they do not."""
    named = dict(re.findall(r"(\w+)\s*:\s*(\d{1,12})", run.settings.get("SCORES", "")))
    if score.name in named:
        wanted = int(named[score.name])
    elif score.name == HEADLINES[run.system][0]:
        wanted = whole_setting(run.settings, "FINAL_EVAL_MAX_SEQS", 0)
    else:
        return 0
    total = count_windows(run, stride_of(run, score))
    return min(wanted or total, total)


def length_of(run: Run) -> int:
    """Tokens of a window."""
    return max(whole_setting(run.settings, "TRAIN_SEQ_LEN", 1), 1)


def count_windows(run: Run, stride: int) -> int:
    """Windows of the split that do not go round its end."""
    length = length_of(run)
    return max(1 + (run.val_tokens - 1 - length) // stride, 0)


def slides(score: ScoreLine) -> bool:
    """Whether its windows overlap."""
    return score.name.startswith("sliding")


def stride_of(run: Run, score: ScoreLine) -> int:
    length = length_of(run)
    stride = whole_setting(run.settings, "STRIDE", length) if slides(score) else length
    return max(min(stride, length), 1)


def faults_of_score(run: Run, score: ScoreLine) -> Iterator[str]:
    """The figures of one line on a score."""
    line = f"score:{score.name}"
    length, stride = length_of(run), stride_of(run, score)
    windows = count_windows(run, stride)
    tokens = score.seqs * stride + (length - stride if score.seqs == windows else 0)
    if score.tokens != tokens:
        yield f"{line} has tokens:{score.tokens}, but seqs:{score.seqs} are {tokens} tokens"
    asked = asked_windows(run, score)
    if score.seqs > windows or (asked and score.seqs != asked):
        yield f"{line} has seqs:{score.seqs}, but {asked or windows} windows were to be scored"
    fastest = 1000 * score.tokens / max(score.ms - 0.5, 1e-9)
    slowest = 1000 * score.tokens / (score.ms + 0.5)
    if not slowest - 0.51 <= score.speed.value <= fastest + 0.51:
        yield f"{line} has time:{score.ms}ms, but tokens_per_s:{score.speed.value:.0f}"
    if score.boundary_bits:
        bits, share = Printed.of(score.boundary_bits), Printed.of(score.boundary_bpb)
        if not share.agrees(bits.value / score.bytes, bits.slack / score.bytes):
            yield f"{line} has boundary_bits and boundary_bpb that do not belong together"


def faults_of_text(run: Run, scores: Iterable[ScoreLine]) -> Iterator[str]:
    """The split, and what of it was scored."""
    windows = count_windows(run, length_of(run))
    if run.val_windows != windows:
        yield f"val_windows:{run.val_windows}, but val_tokens:{run.val_tokens} have {windows}"
    if writes(run, "tokenizer_sha256:{") and not (run.tokenizer_sha256 and run.val_bytes):
        yield "the dataset line lacks tokenizer_sha256 or val_bytes, which its script writes"
    bytes_by_windows: dict[int, int] = {}
    for score in scores:
        line = f"score:{score.name}"
        if score.tokens > run.val_tokens:
            yield f"{line} has tokens:{score.tokens}, more than val_tokens:{run.val_tokens}"
        if run.val_bytes is not None and score.bytes > run.val_bytes:
            yield f"{line} has bytes:{score.bytes}, more than val_bytes:{run.val_bytes}"
        left = run.val_tokens - score.tokens
        if run.val_bytes is not None and run.val_bytes - score.bytes > PIECE_BYTES * left:
            unscored = f"val_bytes:{run.val_bytes}, of which {left} tokens are not scored"
            yield f"{line} has bytes:{score.bytes}, but the split has {unscored}"
        if slides(score):
            continue
        same = bytes_by_windows.setdefault(score.seqs, score.bytes)
        if same != score.bytes:
            yield f"{line} has bytes:{score.bytes}, another score of the same windows {same}"


def faults_of_evaluation(run: Run, last: LogLines, scores: list[ScoreLine]) -> Iterator[str]:
    """Times of scores and their sum; scores by position; what is over budget."""
    names = [score.name for score in scores]
    if len(set(names)) < len(names):
        yield "two lines are on the same score"
    for score in scores:
        bpbs = [part.bpb for part in read_positions(last, score.name)]
        whole = float(score.bpb) - float(score.boundary_bpb or 0)
        if bpbs and not min(bpbs) - 2e-4 <= whole <= max(bpbs) + 2e-4:
            yield f"score:{score.name} has bpb:{score.bpb}, but that of no position is as far off"
    if writes(run, '"Evaluation time"'):
        total = Printed.of(last.text(rf"^Evaluation time: ({REAL}) s$", "evaluation time"))
        slack = PAUSE_SECONDS / 2
        if not total.agrees(run.eval_seconds + slack, slack + 0.001 * len(scores)):
            yield f"Evaluation time: {total.value} s, but the scores took {run.eval_seconds:.3f} s"
    for name, value, limit in (
        ("Training time", run.train_seconds, BUDGET_SECONDS + 1),
        ("Evaluation time", run.eval_seconds, BUDGET_SECONDS),
        ("Total submission size", float(run.total_bytes), float(SIZE_LIMIT_BYTES)),
    ):
        if not writes(run, f'"{name}"') and not writes(run, f'f"{name} '):
            continue
        warned = bool(last.find_all(rf"^(OVER BUDGET): {name} "))
        if warned != (value > limit) and abs(value - limit) > PAUSE_SECONDS:
            yield f"{name} is {value:,.1f}, and OVER BUDGET is said of it: {warned}"


def faults_of_end(run: Run, last: LogLines) -> Iterator[str]:
    if writes(run, 'f"finished:{'):
        finished = last.text(r"^finished:(.*)$", "line that says finished:")
        if finished != run.run_id:
            yield f"finished:{finished} is not run_id:{run.run_id}"
        if not last.body.endswith(f"finished:{finished}\n"):
            yield f"something follows after finished:{finished}"
