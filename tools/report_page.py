"""What a report shows, and its page: one HTML file that needs no network and runs no foreign code.

Everything that comes from a log, a text or a sample is escaped. The page's own script is allowed by
its digest, so nothing else in the page can run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import common
import report_charts as charts
from report_charts import Axis, Bar, Point, Series
from run_log import BIASED, Curve, Position, Run, ScoreLine, Stored, over_budget

from train_mdlm import BUDGET_SECONDS, SIZE_LIMIT_BYTES

BITS_STEPS = (0.5, 1, 2, 4, 6, 8, 12)  # between the shades of a token
ORDER_SHADES = 6
NOT_SHOWN = {"PRESET", "RUN_ID", "SEED", "DATA_PATH", "TOKENIZER_PATH"}  # elsewhere, or paths
SCORE_NAMES = {"l2r": "left to right", "ar": "causal"}  # of those with positions
MOST_EXPENSIVE = 10  # tokens that are named


class RunLog(NamedTuple):
    """What the log of a run says; of one that has not finished, only its curve."""

    curve: Curve
    run: Run | None
    scores: list[ScoreLine]
    positions: dict[str, list[Position]]  # by score
    stored: list[Stored]


class Share(NamedTuple):
    """What a masked token costs when so many of a window or block are masked."""

    masked: int
    of: int
    bits: float
    stderr: float


class Token(NamedTuple):
    """A token of a passage, and its bits."""

    piece: str
    left_to_right: float
    orders: tuple[float, float, float] | None  # mean, least and most over random orders


class Passage(NamedTuple):
    """One window of the validation text."""

    window: int
    tokens: list[Token]


class Measured(NamedTuple):
    """What a model has shown."""

    artifact: str
    sha256: str
    score: str  # its headline, measured again
    bpb: float
    stderr: float
    windows: int
    shares: list[Share]
    positions: dict[str, list[Position]]  # where the log has none
    passages: list[Passage]
    orders: int  # random ones, of which a token has the mean
    block_size: int  # 0: the model has no blocks


class Sample(NamedTuple):
    """One text, and how it came about."""

    seed: int
    fixed: list[bool]  # (L,): given, never drawn
    pieces: list[str]  # (L,)
    calls: int
    seconds: float
    bits: float | None
    steps: list[list[tuple[int, str | None]]]  # what each call reveals; None: masked again


class Samples(NamedTuple):
    """Some texts by one sampler."""

    artifact: str
    sampler: str
    settings: dict[str, object]
    samples: list[Sample]


class Report(NamedTuple):
    title: str
    logs: list[RunLog]
    measured: Measured | None
    absent: str  # why nothing was measured
    samples: list[Samples]

    @property
    def runs(self) -> list[Run]:
        """Those that have finished."""
        return [log.run for log in self.logs if log.run]


# ---- HTML


def visible(text: str) -> str:
    """Text as a page can have it: signs for control characters and for what is no Unicode."""
    shown = []
    for letter in text:
        code = ord(letter)
        if code < 32 and letter not in "\n\t":
            letter = chr(0x2400 + code)
        elif 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
            letter = "\ufffd"
        shown.append(letter)
    return "".join(shown)


def escape(text: object) -> str:
    return html.escape(visible(str(text)))


def tag(name: str, content: str, kind: str = "", **attributes: object) -> str:
    """An element; `content` is HTML, attributes are text."""
    begin = f' class="{kind}"' if kind else ""
    for key, value in attributes.items():
        begin += f' {key.replace("_", "-")}="{escape(value)}"'
    return f"<{name}{begin}>{content}</{name}>"


def paragraph(text: str, kind: str = "") -> str:
    return tag("p", escape(text), kind)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is what a row is about."""
    top = "".join(tag("th", escape(head), scope="col") for head in heads)
    body = []
    for first, *rest in rows:
        cells = tag("th", escape(first), scope="row")
        body.append(tag("tr", cells + "".join(tag("td", escape(cell)) for cell in rest)))
    inner = tag("thead", tag("tr", top)) + tag("tbody", "\n".join(body))
    return tag("div", tag("table", inner), "scroll", tabindex="0", role="group", aria_label="Table")


def details(summary: str, content: str) -> str:
    return tag("details", tag("summary", escape(summary)) + content)


def figure(chart: str, caption: str, data: str) -> str:
    """A chart, what it shows, and its figures as a table."""
    return tag("figure", chart + tag("figcaption", escape(caption))) + details("Table", data)


def section(name: str, title: str, *parts: str) -> str:
    return tag("section", "\n".join([tag("h2", escape(title)), *parts]), id=name)


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    return tag("dl", "".join(tag("dt", escape(a)) + tag("dd", escape(b)) for a, b in rows))


def embedded(name: str, value: object) -> str:
    """JSON that the page carries, in a form that cannot end its element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{text}</script>'


def plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}" if error == error else f"{value:.4f}"


# ---- The claim


def claim(runs: list[Run]) -> tuple[str, str]:
    """The score with its error, and what they are."""
    if len(runs) > 1:
        bpbs = [run.val_bpb for run in runs]
        number = plus_minus(statistics.mean(bpbs), statistics.stdev(bpbs))
        return number, f"mean and standard deviation of val_bpb over {len(runs)} seeds"
    (run,) = runs
    windows = f"over {run.seqs:,} windows"
    return plus_minus(run.val_bpb, run.stderr), f"val_bpb and its standard error {windows}"


def largest(runs: list[Run], what: str) -> float:
    return max(getattr(run, what) for run in runs)


def about_run(runs: list[Run]) -> str:
    first = runs[0]
    lasted = f"{largest(runs, 'step_stop'):,} steps in {largest(runs, 'train_seconds'):,.1f} s"
    total = f"{largest(runs, 'total_bytes'):,} bytes of {SIZE_LIMIT_BYTES:,}"
    scored = f"{first.seqs:,} windows, {first.tokens:,} tokens, {first.bytes:,} bytes"
    rows = [
        ("What the number is", first.estimator),
        ("Text", f"{first.dataset}: {scored}"),
        ("Model", f"preset {first.preset}, {first.params:,} parameters, {first.storage}"),
        ("Size", f"{total}, code and artifact"),
        ("Hardware", f"{first.hardware}, torch {first.torch}"),
        ("Training", lasted),
        ("Evaluation", f"{largest(runs, 'eval_seconds'):,.1f} s"),
    ]
    given = first.overridden.items()
    settings = " ".join(f"{name}={value}" for name, value in given if name not in NOT_SHOWN)
    if settings:
        rows.append(("Settings", settings))
    return definitions(rows)


def budget_bars(runs: list[Run]) -> str:
    rows = (  # the last number may be exceeded by: a step that was begun in time is finished
        ("code + artifact", largest(runs, "total_bytes"), SIZE_LIMIT_BYTES, "bytes", 0),
        ("training", largest(runs, "train_seconds"), BUDGET_SECONDS, "s", 1),
        ("evaluation", largest(runs, "eval_seconds"), BUDGET_SECONDS, "s", 0),
    )
    bars = []
    for name, value, limit, unit, more in rows:
        share = value / limit if value > limit + more else min(value / limit, 1.0)
        bars.append(Bar(name, share, f"{value:,.0f} of {limit:,.0f} {unit}"))
    named = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    about = f"Shares of the challenge's limits: {named}"
    return tag("figure", charts.bar_chart(about, bars))


def seeds_table(logs: list[RunLog]) -> str:
    rows = []
    for log in logs:
        run, curve = log.run, log.curve
        if not run:
            state = f"not finished: step {curve.steps[-1]:,} of {curve.planned:,}"
            rows.append([curve.name, state, "", "", "", "", ""])
            continue
        rows.append(
            [
                f"seed {run.seed}",
                plus_minus(run.val_bpb, run.stderr),
                f"{run.val_loss:.4f}",
                f"{run.step_stop:,}",
                f"{run.train_seconds:,.1f} s",
                f"{run.eval_seconds:,.1f} s",
                f"{run.artifact_bytes:,}",
            ]
        )
    heads = ["", "val_bpb", "val_loss", "steps", "training", "evaluation", "artifact bytes"]
    return table(heads, rows)


def other_scores(logs: list[RunLog]) -> str:
    rows = []
    for log in logs:
        for score in log.scores:
            windows = f"{score.seqs:,}"
            kind = "no: a published estimator" if score.name in BIASED else "yes"
            row = [score.name, f"seed {log.run.seed}", score.bpb, score.stderr, windows, kind]
            rows.append(row)
    heads = ["score", "run", "bits per byte", "std. error", "windows", "length of a code"]
    return details("All scores", table(heads, rows))


def claim_section(report: Report) -> str:
    runs = report.runs
    if not runs:
        text = "No score yet: no run has finished."
        return section("claim", "Claim", paragraph(text), seeds_table(report.logs))
    number, meaning = claim(runs)
    warnings = [paragraph(f"Over budget: {text}.", "warning") for text in over_budget(runs)]
    finished = [log for log in report.logs if log.run]
    return section(
        "claim",
        "Claim",
        tag("p", tag("strong", escape(number)) + " bits per byte", "number"),
        paragraph(meaning, "quiet"),
        *warnings,
        about_run(runs),
        budget_bars(runs),
        seeds_table(report.logs) if len(report.logs) > 1 else "",
        other_scores(finished),
    )


# ---- Curves and scores by position


def name_of(log: RunLog) -> str:
    return f"seed {log.run.seed}" if log.run else log.curve.name


def curve_section(logs: list[RunLog]) -> str:
    chosen, rows = [], []
    for log in logs:
        curve, name = log.curve, name_of(log)
        points = [Point(x, y) for x, y in zip(curve.seconds, curve.bpb, strict=True)]
        label, short, final = name[:14], name[:14], None
        if log.run:
            final = Point(curve.seconds[-1], log.run.val_bpb, log.run.stderr)
            label = f"{name}: {log.run.val_bpb:.3f}"
            short = f"{log.run.seed}: {log.run.val_bpb:.3f}"
        chosen.append(Series(label, points, final, short))
        for step, seconds, bpb in zip(curve.steps, curve.seconds, curve.bpb, strict=True):
            rows.append([name, f"{step:,}", f"{seconds:,.1f}", f"{bpb:.4f}"])
        if log.run:
            rows.append([name, "read back from disk", "", plus_minus(final.y, final.error)])
    data = table(["run", "step", "seconds", "bits per byte"], rows)
    if all(len(one.points) == 1 for one in chosen):
        text = "Validated only once, so there is no curve."
        return section("curves", "Training", paragraph(text), data)
    x = charts.number_axis(
        "training time, s", [point.x for one in chosen for point in one.points], 5, low=0.0
    )
    scores = [one.final for one in chosen if one.final]
    heights = charts.reach([point for one in chosen for point in one.points] + scores)
    y = charts.number_axis("validation, bits per byte", heights, 6)
    steps = f"from {max(heights):.2f} to {min(heights):.2f} bits per byte"
    chart = charts.line_chart(f"Validation score over training time, {steps}", x, y, chosen)
    caption = (
        "Validations during training. The diamond is the final score, of the weights read back "
        "from disk, on windows of its own and with its standard error."
    )
    if not scores:
        caption = "Validations during training."
    return section("curves", "Training", figure(chart, caption, data))


def mean_positions(logs: list[RunLog]) -> dict[str, list[Position]]:
    """By score: the means over the runs of scores and of their standard errors."""
    found = {}
    for name in dict.fromkeys(name for log in logs for name in log.positions):
        parts = zip(*(log.positions[name] for log in logs if name in log.positions), strict=True)
        found[name] = [
            Position(
                same[0].positions,
                statistics.mean(part.bpb for part in same),
                statistics.mean(part.stderr for part in same),
            )
            for same in parts
        ]
    return found


def position_section(report: Report) -> str:
    title = "Bits by position in the window"
    found = mean_positions(report.logs)
    source = "From the log" if len(report.logs) == 1 else "From the logs, mean over the runs"
    if not found and report.measured:
        found = report.measured.positions
        source = f"Measured from {report.measured.artifact} on {report.measured.windows} windows"
    if not found:
        return section("positions", title, paragraph(f"No score by position. {report.absent}"))
    names = [position.positions for position in next(iter(found.values()))]
    chosen = []
    for name, positions in found.items():
        points = [
            Point(place, position.bpb, position.stderr) for place, position in enumerate(positions)
        ]
        label = SCORE_NAMES.get(name, name) if len(found) > 1 else ""
        chosen.append(Series(label, points))
    heights = charts.reach([point for one in chosen for point in one.points])
    x = Axis("tokens before it", -0.4, len(names) - 0.6, list(enumerate(names)))
    y = charts.number_axis("bits per byte", heights, 6)
    about = ", ".join(f"{p.positions}: {p.bpb:.2f}" for p in next(iter(found.values())))
    chart = charts.line_chart(
        f"Bits per byte by position: {about}", x, y, chosen, values=len(found) == 1
    )
    caption = (
        f"{source}. What a token costs, left to right, given so many tokens of its window; "
        "bars are one standard error."
    )
    rows = [
        [names[place]]
        + [plus_minus(each[place].bpb, each[place].stderr) for each in found.values()]
        for place in range(len(names))
    ]
    heads = ["position", *(SCORE_NAMES.get(name, name) for name in found)]
    return section("positions", title, figure(chart, caption, table(heads, rows)))


# ---- By share masked


def share_section(report: Report) -> str:
    title = "Bits by share masked"
    measured = report.measured
    if not measured:
        return section("shares", title, paragraph(report.absent))
    if not measured.shares:
        text = "A causal model predicts from left to right: nothing is masked."
        return section("shares", title, paragraph(text))
    shares = measured.shares
    of = shares[0].of
    points = [Point(share.masked / of, share.bits, share.stderr) for share in shares]
    mean = statistics.mean(share.bits for share in shares)
    ticks = [(k / 4, f"{25 * k} %") for k in range(5)]
    unit = "block" if measured.block_size else "window"
    x = Axis(f"masked share of the {unit}", 0.0, 1.04, ticks)
    y = charts.number_axis("bits of a masked token", charts.reach(points), 6, low=0.0)
    about = ", ".join(f"{point.x:.0%}: {point.y:.2f}" for point in points)
    chart = charts.line_chart(
        f"Bits of a masked token by masked share: {about}",
        x,
        y,
        [Series("", points)],
        level=(mean, f"mean: {mean:.2f}"),
    )
    caption = (
        f"Measured from {measured.artifact} on {measured.windows} windows, each masked at random. "
        "Averaged over all shares, a masked token costs what a token costs in the any-order score."
    )
    rows = [
        [
            f"{share.masked} of {of}",
            f"{share.masked / of:.0%}",
            plus_minus(share.bits, share.stderr),
        ]
        for share in shares
    ]
    data = table(["masked", "share", "bits of a masked token"], rows)
    return section("shares", title, figure(chart, caption, data))


# ---- Bytes


def bytes_section(logs: list[RunLog]) -> str:
    title = f"Where the {SIZE_LIMIT_BYTES:,} bytes went"
    finished = [log for log in logs if log.run]
    if not finished:
        return section("bytes", title, paragraph("No run has finished, so there is no artifact."))
    log = max(finished, key=lambda log: log.run.total_bytes)
    run = log.run
    parts = [("code", run.code_bytes, "", 0)]
    parts += [(stored.kind, stored.bytes, stored.storage, stored.weights) for stored in log.stored]
    rest = run.artifact_bytes - sum(stored.bytes for stored in log.stored)
    parts.append(("header and checksum" if log.stored else "artifact", rest, "", 0))
    free = SIZE_LIMIT_BYTES - run.total_bytes
    room = f"{free:,} free" if free >= 0 else f"{-free:,} too many"
    used = Bar("used", run.total_bytes / SIZE_LIMIT_BYTES, f"{run.total_bytes:,} bytes, {room}")
    shares, rows = [], []
    for name, size, storage, weights in parts:
        share = size / run.total_bytes
        bits = f", {8 * size / weights:.2f} bits a weight" if weights else ""
        shares.append(Bar(name, share, f"{size:,} bytes{bits}", "part"))
        each = f"{weights:,}" if weights else ""
        rows.append([name, f"{size:,}", f"{share:.1%}", storage, each])
    rows += [["free", f"{free:,}", "", "", ""], ["limit", f"{SIZE_LIMIT_BYTES:,}", "", "", ""]]
    named = ", ".join(f"{name} {size:,}" for name, size, *_ in parts)
    about = f"{run.total_bytes:,} bytes of {SIZE_LIMIT_BYTES:,}: {named}"
    seed = f"Seed {run.seed}, the largest" if len(finished) > 1 else "This run"
    caption = f"{seed}: above, what is used of the limit; below, the parts of it."
    data = table(["part", "bytes", "share of used", "storage", "weights"], rows)
    return section("bytes", title, figure(charts.bar_chart(about, [used], shares), caption, data))


# ---- Tokens


def shade(bits: float) -> int:
    return sum(bits >= step for step in BITS_STEPS)


def readable(piece: str) -> str:
    """A token in a sentence: no line breaks, and blanks that can be seen."""
    return piece.replace("\n", "↵").replace("\t", "⇥")


def lines_shown(piece: str) -> str:
    """A token in a text: line breaks are kept, and can be seen."""
    return piece.replace("\n", "↵\n")


def token_bits(token: Token, any_order: bool) -> float:
    return token.orders[0] if any_order else token.left_to_right


def token_span(token: Token, any_order: bool) -> str:
    bits = token_bits(token, any_order)
    note = f"“{readable(token.piece)}”: {bits:.2f} bits"
    if any_order:
        note += f", from {token.orders[1]:.2f} to {token.orders[2]:.2f}"
    return tag("span", escape(lines_shown(token.piece)), f"t b{shade(bits)}", title=note)


def passage_view(measured: Measured, any_order: bool) -> str:
    """The text, each token on a background that says how many bits it costs."""
    where = f" in each block of {measured.block_size}" if measured.block_size else ""
    name = "left to right"
    if any_order:
        name = f"any order{where}, mean of {measured.orders} random orders"
    passages = measured.passages
    tokens = [token for passage in passages for token in passage.tokens]
    mean = statistics.mean(token_bits(token, any_order) for token in tokens)
    texts = [
        "".join(token_span(token, any_order) for token in passage.tokens) for passage in passages
    ]
    text = tag(
        "div",
        "".join(tag("p", text) for text in texts),
        "passage",
        tabindex="0",
        role="group",
        aria_label=f"Passage, {name}. Arrow keys go from token to token; a table follows.",
    )
    top = tag("h3", escape(name[0].upper() + name[1:])) + paragraph(
        f"{mean:.2f} bits per token", "quiet"
    )
    return tag("div", top + text + tag("p", "", "readout", aria_live="polite"))


def legend(shades: Sequence[tuple[str, str]], name: str) -> str:
    items = "".join(
        tag("li", tag("span", "", f"swatch {kind}") + escape(label)) for kind, label in shades
    )
    return tag("ul", items, "legend", aria_label=name)


def bits_legend() -> str:
    edges = [f"{step:g}" for step in BITS_STEPS]
    between = [f"{low}–{high}" for low, high in itertools.pairwise(edges)]
    labels = [f"< {edges[0]}", *between, f"≥ {edges[-1]}"]
    return legend([(f"b{n}", label) for n, label in enumerate(labels)], "Bits of a token")


def most_expensive(tokens: list[Token]) -> str:
    order = sorted(range(len(tokens)), key=lambda n: -tokens[n].left_to_right)[:MOST_EXPENSIVE]
    named = [f"“{readable(tokens[n].piece)}” {tokens[n].left_to_right:.1f}" for n in order]
    total = sum(token.left_to_right for token in tokens)
    share = sum(tokens[n].left_to_right for n in order) / max(total, 1e-9)
    text = f"The {len(order)} most expensive tokens, left to right, have {share:.0%} of the bits: "
    return paragraph(text + ", ".join(named) + ".")


def token_section(report: Report) -> str:
    title = "Which tokens are expensive"
    measured = report.measured
    if not measured:
        return section("tokens", title, paragraph(report.absent))
    tokens = [token for passage in measured.passages for token in passage.tokens]
    both = tokens[0].orders is not None
    windows = ", ".join(f"{passage.window:,}" for passage in measured.passages)
    plural = "s" if len(measured.passages) > 1 else ""
    intro = (
        f"Held-out text, {len(tokens)} tokens: window{plural} {windows} of the validation split. "
        f"The stronger its colour, the more bits a token costs with {measured.artifact}."
    )
    views = [passage_view(measured, any_order) for any_order in (False, True)[: 1 + both]]
    heads = ["token", "left to right"] + ["any order", "least", "most"] * both
    rows = [
        [readable(token.piece), f"{token.left_to_right:.2f}"]
        + [f"{bits:.2f}" for bits in token.orders or ()]
        for token in tokens
    ]
    note = (
        "" if both else paragraph("A causal model has no other order than left to right.", "quiet")
    )
    return section(
        "tokens",
        title,
        paragraph(intro),
        bits_legend(),
        tag("div", "".join(views), "views"),
        note,
        most_expensive(tokens),
        details("Table", table(heads, rows)),
    )


# ---- Samples


def visible_spans(sample: Sample) -> dict[str, list[charts.Span]]:
    """The layers of an order map: what is given, what is seen, and when it was revealed or masked
    again; calls count from 0."""
    given = [(n, 0, sample.calls - 1) for n, fixed in enumerate(sample.fixed) if fixed]
    seen, now, gone = [], [], []
    since: dict[int, int] = {}
    for call, step in enumerate(sample.steps):
        for position, piece in step:
            if position in since:
                seen.append((position, since.pop(position), call - 1))
            if piece is None:
                gone.append((position, call, call))
            else:
                now.append((position, call, call))
                since[position] = call
    last = max(sample.calls, len(sample.steps)) - 1
    seen += [(position, first, last) for position, first in since.items()]
    return {"given": given, "seen": seen, "now": now, "gone": gone}


def last_reveals(sample: Sample) -> dict[int, int]:
    """The call, counted from 0, in which each drawn position got its last token."""
    return {
        position: call
        for call, step in enumerate(sample.steps)
        for position, piece in step
        if piece is not None
    }


def sample_text(sample: Sample) -> str:
    """The final text, shaded by when each token was revealed."""
    reveals, calls = last_reveals(sample), max(len(sample.steps), 1)
    spans = []
    for position, piece in enumerate(sample.pieces):
        kind = "t given" if sample.fixed[position] else "t"
        if position in reveals and not sample.fixed[position]:
            kind += f" o{reveals[position] * ORDER_SHADES // calls}"
        spans.append(tag("span", escape(lines_shown(piece)), kind))
    return tag("p", "".join(spans), "written")


def slider(number: int, steps: int) -> str:
    """Controls that only a script can use, and hidden without one."""
    play = tag("button", "Play", "play", type="button")
    name = f"Model calls done, of {steps}"
    moved = (
        f'<input type="range" min="0" max="{steps}" value="{steps}" aria-label="{escape(name)}">'
    )
    told = tag("output", f"{steps} of {steps} calls")
    return f'<div class="controls" data-sample="{number}" hidden>{play}{moved}{told}</div>'


def sample_block(number: int, sample: Sample) -> str:
    drawn = sample.fixed.count(False)
    facts = [f"seed {sample.seed}", f"{drawn:,} tokens in {sample.calls:,} calls"]
    if sample.seconds:
        facts.append(f"{sample.seconds:.1f} s")
    if sample.bits is not None:
        each = sample.bits / max(drawn, 1)
        facts.append(f"{sample.bits:,.1f} bits, {each:.2f} a token")
    layers = visible_spans(sample)
    about = f"Order of unmasking: {drawn} positions in {len(sample.steps)} calls"
    again = f", {len(layers['gone'])} masked again" if layers["gone"] else ""
    chart = charts.order_map(
        about + again, len(sample.pieces), len(sample.steps), list(layers.items())
    )
    rows = [
        [
            call + 1,
            len(step),
            " ".join(
                f"{position + 1}:{readable(piece) if piece is not None else 'masked'}"
                for position, piece in step
            ),
        ]
        for call, step in enumerate(sample.steps)
    ]
    data = details("Table", table(["call", "positions", "position:token"], rows))
    top = tag("h4", escape(" · ".join(facts)))
    body = top + slider(number, len(sample.steps)) + sample_text(sample)
    return tag("div", body + tag("figure", chart) + data, "sample")


def sample_section(chosen: list[Samples]) -> str:
    title = "Samples"
    if not chosen:
        text = (
            "No samples were given. tools/sample.py --json FILE writes them, --samples FILE shows."
        )
        return section("samples", title, paragraph(text))
    parts = []
    number = 0
    for samples in chosen:
        settings = ", ".join(f"{name} {value}" for name, value in samples.settings.items())
        parts.append(tag("h3", escape(f"{samples.sampler}, {samples.artifact}")))
        parts.append(paragraph(settings, "quiet") if settings else "")
        for sample in samples.samples:
            parts.append(sample_block(number, sample))
            number += 1
    shades = [(f"o{n}", "") for n in range(ORDER_SHADES)]
    shades[0], shades[-1] = ("o0", "revealed early"), (f"o{ORDER_SHADES - 1}", "late")
    shades += [("given", "given"), ("gone", "masked again")]
    intro = (
        "Each text is shaded by when its tokens were revealed. Below it, a column is a position "
        "and a row a model call: marked where the token appears, filled while it is seen."
    )
    return section("samples", title, paragraph(intro), legend(shades, "Order"), *parts)


# ---- The check


def check_items(report: Report) -> list[str]:
    """What was checked, a sentence each."""
    runs = report.runs
    items = [
        "Each log was read as a whole, and its figures agree with one another: steps and times, "
        "the parts of the artifact and their sum, scores by position and as a whole, val_bpb and "
        "val_loss.",
    ]
    if len(runs) > 1:
        items.append(
            "All runs are of one system: the same script, data, hardware and settings, and "
            "another seed each."
        )
    first = runs[0]
    digest = hashlib.sha256(first.source.encode()).hexdigest()
    items.append(f"The script is in the log: {first.code_bytes:,} bytes, SHA-256 {digest}.")
    if first.tokenizer_sha256:
        items.append(
            f"The validation split has {first.val_tokens:,} tokens and {first.val_bytes:,} bytes; "
            f"the tokenizer's SHA-256 is {first.tokenizer_sha256}."
        )
    over = over_budget(runs)
    limits = f"{SIZE_LIMIT_BYTES:,} bytes and {BUDGET_SECONDS:.0f} s"
    items.append(f"Over budget: {'; '.join(over)}." if over else f"All runs keep to {limits}.")
    return items


def measured_item(report: Report) -> str:
    measured = report.measured
    score = plus_minus(measured.bpb, measured.stderr)
    logged = [f"{run.val_bpb:.4f} on {run.seqs:,}" for run in report.runs[:1]]
    return (
        f"{measured.artifact} has the size that the log says (SHA-256 {measured.sha256}). Read "
        f"back and scored again ({measured.score}) on {measured.windows:,} windows it has {score} "
        f"bits per byte; the log says {logged[0]}."
    )


def check_section(report: Report) -> str:
    if not report.runs:
        return section("check", "Check", paragraph("Only a finished run can be checked."))
    items = check_items(report)
    if report.measured:
        items.append(measured_item(report))
    listed = tag("ul", "".join(tag("li", escape(item)) for item in items), "checks")
    again = paragraph("A record folder is checked again, from its logs alone, with")
    command = tag("pre", "python tools/make_record.py --check FOLDER")
    return section("check", "Check", listed, again, command)


# ---- The page

SECTIONS = {
    "claim": "Claim",
    "curves": "Training",
    "positions": "Position",
    "shares": "Masked",
    "bytes": "Bytes",
    "tokens": "Tokens",
    "samples": "Samples",
    "check": "Check",
}


def style() -> str:
    """The style sheet; its dark colours also hold where a dark system leaves the choice to us."""
    sheet = (common.TOOLS / "report.css").read_text(encoding="utf-8")
    dark = re.search(r':root\[data-theme="dark"\] (\{.*?\n\})', sheet, re.DOTALL)[1]
    return f"{sheet}\n@media (prefers-color-scheme: dark) {{\n:root:not([data-theme]) {dark}\n}}\n"


def digest_of(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def theme_switch() -> str:
    choices = "".join(
        f'<label><input type="radio" name="theme" value="{name}"{" checked" * (name == "auto")}>'
        f"<span>{name.capitalize()}</span></label>"
        for name in ("auto", "light", "dark")
    )
    hidden = tag("legend", "Colours")
    return f'<fieldset class="theme" hidden>{hidden}{choices}</fieldset>'


def figures(logs: Sequence[RunLog]) -> list[dict]:
    """What the page says of each run, for programs; make_record.py --check compares it."""
    found = []
    for log in logs:
        run, curve = log.run, log.curve
        entry = dict(steps=curve.steps, seconds=curve.seconds, bpb=curve.bpb)
        if run:
            names = "seed val_bpb val_loss seqs artifact_bytes code_bytes total_bytes".split()
            entry |= {name: getattr(run, name) for name in names}
            entry["scores"] = {score.name: float(score.bpb) for score in log.scores}
            entry["bytes"] = {stored.kind: stored.bytes for stored in log.stored}
        found.append(entry)
    return found


def stated_figures(page: str) -> object:
    """What a page says of each run; None if it says nothing."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    try:
        return json.loads(found[1]) if found else None
    except ValueError:
        return None


def script() -> str:
    return (common.TOOLS / "report.js").read_text(encoding="utf-8")


def sample_steps(chosen: list[Samples]) -> list:
    """What the slider needs: of each sample, the positions and pieces of every call."""
    return [
        [
            [[at, None if piece is None else lines_shown(visible(piece))] for at, piece in step]
            for step in sample.steps
        ]
        for samples in chosen
        for sample in samples.samples
    ]


def head(title: str, sheet: str, program: str) -> str:
    """Only what has these digests is applied or run, and nothing is fetched."""
    policy = f"default-src 'none'; style-src {digest_of(sheet)}; script-src {digest_of(program)}"
    return "\n".join(
        [
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{common.MARK}">',
            f"<title>{escape(title)}</title>",
            f"<style>{sheet}</style>",
        ]
    )


def page(report: Report) -> str:
    """The whole file."""
    program = script()
    links = "".join(tag("a", escape(label), href=f"#{name}") for name, label in SECTIONS.items())
    sections = [
        claim_section(report),
        curve_section(report.logs),
        position_section(report),
        share_section(report),
        bytes_section(report.logs),
        token_section(report),
        sample_section(report.samples),
        check_section(report),
    ]
    body = [
        tag("header", tag("h1", escape(report.title)) + theme_switch()),
        tag("nav", links, aria_label="Sections"),
        tag("main", "\n".join(sections)),
        tag("footer", paragraph("Made by tools/report.py from the logs of train_mdlm.py.")),
        embedded("figures", figures(report.logs)),
        embedded("steps", sample_steps(report.samples)),
        f"<script>{program}</script>",
    ]
    top = tag("head", head(report.title, style(), program))
    html_page = tag("html", top + "\n" + tag("body", "\n".join(body)), lang="en")
    return f"<!doctype html>\n{html_page}\n"
