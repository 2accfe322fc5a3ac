"""data/fetch_fineweb.py with the real huggingface_hub client against a hub on loopback."""

import errno
import hashlib
import http.server
import json
import os
import re
import threading
import time
import tracemalloc
import zlib

import fetch_fineweb
import numpy as np
import prepare_text
import pytest
from conftest import ROOT, run_python, text_of, tiny_hp
from test_data import AWKWARD, file_limit

import train_mdlm as tm

REPO = "willdepueoai/parameter-golf"
LARGER = "kevclark/parameter-golf"  # has the larger vocabularies
DATASET = "datasets/datasets/fineweb10B_sp1024"  # in the repository


def etag_of(path, content):
    """The hub gives the SHA-256 of large files, and Git's hash of small ones."""
    if path.endswith(".bin"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """What downloading needs of a hub: HEAD and GET of /datasets/<repo>/resolve/main/<path>."""

    protocol_version = "HTTP/1.1"

    def answer(self, with_body):
        if self.server.down:
            self.close_connection = True
            self.connection.close()
            return
        repo, path = re.fullmatch("/datasets/(.*?)/resolve/main/(.*)", self.path).groups()
        content = self.server.repos.get(repo, {}).get(path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
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
        etag = self.server.etags.get(path, etag_of(path, content))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            stop = self.server.cut.pop(path, None)
            content = self.server.damaged.pop(path, content)
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


def shard_of(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def shard_bytes(count):
    return shard_of(np.arange(count) % 380)


MODEL = "datasets/tokenizers/fineweb_1024_bpe.model"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A hub without files; the client reads the environment once, when it is imported."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}",
        HF_HOME=str(tmp_path_factory.mktemp("hf")),
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DOWNLOAD_TIMEOUT="5",
    )
    from huggingface_hub import constants

    assert constants.ENDPOINT == os.environ["HF_ENDPOINT"]
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, dataset):
    """A small data set of the challenge."""
    model = dataset / "tokenizers/tiny_384_bpe.model"
    vocab = MODEL.replace(".model", ".vocab")
    files = {MODEL: model.read_bytes(), vocab: b"vocab"}
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
    server.files = files
    server.repos = {REPO: files}
    server.requests = []
    server.cut = {}  # path → where the connection breaks, once
    server.damaged = {}  # path → what is sent instead, once
    server.etags = {}  # path → another than that of its content
    server.down = False  # whether it breaks every connection

    def set_manifest(edit=lambda manifest: None):
        edit(manifest)
        files["datasets/manifest.json"] = json.dumps(manifest).encode()

    server.set_manifest = set_manifest
    set_manifest()
    return server


@pytest.fixture
def fetch(hub, tool, tmp_path, monkeypatch):
    """Calls data/fetch_fineweb.py for some folder; fails if it does not succeed or say `error`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before the client tries again

    def call(*arguments, error=None):
        done = tool(fetch_fineweb, "--out", tmp_path, *arguments)
        lines = done.stderr.strip().splitlines()
        if error is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 2 and error in lines[-1], done.stderr
            assert lines[-1].startswith("fetch_fineweb.py: error: ")
        return done

    return call


def test_whole_validation_split_first_training_shards_and_tokenizer(hub, fetch, tmp_path):
    done = run_python("data/fetch_fineweb.py", "--out", ".", "--train-shards", "2", cwd=tmp_path)
    assert "201 validation tokens, 2 of 3 training shards" in done.stdout
    paths = "DATA_PATH=datasets/fineweb10B_sp1024 TOKENIZER_PATH=tokenizers/fineweb_1024_bpe.model"
    assert done.stdout.endswith(f"{paths} VOCAB_SIZE=384\n")
    published = "not the published split: 0 tokens are scored, published were 62,021,632"
    assert f"fineweb10B_sp1024: {published}\n" in done.stdout and "text" not in done.stdout
    for remote, content in hub.files.items():
        local = tmp_path / remote.removeprefix("datasets/")
        if "train_000002" in remote or "manifest" in remote:
            assert not local.exists()
        else:
            assert local.read_bytes() == content
    assert tm.TokenStream(tmp_path / "datasets/fineweb10B_sp1024", "train").total == 201
    hub.requests.clear()
    again = fetch("--train-shards", "3")  # only what is missing
    fetched = {path for method, path, _ in hub.requests if method == "GET"}
    assert fetched <= {"datasets/manifest.json", f"{DATASET}/fineweb_train_000002.bin"}
    assert again.stdout.count("there already") == 6


def test_verified_json_says_what_was_fetched(hub, fetch, tmp_path):
    folder = tmp_path / "datasets/fineweb10B_sp1024"
    path = folder / "verified.json"
    for count, there in (
        (2, 2),
        (0, 2),
        (3, 3),
    ):  # what is there is compared and listed too
        done = fetch("--train-shards", count)
        assert f"{there} of 3 training shards" in done.stdout
        verified = json.loads(path.read_text())
        assert verified["tokenizer_sha256"] == hashlib.sha256(hub.files[MODEL]).hexdigest()
        assert verified["train"].keys() == {"tokens", "shards"}
        assert verified["train"]["tokens"] == sum(range(100, 100 + there))
        shards = verified["train"]["shards"] | verified["val"]["shards"]
        assert len(shards) == there + 2
        for name, checksum in shards.items():
            assert checksum == zlib.crc32(hub.files[f"{DATASET}/{name}"][1024:])
    assert verified["val"]["tokens"] == 201 and verified["val"]["documents"] == 2
    stream = tm.TokenStream(folder, "val")
    model = tmp_path / MODEL.removeprefix("datasets/")
    sp = tm.load_tokenizer(str(model), 384)
    luts = tm.build_sentencepiece_luts(sp, 384)
    for split in (stream, tm.TokenStream(folder, "train")):
        split.measure(384, luts=luts if split is stream else None)
        hp = tiny_hp(data_path=str(folder), tokenizer_path=str(model), vocab_size=384)
        assert tm.check_verified(hp, split, "val" if split is stream else "train")
    tokens = stream.read(0, stream.total).astype("int64")
    assert verified["val"]["bytes"] == int(tm.count_bytes(tokens, 1, luts)) > 100


def test_verified_json_is_gone_while_what_it_describes_changes(hub, fetch, tmp_path):
    fetch("--train-shards", "1")
    path = tmp_path / "datasets/fineweb10B_sp1024/verified.json"
    before = path.read_bytes()
    hub.down = True
    fetch("--train-shards", "2", error="could not be fetched")
    assert path.read_bytes() == before
    hub.down = False
    missing = hub.files.pop(f"{DATASET}/fineweb_train_000002.bin")
    fetch("--train-shards", "3", error="fineweb_train_000002.bin is not in")  # 000001 is new
    assert not path.exists()
    hub.files[f"{DATASET}/fineweb_train_000002.bin"] = missing
    fetch("--train-shards", "3")
    assert len(json.loads(path.read_text())["train"]["shards"]) == 3


def test_tokens_that_the_tokenizer_does_not_have_are_refused(hub, fetch):
    raw = bytearray(hub.files[f"{DATASET}/fineweb_val_000001.bin"])
    raw[-2:] = b"\x80\x01"  # 384
    hub.files[f"{DATASET}/fineweb_val_000001.bin"] = bytes(raw)
    fetch("--train-shards", "0", error="fineweb_val_000001.bin: holds token 384")


def test_published_figures_are_those_of_the_documentation():
    (length, tokens, nbytes) = fetch_fineweb.PUBLISHED["fineweb10B_sp1024"]
    assert tokens % length == 0
    assert f"{tokens:,} tokens, {nbytes:,} bytes" in (ROOT / "docs/presets.md").read_text()


@pytest.mark.parametrize("tail", [1, 2, 40])
def test_bytes_of_the_published_windows(dataset, tmp_path, monkeypatch, tail):
    """They are refused from a ten-thousandth on; bytes behind the last window do not count."""
    model = dataset / "tokenizers/tiny_384_bpe.model"
    sp = prepare_text.load_tokenizer(model)
    luts = tm.build_sentencepiece_luts(sp, 384)
    tokens = np.array([1, *sp.encode(text_of(0, 5000))])[: 64 * 150 + tail]
    prepare_text.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    val = tm.TokenStream(tmp_path, "val")
    val.measure(384, luts=luts)
    true = int(tm.count_bytes(tokens[: 64 * 150 + 1], 1, luts))
    assert true > 15_000

    def check(known, scored=64 * 150):
        monkeypatch.setattr(fetch_fineweb, "PUBLISHED", {"some": (64, scored, known)})
        return fetch_fineweb.check_published("some", model, val, luts)

    for known in (true - 1, true, true + 1):
        counted = f"{true:,} bytes in the 9,600 tokens that are scored"
        assert check(known) == f"{counted}, published were {known:,}"
    other = "not the published split: 9,600 tokens are scored, published were 9,536"
    assert check(true + 100, scored=64 * 149) == other
    for known in (true - 3, true + 3):
        with pytest.raises(tm.InputError, match="a space at the beginning of a document") as caught:
            check(known)
        assert f"counts {true:,} bytes in the 9,600 tokens of some" in str(caught.value)


def test_published_bytes_are_checked_before_anything_is_called_verified(
    hub, fetch, tmp_path, monkeypatch
):
    published = {"fineweb10B_sp1024": (64, 192, 10_000)}
    monkeypatch.setattr(fetch_fineweb, "PUBLISHED", published)
    fetch("--train-shards", "0", error="published were 10,000")
    assert not list(tmp_path.rglob("verified.json"))


def test_a_broken_connection_ends_in_a_whole_file_or_an_error_and_resumes(hub, fetch, tmp_path):
    name = f"{DATASET}/fineweb_train_000000.bin"
    hub.files[name] = shard_bytes(8_000_000)  # the client keeps what it got in pieces of 10 MB
    hub.cut[name] = 12_000_000
    try:
        fetch("--train-shards", "1")
    except AssertionError as error:
        assert "continues where this one stopped" in str(error)
        fetch("--train-shards", "1")
    assert (tmp_path / name.removeprefix("datasets/")).read_bytes() == hub.files[name]
    # the second request asks for the rest only
    assert any(path == name and wanted for _, path, wanted in hub.requests)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-2], lambda raw: b"\0" + raw[1:], lambda raw: raw[:100]],
    ids=["truncated", "magic", "header"],
)
def test_a_wrong_shard_is_refused_and_nothing_is_left_in_its_place(hub, fetch, tmp_path, damage):
    name = f"{DATASET}/fineweb_val_000001.bin"
    hub.files[name] = damage(hub.files[name])
    fetch("--train-shards", "0", error="fineweb_val_000001.bin")
    assert not (tmp_path / name.removeprefix("datasets/")).exists()


@pytest.mark.parametrize(
    "name, kind",
    [(f"{DATASET}/fineweb_val_000001.bin", "SHA-256"), (MODEL, "Git hash")],
    ids=["shard", "tokenizer"],
)
def test_what_is_damaged_on_its_way_is_refused_and_fetched_again(hub, fetch, tmp_path, name, kind):
    """One bit of one token, which neither the header nor the size can show."""
    whole = hub.files[name]
    hub.damaged[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    fetch("--train-shards", "0", error=f"{kind} is not what the hub says")
    assert not list(tmp_path.rglob("verified.json"))
    fetch("--train-shards", "0")
    assert (tmp_path / name.removeprefix("datasets/")).read_bytes() == whole


@pytest.mark.parametrize(
    "name, damage",
    [
        (f"{DATASET}/fineweb_val_000000.bin", lambda raw: raw[:-10]),
        (f"{DATASET}/fineweb_val_000000.bin", lambda raw: raw[:-1] + b"\x01"),
        (f"{DATASET}/fineweb_train_000001.bin", lambda raw: raw[:-2] + b"\x05\x00"),
        (MODEL, lambda raw: raw.replace(b"the", b"tha", 1)),
    ],
    ids=["truncated", "bit", "training", "tokenizer"],
)
def test_a_local_copy_that_is_not_the_hubs_is_fetched_again_and_kept(
    hub, fetch, tmp_path, name, damage
):
    fetch("--train-shards", "2")
    local = tmp_path / name.removeprefix("datasets/")
    good = local.read_bytes()
    for number in (1, 2):
        local.write_bytes(damage(good))
        done = fetch("--train-shards", "0")
        assert local.read_bytes() == good != damage(good)
        assert local.with_name(f"{local.name}.old{number}").read_bytes() == damage(good)
        assert f"{local.name}.old{number}" in done.stdout and "; fetching it again\n" in done.stdout


def test_a_file_without_a_digest_is_refused(hub, fetch):
    hub.etags[f"{DATASET}/fineweb_val_000001.bin"] = "new-2"
    fetch("--train-shards", "0", error="gives no digest to compare it with")


def test_shards_that_the_manifest_does_not_list_are_left_alone(hub, fetch, tmp_path):
    own = tmp_path / "datasets/fineweb10B_sp1024/fineweb_val_000002.bin"
    own.parent.mkdir(parents=True)
    own.write_bytes(shard_bytes(5))
    fetch("--train-shards", "0", error="fineweb_val_000002.bin: the manifest does not list it")
    assert list(own.parent.iterdir()) == [own]


def test_nobody_elses_manifest_is_replaced(hub, fetch, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    fetch("--train-shards", "0")
    assert (tmp_path / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m["datasets"][0]["stats"].update(tokens_val=999), "the manifest says 999"),
        (lambda m: m["datasets"][0].pop("stats"), "lacks its stats"),
        (lambda m: m["datasets"][0].update(stats=[1]), "lacks its stats"),
        (lambda m: m["datasets"][0].update(tokenizer_name=[1]), "lacks its stats"),
        (lambda m: m["tokenizers"].clear(), "lacks its stats or its tokenizer"),
        (lambda m: m["datasets"].clear(), "--variant sp1024 is not one of"),
        (lambda m: m.pop("datasets"), "not a manifest"),
        (lambda m: m.update(datasets=[["name"]]), "not a manifest"),
        (lambda m: m.update(datasets={"name": 1}), "not a manifest"),
        (lambda m: m["datasets"][0]["stats"].update(files_val=0), "lacks its stats"),
        (lambda m: m["datasets"][0]["stats"].update(files_val=10**7), "lacks its stats"),
        (lambda m: m["datasets"][0]["stats"].update(files_val=3), f"is not in {REPO}"),
        (lambda m: m["datasets"][0].update(name="a\n\x1b[2Jb"), r"is not one of 'a\n\x1b[2Jb'"),
    ],
)
def test_wrong_manifests_are_explained(hub, fetch, tmp_path, edit, message):
    hub.set_manifest(edit)
    done = fetch("--train-shards", "0", error=message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("verified.json"))


@pytest.mark.parametrize("name", ["a/../../b", "../x", "a\nb", ".x", "a/b"])
def test_a_data_set_with_an_odd_name_is_refused(hub, fetch, name):
    hub.set_manifest(lambda manifest: manifest["datasets"][0].update(name=name))
    fetch("--train-shards", "0", "--variant", name, error="names a data set")


@pytest.mark.parametrize(
    "path, message",
    [
        ("../../evil", "outside the data folder"),
        ("/etc/evil", "outside the data folder"),
        ("tokenizers\\x", "outside the data folder"),
        ("tokenizers/a\nb", r"'tokenizers/a\nb'"),
        ("argparse.py", "no data set and no tokenizer"),
        ("tokenizers/x.py", "no data set and no tokenizer"),
        ("datasets/docs_sp1024/fineweb_val_000000.bin", "no tokenizer"),
    ],
)
def test_a_manifest_cannot_name_other_files(hub, fetch, tmp_path, path, message):
    hub.set_manifest(lambda manifest: manifest["tokenizers"][0].update(model_path=path))
    done = fetch("--train-shards", "0", error=message)
    assert done.stderr.count("\n") == 1


def test_wrong_arguments_are_explained_and_a_full_name_is_a_variant(hub, fetch, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--train-shards", "4"], "has 3"),
        (["--train-shards", "-1"], "--train-shards -1 must not be negative"),
        (["--variant", "sp7"], "--variant sp7 is not one of fineweb10B_sp1024"),
        (["--repo", "a/b/c"], "--repo 'a/b/c' is no data set: give OWNER/NAME"),
        (["--repo", ""], "--repo '' is no data set: give OWNER/NAME"),
        (["--remote-root", "../x"], "--remote-root '../x': give a folder in the data set"),
        (["--out", "file"], "--out file: cannot be written: File exists; give another --out"),
    ):
        done = fetch(*arguments, error=message)
        assert done.stderr.count("\n") == 1
    fetch("--train-shards", "0", "--variant", "fineweb10B_sp1024")


@pytest.mark.parametrize("endpoint", ["not a url", "http://[::", "https://", "ftp://x"])
def test_an_endpoint_that_is_no_address_is_explained(fetch, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    done = fetch(error=f"HF_ENDPOINT={endpoint!r} is no address")
    assert done.stderr.count("\n") == 1


def test_a_hub_that_is_not_there_is_one_line(hub, fetch):
    hub.down = True
    fetch("--train-shards", "0", error="manifest.json could not be fetched: ")


def test_a_data_set_that_is_not_there_is_one_line(hub, fetch):
    fetch("--repo", "nobody/nothing", error="manifest.json is not in nobody/nothing")


def test_a_full_disk_is_one_line(hub, fetch, tmp_path):
    """Everything that was there is as it was."""
    name = f"{DATASET}/fineweb_train_000000.bin"
    fetch("--train-shards", "0")
    before = {path: path.read_bytes() for path in (tmp_path / "datasets").rglob("*.*")}
    hub.files[name] = shard_bytes(100_000)
    with file_limit(50_000):
        fetch("--train-shards", "1", error="fineweb_train_000000.bin could not be fetched: ")
    assert before == {path: path.read_bytes() for path in (tmp_path / "datasets").rglob("*.*")}
    fetch("--train-shards", "1")


def test_a_data_set_on_another_disk(hub, fetch, tmp_path, monkeypatch):
    """Where files cannot be renamed to."""
    rename = os.rename

    def across(source, target, **options):
        if ".hub" in str(source) and ".hub" not in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", across)
    fetch("--train-shards", "1")
    local = tmp_path / "datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    assert local.read_bytes() == hub.files[f"{DATASET}/fineweb_train_000000.bin"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_variant_without_a_sentencepiece_model_is_noted(hub, fetch, tmp_path):
    hub.set_manifest(lambda manifest: manifest["tokenizers"][0].pop("model_path"))
    done = fetch("--train-shards", "0")
    assert "no SentencePiece model" in done.stdout
    assert not list(tmp_path.rglob("verified.json"))


# ---- Larger vocabularies


TEXTS = [*(text_of(i, 60) for i in range(20)), " a space first", "日本語 12  345\n\n", "the end"]
SP1024 = "fineweb10B_sp1024"


@pytest.fixture(scope="session")
def larger_model(tmp_path_factory):
    """A tokenizer of 500 pieces."""
    path = tmp_path_factory.mktemp("larger") / "t.model"
    prepare_text.train_tokenizer([text_of(i, 300) for i in range(20)], path, 500, "identity")
    return path


def tokens_of(model, texts):
    sp = prepare_text.load_tokenizer(model)
    return np.array([token for text in texts for token in [1, *sp.encode(text)]])


@pytest.fixture
def publish(hub, dataset, larger_model):
    """Puts the texts of a validation split on the hub: with 384 pieces as sp1024 of the challenge,
    with 500 pieces as any other variant of LARGER."""

    def call(variant, texts=TEXTS, model=None):
        default = variant == "sp1024"
        smaller = dataset / "tokenizers/tiny_384_bpe.model"
        model = model or (smaller if default else larger_model)
        name = f"tokenizers/fineweb_{variant[2:]}_bpe.model"
        tokens = tokens_of(model, texts)
        cuts = [7, len(tokens) // 2] if default else [len(tokens) // 3]  # inside of documents
        files = {f"datasets/{name}": model.read_bytes()}
        for number, part in enumerate(np.split(tokens, cuts)):
            path = f"datasets/datasets/fineweb10B_{variant}/fineweb_val_{number:06d}.bin"
            files[path] = shard_of(part)
        stats = {"files_train": 0, "files_val": len(cuts) + 1, "tokens_val": len(tokens)}
        entry = {"name": f"fineweb10B_{variant}", "tokenizer_name": "t", "stats": stats}
        manifest = {"datasets": [entry], "tokenizers": [{"name": "t", "model_path": name}]}
        files["datasets/manifest.json"] = json.dumps(manifest).encode()
        hub.repos[REPO if default else LARGER] = files

    return call


def note(tmp_path, variant="sp4096"):
    """What verified.json says of how canonical a copy is."""
    path = tmp_path / f"datasets/fineweb10B_{variant}/verified.json"
    return json.loads(path.read_text(encoding="utf-8"))["compared"]


@pytest.mark.parametrize("variant", ["sp4096", "sp8192", "fineweb10B_sp8192"])
def test_a_larger_vocabulary_comes_from_its_own_hub_data_set(
    hub, fetch, publish, larger_model, variant
):
    name = variant.removeprefix("fineweb10B_")
    publish(name)
    lines = fetch("--train-shards", "0", "--variant", variant).stdout.splitlines()
    model = f"tokenizers/fineweb_{name[2:]}_bpe.model"
    variables = f"DATA_PATH=datasets/fineweb10B_{name} TOKENIZER_PATH={model} VOCAB_SIZE=500"
    assert lines[-1] == variables
    nbytes = sum(len(text.encode()) for text in TEXTS)
    tokens = len(tokens_of(larger_model, TEXTS))
    assert lines[-2].endswith(f": {nbytes:,} validation bytes, {nbytes / tokens:.3f} bytes a token")
    given = ["--variant", variant, "--repo", REPO]  # which has another manifest
    fetch("--train-shards", "0", *given, error=f"--variant {variant} is not one of {SP1024}")
    hub.repos["somebody/else"] = hub.repos.pop(LARGER)
    fetch("--train-shards", "0", "--variant", variant, error=f"manifest.json is not in {LARGER}")
    fetch("--train-shards", "0", "--variant", variant, "--repo", "somebody/else")


def test_every_variant_with_a_hub_data_set_of_its_own_is_documented():
    lines = (ROOT / "data/README.md").read_text(encoding="utf-8").splitlines()
    for variant, repo in fetch_fineweb.REPOS.items():
        assert fetch_fineweb.repo_of(variant) == repo == LARGER
        assert any(f"`{variant}`" in line and f"| `{repo}` |" in line for line in lines)
    assert fetch_fineweb.repo_of("sp1024") == fetch_fineweb.repo_of("sp512") == REPO


def test_the_same_text_in_two_vocabularies(fetch, publish, tmp_path):
    publish("sp1024")
    publish("sp4096")
    fetch("--train-shards", "0")
    done = fetch("--train-shards", "0", "--variant", "sp4096")
    nbytes = sum(len(text.encode()) for text in TEXTS)
    same = f"same text as {SP1024}: {len(TEXTS)} documents, {nbytes:,} bytes"
    assert f"fineweb10B_sp4096: {same}\n" in done.stdout and note(tmp_path) == same
    assert "not the published split" in note(tmp_path, "sp1024")
    folder = tmp_path / "datasets/fineweb10B_sp4096"
    model = tmp_path / "tokenizers/fineweb_4096_bpe.model"
    stream = tm.TokenStream(folder, "val")
    stream.measure(500)
    hp = tiny_hp(data_path=str(folder), tokenizer_path=str(model), vocab_size=500)
    assert tm.check_verified(hp, stream, "val")  # which does not read the note


def changed(number, text):
    return [*TEXTS[:number], text, *TEXTS[number + 1 :]]


@pytest.mark.parametrize(
    "texts, number",
    [
        (changed(16, TEXTS[16] + "!"), 17),
        (changed(16, TEXTS[16].swapcase()), 17),
        (changed(20, TEXTS[20][1:]), 21),
        (TEXTS[1:], 1),
        (TEXTS[:-1], 23),
        ([*TEXTS, "more"], 24),
        ([TEXTS[0] + TEXTS[1], *TEXTS[2:]], 1),
    ],
    ids=["longer", "other", "space", "first", "fewer", "more", "joined"],
)
def test_the_first_document_that_differs(fetch, publish, tmp_path, texts, number):
    publish("sp1024")
    publish("sp4096", texts)
    fetch("--train-shards", "0")
    done = fetch("--train-shards", "0", "--variant", "sp4096")
    here, there = (
        f"{len(text.encode())} bytes" if text else "none"
        for text in ((*split, "")[number - 1] for split in (texts, TEXTS))
    )
    differing = f"document {number} ({here} here, {there} there)"
    outcome = f"not the same text as {SP1024}: first differs in {differing}"
    assert f"fineweb10B_sp4096: {outcome}\n" in done.stdout and note(tmp_path) == outcome


def test_without_sp1024_it_says_how_to_compare(hub, fetch, publish, tmp_path):
    publish("sp1024")
    publish("sp4096")
    line = ["--train-shards", "0", "--variant", "sp4096"]
    done = fetch(*line)
    how = "python data/fetch_fineweb.py --train-shards 0 --out ."
    reason = f"there is no verified copy of it; to compare, run '{how}', and then this command"
    assert f"sp4096: text not compared with that of {SP1024}: {reason} again\n" in done.stdout
    assert "not compared" in note(tmp_path)
    fetch(*how.split()[2:])
    hub.requests.clear()
    done = fetch(*line)
    assert f"sp4096: same text as {SP1024}" in done.stdout
    fetched = {path for method, path, _ in hub.requests if method == "GET"}
    assert fetched <= {"datasets/manifest.json"}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("datasets/fineweb10B_sp1024/fineweb_val_000001.bin", "fineweb_val_000001.bin (CRC-32) is"),
        ("tokenizers/fineweb_1024_bpe.model", "fineweb_1024_bpe.model (SHA-256) is"),
        ("datasets/fineweb10B_sp1024/fineweb_val_000002.bin", "truncated or damaged"),
    ],
    ids=["shard", "tokenizer", "truncated"],
)
def test_a_damaged_sp1024_is_not_compared_with(
    fetch, publish, tmp_path, larger_model, name, reason
):
    publish("sp1024")
    publish("sp4096")
    fetch("--train-shards", "0")
    local = tmp_path / name
    whole = local.read_bytes()
    damaged = {
        "(CRC-32) is": whole[:-2] + b"\x09\x00",
        "(SHA-256) is": larger_model.read_bytes(),
        "truncated or damaged": whole[:-2],
    }
    local.write_bytes(next(raw for key, raw in damaged.items() if key in reason))
    done = fetch("--train-shards", "0", "--variant", "sp4096")
    (line,) = [line for line in done.stdout.splitlines() if "not compared" in line]
    assert reason in line and line.endswith(note(tmp_path))


def test_downloads_of_two_hub_data_sets_are_kept_apart(hub, fetch, publish, tmp_path):
    """Both have a manifest.json, which goes to the same place."""
    publish("sp1024")
    publish("sp4096")
    for variant in ("sp1024", "sp4096", "sp1024", "sp4096"):
        fetch("--train-shards", "0", "--variant", variant)
    for repo in (REPO, LARGER):
        for remote, content in hub.repos[repo].items():
            local = tmp_path / remote.removeprefix("datasets/")
            assert "manifest" in remote or local.read_bytes() == content


# ---- Documents of a split


def validation_text(folder, model, tokens, cuts=()):
    """A ValidationText of these tokens."""
    for number, part in enumerate(np.split(np.asarray(tokens), cuts)):
        prepare_text.write_shard(folder / f"fineweb_val_{number:06d}.bin", part)
    return fetch_fineweb.ValidationText(folder, model)


def documents_of(texts):
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return [fetch_fineweb.Document(len(text), hashlib.sha256(text).digest()) for text in raw]


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_documents_are_the_decoded_text(tmp_path, monkeypatch, normalization, size):
    """Wherever shards and the pieces in which they are read are cut."""
    model = tmp_path / "t.model"
    prepare_text.train_tokenizer([text_of(i, 300) for i in range(9)], model, 400, normalization)
    texts = ["", *AWKWARD, "", "", *TEXTS]
    tokens = tokens_of(model, texts)
    val = validation_text(tmp_path, model, tokens, [1, 30, len(tokens) // 2])
    pieces = tm.TokenStream.pieces

    def small_pieces(stream, number):
        for piece in pieces(stream, number):
            yield from np.split(piece, range(size, len(piece), size))

    monkeypatch.setattr(tm.TokenStream, "pieces", small_pieces)
    sp = prepare_text.load_tokenizer(model)
    decoded = [sp.decode(sp.encode(text)) for text in texts]
    assert (decoded == texts) == (normalization == "identity")
    found = list(val.documents())
    assert found == documents_of(decoded)
    assert sum(document.nbytes for document in found) == val.stream.facts["bytes"]
    assert len(found) == val.stream.facts["documents"]


def test_a_split_that_begins_inside_a_document(tmp_path, larger_model):
    """Its text is a document too; bytes that are no character are compared as they are."""
    sp = prepare_text.load_tokenizer(larger_model)
    tokens = [*sp.encode("the rest"), 1, sp.piece_to_id("<0xFF>"), 2, *sp.encode(" x"), 1]
    val = validation_text(tmp_path, larger_model, tokens)
    assert list(val.documents()) == documents_of(["the rest", b"\xff x", ""])


def test_a_space_that_decoding_drops_is_no_text(tmp_path):
    """At the beginning of a document, by a tokenizer that removes extra spaces."""
    model = tmp_path / "t.model"
    prepare_text.train_tokenizer([text_of(i, 300) for i in range(9)], model, 400, "nmt_nfkc")
    sp = prepare_text.load_tokenizer(model)
    space, word = sp.piece_to_id("\u2581"), sp.piece_to_id("\u2581the")
    documents = [[word, word], [space], [word, space, word]]
    decoded = [sp.decode(tokens) for tokens in documents]
    assert decoded == ["the the", "", "the  the"]
    val = validation_text(tmp_path, model, [t for tokens in documents for t in [1, *tokens]])
    assert list(val.documents()) == documents_of(decoded)
    assert val.stream.facts["bytes"] == sum(map(len, decoded))


def test_a_document_of_any_length_takes_the_memory_of_a_million_tokens(tmp_path, larger_model):
    peaks = []
    for millions in (2, 8):
        tokens = np.resize(np.arange(4, 500), millions << 20)
        val = validation_text(tmp_path, larger_model, tokens)
        tracemalloc.start()
        assert [document.nbytes for document in val.documents()] == [val.stream.facts["bytes"]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 1 << 20 and peaks[1] < 1.1 * peaks[0]
