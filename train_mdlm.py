"""Masked diffusion language models for parameter golf: train, pack into 16,000,000 bytes, score as a code length.

Claim: every score this file prints is the length of a code that somebody could decode (but one, printed as biased:1,
which repeats a published estimator for comparison). The default system is PR 1699 of
the challenge (19,190,656 parameters, fp8 e4m3 export, published at 1.4784 bits per byte); PRESET=ar is the challenge's
causal baseline on the same trunk; PRESET=demo trains in minutes on two CPU cores.

    python train_mdlm.py --help                                         every hyperparameter, its default and meaning
    PRESET=demo torchrun --standalone --nproc_per_node=1 train_mdlm.py  after data/prepare_text.py --source docs
    torchrun --standalone --nproc_per_node=8 train_mdlm.py              8xH100, after data/fetch_fineweb.py
    EVAL_ONLY=logs/<run>.mdlm torchrun ... train_mdlm.py                score an artifact again

Sections: hyperparameters · ranks, clock and log · data and bytes · noise · model · loss · optimizers and EMA ·
artifact · scoring · training · main. Importing has no side effect. Shape letters: B sequences, L positions, D width,
H heads, V real tokens, N scored positions of a batch. MASK is token V: it has an embedding and is never predicted.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import zstandard
except ImportError:  # a plain torch installation: PACK=auto then chooses between zlib and lzma
    zstandard = None

SIZE_LIMIT_BYTES = 16_000_000  # code + artifact
BUDGET_SECONDS = 600.0  # for training, and again for evaluation
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly, however many are taken

class InputError(ValueError):
    """Something the user gave is wrong: one line that names the value, the place and the remedy."""


# == Hyperparameters ===================================================================================================

def knob(group: str, default, meaning: str, unit: str = "", low=0, high=math.inf, choices: Sequence[str] = ()):
    """A hyperparameter: the environment variable is its name in capitals; numbers lie in [low, high]."""
    metadata = dict(group=group, meaning=meaning, unit=unit, low=low, high=high, choices=tuple(choices))
    return dataclasses.field(default=default, metadata=metadata)


CHAIN_RULES = ("l2r", "sliding", "confidence", "random")
SCORE_NAMES = ("nelbo", *CHAIN_RULES, "tstep", "tgrid")
PRESETS: dict[str, dict] = {
    "mdlm": {},  # PR 1699: the defaults below
    "ar": dict(  # the challenge's causal baseline
        objective="ar", num_layers=9, model_dim=512, matrix_lr=0.04, grad_clip_norm=0.0, ema_decay=0.0,
    ),
    "demo": dict(  # two CPU cores, a few minutes, the documentation of the installed packages
        data_path="./data/datasets/docs_sp1024", tokenizer_path="./data/tokenizers/docs_1024_bpe.model",
        num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, train_seq_len=128, rope_base=100.0,
        tied_embed_init_std=0.05, masking="count", mask_eps=0.15, mask_max=0.65, loss_weight="flat",
        iterations=1300, warmdown_iters=850, max_wallclock_seconds=400.0, warmup_steps=0, train_batch_tokens=2048,
        matrix_lr=0.04, tied_embed_lr=0.005, scalar_lr=0.01, muon_momentum=0.9, muon_momentum_warmup_steps=100,
        ema_decay=0.0, train_log_every=100, val_loss_every=200, eval_max_seqs=256, nelbo_passes=1, l2r_seqs=32,
        val_batch_size=2048,
    ),
}

@dataclasses.dataclass(frozen=True, init=False)
class Hyperparameters:
    """Resolved configuration: the field defaults, then the preset's row of PRESETS, then the given values.

    Raises InputError (a ValueError) for an unknown name, a value of the wrong type or out of range, or values that do
    not fit each other.
    """

    preset: str = knob("run", "mdlm", "named configuration; the other variables override it", choices=tuple(PRESETS))
    run_id: str = knob("run", "", "names logs/<RUN_ID>.txt and logs/<RUN_ID>.mdlm; empty: start time and preset")
    seed: int = knob("run", 1337, "of initial weights, mask times and masks", high=2**63 - 1)
    eval_only: str = knob("run", "", "path of an artifact to score instead of training")
    data_path: str = knob("data", "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = knob("data", "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    objective: str = knob("model", "mdlm", "masked diffusion, or causal next-token prediction", choices=("mdlm", "ar"))
    vocab_size: int = knob("model", 1024, "real tokens V; MASK is token V", "tokens", low=2, high=65_534)
    train_seq_len: int = knob("model", 1024, "length L of a training and of a scoring window", "tokens", low=1)
    num_layers: int = knob("model", 8, "transformer blocks; the first half feeds skips to the second", low=1)
    model_dim: int = knob("model", 576, "width D of the residual stream", low=2)
    num_heads: int = knob("model", 8, "attention heads H", low=1)
    num_kv_heads: int = knob("model", 4, "key/value heads, each shared by a group of query heads", low=1)
    mlp_mult: int = knob("model", 2, "hidden width of the ReLU² MLP", "× MODEL_DIM", low=1)
    tie_embeddings: bool = knob("model", True, "output head = first V rows of the embedding")
    rope_base: float = knob("model", 10_000.0, "base of the rotary frequencies", low=1)
    logit_softcap: float = knob("model", 30.0, "logits are cap·tanh(logits/cap); 0 leaves them alone")
    qk_gain_init: float = knob("model", 1.5, "initial gain of the normalised queries")
    tied_embed_init_std: float = knob("model", 0.005, "standard deviation of the initial tied embedding")
    compute_dtype: str = knob("model", "auto", "of activations; auto: bfloat16 on GPUs, float32 on CPUs",
                              choices=("auto", "float32", "bfloat16"))
    masking: str = knob("noise", "bernoulli", "each token alone, or exactly k tokens", choices=("bernoulli", "count"))
    time_sampling: str = knob("noise", "stratified", "spread of mask times over the global batch",
                              choices=("stratified", "antithetic", "uniform"))
    mask_eps: float = knob("noise", 0.001, "smallest mask probability", high=1)
    mask_max: float = knob("noise", 1.0, "largest mask probability", high=1)
    loss_weight: str = knob("noise", "elbo", "of a masked token: 1 / mask probability, or 1", choices=("elbo", "flat"))
    weight_clamp: float = knob("noise", 100.0, "largest ELBO weight")
    iterations: int = knob("training", 20_000, "optimizer steps at most", "steps")
    max_wallclock_seconds: float = knob("training", 600.0, "training time at most; 0: no limit", "s")
    warmup_steps: int = knob("training", 20, "compile warm-up, undone before training starts", "steps")
    warmdown_iters: int = knob("training", 1200, "linear decay of the learning rates to 0 at the end", "steps")
    train_batch_tokens: int = knob("training", 524_288, "tokens of the global batch", "tokens", low=1)
    micro_batch_tokens: int = knob("training", 65_536, "tokens of one pass of one process at most", "tokens", low=1)
    train_log_every: int = knob("training", 200, "between log lines (the first 10 steps always log; 0: none)", "steps")
    val_loss_every: int = knob("training", 1000, "between validations; 0: only at the end", "steps")
    matrix_lr: float = knob("optimizer", 0.02, "Muon learning rate of the block matrices")
    tied_embed_lr: float = knob("optimizer", 0.05, "Adam learning rate of a tied embedding")
    embed_lr: float = knob("optimizer", 0.6, "Adam learning rate of an untied embedding")
    head_lr: float = knob("optimizer", 0.008, "Adam learning rate of an untied head")
    scalar_lr: float = knob("optimizer", 0.04, "Adam learning rate of gains, scales and skips")
    muon_momentum: float = knob("optimizer", 0.95, "Nesterov momentum of Muon", high=1)
    muon_momentum_warmup_start: float = knob("optimizer", 0.85, "Muon momentum at step 0", high=1)
    muon_momentum_warmup_steps: int = knob("optimizer", 500, "until MUON_MOMENTUM is reached", "steps")
    muon_backend_steps: int = knob("optimizer", 5, "Newton-Schulz iterations", low=1)
    beta1: float = knob("optimizer", 0.9, "Adam", high=0.999999)
    beta2: float = knob("optimizer", 0.95, "Adam", high=0.999999)
    adam_eps: float = knob("optimizer", 1e-8, "Adam", low=1e-30)
    grad_clip_norm: float = knob("optimizer", 1.0, "largest norm of the whole gradient; 0: no limit")
    ema_decay: float = knob("optimizer", 0.999, "decay a step of the averaged weights; 0: no averaging", high=1)
    ema_start_frac: float = knob("optimizer", 0.1, "averaging starts at this share of the clock or steps", high=1)
    quant_mode: str = knob("export", "fp8", "storage of matrices and embeddings", choices=("fp8", "fp16", "fp32"))
    pack: str = knob("export", "auto", "compressor; auto: the smallest", choices=("auto", "zlib", "lzma", "zstd"))
    nelbo_passes: int = knob("scoring", 4, "masks a sequence of the final any-order NELBO", low=1)
    eval_max_seqs: int = knob("scoring", 4096, "of a validation during training, evenly spaced; 0: all", "windows")
    final_eval_max_seqs: int = knob("scoring", 0, "of the final score, evenly spaced; 0: all", "windows")
    final_eval_t_samples: int = knob("scoring", 0, "as PR 1699: adds tgrid with these points on FINAL_EVAL_MAX_SEQS")
    scores: str = knob("scoring", "nelbo,l2r", f"final scores, any of {','.join(SCORE_NAMES)}")
    l2r_seqs: int = knob("scoring", 512, "chain rule from left to right; 0: all", "windows")
    sliding_seqs: int = knob("scoring", 4096, "the same, each token with the longest left context; 0: all", "windows")
    confidence_seqs: int = knob("scoring", 256, "chain rule, surest position first; 0: all", "windows")
    random_seqs: int = knob("scoring", 256, "chain rule in a seeded random order; 0: all", "windows")
    tstep_seqs: int = knob("scoring", 1024, "bound of TSTEP_STEPS independent masks; 0: all", "windows")
    tgrid_seqs: int = knob("scoring", 256, "PR 1699's grid in t, biased, 256 points; 0: all", "windows")
    tstep_steps: int = knob("scoring", 128, "T of the T-step bound", low=1)
    stride: int = knob("scoring", 64, "tokens a sliding window scores, at most its length", "tokens", low=1)
    chain_group: int = knob("scoring", 1, "positions revealed by one model call of a chain rule", low=1)
    val_batch_size: int = knob("scoring", 524_288, "tokens of one scoring pass of all processes", "tokens", low=1)

    def __init__(self, preset: str = "mdlm", **overrides):
        known = {f.name: f for f in dataclasses.fields(self)}
        if preset not in PRESETS:
            raise InputError(f"PRESET={preset} is not one of {', '.join(PRESETS)}")
        for name in overrides.keys() - known.keys():
            raise InputError(f"unknown hyperparameter {name}{did_you_mean(name, known)}")
        values = {name: f.default for name, f in known.items()} | PRESETS[preset] | overrides | {"preset": preset}
        for name, value in values.items():
            object.__setattr__(self, name, checked_value(known[name], value))
        self._check_together()

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Hyperparameters:
        """Reads every known variable of `env`; others are ignored (see `near_misses`)."""
        given = {f.name: env[f.name.upper()] for f in dataclasses.fields(cls) if f.name.upper() in env}
        return cls(**given)

    def _check_together(self) -> None:
        for small, large in (("num_heads", "model_dim"), ("num_kv_heads", "num_heads")):
            if getattr(self, large) % getattr(self, small):
                raise InputError(f"{self.shown(small)} must divide {self.shown(large)}")
        if self.head_dim % 2:
            raise InputError(f"{self.shown('model_dim')} / {self.shown('num_heads')} = {self.head_dim} must be even "
                             "for rotary embeddings")
        if self.mask_eps >= self.mask_max:
            raise InputError(f"{self.shown('mask_eps')} must be smaller than {self.shown('mask_max')}")
        if self.loss_weight == "elbo" and self.objective == "mdlm" and self.weight_clamp == 0:
            raise InputError(f"{self.shown('weight_clamp')} must be positive, or LOSS_WEIGHT=flat")
        for name in self.score_names:
            if name not in SCORE_NAMES:
                raise InputError(f"{self.shown('scores')}: {name} is not one of {', '.join(SCORE_NAMES)}")
        if self.run_id and not re.fullmatch(r"[\w.+=@-]+", self.run_id):
            raise InputError(f"{self.shown('run_id')} may hold letters, digits and . _ + = @ - only")

    def shown(self, name: str) -> str:
        """`NAME=value`, as the user writes it."""
        value = getattr(self, name)
        return f"{name.upper()}={int(value) if isinstance(value, bool) else value}"

    head_dim = property(lambda self: self.model_dim // self.num_heads)
    mask_id = property(lambda self: self.vocab_size)
    pad_id = property(lambda self: self.vocab_size + 1)
    score_names = property(lambda self: [name.strip() for name in self.scores.split(",") if name.strip()])
    headline = property(lambda self: "ar" if self.objective == "ar" else "nelbo", doc="the score behind val_bpb")
    tgrid_points = property(lambda self: self.final_eval_t_samples or 256, doc="as published unless given")
    batch_rows = property(lambda self: self.train_batch_tokens // self.train_seq_len, doc="sequences a global batch")

def checked_value(spec: dataclasses.Field, value):
    """`value` (a string from the environment, or a Python value) as the type of the field; InputError names it."""
    name, kind, limits = spec.name.upper(), type(spec.default), spec.metadata
    wanted = {int: "a whole number", float: "a number", bool: "0 or 1", str: "text"}[kind]
    try:
        if isinstance(value, str) and kind is bool:
            value = {"0": False, "1": True, "false": False, "true": True}[value.strip().lower()]
        elif isinstance(value, str) and kind is not str:
            value = kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"{name}={value} is not {wanted}") from None
    if limits["choices"] and value not in limits["choices"]:
        raise InputError(f"{name}={value} is not one of {', '.join(limits['choices'])}")
    if kind in (int, float) and not limits["low"] <= value <= limits["high"]:
        raise InputError(f"{name}={value} is not between {limits['low']} and {limits['high']}")
    return value

def did_you_mean(name: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean {close}?)" for close in difflib.get_close_matches(name, list(known), 1, 0.85))

def near_misses(env: Mapping[str, str]) -> list[str]:
    """One warning for every variable of `env` that is almost, but not quite, the name of a hyperparameter."""
    known = [f.name.upper() for f in dataclasses.fields(Hyperparameters)]
    hints = ((name, did_you_mean(name, known)) for name in sorted(env) if name not in known)
    return [f"warning: environment variable {name} is not read{hint}" for name, hint in hints if hint]

def help_text() -> str:
    """The table that --help prints: name, default, unit, meaning, choices, and the presets that change it."""
    lines = [__doc__.strip(), "", "Environment variables:"]
    for spec in dataclasses.fields(Hyperparameters):
        about = spec.metadata
        lines += ["", f"  {about['group']}"] if f"  {about['group']}" not in lines else []
        value = f"{spec.name.upper()}={int(spec.default) if isinstance(spec.default, bool) else spec.default}"
        notes = [about["meaning"] + (f" [{about['unit']}]" if about["unit"] else "")]
        notes += [" | ".join(about["choices"])] if about["choices"] else []
        changed = [f"{preset}: {row[spec.name]}" for preset, row in PRESETS.items() if spec.name in row]
        notes += ["; ".join(changed)] if changed else []
        lines += [f"    {value:<36} {notes[0]}"] + [f"    {'':<36}   {note}" for note in notes[1:]]
    return "\n".join(lines)


# == Ranks, clock and log ==============================================================================================

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def all_reduce(tensor: Tensor) -> Tensor:
    """Sums in place over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

def start_ranks() -> torch.device:
    """Joins the process group that torchrun describes (or a group of one) and returns this process's device.

    CPU tensors always travel by gloo, so that control messages never wait for the GPU.
    """
    if torch.cuda.is_available():
        wanted, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if wanted > found:
            raise InputError(f"--nproc_per_node={wanted}, but this machine has {found} GPUs")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    return device

def raise_everywhere(problem: InputError | None) -> None:
    """Raises the first problem that any process has on all of them, so that none is left waiting for the others."""
    problems = [problem] * world_size()
    if world_size() > 1:
        dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found

class Clock:
    """Training time in milliseconds; stopped around validation, so that only training is counted."""
    def __init__(self, device: torch.device):
        self.device, self.counted_ms, self.started = device, 0.0, None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.counted_ms, self.started = self.ms(), None

    def ms(self) -> float:
        return self.counted_ms + (1000 * (time.perf_counter() - self.started) if self.started else 0.0)

    def shared_ms(self) -> float:
        """The first process's time: decisions that depend on it must be the same everywhere."""
        now = torch.tensor([self.ms()], dtype=torch.float64)
        if world_size() > 1:
            dist.broadcast(now, src=0)
        return now.item()

class Log:
    """The first process's lines, on the screen and in a file; on a terminal also a progress bar below them."""
    def __init__(self, path: Path | None = None):
        self.path = path if rank() == 0 else None
        self.bar = rank() == 0 and sys.stdout.isatty()
        self.phase, self.drawn = ("", 0.0, 0.0), 0.0  # name, start and first fraction of the bar; when it was drawn

    def __call__(self, line: str, screen: bool = True) -> None:
        if rank() != 0:
            return
        if screen:
            print(("\r\x1b[K" if self.bar else "") + line, flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def progress(self, name: str, fraction: float, note: str = "") -> None:
        """Redraws the bar at most five times a second; `fraction` in [0, 1], the time left follows from it."""
        now = time.monotonic()
        if not self.bar or (now - self.drawn < 0.2 and 0.0 < fraction < 1.0):
            return
        if name != self.phase[0]:
            self.phase = name, now, fraction
        speed = (fraction - self.phase[2]) / max(now - self.phase[1], 1e-9)
        left = "{}:{:02d} left".format(*divmod(int((1 - fraction) / speed), 60)) if speed > 0 else ""
        bar = f"{'█' * int(30 * fraction):░<30}"
        line = f"{name} {bar} {100 * fraction:3.0f} % {left} {note}" if fraction < 1.0 else ""
        print("\r\x1b[K" + line, end="", flush=True)
        self.drawn = now


# == Data and bytes ====================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
BOS_ID = 1  # <s> in the challenge's tokenizers

def open_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard of the challenge: 256 little-endian int32 (magic, version, number of tokens), then uint16."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if header.size < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path}: not a token shard (bad header); make it again with data/prepare_text.py or "
                         "fetch it again with data/fetch_fineweb.py")
    count = int(header[2])
    if count < 1 or size != header_bytes + 2 * count:
        raise InputError(f"{path}: the header says {count} tokens, so {header_bytes + 2 * count} bytes, but the file "
                         f"has {size}; it is truncated or damaged, make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))

class TokenStream:
    """The shards of one split end to end, memory-mapped, read as a ring: after the last token comes the first."""
    def __init__(self, folder: str | Path, split: str):
        self.files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
        if not self.files:
            raise InputError(f"no {split} shards in DATA_PATH={folder}; make them with 'python data/prepare_text.py "
                             "--source docs' (and PRESET=demo) or fetch them with 'python data/fetch_fineweb.py'")
        self.shards = [open_shard(path) for path in self.files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the ring, uint16."""
        parts, start = [], start % self.total
        while count > 0:
            i = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - int(self.ends[i]) + len(self.shards[i])
            parts.append(self.shards[i][offset:offset + count])
            count -= len(parts[-1])
            start = (start + len(parts[-1])) % self.total
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def windows(self, numbers: Iterable[int], length: int, stride: int = 0) -> Tensor:
        """(B, 1 + length) int64: window n is token n·stride and the `length` after it; without a stride end to end."""
        starts = [n * (stride or length) for n in numbers]
        return torch.from_numpy(np.stack([self.read(start, 1 + length) for start in starts]).astype(np.int64))

    def count_windows(self, length: int, stride: int = 0) -> int:
        """Whole windows without going round the ring; the very first token is only ever a predecessor."""
        return max(1 + (self.total - 1 - length) // (stride or length), 0)

    def check_tokens(self, vocab_size: int, first_tokens: int | None = None) -> None:
        """Reads what a run can touch, each process its share of the files; InputError for a token ≥ vocab_size."""
        problem = None
        for i in range(rank(), len(self.shards), world_size()):
            shard, begins = self.shards[i], int(self.ends[i]) - len(self.shards[i])
            if first_tokens is None or begins < first_tokens:
                largest = max(int(shard[at:at + (1 << 24)].max()) for at in range(0, len(shard), 1 << 24))
                if largest >= vocab_size:
                    problem = InputError(f"{self.files[i]}: holds token {largest}, but VOCAB_SIZE={vocab_size}; "
                                         "the shards were made with another tokenizer")
        raise_everywhere(problem)

class ByteTables(NamedTuple):
    """What each token adds to the text, for all ids < table size (the challenge's tables, plus `keeps_space`)."""
    base_bytes: Tensor  # (table,) int64, UTF-8 bytes without the leading space
    has_leading_space: Tensor  # (table,) bool
    is_boundary: Tensor  # (table,) bool: control and unknown tokens, which stand for no text
    keeps_space: bool  # whether the first piece after a boundary keeps its leading space when decoded

def build_sentencepiece_luts(sp, vocab_size: int, device: torch.device | str = "cpu") -> ByteTables:
    """Byte tables of a SentencePiece model, exact for pieces with several spaces and for text that starts with one."""
    size = max(int(sp.vocab_size()), vocab_size)
    base, space, boundary = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
    keeps_space = False
    for token in range(int(sp.vocab_size())):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        boundary[token] = False
        if sp.is_byte(token):
            base[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith("\u2581"):
            piece = piece[1:]
            if not space.any():  # every piece behaves alike: ask once
                keeps_space = sp.decode([token]).startswith(" ")
            space[token] = True
        base[token] = len(piece.replace("\u2581", " ").encode())
    return ByteTables(*(torch.from_numpy(table).to(device) for table in (base, space, boundary)), keeps_space)

def token_bytes(tokens: Tensor, prev: Tensor | int, luts: ByteTables) -> Tensor:
    """(…, L) int64: exact UTF-8 bytes of the text that each of tokens (…, L) adds; `prev` (…) is the token before."""
    tokens = torch.as_tensor(tokens, dtype=torch.int64, device=luts.base_bytes.device)
    first = torch.as_tensor(prev, dtype=torch.int64, device=tokens.device).expand(tokens.shape[:-1])
    before = torch.cat([first[..., None], tokens[..., :-1]], dim=-1)
    counted = luts.has_leading_space[tokens]
    if not luts.keeps_space:
        counted = counted & ~luts.is_boundary[before]
    return luts.base_bytes[tokens] + counted

def count_bytes(tokens: Tensor, prev: Tensor | int, luts: ByteTables) -> Tensor:
    """(…) int64: exact UTF-8 bytes of the text that tokens (…, L) add after the token `prev` (…) before them."""
    return token_bytes(tokens, prev, luts).sum(-1)

def load_tokenizer(path: str, vocab_size: int):
    """The SentencePiece model at `path`; InputError when it is missing, foreign or of another size."""
    import sentencepiece
    if not Path(path).is_file():
        raise InputError(f"no tokenizer at TOKENIZER_PATH={path}; make it with 'python data/prepare_text.py --source "
                         "docs' (and PRESET=demo) or fetch it with 'python data/fetch_fineweb.py'")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise InputError(f"{path}: not a SentencePiece model") from None
    if int(sp.vocab_size()) != vocab_size:
        raise InputError(f"{path}: has {sp.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return sp


# == Noise: when and what to mask ======================================================================================

def seeded(device: torch.device | str, *key) -> torch.Generator:
    """A generator that depends on `key` only, for example (seed, "train", step)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)

def sample_times(kind: str, u: Tensor) -> Tensor:
    """Mask times t in [0, 1] of a global batch from independent uniform draws u (B,).

    stratified: one offset, a row in each of B equal strata (Sahoo et al. 2024), in the order of multiples of the golden
    ratio, so that any few neighbours are spread evenly too; antithetic: pairs t, 1 − t.
    """
    rows = len(u)
    if kind == "stratified":
        strata = (torch.arange(rows, dtype=torch.float64, device=u.device) * GOLDEN % 1).argsort().argsort()
        return (strata + u[0]) / rows
    if kind == "antithetic":
        return torch.stack([u[: rows // 2], 1 - u[: rows // 2]], dim=1).flatten()
    return u

def mask_probability(hp: Hyperparameters, u: Tensor) -> Tensor:
    """(B,) probability that a token is masked, uniform on [MASK_EPS, MASK_MAX]."""
    return hp.mask_eps + (hp.mask_max - hp.mask_eps) * sample_times(hp.time_sampling, u)

def mask_exactly(k: Tensor, keys: Tensor) -> Tensor:
    """Masks the k (B,) positions of each row with the smallest keys (B, L); (B, L) bool."""
    first = torch.arange(keys.shape[-1], device=keys.device) < k[:, None]
    return torch.zeros_like(first).scatter_(1, keys.argsort(-1), first)

def sample_masks(hp: Hyperparameters, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks of a global batch: (B, L) bool, and the loss weight (B,) of each of a row's masked tokens."""
    rows, length, device = hp.batch_rows, hp.train_seq_len, generator.device
    probability = mask_probability(hp, torch.rand(rows, generator=generator, device=device))
    keys = torch.rand(rows, length, generator=generator, device=device)
    if hp.masking == "count":
        k = (probability * length).ceil().clamp(1, length)
        mask, probability = mask_exactly(k, keys), k / length
    else:
        mask = keys < probability[:, None]
    if hp.loss_weight == "flat":
        return mask, torch.ones_like(probability)
    return mask, (1 / probability).clamp(max=hp.weight_clamp)

def masked_capacity(hp: Hyperparameters, rows: int) -> int:
    """A static bound on the masked positions of any micro-batch of `rows` rows: only those need the output head.

    Mask probabilities are affine in the draws, so their sum over a slice is largest at an end of the draws. Counts add
    less than one a row; independent masks exceed 4·sqrt(N) more with probability e^-32 (Hoeffding), and are then cut.
    """
    positions = rows * hp.train_seq_len
    ends = [mask_probability(hp, torch.full((hp.batch_rows,), end)).view(-1, rows).sum(1).max() for end in (0.0, 1.0)]
    slack = rows if hp.masking == "count" else 4 * math.sqrt(positions)
    return min(positions, math.ceil(float(max(ends)) * hp.train_seq_len + slack))


# == Model =============================================================================================================

NORM_EPS = torch.finfo(torch.float32).eps

def norm(x: Tensor) -> Tensor:
    """RMS normalisation of the last axis, without gain."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)

def rotary_table(length: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (L, head_dim/2) of the rotary embedding, in the dtype and on the device of `like`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=like.device), base**-exponent)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x (…, L, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and applied in the dtype of its input."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

def pick(x: Tensor, at: Tensor | None) -> Tensor:
    """(N, D): the positions `at` (N,) of x (B, L, D), counted through the batch; all of x for None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)

class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated and gained queries; bidirectional unless `causal`."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.head_dim, self.causal = hp.head_dim, hp.objective == "ar"
        self.shares_keys = hp.num_kv_heads < hp.num_heads
        self.c_q = Linear(hp.model_dim, hp.model_dim)
        self.c_k = Linear(hp.model_dim, hp.num_kv_heads * hp.head_dim)
        self.c_v = Linear(hp.model_dim, hp.num_kv_heads * hp.head_dim)
        self.proj = Linear(hp.model_dim, hp.model_dim)
        self.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        q, k, v = (c(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        q = rotate(norm(q), *rotary) * self.q_gain.to(x.dtype)[:, None, None]  # (B, H, L, head_dim)
        k = rotate(norm(k), *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.shares_keys)
        return self.proj(pick(y.transpose(1, 2).flatten(2), at))

class MLP(nn.Module):
    """proj(ReLU(fc x)²)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.fc = Linear(hp.model_dim, hp.mlp_mult * hp.model_dim)
        self.proj = Linear(hp.mlp_mult * hp.model_dim, hp.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.attn, self.mlp = Attention(hp), MLP(hp)
        self.attn_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(hp.model_dim), torch.zeros(hp.model_dim)]))

    def forward(self, x: Tensor, x_emb: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        """(B, L, D) → (B, L, D), or (N, D) if only the positions `at` (N,) are wanted: attention still sees all."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x_emb
        x = pick(x, at) + self.attn_scale.to(x.dtype) * self.attn(norm(x), rotary, at)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))

class Model(nn.Module):
    """The challenge's U-Net transformer, with its parameter names; bidirectional with a MASK embedding, or causal.

    `compute_dtype` is the dtype of activations; parameters stay float32, logits are float32.
    """

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, self.compute_dtype = hp, torch.float32
        self.tok_emb = nn.Embedding(hp.vocab_size + (hp.objective == "mdlm"), hp.model_dim)
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(hp.num_layers // 2, hp.model_dim))
        self.lm_head = None if hp.tie_embeddings else Linear(hp.model_dim, hp.vocab_size)
        if hp.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=hp.tied_embed_init_std)
        else:
            nn.init.zeros_(self.lm_head.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)

    def on(self, device: torch.device) -> Model:
        """Moves to the device; activations get the dtype of COMPUTE_DTYPE."""
        self.compute_dtype = getattr(torch, resolve_dtype(self.hp, device))
        return self.to(device)

    def hidden(self, z: Tensor, masked_fraction: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Normalised last hidden state (B, L, D) of tokens z (B, L) int64; (N, D) at the flat positions `at` (N,).

        `masked_fraction` (B,) is for backbones that are told the noise level; this one sees it in z.
        """
        x = x_emb = norm(self.tok_emb(z)).to(self.compute_dtype)
        rotary = rotary_table(z.shape[1], self.hp.head_dim, self.hp.rope_base, x)
        encoder, skips = len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= encoder and skips:
                x = x + self.skip_weights[i - encoder].to(x.dtype) * skips.pop()
            x = block(x, x_emb, rotary, at if block is self.blocks[-1] else None)
            if i < encoder:
                skips.append(x)
        return norm(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits (…, V) float32 over the real tokens of hidden states (…, D)."""
        weight = self.tok_emb.weight[: self.hp.vocab_size] if self.lm_head is None else self.lm_head.weight
        logits, cap = F.linear(h, weight.to(h.dtype)).float(), self.hp.logit_softcap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def forward(self, z: Tensor, masked_fraction: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(z, masked_fraction))

def resolve_dtype(hp: Hyperparameters, device: torch.device) -> str:
    """COMPUTE_DTYPE without auto."""
    return ("bfloat16" if device.type == "cuda" else "float32") if hp.compute_dtype == "auto" else hp.compute_dtype

def build_model(hp: Hyperparameters) -> Model:
    """A new model on the CPU, in float32; its weights depend on hp.seed only, and no global state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hp.seed)
        return Model(hp)


# == Loss ==============================================================================================================

class Batch(NamedTuple):
    """One micro-batch, with static shapes."""
    z: Tensor  # (B, L) int64, what the model sees
    positions: Tensor  # (N,) int64, scored positions of the flattened batch
    targets: Tensor  # (N,) int64, the tokens there
    weights: Tensor  # (N,) float32, already divided by the tokens of the global batch; 0 fills up to N

def compact(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Indices of the True elements of `mask`, flattened, in `capacity` slots: (N,) int64, and which are used (N,) bool.

    Shapes do not depend on the data, so neither a compiler nor the host has to wait for a count.
    """
    flat = mask.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, capacity).clamp(max=capacity)
    positions = torch.arange(capacity + 1, device=flat.device).clamp(max=len(flat) - 1)  # unused slots: all different
    positions.scatter_(0, slot, torch.arange(len(flat), device=flat.device))
    return positions[:capacity], torch.arange(capacity, device=flat.device) < flat.sum()

def training_batch(hp: Hyperparameters, stream: TokenStream, step: int, rows: range, capacity: int,
                   device: torch.device) -> Batch:
    """Rows `rows` of the global batch of `step`: a function of (seed, step, rows) on one kind of device."""
    first = step * hp.batch_rows
    window = stream.windows(range(first + rows.start, first + rows.stop), hp.train_seq_len)
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    if hp.objective == "ar":
        targets = window[:, 1:].flatten()
        weights = torch.full(targets.shape, 1 / hp.train_batch_tokens, device=device)
        return Batch(window[:, :-1], torch.arange(len(targets), device=device), targets, weights)
    mask, weight = (full[rows.start:rows.stop] for full in sample_masks(hp, seeded(device, hp.seed, "train", step)))
    x0 = window[:, 1:]
    positions, used = compact(mask, capacity)
    weights = torch.where(used, weight[positions // hp.train_seq_len], 0) / hp.train_batch_tokens
    return Batch(torch.where(mask, hp.mask_id, x0), positions, x0.flatten()[positions], weights)

def batch_loss(model: Model, batch: Batch) -> Tensor:
    """Σ weight·nll over the scored positions, in nats; summed over the global batch it is the loss of the step."""
    h = model.hidden(batch.z, at=batch.positions)
    return (F.cross_entropy(model.head(h), batch.targets, reduction="none") * batch.weights).sum()


# == Optimizers and EMA ================================================================================================

class Kind(NamedTuple):
    """A kind of parameter: what it is called, how it is trained and how it is stored."""
    name: str
    pattern: str  # of the parameter's name
    optimizer: str  # muon | adam
    lr: str  # the hyperparameter that holds the learning rate
    storage: str  # in the artifact; empty: QUANT_MODE


KINDS = (
    Kind("matrix", r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", "muon", "matrix_lr", ""),
    Kind("embed", r"tok_emb\.weight", "adam", "embed_lr", ""),
    Kind("head", r"lm_head\.weight", "adam", "head_lr", ""),
    Kind("gain", r"(blocks\.\d+\.)?(attn\.q_gain|attn_scale|mlp_scale|resid_mix|skip_weights)", "adam", "scalar_lr",
         "fp16"),
)

def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if re.fullmatch(kind.pattern, name))

def base_learning_rate(kind: Kind, hp: Hyperparameters) -> float:
    return hp.tied_embed_lr if kind.name == "embed" and hp.tie_embeddings else getattr(hp, kind.lr)

def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Pushes the singular values of each matrix (n, rows, cols) to about 1 by Newton-Schulz iterations.

    The quintic of Jordan et al. 2024 (Muon), which trades exactness for speed: values end in about [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x

class Optimizer:
    """Muon and Adam over one flat buffer of weights and one of gradients.

    The model's parameters become views of `weights`, their gradients views of `grads`: zeroing, reducing over the
    processes, clipping and averaging are one call each, and matrices of one shape are one stack without a copy.
    """

    def __init__(self, model: Model, hp: Hyperparameters):
        def stacked(item: tuple[str, nn.Parameter]) -> tuple:
            kind = kind_of(item[0])
            return KINDS.index(kind), tuple(item[1].shape) if kind.optimizer == "muon" else ()

        groups = [list(g) for _, g in itertools.groupby(sorted(model.named_parameters(), key=stacked), key=stacked)]
        sizes = [sum(p.numel() for _, p in group) for group in groups]
        ends = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))  # aligned for the widest loads
        self.hp, self.muon, adam = hp, [], []
        self.weights = torch.zeros(ends[-1], device=groups[0][0][1].device)
        self.grads = torch.zeros_like(self.weights)
        for group, size, first in zip(groups, sizes, [0, *ends[:-1]], strict=True):
            kind, parameters = kind_of(group[0][0]), [p for _, p in group]
            weights, grads = self.weights[first:first + size], self.grads[first:first + size]
            counts = [p.numel() for p in parameters]
            for p, w, g in zip(parameters, weights.split(counts), grads.split(counts), strict=True):
                w.copy_(p.detach().flatten())
                p.data, p.grad = w.view(p.shape), g.view(p.shape)
            if kind.optimizer == "muon":
                stack = (len(parameters), *parameters[0].shape)
                self.muon.append((weights.view(stack), grads.view(stack), torch.zeros_like(weights).view(stack)))
            else:
                flat = nn.Parameter(weights)
                flat.grad = grads
                adam.append(dict(params=[flat], base_lr=base_learning_rate(kind, hp)))
        self.adam = torch.optim.Adam(adam, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, step: int, lr_scale: float) -> None:
        """Adds up the gradients of all processes, clips them, and updates the weights, the same everywhere."""
        hp = self.hp
        all_reduce(self.grads)
        if hp.grad_clip_norm > 0:
            self.grads.mul_((hp.grad_clip_norm / (self.grads.norm() + 1e-6)).clamp(max=1.0))
        warmup = min(step / hp.muon_momentum_warmup_steps, 1.0) if hp.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warmup) * hp.muon_momentum_warmup_start + warmup * hp.muon_momentum
        for weights, grads, velocity in self.muon:
            velocity.mul_(momentum).add_(grads)
            update = self._orthogonalize_shared(grads.add(velocity, alpha=momentum))
            taller = max(1.0, weights.shape[-2] / weights.shape[-1]) ** 0.5
            weights.add_(update, alpha=-hp.matrix_lr * lr_scale * taller)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        self.grads.zero_()

    def _orthogonalize_shared(self, stack: Tensor) -> Tensor:
        """Each process orthogonalizes its share of the stack (n, rows, cols); all of them get the whole."""
        share = -(-len(stack) // world_size())
        mine = slice(rank() * share, (rank() + 1) * share)
        part = orthogonalize(stack[mine], self.hp.muon_backend_steps)
        if world_size() == 1:
            return part
        whole = part.new_zeros(stack.shape)
        whole[mine] = part
        return all_reduce(whole)

    @torch.no_grad()
    def reset(self, weights: Tensor) -> None:
        """Back to the start: the given weights and no memory of any step."""
        self.weights.copy_(weights)
        self.grads.zero_()
        for _, _, velocity in self.muon:
            velocity.zero_()
        self.adam.state.clear()

class EMA:
    """Exponential moving average of a flat weight buffer, in float32, from the first update on.

    After n updates: d^(n-1)·w_1 + (1 − d)·Σ_{i=2..n} d^(n−i)·w_i.
    """

    def __init__(self, decay: float):
        self.decay, self.average = decay, None

    @torch.no_grad()
    def update(self, weights: Tensor) -> None:
        if self.average is None:
            self.average = weights.float().clone()
        else:
            self.average.lerp_(weights.float(), 1 - self.decay)

    @torch.no_grad()
    def swap(self, weights: Tensor) -> None:
        """Exchanges the weights with their average; a second call restores both. Nothing before the first update."""
        if self.average is not None:
            held = weights.clone()
            weights.copy_(self.average)
            self.average.copy_(held)


# == Artifact ==========================================================================================================

# packed( MAGIC · u32 header length · JSON header · tensor bytes ) · SHA-256 of the packed bytes
ARTIFACT_MAGIC, ARTIFACT_VERSION, MAX_HEADER_BYTES = b"MDLMgolf", 1, 1 << 22
STORAGES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "fp32": torch.float32}

class Packer(NamedTuple):
    magic: bytes  # the first bytes of its files
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]  # (packed, limit): at most `limit` bytes, however many there are


PACKERS = {
    "zlib": Packer(b"\x78\xda", lambda raw: zlib.compress(raw, 9),
                   lambda packed, limit: zlib.decompressobj().decompress(packed, limit)),
    "lzma": Packer(b"\xfd7zXZ\x00", lambda raw: lzma.compress(raw, preset=6),
                   lambda packed, limit: lzma.LZMADecompressor().decompress(packed, limit)),
    "zstd": Packer(b"\x28\xb5\x2f\xfd", lambda raw: zstandard.ZstdCompressor(level=22).compress(raw),
                   lambda packed, limit: zstandard.ZstdDecompressor().stream_reader(packed).read(limit)),
}

def store(tensor: Tensor, storage: str) -> bytes:
    """The tensor's elements, row-major and little-endian; e4m3 saturates at ±448 instead of becoming NaN."""
    tensor = tensor.detach().float().cpu().contiguous()
    if storage == "fp8":
        return tensor.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    return tensor.to(STORAGES[storage]).numpy().tobytes()

def stored_fields() -> list[str]:
    """The hyperparameters an artifact carries: those that define the predictor."""
    return ["preset"] + [f.name for f in dataclasses.fields(Hyperparameters) if f.metadata["group"] == "model"]

def save_artifact(model: Model, hp: Hyperparameters, path: str | Path) -> dict:
    """Quantizes, packs and writes the model; returns artifact_bytes, label, raw_bytes and packed_bytes by packer."""
    table, body = [], io.BytesIO()
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: (KINDS.index(kind_of(item[0])), item[0])):
        storage = kind_of(name).storage or hp.quant_mode
        table.append(dict(name=name, shape=list(tensor.shape), storage=storage, offset=body.tell()))
        body.write(store(tensor, storage))
    header = json.dumps(dict(version=ARTIFACT_VERSION, hyperparameters={f: getattr(hp, f) for f in stored_fields()},
                             tensors=table), separators=(",", ":")).encode()
    raw = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + body.getvalue()
    if hp.pack == "zstd" and zstandard is None:
        raise InputError("PACK=zstd needs the zstandard package: pip install -r requirements.txt, or PACK=auto")
    names = [n for n in PACKERS if n == hp.pack or (hp.pack == "auto" and (n != "zstd" or zstandard))]
    packed = {name: PACKERS[name].pack(raw) for name in names}
    smallest = min(packed.values(), key=len)
    smallest += hashlib.sha256(smallest).digest()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(smallest)
    os.replace(part, path)
    written = path.read_bytes()
    return dict(artifact_bytes=len(written), label=unpack_artifact(written, path)[2], raw_bytes=len(raw),
                packed_bytes={name: len(blob) for name, blob in packed.items()})

def read_file_everywhere(path: str | Path) -> bytes:
    """The first process's file, on every process: other machines need not have it."""
    content, problem = [None], None
    try:
        content = [Path(path).read_bytes() if rank() == 0 else None]
    except OSError as error:
        problem = InputError(f"{path}: cannot be read: {error.strerror}")
    raise_everywhere(problem)
    if world_size() > 1:
        dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]

def unpack_artifact(packed: bytes, path: str | Path) -> tuple[dict, bytes, str]:
    """Header, tensor bytes and label of an artifact, verified; InputError (one line, with `path`) for anything else.

    The checksum comes first; then the length of the header is unpacked, the header, and what it accounts for. The label
    says how the matrices are stored and how the file is packed, for example fp8+lzma.
    """
    packed, checksum = packed[:-32], packed[-32:]
    packer = next((name for name, packer in PACKERS.items() if packed.startswith(packer.magic)), "")
    if packer and hashlib.sha256(packed).digest() != checksum:
        raise InputError(f"{path}: checksum mismatch, the artifact is damaged or truncated")
    if packer == "zstd" and zstandard is None:
        raise InputError(f"{path}: is packed with zstd: pip install -r requirements.txt")
    try:
        start = PACKERS[packer].unpack(packed, 12)
        body_at = 12 + struct.unpack("<8xI", start)[0]
        if not start.startswith(ARTIFACT_MAGIC) or body_at > MAX_HEADER_BYTES:
            raise ValueError
        header = json.loads(PACKERS[packer].unpack(packed, body_at)[12:])
        sizes = [math.prod(entry["shape"]) * STORAGES[entry["storage"]].itemsize for entry in header["tensors"]]
        offsets = [entry["offset"] for entry in header["tensors"]]
        storages = {entry["storage"] for entry in header["tensors"] if not kind_of(entry["name"]).storage}
        if header["version"] != ARTIFACT_VERSION or offsets != [sum(sizes[:i]) for i in range(len(sizes))]:
            raise ValueError
        raw = PACKERS[packer].unpack(packed, body_at + sum(sizes) + 1)
        if len(raw) != body_at + sum(sizes):
            raise ValueError
    except Exception:  # the decompressors and the parser each have their own errors; they all mean the same here
        raise InputError(f"{path}: not an artifact of this version of train_mdlm.py") from None
    return header, raw[body_at:], "+".join([*sorted(storages), packer])

def load_artifact(path: str | Path) -> tuple[Model, Hyperparameters]:
    """A fresh model with the weights on disk, and its hyperparameters; InputError (a ValueError) if it is not sound.

    In a group of processes all of them call it, and get what the first one reads.
    """
    return restore_artifact(*unpack_artifact(read_file_everywhere(path), path)[:2], path)

def restore_artifact(header: dict, body: bytes, path: str | Path) -> tuple[Model, Hyperparameters]:
    """Model and hyperparameters of an unpacked artifact; InputError if its tensors are not those of its shape."""
    try:
        hp = Hyperparameters(**header["hyperparameters"])
        model = build_model(hp)
        tensors = {}
        for entry in header["tensors"]:
            dtype, offset = STORAGES[entry["storage"]], entry["offset"]
            raw = bytearray(body[offset:offset + math.prod(entry["shape"]) * dtype.itemsize])
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0)  # one layer has no skips
            tensors[entry["name"]] = flat.view(entry["shape"]).float()
        model.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: the tensors do not fit the hyperparameters: {str(error).splitlines()[0]}") from None
    return model, hp


# == Scoring ===========================================================================================================

@torch.no_grad()
def token_nll(model: Model, z: Tensor, x0: Tensor, scored: Tensor, masked_fraction: Tensor | None = None) -> Tensor:
    """(B, L) nats: −ln p(x_i | z) at the positions `scored` (B, L), 0 elsewhere; only those need the output head."""
    at = scored.flatten().nonzero()[:, 0]
    h = model.hidden(z, masked_fraction, at)
    nll = F.cross_entropy(model.head(h), x0.flatten()[at], reduction="none")
    return nll.new_zeros(x0.numel()).index_copy_(0, at, nll).view(x0.shape)

def masked_nll(model: Model, x0: Tensor, mask: Tensor, scored: Tensor | None = None) -> Tensor:
    """(B, L) nats of the `scored` tokens of x0 (B, L), or all masked ones, where MASK hides `mask` (B, L)."""
    z = torch.where(mask, model.hp.mask_id, x0)
    return token_nll(model, z, x0, mask if scored is None else scored, mask.float().mean(1))

def causal_nll(model: Model, window: Tensor, scored: Tensor | None = None) -> Tensor:
    """(B, L) nats: −ln p(x_i | the token before the window, x_<i) for window (B, 1 + L), with a causal model."""
    x0 = window[:, 1:]
    return token_nll(model, window[:, :-1], x0, torch.ones_like(x0, dtype=torch.bool) if scored is None else scored)

def weighted_nll(model: Model, x0: Tensor, masks: Iterable[tuple[Tensor, Tensor | float]]) -> Tensor:
    """(B,) float64 nats: the sum over masks (B, L) of weight · nll of the masked tokens."""
    nats = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for mask, weight in masks:
        nll = masked_nll(model, x0, mask.to(x0.device)).double().sum(1)
        nats += torch.as_tensor(weight, device=x0.device) * nll
    return nats

def uniform_keys(shape: torch.Size, generator: torch.Generator | None) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape, generator=generator, device=generator.device if generator else "cpu")

def nelbo_masks(passes: int, times: Tensor, draw: Callable[[], Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """Masks (B, L) of k positions and weights (B,): an unbiased estimate of E_k E_mask (L/k)·nll, k uniform on 1..L.

    That is the code length of x0 averaged over all orders: the continuous-time bound of Sahoo et al. 2024 without its
    discretisation. Small k vary most, so k = 1 + ⌊L·t^1.5⌋ and the weight corrects for its probability (a single pass
    keeps k uniform, so that windows compare). `times` (B,) are uniform on [0, 1); each pass has an equal share of t,
    some run through it backwards, and the passes mask consecutive arcs of one random circle, `draw` (B, L), so that
    together they treat positions evenly.
    """
    rank, start, power = draw().argsort(1).argsort(1), 0, 1.5 if passes > 1 else 1.0
    length = rank.shape[1]
    for p in range(passes):
        t = (p + (1 - times if p.bit_count() % 2 else times)) / passes
        k = (1 + (length * t**power).long()).clamp(max=length)
        probability = (k.double() / length) ** (1 / power) - ((k - 1).double() / length) ** (1 / power)
        yield (rank - start) % length < k[:, None], 1 / (k * probability * passes)
        start = start + k[:, None]

def nelbo(model: Model, x0: Tensor, passes: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """(B,) float64 nats: unbiased any-order bound of each row of x0 (B, L), with `passes` random masks a row.

    The mask sizes are a rotated lattice over rows and passes, so that all rows together have them evenly spread.
    """
    draw = uniform_keys(x0.shape, generator)
    offset = torch.rand((), generator=generator, device=generator.device if generator else "cpu", dtype=torch.float64)
    lattice = torch.arange(len(x0), dtype=torch.float64, device=offset.device) * GOLDEN
    return weighted_nll(model, x0, nelbo_masks(passes, (offset + lattice) % 1, draw))

TSTEP_EPS = 1e-3  # ε of the T-step bound and of the t-grid, as published

def tstep_masks(steps: int, draw: Callable[[], Tensor]) -> Iterable[tuple[Tensor, float]]:
    """Independent masks with probability 1 − α_i, weight (α_{i−1} − α_i)/(1 − α_i) = 1/i for α_i = 1 − (1 − ε)·i/T."""
    for i in range(1, steps + 1):
        yield draw() < (1 - TSTEP_EPS) * i / steps, 1 / i

def discrete_elbo(model: Model, x0: Tensor, steps: int = 128, generator: torch.Generator | None = None,
                  draw: Callable[[], Tensor] | None = None) -> Tensor:
    """(B,) float64 nats: unbiased estimate of the T-step bound of x0 (B, L) (Austin et al. 2021), one mask a step.

    ε·L·ln V, for what the last step leaves visible, + Σ_i Σ_masked nll / i. `draw` replaces keys of the generator.
    """
    terminal = TSTEP_EPS * x0.shape[1] * math.log(model.hp.vocab_size)
    return terminal + weighted_nll(model, x0, tstep_masks(steps, draw or uniform_keys(x0.shape, generator)))

def tgrid_masks(points: int, draw: Callable[[], Tensor]) -> Iterable[tuple[Tensor, float]]:
    """PR 1699's grid in t, biased: below t = 0.01 the first token is always masked, and t < 0.001 is left out."""
    for t in torch.linspace(TSTEP_EPS, 1.0, points).tolist():
        mask = draw() < t
        if t < 0.01:
            mask[:, 0] = True
        yield mask, (1 - TSTEP_EPS) / points / t

def ordered_nll(model: Model, x0: Tensor, steps: Tensor) -> Tensor:
    """(B, L) nats of each token given the tokens of earlier steps, and none of its own step, for steps (B, L) int64.

    Positions with a negative step are visible from the start and are not scored. The order is known beforehand, so all
    model calls of all sequences are independent rows; as many run at a time as keep a GPU busy or a CPU in its caches.
    """
    rows = max((65_536 if x0.is_cuda else 2_048) // x0.shape[1], 1)
    calls = steps.amax(1) + 1
    sequence = torch.repeat_interleave(calls)  # (number of rows,)
    step = torch.arange(len(sequence), device=x0.device) - (calls.cumsum(0) - calls)[sequence]
    nats = torch.zeros(x0.shape, device=x0.device)
    for s, now in zip(sequence.split(rows), step[:, None].split(rows), strict=True):
        nats.index_add_(0, s, masked_nll(model, x0[s], steps[s] >= now, steps[s] == now))
    return nats

@torch.no_grad()
def reveal(model: Model, z: Tensor, order: Tensor | None, group: int = 1) -> Iterable[tuple[Tensor, Tensor]]:
    """Fills z (B, L), all MASK, `group` positions a call: yields positions (B, g) and log-probabilities (B, g, V).

    The caller writes the tokens there into z before it goes on: known ones to measure or to encode, decoded ones to
    decode. `order` (B, L) holds positions; None reveals the positions with the largest maximal probability first, which
    no hidden token can influence. Less than 2^-13 nats is a tie, and a tie goes to the leftmost: when all is MASK, all
    positions are alike but for rounding. Elsewhere rounding may decide, so batches of one shape give one order.
    A causal model goes from left to right, one at a time, after <s>.
    """
    rows, length = z.shape
    for done in range(0, length, group):
        masked = z == model.hp.mask_id
        if order is None:
            at = (~masked).byte().argsort(dim=1, stable=True)[:, : length - done]
        else:
            at = order[:, done:done + group]
        seen = z
        if model.hp.objective == "ar":  # what follows is not seen, so it is not computed
            at = torch.full((rows, 1), done, device=z.device)
            seen = F.pad(z[:, :done], (1, 0), value=BOS_ID)
        flat = at + seen.shape[1] * torch.arange(rows, device=z.device)[:, None]
        logits = model.head(model.hidden(seen, masked.float().mean(1), flat.flatten()))
        logp = logits.log_softmax(-1).unflatten(0, at.shape)
        if order is None:
            surest = logp.amax(-1)
            behind = ((surest.amax(1, keepdim=True) - surest) * 2**12).round()
            sure = behind.argsort(dim=1, stable=True)[:, :group]
            at, logp = at.gather(1, sure), logp.take_along_dim(sure[..., None], 1)
        yield at, logp

def chain_rule(model: Model, x0: Tensor, order: str | Tensor = "l2r", group: int = 1, seed: int = 0,
               before: Tensor | int = BOS_ID) -> Tensor:
    """(B, L) nats, indexed by position: −ln p(x_i | what was revealed before its group), an exact and decodable code.

    `order`: l2r, confidence (see `reveal`), random (one permutation, drawn from `seed`), or positions (L,) or (B, L) in
    order of revealing. `group` positions are revealed by one model call. A causal model has one order, l2r, one at a
    time, and is given the token `before` (B,) the first, <s> unless said otherwise.
    """
    count, length = x0.shape
    if model.hp.objective == "ar":
        if isinstance(order, Tensor) or order != "l2r" or group != 1:
            raise InputError("a causal model predicts from left to right, one token at a time: order l2r, group 1")
        first = torch.as_tensor(before, device=x0.device).expand(count)
        return causal_nll(model, torch.cat([first[:, None], x0], dim=1))
    if isinstance(order, str) and order == "confidence":
        nats = torch.zeros(x0.shape, device=x0.device)
        z = torch.full_like(x0, model.hp.mask_id)
        for at, logp in reveal(model, z, None, group):
            tokens = x0.gather(1, at)
            nats.scatter_(1, at, -logp.gather(2, tokens[..., None])[..., 0])
            z.scatter_(1, at, tokens)
        return nats
    if not isinstance(order, Tensor):
        if order not in ("l2r", "random"):
            raise InputError(f"{order} is not an order: l2r, confidence, random or a tensor of positions")
        generator = seeded("cpu", seed, "order")
        order = torch.arange(length) if order == "l2r" else torch.randperm(length, generator=generator)
    steps = (order.to(x0.device).argsort(-1) // group).expand(count, length)
    return ordered_nll(model, x0, steps)

def boundary_bits(count: int, length: int) -> float:
    """Bits for where `count` always visible tokens stand in a window: log2(L + 1) + log2 C(L, count)."""
    return math.log2(length + 1) + math.log2(math.comb(length, count))

CHAIN_BATCH = 16  # windows whose chain rules go side by side

class Score(NamedTuple):
    """A code length of a split. bpb: bits per byte, with its standard error; loss: nats per token."""
    bpb: float
    stderr: float
    loss: float
    seqs: int
    tokens: int
    bytes: int
    ms: float
    calls: int  # windows that went through the model

    def line(self) -> str:
        return (f"bpb:{self.bpb:.4f} stderr:{self.stderr:.4f} seqs:{self.seqs} tokens:{self.tokens} bytes:{self.bytes} "
                f"time:{self.ms:.0f}ms calls:{self.calls} tokens_per_s:{1000 * self.tokens / self.ms:.0f}")

def spaced(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 … total − 1, evenly spaced; all of them for 0."""
    wanted = min(wanted, total) if wanted else total
    return [i * total // wanted for i in range(wanted)]

def ratio(bits: Tensor, size: Tensor) -> tuple[float, float]:
    """Σ bits / Σ bytes over windows (n,), and its standard error with windows as clusters (not a number for one).

    sqrt(Σ (bits_s − ratio·bytes_s)²) / Σ bytes; given differences of bits, it is that of a paired difference.
    """
    bpb = bits.sum() / size.sum()
    stderr = (bits - bpb * size).square().sum().sqrt() / size.sum()
    return bpb.item(), stderr.item() if len(bits) > 1 else math.nan

def row_draws(hp: Hyperparameters, name: str, places: range) -> Callable[[], Tensor]:
    """Uniform keys (B, L) whose rows depend on (seed, place) only, not on the batch or the process."""
    generators = [seeded("cpu", hp.seed, name, place) for place in places]
    return lambda: torch.stack([torch.rand(hp.train_seq_len, generator=g) for g in generators])

def window_nats(name: str, model: Model, hp: Hyperparameters, window: Tensor, scored: Tensor, places: range) -> Tensor:
    """(B,) nats, or (B, L) by position, of windows (B, 1 + L), the token before first, under the score `name`.

    What is not `scored` (B, L), the left context, is visible and free; `places` number the windows, for their seeds.
    """
    if hp.objective == "ar":
        return causal_nll(model, window, scored)
    x0, draw, length = window[:, 1:], row_draws(hp, name, places), hp.train_seq_len
    if name == "confidence":
        return chain_rule(model, x0, "confidence", hp.chain_group)
    if name in CHAIN_RULES:
        order = torch.arange(length).expand(x0.shape) if name != "random" else draw().argsort(1).argsort(1)
        return ordered_nll(model, x0, (order.to(x0.device) - (~scored).sum(1, keepdim=True)) // hp.chain_group)
    if name == "tstep":
        return discrete_elbo(model, x0, hp.tstep_steps, draw=draw)
    if name == "tgrid":
        return weighted_nll(model, x0, tgrid_masks(hp.tgrid_points, draw))
    offset = torch.rand((), generator=seeded("cpu", hp.seed, "nelbo offset"), dtype=torch.float64)
    times = (offset + torch.tensor(places, dtype=torch.float64) * GOLDEN) % 1
    return weighted_nll(model, x0, nelbo_masks(hp.nelbo_passes, times, draw))

def model_calls(name: str, hp: Hyperparameters, scored: int) -> int:
    """How often a window with `scored` tokens to score goes through the model."""
    if name in CHAIN_RULES and hp.objective == "mdlm":
        return -(-scored // hp.chain_group)
    return {"nelbo": hp.nelbo_passes, "tstep": hp.tstep_steps, "tgrid": hp.tgrid_points}.get(name, 1)

def score_windows(name: str, model: Model, hp: Hyperparameters, stream: TokenStream, luts: ByteTables, max_seqs: int,
                  note: Callable[[float], None] = lambda fraction: None) -> tuple[Score, Tensor]:
    """Scores evenly spaced windows, shared over the processes; also bits and bytes (windows, buckets, 2) of each.

    Bucket b holds the positions 2^(b−1) … 2^b − 1 of a window (0: the first), for scores by position; else all is in 0.
    Sliding windows begin STRIDE tokens apart, and only their last STRIDE tokens are scored: of a whole split, all are.
    """
    started, length, device = time.perf_counter(), hp.train_seq_len, luts.base_bytes.device
    stride = min(hp.stride, length) if name == "sliding" else length
    total = stream.count_windows(length, stride)
    numbers = spaced(total, max_seqs)
    batch = min(hp.val_batch_size // length, len(numbers)) // world_size()
    if name in CHAIN_RULES and hp.objective == "mdlm":  # the surest position may depend on rounding, so on the batch
        batch = CHAIN_BATCH if name == "confidence" else min(batch, CHAIN_BATCH)
    batch = max(batch, 1)
    bucket = torch.tensor([i.bit_length() for i in range(length)])
    table = torch.zeros(len(numbers), int(bucket[-1]) + 1, 2, dtype=torch.float64)
    work = torch.zeros(2, dtype=torch.int64)  # tokens, model calls
    for at in range(rank() * batch, len(numbers), world_size() * batch):
        places = range(at, min(at + batch, len(numbers)))
        window = stream.windows([numbers[place] for place in places], length, stride).to(device)
        counts = [stride if numbers[place] or len(numbers) < total else length for place in places]
        work += torch.tensor([[count, model_calls(name, hp, count)] for count in counts]).sum(0)
        scored = torch.arange(length, device=device) >= length - torch.tensor(counts, device=device)[:, None]
        nats = window_nats(name, model, hp, window, scored, places).double()
        size = token_bytes(window[:, 1:], window[:, 0], luts) * scored
        if nats.dim() == 2:
            table[places.start:places.stop].index_add_(1, bucket, torch.stack([nats / math.log(2), size], dim=2).cpu())
        else:
            table[places.start:places.stop, 0] = torch.stack([nats / math.log(2), size.sum(1)], dim=1).cpu()
        note((at + batch) / len(numbers))
    table, (tokens, calls) = all_reduce(table), all_reduce(work).tolist()
    bits, size = table.sum(1).unbind(1)
    if size.sum() == 0:
        raise InputError("the validation windows hold no bytes of text, so there is nothing to divide by")
    return Score(*ratio(bits, size), bits.sum().item() * math.log(2) / tokens, len(numbers), tokens, int(size.sum()),
                 1000 * (time.perf_counter() - started), calls), table

def bucket_name(bucket: int, length: int) -> str:
    """The positions of a bucket: 0, 1, 2-3, 4-7, …"""
    first, last = (1 << bucket) >> 1, min((1 << bucket) - 1, length - 1)
    return f"{first}-{last}" if last > first else f"{first}"

def score_artifact(path: Path, hp: Hyperparameters, val: TokenStream, luts: ByteTables, log: Log) -> None:
    """Scores the weights on disk, read into a fresh model, and logs the headline and the scores that were asked for."""
    header, body, label = unpack_artifact(read_file_everywhere(path), path)
    model, label = restore_artifact(header, body, path)[0].on(luts.base_bytes.device), label.replace("+", "_")
    sizes = {name: getattr(hp, f"{name}_seqs") for name in SCORE_NAMES[1:] if name in hp.score_names}
    if hp.final_eval_t_samples:
        sizes["tgrid"] = hp.final_eval_max_seqs
    if hp.objective == "ar":  # the headline is its chain rule, from left to right, and it has no other order
        for name in [name for name in sizes if name != "sliding"]:
            log(f"score:{name} is not for causal models", screen=name != "l2r")
            del sizes[name]
    total_ms = 0.0
    for name, seqs in {hp.headline: hp.final_eval_max_seqs, **sizes}.items():
        score, table = score_windows(name, model, hp, val, luts, seqs, functools.partial(log.progress, name))
        total_ms += score.ms
        if name == hp.headline:
            log(f"final_{label}_roundtrip val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                f"stderr:{score.stderr:.4f} eval_time:{score.ms:.0f}ms")
            log(f"final_{label}_roundtrip_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        log(f"score:{name} {'biased:1 ' * (name == 'tgrid')}{score.line()}")
        for bucket, part in enumerate(table.unbind(1) if name in ("l2r", "ar") else ()):
            bpb, stderr = ratio(*part.unbind(1))
            log(f"prefix:{bucket_name(bucket, hp.train_seq_len)} bpb:{bpb:.4f} stderr:{stderr:.4f}", screen=False)
    if total_ms > 1000 * BUDGET_SECONDS:
        log(f"OVER BUDGET: evaluation took {total_ms / 1000:.0f} s of the {BUDGET_SECONDS:.0f} s allowed")


# == Training ==========================================================================================================

def progress(hp: Hyperparameters, step: int, elapsed_ms: float) -> float:
    """How much of the run is done, in [0, 1]: of its steps or of its time, whichever is nearer to its end."""
    by_clock = elapsed_ms / (1000 * hp.max_wallclock_seconds) if hp.max_wallclock_seconds else 0.0
    return min(max(step / hp.iterations if hp.iterations else 1.0, by_clock), 1.0)

def lr_scale(hp: Hyperparameters, step: int, elapsed_ms: float) -> float:
    """1, then linearly to 0 over the last WARMDOWN_ITERS steps that the iterations or the clock leave."""
    left = hp.iterations - step
    if hp.max_wallclock_seconds and step >= 10:  # before that, a step's time says little
        left = min(left, (1000 * hp.max_wallclock_seconds - elapsed_ms) / (elapsed_ms / step))
    return min(max(left / hp.warmdown_iters, 0.0), 1.0) if hp.warmdown_iters else 1.0

def micro_batches(hp: Hyperparameters) -> list[range]:
    """This process's rows of every global batch, in equal parts of at most MICRO_BATCH_TOKENS tokens; or InputError."""
    if hp.train_batch_tokens % hp.train_seq_len:
        raise InputError(f"{hp.shown('train_seq_len')} must divide {hp.shown('train_batch_tokens')}")
    if hp.time_sampling == "antithetic" and hp.batch_rows % 2:
        raise InputError(f"TIME_SAMPLING=antithetic needs an even batch, not one of {hp.batch_rows} sequences")
    if hp.batch_rows % world_size():
        raise InputError(f"{hp.shown('train_batch_tokens')} / {hp.shown('train_seq_len')} = {hp.batch_rows} sequences "
                         f"cannot be shared by {world_size()} processes; choose a multiple of "
                         f"{hp.train_seq_len * world_size()} tokens")
    rows = hp.batch_rows // world_size()
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * hp.train_seq_len <= hp.micro_batch_tokens]
    if not fitting:
        raise InputError(f"{hp.shown('micro_batch_tokens')} is less than one sequence, {hp.shown('train_seq_len')}")
    first, size = rank() * rows, fitting[-1]
    return [range(at, at + size) for at in range(first, first + rows, size)]

class Trainer:
    """Weights, optimizer and the one training step; any number of processes and micro-batches gives the same sums."""
    def __init__(self, hp: Hyperparameters, stream: TokenStream, device: torch.device):
        self.hp, self.stream, self.device = hp, stream, device
        self.micros = micro_batches(hp)
        self.capacity = masked_capacity(hp, len(self.micros[0])) if hp.objective == "mdlm" else 0
        self.model = build_model(hp).on(device)
        self.optimizer = Optimizer(self.model, hp)
        self.ema = EMA(hp.ema_decay)
        compiled = device.type == "cuda"
        self.loss = torch.compile(batch_loss, dynamic=False, fullgraph=True) if compiled else batch_loss
        self.events: list = []

    def step(self, step: int, scale: float) -> Tensor:
        """One optimizer step on the global batch of `step`; this process's part of the loss, not yet read."""
        total = torch.zeros((), device=self.device)
        for rows in self.micros:
            batch = training_batch(self.hp, self.stream, step, rows, self.capacity, self.device)
            loss = self.loss(self.model, batch)
            loss.backward()
            total += loss.detach()
        self.optimizer.step(step, scale)
        if self.device.type == "cuda":  # the host stays two steps ahead at most, so that its clock tells the truth
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        return total

    def warm_up(self, log: Log) -> None:
        """Compiles everything on real batches, then restores the initial state."""
        initial = self.optimizer.weights.clone()
        for step in range(self.hp.warmup_steps):
            self.step(step, 1.0)
            log.progress("warm-up", (step + 1) / self.hp.warmup_steps)
        self.optimizer.reset(initial)
        if self.hp.warmup_steps:
            log(f"warmup_step:{self.hp.warmup_steps}/{self.hp.warmup_steps}")

    def validate(self, val: TokenStream, luts: ByteTables) -> Score:
        """One pass over EVAL_MAX_SEQS windows with the averaged weights, if there are any yet."""
        self.ema.swap(self.optimizer.weights)
        hp = dataclasses.replace(self.hp, nelbo_passes=1)
        score = score_windows(hp.headline, self.model, hp, val, luts, hp.eval_max_seqs)[0]
        self.ema.swap(self.optimizer.weights)
        return score

def train(trainer: Trainer, val: TokenStream, luts: ByteTables, log: Log) -> Model:
    """Runs to the last iteration or the wall-clock cap; returns the model with its averaged weights."""
    hp, clock = trainer.hp, Clock(trainer.device)
    trainer.warm_up(log)
    step, elapsed_ms, note = 0, 0.0, ""
    clock.start()
    while True:
        done = progress(hp, step, elapsed_ms)
        if done >= 1 or (hp.val_loss_every and step and step % hp.val_loss_every == 0):
            clock.stop()
            score = trainer.validate(val, luts)
            log(f"step:{step}/{hp.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                f"stderr:{score.stderr:.4f} seqs:{score.seqs} train_time:{clock.ms():.0f}ms "
                f"step_avg:{clock.ms() / max(step, 1):.2f}ms")
            note = f"val_bpb {score.bpb:.3f}"
            clock.start()
        if done >= 1:
            break
        loss = trainer.step(step, lr_scale(hp, step, elapsed_ms))
        step += 1
        elapsed_ms = clock.shared_ms() if hp.max_wallclock_seconds else clock.ms()
        if hp.ema_decay and progress(hp, step, elapsed_ms) >= hp.ema_start_frac:
            if trainer.ema.average is None:
                log(f"ema:started step:{step} decay:{hp.ema_decay}")
            trainer.ema.update(trainer.optimizer.weights)
        if hp.train_log_every and (step <= 10 or step % hp.train_log_every == 0):
            train_loss = all_reduce(loss).item()
            log(f"step:{step}/{hp.iterations} train_loss:{train_loss:.4f} train_time:{clock.ms():.0f}ms "
                f"step_avg:{clock.ms() / step:.2f}ms")
        log.progress("train", done, note)
    if step < hp.iterations:
        log(f"stopping_early: wallclock_cap train_time:{clock.ms():.0f}ms step:{step}/{hp.iterations}")
    trainer.ema.swap(trainer.optimizer.weights)
    return trainer.model


# == Main ==============================================================================================================

def hardware(device: torch.device) -> str:
    """For example 8xNVIDIA_H100_80GB_HBM3 or 2xCPU_AMD_EPYC_(2_threads)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
        name = f"CPU {model[1].strip() if model else 'unknown'} ({torch.get_num_threads()} threads)"
    return f"{world_size()}x{name}".replace(" ", "_")

def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"{allocated >> 20} MiB reserved: {reserved >> 20} MiB"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"

def open_log(hp: Hyperparameters, env: Mapping[str, str], device: torch.device) -> tuple[Hyperparameters, Log]:
    """Starts the log with the source of this file and the resolved hyperparameters; settles RUN_ID."""
    if not hp.run_id:
        hp = dataclasses.replace(hp, run_id=time.strftime("%Y%m%d-%H%M%S_") + hp.preset)
    path, problem = Path("logs") / f"{hp.run_id}.txt", None
    try:
        if rank() == 0 and path.exists():
            problem = InputError(f"{path} is there already: {hp.shown('run_id')} was used before; choose another")
        elif rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except OSError as error:
        problem = InputError(f"{path}: cannot be written: {error.strerror}")
    raise_everywhere(problem)
    log = Log(path)
    log(Path(__file__).read_text(encoding="utf-8"), screen=False)
    log("=" * 100, screen=False)
    log(f"run_id:{hp.run_id} started:{time.strftime('%Y-%m-%dT%H:%M:%S')} log:{log.path}")
    log(f"hardware:{hardware(device)} torch:{torch.__version__} python:{sys.version.split()[0]}")
    fields = [f.name for f in dataclasses.fields(hp)]
    log("hyperparameters: " + " ".join(hp.shown(name) for name in fields), screen=False)
    log("overridden: " + (" ".join(hp.shown(name) for name in fields if name.upper() in env) or "nothing"))
    for warning in near_misses(env):
        log(warning)
    return hp, log

def write_artifact(model: Model, hp: Hyperparameters, path: Path, log: Log) -> None:
    """Packs the model on the first process and logs code + artifact against the limit."""
    problem = None
    try:
        if rank() == 0:
            info = save_artifact(model, hp, path)
            code_bytes, label = len(Path(__file__).read_bytes()), info["label"]
            total = code_bytes + info["artifact_bytes"]
            packers = " ".join(f"{name}:{size}" for name, size in info["packed_bytes"].items())
            log(f"Code size: {code_bytes} bytes")
            log(f"Serialized model {label}: {info['artifact_bytes']} bytes (raw:{info['raw_bytes']} {packers})")
            log(f"Total submission size {label}: {total} bytes")
            if total > SIZE_LIMIT_BYTES:
                over = total - SIZE_LIMIT_BYTES
                log(f"OVER BUDGET: {total} bytes is {over} more than the {SIZE_LIMIT_BYTES} allowed")
    except (InputError, OSError) as error:
        problem = InputError(f"{path}: the artifact could not be written: {error}")
    raise_everywhere(problem)

def run(env: Mapping[str, str]) -> None:
    """configure → data → train → pack → unpack → score → log."""
    hp = Hyperparameters.from_env(env)
    device = start_ranks()
    artifact = None
    if hp.eval_only:
        artifact, packed = Path(hp.eval_only), load_artifact(hp.eval_only)[1]
        for name in stored_fields()[1:]:
            if name.upper() in env and getattr(hp, name) != getattr(packed, name):
                raise InputError(f"{hp.shown(name)}, but {artifact} was made with {packed.shown(name)}")
        hp = dataclasses.replace(hp, **{name: getattr(packed, name) for name in stored_fields()[1:]})
    hp = dataclasses.replace(hp, compute_dtype=resolve_dtype(hp, device))  # the artifact carries it
    val = TokenStream(hp.data_path, "val")
    luts = build_sentencepiece_luts(load_tokenizer(hp.tokenizer_path, hp.vocab_size), hp.vocab_size, device)
    if not val.count_windows(hp.train_seq_len):
        raise InputError(f"{val.files[0]}: the validation split has {val.total} tokens, less than a window of "
                         f"{hp.shown('train_seq_len')} and the token before it")
    val.check_tokens(hp.vocab_size)
    if not artifact:
        stream = TokenStream(hp.data_path, "train")
        stream.check_tokens(hp.vocab_size, 1 + max(hp.iterations, hp.warmup_steps) * hp.train_batch_tokens)
        micro_batches(hp)
    hp, log = open_log(hp, env, device)
    log(f"dataset:{Path(hp.data_path).name} val_tokens:{val.total} "
        f"val_windows:{val.count_windows(hp.train_seq_len)}" + ("" if artifact else f" train_tokens:{stream.total}"))
    if artifact:
        log(f"eval_only:{artifact} compute_dtype:{hp.compute_dtype}")
    else:
        trainer = Trainer(hp, stream, device)
        log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
        log(f"world_size:{world_size()} grad_accum_steps:{len(trainer.micros)} compute_dtype:{hp.compute_dtype}")
        model = train(trainer, val, luts, log)
        log(f"peak memory allocated: {peak_memory(device)}")
        artifact = Path("logs") / f"{hp.run_id}.mdlm"
        write_artifact(model, hp, artifact, log)
    score_artifact(artifact, hp, val, luts, log)

def main() -> None:
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(help_text())
        return
    try:
        if len(sys.argv) > 1:
            raise InputError(f"{sys.argv[1]}: hyperparameters are environment variables; see --help")
        run(os.environ)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every machine
            print(f"train_mdlm.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
