"""Compares two artifacts on the same windows by position: bits per byte, and the paired difference.

    python tools/compare.py logs/mdlm.mdlm logs/ar.mdlm --seqs 512 --out compare.png

Both are scored from left to right: a causal model in one pass, a masked diffusion model by its chain rule, one position
after the other. Position 0 is the first token of a window: the causal model sees the token before it, the diffusion
model sees nothing. Standard errors have windows as clusters; that of the difference is paired, so what is hard for both
cancels. The plot also holds the difference. What an ANCHOR_BOS artifact pays for the places of its anchors is in its
own line, not in the table by position.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402


def measure(artifacts: list[Path], data: str | None, tokenizer: str | None, seqs: int) -> tuple[list, int]:
    """Of each artifact its score and the table (windows, buckets, 2) of bits and bytes; and the window length."""
    log, scores, shape = tm.Log(), [], None
    for path in artifacts:
        model, hp = tm.load_artifact(path)
        if shape is None:
            data = data or os.environ.get("DATA_PATH") or hp.data_path
            tokenizer = tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path
        elif shape != (hp.vocab_size, hp.train_seq_len):
            raise InputError(f"{path}: {hp.shown('vocab_size')} {hp.shown('train_seq_len')}, but {artifacts[0]} has "
                             f"{shape[0]} and {shape[1]}; windows and tokens must be the same")
        shape = hp.vocab_size, hp.train_seq_len
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        val, luts = tm.open_validation(dataclasses.replace(hp, data_path=data, tokenizer_path=tokenizer), device)
        name = "ar" if hp.objective == "ar" else "l2r"
        scores.append(tm.score_windows(name, model.on(device), hp, val, luts, seqs,
                                       lambda done, path=path: log.progress(path.stem, done)))
    return scores, shape[1]


def rows(first: torch.Tensor, second: torch.Tensor, length: int) -> list[tuple]:
    """(positions, tokens, bpb and stderr of both, and of the difference) for every bucket, and for the whole window."""
    size = first[..., 1]
    columns = [(tm.bucket_name(b, length), slice(b, b + 1)) for b in range(size.shape[1])] + [("all", slice(None))]
    found = []
    for name, at in columns:
        a, b, nbytes = first[:, at, 0].sum(1), second[:, at, 0].sum(1), size[:, at].sum(1)
        ends = [int(end) for end in name.split("-")] if name != "all" else [0, length - 1]
        tokens = len(size) * (ends[-1] - ends[0] + 1)
        found.append((name, tokens, *tm.ratio(a, nbytes), *tm.ratio(b, nbytes), *tm.ratio(a - b, nbytes)))
    return found


def table(names: list[str], found: list[tuple]) -> str:
    """Markdown."""
    lines = [f"| position | tokens | {names[0]} | {names[1]} | {names[0]} − {names[1]} |", "|---|---|---|---|---|"]
    lines += [f"| {position} | {tokens} | {a:.3f} ± {ea:.3f} | {b:.3f} ± {eb:.3f} | {d:+.3f} ± {ed:.3f} |"
              for position, tokens, a, ea, b, eb, d, ed in found]
    return "\n".join(lines)


def draw(names: list[str], found: list[tuple], out: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    buckets = found[:-1]
    at = range(len(buckets))
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 5), layout="constrained", height_ratios=(2, 1))
    for i, name in enumerate(names):
        above.errorbar(at, [row[2 + 2 * i] for row in buckets], [row[3 + 2 * i] for row in buckets], marker="o",
                       markersize=4, capsize=3, label=f"{name}: {found[-1][2 + 2 * i]:.3f} over all positions")
    below.errorbar(at, [row[6] for row in buckets], [row[7] for row in buckets], marker="o", markersize=4, capsize=3,
                   color="black")
    below.axhline(0, color="gray", linewidth=0.8)
    above.set(ylabel="bits per byte, left to right")
    below.set(ylabel="paired difference", xlabel="position in the window",
              xticks=list(at), xticklabels=[row[0] for row in buckets])
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: the picture cannot be written: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs=2, type=Path, metavar="ARTIFACT")
    parser.add_argument("--seqs", type=int, default=256, help="windows, evenly spaced; 0: the whole split")
    parser.add_argument("--data", help="folder of the shards; default: DATA_PATH, or that of the first one's preset")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: TOKENIZER_PATH, or as above")
    parser.add_argument("--out", type=Path, default=Path("compare.png"))
    arguments = parser.parse_args()
    try:
        if arguments.seqs < 0:
            raise InputError(f"--seqs {arguments.seqs}: give 0 or more")
        scores, length = measure(arguments.artifacts, arguments.data, arguments.tokenizer, arguments.seqs)
        names = [path.stem for path in arguments.artifacts]
        names = names if names[0] != names[1] else [str(path) for path in arguments.artifacts]
        found = rows(scores[0][1], scores[1][1], length)
        for name, (score, _) in zip(names, scores, strict=True):
            print(f"{name}: {score.line()}")
        print(table(names, found))
        draw(names, found, arguments.out)
        print(arguments.out)
    except InputError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
