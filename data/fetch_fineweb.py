"""Fetches the challenge's published FineWeb shards and tokenizer, as their manifest lists them.

    python data/fetch_fineweb.py                    # sp1024: validation split, 80 training shards
    python data/fetch_fineweb.py --train-shards 1   # one training shard (100 M tokens), to try
    python data/fetch_fineweb.py --variant sp4096 --train-shards 10

Files land in data/datasets/ and data/tokenizers/, where train_mdlm.py looks for them by default.
What is already there and sound is not fetched again; an interrupted download continues. A file
whose SHA-256 is not what the hub says, or a shard whose header or size is wrong, is refused.

HF_ENDPOINT and HF_TOKEN are honoured. Needs requirements-dev.txt (huggingface_hub).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # noqa: E402

from train_mdlm import InputError, Log, open_shard  # noqa: E402

REPO = "willdepueoai/parameter-golf"
REMOTE_ROOT = "datasets"
MOST_SHARDS = 1_000_000  # as many as their names have room for

Verify = Callable[[Path], object]  # raises InputError for a bad file


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def accept(path: Path) -> None:
    """A `Verify` that says nothing."""


class Fetcher:
    """Downloads files of a hub data set from below `remote_root` to the same places in `out`."""

    def __init__(self, repo: str, remote_root: str, out: Path, log: Log):
        self.repo = repo
        self.remote_root = remote_root
        self.out = out
        self.log = log

    def local(self, relative: str) -> Path:
        """Where a file of the manifest goes; InputError for a path that would leave `out`."""
        path = PurePosixPath(relative)
        named = f"manifest.json names {relative!r}, which is"
        escapes = path.is_absolute() or ".." in path.parts
        if not relative or escapes or re.search(r"[\\\0]", relative):
            raise InputError(f"{named} outside the data folder; refused")
        expected = path.parts[0] in ("datasets", "tokenizers", "manifest.json")
        if not expected or path.suffix in (".py", ".pth"):
            raise InputError(f"{named} no data set and no tokenizer; refused")
        return self.out / path

    def fetch(self, relative: str, verify: Verify, refresh: bool = False) -> Path:
        """Downloads `relative` unless a sound copy is there."""
        target = self.local(relative)
        if target.is_file() and not refresh:
            try:
                verify(target)
                self.log(f"{target}: there already")
                return target
            except InputError as error:
                self.log(f"{error}; fetching it again")
        got, etag = self.download(relative)
        try:
            is_sha256 = re.fullmatch("[0-9a-f]{64}", etag)  # of large files; others have a Git hash
            if is_sha256 and sha256(got) != etag:
                damaged = "its SHA-256 is not what the hub says, it was damaged on its way"
                raise InputError(f"{relative}: {damaged}; run the same command again")
            verify(got)
        except InputError:
            got.unlink()
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(got, target)
        self.log(f"{target}: {target.stat().st_size:,} bytes")
        return target

    def download(self, relative: str) -> tuple[Path, str]:
        """Where a file has been downloaded to, and what the hub says it is."""
        import huggingface_hub
        from huggingface_hub import errors

        remote = str(PurePosixPath(self.remote_root, relative))
        where = dict(repo_id=self.repo, filename=remote, repo_type="dataset")
        try:
            got = huggingface_hub.hf_hub_download(**where, local_dir=self.out / ".hub")
            url = huggingface_hub.hf_hub_url(**where)
            etag = huggingface_hub.get_hf_file_metadata(url).etag
            return Path(got), etag or ""
        except errors.RepositoryNotFoundError:
            raise InputError(f"there is no data set {self.repo} that you may read") from None
        except errors.LocalEntryNotFoundError as error:
            failure = error
        except errors.EntryNotFoundError:
            missing = f"{relative} is not in {self.repo}; the manifest promises it"
            raise InputError(missing) from None
        except (errors.HfHubHTTPError, OSError, RuntimeError) as error:
            failure = error
        reason = str(failure).strip().splitlines()[0]
        remedy = "the same command continues where this one stopped"
        raise InputError(f"{relative} could not be fetched: {reason}; {remedy}")


# ---- The manifest


class Variant(NamedTuple):
    """What the manifest says of a data set and its tokenizer."""

    name: str
    files_train: int
    files_val: int
    tokens_val: int  # 0 if it does not say
    tokenizer_files: list[str]


def read_manifest(path: Path) -> dict[str, dict[str, dict]]:
    """Its data sets and tokenizers, by name."""
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
    dataset = datasets.get(f"fineweb10B_{variant}", datasets.get(variant))
    if dataset is None:
        raise InputError(f"--variant {variant} is not one of {', '.join(sorted(datasets))}")
    try:
        stats = dataset["stats"]
        tokenizer = manifest["tokenizers"][dataset["tokenizer_name"]]
        keys = ("model_path", "vocab_path", "path")
        found = Variant(
            name=dataset["name"],
            files_train=int(stats["files_train"]),
            files_val=int(stats["files_val"]),
            tokens_val=int(stats.get("tokens_val", 0)),
            tokenizer_files=[str(tokenizer[key]) for key in keys if tokenizer.get(key)],
        )
        if not 1 <= found.files_val <= MOST_SHARDS or not 0 <= found.files_train <= MOST_SHARDS:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        lacking = f"the entry of {dataset['name']} lacks its stats or its tokenizer"
        raise InputError(f"manifest.json: {lacking}") from None
    return found


def fetch_variant(fetcher: Fetcher, variant: str, train_shards: int) -> tuple[Path, list[Path]]:
    """The folder of a data set, and the files of its tokenizer."""
    manifest = read_manifest(fetcher.fetch("manifest.json", read_manifest, refresh=True))
    found = find_variant(manifest, variant)
    if train_shards > found.files_train:
        raise InputError(f"--train-shards {train_shards}: {found.name} has {found.files_train}")
    tokenizers = [fetcher.fetch(path, accept) for path in found.tokenizer_files]

    def fetch_split(split: str, count: int) -> list[Path]:
        names = [f"fineweb_{split}_{number:06d}.bin" for number in range(count)]
        return [fetcher.fetch(f"datasets/{found.name}/{name}", open_shard) for name in names]

    val = fetch_split("val", found.files_val)
    fetch_split("train", train_shards)
    val_tokens = sum(len(open_shard(path)) for path in val)
    if found.tokens_val and val_tokens != found.tokens_val:
        promised = f"the manifest says {found.tokens_val}"
        raise InputError(f"the validation split has {val_tokens} tokens, {promised}")
    shards = f"{train_shards} of {found.files_train} training shards"
    fetcher.log(f"{found.name}: {val_tokens:,} validation tokens, {shards}")
    return val[0].parent, tokenizers


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    variant_help = "sp1024 (default), sp512, …, or a full name"
    parser.add_argument("--variant", default="sp1024", help=variant_help)
    shards_help = "training shards, the first N (default 80)"
    parser.add_argument("--train-shards", type=int, default=80, help=shards_help)
    parser.add_argument("--repo", default=REPO, help=f"hub data set (default {REPO})")
    root_help = "folder of manifest.json in it"
    parser.add_argument("--remote-root", default=REMOTE_ROOT, help=root_help)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="default: data/")
    arguments = parser.parse_args()
    if arguments.train_shards < 0:
        raise InputError("--train-shards must not be negative")
    common.require("huggingface_hub")
    fetcher = Fetcher(arguments.repo, arguments.remote_root, arguments.out, Log())
    folder, tokenizers = fetch_variant(fetcher, arguments.variant, arguments.train_shards)
    models = [path for path in tokenizers if path.suffix == ".model"]
    if models:
        places = f"DATA_PATH={os.path.relpath(folder)} TOKENIZER_PATH={os.path.relpath(models[0])}"
        fetcher.log(places)
    else:
        missing = "this variant has no SentencePiece model, which train_mdlm.py needs"
        fetcher.log(f"note: {missing} to count bytes")


if __name__ == "__main__":
    main()
