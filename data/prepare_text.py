"""Turns text into what train_mdlm.py reads: a SentencePiece tokenizer and token shards.

    python data/prepare_text.py --source docs                         documentation of installed packages, no download
    python data/prepare_text.py --source a.txt b.md --name mine       text files, one document each
    python data/prepare_text.py --source books.jsonl.xz --name books  JSON lines {"text": ...}, plain, .gz or .xz

Writes <out>/tokenizers/<name>_<vocab>_bpe.model and <out>/datasets/<name>_sp<vocab>/fineweb_{train,val}_*.bin and
prints the two variables that point train_mdlm.py at them. The same input and options give the same bytes. Held in
memory are one batch of documents, one shard, the sample that trains the tokenizer and, for --source docs, the text.
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
import warnings
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_mdlm import (  # noqa: E402
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    InputError,
    Log,
    build_sentencepiece_luts,
    count_bytes,
)

# What `pip install -r requirements.txt` brings on every platform; naming them keeps the corpus the same when other
# packages are installed beside them. The standard library comes with every Python.
DOC_PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath", "jinja2", "fsspec", "filelock", "zstandard",
                "sentencepiece", "typing_extensions")
SHORTEST_DOC = 200  # characters; shorter docstrings say little
BATCH_DOCS = 256
TOKENIZER_SAMPLE_BYTES = 8_000_000


def module_text(path: Path) -> str:
    """All docstrings of one Python file, in order, blank lines between them; empty if there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    found = (ast.get_docstring(node) for node in ast.walk(tree)
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
    text = "\n\n".join(doc for doc in found if doc and len(doc) >= SHORTEST_DOC)
    return text if text.isascii() or text.encode(errors="ignore").decode() == text else ""


def package_files(packages: Iterable[str]) -> list[Path]:
    """Python files of the standard library and of the named packages, without their tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            origin = Path(spec.origin)
            files += origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    return [path for path in files if not {"tests", "test", "testing", "idlelib"} & set(path.parts)]


def docs_of_packages(packages: Iterable[str], note: Callable[[float], None]) -> list[str]:
    """One document a module, in an order that depends on the texts only."""
    files = package_files(packages)
    texts = set()
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        for i, text in enumerate(pool.imap_unordered(module_text, files, chunksize=32)):
            texts.add(text)
            note((i + 1) / len(files))
    return sorted(texts - {""}, key=lambda text: hashlib.sha256(text.encode()).digest())


def docs_of_files(paths: list[Path]) -> Iterator[str]:
    """Documents of text files (one each) and of JSON lines."""
    for path in paths:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        try:
            with opener(path, "rt", encoding="utf-8", newline="") as file:
                if ".jsonl" not in path.suffixes:
                    yield file.read()
                    continue
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)["text"] + ""
                    except (ValueError, KeyError, TypeError):
                        raise InputError(f'{path}:{number}: not a JSON object with a "text" string') from None
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def is_validation(number: int, text: str, val_docs: int, val_fraction: float) -> bool:
    """The first `val_docs` documents, or, if that is 0, those whose hash falls into the fraction."""
    if val_docs:
        return number < val_docs
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_fraction * 2.0**64


def train_tokenizer(docs: Iterable[str], path: Path, vocab_size: int, normalization: str) -> None:
    """BPE with byte fallback and the challenge's options, on the first TOKENIZER_SAMPLE_BYTES of the documents."""
    lines, budget = [], TOKENIZER_SAMPLE_BYTES
    for text in docs:
        lines += [line for line in text.split("\n") if line]
        budget -= len(text)
        if budget < 0:
            break
    if not lines:
        raise InputError("the train split is empty; change --val-docs or --val-fraction")
    model = io.BytesIO()  # not a file: the trainer would write its name into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, add_dummy_prefix=False, character_coverage=0.999,
            normalization_rule_name=normalization, remove_extra_whitespaces=normalization != "identity",
            allow_whitespace_only_pieces=normalization == "identity", hard_vocab_limit=True,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<s>", eos_piece="</s>",
            unk_piece="<unk>", minloglevel=2)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"a tokenizer of {vocab_size} pieces cannot be trained on this text: {reason}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes 1-D `tokens` (< 65536) as a shard, under a temporary name first."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    os.replace(part, path)


class ShardWriter:
    """Collects the tokens of a split and writes them in shards of `shard_tokens`."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.parts: list[np.ndarray] = []
        self.pending = self.shards = self.docs = self.tokens = self.bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self.docs, self.tokens, self.bytes = self.docs + 1, self.tokens + len(tokens), self.bytes + text_bytes
        self.parts.append(tokens)
        self.pending += len(tokens)
        while self.pending >= self.shard_tokens:
            self.flush(self.shard_tokens)

    def flush(self, count: int) -> None:
        whole = np.concatenate(self.parts)
        write_shard(self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin", whole[:count])
        self.parts, self.pending, self.shards = [whole[count:]], len(whole) - len(whole[:count]), self.shards + 1

    def close(self) -> None:
        if self.pending:
            self.flush(self.pending)


def encode(docs: Iterable[str], sp, vocab_size: int, exact: bool, choose: Callable[[int, str], ShardWriter],
           note: Callable[[int], None]) -> int:
    """Encodes documents into the writers that `choose` names; returns how many were left out.

    With an `exact` tokenizer a document that decodes to something else is left out (for example one that holds U+2581,
    SentencePiece's sign for a space). Bytes are counted twice, by the tables that scores use and in the decoded text;
    InputError if they differ, because every score with this tokenizer would be wrong.
    """
    luts, bos, left_out, number = build_sentencepiece_luts(sp, vocab_size), sp.bos_id(), 0, 0
    if bos < 0:
        raise InputError("the tokenizer has no <s> to begin a document with")
    docs = iter(docs)
    while batch := list(itertools.islice(docs, BATCH_DOCS)):
        ids = sp.encode(batch, num_threads=os.cpu_count() or 1)
        for text, tokens, decoded in zip(batch, ids, sp.decode(ids, num_threads=os.cpu_count() or 1)):
            number += 1
            if not tokens or (exact and decoded != text):
                left_out += 1
                continue
            true_bytes, counted = len(decoded.encode()), int(count_bytes(tokens, bos, luts))
            if counted != true_bytes:
                raise InputError(f"document {number}: the byte tables of this tokenizer count {counted} bytes where "
                                 f"the decoded text has {true_bytes}; scores would be wrong, so it is refused")
            choose(number - 1, text).add(np.array([bos, *tokens], dtype=np.uint16), true_bytes)
        note(number)
    return left_out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", required=True, help="docs, or text and .jsonl files (.gz, .xz)")
    parser.add_argument("--name", help="name of the data set (default: docs, or the first file's name)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: data/")
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer to train (default 1024)")
    parser.add_argument("--normalization", default="identity", choices=("identity", "nmt_nfkc"),
                        help="identity keeps every byte; nmt_nfkc is the challenge's")
    parser.add_argument("--val-docs", type=int, default=0, help="the first N documents are the validation split")
    parser.add_argument("--val-fraction", type=float,
                        help="or this share of them, by hash (0.04; 0.35 for docs, so that scores are sharp)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default 100,000,000)")
    arguments = parser.parse_args()
    if arguments.val_fraction is None:
        arguments.val_fraction = 0.35 if arguments.source == ["docs"] else 0.04
    if arguments.val_docs < 0 or not 0 < arguments.val_fraction < 1 or arguments.shard_tokens < 1:
        raise InputError("--val-docs must not be negative, --val-fraction lies between 0 and 1, --shard-tokens is at "
                         "least 1")
    if arguments.vocab_size > 65_534:
        raise InputError(f"--vocab-size {arguments.vocab_size}: shards hold 16-bit tokens")
    return arguments


def prepare(arguments: argparse.Namespace, log: Log) -> None:
    from_packages = arguments.source == ["docs"]
    name = arguments.name or ("docs" if from_packages else Path(arguments.source[0]).name.split(".")[0])
    paths = [] if from_packages else [Path(source) for source in arguments.source]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    if from_packages:
        kept = docs_of_packages(DOC_PACKAGES, lambda fraction: log.progress("reading documentation", fraction))
    documents = (lambda: iter(kept)) if from_packages else (lambda: docs_of_files(paths))

    def chosen(number: int, text: str) -> bool:
        return is_validation(number, text, arguments.val_docs, arguments.val_fraction)

    if arguments.tokenizer:
        model_path = arguments.tokenizer
        sp = sentencepiece.SentencePieceProcessor()
        try:
            sp.load(str(model_path))
        except (OSError, RuntimeError):
            raise InputError(f"{model_path}: not a SentencePiece model") from None
    else:
        model_path = arguments.out / "tokenizers" / f"{name}_{arguments.vocab_size}_bpe.model"
        log(f"training a tokenizer of {arguments.vocab_size} pieces …")
        train_tokenizer((text for i, text in enumerate(documents()) if not chosen(i, text)), model_path,
                        arguments.vocab_size, arguments.normalization)
        sp = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocab_size = sp.vocab_size()
    folder = arguments.out / "datasets" / f"{name}_sp{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fineweb_*.bin"):
        old.unlink()
    writers = {split: ShardWriter(folder, split, arguments.shard_tokens) for split in ("train", "val")}
    probe = "  two spaces\n\ttab é"
    left_out = encode(documents(), sp, vocab_size, sp.decode(sp.encode(probe)) == probe,
                      lambda number, text: writers["val" if chosen(number, text) else "train"],
                      lambda number: log.progress("encoding", number / len(kept)) if from_packages else
                      log(f"encoded {number} documents") if number % (40 * BATCH_DOCS) == 0 else None)
    for split, writer in writers.items():
        writer.close()
        if not writer.docs:
            raise InputError(f"the {split} split is empty; change --val-docs or --val-fraction")
        log(f"{split}: {writer.docs} documents, {writer.tokens} tokens, {writer.bytes} bytes (verified), "
            f"{writer.bytes / writer.tokens:.3f} bytes/token, {writer.shards} shards")
    if left_out:
        log(f"left out: {left_out} documents that the tokenizer cannot give back unchanged")
    log(f"DATA_PATH={os.path.relpath(folder)} TOKENIZER_PATH={os.path.relpath(model_path)}"
        + ("" if vocab_size == 1024 else f" VOCAB_SIZE={vocab_size}"))


if __name__ == "__main__":
    try:
        prepare(parse_arguments(), Log())
    except InputError as error:
        print(f"prepare_text.py: error: {error}", file=sys.stderr)
        sys.exit(2)
