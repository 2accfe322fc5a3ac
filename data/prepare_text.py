"""Turns text into what train_mdlm.py reads: a SentencePiece tokenizer and token shards.

    python data/prepare_text.py --source docs                         # of installed packages
    python data/prepare_text.py --source a.txt b.md --name mine --val-docs 1   # files
    python data/prepare_text.py --source books.jsonl.xz --name books  # lines of {"text": …}

A file is a document, and so is a line of a .jsonl file; the validation split gets some of them.
Files may be packed (.gz, .xz). Writes <out>/tokenizers/<name>_<vocab>_bpe.model and
<out>/datasets/<name>_sp<vocab>/fineweb_{train,val}_*.bin, and prints the two variables that point
train_mdlm.py at them. The same input and options give the same bytes. Held in memory are one batch
of documents, one shard, the sample that trains the tokenizer and, for --source docs, the text.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # noqa: E402

from train_mdlm import (  # noqa: E402
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    InputError,
    Log,
    build_sentencepiece_luts,
    count_bytes,
    write_file,
)

# What `pip install -r requirements.txt` brings on every platform. They are named so that other
# packages, installed beside them, do not change the text. The standard library is always there.
DOC_PACKAGES = """
    torch numpy sympy networkx mpmath jinja2 fsspec filelock zstandard sentencepiece
    typing_extensions
""".split()
TEST_FOLDERS = {"tests", "test", "testing", "idlelib"}
SHORTEST_DOC = 200  # characters; shorter docstrings say little
BATCH_DOCS = 256
TOKENIZER_SAMPLE_BYTES = 8_000_000
LARGEST_VOCABULARY = 65_534  # shards hold 16-bit tokens, and the model adds two of its own


# ---- Sources


def module_text(path: Path) -> str:
    """All docstrings of one Python file, in order, blank lines between them; empty for none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    text = "\n\n".join(doc for doc in docs if doc and len(doc) >= SHORTEST_DOC)
    survives = text.encode(errors="ignore").decode() == text  # lone surrogates do not
    return text if survives else ""


def package_files(packages: Iterable[str]) -> list[Path]:
    """Python files of the standard library and of the named packages, without their tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if not spec or not spec.origin:
            continue
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            files += origin.parent.rglob("*.py")
        else:
            files.append(origin)
    return [path for path in files if not TEST_FOLDERS & set(path.parts)]


def docs_of_packages(packages: Iterable[str], note: Callable[[float], None]) -> list[str]:
    """One document a module, in an order that depends on the texts only."""
    files = package_files(packages)
    texts = set()
    processes = min(2, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, text in enumerate(pool.imap_unordered(module_text, files, chunksize=32), 1):
            texts.add(text)
            note(done / len(files))
    return sorted(texts - {""}, key=lambda text: hashlib.sha256(text.encode()).digest())


def docs_of_files(paths: Iterable[Path]) -> Iterator[str]:
    """Documents of text files (one each) and of JSON lines."""
    for path in paths:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        try:
            with opener(path, "rt", encoding="utf-8", newline="") as file:
                if ".jsonl" in path.suffixes:
                    yield from docs_of_lines(file, path)
                else:
                    yield file.read()
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def docs_of_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            wanted = 'a JSON object with a "text" string'
            raise InputError(f"{path}:{number}: not {wanted}") from None
        yield text


def is_validation(number: int, text: str, val_docs: int, val_fraction: float) -> bool:
    """The first `val_docs` documents or, for 0, those whose hash falls into the fraction."""
    if val_docs:
        return number < val_docs
    first_bytes = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first_bytes, "big") < val_fraction * 2.0**64


# ---- Tokenizer


def train_tokenizer(docs: Iterable[str], path: Path, vocab_size: int, normalization: str) -> None:
    """BPE with byte fallback and the challenge's options, on the first TOKENIZER_SAMPLE_BYTES."""
    lines = []
    budget = TOKENIZER_SAMPLE_BYTES
    for text in docs:
        lines += [line for line in text.split("\n") if line]
        budget -= len(text)
        if budget < 0:
            break
    if not lines:
        raise InputError("the train split is empty; change --val-docs or --val-fraction")
    exact = normalization == "identity"
    model = io.BytesIO()  # not a file: the trainer would write its name into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            character_coverage=0.999,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=not exact,
            allow_whitespace_only_pieces=exact,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            bos_piece="<s>",
            eos_piece="</s>",
            unk_piece="<unk>",
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        failed = f"a tokenizer of {vocab_size} pieces cannot be trained on this text"
        raise InputError(f"{failed}: {reason}") from None
    write_file(path, model.getvalue())


def load_tokenizer(path: Path):
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.load(str(path))
    except (OSError, RuntimeError):
        raise InputError(f"{path}: not a SentencePiece model") from None
    return sp


def keeps_text(sp) -> bool:
    """Whether a tokenizer gives a text with unusual spaces back as it was."""
    probe = "  two spaces\n\ttab é"
    return sp.decode(sp.encode(probe)) == probe


# ---- Shards


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes 1-D `tokens` (< 65536) as a shard."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_file(path, header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


class ShardWriter:
    """Collects the tokens of a split and writes them in shards of `shard_tokens`."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.parts: list[np.ndarray] = []  # what is not written yet
        self.pending = 0  # tokens in it
        self.shards = 0
        self.docs = 0
        self.tokens = 0
        self.bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self.docs += 1
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.parts.append(tokens)
        self.pending += len(tokens)
        while self.pending >= self.shard_tokens:
            self.flush(self.shard_tokens)

    def flush(self, count: int) -> None:
        collected = np.concatenate(self.parts)
        path = self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin"
        write_shard(path, collected[:count])
        rest = collected[count:]
        self.parts = [rest]
        self.pending = len(rest)
        self.shards += 1

    def close(self) -> None:
        if self.pending:
            self.flush(self.pending)


def encode(
    docs: Iterable[str],
    sp,
    vocab_size: int,
    exact: bool,
    choose: Callable[[int, str], ShardWriter],
    note: Callable[[int], None],
) -> int:
    """Encodes documents into the writers that `choose` names; returns how many were left out.

    With an `exact` tokenizer a document that decodes to something else is left out (for example one
    that holds U+2581, SentencePiece's sign for a space). Bytes are counted twice, by the tables
    that scores use and in the decoded text; InputError if they differ, because every score with
    this tokenizer would be wrong.
    """
    luts = build_sentencepiece_luts(sp, vocab_size)
    bos = sp.bos_id()
    if bos < 0:
        raise InputError("the tokenizer has no <s> to begin a document with")
    threads = os.cpu_count() or 1
    left_out = 0
    number = 0
    docs = iter(docs)
    while batch := list(itertools.islice(docs, BATCH_DOCS)):
        encoded = sp.encode(batch, num_threads=threads)
        decoded = sp.decode(encoded, num_threads=threads)
        for text, tokens, text_again in zip(batch, encoded, decoded, strict=True):
            number += 1
            if not tokens or (exact and text_again != text):
                left_out += 1
                continue
            true_bytes = len(text_again.encode())
            counted = int(count_bytes(tokens, bos, luts))
            if counted != true_bytes:
                raise InputError(
                    f"document {number}: the byte tables of this tokenizer count {counted} bytes "
                    f"where the decoded text has {true_bytes}; scores would be wrong, so it is "
                    "refused"
                )
            choose(number - 1, text).add(np.array([bos, *tokens], dtype=np.uint16), true_bytes)
        note(number)
    return left_out


# ---- Command line


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(__doc__)
    source_help = "docs, or text and .jsonl files (.gz, .xz)"
    parser.add_argument("--source", nargs="+", required=True, help=source_help)
    name_help = "name of the data set (default: docs, or the first file's name)"
    parser.add_argument("--name", help=name_help)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="default: data/")
    tokenizer_help = "use this SentencePiece model instead of training one"
    parser.add_argument("--tokenizer", type=Path, help=tokenizer_help)
    vocab_help = "pieces of the tokenizer to train (default 1024)"
    parser.add_argument("--vocab-size", type=int, default=1024, help=vocab_help)
    normalization_help = "identity keeps every byte; nmt_nfkc is the challenge's"
    parser.add_argument(
        "--normalization",
        choices=("identity", "nmt_nfkc"),
        default="identity",
        help=normalization_help,
    )
    val_docs_help = "the first N documents are the validation split"
    parser.add_argument("--val-docs", type=int, default=0, help=val_docs_help)
    fraction_help = "or this share of them, by hash (0.04; 0.35 for docs, so that scores are sharp)"
    parser.add_argument("--val-fraction", type=float, help=fraction_help)
    shard_help = "tokens a shard (default 100,000,000)"
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help=shard_help)
    arguments = parser.parse_args()
    if arguments.val_fraction is None:
        arguments.val_fraction = 0.35 if arguments.source == ["docs"] else 0.04
    if arguments.val_docs < 0:
        raise InputError("--val-docs must not be negative")
    if not 0 < arguments.val_fraction < 1:
        raise InputError("--val-fraction lies between 0 and 1")
    if arguments.shard_tokens < 1:
        raise InputError("--shard-tokens is at least 1")
    if arguments.vocab_size > LARGEST_VOCABULARY:
        raise InputError(f"--vocab-size {arguments.vocab_size}: shards hold 16-bit tokens")
    return arguments


class Source:
    """The documents that --source names, which can be read again and again."""

    def __init__(self, arguments: argparse.Namespace, log: Log):
        self.log = log
        self.val_docs = arguments.val_docs
        self.val_fraction = arguments.val_fraction
        self.paths: list[Path] = []
        self.in_memory: list[str] = []
        if arguments.source == ["docs"]:
            self.name = "docs"
            self.in_memory = docs_of_packages(DOC_PACKAGES, self.note_reading)
        else:
            self.paths = [Path(source) for source in arguments.source]
            self.name = self.paths[0].name.split(".")[0]
            for path in self.paths:
                if not path.is_file():
                    raise InputError(f"{path}: no such file")

    def note_reading(self, fraction: float) -> None:
        self.log.progress("reading documentation", fraction)

    def note_encoded(self, number: int) -> None:
        if self.in_memory:
            self.log.progress("encoding", number / len(self.in_memory))
        elif number % (40 * BATCH_DOCS) == 0:
            self.log(f"encoded {number} documents")

    def documents(self) -> Iterator[str]:
        yield from self.in_memory or docs_of_files(self.paths)

    def is_validation(self, number: int, text: str) -> bool:
        return is_validation(number, text, self.val_docs, self.val_fraction)

    def training_documents(self) -> Iterator[str]:
        for number, text in enumerate(self.documents()):
            if not self.is_validation(number, text):
                yield text


def prepare(arguments: argparse.Namespace, log: Log) -> None:
    """Everything is made in a folder of its own first: a failure leaves the old data alone."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=arguments.out) as staging:
        prepare_in(Path(staging), arguments, log)


def prepare_in(staging: Path, arguments: argparse.Namespace, log: Log) -> None:
    """Makes tokenizer and shards in `staging`, and moves them to their places at the end."""
    source = Source(arguments, log)
    name = arguments.name or source.name
    model_path = arguments.tokenizer
    staged_model = staging / "tokenizer.model"
    if model_path is None:
        vocab_size = arguments.vocab_size
        model_path = arguments.out / "tokenizers" / f"{name}_{vocab_size}_bpe.model"
        log(f"training a tokenizer of {vocab_size} pieces …")
        documents = source.training_documents()
        train_tokenizer(documents, staged_model, vocab_size, arguments.normalization)
    sp = load_tokenizer(staged_model if staged_model.exists() else model_path)
    vocab_size = sp.vocab_size()
    folder = arguments.out / "datasets" / f"{name}_sp{vocab_size}"
    train = ShardWriter(staging, "train", arguments.shard_tokens)
    val = ShardWriter(staging, "val", arguments.shard_tokens)

    def choose(number: int, text: str) -> ShardWriter:
        return val if source.is_validation(number, text) else train

    exact = keeps_text(sp)
    left_out = encode(source.documents(), sp, vocab_size, exact, choose, source.note_encoded)
    for writer in (train, val):
        writer.close()
        if not writer.docs:
            remedy = "change --val-docs or --val-fraction"
            raise InputError(f"the {writer.split} split is empty; {remedy}")
        log(
            f"{writer.split}: {writer.docs} documents, {writer.tokens} tokens, {writer.bytes} "
            f"bytes (verified), {writer.bytes / writer.tokens:.3f} bytes/token, {writer.shards} "
            "shards"
        )
    if left_out:
        log(f"left out: {left_out} documents that the tokenizer cannot give back unchanged")
    if staged_model.exists():
        model_path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged_model, model_path)
    replace_shards(staging, folder)
    places = f"DATA_PATH={os.path.relpath(folder)} TOKENIZER_PATH={os.path.relpath(model_path)}"
    if vocab_size != 1024:
        places += f" VOCAB_SIZE={vocab_size}"
    log(places)


def replace_shards(staging: Path, folder: Path) -> None:
    """Moves the shards in `staging` to `folder`, in place of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fineweb_*.bin"):
        old.unlink()
    for shard in staging.glob("fineweb_*.bin"):
        os.replace(shard, folder / shard.name)


@common.run_tool
def main() -> None:
    prepare(parse_arguments(), Log())


if __name__ == "__main__":
    main()
