"""Draws training curves: bits per byte of the validations in one or more logs, and the final score, as a PNG.

    python tools/plot_log.py logs/a.txt logs/b.txt --out curves.png
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_record import lives  # noqa: E402
from train_mdlm import InputError  # noqa: E402


def read_curve(path: Path) -> dict:
    """Steps, seconds and bpb of the validations, and the final bpb (None if the run did not get there)."""
    points = {}
    for body in lives(path)[1]:
        resumed = re.search(r"^resumed:\S+ step:(\d+)/", body, re.MULTILINE)
        points = {step: point for step, point in points.items() if step <= int(resumed[1])} if resumed else {}
        found = re.findall(r"^step:(\d+)/\d+ val_loss:\S+ val_bpb:(\S+) .*train_time:(\d+)ms", body, re.MULTILINE)
        points |= {int(step): (int(ms) / 1000, float(bpb)) for step, bpb, ms in found}
    if not points:
        raise InputError(f"{path}: no validation in this log")
    final = re.search(r"^final_(\S+)_roundtrip_exact val_loss:\S+ val_bpb:(\S+)", body, re.MULTILINE)
    seconds, bpb = zip(*points.values(), strict=True)
    return dict(name=path.stem, seconds=list(seconds), bpb=list(bpb),
                final=float(final[2]) if final else None, label=final[1].replace("_", "+") if final else "")


def draw(curves: list[dict], out: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for curve in curves:
        line, = axes.plot(curve["seconds"], curve["bpb"], marker="o", markersize=3, label=curve["name"])
        if curve["final"]:
            axes.plot(curve["seconds"][-1], curve["final"], marker="*", markersize=12, color=line.get_color(),
                      label=f"{curve['label']} read back from disk: {curve['final']:.3f}")
    axes.set(xlabel="training time, s", ylabel="validation, bits per byte (any-order NELBO)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    try:
        draw([read_curve(path) for path in arguments.logs], arguments.out)
        print(arguments.out)
    except InputError as error:
        print(f"plot_log.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
