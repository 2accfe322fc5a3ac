"""Shards, byte counts and data/prepare_text.py."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing.pool
import os
import resource
import shutil
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare_text
import pytest
import sentencepiece
import torch
from conftest import prepare_tiny, text_of, tiny_hp

import train_mdlm as tm

AWKWARD = [
    "plain text",
    " starts with a space",
    "  starts with two",
    "ends with spaces  ",
    "two  spaces   three",
    "\ttab\tand\ttab",
    "line\nbreak\n\n\nmore",
    "\n",
    " ",
    "   ",
    "a",
    "🙂 emoji 👩‍👩‍👧 family",
    "e\u0301 combining a\u0308o\u0302",
    "日本語テキスト",
    "\u00a0no-break\u2003em space",
    "café naïve",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "zero\u200bwidth",
    "\r\nwindows\r\n",
    "1234567890 12.5",
    "\x01control\x7f",
    "ﬁ ligature ½ ①",
    "mixed  🙂\n\n    indented\tcode()",
]


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    prepare_text.train_tokenizer([text_of(i, 400) for i in range(20)], path, 400, request.param)
    return request.param, tm.load_tokenizer(str(path), 400)


def test_bytes_of_awkward_text_are_exact(tokenizer):
    normalization, sp = tokenizer
    luts = tm.build_sentencepiece_luts(sp, 400)
    used_byte_fallback = False
    for text in AWKWARD:
        ids = sp.encode(text)
        decoded = sp.decode(ids)
        if normalization == "identity":
            assert decoded == text
        used_byte_fallback |= any(sp.is_byte(i) for i in ids)
        assert int(tm.count_bytes(ids, sp.bos_id(), luts)) == len(decoded.encode()), repr(text)
        # A window may begin inside the text: its first token has a real predecessor.
        for cut in range(1, len(ids)):
            left = int(tm.count_bytes(ids[:cut], 1, luts))
            right = int(tm.count_bytes(ids[cut:], ids[cut - 1], luts))
            assert left + right == len(decoded.encode())
    assert used_byte_fallback


def test_bytes_of_rows_and_documents_in_one_stream(tokenizer):
    _, sp = tokenizer
    luts = tm.build_sentencepiece_luts(sp, 400)
    texts = ["first text", " second 🙂", "third"]
    stream = [i for text in texts for i in [sp.bos_id(), *sp.encode(text)]]
    true = sum(len(sp.decode(sp.encode(text)).encode()) for text in texts)
    assert int(tm.count_bytes(stream[1:], stream[0], luts)) == true  # <s> carries no bytes
    rows = torch.tensor(stream[1 : 1 + 2 * (len(stream) // 2 - 1)]).view(2, -1)
    both = tm.count_bytes(rows, torch.tensor([stream[0], int(rows[0, -1])]), luts)
    assert both.shape == (2,)
    assert int(both.sum()) == int(tm.count_bytes(rows.flatten(), stream[0], luts))


def test_published_tokenizer_rule_for_a_space_after_a_boundary():
    """Where decoding drops the first space, the challenge's table drops it too."""
    luts = tm.ByteTables(
        base_bytes=torch.tensor([0, 3]),
        has_leading_space=torch.tensor([False, True]),
        is_boundary=torch.tensor([True, False]),
        keeps_space=False,
    )
    assert tm.count_bytes([1], 0, luts) == 3 and tm.count_bytes([1], 1, luts) == 4
    assert tm.count_bytes([1], 0, luts._replace(keeps_space=True)) == 4


@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shard(path, tokens):
    prepare_text.write_shard(path, np.array(tokens))
    return path


def test_shard_format_is_the_challenges(tmp_path):
    path = shard(tmp_path / "fineweb_train_000000.bin", [5, 6, 65535])
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert len(raw) == 1024 + 6 and header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u2").tolist() == [5, 6, 65535]
    mapped = tm.open_shard(path)
    assert isinstance(mapped, np.memmap) and mapped.tolist() == [5, 6, 65535]


def test_stream_is_a_ring_over_shards(tmp_path):
    shard(tmp_path / "fineweb_val_000001.bin", range(7, 10))
    shard(tmp_path / "fineweb_val_000000.bin", range(0, 7))
    stream = tm.TokenStream(tmp_path, "val")
    assert stream.total == 10 and stream.read(5, 4).tolist() == [5, 6, 7, 8]
    assert stream.read(8, 15).tolist() == [8, 9, *range(10), 0, 1, 2]
    assert stream.read(3, 20_000).tolist() == [i % 10 for i in range(3, 20_003)]  # many times round
    assert [stream.count_windows(length) for length in (3, 9, 10)] == [3, 1, 0]
    assert stream.windows([0, 2], 3).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert stream.windows([3], 3).tolist() == [[9, 0, 1, 2]]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-2], "truncated"),
        (lambda raw: raw + b"\0\0", "damaged"),
        (lambda raw: raw[:500], "bad header"),
        (lambda raw: b"\0" * 4 + raw[4:], "bad header"),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "bad header"),
        (lambda raw: b"", "bad header"),
        (lambda raw: raw[:8] + b"\xff" * 4 + raw[12:], "damaged"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    path = shard(tmp_path / "fineweb_train_000000.bin", range(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        tm.TokenStream(tmp_path, "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_found(tmp_path):
    shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 3])
    bad = shard(tmp_path / "fineweb_train_000001.bin", [1, 1024, 3])
    stream = tm.TokenStream(tmp_path, "train")
    stream.measure(1025)
    stream.measure(1024, first_tokens=3)  # a run that never gets there
    with pytest.raises(ValueError, match="holds token 1024, but VOCAB_SIZE=1024") as caught:
        stream.measure(1024)
    assert str(bad) in str(caught.value)


def test_prepared_data_is_deterministic_and_split_by_document(dataset, tmp_path):
    files = sorted(dataset.glob("doc*.txt"))
    prepare_tiny(files, tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len([path for path in made if path.suffix == ".bin"]) >= 3
    for path in made:
        if path.suffix in (".bin", ".model"):
            assert (tmp_path / path).read_bytes() == (dataset / path).read_bytes(), path
    sp = tm.load_tokenizer(str(dataset / "tokenizers/tiny_384_bpe.model"), 384)
    for split, chosen in (("val", files[:10]), ("train", files[10:])):
        stream = tm.TokenStream(dataset / "datasets/tiny_sp384", split)
        tokens = stream.read(0, stream.total).tolist()
        starts = [i for i, token in enumerate(tokens) if token == 1] + [len(tokens)]
        texts = [sp.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]
        assert texts == [path.read_text(encoding="utf-8") for path in chosen]


@pytest.fixture
def prepare(tool, tmp_path, monkeypatch):
    """Calls data/prepare_text.py in an empty folder; fails if it does not succeed or say `error`
    in one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, error=None):
        done = tool(prepare_text, *arguments)
        if error is None:
            assert done.returncode == 0 and done.stderr == "", done.stderr
        else:
            assert done.returncode == 2 and error in done.stderr, done.stderr
            assert done.stderr.startswith("prepare_text.py: error: ")
            assert done.stderr.count("\n") == 1
        assert not list(tmp_path.rglob(".prepare-*"))
        return done

    return call


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_lines(path, count, words=60):
    lines = [json.dumps({"text": text_of(i, words)}) + "\n" for i in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return lines


DEEP = '{"text": "two", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--source missing.txt", "missing.txt: no such file"),
        ("--source folder", "folder: is a folder; name the files in it"),
        (
            "--source good.txt folder/../good.txt",
            "--source names folder/../good.txt twice; name it once",
        ),
        ("--source bad.jsonl", 'bad.jsonl:2: not a JSON object with a "text" string'),
        ("--source list.jsonl", 'list.jsonl:1: not a JSON object with a "text" string'),
        ("--source number.jsonl", 'number.jsonl:1: not a JSON object with a "text" string'),
        ("--source deep.jsonl", 'deep.jsonl:2: not a JSON object with a "text" string'),
        ("--source half.jsonl", r"half.jsonl:2: its text holds \ud800, half a character; repair"),
        ("--source half.jsonl --tokenizer t.model", r"half.jsonl:2: its text holds \ud800"),
        ("--source latin.txt", "latin.txt: cannot be read as UTF-8 text: "),
        ("--source text.gz", "text.gz: cannot be read as UTF-8 text: Not a gzipped file"),
        ("--source text.xz", "text.xz: cannot be read as UTF-8 text: "),
        ("--source cut.gz", "cut.gz: cannot be read as UTF-8 text: Compressed file ended"),
        ("--source bad.gz", "bad.gz: cannot be read as UTF-8 text: Error -3"),
        ("--source empty.txt", "the train split is empty; give more text"),
        ("--source empty.txt --tokenizer t.model", "the train split is empty; give more text"),
        ("--source zeros.txt", "cannot be trained on this text: there is nothing in it"),
        ("--source good.txt --tokenizer good.txt", "good.txt: not a SentencePiece model"),
        ("--source good.txt --tokenizer empty.txt", "empty.txt: not a SentencePiece model"),
        ("--source good.txt --tokenizer folder", "folder: there is no such file"),
        ("--source good.txt --vocab-size 60000", "it has no more than 8"),
        ("--source good.txt --vocab-size 100", "it needs at least 2"),
        ("--source good.txt --vocab-size 0", "--vocab-size 0: a tokenizer has between 1 and"),
        ("--source good.txt --vocab-size -7", "--vocab-size -7: a tokenizer has between 1 and"),
        ("--source good.txt --vocab-size 65535", "--vocab-size 65535: a tokenizer has between"),
        ("--source good.txt --shard-tokens 0", "--shard-tokens 0: a shard has between 1 and"),
        ("--source good.txt --shard-tokens 2147483648", "--shard-tokens 2147483648: a shard has"),
        (f"--source good.txt --shard-tokens 1{'0' * 30}", "a shard has between 1 and 2147483647"),
        ("--source good.txt --val-docs 1", "the train split is empty"),
        ("--source good.txt --val-docs -1", "--val-docs -1 must not be negative"),
        ("--source good.txt --tokenizer t.model", "the val split is empty"),
        ("--source good.txt --val-fraction 0", "--val-fraction 0.0 lies not between 0 and 1"),
        ("--source good.txt --val-fraction 1", "--val-fraction 1.0 lies not between 0 and 1"),
        ("--source good.txt --val-fraction nan", "--val-fraction nan lies not between 0 and 1"),
        ("--source good.txt --name ../../evil", "--name '../../evil': no name of a data set"),
        ("--source good.txt --name a/b", "--name 'a/b': no name of a data set; letters, digits"),
        ("--source good.txt --name .x", "--name '.x': no name of a data set; letters, digits"),
        ("--source good.txt --name=", "--name '': no name of a data set"),
        (f"--source good.txt --name {'x' * 101}", "': no name of a data set; letters, digits"),
        ("--source .hidden", ".hidden: no data set can be called ''; give --name (letters"),
        ("--source good.txt --out good.txt", "good.txt/tokenizers: cannot be written: Not a"),
        ("--source good.txt --out good.txt/x", "cannot be written: Not a directory; give another"),
    ],
)
def test_prepare_explains_bad_input(dataset, prepare, tmp_path, arguments, message):
    first = '{"text": "one"}\n'
    packed = gzip.compress(text_of(0, 2000).encode())
    texts = {
        "good.txt": text_of(0, 2000),
        "bad.jsonl": first + '{"body": "two"}\n',
        "list.jsonl": "[1]\n",
        "number.jsonl": '{"text": 1}\n',
        "deep.jsonl": first + DEEP,
        "half.jsonl": first + '{"text": "a \\ud800 b"}\n',
        "text.gz": "plain",
        "text.xz": "plain",
        "empty.txt": "",
        "zeros.txt": "\0" * 5000,
        ".hidden": "text",
        "latin.txt": b"caf\xe9",
        "cut.gz": packed[:-20],
        "bad.gz": packed[:30] + bytes(200),
        "t.model": (dataset / "tokenizers/tiny_384_bpe.model").read_bytes(),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "folder").mkdir()
    out = [] if "--out" in arguments else ["--out", "out"]
    prepare(*arguments.split(), *out, error=message)
    assert not [path for path in contents(tmp_path) if path.suffix in (".bin", ".json")]
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bos_id=2, eos_id=1), "its <s> is token 2, but it has to be token 1; train it with"),
        (dict(bos_id=-1, eos_id=1), "its <s> is missing, but it has to be token 1"),
        (dict(bos_id=1, user_defined_symbols="<s>"), "its <s> is missing, but it"),
    ],
)
def test_a_tokenizer_with_another_s_is_refused(prepare, tmp_path, options, message):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text_of(0, 1000).split("\n")),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        pad_id=0,
        unk_id=3,
        minloglevel=2,
        **(dict(eos_id=2) | options),
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    write_lines(tmp_path / "a.jsonl", 4)
    prepare("--source", "a.jsonl", "--tokenizer", "t.model", "--out", "out", error=message)


def test_a_tokenizer_of_more_than_16_bits_is_refused(dataset, monkeypatch):
    monkeypatch.setattr(prepare_text, "LARGEST_VOCABULARY", 383)
    with pytest.raises(tm.InputError, match="has 384 pieces; give a tokenizer of at most 383"):
        prepare_text.load_tokenizer(dataset / "tokenizers/tiny_384_bpe.model")


def test_lines_that_are_too_long_for_sentencepiece_are_cut(tmp_path):
    longest = "ab " * 1397 + "a"  # 4192 bytes
    plain = f"one\n\n two \n{longest}\n"
    assert list(prepare_text.short_lines(plain)) == ["one", " two ", longest]
    texts = [
        longest + "b",
        "é" * 3000,
        "🙂" * 1048 + "b",
        " " * 5000,
        "🙂 🙂 " * 3000,
    ]
    for text in texts:
        parts = list(prepare_text.short_lines(text + "\nlast"))
        assert len(parts) > 2 and "".join(parts[:-1]) == text and parts[-1] == "last"
        assert all(0 < len(part.encode()) <= 4192 for part in parts)
        if text.strip(" ").count(" ") > 2:
            assert all(part.startswith(" ") for part in parts[1:-1])


def test_long_lines_train_a_tokenizer_and_short_ones_the_same_as_before(tmp_path, monkeypatch):
    path = tmp_path / "t.model"

    def trained(texts):
        prepare_text.train_tokenizer(texts, path, 384, "identity")
        return path.read_bytes()

    texts = [text_of(i, 300) for i in range(9)]
    long_line = " ".join(texts).replace("\n", " ")
    assert len(long_line.encode()) > 8000
    sp = sentencepiece.SentencePieceProcessor(model_proto=trained([long_line]))
    assert len(sp.encode(long_line)) < 0.6 * len(long_line)
    short = trained(texts)
    assert trained([*texts, long_line]) != short
    monkeypatch.setattr(prepare_text, "short_lines", lambda text: filter(None, text.split("\n")))
    assert trained(texts) == short == trained([*texts, long_line])


def test_verified_json_says_what_the_text_holds(dataset):
    files = sorted(dataset.glob("doc*.txt"))
    folder = dataset / "datasets/tiny_sp384"
    model = dataset / "tokenizers/tiny_384_bpe.model"
    verified = json.loads((folder / "verified.json").read_text())
    assert verified.keys() == {"tokenizer_sha256", "train", "val"}
    assert verified["tokenizer_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(str(model), 384), 384)
    paths = dict(data_path=str(folder), tokenizer_path=str(model))
    for split, chosen in (("val", files[:10]), ("train", files[10:])):
        assert verified[split]["documents"] == len(chosen)
        assert verified[split]["bytes"] == sum(path.stat().st_size for path in chosen)
        stream = tm.TokenStream(folder, split)
        stream.measure(384, luts=luts)
        assert verified[split] == stream.facts
        assert tm.check_verified(tiny_hp(**paths, vocab_size=384), stream, split)
    assert len(verified["train"]["shards"]) > 1
    for name, checksum in verified["train"]["shards"].items():
        assert checksum == zlib.crc32((folder / name).read_bytes()[1024:])


def test_verified_json_of_a_given_tokenizer(dataset, prepare, tmp_path):
    model = dataset / "tokenizers/tiny_384_bpe.model"
    write_lines(tmp_path / "a.jsonl", 9)
    prepare("--source", "a.jsonl", "--tokenizer", model, "--out", "out", "--val-docs", 2)
    assert not list((tmp_path / "out").rglob("*.model"))
    verified = json.loads((tmp_path / "out/datasets/a_sp384/verified.json").read_text())
    assert verified["tokenizer_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert verified["val"]["documents"] == 2 and verified["train"]["documents"] == 7


def test_prepare_reads_json_lines_packed_or_not_with_a_given_tokenizer(dataset, prepare, tmp_path):
    lines = "".join(json.dumps({"text": text_of(i, 50)}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    tokenizer = dataset / "tokenizers/tiny_384_bpe.model"
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz"):
        options = ["--name", name[0], "--out", tmp_path, "--val-fraction", "0.25"]
        done = prepare("--source", name, "--tokenizer", tokenizer, *options)
        assert "VOCAB_SIZE=384" in done.stdout and "verified" in done.stdout
    folders = [tmp_path / f"datasets/{name}_sp384" for name in "abc"]
    read = [(folder / "fineweb_train_000000.bin").read_bytes() for folder in folders]
    assert read[0] == read[1] == read[2]
    streams = [tm.TokenStream(tmp_path / "datasets/a_sp384", split) for split in ("train", "val")]
    docs = [int((stream.read(0, stream.total) == 1).sum()) for stream in streams]
    assert sum(docs) == 40 and 3 <= docs[1] <= 20  # a quarter of them by hash


@pytest.fixture
def made(prepare, tmp_path):
    """A data set, and the command that would replace it by another."""
    lines = write_lines(tmp_path / "a.jsonl", 20)
    line = "--source a.jsonl --out out --vocab-size 384 --val-docs 4".split()
    prepare(*line)
    (tmp_path / "a.jsonl").write_text("".join(lines[:9]), encoding="utf-8")
    return line


def test_a_failure_leaves_the_old_data_alone(made, prepare, tmp_path):
    """A bad last line ends in an error before a tokenizer or a shard is replaced."""
    out = tmp_path / "out"
    before = contents(out)
    assert len(before) == 4
    good = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(good + '{"body": "two"}\n')
    prepare(*made, error="a.jsonl:10: not a JSON object")
    assert contents(out) == before and len(list(out.iterdir())) == 2
    (tmp_path / "a.jsonl").write_text(good)
    prepare(*made)
    after = contents(out)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())
    mode = (out / "datasets/a_sp384").stat().st_mode
    assert mode == (out / "datasets").stat().st_mode  # not that of a temporary folder


def test_fewer_shards_leave_none_of_the_old_ones(made, prepare, tmp_path):
    folder = tmp_path / "out/datasets/a_sp384"
    prepare(*made, "--shard-tokens", 300)
    assert len(list(folder.iterdir())) > 5
    prepare(*made)
    assert len(list(folder.iterdir())) == 3


def test_signals_are_ignored_for_a_while_only():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with prepare_text.ignored(signal.SIGINT):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_old_data_alone(made, prepare, tmp_path, monkeypatch, number):
    before = contents(tmp_path / "out")
    write_verified = prepare_text.write_verified

    def interrupted(*arguments):
        write_verified(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(prepare_text, "write_verified", interrupted)
    handler = signal.signal(number, signal.default_int_handler)  # not the end of the tests
    try:
        prepare(*made, error="stopped by ")
    finally:
        signal.signal(number, handler)
    assert contents(tmp_path / "out") == before


def test_a_full_disk_leaves_the_old_data_alone(made, prepare, tmp_path):
    before = contents(tmp_path / "out")
    shutil.copy(next((tmp_path / "out").rglob("*.model")), "t.model")
    for given in ([], ["--tokenizer", "t.model"]):  # so that it is the tokenizer, or a shard
        with file_limit(2000):
            prepare(*made, *given, error="cannot be written: File too large")
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("failing", ["rename", "write_file"])
def test_a_failure_while_data_are_replaced(made, prepare, tmp_path, monkeypatch, failing):
    """There are never shards beside a tokenizer or shards of the other data set."""
    folder, model = tmp_path / "out/datasets/a_sp384", tmp_path / "out/tokenizers/a_384_bpe.model"
    before = contents(tmp_path / "out")
    rename, write_file, calls = os.rename, prepare_text.write_file, []

    def watched(name, action):
        def call(*arguments):
            place = Path(arguments[-1] if name == "rename" else arguments[0]).absolute()
            if place in (folder, model):
                calls.append(name)
                assert not folder.exists() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                if calls.count(name) == 1 and name == failing:
                    raise OSError(errno.EIO, "Input/output error", str(place))
            return action(*arguments)

        return call

    monkeypatch.setattr(os, "rename", watched("rename", rename))
    monkeypatch.setattr(prepare_text, "write_file", watched("write_file", write_file))
    handler = signal.getsignal(signal.SIGINT)
    prepare(*made, error="Input/output error")
    assert signal.getsignal(signal.SIGINT) == handler
    assert contents(tmp_path / "out") == before
    done, *undone = ["write_file", "rename"], "write_file", "rename"
    assert calls == done[: 1 + done.index(failing)] + undone


def test_nothing_is_replaced_that_the_program_did_not_make(made, prepare, tmp_path):
    folder = tmp_path / "out/datasets/a_sp384"
    for name in ("notes.txt", "fineweb_val_1.bin", "fineweb_val_000000.bin.old1", "x/y"):
        own = folder / name
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        before = contents(tmp_path / "out")
        own = own if own.parent == folder else own.parent
        prepare(*made, error=f"{own.name}: is not of this program; move it away, or give another")
        assert contents(tmp_path / "out") == before
        shutil.rmtree(own) if own.is_dir() else own.unlink()
    model = tmp_path / "out/tokenizers/b_384_bpe.model"
    model.mkdir()
    prepare(*made, "--name", "b", error="b_384_bpe.model: is a folder; move it away")
    (folder.parent / "c_sp384").write_text("mine")
    prepare(*made, "--name", "c", error="c_sp384: is not a folder; move it away")
    assert (folder.parent / "c_sp384").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        lambda verified: None,
        lambda verified: verified["train"].pop("documents"),  # of fetch_fineweb.py
        lambda verified: verified["val"]["shards"].clear(),
        lambda verified: verified.clear(),
    ],
    ids=["none", "fetched", "shards", "empty"],
)
def test_data_that_the_program_may_not_have_made_are_kept(made, prepare, tmp_path, change):
    out = tmp_path / "out"
    folder, model = out / "datasets/a_sp384", out / "tokenizers/a_384_bpe.model"
    shards, tokenizer = contents(folder), model.read_bytes()
    path = folder / "verified.json"
    verified = json.loads(path.read_text())
    if change(verified) is None and verified == json.loads(path.read_text()):
        path.unlink()
    else:
        path.write_text(json.dumps(verified))
    done = prepare(*made)
    assert "a_sp384: what was there is a_sp384.old1 now" in done.stdout
    kept = contents(folder.with_name("a_sp384.old1"))
    assert {p.name: data for p, data in kept.items() if p.suffix == ".bin"} == {
        p.name: data for p, data in shards.items() if p.suffix == ".bin"
    }
    assert model.with_name(f"{model.name}.old1").read_bytes() == tokenizer != model.read_bytes()
    prepare(*made)
    assert len(list(folder.parent.iterdir())) == len(list(model.parent.iterdir())) == 2


def test_a_tokenizer_of_another_data_set_is_kept(made, prepare, tmp_path):
    """For example that of FineWeb, where a text is called fineweb.txt."""
    model = tmp_path / "out/tokenizers/a_384_bpe.model"
    model.write_bytes(b"other")
    for number in (1, 2):
        done = prepare(*made)
        assert f"a_384_bpe.model: what was there is a_384_bpe.model.old{number} now" in done.stdout
        assert model.with_name(f"{model.name}.old{number}").read_bytes() == b"other"
        model.write_bytes(b"other")
    prepare(*made)
    shutil.rmtree(tmp_path / "out/datasets")
    there = set(contents(model.parent))
    prepare(*made)  # makes the same tokenizer again
    assert set(contents(model.parent)) == there and len(there) == 4
    assert len(list((tmp_path / "out/datasets").iterdir())) == 1


def test_a_link_to_another_disk_stays_a_link(made, prepare, tmp_path):
    link, disk = tmp_path / "out/datasets/a_sp384", tmp_path / "disk"
    disk.mkdir()
    before = contents(link)
    link.rename(disk / "text")
    link.symlink_to(disk / "text")
    done = prepare(*made)
    assert "DATA_PATH=out/datasets/a_sp384 " in done.stdout
    assert link.is_symlink() and [path.name for path in disk.iterdir()] == ["text"]
    assert len(contents(disk)) == 3 and not set(contents(disk).values()) & set(before.values())


def test_which_documents_are_validation_depends_on_their_hash():
    """So that figures of the same text, such as those of the records, stay comparable."""
    chosen = [n for n in range(40) if prepare_text.is_validation(n, f"text {n}", 0, 0.35)]
    assert chosen == [6, 7, 11, 12, 13, 14, 17, 19, 20, 21, 24, 26, 28, 30, 34, 39]
    first = [prepare_text.is_validation(n, "text", 2, 0.35) for n in range(4)]
    assert first == [True, True, False, False]


def test_a_tokenizer_is_trained_on_the_first_documents(tmp_path, monkeypatch):
    """So that memory does not grow with the text."""
    monkeypatch.setattr(prepare_text, "TOKENIZER_SAMPLE", 5000)
    texts = iter([text_of(i, 300) for i in range(20)])
    prepare_text.train_tokenizer(texts, tmp_path / "t.model", 384, "identity")
    assert 14 <= len(list(texts)) <= 17


def test_files_of_the_same_name_are_different_documents(dataset, prepare, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"text {folder}")
    model = dataset / "tokenizers/tiny_384_bpe.model"
    line = "--source a/x.txt b/x.txt --val-docs 1 --out out --tokenizer".split()
    prepare(*line, model)
    sp = tm.load_tokenizer(str(model), 384)
    for split, text in (("val", "text a"), ("train", "text b")):
        tokens = tm.TokenStream(tmp_path / "out/datasets/x_sp384", split).read(0, 99).tolist()
        assert sp.decode(tokens[1 : tokens.index(1, 1)]) == text


def test_more_shards_than_their_names_can_number(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "MOST_SHARDS", 2)
    writer = prepare_text.ShardWriter(tmp_path, "train", 3)
    writer.add(np.arange(6, dtype=np.uint16), 1)
    with pytest.raises(tm.InputError, match="--shard-tokens 3: more than 2 shards"):
        writer.add(np.arange(6, dtype=np.uint16), 1)


def encode_all(docs, sp, writer):
    """Encodes documents, which have to come back unchanged, into one split."""
    return prepare_text.encode(
        docs,
        sp,
        vocab_size=384,
        exact=True,
        choose=lambda number, text: writer,
        note=lambda number: None,
    )


def test_a_tokenizer_with_a_wrong_byte_table_is_refused(dataset, tmp_path, monkeypatch):
    sp = tm.load_tokenizer(str(dataset / "tokenizers/tiny_384_bpe.model"), 384)
    honest = prepare_text.build_sentencepiece_luts

    def wrong(sp, vocab_size):
        luts = honest(sp, vocab_size)
        luts.base_bytes[sp.encode("the")[-1]] += 1
        return luts

    monkeypatch.setattr(prepare_text, "build_sentencepiece_luts", wrong)
    writer = prepare_text.ShardWriter(tmp_path, "train", 1000)
    with pytest.raises(ValueError, match="so it is refused"):
        encode_all([text_of(0, 50)], sp, writer)


def test_documents_that_cannot_come_back_are_left_out(dataset, tmp_path):
    sp = tm.load_tokenizer(str(dataset / "tokenizers/tiny_384_bpe.model"), 384)
    writer = prepare_text.ShardWriter(tmp_path, "train", 1000)
    left_out = encode_all(["fine", "a literal \u2581 sign", ""], sp, writer)
    assert left_out == 2 and writer.docs == 1


def test_documentation_source_reads_docstrings_in_an_order_of_their_own(tmp_path):
    module_doc = '"""' + "Module text. " * 20 + '"""'
    function_doc = '"""' + "About f. " * 30 + '"""'
    (tmp_path / "m.py").write_text(f"{module_doc}\ndef f():\n    {function_doc}\n")
    text = prepare_text.module_text(tmp_path / "m.py")
    assert text.startswith("Module text.") and "\n\nAbout f." in text
    (tmp_path / "broken.py").write_text("def (")
    assert prepare_text.module_text(tmp_path / "broken.py") == ""
    files = prepare_text.package_files(["sentencepiece"])
    assert any("sentencepiece" in path.parts for path in files)
    assert not any("tests" in path.parts for path in files)


def test_documentation_is_sorted_by_hash_and_counted_once(tmp_path, monkeypatch):
    names = ["a", "b", "c", "d", "same"]
    for name in names:
        doc = f'"""Text of {name}. {"More. " * 40}"""'
        (tmp_path / f"{name}.py").write_text(doc)
    shutil.copy(tmp_path / "same.py", tmp_path / "again.py")
    (tmp_path / "without.py").write_text("x = 1")
    threads = SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    monkeypatch.setattr(prepare_text.multiprocessing, "get_context", lambda method: threads)
    fractions = []
    texts = []
    for order in (False, True):
        files = sorted(tmp_path.glob("*.py"), reverse=order)
        monkeypatch.setattr(prepare_text, "package_files", lambda packages, files=files: files)
        texts.append(prepare_text.docs_of_packages([], fractions.append))
    assert texts[0] == texts[1] and len(texts[0]) == len(names)
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts[0]]
    assert hashes == sorted(hashes) and fractions[-1] == 1


def test_the_windows_of_a_step_are_contiguous(tmp_path):
    """Else their pinned copy is not, and goes to a GPU by way of memory that is not pinned."""
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(100) % 7)
    rows = tm.TokenStream(tmp_path, "train").windows(range(3, 8), 9)
    assert rows.is_contiguous() and rows[1].tolist() == [i % 7 for i in range(36, 46)]


@pytest.mark.parametrize("steps", [7, 100])
def test_shuffled_windows_are_all_over_the_text_and_each_once_an_epoch(tmp_path, steps):
    """Of the text that the run reaches: 28 windows of 9 tokens, or all 111."""
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(1000))
    stream = tm.TokenStream(tmp_path, "train")
    hp = tiny_hp(train_seq_len=9, train_batch_tokens=4 * 9, iterations=steps, shuffle=True)
    count = min(4 * steps, 111)
    for epoch in range(2):
        numbers = range(epoch * count, (epoch + 1) * count)
        assert sorted(tm.scattered(hp, stream, numbers)) == list(range(count))
    for first in range(count):
        some = sorted(tm.scattered(hp, stream, range(first, first + 8)))
        gaps = [later - sooner for sooner, later in itertools.pairwise([*some, some[0] + count])]
        assert max(gaps) <= 2 * count / 8 + 1  # evenly spaced: count / 8


def test_shuffled_windows_of_a_short_text_are_its_only_one(tmp_path):
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(5))
    hp = tiny_hp(train_seq_len=9, train_batch_tokens=4 * 9, shuffle=True)
    stream = tm.TokenStream(tmp_path, "train")
    assert tm.scattered(hp, stream, range(3, 7)) == [0] * 4


@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_a_shuffled_batch_has_the_shuffled_windows(tmp_path, objective):
    """Whoever makes which part of it; documents have an order of their own."""
    prepare_text.write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(1000) % 50)
    stream = tm.TokenStream(tmp_path, "train")
    hp = tiny_hp(
        train_seq_len=8, train_batch_tokens=4 * 8, shuffle=True, objective=objective, neighbors=0
    )
    cpu = torch.device("cpu")
    rows = [tm.training_batch(hp, stream, 5, part, 16, cpu) for part in (range(2), range(2, 4))]
    z = torch.cat([batch.z for batch in rows])
    window = stream.windows(tm.scattered(hp, stream, range(20, 24)), 8)
    x0 = window[:, :-1] if objective == "ar" else window[:, 1:]
    seen = z != hp.mask_id
    assert torch.equal(z[seen], x0[seen]) and seen.any()
    assert not torch.equal(x0, stream.windows(range(20, 24), 8)[:, : x0.shape[1]])
    if objective == "mdlm":
        hp = dataclasses.replace(hp, doc_chunks=True)
        documents = tm.DocumentStream(dataclasses.replace(hp, data_path=str(tmp_path)))
        z = tm.training_batch(hp, documents, 5, range(4), 32, cpu).z
        chunks = documents.windows(range(20, 24), 8)[:, 1:]
        assert torch.equal(torch.where(z == hp.mask_id, chunks, z), chunks)
