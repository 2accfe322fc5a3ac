"""Shards, byte counts and data/prepare_text.py."""

import gzip
import itertools
import json
import lzma

import numpy as np
import prepare_text
import pytest
import torch
from conftest import prepare_tiny, run_python, text_of

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


def test_prepare_reads_json_lines_packed_or_not_with_a_given_tokenizer(dataset, tmp_path):
    lines = "".join(json.dumps({"text": text_of(i, 50)}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    tokenizer = dataset / "tokenizers/tiny_384_bpe.model"
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz"):
        options = ["--name", name[0], "--out", tmp_path, "--val-fraction", "0.25"]
        line = ["data/prepare_text.py", "--source", tmp_path / name, "--tokenizer", tokenizer]
        done = run_python(*line, *options, cwd=tmp_path)
        assert "VOCAB_SIZE=384" in done.stdout and "verified" in done.stdout
    folders = [tmp_path / f"datasets/{name}_sp384" for name in "abc"]
    read = [(folder / "fineweb_train_000000.bin").read_bytes() for folder in folders]
    assert read[0] == read[1] == read[2]
    streams = [tm.TokenStream(tmp_path / "datasets/a_sp384", split) for split in ("train", "val")]
    docs = [int((stream.read(0, stream.total) == 1).sum()) for stream in streams]
    assert sum(docs) == 40 and 3 <= docs[1] <= 20  # a quarter of them by hash


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--source", "missing.txt"], "no such file"),
        (["--source", "bad.jsonl"], 'bad.jsonl:2: not a JSON object with a "text" string'),
        (["--source", "latin.txt"], "cannot be read as UTF-8"),
        (["--source", "good.txt", "--tokenizer", "good.txt"], "not a SentencePiece model"),
        (["--source", "good.txt", "--vocab-size", "60000"], "cannot be trained"),
        (["--source", "good.txt", "--val-docs", "1"], "the train split is empty"),
        (["--source", "good.txt", "--val-fraction", "0"], "between 0 and 1"),
    ],
)
def test_prepare_explains_bad_input(tmp_path, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text(text_of(0, 2000), encoding="utf-8")
    line = ["data/prepare_text.py", *arguments, "--out", tmp_path / "out"]
    done = run_python(*line, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_failure_leaves_the_old_data_alone(tmp_path):
    """A bad last line ends in an error before a tokenizer or a shard is replaced."""
    lines = [json.dumps({"text": text_of(i, 60)}) + "\n" for i in range(20)]
    source = tmp_path / "a.jsonl"
    out = tmp_path / "out"
    line = ["data/prepare_text.py", "--source", source, "--out", out, "--vocab-size", "384"]
    line += ["--val-docs", "4"]

    def contents():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    source.write_text("".join(lines), encoding="utf-8")
    run_python(*line, cwd=tmp_path)
    before = contents()
    assert len(before) == 3
    source.write_text("".join(lines[:9]) + '{"body": "two"}\n', encoding="utf-8")
    done = run_python(*line, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "a.jsonl:10: not a JSON object" in done.stderr
    assert contents() == before and len(list(out.iterdir())) == 2
    source.write_text("".join(lines[:9]), encoding="utf-8")
    run_python(*line, cwd=tmp_path)
    assert contents().keys() == before.keys() and contents() != before


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
