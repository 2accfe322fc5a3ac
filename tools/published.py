"""The published diffusion scores: what was computed, and what they are in exact bytes.

    python tools/published.py
    python tools/published.py logs/<run>.mdlm --seqs 500 --steps 128

The first command prints a table. Every figure in it follows by a formula from what the pull
requests print and from the counts of FineWeb's SP-1024 validation split.

The second command scores an artifact as PR 1106 and PR 1241 did: the T-step bound of the first
windows, the model told the noise level of the step, `<s>` free where it is never masked, 4.3 bytes
a token. Below that come the same bits over the exact bytes, and the same with the places of `<s>`
paid for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import torch

import train_mdlm as tm
from train_mdlm import InputError

# Of the validation split
TOKENS = 62_021_632
BYTES = 151_073_604
DOCUMENTS = 50_000

ASSUMED_BYTES_PER_TOKEN = 4.3  # by PR 1106 and PR 1241
PR1241_LENGTH = 2048
PR1106_TSTEP = {64: 1.1571, 128: 1.1508, 256: 1.1482, 512: 1.1465}


# ---- The table


def exact_bytes(published: float) -> float:
    """Bits per byte of a score that divided its bits by 4.3 bytes a token."""
    return published * ASSUMED_BYTES_PER_TOKEN / (BYTES / TOKENS)


def whole_range(published: float, low: float, high: float) -> float:
    """About what an integral over t in [low, high] would be over [0, 1]: its mean integrand."""
    return published / (high - low)


def boundary_bpb(length: int) -> float:
    """Bits per byte for where the documents begin: a Poisson number in windows of `length`."""
    windows = TOKENS // length
    mean = DOCUMENTS / windows
    most = min(length, int(mean + 40 * math.sqrt(mean) + 40))
    bits = 0.0
    for count in range(most + 1):
        probability = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        bits += probability * tm.boundary_bits(count, length)
    return windows * bits / BYTES


class Claim(NamedTuple):
    """A published score."""

    published: str
    computed: str
    is_code_length: str  # of the bytes
    in_exact_bytes: str


def claims() -> list[Claim]:
    assumed = f"{ASSUMED_BYTES_PER_TOKEN} a token assumed, {BYTES / TOKENS:.4f} true"
    pr1241 = exact_bytes(0.9901)
    with_boundaries = pr1241 + boundary_bpb(PR1241_LENGTH)
    return [
        Claim(
            "PR 1699, 1.4831 and 1.4784 (NELBO, 256 points)",
            "weighted masked NLL on a grid in t from 0.001 to 1",
            "yes, slightly high",
            "as published",
        ),
        Claim(
            "PR 1699, 1.4203 (left-to-right), 1.4297 (confidence)",
            "chain rule, 5,000 windows",
            "yes",
            "as published",
        ),
        Claim("AR baseline, 1.2387", "chain rule, the same windows", "yes", "as published"),
        Claim("PR 820, 1.625", "32-step ELBO, exact bytes", "yes", "as published"),
        Claim(
            "PR 1100/1106, 1.1465",
            "512-step ELBO, 500 windows",
            f"bytes wrong: {assumed}",
            f"{exact_bytes(1.1465):.3f}",
        ),
        Claim(
            "PR 1241, 0.9901",
            "128-step ELBO, 500 windows, `<s>` never masked and never paid",
            "bytes wrong, boundaries free",
            f"{pr1241:.3f}, with boundaries about {with_boundaries:.3f}",
        ),
        Claim(
            "PR 1403, 1.3485",
            "the right integrand over t in [0.05, 0.95] only",
            "no, too low",
            f"about {whole_range(1.3485, 0.05, 0.95):.2f}",
        ),
        Claim(
            "PR 1582, 1.3428",
            "the same",
            "no, too low",
            f"about {whole_range(1.3428, 0.05, 0.95):.2f}",
        ),
        Claim(
            "PR 1053, 1.3600",
            "pseudo-likelihood: half of both sides visible for every token",
            "no",
            "–",
        ),
    ]


def print_table() -> None:
    per_token = f"{BYTES / TOKENS:.4f} bytes a token"
    print(f"FineWeb validation, SP-1024: {TOKENS:,} tokens, {BYTES:,} bytes, {per_token}\n")
    print(
        "| published | what was computed | a code length of the bytes? | in exact bytes |\n"
        "|---|---|---|---|"
    )
    for claim in claims():
        print(f"| {' | '.join(claim)} |")
    by_steps = (f"{steps}: {bpb} → {exact_bytes(bpb):.3f}" for steps, bpb in PR1106_TSTEP.items())
    print("\nPR 1106 by T: " + " · ".join(by_steps))


# ---- An artifact


class Rows(NamedTuple):
    """Some of the first windows of a split, back to back as the pull requests cut them."""

    numbers: range
    x0: torch.Tensor  # (B, L) int64
    before: torch.Tensor  # (B,) int64, the token before each; <s> before the very first


def first_windows(val: tm.Split, length: int, seqs: int) -> Iterator[Rows]:
    device = val.luts.base_bytes.device
    at_once = max((65_536 if device.type == "cuda" else 2_048) // length, 1)
    before = tm.BOS_ID
    for first in range(0, seqs, at_once):
        numbers = range(first, min(first + at_once, seqs))
        tokens = val.stream.read(first * length, length * len(numbers))
        x0 = torch.from_numpy(tokens).long().view(-1, length)
        last_tokens = x0[:, -1].tolist()
        predecessors = torch.tensor([before, *last_tokens[:-1]])
        yield Rows(numbers, x0.to(device), predecessors.to(device))
        before = last_tokens[-1]


@torch.no_grad()
def published_bound(model: tm.Model, rows: Rows, steps: int) -> torch.Tensor:
    """(B,) float64 bits of the T-step bound; <s> is free if it is an anchor."""
    hp = model.hp
    length = hp.train_seq_len
    generators = [tm.seeded("cpu", hp.seed, "published", number) for number in rows.numbers]
    keys = tm.random_keys(rows.x0.shape, generators)
    allowed, window = tm.maskable(hp, rows.x0), tm.with_before(rows.x0)
    terminal = tm.TSTEP_EPS * length * math.log(hp.vocab_size)
    nats = torch.full((len(rows.x0),), terminal, dtype=torch.float64)
    for step, (mask, weight) in enumerate(tm.tstep_masks(steps, keys), 1):
        noise = (1 - tm.TSTEP_EPS) * step / steps
        told = torch.full((len(rows.x0),), noise, device=rows.x0.device)
        hidden = mask.to(rows.x0.device) & allowed
        z = torch.where(hidden, hp.mask_id, rows.x0)
        nll = tm.token_nll(model, z, window, hidden, told)
        nats += weight * nll.double().sum(1).cpu()
    return nats / math.log(2)


class Measured(NamedTuple):
    """Of each window (n,), float64."""

    bits: torch.Tensor
    anchors: torch.Tensor
    nbytes: torch.Tensor


def measure(model: tm.Model, val: tm.Split, seqs: int, steps: int) -> Measured:
    progress = common.Progress("T-step bound")
    bits = []
    anchors = []
    nbytes = []
    for rows in first_windows(val, model.hp.train_seq_len, seqs):
        bits.append(published_bound(model, rows, steps))
        if not bits[-1].isfinite().all():
            raise InputError("the T-step bound is not a finite number: the weights have diverged")
        anchors.append((~tm.maskable(model.hp, rows.x0)).sum(1).cpu().double())
        nbytes.append(tm.count_bytes(rows.x0, rows.before, val.luts).cpu().double())
        progress(rows.numbers.stop / seqs)
    return Measured(torch.cat(bits), torch.cat(anchors), torch.cat(nbytes))


def score_model(name: str, model: tm.Model, val: tm.Split, seqs: int, steps: int) -> None:
    """Prints what a model called `name` scores by the published formula and by the exact one."""
    hp = model.hp
    length = hp.train_seq_len
    seqs = min(seqs, val.stream.total // length)
    if seqs < 2:
        raise InputError(f"{name}: {seqs} window has no standard error; give --seqs of 2 or more")
    found = measure(model, val, seqs, steps)
    tokens = seqs * length
    total = found.nbytes.sum()
    print(
        f"{name}: {steps}-step bound of the first {seqs} windows, {tokens} tokens, "
        f"{total:.0f} bytes, {total / tokens:.4f} bytes a token"
    )
    free = ", `<s>` free" if hp.anchor_bos else ""
    assumed = torch.full((seqs,), length * ASSUMED_BYTES_PER_TOKEN, dtype=torch.float64)
    rows = [
        (f"as published: {ASSUMED_BYTES_PER_TOKEN} bytes a token{free}", found.bits, assumed),
        (f"exact bytes{free}", found.bits, found.nbytes),
    ]
    if hp.anchor_bos:
        places = [tm.boundary_bits(int(count), length) for count in found.anchors]
        paid = found.bits + torch.tensor(places, dtype=torch.float64)
        places_paid = f"{found.anchors.sum():.0f} places of `<s>` paid"
        rows.append((f"exact bytes, {places_paid}", paid, found.nbytes))
    print("\n| computed | bits per byte |\n|---|---|")
    for computed, bits, nbytes in rows:
        bpb, stderr = tm.bits_per_byte(bits, nbytes)
        print(f"| {computed} | {bpb:.4f} ± {stderr:.4f} |")


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    artifact_help = "score it as published; without it, print the table"
    parser.add_argument("artifact", nargs="?", type=Path, help=artifact_help)
    parser.add_argument("--seqs", type=int, default=500, help="windows, from the first on")
    parser.add_argument("--steps", type=int, default=128, help="T")
    common.add_data_options(parser)
    arguments = parser.parse_args()
    if arguments.artifact is None:
        print_table()
        return
    model, hp = common.load_model(arguments.artifact, arguments.data, arguments.tokenizer)
    if hp.system != "mdlm" or arguments.seqs < 1 or arguments.steps < 1:
        needed = "a masked diffusion model without blocks, and --seqs and --steps of 1 or more"
        raise InputError(f"{arguments.artifact}: needs {needed}")
    val = common.open_validation(hp)
    score_model(str(arguments.artifact), model, val, arguments.seqs, arguments.steps)


if __name__ == "__main__":
    main()
