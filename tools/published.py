"""The published diffusion scores, what was computed, and what they are in exact bytes; every figure from its formula.

    python tools/published.py
    python tools/published.py logs/<run>.mdlm --seqs 500 --steps 128

The inputs are what the pull requests print and the counts of FineWeb's SP-1024 validation split. Given an artifact, its
score is computed as PR 1106 and PR 1241 did: the T-step bound of the first windows, the model told the noise level of
the step, `<s>` free where it is never masked, 4.3 bytes a token. Below that come the same bits over the exact bytes,
and the same with the places of `<s>` paid for.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError, boundary_bits  # noqa: E402

TOKENS, BYTES, DOCUMENTS = 62_021_632, 151_073_604, 50_000  # of the validation split
ASSUMED_BYTES_PER_TOKEN = 4.3  # of PR 1106 and PR 1241
PR1241_LENGTH = 2048
PR1106_TSTEP = {64: 1.1571, 128: 1.1508, 256: 1.1482, 512: 1.1465}


def exact_bytes(published: float) -> float:
    """Bits per byte of a score that divided its bits by 4.3 bytes a token."""
    return published * ASSUMED_BYTES_PER_TOKEN / (BYTES / TOKENS)


def whole_range(published: float, low: float, high: float) -> float:
    """About what an integral over t in [low, high] would be over [0, 1]: the mean of the integrand times 1."""
    return published / (high - low)


def boundary_bpb(length: int) -> float:
    """Bits per byte for where the documents begin, windows of `length` with Poisson many beginnings each."""
    windows = TOKENS // length
    mean = DOCUMENTS / windows
    counts = range(min(length, int(mean + 40 * math.sqrt(mean) + 40)) + 1)
    weights = [math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in counts]
    return windows * sum(w * boundary_bits(n, length) for n, w in zip(counts, weights, strict=True)) / BYTES


def rows() -> list[tuple[str, str, str, str]]:
    """(published, what was computed, whether it is a code length of the bytes, in exact bytes)."""
    corrected = exact_bytes(0.9901)
    return [
        ("PR 1699, 1.4831 and 1.4784 (NELBO, 256 points)", "weighted masked NLL on a grid in t from 0.001 to 1",
         "yes, slightly high", "as published"),
        ("PR 1699, 1.4203 (left-to-right), 1.4297 (confidence)", "chain rule, 5,000 windows", "yes", "as published"),
        ("AR baseline, 1.2387", "chain rule, the same windows", "yes", "as published"),
        ("PR 820, 1.625", "32-step ELBO, exact bytes", "yes", "as published"),
        ("PR 1100/1106, 1.1465", "512-step ELBO, 500 windows", f"bytes wrong: {ASSUMED_BYTES_PER_TOKEN} a token "
         f"assumed, {BYTES / TOKENS:.4f} true", f"{exact_bytes(1.1465):.3f}"),
        ("PR 1241, 0.9901", "128-step ELBO, 500 windows, `<s>` never masked and never paid", "bytes wrong, boundaries "
         "free", f"{corrected:.3f}, with boundaries about {corrected + boundary_bpb(PR1241_LENGTH):.3f}"),
        ("PR 1403, 1.3485", "the right integrand over t in [0.05, 0.95] only", "no, too low",
         f"about {whole_range(1.3485, 0.05, 0.95):.2f}"),
        ("PR 1582, 1.3428", "the same", "no, too low", f"about {whole_range(1.3428, 0.05, 0.95):.2f}"),
        ("PR 1053, 1.3600", "pseudo-likelihood: half of both sides visible for every token", "no", "–"),
    ]


@torch.no_grad()
def as_published(model: tm.Model, stream: tm.TokenStream, luts: tm.ByteTables, seqs: int, steps: int,
                 log: tm.Log) -> dict[str, torch.Tensor]:
    """Of each of the first `seqs` windows (n,): bits of the T-step bound with <s> free if it is an anchor, bits for the
    places of anchors, anchors, exact bytes."""
    hp, length, device = model.hp, model.hp.train_seq_len, luts.base_bytes.device
    found = {name: torch.zeros(seqs, dtype=torch.float64) for name in ("bits", "boundaries", "anchors", "bytes")}
    batch = max((65_536 if device.type == "cuda" else 2_048) // length, 1)
    for at in range(0, seqs, batch):
        numbers = range(at, min(at + batch, seqs))
        here = slice(numbers.start, numbers.stop)
        x0 = torch.from_numpy(stream.read(at * length, length * len(numbers)).astype("int64")).view(-1, length)
        before = torch.cat([torch.tensor([int(stream.read(at * length - 1, 1)[0]) if at else tm.BOS_ID]), x0[:-1, -1]])
        x0, draw = x0.to(device), tm.key_source(x0.shape, [tm.seeded("cpu", hp.seed, "published", n) for n in numbers])
        free = tm.hideable(hp, x0)
        nats = torch.full((len(x0),), tm.TSTEP_EPS * length * math.log(hp.vocab_size), dtype=torch.float64)
        for step, (mask, weight) in enumerate(tm.tstep_masks(steps, draw), 1):
            told = torch.full((len(x0),), (1 - tm.TSTEP_EPS) * step / steps, device=device)
            nll = tm.masked_nll(model, x0, mask.to(device) & free, masked_fraction=told)
            nats += weight * nll.double().sum(1).cpu()
        found["bits"][here], found["anchors"][here] = nats / math.log(2), (~free).sum(1).cpu().double()
        found["bytes"][here] = tm.count_bytes(x0, before, luts).cpu().double()
        log.progress("T-step bound", numbers.stop / seqs)
    if hp.anchor_bos:
        found["boundaries"][:] = torch.tensor([boundary_bits(int(n), length) for n in found["anchors"]])
    return found


def score_artifact(arguments: argparse.Namespace) -> None:
    model, hp = tm.load_artifact(arguments.artifact)
    if hp.objective == "ar" or arguments.seqs < 1 or arguments.steps < 1:
        raise InputError(f"{arguments.artifact}: needs a masked diffusion model, and --seqs and --steps of 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    val, luts = tm.open_validation(dataclasses.replace(
        hp, data_path=arguments.data or os.environ.get("DATA_PATH") or hp.data_path,
        tokenizer_path=arguments.tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path), device)
    seqs = min(arguments.seqs, val.total // hp.train_seq_len)
    found = as_published(model.on(device), val, luts, seqs, arguments.steps, tm.Log())
    assumed = torch.full((seqs,), hp.train_seq_len * ASSUMED_BYTES_PER_TOKEN, dtype=torch.float64)
    paid, nbytes = found["bits"] + found["boundaries"], found["bytes"]
    tokens = seqs * hp.train_seq_len
    print(f"{arguments.artifact}: {arguments.steps}-step bound of the first {seqs} windows, {tokens} tokens, "
          f"{nbytes.sum():.0f} bytes, {nbytes.sum() / tokens:.4f} bytes a token")
    free = ", `<s>` free" if hp.anchor_bos else ""
    print("\n| computed | bits per byte |\n|---|---|")
    rows = [(f"as published: {ASSUMED_BYTES_PER_TOKEN} bytes a token{free}", found["bits"], assumed),
            (f"exact bytes{free}", found["bits"], nbytes)]
    rows += [(f"exact bytes, {found['anchors'].sum():.0f} places of `<s>` paid", paid, nbytes)] if hp.anchor_bos else []
    for name, bits, size in rows:
        bpb, stderr = tm.ratio(bits, size)
        print(f"| {name} | {bpb:.4f} ± {stderr:.4f} |")


def print_table() -> None:
    print(f"FineWeb validation, SP-1024: {TOKENS:,} tokens, {BYTES:,} bytes, {BYTES / TOKENS:.4f} bytes a token\n")
    print("| published | what was computed | a code length of the bytes? | in exact bytes |\n|---|---|---|---|")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows()))
    by_steps = (f"{steps}: {bpb} → {exact_bytes(bpb):.3f}" for steps, bpb in PR1106_TSTEP.items())
    print("\nPR 1106 by T: " + " · ".join(by_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, help="score it as published; without it, print the table")
    parser.add_argument("--seqs", type=int, default=500, help="windows, from the first on")
    parser.add_argument("--steps", type=int, default=128, help="T")
    parser.add_argument("--data", help="folder of the shards; default: DATA_PATH, or the preset's")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: TOKENIZER_PATH, or the preset's")
    arguments = parser.parse_args()
    try:
        score_artifact(arguments) if arguments.artifact else print_table()
    except InputError as error:
        print(f"published.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
