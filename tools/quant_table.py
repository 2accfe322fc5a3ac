"""Packs one trained model with every quantizer and scores each: bits per weight, bytes, error, and what it costs.

    QUANT_MODE=fp32,gain:fp32 RUN_ID=exact PRESET=demo torchrun --standalone --nproc_per_node=1 train_mdlm.py
    python tools/quant_table.py logs/exact.mdlm --out quant_table.json

The rows are configurations: QUANT_MODE, a clip after @ (QUANT_CLIP) and +N for error feedback from N training batches
(QUANT_FEEDBACK), for example int7@8+24. Cost is the exact NELBO of the packed and reloaded model minus that of the
given one, on the same windows and masks, so its standard error is that of a paired difference. Seconds are those of
packing, with all packers. Artifacts to compare from should be stored as fp32, or the first damage is done already.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402

DEFAULT = ["fp16", "fp8", "fp8+64", "fp8_row", *(f"int{bits}" for bits in range(8, 3, -1)),
           *(f"int7@{clip}{feedback}" for clip in (5, 8, 10, 16) for feedback in ("", "+64")), "int6+64", "int5+64",
           *(f"int7,embed:int8@{clip}+64" for clip in (8, 10, 12)), "int8@16+64"]


def configure(hp: tm.Hyperparameters, text: str) -> tm.Hyperparameters:
    """The hyperparameters of a row, for example int7,embed:int8@8+24."""
    parts = re.fullmatch(r"([^@+]+)(?:@(\d+\.?\d*))?(?:\+(\d+))?", text)
    if not parts:
        raise InputError(f"{text}: write QUANT_MODE, then @ and QUANT_CLIP, then + and QUANT_FEEDBACK: int7@8+24")
    mode, clip, feedback = parts.groups()
    return dataclasses.replace(hp, quant_mode=mode, quant_clip=float(clip or 0), quant_feedback=int(feedback or 0))


def moments(model: tm.Model, hp: tm.Hyperparameters, folder: str, device: torch.device) -> dict[str, torch.Tensor]:
    """What the exporter collects in `hp.quant_feedback` training batches."""
    stream = tm.DocumentStream(folder, "train", hp) if hp.doc_chunks else tm.TokenStream(folder, "train")
    rows = range(hp.batch_rows)
    capacity = tm.masked_capacity(hp, hp.batch_rows) if hp.objective == "mdlm" else 0
    return tm.input_moments(model, (tm.training_batch(hp, stream, step, rows, capacity, device)
                                    for step in range(hp.quant_feedback)))


def measure(artifact: Path, rows: list[str], seqs: int, batch: int, log: tm.Log) -> list[dict]:
    """A result for each row, the given model first."""
    model, hp = tm.load_artifact(artifact)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = {name: os.environ.get(name.upper(), getattr(hp, name)) for name in ("data_path", "tokenizer_path")}
    hp = dataclasses.replace(hp, **paths, nelbo_passes=1, train_batch_tokens=batch * hp.train_seq_len)
    configurations = [configure(hp, text) for text in rows]
    val, luts = tm.open_validation(hp, device)
    model.on(device)
    weights = {name: p.detach() for name, p in model.named_parameters() if not tm.kind_of(name).storage}
    energy = sum(w.square().sum().item() for w in weights.values())
    score, table = tm.score_windows(hp.headline, model, hp, val, luts, seqs)
    exact, size = table.sum(1).unbind(1)
    results = [dict(row="as given", bpb=score.bpb, stderr=score.stderr, seqs=score.seqs,
                    artifact_bytes=artifact.stat().st_size)]
    known: dict[int, dict] = {0: {}}
    for number, (text, row) in enumerate(zip(rows, configurations, strict=True)):
        if row.quant_feedback not in known:
            known[row.quant_feedback] = moments(model, row, hp.data_path, device)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            info = tm.save_artifact(model, row, Path(folder) / "row.mdlm", known[row.quant_feedback])
            seconds = time.perf_counter() - started
            packed = tm.load_artifact(Path(folder) / "row.mdlm")[0].on(device)
        stored = dict(packed.named_parameters())
        lost = sum((stored[name].detach() - w).square().sum().item() for name, w in weights.items())
        bits = tm.score_windows(hp.headline, packed, hp, val, luts, seqs)[1].sum(1)[:, 0]
        cost, stderr = tm.ratio(bits - exact, size)
        kinds = [kind for name, kind in info["kinds"].items() if name != "gain"]
        count = sum(kind["weights"] for kind in kinds)
        results.append(dict(
            row=text, label=info["label"], artifact_bytes=info["artifact_bytes"],
            bits_per_weight=8 * info["artifact_bytes"] / sum(kind["weights"] for kind in info["kinds"].values()),
            entropy=sum(kind["entropy_bits"] for kind in kinds) / count, error=lost / energy, cost=cost,
            stderr=stderr, seconds=seconds, kinds=info["kinds"],
            packers={name: 8 * sum(kind["packed_bytes"][name] for kind in kinds) / count
                     for name in kinds[0]["packed_bytes"]}))
        log(markdown(results[-1:], header=number == 0))
    return results


def markdown(results: list[dict], header: bool) -> str:
    names = results[0]["packers"]
    lines = [] if not header else [
        f"| stored as | artifact bytes | bits per weight | entropy | {' | '.join(names)} | squared error | ΔBPB | s |",
        "|---" * (len(names) + 7) + "|"]
    for r in results:
        packers = " | ".join(f"{bits:.3f}" for bits in r["packers"].values())
        lines.append(f"| {r['row']} | {r['artifact_bytes']:,} | {r['bits_per_weight']:.3f} | {r['entropy']:.3f} | "
                     f"{packers} | {r['error']:.1e} | {r['cost']:+.4f} ± {r['stderr']:.4f} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--rows", nargs="+", default=DEFAULT, metavar="ROW", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--seqs", type=int, default=2048, help="windows, evenly spaced; 0: the whole split")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a batch of error feedback")
    parser.add_argument("--out", type=Path, help="the same figures as JSON")
    arguments = parser.parse_args()
    try:
        for name in ("seqs", "batch"):
            if getattr(arguments, name) < (name == "batch"):
                raise InputError(f"--{name} {getattr(arguments, name)}: too small")
        results = measure(arguments.artifact, arguments.rows, arguments.seqs, arguments.batch, tm.Log())
        print("as given: {bpb:.4f} ± {stderr:.4f} bits per byte, {seqs} windows".format(**results[0]))
        if arguments.out:
            tm.write_file(arguments.out, json.dumps(results, indent=1).encode())
    except (InputError, OSError) as error:
        print(f"quant_table.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
