"""tools/codec.py: any text there and back, at the size that the score predicts."""

import hashlib
import math

import codec
import numpy as np
import prepare_text
import pytest
import torch
from conftest import WORDS, random_model, run_python, text_of, tiny_hp
from hypothesis import given, settings
from hypothesis import strategies as st

import train_mdlm as tm

LONG = text_of(5, 120)
UNUSUAL = ["\u2581", "\0", "\r\n", "  ", "<s>", "🙂"]


def artifact_of(folder, name, tokenizer, **overrides):
    """A random model for the tokenizer, with windows of 16 tokens, as a file."""
    hp = tm.Hyperparameters(
        vocab_size=384,
        tokenizer_path=tokenizer,
        train_seq_len=16,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        compute_dtype="float32",
        **overrides,
    )
    path = folder / f"{name}.mdlm"
    tm.save_artifact(random_model(hp, scale=0.3), hp, path)
    return path


@pytest.fixture(scope="module")
def files(tiny_env, tmp_path_factory):
    """Artifacts of models of all kinds, and their tokenizer."""
    folder = tmp_path_factory.mktemp("codec")
    tokenizer = tiny_env["TOKENIZER_PATH"]
    return dict(
        folder=folder,
        tokenizer=tokenizer,
        mdlm=artifact_of(folder, "mdlm", tokenizer),
        ar=artifact_of(folder, "ar", tokenizer, objective="ar"),
        eos=artifact_of(folder, "eos", tokenizer, backbone="dit", doc_chunks=True, anchor_bos=True),
        block=artifact_of(folder, "block", tokenizer, block_size=4, neighbors=2),
    )


@pytest.fixture(scope="module")
def loaded(files):
    names = ("mdlm", "ar", "eos", "block")
    return {name: codec.load(files[name], files["tokenizer"]) for name in names}


def there_and_back(loaded, text, order="l2r", group=1, seed=0):
    data, bits, count = codec.compress(text, loaded, order, group, seed, "cpu")
    assert codec.decompress(data, loaded, "file") == text
    return data, bits, count


def given_to(command, *arguments, files, artifact="mdlm"):
    """The command line of codec.py."""
    return [command, *arguments, "--artifact", files[artifact], "--tokenizer", files["tokenizer"]]


# ---- lossless


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    text=st.text(max_size=60),
    order=st.sampled_from(codec.ORDERS[:3]),
    group=st.integers(1, 20),
    seed=st.integers(0, 2**40),
)
def test_arbitrary_text_comes_back(loaded, text, order, group, seed):
    there_and_back(loaded["mdlm"], text, order, group, seed)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(words=st.lists(st.sampled_from([*WORDS, *UNUSUAL]), max_size=40))
def test_a_causal_model_codes_too(loaded, words):
    there_and_back(loaded["ar"], " ".join(words))


@pytest.mark.parametrize(
    "order, group", [("l2r", 1), ("confidence", 1), ("confidence", 3), ("random", 5)]
)
def test_a_model_that_is_told_the_noise_level_codes_too(loaded, order, group):
    """With anchors, which a text has none of: nothing is paid for their places."""
    data, bits, count = there_and_back(loaded["eos"], LONG, order, group)
    assert 0 <= 8 * len(data) - bits < 8 * 64
    if order == "l2r":
        tokens = torch.tensor(loaded["eos"].tokenizer.encode(LONG))
        windows = [part[None] for part in tokens.split(16)]
        model = loaded["eos"].model
        nats = sum(tm.chain_rule(model, window, order).sum().item() for window in windows)
        assert bits == pytest.approx(nats / math.log(2), rel=1e-4)


def text_of_tokens(sp, count):
    """Of that many tokens, which the tokenizer would also choose for it."""
    tokens = sp.encode(text_of(1, 400))
    while True:
        text = sp.decode(tokens[:count])
        if len(sp.encode(text)) == count:
            return text
        tokens = tokens[1:]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 16 * 17 + 3])
@pytest.mark.parametrize("order, group", [("l2r", 1), ("confidence", 3), ("random", 16)])
def test_every_number_of_tokens(loaded, count, order, group):
    """Empty, shorter than a window, exact windows, more windows than a batch holds, and a rest."""
    text = text_of_tokens(loaded["mdlm"].tokenizer, count)
    assert there_and_back(loaded["mdlm"], text, order, group)[2] == count
    assert there_and_back(loaded["block"], text, order, group)[2] == count


def test_a_lossy_tokenizer_is_noticed(files, tmp_path, tool):
    path = tmp_path / "nfkc.model"
    prepare_text.train_tokenizer([text_of(i, 300) for i in range(40)], path, 384, "nmt_nfkc")
    artifact = artifact_of(tmp_path, "nfkc", str(path))
    source = tmp_path / "in.txt"
    out = tmp_path / "out"
    back = tmp_path / "back.txt"
    source.write_text("two  spaces and ① ligature ﬁ", encoding="utf-8")
    arguments = ["--artifact", artifact, "--tokenizer", path]
    done = tool(codec, "compress", source, out, *arguments)
    assert done.returncode == 2 and "--normalized" in done.stderr and not out.exists()
    assert tool(codec, "compress", source, out, *arguments, "--normalized").returncode == 0
    assert tool(codec, "decompress", out, back, *arguments).returncode == 0
    assert back.read_text(encoding="utf-8") == "two spaces and 1 ligature fi"


# ---- the size is the score


def score_bits(model, tokens, order, group, seed):
    """Bits of the chain rule for tokens (n,), in windows of 16, each after <s>."""
    nats = 0.0
    for number, window in enumerate(tokens.split(16)):
        window_order = order
        if order == "random":
            generator = tm.seeded("cpu", seed, "codec", number)
            window_order = torch.randperm(len(window), generator=generator)
        nats += tm.chain_rule(model, window[None], window_order, group).sum().item()
    return nats / math.log(2)


@pytest.mark.parametrize(
    "order, group", [("l2r", 1), ("random", 1), ("confidence", 1), ("confidence", 5)]
)
def test_size_is_what_the_score_predicts(loaded, order, group):
    model = loaded["mdlm"].model
    data, bits, count = there_and_back(loaded["mdlm"], LONG, order, group, seed=3)
    assert abs(len(data) - bits / 8) < 0.005 * bits / 8 + 64
    tokens = torch.tensor(loaded["mdlm"].tokenizer.encode(LONG))
    assert len(tokens) == count
    assert bits == pytest.approx(score_bits(model, tokens, order, group, seed=3), rel=1e-5)


@pytest.mark.parametrize(
    "order, group", [("l2r", 1), ("l2r", 3), ("random", 1), ("confidence", 1), ("confidence", 2)]
)
def test_blocks_are_coded_at_the_size_that_their_score_predicts(loaded, order, group):
    """After <s>, in every window anew; a rest of whole blocks too."""
    text = text_of_tokens(loaded["block"].tokenizer, 16 * 17 + 8)
    data, bits, _ = there_and_back(loaded["block"], text, order, group, seed=3)
    assert abs(len(data) - bits / 8) < 0.005 * bits / 8 + 64
    tokens = torch.tensor(loaded["block"].tokenizer.encode(text))
    expected = score_bits(loaded["block"].model, tokens, order, group, seed=3)
    assert bits == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, order", [("ar", "ar"), ("block", "l2r"), ("block", "ar")])
def test_a_model_that_keeps_what_it_read_agrees_on_any_number_of_threads(loaded, name, order):
    text, before = text_of_tokens(loaded[name].tokenizer, 16 * 40 + 3), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(codec.compress(text, loaded[name], order, 1, 0, "cpu")[:2])
        torch.set_num_threads(2)
        assert codec.decompress(made[0][0], loaded[name], "file") == text
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


@pytest.mark.parametrize("name, order", [("ar", "l2r"), ("ar", "ar"), ("block", "ar")])
def test_a_causal_code_has_the_size_of_its_score(loaded, name, order):
    data, bits, _ = there_and_back(loaded[name], LONG, order)
    tokens = torch.tensor(loaded[name].tokenizer.encode(LONG))
    model = loaded[name].model
    windows = [tm.with_before(window[None]) for window in tokens.split(16)]
    nats = sum(tm.causal_nll(model, window).sum().item() for window in windows)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert abs(len(data) - bits / 8) < 0.005 * bits / 8 + 64


@pytest.mark.parametrize(
    "name, group, order",
    [("mdlm", 1, "l2r"), ("ar", 1, "ar"), ("block", 1, "ar"), ("block", 2, "l2r")],
)
def test_the_usual_order_is_causal_where_a_model_has_such_a_code(
    files, tmp_path, tool, name, group, order
):
    source = tmp_path / "in.txt"
    source.write_text("A short text.", encoding="utf-8")
    line = ["compress", source, tmp_path / "o", "--group", str(group)]
    done = tool(codec, *given_to(*line, files=files, artifact=name))
    assert done.returncode == 0 and f"(order {order}, group {group})" in done.stdout


def test_header_is_small(loaded):
    assert len(there_and_back(loaded["mdlm"], "")[0]) < 50


# ---- bit for bit, and errors


def test_any_number_of_threads_agrees(files, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text(LONG * 3, encoding="utf-8")
    made = []
    for threads in ("1", "3"):
        out = tmp_path / f"out{threads}"
        line = given_to("compress", source, out, "--order", "confidence", files=files)
        done = run_python("tools/codec.py", *line, cwd=tmp_path, OMP_NUM_THREADS=threads)
        assert "predicted by the score" in done.stdout and "zstd" in done.stdout
        made.append(out.read_bytes())
    assert made[0] == made[1]
    back = tmp_path / "back.txt"
    line = given_to("decompress", out, back, files=files)
    run_python("tools/codec.py", *line, cwd=tmp_path, OMP_NUM_THREADS="2")
    assert back.read_bytes() == source.read_bytes()


def test_what_cannot_be_decoded_is_said_in_one_line(files, tmp_path, tool):
    source = tmp_path / "in.txt"
    out = tmp_path / "out"
    back = tmp_path / "back"
    source.write_text(LONG[:300], encoding="utf-8")
    assert tool(codec, *given_to("compress", source, out, files=files)).returncode == 0
    good = out.read_bytes()
    damaged = "damaged or truncated"
    foreign = "not a file that this version of codec.py"
    for content, message in [
        (good[:-1], damaged),
        (good + b"\0", damaged),
        (good[:40], damaged),
        (good[:30] + b"x" + good[31:], damaged),
        (good[:4], damaged),
        (b"", foreign),
        (b"hello, world", foreign),
        (source.read_bytes(), foreign),
    ]:
        out.write_bytes(content)
        done = tool(codec, *given_to("decompress", out, back, files=files))
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    out.write_bytes(good)
    for arguments, artifact, message in [
        (("decompress", out, back), "ar", "another artifact"),
        (("decompress", tmp_path / "absent", back), "mdlm", "cannot be read"),
        (("compress", tmp_path, out), "mdlm", "cannot be read"),
        (("compress", source, tmp_path / "no/such/folder"), "mdlm", "cannot be written"),
        (("compress", source, back, "--order", "random"), "ar", "--order random --group 1"),
        (("compress", source, back, "--order", "ar"), "mdlm", "this model has no causal half"),
        (("compress", source, back, "--order", "ar", "--group", "2"), "block", "use --group 1 or"),
        (("compress", source, back, "--group", "0"), "mdlm", "not a whole number from 1 on"),
    ]:
        done = tool(codec, *given_to(*arguments, files=files, artifact=artifact))
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not back.exists() and not list(tmp_path.glob("*.part")) and out.read_bytes() == good


@pytest.mark.parametrize("replaced", ["input", "artifact", "tokenizer"])
def test_what_a_command_reads_is_not_replaced(files, tmp_path, tool, replaced):
    paths = {name: tmp_path / name for name in ("input", "artifact", "tokenizer")}
    for path in paths.values():
        path.write_text("something")
    line = ["compress", paths["input"], tmp_path / "sub/.." / replaced]
    (tmp_path / "sub").mkdir()
    options = ["--artifact", paths["artifact"], "--tokenizer", paths["tokenizer"]]
    done = tool(codec, *line, *options)
    assert done.returncode == 2 and "is read by this command; choose another name" in done.stderr
    assert all(path.read_text() == "something" for path in paths.values())


def test_only_files_of_codec_are_replaced(files, tmp_path, tool):
    source = tmp_path / "in.txt"
    out = tmp_path / "out"
    source.write_text("A short text.", encoding="utf-8")
    out.write_text("mine")
    done = tool(codec, *given_to("compress", source, out, files=files))
    assert done.returncode == 2 and "out: is there already" in done.stderr
    assert out.read_text() == "mine"
    out.unlink()
    for _ in range(2):  # it made the first one
        assert tool(codec, *given_to("compress", source, out, files=files)).returncode == 0
    back = tmp_path / "back"
    assert tool(codec, *given_to("decompress", out, back, files=files)).returncode == 0
    done = tool(codec, *given_to("decompress", out, back, files=files))  # a text may be anybody's
    assert done.returncode == 2 and "back: is there already" in done.stderr


def test_text_that_is_not_utf8_is_refused(files, tmp_path, tool):
    source = tmp_path / "in.bin"
    out = tmp_path / "out"
    source.write_bytes(b"caf\xe9")
    done = tool(codec, *given_to("compress", source, out, files=files))
    assert done.returncode == 2 and "not UTF-8 text (byte 3)" in done.stderr and not out.exists()


def test_every_damaged_byte_is_found(loaded):
    data = there_and_back(loaded["mdlm"], LONG[:200])[0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        at = int(rng.integers(len(data)))
        flip = int(rng.integers(1, 256))
        bad = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        with pytest.raises(ValueError, match="file: "):
            codec.decompress(bad, loaded["mdlm"], "file")


def test_a_hostile_header_is_a_clear_error(loaded):
    """With the checksum made right again: absurd counts, orders and lengths end in one line too."""
    data, _, _ = there_and_back(loaded["mdlm"], LONG[:200])
    head = codec.BODY + codec.FIELDS.size

    def sealed(rest):
        return codec.MAGIC + codec.digest(rest) + rest

    hostile = [
        sealed(data[12 : head - 2] + b"\x09" + data[head - 1 :]),  # no such order
        sealed(data[12:head] + b"\xff" * 12),  # an endless number
        sealed(data[12:head] + b"\0\0\x05" + data[-8:]),  # groups of nothing
        sealed(data[12:head] + b"\x01\0" + codec.varint(2**60) + data[-8:]),  # an exabyte of text
        sealed(data[12:] + b"x"),  # not whole words
    ]
    for content in hostile:
        with pytest.raises(ValueError, match="file: "):
            codec.decompress(content, loaded["mdlm"], "file")


HEAD = codec.BODY + codec.FIELDS.size  # where the numbers begin


def resealed(rest):
    return codec.MAGIC + codec.digest(rest) + rest


@pytest.mark.parametrize(
    "order, claim", [("l2r", 1_000_000), ("confidence", 20_000), ("random", 400_000_000)]
)
def test_a_claim_of_many_tokens_is_soon_found_out(loaded, monkeypatch, order, claim):
    """After some model calls, whatever the code is: nothing, zeros, or that of another text."""
    data, _, _ = there_and_back(loaded["mdlm"], LONG, order)
    *_, begin = codec.read_numbers(data, 384)
    calls = []
    predict = codec.predict
    monkeypatch.setattr(codec, "predict", lambda steps: calls.append(0) or predict(steps))
    for code in (b"", b"\0" * 80, data[begin:], b"\0" * 800):
        calls.clear()
        numbers = codec.varint(1) + codec.varint(0) + codec.varint(claim)
        file = resealed(data[codec.BODY : HEAD] + numbers + code)
        with pytest.raises(tm.InputError) as caught:
            codec.decompress(file, loaded["mdlm"], "file")
        message = str(caught.value)
        assert message.startswith(
            f"file: the code ends before the {claim:,} tokens of the header"
        ) or (message.startswith("file: the header makes no sense"))
        tokens = 8 * len(code) + codec.SPARE_BITS  # if each took a bit, and most take many
        assert len(calls) <= tokens / codec.BATCH + codec.CALLS_AHEAD + 2


def test_damage_under_a_checksum_that_is_right_is_one_line(loaded):
    """Bits flipped in numbers and code, code cut off or exchanged: the text, or one line."""
    text = LONG[:300]
    rng = np.random.default_rng(0)
    data, _, _ = there_and_back(loaded["mdlm"], text, "confidence", 2)
    *_, begin = codec.read_numbers(data, 384)
    refused = 0
    for trial in range(90):
        rest = bytearray(data[codec.BODY :])
        if trial % 3 == 0:
            at = int(rng.integers(HEAD - 2, len(data))) - codec.BODY
            rest[at] ^= 1 << int(rng.integers(8))
        elif trial % 3 == 1:
            del rest[begin - codec.BODY + 4 * int(rng.integers(0, (len(data) - begin) // 4)) :]
        else:
            rest[begin - codec.BODY :] = rng.bytes(4 * int(rng.integers(300)))
        try:
            assert codec.decompress(resealed(bytes(rest)), loaded["mdlm"], "file") == text
        except tm.InputError as error:
            assert str(error).startswith("file: ")
            refused += 1
    assert refused > 80


def test_a_text_that_costs_next_to_nothing_is_no_false_alarm(files, tmp_path, monkeypatch):
    """A model that is sure: thousands of tokens in a few bytes, and no bit counted too much."""
    loaded = codec.load(files["mdlm"], files["tokenizer"])
    the = loaded.tokenizer.encode("the the")[-1]
    text = loaded.tokenizer.decode([the] * 5_000)
    model = loaded.model
    sure = torch.full((model.hp.vocab_size,), -30.0)
    sure[the] = 30.0
    monkeypatch.setattr(model, "head", lambda hidden: sure.expand(len(hidden), -1))
    data, bits, count = codec.compress(text, loaded, "l2r", 1, 0, "cpu")
    assert count >= 5_000 and len(data) < 60
    assert codec.decompress(data, loaded, "file") == text


def test_what_is_all_but_impossible_is_no_false_alarm():
    """The coder gives every token 2^-24 at least, so it needs fewer bits than the model says."""
    coding = codec.common.require("constriction").stream
    logp = np.log(np.array([[1.0, 1e-9, 1e-12]], np.float32)).repeat(500, 0)
    tokens = np.arange(500, dtype=np.int32) % 2 + 1
    coder = coding.queue.RangeEncoder()
    coder.encode(tokens, coding.model.Categorical(perfect=False), np.exp(logp))
    decoder = codec.Decoder(coder.get_compressed().astype("<u4").tobytes(), 500)
    for first in range(0, 500, 100):
        index = np.arange(first, first + 100)
        assert (decoder.transfer(index, logp[index]) == tokens[index]).all()
    assert 0 <= decoder.bits < 0.15 * 24 * 500
    with pytest.raises(EOFError):
        for _ in range(50):
            decoder.transfer(np.arange(100), np.log(np.full((100, 2), 0.5, np.float32)))


def test_arithmetic_that_differs_is_detected(loaded, monkeypatch):
    data = there_and_back(loaded["mdlm"], LONG)[0]
    exact = codec.predict

    def slightly_different(steps):
        found = exact(steps)
        if found is None:
            return None
        positions, logp = found
        return positions, logp * np.float32(1.01)

    monkeypatch.setattr(codec, "predict", slightly_different)
    with pytest.raises(ValueError, match="the arithmetic of this machine or version of torch"):
        codec.decompress(data, loaded["mdlm"], "file")


def test_digest_is_that_of_the_whole_artifact(files, loaded):
    whole = files["mdlm"].read_bytes()
    assert loaded["mdlm"].artifact_id == hashlib.blake2b(whole, digest_size=8).digest()


def test_large_models_have_fewer_windows_side_by_side(monkeypatch):
    """As many as keys and values have room for, in both directions."""
    hp = tiny_hp(objective="ar", train_seq_len=8, train_batch_tokens=8)
    kept = 8 * 2 * hp.num_layers * hp.num_kv_heads * hp.head_dim
    for room, windows in ((3 * kept + 1, 3), (kept - 1, 1), (10**9, codec.CACHED_BATCH)):
        monkeypatch.setattr(codec, "KEPT_FLOATS", room)
        predictor = codec.Predictor(random_model(hp), "ar", 1, 0, "cpu")
        assert max(batch.windows for batch in predictor.batches(8 * 600)) <= windows
        assert predictor.windows == windows
