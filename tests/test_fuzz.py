"""Damaged and hostile files: each is used, or refused with one line, and nothing is executed."""

import json
import random
import shutil
from pathlib import Path

import fetch_fineweb
import numpy as np
import prepare_text
import pytest
import torch
from conftest import prepare_tiny, tiny_hp

import train_mdlm as tm


def mutate(data: bytes, g: random.Random) -> bytes:
    """One to fifty changes: a bit, a byte, bytes taken out, bytes put in."""
    data = bytearray(data)
    for _ in range(g.choice([1, 1, 2, 5, 50])):
        kind, i = g.randrange(4), g.randrange(len(data) or 1)
        if kind == 0 and data:
            data[i] ^= 1 << g.randrange(8)
        elif kind == 1 and data:
            data[i] = g.randrange(256)
        elif kind == 2:
            del data[i : i + g.choice([1, 1, 10, 1000])]
        else:
            data[i:i] = g.randbytes(g.choice([1, 4, 100]))
    return bytes(data)


def outcome(action) -> str:
    """ "used" or the message; any other exception is a failure."""
    try:
        action()
        return "used"
    except tm.InputError as error:
        assert "\n" not in str(error)
        return str(error)


def validation(data_path, tokenizer_path):
    """Opens a validation split with a tokenizer of 384 pieces; its `outcome`."""
    paths = dict(data_path=str(data_path), tokenizer_path=str(tokenizer_path))
    hp = tm.Hyperparameters(vocab_size=384, train_seq_len=32, **paths)

    def open_all():
        tokenizer = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
        tm.open_validation(hp, tokenizer, tm.build_sentencepiece_luts(tokenizer, hp.vocab_size))

    return outcome(open_all)


def test_tokenizers(tiny_env, tmp_path):
    """Those that are used make, of the validation split, what it holds."""
    raw, g = Path(tiny_env["TOKENIZER_PATH"]).read_bytes(), random.Random(0)
    path = tmp_path / "t.model"
    found = []
    for _ in range(150):
        path.write_bytes(mutate(raw, g))
        found.append(validation(tiny_env["DATA_PATH"], path))
    assert 100 < sum("there is no SentencePiece model" in text for text in found) < 150


def test_the_tokenizer_of_another_text(tiny_env, tmp_path):
    """Of the same size, so only what it makes of the text tells."""
    files = [tmp_path / f"{n:02d}.txt" for n in range(12)]
    for n, path in enumerate(files):
        lines = (f"{k * k} {k:x} QUARTZ fjord {k}" for k in range(n * 300, n * 300 + 300))
        path.write_text("\n".join(lines))
    prepare_tiny(files, tmp_path)
    other = next(tmp_path.rglob("*.model"))
    without = tmp_path / "without"  # verified.json, which would tell at once
    shutil.copytree(tiny_env["DATA_PATH"], without)
    (without / tm.VERIFIED).unlink(missing_ok=True)
    assert "splits the text differently: it did not make" in validation(without, other)
    # Tokens that are as frequent as by chance are no text: a benchmark's, which no tokenizer made.
    tokens = np.random.default_rng(0).integers(3, 384, 20_000)
    prepare_text.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    assert validation(tmp_path, other) == "used"


def test_shards(tmp_path):
    path, g, found = tmp_path / "fineweb_val_000000.bin", random.Random(0), []
    prepare_text.write_shard(path, np.arange(300) % 50)
    raw = path.read_bytes()

    def read():
        stream = tm.TokenStream(tmp_path, "val")
        stream.measure(50)
        assert stream.windows(range(stream.count_windows(8)), 8).max() < 50

    for n in range(400):
        head, rest = raw[:16], raw[16:]
        path.write_bytes(mutate(head, g) + rest if n % 2 else head + mutate(rest, g))
        found.append(outcome(read))
    assert len(set(found)) > 3 and 300 < sum(text != "used" for text in found) < 400
    assert all("fineweb_val_000000.bin" in text for text in found if text != "used")


STATS = {"files_train": 2, "files_val": 1, "tokens_val": 9}
MANIFEST = {
    "datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "t", "stats": STATS}],
    "tokenizers": [{"name": "t", "model_path": "tokenizers/t.model"}],
}
ODD = [None, -1, 0, 10**30, 1.5, True, [], {}, "", "9" * 400, "x\0y"]
ODD += ["..", "../../x", "/etc/x", "a\\..\\b", "a/../../b"]


def poison(value, g: random.Random):
    """`value`, a part of a manifest, with something odd somewhere in it."""
    if isinstance(value, dict):
        key = g.choice([*value, *value, "name"])
        return value | {key: g.choice(ODD) if g.random() < 0.5 else poison(value.get(key), g)}
    if isinstance(value, list) and value and g.random() < 0.8:
        return [poison(value[0], g)]
    return g.choice(ODD)


def test_manifests(tmp_path):
    """As JSON with anything anywhere, and as bytes; nothing outside the data folder is fetched."""
    manifest, shard = tmp_path / "manifest.json", tmp_path / "shard.bin"
    prepare_text.write_shard(shard, np.arange(9))
    g, asked = random.Random(0), []

    class Fetcher(fetch_fineweb.Fetcher):
        def fetch(self, relative, verify, refresh=False):
            target = self.local(relative)
            if relative == "manifest.json":
                verify(manifest)
                return manifest
            assert target.resolve().is_relative_to((tmp_path / "out").resolve())
            asked.append(relative)
            assert len(asked) < 100_000
            verify(shard)
            return shard

    used = 0
    for n in range(600):
        raw = json.dumps(poison(MANIFEST, g) if n % 3 else MANIFEST).encode()
        manifest.write_bytes(raw if n % 3 else mutate(raw, g))
        asked.clear()
        fetcher = Fetcher("repo", "root", tmp_path / "out", lambda line: None)
        used += outcome(lambda f=fetcher: fetch_fineweb.fetch_variant(f, "sp1024", 1)) == "used"
    assert 20 < used < 500


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", '{"datasets": 3}'])
def test_a_text_that_is_no_manifest(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    assert "not a manifest" in outcome(lambda: fetch_fineweb.read_manifest(tmp_path / "m.json"))


def test_checkpoints(tiny_env, tmp_path, monkeypatch):
    """Whatever is changed, the checksum shows it, and the run begins again."""
    monkeypatch.chdir(tmp_path)
    hp = tiny_hp(run_id="f", vocab_size=384, train_seq_len=32, train_batch_tokens=512)
    stream = tm.TokenStream(tiny_env["DATA_PATH"], "train")
    lines = []

    def new_trainer():
        return tm.Trainer(hp, stream, torch.device("cpu"), lines.append)

    trainer = new_trainer()
    trainer.progress.step = 3
    trainer.optimizer.counts[0] = 3
    trainer.save()
    path = next(Path("logs").glob("f.*.ckpt"))
    raw, g = path.read_bytes(), random.Random(0)
    for _ in range(100):
        path.write_bytes(mutate(raw, g))
        lines.clear()
        other = new_trainer()
        other.resume()
        assert other.progress.step == 0 and lines[0].startswith(f"skipped:{path}: damaged")
        # Under another name, so that it does not count as one of the last two.
        assert not path.exists() and Path(f"{path}.damaged").exists()
    path.write_bytes(raw)
    other.resume()
    assert other.progress.step == 3 and lines[-1].startswith(f"resumed:{path} step:3/")
