"""Compares two artifacts on the same windows by position: bits per byte, and their difference.

    python tools/compare.py logs/mdlm.mdlm logs/ar.mdlm --seqs 512 --out compare.png

Both are scored on the same windows of the same text, or not at all, and from left to right: a
causal model in one pass, a masked diffusion model by its chain rule, one position after the other.
Position 0 is the first token of a window: the causal model sees the token before it, the diffusion
model sees nothing. Standard errors have windows as clusters. That of the difference is paired, so
what is hard for both cancels. What an ANCHOR_BOS artifact pays for the places of its anchors is in
its own line, not in the table by position. The picture shows the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import common
import torch

import train_mdlm as tm
from train_mdlm import InputError


def check_same_text(artifacts: list[Path], settings: list[tm.Hyperparameters]) -> None:
    """InputError unless both artifacts predict the same tokens, in the same windows."""
    first, second = settings
    for name, remedy in (
        ("vocab_size", "artifacts of two tokenizers have no tokens in common"),
        ("train_seq_len", "windows must be the same"),
        ("tokenizer_path", "if both were trained with the same one, give it with --tokenizer"),
        ("data_path", "if both were trained on the same text, give it with --data"),
    ):
        if getattr(first, name) != getattr(second, name):
            difference = f"{second.shown(name)}, but {artifacts[0]} has {first.shown(name)}"
            raise InputError(f"{artifacts[1]}: {difference}: {remedy}")


def check_same_windows(scores: list[tuple[tm.Score, torch.Tensor]]) -> None:
    """InputError unless both scores are of the same bytes, window for window."""
    (first, first_table), (second, second_table) = scores
    same_bytes = torch.equal(first_table[..., 1], second_table[..., 1])
    if (first.seqs, first.tokens) != (second.seqs, second.tokens) or not same_bytes:
        found = [f"{score.seqs} windows, {score.bytes} bytes" for score in (first, second)]
        raise InputError(f"the artifacts were scored on different text: {' and '.join(found)}")


def measure(
    artifacts: list[Path], data: str | None, tokenizer: str | None, seqs: int
) -> tuple[list[tuple[tm.Score, torch.Tensor]], int]:
    """Score and table (windows, buckets, 2) of each artifact, and the length of the windows."""
    loaded = [common.load_model(path, data, tokenizer) for path in artifacts]
    check_same_text(artifacts, [hp for _, hp in loaded])
    _, first = loaded[0]
    val = common.open_validation(first)
    scores = []
    for model, hp in loaded:
        name = "ar" if hp.causal else "l2r"
        scores.append(tm.score_windows(name, model, hp, val, seqs))
    check_same_windows(scores)
    return scores, first.train_seq_len


class Figures(NamedTuple):
    """Bits per byte of both artifacts in a range of positions, each with its standard error."""

    positions: str
    tokens: int
    first: tuple[float, float]
    second: tuple[float, float]
    difference: tuple[float, float]


def compare_positions(first: torch.Tensor, second: torch.Tensor, length: int) -> list[Figures]:
    """The figures of every bucket of two tables, and then of the whole window."""
    windows, buckets, _ = first.shape
    ranges = []
    for bucket in range(buckets):
        positions = tm.bucket_name(bucket, length)
        low, _, high = positions.partition("-")
        ranges.append((positions, int(high or low) - int(low) + 1, [bucket]))
    ranges.append(("all", length, [*range(buckets)]))
    found = []
    for positions, size, chosen in ranges:
        nbytes = first[:, chosen, 1].sum(1)
        first_bits = first[:, chosen, 0].sum(1)
        second_bits = second[:, chosen, 0].sum(1)
        figures = Figures(
            positions,
            windows * size,
            first=tm.bits_per_byte(first_bits, nbytes),
            second=tm.bits_per_byte(second_bits, nbytes),
            difference=tm.bits_per_byte(first_bits - second_bits, nbytes),
        )
        found.append(figures)
    return found


def table(names: list[str], found: list[Figures]) -> str:
    """Markdown."""
    first, second = names
    lines = [
        f"| position | tokens | {first} | {second} | {first} − {second} |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        bpbs = [f"{bpb:.3f} ± {stderr:.3f}" for bpb, stderr in (row.first, row.second)]
        difference, stderr = row.difference
        cells = [row.positions, str(row.tokens), *bpbs, f"{difference:+.3f} ± {stderr:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(names: list[str], found: list[Figures], out: Path) -> None:
    """The table as a picture: both artifacts above, their difference below."""
    *buckets, whole = found
    places = range(len(buckets))
    style = dict(marker="o", markersize=4, capsize=3)
    figure = common.new_figure(7, 5)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for name, part in zip(names, ("first", "second"), strict=True):
        bpbs, stderrs = zip(*(getattr(row, part) for row in buckets), strict=True)
        overall, _ = getattr(whole, part)
        label = common.plain_label(f"{name}: {overall:.3f} over all positions")
        above.errorbar(places, bpbs, stderrs, label=label, **style)
    bpbs, stderrs = zip(*(row.difference for row in buckets), strict=True)
    below.errorbar(places, bpbs, stderrs, color="black", **style)
    below.axhline(0, color="gray", linewidth=0.8)
    above.set(ylabel="bits per byte, left to right")
    below.set(ylabel="paired difference", xlabel="position in the window")
    below.set(xticks=list(places), xticklabels=[row.positions for row in buckets])
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    common.save_figure(figure, out)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("artifacts", nargs=2, type=Path, metavar="ARTIFACT")
    common.add_seqs_option(parser, default=256)
    common.add_data_options(parser)
    parser.add_argument("--out", type=Path, default=Path("compare.png"))
    arguments = parser.parse_args()
    common.check_picture(arguments.out)
    artifacts = arguments.artifacts
    scores, length = measure(artifacts, arguments.data, arguments.tokenizer, arguments.seqs)
    names = [path.stem for path in artifacts]
    if names[0] == names[1]:
        names = [str(path) for path in artifacts]
    for name, (score, _) in zip(names, scores, strict=True):
        print(f"{name}: {score.line()}")
    (_, first), (_, second) = scores
    found = compare_positions(first, second, length)
    print(table(names, found))
    draw(names, found, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
