"""Draws text from an artifact: which positions are written in which model call, and the tokens.

`SAMPLERS` is the table of them. A sampler fills the masked positions of a text, of all of it for a
masked diffusion model, of one block after the other for a model with blocks. The cost of a sample
is its code length, so it is exact where a decoder would know the order: from the tokens revealed
before, or from a public seed. Each sample has a seed and random numbers of its own, so batches make
no difference, up to rounding.

    loaded = sampling.load(Path("logs/golf.mdlm"))  # with tools/ on sys.path
    record = sampling.record(loaded, sampling.Request(sampler="confidence", num=4))

docs/sampling.md says what the record holds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import codec
import common
import decoding
import run_log
import torch
import torch.nn.functional as F
from torch import Tensor

import train_mdlm as tm
from train_mdlm import InputError

RECORD_VERSION = 1


class Request(NamedTuple):
    """What is asked for; the names are those of the options of tools/sample.py."""

    sampler: str = ""  # row of SAMPLERS; empty: the first one that the model has
    prompt: str = ""
    infill: str = ""  # a template with gaps
    length: int = 0  # tokens of a text without a template; 0: a window
    steps: int | None = None  # these three: None is the sampler's own
    gamma: float | None = None
    eta: float | None = None
    temperature: float = 1.0  # 0: always the most probable token
    top_p: float = 1.0
    seed: int = 0  # of the first sample; the next one has the next seed
    num: int = 1
    batch: int = 16  # samples side by side
    cache: bool = True  # whether keys and values are kept, where they can be


class Loaded(NamedTuple):
    """An artifact and its tokenizer."""

    name: str  # of the file
    model: tm.Model
    hp: tm.Hyperparameters
    tokenizer: object
    luts: tm.ByteTables


# ---- Artifacts and their tokenizers
#
# An artifact does not say with which tokenizer it was trained. Any other one of the same size makes
# nonsense of its tokens, so what is at hand is asked: the log of the run, then the data.


def no_file(path: Path) -> str:
    """Of a path that is no file: what is there."""
    return "is a folder" if path.is_dir() else "there is no such file"


def check_artifact(artifact: Path) -> None:
    """InputError unless there is such a file."""
    if not artifact.is_file():
        raise InputError(f"{artifact}: {no_file(artifact)}; give the .mdlm of a run")


def log_beside(artifact: Path) -> Path:
    return artifact.parent / f"{artifact.stem}.txt"


def run_of(artifact: Path) -> run_log.Run | None:
    """What the log beside an artifact says, if it is that of its run."""
    log = log_beside(artifact)
    if log.is_file() and log.stat().st_size <= common.LARGEST_OUTPUT:
        with contextlib.suppress(InputError, OSError):
            run = run_log.parse_log(log)
            if run.artifact_bytes == artifact.stat().st_size:
                return run
    return None


def path_of(run: run_log.Run | None, log: Path, name: str, given: str | None) -> str | None:
    """The path that is given, else in the environment, else that of the run if it is there: seen
    from here, or from where the run wrote logs/<run>.txt. None: that of the preset."""
    logged = run.settings.get(name, "") if run else ""
    places = [Path(logged), log.absolute().parent.parent / logged] if logged else []
    there = next((str(place) for place in places if place.exists()), None)
    return given or os.environ.get(name) or there


def load_tokenizer(
    hp: tm.Hyperparameters, run: run_log.Run | None, log: Path, given: str | None
) -> tuple[object, tm.ByteTables]:
    """As `common.load_tokenizer`, but InputError says who named a file that is no tokenizer."""
    path = hp.tokenizer_path
    named, remedy = f"{path}, which preset {hp.preset} names", "give it with --tokenizer"
    if given or os.environ.get("TOKENIZER_PATH"):
        named = f"--tokenizer {path}" if given else f"TOKENIZER_PATH={path}"
        remedy = "give the .model that the artifact was trained with"
    elif run and run.settings.get("TOKENIZER_PATH"):
        named = f"{run.settings['TOKENIZER_PATH']}, which {log} names"
    if not Path(path).is_file():
        raise InputError(f"{named}: {no_file(Path(path))}; {remedy}")
    try:
        return common.load_tokenizer(hp)
    except InputError as error:
        if not str(error).startswith("TOKENIZER_PATH="):
            raise
        raise InputError(f"{named}: is no SentencePiece model; {remedy}") from None


def tokenizer_of_data(folder: Path) -> str:
    """SHA-256 of the tokenizer that made the shards there, if verified.json is there; else
    empty."""
    path = folder / tm.VERIFIED
    if path.is_file():
        with contextlib.suppress(InputError, OSError):
            verified = common.read_json(path)
            return str(verified.get("tokenizer_sha256", "")) if isinstance(verified, dict) else ""
    return ""


def check_tokenizer(artifact: Path, hp: tm.Hyperparameters, run: run_log.Run | None) -> None:
    """InputError if the run or, where nothing says what it had, the data have another one than `hp`
    names."""
    digest = tm.file_sha256(hp.tokenizer_path)
    if run and run.tokenizer_sha256:
        if run.tokenizer_sha256 != digest:
            said = f"its log says SHA-256 {run.tokenizer_sha256[:12]}…, not {digest[:12]}…"
            wrong = f"{hp.tokenizer_path}: {artifact.name} was trained with another tokenizer"
            raise InputError(f"{wrong} ({said}): give that one with --tokenizer")
        return
    if tokenizer_of_data(Path(hp.data_path)) not in ("", digest):
        wrong = f"{hp.tokenizer_path}: is not the tokenizer of the data in {hp.data_path}"
        remedy = "give those that the artifact was trained with, --tokenizer and --data"
        raise InputError(f"{wrong}: {remedy}")


def load(artifact: Path, tokenizer: str | None = None, data: str | None = None) -> Loaded:
    """On the device of the machine. Paths that are not given are those of the log beside the
    artifact, if they are here."""
    if data and not Path(data).is_dir():
        raise InputError(f"--data {data}: there is no such folder")
    check_artifact(artifact)
    run, log = run_of(artifact), log_beside(artifact)
    paths = (
        path_of(run, log, "DATA_PATH", data),
        path_of(run, log, "TOKENIZER_PATH", tokenizer),
    )
    model, hp = common.load_model(artifact, *paths)
    loaded = Loaded(artifact.name, model.eval(), hp, *load_tokenizer(hp, run, log, tokenizer))
    check_tokenizer(artifact, hp, run)
    return loaded


# ---- Tokens as text


def characters(run: bytes) -> list[str]:
    """What each byte adds to a text: a character stands at its first byte, and what is none is
    U+FFFD."""
    added = []
    while len(added) < len(run):
        rest = run[len(added) : len(added) + 4]
        for size in range(1, 5):
            try:
                added += [rest[:size].decode(), *[""] * (min(size, len(rest)) - 1)]
                break
            except UnicodeDecodeError:
                pass
        else:
            added.append("\ufffd")
    return added


def is_byte(loaded: Loaded, token: int) -> bool:
    return token < loaded.hp.vocab_size and loaded.tokenizer.is_byte(token)


def byte_run(loaded: Loaded, tokens: list[int], first: int) -> bytes:
    """The bytes that `tokens` have from the first one on."""
    rest = (tokens[place] for place in range(first, len(tokens)))
    names = map(
        loaded.tokenizer.id_to_piece,
        itertools.takewhile(functools.partial(is_byte, loaded), rest),
    )
    return bytes(int(name[3:5], 16) for name in names)  # <0x41>


def pieces_of(
    loaded: Loaded, tokens: list[int], unwritten: str = "", begins: bool = True
) -> list[str]:
    """The text that each token adds; together they are the decoded text, but that control tokens
    are shown by name, and MASK and PAD as `unwritten`. `begins`: there is no text before."""
    sp, luts = loaded.tokenizer, loaded.luts
    found: list[str] = []
    while len(found) < len(tokens):
        token = tokens[len(found)]
        if token >= loaded.hp.vocab_size:
            found.append(unwritten)
            begins = False
        elif sp.is_byte(token):
            found += characters(byte_run(loaded, tokens, len(found)))
            begins = False
        else:
            text = sp.id_to_piece(token).replace("\u2581", " ")
            dropped = begins and not luts.keeps_space and text.startswith(" ")
            found.append(text[1:] if dropped else text)
            begins = bool(luts.is_boundary[token])
    return found


def text_of(loaded: Loaded, tokens: list[int]) -> str:
    """The decoded text, without MASK and PAD."""
    return loaded.tokenizer.decode([token for token in tokens if token < loaded.hp.vocab_size])


# ---- Templates


class Template(NamedTuple):
    """What texts have to keep, at the same positions of all of them."""

    tokens: Tensor  # (B, N) int64; MASK where a token is drawn
    fixed: Tensor  # (N,) bool
    after_space: Tensor  # (N,) bool: a token drawn there has to begin with a space


def template_of_tokens(tokens: Tensor, mask_id: int) -> Template:
    """Of tokens (B, N) with MASK at the same positions of all rows."""
    fixed = tokens[0] != mask_id
    return Template(tokens, fixed, torch.zeros_like(fixed))


GAP = re.compile(r"(?<!\\)(\\*)\[([0-9]+)\]")  # and the backslashes before it
LONGEST = 2**20  # tokens of a text
MOST_STEPS = 2**14
LEAST_TEMPERATURE = 1e-9  # beside 0


def parse_infill(text: str) -> list[str | int]:
    r"""Fixed text and gaps, in tokens: `Once [5] a` is ["Once ", 5, " a"].

    `\[5]` is no gap but the text [5]. So before brackets with a number, and only there, a backslash
    of the text is written as two: `\\[5]` is a backslash and a gap.
    """
    parts: list[str | int] = [""]
    end = 0
    for match in GAP.finditer(text):
        backslashes, number = match.groups()
        parts[-1] += text[end : match.start()] + backslashes[: len(backslashes) // 2]
        end = match.end()
        if len(backslashes) % 2:
            parts[-1] += f"[{number}]"
        else:
            parts += [gap_of(number.lstrip("0") or "0"), ""]
    parts[-1] += text[end:]
    if sum(part for part in parts if isinstance(part, int)) > LONGEST:
        raise InputError(f"--infill: the gaps have more than {LONGEST:,} tokens together")
    if len(parts) == 1:
        raise InputError("--infill: there is no gap; write one of five tokens as [5]")
    return [part for part in parts if part != ""]


def gap_of(number: str) -> int:
    """The tokens of a gap; `number` has no needless zero."""
    if len(number) > len(str(LONGEST)):
        raise InputError(f"--infill: a gap of {number[:20]} tokens is longer than {LONGEST:,}")
    if number == "0":
        raise InputError("--infill: a gap has at least one token, so [0] is none")
    return int(number)


def encode_exactly(loaded: Loaded, text: str, option: str, begins: bool) -> list[int]:
    """Tokens of fixed text; InputError unless they stand for it exactly."""
    if not text.isascii() and text.encode(errors="replace").decode() != text:  # half characters
        raise InputError(f"{option}: not UTF-8 text: {text[:40]!r}")
    tokens = codec.tokenize(loaded.tokenizer, text)
    found = "".join(pieces_of(loaded, tokens, begins=begins))
    if found != text:
        change = f"{text[:40]!r} becomes {found[:40]!r}"
        raise InputError(f"{option}: the tokenizer does not keep this text as it is: {change}")
    return tokens


def template_of(loaded: Loaded, request: Request) -> Template:
    """One row; InputError for a text that the tokenizer does not keep, or that has no place."""
    hp = loaded.hp
    option = "--infill" if request.infill else "--prompt"
    parts = parse_infill(request.infill) if request.infill else [request.prompt]
    spaces_are_joined = bool(loaded.luts.has_leading_space.any())
    tokens: list[int] = []
    after_space = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            tokens += [hp.mask_id] * part
            continue
        gap_follows = i + 1 < len(parts) or not request.infill
        if gap_follows and part.endswith(" ") and spaces_are_joined:
            # A tokenizer joins a space with the word behind it: this one comes with the gap.
            tokens += encode_exactly(loaded, part[:-1], option, begins=i == 0)
            after_space.append(len(tokens))
        else:
            tokens += encode_exactly(loaded, part, option, begins=i == 0)
    if not request.infill:
        tokens = fill_up(tokens, request.length or max(hp.train_seq_len, len(tokens) + 1), hp)
    check_length(loaded, len(tokens), option if request.infill or request.prompt else "--length")
    if hp.doc_chunks:  # as in training: what a document does not fill is PAD
        tokens += [hp.pad_id] * (hp.train_seq_len - len(tokens))
    template = template_of_tokens(torch.tensor([tokens]), hp.mask_id)
    template.after_space[after_space] = True
    return template


def fill_up(tokens: list[int], length: int, hp: tm.Hyperparameters) -> list[int]:
    if length <= len(tokens):
        found = f"the prompt alone has {len(tokens)} tokens"
        raise InputError(f"--length {length}: {found}, so nothing would be written")
    return tokens + [hp.mask_id] * (length - len(tokens))


def check_length(loaded: Loaded, length: int, option: str) -> None:
    window = loaded.hp.train_seq_len
    if length > LONGEST:
        raise InputError(f"{option}: {length:,} tokens are more than {LONGEST:,}")
    if loaded.hp.system == "mdlm" and length > window:
        found = f"{length} tokens are more than the {window} of a window of {loaded.name}"
        remedy = "only causal models and those with blocks go on beyond it"
        raise InputError(f"{option}: {found}; {remedy}")


# ---- Rows that are being written


class Prediction(NamedTuple):
    """Of some positions, as many in every row: first those that are asked for, from left to right,
    then others that fill up."""

    positions: Tensor  # (B, g) in the part
    asked: Tensor  # (B, g) bool
    logp: Tensor  # (B, g, V) float32

    def only(self, chosen: Tensor) -> Prediction:
        """Of those of them that are chosen (B, g)."""
        columns, asked = true_first(chosen)
        logp = self.logp.take_along_dim(columns[..., None], 1)
        return Prediction(self.positions.gather(1, columns), asked, logp)


def true_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, g) of mask (B, m), from left to right those where it is true, as many as the
    fullest row has; and the mask there."""
    columns = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return columns, mask.gather(1, columns)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits (…, V) of the most probable tokens that have top_p of the probability together, the
    others −∞ (Holtzman et al. 2020)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    p = ordered.softmax(-1)
    ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


class Recomputed:
    """As decoding.Past, but nothing is kept: all clean tokens run through the model in each call,
    as they do for the scores."""

    def __init__(self, model: tm.Model, before: Tensor):
        self.model, self.hp = model, model.hp
        self.tokens = before[:, None]

    def append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens], dim=1)

    def next_hidden(self) -> Tensor:
        """(B, D) at the last of the clean tokens."""
        length, device = self.tokens.shape[1], self.tokens.device
        view = tm.plain_view(self.hp, length, True, device)
        rows = torch.arange(len(self.tokens), device=device)
        return self.model.hidden(self.tokens, None, (rows + 1) * length - 1, view)

    def hidden(self, z: Tensor, positions: Tensor) -> Tensor:
        """(N, D) that predict flat positions of a noisy block (B, m)."""
        window = F.pad(self.tokens, (0, 1))  # the last one is not read
        block = z.shape[1]
        columns = torch.arange(block, device=z.device) + self.tokens.shape[1] - 1
        both, at, view = tm.beside_clean(self.hp, block, z, positions, window, columns)
        return self.model.hidden(both, None, at, view)


def divide_calls(hp: tm.Hyperparameters, masked: Tensor, most: int) -> dict[int, int]:
    """Calls of each part that has something to fill, by the column where it ends: one, and of the
    rest of `most` a share like that of the `masked` (N,) that it fills. Nothing for 0."""
    if not most:
        return {}
    counts: dict[int, int] = {}
    done, masked = 0, masked.cpu()
    for part in parts(hp, len(masked)):
        own = int(masked[max(part.start, done) : part.stop].sum())  # without what is filled before
        done = max(part.stop, done)
        if own:
            counts[part.stop] = own
    calls = {}
    rest, before, total = max(most - len(counts), 0), 0, sum(counts.values())
    for stop, own in counts.items():
        calls[stop] = 1 + rest * (before + own) // total - rest * before // total
        before += own
    return calls


class Rows:
    """Texts that are written side by side, and what they have cost."""

    def __init__(
        self,
        model: tm.Model,
        template: Template,
        request: Request,
        luts: tm.ByteTables | None = None,
    ):
        """A row for each row of the template, with seeds from `request.seed` on."""
        self.model, self.hp, self.request = model, model.hp, request
        self.sampler = SAMPLERS[request.sampler]
        self.settings = settings_of(request)
        device = model.tok_emb.weight.device
        self.z = template.tokens.clone().to(device)  # (B, N)
        self.fixed = template.fixed.to(device)
        self.generators = [
            tm.seeded("cpu", request.seed + row, "sample") for row in range(len(self.z))
        ]
        self.steps: list[list[dict]] = [[] for _ in self.z]  # one for each model call
        self.fresh = torch.zeros_like(self.z, dtype=torch.bool)  # written after the last call
        self.nats = torch.zeros(len(self.z), dtype=torch.float64, device=device)
        self.after_space = template.after_space.to(device)
        allowed = torch.zeros(2, self.hp.vocab_size, device=device)
        if self.hp.anchor_bos:  # never masked, so never predicted
            allowed[:, tm.BOS_ID] = -math.inf
        if luts:
            allowed[1, ~luts.has_leading_space[: self.hp.vocab_size]] = -math.inf
        self.allowed = allowed  # (2, V): anywhere, and after a space; 0 or −∞
        use_cache = request.cache and self.hp.system != "mdlm"
        self.twin = decoding.cached(model) if use_cache else None
        masked = self.z[0] == self.hp.mask_id
        self.calls = divide_calls(self.hp, masked, self.settings.get("steps", 0))

    def past(self, columns: slice) -> decoding.Past | Recomputed:
        """What is before a window that begins there: so far one token."""
        before = self.z.new_full((len(self.z),), tm.BOS_ID)
        if columns.start:
            before = self.z[:, columns.start - 1]
        if self.twin is None:
            return Recomputed(self.model, before)
        return decoding.Past(self.twin, before, columns.stop - columns.start)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float64 in [0, 1), each row from its own generator."""
        draws = [torch.rand(shape, dtype=torch.float64, generator=g) for g in self.generators]
        return torch.stack(draws).to(self.z.device)

    def gumbel(self, asked: Tensor) -> Tensor:
        """(B, g, V) float64 where `asked` (B, g): float32 would lower the temperature (Zheng et al.
        2024). A row draws no more than it needs, whoever is beside it."""
        shape = (*asked.shape, self.hp.vocab_size)
        noise = torch.zeros(shape, dtype=torch.float64)
        counts = asked.sum(1).tolist()
        for row, generator, count in zip(noise, self.generators, counts, strict=True):
            torch.rand(count, shape[2], generator=generator, out=row[:count])
        return -(-noise.to(asked.device).log()).log()

    def draw(self, columns: Tensor, prediction: Prediction) -> Tensor:
        """Tokens (B, g) for the `columns` (B, g) of the text."""
        request = self.request
        logits = prediction.logp.double() + self.allowed[self.after_space[columns].long()]
        if not logits.amax(-1)[prediction.asked].isfinite().all():
            raise InputError("the artifact's predictions are not finite numbers: no text in it")
        if request.temperature == 0:
            return logits.argmax(-1)
        logits = logits / request.temperature
        if request.top_p < 1:
            logits = nucleus(logits, request.top_p)
        return (logits + self.gumbel(prediction.asked)).argmax(-1)

    def write(self, columns: Tensor, prediction: Prediction, tokens: Tensor) -> None:
        """Tokens (B, g) into the `columns` (B, g), where they are asked for: one model call."""
        asked = prediction.asked
        nll = -prediction.logp.double().gather(2, tokens[..., None])[..., 0]
        self.nats += torch.where(asked, nll, 0).sum(1)
        self.fresh.fill_(False)
        rows = torch.arange(len(self.z), device=self.z.device)[:, None].expand_as(columns)
        self.z[rows[asked], columns[asked]] = tokens[asked]
        self.fresh[rows[asked], columns[asked]] = True
        for steps, where, what, own in zip(
            self.steps, columns.tolist(), tokens.tolist(), asked.tolist(), strict=True
        ):
            if any(own):
                step = dict(positions=where, tokens=what)
                steps.append({k: list(itertools.compress(v, own)) for k, v in step.items()})

    def remask(self, remasked: Tensor) -> None:
        """Takes tokens (B, N) back, as the end of the last step of their row."""
        self.z.masked_fill_(remasked, self.hp.mask_id)
        for steps, own in zip(self.steps, remasked, strict=True):
            columns = own.nonzero()[:, 0].tolist()
            if columns:
                steps[-1]["positions"] += columns
                steps[-1]["tokens"] += [self.hp.mask_id] * len(columns)


View = tm.Model | decoding.Past | Recomputed


class Part:
    """Columns of the rows that one sampler fills: a window or a block."""

    def __init__(self, rows: Rows, view: View, columns: slice):
        self.rows, self.view, self.columns = rows, view, columns
        self.z = rows.z[:, columns]  # shares memory
        self.drawn = self.masked[0]  # (m,) bool, the same in all rows
        self.count = int(self.drawn.sum())
        self.steps = rows.calls.get(columns.stop, self.count)  # calls at most

    @property
    def masked(self) -> Tensor:
        """(B, m) bool."""
        return self.z == self.rows.hp.mask_id

    @torch.no_grad()
    def look(self, asked: Tensor) -> Prediction:
        """A model call for the positions `asked` (B, m)."""
        positions, asked = true_first(asked)
        row_starts = self.z.shape[1] * torch.arange(len(self.z), device=self.z.device)[:, None]
        hidden = self.view.hidden(self.z, positions=(positions + row_starts).flatten())
        logp = self.rows.model.head(hidden).log_softmax(-1).unflatten(0, positions.shape)
        return Prediction(positions, asked, logp)

    @torch.no_grad()
    def look_on(self) -> Prediction:
        """Of the position behind what the view of a causal model has read."""
        logp = self.rows.model.head(self.view.next_hidden()).log_softmax(-1)
        read = self.view.tokens.shape[1] - 1
        positions = torch.full_like(self.z[:, :1], read)
        return Prediction(positions, torch.ones_like(positions, dtype=torch.bool), logp[:, None])

    def draw(self, prediction: Prediction) -> Tensor:
        return self.rows.draw(self.columns.start + prediction.positions, prediction)

    def write(self, prediction: Prediction, tokens: Tensor | None = None) -> None:
        """Draws the tokens if they are not given."""
        tokens = self.draw(prediction) if tokens is None else tokens
        self.rows.write(self.columns.start + prediction.positions, prediction, tokens)

    def remask(self, remasked: Tensor) -> None:
        """(B, m) bool."""
        after = self.rows.z.shape[1] - self.columns.stop
        self.rows.remask(F.pad(remasked, (self.columns.start, after)))


# ---- Samplers
#
# Each is a generator over the model calls that fill a part.


def shares(count: int, calls: int) -> list[int]:
    """How many of `count` positions each of `calls` reveals: as equal as can be, none without."""
    calls = min(calls, count)
    return [count * (i + 1) // calls - count * i // calls for i in range(calls)]


def in_order(keys_of: Callable[[Part], Tensor]) -> Callable:
    """The smallest of keys (B, m) first, so many in each call."""

    def fill(part: Part) -> Iterator[None]:
        place = tm.ranks(keys_of(part).masked_fill(~part.masked, math.inf))
        done = 0
        for count in shares(part.count, part.steps):
            part.write(part.look((place >= done) & (place < done + count)))
            done += count
            yield

    return fill


def left_to_right(part: Part) -> Tensor:
    return torch.arange(part.z.shape[1], device=part.z.device).double().expand(part.z.shape)


def at_random(part: Part) -> Tensor:
    return part.rows.uniform(part.z.shape[1])


def largest(score: Tensor, asked: Tensor, count: int) -> Tensor:
    """(B, g) bool: so many of those asked for, with the largest score in nats (B, g). Of those
    within 2^-13, as tm.reveal_surest has it, the leftmost."""
    score = score.masked_fill(~asked, -math.inf)
    behind = ((score.amax(1, keepdim=True) - score) * 2**12).round()
    chosen = behind.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(asked).scatter_(1, chosen, True) & asked


def confidence(logp: Tensor) -> Tensor:
    """The largest probability of any token."""
    return logp.amax(-1)


def margin(logp: Tensor) -> Tensor:
    """How far the most probable token is ahead of the next one."""
    first, second = logp.exp().topk(2, dim=-1).values.unbind(-1)
    return first - second


def negative_entropy(logp: Tensor) -> Tensor:
    """In nats."""
    return -torch.special.entr(logp.exp()).sum(-1)


def most_certain(score: Callable[[Tensor], Tensor]) -> Callable:
    """The positions with the largest score of their predictions (B, g, V) first, so many in each
    call."""

    def fill(part: Part) -> Iterator[None]:
        for count in shares(part.count, part.steps):
            prediction = part.look(part.masked)
            chosen = largest(score(prediction.logp), prediction.asked, count)
            part.write(prediction.only(chosen))
            yield

    return fill


def entropy_bounded(part: Part) -> Iterator[None]:
    """In each call as many as can be, the smallest entropies first, of which the sum without the
    largest, a bound on what they say about each other, is at most gamma."""
    gamma = part.rows.settings["gamma"]
    while part.masked.any():
        prediction = part.look(part.masked)
        entropy = -negative_entropy(prediction.logp).masked_fill(~prediction.asked, -math.inf)
        order = (entropy * 2**12).round().argsort(dim=1, stable=True)
        sorted_entropy = entropy.gather(1, order).nan_to_num(posinf=0)
        others = sorted_entropy.cumsum(1) - sorted_entropy
        chosen = torch.zeros_like(prediction.asked).scatter_(1, order, others <= gamma)
        part.write(prediction.only(chosen & prediction.asked))
        yield


def cosine_counts(count: int, calls: int) -> list[int]:
    """How many of `count` each call reveals if count · cos(π/2 · i/calls) stay masked after the
    i-th, and each reveals at least one."""
    left, counts = count, []
    for i in range(1, min(calls, count) + 1):
        stay = int(count * math.cos(math.pi / 2 * i / min(calls, count)))
        counts.append(max(left - stay, 1))
        left -= counts[-1]
    return [n for n in counts if n]


def maskgit(part: Part) -> Iterator[None]:
    """Draws tokens at all masked positions, and keeps the most probable of the tokens."""
    for count in cosine_counts(part.count, part.steps):
        prediction = part.look(part.masked)
        tokens = part.draw(prediction)
        own = prediction.logp.gather(2, tokens[..., None])[..., 0]
        chosen = largest(own, prediction.asked, count)
        kept = tokens.gather(1, true_first(chosen)[0])
        part.write(prediction.only(chosen), kept)
        yield


def mask_path(part: Part, eta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """What each model call reveals, and what is masked again after it, (B, m) bool each.

    From time t = i/T to s = (i − 1)/T, with α_t = 1 − t, an unmasked position is masked again with
    probability σ = min(η, (1 − α_s)/α_t), and a masked one revealed with (α_s − (1 − σ)·α_t)/(1 −
    α_t) (Wang et al. 2025; for η = 0 Sahoo et al. 2024). None of that depends on the tokens, so it
    is drawn in advance. A step that reveals nothing takes no call; so a row's n-th call is beside
    the n-th of the others, whatever their times.
    """
    masked, revealed, remasked = part.masked, [], []
    for i in range(part.steps, 0, -1):
        alpha_t, alpha_s = 1 - i / part.steps, 1 - (i - 1) / part.steps
        sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t else 0.0
        u = part.rows.uniform(part.z.shape[1])
        revealed.append(masked & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)))
        remasked.append(~masked & part.drawn & (u < sigma))
        masked = masked & ~revealed[-1] | remasked[-1]
    revealed, remasked = torch.stack(revealed), torch.stack(remasked)  # (T, B, m)
    call = (revealed.any(2).cumsum(0) - 1).clamp(min=0)[..., None].expand(revealed.shape)
    merged = [
        torch.zeros_like(x, dtype=torch.int8).scatter_add_(0, call, x.to(torch.int8)) > 0
        for x in (revealed, remasked)
    ]
    calls = int(call.max()) + 1
    yield from zip(merged[0][:calls], merged[1][:calls], strict=True)


def ancestral(part: Part) -> Iterator[None]:
    eta = part.rows.settings.get("eta", 0.0)
    for revealed, remasked in mask_path(part, eta):
        part.write(part.look(revealed))
        part.remask(remasked)
        yield


def causally(part: Part) -> Iterator[None]:
    """Of a window, each token given those before it. Fixed tokens take no call of their own."""
    for column, drawn in enumerate(part.drawn.tolist()):
        if drawn:
            part.write(part.look_on())
            yield
        part.view.append(part.z[:, column : column + 1])


class Sampler(NamedTuple):
    """A way to write a text."""

    fill: Callable[[Part], Iterator[None]]
    about: str
    options: dict  # the settings of its own, with their defaults; None: there is none
    systems: tuple[str, ...] = ("mdlm", "block")
    exact: bool = True  # a decoder knows the order, so there is an exact code length


STEPS = dict(steps=None)  # without it a call for each position
# The first one that a model has is its default.
SAMPLERS = {
    "causal": Sampler(
        causally,
        "each token given those before it; of a model with blocks the clean half",
        {},
        systems=("ar", "block"),
    ),
    "confidence": Sampler(
        most_certain(confidence),
        "the largest probability of any token first (Chang et al. 2022, Nie et al. 2025)",
        STEPS,
    ),
    "ancestral": Sampler(
        ancestral,
        "the reverse process on T steps (Austin et al. 2021, Sahoo et al. 2024)",
        STEPS,
    ),
    "random": Sampler(
        in_order(at_random),
        "a random order: the first-hitting sampler (Zheng et al. 2024), which needs no times",
        STEPS,
    ),
    "l2r": Sampler(in_order(left_to_right), "from left to right", STEPS),
    "margin": Sampler(
        most_certain(margin),
        "the largest lead of the best token over the next first (Kim et al. 2025)",
        STEPS,
    ),
    "entropy": Sampler(
        most_certain(negative_entropy), "the smallest entropy first (Ye et al. 2025)", STEPS
    ),
    "eb": Sampler(
        entropy_bounded,
        "EB-sampler: as many of the smallest entropies as gamma allows (Ben-Hamu et al. 2025)",
        dict(gamma=0.1),
    ),
    "maskgit": Sampler(
        maskgit,
        "tokens everywhere, the most probable of them stay; cosine schedule (Chang et al. 2022)",
        STEPS,
        exact=False,
    ),
    "remdm": Sampler(
        ancestral,
        "ancestral with remasking, ReMDM-cap: with probability eta at most (Wang et al. 2025)",
        dict(steps=None, eta=0.02),
        exact=False,
    ),
}


def settings_of(request: Request) -> dict:
    """The settings of its sampler; without steps if they are not given."""
    options = SAMPLERS[request.sampler].options
    given = {name: getattr(request, name) for name in options}
    settings = options | {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in settings.items() if value is not None}


def fill_window(rows: Rows, columns: slice) -> Iterator[None]:
    """What is masked in these columns, a model call after the other. The tokens before them are
    seen by a model with blocks and by a causal one."""
    if rows.hp.system == "mdlm" or rows.sampler.fill is causally:
        view = rows.model if rows.hp.system == "mdlm" else rows.past(columns)
        yield from rows.sampler.fill(Part(rows, view, columns))
        return
    past = rows.past(columns)
    for block in blocks_of(rows.hp, columns):
        part = Part(rows, past, block)
        if part.count:
            yield from rows.sampler.fill(part)
        past.append(part.z)


def windows(hp: tm.Hyperparameters, length: int) -> Iterator[slice]:
    """Of a text of that length, in the order of writing: each but the first begins with the second
    half of the one before."""
    window, block = hp.train_seq_len, hp.block_size or 1
    kept = window // 2 // block * block
    stop = min(window, length)
    yield slice(0, stop)
    while stop < length:
        start = stop - kept
        stop = min(start + window, length)
        yield slice(start, stop)


def blocks_of(hp: tm.Hyperparameters, window: slice) -> Iterator[slice]:
    for start in range(window.start, window.stop, hp.block_size):
        yield slice(start, min(start + hp.block_size, window.stop))


def parts(hp: tm.Hyperparameters, length: int) -> Iterator[slice]:
    """What is filled at a time, of a text of that length: windows or, if there are any, blocks."""
    for window in windows(hp, length):
        yield from blocks_of(hp, window) if hp.block_size else [window]


def write(rows: Rows) -> Iterator[None]:
    """Writes the text, a model call after the other."""
    for columns in windows(rows.hp, rows.z.shape[1]):
        yield from fill_window(rows, columns)


# ---- Requests


def check_sampler(loaded: Loaded, name: str) -> None:
    """InputError unless it is one for such a model."""
    if name not in SAMPLERS:
        close = tm.did_you_mean(name, SAMPLERS)
        raise InputError(f"--sampler {name} is not one of {', '.join(SAMPLERS)}{close}")
    if loaded.hp.system in SAMPLERS[name].systems:
        return
    if loaded.hp.causal:
        reason = "is a causal model, which has no MASK: it takes --sampler causal"
    else:
        reason = "has no causal half: take another sampler, for example l2r"
    raise InputError(f"--sampler {name}: {loaded.name} {reason}")


def default_sampler(loaded: Loaded) -> str:
    return next(name for name, row in SAMPLERS.items() if loaded.hp.system in row.systems)


def check(loaded: Loaded, request: Request) -> None:
    """InputError for values that are out of range, or do not fit together."""
    check_sampler(loaded, request.sampler)
    own = SAMPLERS[request.sampler].options
    if request.steps == 0:
        raise InputError("--steps 0: a text takes one call or more; leave it out for one a token")
    for name in ("steps", "gamma", "eta"):
        if getattr(request, name) is not None and name not in own:
            known = ", ".join(f"--{option}" for option in own) or "none of its own"
            raise InputError(f"--{name} is not for --sampler {request.sampler}, which has {known}")
    values = request._asdict() | settings_of(request)
    limits = dict(
        length=(0, LONGEST),
        steps=(1, MOST_STEPS),
        num=(1, 2**20),
        batch=(1, 2**16),
        seed=(0, 2**62),
    )
    limits |= dict(temperature=(0, 1e6), top_p=(1e-9, 1), gamma=(0, 1e6), eta=(0, 1))
    for name, (low, high) in limits.items():
        if values.get(name) is not None and not low <= values[name] <= high:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {values[name]} is not between {low} and {high}")
    if 0 < request.temperature < LEAST_TEMPERATURE:  # logits would not stay finite
        remedy = f"give 0 for the most probable tokens, or at least {LEAST_TEMPERATURE}"
        raise InputError(f"--temperature {request.temperature} is too low: {remedy}")
    if request.infill and (request.prompt or request.length):
        other = "--prompt" if request.prompt else "--length"
        raise InputError(f"{other} does not go with --infill, whose template is the whole text")


def check_steps(loaded: Loaded, request: Request, template: Template) -> None:
    """InputError for fewer steps than there are blocks to fill."""
    steps = settings_of(request).get("steps", 0)
    needed = len(divide_calls(loaded.hp, ~template.fixed, steps))
    if steps < needed:
        found = f"there are {needed} blocks to fill, with a model call or more for each"
        raise InputError(f"--steps {steps}: {found}; give {needed} or more")


def notes(loaded: Loaded, template: Template) -> list[str]:
    """What a user may not expect of such a model and such a text."""
    hp, found = loaded.hp, []
    length = len(template.fixed)
    if length > hp.train_seq_len:
        _, second, *_ = windows(hp, length)
        found.append(
            f"{length} tokens are more than a window of {hp.train_seq_len}: each further window "
            f"begins with the last {hp.train_seq_len - second.start} tokens of the one before"
        )
    gaps = (~template.fixed).nonzero()[:, 0]
    if hp.system != "mdlm" and template.fixed[int(gaps[0]) :].any():
        own = f" and the rest of its block of {hp.block_size}" if hp.block_size else ""
        found.append(f"in a gap this model sees what is to the left{own}, not what follows")
    return found


# ---- Samples


class Sample(NamedTuple):
    """A text, and how it was written."""

    seed: int
    fixed: list[bool]  # by position: part of the prompt or template
    tokens: list[int]
    calls: int
    seconds: float  # its share of the time of its batch
    bits: float | None  # −log2 of what the model gave the drawn tokens, where that is exact
    steps: list[dict]  # positions and tokens that each call wrote; MASK: taken back after it


def finished(rows: Rows, seconds: float) -> Iterator[Sample]:
    """What is in the rows."""
    hp, request = rows.hp, rows.request
    length = int((rows.z[0] != hp.pad_id).sum())  # PAD is at the end
    bits = (rows.nats / math.log(2)).tolist()
    for i, tokens in enumerate(rows.z.tolist()):
        yield Sample(
            seed=request.seed + i,
            fixed=rows.fixed[:length].tolist(),
            tokens=tokens[:length],
            calls=len(rows.steps[i]),
            seconds=seconds / len(rows.z),
            bits=bits[i] if rows.sampler.exact else None,
            steps=rows.steps[i],
        )


def resolve(loaded: Loaded, request: Request) -> tuple[Request, Template]:
    """The request with a sampler, checked, and its template; or InputError."""
    request = request._replace(sampler=request.sampler or default_sampler(loaded))
    check(loaded, request)
    template = template_of(loaded, request)
    check_steps(loaded, request, template)
    return request, template


def no_watch(rows: Rows) -> None:
    pass


def draw(
    loaded: Loaded, request: Request, watch: Callable[[Rows], None] = no_watch
) -> Iterator[Sample]:
    """The samples, in batches; `watch` is shown the rows of a batch at first and after each call.
    InputError for a request that cannot be met."""
    request, template = resolve(loaded, request)
    for first in range(0, request.num, request.batch):
        count = min(request.batch, request.num - first)
        tokens = template.tokens.expand(count, -1)
        own = request._replace(seed=request.seed + first)
        rows = Rows(loaded.model, template._replace(tokens=tokens), own, loaded.luts)
        watch(rows)
        seconds, since = 0.0, time.perf_counter()
        for _ in write(rows):
            seconds += time.perf_counter() - since
            watch(rows)
            since = time.perf_counter()
        yield from finished(rows, seconds)


def shaping(request: Request) -> dict:
    """The settings that a sample depends on, beside its seed."""
    given = dict(prompt=request.prompt, infill=request.infill)
    settings = settings_of(request)
    settings |= dict(temperature=request.temperature, top_p=request.top_p)
    return settings | {name: text for name, text in given.items() if text}


def record(loaded: Loaded, request: Request, samples: list[Sample] | None = None) -> dict:
    """What `--json` writes (docs/sampling.md); the samples are drawn if they are not given."""
    request, _ = resolve(loaded, request)
    samples = list(draw(loaded, request)) if samples is None else samples
    return dict(
        version=RECORD_VERSION,
        artifact=loaded.name,
        preset=loaded.hp.preset,
        sampler=request.sampler,
        settings=shaping(request),
        length=len(samples[0].tokens),
        mask_id=loaded.hp.mask_id,
        samples=[
            dict(
                seed=sample.seed,
                prompt_or_template=sample.fixed,
                tokens=sample.tokens,
                pieces=pieces_of(loaded, sample.tokens),
                text=text_of(loaded, sample.tokens),
                calls=sample.calls,
                seconds=sample.seconds,
                bits=sample.bits,
                steps=sample.steps,
            )
            for sample in samples
        ],
    )
