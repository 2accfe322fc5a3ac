"""data/fetch_fineweb.py with the real huggingface_hub client against a hub on loopback."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
from conftest import run_python

import train_mdlm as tm

REPO = "willdepueoai/parameter-golf"
DATASET = "datasets/datasets/fineweb10B_sp1024"  # in the repository


class Hub(http.server.BaseHTTPRequestHandler):
    """What downloading needs of a hub: HEAD and GET of /datasets/<repo>/resolve/main/<path>."""

    protocol_version = "HTTP/1.1"

    def answer(self, with_body):
        prefix = f"/datasets/{REPO}/resolve/main/"
        content = (
            self.server.files.get(self.path[len(prefix) :])
            if self.path.startswith(prefix)
            else None
        )
        self.server.requests.append(
            (self.command, self.path[len(prefix) :], self.headers.get("Range"))
        )
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = (
            int(self.headers["Range"][6:].split("-")[0])
            if self.headers.get("Range") and with_body
            else 0
        )
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            stop = self.server.cut.pop(self.path[len(prefix) :], None)
            content = self.server.damaged.pop(self.path[len(prefix) :], content)
            self.wfile.write(content[start:stop])
            if stop is not None:  # the connection breaks in the middle
                self.close_connection = True
                self.connection.close()

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *arguments):
        pass


def shard_bytes(count):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, count
    return header.tobytes() + (np.arange(count) % 1000).astype("<u2").tobytes()


@pytest.fixture
def hub():
    files = {
        "datasets/tokenizers/fineweb_1024_bpe.model": b"model",
        "datasets/tokenizers/fineweb_1024_bpe.vocab": b"vocab",
    }
    for split, count in (("val", 2), ("train", 3)):
        for i in range(count):
            files[f"{DATASET}/fineweb_{split}_{i:06d}.bin"] = shard_bytes(100 + i)
    manifest = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 2, "tokens_val": 201},
            }
        ],
        "tokenizers": [
            {
                "name": "sp_bpe_1024",
                "model_path": "tokenizers/fineweb_1024_bpe.model",
                "vocab_path": "tokenizers/fineweb_1024_bpe.vocab",
            }
        ],
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = files
    server.requests = []
    server.cut = {}  # path → where the connection breaks, once
    server.damaged = {}  # path → what is sent instead, once

    def set_manifest(edit=lambda manifest: None):
        edit(manifest)
        files["datasets/manifest.json"] = json.dumps(manifest).encode()

    server.set_manifest = set_manifest
    set_manifest()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, out, *arguments, check=True):
    env = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_address[1]}",
        HF_HOME=str(out / "hf"),
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DOWNLOAD_TIMEOUT="5",
    )
    script = "data/fetch_fineweb.py"
    return run_python(script, "--out", out, *arguments, cwd=out, check=check, **env)


def test_whole_validation_split_first_training_shards_and_tokenizer(hub, tmp_path):
    done = fetch(hub, tmp_path, "--train-shards", "2")
    assert "201 validation tokens, 2 of 3 training shards" in done.stdout
    assert "DATA_PATH=datasets/fineweb10B_sp1024 " in done.stdout
    assert "TOKENIZER_PATH=tokenizers/fineweb_1024_bpe.model" in done.stdout
    for remote, content in hub.files.items():
        local = tmp_path / remote.removeprefix("datasets/")
        if "train_000002" in remote:
            assert not local.exists()
        else:
            assert local.read_bytes() == content
    assert tm.TokenStream(tmp_path / "datasets/fineweb10B_sp1024", "train").total == 201
    hub.requests.clear()
    again = fetch(hub, tmp_path, "--train-shards", "3")  # only what is missing
    fetched = {path for method, path, _ in hub.requests if method == "GET"}
    assert fetched <= {"datasets/manifest.json", f"{DATASET}/fineweb_train_000002.bin"}
    assert again.stdout.count("there already") == 6


def test_a_broken_connection_ends_in_a_whole_file_or_an_error_and_resumes(hub, tmp_path):
    name = f"{DATASET}/fineweb_train_000000.bin"
    hub.files[name] = shard_bytes(8_000_000)  # the client keeps what it got in pieces of 10 MB
    hub.cut[name] = 12_000_000
    done = fetch(hub, tmp_path, "--train-shards", "1", check=False)
    if done.returncode:
        assert done.returncode == 2 and "continues where this one stopped" in done.stderr
        assert "Traceback" not in done.stderr
        fetch(hub, tmp_path, "--train-shards", "1")
    assert (tmp_path / name.removeprefix("datasets/")).read_bytes() == hub.files[name]
    # the second request asks for the rest only
    assert any(path == name and wanted for _, path, wanted in hub.requests)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-2], lambda raw: b"\0" + raw[1:], lambda raw: raw[:100]]
)
def test_a_wrong_shard_is_refused_and_nothing_is_left_in_its_place(hub, tmp_path, damage):
    name = f"{DATASET}/fineweb_val_000001.bin"
    hub.files[name] = damage(hub.files[name])
    done = fetch(hub, tmp_path, "--train-shards", "0", check=False)
    assert done.returncode == 2 and "fineweb_val_000001.bin" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / name.removeprefix("datasets/")).exists()


def test_a_shard_damaged_on_its_way_is_refused_and_fetched_again(hub, tmp_path):
    """One bit of one token, which neither the header nor the size can show."""
    name = f"{DATASET}/fineweb_val_000001.bin"
    whole = hub.files[name]
    hub.damaged[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    done = fetch(hub, tmp_path, "--train-shards", "0", check=False)
    assert done.returncode == 2
    assert "fineweb_val_000001.bin: its SHA-256 is not what the hub says" in done.stderr
    fetch(hub, tmp_path, "--train-shards", "0")
    assert (tmp_path / name.removeprefix("datasets/")).read_bytes() == whole


def test_a_damaged_local_copy_is_fetched_again(hub, tmp_path):
    fetch(hub, tmp_path, "--train-shards", "0")
    local = tmp_path / "datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
    good = local.read_bytes()
    local.write_bytes(good[:-10])
    fetch(hub, tmp_path, "--train-shards", "0")
    assert local.read_bytes() == good


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m["datasets"][0]["stats"].update(tokens_val=999), "the manifest says 999"),
        (lambda m: m["datasets"][0].pop("stats"), "lacks its stats"),
        (lambda m: m["tokenizers"].clear(), "lacks its stats or its tokenizer"),
        (lambda m: m["datasets"].clear(), "--variant sp1024 is not one of"),
        (lambda m: m.pop("datasets"), "not a manifest"),
        (lambda m: m["datasets"][0]["stats"].update(files_val=0), "lacks its stats"),
        (lambda m: m["datasets"][0]["stats"].update(files_val=3), f"is not in {REPO}"),
    ],
)
def test_wrong_manifests_are_explained(hub, tmp_path, edit, message):
    hub.set_manifest(edit)
    done = fetch(hub, tmp_path, "--train-shards", "0", check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path, message",
    [
        ("../../evil", "outside the data folder"),
        ("/etc/evil", "outside the data folder"),
        ("argparse.py", "no data set and no tokenizer"),
        ("tokenizers/x.py", "no data set and no tokenizer"),
    ],
)
def test_a_manifest_cannot_name_other_files(hub, tmp_path, path, message):
    hub.set_manifest(lambda manifest: manifest["tokenizers"][0].update(model_path=path))
    done = fetch(hub, tmp_path, "--train-shards", "0", check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_wrong_arguments_are_explained_and_a_full_name_is_a_variant(hub, tmp_path):
    for arguments, message in (
        (["--train-shards", "4"], "has 3"),
        (["--train-shards", "-1"], "negative"),
        (["--variant", "sp7"], "--variant sp7 is not one of fineweb10B_sp1024"),
    ):
        done = fetch(hub, tmp_path, *arguments, check=False)
        assert done.returncode == 2 and message in done.stderr
    fetch(hub, tmp_path, "--train-shards", "0", "--variant", "fineweb10B_sp1024")


def test_a_hub_that_is_not_there_is_one_line(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = fetch(hub, tmp_path, "--train-shards", "0", check=False)
    assert done.returncode == 2 and "could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr
