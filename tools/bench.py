"""Measures what the scores of one artifact cost and how exact they are.

    python tools/bench.py scores logs/<run>.mdlm --seqs 32

Every estimator is repeated with fresh masks on the same windows. `calls` is how often a window goes through the model,
`bpb` the mean, `off by` its distance to the exact any-order NELBO (from many passes, with the standard error of the
difference), `sampling` the standard deviation of one repetition, and `split` the same for the whole validation split,
which has more windows: sampling · sqrt(windows measured / windows of the split).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402

REFERENCE_PASSES = 256
ESTIMATORS = (
    ("NELBO, 1 pass", "nelbo", dict(nelbo_passes=1)),
    ("NELBO, 2 passes", "nelbo", dict(nelbo_passes=2)),
    ("NELBO, 4 passes", "nelbo", dict(nelbo_passes=4)),
    ("NELBO, 32 passes", "nelbo", dict(nelbo_passes=32)),
    ("T-step, T = 32", "tstep", dict(tstep_steps=32)),
    ("T-step, T = 128", "tstep", dict(tstep_steps=128)),
    ("t-grid, 256 points", "tgrid", dict(final_eval_t_samples=256)),
)


def bench_scores(artifact: Path, data: str | None, tokenizer: str | None, seqs: int, budget: int) -> list[str]:
    """A Markdown table; each estimator is repeated 3 to 32 times, while its model calls stay within the budget."""
    model, hp = tm.load_artifact(artifact)
    if hp.objective == "ar":
        raise InputError(f"{artifact}: a causal model is scored exactly, in one pass; there is nothing to compare")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.on(device)
    val, luts = tm.open_validation(dataclasses.replace(
        hp, data_path=data or os.environ.get("DATA_PATH") or hp.data_path,
        tokenizer_path=tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path), device)
    log, seeds = tm.Log(), itertools.count()

    def repeat(name: str, label: str, times: int, **overrides) -> tuple[list[float], float]:
        """bpb of each repetition, and milliseconds of one."""
        found = []
        for seed in range(times):
            settings = dataclasses.replace(hp, seed=next(seeds), **overrides)
            found.append(tm.score_windows(name, model, settings, val, luts, seqs)[0])
            log.progress(label, (seed + 1) / times)
        return [score.bpb for score in found], sum(s.ms for s in found) / times

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) / len(values) ** 0.5

    windows = val.count_windows(hp.train_seq_len)
    shrink = (min(seqs or windows, windows) / windows) ** 0.5
    exact = repeat("nelbo", "reference", 4, nelbo_passes=REFERENCE_PASSES // 4)[0]
    lines = [f"exact any-order NELBO: {statistics.fmean(exact):.4f} ± {spread(exact):.4f} bpb on {seqs or windows} "
             f"of {windows} windows ({REFERENCE_PASSES} passes)", "",
             "| estimator | calls | bpb | off by | sampling | split | ms a repetition | repetitions |",
             "|---|---|---|---|---|---|---|---|"]
    for label, name, overrides in ESTIMATORS:
        (calls,) = overrides.values()
        values, ms = repeat(name, label, min(max(budget // calls, 3), 32), **overrides)
        off, error = statistics.fmean(values) - statistics.fmean(exact), (spread(values)**2 + spread(exact)**2) ** 0.5
        deviation = statistics.stdev(values)
        lines.append(f"| {label} | {calls} | {statistics.fmean(values):.4f} | {off:+.4f} ± {error:.4f} | "
                     f"{deviation:.4f} | {deviation * shrink:.4f} | {ms:.0f} | {len(values)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scores",))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seqs", type=int, default=32, help="windows, evenly spaced; 0: the whole split")
    parser.add_argument("--budget", type=int, default=512, help="model calls a window spent on one estimator")
    parser.add_argument("--data", help="folder of the shards; default: DATA_PATH, or the preset's")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: TOKENIZER_PATH, or the preset's")
    arguments = parser.parse_args()
    try:
        if arguments.seqs < 0 or arguments.budget < 1:
            raise InputError("--seqs takes 0 or more, --budget 1 or more")
        print("\n".join(bench_scores(arguments.artifact, arguments.data, arguments.tokenizer, arguments.seqs,
                                     arguments.budget)))
    except InputError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
