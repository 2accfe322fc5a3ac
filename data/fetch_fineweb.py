"""Fetches the challenge's published FineWeb shards and tokenizer, as their manifest lists them.

    python data/fetch_fineweb.py                                    sp1024: the validation split, 80 training shards
    python data/fetch_fineweb.py --train-shards 1                   one training shard (100 M tokens) to try things out
    python data/fetch_fineweb.py --variant sp4096 --train-shards 10

Files land in data/datasets/ and data/tokenizers/, where train_mdlm.py looks for them by default. What is already there
and sound is not fetched again; an interrupted download continues. A file whose SHA-256 is not what the hub says, or a
shard whose header or size is wrong, is refused.
HF_ENDPOINT and HF_TOKEN are honoured. Needs requirements-dev.txt (huggingface_hub).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_mdlm import InputError, Log, open_shard  # noqa: E402

REPO, REMOTE_ROOT = "willdepueoai/parameter-golf", "datasets"
MOST_SHARDS = 1_000_000  # as many as their names have room for


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Fetcher:
    """Downloads files of one hub data set below `remote_root` to the same relative places below `out`."""

    def __init__(self, repo: str, remote_root: str, out: Path, log: Log):
        self.repo, self.remote_root, self.out, self.log = repo, remote_root, out, log

    def local(self, relative: str) -> Path:
        """Where a file of the manifest goes; InputError for a path that would leave `out`."""
        path = PurePosixPath(relative)
        if not relative or path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]", relative):
            raise InputError(f"manifest.json names {relative!r}, which is outside the data folder; refused")
        if path.parts[0] not in ("datasets", "tokenizers", "manifest.json") or path.suffix in (".py", ".pth"):
            raise InputError(f"manifest.json names {relative!r}, which is no data set and no tokenizer; refused")
        return self.out / path

    def fetch(self, relative: str, verify, refresh: bool = False) -> Path:
        """Downloads `relative` unless a sound copy is there; `verify(path)` raises InputError for a bad one."""
        import huggingface_hub
        from huggingface_hub import errors

        target = self.local(relative)
        if target.is_file() and not refresh:
            try:
                verify(target)
                self.log(f"{target}: there already")
                return target
            except InputError as error:
                self.log(f"{error}; fetching it again")
        staging, remote = self.out / ".hub", str(PurePosixPath(self.remote_root, relative))
        try:
            got = Path(huggingface_hub.hf_hub_download(self.repo, remote, repo_type="dataset", local_dir=staging))
            etag = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(self.repo, remote, repo_type="dataset")).etag or ""
        except errors.RepositoryNotFoundError:
            raise InputError(f"there is no data set {self.repo} that you may read") from None
        except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError, RuntimeError) as error:
            if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
                raise InputError(f"{relative} is not in {self.repo}; the manifest promises it") from None
            raise InputError(f"{relative} could not be fetched: {str(error).strip().splitlines()[0]}; the same command "
                             "continues where this one stopped") from None
        try:
            if re.fullmatch("[0-9a-f]{64}", etag) and sha256(got) != etag:  # of large files; others have a Git hash
                raise InputError(f"{relative}: its SHA-256 is not what the hub says, it was damaged on its way; run "
                                 "the same command again")
            verify(got)
        except InputError:
            got.unlink()
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(got, target)
        self.log(f"{target}: {target.stat().st_size:,} bytes")
        return target


def read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {kind: {str(entry["name"]): entry for entry in manifest[kind]} for kind in ("datasets", "tokenizers")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: not a manifest of the challenge (it lists datasets and tokenizers)") from None


def fetch_variant(fetcher: Fetcher, variant: str, train_shards: int) -> tuple[Path, list[Path]]:
    """The data set of a variant with its tokenizer; returns their local places."""
    manifest = read_manifest(fetcher.fetch("manifest.json", read_manifest, refresh=True))
    dataset = manifest["datasets"].get(f"fineweb10B_{variant}", manifest["datasets"].get(variant))
    if dataset is None:
        raise InputError(f"--variant {variant} is not one of {', '.join(sorted(manifest['datasets']))}")
    try:
        stats = {key: int(dataset["stats"][key]) for key in ("files_train", "files_val")}
        if not 1 <= stats["files_val"] <= MOST_SHARDS or not 0 <= stats["files_train"] <= MOST_SHARDS:
            raise ValueError
        tokens_val = int(dataset["stats"].get("tokens_val", 0))
        tokenizer = manifest["tokenizers"][dataset["tokenizer_name"]]
        tokenizer_files = [str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"manifest.json: the entry of {dataset['name']} lacks its stats or its tokenizer") from None
    if train_shards > stats["files_train"]:
        raise InputError(f"--train-shards {train_shards}: {dataset['name']} has {stats['files_train']}")
    tokenizers = [fetcher.fetch(path, lambda local: None) for path in tokenizer_files]
    shards = [f"fineweb_val_{i:06d}.bin" for i in range(stats["files_val"])]
    shards += [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    found = [fetcher.fetch(f"datasets/{dataset['name']}/{shard}", open_shard) for shard in shards]
    val_tokens = sum(len(open_shard(path)) for path in found[:stats["files_val"]])
    if tokens_val and val_tokens != tokens_val:
        raise InputError(f"the validation split has {val_tokens} tokens, the manifest says {tokens_val}")
    fetcher.log(f"{dataset['name']}: {val_tokens:,} validation tokens, "
                f"{train_shards} of {stats['files_train']} training shards")
    return found[0].parent, tokenizers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", help="sp1024 (default), sp512, …, or a full name")
    parser.add_argument("--train-shards", type=int, default=80, help="training shards, the first N (default 80)")
    parser.add_argument("--repo", default=REPO, help=f"hub data set (default {REPO})")
    parser.add_argument("--remote-root", default=REMOTE_ROOT, help="folder of manifest.json in it")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: data/")
    arguments = parser.parse_args()
    try:
        if arguments.train_shards < 0:
            raise InputError("--train-shards must not be negative")
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise InputError("needs huggingface_hub: pip install -r requirements-dev.txt") from None
        fetcher = Fetcher(arguments.repo, arguments.remote_root, arguments.out, Log())
        folder, tokenizers = fetch_variant(fetcher, arguments.variant, arguments.train_shards)
        model = next((path for path in tokenizers if path.suffix == ".model"), None)
        if model is None:
            fetcher.log("note: this variant has no SentencePiece model, which train_mdlm.py needs to count bytes")
        else:
            fetcher.log(f"DATA_PATH={os.path.relpath(folder)} TOKENIZER_PATH={os.path.relpath(model)}")
    except InputError as error:
        print(f"fetch_fineweb.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
