"""Packs one trained model in many ways, and measures what each of them costs.

    QUANT_MODE=fp32,gain:fp32 RUN_ID=exact PRESET=demo python train_mdlm.py
    python tools/quant_table.py logs/exact.mdlm --out quant_table.json

A row is a configuration: QUANT_MODE, then @ and QUANT_CLIP, then + and QUANT_FEEDBACK (the number
of training batches for error feedback), for example int7@8+24. Its cost, ΔBPB, is the headline
score, one mask a window, of the packed and reloaded model minus that of the given one, on the same
windows and masks, so its standard error is that of a paired difference. Seconds are those of
packing, with all packers.

The artifact should be stored as fp32, or the first damage is done already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import common
import torch

import train_mdlm as tm
from train_mdlm import InputError

DEFAULT_ROWS = """
    fp16 fp8 fp8+64 fp8_row int8 int7 int6 int5 int4
    int7@5 int7@5+64 int7@8 int7@8+64 int7@10 int7@10+64 int7@16 int7@16+64
    int6+64 int5+64 int7,embed:int8@8+64 int7,embed:int8@10+64 int7,embed:int8@12+64 int8@16+64
""".split()


def configure(hp: tm.Hyperparameters, row: str) -> tm.Hyperparameters:
    """The hyperparameters of a row, for example int7,embed:int8@8+24."""
    parts = re.fullmatch(r"([^@+]+)(?:@(\d+\.?\d*))?(?:\+(\d+))?", row)
    if not parts:
        form = "QUANT_MODE, then @ and QUANT_CLIP, then + and QUANT_FEEDBACK: int7@8+24"
        raise InputError(f"{row}: write {form}")
    mode, clip, feedback = parts.groups()
    return dataclasses.replace(
        hp,
        quant_mode=mode,
        quant_clip=float(clip or 0),
        quant_feedback=int(feedback or 0),
    )


class QuantTable:
    """A model as it was given, with its score, to compare packed copies with."""

    def __init__(self, model: tm.Model, hp: tm.Hyperparameters, seqs: int, feedback: int):
        """`feedback` is the largest QUANT_FEEDBACK of all rows."""
        self.model = model
        self.hp = dataclasses.replace(hp, iterations=feedback)
        self.seqs = seqs
        self.val = common.open_validation(hp)
        if feedback:
            self.stream = tm.open_training(self.hp, *common.load_tokenizer(hp))
        self.moments: dict[int, Mapping[str, torch.Tensor]] = {0: {}}  # by QUANT_FEEDBACK
        self.weights = self.quantized_weights(model)
        self.energy = sum(weight.square().sum().item() for weight in self.weights.values())
        self.score, table = self.measure(model)
        self.bits, self.bytes = table.sum(1).unbind(1)

    @staticmethod
    def quantized_weights(model: tm.Model) -> dict[str, torch.Tensor]:
        """All weights whose storage QUANT_MODE decides."""
        return {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if not tm.kind_of(name).storage
        }

    def measure(self, model: tm.Model) -> tuple[tm.Score, torch.Tensor]:
        return tm.score_windows(self.hp.headline, model, self.hp, self.val, self.seqs)

    def input_moments(self, hp: tm.Hyperparameters) -> Mapping[str, torch.Tensor]:
        """What the exporter of the script would collect in QUANT_FEEDBACK batches of a run that has
        as many steps as the row with the most of them."""
        if hp.quant_feedback not in self.moments:
            rows = range(hp.batch_rows)
            capacity = tm.scored_capacity(hp, hp.batch_rows)
            batches = (
                tm.training_batch(self.hp, self.stream, step, rows, capacity, common.device())
                for step in range(hp.quant_feedback)
            )
            self.moments[hp.quant_feedback] = tm.input_moments(self.model, batches)
        return self.moments[hp.quant_feedback]

    def row(self, name: str, hp: tm.Hyperparameters) -> dict:
        """The figures of one configuration."""
        moments = self.input_moments(hp)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "row.mdlm"
            started = time.perf_counter()
            info = tm.save_artifact(self.model, hp, path, moments)
            seconds = time.perf_counter() - started
            packed, _ = tm.load_artifact(path)
        packed.on(common.device())
        lost = 0.0
        for weight_name, weight in self.quantized_weights(packed).items():
            lost += (weight - self.weights[weight_name]).square().sum().item()
        _, table = self.measure(packed)
        cost, stderr = tm.bits_per_byte(table.sum(1)[:, 0] - self.bits, self.bytes)
        every_kind = info["kinds"].values()
        kinds = [kind for kind_name, kind in info["kinds"].items() if kind_name != "gain"]
        count = sum(kind["weights"] for kind in kinds)
        sizes = [kind["packed_bytes"] for kind in kinds]
        packers = {  # None where a large kind was not packed with it
            name: 8 * sum(size[name] for size in sizes) / count
            if all(name in size for size in sizes)
            else None
            for name in tm.PACKERS
        }
        return dict(
            row=name,
            label=info["label"],
            artifact_bytes=info["artifact_bytes"],
            bits_per_weight=8
            * info["artifact_bytes"]
            / sum(kind["weights"] for kind in every_kind),
            entropy=sum(kind["entropy_bits"] for kind in kinds) / count,
            error=lost / self.energy,
            cost=cost,
            stderr=stderr,
            seconds=seconds,
            kinds=info["kinds"],
            packers=packers,
        )


def header(packers: list[str]) -> str:
    """The first two lines of the Markdown table."""
    before = ["stored as", "artifact bytes", "bits per weight", "entropy"]
    names = [*before, *packers, "squared error", "ΔBPB", "s"]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def line(figures: dict) -> str:
    """A row of it."""
    cells = [
        figures["row"],
        f"{figures['artifact_bytes']:,}",
        f"{figures['bits_per_weight']:.3f}",
        f"{figures['entropy']:.3f}",
        *("–" if bits is None else f"{bits:.3f}" for bits in figures["packers"].values()),
        f"{figures['error']:.1e}",
        f"{figures['cost']:+.4f} ± {figures['stderr']:.4f}",
        f"{figures['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def made_table(path: Path) -> bool:
    """Whether quant_table.py made this file."""
    with contextlib.suppress(InputError):
        rows = common.read_json(path)
        first = rows[0] if isinstance(rows, list) and rows else None
        return isinstance(first, dict) and first.get("row") == "as given"
    return False


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    rows_help = f"default: {' '.join(DEFAULT_ROWS)}"
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, metavar="ROW", help=rows_help)
    common.add_seqs_option(parser, default=2048)
    batch_help = "sequences of a batch of error feedback"
    parser.add_argument("--batch", type=int, default=16, help=batch_help)
    common.add_data_options(parser)
    parser.add_argument("--out", type=Path, help="the same figures as JSON")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise InputError(f"--batch {arguments.batch}: too small, give 1 or more")
    if arguments.out:
        common.check_output(arguments.out, made_table)
    artifact = arguments.artifact
    model, hp = common.load_model(artifact, arguments.data, arguments.tokenizer)
    batch_tokens = arguments.batch * hp.train_seq_len
    hp = dataclasses.replace(hp, nelbo_passes=1, train_batch_tokens=batch_tokens)
    configurations = [configure(hp, row) for row in arguments.rows]
    log = tm.Log()
    feedback = max(configuration.quant_feedback for configuration in configurations)
    quant_table = QuantTable(model, hp, arguments.seqs, feedback)
    score = quant_table.score
    given = dict(row="as given", bpb=score.bpb, stderr=score.stderr, seqs=score.seqs)
    results = [given | dict(bytes=score.bytes, artifact_bytes=artifact.stat().st_size)]
    print(f"as given: {score.bpb:.4f} ± {score.stderr:.4f} bits per byte, {score.seqs} windows")
    try:
        for name, configuration in zip(arguments.rows, configurations, strict=True):
            figures = quant_table.row(name, configuration)
            if len(results) == 1:
                log(header(list(figures["packers"])))
            log(line(figures))
            results.append(figures)
    finally:  # what was measured is kept, but replaces no whole table
        missing = 1 + len(configurations) - len(results)
        if arguments.out and not (missing and arguments.out.exists()):
            tm.write_file(arguments.out, common.to_json(results, indent=1).encode())
            if missing:
                log(f"{arguments.out}: {missing} rows are missing")


if __name__ == "__main__":
    main()
