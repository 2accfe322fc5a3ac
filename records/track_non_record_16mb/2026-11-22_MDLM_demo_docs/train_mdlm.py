"""Masked diffusion language models for parameter golf: train, pack into 16,000,000 bytes, score as a code length.

Claim: every score this file prints is the length of a code that somebody could decode (but one, printed as biased:1,
which repeats a published estimator). The defaults are PR 1699 of the challenge, published at 1.4784 bits per byte;
presets llada and eos are PR 1106 and PR 1241, ar is the causal baseline, golf what records/README.md found better.

    PRESET=demo torchrun --standalone --nproc_per_node=1 train_mdlm.py  after data/prepare_text.py --source docs
    torchrun --standalone --nproc_per_node=8 train_mdlm.py              8xH100, after data/fetch_fineweb.py
    EVAL_ONLY=logs/<run>.mdlm torchrun ... train_mdlm.py                score an artifact again; --help: every knob

Sections: hyperparameters · ranks, clock and log · data and bytes · noise · model · loss · optimizers and EMA ·
artifact · scoring · training · main. Importing has no side effect. Shape letters: B sequences, L positions, D width,
H heads, V real tokens, N scored positions of a batch. MASK is token V, PAD is V + 1: seen, never predicted.
"""

from __future__ import annotations
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
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
SIZE_LIMIT_BYTES, BUDGET_SECONDS = 16_000_000, 600.0  # code + artifact; training, and again evaluation
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly, however many are taken
class InputError(ValueError):
    """Something the user gave is wrong: one line that names the value, the place and the remedy."""
# == Hyperparameters ===================================================================================================
def knob(group: str, default, meaning: str, unit: str = "", low=0, high=1e12, choices: str = ""):
    """A hyperparameter: the environment variable is its name in capitals; numbers lie in [low, high]."""
    return dataclasses.field(default=default, metadata=dict(group=group, meaning=meaning, unit=unit, low=low, high=high,
                                                            choices=choices.split("|") if choices else []))
SCORE_NAMES = ("nelbo", *(CHAIN_RULES := ("l2r", "sliding", "confidence", "random")), "tstep", "tgrid")
LLADA = dict(  # PR 1106
    backbone="dit", num_layers=11, model_dim=512, num_kv_heads=8, mlp_mult=3, tie_embeddings=False, logit_softcap=0.0,
    train_seq_len=2048, time_sampling="antithetic", mask_eps=0.0, mask_max=0.999, loss_weight="dsigma", ema_decay=0.0,
    weight_clamp=1000.0, iterations=6000, lr_warmup_steps=300, warmdown_iters=1500, warmdown_shape="cosine",
    min_lr_frac=0.1, train_batch_tokens=65_536, optimizer="adamw", weight_decay=0.1, weight_decay_on="all",
    **dict.fromkeys(("matrix_lr", "embed_lr", "head_lr", "tied_embed_lr", "scalar_lr"), 6e-4),
    scores="nelbo,l2r,tstep", tstep_seqs=500, tstep_steps=512)
MDLM16 = dict(num_layers=11, quant_mode="int7,embed:int8", quant_clip=10.0, quant_feedback=4)  # as many as fit
GOLF = MDLM16 | dict(num_layers=8, mlp_mult=3, num_kv_heads=2, neighbors=2, masking="count", mask_dist="normal",
                     loss_weight="flat", ema_decay=0.0, warmdown_iters=0, warmdown_frac=0.5,
                     adam_batch_tokens=524_288, embed_lr=0.2, tied_embed_init_std=0.05)
PRESETS: dict[str, dict] = {
    "mdlm": {}, "mdlm16": MDLM16, "golf": GOLF, "llada": LLADA,  # mdlm, PR 1699, is the defaults below
    "eos": LLADA | dict(doc_chunks=True, anchor_bos=True, lr_cycle_steps=6000, tstep_steps=128),  # PR 1241
    "ar": dict(objective="ar", num_layers=9, model_dim=512, matrix_lr=0.04, grad_clip_norm=0.0, ema_decay=0.0),
    "demo": GOLF | dict(  # two CPU cores, a few minutes, the documentation of the installed packages
        data_path="./data/datasets/docs_sp1024", tokenizer_path="./data/tokenizers/docs_1024_bpe.model",
        num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, train_seq_len=128, rope_base=100.0, iterations=1300,
        max_wallclock_seconds=400.0, warmup_steps=0, train_batch_tokens=2048, train_log_every=100, val_loss_every=200,
        mlp_mult=2, eval_max_seqs=256, nelbo_passes=1, l2r_seqs=32, val_batch_size=2048),
}
@dataclasses.dataclass(frozen=True, init=False)
class Hyperparameters:
    """Resolved configuration: the defaults, then the preset's row of PRESETS, then the given values; or InputError."""
    preset: str = knob("run", "mdlm", "named configuration; the other variables override it", choices="|".join(PRESETS))
    run_id: str = knob("run", "", "names logs/<RUN_ID>.txt and logs/<RUN_ID>.mdlm; empty: time, process and preset")
    eval_only: str = knob("run", "", "path of an artifact to score instead of training")
    data_path: str = knob("data", "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = knob("data", "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    objective: str = knob("model", "mdlm", "masked diffusion, or causal next-token prediction", choices="mdlm|ar")
    backbone: str = knob("model", "unet", "the challenge's trunk, or a stack told the noise level", choices="unet|dit")
    vocab_size: int = knob("model", 1024, "real tokens V; MASK is V, PAD is V + 1", "tokens", low=2, high=65_534)
    doc_chunks: bool = knob("model", False, "train on documents, cut into chunks of at most L tokens, PAD after them")
    anchor_bos: bool = knob("model", False, "<s> is never masked; scores pay for where it is")
    train_seq_len: int = knob("model", 1024, "length L of a training and of a scoring window", "tokens", low=1)
    num_layers: int = knob("model", 8, "blocks; the U-Net's first half feeds skips to the second", low=1, high=200)
    model_dim: int = knob("model", 576, "width D of the residual stream", low=2)
    num_heads: int = knob("model", 8, "attention heads H", low=1)
    num_kv_heads: int = knob("model", 4, "key/value heads, each shared by a group of query heads", low=1)
    mlp_mult: int = knob("model", 2, "hidden width of the ReLU² MLP", "× MODEL_DIM", low=1)
    tie_embeddings: bool = knob("model", True, "output head = first V rows of the embedding")
    neighbors: int = knob("model", 0, "embeddings of the nearest tokens, added to the input", "on each side", high=64)
    rope_base: float = knob("model", 10_000.0, "base of the rotary frequencies", low=1)
    logit_softcap: float = knob("model", 30.0, "logits are cap·tanh(logits/cap); 0 leaves them alone")
    qk_gain_init: float = knob("model", 1.5, "initial gain of the normalised queries")
    tied_embed_init_std: float = knob("model", 0.005, "standard deviation of the initial tied embedding")
    compute_dtype: str = knob("model", "auto", "of activations; auto: GPUs bfloat16", choices="auto|float32|bfloat16")
    masking: str = knob("noise", "bernoulli", "each token alone, or exactly k tokens", choices="bernoulli|count")
    time_sampling: str = knob("noise", "stratified", "of a batch's times", choices="stratified|antithetic|uniform")
    mask_dist: str = knob("noise", "uniform", "of mask probabilities", choices="uniform|normal")
    mask_mean: float = knob("noise", 0.45, "of the normal distribution, clamped to MASK_EPS and MASK_MAX", high=1)
    mask_std: float = knob("noise", 0.1, "its standard deviation", low=1e-6, high=10)
    mask_eps: float = knob("noise", 0.001, "smallest mask probability", high=1)
    mask_max: float = knob("noise", 1.0, "largest mask probability", high=1)
    loss_weight: str = knob("noise", "elbo", "at probability p: 1/p, ~ 1/(1 − p), 1", choices="elbo|dsigma|flat")
    weight_clamp: float = knob("noise", 100.0, "largest loss weight", low=1)
    seed: int = knob("training", 1337, "of initial weights, mask times and masks", high=2**63 - 1)
    iterations: int = knob("training", 20_000, "optimizer steps at most", "steps", high=2**24)
    max_wallclock_seconds: float = knob("training", 600.0, "training time at most; 0: no limit", "s")
    lr_warmup_steps: int = knob("training", 0, "linear growth of the learning rates at the start", "steps")
    warmdown_iters: int = knob("training", 1200, "decay of the learning rates at the end; 0: WARMDOWN_FRAC", "steps")
    warmdown_frac: float = knob("training", 0.0, "that decay's share of the clock or steps", high=1)
    warmdown_shape: str = knob("training", "linear", "of that decay", choices="linear|cosine")
    min_lr_frac: float = knob("training", 0.0, "where it ends, of the full learning rates", high=1)
    lr_cycle_steps: int = knob("training", 0, "growth and decay start again every so many steps; 0: never", "steps")
    train_batch_tokens: int = knob("training", 524_288, "tokens of the global batch", "tokens", low=1)
    compile: str = knob("running", "auto", "the loss, with torch.compile; auto: on GPUs", choices="auto|on|off")
    warmup_steps: int = knob("running", 20, "compile warm-up, undone before training starts", "steps")
    micro_batch_tokens: int = knob("running", 65_536, "tokens of one pass of one process at most", "tokens", low=1)
    train_log_every: int = knob("running", 200, "between log lines (the first 10 steps always log; 0: none)", "steps")
    val_loss_every: int = knob("running", 1000, "between validations; 0: only at the end", "steps")
    checkpoint_every: float = knob("running", 300.0, "training time between checkpoints; 0: only on a signal", "s")
    resume: str = knob("running", "auto", "from a checkpoint of this RUN_ID if there is one; or never, or a path")
    skip_nonfinite: int = knob("running", 0, "with gradients that are not finite, before the run stops", "steps")
    optimizer: str = knob("optimizer", "muon", "of the block matrices; the rest has AdamW", choices="muon|adamw")
    matrix_lr: float = knob("optimizer", 0.02, "learning rate of the block matrices")
    tied_embed_lr: float = knob("optimizer", 0.05, "Adam learning rate of a tied embedding")
    embed_lr: float = knob("optimizer", 0.6, "Adam learning rate of an untied embedding, and of neighbors'")
    head_lr: float = knob("optimizer", 0.008, "Adam learning rate of an untied head")
    scalar_lr: float = knob("optimizer", 0.04, "Adam learning rate of gains, scales, skips and biases")
    weight_decay: float = knob("optimizer", 0.0, "decoupled decay a step, times the learning rate")
    weight_decay_on: str = knob("optimizer", "matrices", "block and head matrices, or all", choices="matrices|all")
    muon_momentum: float = knob("optimizer", 0.95, "Nesterov momentum of Muon", high=1)
    muon_momentum_warmup_start: float = knob("optimizer", 0.85, "Muon momentum at step 0", high=1)
    muon_momentum_warmup_steps: int = knob("optimizer", 500, "until MUON_MOMENTUM is reached", "steps")
    muon_backend_steps: int = knob("optimizer", 5, "Newton-Schulz iterations", low=1)
    beta1: float = knob("optimizer", 0.9, "Adam", high=0.999999)
    beta2: float = knob("optimizer", 0.95, "Adam", high=0.999999)
    adam_eps: float = knob("optimizer", 1e-8, "Adam", low=1e-30)
    adam_batch_tokens: int = knob("optimizer", 0, "batch of Adam's *_LR that are not given, × √ratio; 0: any", "tokens")
    grad_clip_norm: float = knob("optimizer", 1.0, "largest norm of the whole gradient; 0: no limit")
    ema_decay: float = knob("optimizer", 0.999, "decay a step of the averaged weights; 0: no averaging", high=1)
    ema_start_frac: float = knob("optimizer", 0.1, "averaging starts at this share of the clock or steps", high=1)
    quant_mode: str = knob("export", "fp8", "fp8, fp8_row, int4 … int8, fp16 or fp32; by kind: embed:int8,matrix:int6")
    quant_clip: float = knob("export", 0.0, "the largest code; 0: least squares; with feedback ≥ 10", "× RMS", high=16)
    quant_feedback: int = knob("export", 0, "rounding corrects itself for the inputs of so many; 0: nearest", "batches")
    pack: str = knob("export", "auto", "compressor; auto: the smallest", choices="auto|zlib|huffman|lzma|zstd")
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
        for name in overrides.keys() - known.keys():
            raise InputError(f"unknown hyperparameter {name}{did_you_mean(name, known)}")
        implied = {"preset": preset} | ({"warmdown_iters": 0} if "warmdown_frac" in overrides else {})
        values = {n: f.default for n, f in known.items()} | PRESETS.get(preset, {}) | implied | overrides
        for name, value in values.items():
            object.__setattr__(self, name, checked_value(known[name], value))
        ratio = self.train_batch_tokens / (self.adam_batch_tokens or self.train_batch_tokens)
        for name in {"tied_embed_lr", "embed_lr", "head_lr", "scalar_lr"} - overrides.keys():
            object.__setattr__(self, name, getattr(self, name) * ratio**0.5)
        self._check_together()
    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Hyperparameters:
        """Reads every known variable of `env`; others are ignored (see `near_misses`)."""
        return cls(**{f.name: env[f.name.upper()] for f in dataclasses.fields(cls) if f.name.upper() in env})
    def _check_together(self) -> None:
        shown, causal = self.shown, self.objective == "ar"
        foreign, kinds = [name for name in self.score_names if name not in SCORE_NAMES], [kind.name for kind in KINDS]
        unstored = [kind for kind, storage in self.storages.items() if kind not in kinds or storage not in QUANTIZERS]
        for wrong, message in (
            (self.model_dim % self.num_heads, f"{shown('num_heads')} must divide {shown('model_dim')}"),
            (self.num_heads % self.num_kv_heads, f"{shown('num_kv_heads')} must divide {shown('num_heads')}"),
            (self.head_dim % 2, f"{shown('model_dim')} / {shown('num_heads')} must be even for rotary embeddings"),
            (self.mask_eps >= self.mask_max, f"{shown('mask_eps')} must be smaller than {shown('mask_max')}"),
            (causal and (self.backbone != "unet" or self.doc_chunks or self.anchor_bos),
             f"OBJECTIVE=ar does not go with {shown('backbone')} {shown('doc_chunks')} {shown('anchor_bos')}"),
            (foreign, f"{shown('scores')}: {', '.join(foreign)} is not one of {', '.join(SCORE_NAMES)}"),
            (unstored, f"{shown('quant_mode')}: {', '.join(kinds)}, or all of them, may be {', '.join(QUANTIZERS)}"),
            (self.pack == "zstd" and not zstandard, "PACK=zstd needs zstandard: pip install -r requirements.txt"),
            (re.search(r"[^\w.+=@-]|^\.", self.run_id), f"{shown('run_id')}: letters, digits, _+=@-, dots inside")):
            if wrong:
                raise InputError(message)
    def shown(self, name: str) -> str:
        value = getattr(self, name)
        return f"{name.upper()}={int(value) if isinstance(value, bool) else value}"
    @property
    def storages(self) -> dict[str, str]:
        """Storage by kind of parameter: what QUANT_MODE says of the kind, else the table of kinds, else of all."""
        parts = [part.strip().rpartition(":")[::2] for part in self.quant_mode.split(",")]
        said = dict(parts) if len(dict(parts)) == len(parts) else {"": "two at once"}
        default = said.pop("", "fp8")
        return {kind.name: kind.storage or default for kind in KINDS} | said
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    mask_id = property(lambda self: self.vocab_size)
    pad_id = property(lambda self: self.vocab_size + 1)
    score_names = property(lambda self: [name.strip() for name in self.scores.split(",") if name.strip()])
    headline = property(lambda self: "ar" if self.objective == "ar" else "nelbo", doc="the score behind val_bpb")
    batch_rows = property(lambda self: self.train_batch_tokens // self.train_seq_len, doc="sequences a global batch")
def checked_value(spec: dataclasses.Field, value):
    """`value` (a string from the environment, or a Python value) as the type of the field; InputError names it."""
    name, kind, limits = spec.name.upper(), type(spec.default), spec.metadata
    parse = {"0": False, "1": True, "false": False, "true": True}.__getitem__ if kind is bool else kind
    try:
        value = parse(value.strip().lower() if kind is bool else value) if isinstance(value, str) else value
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "0 or 1", str: "text"}[kind]
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
    hints = {name: did_you_mean(name, known) for name in sorted(env) if name not in known}
    return [f"warning: environment variable {name} is not read{hint}" for name, hint in hints.items() if hint]
def help_text() -> str:
    """The table that --help prints: name, default, unit, meaning, choices, and the presets that change it."""
    lines, group = [__doc__.strip(), "", "Environment variables:"], ""
    presets = {name: Hyperparameters(preset=name) for name in PRESETS}
    for spec in dataclasses.fields(Hyperparameters):
        about = spec.metadata
        lines, group = lines + ["", f"  {about['group']}"] * (about["group"] != group), about["group"]
        meaning = about["meaning"] + f" [{about['unit']}]" * bool(about["unit"])
        lines += [f"    {presets['mdlm'].shown(spec.name):<36} {meaning}"]
        changed = [f"{name}: {hp.shown(spec.name).partition('=')[2]}" for name, hp in presets.items()
                   if getattr(hp, spec.name) != getattr(presets["mdlm"], spec.name) and spec.name != "preset"]
        lines += [f"{'':<43}{note}" for note in (" | ".join(about["choices"]), "; ".join(changed)) if note]
    return "\n".join(lines)
# == Ranks, clock and log ==============================================================================================
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
def together(collective: Callable, *arguments, **options) -> None:
    """A collective of torch.distributed; InputError if one of the processes is no longer there."""
    try:
        if world_size() > 1:
            collective(*arguments, **options)
    except RuntimeError as error:
        raise InputError(f"another process of the group is lost: {str(error).splitlines()[0]}") from None
def all_reduce(tensor: Tensor) -> Tensor:
    together(dist.all_reduce, tensor)
    return tensor
def start_ranks() -> torch.device:
    """Joins the process group that torchrun describes (or a group of one) and returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device, found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.cuda.device_count()
        if device.index >= found:
            raise InputError(f"--nproc_per_node is more than {found}, the GPUs of this machine")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # control messages go through gloo, they never wait for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device
def on_signals(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
def on_first_process(work: Callable):
    """What work() returns on the first process, on all of them; what it finds wrong is an InputError on all of them."""
    result = [None, None]
    try:
        result[0] = work() if rank() == 0 else None
    except (InputError, OSError) as error:
        result[1] = InputError(reason(error))
    together(dist.broadcast_object_list, result, src=0, device=torch.device("cpu"))
    if result[1]:
        raise result[1]
    return result[0]
def reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by a signal, or after another process; with its RUN_ID a run goes on from its last checkpoint"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return "out of memory: lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or the size of the model"
    if isinstance(error, RuntimeError) and re.search(r"\bC(\+\+)? compiler", str(error)):
        return "torch.compile finds no C++ compiler: install one, for example g++, or give COMPILE=off"
    if isinstance(error, OSError):
        return f"{error.filename or 'the log or the screen'}: cannot be read or written: {error.strerror}"
    return " ".join(str(error).split())
class Clock:
    """Training time, over all lives of a run; what is done while it is paused counts in `apart`, in seconds by name."""
    def __init__(self, device: torch.device):
        self.device, self.stopped, self.apart = device, False, {}
        self.started = self.now()
    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
    def read(self) -> tuple[float, bool]:
        """Milliseconds, the mean of the processes, and whether one was told to stop: so all of them decide alike."""
        own = [1000 * (time.perf_counter() - self.started), self.stopped]
        ms, stopped = all_reduce(torch.tensor(own, dtype=torch.float64)).tolist()
        return ms / world_size(), stopped > 0
    @contextlib.contextmanager
    def paused(self, name: str) -> Iterable[None]:
        since = self.now()
        yield
        spent = self.now() - since
        self.started, self.apart[name] = self.started + spent, self.apart.get(name, 0.0) + spent
class Log:
    """The first process's lines, on the screen and in a file; on a terminal also a progress bar below them."""
    def __init__(self, path: Path | None = None):
        self.path, self.bar = path, rank() == 0 and sys.stdout.isatty()
        self.phase, self.drawn = ("", 0.0, 0.0), 0.0  # name, start and first fraction of the bar; when it was drawn
    def __call__(self, line: str, screen: bool = True, every_rank: bool = False) -> None:
        if screen and rank() == 0:
            print("\r\x1b[K" * self.bar + line, flush=True)
        if self.path and (every_rank or rank() == 0):
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
    def progress(self, name: str, fraction: float, note: str = "") -> None:
        """Redraws the bar at most five times a second; `fraction` in [0, 1], the time left follows from it."""
        now = time.monotonic()
        if not self.bar or (now - self.drawn < 0.2 and 0.0 < fraction < 1.0):
            return
        self.phase, self.drawn = self.phase if name == self.phase[0] else (name, now, fraction), now
        speed = (fraction - self.phase[2]) / max(now - self.phase[1], 1e-9)
        left = "{}:{:02d} left".format(*divmod(int((1 - fraction) / speed), 60)) if speed > 0 else ""
        line = f"{name} {'█' * int(30 * fraction):░<30} {100 * fraction:3.0f} % {left} {note}"
        print("\r\x1b[K" + line * (fraction < 1.0), end="", flush=True)
def log_budget(log: Log, name: str, value: float, limit: float, unit: str, note: str = "") -> None:
    """What the challenge limits, and whether it is more than that."""
    log(f"{name}: {round(value, 1)} {unit}{note}")
    if value > limit:
        log(f"OVER BUDGET: {name} is {round(value, 1)} {unit}, {round(value - limit, 1)} more than allowed")
# == Data and bytes ====================================================================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
BOS_ID = 1  # <s> in the challenge's tokenizers
REMEDY = "run 'python data/prepare_text.py --source docs' (for PRESET=demo) or 'python data/fetch_fineweb.py'"
def open_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard of the challenge: 256 little-endian int32 (magic, version, number of tokens), then uint16."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path}: not a token shard (bad header); {REMEDY}")
    if header[2] < 1 or size != 4 * SHARD_HEADER_INTS + 2 * int(header[2]):
        raise InputError(f"{path}: truncated or damaged, its header says {header[2]} tokens; {REMEDY}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(int(header[2]),))
class TokenStream:
    """The shards of one split end to end, as a ring: after the last token comes the first."""
    def __init__(self, folder: str | Path, split: str):
        self.files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
        if not self.files:
            raise InputError(f"no {split} shards in DATA_PATH={folder}; {REMEDY}")
        sizes, self.digest = np.array([len(open_shard(path)) for path in self.files]), 0
        self.ends, self.begins, self.total = sizes.cumsum(), sizes.cumsum() - sizes, int(sizes.sum())
    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the ring, uint16."""
        parts = []
        while count > 0:
            i = int(np.searchsorted(self.ends, start % self.total, side="right"))
            size, at = min(int(self.ends[i]) - start % self.total, count), start % self.total - int(self.begins[i])
            parts.append(np.fromfile(self.files[i], "<u2", size, offset=4 * SHARD_HEADER_INTS + 2 * at))
            if len(parts[-1]) < size:
                raise InputError(f"{self.files[i]}: was cut off while it was in use")
            start, count = start + size, count - size
        return np.concatenate(parts)
    def windows(self, numbers: Iterable[int], length: int, stride: int = 0) -> Tensor:
        """(B, 1 + length) int64: window n is token n·stride and the `length` after it; without a stride end to end."""
        if isinstance(numbers, range) and not stride:  # neighbours, as in training
            tokens = torch.from_numpy(self.read(numbers.start * length, 1 + len(numbers) * length)).long()
            return tokens.unfold(0, 1 + length, length)
        return torch.from_numpy(np.stack([self.read(n * (stride or length), 1 + length) for n in numbers])).long()
    def count_windows(self, length: int, stride: int = 0) -> int:
        """Whole windows without going round the ring; the very first token is only ever a predecessor."""
        return max(1 + (self.total - 1 - length) // (stride or length), 0)
    def order(self, epoch: int) -> Sequence[int]:
        return range(len(self.files))
    def check_tokens(self, vocab_size: int, first_tokens: float = math.inf) -> None:
        """Reads what a run can touch, and keeps its checksum; InputError for a token ≥ vocab_size."""
        before = 0
        for i in self.order(0):
            shard = open_shard(self.files[i])
            if before < first_tokens:
                self.digest = zlib.crc32(shard, self.digest)
                if (largest := int(shard.max())) >= vocab_size:
                    raise InputError(f"{self.files[i]}: holds token {largest}, but VOCAB_SIZE={vocab_size}; it was "
                                     "made with another tokenizer")
            before += len(shard)
class DocumentStream(TokenStream):
    """The same shards as documents, from <s> to <s>, cut into chunks of at most L tokens, then PAD; epoch after epoch,
    the shards and the chunks of a shard come in orders that depend on (seed, epoch), two shards at most in use."""
    def __init__(self, folder: str | Path, split: str, hp: Hyperparameters):
        super().__init__(folder, split)
        self.length, self.pad_id, self.seed = hp.train_seq_len, hp.pad_id, hp.seed
        self.firsts = [0]  # number of the first chunk of every visit of a shard, as far as is known
        self.visit = functools.lru_cache(maxsize=2)(self._visit)
    def order(self, epoch: int) -> Sequence[int]:
        return torch.randperm(len(self.files), generator=seeded("cpu", self.seed, "shards", epoch)).tolist()
    def _visit(self, visit: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """The tokens of a shard, where its chunks begin (and the last one ends), and the order of its chunks."""
        epoch, place = divmod(visit, len(self.files))
        shard = np.array(open_shard(self.files[self.order(epoch)[place]]))  # a file that changes does no harm
        documents = np.union1d([0], np.flatnonzero(shard == BOS_ID))  # a shard may begin inside a document
        chunks = -(-np.diff(documents, append=len(shard)) // self.length)
        inside = np.arange(chunks.sum()) - np.repeat(chunks.cumsum() - chunks, chunks)
        starts = np.append(np.repeat(documents, chunks) + self.length * inside, len(shard))
        return shard, starts, torch.randperm(len(inside), generator=seeded("cpu", self.seed, "chunks", visit))
    def chunk(self, number: int) -> np.ndarray:
        """The tokens of a chunk, uint16."""
        while self.firsts[-1] <= number:
            self.firsts.append(self.firsts[-1] + len(self.visit(len(self.firsts) - 1)[2]))
        visit = int(np.searchsorted(self.firsts, number, side="right")) - 1
        shard, starts, order = self.visit(visit)
        at = int(order[number - self.firsts[visit]])
        return shard[starts[at]:starts[at + 1]]
    def windows(self, numbers: Iterable[int], length: int, stride: int = 0) -> Tensor:
        """(B, 1 + length) int64: PAD, then the tokens of a chunk, then PAD."""
        rows = [np.pad(c, (1, length - len(c)), constant_values=self.pad_id) for c in map(self.chunk, numbers)]
        return torch.from_numpy(np.stack(rows)).long()
class ByteTables(NamedTuple):
    """What each token adds to the text, for all ids < table size (the challenge's tables, plus `keeps_space`)."""
    base_bytes: Tensor  # (table,) int64, UTF-8 bytes without the leading space
    has_leading_space: Tensor  # (table,) bool
    is_boundary: Tensor  # (table,) bool: control and unknown tokens, which stand for no text
    keeps_space: bool  # whether the first piece after a boundary keeps its leading space when decoded
def build_sentencepiece_luts(sp, vocab_size: int, device: torch.device | str = "cpu") -> ByteTables:
    """Byte tables of a SentencePiece model, exact for pieces with several spaces and for text that starts with one."""
    size = max(int(sp.vocab_size()), vocab_size + 2)  # MASK and PAD stand for no text
    base, space, boundary = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
    for token in range(int(sp.vocab_size())):
        if not (sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)):
            piece, boundary[token] = sp.id_to_piece(token), False
            space[token] = piece.startswith("\u2581")
            base[token] = 1 if sp.is_byte(token) else len(piece.replace("\u2581", " ").encode()) - space[token]
    keeps_space = space.any() and sp.decode([int(space.argmax())]).startswith(" ")  # every piece behaves alike: ask one
    return ByteTables(*(torch.from_numpy(table).to(device) for table in (base, space, boundary)), bool(keeps_space))
def token_bytes(tokens: Tensor, prev: Tensor | int, luts: ByteTables) -> Tensor:
    """(…, L) int64: exact UTF-8 bytes of the text that each of tokens (…, L) adds; `prev` (…) is the token before."""
    tokens = torch.as_tensor(tokens, dtype=torch.int64, device=luts.base_bytes.device)
    first = torch.as_tensor(prev, dtype=torch.int64, device=tokens.device).expand(tokens.shape[:-1])
    before = torch.cat([first[..., None], tokens[..., :-1]], dim=-1)
    return luts.base_bytes[tokens] + (luts.has_leading_space[tokens] & (luts.keeps_space | ~luts.is_boundary[before]))
def count_bytes(tokens: Tensor, prev: Tensor | int, luts: ByteTables) -> Tensor:
    """(…) int64: exact UTF-8 bytes of the text that tokens (…, L) add after the token `prev` (…) before them."""
    return token_bytes(tokens, prev, luts).sum(-1)
def load_tokenizer(path: str, vocab_size: int):
    """The SentencePiece model at `path`; InputError when it is missing, foreign or of another size."""
    import sentencepiece
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
        sp.id_to_piece(list(range(sp.vocab_size())))  # are they all text?
    except (RuntimeError, OSError, ValueError):
        raise InputError(f"TOKENIZER_PATH={path}: there is no SentencePiece model; {REMEDY}") from None
    if int(sp.vocab_size()) != vocab_size:
        raise InputError(f"{path}: has {sp.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return sp
def check_tokenizer(path: str, sp, stream: TokenStream, luts: ByteTables) -> None:
    """InputError unless the text of the first tokens is tokenized to them again, nearly; but tokens none of which is
    more frequent than by chance are not text, so no tokenizer is theirs."""
    def pairs(documents: Iterable[Sequence[int]]) -> collections.Counter:
        return collections.Counter(pair for document in documents for pair in itertools.pairwise(document))
    tokens, boundary = stream.read(0, min(stream.total, 50_000)), luts.is_boundary.cpu().numpy()
    parts = [part[~boundary[part]].tolist() for part in np.split(tokens, np.flatnonzero(boundary[tokens]))]
    stored, again = pairs(parts), pairs(sp.encode(sp.decode(parts)))
    text = np.bincount(tokens).max() > 10 + 4 * len(tokens) / len(boundary)
    if text and (stored & again).total() < 0.99 * stored.total():
        raise InputError(f"{path}: is not the tokenizer that made {stream.files[0]}; it splits the text differently")
# == Noise: when and what to mask ======================================================================================
def seeded(device: torch.device | str, *key) -> torch.Generator:
    """A generator that depends on `key` only, for example (seed, "train", step)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
def sample_times(kind: str, u: Tensor) -> Tensor:
    """Mask times t (B,) in [0, 1] from uniform draws u (B,); stratified: one offset, a row in each of B equal strata
    (Sahoo et al. 2024), ordered so that any few neighbours are spread evenly too; antithetic: pairs t, 1 − t."""
    if kind == "stratified":
        strata = (torch.arange(len(u), dtype=torch.float64, device=u.device) * GOLDEN % 1).argsort().argsort()
        return (strata + u[0]) / len(u)
    if kind == "antithetic":
        return torch.stack([u, 1 - u], dim=1).flatten()[:len(u)]
    return u
def mask_probability(hp: Hyperparameters, u: Tensor) -> Tensor:
    """(B,) probability that a token is masked: uniform on [MASK_EPS, MASK_MAX], or normal and clamped to it."""
    t = sample_times(hp.time_sampling, u)
    if hp.mask_dist == "normal":
        return (hp.mask_mean + hp.mask_std * torch.special.ndtri(t)).clamp(hp.mask_eps, hp.mask_max)
    return hp.mask_eps + (hp.mask_max - hp.mask_eps) * t
def hideable(hp: Hyperparameters, x: Tensor) -> Tensor:
    """(B, L) bool: what noise may mask (or has masked) in x (B, L): not PAD and, with ANCHOR_BOS, not <s>."""
    return (x != hp.pad_id) & (x != BOS_ID) if hp.anchor_bos else x != hp.pad_id
def mask_exactly(k: Tensor, keys: Tensor) -> Tensor:
    """Masks the k (B,) positions of each row with the smallest keys (B, L); (B, L) bool."""
    return keys.argsort(-1).argsort(-1) < k[:, None]
def draw_noise(hp: Hyperparameters, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a global batch: mask probabilities (B,), and uniform keys (B, L) that decide what they mask."""
    draw = functools.partial(torch.rand, generator=generator, device=generator.device)
    return mask_probability(hp, draw(hp.batch_rows)), draw(hp.batch_rows, hp.train_seq_len)
def apply_noise(hp: Hyperparameters, x0: Tensor, probability: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks x0 (B, L): the mask (B, L) bool, the loss weight (B,) of its tokens, and the probability (B,) behind it."""
    free, told, mask = hideable(hp, x0), probability, keys < probability[:, None]
    if hp.masking == "count":
        count = free.sum(1).clamp(min=1)
        k = (probability * count).ceil().clamp(min=1)
        mask, told = mask_exactly(k, torch.where(free, keys, 2)), k / count
    weight = {"flat": torch.ones_like(probability), "elbo": 1 / told,  # elbo is the bound's weight,
              "dsigma": (hp.mask_max - hp.mask_eps) / (1 - probability)}[hp.loss_weight]  # dsigma PR 1106's σ′(t)
    return mask & free, weight.clamp(max=hp.weight_clamp), told
def masked_capacity(hp: Hyperparameters, rows: int) -> int:
    """A static bound on the masked positions of any micro-batch of `rows` rows. Their probabilities add up to most if
    all draws are 0, ½ or 1; counts add less than 1 a row, independence 4·sqrt(N) (more, cut, with p = e^-32)."""
    sums = [mask_probability(hp, torch.full((hp.batch_rows,), u)).view(-1, rows).sum(1).max() for u in (0.0, 0.5, 1.0)]
    slack = rows if hp.masking == "count" else 4 * math.sqrt(rows * hp.train_seq_len)
    slack += rows % 2 * hp.train_seq_len * (hp.time_sampling == "antithetic")  # a row without its other half
    return min(rows * hp.train_seq_len, math.ceil(float(max(sums)) * hp.train_seq_len + slack))
# == Model =============================================================================================================
NORM_EPS, COND_DIM = torch.finfo(torch.float32).eps, 128  # COND_DIM: width of the noise condition, as published
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
    """A matrix, kept in float32 and applied in the dtype of its input."""
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))
def pick(x: Tensor, at: Tensor | None) -> Tensor:
    """(N, D): the positions `at` (N,) of x (B, L, D), counted through the batch; all of x for None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)
class Attention(nn.Module):
    """Grouped-query attention with normalised and rotated queries and keys; bidirectional unless `causal`."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.head_dim, self.causal = hp.head_dim, hp.objective == "ar"
        self.c_q = Linear(hp.model_dim, hp.model_dim, bias=False)
        self.c_k, self.c_v = (Linear(hp.model_dim, hp.num_kv_heads * hp.head_dim, bias=False) for _ in range(2))
        self.proj = Linear(hp.model_dim, hp.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init)) if hp.backbone == "unet" else None
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        q, k, v = (c(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        q, k = rotate(norm(q), *rotary), rotate(norm(k), *rotary)  # (B, H, L, head_dim)
        if self.q_gain is not None:
            q = q * self.q_gain.to(x.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=k.shape[1] < q.shape[1])
        return self.proj(pick(y.transpose(1, 2).flatten(2), at))
class MLP(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.fc = Linear(hp.model_dim, hp.mlp_mult * hp.model_dim, bias=False)
        self.proj = Linear(hp.mlp_mult * hp.model_dim, hp.model_dim, bias=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())
class UNetBlock(nn.Module):
    """A block of the challenge's trunk: it can mix the embedding in again, and its branches have gains."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.attn, self.mlp = Attention(hp), MLP(hp)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(hp.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.ones(2, hp.model_dim))
        for start in (self.resid_mix[1], self.attn.proj.weight, self.mlp.proj.weight):
            nn.init.zeros_(start)
    def forward(self, x: Tensor, x_emb: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        """(B, L, D) → (B, L, D), or (N, D) if only the positions `at` (N,) are wanted: attention still sees all."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x_emb
        x = pick(x, at) + self.attn_scale.to(x.dtype) * self.attn(norm(x), rotary, at)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))
class DiTBlock(nn.Module):
    """A plain pre-norm block; the noise level scales and shifts what its norms return (adaLN; Peebles & Xie 2023)."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.attn, self.mlp = Attention(hp), MLP(hp)
        self.attn_mod, self.mlp_mod = (nn.Linear(COND_DIM, 2 * hp.model_dim) for _ in range(2))
    def forward(self, x: Tensor, cond: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        """As UNetBlock, with cond (B, COND_DIM) in place of the embedding."""
        mods = self.attn_mod(cond)[:, None], self.mlp_mod(cond)[:, None]  # (B, 1, 2D): scale, then shift
        (scale, shift), after = mods[0].to(x.dtype).chunk(2, -1), mods[1]  # picked in float32: so its gradients add up
        after = (after if at is None else after[at // x.shape[1], 0]).to(x.dtype)
        x = pick(x, at) + self.attn(norm(x) * (1 + scale) + shift, rotary, at)
        scale, shift = after.chunk(2, -1)
        return x + self.mlp(norm(x) * (1 + scale) + shift)
def noise_features(masked_fraction: Tensor) -> Tensor:
    """(B, COND_DIM): sines and cosines of σ = −ln(1 − masked_fraction) (B,), at most 6.9, over frequencies 1 … 1e-4."""
    sigma = -(1 - masked_fraction).clamp(min=1e-3).log()
    half = torch.arange(COND_DIM // 2, dtype=torch.float32, device=sigma.device)
    angle = sigma[:, None] * 10_000 ** (-2 * half / COND_DIM)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
class Model(nn.Module):
    """The challenge's U-Net transformer, masked or causal, or PR 1106's stack; parameters and logits are float32."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, self.compute_dtype = hp, torch.float32
        unet, rows = hp.backbone == "unet", hp.vocab_size + (hp.objective == "mdlm") + hp.doc_chunks
        std = hp.tied_embed_init_std if hp.tie_embeddings else 1.0
        self.tok_emb = nn.Embedding.from_pretrained(torch.randn(rows, hp.model_dim).mul_(std), freeze=False)
        self.near = nn.ModuleDict({str(at): nn.Embedding.from_pretrained(torch.zeros(rows, hp.model_dim), freeze=False)
                                   for at in range(-hp.neighbors, hp.neighbors * (hp.objective != "ar") + 1) if at})
        self.blocks = nn.ModuleList((UNetBlock if unet else DiTBlock)(hp) for _ in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(hp.num_layers // 2, hp.model_dim)) if unet else None
        self.time_embed = None if unet else nn.Sequential(
            nn.Linear(COND_DIM, 4 * COND_DIM), nn.SiLU(), nn.Linear(4 * COND_DIM, COND_DIM))
        self.lm_head = None if hp.tie_embeddings else Linear(hp.model_dim, hp.vocab_size, bias=False)
        if unet and self.lm_head is not None:
            nn.init.zeros_(self.lm_head.weight)
    def on(self, device: torch.device) -> Model:
        """Moves to the device; activations get the dtype of COMPUTE_DTYPE."""
        self.compute_dtype = getattr(torch, resolve_dtype(self.hp, device))
        return self.to(device)
    def hidden(self, z: Tensor, masked_fraction: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Normalised last hidden state (B, L, D) of tokens z (B, L) int64; (N, D) at the flat positions `at` (N,).
        `masked_fraction` (B,) is what a DiT is told of the noise; without it, the true fraction of the maskable."""
        x, skips, encoder = self.tok_emb(z), [], len(self.blocks) // 2
        x = norm(x) if self.time_embed is None else x
        for name, embedding in self.near.items():  # of the token so far to the right; beyond the ends, zeros
            offset = max(-z.shape[1], min(int(name), z.shape[1]))
            x = x + F.pad(embedding(z), (0, 0, -offset, offset))
        x = given = x.to(self.compute_dtype)
        if self.time_embed is not None:
            if masked_fraction is None:
                masked_fraction = (z == self.hp.mask_id).sum(1) / hideable(self.hp, z).sum(1).clamp(min=1)
            given = F.silu(self.time_embed(noise_features(masked_fraction)))
        rotary = rotary_table(z.shape[1], self.hp.head_dim, self.hp.rope_base, x)
        for i, block in enumerate(self.blocks):
            if skips and i >= encoder:
                x = x + self.skip_weights[i - encoder].to(x.dtype) * skips.pop()
            x = block(x, given, rotary, at if block is self.blocks[-1] else None)
            if self.skip_weights is not None and i < encoder:
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
    weights: Tensor  # (N,) float32, of their nll; 0 fills up to N
    tokens: Tensor  # () int64, all that are not PAD
    masked_fraction: Tensor | None  # (B,) float32, the probability behind the mask; None for a causal model
def compact(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Flat indices of `capacity` elements of `mask` (N,), True ones first, and their values (N,): static shapes."""
    positions = (~mask.flatten()).byte().argsort(stable=True)[:capacity]
    return positions, mask.flatten()[positions]
def training_batch(hp: Hyperparameters, stream: TokenStream, step: int, rows: range, capacity: int,
                   device: torch.device) -> Batch:
    """Rows `rows` of the global batch of `step`: a function of (seed, step, rows) on one kind of device."""
    first = step * hp.batch_rows
    window = stream.windows(range(first + rows.start, first + rows.stop), hp.train_seq_len)
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    x0, tokens = window[:, 1:], (window[:, 1:] != hp.pad_id).sum()
    if hp.objective == "ar":
        at, weights = torch.arange(x0.numel(), device=device), torch.ones(x0.numel(), device=device)
        return Batch(window[:, :-1], at, x0.flatten(), weights, tokens, None)
    noise = (full[rows.start:rows.stop] for full in draw_noise(hp, seeded(device, hp.seed, "train", step)))
    mask, weight, probability = apply_noise(hp, x0, *noise)
    positions, used = compact(mask, capacity)
    weights = torch.where(used, weight[positions // hp.train_seq_len], 0)
    z, targets = torch.where(mask, hp.mask_id, x0), torch.where(used, x0.flatten()[positions], 0)
    return Batch(z, positions, targets, weights, tokens, probability)
def batch_loss(model: Model, batch: Batch) -> Tensor:
    """Σ weight·nll over the scored positions, in nats: of the global batch, and by its tokens, the loss of a step."""
    h = model.hidden(batch.z, batch.masked_fraction, batch.positions)
    return (F.cross_entropy(model.head(h), batch.targets, reduction="none") * batch.weights).sum()
# == Optimizers and EMA ================================================================================================
class Kind(collections.namedtuple("Kind", "name pattern optimizer lr decays storage")):
    """A kind of parameter: its name, and the pattern of its parameters' names; muon (if OPTIMIZER is) or adamw, the
    knob that is its learning rate, whether WEIGHT_DECAY_ON=matrices means it; its storage, or "" for QUANT_MODE."""
KINDS = (
    Kind("matrix", r"(blocks\.\d+\.(attn|mlp)(_mod|\.\w+)|time_embed\.\d)\.weight", "muon", "matrix_lr", True, ""),
    Kind("embed", r"tok_emb\.weight", "adamw", "embed_lr", False, ""),
    Kind("near", r"near\.-?\d+\.weight", "adamw", "embed_lr", False, ""),
    Kind("head", r"lm_head\.weight", "adamw", "head_lr", True, ""),
    Kind("gain", r"(blocks\.\d+\.)?(attn\.q_gain|attn_scale|mlp_scale|resid_mix|skip_weights)|.*\.bias", "adamw",
         "scalar_lr", False, "fp16"))
def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if re.fullmatch(kind.pattern, name))
def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Pushes singular values of matrices (n, rows, cols) into about [0.7, 1.2]: the quintic of Jordan et al. 2024."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x
class Optimizer:
    """Muon and AdamW over flat buffers of weights and gradients (the model's are views), one stack for each shape."""
    def __init__(self, model: Model, hp: Hyperparameters):
        def stacked(item: tuple[str, nn.Parameter]) -> tuple:
            kind = kind_of(item[0])
            return KINDS.index(kind), tuple(item[1].shape) if kind.optimizer == hp.optimizer == "muon" else ()
        groups = [list(g) for _, g in itertools.groupby(sorted(model.named_parameters(), key=stacked), key=stacked)]
        sizes = [sum(p.numel() for _, p in group) for group in groups]
        ends = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))  # aligned for the widest loads
        self.hp, self.names, self.groups, self.averages, device = hp, [], [], 0, groups[0][0][1].device
        self.state = torch.zeros(4, ends[-1], device=device)  # weights, two moments of gradients, weights' average
        self.weights, self.average = self.state[0], self.state[3]
        self.grads = torch.zeros(ends[-1] + 2, device=device)  # of sums; then the tokens, and the sum that is the loss
        self.counts = torch.zeros(2, device=device)  # steps that were taken, and that were skipped
        for group, size, begin in zip(groups, sizes, [0, *ends[:-1]], strict=True):
            kind, parameters = kind_of(group[0][0]), [p for _, p in group]
            grads, *state = (x[begin:begin + size] for x in (self.grads, *self.state[:3]))
            counts = [p.numel() for p in parameters]
            for p, w, g in zip(parameters, state[0].split(counts), grads.split(counts), strict=True):
                w.copy_(p.detach().flatten())
                p.data, p.grad = w.view(p.shape), g.view(p.shape)
            muon = kind.optimizer == hp.optimizer == "muon"
            shape = (len(parameters), *parameters[0].shape) if muon else (size,)
            lr = "tied_embed_lr" if kind.name == "embed" and hp.tie_embeddings else kind.lr
            decay = hp.weight_decay if kind.decays or hp.weight_decay_on == "all" else 0.0
            self.groups.append((muon, getattr(hp, lr), decay, *(x.view(shape) for x in (grads, *state))))
            self.names.append(f"{kind.name} ({group[0][0]}, …)")
        self.first_bad = torch.zeros(2 + len(groups), device=device)  # a skipped step, its norms, its loss
    def step(self, step: int, lr_scale: float) -> Tensor:
        """Adds up loss and gradients of all processes, clips them, and updates the weights, the same everywhere; unless
        they are not finite: then nothing changes, and `first_bad` tells which. Returns the loss a token."""
        hp, grads, factor = self.hp, all_reduce(self.grads), 1 / self.grads[-2].clamp(min=1)
        norms = torch.stack([*(group[3].norm() for group in self.groups), grads[-1]]) * factor
        ok = norms.isfinite().all()
        self.counts += torch.stack([ok, ~ok])
        now = torch.cat([self.counts.sum()[None], norms])
        self.first_bad.copy_(torch.where(ok | (self.first_bad[0] > 0), self.first_bad, now))
        if hp.grad_clip_norm > 0:
            factor *= (hp.grad_clip_norm / (norms[:-1].norm() + 1e-6)).clamp(max=1.0)
        grads.mul_(factor).masked_fill_(~ok, 0.0)
        warmup = min(step / hp.muon_momentum_warmup_steps, 1.0) if hp.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warmup) * hp.muon_momentum_warmup_start + warmup * hp.muon_momentum
        scale, momentum, beta1, beta2 = (torch.where(ok, x, x_if_skipped) for x, x_if_skipped in (
            (lr_scale, 0.0), (momentum, 1.0), (hp.beta1, 1.0), (hp.beta2, 1.0)))
        taken = self.counts[0].clamp(min=1)
        for muon, lr, decay, grad, weights, first, second in self.groups:
            if muon:
                first.mul_(momentum).add_(grad)
                update = self._orthogonalize_shared(grad.addcmul(first, momentum)).float()
                update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            else:
                first.lerp_(grad, 1 - beta1)
                second.lerp_(grad.square(), 1 - beta2)
                square = second / (1 - hp.beta2**taken)
                update = first / (1 - hp.beta1**taken) / (square.sqrt() + hp.adam_eps)
            weights.mul_(1 - lr * decay * scale).sub_(update.mul_(lr * scale))
        grads.zero_()
        return norms[-1]
    def _orthogonalize_shared(self, stack: Tensor) -> Tensor:
        """Each process orthogonalizes its share of the stack (n, rows, cols); all of them get the whole."""
        share = -(-len(stack) // world_size())
        mine = slice(rank() * share, (rank() + 1) * share)
        part = orthogonalize(stack[mine], self.hp.muon_backend_steps)
        whole = part.new_zeros(stack.shape)
        whole[mine] = part
        return all_reduce(whole)
    def update_average(self) -> None:
        """EMA in float32: after n updates d^(n-1)·w_1 + (1 − d)·Σ_{i=2..n} d^(n−i)·w_i for d = EMA_DECAY."""
        self.average.lerp_(self.weights, 1 - self.hp.ema_decay if self.averages else 1.0)
        self.averages += 1
    def swap_average(self) -> None:
        """Exchanges the weights with their average; a second call restores both. Nothing before the first update."""
        if self.averages:
            self.state[[0, 3]] = self.state[[3, 0]]
# == Artifact ==========================================================================================================
# MAGIC · u32 header length · JSON header · of each kind of parameter its codes, then its scales, packed · SHA-256
ARTIFACT_MAGIC, FORMAT_VERSION = b"MDLMgolf", 2
class Quantizer(collections.namedtuple("Quantizer", "dtype largest scale")):
    """A grid for weights: codes of a dtype, at most ±`largest`, times a scale of a dtype for each row, or without:
    None. fp8_row's is another than that of the integers, so neither can be read as the other."""
QUANTIZERS = {
    "fp8": Quantizer(torch.float8_e4m3fn, 448.0, None), "fp8_row": Quantizer(torch.float8_e4m3fn, 448.0, torch.float32),
    **{f"int{bits}": Quantizer(torch.int8, 2.0 ** (bits - 1) - 1, torch.bfloat16) for bits in range(4, 9)},
    "fp16": Quantizer(torch.float16, 65_504.0, None), "fp32": Quantizer(torch.float32, 3e38, None)}
def deflate(raw: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(9, memLevel=9, strategy=strategy)
    return packer.compress(raw) + packer.flush()
def inflate(packed: bytes, limit: int) -> bytes:
    return zlib.decompressobj().decompress(packed, limit)
PACKERS = {  # bytes → packed, and (packed, limit) → at most `limit` bytes, however many there are
    "zlib": (deflate, inflate),
    "huffman": (lambda raw: deflate(raw, zlib.Z_HUFFMAN_ONLY), inflate),  # codes repeat by chance only
    "lzma": (lambda raw: lzma.compress(raw, preset=6), lambda packed, limit:
             lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 24).decompress(packed, limit)),
    "zstd": (lambda raw: zstandard.ZstdCompressor(level=22).compress(raw), lambda packed, limit:
             zstandard.ZstdDecompressor(max_window_size=max(2 * limit, 1024)).stream_reader(packed).read(limit))}
def to_codes(x: Tensor, quantizer: Quantizer) -> Tensor:
    """The nearest codes; beyond the largest one they saturate, so e4m3 never becomes NaN."""
    x = x.clamp(-quantizer.largest, quantizer.largest)
    return (x.round() if quantizer.dtype == torch.int8 else x).to(quantizer.dtype)
def row_scales(rows: Tensor, quantizer: Quantizer, clip: float) -> Tensor:
    """(R, 1) for rows (R, C): the largest code means `clip` root mean squares of the row, or, for 0, the one of 40
    shares of the row's largest weight that has the least squared error."""
    reach = clip * rows.square().mean(1, keepdim=True).sqrt() if clip else rows.abs().amax(1, keepdim=True)
    best, least = None, math.inf
    for n in range(1 if clip else 40):
        scale = (0.96**n * reach / quantizer.largest).clamp(1e-30, 1e30).to(quantizer.scale).float()
        error = (to_codes(rows / scale, quantizer).float() * scale - rows).square().sum(1, keepdim=True)
        best, least = (scale, error) if n == 0 else (scale.where(error < least, best), error.minimum(least))
    return best
def feed_back(rows: Tensor, scales: Tensor, quantizer: Quantizer, moments: Tensor) -> Tensor:
    """Codes (R, C) of rows (R, C), column after column, those with the largest inputs first: what one loses, the next
    ones make up for, as far as inputs x with second moments Σ x xᵀ (C, C) let them (GPTQ, Frantar et al. 2022)."""
    order, damping = moments.diagonal().argsort(descending=True), 0.01 * moments.diagonal().mean() + 1e-30
    damped = moments[order][:, order].double() + damping * torch.eye(len(order), device=rows.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    rest, codes, scales = rows[:, order], torch.empty_like(rows, dtype=quantizer.dtype), scales[:, 0]
    for i, column in enumerate(order.tolist()):
        codes[:, column] = to_codes(rest[:, i] / scales, quantizer)
        lost = (rest[:, i] - codes[:, column].float() * scales) / upper[i, i]
        rest[:, i:].addr_(lost, upper[i, i:], alpha=-1)
    return codes
def quantize(weights: Tensor, quantizer: Quantizer, clip: float, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales (R, 1) of weights (…, C); moments (C, C) of inputs: so that outputs change least."""
    rows = weights.detach().float().view(weights.shape[:-1].numel(), weights.shape[-1])
    scales = row_scales(rows, quantizer, clip) if quantizer.scale else rows.new_ones(len(rows), 1)
    codes = to_codes(rows / scales, quantizer) if moments is None else feed_back(rows, scales, quantizer, moments)
    return codes, scales.to(quantizer.scale or scales.dtype)
@torch.no_grad()
def input_moments(model: Model, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """By the name of a matrix (…, C): Σ x xᵀ (C, C) of its inputs x in these batches, added up over all processes."""
    names, moments = {module: f"{name}.weight" for name, module in model.named_modules()}, {}
    def add(module: nn.Module, inputs: Sequence[Tensor]) -> None:
        x, name = inputs[0].flatten(0, -2).float(), names[module]
        moments[name] = moments.get(name, 0) + x.T @ x
    hooks = [module.register_forward_pre_hook(add) for module in model.modules() if isinstance(module, nn.Linear)]
    for batch in batches:
        add(model.lm_head or model.tok_emb, [model.hidden(batch.z, batch.masked_fraction, batch.positions)])
    for hook in hooks:
        hook.remove()
    return {name: all_reduce(moment) for name, moment in moments.items()}
def to_planes(tensors: Iterable[Tensor]) -> np.ndarray:
    """(bytes an element, elements) uint8: what is alike side by side, for the compressor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    return np.ascontiguousarray(flat.view(torch.uint8).view(-1, flat.element_size()).numpy().T)
def from_planes(raw: bytes, dtype: torch.dtype, count: int) -> Tensor:
    """(count,) float32; ValueError if `raw` is not as long as that."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return torch.from_numpy(planes.T.copy()).view(-1).view(dtype).float()
def entropy_bits(planes: np.ndarray) -> float:
    """What all bytes need if they are coded one by one, by how often they occur in their plane."""
    counts = (np.unique(plane, return_counts=True)[1] for plane in planes)
    return float(sum((n * np.log2(n.sum() / n)).sum() for n in counts))
def pack_kind(weights: Mapping[str, Tensor], storage: str, hp: Hyperparameters,
              moments: Mapping[str, Tensor] | None = None) -> tuple[bytes, dict]:
    """One kind of parameter, packed, and what the header and the log say of it."""
    quantizer = QUANTIZERS[storage]
    coded = [quantize(w, quantizer, hp.quant_clip, (moments or {}).get(name)) for name, w in weights.items()]
    parts = [to_planes(codes for codes, _ in coded)] + [to_planes(s for _, s in coded)] * bool(quantizer.scale)
    names = [hp.pack] if hp.pack != "auto" else [name for name in PACKERS if name != "zstd" or zstandard]
    packed = {name: PACKERS[name][0](b"".join(part.tobytes() for part in parts)) for name in names}
    best = min(packed, key=lambda name: len(packed[name]))
    return packed[best], dict(storage=storage, packer=best, bytes=len(packed[best]), weights=parts[0].shape[1],
                              entropy_bits=sum(map(entropy_bits, parts)),
                              packed_bytes={name: len(blob) for name, blob in packed.items()})
def unpack_kind(packed: bytes, storage: str, packer: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The weights, float32; unpacks no more than their shapes account for, and ValueError if it is not that much."""
    quantizer, sizes = QUANTIZERS[storage], [shape.numel() for shape in shapes]
    rows = [shape[:-1].numel() for shape in shapes] if quantizer.scale else []
    end, scale = sum(sizes) * quantizer.dtype.itemsize, quantizer.scale or torch.float32
    raw = memoryview(PACKERS[packer][1](packed, end + sum(rows) * scale.itemsize + 1))
    weights = from_planes(raw[:end], quantizer.dtype, sum(sizes))
    scales, parts = from_planes(raw[end:], scale, sum(rows)).split(rows), weights.split(sizes)
    for part, shape, factor in zip(parts, shapes, scales):
        part.view(-1, shape[-1]).mul_(factor[:, None])
    if not weights.isfinite().all():
        raise ValueError
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
def by_kind(model: Model) -> dict[Kind, dict[str, nn.Parameter]]:
    """The parameters, in the order in which an artifact has them."""
    named = sorted(model.named_parameters())
    return {kind: found for kind in KINDS if (found := {name: p for name, p in named if kind_of(name) == kind})}
def stored_fields() -> list[str]:
    """The hyperparameters an artifact carries: those that define the predictor."""
    return ["preset"] + [f.name for f in dataclasses.fields(Hyperparameters) if f.metadata["group"] == "model"]
def write_file(path: Path, data: bytes) -> None:
    """All of it or nothing: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)  # what little there is left of a full disk
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
def save_artifact(model: Model, hp: Hyperparameters, path: str | Path,
                  moments: Mapping[str, Tensor] | None = None) -> dict:
    """Quantizes (with input_moments, if given), packs and writes the model; returns artifact_bytes, label and kinds."""
    if wrong := [name for name, x in [*model.named_parameters(), *(moments or {}).items()] if not x.isfinite().all()]:
        raise InputError(f"{path}: not written, {wrong[0]} or its inputs are not finite; the run has diverged")
    packed = {kind.name: pack_kind(ps, hp.storages[kind.name], hp, moments) for kind, ps in by_kind(model).items()}
    kinds = {name: facts for name, (_, facts) in packed.items()}
    header = dict(version=FORMAT_VERSION, hyperparameters={field: getattr(hp, field) for field in stored_fields()},
                  kinds={name: [facts[key] for key in ("storage", "packer", "bytes")] for name, facts in kinds.items()})
    text = json.dumps(header).encode()
    data = b"".join([ARTIFACT_MAGIC, len(text).to_bytes(4, "little"), text, *(blob for blob, _ in packed.values())])
    write_file(Path(path), data + hashlib.sha256(data).digest())
    return dict(artifact_bytes=len(data) + 32, label=label(header), kinds=kinds)
def unpack_artifact(data: bytes, path: str | Path) -> tuple[Model, Hyperparameters, str]:
    """A model with the weights of an artifact, its hyperparameters, and a label, for example fp8+lzma.
    InputError if it is not sound. Memory is taken only if the file has a bit for each weight."""
    if data.startswith(ARTIFACT_MAGIC) and hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{path}: checksum mismatch, the artifact is damaged or truncated")
    try:
        at = 12 + int.from_bytes(data[8:12], "little")
        header = json.loads(data[12:at])
        kinds, fields = header["kinds"], header["hyperparameters"]
        with torch.device("meta"):
            model = Model(hp := Hyperparameters(**fields))
        groups, state = by_kind(model), {}
        if (not data.startswith(ARTIFACT_MAGIC) or header["version"] != FORMAT_VERSION
                or list(fields) != stored_fields() or list(kinds) != [kind.name for kind in groups]
                or at + sum(size for _, _, size in kinds.values()) != len(data) - 32
                or sum(p.numel() for p in model.parameters()) > 8 * len(data) + 2**16):
            raise ValueError
        for named, (storage, packer, size) in zip(groups.values(), kinds.values(), strict=True):
            weights = unpack_kind(data[at:at + size], storage, packer, [p.shape for p in named.values()])
            at, state = at + size, state | dict(zip(named, weights, strict=True))
        model.load_state_dict(state, assign=True)
    except Exception:  # decompressors, parser and model each have their own errors; they all mean the same here
        hint = ", or packed with zstd: pip install -r requirements.txt" * (zstandard is None)
        raise InputError(f"{path}: not an artifact of this version of train_mdlm.py{hint}") from None
    return model, hp, label(header)
def label(header: Mapping) -> str:
    """The storages and packers of an artifact, but of gains: for example fp8+lzma."""
    entries = [entry for name, entry in header["kinds"].items() if name != "gain"]
    return "+".join([*sorted({storage for storage, _, _ in entries}), *sorted({packer for _, packer, _ in entries})])
def read_artifact(path: str | Path) -> tuple[Model, Hyperparameters, str]:
    """As unpack_artifact; in a group of processes all of them call it, and get what the first one reads."""
    return unpack_artifact(on_first_process(Path(path).read_bytes), path)
def load_artifact(path: str | Path) -> tuple[Model, Hyperparameters]:
    """A model with the weights on disk, and its hyperparameters; InputError (a ValueError) if it is not sound."""
    return read_artifact(path)[:2]
def predicted_bytes(hp: Hyperparameters) -> int:
    """Code and artifact if all weights were normal: as large as 256 rows of each kind, and as many as there are."""
    total = len(Path(__file__).read_bytes())
    with torch.device("meta"):
        groups = by_kind(Model(hp))
    for kind, named in groups.items():
        sample = torch.randn(256, max(p.shape[-1] for p in named.values()), generator=seeded("cpu", "predicted bytes"))
        size = pack_kind({"": sample}, hp.storages[kind.name], hp)[1]["bytes"]
        total += math.ceil(size / sample.numel() * sum(p.numel() for p in named.values()))
    return total
# == Scoring ===========================================================================================================
@torch.no_grad()
def token_nll(model: Model, z: Tensor, x0: Tensor, scored: Tensor, masked_fraction: Tensor | None = None) -> Tensor:
    """(B, L) nats: −ln p(x_i | z) at the positions `scored` (B, L), 0 elsewhere; only those need the output head."""
    at = scored.flatten().nonzero()[:, 0]
    h = model.hidden(z, masked_fraction, at)
    nll = F.cross_entropy(model.head(h), x0.flatten()[at], reduction="none")
    return nll.new_zeros(x0.numel()).index_copy_(0, at, nll).view(x0.shape)
def masked_nll(model: Model, x0: Tensor, mask: Tensor, scored: Tensor | None = None,
               masked_fraction: Tensor | None = None) -> Tensor:
    """(B, L) nats of the `scored` tokens of x0 (B, L), or all masked ones, where MASK hides `mask` (B, L)."""
    return token_nll(model, torch.where(mask, model.hp.mask_id, x0), x0, mask if scored is None else scored,
                     masked_fraction)
def causal_nll(model: Model, window: Tensor, scored: Tensor | None = None) -> Tensor:
    """(B, L) nats: −ln p(x_i | the token before the window, x_<i) for window (B, 1 + L), with a causal model."""
    x0 = window[:, 1:]
    return token_nll(model, window[:, :-1], x0, torch.ones_like(x0, dtype=torch.bool) if scored is None else scored)
def weighted_nll(model: Model, x0: Tensor, masks: Iterable[tuple[Tensor, Tensor | float]]) -> Tensor:
    """(B,) float64 nats: the sum over masks (B, L) of weight · nll of the masked tokens; what is anchored stays."""
    nats, free = torch.zeros(len(x0), dtype=torch.float64, device=x0.device), hideable(model.hp, x0)
    for mask, weight in masks:
        nll = masked_nll(model, x0, mask.to(x0.device) & free).double().sum(1)
        nats += torch.as_tensor(weight, device=x0.device) * nll
    return nats
def key_source(shape: Sequence[int], generators) -> Callable[[], Tensor]:
    """A function that draws uniform keys (B, L), from one generator (or None) or from one for each row."""
    if isinstance(generators, list):
        return lambda: torch.stack([torch.rand(shape[1], generator=g) for g in generators])
    return lambda: torch.rand(shape, generator=generators, device=generators.device if generators else "cpu")
def nelbo_masks(passes: int, times: Tensor, draw: Callable, free: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Masks (B, L) of k positions and weights (B,): an unbiased estimate of E_k E_mask (n/k)·nll, k uniform on 1..n,
    the code length over all orders of the n tokens `free` (B, L) to be masked: the bound of Sahoo et al. 2024 in
    continuous time. Small k vary most, so several passes take k = 1 + ⌊n·t^1.5⌋, with weights for it. `times` (B,) are
    uniform; passes share t, some backwards, and mask consecutive arcs of one random circle, `draw` (B, L)."""
    rank, start, power = torch.where(free, draw(), 2).argsort(1).argsort(1), 0, 1.5 if passes > 1 else 1.0
    n = free.sum(1).clamp(min=1)
    for p in range(passes):
        t = (p + (1 - times if p.bit_count() % 2 else times)) / passes
        k = (1 + (n * t**power).long()).minimum(n)
        probability = (k.double() / n) ** (1 / power) - ((k - 1).double() / n) ** (1 / power)
        yield free & ((rank - start) % n[:, None] < k[:, None]), 1 / (k * probability * passes)
        start = start + k[:, None]
def nelbo(model: Model, x0: Tensor, passes: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """(B,) float64 nats: unbiased any-order bound of the rows of x0 (B, L); `passes` masks each, of lattice sizes."""
    draw, device = key_source(x0.shape, generator), generator.device if generator else "cpu"
    offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    times = (offset + torch.arange(len(x0), dtype=torch.float64, device=device) * GOLDEN) % 1
    return weighted_nll(model, x0, nelbo_masks(passes, times, draw, hideable(model.hp, x0).to(device)))
TSTEP_EPS = 1e-3  # ε of the T-step bound and of the t-grid, as published
def tstep_masks(steps: int, draw: Callable[[], Tensor]) -> Iterable[tuple[Tensor, float]]:
    """Independent masks with probability 1 − α_i, weight (α_{i−1} − α_i)/(1 − α_i) = 1/i for α_i = 1 − (1 − ε)·i/T."""
    return ((draw() < (1 - TSTEP_EPS) * i / steps, 1 / i) for i in range(1, steps + 1))
def discrete_elbo(model: Model, x0: Tensor, steps: int = 128, generator=None) -> Tensor:
    """(B,) float64 nats: unbiased estimate of the T-step bound of x0 (B, L) (Austin et al. 2021), one mask a step.
    ε·L·ln V, for what the last step leaves visible, + Σ_i Σ_masked nll / i. A list has a generator for each row."""
    terminal = TSTEP_EPS * math.log(model.hp.vocab_size) * hideable(model.hp, x0).sum(1)
    return terminal + weighted_nll(model, x0, tstep_masks(steps, key_source(x0.shape, generator)))
def tgrid_masks(points: int, draw: Callable[[], Tensor]) -> Iterable[tuple[Tensor, float]]:
    """PR 1699's grid in t, biased: below t = 0.01 the first token is always masked, and t < 0.001 is left out."""
    for t in torch.linspace(TSTEP_EPS, 1.0, points).tolist():
        mask = draw() < t
        mask[:, 0] |= t < 0.01
        yield mask, (1 - TSTEP_EPS) / points / t
def ordered_nll(model: Model, x0: Tensor, steps: Tensor) -> Tensor:
    """(B, L) nats of each token given the tokens of earlier steps, none of its own, for steps (B, L) int64; negative
    steps, and anchors, are visible and not scored. All model calls are rows that can run at once; as many do as fit."""
    steps = steps.masked_fill(~hideable(model.hp, x0), -1)
    rows = max((65_536 if x0.is_cuda else 2_048) // x0.shape[1], 1)
    calls = steps.amax(1) + 1
    sequence = torch.repeat_interleave(calls)  # (number of rows,)
    step = torch.arange(len(sequence), device=x0.device) - (calls.cumsum(0) - calls)[sequence]
    nats = torch.zeros(x0.shape, device=x0.device)
    for s, now in zip(sequence.split(rows), step[:, None].split(rows), strict=True):
        nats.index_add_(0, s, masked_nll(model, x0[s], steps[s] >= now, steps[s] == now))
    return nats
@torch.no_grad()
def reveal_surest(model: Model, z: Tensor, group: int = 1) -> Iterable[tuple[Tensor, Tensor]]:
    """Fills z (B, L), MASK but for anchors, `group` positions a call: yields positions (B, g) and log-probabilities
    (B, g, V), of a full row positions that are not MASK; the caller writes the tokens into z. The largest probability
    first; less than 2^-13 nats is a tie, goes to the leftmost; else rounding may decide, so batches keep one shape."""
    rows, length = z.shape
    for done in range(0, length, group):
        masked = z == model.hp.mask_id
        at = (~masked).byte().argsort(dim=1, stable=True)[:, :length - done]  # those that are still MASK come first
        flat = at + length * torch.arange(rows, device=z.device)[:, None]
        logp = model.head(model.hidden(z, at=flat.flatten())).log_softmax(-1).unflatten(0, at.shape)
        surest = logp.amax(-1).where(masked.gather(1, at), -math.inf)
        behind = ((surest.amax(1, keepdim=True) - surest) * 2**12).round()
        sure = behind.argsort(dim=1, stable=True)[:, :group]
        yield at.gather(1, sure), logp.take_along_dim(sure[..., None], 1)
def chain_rule(model: Model, x0: Tensor, order: str | Tensor = "l2r", group: int = 1, seed: int = 0,
               before: Tensor | int = BOS_ID) -> Tensor:
    """(B, L) nats, indexed by position: −ln p(x_i | what was revealed before its group), an exact and decodable code.
    `order`: l2r, confidence (see `reveal_surest`), random (drawn from `seed`), or positions (L,) or (B, L) as revealed,
    `group` a model call; `boundary_bits` pays for anchors. A causal model goes l2r after the token `before` (B,)."""
    count, length = x0.shape
    if model.hp.objective == "ar":
        if isinstance(order, Tensor) or order != "l2r" or group != 1:
            raise InputError("a causal model predicts from left to right, one token at a time: order l2r, group 1")
        first = torch.as_tensor(before, device=x0.device).expand(count)
        return causal_nll(model, torch.cat([first[:, None], x0], dim=1))
    if isinstance(order, str) and order == "confidence":
        nats = torch.zeros(x0.shape, device=x0.device)
        z = x0.masked_fill(hideable(model.hp, x0), model.hp.mask_id)
        for at, logp in reveal_surest(model, z, group):
            tokens, masked = x0.gather(1, at), z.gather(1, at) == model.hp.mask_id
            nll = -logp.gather(2, tokens.clamp(max=model.hp.vocab_size - 1)[..., None])[..., 0]
            nats.scatter_add_(1, at, torch.where(masked, nll, 0))
            z.scatter_(1, at, tokens)
        return nats
    if not isinstance(order, Tensor):
        if order not in ("l2r", "random"):
            raise InputError(f"{order} is not an order: l2r, confidence, random or a tensor of positions")
        order = torch.arange(length) if order == "l2r" else torch.randperm(
            length, generator=seeded("cpu", seed, "order"))
    steps = (order.to(x0.device).argsort(-1) // group).expand(count, length)
    return ordered_nll(model, x0, steps)
def boundary_bits(count: int, length: int) -> float:
    """Bits for where `count` always visible tokens stand in a window: log2(L + 1) + log2 C(L, count)."""
    return math.log2(length + 1) + math.log2(math.comb(length, count))
class Score(collections.namedtuple("Score", "bpb stderr loss seqs tokens bytes ms boundary_bits")):
    """A code length of a split: bits per byte ± standard error, nats per token, what was scored; the anchors' bits."""
    def line(self) -> str:
        line = (f"bpb:{self.bpb:.4f} stderr:{self.stderr:.4f} seqs:{self.seqs} tokens:{self.tokens} bytes:{self.bytes} "
                f"time:{self.ms:.0f}ms tokens_per_s:{1000 * self.tokens / self.ms:.0f}")
        paid = f" boundary_bits:{self.boundary_bits:.1f} boundary_bpb:{self.boundary_bits / self.bytes:.4f}"
        return line + paid * (self.boundary_bits > 0)
def spaced(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 … total − 1, evenly spaced; all of them for 0."""
    wanted = min(wanted, total) if wanted else total
    return [i * total // wanted for i in range(wanted)]
def ratio(bits: Tensor, size: Tensor) -> tuple[float, float]:
    """Σ bits / Σ bytes over windows (n,), and sqrt(Σ (bits_s − ratio·bytes_s)²) / Σ bytes, its standard error with
    windows as clusters (not a number for one); given differences of bits, it is that of a paired difference."""
    bpb = bits.sum() / size.sum()
    stderr = (bits - bpb * size).square().sum().sqrt() / size.sum()
    return bpb.item(), stderr.item() if len(bits) > 1 else math.nan
def window_nats(name: str, model: Model, hp: Hyperparameters, window: Tensor, scored: Tensor, places: range) -> Tensor:
    """(B,) nats, or (B, L) by position, of windows (B, 1 + L), the token before first, under the score `name`.
    What is not `scored` (B, L), the left context, is visible and free; `places` number the windows, for their seeds."""
    if hp.objective == "ar":
        return causal_nll(model, window, scored)
    x0, generators = window[:, 1:], [seeded("cpu", hp.seed, name, place) for place in places]
    draw = key_source(x0.shape, generators)
    if name == "confidence":
        return chain_rule(model, x0, "confidence", hp.chain_group)
    if name in CHAIN_RULES:
        order = torch.arange(x0.shape[1]).expand(x0.shape) if name != "random" else draw().argsort(1).argsort(1)
        return ordered_nll(model, x0, (order.to(x0.device) - (~scored).sum(1, keepdim=True)) // hp.chain_group)
    if name == "tstep":
        return discrete_elbo(model, x0, hp.tstep_steps, generators)
    if name == "tgrid":
        return weighted_nll(model, x0, tgrid_masks(hp.final_eval_t_samples or 256, draw))
    offset = torch.rand((), generator=seeded("cpu", hp.seed, "nelbo offset"), dtype=torch.float64)
    times = (offset + torch.tensor(places, dtype=torch.float64) * GOLDEN) % 1
    return weighted_nll(model, x0, nelbo_masks(hp.nelbo_passes, times, draw, hideable(hp, x0).cpu()))
def score_windows(name: str, model: Model, hp: Hyperparameters, stream: TokenStream, luts: ByteTables, max_seqs: int,
                  note: Callable[[float], None] = lambda fraction: None) -> tuple[Score, Tensor]:
    """Scores evenly spaced windows, shared over the processes; and their bits, without anchors' places, and bytes in
    (windows, buckets, 2): bucket b has positions 2^(b−1) … 2^b − 1, or all is in 0. Sliding: the last STRIDE tokens."""
    started, length, device = time.perf_counter(), hp.train_seq_len, luts.base_bytes.device
    stride = min(hp.stride, length) if name == "sliding" else length
    total = stream.count_windows(length, stride)
    numbers = spaced(total, max_seqs)
    batch = max(min(hp.val_batch_size // length, len(numbers)) // world_size(), 1)
    if name in CHAIN_RULES and hp.objective == "mdlm":  # the surest position may depend on rounding, so on the batch
        batch = 16 if name == "confidence" else min(batch, 16)
    counts = [stride if n or len(numbers) < total else length for n in numbers]
    bucket = torch.tensor([i.bit_length() for i in range(length)])
    table = torch.zeros(len(numbers), int(bucket[-1]) + 1, 2, dtype=torch.float64)
    boundaries = torch.zeros(len(numbers), dtype=torch.float64)
    for at in range(rank() * batch, len(numbers), world_size() * batch):
        here = slice(at, at + batch)
        window = stream.windows(numbers[here], length, stride).to(device)
        scored = torch.arange(length, device=device) >= length - torch.tensor(counts[here], device=device)[:, None]
        nats = window_nats(name, model, hp, window, scored, range(len(numbers))[here]).double()
        nats = nats if nats.dim() == 2 else F.pad(nats[:, None], (0, length - 1))  # no positions: all in the first
        size = token_bytes(window[:, 1:], window[:, 0], luts) * scored
        table[here].index_add_(1, bucket, torch.stack([nats / math.log(2), size], dim=2).cpu())
        if hp.anchor_bos:
            anchors = (scored & ~hideable(hp, window[:, 1:])).sum(1).tolist()
            boundaries[here] = torch.tensor([*map(boundary_bits, anchors, counts[here])], dtype=torch.float64)
        note((at + batch) / len(numbers))
    bits, size = all_reduce(table).sum(1).unbind(1)
    if size.sum() == 0:
        raise InputError("the validation windows hold no bytes of text, so there is nothing to divide by")
    bits = bits + all_reduce(boundaries)
    if not bits.isfinite().all():
        raise InputError(f"the {name} score is not a finite number: the weights have diverged")
    return Score(*ratio(bits, size), bits.sum().item() * math.log(2) / sum(counts), len(numbers), sum(counts),
                 int(size.sum()), 1000 * (time.perf_counter() - started), boundaries.sum().item()), table
def bucket_name(bucket: int, length: int) -> str:
    """The positions of a bucket: 0, 1, 2-3, 4-7, …"""
    first, last = (1 << bucket) >> 1, min((1 << bucket) - 1, length - 1)
    return f"{first}-{last}" if last > first else f"{first}"
def score_model(model: Model, label: str, hp: Hyperparameters, val: TokenStream, luts: ByteTables, log: Log) -> None:
    """Logs the headline and the scores that were asked for, of a model read from disk and the label of its file."""
    model, label = model.on(luts.base_bytes.device), label.replace("+", "_")
    sizes = {name: getattr(hp, f"{name}_seqs") for name in SCORE_NAMES[1:] if name in hp.score_names}
    sizes |= {"tgrid": hp.final_eval_max_seqs} if hp.final_eval_t_samples else {}
    if hp.objective == "ar":  # the headline is its chain rule, from left to right, and it has no other order
        for name in [name for name in sizes if name != "sliding"]:
            log(f"score:{name} is not for causal models", screen=name != "l2r")
            del sizes[name]
    started = time.perf_counter()
    for name, seqs in {hp.headline: hp.final_eval_max_seqs, **sizes}.items():
        score, table = score_windows(name, model, hp, val, luts, seqs, functools.partial(log.progress, name))
        if name == hp.headline:
            log(f"final_{label}_roundtrip val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                f"stderr:{score.stderr:.4f} eval_time:{score.ms:.0f}ms")
            log(f"final_{label}_roundtrip_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        log(f"score:{name} {'biased:1 ' * (name == 'tgrid')}{score.line()}")
        for bucket, part in enumerate(table.unbind(1) if name in ("l2r", "ar") else ()):
            bpb, stderr = ratio(*part.unbind(1))
            log(f"prefix:{bucket_name(bucket, hp.train_seq_len)} bpb:{bpb:.4f} stderr:{stderr:.4f}", screen=False)
    log_budget(log, "Evaluation time", time.perf_counter() - started, BUDGET_SECONDS, "s")
# == Training ==========================================================================================================
def progress(hp: Hyperparameters, step: int, elapsed_ms: float) -> float:
    """How much of the run is done, in [0, 1]: of its steps or of its time, whichever is nearer to its end."""
    by_clock = elapsed_ms / (1000 * hp.max_wallclock_seconds) if hp.max_wallclock_seconds else 0.0
    return min(max(step / hp.iterations if hp.iterations else 1.0, by_clock), 1.0)
def lr_scale(hp: Hyperparameters, step: int, elapsed_ms: float) -> float:
    """Grows over LR_WARMUP_STEPS, decays to MIN_LR_FRAC over the last steps that iterations, clock or cycle leave."""
    at = step % hp.lr_cycle_steps if hp.lr_cycle_steps else step
    left = min(hp.iterations - step, hp.lr_cycle_steps - at) if hp.lr_cycle_steps else hp.iterations - step
    if hp.max_wallclock_seconds and step >= 10:  # before that, a step's time says little
        left = min(left, (1000 * hp.max_wallclock_seconds - elapsed_ms) / (elapsed_ms / step))
    decay = hp.warmdown_iters or hp.warmdown_frac * (hp.lr_cycle_steps or step + left)
    scale = min(max(left / decay, 0.0), 1.0) if decay > 0 else 1.0
    scale = (1 - math.cos(math.pi * scale)) / 2 if hp.warmdown_shape == "cosine" else scale
    return min((at + 1) / max(hp.lr_warmup_steps, 1), 1.0) * (hp.min_lr_frac + (1 - hp.min_lr_frac) * scale)
def micro_batches(hp: Hyperparameters) -> list[range]:
    """This process's rows of every global batch, in equal parts of at most MICRO_BATCH_TOKENS tokens; or InputError."""
    rows, rest = divmod(hp.batch_rows, world_size())
    if hp.train_batch_tokens % hp.train_seq_len or rest:
        raise InputError(f"{hp.shown('train_batch_tokens')} is no multiple of {hp.train_seq_len * world_size()}: "
                         f"{hp.shown('train_seq_len')} times the {world_size()} processes that share its sequences")
    most = min(rows, hp.micro_batch_tokens // hp.train_seq_len)
    fitting = [n for n in range(1, most + 1) if rows % n == 0]
    if not fitting:
        raise InputError(f"{hp.shown('micro_batch_tokens')} is less than one sequence, {hp.shown('train_seq_len')}")
    return [range(at, at + fitting[-1]) for at in range(rank() * rows, (rank() + 1) * rows, fitting[-1])]
class Trainer:
    """Weights, optimizer and the one training step; any number of processes and micro-batches gives the same sums."""
    def __init__(self, hp: Hyperparameters, stream: TokenStream, device: torch.device):
        self.hp, self.stream, self.device = hp, stream, device
        self.at = SimpleNamespace(step=0, train_ms=0.0, validated=0, best_bpb=math.inf)  # over all lives of the run
        self.micros, self.model = micro_batches(hp), build_model(hp).on(device)
        self.capacity = masked_capacity(hp, len(self.micros[0])) if hp.objective == "mdlm" else 0
        self.optimizer = Optimizer(self.model, hp)
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        compiled = hp.compile == "on" or (hp.compile == "auto" and device.type == "cuda")
        self.loss = torch.compile(batch_loss, dynamic=False, fullgraph=True) if compiled else batch_loss
    def batches(self, step: int) -> Iterable[Batch]:
        for rows in self.micros:
            yield training_batch(self.hp, self.stream, step, rows, self.capacity, self.device)
    def step(self, step: int, scale: float) -> Tensor:
        """One optimizer step on the global batch of `step`; its loss, not yet read."""
        for batch in self.batches(step):
            loss = self.loss(self.model, batch)
            loss.backward()
            self.optimizer.grads[-2:] += torch.stack([batch.tokens, loss.detach()])
        total = self.optimizer.step(step, scale)
        if self.done:  # the host stays one step ahead at most, so that its clock tells the truth
            self.done.synchronize()
            self.done.record()
        return total
    def check(self, log: Log) -> None:
        """InputError if loss or gradients of more than SKIP_NONFINITE steps, or the weights, are not finite."""
        skipped, (step, *norms, loss) = int(self.optimizer.counts[1]), self.optimizer.first_bad.tolist()
        if step:
            bad = [name for name, norm in zip(self.optimizer.names, norms) if not math.isfinite(norm)]
            text = f"step:{step:.0f} not finite: loss {loss}, gradients: {', '.join(bad) or 'none'}; skipped:{skipped}"
            if skipped > self.hp.skip_nonfinite:
                raise InputError(f"{text}; lower the learning rates, or allow some such steps with SKIP_NONFINITE")
            log(text)
            self.optimizer.first_bad.zero_()
        if not self.optimizer.state.isfinite().all():
            raise InputError(f"step:{self.at.step} the weights are not finite; lower the learning rates")
    def warm_up(self, log: Log) -> None:
        """Compiles everything on real batches, then puts everything back."""
        kept = [(x, x.clone()) for x in (self.optimizer.state, self.optimizer.counts, self.optimizer.first_bad)]
        for step in range(self.hp.warmup_steps):
            self.step(step, 1.0)
            log.progress("warm-up", (step + 1) / self.hp.warmup_steps)
        for x, before in kept:
            x.copy_(before)
    def save(self, log: Log) -> None:
        """Writes a checkpoint, on the first process; the one before it stays."""
        self.check(log)
        since, path = time.perf_counter(), Path("logs") / f"{self.hp.run_id}.{self.at.step:08d}.ckpt"
        def write() -> None:  # tensors, numbers and text only, so that nothing else needs to be unpickled
            torch.save(dict(
                version=FORMAT_VERSION, hyperparameters=dataclasses.asdict(self.hp), data=self.stream.digest,
                at=vars(self.at), state=self.optimizer.state, counts=self.optimizer.counts,
                averages=self.optimizer.averages), buffer := io.BytesIO())
            write_file(path, buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest())
            for old in [other for other in checkpoints(self.hp.run_id) if other < path][1:]:
                old.unlink()
        on_first_process(write)
        log(f"checkpoint:{path} time:{1000 * (time.perf_counter() - since):.0f}ms")
    def resume(self, log: Log) -> None:
        """Goes on from the newest sound checkpoint of this run, else from RESUME; InputError if it is another run's."""
        hp, optimizer, own = self.hp, self.optimizer, on_first_process(lambda: checkpoints(self.hp.run_id))
        given = [Path(hp.resume)] if hp.resume not in ("auto", "never") else []
        if set(given) & set(own[1:]):
            raise InputError(f"{hp.shown('resume')}, but this run is at {own[0]}: remove that, or give another RUN_ID")
        for path in own + given:
            sound = False
            with contextlib.suppress(Exception):  # there are as many kinds as ways to damage a file
                data = on_first_process(path.read_bytes)
                if hashlib.sha256(data[:-32]).digest() == data[-32:]:
                    saved = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
                    made, at = Hyperparameters(**saved["hyperparameters"]), SimpleNamespace(**saved["at"])
                    differ = [made.shown(f.name) for f in dataclasses.fields(hp) if getattr(made, f.name) != getattr(
                        hp, f.name) and f.metadata["group"] in ("model", "noise", "training", "optimizer")]
                    whole = (at.step, at.validated, saved["averages"], saved["data"], saved["version"] - FORMAT_VERSION)
                    sound = (all(type(x) is int and x >= 0 for x in whole) and 0 <= at.train_ms < math.inf
                             and at.best_bpb > 0 and saved["counts"].sum() == at.step and (differ or all(
                                 saved[x].shape == y.shape and saved[x].dtype == y.dtype and saved[x].isfinite().all()
                                 for x, y in (("state", optimizer.state), ("counts", optimizer.counts)))))
            if not sound:
                log(f"skipped:{path}: damaged, or not a checkpoint of this version of train_mdlm.py")
                if path not in given:
                    on_first_process(functools.partial(path.replace, f"{path}.damaged"))
                continue
            if differ or saved["data"] != self.stream.digest:
                raise InputError(f"{path} was made with {' '.join(differ) or 'other shards'}: give it the same, or "
                                 "start another run, with another RUN_ID")
            self.at, optimizer.averages = at, saved["averages"]
            optimizer.state.copy_(saved["state"])
            optimizer.counts.copy_(saved["counts"])
            log(f"resumed:{path} step:{at.step}/{hp.iterations} train_time:{at.train_ms:.0f}ms "
                f"best_val_bpb:{at.best_bpb:.4f}; skips {at.step * hp.train_batch_tokens} tokens")
            return
        if given:
            raise InputError(f"{hp.shown('resume')}: no sound checkpoint there; give another one, or auto")
def checkpoints(run_id: str) -> list[Path]:
    """Of one run, the newest first."""
    return sorted(Path("logs").glob(f"{run_id}.{'[0-9]' * 8}.ckpt"), reverse=True)
def train(trainer: Trainer, val: TokenStream, luts: ByteTables, log: Log) -> Model:
    """To the last iteration, the wall-clock cap or a signal (an InputError); the model with its averaged weights."""
    hp, at, clock, note, stopped = trainer.hp, trainer.at, Clock(trainer.device), "", False
    with clock.paused("warm-up"):
        trainer.warm_up(log)
        next(iter(trainer.batches(at.step)))  # a stream of documents has to find the place
    clock.started, begun, saved_ms = clock.started - at.train_ms / 1000, at.step, at.train_ms
    on_signals(lambda *_: setattr(clock, "stopped", True))  # the step that is running is finished first
    while True:
        done, where = progress(hp, at.step, at.train_ms), f"step:{at.step}/{hp.iterations}"
        due = hp.checkpoint_every and (done >= 1 or at.train_ms - saved_ms >= 1000 * hp.checkpoint_every)
        if (due or stopped) and at.step > begun:
            with clock.paused("checkpoints"):
                trainer.save(log)
            saved_ms = at.train_ms
        due = hp.val_loss_every and at.step != at.validated and at.step % hp.val_loss_every == 0
        if (due or done >= 1) and not stopped:
            with clock.paused("validation"):
                trainer.check(log)
                trainer.optimizer.swap_average()
                once = dataclasses.replace(hp, nelbo_passes=1)
                score = score_windows(hp.headline, trainer.model, once, val, luts, hp.eval_max_seqs)[0]
                trainer.optimizer.swap_average()
            at.validated, at.best_bpb, note = at.step, min(at.best_bpb, score.bpb), f"val_bpb {score.bpb:.3f}"
            log(f"{where} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} stderr:{score.stderr:.4f} seqs:{score.seqs}"
                f" train_time:{at.train_ms:.0f}ms step_avg:{at.train_ms / max(at.step, 1):.2f}ms")
        if stopped:
            raise InputError(f"{where} stopped by a signal; the same command with RUN_ID={hp.run_id} goes on from here")
        if done >= 1 and (stopped := clock.read()[1]):
            continue
        if done >= 1:
            break
        loss = trainer.step(at.step, lr_scale(hp, at.step, at.train_ms))
        at.step += 1
        at.train_ms, stopped = clock.read()
        if hp.ema_decay and progress(hp, at.step, at.train_ms) >= hp.ema_start_frac:
            if not trainer.optimizer.averages:
                log(f"ema:started step:{at.step} decay:{hp.ema_decay}")
            trainer.optimizer.update_average()
        if hp.train_log_every and (at.step <= 10 or at.step % hp.train_log_every == 0):
            trainer.check(log)
            if loss.isfinite():
                log(f"step:{at.step}/{hp.iterations} train_loss:{loss:.4f} train_time:{at.train_ms:.0f}ms "
                    f"step_avg:{at.train_ms / at.step:.2f}ms")
        log.progress("train", done, note)
    on_signals(signal.default_int_handler)
    if at.step < hp.iterations:
        log(f"stopping_early: wallclock_cap train_time:{at.train_ms:.0f}ms {where}")
    apart = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.apart.items())
    log_budget(log, "Training time", at.train_ms / 1000, BUDGET_SECONDS + 1, "s", f"; not counted: {apart}")
    trainer.optimizer.swap_average()
    return trainer.model
# == Main ==============================================================================================================
def hardware(device: torch.device) -> str:
    """For example 8xNVIDIA_H100_80GB_HBM3 or 2xCPU_AVX512_(2_threads)."""
    cpu = f"CPU {torch.backends.cpu.get_cpu_capability()} ({torch.get_num_threads()} threads)"
    return f"{world_size()}x{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}".replace(" ", "_")
def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() >> 20} MiB reserved: {torch.cuda.max_memory_reserved() >> 20} MiB"
    import resource  # not on every system
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
def open_log(hp: Hyperparameters, env: Mapping[str, str], device: torch.device) -> tuple[Hyperparameters, Log]:
    """Starts the log, or goes on with an unfinished one: source, once, and hyperparameters; settles RUN_ID."""
    stamp = on_first_process(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}_{hp.preset}")
    hp = dataclasses.replace(hp, run_id=hp.run_id or stamp)
    source = Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n"
    log = Log(path := Path(f"logs/{hp.run_id}.txt"))
    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.locked = path.open("a+", encoding="utf-8", errors="replace")  # as long as this process lives
        try:
            fcntl.flock(log.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some file systems cannot lock
            if isinstance(error, BlockingIOError):
                raise InputError(f"{path}: {hp.shown('run_id')} is running already; choose another") from None
        text = log.locked.seek(0) or log.locked.read()
        used = (hp.resume == "never" or hp.eval_only) and (text or checkpoints(hp.run_id))
        if used or re.search("^finished:", text, re.MULTILINE):
            raise InputError(f"{path} is there already: {hp.shown('run_id')} was used before; choose another")
        for left in [*path.parent.glob(f"{hp.run_id}.{'[0-9]' * 8}.ckpt.part"), *checkpoints(hp.run_id)[2:]]:
            left.unlink()  # by a process that was killed while it wrote
        if not (begun := re.search("^run_id:", text, re.MULTILINE)):
            log.locked.truncate(0)
        log.locked.write("\n" * bool(begun and text[-1] != "\n") + source * (not begun or source not in text))
        log.locked.flush()
    on_first_process(begin)
    log(f"run_id:{hp.run_id} started:{time.strftime('%Y-%m-%dT%H:%M:%S')} log:{path}")
    log(f"hardware:{hardware(device)} torch:{torch.__version__} python:{sys.version.split()[0]}")
    fields = [f.name for f in dataclasses.fields(hp)]
    log("hyperparameters: " + " ".join(hp.shown(name) for name in fields), screen=False)
    log("overridden: " + (" ".join(hp.shown(name) for name in fields if name.upper() in env) or "nothing"))
    for warning in near_misses(env):
        log(warning)
    return hp, log
def write_artifact(model: Model, moments: Mapping, hp: Hyperparameters, path: Path, log: Log) -> None:
    """Packs the model on the first process and logs code + artifact against the limit."""
    info = on_first_process(lambda: save_artifact(model, hp, path, moments))
    code_bytes, label, kinds = len(Path(__file__).read_bytes()), info["label"], info["kinds"]
    for name, kind in kinds.items():
        packers = " ".join(f"{packer}:{size}" for packer, size in kind["packed_bytes"].items())
        bits, entropy = (total / max(kind["weights"], 1) for total in (8 * kind["bytes"], kind["entropy_bits"]))
        log(f"kind:{name} storage:{kind['storage']} weights:{kind['weights']} bytes:{kind['bytes']} "
            f"bits_per_weight:{bits:.3f} entropy:{entropy:.3f} {packers}")
    size, bits = info["artifact_bytes"], 8 * info["artifact_bytes"] / sum(kind["weights"] for kind in kinds.values())
    log(f"Code size: {code_bytes} bytes")
    log(f"Serialized model {label}: {size} bytes ({bits:.3f} bits per weight)")
    log_budget(log, f"Total submission size {label}", code_bytes + size, SIZE_LIMIT_BYTES, "bytes")
def open_validation(hp: Hyperparameters, device: torch.device) -> tuple[TokenStream, ByteTables]:
    """The validation split and the tokenizer's byte tables; InputError if they, or the windows, do not fit."""
    val, sp = TokenStream(hp.data_path, "val"), load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    luts = build_sentencepiece_luts(sp, hp.vocab_size, device)
    if not val.count_windows(hp.train_seq_len):
        raise InputError(f"{val.files[0]}: the validation split has {val.total} tokens, less than a window of "
                         f"{hp.shown('train_seq_len')} and the token before it")
    val.check_tokens(hp.vocab_size)
    check_tokenizer(hp.tokenizer_path, sp, val, luts)
    return val, luts
def run(env: Mapping[str, str]) -> None:
    """configure → data → train → pack → unpack → score → log."""
    hp = Hyperparameters.from_env(env)
    device = start_ranks()
    if hp.eval_only:
        model, packed, label = read_artifact(hp.eval_only)
        for name in stored_fields()[1:]:
            if name.upper() in env and getattr(hp, name) != getattr(packed, name):
                raise InputError(f"{hp.shown(name)}, but {hp.eval_only} was made with {packed.shown(name)}")
        hp = Hyperparameters.from_env({**{name.upper(): getattr(packed, name) for name in stored_fields()}, **env})
    hp = dataclasses.replace(hp, compute_dtype=resolve_dtype(hp, device))  # the artifact carries it
    val, luts = open_validation(hp, device)
    if not hp.eval_only:
        stream = DocumentStream(hp.data_path, "train", hp) if hp.doc_chunks else TokenStream(hp.data_path, "train")
        batches = max(hp.iterations, hp.warmup_steps, hp.quant_feedback)
        stream.check_tokens(hp.vocab_size, 1 + batches * hp.train_batch_tokens)
        check_tokenizer(hp.tokenizer_path, load_tokenizer(hp.tokenizer_path, hp.vocab_size), stream, luts)
        micro_batches(hp)
    hp, log = open_log(hp, env, device)
    try:
        log(f"dataset:{Path(hp.data_path).name} val_tokens:{val.total} val_windows:"
            f"{val.count_windows(hp.train_seq_len)}" + ("" if hp.eval_only else f" train_tokens:{stream.total}"))
        if hp.eval_only:
            log(f"eval_only:{hp.eval_only} compute_dtype:{hp.compute_dtype}")
        else:
            model, label = train_and_pack(Trainer(hp, stream, device), val, luts, log)
        score_model(model, label, hp, val, luts, log)
        log(f"finished:{hp.run_id}")
    except BaseException as error:
        with contextlib.suppress(OSError):  # if that is a full disk
            log(f"error: rank:{rank()} {reason(error)}", screen=False, every_rank=True)
        raise
def train_and_pack(trainer: Trainer, val: TokenStream, luts: ByteTables, log: Log) -> tuple[Model, str]:
    """The model as its artifact on disk has it, and the artifact's label."""
    hp, artifact = trainer.hp, Path("logs") / f"{trainer.hp.run_id}.mdlm"
    log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    size = on_first_process(lambda: predicted_bytes(hp))
    log_budget(log, "Predicted submission size", size, SIZE_LIMIT_BYTES, "bytes", " for normal weights")
    log(f"world_size:{world_size()} grad_accum_steps:{len(trainer.micros)} compute_dtype:{hp.compute_dtype}")
    trainer.resume(log)
    model = train(trainer, val, luts, log)
    log(f"peak memory allocated: {peak_memory(trainer.device)}")
    moments = input_moments(model, (b for step in range(hp.quant_feedback) for b in trainer.batches(step)))
    write_artifact(model, moments, hp, artifact, log)
    return read_artifact(artifact)[::2]
def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        return print(help_text())
    on_signals(signal.default_int_handler)  # a KeyboardInterrupt
    try:
        if len(sys.argv) > 1:
            raise InputError(f"{sys.argv[1]}: hyperparameters are environment variables; see --help")
        run(os.environ)
    except (InputError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and reason(error) == " ".join(str(error).split()):
            raise  # nobody foresaw it
        on_signals(signal.SIG_DFL)
        time.sleep(5 * (os.environ.get("LOCAL_RANK", "0") != "0"))  # what all of them meet, the first one tells before
        print("train_mdlm.py: error:", reason(error), file=sys.stderr, flush=True)
        (os._exit if dist.is_initialized() else sys.exit)(2)  # whoever still waits for a lost process is not waited for
    if dist.is_initialized():
        dist.destroy_process_group()
if __name__ == "__main__":
    main()
