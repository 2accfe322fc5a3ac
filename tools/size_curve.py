"""Where a byte buys most: bits per byte against bytes, for models of several shapes and storages.

    python tools/quant_table.py logs/wide.mdlm --out wide.json
    python tools/quant_table.py logs/deep.mdlm --out deep.json
    python tools/size_curve.py wide.json deep.json --out size_curve.png

Each table of tools/quant_table.py is one trained model: a line of the picture, with a point for
each way to store it. The names of the files are the labels. Printed are the points that are worth
their bytes: no other is as small and has as few bits per byte. All tables have to be of the same
text, scored on the same number of windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import common
import quant_table

import train_mdlm as tm
from train_mdlm import InputError

COMPARABLE = ("seqs", "bytes")  # what tables of the same text have in common


class Point(NamedTuple):
    """One model, stored in one way."""

    model: str
    storage: str
    nbytes: int  # of the artifact, without the code
    bpb: float


def read_table(path: Path) -> tuple[dict, list[Point]]:
    """What the model was scored on, and its points from the smallest to the largest; InputError if
    the file is no table of tools/quant_table.py."""
    if not quant_table.made_table(path):
        raise InputError(f"{path}: is no table of tools/quant_table.py --out")
    try:
        given, *rows = common.read_json(path)
        scored = {name: given[name] for name in COMPARABLE}
        points = [
            Point(
                path.stem, str(row["row"]), int(row["artifact_bytes"]), given["bpb"] + row["cost"]
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        reason = common.one_line(str(error))
        raise InputError(f"{path}: {reason}: make it again with tools/quant_table.py") from None
    points.sort(key=lambda point: point.nbytes)
    if not points:
        raise InputError(f"{path}: has no rows")
    return scored, points


def read_tables(paths: list[Path]) -> list[list[Point]]:
    """A list for each file; InputError if they cannot be compared."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(names)}: two of these labels are the same; rename a file")
    scored, curves = zip(*map(read_table, paths), strict=True)
    for path, other in zip(paths, scored, strict=True):
        if other != scored[0]:
            raise InputError(f"{path}: is of {told(other)}, and {paths[0]} of {told(scored[0])}")
    return list(curves)


def told(scored: dict) -> str:
    return f"{scored['seqs']} windows with {scored['bytes']} bytes"


def worth_their_bytes(points: list[Point]) -> list[Point]:
    """Those that no other point beats in both respects, from the smallest to the largest."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.nbytes, point.bpb)):
        if not kept or point.bpb < kept[-1].bpb:
            kept.append(point)
    return kept


def table(points: list[Point]) -> str:
    """In Markdown."""
    lines = ["| artifact bytes | bits per byte | model | stored as |", "|---|---|---|---|"]
    for point in points:
        lines.append(f"| {point.nbytes:,} | {point.bpb:.4f} | {point.model} | {point.storage} |")
    return "\n".join(lines)


def draw(curves: list[list[Point]], best: list[Point], path: Path) -> None:
    figure = common.new_figure(7, 4.5)
    axes = figure.subplots()
    axes.step(
        [point.nbytes / 1000 for point in best],
        [point.bpb for point in best],
        where="post",
        color="0.8",
        linewidth=6,
        label="worth their bytes",
    )
    for points in curves:
        sizes = [point.nbytes / 1000 for point in points]
        label = common.plain_label(points[0].model)
        axes.plot(sizes, [point.bpb for point in points], marker="o", markersize=4, label=label)
    axes.set(xscale="log", xlabel="artifact, thousands of bytes", ylabel="bits per byte")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    common.save_figure(figure, path)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("tables", type=Path, nargs="+", metavar="TABLE.json")
    parser.add_argument("--out", type=Path, help="the picture")
    arguments = parser.parse_args()
    if arguments.out:
        common.check_picture(arguments.out)
    curves = read_tables(arguments.tables)
    best = worth_their_bytes([point for points in curves for point in points])
    tm.Log()(table(best))
    if arguments.out:
        draw(curves, best, arguments.out)


if __name__ == "__main__":
    main()
