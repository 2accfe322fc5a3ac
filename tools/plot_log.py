"""Draws the training curves of one or more logs, and their final scores, as a picture.

    python tools/plot_log.py logs/a.txt logs/b.txt --out curves.png

A curve has the bits per byte of every validation; a star is the final score.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import common
from run_log import REAL, WHOLE, lives

from train_mdlm import InputError


class Curve(NamedTuple):
    """What a log says about the course of its run."""

    name: str
    seconds: list[float]  # of training, at every validation
    bpb: list[float]
    final: float | None  # bits per byte read back from disk; None if the run did not get there
    storage: str  # of the artifact, for example fp8+lzma


def read_curve(path: Path) -> Curve:
    points: dict[int, tuple[float, float]] = {}  # seconds and bpb by step
    body = ""
    for body in lives(path)[1]:
        resumed = re.search(rf"^resumed:.+ step:({WHOLE})/", body, re.MULTILINE)
        last_kept = int(resumed[1]) if resumed else -1
        points = {step: point for step, point in points.items() if step <= last_kept}
        pattern = rf"^step:({WHOLE})/\d+ val_loss:\S+ val_bpb:({REAL}) .*train_time:({WHOLE})ms"
        for step, bpb, ms in re.findall(pattern, body, re.MULTILINE):
            points[int(step)] = (int(ms) / 1000, float(bpb))
    if not points:
        raise InputError(f"{path}: no validation in this log")
    pattern = rf"^final_(\S+)_roundtrip_exact val_loss:\S+ val_bpb:({REAL})$"
    final = re.search(pattern, body, re.MULTILINE)
    return Curve(
        name=path.stem,
        seconds=[seconds for seconds, _ in points.values()],
        bpb=[bpb for _, bpb in points.values()],
        final=float(final[2]) if final else None,
        storage=final[1].replace("_", "+") if final else "",
    )


def draw(curves: list[Curve], out: Path) -> None:
    figure = common.new_figure(7, 4)
    axes = figure.subplots()
    for curve in curves:
        name = common.plain_label(curve.name)
        (line,) = axes.plot(curve.seconds, curve.bpb, marker="o", markersize=3, label=name)
        if curve.final is not None:
            label = f"{curve.storage} read back from disk: {curve.final:.3f}"
            star = dict(marker="*", markersize=12, color=line.get_color(), label=label)
            axes.plot(curve.seconds[-1], curve.final, **star)
    axes.set(xlabel="training time, s", ylabel="validation, bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    common.save_figure(figure, out)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    common.check_picture(arguments.out)
    draw([read_curve(path) for path in arguments.logs], arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
