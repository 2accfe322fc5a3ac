"""The same documents under tokenizers of different sizes: the same bytes, splits and documents."""

import json
import re

import numpy as np
import prepare_text
import pytest
import sentencepiece
from conftest import text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import AWKWARD

import train_mdlm as tm

SIZES = (340, 500, 800)  # pieces
SPACE_SIGN = "\u2581"  # SentencePiece's sign for a space; text that has it does not come back
LEARNED = " 1234 5678 日本語 ½ ﬁ “quoted”  two spaces\n\n\tindented"  # in every training text
NORMALIZATIONS = ("identity", "nmt_nfkc")
HARD = [
    *AWKWARD,
    "2026-11-26 00:46 3.14159",
    "no letter that was seen in training: ŵ ꙮ ᚠ 𒀀",
    "\n\n\nempty lines\n\n",
    "日本語 and  1234",
    "<s> </s> <unk> <0x41>",
    "tab\t\tspace \t mixed",
    "\u3000ideographic\u3000space",
    "\0",
]
PARTS = [*HARD, SPACE_SIGN, *" \n\t", "  ", "the", " the", "12", "日本", "🙂", "\u0301", "\u200b"]


class Vocabularies:
    """Tokenizers of all sizes, trained on the same text with the same normalisation."""

    def __init__(self, folder, normalization):
        exact = normalization == "identity"
        self.normalizer = sentencepiece.SentencePieceNormalizer(
            rule_name=normalization,
            add_dummy_prefix=False,
            escape_whitespaces=False,
            remove_extra_whitespaces=not exact,
        )
        self.tokenizers = {}
        for size in SIZES:
            path = folder / f"{size}.model"
            texts = [text_of(i, 300) + LEARNED for i in range(20)]
            prepare_text.train_tokenizer(texts, path, size, normalization)
            sp = tm.load_tokenizer(str(path), size)
            self.tokenizers[size] = sp, tm.build_sentencepiece_luts(sp, size)

    def bytes_of(self, text):
        """What each of them counts in a text."""
        return [
            int(tm.count_bytes(sp.encode(text), tm.BOS_ID, luts))
            for sp, luts in self.tokenizers.values()
        ]

    def decoded(self, text):
        """What comes back from each of them."""
        return [sp.decode(sp.encode(text)) for sp, _ in self.tokenizers.values()]

    def normalized(self, text):
        """By SentencePiece's normaliser alone, without any tokenizer."""
        return self.normalizer.normalize(text)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    return {name: Vocabularies(folder, name) for name in NORMALIZATIONS}


def test_the_tokenizers_do_split_differently(vocabularies):
    """So that equal bytes below say something: fewer tokens, other pieces, bytes alone."""
    for some in vocabularies.values():
        lengths = [len(sp.encode(text_of(99, 300))) for sp, _ in some.tokenizers.values()]
        assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 0.7 * lengths[0]
        for sp, _ in some.tokenizers.values():
            assert any(sp.is_byte(token) for token in sp.encode("ŵ ꙮ"))
            assert not any(sp.is_byte(token) for token in sp.encode("日本語"))
    keeps_space = {
        name: {luts.keeps_space for _, luts in some.tokenizers.values()}
        for name, some in vocabularies.items()
    }
    assert keeps_space == {"identity": {True}, "nmt_nfkc": {False}}


@pytest.mark.parametrize("text", HARD)
def test_hard_text_has_the_same_bytes_in_every_vocabulary(vocabularies, text):
    for some in vocabularies.values():
        expected = some.normalized(text)
        assert some.decoded(text) == [expected] * len(SIZES)
        assert some.bytes_of(text) == [len(expected.encode())] * len(SIZES)
    assert vocabularies["identity"].normalized(text) == text


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=6)), max_size=12),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_any_text_has_the_same_bytes_in_every_vocabulary(vocabularies, parts, normalization):
    some = vocabularies[normalization]
    text = "".join(parts)
    expected = some.normalized(text).replace(SPACE_SIGN, " ")
    assert some.decoded(text) == [expected] * len(SIZES)
    assert some.bytes_of(text) == [len(expected.encode())] * len(SIZES)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    texts=st.lists(st.sampled_from(HARD), min_size=1, max_size=8),
    cut=st.floats(0, 1),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_a_stream_of_documents_has_the_same_bytes_in_every_vocabulary(
    vocabularies, texts, cut, normalization
):
    """Whole or in two windows: <s> carries none, and a window's first token has one before it."""
    some = vocabularies[normalization]
    expected = sum(len(some.normalized(text).encode()) for text in texts)
    for sp, luts in some.tokenizers.values():
        stream = [token for text in texts for token in [tm.BOS_ID, *sp.encode(text)]]
        place = 1 + int(cut * (len(stream) - 1))
        left = int(tm.count_bytes(stream[1:place], stream[0], luts))
        right = int(tm.count_bytes(stream[place:], stream[place - 1], luts))
        assert left + right == int(tm.count_bytes(stream[1:], stream[0], luts)) == expected


# ---- data/prepare_text.py


def write_source(path):
    """Documents as lines; the last one does not come back from an exact tokenizer."""
    texts = [text_of(i, 80) + LEARNED for i in range(120)] + HARD + [f"a {SPACE_SIGN} sign"]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return texts


def documents_of(folder, model, size, split):
    """The decoded documents of a split."""
    sp = tm.load_tokenizer(str(model), size)
    stream = tm.TokenStream(folder, split)
    tokens = stream.read(0, stream.total)
    parts = np.split(tokens, np.flatnonzero(tokens == tm.BOS_ID))
    return [sp.decode(part[1:].tolist()) for part in parts[1:]]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_prepared_splits_are_the_same_in_every_vocabulary(
    tool, tmp_path, monkeypatch, normalization
):
    monkeypatch.chdir(tmp_path)
    texts = write_source(tmp_path / "a.jsonl")
    line = ["--source", "a.jsonl", "--out", "out", "--val-fraction", "0.3"]
    line += ["--normalization", normalization]
    verified, documents = [], []
    for size in SIZES[1:]:
        done = tool(prepare_text, *line, "--vocab-size", size)
        assert done.returncode == 0, done.stderr
        folder, model = f"out/datasets/a_sp{size}", f"out/tokenizers/a_{size}_bpe.model"
        variables = f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={size}"
        assert done.stdout.splitlines()[-1] == variables
        verified.append(json.loads((tmp_path / folder / "verified.json").read_text()))
        documents.append(
            {split: documents_of(folder, model, size, split) for split in ("train", "val")}
        )
    assert documents[0] == documents[1]
    for split in ("train", "val"):
        found = documents[0][split]
        facts = [{key: facts[split][key] for key in ("documents", "bytes")} for facts in verified]
        nbytes = sum(len(text.encode()) for text in found)
        assert facts == [dict(documents=len(found), bytes=nbytes)] * 2
        assert verified[0][split]["tokens"] > 1.1 * verified[1][split]["tokens"]
        if normalization == "identity":
            chosen = [
                text
                for number, text in enumerate(texts[:-1])
                if prepare_text.is_validation(number, text, 0, 0.3) == (split == "val")
            ]
            assert found == chosen


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_vocabulary_that_is_too_large_is_told_the_largest_that_works(tmp_path, normalization):
    texts = [text_of(i, 100) for i in range(5)]
    path = tmp_path / "t.model"

    def train(size):
        prepare_text.train_tokenizer(texts, path, size, normalization)

    with pytest.raises(tm.InputError, match="4096 pieces cannot be trained on this text") as caught:
        train(4096)
    remedy = r"it has no more than (\d+); give --vocab-size (\d+) or less, or more text"
    most, given_most = map(int, re.search(remedy, str(caught.value)).groups())
    assert most == given_most and "\n" not in str(caught.value)
    train(most)
    assert prepare_text.load_tokenizer(path).vocab_size() == most
    with pytest.raises(tm.InputError, match=f"no more than {most};"):
        train(most + 1)
