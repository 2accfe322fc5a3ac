"""The bytes in bits per byte: a tokenizer or a shard that is not the one it was is never used."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import prepare_text
import pytest
import sentencepiece
import torch
from conftest import ROOT, WORDS, clean_env, prepare_tiny, text_of, tiny_hp

import train_mdlm as tm


@pytest.fixture
def copy(dataset, tmp_path):
    """A copy of the data: its folder of shards, and its tokenizer."""
    for name in ("datasets", "tokenizers"):
        shutil.copytree(dataset / name, tmp_path / name)
    return tmp_path / "datasets/tiny_sp384", tmp_path / "tokenizers/tiny_384_bpe.model"


def opened(folder, tokenizer, iterations=1000):
    """Both splits, as a run of 16,000 tokens opens them: what it found, or what it says."""
    paths = dict(data_path=str(folder), tokenizer_path=str(tokenizer))
    hp = tiny_hp(vocab_size=384, train_seq_len=32, train_batch_tokens=512, **paths)
    hp = tm.dataclasses.replace(hp, iterations=iterations)
    try:
        sp = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
        luts = tm.build_sentencepiece_luts(sp, hp.vocab_size)
        val = tm.open_validation(hp, sp, luts)
        train = tm.open_training(hp, sp, luts)
    except tm.InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return val.stream.facts, train.facts


def verify(folder, tokenizer):
    """Writes verified.json for data as they are; its content."""
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    val, train = opened(folder, tokenizer)
    verified = dict(tokenizer_sha256=tm.file_sha256(tokenizer), val=val, train=train)
    (folder / tm.VERIFIED).write_text(json.dumps(verified))
    return verified


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def space_signs(tokenizer):
    data = tokenizer.read_bytes()
    return [place for place in range(len(data)) if data.startswith("\u2581".encode(), place)]


def test_what_is_measured_is_what_the_text_has(copy):
    """Counted here from the decoded text of the shards, in one piece."""
    folder, tokenizer = copy
    verified = verify(folder, tokenizer)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for split in ("val", "train"):
        paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        tokens = np.concatenate([tm.open_shard(path) for path in paths])
        facts = verified[split]
        assert facts["tokens"] == len(tokens)
        if split == "val":  # of the training split the scores need no bytes
            assert facts["documents"] == (tokens == 1).sum() == 10
            documents = np.split(tokens, np.flatnonzero(tokens == 1))
            texts = sp.decode([document.tolist() for document in documents])
            assert facts["bytes"] == sum(len(text.encode()) for text in texts)
        for path in paths:
            checksum = tm.zlib.crc32(path.read_bytes()[tm.SHARD_HEADER_BYTES :])
            assert facts["shards"][path.name] == checksum
    assert opened(folder, tokenizer) == (verified["val"], verified["train"])


def test_what_may_change_in_a_restart_reaches_no_other_shards(copy):
    """More batches for the warm-up or for packing than steps are the same ones again."""
    folder, tokenizer = copy
    paths = dict(data_path=str(folder), tokenizer_path=str(tokenizer), vocab_size=384)
    digests, seen = set(), []
    for more in ({}, dict(quant_feedback=100), dict(warmup_steps=100)):
        hp = tiny_hp(**paths, train_seq_len=32, train_batch_tokens=512, iterations=3, **more)
        sp = tm.load_tokenizer(hp.tokenizer_path, 384)
        stream = tm.open_training(hp, sp, tm.build_sentencepiece_luts(sp, 384))
        digests.add(stream.digest)
        trainer = tm.Trainer(hp, stream, torch.device("cpu"), tm.Log())
        seen.append([next(trainer.batches(step)).targets.tolist() for step in (1, 4, 100)])
    assert len(digests) == 1 and len(stream.facts["shards"]) < len(stream.files)
    assert all(first == again == later for first, again, later in seen)


def test_a_run_reads_and_compares_only_the_shards_it_can_reach(copy):
    folder, tokenizer = copy
    verify(folder, tokenizer)
    last = sorted(folder.glob("fineweb_train_*.bin"))[-1]
    flip(last, -1)
    assert f"{last.name} (CRC-32) is " in opened(folder, tokenizer)
    _, train = opened(folder, tokenizer, iterations=2)
    assert list(train["shards"]) == ["fineweb_train_000000.bin"]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_a_sign_for_a_space(copy, bit):
    """Of one piece: it would count up to 2.3 % more bytes."""
    folder, tokenizer = copy
    rng = random.Random(bit)
    flip(tokenizer, rng.choice(space_signs(tokenizer)) + rng.randrange(3), 1 << bit)
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    found = opened(folder, tokenizer)
    assert "is in its pieces, but is no piece" in found or "no SentencePiece model" in found


def test_any_other_tokenizer_file_is_known_by_its_digest(copy):
    """For example one letter of one piece, which changes no byte count."""
    folder, tokenizer = copy
    verify(folder, tokenizer)
    flip(tokenizer, tokenizer.read_bytes().index(b"the"))
    assert f"{tokenizer} (SHA-256) is " in opened(folder, tokenizer)


@pytest.mark.parametrize("split", ["val", "train"])
def test_every_figure_of_verified_json_is_compared(copy, split):
    folder, tokenizer = copy
    verified = verify(folder, tokenizer)
    for name, value in verified[split].items():
        other = {path: 1 for path in value} if name == "shards" else value + 1
        changed = verified | {split: verified[split] | {name: other}}
        (folder / tm.VERIFIED).write_text(json.dumps(changed))
        message = opened(folder, tokenizer)
        expected = "(CRC-32) is " if name == "shards" else f"{split} {name} is {value}, but was"
        assert str(folder / tm.VERIFIED) in message and expected in message


BROKEN = ["", "{", "[]", "null", "3", '{"tokenizer_sha256": 3}', "[" * 100_000, '"\\ud800"', "\0"]


def test_a_broken_verified_json_is_one_line(copy):
    folder, tokenizer = copy
    verified = verify(folder, tokenizer)
    odd = [verified | change for change in (dict(val=[]), dict(val={}), dict(train=None))]
    odd += [{"val": verified["val"]}, verified | dict(val=verified["val"] | dict(shards=7))]
    for text in BROKEN + [json.dumps(value) for value in odd]:
        (folder / tm.VERIFIED).write_text(text)
        assert "verified.json: " in opened(folder, tokenizer)
    less = {name: verified["val"][name] for name in ("documents", "bytes", "shards")}
    (folder / tm.VERIFIED).write_text(json.dumps(verified | dict(val=less)))
    assert "verified.json: damaged" in opened(folder, tokenizer)
    (folder / tm.VERIFIED).write_bytes(b"\xff\xfe")
    assert "verified.json: damaged" in opened(folder, tokenizer)
    (folder / tm.VERIFIED).unlink()
    (folder / tm.VERIFIED).symlink_to(tm.VERIFIED)  # to itself
    assert "verified.json: there is no such file" in opened(folder, tokenizer)
    (folder / tm.VERIFIED).unlink()
    os.mkfifo(folder / tm.VERIFIED)
    assert "verified.json: there is no such file" in opened(folder, tokenizer)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The data of another text, with a tokenizer of its own of the same size."""
    folder = tmp_path_factory.mktemp("other")
    files = []
    for number in range(20):
        files.append(folder / f"{number:02d}.txt")
        words = " ".join(word[::-1].upper() + "Q" for word in WORDS)
        files[-1].write_text(text_of(number, 100).upper() + words * 3)
    prepare_tiny(files, folder)
    return folder / "datasets/tiny_sp384"


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("where", ["a shard", "the end of a shard"])
def test_a_shard_of_another_tokenizer_is_refused(copy, other, split, where):
    """However far from the beginning of the split; in a training shard, if it begins so."""
    folder, tokenizer = copy
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    foreign = tm.open_shard(sorted(other.glob("fineweb_train_*.bin"))[0])
    last = sorted(folder.glob(f"fineweb_{split}_*.bin"))[-1]
    if where == "a shard":
        last = folder / f"fineweb_{split}_000099.bin"
        prepare_text.write_shard(last, foreign)
    else:
        prepare_text.write_shard(last, np.append(tm.open_shard(last), foreign))
    message = opened(folder, tokenizer)
    assert "splits the text differently: it did not make" in message and str(last) in message


def test_a_foreign_text_of_few_long_documents_is_refused(copy, other):
    """Of a million tokens some are looked at, whatever the first document is."""
    _, tokenizer = copy
    sp = tm.load_tokenizer(str(tokenizer), 384)
    luts = tm.build_sentencepiece_luts(sp, 384)
    foreign = np.array(tm.open_shard(sorted(other.glob("fineweb_train_*.bin"))[0]))
    body = np.resize(foreign[foreign != tm.BOS_ID], 60_000)
    tokens = np.concatenate([[tm.BOS_ID], body, [tm.BOS_ID], body]).astype(np.uint16)
    assert "splits the text differently" in tm.text_fault(tokens, sp, luts)


def test_bytes_are_compared_with_the_decoded_text(copy, monkeypatch):
    """A table that counts one byte too few for one piece in a hundred."""
    folder, tokenizer = copy
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    build = tm.build_sentencepiece_luts

    def wrong(sp, vocab_size):
        luts = build(sp, vocab_size)
        luts.base_bytes[sp.piece_to_id("\u2581the")] += 1
        return luts

    monkeypatch.setattr(tm, "build_sentencepiece_luts", wrong)
    assert "bytes where there are" in opened(folder, tokenizer)


def test_begin_of_document_has_to_be_token_1(tmp_path):
    model = tmp_path / "t.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text_of(0, 400)]),
        model_prefix=str(model.with_suffix("")),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=2,
        eos_id=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    with pytest.raises(tm.InputError, match="its <s> is token 2, but it has to be 1"):
        tm.load_tokenizer(str(model), pieces)


def test_pipes_are_not_waited_for(copy, tmp_path):
    folder, tokenizer = copy
    os.mkfifo(tmp_path / "pipe")
    assert "there is no SentencePiece model" in opened(folder, tmp_path / "pipe")
    os.mkfifo(folder / "fineweb_val_000050.bin")
    assert "fineweb_val_000050.bin: is not a file" in opened(folder, tokenizer)


def test_a_foreign_end_of_a_long_shard_is_noticed(copy, other):
    """After more tokens than are split again of each million."""
    folder, tokenizer = copy
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    own = np.concatenate([tm.open_shard(path) for path in folder.glob("fineweb_train_*.bin")])
    foreign = np.concatenate([tm.open_shard(path) for path in other.glob("fineweb_train_*.bin")])
    long = folder / "fineweb_val_000099.bin"
    right = np.tile(own, 1 + 60_000 // len(own))
    prepare_text.write_shard(long, np.append(right, np.tile(foreign, 1 + 30_000 // len(foreign))))
    assert "splits the text differently" in opened(folder, tokenizer)


# ---- Several processes


@pytest.mark.parametrize("local", [("1", "2"), ("1", None), ("0", "0"), ("x", "-1")])
def test_variables_of_no_group_do_not_matter(copy, monkeypatch, local):
    """Left over in the environment: one process looks at every shard."""
    folder, tokenizer = copy
    (folder / tm.VERIFIED).unlink(missing_ok=True)
    found = opened(folder, tokenizer)
    for name, value in zip(("LOCAL_RANK", "LOCAL_WORLD_SIZE"), local, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert opened(folder, tokenizer) == found and all(found[0]["shards"].values())


WRAPPER = """
import os, runpy, sys
settings, folder, script = sys.argv[1:]
os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"  # a machine for each
if os.environ["RANK"] == "1":
    os.environ.update(item.split("=") for item in settings.split())
    os.chdir(folder)
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""


def two_machines(env, folder, other_folder, other_settings=""):
    """A run of two processes, the second of which has other settings or another folder."""
    (folder / "wrapper.py").write_text(WRAPPER)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 wrapper.py".split()
    done = subprocess.run(
        [sys.executable, *launch, other_settings, other_folder, ROOT / "train_mdlm.py"],
        cwd=folder,
        env=clean_env(OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def test_processes_have_the_same_settings_and_the_same_shards(tiny_env, copy, tmp_path):
    """On two machines with disks of their own; here in two folders."""
    folder, tokenizer = copy
    verify(folder, tokenizer)
    there = tmp_path / "there"
    for place in (tmp_path, there):
        shutil.copytree(folder, place / "data")
        shutil.copy(tokenizer, place / "t.model")
    env = tiny_env | dict(DATA_PATH="data", TOKENIZER_PATH="t.model", ITERATIONS="2", RUN_ID="m")
    status, printed = two_machines(env, tmp_path, there, "SEED=5")
    assert status == 1 and "error: SEED=5, but the first process has 1337" in printed
    status, printed = two_machines(env, tmp_path, there, "EVAL_ONLY=a.mdlm")
    assert status == 1 and "error: EVAL_ONLY=a.mdlm, but the first process has" in printed
    last = sorted((there / "data").glob("fineweb_val_*.bin"))[-1]
    tokens = np.array(tm.open_shard(last))
    prepare_text.write_shard(last, np.random.default_rng(0).permutation(tokens))
    status, printed = two_machines(env, tmp_path, there)
    assert status == 1 and "data: other shards than on other machines" in printed
    shutil.copy(last, tmp_path / "data/fineweb_val_999999.bin")  # one more than there
    status, printed = two_machines(env, tmp_path, there)
    assert status == 1 and "data: other shards than on other machines" in printed
    assert not (tmp_path / "logs/m.txt").exists()
