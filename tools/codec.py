"""Turns the score into a file: compresses UTF-8 text with an artifact, and reads it back.

    python tools/codec.py compress book.txt book.mdlc --artifact logs/<run>.mdlm
    python tools/codec.py decompress book.mdlc copy.txt --artifact logs/<run>.mdlm

The text is cut into windows of TRAIN_SEQ_LEN tokens; the last one may be shorter. Each is coded by
the chain rule in the order and with the group size asked for, windows side by side in batches, by
the range coder of the package `constriction`. What is written is a header of about 40 bytes and
the code; the reader needs the same artifact and tokenizer. Causal models and those with blocks keep
the keys and values of what they have read (tools/decoding.py); the token before a window is <s>.
With the order `ar` each token is coded given those before it, by a causal model or by the causal
half of one with blocks. It is the default of both: their fastest code and, with blocks of 4 and
more, nearly always the shortest. That of other models, and with --group of those with blocks, is
`l2r`.

Both directions run the same model calls, on batches of the same shape, with one thread each
(several calls run at the same time). So the probabilities agree bit for bit on one machine with
one version of torch, whatever the number of threads. Should they not, the checksum of the text
says so, and nothing is written.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import itertools
import math
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import common
import decoding
import numpy as np
import torch
from torch import Tensor

import train_mdlm as tm
from train_mdlm import InputError

ORDERS = ("l2r", "random", "confidence", "ar")  # a file has the number of its order
# Windows of one model call, at most, without and with kept keys and values: part of the format,
# because the arithmetic depends on it
BATCH = 16
CACHED_BATCH = 512
BLOCK_FLOATS = 1 << 25  # probabilities in memory: as many batches advance together as have fewer
KEPT_FLOATS = 1 << 28  # keys and values that are kept; also part of the format
PRECISION = 24  # bits of the probabilities of `constriction`: a token has at least 2^-24
CALLS_AHEAD = 16  # model calls that are begun before they are needed
SPARE_BITS = 64  # the range coder may leave out so many at the end

Note = Callable[[float], None]  # is told which share of the work is done


def no_note(fraction: float) -> None:
    pass


# ---- The file
#
#     MAGIC · digest of all that follows · Header · group, seed, number of tokens · code
#
# The three numbers have as many bytes as they need.

MAGIC = b"MDLd"  # the last letter: of this version of the format
BODY = 12  # where what the digest covers begins
FIELDS = struct.Struct("<8s8s4s2sBB")


class Header(NamedTuple):
    """What a file says about how it was made."""

    artifact_id: bytes
    text_id: bytes
    tokenizer_id: bytes
    surroundings: bytes
    order: int  # number of one of ORDERS
    on_gpu: int


def digest(data: bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def surroundings(device: str) -> bytes:
    """A fingerprint of what the arithmetic depends on; another one is worth a warning."""
    capability = torch.backends.cpu.get_cpu_capability()
    return digest(f"{torch.__version__} {capability} {device}".encode(), 2)


def varint(number: int) -> bytes:
    """Seven bits in each byte; the eighth says that another byte follows."""
    written = bytearray()
    while number >= 128:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it; IndexError or ValueError for none."""
    number = 0
    for shift in range(0, 63, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("longer than 63 bits")


# ---- Predictions


class Batch(NamedTuple):
    """Windows of a text that are side by side in one model call."""

    first: int  # its first token
    windows: int
    length: int  # tokens of each


class Revelation(NamedTuple):
    """A batch that is being revealed, or, by the reader, guessed."""

    first: int  # its first token
    z: Tensor  # (windows, length) int64, MASK where a token is not known yet
    steps: Iterator  # of positions (windows, g) and log-probabilities (windows, g, V)


class Predictor:
    """Runs the chain rule over all windows of a text, whether its tokens are known or not."""

    def __init__(self, model: tm.Model, order: str, group: int, seed: int, device: str):
        given = f"--order {order} --group {group}"
        self.causal = order == "ar" or model.hp.causal
        if order == "ar" and model.hp.system == "mdlm":
            rule = "this model has no causal half"
            raise InputError(f"{given}: {rule}: use --order l2r, random or confidence")
        if self.causal and (order not in ("ar", "l2r") or group != 1):
            rule = "a causal code goes from left to right, one token at a time"
            remedy = "--order ar --group 1" if model.hp.causal else "--group 1 or another --order"
            raise InputError(f"{given}: {rule}: use {remedy}")
        self.device = torch.device(device)
        self.model = model.on(self.device)
        self.order = order
        self.group = group
        self.seed = seed
        self.length = model.hp.train_seq_len
        self.twin = decoding.cached(self.model) if model.hp.system != "mdlm" else None
        self.windows = BATCH
        hp = model.hp
        self.kept_floats = self.length * 2 * hp.num_layers * hp.num_kv_heads * hp.head_dim
        if self.twin:
            self.windows = max(min(CACHED_BATCH, KEPT_FLOATS // self.kept_floats), 1)

    def batches(self, count: int) -> Iterator[Batch]:
        """The batches of a text of `count` tokens; a rest is a batch of its own."""
        whole, rest = divmod(count, self.length)
        rows = self.windows
        if self.twin and whole:  # batches of nearly the same size keep all threads busy
            rows = tm.ceil_div(whole, tm.ceil_div(whole, rows))
        for window in range(0, whole, rows):
            yield Batch(window * self.length, min(rows, whole - window), self.length)
        if rest:
            yield Batch(whole * self.length, 1, rest)

    def random_order(self, batch: Batch) -> Tensor:
        """(windows, length): a permutation of its own for every window of the text."""
        first = batch.first // self.length
        permutations = []
        for window in range(first, first + batch.windows):
            generator = tm.seeded("cpu", self.seed, "codec", window)
            permutations.append(torch.randperm(batch.length, generator=generator))
        return torch.stack(permutations)

    def begin(self, batch: Batch) -> Revelation:
        shape = (batch.windows, batch.length)
        z = torch.full(shape, self.model.hp.mask_id, device=self.device)
        before = torch.full(shape[:1], tm.BOS_ID, device=self.device)
        if self.causal:
            return Revelation(batch.first, z, decoding.reveal_causally(self.twin, z, before))
        if self.twin:
            steps = functools.partial(self.begin_block, self.place(batch))
            blocks = decoding.reveal_blocks(self.twin, z, before, steps)
            return Revelation(batch.first, z, blocks)
        if self.order == "confidence":
            steps = tm.reveal_surest(self.model, z, self.model.hidden, self.group)
            return Revelation(batch.first, z, steps)
        order = self.place(batch).argsort(1)
        return Revelation(batch.first, z, reveal_in_order(self.model, z, order, self.group))

    def place(self, batch: Batch) -> Tensor:
        """(windows, length): in an order that is given, the places of the positions in it."""
        place = torch.arange(batch.length).expand(batch.windows, batch.length)
        if self.order == "random":
            place = self.random_order(batch).argsort(1)
        return place.to(self.device)

    def begin_block(
        self, place: Tensor, past: decoding.Past, z: Tensor, columns: slice
    ) -> decoding.Steps:
        """The steps that reveal a block, of the columns of its windows, after its past."""
        if self.order == "confidence":
            return tm.reveal_surest(past, z, past.hidden, self.group)
        return reveal_in_order(past, z, place[:, columns].argsort(1), self.group)

    def run(self, count: int, transfer: Callable, note: Note) -> None:
        """Calls transfer(index (n,), log-probabilities (n, V)) → tokens (n,) for all tokens, group
        after group.

        `index` says which tokens of the text they are. Model calls run side by side, transfers one
        after the other, each as soon as it can be: one that raises an error ends it all.
        """
        threads = torch.get_num_threads()
        workers = threads if self.device.type == "cpu" else 1
        one_thread = functools.partial(torch.set_num_threads, 1)
        one_thread()
        group = min(self.group, self.length)
        at_once = BLOCK_FLOATS // (self.windows * group * self.model.hp.vocab_size)
        if self.twin:
            at_once = min(at_once, KEPT_FLOATS // (self.windows * self.kept_floats))
        at_once = max(at_once, 1)
        try:
            with ThreadPoolExecutor(workers, initializer=one_thread) as pool:
                batches = self.batches(count)
                done = 0
                while block := list(itertools.islice(batches, at_once)):
                    for tokens in self.reveal(block, transfer, pool):
                        done += tokens
                        note(done / count)
        finally:
            torch.set_num_threads(threads)

    def reveal(
        self, block: list[Batch], transfer: Callable, pool: ThreadPoolExecutor
    ) -> Iterator[int]:
        """Reveals some batches side by side, a step of each in turn; yields how many tokens that
        were."""
        fresh = map(self.begin, block)  # as late as possible
        again, waiting = collections.deque(), collections.deque()
        while True:
            while len(waiting) <= CALLS_AHEAD:
                revelation = next(fresh, None) or (again.popleft() if again else None)
                if not revelation:
                    break
                waiting.append((revelation, pool.submit(predict, revelation.steps)))
            if not waiting:
                return
            revelation, call = waiting.popleft()
            prediction = call.result()
            if prediction is None:
                continue
            positions, logp = prediction
            windows, length = revelation.z.shape
            window_starts = length * torch.arange(windows)[:, None]
            index = revelation.first + window_starts + positions.cpu()
            tokens = np.asarray(transfer(index.flatten().numpy(), logp), np.int64)
            tokens = torch.from_numpy(tokens).view(positions.shape)
            revelation.z.scatter_(1, positions, tokens.to(self.device))
            again.append(revelation)
            yield index.numel()


@torch.no_grad()
def reveal_in_order(
    model: tm.Model | decoding.Past, z: Tensor, order: Tensor, group: int
) -> decoding.Steps:
    """As tm.reveal_surest, in the given order of positions (B, L)."""
    rows = torch.arange(len(z), device=z.device)[:, None]
    for done in range(0, z.shape[1], group):
        positions = order[:, done : done + group]
        wanted = positions + z.shape[1] * rows
        logits = model.head(model.hidden(z, positions=wanted.flatten()))
        yield positions, logits.log_softmax(-1).unflatten(0, positions.shape)


def predict(steps: Iterator) -> tuple[Tensor, np.ndarray] | None:
    """The next positions (B, g) of a batch and log-probabilities (B·g, V); None at the end."""
    following = next(steps, None)
    if following is None:
        return None
    positions, logp = following
    if not logp.isfinite().all():
        raise InputError(
            "the artifact's predictions are not finite numbers; it cannot code anything"
        )
    return positions, logp.flatten(0, 1).cpu().numpy()


# ---- Compress and decompress


class Loaded(NamedTuple):
    """What both directions need, and its digests."""

    model: tm.Model
    tokenizer: object
    artifact_id: bytes
    tokenizer_id: bytes


def usual_order(hp: tm.Hyperparameters, group: int) -> str:
    """A model with blocks reveals several positions a call in its other orders only."""
    return "ar" if hp.causal or (hp.block_size and group == 1) else "l2r"


def load(artifact: Path, tokenizer: str | None) -> Loaded:
    model, hp = tm.load_artifact(artifact)
    path = common.with_paths(hp, tokenizer=tokenizer).tokenizer_path
    sentencepiece = tm.load_tokenizer(path, hp.vocab_size)
    artifact_id = digest(artifact.read_bytes())
    tokenizer_id = digest(Path(path).read_bytes(), 4)
    return Loaded(model.eval(), sentencepiece, artifact_id, tokenizer_id)


def tokenize(sp, text: str) -> list[int]:
    """Tokens of the text. U+2581 means a space to the tokenizer, so it is spelt in bytes where the
    tokenizer has them."""
    spelling = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    if not all(sp.is_byte(token) for token in spelling):
        return sp.encode(text)
    first, *others = text.split("\u2581")
    tokens = sp.encode(first)
    for part in others:
        tokens += spelling
        tokens += sp.encode(part)
    return tokens


def compress(
    text: str,
    loaded: Loaded,
    order: str,
    group: int,
    seed: int,
    device: str,
    note: Note = no_note,
) -> tuple[bytes, float, int]:
    """The compressed file, the bits that the score predicts for it, and the number of tokens."""
    coding = common.require("constriction").stream
    tokens = np.asarray(tokenize(loaded.tokenizer, text), dtype=np.int32)
    if loaded.tokenizer.decode(tokens.tolist()) != text:
        raise InputError(
            "the tokenizer does not keep this text as it is (it normalises it, or lacks some "
            "characters); --normalized stores its normal form, where it has one"
        )
    predictor = Predictor(loaded.model, order, group, seed, device)
    coder = coding.queue.RangeEncoder()
    family = coding.model.Categorical(perfect=False)
    nats = 0.0

    def transfer(index: np.ndarray, logp: np.ndarray) -> np.ndarray:
        nonlocal nats
        chosen = tokens[index]
        nats -= float(logp[np.arange(len(index)), chosen].sum(dtype=np.float64))
        coder.encode(chosen, family, np.exp(logp))
        return chosen

    predictor.run(len(tokens), transfer, note)
    header = Header(
        artifact_id=loaded.artifact_id,
        text_id=digest(text.encode()),
        tokenizer_id=loaded.tokenizer_id,
        surroundings=surroundings(device),
        order=ORDERS.index(order),
        on_gpu=int(device != "cpu"),
    )
    numbers = varint(group) + varint(seed) + varint(len(tokens))
    code = coder.get_compressed().astype("<u4").tobytes()
    body = FIELDS.pack(*header) + numbers + code
    return MAGIC + digest(body) + body, nats / math.log(2), len(tokens)


def check_magic(data: bytes, path: Path) -> None:
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: not a file that this version of codec.py compressed")


def read_header(data: bytes, loaded: Loaded, path: Path) -> Header:
    """The header; InputError if the file is damaged, or made with another artifact or tokenizer."""
    check_magic(data, path)
    if len(data) < BODY + FIELDS.size + 3 or digest(data[BODY:]) != data[len(MAGIC) : BODY]:
        raise InputError(f"{path}: checksum mismatch, the file is damaged or truncated")
    header = Header(*FIELDS.unpack_from(data, BODY))
    if header.artifact_id != loaded.artifact_id:
        digests = f"digest {header.artifact_id.hex()}, not {loaded.artifact_id.hex()}"
        raise InputError(f"{path}: was made with another artifact ({digests})")
    if header.tokenizer_id != loaded.tokenizer_id:
        remedy = "give the right one with --tokenizer"
        raise InputError(f"{path}: was made with another tokenizer; {remedy}")
    if header.on_gpu and not torch.cuda.is_available():
        raise InputError(f"{path}: was made on a GPU, and there is none here")
    return header


def read_numbers(data: bytes, vocab_size: int) -> tuple[int, int, int, int]:
    """Group, seed, number of tokens, and where the code begins.

    ValueError or IndexError if no such file can have been written: in particular, a few bytes
    cannot be the code of so many tokens, however sure the model is of them.
    """
    group, position = read_varint(data, BODY + FIELDS.size)
    seed, position = read_varint(data, position)
    count, position = read_varint(data, position)
    code_bytes = len(data) - position
    largest_probability = 1 - (vocab_size - 1) / 2**PRECISION
    least_bits = count * -math.log2(largest_probability)
    if group < 1 or code_bytes % 4 or least_bits > 8 * code_bytes + SPARE_BITS:
        raise ValueError("numbers that do not fit together")
    return group, seed, count, position


class Decoder:
    """Tokens from a code; stops where the code cannot be that of so many tokens."""

    def __init__(self, code: bytes, count: int):
        coding = common.require("constriction").stream
        self.coder = coding.queue.RangeDecoder(np.frombuffer(code, "<u4").astype(np.uint32))
        self.family = coding.model.Categorical(perfect=False)
        self.count = count  # what the header says; memory is taken for what the code has
        self.tokens = np.zeros(0, np.int32)
        self.bits = 8 * len(code) + SPARE_BITS  # that are left, or more

    def transfer(self, index: np.ndarray, logp: np.ndarray) -> np.ndarray:
        """The tokens at `index`, for `Predictor.run`; EOFError after the end of the code."""
        probability = np.exp(logp)
        found = self.coder.decode(self.family, probability)
        rounded_up = probability[np.arange(len(index)), found].astype(np.float64)
        rounded_up += 4 / 2**PRECISION
        self.bits += np.log2(rounded_up.clip(max=1)).sum()
        if self.bits < 0:
            raise EOFError
        missing = int(index.max()) + 1 - len(self.tokens)
        if missing > 0:
            self.tokens = np.pad(self.tokens, (0, max(missing, len(self.tokens))))
        self.tokens[index] = found
        return found


def decompress(data: bytes, loaded: Loaded, path: Path, note: Note = no_note) -> str:
    """The text; InputError if the file is not sound, or if the arithmetic here is different."""
    header = read_header(data, loaded, path)
    device = "cuda" if header.on_gpu else "cpu"
    if header.surroundings != surroundings(device):
        other = "another version of torch or kind of processor"
        print(f"warning: {path} was made with {other}; it may not decode", file=sys.stderr)
    try:
        order = ORDERS[header.order]
        group, seed, count, begin = read_numbers(data, loaded.model.hp.vocab_size)
        predictor = Predictor(loaded.model, order, group, seed, device)
    except (IndexError, ValueError):
        reason = "the header makes no sense, the file was not written by this codec.py"
        raise InputError(f"{path}: {reason}") from None
    decoder = Decoder(data[begin:], count)
    otherwise = (
        "the arithmetic of this machine or version of torch differs from that of the one that "
        "compressed it"
    )
    ended = f"the code ends before the {count:,} tokens of the header: they were made up, or"
    disagree = InputError(
        f"{path}: the decoded text does not have the checksum of the original: {otherwise}"
    )
    try:
        predictor.run(count, decoder.transfer, note)
        text = loaded.tokenizer.decode(decoder.tokens[:count].tolist())
    except EOFError:
        raise InputError(f"{path}: {ended} {otherwise}") from None
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError):
        raise disagree from None
    if digest(text.encode(errors="replace")) != header.text_id:
        raise disagree
    return text


# ---- Command line


def compressed(path: Path) -> bool:
    """Whether codec.py made this file."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_output(arguments: argparse.Namespace, made: Callable[[Path], bool]) -> None:
    """Before hours of work: InputError if the output could not be written, or would replace what
    the codec needs or did not make."""
    path = arguments.output
    for needed in (arguments.input, arguments.artifact, arguments.tokenizer):
        if needed and path.exists() and path.samefile(needed):
            raise InputError(f"{path}: is read by this command; choose another name for the output")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: its folder does not exist")
    common.check_output(path, made)


def run_compress(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here")
    source = arguments.input.read_bytes()
    check_output(arguments, compressed)
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start}); this codec is for text"
        raise InputError(f"{arguments.input}: {reason}") from None
    loaded = load(arguments.artifact, arguments.tokenizer)
    if arguments.normalized:
        text = loaded.tokenizer.decode(tokenize(loaded.tokenizer, text))
    order = arguments.order or usual_order(loaded.model.hp, arguments.group)
    how = (order, arguments.group, arguments.seed, arguments.device)
    data, bits, tokens = compress(text, loaded, *how, common.Progress("compress"))
    tm.write_file(arguments.output, data)
    coded = len(text.encode())
    size = max(coded, 1)
    print(f"{arguments.input}: {len(source)} bytes, {coded} coded, {tokens} tokens")
    print(
        f"predicted by the score: {bits / 8:.1f} bytes, {bits / size:.4f} bits per byte "
        f"(order {order}, group {arguments.group})"
    )
    print(
        f"{arguments.output}: {len(data)} bytes, {8 * len(data) / size:.4f} bits per byte, "
        f"{len(data) - bits / 8:+.1f} bytes beside the prediction"
    )
    names = ["zlib", "lzma"]
    if tm.zstandard:
        names.append("zstd")
    sizes = [f"{name} {len(tm.PACKERS[name].pack(source))}" for name in names]
    print("for comparison: " + ", ".join(sizes))


def run_decompress(arguments: argparse.Namespace) -> None:
    data = arguments.input.read_bytes()
    check_output(arguments, lambda path: False)  # a text may be anybody's
    check_magic(data, arguments.input)  # before the artifact is asked for
    loaded = load(arguments.artifact, arguments.tokenizer)
    text = decompress(data, loaded, arguments.input, common.Progress("decompress")).encode()
    tm.write_file(arguments.output, text)
    print(f"{arguments.output}: {len(text)} bytes, checksum verified")


def whole(low: int) -> Callable[[str], int]:
    """An argument that is a whole number of at least `low`, in 63 bits."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on")
        return int(text)

    return parse


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compressing = commands.add_parser("compress", help="text → code")
    compressing.set_defaults(act=run_compress)
    decompressing = commands.add_parser("decompress", help="code → text")
    decompressing.set_defaults(act=run_decompress)
    for command in (compressing, decompressing):
        command.add_argument("input", type=Path)
        command.add_argument("output", type=Path)
        artifact_help = "the .mdlm file of a run"
        command.add_argument("--artifact", type=Path, required=True, help=artifact_help)
        common.add_tokenizer_option(command)
    order_help = "default: ar for causal models and, with --group 1, those with blocks; else l2r"
    compressing.add_argument("--order", choices=ORDERS, help=order_help)
    group_help = "positions revealed by one model call: more is faster and packs less; --order ar "
    group_help += "has only 1"
    compressing.add_argument("--group", type=whole(1), default=1, help=group_help)
    compressing.add_argument("--seed", type=whole(0), default=0, help="of --order random")
    compressing.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    normalized_help = "store the tokenizer's normal form of a text that it does not keep as it is"
    compressing.add_argument("--normalized", action="store_true", help=normalized_help)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
