"""Turns text into what train_mdlm.py reads: a SentencePiece tokenizer and token shards.

    python data/prepare_text.py --source docs                         # of installed packages
    python data/prepare_text.py --source a.txt b.md --name mine --val-docs 1   # files
    python data/prepare_text.py --source books.jsonl.xz --name books  # lines of {"text": …}

A file is a document, and so is a line of a .jsonl file; the validation split gets some of them.
Files may be packed (.gz, .xz). Writes <out>/tokenizers/<name>_<vocab>_bpe.model and
<out>/datasets/<name>_sp<vocab>/fineweb_{train,val}_*.bin, with what it counted in them in
verified.json, and prints the three variables that point train_mdlm.py at them. A data set of the
same name is replaced when all of the new one is made. The same input and options give the same
bytes, and another --vocab-size the same documents in the same split. Held in memory are one batch
of documents, one shard, the sample that trains the tokenizer and, for --source docs, the text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # noqa: E402  (before what takes long to import)
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402

from train_mdlm import (  # noqa: E402
    BOS_ID,
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    VERIFIED,
    InputError,
    Log,
    build_sentencepiece_luts,
    count_bytes,
    file_sha256,
    read_file,
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
VOCAB_SIZE = 4096  # pieces of a tokenizer that is trained, unless --vocab-size says otherwise
TOKENIZER_SAMPLE = 8_000_000  # characters of text that it is trained on
LONGEST_LINE_BYTES = 4192  # SentencePiece leaves longer lines out when it trains
LARGEST_VOCABULARY = 65_534  # shards hold 16-bit tokens, and the model adds two of its own
LARGEST_SHARD = 2**31 - 1  # tokens; the header counts them in 32 bits
MOST_SHARDS = 1_000_000  # of a split: their names have six digits
NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}")
OWN_FILES = re.compile(r"fineweb_(train|val)_\d{6}\.bin(\.part)?|" + re.escape(VERIFIED))


@contextlib.contextmanager
def ignored(*signals: signal.Signals) -> Iterator[None]:
    """For a while; processes that are started meanwhile ignore these signals to their end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    with ignored(signal.SIGINT, signal.SIGHUP):  # they would complain, each for itself
        workers = multiprocessing.get_context("spawn").Pool(processes)
    with workers as pool:
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
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}; convert it") from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            packed = "" if opener is open else "; is it packed, as its name says?"
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: cannot be read as UTF-8 text: {reason}{packed}") from None


def docs_of_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = 'a JSON object with a "text" string'
            raise InputError(f"{path}:{number}: not {wanted}") from None
        if half := re.search("[\ud800-\udfff]", text):
            found = f"its text holds \\u{ord(half[0]):x}, half a character"
            raise InputError(f"{path}:{number}: {found}; repair the text or remove the line")
        yield text


def is_validation(number: int, text: str, val_docs: int, val_fraction: float) -> bool:
    """The first `val_docs` documents or, for 0, those whose hash falls into the fraction."""
    if val_docs:
        return number < val_docs
    first_bytes = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first_bytes, "big") < val_fraction * 2.0**64


# ---- Tokenizer


def short_lines(text: str) -> Iterator[str]:
    """The lines of a text; those that SentencePiece would leave out in parts, cut before spaces."""
    for line in text.split("\n"):
        longest = len(line)  # characters of a part
        if len(line.encode()) > LONGEST_LINE_BYTES:
            longest = LONGEST_LINE_BYTES // 4  # a character has at most 4 bytes
        start = 0
        while start < len(line):
            end = start + longest
            if end < len(line):
                space = line.rfind(" ", start + 1, end + 1)
                end = space if space > 0 else end
            yield line[start:end]
            start = end


def why_not_trained(error: RuntimeError) -> str:
    """What SentencePiece's message means here."""
    text = str(error)
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return f"it needs at least {found[1]}; give --vocab-size {found[1]} or more"
    if found := re.search(r"size too high .* value <= (\d+)", text):
        remedy = f"give --vocab-size {found[1]} or less, or more text"
        return f"it has no more than {found[1]}; {remedy}"
    if "sentences_.empty()" in text or "all_chars_count" in text:
        return "there is nothing in it to learn from; give more text"
    return text.strip().splitlines()[-1]


def train_tokenizer(docs: Iterable[str], path: Path, vocab_size: int, normalization: str) -> None:
    """BPE with byte fallback and the challenge's options, on the first TOKENIZER_SAMPLE."""
    lines: list[str] = []
    budget = TOKENIZER_SAMPLE
    for text in docs:
        lines += short_lines(text)
        budget -= len(text)
        if budget < 0:
            break
    if not lines:
        raise InputError(empty("train"))
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
        failed = f"a tokenizer of {vocab_size} pieces cannot be trained on this text"
        raise InputError(f"{failed}: {why_not_trained(error)}") from None
    write_file(path, model.getvalue())


def load_tokenizer(path: Path):
    """A SentencePiece model; InputError if shards cannot be made with it."""
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(read_file(path))
        pieces = len(sp.id_to_piece(list(range(sp.vocab_size()))))  # raises if one is no UTF-8
    except (RuntimeError, UnicodeDecodeError):
        raise InputError(f"{path}: not a SentencePiece model") from None
    if pieces > LARGEST_VOCABULARY:
        most = f"at most {LARGEST_VOCABULARY}, as shards hold 16-bit tokens"
        raise InputError(f"{path}: has {pieces} pieces; give a tokenizer of {most}")
    if sp.bos_id() != BOS_ID:
        found = f"token {sp.bos_id()}" if sp.bos_id() >= 0 else "missing"
        remedy = f"train it with bos_id={BOS_ID}"
        raise InputError(f"{path}: its <s> is {found}, but it has to be token {BOS_ID}; {remedy}")
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
        self.shards: dict[str, int] = {}  # CRC-32 of the tokens, by name
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
        if len(self.shards) == MOST_SHARDS:
            raise InputError(f"--shard-tokens {self.shard_tokens}: more than {MOST_SHARDS} shards")
        collected = np.concatenate(self.parts).astype("<u2", copy=False)
        name = f"fineweb_{self.split}_{len(self.shards):06d}.bin"
        write_shard(self.folder / name, collected[:count])
        self.shards[name] = zlib.crc32(collected[:count])
        rest = collected[count:]
        self.parts = [rest]
        self.pending = len(rest)

    def close(self) -> None:
        if self.pending:
            self.flush(self.pending)

    def facts(self) -> dict:
        """What verified.json says of the split."""
        counts = dict(tokens=self.tokens, documents=self.docs, bytes=self.bytes)
        return counts | {"shards": self.shards}


def write_verified(folder: Path, tokenizer: Path, train: dict, val: dict, **notes: str) -> None:
    """What train_mdlm.py compares shards and tokenizer with, and notes, which it does not read."""
    facts = {"tokenizer_sha256": file_sha256(tokenizer), "train": train, "val": val} | notes
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / VERIFIED, text.encode())


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
            counted = int(count_bytes(tokens, BOS_ID, luts))
            if counted != true_bytes:
                raise InputError(
                    f"document {number}: the byte tables of this tokenizer count {counted} bytes "
                    f"where the decoded text has {true_bytes}; scores would be wrong, so it is "
                    "refused"
                )
            choose(number - 1, text).add(np.array([BOS_ID, *tokens], dtype=np.uint16), true_bytes)
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
    vocab_help = f"pieces of the tokenizer to train (default {VOCAB_SIZE})"
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help=vocab_help)
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
    arguments.name = data_set_name(arguments.name, arguments.source[0])
    if arguments.source != ["docs"]:
        check_sources([Path(source) for source in arguments.source])
    if arguments.val_fraction is None:
        arguments.val_fraction = 0.35 if arguments.source == ["docs"] else 0.04
    if arguments.val_docs < 0:
        raise InputError(f"--val-docs {arguments.val_docs} must not be negative")
    if not 0 < arguments.val_fraction < 1:
        raise InputError(f"--val-fraction {arguments.val_fraction} lies not between 0 and 1")
    if not 1 <= arguments.shard_tokens <= LARGEST_SHARD:
        limits = f"a shard has between 1 and {LARGEST_SHARD} tokens"
        raise InputError(f"--shard-tokens {arguments.shard_tokens}: {limits}")
    if not 1 <= arguments.vocab_size <= LARGEST_VOCABULARY:
        limits = f"a tokenizer has between 1 and {LARGEST_VOCABULARY} pieces"
        raise InputError(f"--vocab-size {arguments.vocab_size}: {limits}")
    return arguments


def data_set_name(wanted: str | None, first_source: str) -> str:
    """`wanted`, else the name of the first source; InputError if it makes no file name."""
    rule = "letters, digits and . _ + - only, at most 100, and no . at the beginning"
    if wanted is None:
        name = Path(first_source).name.split(".")[0]
        if not NAME.fullmatch(name):
            remedy = f"give --name ({rule})"
            raise InputError(f"{first_source}: no data set can be called {name!r}; {remedy}")
        return name
    if not NAME.fullmatch(wanted):
        raise InputError(f"--name {wanted!r}: no name of a data set; {rule}")
    return wanted


def check_sources(paths: list[Path]) -> None:
    """InputError unless they are different files."""
    seen: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name the files in it")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        same = seen.setdefault(os.path.realpath(path), path)
        if same is not path:
            raise InputError(f"--source names {path} twice; name it once")


class Source:
    """The documents that --source names, which can be read again and again."""

    def __init__(self, arguments: argparse.Namespace, log: Log):
        self.log = log
        self.encoding = common.Progress("encoding")
        self.val_docs = arguments.val_docs
        self.val_fraction = arguments.val_fraction
        self.paths: list[Path] = []
        self.in_memory: list[str] = []
        if arguments.source == ["docs"]:
            self.in_memory = docs_of_packages(
                DOC_PACKAGES, common.Progress("reading documentation")
            )
        else:
            self.paths = [Path(source) for source in arguments.source]

    def note_encoded(self, number: int) -> None:
        if self.in_memory:
            self.encoding(number / len(self.in_memory))
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


def empty(split: str) -> str:
    remedy = "give more text, or change --val-docs or --val-fraction"
    return f"the {split} split is empty; {remedy}"


# ---- Places


class Places:
    """Where a data set and its tokenizer go; `folder` is the one that a link leads to."""

    def __init__(self, out: Path, name: str, vocab_size: int):
        self.link = out / "datasets" / f"{name}_sp{vocab_size}"
        self.folder = Path(os.path.realpath(self.link))
        self.model = out / "tokenizers" / f"{name}_{vocab_size}_bpe.model"
        self.check()

    def check(self) -> None:
        """InputError if something is there that this program does not make."""
        remedy = "move it away, or give another --name"
        if self.model.is_dir():
            raise InputError(f"{self.model}: is a folder; {remedy}")
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise InputError(f"{self.link}: is not a folder; {remedy}")
        others = [path for path in self.folder.iterdir() if not OWN_FILES.fullmatch(path.name)]
        if others:
            raise InputError(f"{min(others)}: is not of this program; {remedy}")

    def staging(self) -> tempfile.TemporaryDirectory:
        """A folder beside that of the data set, to be removed again."""
        parent = self.folder.parent
        try:
            self.model.parent.mkdir(parents=True, exist_ok=True)
            parent.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix=".prepare-", dir=parent)
        except OSError as error:
            failed = f"{error.filename}: cannot be written: {error.strerror}"
            raise InputError(f"{failed}; give another --out") from None

    def made_with(self) -> str:
        """SHA-256 of the tokenizer of the data set that is there; empty unless verified.json says
        that this program made all of it."""
        try:
            verified = json.loads(read_file(self.folder / VERIFIED))
            verified["train"]["documents"]  # fetch_fineweb.py does not count them
            shards = {*verified["train"]["shards"], *verified["val"]["shards"]}
            there = {path.name for path in self.folder.iterdir()}
            return str(verified["tokenizer_sha256"]) if there <= shards | {VERIFIED} else ""
        except (InputError, ValueError, KeyError, TypeError, RecursionError):
            return ""

    def replace(self, made: Path, model: Path | None, aside: Path, log: Log) -> None:
        """Moves the folder `made` and the tokenizer `model` to their places, the old data `aside`;
        what this program may not have made is kept under another name.

        At no time there are shards of which some are new, or shards with another tokenizer.
        """
        self.check()
        made_with = self.made_with()
        replaced = self.folder.exists()
        old_model = self.model.read_bytes() if self.model.exists() else None
        if replaced:
            if not made_with:
                aside = free_name(self.folder)
                log(f"{self.link}: what was there is {aside.name} now")
            os.rename(self.folder, aside)
        try:
            if model:
                ours = (made_with, file_sha256(model))
                if old_model is not None and file_sha256(self.model) not in ours:
                    kept = free_name(self.model)
                    log(f"{self.model}: what was there is {kept.name} now")
                    write_file(kept, old_model)
                write_file(self.model, model.read_bytes())
            os.rename(made, self.folder)
        except BaseException:
            try:
                if model and old_model is None:
                    self.model.unlink(missing_ok=True)
                elif model:
                    write_file(self.model, old_model)
            finally:
                if replaced:
                    os.rename(aside, self.folder)
            raise


def free_name(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


# ---- The whole


def prepare(arguments: argparse.Namespace, log: Log) -> None:
    """Everything is made in a folder of its own first: a failure leaves the old data alone."""
    given = arguments.tokenizer and load_tokenizer(arguments.tokenizer)
    vocab_size = given.vocab_size() if given else arguments.vocab_size
    places = Places(arguments.out, arguments.name, vocab_size)
    source = Source(arguments, log)
    with places.staging() as folder:
        staging = Path(folder)
        model = arguments.tokenizer
        if not given:
            model = staging / "tokenizer.model"
            log(f"training a tokenizer of {vocab_size} pieces …")
            documents = source.training_documents()
            train_tokenizer(documents, model, vocab_size, arguments.normalization)
        made = staging / "made"
        made.mkdir()
        write_data_set(made, model, source, arguments.shard_tokens, log)
        with ignored(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # all is done but this
            places.replace(made, None if given else model, staging / "replaced", log)
            shutil.rmtree(staging / "replaced", ignore_errors=True)
    model = arguments.tokenizer or places.model
    log(variables(places.link, model, vocab_size))


def variables(folder: Path, model: Path, vocab_size: int) -> str:
    """What points train_mdlm.py at shards and their tokenizer, to be pasted before its command."""
    places = dict(DATA_PATH=folder, TOKENIZER_PATH=model)
    paths = [f"{name}={shlex.quote(os.path.relpath(path))}" for name, path in places.items()]
    return " ".join([*paths, f"VOCAB_SIZE={vocab_size}"])


def write_data_set(folder: Path, model: Path, source: Source, shard_tokens: int, log: Log) -> None:
    """Encodes a source into the shards of both splits, and writes down what they hold."""
    sp = load_tokenizer(model)
    train = ShardWriter(folder, "train", shard_tokens)
    val = ShardWriter(folder, "val", shard_tokens)

    def choose(number: int, text: str) -> ShardWriter:
        return val if source.is_validation(number, text) else train

    exact = keeps_text(sp)
    left_out = encode(source.documents(), sp, sp.vocab_size(), exact, choose, source.note_encoded)
    for writer in (train, val):
        writer.close()
        if not writer.docs:
            raise InputError(empty(writer.split))
        log(
            f"{writer.split}: {writer.docs} documents, {writer.tokens} tokens, {writer.bytes} "
            f"bytes (verified), {writer.bytes / writer.tokens:.3f} bytes/token, "
            f"{len(writer.shards)} shards"
        )
    if left_out:
        log(f"left out: {left_out} documents that the tokenizer cannot give back unchanged")
    write_verified(folder, model, train.facts(), val.facts())


@common.run_tool
def main() -> None:
    prepare(parse_arguments(), Log())


if __name__ == "__main__":
    main()
