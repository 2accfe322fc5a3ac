"""Measures what the scores of one artifact cost and how exact they are.

    python tools/bench.py scores logs/<run>.mdlm --seqs 32

Every estimator is repeated with fresh masks on the same windows. Columns of the table:

    calls     how often a window goes through the model
    bpb       the mean over the repetitions
    off by    its distance to the exact any-order NELBO (from many passes), with the standard error
              of the difference
    sampling  the standard deviation of one repetition
    split     the same for the whole validation split, which has more windows:
              sampling · sqrt(windows measured / windows of the split)
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

import common

import train_mdlm as tm
from train_mdlm import InputError

REFERENCE_REPETITIONS = 4
REFERENCE_PASSES = 64  # in each of them


class Variant(NamedTuple):
    """An estimator as it is measured here; the value of its knob is the number of model calls."""

    label: str
    score: str
    knob: str
    calls: int


VARIANTS = (
    Variant("NELBO, 1 pass", "nelbo", "nelbo_passes", 1),
    Variant("NELBO, 2 passes", "nelbo", "nelbo_passes", 2),
    Variant("NELBO, 4 passes", "nelbo", "nelbo_passes", 4),
    Variant("NELBO, 32 passes", "nelbo", "nelbo_passes", 32),
    Variant("T-step, T = 32", "tstep", "tstep_steps", 32),
    Variant("T-step, T = 128", "tstep", "tstep_steps", 128),
    Variant("t-grid, 256 points", "tgrid", "final_eval_t_samples", 256),
)


class Repetitions(NamedTuple):
    """The same score with fresh masks, again and again."""

    bpbs: list[float]
    ms: float  # of one of them

    @property
    def mean(self) -> float:
        return statistics.fmean(self.bpbs)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.bpbs)

    @property
    def stderr(self) -> float:
        return self.deviation / len(self.bpbs) ** 0.5


class Bench:
    """A model and the windows that it is measured on."""

    def __init__(self, model: tm.Model, hp: tm.Hyperparameters, val: tm.Split, seqs: int):
        self.model = model
        self.hp = hp
        self.val = val
        self.seqs = seqs
        self.seeds = itertools.count()

    def repeat(self, variant: Variant, times: int) -> Repetitions:
        scores, progress = [], common.Progress(variant.label)
        for repetition in range(times):
            changes = {variant.knob: variant.calls, "seed": next(self.seeds)}
            hp = dataclasses.replace(self.hp, **changes)
            score, _ = tm.score_windows(variant.score, self.model, hp, self.val, self.seqs)
            scores.append(score)
            progress((repetition + 1) / times)
        return Repetitions(
            bpbs=[score.bpb for score in scores],
            ms=statistics.fmean(score.ms for score in scores),
        )

    def variants(self) -> list[Variant]:
        """Those of the estimators that this model has."""
        known = tm.ESTIMATORS[self.hp.system]
        return [variant for variant in VARIANTS if variant.score in known]

    def table(self, budget: int) -> str:
        """Markdown; an estimator is repeated 3 to 32 times, with `budget` model calls at most
        where that is more than 3 times."""
        windows = self.val.stream.count_windows(self.hp.train_seq_len)
        measured = min(self.seqs or windows, windows)
        shrink = (measured / windows) ** 0.5
        reference = Variant("reference", "nelbo", "nelbo_passes", REFERENCE_PASSES)
        exact = self.repeat(reference, REFERENCE_REPETITIONS)
        passes = REFERENCE_REPETITIONS * REFERENCE_PASSES
        lines = [
            f"exact any-order NELBO: {exact.mean:.4f} ± {exact.stderr:.4f} bpb on {measured} "
            f"of {windows} windows ({passes} passes)",
            "",
            "| estimator | calls | bpb | off by | sampling | split | ms per repetition "
            "| repetitions |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for variant in self.variants():
            found = self.repeat(variant, min(max(budget // variant.calls, 3), 32))
            off = found.mean - exact.mean
            error = (found.stderr**2 + exact.stderr**2) ** 0.5
            lines.append(
                f"| {variant.label} | {variant.calls} | {found.mean:.4f} | {off:+.4f} ± "
                f"{error:.4f} | {found.deviation:.4f} | {found.deviation * shrink:.4f} "
                f"| {found.ms:.0f} | {len(found.bpbs)} |"
            )
        return "\n".join(lines)


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("what", choices=("scores",))
    parser.add_argument("artifact", type=Path)
    common.add_seqs_option(parser, default=32)
    budget_help = "model calls that a window has for one estimator"
    parser.add_argument("--budget", type=int, default=512, help=budget_help)
    common.add_data_options(parser)
    arguments = parser.parse_args()
    if arguments.budget < 1:
        raise InputError(f"--budget {arguments.budget}: give 1 or more")
    artifact = arguments.artifact
    model, hp = common.load_model(artifact, arguments.data, arguments.tokenizer)
    if hp.causal:
        exactly = "a causal model is scored exactly, in one pass; there is nothing to compare"
        raise InputError(f"{artifact}: {exactly}")
    val = common.open_validation(hp)
    print(Bench(model, hp, val, arguments.seqs).table(arguments.budget))


if __name__ == "__main__":
    main()
