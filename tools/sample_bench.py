"""Quality against work: what each sampler makes of so many model calls, and how gaps are filled.

    python tools/sample_bench.py logs/demo.mdlm --judge logs/ar.mdlm --num 64 --out bench

Every sampler of the artifact writes --num windows with 8, 16, 32, 64 and 128 model calls each. The
judge, a causal artifact trained on the same data, gives their generative perplexity. That falls for
text that repeats itself, so it stands beside the entropy of the tokens of a window, the share of
distinct pairs of tokens, and the share of 4-grams that a window repeats, all of them also for real
held-out text. Calls are as counted: ancestral steps that reveal nothing are none, and eb, which
decides itself, gets the gamma that comes closest.

Gaps in the middle of held-out windows are filled by the artifact, which sees both sides, and from
left to right by the artifact and by the judge, which see the left side alone: how often the most
probable tokens are the true ones, and how many bits the true ones cost.

OUT/README.md is the table, OUT/sample_bench.json the same for programs, OUT/sample_bench.png the
picture. After Ctrl-C they have the rows that were finished, and say how many are missing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import common
import compare
import sampling
import sweep
import torch
from torch import Tensor

import train_mdlm as tm
from train_mdlm import InputError

TABLE_BEGINS = "Quality against work"
SETTINGS = ("num", "batch", "temperature", "top_p", "seed")
CALLS, GAPS = "8,16,32,64,128", "1,2,4,8,16"
REPEATED = 4  # tokens of the n-grams of which repeats are counted
PROBE, ROUNDS, CLOSE = 4, 8, 0.05  # samples and rounds of the search for gamma, and when it ends


class Bench(NamedTuple):
    """What all measurements share."""

    loaded: sampling.Loaded
    judge: sampling.Loaded
    request: sampling.Request  # temperature, top_p, seed, num, batch

    @property
    def length(self) -> int:
        return self.loaded.hp.train_seq_len

    @property
    def fewest_calls(self) -> int:
        """Of a window: one for each block."""
        return self.length // (self.loaded.hp.block_size or self.length)


# ---- Quality of texts


def entropy_of(tokens: Tensor) -> float:
    """Bits: of the frequencies of the tokens (L,) in one text."""
    p = tokens.unique(return_counts=True)[1] / len(tokens)
    return -(p * p.log2()).sum().item()


def ngrams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_share(texts: list[list[int]], n: int) -> float:
    """Different n-grams of all texts over all of them (Li et al. 2016)."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found)


def repeated_share(texts: list[list[int]], n: int) -> float:
    """Share of the n-grams of a text that were in it before (Welleck et al. 2020), on average."""
    grams = [ngrams(text, n) for text in texts]
    return statistics.fmean(1 - len(set(own)) / len(own) for own in grams)


def judged_nats(judge: sampling.Loaded, tokens: Tensor, batch: int) -> Tensor:
    """(B,) nats per token of texts (B, L) that begin a document."""
    device = judge.luts.base_bytes.device
    parts = [
        tm.causal_nll(judge.model, tm.with_before(rows.to(device))).double().mean(1).cpu()
        for rows in tokens.split(batch)
    ]
    return torch.cat(parts)


def quality(bench: Bench, tokens: Tensor) -> dict:
    """Of texts (B, L)."""
    nats = judged_nats(bench.judge, tokens, bench.request.batch)
    perplexity = nats.mean().exp().item()
    texts = tokens.tolist()
    return dict(
        perplexity=perplexity,
        stderr=perplexity * nats.std().item() / math.sqrt(len(nats)),
        entropy=statistics.fmean(entropy_of(text) for text in tokens),
        distinct=distinct_share(texts, 2),
        repeated=repeated_share(texts, REPEATED),
    )


# ---- Samplers


def mean_calls(samples: list[sampling.Sample]) -> float:
    return statistics.fmean(sample.calls for sample in samples)


def gamma_for(bench: Bench, request: sampling.Request, calls: int) -> float:
    """The gamma of eb, in nats, with which some samples take about so many calls."""
    low, high = 0.0, 1.0  # more calls, fewer
    probe = request._replace(num=min(PROBE, request.num))

    def taken(gamma: float) -> float:
        tried = f"looking for {calls} calls, trying gamma {gamma:g}"
        print(f"{request.sampler}: {tried}", flush=True)
        return mean_calls(list(sampling.draw(bench.loaded, probe._replace(gamma=gamma))))

    if calls >= bench.length:
        return low
    while taken(high) > calls and high < 1e4:
        low, high = high, 4 * high
    for _ in range(ROUNDS):
        gamma = (low + high) / 2
        found = taken(gamma)
        if abs(found - calls) <= CLOSE * calls:
            return gamma
        low, high = (gamma, high) if found > calls else (low, gamma)
    return (low + high) / 2


def possible_calls(bench: Bench, calls: list[int]) -> list[int]:
    """Those of `calls` that a window can take, if its sampler has a choice."""
    return [number for number in calls if bench.fewest_calls <= number <= bench.length]


def planned_rows(bench: Bench, names: list[str], calls: list[int]) -> list[tuple[str, int]]:
    """Sampler and model calls of each row."""
    possible = possible_calls(bench, calls)
    return [
        (name, number)
        for name in names
        for number in (possible if sampling.SAMPLERS[name].options else [bench.length])
    ]


def request_for(bench: Bench, name: str, calls: int) -> sampling.Request:
    """The request that comes closest to so many calls."""
    request = bench.request._replace(sampler=name)
    options = sampling.SAMPLERS[name].options
    if not options:  # a call for each token
        return request
    if "steps" in options:
        return request._replace(steps=calls)
    return request._replace(gamma=gamma_for(bench, request, calls))


def measure(bench: Bench, request: sampling.Request) -> dict:
    """A row of the table."""
    samples = list(sampling.draw(bench.loaded, request))
    seconds = sum(sample.seconds for sample in samples)
    tokens = torch.tensor([sample.tokens for sample in samples])
    return dict(
        sampler=request.sampler,
        settings=sampling.settings_of(request),
        calls=mean_calls(samples),
        tokens_per_second=tokens.numel() / seconds,
        **quality(bench, tokens),
    )


# ---- Gaps


class Forced(sampling.Rows):
    """Rows into which the true tokens are written, whatever is predicted."""

    truth: Tensor  # (B, N)

    def draw(self, columns: Tensor, prediction: sampling.Prediction) -> Tensor:
        return self.truth.gather(1, columns)


class Filling(NamedTuple):
    """A way to fill gaps."""

    name: str
    loaded: sampling.Loaded
    sampler: str
    right: bool  # whether what follows is there


def fillings(bench: Bench) -> list[Filling]:
    loaded, judge = bench.loaded, bench.judge
    ways = [Filling("judge, left to right", judge, "causal", right=False)]
    if loaded.hp.causal:
        return ways
    for name in ("confidence", "l2r"):
        ways.append(Filling(f"both sides, {name}", loaded, name, right=True))
    return [*ways, Filling("left side, l2r", loaded, "l2r", right=False)]


def fill(way: Filling, x0: Tensor, gap: slice, kind: type[sampling.Rows]) -> sampling.Rows:
    """The gap of windows x0 (B, L), filled a token a call with the most probable ones."""
    hp = way.loaded.hp
    tokens = x0.clone()
    tokens[:, gap] = hp.mask_id
    if not way.right:
        tokens[:, gap.stop :] = hp.mask_id
    template = sampling.template_of_tokens(tokens, hp.mask_id)
    request = sampling.Request(sampler=way.sampler, temperature=0)
    rows = kind(way.loaded.model, template, request)
    rows.truth = x0
    for _ in itertools.islice(sampling.write(rows), gap.stop - gap.start):
        pass
    return rows


def measure_gaps(bench: Bench, way: Filling, windows: Tensor, length: int) -> dict:
    """Exact matches and bits of the true tokens of a gap of that length in windows (B, L)."""
    start = (windows.shape[1] - length) // 2
    gap = slice(start, start + length)
    matches, bits = [], []
    device = way.loaded.luts.base_bytes.device
    for x0 in windows.to(device).split(bench.request.batch):
        found = fill(way, x0, gap, sampling.Rows).z[:, gap]
        matches.append((found == x0[:, gap]).all(1))
        bits.append(fill(way, x0, gap, Forced).nats / math.log(2))
    bits = torch.cat(bits)
    return dict(
        filling=way.name,
        gap=length,
        exact_match=torch.cat(matches).double().mean().item(),
        bits=bits.mean().item(),
        stderr=bits.std().item() / math.sqrt(len(bits)),
    )


# ---- The report


def table(report: dict) -> str:
    heads = ["sampler", "calls", "generative perplexity", "entropy of tokens, bits"]
    heads += ["distinct pairs", f"repeated {REPEATED}-grams", "tokens/s"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    reference = dict(report["held_out"], sampler="held-out text", calls=None)
    for row in [reference, *report["samplers"]]:
        cells = [row["sampler"], "" if row["calls"] is None else f"{row['calls']:.4g}"]
        cells.append(f"{row['perplexity']:.1f} ± {row['stderr']:.1f}")
        cells += [f"{row['entropy']:.2f}", f"{row['distinct']:.3f}", f"{row['repeated']:.3f}"]
        cells.append("" if row["calls"] is None else f"{row['tokens_per_second']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gap_cell(row: dict) -> str:
    bits = f"{row['bits']:.1f} ± {row['stderr']:.1f} bits"
    return f"{100 * row['exact_match']:.0f} %, {bits}"


def gap_table(report: dict) -> str:
    gaps = sorted({row["gap"] for row in report["gaps"]})
    heads = ["filled", *(f"{gap} token{'s' * (gap > 1)}" for gap in gaps)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["filling"] for row in report["gaps"]):
        own = {row["gap"]: row for row in report["gaps"] if row["filling"] == name}
        cells = [gap_cell(own[gap]) if gap in own else "" for gap in gaps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_markdown(report: dict) -> str:
    text = (
        f"{TABLE_BEGINS}: {report['artifact']}, {report['num']} windows of {report['length']} "
        f"tokens for each row, temperature {report['temperature']:g}, top-p {report['top_p']:g}; "
        f"perplexity under {report['judge']}:\n\n{table(report)}"
    )
    if report["gaps"]:
        text += (
            f"\nGaps in the middle of {report['num']} held-out windows: exact matches of the most "
            f"probable tokens, and bits of the true ones:\n\n{gap_table(report)}"
        )
    planned = report["planned_rows"]
    missing = planned - len(report["samplers"]) - len(report["gaps"])
    if missing:
        text += f"\nInterrupted: {missing} of {planned} rows are missing.\n"
    return text


def draw_picture(report: dict, path: Path) -> None:
    figure = common.new_figure(11, 4.4)
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["sampler"] for row in report["samplers"]))
    measures = dict(perplexity="generative perplexity", entropy="entropy of tokens, bits")
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for name, marker in zip(names, itertools.cycle("osD^vP*X<>")):  # noqa: B905 (endless)
            rows = [row for row in report["samplers"] if row["sampler"] == name]
            points = sorted((row["calls"], row[measure]) for row in rows)
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        reference = report["held_out"][measure]
        axes.axhline(reference, color="black", linestyle="--", label="held-out text")
        axes.set(xlabel="model calls a window", ylabel=label, xscale="log")
        ticks = report["asked_calls"]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    common.save_figure(figure, path)


# ---- Command line


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("artifact", type=Path, help="the .mdlm file of a run")
    judge_help = "artifact of a causal model, trained on the same data"
    parser.add_argument("--judge", type=Path, required=True, help=judge_help)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--num", type=int, default=64, help="windows for each row")
    parser.add_argument("--batch", type=int, default=64, help="windows side by side")
    parser.add_argument("--calls", default=CALLS, help="model calls a window")
    parser.add_argument("--gaps", default=GAPS, help="lengths of gaps, in tokens")
    samplers_help = "separated by commas; default: all that the artifact has"
    parser.add_argument("--samplers", default="", help=samplers_help)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first window")
    common.add_data_options(parser, "that of the run or of its preset")
    return parser.parse_args()


def check_calls(bench: Bench, names: list[str], calls: list[int]) -> None:
    """InputError if a sampler would have no row at all."""
    if possible_calls(bench, calls):
        return
    if any(sampling.SAMPLERS[name].options for name in names):
        given = ",".join(map(str, calls))
        possible = f"take {bench.fewest_calls} to {bench.length}"
        window = f"{bench.length} tokens of {bench.loaded.name} {possible}"
        raise InputError(f"--calls {given}: none of them is possible: {window}")


def load_both(arguments: argparse.Namespace) -> tuple[sampling.Loaded, sampling.Loaded]:
    """The artifact and its judge; InputError unless they are of the same text."""
    paths = [arguments.artifact, arguments.judge]
    both = [sampling.load(path, arguments.tokenizer, arguments.data) for path in paths]
    compare.check_same_text(paths, [loaded.hp for loaded in both])
    if not both[1].hp.causal:
        raise InputError(f"--judge {arguments.judge}: is no causal model (OBJECTIVE=ar)")
    return both[0], both[1]


def chosen_samplers(bench: Bench, asked: str) -> list[str]:
    system = bench.loaded.hp.system
    known = [name for name, row in sampling.SAMPLERS.items() if system in row.systems]
    names = [name.strip() for name in asked.split(",")] if asked else known
    for name in dict.fromkeys(names):
        if not name:
            raise InputError(f"--samplers {asked}: takes names separated by commas")
        sampling.check(bench.loaded, bench.request._replace(sampler=name))
    return list(dict.fromkeys(names))


def held_out_windows(bench: Bench) -> Tensor:
    """(num, L): evenly spaced windows of the validation split."""
    split = common.open_validation(bench.loaded.hp)
    total = split.stream.count_windows(bench.length)
    if total < bench.request.num:
        raise InputError(f"--num {bench.request.num}: the validation split has {total} windows")
    numbers = tm.evenly_spaced(total, bench.request.num)
    return split.stream.windows(numbers, bench.length)[:, 1:]


def check_out(out: Path) -> None:
    common.check_output(out / "README.md", lambda path: True)
    sweep.check_readme(out, TABLE_BEGINS)
    made = common.made_object("judge", "samplers", "gaps")
    common.check_output(out / "sample_bench.json", made)
    common.check_picture(out / "sample_bench.png")


def write_report(report: dict, out: Path) -> None:
    """Into the folder, and the table on the screen."""
    text = to_markdown(report)
    tm.write_file(out / "README.md", text.encode())
    tm.write_file(out / "sample_bench.json", common.to_json(report, indent=2).encode())
    draw_picture(report, out / "sample_bench.png")
    print(f"\n{text}", end="")


def run(bench: Bench, names: list[str], calls: list[int], gaps: list[int], out: Path) -> None:
    """Measures and writes the report; a line on the screen for each row."""
    windows = held_out_windows(bench)
    plan = planned_rows(bench, names, calls)
    gap_plan = list(itertools.product(fillings(bench), gaps))
    report = dict(
        artifact=bench.loaded.name,
        judge=bench.judge.name,
        length=bench.length,
        asked_calls=calls,
        **{name: getattr(bench.request, name) for name in SETTINGS},
        planned_rows=len(plan) + len(gap_plan),
        held_out=quality(bench, windows),
        samplers=[],
        gaps=[],
    )
    started = time.monotonic()
    try:
        for name, number in plan:
            row = measure(bench, request_for(bench, name, number))
            report["samplers"].append(row)
            facts = f"{row['calls']:.1f} calls, perplexity {row['perplexity']:.1f}"
            seconds = time.monotonic() - started
            print(f"{name}: {facts}, entropy {row['entropy']:.2f} ({seconds:.0f} s)", flush=True)
        for way, length in gap_plan:
            row = measure_gaps(bench, way, windows, length)
            report["gaps"].append(row)
            print(f"{way.name}: gap of {length}, {row['bits']:.1f} bits", flush=True)
    finally:  # what is finished is kept, also after Ctrl-C
        if report["samplers"]:
            write_report(report, out)


@common.run_tool
def main() -> None:
    arguments = parse_arguments()
    out = arguments.out
    check_out(out)
    calls = common.whole_numbers("--calls", arguments.calls, 1, sampling.MOST_STEPS)
    gaps = common.whole_numbers("--gaps", arguments.gaps, 1, sampling.LONGEST)
    if arguments.num < 2:
        raise InputError(f"--num {arguments.num}: give 2 windows or more, for a standard error")
    request = sampling.Request(**{name: getattr(arguments, name) for name in SETTINGS})
    bench = Bench(*load_both(arguments), request)
    names = chosen_samplers(bench, arguments.samplers)
    check_calls(bench, names, calls)
    if gaps[-1] >= bench.length:
        window = f"a window of {bench.loaded.name} has {bench.length} tokens"
        raise InputError(f"--gaps {arguments.gaps}: gaps have to be shorter, {window}")
    run(bench, names, calls, gaps, out)


if __name__ == "__main__":
    main()
