"""The published diffusion scores, what was computed, and what they are in exact bytes; every figure from its formula.

    python tools/published.py

The inputs are what the pull requests print and the counts of FineWeb's SP-1024 validation split.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_mdlm import boundary_bits  # noqa: E402

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"FineWeb validation, SP-1024: {TOKENS:,} tokens, {BYTES:,} bytes, {BYTES / TOKENS:.4f} bytes a token\n")
    print("| published | what was computed | a code length of the bytes? | in exact bytes |\n|---|---|---|---|")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows()))
    by_steps = (f"{steps}: {bpb} → {exact_bytes(bpb):.3f}" for steps, bpb in PR1106_TSTEP.items())
    print("\nPR 1106 by T: " + " · ".join(by_steps))


if __name__ == "__main__":
    main()
