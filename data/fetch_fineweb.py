"""Fetches the challenge's published FineWeb shards and tokenizer, as their manifest lists them.

    python data/fetch_fineweb.py                    # sp1024: validation split, 80 training shards
    python data/fetch_fineweb.py --train-shards 1   # one training shard (100 M tokens), to try
    python data/fetch_fineweb.py --variant sp4096   # or sp8192: larger vocabularies

The variants sp4096 and sp8192 come from another hub data set than the challenge's, unless --repo
names one. Files land in data/datasets/ and data/tokenizers/, where train_mdlm.py looks for them,
and the three variables that point it at them are printed. What is already there and is what the hub
has is not fetched again; an interrupted download continues. A file whose digest is not what the hub
says, or a shard whose header or size is wrong, is refused. What all of it holds is written to
verified.json beside the shards.

Scores of two variants can be compared if their validation splits hold the same text. So where the
validation split of sp1024 is there too, that of another variant is compared with it, document by
document, and a line says whether the decoded text is the same. That of sp1024 is compared with what
has been published of it.

HF_ENDPOINT and HF_TOKEN are honoured. Needs requirements-dev.txt (huggingface_hub).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from prepare_text import (  # noqa: E402
    MOST_SHARDS,
    NAME,
    free_name,
    load_tokenizer,
    variables,
    write_verified,
)

from train_mdlm import (  # noqa: E402
    BOS_ID,
    SHARD_HEADER_BYTES,
    VERIFIED,
    ByteTables,
    Hyperparameters,
    InputError,
    Log,
    TokenStream,
    build_sentencepiece_luts,
    check_verified,
    count_bytes,
    explain,
    open_shard,
)

VARIANT = "sp1024"  # the challenge's
REPO = "willdepueoai/parameter-golf"  # the challenge's hub data set, for all variants but these
REPOS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
REMOTE_ROOT = "datasets"
PREFIX = "fineweb10B_"  # of the name of a data set, before its variant
CANONICAL = PREFIX + VARIANT  # the data set with which the text of others is compared
CANONICAL_MODEL = "fineweb_1024_bpe.model"
# Length of a window, and tokens and bytes in all windows of the validation split. A space at the
# beginning of a document, which published scripts do not always count, makes less of a difference.
PUBLISHED = {CANONICAL: (1024, 62_021_632, 151_073_604)}
BYTES_MAY_DIFFER = 0.0001

Verify = Callable[[Path], object]  # raises InputError for a bad file


def read_through(path: Path, like: str) -> tuple[str, int]:
    """A digest of the same kind as `like`, and the CRC-32 of what follows the header of a shard.

    The hub gives the SHA-256 of large files, and Git's SHA-1 of small ones.
    """
    if re.fullmatch("[0-9a-f]{64}", like):
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    checksum = 0
    with path.open("rb") as file:
        digest.update(file.read(SHARD_HEADER_BYTES))
        while block := file.read(1 << 20):
            digest.update(block)
            checksum = zlib.crc32(block, checksum)
    return digest.hexdigest(), checksum


def accept(path: Path) -> None:
    """A `Verify` that says nothing."""


class Fetcher:
    """Downloads files of a hub data set from below `remote_root` to the same places in `out`."""

    def __init__(self, repo: str, remote_root: str, out: Path, log: Log):
        self.repo = repo
        self.remote_root = remote_root
        self.out = out
        self.log = log
        self.checksums: dict[str, int] = {}  # CRC-32 of the tokens of a shard, by its name
        self.verified: Path | None = None  # removed before anything that it describes changes

    def local(self, relative: str) -> Path:
        """Where a file of the manifest goes; InputError for a path that would leave `out`."""
        path = PurePosixPath(relative)
        named = f"manifest.json names {ascii(relative)}, which is"
        escapes = path.is_absolute() or ".." in path.parts
        if not relative or escapes or "\\" in relative or not relative.isprintable():
            raise InputError(f"{named} outside the data folder; refused")
        expected = path.parts[0] in ("datasets", "tokenizers", "manifest.json")
        if not expected or path.suffix in (".py", ".pth"):
            raise InputError(f"{named} no data set and no tokenizer; refused")
        return self.out / path

    def fetch(self, relative: str, verify: Verify, refresh: bool = False) -> Path:
        """Downloads `relative` unless what is there is what the hub has; to `refresh` what may
        change on the hub is to ask for it each time, and to leave it where downloads begin."""
        target = self.local(relative)
        if refresh:
            return self.download(relative, verify)
        if target.is_file():
            etag = self.etag(relative)
            try:
                verify(target)
                self.compare(target, etag)
                self.log(f"{target}: there already")
                return target
            except InputError as error:
                self.log(f"{explain(error)}; fetching it again")
        got = self.download(relative, verify)
        if self.verified:
            self.verified.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # somebody else's, perhaps
            aside = free_name(target)
            os.rename(target, aside)
            self.log(f"{target}: what was there is {aside.name} now")
        part = target.with_name(target.name + ".part")
        shutil.move(got, part)  # perhaps to another disk
        os.replace(part, target)
        self.log(f"{target}: {target.stat().st_size:,} bytes")
        return target

    def compare(self, path: Path, etag: str) -> None:
        """InputError if a file is not what the hub has; notes its checksum."""
        digest, checksum = read_through(path, etag)
        if digest != etag:
            kind = "SHA-256" if len(digest) == 64 else "Git hash"
            raise InputError(f"{path}: its {kind} is not what the hub says, it is damaged")
        self.checksums[path.name] = checksum

    def download(self, relative: str, verify: Verify) -> Path:
        """Where a file has been downloaded to: a place of its own, in which it is kept if sound."""
        import huggingface_hub

        with self.explained(relative):
            place = dict(repo_type="dataset", local_dir=self.out / ".hub")
            name = str(PurePosixPath(self.remote_root, relative))
            got = Path(huggingface_hub.hf_hub_download(self.repo, name, **place))
        try:
            self.compare(got, self.etag(relative))
            verify(got)
        except InputError as error:
            got.unlink()
            raise InputError(f"{explain(error)}; run the same command again") from None
        return got

    def etag(self, relative: str) -> str:
        """The digest that the hub gives for a file."""
        import huggingface_hub

        with self.explained(relative):
            name = str(PurePosixPath(self.remote_root, relative))
            url = huggingface_hub.hf_hub_url(self.repo, name, repo_type="dataset")
            etag = huggingface_hub.get_hf_file_metadata(url).etag or ""
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
            raise InputError(f"{relative}: {self.repo} gives no digest to compare it with")
        return etag

    @contextlib.contextmanager
    def explained(self, relative: str) -> Iterator[None]:
        """Says in one line why the hub did not answer."""
        from huggingface_hub import errors

        try:
            yield
        except errors.HFValidationError:
            raise InputError(f"--repo {self.repo!r} is no data set: give OWNER/NAME") from None
        except errors.RepositoryNotFoundError:
            raise InputError(f"there is no data set {self.repo} that you may read") from None
        except errors.LocalEntryNotFoundError as error:
            failure = error
        except errors.EntryNotFoundError:
            missing = f"{relative} is not in {self.repo}; the manifest promises it"
            raise InputError(missing) from None
        except Exception as error:  # of whatever the client uses to connect
            failure = error
        else:
            return
        reason = str(failure).strip() or type(failure).__name__
        remedy = "the same command continues where this one stopped"
        first_line = reason.splitlines()[0].rstrip(".")
        raise InputError(f"{relative} could not be fetched: {first_line}; {remedy}")


# ---- The manifest


class Variant(NamedTuple):
    """What the manifest says of a data set and its tokenizer."""

    name: str
    files_train: int
    files_val: int
    tokens_val: int  # 0 if it does not say
    tokenizer_files: list[str]


def read_manifest(path: Path) -> dict[str, dict[str, dict]]:
    """Its data sets and tokenizers, by name; InputError if it is none."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {
            kind: {str(entry["name"]): entry for entry in manifest[kind]}
            for kind in ("datasets", "tokenizers")
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        lists = "it lists datasets and tokenizers"
        raise InputError(f"{path}: not a manifest of the challenge ({lists})") from None


def find_variant(manifest: dict[str, dict[str, dict]], variant: str) -> Variant:
    """The data set fineweb10B_<variant>, or the one with that full name."""
    datasets = manifest["datasets"]
    dataset = datasets.get(PREFIX + variant, datasets.get(variant))
    if dataset is None:
        known = ", ".join(sorted(map(printable, datasets)))
        raise InputError(f"--variant {printable(variant)} is not one of {known}")
    name = str(dataset["name"])
    if not NAME.fullmatch(name):
        raise InputError(f"manifest.json names a data set {ascii(name)}; refused")
    try:
        stats = dataset["stats"]
        tokenizer = manifest["tokenizers"][dataset["tokenizer_name"]]
        keys = ("model_path", "vocab_path", "path")
        found = Variant(
            name=name,
            files_train=int(stats["files_train"]),
            files_val=int(stats["files_val"]),
            tokens_val=int(stats.get("tokens_val", 0)),
            tokenizer_files=[str(tokenizer[key]) for key in keys if tokenizer.get(key)],
        )
        if not 1 <= found.files_val <= MOST_SHARDS or not 0 <= found.files_train <= MOST_SHARDS:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        lacking = f"the entry of {name} lacks its stats or its tokenizer"
        raise InputError(f"manifest.json: {lacking}") from None
    return found


def repo_of(variant: str) -> str:
    """The hub data set that publishes a variant."""
    return REPOS.get(variant.removeprefix(PREFIX), REPO)


def printable(text: str) -> str:
    """`text`, with escapes if there is anything in it that moves a cursor."""
    return text if text.isprintable() else ascii(text)


def fetch_variant(fetcher: Fetcher, variant: str, train_shards: int) -> tuple[Path, list[Path]]:
    """The folder of a data set, and the files of its tokenizer."""
    manifest = read_manifest(fetcher.fetch("manifest.json", read_manifest, refresh=True))
    found = find_variant(manifest, variant)
    if train_shards > found.files_train:
        raise InputError(f"--train-shards {train_shards}: {found.name} has {found.files_train}")
    folder = fetcher.local(f"datasets/{found.name}")
    wanted = {f"fineweb_val_{number:06d}.bin" for number in range(found.files_val)}
    listed = [f"fineweb_train_{number:06d}.bin" for number in range(found.files_train)]
    there = {path.name for path in folder.glob("fineweb_*.bin")}
    foreign = there - wanted - set(listed)
    if foreign:
        remedy = "the manifest does not list it; move it away"
        raise InputError(f"{folder / min(foreign)}: {remedy}")
    wanted |= there | set(listed[:train_shards])  # what is there is compared too
    for path in found.tokenizer_files:
        if fetcher.out / "tokenizers" not in fetcher.local(path).parents:
            raise InputError(f"manifest.json names {ascii(path)}, which is no tokenizer; refused")
    fetcher.verified = folder / VERIFIED
    tokenizers = [fetcher.fetch(path, accept) for path in found.tokenizer_files]
    shards = [
        fetcher.fetch(f"datasets/{found.name}/{name}", open_shard)
        for name in sorted(wanted, key=lambda name: ("train" in name, name))
    ]
    val_tokens = sum(len(open_shard(path)) for path in shards[: found.files_val])
    if found.tokens_val and val_tokens != found.tokens_val:
        promised = f"the manifest says {found.tokens_val}"
        raise InputError(f"the validation split has {val_tokens} tokens, {promised}")
    count = f"{len(shards) - found.files_val} of {found.files_train} training shards"
    fetcher.log(f"{found.name}: {val_tokens:,} validation tokens, {count}")
    return shards[0].parent, tokenizers


# ---- What is there


def texts_of_tokens(sp, luts: ByteTables) -> np.ndarray:
    """(2, V) bytes objects, as long as scores count them: the text of every token after one with
    text, and after one without, where a tokenizer may drop a space."""
    texts = np.full((2, sp.vocab_size()), b"", dtype=object)
    for token in np.flatnonzero(~luts.is_boundary[: sp.vocab_size()].numpy()).tolist():
        piece = sp.id_to_piece(token)
        if sp.is_byte(token):  # <0x0A>
            text = bytes([int(piece[1:-1], 16)])
        else:
            text = piece.replace("\u2581", " ").encode()
        dropped = bool(luts.has_leading_space[token]) and not luts.keeps_space
        texts[:, token] = text, text[int(dropped) :]
    return texts


class Document(NamedTuple):
    """What a document decodes to."""

    nbytes: int
    sha256: bytes


class ValidationText:
    """A validation split and its tokenizer; InputError if they do not belong together."""

    def __init__(self, folder: Path, model: Path):
        sp = load_tokenizer(model)
        self.vocab_size = sp.vocab_size()
        self.luts = build_sentencepiece_luts(sp, self.vocab_size)
        self.texts = texts_of_tokens(sp, self.luts)
        self.stream = TokenStream(folder, "val")
        self.stream.measure(self.vocab_size, luts=self.luts)

    def documents(self) -> Iterator[Document]:
        """From <s> to <s>, in order; held in memory is a million tokens, however long one is."""
        boundary = self.luts.is_boundary.numpy()
        before = BOS_ID
        begun = False  # whether there is a document to end
        digest = hashlib.sha256()
        nbytes = 0
        shards = range(len(self.stream.files))
        for tokens in itertools.chain.from_iterable(map(self.stream.pieces, shards)):
            follows_boundary = boundary[np.append(before, tokens[:-1])].astype(int)
            texts = self.texts[follows_boundary, tokens]
            for number, part in enumerate(np.split(texts, np.flatnonzero(tokens == BOS_ID))):
                if number and begun:
                    yield Document(nbytes, digest.digest())
                    digest = hashlib.sha256()
                    nbytes = 0
                text = b"".join(part)
                digest.update(text)
                nbytes += len(text)
                begun |= len(part) > 0
            before = int(tokens[-1])
        yield Document(nbytes, digest.digest())


def verify(fetcher: Fetcher, folder: Path, model: Path) -> int:
    """Counts what the fetched shards hold, compares it, and writes it beside them; the number of
    pieces of the tokenizer."""
    val = ValidationText(folder, model)
    facts = val.stream.facts
    if folder.name in PUBLISHED:
        outcome = check_published(folder.name, model, val.stream, val.luts)
    else:
        outcome = compare_with_canonical(val, fetcher.out)
    fetcher.log(f"{folder.name}: {outcome}")
    shards = sorted(folder.glob("fineweb_train_*.bin"))
    checksums = {path.name: fetcher.checksums[path.name] for path in shards}
    tokens = sum(len(open_shard(path)) for path in shards)
    write_verified(folder, model, dict(tokens=tokens, shards=checksums), facts, compared=outcome)
    density = f"{facts['bytes'] / facts['tokens']:.3f} bytes a token"
    fetcher.log(f"{folder / VERIFIED}: {facts['bytes']:,} validation bytes, {density}")
    return val.vocab_size


def compare_with_canonical(val: ValidationText, out: Path) -> str:
    """One line on whether a validation split holds the text of CANONICAL."""
    folder = out / "datasets" / CANONICAL
    model = out / "tokenizers" / CANONICAL_MODEL
    paths = dict(data_path=str(folder), tokenizer_path=str(model))
    try:
        if not (folder / VERIFIED).is_file() or not model.is_file():
            fetch = f"data/fetch_fineweb.py --train-shards 0 --out {os.path.relpath(out)}"
            remedy = f"to compare, run 'python {fetch}', and then this command again"
            raise InputError(f"there is no verified copy of it; {remedy}")
        canonical = ValidationText(folder, model)
        hp = Hyperparameters(**paths, vocab_size=canonical.vocab_size)
        check_verified(hp, canonical.stream, "val")
    except InputError as error:
        return f"text not compared with that of {CANONICAL}: {explain(error)}"
    return compare_texts(val.documents(), canonical.documents())


def compare_texts(own: Iterable[Document], canonical: Iterable[Document]) -> str:
    """One line on whether these are the documents of CANONICAL, in the same order."""
    nbytes = 0
    for number, pair in enumerate(itertools.zip_longest(own, canonical), 1):
        if pair[0] != pair[1]:
            sizes = [f"{document.nbytes:,} bytes" if document else "none" for document in pair]
            differing = f"document {number:,} ({sizes[0]} here, {sizes[1]} there)"
            return f"not the same text as {CANONICAL}: first differs in {differing}"
        nbytes += pair[0].nbytes
    return f"same text as {CANONICAL}: {number:,} documents, {nbytes:,} bytes"


def check_published(name: str, model: Path, val: TokenStream, luts: ByteTables) -> str:
    """One line on whether this is the published split; InputError if it is, by its tokens, but its
    windows have other bytes."""
    length, tokens, known = PUBLISHED[name]
    scored = val.count_windows(length) * length
    if scored != tokens:
        return f"not the published split: {scored:,} tokens are scored, published were {tokens:,}"
    tail = torch.from_numpy(val.read(tokens, val.total - tokens)).long()
    counted = val.facts["bytes"] - int(count_bytes(tail[1:], tail[0], luts))
    if abs(counted - known) > BYTES_MAY_DIFFER * known:
        raise InputError(
            f"{model}: counts {counted:,} bytes in the {tokens:,} tokens of {name} that are "
            f"scored, but published were {known:,} (a space at the beginning of a document, which "
            f"published scripts treat differently, makes less than {BYTES_MAY_DIFFER:.2%}); scores "
            "would be wrong, so it is refused: move the file away and run the same command again"
        )
    return f"{counted:,} bytes in the {tokens:,} tokens that are scored, published were {known:,}"


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.train_shards < 0:
        raise InputError(f"--train-shards {arguments.train_shards} must not be negative")
    root = PurePosixPath(arguments.remote_root)
    if root.is_absolute() or ".." in root.parts or not arguments.remote_root.isprintable():
        wanted = "a folder in the data set, such as datasets"
        raise InputError(f"--remote-root {arguments.remote_root!r}: give {wanted}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):
            pass
    except OSError as error:
        failed = f"--out {arguments.out}: cannot be written: {error.strerror}"
        raise InputError(f"{failed}; give another --out") from None
    endpoint = os.environ.get("HF_ENDPOINT")
    if not endpoint:
        return
    with contextlib.suppress(ValueError):
        address = urllib.parse.urlsplit(endpoint)
        if address.scheme in ("http", "https") and address.hostname:
            return
    raise InputError(f"HF_ENDPOINT={endpoint!r} is no address: give https://… or unset it")


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    variant_help = f"{VARIANT} (default), {', '.join(REPOS)}, …, or a full name"
    parser.add_argument("--variant", default=VARIANT, help=variant_help)
    shards_help = "training shards, the first N (default 80)"
    parser.add_argument("--train-shards", type=int, default=80, help=shards_help)
    others = ", ".join(f"{repo} for {variant}" for variant, repo in REPOS.items())
    repo_help = f"hub data set (default {others}, {REPO} for all others)"
    parser.add_argument("--repo", help=repo_help)
    root_help = "folder of manifest.json in it"
    parser.add_argument("--remote-root", default=REMOTE_ROOT, help=root_help)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="default: data/")
    arguments = parser.parse_args()
    check_arguments(arguments)
    common.require("huggingface_hub")
    repo = repo_of(arguments.variant) if arguments.repo is None else arguments.repo
    fetcher = Fetcher(repo, arguments.remote_root, arguments.out, Log())
    folder, tokenizers = fetch_variant(fetcher, arguments.variant, arguments.train_shards)
    models = [path for path in tokenizers if path.suffix == ".model"]
    if models:
        fetcher.log(variables(folder, models[0], verify(fetcher, folder, models[0])))
    else:
        missing = "this variant has no SentencePiece model, which train_mdlm.py needs"
        fetcher.log(f"note: {missing} to count bytes")


if __name__ == "__main__":
    main()
