"""Turns the score into a file: compresses UTF-8 text with the probabilities of an artifact, and reads it back.

    python tools/codec.py compress book.txt book.mdlc --artifact logs/<run>.mdlm
    python tools/codec.py decompress book.mdlc copy.txt --artifact logs/<run>.mdlm

The text is cut into windows of TRAIN_SEQ_LEN tokens (the last one may be shorter). Each is coded by the chain rule in
the order and with the group size asked for, windows side by side in batches, by the range coder of the `constriction`
library. What is written is a header of about 45 bytes and the code; the reader needs the same artifact and tokenizer.

Both directions run the same model calls, on batches of the same shape, with one thread each (several calls run at the
same time), so the probabilities agree bit for bit on one machine with one version of torch, whatever the number of
threads. Should they not, the checksum of the text says so and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import math
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402

try:
    import constriction
except ImportError:
    sys.exit("codec.py: error: the constriction package is missing: pip install -r requirements-dev.txt")

MAGIC = b"MDLc"
ORDERS = ("l2r", "random", "confidence")
BATCH = 16  # windows of one model call; part of the format, because the arithmetic depends on it
BLOCK_FLOATS = 1 << 25  # probabilities in memory: as many batches advance together as have fewer of them
PRECISION = 24  # bits of the probabilities of `constriction`: each token has at least 2^-24
# magic · digest of all that follows · digests of artifact, text, tokenizer, surroundings · order · flags, and then
# group, seed and number of tokens as variable-length integers
HEADER = struct.Struct("<4s8s8s8s4s2sBB")


def digest(data: bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def surroundings(device: str) -> bytes:
    """A fingerprint of what the arithmetic depends on; another one is worth a warning."""
    return digest(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {device}".encode(), 2)


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at position `at`, and the position after it."""
    number = shift = 0
    while shift < 63:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at
    raise ValueError("longer than 63 bits")


def tokenize(sp, text: str) -> list[int]:
    """Tokens of the text. U+2581 means a space to the tokenizer, so it is spelt in bytes where there are any."""
    spelling = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    if not all(sp.is_byte(token) for token in spelling):
        return sp.encode(text)
    tokens = []
    for i, part in enumerate(text.split("\u2581")):
        tokens += (spelling if i else []) + sp.encode(part)
    return tokens


class Predictor:
    """Runs the chain rule over all windows of a text, in the same way whether its tokens are known or not."""

    def __init__(self, model: tm.Model, order: str, group: int, seed: int, device: str):
        if model.hp.objective == "ar" and (order != "l2r" or group != 1):
            raise InputError(f"--order {order} --group {group}: a causal model predicts from left to right, one token "
                             "at a time: use --order l2r --group 1")
        self.model, self.order, self.group, self.seed, self.device = model, order, group, seed, torch.device(device)
        model.on(self.device)

    def batches(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(first token, windows, length of each) of every model batch of a text of `count` tokens."""
        length = self.model.hp.train_seq_len
        whole = count // length
        for first in range(0, whole, BATCH):
            yield first * length, min(BATCH, whole - first), length
        if count % length:
            yield whole * length, 1, count % length

    def positions(self, first: int, windows: int, length: int) -> torch.Tensor | None:
        """(windows, length): the order of revealing, or None where the model decides."""
        if self.order == "confidence":
            return None
        if self.order == "l2r":
            return torch.arange(length).expand(windows, length)
        width = self.model.hp.train_seq_len
        generators = [tm.seeded("cpu", self.seed, "codec", first // width + w) for w in range(windows)]
        return torch.stack([torch.randperm(length, generator=g) for g in generators])

    def run(self, count: int, transfer: Callable, note: Callable[[float], None]) -> None:
        """Calls transfer(index (n,), log-probabilities (n, V)) → tokens (n,) for every group of tokens, in turn.

        `index` says which tokens of the text they are. Model calls run side by side, transfers one after the other.
        """
        threads = torch.get_num_threads()
        workers = threads if self.device.type == "cpu" else 1
        one_thread = functools.partial(torch.set_num_threads, 1)
        one_thread()
        group = min(self.group, self.model.hp.train_seq_len)
        block = max(BLOCK_FLOATS // (BATCH * group * self.model.hp.vocab_size), 1)
        try:
            with ThreadPoolExecutor(workers, initializer=one_thread) as pool:
                batches = list(self.batches(count))
                for at in range(0, len(batches), block):
                    for done in self.block(batches[at:at + block], transfer, pool):
                        note((at + done * len(batches[at:at + block])) / len(batches))
        finally:
            torch.set_num_threads(threads)

    def block(self, batches: list[tuple], transfer: Callable, pool: ThreadPoolExecutor) -> Iterator[float]:
        """Reveals all windows of some batches, step by step; yields the share that is done."""
        running = []
        for first, windows, length in batches:
            z = torch.full((windows, length), self.model.hp.mask_id, device=self.device)
            order = self.positions(first, windows, length)
            order = order if order is None else order.to(self.device)
            running.append((first, z, tm.reveal_surest(self.model, z, self.group) if order is None
                            else reveal_in_order(self.model, z, order, self.group)))
        longest, step = batches[0][2], 0
        while running:
            predictions = list(pool.map(predict, [steps for _, _, steps in running]))
            for (first, z, _), prediction in zip(running, predictions, strict=True):
                if prediction is None:
                    continue
                at, logp = prediction
                index = first + at.cpu() + z.shape[1] * torch.arange(len(z))[:, None]
                tokens = torch.from_numpy(np.asarray(transfer(index.flatten().numpy(), logp), np.int64))
                z.scatter_(1, at, tokens.view(at.shape).to(z.device))
            running = [run for run, prediction in zip(running, predictions, strict=True) if prediction is not None]
            step += self.group
            yield min(step / longest, 1.0)


@torch.no_grad()
def reveal_in_order(model: tm.Model, z: torch.Tensor, order: torch.Tensor,
                    group: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As tm.reveal_surest, in the given order of positions (B, L); a causal model sees <s> and what is to the left."""
    causal, rows = model.hp.objective == "ar", torch.arange(len(z), device=z.device)[:, None]
    for done in range(0, z.shape[1], group):
        at = order[:, done:done + group]
        seen = torch.nn.functional.pad(z[:, :done], (1, 0), value=tm.BOS_ID) if causal else z
        hidden = model.hidden(seen, at=(at + seen.shape[1] * rows).flatten())
        yield at, model.head(hidden).log_softmax(-1).unflatten(0, at.shape)


def predict(steps: Iterator) -> tuple[torch.Tensor, np.ndarray] | None:
    """The next positions (B, g) of a batch and their log-probabilities (B·g, V); None at the end."""
    following = next(steps, None)
    if following is None:
        return None
    at, logp = following
    if not logp.isfinite().all():
        raise InputError("the artifact's predictions are not finite numbers; it cannot code anything")
    return at, logp.flatten(0, 1).cpu().numpy()


def load(artifact: Path, tokenizer: str | None) -> tuple[tm.Model, object, bytes, bytes]:
    """Model, tokenizer and their digests."""
    model, hp = tm.load_artifact(artifact)
    path = tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path
    sp = tm.load_tokenizer(path, hp.vocab_size)
    return model.eval(), sp, digest(artifact.read_bytes()), digest(Path(path).read_bytes(), 4)


def compress(text: str, loaded: tuple, order: str, group: int, seed: int, device: str,
             note: Callable[[float], None] = lambda done: None) -> tuple[bytes, float, int]:
    """The compressed file, the bits that the score predicts for it, and the number of tokens."""
    model, sp, artifact_id, tokenizer_id = loaded
    tokens = np.asarray(tokenize(sp, text), dtype=np.int32)
    if sp.decode(tokens.tolist()) != text:
        raise InputError("the tokenizer does not keep this text as it is (it normalises it, or lacks some characters); "
                         "--normalized stores its normal form, where it has one")
    predictor, coder = Predictor(model, order, group, seed, device), constriction.stream.queue.RangeEncoder()
    family, nats = constriction.stream.model.Categorical(perfect=False), 0.0

    def transfer(index: np.ndarray, logp: np.ndarray) -> np.ndarray:
        nonlocal nats
        chosen = tokens[index]
        nats -= float(logp[np.arange(len(index)), chosen].sum(dtype=np.float64))
        coder.encode(chosen, family, np.exp(logp))
        return chosen

    predictor.run(len(tokens), transfer, note)
    payload = coder.get_compressed().astype("<u4").tobytes()
    head = HEADER.pack(MAGIC, b"", artifact_id, digest(text.encode()), tokenizer_id, surroundings(device),
                       ORDERS.index(order), int(device != "cpu"))[12:]
    rest = head + varint(group) + varint(seed) + varint(len(tokens)) + payload
    return MAGIC + digest(rest) + rest, nats / math.log(2), len(tokens)


def decompress(data: bytes, loaded: tuple, path: Path, note: Callable[[float], None] = lambda done: None) -> str:
    """The text; InputError if the file is damaged, or was made with another artifact or tokenizer."""
    model, sp, artifact_id, tokenizer_id = loaded
    if data[:4] != MAGIC:
        raise InputError(f"{path}: not a file that codec.py compressed")
    if len(data) < HEADER.size + 3 or digest(data[12:]) != data[4:12]:
        raise InputError(f"{path}: checksum mismatch, the file is damaged or truncated")
    _, _, made_with, text_id, tokenized_with, made_in, order, on_gpu = HEADER.unpack_from(data)
    if made_with != artifact_id:
        raise InputError(f"{path}: was made with another artifact (digest {made_with.hex()}, not {artifact_id.hex()})")
    if tokenized_with != tokenizer_id:
        raise InputError(f"{path}: was made with another tokenizer; give the right one with --tokenizer")
    device = "cuda" if on_gpu else "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise InputError(f"{path}: was made on a GPU, and there is none here")
    if made_in != surroundings(device):
        print(f"warning: {path} was made with another version of torch or kind of processor; it may not decode",
              file=sys.stderr)
    try:
        group, at = read_varint(data, HEADER.size)
        seed, at = read_varint(data, at)
        count, at = read_varint(data, at)
        least_bits = -math.log2(1 - (model.hp.vocab_size - 1) / 2**PRECISION)  # no token is surer than that
        if order >= len(ORDERS) or group < 1 or (len(data) - at) % 4 or count * least_bits > 8 * (len(data) - at) + 64:
            raise ValueError
    except (IndexError, ValueError):
        raise InputError(f"{path}: the header makes no sense, the file was not written by this codec.py") from None
    predictor = Predictor(model, ORDERS[order], group, seed, device)
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[at:], "<u4").astype(np.uint32))
    family, tokens = constriction.stream.model.Categorical(perfect=False), np.zeros(count, np.int32)

    def transfer(index: np.ndarray, logp: np.ndarray) -> np.ndarray:
        tokens[index] = coder.decode(family, np.exp(logp))
        return tokens[index]

    disagree = InputError(f"{path}: the decoded text does not have the checksum of the original: the arithmetic of "
                          "this machine or version of torch differs from that of the one that compressed it")
    try:
        predictor.run(count, transfer, note)
        text = sp.decode(tokens.tolist())
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError):
        raise disagree from None
    if digest(text.encode(errors="replace")) != text_id:
        raise disagree
    return text


def write(path: Path, data: bytes) -> None:
    """Under a temporary name first, so that no half of a file is left behind."""
    part = path.parent / (path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def check_output(path: Path) -> None:
    """Before hours of work: InputError if the file could not be written afterwards."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: not a file name in a folder that exists")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def run_compress(arguments: argparse.Namespace, log: tm.Log) -> None:
    source = read(arguments.input)
    check_output(arguments.output)
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{arguments.input}: not UTF-8 text (byte {error.start}); this codec is for text") from None
    loaded = load(arguments.artifact, arguments.tokenizer)
    if arguments.normalized:
        text = loaded[1].decode(tokenize(loaded[1], text))
    data, bits, count = compress(text, loaded, arguments.order, arguments.group, arguments.seed, arguments.device,
                                 lambda done: log.progress("compress", done))
    write(arguments.output, data)
    size = max(len(text.encode()), 1)
    print(f"{arguments.input}: {len(source)} bytes, {len(text.encode())} coded, {count} tokens")
    print(f"predicted by the score: {bits / 8:.1f} bytes, {bits / size:.4f} bits per byte "
          f"(order {arguments.order}, group {arguments.group})")
    print(f"{arguments.output}: {len(data)} bytes, {8 * len(data) / size:.4f} bits per byte, "
          f"{len(data) - bits / 8:+.1f} bytes beside the prediction")
    others = ["zlib", "lzma", *(["zstd"] if tm.zstandard else [])]
    print("for comparison: " + ", ".join(f"{name} {len(tm.PACKERS[name][0](source))}" for name in others))


def run_decompress(arguments: argparse.Namespace, log: tm.Log) -> None:
    data = read(arguments.input)
    check_output(arguments.output)
    if data[:4] != MAGIC:  # before the artifact is asked for
        raise InputError(f"{arguments.input}: not a file that codec.py compressed")
    text = decompress(data, load(arguments.artifact, arguments.tokenizer), arguments.input,
                      lambda done: log.progress("decompress", done))
    write(arguments.output, text.encode())
    print(f"{arguments.output}: {len(text.encode())} bytes, checksum verified")


def whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on")
        return int(text)

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, act, meaning in (("compress", run_compress, "text → code"),
                               ("decompress", run_decompress, "code → text")):
        command = commands.add_parser(name, help=meaning)
        command.set_defaults(act=act)
        command.add_argument("input", type=Path)
        command.add_argument("output", type=Path)
        command.add_argument("--artifact", type=Path, required=True, help="the .mdlm file of a run")
        command.add_argument("--tokenizer", help="SentencePiece model; default: TOKENIZER_PATH, or the preset's")
        if name == "compress":
            command.add_argument("--order", choices=ORDERS, default="l2r")
            command.add_argument("--group", type=whole(1), default=1,
                                 help="positions revealed by one model call: more is faster and packs less")
            command.add_argument("--seed", type=whole(0), default=0, help="of --order random")
            command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
            command.add_argument("--normalized", action="store_true",
                                 help="store the tokenizer's normal form of a text that it does not keep as it is")
    arguments = parser.parse_args()
    try:
        if getattr(arguments, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: there is no GPU here")
        arguments.act(arguments, tm.Log())
    except InputError as error:
        print(f"codec.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
