"""Masked diffusion language models for parameter golf: train, pack, score as a code length.

Every score that this file prints is the length of a code that somebody could decode, except those
marked biased:1, which repeat a published estimator. The defaults are PR 1699 of the challenge;
llada and eos are PR 1106 and PR 1241, ar is the causal baseline, golf our own (docs/recipe.md).

    # two CPU cores, the text of the installed packages
    python data/prepare_text.py --source docs
    PRESET=demo torchrun --standalone --nproc_per_node=1 train_mdlm.py
    # 8xH100, the challenge's data
    python data/fetch_fineweb.py
    torchrun --standalone --nproc_per_node=8 train_mdlm.py

The life of a token, from its shard to the score:

    shard    data/prepare_text.py or data/fetch_fineweb.py wrote it. The shards of a split are a
             ring of tokens, `TokenStream`.
    window   `TokenStream.windows` cuts it into rows of L tokens, each with the token before it;
             `training_batch` takes those of one pass.
    mask     `draw_noise` draws how much of each row is masked, and `apply_noise` chooses the tokens
             that the model will see as MASK. LOSS_WEIGHTS says how much each of them counts.
    model    `Model.hidden` sends the row through one of BACKBONES; `Model.head` gives logits over V
             tokens at the masked positions.
    loss     `batch_loss` sums weight · −ln p(token) over the masked tokens.
    step     `Optimizer.step` adds up the gradients of all processes and moves the weights: matrices
             by Muon, the rest by AdamW, as the table KINDS says.
    average  `Optimizer.update_average` keeps an exponential average of the weights.
    codes    `quantize` rounds each weight to a grid of QUANTIZERS, and `pack_kind` compresses them
             with the best of PACKERS.
    file     `save_artifact` writes it; `read_artifact` builds a fresh model from nothing else.
    score    `score_windows` masks the validation split as one of ESTIMATORS does, adds up −log2 p
             of that model, and divides by the bytes of the text, which `token_bytes` counts.
    log      `Log` writes it all to logs/<run>.txt, below the source of this file.

`run`, near the end, is this story as code.

Letters in shapes: B rows (windows), L positions, D width, H heads, V real tokens, N scored
positions; R rows and C columns of a matrix. MASK is token V and PAD is token V + 1: the model sees
them and never predicts them. `hp` is always a Hyperparameters, `model` a Model; in formulas, what
has no type is a Tensor.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(2))  # the next imports take seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:
    import zstandard
except ImportError:  # PACK=auto does without it
    zstandard = None

SIZE_LIMIT_BYTES = 16_000_000  # code + artifact
BUDGET_SECONDS = 600.0  # of training, and again of evaluation
GOLDEN = (math.sqrt(5) - 1) / 2


class InputError(ValueError):
    """What the user gave is wrong: one line that names the value, the place and the remedy."""


class ToldToStop(Exception):
    """One of the processes was, and all know it."""


def ceil_div(a, b):
    return -(-a // b)


def ranks(keys):
    """(…, L) int64: the place of every key (…, L) in its row, 0 for the smallest."""
    return keys.argsort(-1).argsort(-1)


def golden_sequence(numbers, offset: Tensor | float = 0.0):
    """Points in [0, 1) for numbers (n,): consecutive ones are spread evenly."""
    return (offset + numbers.double() * GOLDEN) % 1


def seeded(device: torch.device | str, *key) -> torch.Generator:
    """A generator for a key such as (seed, "train", step)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---- Hyperparameters: knobs, presets, rules, help
#
# A knob is a field here and an environment variable of the challenge's name; PRESETS has values.

GROUPS = {}  # name → what its knobs are about


def group(name: str, about: str) -> Callable:
    """Begins a group; what makes a knob of it. Its `choices` may be a function."""
    GROUPS[name] = about

    def knob(default, meaning: str, low=0, high=1e12, choices=()):
        told = dict(group=name, meaning=meaning, low=low, high=high, choices=choices)
        return dataclasses.field(default=default, metadata=told)

    return knob


RESULT_GROUPS = ("model", "noise", "training", "optimizer")  # the same when a run is resumed


# fmt: off
@dataclasses.dataclass(frozen=True, init=False)
class Hyperparameters:
    """The defaults, changed by the preset, changed by the values that are given; InputError if
    they are unknown, out of range, or do not fit together."""

    knob = group("run", "what to do")
    preset: str = knob("mdlm", "values to start from", choices=lambda: PRESETS)
    run_id: str = knob("", "name of logs/<RUN_ID>.txt and .mdlm; empty: time and preset")
    eval_only: str = knob("", "artifact to score instead of training")

    knob = group("data", "where the text is")
    data_path: str = knob("./data/datasets/fineweb10B_sp1024",
        "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model",
        "SentencePiece model that made them")

    knob = group("model", "what the predictor is; the artifact carries these values")
    objective: str = knob("mdlm", "masked diffusion, or causal", choices=("mdlm", "ar"))
    block_size: int = knob(0,
        "tokens of a block; blocks from left to right, diffusion inside; 0: none")
    backbone: str = knob("unet", "trunk; dit is told the noise", choices=lambda: BACKBONES)
    vocab_size: int = knob(1024, "real tokens V; MASK is V, PAD V + 1", low=2, high=65_534)
    doc_chunks: bool = knob(False, "train on documents, in chunks of L tokens and PAD")
    anchor_bos: bool = knob(False, "never mask <s>; scores pay for where it stands")
    train_seq_len: int = knob(1024, "tokens L of a window", low=1, high=2**20)
    num_layers: int = knob(8, "blocks; half of the U-Net's feed skips", low=1, high=200)
    model_dim: int = knob(576, "width D of the residual stream", low=2, high=2**16)
    num_heads: int = knob(8, "attention heads H", low=1)
    num_kv_heads: int = knob(4, "key/value heads, each for an equal share of H", low=1)
    mlp_mult: int = knob(2, "hidden width of the MLP over MODEL_DIM", low=1, high=64)
    tie_embeddings: bool = knob(True, "use the embedding as the output head too")
    neighbors: int = knob(0, "tokens on each side that join a position's input", high=64)
    neighbor_dim: int = knob(32, "width of their embeddings", low=1, high=2**16)
    rope_base: float = knob(1e4, "base of the rotary frequencies", low=1)
    logit_softcap: float = knob(30.0, "logits become cap·tanh(logits/cap); 0: unchanged")
    qk_gain_init: float = knob(1.5, "initial gain of the normalised queries")
    tied_embed_init_std: float = knob(0.005, "standard deviation of a new tied embedding")
    compute_dtype: str = knob("auto", "of activations; auto: bfloat16 on GPUs",
        choices=("auto", "float32", "bfloat16"))

    knob = group("noise", "what is masked in training, and how much a masked token counts")
    masking: str = knob("bernoulli",
        "how a row is masked: each token by itself, or exactly so many", choices=lambda: MASKINGS)
    time_sampling: str = knob("stratified",
        "how mask times are drawn: evenly spaced, in pairs t and 1 − t, or independently",
        choices=lambda: TIME_SAMPLINGS)
    mask_dist: str = knob("uniform", "of mask probabilities", choices=lambda: MASK_DISTS)
    mask_mean: float = knob(0.45, "mean of MASK_DIST=normal", high=1)
    mask_std: float = knob(0.1, "its standard deviation", low=1e-6, high=10)
    mask_eps: float = knob(0.001, "smallest mask probability", high=1)
    mask_max: float = knob(1.0, "largest mask probability", high=1)
    loss_weight: str = knob("elbo",
        "weight of a token masked with probability p: 1/p, about 1/(1 − p), or 1",
        choices=lambda: LOSS_WEIGHTS)
    block_share: float = knob(1.0, "share of the blocks that a step masks", high=1)
    causal_weight: float = knob(1.0, "weight of the clean half with BLOCK_SIZE")
    weight_clamp: float = knob(100.0, "largest weight of a masked token", low=1)

    knob = group("training", "how long, how much at a time, and how fast")
    seed: int = knob(1337, "seed of weights, mask times and masks", high=2**63 - 1)
    iterations: int = knob(20_000, "optimizer steps at most", high=2**24)
    max_wallclock_seconds: float = knob(600.0, "training time at most; 0: no limit")
    train_batch_tokens: int = knob(524_288, "tokens of a step", low=1, high=2**28)
    shuffle: bool = knob(False, "windows of a step from all over the text; not for DOC_CHUNKS")
    lr_warmup_steps: int = knob(0, "steps in which the learning rates rise at first")
    warmdown_iters: int = knob(1200, "steps in which they decay; 0: see WARMDOWN_FRAC")
    warmdown_frac: float = knob(0.0, "share of the run in which they decay", high=1)
    warmdown_shape: str = knob("linear", "of the decay", choices=("linear", "cosine"))
    min_lr_frac: float = knob(0.0, "share of them that is left at the end", high=1)

    knob = group("execution", "how the work is done; the result is the same up to rounding")
    compile: str = knob("auto", "torch.compile for the loss and the scores; auto: on GPUs",
        choices=("auto", "on", "off"))
    warmup_steps: int = knob(20, "undone steps that warm the compiler up", high=1000)
    micro_batch_tokens: int = knob(65_536, "most tokens of one pass of a process",
        low=1, high=2**24)
    train_log_every: int = knob(200, "steps between log lines, after the first ten; 0: none")
    val_loss_every: int = knob(1000, "steps between validations; 0: only at the end")
    checkpoint_every: float = knob(300.0,
        "seconds of training between checkpoints; 0: only when stopped")
    resume: str = knob("auto", "from the last checkpoint of RUN_ID, if any",
        choices=("auto", "never"))
    skip_nonfinite: int = knob(0,
        "steps whose gradients are not finite, skipped before the run gives up")

    knob = group("optimizer", "how gradients move the weights")
    optimizer: str = knob("muon", "for the block matrices; AdamW is for the rest",
        choices=("muon", "adamw"))
    matrix_lr: float = knob(0.02, "learning rate of the block matrices")
    tied_embed_lr: float = knob(0.05, "learning rate of a tied embedding")
    embed_lr: float = knob(0.6, "learning rate of an untied one, and of NEIGHBORS")
    head_lr: float = knob(0.008, "learning rate of an untied output head")
    scalar_lr: float = knob(0.04, "learning rate of gains, scales, skips and biases")
    adam_batch_tokens: int = knob(0,
        "batch that these rates, but MATRIX_LR, are for; they scale with its square root; 0: not")
    weight_decay: float = knob(0.0, "decoupled, per step, times the learning rate")
    weight_decay_on: str = knob("matrices",
        "what decays: block and head matrices, or all weights", choices=("matrices", "all"))
    muon_momentum: float = knob(0.95, "Nesterov momentum of Muon", high=1)
    muon_momentum_warmup_start: float = knob(0.85, "its momentum at step 0", high=1)
    muon_momentum_warmup_steps: int = knob(500, "steps until it is MUON_MOMENTUM")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=99)
    beta1: float = knob(0.9, "decay of AdamW's first moment", high=0.999999)
    beta2: float = knob(0.95, "decay of AdamW's second moment", high=0.999999)
    adam_eps: float = knob(1e-8, "ε of AdamW", low=1e-30)
    grad_clip_norm: float = knob(1.0, "largest norm of the gradient; 0: no limit")
    ema_decay: float = knob(0.999, "decay of averaged weights; 0: no average", high=1)
    ema_start_frac: float = knob(0.1, "share of the run before averaging", high=1)

    knob = group("export", "how the weights become bytes")
    quant_mode: str = knob("fp8",
        "storage of all weights, or by kind of parameter: int7,embed:int8,gain:fp16")
    quant_clip: float = knob(0.0,
        "largest code, in root mean squares of its row; 0: that of least squared error", high=16)
    quant_feedback: int = knob(0,
        "training batches for GPTQ, best with QUANT_CLIP of 10 or more; 0: to nearest", high=1000)
    pack: str = knob("auto", "compressor of each kind of parameter; auto: the smallest",
        choices=lambda: ("auto", *PACKERS))

    knob = group("scoring", "which code lengths are measured, and on how much text")
    scores: str = knob("nelbo,l2r",
        "final scores, each with a number of windows if wanted (0: all): nelbo,l2r:512")
    nelbo_passes: int = knob(4, "masks per window of the final NELBO", low=1, high=9999)
    eval_max_seqs: int = knob(4096, "windows of a validation in training; 0: all")
    final_eval_max_seqs: int = knob(0, "windows of the final val_bpb; 0: all")
    final_eval_t_samples: int = knob(0, "points of PR 1699's grid; adds the score tgrid",
        high=100_000)
    tstep_steps: int = knob(128, "T of the T-step bound", low=1, high=100_000)
    stride: int = knob(64, "tokens that a sliding window scores", low=1)
    chain_group: int = knob(1, "positions a chain rule reveals in one call", low=1)
    val_batch_size: int = knob(524_288, "tokens of one scoring pass, over all processes",
        low=1, high=2**24)
# fmt: on

    def __init__(self, preset: str = "mdlm", **overrides):
        known = {spec.name: spec for spec in dataclasses.fields(self)}
        values = {name: spec.default for name, spec in known.items()}
        values |= PRESETS.get(preset, {}) | {"preset": preset}
        for name in (values | overrides).keys() - known.keys():
            raise InputError(f"unknown hyperparameter {name}{did_you_mean(name, known)}")
        if "warmdown_frac" in overrides:
            values["warmdown_iters"] = 0
        for name, value in (values | overrides).items():
            object.__setattr__(self, name, checked_value(known[name], value))
        if broken := next(self._broken_rules(), None):
            raise InputError(broken)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Hyperparameters:
        names = [spec.name for spec in dataclasses.fields(cls) if spec.name.upper() in env]
        return cls(**{name: env[name.upper()] for name in names})

    def shown(self, name: str) -> str:
        """As one would give it: NUM_LAYERS=8."""
        value = getattr(self, name)
        return f"{name.upper()}={int(value) if isinstance(value, bool) else value}"

    # Whether a position sees only what is to its left
    causal = property(lambda self: self.objective == "ar")
    mask_id = property(lambda self: self.vocab_size)
    pad_id = property(lambda self: self.vocab_size + 1)
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    # Windows of a global batch
    batch_rows = property(lambda self: self.train_batch_tokens // self.train_seq_len)
    # Tokens that are masked together, and how many such rows a global batch has
    noise_length = property(lambda self: self.block_size or self.train_seq_len)
    noise_rows = property(lambda self: self.batch_rows * self.noisy_blocks)
    # Row of ESTIMATORS, whose first score is val_bpb
    system = property(lambda self: "block" if self.block_size else self.objective)
    headline = property(lambda self: next(iter(ESTIMATORS[self.system])))
    # Tokens the model can see: the real ones, MASK unless causal, PAD for chunks
    embedding_rows = property(lambda self: self.vocab_size + (not self.causal) + self.doc_chunks)

    @property
    def noisy_blocks(self) -> int:
        return max(round(self.block_share * (self.train_seq_len // self.noise_length)), 1)

    @property
    def neighbor_offsets(self) -> list[int]:
        """Where the tokens of NEIGHBORS are, relative to a position."""
        last = 0 if self.causal else self.neighbors
        return [offset for offset in range(-self.neighbors, last + 1) if offset]

    @property
    def storages(self) -> dict[str, str]:
        """By kind of parameter: what QUANT_MODE says of it, else KINDS, else of all."""
        parts = [part.strip().rpartition(":")[::2] for part in self.quant_mode.split(",")]
        asked = dict(parts)
        if len(asked) < len(parts):
            raise InputError(f"{self.shown('quant_mode')} names one kind twice")
        default = asked.pop("", "fp8")
        return {kind.name: kind.storage or default for kind in KINDS} | asked

    @property
    def requested_scores(self) -> dict[str, int | None]:
        """Windows by score: SCORES, and tgrid; None where no number is given."""
        requested = {}
        for item in self.scores.split(","):
            name, colon, windows = (part.strip() for part in item.partition(":"))
            if colon and not re.fullmatch(r"\d{1,12}", windows):
                raise InputError(f"{self.shown('scores')}: {item} needs a number of windows")
            if name in requested:
                raise InputError(f"{self.shown('scores')} names {name} twice")
            if name or colon:
                requested[name] = int(windows) if colon else None
        if self.final_eval_t_samples:
            requested.setdefault("tgrid", self.final_eval_max_seqs)
        return requested

    def _broken_rules(self) -> Iterator[str]:
        """A message for each rule between values that does not hold."""
        divisors = dict(
            num_heads="model_dim", num_kv_heads="num_heads", block_size="train_seq_len"
        )
        for part, whole in divisors.items():
            if getattr(self, part) and getattr(self, whole) % getattr(self, part):
                yield f"{self.shown(part)} must divide {self.shown(whole)}"
        if self.head_dim % 2:
            quotient = f"{self.shown('model_dim')} / {self.shown('num_heads')}"
            yield f"{quotient} must be even for rotary embeddings"
        if self.mask_eps >= self.mask_max:
            yield f"{self.shown('mask_eps')} must be smaller than {self.shown('mask_max')}"
        masks_only = BACKBONES[self.backbone].told_noise or self.doc_chunks or self.anchor_bos
        if self.causal + bool(self.block_size) + masks_only > 1:
            yield "OBJECTIVE=ar, BLOCK_SIZE and (BACKBONE=dit, DOC_CHUNKS, ANCHOR_BOS) do not mix"
        scores = list(dict.fromkeys(itertools.chain(*ESTIMATORS.values())))
        for name in self.requested_scores:
            if name not in scores:
                yield f"{self.shown('scores')}: {name} is not one of {', '.join(scores)}"
        kinds = [kind.name for kind in KINDS]
        for kind, storage in self.storages.items():
            if kind not in kinds or storage not in QUANTIZERS:
                allowed = f"{', '.join(kinds)}, or all of them, may be {', '.join(QUANTIZERS)}"
                yield f"{self.shown('quant_mode')}: {allowed}"
        if self.pack == "zstd" and zstandard is None:
            yield "PACK=zstd needs the package zstandard: pip install -r requirements.txt"
        if re.search(r"[^\w.+=@-]|^\.", self.run_id) or len(self.run_id.encode()) > 200:
            allowed = "letters, digits, _+=@- and, not at the start, dots; at most 200 bytes"
            yield f"{self.shown('run_id')}: {allowed}"


# fmt: off
MDLM16 = dict(num_layers=11, quant_mode="int7,embed:int8", quant_clip=10.0, quant_feedback=4)
GOLF = MDLM16 | dict(
    data_path="./data/datasets/fineweb10B_sp8192",
    tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model", vocab_size=8192, quant_mode="int7",
    num_layers=7, mlp_mult=3, num_heads=9, num_kv_heads=3, neighbors=2,
    masking="count", mask_dist="normal", loss_weight="flat",
    warmdown_iters=0, warmdown_frac=0.5, ema_decay=0.0, shuffle=True,
    adam_batch_tokens=524_288, embed_lr=0.2, tied_embed_init_std=0.05,
)
DEMO = GOLF | dict(  # two CPU cores
    data_path="./data/datasets/docs_sp4096",
    tokenizer_path="./data/tokenizers/docs_4096_bpe.model", vocab_size=4096,
    quant_mode="int7,embed:int8",
    num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_mult=2, neighbor_dim=128,
    train_seq_len=128, rope_base=100.0, tied_embed_lr=0.2, embed_lr=0.4,
    iterations=500, max_wallclock_seconds=400.0, warmup_steps=0,
    train_batch_tokens=4096, micro_batch_tokens=2048,
    train_log_every=50, val_loss_every=100, eval_max_seqs=256,
    scores="nelbo,l2r:32", nelbo_passes=1, val_batch_size=2048,
)
BLOCK = GOLF | dict(
    block_size=4, block_share=0.5, causal_weight=2.0, mask_dist="uniform", loss_weight="elbo",
)
LLADA = dict(  # PR 1106
    backbone="dit", num_layers=11, model_dim=512, num_kv_heads=8, mlp_mult=3,
    tie_embeddings=False, logit_softcap=0.0, train_seq_len=2048,
    time_sampling="antithetic", mask_eps=0.0, mask_max=0.999,
    loss_weight="dsigma", weight_clamp=1000.0,
    iterations=6000, train_batch_tokens=65_536, lr_warmup_steps=300,
    warmdown_iters=1500, warmdown_shape="cosine", min_lr_frac=0.1,
    optimizer="adamw", weight_decay=0.1, weight_decay_on="all", ema_decay=0.0,
    matrix_lr=6e-4, embed_lr=6e-4, head_lr=6e-4, tied_embed_lr=6e-4, scalar_lr=6e-4,
    scores="nelbo,l2r:64,tstep:500", tstep_steps=512,
)
EOS = LLADA | dict(doc_chunks=True, anchor_bos=True, tstep_steps=128)  # PR 1241
AR = dict(  # the challenge's causal baseline
    objective="ar", num_layers=9, model_dim=512, matrix_lr=0.04, grad_clip_norm=0.0, ema_decay=0.0,
)
PRESETS = {
    "mdlm": {},
    "mdlm16": MDLM16,  # as many layers as fit
    "golf": GOLF,
    "block": BLOCK,
    "llada": LLADA,
    "eos": EOS,
    "ar": AR,
    "demo": DEMO,
}
# fmt: on


KNOBS = dataclasses.fields(Hyperparameters)
PREDICTOR = [spec.name for spec in KNOBS if spec.metadata["group"] == "model"]


def choices_of(spec: dataclasses.Field) -> list[str]:
    choices = spec.metadata["choices"]
    return list(choices() if callable(choices) else choices)


def checked_value(spec: dataclasses.Field, value):
    """`value`, as text or not, in the type and range of its field; or InputError."""
    name, kind = spec.name.upper(), type(spec.default)
    try:
        if isinstance(value, str) and kind is bool:
            value = {"0": False, "1": True, "false": False, "true": True}[value.strip().lower()]
        elif isinstance(value, str) or (kind is float and type(value) is int):
            value = kind(value)
        if type(value) is not kind:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "0 or 1", str: "text"}[kind]
        raise InputError(f"{name}={value} is not {wanted}") from None
    choices = choices_of(spec)
    if choices and value not in choices:
        raise InputError(f"{name}={value} is not one of {', '.join(choices)}")
    low, high = spec.metadata["low"], spec.metadata["high"]
    if kind in (int, float) and not low <= value <= high:
        raise InputError(f"{name}={value} is not between {low} and {high}")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    return f" (did you mean {close[0]}?)" if close else ""


def near_misses(env: Mapping[str, str]) -> list[str]:
    """A warning for every variable that is almost a hyperparameter."""
    known = [spec.name.upper() for spec in KNOBS]
    return [
        f"warning: environment variable {name} is not read{hint}"
        for name in sorted(set(env) - set(known))
        if (hint := did_you_mean(name, known))
    ]


def help_text(wanted: Sequence[str] = ()) -> str:
    """The story of this file and every knob, or only the `wanted` groups."""
    lines = [] if wanted else [__doc__.strip(), ""]
    for name in wanted or GROUPS:
        if name not in GROUPS:
            raise InputError(f"--help {name}: the groups are {', '.join(GROUPS)}")
        lines.append(f"{name}: {GROUPS[name]}")
        for spec in KNOBS:
            if spec.metadata["group"] == name:
                lines += knob_help(spec)
        lines.append("")
    return "\n".join(lines).rstrip()


def knob_help(spec: dataclasses.Field) -> Iterator[str]:
    """Default and meaning, choices, and the presets that set it."""
    yield f"    {spec.name.upper()}={spec.default}  {spec.metadata['meaning']}"
    presets = {}
    for name, values in PRESETS.items():
        if spec.name in values:
            presets.setdefault(values[spec.name], []).append(name)
    changed = [f"{', '.join(names)}: {value}" for value, names in presets.items()]
    for note in (" | ".join(choices_of(spec)), "; ".join(changed)):
        if note:
            yield f"        {note}"


# ---- Processes, clock, log, files
#
# Only the first process writes. What could differ between processes (a file, the time, a signal) is
# decided once and told to all.


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def run_collective(collective: Callable, *arguments, **options):
    """Runs it if there are several processes; InputError if another one is lost."""
    try:
        if world_size() > 1:
            collective(*arguments, **options)
    except RuntimeError as error:
        if str(error).startswith("CUDA"):  # a failure of this process
            raise
        raise InputError(f"another process of the group is lost: {error}") from None


def all_reduce(tensor):
    """Adds `tensor` up over all processes, in place."""
    run_collective(dist.all_reduce, tensor)
    return tensor


def is_lack_of_memory(error: BaseException) -> bool:
    told = re.search(r"(out of|allocate|not enough) memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(told))


def foreseen(error: BaseException) -> str:
    """One line on an error that has a known cause, else nothing."""
    text = str(error)
    if isinstance(error, InputError):
        return " ".join(text.split())
    if isinstance(error, KeyboardInterrupt):
        return "stopped by a signal; a run that has a checkpoint goes on with its RUN_ID"
    if is_lack_of_memory(error):
        return "out of memory: lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or the size of the model"
    if isinstance(error, ImportError):
        return f"{text}: pip install -r requirements.txt"
    if isinstance(error, RuntimeError) and re.search(r"\bC(\+\+)? compiler", text):
        return "torch.compile finds no C++ compiler: install g++, or give COMPILE=off"
    if isinstance(error, OSError):
        file = error.filename or "the log or the screen"
        return f"{file}: cannot be read or written: {error.strerror or error}"
    return ""


def explain(error: BaseException) -> str:
    """One line on any error."""
    return foreseen(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


def on_first_process(work: Callable, *arguments):
    """What work(*arguments) returns or raises on the first process, on all of them."""
    outcome = [None]
    try:
        if rank() == 0:
            outcome = [work(*arguments)]
    except (InputError, OSError) as error:
        outcome = [InputError(explain(error))]
    run_collective(dist.broadcast_object_list, outcome, 0, device=torch.device("cpu"))
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def environ_number(name: str, otherwise: float = math.nan) -> int | float:
    """A variable that torchrun sets."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def own_share(count: int) -> range:
    """Which of `count` things this process looks at, if those of each machine share them."""
    here, processes = environ_number("LOCAL_RANK"), environ_number("LOCAL_WORLD_SIZE")
    if dist.is_initialized() and here < processes:
        return range(here, count, processes)
    return range(count)


def start_processes() -> torch.device:
    """Joins the group that torchrun describes, if any; this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", environ_number("LOCAL_RANK", 0))
        found = torch.cuda.device_count()
        if device.index >= found:
            raise InputError(f"--nproc_per_node is more than {found}, the GPUs of this machine")
        torch.cuda.set_device(device)
    elif os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") >= "0":
        # not "" nor -1
        remedy = "install one for their driver, or give CUDA_VISIBLE_DEVICES= for CPUs"
        raise InputError(f"this torch cannot use the GPUs here: {remedy}")
    if "RANK" not in os.environ:
        return device
    try:
        if not environ_number("RANK") < environ_number("WORLD_SIZE"):
            raise ValueError("RANK is no number below WORLD_SIZE")
        on_signals(signal.SIG_DFL)  # others would wait until the group is complete
        # Control messages go through gloo, so they never wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        on_signals(signal.default_int_handler)
    except (ValueError, dist.DistError) as error:
        given = f"RANK={os.environ.get('RANK')} WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
        raise InputError(
            f"{given}: no group of processes, start it with torchrun: {error}"
        ) from None
    return device


def on_signals(handler):
    """Sets the handler of the signals that end a run, unless nohup has switched them off."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Clock:
    """Training time of a run over all its restarts; pauses do not count."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stopped = 0.0  # when a signal told this process to stop
        self.pauses = collections.Counter()
        self.started = self.now()

    def now(self) -> float:
        """Waits for the device; the time in seconds."""
        torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def read(self) -> tuple[float, bool]:
        """Training time in ms, and whether any process was told to stop: the same on all. Does not
        wait for the device."""
        own = [1000 * (time.perf_counter() - self.started), self.stopped]
        ms, stopped = all_reduce(torch.tensor(own, dtype=torch.float64)).tolist()
        return ms / world_size(), stopped > 0

    def stop(self, *signal_and_frame):
        """A signal handler: the step is finished first, but for a second signal."""
        if self.stopped and time.perf_counter() > self.stopped + 1:
            raise KeyboardInterrupt
        self.stopped = self.stopped or time.perf_counter()

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        since = self.now()
        yield
        seconds = self.now() - since
        self.started += seconds
        self.pauses[name] += seconds


def show(line: str, file: TextIO):
    """Prints it, if the screen is still there."""
    with contextlib.suppress(OSError):
        print(line, file=file, flush=True)


class Log:
    """The first process's lines, on the screen and in a file."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.lock = None  # its file, locked

    def __call__(self, line: str, screen: bool = True, every_rank: bool = False):
        if screen and rank() == 0:
            show(line, sys.stdout)
        if self.path and (every_rank or rank() == 0):
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

    def budget(self, name: str, value: float, limit: float, unit: str, note: str = ""):
        """A line on what the challenge limits, and one more if it is over."""
        self(f"{name}: {round(value, 1)} {unit}{note}")
        if value > limit:
            excess = round(value - limit, 1)
            self(f"OVER BUDGET: {name} is {round(value, 1)} {unit}, {excess} more than allowed")


DIGEST_BYTES = hashlib.sha256().digest_size


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(read_file(path)).hexdigest()


def sealed(data: bytes) -> bytes:
    """`data`, then its SHA-256."""
    return data + hashlib.sha256(data).digest()


def unsealed(data: bytes) -> bytes | None:
    """What was sealed, or None if it is damaged."""
    body = data[:-DIGEST_BYTES]
    return body if sealed(body) == data else None


def read_file(path: str | Path) -> bytes:
    """InputError unless it is an ordinary file that can be read: a pipe would never end."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def write_file(path: Path, data: bytes):
    """All of it or nothing: under another name first. InputError if that fails."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()  # it may have filled the disk
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


# ---- Data and bytes
#
# Shards are read a window at a time, and bytes of text are counted token by token.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS
VERIFIED = "verified.json"  # what was counted when the shards were written
BOS_ID = 1  # <s> in the challenge's tokenizers
REMEDY = (
    "run 'python data/prepare_text.py --source docs' (demo) or "
    "'python data/fetch_fineweb.py' (golf, block: --variant sp8192)"
)


def open_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard: 256 int32 (magic, version, tokens, zeros), then uint16."""
    if not path.is_file():
        raise InputError(f"{path}: is not a file; {REMEDY}")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size < SHARD_HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(f"{path}: not a token shard (bad header); {REMEDY}")
    count = int(header[2])
    if count < 1 or path.stat().st_size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(f"{path}: truncated or damaged, its header says {count} tokens; {REMEDY}")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """The shards of a split end to end, as a ring: after the last token comes the first."""

    def __init__(self, folder: str | Path, split: str):
        self.files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
        if not self.files:
            raise InputError(f"no {split} shards in DATA_PATH={folder}; {REMEDY}")
        sizes = np.array([len(open_shard(path)) for path in self.files])
        self.ends = sizes.cumsum()
        self.begins = self.ends - sizes
        self.total = int(sizes.sum())
        self.facts: dict = dict(shards={})  # what `measure` has found

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the ring on, uint16."""
        parts = []
        while count > 0:
            position = start % self.total
            shard = bisect.bisect(self.ends, position)
            size = min(int(self.ends[shard]) - position, count)
            offset = SHARD_HEADER_BYTES + 2 * (position - int(self.begins[shard]))
            part = np.fromfile(self.files[shard], "<u2", size, offset=offset)
            if len(part) < size:
                raise InputError(f"{self.files[shard]}: was cut off while it was in use")
            parts.append(part)
            start += size
            count -= size
        return np.concatenate(parts)

    def windows(self, numbers: Iterable[int], length: int, stride: int = 0):
        """(B, 1 + length) int64: row n has token n·(stride or length) and the `length` after it."""
        rows = [self.read(number * (stride or length), 1 + length) for number in numbers]
        return torch.from_numpy(np.stack(rows)).long()

    def count_windows(self, length: int, stride: int = 0) -> int:
        """Windows that do not go round the ring."""
        return max(1 + (self.total - 1 - length) // (stride or length), 0)

    def order(self, epoch: int) -> Sequence[int]:
        """The shards in the order in which they are read."""
        return range(len(self.files))

    def measure(
        self, vocab_size: int, first_tokens: float = math.inf, luts: ByteTables | None = None
    ):
        """Reads the shards of the first tokens, shared among the processes, and notes in `facts`
        what verified.json should say of them: bytes and documents if `luts` are given. InputError
        for a foreign token."""
        other = InputError(f"{self.files[0].parent}: other shards than on other machines")
        if on_first_process(self.ends.tolist) != self.ends.tolist():
            raise other
        order = list(self.order(0))
        sizes = (self.ends - self.begins)[order]
        reached = order[: int(np.searchsorted(sizes.cumsum(), first_tokens)) + 1]
        own = own_share(len(reached))
        counts = torch.zeros(len(reached), 3, dtype=torch.int64)
        for i in own:
            counts[i] = torch.tensor(self._count(reached[i], vocab_size, luts))
        largest = counts.clone()
        run_collective(dist.all_reduce, largest, dist.ReduceOp.MAX)
        if not torch.equal(largest[own], counts[own]):
            raise other
        checksums, documents, nbytes = largest.unbind(1)
        names = [self.files[number].name for number in reached]
        self.facts = dict(
            tokens=self.total, shards=dict(zip(names, checksums.tolist(), strict=True))
        )
        if luts:
            self.facts |= dict(documents=int(documents.sum()), bytes=int(nbytes.sum()))

    def pieces(self, number: int) -> Iterator[np.ndarray]:
        """The tokens of a shard, a million at a time."""
        for start in range(self.begins[number], self.ends[number], 1 << 20):
            yield self.read(start, min(1 << 20, int(self.ends[number]) - start))

    def _count(self, number: int, vocab_size: int, luts: ByteTables | None) -> tuple:
        """Checksum, documents and bytes of text of a shard."""
        before = int(self.read(self.begins[number] - 1, 1)[0]) if number else BOS_ID
        checksum = documents = nbytes = 0
        for tokens in self.pieces(number):
            largest = int(tokens.max())
            if largest >= vocab_size:
                found = f"holds token {largest}, but VOCAB_SIZE={vocab_size}"
                raise InputError(f"{self.files[number]}: {found}; another tokenizer made it")
            checksum = zlib.crc32(tokens, checksum)
            documents += int((tokens == BOS_ID).sum())
            if luts:
                nbytes += int(count_bytes(tokens, before, luts))
                before = int(tokens[-1])
        return checksum, documents, nbytes

    @property
    def digest(self) -> int:
        """Of all tokens that `measure` has read."""
        return zlib.crc32(json.dumps(self.facts["shards"]).encode())


class DocumentStream(TokenStream):
    """The shards as documents, from <s> to <s>, in chunks of at most L tokens, then PAD: shards and
    the chunks of each are shuffled in every epoch. A visit is one shard in one epoch."""

    def __init__(self, hp):
        super().__init__(hp.data_path, "train")
        self.hp = hp
        self.first_chunks = [0]  # number of the first chunk of every visit so far
        self.visit = functools.lru_cache(maxsize=2)(self._visit)  # shards in memory

    def order(self, epoch: int) -> Sequence[int]:
        generator = seeded("cpu", self.hp.seed, "shards", epoch)
        return torch.randperm(len(self.files), generator=generator).tolist()

    def _visit(self, visit: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """A shard's tokens, where its chunks begin (and the last one ends), and their order."""
        epoch, place = divmod(visit, len(self.files))
        path = self.files[self.order(epoch)[place]]
        shard = np.array(open_shard(path))
        documents = np.union1d([0], np.flatnonzero(shard == BOS_ID))  # the first may lack its <s>
        chunks = ceil_div(np.diff(documents, append=len(shard)), self.hp.train_seq_len)
        first_of_document = np.repeat(chunks.cumsum() - chunks, chunks)
        within_document = np.arange(chunks.sum()) - first_of_document
        starts = np.repeat(documents, chunks) + self.hp.train_seq_len * within_document
        generator = seeded("cpu", self.hp.seed, "chunks", visit)
        order = torch.randperm(len(starts), generator=generator)
        return shard, np.append(starts, len(shard)), order

    def chunk(self, number: int) -> np.ndarray:
        """The tokens of a chunk, uint16."""
        while self.first_chunks[-1] <= number:
            _, _, order = self.visit(len(self.first_chunks) - 1)
            self.first_chunks.append(self.first_chunks[-1] + len(order))
        visit = bisect.bisect(self.first_chunks, number) - 1
        shard, starts, order = self.visit(visit)
        place = int(order[number - self.first_chunks[visit]])
        return shard[starts[place] : starts[place + 1]]

    def windows(self, numbers: Sequence[int], length: int):
        """(B, 1 + length) int64: PAD, then the tokens of a chunk, then PAD."""
        rows = torch.full((len(numbers), 1 + length), self.hp.pad_id)
        for row, number in zip(rows, numbers, strict=True):
            chunk = torch.from_numpy(self.chunk(number))
            row[1 : 1 + len(chunk)] = chunk
        return rows


class ByteTables(NamedTuple):
    """What every token adds to the text, by its id."""

    base_bytes: Tensor  # (table,) int64, UTF-8 bytes without the leading space
    has_leading_space: Tensor  # (table,) bool
    is_boundary: Tensor  # (table,) bool: control and unknown tokens, which stand for no text
    keeps_space: bool  # whether the first piece after a boundary does


def build_sentencepiece_luts(sp, vocab_size: int, device: torch.device | str = "cpu") -> ByteTables:
    """Of a SentencePiece model, exact also where a space begins a piece."""
    pieces = int(sp.vocab_size())
    size = max(pieces, vocab_size + 2)  # MASK and PAD stand for no text
    base = np.zeros(size, np.int64)
    space = np.zeros(size, bool)
    boundary = np.ones(size, bool)
    for token in range(pieces):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        piece = sp.id_to_piece(token)
        boundary[token] = False
        space[token] = piece.startswith("\u2581")
        text_bytes = len(piece.replace("\u2581", " ").encode())
        base[token] = 1 if sp.is_byte(token) else text_bytes - space[token]
    # All pieces behave alike, so it is enough to ask one of them.
    keeps_space = space.any() and sp.decode([int(space.argmax())]).startswith(" ")
    tables = (torch.from_numpy(table).to(device) for table in (base, space, boundary))
    return ByteTables(*tables, bool(keeps_space))


def token_bytes(tokens, prev: Tensor | int, luts: ByteTables):
    """(…, L) int64: UTF-8 bytes of tokens (…, L), after the token `prev` (…)."""
    device = luts.base_bytes.device
    tokens = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    prev = torch.as_tensor(prev, dtype=torch.int64, device=device).expand(tokens.shape[:-1])
    before = torch.cat([prev[..., None], tokens[..., :-1]], dim=-1)
    space_stays = luts.keeps_space | ~luts.is_boundary[before]
    return luts.base_bytes[tokens] + (luts.has_leading_space[tokens] & space_stays)


def count_bytes(tokens, prev: Tensor | int, luts: ByteTables):
    """(…) int64: UTF-8 bytes of the text of tokens (…, L), after the token `prev` (…)."""
    return token_bytes(tokens, prev, luts).sum(-1)


def load_tokenizer(path: str, vocab_size: int):
    """The SentencePiece model at `path`; InputError if there is none of this size and kind."""
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor()
        sp.LoadFromSerializedProto(read_file(path))
        pieces = sp.id_to_piece(list(range(sp.vocab_size())))  # raises if one is no UTF-8
    except (RuntimeError, ValueError):
        message = f"TOKENIZER_PATH={path}: there is no SentencePiece model; {REMEDY}"
        raise InputError(message) from None
    if len(pieces) != vocab_size:
        raise InputError(f"{path}: has {len(pieces)} pieces, but VOCAB_SIZE={vocab_size}")
    if sp.bos_id() != BOS_ID:
        raise InputError(f"{path}: its <s> is token {sp.bos_id()}, but it has to be {BOS_ID}")
    special = (sp.is_control, sp.is_unknown, sp.is_unused, sp.is_byte)
    texts = [piece for n, piece in enumerate(pieces) if not any(test(n) for test in special)]
    strange = {character for character in set("".join(texts)) - set(pieces) if character > "~"}
    if strange:  # no trainer makes such a file
        message = f"{path}: damaged: {min(strange)!r} is in its pieces, but is no piece"
        raise InputError(f"{message}; {REMEDY}")
    return sp


def text_fault(tokens: np.ndarray, sp, luts: ByteTables) -> str:
    """What speaks against this tokenizer for tokens (n,) of a shard: their text has other bytes
    than the tables count, or gives other tokens. Random tokens pass."""
    boundary = luts.is_boundary.cpu().numpy()
    if np.bincount(tokens).max() <= 10 + 4 * len(tokens) / len(boundary):
        return ""
    parts = np.split(tokens, np.flatnonzero(boundary[tokens]))
    parts = [part[~boundary[part]].tolist() for part in parts]
    texts = sp.decode(parts)
    counted = int(count_bytes(tokens, BOS_ID, luts))
    decoded = sum(len(text.encode()) for text in texts)
    if abs(counted - decoded) > 8 + 1e-4 * decoded:  # characters may be cut off at both ends
        return f"counts {counted} bytes where there are {decoded}: it did not make"

    def pairs(documents: Iterable[Sequence[int]]) -> collections.Counter:
        return collections.Counter(itertools.chain(*map(itertools.pairwise, documents)))

    # parts[0] comes before the first document
    sample = slice(len(parts) > 1, None, ceil_div(len(tokens), 50_000))
    stored = pairs(parts[sample])
    if (stored & pairs(sp.encode(texts[sample]))).total() < 0.99 * stored.total():
        return "splits the text differently: it did not make"
    return ""


def check_verified(hp, stream: TokenStream, split: str) -> bool:
    """InputError unless tokenizer and shards are what verified.json says; False without one."""
    path = Path(hp.data_path) / VERIFIED
    if not os.path.lexists(path):
        return False
    text, digest = read_file(path), file_sha256(hp.tokenizer_path)
    try:
        verified = json.loads(text)
        pairs = {f"{hp.tokenizer_path} (SHA-256)": (verified["tokenizer_sha256"], digest)}
        stated, found = verified[split], dict(stream.facts)
        for name, checksum in found.pop("shards").items():
            pairs[f"{name} (CRC-32)"] = (stated["shards"].get(name), checksum)
        pairs |= {f"{split} {name}": (stated[name], value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: damaged, and perhaps the data with it; {REMEDY}") from None
    for name, (then, now) in pairs.items():
        if then != now:
            wrong = f"{name} is {now}, but was {then} when the data were made"
            raise InputError(f"{path}: {wrong}; {REMEDY}")
    return True


def check_data(hp, stream: TokenStream, split: str, sp, luts: ByteTables):
    """Against verified.json or, without it, the text: all of the validation split, the beginning of
    every training shard in reach."""
    if check_verified(hp, stream, split):
        return
    shards = stream.facts["shards"]
    numbers = [number for number, path in enumerate(stream.files) if path.name in shards]
    for i in own_share(len(numbers)):
        pieces = stream.pieces(numbers[i])
        for tokens in pieces if split == "val" else [next(pieces)[:50_000]]:
            if fault := text_fault(tokens, sp, luts):
                tokenizer = hp.shown("tokenizer_path")
                raise InputError(f"{tokenizer} {fault} {stream.files[numbers[i]]}; {REMEDY}")


def open_training(hp, sp, luts: ByteTables) -> TokenStream:
    """The training split, checked as far as the run can reach."""
    stream = DocumentStream(hp) if hp.doc_chunks else TokenStream(hp.data_path, "train")
    stream.measure(hp.vocab_size, 1 + max(hp.iterations, 1) * hp.train_batch_tokens)
    check_data(hp, stream, "train", sp, luts)
    return stream


class Split(NamedTuple):
    """Tokens to be scored, and the bytes that they stand for."""

    stream: TokenStream
    luts: ByteTables


def open_validation(hp, sp, luts: ByteTables) -> Split:
    stream = TokenStream(hp.data_path, "val")
    if not stream.count_windows(hp.train_seq_len):
        needed = f"less than a window of {hp.shown('train_seq_len')} and the token before it"
        raise InputError(f"{stream.files[0]}: the split has {stream.total} tokens, {needed}")
    stream.measure(hp.vocab_size, luts=luts)
    check_data(hp, stream, "val", sp, luts)
    return Split(stream, luts)


# ---- Noise and loss weights
#
# The reported bound is exact whatever the model was trained on, so training noise is a free choice,
# made in four tables. One generator for each (seed, step) draws that of the global batch.


def stratified_times(u):
    """One time in each of B equal strata, all at the same place in it (Sahoo et al. 2024),
    dealt out so that neighbouring rows are spread evenly too."""
    strata = ranks(golden_sequence(torch.arange(len(u), device=u.device)))
    return (strata + u[0]) / len(u)


def antithetic_times(u):
    """Pairs u, 1 − u."""
    return torch.stack([u, 1 - u], dim=1).flatten()[: len(u)]


# Uniform draws (B,) → mask times (B,) in [0, 1]
TIME_SAMPLINGS = {
    "stratified": stratified_times,
    "antithetic": antithetic_times,
    "uniform": lambda u: u,
}


def normal_probability(hp, t):
    quantile = hp.mask_mean + hp.mask_std * torch.special.ndtri(t)
    return quantile.clamp(hp.mask_eps, hp.mask_max)


# Times (B,) → mask probabilities (B,) in [MASK_EPS, MASK_MAX]: quantile functions, so they grow
MASK_DISTS = {
    "uniform": lambda hp, t: hp.mask_eps + (hp.mask_max - hp.mask_eps) * t,
    "normal": normal_probability,
}


def mask_probability(hp, u):
    """(B,) for the tokens of a row, from uniform draws u (B,)."""
    return MASK_DISTS[hp.mask_dist](hp, TIME_SAMPLINGS[hp.time_sampling](u))


def maskable(hp, x):
    """(B, L) bool: all of x (B, L) but PAD and, with ANCHOR_BOS, <s>."""
    not_pad = x != hp.pad_id
    return not_pad & (x != BOS_ID) if hp.anchor_bos else not_pad


def bernoulli_mask(probability, keys, allowed) -> tuple[Tensor, Tensor]:
    return keys < probability[:, None], probability


def count_mask(probability, keys, allowed) -> tuple[Tensor, Tensor]:
    count = allowed.sum(1).clamp(min=1)
    k = (probability * count).ceil().clamp(min=1)
    return ranks(torch.where(allowed, keys, 2)) < k[:, None], k / count


class Masking(NamedTuple):
    """How rows are masked, given a probability (B,) for each.

    `mask`: (probability, keys (B, L), allowed (B, L)) → mask (B, L), of which only the allowed part
    counts, and the share of allowed (B,) that is masked, or its mean.
    `slack`: (rows, L) → how many more tokens than L · Σ probability a mask may have.
    """

    mask: Callable
    slack: Callable


MASKINGS = {
    # More than 4·sqrt(N) too many of N independent tokens have a probability of e^-32.
    "bernoulli": Masking(bernoulli_mask, slack=lambda rows, length: 4 * math.sqrt(rows * length)),
    # A count is rounded up by less than 1.
    "count": Masking(count_mask, slack=lambda rows, length: rows),
}


def elbo_weight(hp, probability, share):
    """For uniform probabilities the loss is then the any-order bound."""
    return 1 / share


def dsigma_weight(hp, probability, share):
    """PR 1106's σ′(t): the fewer tokens are visible, the more a masked one counts. No bound."""
    return (hp.mask_max - hp.mask_eps) / (1 - probability)


# Probability (B,) that was drawn, share (B,) that was masked → weight (B,) of a masked token
LOSS_WEIGHTS = {
    "elbo": elbo_weight,
    "dsigma": dsigma_weight,
    "flat": lambda hp, probability, share: torch.ones_like(probability),
}


def draw_noise(hp, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | slice]:
    """Mask probabilities (B·n,), keys (B, n·b) and columns (n·b,) of the n noisy blocks of b tokens
    in each window of a global batch; columns are the same in all, without blocks a slice."""
    draw = functools.partial(torch.rand, generator=generator, device=generator.device)
    length, blocks = hp.noise_length, hp.noisy_blocks
    probability = mask_probability(hp, draw(hp.noise_rows))
    keys = draw(hp.batch_rows, blocks * length)
    if not hp.block_size:
        return probability, keys, slice(None)
    chosen = draw(hp.train_seq_len // length).topk(blocks).indices.sort().values
    columns = chosen[:, None] * length + torch.arange(length, device=chosen.device)
    return probability, keys, columns.flatten()


def apply_noise(hp, x0, probability, keys) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (B, L), weight (B,) of its tokens, and masked share (B,), of x0 (B, L)."""
    allowed = maskable(hp, x0)
    mask, share = MASKINGS[hp.masking].mask(probability, keys, allowed)
    weight = LOSS_WEIGHTS[hp.loss_weight](hp, probability, share)
    return mask & allowed, weight.clamp(max=hp.weight_clamp), share


def scored_capacity(hp, rows: int) -> int:
    """The most positions that are scored in a micro-batch of `rows` rows: a static shape. Most are
    masked if every draw is 1, or, for pairs t and 1 − t, 0 or ½; `Trainer.check` notices more."""
    length = hp.noise_length
    rows *= hp.noisy_blocks
    tokens = rows * length
    if hp.causal:
        return tokens
    draws = (torch.full((hp.noise_rows,), u) for u in (0.0, 0.5, 1.0))
    most = max(mask_probability(hp, u).view(-1, rows).sum(1).max().item() for u in draws)
    slack = MASKINGS[hp.masking].slack(rows, length)
    if hp.time_sampling == "antithetic" and rows % 2:  # a row may lack its other half
        slack += length
    return min(tokens, 128 * math.ceil((most * length + slack) / 128))  # whole tiles of a product


# ---- Model
#
# Parameters are float32, and cast to the dtype of the activations where they are used. The last MLP
# and the head are computed at scored positions only.

NORM_EPS = torch.finfo(torch.float32).eps
COND_DIM = 128  # width of the noise condition of the DiT, as published
Positions = Tensor | None  # flat positions (N,) of a batch that are wanted; None: all


def norm(x):
    """RMS normalisation of the last axis."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


class View(NamedTuple):
    """Where L positions are, and what they see."""

    rotary: tuple[Tensor, Tensor]  # of their places in the text
    neighbors: Tensor  # (offsets, L): columns of their tokens; −1: none
    causal: bool = False  # only what is to the left
    mask: Tensor | None = None  # (N, L) bool: what the first N see; no other sees these
    tiles: BlockMask | None = None  # the same for `flex_attention`, which leaves out empty ones


def neighbor_places(hp, place):
    """(offsets, L) of places (L,)."""
    rows = [place[None] + offset for offset in hp.neighbor_offsets]
    return torch.cat([place[None][:0], *rows])


def rotary_table(hp, place) -> tuple[Tensor, Tensor]:
    """What `rotate` needs at places (L,): (L, 1, head_dim) each."""
    exponent = torch.arange(0, hp.head_dim, 2, dtype=torch.float32, device=place.device)
    angle = torch.outer(place.float(), hp.rope_base ** -(exponent / hp.head_dim))[:, None]
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin(), -angle.sin()], -1)


def plain_view(hp, length: int, causal: bool, device: torch.device) -> View:
    """Of a row of tokens that see one another or, if causal, those to their left."""
    place = torch.arange(length, device=device)
    wanted = neighbor_places(hp, place)
    seen = (wanted >= 0) & (wanted <= (place if causal else length - 1))
    return View(rotary_table(hp, place), torch.where(seen, wanted, -1), causal=causal)


def block_view(hp, block: int, columns, length: int) -> View:
    """Of [for each noisy block, whose tokens are at `columns` of a window, the token before it and
    its tokens; clean x_0 … x_{L−1}] for x_0, which is before the window. Each predicts the next.

    A noisy one sees its own block, and the clean tokens before that; a clean one itself and the
    clean ones before it. Neighbours are what is seen.
    """
    clean = torch.arange(length, device=columns.device)
    first = columns[::block].repeat_interleave(block + 1)  # place before a noisy one's block
    mask = torch.cat([first[:, None] == first, first[:, None] > clean], dim=1)
    index = torch.arange(mask.shape[1], device=columns.device)
    place = torch.cat([first + index[: len(first)] % (block + 1), clean])
    end = torch.cat([first, clean + 1])  # of the clean ones it sees
    wanted = neighbor_places(hp, place)
    in_block = (index < len(first)) & (wanted >= end) & (wanted <= end + block)
    in_clean = torch.where((wanted >= 0) & (wanted < end), len(first) + wanted, -1)
    neighbors = torch.where(in_block, wanted + index - place, in_clean)
    return View(rotary_table(hp, place), neighbors, causal=True, mask=mask)


def attend(q, k, v, view: View):
    """(B, H, L, head_dim) of queries like it, and keys and values with fewer heads."""
    if view.mask is None:
        options = dict(is_causal=view.causal, enable_gqa=k.shape[1] < q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, **options)
    noisy = len(view.mask)
    others = attend(*(x[:, :, noisy:] for x in (q, k, v)), view._replace(mask=None))
    q = q[:, :, :noisy]
    if view.tiles is not None:  # it may lack the kernel it would choose
        options = dict(FORCE_USE_FLEX_ATTENTION=True)
        y = flex_attention(q, k, v, None, view.tiles, enable_gqa=True, kernel_options=options)
    else:  # fast kernels with masks know no groups
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask)
    return torch.cat([y, others], dim=2)


def rotate(x, cos, sin):
    """Half-split rotary embedding of x (…, L, heads, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def select_positions(x, positions: Positions):
    """x (B, L, D) at the flat positions, (N, D); for None all of x."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)


# Some CPUs multiply in bfloat16 twice as fast. What is scored is never rounded.
FAST_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def multiply(x, weight):
    """(…, C) → (…, R) by weight (R, C), in the dtype of x; in training on CPUs in bfloat16."""
    rounded = FAST_BFLOAT16 and not x.is_cuda and x.shape[-1] >= 64 and torch.is_grad_enabled()
    dtype = torch.bfloat16 if rounded else x.dtype
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


class Linear(nn.Linear):
    """A matrix, kept in float32 and applied in the dtype of its input."""

    def forward(self, x, *beside: Linear, scale: Tensor | None = None):
        """(…, C) → (…, R): of this matrix, times `scale` (R,), then of those beside it."""
        weight = self.weight if scale is None else scale[:, None] * self.weight
        if beside:
            weight = torch.cat([weight, *(matrix.weight for matrix in beside)])
        return multiply(x, weight)


class Attention(nn.Module):
    """Grouped-query attention with normalised and rotated queries and keys."""

    def __init__(self, hp):
        super().__init__()
        self.head_dim = hp.head_dim
        self.kv_heads = hp.num_kv_heads
        kv_dim = hp.num_kv_heads * hp.head_dim
        self.c_q = Linear(hp.model_dim, hp.model_dim, bias=False)
        self.c_k = Linear(hp.model_dim, kv_dim, bias=False)
        self.c_v = Linear(hp.model_dim, kv_dim, bias=False)
        self.proj = Linear(hp.model_dim, hp.model_dim, bias=False)
        self.q_gain = None  # (H,) in a UNetBlock

    def forward(self, x, view: View, positions: Positions, scale: Tensor | None = None):
        """(B, L, D) → (B, L, D), or (N, D) at the positions; `scale` (D,) of the outputs."""
        projected = self.c_q(x, self.c_k, self.c_v).unflatten(-1, (-1, self.head_dim))
        q_and_k, v = projected.tensor_split([-self.kv_heads], dim=2)
        q, k = rotate(norm(q_and_k), *view.rotary).tensor_split([-self.kv_heads], dim=2)
        if self.q_gain is not None:
            q = q * self.q_gain.to(x.dtype)[:, None]
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)), view).transpose(1, 2).flatten(2)
        return self.proj(select_positions(y, positions), scale=scale)


class MLP(nn.Module):
    """ReLU² between two matrices."""

    def __init__(self, hp):
        super().__init__()
        self.fc = Linear(hp.model_dim, hp.mlp_mult * hp.model_dim, bias=False)
        self.proj = Linear(hp.mlp_mult * hp.model_dim, hp.model_dim, bias=False)

    def forward(self, x, scale: Tensor | None = None):
        return self.proj(F.relu(self.fc(x)).square(), scale=scale)


class UNetBlock(nn.Module):
    """A block of the challenge's trunk: it can mix the embedding in again."""

    def __init__(self, hp):
        super().__init__()
        self.attn = Attention(hp)
        self.attn.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init))
        self.mlp = MLP(hp)
        self.attn_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.resid_mix = nn.Parameter(torch.ones(2, hp.model_dim))
        for starts_at_zero in (self.resid_mix[1], self.attn.proj.weight, self.mlp.proj.weight):
            nn.init.zeros_(starts_at_zero)

    def forward(self, x, x_emb, view: View, positions: Positions):
        """(B, L, D) → (B, L, D), or (N, D) at the positions; attention sees all of x."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x_emb
        kept = select_positions(x, positions)
        x = kept + self.attn(norm(x), view, positions, self.attn_scale)
        return x + self.mlp(norm(x), self.mlp_scale)


class DiTBlock(nn.Module):
    """A pre-norm block, its norms scaled and shifted by the noise: adaLN, no gates."""

    def __init__(self, hp):
        super().__init__()
        self.attn = Attention(hp)
        self.mlp = MLP(hp)
        self.attn_mod = nn.Linear(COND_DIM, 2 * hp.model_dim)
        self.mlp_mod = nn.Linear(COND_DIM, 2 * hp.model_dim)

    def forward(self, x, cond, view: View, positions: Positions):
        """As UNetBlock, with the noise (B, COND_DIM) in place of the embedding."""
        attn_mod = self.attn_mod(cond)[:, None]  # (B, 1, 2D): scale, then shift
        mlp_mod = self.mlp_mod(cond)[:, None]
        if positions is not None:  # selected in float32, so that its gradients add up in float32
            mlp_mod = mlp_mod[positions // x.shape[1], 0]
        scale, shift = attn_mod.to(x.dtype).chunk(2, -1)
        kept = select_positions(x, positions)
        x = kept + self.attn(norm(x) * (1 + scale) + shift, view, positions)
        scale, shift = mlp_mod.to(x.dtype).chunk(2, -1)
        return x + self.mlp(norm(x) * (1 + scale) + shift)


class Model(nn.Module):
    """Embedding, neighbours and output head. A backbone adds `build_trunk(hp)`, its blocks, and
    `trunk(x, z, masked_fraction, view, positions)`, which takes z (B, L), embedded as x, through
    them."""

    told_noise = False  # whether `trunk` uses masked_fraction, which causal models have not
    normalize_embedding = False

    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        self.compute_dtype = torch.float32
        self.block_size = hp.block_size  # a score may have another one; hp keeps that of training
        std = hp.tied_embed_init_std if hp.tie_embeddings else 1.0
        shape = (hp.embedding_rows, hp.model_dim)
        self.tok_emb = nn.Embedding.from_pretrained(torch.randn(shape).mul_(std), freeze=False)
        self.build_trunk(hp)
        self.lm_head = None
        if not hp.tie_embeddings:
            self.lm_head = Linear(hp.model_dim, hp.vocab_size, bias=False)
        if offsets := len(hp.neighbor_offsets):
            zeros = torch.zeros(offsets * hp.embedding_rows, hp.neighbor_dim)
            self.near = nn.Embedding.from_pretrained(zeros, freeze=False)
            self.near_proj = Linear(offsets * hp.neighbor_dim, hp.model_dim, bias=False)

    def on(self, device: torch.device) -> Model:
        """Moves to the device; activations get the dtype of COMPUTE_DTYPE."""
        self.compute_dtype = getattr(torch, resolve_dtype(self.hp, device))
        return self.to(device)

    def embed(self, z, view: View):
        """(B, L, D): embeddings of tokens z and of their NEIGHBORS."""
        x = self.tok_emb(z)
        if self.normalize_embedding:
            x = norm(x)
        x = x.to(self.compute_dtype)
        if offsets := len(view.neighbors):
            tables = self.hp.embedding_rows * torch.arange(offsets, device=z.device)[:, None]
            near = self.near(z[:, view.neighbors] + tables) * (view.neighbors >= 0)[..., None]
            x = x + self.near_proj(near.transpose(1, 2).flatten(2).to(x.dtype))
        return x

    def hidden(
        self,
        z,
        masked_fraction: Tensor | None = None,
        positions: Positions = None,
        view: View | None = None,
    ):
        """Normalised last hidden state (B, L, D) of tokens z (B, L), or (N, D) at the positions.
        `masked_fraction` (B,) is what a DiT is told of the noise; by default the truth."""
        if view is None:
            view = plain_view(self.hp, z.shape[1], self.hp.causal, z.device)
        return self.states(z, masked_fraction, positions, view)

    def states(self, z, masked_fraction: Tensor | None, positions: Positions, view: View):
        """`hidden`, for the compiler: what a mask of `flex_attention` looks at has to come from
        outside of its graph."""
        x = self.embed(z, view)
        view = view._replace(rotary=[table.to(x.dtype) for table in view.rotary])
        mask = view.mask
        if mask is not None and z.is_cuda and torch.compiler.is_compiling():
            tiles = create_block_mask(
                lambda b, h, q, k: mask[q, k], None, None, *mask.shape, z.device
            )
            view = view._replace(tiles=tiles)
        return norm(self.trunk(x, z, masked_fraction, view, positions))

    def head(self, h):
        """Logits (…, V) float32 of hidden states (…, D)."""
        weight = (self.lm_head or self.tok_emb).weight[: self.hp.vocab_size]
        cap = self.hp.logit_softcap
        if not cap:
            return multiply(h, weight).float()
        half = multiply(h, weight * (2 / cap)).float().sigmoid()
        return 2 * cap * half - cap  # cap·tanh(logits/cap), which would take longer

    def forward(self, z, masked_fraction: Tensor | None = None):
        return self.head(self.hidden(z, masked_fraction))


class UNet(Model):
    """The challenge's trunk: the first half of the blocks feeds skips to the second half."""

    normalize_embedding = True

    def __init__(self, hp):
        super().__init__(hp)
        if self.lm_head:
            nn.init.zeros_(self.lm_head.weight)

    def build_trunk(self, hp):
        self.blocks = nn.ModuleList(UNetBlock(hp) for _ in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(hp.num_layers // 2, hp.model_dim))

    def trunk(self, x, z, masked_fraction: Tensor | None, view: View, positions: Positions):
        x_emb = x
        half = len(self.blocks) // 2
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = x + self.skip_weights[i - half].to(x.dtype) * skips.pop()
            x = block(x, x_emb, view, positions if block is self.blocks[-1] else None)
            if i < half:
                skips.append(x)
        return x


def noise_features(masked_fraction):
    """(B, COND_DIM): sines and cosines of σ = −ln(1 − masked_fraction) ≤ 6.9."""
    sigma = -(1 - masked_fraction).clamp(min=1e-3).log()
    half = torch.arange(COND_DIM // 2, dtype=torch.float32, device=sigma.device)
    angle = sigma[:, None] * 10_000 ** (-2 * half / COND_DIM)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class DiT(Model):
    """PR 1106's trunk: a plain stack of blocks, told how much of the row is masked."""

    told_noise = True

    def build_trunk(self, hp):
        self.blocks = nn.ModuleList(DiTBlock(hp) for _ in range(hp.num_layers))
        self.time_embed = nn.Sequential(
            nn.Linear(COND_DIM, 4 * COND_DIM), nn.SiLU(), nn.Linear(4 * COND_DIM, COND_DIM)
        )

    def trunk(self, x, z, masked_fraction: Tensor | None, view: View, positions: Positions):
        if masked_fraction is None:
            masked = (z == self.hp.mask_id).sum(1)
            masked_fraction = masked / maskable(self.hp, z).sum(1).clamp(min=1)
        cond = F.silu(self.time_embed(noise_features(masked_fraction)))
        for block in self.blocks:
            x = block(x, cond, view, positions if block is self.blocks[-1] else None)
        return x


BACKBONES = {"unet": UNet, "dit": DiT}


def resolve_dtype(hp, device: torch.device) -> str:
    if hp.compute_dtype != "auto":
        return hp.compute_dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def compiled(function: Callable, hp, device: torch.device, **options) -> Callable:
    """By torch.compile, if COMPILE says so."""
    if hp.compile == "on" or (hp.compile == "auto" and device.type == "cuda"):
        return torch.compile(function, **options)
    return function


def build_model(hp) -> Model:
    """A new float32 model on the CPU; its weights depend on hp.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hp.seed)
        return BACKBONES[hp.backbone](hp)


def outline_model(hp) -> Model:
    """The same names and shapes without memory."""
    with torch.device("meta"):
        return BACKBONES[hp.backbone](hp)


class Kind(NamedTuple):
    """How a kind of parameter is trained and stored."""

    name: str
    pattern: str  # of its parameters' names
    lr: str  # the knob that is its learning rate
    optimizer: str = "adamw"  # or muon, if OPTIMIZER is
    decays: bool = False  # even with WEIGHT_DECAY_ON=matrices
    storage: str = ""  # unless QUANT_MODE names the kind; empty: that of all


BLOCK_MATRICES = r"(blocks\.\d+\.(attn|mlp)(_mod|\.\w+)|time_embed\.\d|near_proj)\.weight"
GAINS = r".*(q_gain|attn_scale|mlp_scale|resid_mix|skip_weights|\.bias)"
KINDS = (
    Kind("matrix", BLOCK_MATRICES, "matrix_lr", optimizer="muon", decays=True),
    Kind("embed", r"tok_emb\.weight", "embed_lr"),
    Kind("near", r"near\.weight", "embed_lr"),
    Kind("head", r"lm_head\.weight", "head_lr", decays=True),
    Kind("gain", GAINS, "scalar_lr", storage="fp16"),
)


def kind_of(name: str) -> Kind:
    for kind in KINDS:
        if re.fullmatch(kind.pattern, name):
            return kind
    raise InputError(f"parameter {name} fits no pattern in the table KINDS")


def by_kind(model) -> dict[Kind, dict[str, nn.Parameter]]:
    """The parameters by kind and name, in the order of an artifact."""
    groups = {kind: {} for kind in KINDS}
    for name, parameter in sorted(model.named_parameters()):
        groups[kind_of(name)][name] = parameter
    return {kind: named for kind, named in groups.items() if named}


# ---- Batch and loss
#
# Shapes are static, so that the compiled loss is one graph: scored positions are gathered into N
# places, and those left over have weight 0.


class Batch(NamedTuple):
    """One micro-batch, with static shapes."""

    z: Tensor  # (B, L) int64, what the model sees
    positions: Positions  # (N,) int64, scored positions of the flattened batch
    targets: Tensor  # (N,) int64, true tokens
    weights: Tensor  # (N,) float32, of their nll; 0 fills up to N
    tokens: Tensor  # () int64, all that are not PAD
    dropped: Tensor  # () int64, masked tokens that found no place; has to be 0
    masked_fraction: Tensor | None = None  # (rows of the noise,) float32; None if causal
    view: View | None = None  # of z; None: of a plain row


def compact(mask, capacity: int) -> tuple[Tensor, Tensor]:
    """Flat indices (N,) of N = `capacity` elements of `mask`, True first; their values."""
    positions = (~mask.flatten()).byte().argsort(stable=True)[:capacity]
    return positions, mask.flatten()[positions]


def scattered(hp, stream: TokenStream, numbers: range) -> list[int]:
    """`numbers` as windows all over the text that ITERATIONS steps read, each once an epoch."""
    reached = min(stream.total, hp.iterations * hp.train_batch_tokens)
    count = max(reached // hp.train_seq_len, 1)
    hop = next(n for n in itertools.count(round(GOLDEN * count)) if math.gcd(n, count) == 1)
    return [number * hop % count for number in numbers]


def training_batch(
    hp, stream: TokenStream, step: int, rows: range, capacity: int, device: torch.device
) -> Batch:
    """Rows `rows` of the global batch of `step`."""
    first = step * hp.batch_rows
    numbers = range(first + rows.start, first + rows.stop)
    if hp.shuffle and not hp.doc_chunks:
        numbers = scattered(hp, stream, numbers)
    window = stream.windows(numbers, hp.train_seq_len)
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    if hp.causal:
        batch = causal_batch(window)
    else:
        probability, keys, columns = draw_noise(hp, seeded(device, hp.seed, "train", step))
        own = slice(rows.start, rows.stop)
        probability = probability.view(hp.batch_rows, -1)[own].flatten()
        batch = masked_batch(hp, window[:, 1:][:, columns], probability, keys[own], capacity)
    if hp.block_size:
        return with_clean_half(hp, batch, columns, window)
    view = plain_view(hp, hp.train_seq_len, hp.causal, device)  # outside of the compiled graph
    return batch._replace(view=view)


def causal_batch(window) -> Batch:
    """Every token of window (B, 1 + L) but the first, given those before it."""
    targets = window[:, 1:].flatten()
    return Batch(
        z=window[:, :-1],
        positions=None,
        targets=targets,
        weights=torch.ones(len(targets), device=window.device),
        tokens=window.new_full((), len(targets)),
        dropped=window.new_zeros(()),
    )


def masked_batch(hp, x0, probability, keys, capacity: int) -> Batch:
    """The tokens of x0 (B, L) that the noise hides, given the others."""
    blocks, keys = x0.reshape(-1, hp.noise_length), keys.view(-1, hp.noise_length)
    mask, weight, share = apply_noise(hp, blocks, probability, keys)
    mask = mask.view(x0.shape)
    positions, used = compact(mask, capacity)
    return Batch(
        z=torch.where(mask, hp.mask_id, x0),
        positions=positions,
        targets=torch.where(used, x0.flatten()[positions], 0),
        weights=torch.where(used, weight[positions // hp.noise_length], 0),
        tokens=(x0 != hp.pad_id).sum(),
        dropped=mask.sum() - used.sum(),
        masked_fraction=share,
    )


def with_clean_half(hp, batch: Batch, columns, window) -> Batch:
    """Adds what `causal_batch` predicts: every token, given the clean ones before it."""
    clean = causal_batch(window)
    z, positions, view = beside_clean(hp, hp.block_size, batch.z, batch.positions, window, columns)
    places = torch.arange(z.numel(), device=z.device).view(z.shape)
    return batch._replace(
        z=z,
        view=view,
        positions=torch.cat([positions, places[:, -hp.train_seq_len :].flatten()]),
        targets=torch.cat([batch.targets, clean.targets]),
        weights=torch.cat([batch.weights, hp.causal_weight * clean.weights]),
        tokens=clean.tokens,
    )


def beside_clean(
    hp, block: int, z, positions, window, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, View]:
    """The input of a block model for noisy blocks z (B, n) at these columns, by default all, of
    window (B, 1 + L); the positions (N,) in it that predict those of z; and its view."""
    if columns is None:
        columns = torch.arange(z.shape[1], device=z.device)
    clean, before = window[:, :-1], window[:, columns[::block]]
    noisy = torch.cat([before[..., None], z.unflatten(1, (-1, block))], dim=2).flatten(1)
    both = torch.cat([noisy, clean], dim=1)
    row, column = positions // z.shape[1], positions % z.shape[1]
    at = row * both.shape[1] + column // block + column
    return both, at, block_view(hp, block, columns, clean.shape[1])


def batch_hidden(model, batch: Batch):
    """Hidden states at the scored positions: (N, D), or (B, L, D)."""
    return model.hidden(batch.z, batch.masked_fraction, batch.positions, batch.view)


def batch_loss(model, batch: Batch):
    """Σ weight · nll in nats; a step divides it by the tokens of the global batch."""
    logits = model.head(batch_hidden(model, batch)).flatten(0, -2)
    nll = F.cross_entropy(logits, batch.targets, reduction="none")
    return (nll * batch.weights).sum()


# ---- Optimizer and average
#
# Weights, gradients and moments are flat buffers of which the parameters are views: a step is a few
# large operations and collectives. Nothing here waits for the device: what was not finite is
# noted there until `Trainer.check` looks.


def orthogonalize(matrices, steps: int):
    """Pushes the singular values of matrices (n, rows, cols) into about [0.7, 1.2]: the
    quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    if x.is_cuda or (x.shape[-2] >= 64 and FAST_BFLOAT16):
        x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_shared(matrices, steps: int):
    """Each process orthogonalizes its share of the n matrices, all get the whole."""
    share = ceil_div(len(matrices), world_size())
    own = orthogonalize(matrices[rank() * share :][:share], steps)
    own = F.pad(own, (0, 0, 0, 0, 0, share - len(own))).contiguous()
    whole = torch.cat([own] * world_size())
    run_collective(dist.all_gather_into_tensor, whole, own)
    return whole[: len(matrices)]


def learning_rate(hp, kind: Kind) -> float:
    """All but that of matrices follow the square root of the batch (Malladi et al. 2022)."""
    knob_name = "tied_embed_lr" if kind.name == "embed" and hp.tie_embeddings else kind.lr
    rate = getattr(hp, knob_name)
    if kind.optimizer == "adamw" and hp.adam_batch_tokens:
        rate *= (hp.train_batch_tokens / hp.adam_batch_tokens) ** 0.5
    return rate


class StepSettings(NamedTuple):
    """Scalars of a step, on the device; 0, 1, 1, 1 let it move nothing."""

    scale: Tensor  # of the learning rates
    momentum: Tensor  # of Muon
    beta1: Tensor  # of AdamW
    beta2: Tensor
    steps_taken: Tensor  # at least 1


class ParameterGroup(NamedTuple):
    """Views of the flat buffers: for Muon n matrices (n, R, C), for AdamW all of a kind, flat."""

    name: str
    muon: bool
    lr: float
    weight_decay: float
    grads: Tensor
    weights: Tensor
    first: Tensor  # moment
    second: Tensor  # moment, of AdamW only

    def muon_update(self, hp, now: StepSettings):
        torch.addcmul(self.grads, self.first, now.momentum, out=self.first)
        nesterov = self.grads.addcmul(self.first, now.momentum)
        return orthogonalize_shared(nesterov, hp.muon_backend_steps)

    def adamw_update(self, hp, now: StepSettings):
        self.first.lerp_(self.grads, 1 - now.beta1)
        self.second.lerp_(self.grads.square(), 1 - now.beta2)
        mean = self.first / (1 - hp.beta1**now.steps_taken)
        square = self.second / (1 - hp.beta2**now.steps_taken)
        return mean / (square.sqrt() + hp.adam_eps)

    def step(self, hp, now: StepSettings):
        update = self.muon_update(hp, now) if self.muon else self.adamw_update(hp, now)
        rate = self.lr * now.scale
        self.weights.mul_(1 - self.weight_decay * rate)
        if self.muon:
            rows, columns = update.shape[-2:]
            rate *= max(1.0, rows / columns) ** 0.5
        self.weights.addcmul_(update, rate, value=-1)


class Optimizer:
    """Muon and AdamW over flat buffers, and the average of the weights."""

    def __init__(self, model, hp):
        self.hp = hp
        self.averages = 0  # updates of the average

        by_key = {}  # names and parameters by kind and, for Muon, shape
        for name, parameter in model.named_parameters():
            kind = kind_of(name)
            shape = tuple(parameter.shape) if kind.optimizer == hp.optimizer == "muon" else ()
            by_key.setdefault((KINDS.index(kind), shape), {})[name] = parameter
        grouped = sorted(by_key.items())
        sizes = [sum(parameter.numel() for parameter in named.values()) for _, named in grouped]
        aligned = (64 * ceil_div(size, 64) for size in sizes)
        *begins, total = itertools.accumulate(aligned, initial=0)
        device = next(model.parameters()).device

        self.state = torch.zeros(4, total, device=device)  # weights, moments, average
        self.weights = self.state[0]
        self.average = self.state[3]
        self.grads = torch.zeros(total + 3, device=device)
        self.sums = self.grads[total:]  # tokens, loss, dropped tokens; all-reduced with the rest
        self.counts = torch.zeros(2, device=device)  # steps that were taken, and that were skipped
        self.dropped = torch.zeros((), device=device)
        self.groups = [
            self._make_group(KINDS[index], shape, named, slice(begin, begin + size))
            for ((index, shape), named), begin, size in zip(grouped, begins, sizes, strict=True)
        ]
        # The first step that was not finite since the last check: its number, norms and loss
        self.first_bad = torch.zeros(2 + len(self.groups), device=device)

    def _make_group(
        self, kind: Kind, shape: tuple, named: dict[str, nn.Parameter], place: slice
    ) -> ParameterGroup:
        """Moves parameters and gradients to their place in the flat buffers."""
        hp = self.hp
        grads = self.grads[place]
        weights, first, second = self.state[:3, place]
        counts = [parameter.numel() for parameter in named.values()]
        views = zip(named.values(), weights.split(counts), grads.split(counts), strict=True)
        for parameter, weight, grad in views:
            weight.copy_(parameter.detach().flatten())
            parameter.data = weight.view(parameter.shape)
            parameter.grad = grad.view(parameter.shape)
        whole = (len(named), *shape) if shape else grads.shape
        return ParameterGroup(
            name=f"{kind.name} ({next(iter(named))}, …)",
            muon=bool(shape),
            lr=learning_rate(hp, kind),
            weight_decay=hp.weight_decay if kind.decays or hp.weight_decay_on == "all" else 0.0,
            grads=grads.view(whole),
            weights=weights.view(whole),
            first=first.view(whole),
            second=second.view(whole),
        )

    def step(self, step: int, lr_scale: float):
        """Adds up loss and gradients of all processes, clips them and moves the weights, or nothing
        if they are not finite: see `first_bad`. Returns the loss per token."""
        hp = self.hp
        all_reduce(self.grads)
        tokens, loss, dropped = self.sums
        self.dropped += dropped
        factor = 1 / tokens.clamp(min=1)
        norms = torch.stack([*(group.grads.norm() for group in self.groups), loss]) * factor
        finite = norms.isfinite().all()
        self.counts += torch.stack([finite, ~finite])
        this_step = torch.cat([self.counts.sum()[None], norms])
        keep = finite | (self.first_bad[0] > 0)
        self.first_bad.copy_(torch.where(keep, self.first_bad, this_step))
        if hp.grad_clip_norm > 0:
            factor *= (hp.grad_clip_norm / (norms[:-1].norm() + 1e-6)).clamp(max=1.0)
        self.grads.mul_(factor).masked_fill_(~finite, 0.0)
        now = StepSettings(
            scale=torch.where(finite, lr_scale, 0.0),
            momentum=torch.where(finite, muon_momentum(hp, step), 1.0),
            beta1=torch.where(finite, hp.beta1, 1.0),
            beta2=torch.where(finite, hp.beta2, 1.0),
            steps_taken=self.counts[0].clamp(min=1),
        )
        for group in self.groups:
            group.step(hp, now)
        self.grads.zero_()
        return norms[-1]

    def update_average(self):
        """Begins with the weights; then d · average + (1 − d) · weights for d = EMA_DECAY."""
        self.average.lerp_(self.weights, 1 - self.hp.ema_decay if self.averages else 1.0)
        self.averages += 1

    def swap_average(self):
        """Exchanges the weights with their average; a second call restores both."""
        if self.averages:
            self.state[[0, 3]] = self.state[[3, 0]]


def muon_momentum(hp, step: int) -> float:
    steps = hp.muon_momentum_warmup_steps
    share = min(step / steps, 1.0) if steps else 1.0
    return (1 - share) * hp.muon_momentum_warmup_start + share * hp.muon_momentum


# ---- Quantizing and packing
#
# Common codes become short, so rare ones may be large: what counts is the step of the grid, and
# rounding so that errors cancel (docs/artifact.md).


class Quantizer(NamedTuple):
    """Codes up to ±`largest`, times a scale for each row if there is a dtype for it."""

    dtype: torch.dtype
    largest: float
    scale: torch.dtype | None


QUANTIZERS = {
    "fp8": Quantizer(torch.float8_e4m3fn, 448.0, None),
    "fp8_row": Quantizer(torch.float8_e4m3fn, 448.0, torch.float32),
    **{f"int{n}": Quantizer(torch.int8, 2.0 ** (n - 1) - 1, torch.bfloat16) for n in range(4, 9)},
    "fp16": Quantizer(torch.float16, 65_504.0, None),
    "fp32": Quantizer(torch.float32, 3e38, None),
}


def to_codes(x, quantizer: Quantizer):
    """The nearest codes. They saturate, so e4m3 never becomes NaN."""
    x = x.clamp(-quantizer.largest, quantizer.largest)
    if quantizer.dtype == torch.int8:
        x = x.round()
    return x.to(quantizer.dtype)


def row_scales(rows, quantizer: Quantizer, clip: float):
    """Scales (R, 1) of rows (R, C): the largest code stands for clip · RMS of the row; for clip 0,
    the one of 40 ever smaller scales with the least squared error."""
    reach = rows.abs().amax(1, keepdim=True)
    if clip:
        reach = clip * rows.square().mean(1, keepdim=True).sqrt()
    best = torch.zeros_like(reach)
    least = torch.full_like(reach, math.inf)
    for n in range(1 if clip else 40):
        scale = (0.96**n * reach / quantizer.largest).clamp(1e-30, 1e30)
        scale = scale.to(quantizer.scale).float()
        rounded = to_codes(rows / scale, quantizer).float() * scale
        error = (rounded - rows).square().sum(1, keepdim=True)
        best = scale.where(error < least, best)
        least = error.minimum(least)
    return best


def feed_back(rows, scales, quantizer: Quantizer, moments):
    """Codes (R, C) of rows (R, C), rounded column by column, largest inputs first: later ones make
    up for the error of each, given `moments` Σ x xᵀ (C, C) of the inputs x (GPTQ, Frantar 2022)."""
    order = moments.diagonal().argsort(descending=True)
    damped = moments[order][:, order].double()
    damped.diagonal().add_(0.01 * moments.diagonal().mean() + 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rest = rows[:, order]
    scales = scales[:, 0]
    codes = torch.empty_like(rows, dtype=quantizer.dtype)
    for i, column in enumerate(order.tolist()):
        codes[:, column] = to_codes(rest[:, i] / scales, quantizer)
        lost = (rest[:, i] - codes[:, column].float() * scales) / upper[i, i]
        rest[:, i:].addr_(lost, upper[i, i:], alpha=-1)
    return codes


def quantize(
    weights, quantizer: Quantizer, clip: float, moments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales (R, 1) of weights (…, C): the nearest codes, or with moments (C, C)
    of the inputs those that change the outputs least."""
    rows = weights.detach().float().view(-1, weights.shape[-1])
    scales = rows.new_ones(len(rows), 1)
    if quantizer.scale:
        scales = row_scales(rows, quantizer, clip)
    if moments is None:
        codes = to_codes(rows / scales, quantizer)
    else:
        codes = feed_back(rows, scales, quantizer, moments)
    return codes, scales.to(quantizer.scale or scales.dtype)


@torch.no_grad()
def input_moments(model, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Σ x xᵀ (C, C) of the inputs x of each matrix (…, C), by name, over all processes."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    moments = {}

    def add(module: nn.Module, inputs: Sequence):
        x = inputs[0].flatten(0, -2).float()
        moment = x.T @ x
        for matrix in (module, *inputs[1:]):  # those beside it
            name = names[matrix]
            moments[name] = moments.get(name, 0) + moment

    matrices = (module for module in names if isinstance(module, nn.Linear))
    hooks = [module.register_forward_pre_hook(add) for module in matrices]
    for batch in batches:
        hidden = batch_hidden(model, batch)
        if model.lm_head:  # a tied one is an input too
            add(model.lm_head, [hidden])
    for hook in hooks:
        hook.remove()
    return {name: all_reduce(moment) for name, moment in moments.items()}


def deflate(raw: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    compressor = zlib.compressobj(9, memLevel=9, strategy=strategy)
    return compressor.compress(raw) + compressor.flush()


def inflate(packed: bytes, limit: int) -> bytes:
    return zlib.decompressobj().decompress(packed, limit)


def unlzma(packed: bytes, limit: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 24)  # preset 6 needs less
    return decompressor.decompress(packed, limit)


def unzstd(packed: bytes, limit: int) -> bytes:
    most = max(2 * limit, 1024)  # bytes that the file can ask for
    return zstandard.ZstdDecompressor(max_window_size=most).stream_reader(packed).read(limit)


class Packer(NamedTuple):
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]  # at most `limit` bytes, however many there are


PACKERS = {
    "zlib": Packer(deflate, inflate),
    # without the search for repeats, which codes have by chance only
    "huffman": Packer(lambda raw: deflate(raw, zlib.Z_HUFFMAN_ONLY), inflate),
    "lzma": Packer(lambda raw: lzma.compress(raw, preset=6), unlzma),
    "zstd": Packer(lambda raw: zstandard.ZstdCompressor(level=22).compress(raw), unzstd),
}


def to_planes(tensors: Iterable[Tensor]) -> np.ndarray:
    """(bytes per element, elements) uint8: all first bytes, then all second bytes, …"""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    elements = flat.view(torch.uint8).view(-1, flat.element_size())
    return elements.numpy().T


def from_planes(raw: bytes, dtype: torch.dtype, count: int):
    """(count,) float32; ValueError if `raw` is not as long as that."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return torch.from_numpy(planes.T.copy()).view(-1).view(dtype).float()


def entropy_bits(planes: np.ndarray) -> float:
    """Zero-order entropy of the bytes, each plane by itself."""
    bits = 0.0
    for plane in planes:
        _, counts = np.unique(plane, return_counts=True)
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return bits


SAMPLE_BYTES = 1 << 20  # of a kind, to pick a packer


def pack_each(names: Sequence[str], raw: bytes) -> dict[str, bytes]:
    """By each of these packers, side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: PACKERS[name].pack(raw), names), strict=True))


def pack_kind(
    weights: Mapping[str, Tensor], storage: str, hp, moments: Mapping[str, Tensor] = {}
) -> tuple[bytes, dict]:
    """One kind of parameter, packed, and facts for the header and the log."""
    quantizer = QUANTIZERS[storage]
    coded = [
        quantize(weight, quantizer, hp.quant_clip, moments.get(name))
        for name, weight in weights.items()
    ]
    planes = [to_planes(codes for codes, _ in coded)]
    if quantizer.scale:
        planes.append(to_planes(scales for _, scales in coded))
    raw = b"".join(part.tobytes() for part in planes)
    names = [hp.pack]
    if hp.pack == "auto":
        names = [name for name in PACKERS if name != "zstd" or zstandard]
        if len(raw) > SAMPLE_BYTES:  # what cannot win would take a minute
            sample = pack_each(names, raw[:SAMPLE_BYTES])
            best = min(map(len, sample.values()))
            names = [name for name in names if len(sample[name]) <= 1.01 * best]
    packed = pack_each(names, raw)
    packer = min(packed, key=lambda name: len(packed[name]))
    facts = dict(
        storage=storage,
        packer=packer,
        bytes=len(packed[packer]),
        weights=planes[0].shape[1],
        entropy_bits=sum(map(entropy_bits, planes)),
        packed_bytes={name: len(blob) for name, blob in packed.items()},
    )
    return packed[packer], facts


def unpack_kind(packed: bytes, storage: str, packer: str, shapes: list[torch.Size]) -> list[Tensor]:
    """Float32 weights; ValueError unless they are finite and as many as the shapes say.
    Unpacks no more than that."""
    quantizer = QUANTIZERS[storage]
    sizes = [shape.numel() for shape in shapes]
    rows = [shape[:-1].numel() for shape in shapes] if quantizer.scale else []
    scale_dtype = quantizer.scale or torch.float32
    code_bytes = sum(sizes) * quantizer.dtype.itemsize
    scale_bytes = sum(rows) * scale_dtype.itemsize
    raw = memoryview(PACKERS[packer].unpack(packed, code_bytes + scale_bytes + 1))
    weights = from_planes(raw[:code_bytes], quantizer.dtype, sum(sizes))
    parts = weights.split(sizes)
    scales = from_planes(raw[code_bytes:], scale_dtype, sum(rows)).split(rows)
    for part, shape, scale in zip(parts, shapes, scales, strict=False):  # no scales: no rows
        part.view(-1, shape[-1]).mul_(scale[:, None])
    if not weights.isfinite().all():
        raise ValueError("weights that are not finite")
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# ---- Artifact
#
#     MAGIC · u32 length of the header · JSON header · every kind of parameter, packed · SHA-256
#
# Names and shapes follow from the hyperparameters in the header. Nothing in a file is executed. One
# with less than a bit for each weight is refused, so spaces fill it up.

ARTIFACT_MAGIC = b"MDLMgolf"
FORMAT_VERSION = 4
STORED = ["preset", *PREDICTOR]  # hyperparameters in an artifact


def least_bytes(weights: int) -> int:
    """Of the artifact of so many weights."""
    return max(weights - 2**16, 0) // 8


class Artifact(NamedTuple):
    model: Model
    hp: Hyperparameters
    label: str  # of `storage_label`


def storage_label(header: Mapping) -> str:
    """Of all kinds but gains, for example fp8+lzma."""
    entries = [entry for name, entry in header["kinds"].items() if name != "gain"]
    storages, packers, _ = zip(*entries, strict=True)
    return "+".join(sorted(set(storages)) + sorted(set(packers)))


def save_artifact(model, hp, path: str | Path, moments: Mapping[str, Tensor] = {}) -> dict:
    """Packs and writes the model; its artifact_bytes, label and kinds. `input_moments` let rounding
    errors cancel. InputError for what is not finite or not written."""
    for name, tensor in [*model.named_parameters(), *moments.items()]:
        if not tensor.isfinite().all():
            reason = f"{name} or its inputs are not finite; the run has diverged"
            raise InputError(f"{path}: not written, {reason}")
    packed, kinds = b"", {}
    for kind, named in by_kind(model).items():
        blob, kinds[kind.name] = pack_kind(named, hp.storages[kind.name], hp, moments)
        packed += blob
    header = dict(
        version=FORMAT_VERSION,
        hyperparameters={field: getattr(hp, field) for field in STORED},
        kinds={
            name: [facts["storage"], facts["packer"], facts["bytes"]]
            for name, facts in kinds.items()
        },
    )
    weights = sum(facts["weights"] for facts in kinds.values())
    text = json.dumps(header).ljust(least_bytes(weights) - len(packed)).encode()
    data = sealed(ARTIFACT_MAGIC + len(text).to_bytes(4, "little") + text + packed)
    write_file(Path(path), data)
    return dict(artifact_bytes=len(data), label=storage_label(header), kinds=kinds)


def unpack_artifact(data: bytes, path: str | Path) -> Artifact:
    """The model in an artifact; InputError, which names `path`, if it is not sound."""
    if data.startswith(ARTIFACT_MAGIC) and unsealed(data) is None:
        raise InputError(f"{path}: checksum mismatch, the artifact is damaged or truncated")
    try:
        return _unpack_sound(data)
    except InputError as error:
        reason = f": {error}"[:200]
    except Exception as error:  # decompressors, parser and model have errors of many kinds
        if is_lack_of_memory(error):
            raise
        reason = "" if zstandard else ", or packed with zstd: pip install -r requirements.txt"
    message = f"{path}: not an artifact of this version of train_mdlm.py{reason}"
    raise InputError(" ".join(message.split()))


def _require(holds: bool, otherwise: str):
    if not holds:
        raise InputError(otherwise)


def _unpack_sound(data: bytes) -> Artifact:
    """Any exception means that it is not."""
    _require(data.startswith(ARTIFACT_MAGIC), "it begins with something else")
    position = 12 + int.from_bytes(data[8:12], "little")
    header = json.loads(data[12:position])
    kinds, fields = header["kinds"], header["hyperparameters"]
    _require(header["version"] == FORMAT_VERSION, f"its format is version {header['version']}")
    hp = Hyperparameters(**fields)
    _require(list(fields) == STORED, "it has other hyperparameters")
    model = outline_model(hp)
    groups = by_kind(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    packed_bytes = sum(size for _, _, size in kinds.values())
    _require(list(kinds) == [kind.name for kind in groups], "it has other kinds of parameters")
    _require(position + packed_bytes == len(data) - DIGEST_BYTES, "its parts do not fill it")
    _require(len(data) >= least_bytes(weights), "it has less than a bit for each weight")
    state = {}
    for named, (storage, packer, size) in zip(groups.values(), kinds.values(), strict=True):
        shapes = [parameter.shape for parameter in named.values()]
        tensors = unpack_kind(data[position : position + size], storage, packer, shapes)
        state |= dict(zip(named, tensors, strict=True))
        position += size
    model.load_state_dict(state, assign=True)
    return Artifact(model, hp, storage_label(header))


def read_artifact(path: str | Path) -> Artifact:
    """All processes get what the first one reads; InputError if it is not sound."""
    return unpack_artifact(on_first_process(read_file, path), path)


def load_artifact(path: str | Path) -> tuple[Model, Hyperparameters]:
    """A model with the weights on disk, and its hyperparameters; or InputError."""
    return read_artifact(path)[:2]


def predicted_bytes(hp) -> int:
    """Code + artifact if all weights were normal, from 256 rows of each kind."""
    total = len(Path(__file__).read_bytes())
    for kind, named in by_kind(outline_model(hp)).items():
        columns = max(parameter.shape[-1] for parameter in named.values())
        sample = torch.randn(256, columns, generator=seeded("cpu", "predicted bytes"))
        _, facts = pack_kind({"": sample}, hp.storages[kind.name], hp)
        weights = sum(parameter.numel() for parameter in named.values())
        total += math.ceil(facts["bytes"] / sample.numel() * weights)
    return total


# ---- Scoring
#
# Bottom up: −ln p of tokens; masks and orders whose weighted sums are code lengths; the estimators;
# a whole split (docs/scores.md). Each window has random numbers of its own.


def hidden_within(
    model, z, positions, window, masked_fraction: Tensor | None = None, view: View | None = None
):
    """Hidden states (N, D) that predict flat positions of z (B, L). Without a `view`, a block model
    also sees the clean tokens of window (B, 1 + L) before each block."""
    if model.block_size and not view:
        z, positions, view = beside_clean(model.hp, model.block_size, z, positions, window)
    return model.hidden(z, masked_fraction, positions, view)


@torch.no_grad()
def token_nll(
    model, z, window, scored, masked_fraction: Tensor | None = None, view: View | None = None
):
    """(B, L) nats of the tokens of window (B, 1 + L) given z (B, L), at the positions `scored`
    (B, L), 0 elsewhere."""
    x0 = window[:, 1:]
    positions = scored.flatten().nonzero()[:, 0]
    h = hidden_within(model, z, positions, window, masked_fraction, view)
    nll = F.cross_entropy(model.head(h), x0.flatten()[positions], reduction="none")
    return nll.new_zeros(x0.numel()).index_copy_(0, positions, nll).view(x0.shape)


def with_before(x0, before: Tensor | int = BOS_ID):
    """(B, 1 + L): the token before the window, then x0 (B, L)."""
    before = torch.as_tensor(before, device=x0.device).expand(len(x0))
    return torch.cat([before[:, None], x0], dim=1)


def masked_nll(model, window, mask, scored: Tensor | None = None):
    """(B, L) nats of the `scored`, by default of all masked tokens of window (B, 1 + L)."""
    z = torch.where(mask, model.hp.mask_id, window[:, 1:])
    return token_nll(model, z, window, mask if scored is None else scored)


def causal_nll(model, window, scored: Tensor | None = None):
    """(B, L) nats: −ln p(x_i | x_<i) for window (B, 1 + L), the token before it first."""
    z = window[:, :-1]
    if scored is None:
        scored = torch.ones_like(z, dtype=torch.bool)
    view = plain_view(model.hp, z.shape[1], True, z.device)
    return token_nll(model, z, window, scored, view=view)


# Masks of windows, or of their blocks: (n, length) bool, and weights, (n,) or one for all
WeightedMasks = Iterator[tuple[Tensor, Tensor | float]]


def weighted_nll(model, window, masks: WeightedMasks):
    """(B,) float64 nats: Σ weight · nll of masked tokens; anchors and PAD stay visible."""
    allowed = maskable(model.hp, window[:, 1:])
    nats = 0.0
    for mask, weight in masks:
        weight = torch.as_tensor(weight, device=window.device)  # waits, so before the pass
        masked = mask.to(window.device).view(allowed.shape) & allowed
        nll = masked_nll(model, window, masked).double().view(mask.shape).sum(1)
        nats = nats + weight * nll
    return nats.view(len(window), -1).sum(1)


Generators = torch.Generator | list[torch.Generator] | None  # one, or one for each row


def random_keys(shape: Sequence[int], generator: Generators) -> Iterator[Tensor]:
    """Uniform keys (B, L), endlessly."""
    while True:
        if isinstance(generator, list):
            yield torch.stack([torch.rand(shape[1], generator=row) for row in generator])
        else:
            yield torch.rand(shape, generator=generator)


def nelbo_masks(passes: int, times, keys, allowed) -> WeightedMasks:
    """Masks of k of the n `allowed` (B, L) positions, and weights: the weighted nll is an unbiased
    estimate of E_k E_mask (n/k)·nll for k uniform on 1 … n.

    Small masks vary most, so with several passes k = 1 + ⌊n·t^1.5⌋ favours them, for which P(k)
    makes up. Pass i has t = `times` (B,) in [0, 1) in the i-th of `passes` strata, in half of them
    backwards, and masks the next k positions, cyclically, in the order of the keys (B, L).
    """
    power = 1.5 if passes > 1 else 1.0
    place = ranks(torch.where(allowed, keys, 2))
    n = allowed.sum(1).clamp(min=1)
    masked_before = 0
    for i in range(passes):
        backwards = i.bit_count() % 2  # 0 1 1 0 1 0 0 1 …
        t = (i + (1 - times if backwards else times)) / passes
        k = (1 + (n * t**power).long()).minimum(n)
        # P(k), the length of the interval of t that gives k
        p_k = (k.double() / n) ** (1 / power) - ((k - 1).double() / n) ** (1 / power)
        next_k = (place - masked_before) % n[:, None] < k[:, None]
        yield allowed & next_k, 1 / (k * p_k * passes)
        masked_before = masked_before + k[:, None]


def any_order_nll(model, window, scored, passes: int, numbers, offset, keys):
    """(B,) float64 nats: the NELBO of the `scored` (B, L) of window (B, 1 + L), by blocks, with the
    masks of `nelbo_masks` for the numbers (B,) of a golden sequence."""
    length = model.block_size or keys.shape[1]
    blocks = torch.arange(keys.shape[1] // length, device=keys.device)
    times = golden_sequence((numbers[:, None] * len(blocks) + blocks).flatten(), offset)
    allowed = (scored & maskable(model.hp, window[:, 1:])).to(keys.device).view(-1, length)
    return weighted_nll(model, window, nelbo_masks(passes, times, keys.view(-1, length), allowed))


def nelbo(model, x0, passes: int = 4, generator: torch.Generator | None = None):
    """(B,) float64 nats: an unbiased estimate of the any-order bound of x0 (B, L)."""
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    keys, numbers = next(random_keys(x0.shape, generator)), torch.arange(len(x0))
    scored = torch.ones_like(x0, dtype=torch.bool)
    return any_order_nll(model, with_before(x0), scored, passes, numbers, offset, keys)


TSTEP_EPS = 1e-3  # ε of the T-step bound and of the t-grid


def tstep_masks(steps: int, keys: Iterator[Tensor]) -> WeightedMasks:
    """Independent, with probability 1 − α_i = (1 − ε)·i/T and weight 1/i, i = 1 … T."""
    for i in range(1, steps + 1):
        yield next(keys) < (1 - TSTEP_EPS) * i / steps, 1 / i


def discrete_elbo(model, x0, steps: int = 128, generator: Generators = None):
    """(B,) float64 nats: an unbiased estimate of the T-step bound of x0 (B, L): ε·L·ln V, for what
    the last step leaves visible, plus Σ_i Σ_masked nll / i (Austin et al. 2021)."""
    terminal = TSTEP_EPS * math.log(model.hp.vocab_size) * maskable(model.hp, x0).sum(1)
    masks = tstep_masks(steps, random_keys(x0.shape, generator))
    return terminal + weighted_nll(model, with_before(x0), masks)


def tgrid_masks(points: int, keys: Iterator[Tensor]) -> WeightedMasks:
    """PR 1699's grid in t. Biased: token 0 is masked for t < 0.01, t < 0.001 is left out."""
    for t in torch.linspace(TSTEP_EPS, 1.0, points).tolist():
        mask = next(keys) < t
        if t < 0.01:
            mask[:, 0] = True
        yield mask, (1 - TSTEP_EPS) / points / t


def ordered_nll(model, window, place, group: int = 1, context: Tensor | int = 0):
    """(B, L) nats of the tokens of window (B, 1 + L), revealed in each block by `place` (L,) or
    (B, L), the smallest first, `group` by one call; the first `context` (B, 1) and anchors are
    visible and free. Each (row, step) is one masked input, and many share a forward pass."""
    x0 = window[:, 1:]
    place = place.unflatten(-1, (-1, model.block_size or x0.shape[1]))
    steps = (ranks(place).flatten(-2).to(x0.device) - context) // group
    steps = steps.expand(x0.shape).masked_fill(~maskable(model.hp, x0), -1)
    calls = steps.amax(1) + 1
    row = torch.repeat_interleave(calls)
    step = torch.arange(len(row), device=x0.device) - (calls.cumsum(0) - calls)[row]
    pass_tokens = 65_536 if x0.is_cuda else 2_048
    at_once = max(pass_tokens // x0.shape[1], 1)
    nats = torch.zeros(x0.shape, device=x0.device)
    for rows, now in zip(row.split(at_once), step[:, None].split(at_once), strict=True):
        nll = masked_nll(model, window[rows], steps[rows] >= now, steps[rows] == now)
        nats.index_add_(0, rows, nll)
    return nats


@torch.no_grad()
def reveal_surest(model, z, hidden: Callable, group: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Reveals z (n, length), MASK but for anchors, `group` positions a call, the surest first: the
    largest probability of any token, and of those within 2^-13 nats the leftmost.

    Yields positions (n, g) and log-probabilities (n, g, V); the caller writes the tokens into z.
    Rows that are done yield positions that are no longer MASK. `hidden`(z, positions=flat ones) is
    (N, D), for the head: model.hidden, but not with blocks.
    """
    rows, length = z.shape
    row_starts = length * torch.arange(rows, device=z.device)[:, None]
    for done in range(0, length, group):
        masked = z == model.hp.mask_id
        candidates = (~masked).byte().argsort(dim=1, stable=True)[:, : length - done]  # MASK first
        logp = model.head(hidden(z, positions=(candidates + row_starts).flatten()))
        logp = logp.log_softmax(-1).unflatten(0, candidates.shape)
        surest = logp.amax(-1).where(masked.gather(1, candidates), -math.inf)
        behind = ((surest.amax(1, keepdim=True) - surest) * 2**12).round()
        chosen = behind.argsort(dim=1, stable=True)[:, :group]
        logp = logp.take_along_dim(chosen[..., None], 1)  # frees the rest
        yield candidates.gather(1, chosen), logp


def confidence_nll(model, window, group: int = 1):
    """(B, L) nats of the tokens of window (B, 1 + L) in the order of `reveal_surest`, by blocks."""

    def hidden(blocks, positions):
        return hidden_within(model, blocks.view(len(window), -1), positions, window)

    x0 = window[:, 1:].reshape(-1, model.block_size or window.shape[1] - 1)
    nats = torch.zeros(x0.shape, device=x0.device)
    z = x0.masked_fill(maskable(model.hp, x0), model.hp.mask_id)
    for positions, logp in reveal_surest(model, z, hidden, group):
        tokens = x0.gather(1, positions)
        masked = z.gather(1, positions) == model.hp.mask_id
        column = tokens.clamp(max=model.hp.vocab_size - 1)[..., None]  # PAD has none
        nll = -logp.gather(2, column)[..., 0]
        nats.scatter_add_(1, positions, torch.where(masked, nll, 0))
        z.scatter_(1, positions, tokens)
    return nats.view(len(window), -1)


def chain_rule(
    model,
    x0,
    order: str | Tensor = "l2r",
    group: int = 1,
    seed: int = 0,
    before: Tensor | int = BOS_ID,
):
    """(B, L) nats by position: −ln p(x_i | what was revealed before the group of i), of x0 (B, L)
    after the token `before` (B,). InputError for an order that the model does not have.

    `order` is l2r, confidence, random (drawn from `seed`), or positions (L,) or (B, L) as revealed.
    """
    window, length = with_before(x0, before), x0.shape[1]
    if model.hp.causal:
        if str(order) != "l2r" or group != 1:
            raise InputError("a causal model has order l2r and group 1 only")
        return causal_nll(model, window)
    if isinstance(order, Tensor):
        place = order.argsort(-1)
    elif order == "l2r":
        place = torch.arange(length)
    elif order == "random":
        place = torch.rand(length, generator=seeded("cpu", seed, "order"))
    elif order == "confidence":
        return confidence_nll(model, window, group)
    else:
        raise InputError(f"{order} is not an order: l2r, confidence, random or positions")
    return ordered_nll(model, window, place, group)


class Windows(NamedTuple):
    """Some windows of a split, as an estimator gets them."""

    hp: Hyperparameters  # of the score
    tokens: Tensor  # (B, 1 + L) int64, the token before the window first
    scored: Tensor  # (B, L) bool; False: left context, visible and free
    places: range  # which windows of the score these are; seeds their random numbers

    @property
    def x0(self):
        return self.tokens[:, 1:]

    def generators(self, score: str) -> list[torch.Generator]:
        return [seeded("cpu", self.hp.seed, score, place) for place in self.places]

    def keys(self, score: str) -> Iterator[Tensor]:
        return random_keys(self.x0.shape, self.generators(score))


def score_nelbo(model, windows: Windows):
    hp, tokens, scored, places = windows
    generator = seeded("cpu", hp.seed, "nelbo offset")
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    numbers, keys = torch.tensor(places), next(windows.keys("nelbo"))
    return any_order_nll(model, tokens, scored, hp.nelbo_passes, numbers, offset, keys)


def score_in_order(model, windows: Windows, place):
    context = (~windows.scored).sum(1, keepdim=True)
    return ordered_nll(model, windows.tokens, place, windows.hp.chain_group, context)


def score_left_to_right(model, windows: Windows):
    return score_in_order(model, windows, torch.arange(windows.hp.train_seq_len))


def score_random_order(model, windows: Windows):
    return score_in_order(model, windows, next(windows.keys("random")))


def score_by_confidence(model, windows: Windows):
    return confidence_nll(model, windows.tokens, windows.hp.chain_group)


def score_tstep(model, windows: Windows):
    return discrete_elbo(model, windows.x0, windows.hp.tstep_steps, windows.generators("tstep"))


def score_tgrid(model, windows: Windows):
    points = windows.hp.final_eval_t_samples or 256
    return weighted_nll(model, windows.tokens, tgrid_masks(points, windows.keys("tgrid")))


def score_causally(model, windows: Windows):
    return causal_nll(model, windows.tokens, windows.scored)


class Estimator(NamedTuple):
    """A score: the nats of some windows, and how it is measured on a split."""

    nats: Callable[[Model, Windows], Tensor]  # (B,), or (B, L) by position
    windows: int = 0  # where SCORES gives no number; 0: all
    rows: int = 0  # windows of a call, where rounding matters; 0: as VAL_BATCH_SIZE says
    sliding: bool = False  # windows overlap, and score their last STRIDE tokens
    prefixes: bool = False  # log a line for each range of positions
    biased: bool = False  # not a code length, and its line says so


# Scores by objective, and of block models; the first is the headline, val_bpb.
ESTIMATORS = {
    "mdlm": {
        "nelbo": Estimator(score_nelbo),
        "l2r": Estimator(score_left_to_right, windows=512, prefixes=True),
        "sliding": Estimator(score_left_to_right, windows=4096, sliding=True),
        "sliding_nelbo": Estimator(score_nelbo, windows=4096, sliding=True),
        "confidence": Estimator(score_by_confidence, windows=256, rows=16),
        "random": Estimator(score_random_order, windows=256),
        "tstep": Estimator(score_tstep, windows=1024),
        "tgrid": Estimator(score_tgrid, windows=256, biased=True),
    },
    "ar": {
        "ar": Estimator(score_causally, prefixes=True),
        "sliding": Estimator(score_causally, windows=4096, sliding=True),
    },
    "block": {
        "l2r": Estimator(score_left_to_right, prefixes=True),
        "ar": Estimator(score_causally, prefixes=True),
        "nelbo": Estimator(score_nelbo),
        "confidence": Estimator(score_by_confidence, windows=256, rows=16),
        "random": Estimator(score_random_order, windows=256),
    },
}


def boundary_bits(count: int, length: int) -> float:
    """Bits for where `count` visible tokens stand in a window."""
    return math.log2(length + 1) + math.log2(math.comb(length, count))


def bits_per_byte(bits, nbytes) -> tuple[float, float]:
    """Σ bits / Σ bytes over windows (n,), and its standard error with windows as clusters; paired
    if the bits are differences between two models."""
    bpb = bits.sum() / nbytes.sum()
    stderr = (bits - bpb * nbytes).square().sum().sqrt() / nbytes.sum()
    return bpb.item(), stderr.item() if len(bits) > 1 else math.nan


class Score(NamedTuple):
    bpb: float  # bits per byte
    stderr: float  # its standard error
    loss: float  # nats per token
    seqs: int  # windows
    tokens: int
    bytes: int
    ms: float
    boundary_bits: float  # for the places of anchors, part of bpb

    def figures(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f} stderr:{self.stderr:.4f}"

    def line(self) -> str:
        speed = 1000 * self.tokens / self.ms
        line = (
            f"bpb:{self.bpb:.4f} stderr:{self.stderr:.4f} seqs:{self.seqs} tokens:{self.tokens} "
            f"bytes:{self.bytes} time:{self.ms:.0f}ms tokens_per_s:{speed:.0f}"
        )
        if self.boundary_bits > 0:
            share = self.boundary_bits / self.bytes
            line += f" boundary_bits:{self.boundary_bits:.1f} boundary_bpb:{share:.4f}"
        return line


def evenly_spaced(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 … total − 1, evenly spaced; all of them for 0."""
    wanted = min(wanted or total, total)
    return [i * total // wanted for i in range(wanted)]


class WindowPlan:
    """Which windows a score sees, what it scores of them, in what batches."""

    def __init__(self, estimator: Estimator, hp, stream: TokenStream, seqs: int):
        self.hp = hp
        self.length = hp.train_seq_len
        self.stride = min(hp.stride, self.length) if estimator.sliding else self.length
        total = stream.count_windows(self.length, self.stride)
        self.numbers = evenly_spaced(total, seqs)
        # The tokens of the first window have not been scored by one to its left.
        whole_split = len(self.numbers) == total
        self.scored_tokens = [
            self.length if number == 0 and whole_split else self.stride for number in self.numbers
        ]
        rows = min(hp.val_batch_size // self.length, len(self.numbers)) // world_size()
        self.rows = estimator.rows or max(min(rows, hp.micro_batch_tokens // self.length), 1)

    def batches(self, split: Split) -> Iterator[tuple[slice, Windows]]:
        """This process's share, and which windows that is."""
        device = split.luts.base_bytes.device
        for start in range(rank() * self.rows, len(self.numbers), world_size() * self.rows):
            batch = slice(start, start + self.rows)
            tokens = split.stream.windows(self.numbers[batch], self.length, self.stride).to(device)
            scored_tokens = torch.tensor(self.scored_tokens[batch], device=device)[:, None]
            scored = torch.arange(self.length, device=device) >= self.length - scored_tokens
            yield batch, Windows(self.hp, tokens, scored, range(len(self.numbers))[batch])


def score_windows(
    name: str, model, hp, split: Split, seqs: int, told_to_stop: Callable = lambda: False
) -> tuple[Score, Tensor]:
    """The score `name` of `seqs` evenly spaced windows (0: all), shared among the processes.

    Also its table (windows, buckets, 2) of bits, without `boundary_bits`, and bytes: see
    `bucket_name`; scores without positions have all nats in bucket 0. ToldToStop if a process is
    `told_to_stop`, InputError if bits are not finite or there are no bytes.
    """
    started = time.perf_counter()
    estimator = ESTIMATORS[hp.system][name]
    plan = WindowPlan(estimator, hp, split.stream, seqs)
    bucket = torch.tensor([position.bit_length() for position in range(plan.length)])
    # bits, bytes, boundary bits
    table = torch.zeros(len(plan.numbers), int(bucket[-1]) + 1, 3, dtype=torch.float64)
    for batch, windows in plan.batches(split):
        nats = estimator.nats(model, windows).double()
        if nats.dim() == 1:
            nats = F.pad(nats[:, None], (0, plan.length - 1))
        nbytes = token_bytes(windows.x0, windows.tokens[:, 0], split.luts) * windows.scored
        columns = torch.stack([nats / math.log(2), nbytes], dim=2)
        table[batch, :, :2].index_add_(1, bucket, columns.cpu())
        if hp.anchor_bos:
            anchors = (windows.scored & ~maskable(hp, windows.x0)).sum(1).tolist()
            paid = list(map(boundary_bits, anchors, plan.scored_tokens[batch]))
            table[batch, 0, 2] = torch.tensor(paid, dtype=torch.float64)
        if told_to_stop():
            break
    if all_reduce(torch.tensor(float(told_to_stop()))) > 0:
        raise ToldToStop
    all_reduce(table)
    ms = 1000 * (time.perf_counter() - started)
    bits, nbytes, boundaries = table.sum(1).unbind(1)
    bits = bits + boundaries
    if nbytes.sum() == 0:
        raise InputError("the validation windows hold no bytes of text to divide by")
    if not bits.isfinite().all():
        raise InputError(f"the {name} score is not a finite number: the weights have diverged")
    bpb, stderr = bits_per_byte(bits, nbytes)
    tokens = sum(plan.scored_tokens)
    score = Score(
        bpb=bpb,
        stderr=stderr,
        loss=bits.sum().item() * math.log(2) / tokens,
        seqs=len(bits),
        tokens=tokens,
        bytes=int(nbytes.sum()),
        ms=ms,
        boundary_bits=boundaries.sum().item(),
    )
    return score, table[..., :2]


def bucket_name(bucket: int, length: int) -> str:
    """The positions of a bucket: 0, 1, 2-3, 4-7, …"""
    first = (1 << bucket) >> 1
    last = min((1 << bucket) - 1, length - 1)
    return f"{first}-{last}" if last > first else f"{first}"


def final_scores(hp) -> dict[str, int]:
    """Windows (0: all) by score, the headline first."""
    known = ESTIMATORS[hp.system]
    found = {hp.headline: hp.final_eval_max_seqs}
    for name, windows in hp.requested_scores.items():
        if name in known:
            default = found.get(name, known[name].windows)
            found[name] = default if windows is None else windows
    return found


def score_model(artifact: Artifact, hp, val: Split, log: Log):
    device = val.luts.base_bytes.device
    model = artifact.model.on(device)
    model.block_size = hp.block_size
    model.states = compiled(model.states, hp, device)
    label = artifact.label.replace("+", "_")
    scores = final_scores(hp)
    for name in hp.requested_scores:
        if name not in scores:  # these two are defaults
            log(f"score:{name} is not for {hp.system} models", screen=name not in ("nelbo", "l2r"))
    started = time.perf_counter()
    for name, seqs in scores.items():
        estimator = ESTIMATORS[hp.system][name]
        score, table = score_windows(name, model, hp, val, seqs)
        if name == hp.headline:
            log(f"final_{label}_roundtrip {score.figures()} eval_time:{score.ms:.0f}ms")
            exact = f"val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}"
            log(f"final_{label}_roundtrip_exact {exact}")
        log(f"score:{name} {'biased:1 ' if estimator.biased else ''}{score.line()}")
        if estimator.prefixes:
            for bucket, part in enumerate(table.unbind(1)):
                bpb, stderr = bits_per_byte(*part.unbind(1))
                positions = bucket_name(bucket, hp.train_seq_len)
                log(f"prefix:{positions} bpb:{bpb:.4f} stderr:{stderr:.4f}", screen=False)
    log.budget("Evaluation time", time.perf_counter() - started, BUDGET_SECONDS, "s")


# ---- Checkpoints
#
#     u32 length of the header · JSON header · weights, moments and average in float32 · SHA-256
#
# If its clock does not end it, a run that goes on ends in the same bytes as one never interrupted.


OF_ANOTHER_VERSION = "is of another version of train_mdlm.py; use that, or another RUN_ID"


@dataclasses.dataclass
class Progress:
    """How far a run is, over all its lives."""

    step: int = 0
    train_ms: float = 0.0


class Checkpoint(NamedTuple):
    hp: Hyperparameters
    progress: Progress
    state: Tensor  # (4, total) of the optimizer
    counts: list[int]
    averages: int
    data: int  # digest of the training shards

    def changed_settings(self, hp) -> list[str]:
        """What was different when it was made, of all that changes the result."""
        return [
            self.hp.shown(spec.name)
            for spec in KNOBS
            if spec.metadata["group"] in RESULT_GROUPS
            and getattr(self.hp, spec.name) != getattr(hp, spec.name)
        ]


def checkpoint_paths(run_id: str, ending: str = "") -> list[Path]:
    """Of one run, the newest first."""
    return sorted(Path("logs").glob(f"{run_id}.{'[0-9]' * 8}.ckpt{ending}"), reverse=True)


def write_checkpoint(checkpoint: Checkpoint) -> Path:
    """logs/<RUN_ID>.<step>.ckpt; the one before it stays, older ones go."""
    run_id = checkpoint.hp.run_id
    path = Path("logs") / f"{run_id}.{checkpoint.progress.step:08d}.ckpt"
    header = checkpoint._asdict() | dict(version=FORMAT_VERSION)
    state = header.pop("state").cpu().numpy().tobytes()
    text = json.dumps(header, default=dataclasses.asdict).encode()
    write_file(path, sealed(len(text).to_bytes(4, "little") + text + state))
    for older in checkpoint_paths(run_id)[2:]:
        older.unlink()
    return path


def read_checkpoint(path: Path) -> Checkpoint | None:
    """None if it is damaged; InputError if it is not readable, or of another version."""
    body = unsealed(on_first_process(read_file, path))
    if body is None:
        return None
    try:
        begin = 4 + int.from_bytes(body[:4], "little")
        saved = json.loads(body[4:begin])
        _require(saved.pop("version") == FORMAT_VERSION, "version")
        saved["hp"] = Hyperparameters(**saved["hp"])
        saved["progress"] = Progress(**saved["progress"])
        state = np.frombuffer(body, np.float32, offset=begin).reshape(4, -1)
        return Checkpoint(state=torch.from_numpy(state.copy()), **saved)
    except Exception as error:
        if is_lack_of_memory(error):
            raise
    raise InputError(f"{path}: {OF_ANOTHER_VERSION}")


# ---- Training
#
# The loop: save, stop, validate, step. The clock stands still for all but the last.


def run_fraction(hp, step: int, elapsed_ms: float) -> float:
    """How much of the run is done, in [0, 1]: of its steps or its time, whichever is more."""
    by_steps = step / hp.iterations if hp.iterations else 1.0
    by_clock = elapsed_ms / (1000 * hp.max_wallclock_seconds or math.inf)
    return min(max(by_steps, by_clock), 1.0)


def lr_scale(hp, step: int, elapsed_ms: float) -> float:
    """Of all learning rates: rises over LR_WARMUP_STEPS, decays to MIN_LR_FRAC at the end, which
    is the last iteration or the end of the wall clock."""
    left = hp.iterations - step
    if hp.max_wallclock_seconds and step >= 10 and elapsed_ms > 0:  # a mean of fewer says little
        ms_left = 1000 * hp.max_wallclock_seconds - elapsed_ms
        left = min(left, ms_left * step / elapsed_ms)
    decay_steps = hp.warmdown_iters or hp.warmdown_frac * (step + left)
    scale = min(max(left / decay_steps, 0.0), 1.0) if decay_steps > 0 else 1.0
    if hp.warmdown_shape == "cosine":
        scale = (1 - math.cos(math.pi * scale)) / 2
    rise = min((step + 1) / max(hp.lr_warmup_steps, 1), 1.0)
    return rise * (hp.min_lr_frac + (1 - hp.min_lr_frac) * scale)


def micro_batches(hp) -> list[range]:
    """This process's rows of a batch, in equal parts of at most MICRO_BATCH_TOKENS."""
    length, share = hp.shown("train_seq_len"), hp.train_seq_len * world_size()
    if hp.train_batch_tokens % share:
        batch = hp.shown("train_batch_tokens")
        raise InputError(f"{batch} is no multiple of {share}: {length} x {world_size()} processes")
    rows = hp.batch_rows // world_size()
    most = min(rows, hp.micro_batch_tokens // hp.train_seq_len)
    if most < 1:
        raise InputError(f"{hp.shown('micro_batch_tokens')} is less than one sequence, {length}")
    size = next(size for size in range(most, 0, -1) if rows % size == 0)
    first = rank() * rows
    return [range(start, start + size) for start in range(first, first + rows, size)]


def check_memory(hp, device: torch.device):
    """InputError if a run cannot fit; counts what it takes at least, before it is built."""
    rows = len(micro_batches(hp)[0])
    per_token = (2 if hp.compute_dtype == "bfloat16" else 4) * hp.model_dim * (4 + hp.mlp_mult)
    weights = sum(parameter.numel() for parameter in outline_model(hp).parameters())
    needed = {
        "weights and optimizer": 20 * weights,
        "activations": rows * hp.train_seq_len * hp.num_layers * per_token,
        "logits": 8 * scored_capacity(hp, rows) * hp.vocab_size,
        "noise": 4 * hp.train_batch_tokens,
    }
    if device.type == "cuda":
        there_are = torch.cuda.get_device_properties(device).total_memory
    else:
        there_are = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there_are /= max(environ_number("LOCAL_WORLD_SIZE", 1), 1)
    if sum(needed.values()) > there_are:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items())
        memory = f"more GiB than the {there_are / 2**30:.1f} there are: {parts}"
        names = ("model_dim", "num_layers", "train_batch_tokens", "micro_batch_tokens")
        raise InputError(f"{memory}; lower one of {', '.join(map(hp.shown, names))}")


class Trainer:
    """Model, optimizer and progress of a run, and its training step: up to rounding the same for
    any number of processes and micro-batches."""

    def __init__(self, hp, stream: TokenStream, device: torch.device, log: Log):
        self.hp = hp
        self.stream = stream
        self.device = device
        self.log = log
        self.progress = Progress()
        self.micros = micro_batches(hp)
        self.capacity = scored_capacity(hp, len(self.micros[0]))
        self.model = build_model(hp).on(device)
        self.optimizer = Optimizer(self.model, hp)
        self.step_done = torch.get_device_module(device).Event()
        self.loss = compiled(batch_loss, hp, device, dynamic=False, fullgraph=True)

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step; after the last comes the first."""
        step %= max(self.hp.iterations, 1)
        for rows in self.micros:
            yield training_batch(self.hp, self.stream, step, rows, self.capacity, self.device)

    def step(self, step: int, scale: float):
        """One step on the global batch of `step`; its loss, () on the device."""
        for batch in self.batches(step):
            loss = self.loss(self.model, batch)
            loss.backward()
            self.optimizer.sums += torch.stack([batch.tokens, loss.detach(), batch.dropped])
        mean_loss = self.optimizer.step(step, scale)
        self.step_done.synchronize()  # one step ahead at most, so that the host's clock is right
        self.step_done.record()
        return mean_loss

    def average_if_due(self):
        fraction = run_fraction(self.hp, self.progress.step, self.progress.train_ms)
        if self.hp.ema_decay and fraction >= self.hp.ema_start_frac:
            self.optimizer.update_average()

    def check(self):
        """InputError for dropped tokens, too many steps that were not finite, bad weights."""
        optimizer, where = self.optimizer, f"step:{self.progress.step}"
        if optimizer.dropped > 0:
            dropped = f"{int(optimizer.dropped)} masked tokens had no place in their batch"
            remedy = "`scored_capacity` is too small for this MASK_DIST and MASKING"
            raise InputError(f"{where} {dropped}: {remedy}")
        step, *norms, loss = optimizer.first_bad.tolist()
        if step:
            skipped = int(optimizer.counts[1])
            pairs = zip(optimizer.groups, norms, strict=True)
            bad = ", ".join(group.name for group, norm in pairs if not math.isfinite(norm))
            text = f"step:{step:.0f} not finite: loss {loss}, gradients: {bad or 'none'}"
            if skipped > self.hp.skip_nonfinite:
                remedy = "lower the learning rates, or allow some such steps with SKIP_NONFINITE"
                raise InputError(f"{text}; skipped:{skipped}; {remedy}")
            self.log(f"{text}; skipped:{skipped}")
            optimizer.first_bad.zero_()
        if not optimizer.state.isfinite().all():
            raise InputError(f"{where} the weights are not finite; lower the learning rates")

    def warm_up(self):
        """Compiles everything on real batches, then puts everything back."""
        optimizer = self.optimizer
        changed = (optimizer.state, optimizer.counts, optimizer.dropped, optimizer.first_bad)
        kept = [tensor.clone() for tensor in changed]
        for step in range(self.hp.warmup_steps):
            self.step(step, 1.0)
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)

    def validate(self, val: Split, told_to_stop: Callable):
        """Logs the headline of the averaged weights, with one mask per window, unless a process is
        told to stop."""
        self.check()
        once = dataclasses.replace(self.hp, nelbo_passes=1)
        seqs = self.hp.eval_max_seqs
        self.optimizer.swap_average()
        try:
            score, _ = score_windows(self.hp.headline, self.model, once, val, seqs, told_to_stop)
        except ToldToStop:
            return
        finally:
            self.optimizer.swap_average()
        self.log_step(f"{score.figures()} seqs:{score.seqs}")

    def log_step(self, figures: str):
        step, ms = self.progress.step, self.progress.train_ms
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        self.log(f"step:{step}/{self.hp.iterations} {figures} {times}")

    def save(self):
        self.check()
        started = time.perf_counter()
        checkpoint = Checkpoint(
            hp=self.hp,
            progress=self.progress,
            state=self.optimizer.state,
            counts=self.optimizer.counts.long().tolist(),
            averages=self.optimizer.averages,
            data=self.stream.digest,
        )
        path = on_first_process(write_checkpoint, checkpoint)
        self.log(f"checkpoint:{path} time:{1000 * (time.perf_counter() - started):.0f}ms")

    def resume(self):
        """Goes on from the newest sound checkpoint of this run, if any; InputError if its settings
        or data were others."""
        hp = self.hp
        for path in on_first_process(checkpoint_paths, hp.run_id):
            checkpoint = read_checkpoint(path)
            if checkpoint:
                break
            self.log(f"skipped:{path}: damaged")
            on_first_process(path.replace, f"{path}.damaged")
        else:
            return
        changed = checkpoint.changed_settings(hp)
        if changed or checkpoint.data != self.stream.digest:
            made_with = " ".join(changed) or "other shards"
            remedy = "give it the same, or start another run, with another RUN_ID"
            raise InputError(f"{path} was made with {made_with}: {remedy}")
        if checkpoint.state.shape != self.optimizer.state.shape:
            raise InputError(f"{path}: {OF_ANOTHER_VERSION}")
        self.progress = checkpoint.progress
        self.optimizer.averages = checkpoint.averages
        self.optimizer.state.copy_(checkpoint.state)
        self.optimizer.counts.copy_(torch.tensor(checkpoint.counts))
        step, ms = self.progress.step, self.progress.train_ms
        self.log(f"resumed:{path} step:{step}/{hp.iterations} train_time:{ms:.0f}ms")


def train(trainer: Trainer, val: Split) -> Model:
    """To the last iteration or the wall-clock cap; the model with its averaged weights. InputError
    after a signal, with a checkpoint."""
    hp, progress, log = trainer.hp, trainer.progress, trainer.log
    clock = Clock(trainer.device)
    with clock.paused("warm-up"):
        trainer.warm_up()
        next(trainer.batches(progress.step))  # a stream of documents has to find its place
    clock.started -= progress.train_ms / 1000
    first_step, saved_ms = progress.step, progress.train_ms
    stopped = False
    on_signals(clock.stop)
    while True:
        finished = run_fraction(hp, progress.step, progress.train_ms) >= 1
        where = f"step:{progress.step}/{hp.iterations}"
        waited = progress.train_ms - saved_ms >= 1000 * hp.checkpoint_every
        checkpoint_due = hp.checkpoint_every and (finished or waited)
        if (checkpoint_due or stopped) and progress.step > first_step:
            with clock.paused("checkpoints"):
                trainer.save()
            saved_ms = progress.train_ms
        if stopped:
            remedy = f"the same command with RUN_ID={hp.run_id} goes on from here"
            raise InputError(f"{where} stopped by a signal; {remedy}")
        every = hp.val_loss_every
        if finished or (every and progress.step and progress.step % every == 0):
            with clock.paused("validation"):
                trainer.validate(val, lambda: clock.stopped)
            _, stopped = clock.read()
            if stopped:
                continue
        if finished:
            break
        loss = trainer.step(progress.step, lr_scale(hp, progress.step, progress.train_ms))
        progress.step += 1
        progress.train_ms, stopped = clock.read()
        if run_fraction(hp, progress.step, progress.train_ms) >= 1:  # the last step, to its end
            clock.now()
            progress.train_ms, stopped = clock.read()
        trainer.average_if_due()
        if hp.train_log_every and (progress.step <= 10 or progress.step % hp.train_log_every == 0):
            trainer.check()
            if loss.isfinite():
                trainer.log_step(f"train_loss:{loss:.4f}")
    on_signals(signal.default_int_handler)
    if progress.step < hp.iterations:
        log(f"stopping_early: wallclock_cap train_time:{progress.train_ms:.0f}ms {where}")
    pauses = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.pauses.items())
    seconds, limit = progress.train_ms / 1000, BUDGET_SECONDS + 1  # the last step may pass it
    log.budget("Training time", seconds, limit, "s", f"; not counted: {pauses}")
    trainer.optimizer.swap_average()
    return trainer.model


# ---- Main
#
# What the user got wrong is found before training where that is possible: one line, exit status 2.


def hardware(device: torch.device) -> str:
    """Such as 8xNVIDIA_H100_80GB_HBM3 or 2xCPU_AVX512_(2_threads)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {torch.backends.cpu.get_cpu_capability()} ({torch.get_num_threads()} threads)"
    return f"{world_size()}x{name}".replace(" ", "_")


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated() >> 20
        reserved = torch.cuda.max_memory_reserved() >> 20
        return f"{allocated} MiB reserved: {reserved} MiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"


def requested_artifact(env: Mapping[str, str]) -> Artifact | None:
    path = env.get("EVAL_ONLY", "")
    data = on_first_process(lambda: read_file(path) if path else None)
    return None if data is None else unpack_artifact(data, path)


def resolve_hyperparameters(
    env: Mapping[str, str], device: torch.device, artifact: Artifact | None = None
) -> Hyperparameters:
    """What `env` asks for, with the predictor of the artifact that is scored, a RUN_ID and a dtype;
    InputError for another predictor, or if another process was asked for something else."""
    made = artifact.hp if artifact else Hyperparameters.from_env(env)
    stored = {name.upper(): getattr(made, name) for name in STORED}
    hp = Hyperparameters.from_env({**stored, **env})
    for name in PREDICTOR:
        asked, there = getattr(hp, name), getattr(made, name)
        other_blocks = name == "block_size" and asked and there  # than in training
        if asked not in ("auto", there) and not other_blocks:
            made_with = f"{hp.eval_only} was made with {made.shown(name)}"
            raise InputError(f"{hp.shown(name)}, but {made_with}")
    for name, value in on_first_process(vars, hp).items():
        if getattr(hp, name) != value:
            raise InputError(f"{hp.shown(name)}, but the first process has {value}")
    stamp = on_first_process(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}_{hp.preset}")
    dtype = resolve_dtype(made if hp.compute_dtype == "auto" else hp, device)
    return dataclasses.replace(hp, run_id=hp.run_id or stamp, compute_dtype=dtype)


def claim_run(hp, log: Log):
    """Locks the log of this RUN_ID, and begins it with the source of this file; InputError if
    another process has it, or if the run is finished or may not go on."""
    path = log.path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.lock = path.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(log.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{path}: {hp.shown('run_id')} is running already; choose another"
        raise InputError(message) from None
    except OSError:
        pass  # some file systems cannot lock
    log.lock.seek(0)
    text = log.lock.read()
    source = Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n"
    begun = re.search(rf"(?ms)^={{100}}$.*^run_id:{re.escape(hp.run_id)} ", text)
    finished = re.search("(?m)^finished:", text)
    may_not_go_on = hp.resume == "never" or hp.eval_only
    if finished or (may_not_go_on and (text or checkpoint_paths(hp.run_id))):
        raise InputError(f"{hp.shown('run_id')} was used before: see {path}; choose another")
    artifact = path.with_suffix(".mdlm")
    if not begun and (not source.startswith(text) or (artifact.exists() and not hp.eval_only)):
        foreign = artifact if source.startswith(text) else path
        raise InputError(f"{foreign}: is not of this run; choose another RUN_ID than {hp.run_id}")
    if begun and source not in text:
        raise InputError(f"{path}: {OF_ANOTHER_VERSION}")
    for half_written in checkpoint_paths(hp.run_id, ".part"):
        half_written.unlink()  # by a process that was killed
    if not begun:
        log.lock.truncate(0)
        log.lock.write(source)
    elif not text.endswith("\n"):
        log.lock.write("\n")
    log.lock.flush()


def open_log(hp, env: Mapping[str, str], device: torch.device) -> Log:
    log = Log(Path(f"logs/{hp.run_id}.txt"))
    on_first_process(claim_run, hp, log)
    log(f"run_id:{hp.run_id} started:{time.strftime('%Y-%m-%dT%H:%M:%S')} log:{log.path}")
    log(f"hardware:{hardware(device)} torch:{torch.__version__} python:{sys.version.split()[0]}")
    names = [spec.name for spec in KNOBS]
    log("hyperparameters: " + " ".join(map(hp.shown, names)), screen=False)
    overridden = [hp.shown(name) for name in names if name.upper() in env]
    log("overridden: " + (" ".join(overridden) or "nothing"))
    for warning in near_misses(env):
        log(warning, screen=False)
    return log


def write_artifact(model, moments: Mapping[str, Tensor], hp, path: Path, log: Log):
    """Packs the model, and logs code + artifact against the limit."""
    info = on_first_process(save_artifact, model, hp, path, moments)
    label, kinds, artifact_bytes = info["label"], info["kinds"], info["artifact_bytes"]
    for name, kind in kinds.items():
        weights = kind["weights"]
        packers = " ".join(f"{packer}:{size}" for packer, size in kind["packed_bytes"].items())
        log(
            f"kind:{name} storage:{kind['storage']} weights:{weights} "
            f"bytes:{kind['bytes']} bits_per_weight:{8 * kind['bytes'] / weights:.3f} "
            f"entropy:{kind['entropy_bits'] / weights:.3f} {packers}"
        )
    code_bytes = len(Path(__file__).read_bytes())
    bits = 8 * artifact_bytes / sum(kind["weights"] for kind in kinds.values())
    log(f"Code size: {code_bytes} bytes")
    log(f"Serialized model {label}: {artifact_bytes} bytes ({bits:.3f} bits per weight)")
    total = code_bytes + artifact_bytes
    log.budget(f"Total submission size {label}", total, SIZE_LIMIT_BYTES, "bytes")


def train_and_pack(trainer: Trainer, val: Split) -> Artifact:
    """Trains, writes the artifact, and returns it as it is on disk."""
    hp, log = trainer.hp, trainer.log
    log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    size = on_first_process(predicted_bytes, hp)
    log.budget("Predicted submission size", size, SIZE_LIMIT_BYTES, "bytes for normal weights")
    micros, dtype = len(trainer.micros), hp.compute_dtype
    log(f"world_size:{world_size()} grad_accum_steps:{micros} compute_dtype:{dtype}")
    trainer.resume()
    model = train(trainer, val)
    log(f"peak memory allocated: {peak_memory(trainer.device)}")
    batches = (batch for step in range(hp.quant_feedback) for batch in trainer.batches(step))
    path = Path(f"logs/{hp.run_id}.mdlm")
    write_artifact(model, input_moments(model, batches), hp, path, log)
    return read_artifact(path)


def run(env: Mapping[str, str]):
    """The story at the top of this file, for the hyperparameters in `env`."""
    if env.get("RANK", "0") == "0":
        for warning in near_misses(env):  # first, because they may explain what goes wrong next
            show(warning, sys.stderr)
    device = start_processes()
    artifact = requested_artifact(env)
    hp = resolve_hyperparameters(env, device, artifact)
    if not artifact:
        check_memory(hp, device)
    tokenizer = load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    luts = build_sentencepiece_luts(tokenizer, hp.vocab_size, device)
    val = open_validation(hp, tokenizer, luts)
    windows = val.stream.count_windows(hp.train_seq_len)
    data = f"tokenizer_sha256:{file_sha256(hp.tokenizer_path)} val_tokens:{val.stream.total} "
    data += f"val_bytes:{val.stream.facts['bytes']} val_windows:{windows}"
    if not artifact:
        stream = open_training(hp, tokenizer, luts)
        data += f" train_tokens:{stream.total}"
    log = open_log(hp, env, device)
    try:
        log(f"dataset:{Path(hp.data_path).name} {data}")
        if artifact:
            log(f"eval_only:{hp.eval_only} compute_dtype:{hp.compute_dtype}")
        else:
            artifact = train_and_pack(Trainer(hp, stream, device, log), val)
        score_model(artifact, hp, val, log)
        log(f"finished:{hp.run_id}")
    except BaseException as error:
        with contextlib.suppress(OSError):
            log(f"error: rank:{rank()} {explain(error)}", screen=False, every_rank=True)
        raise


def main():
    arguments = sys.argv[1:]
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    on_signals(signal.default_int_handler)  # raises a KeyboardInterrupt
    try:
        if arguments and arguments[0] in ("-h", "--help"):
            print(help_text(arguments[1:]))
            return
        if arguments:
            raise InputError(f"{arguments[0]}: hyperparameters are environment variables; --help")
        run(os.environ)
    except (Exception, KeyboardInterrupt) as error:
        if not foreseen(error):
            raise
        on_signals(signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # what all processes meet, the first one says
        show(f"train_mdlm.py: error: {foreseen(error)}", sys.stderr)
        if dist.is_initialized():
            os._exit(2)  # without waiting for collectives that a lost process will never join
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
