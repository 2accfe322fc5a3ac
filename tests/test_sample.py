"""tools/sample.py: texts, templates, what is shown, what is refused."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sample
import sampling
import torch
from conftest import ROOT, clean_env, prepare_tiny, random_model, refused, run_python, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train_mdlm as tm

WINDOW = 16


def artifact_of(folder, name, tokenizer, **overrides):
    """A random model for the tokenizer, as a file."""
    shape = dict(vocab_size=384, tokenizer_path=tokenizer, train_seq_len=WINDOW)
    widths = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
    hp = tm.Hyperparameters(**shape, **widths, compute_dtype="float32", **overrides)
    tm.save_artifact(random_model(hp, scale=0.3), hp, folder / f"{name}.mdlm")
    return folder / f"{name}.mdlm"


@pytest.fixture(scope="module")
def files(tiny_env, tmp_path_factory):
    """Artifacts of models of all kinds."""
    of = functools.partial(artifact_of, tmp_path_factory.mktemp("sample"))
    tokenizer = tiny_env["TOKENIZER_PATH"]
    return dict(
        mdlm=of("mdlm", tokenizer),
        ar=of("ar", tokenizer, objective="ar"),
        eos=of("eos", tokenizer, backbone="dit", doc_chunks=True, anchor_bos=True),
        block=of("block", tokenizer, block_size=4, neighbors=2),
    )


@pytest.fixture(scope="module")
def loaded(files, tiny_env):
    paths = tiny_env["TOKENIZER_PATH"], tiny_env["DATA_PATH"]
    return {name: sampling.load(path, *paths) for name, path in files.items()}


@pytest.fixture
def call(tool, files, tiny_env, monkeypatch):
    """Calls the tool with an artifact by its name."""
    for name in ("TOKENIZER_PATH", "DATA_PATH"):
        monkeypatch.setenv(name, tiny_env[name])
    return lambda name, *arguments: tool(sample, files[name], *arguments)


# ---- Tokens as text


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_are_the_decoded_text(loaded, data):
    tokens = data.draw(st.lists(st.integers(0, 383), max_size=12))
    some = loaded["mdlm"]
    sp = some.tokenizer
    names = [sp.id_to_piece(i) for i in range(4)]
    pieces = sampling.pieces_of(some, tokens)
    assert len(pieces) == len(tokens)
    shown = [piece for piece, token in zip(pieces, tokens, strict=True) if token not in (0, 1, 2)]
    assert all(pieces[i] == names[t] for i, t in enumerate(tokens) if t < 3)
    runs = "".join(shown) if not set(tokens) & {0, 1, 2, 3} else None
    if runs is not None:  # control tokens cut characters off
        assert runs == sp.decode(tokens) == sampling.text_of(some, tokens)


def test_characters_of_several_bytes_stand_at_the_first():
    assert sampling.characters("aé🙂".encode()) == ["a", "é", "", "🙂", "", "", ""]
    assert sampling.characters(b"\xff\xc3a\xf0\x9f") == [
        "\ufffd",
        "\ufffd",
        "a",
        "\ufffd",
        "\ufffd",
    ]


# ---- Templates


def test_gaps_are_read():
    assert sampling.parse_infill("Once [5] a [12].") == ["Once ", 5, " a ", 12, "."]
    assert sampling.parse_infill(r"[1]x\[2][3]y[z]") == [1, "x[2]", 3, "y[z]"]
    assert sampling.parse_infill(f"[{'0' * 5000}2]") == [2]
    for text, reason in (("no gap", "there is no gap"), ("a [0] b", "at least one token")):
        with pytest.raises(tm.InputError, match=reason):
            sampling.parse_infill(text)


@pytest.mark.parametrize("text, parts", [
    (r"\[5] [1]", ["[5] ", 1]),
    (r"\\[5]", ["\\", 5]),
    (r"a\\\[5][1]", [r"a\[5]", 1]),
    (r"\\\\[5]", [r"\\", 5]),
    (r"\\ \n [1] \[z] \\[] \\", [r"\\ \n ", 1, r" \[z] \\[] \\"]),  # nothing to escape
])  # fmt: skip
def test_a_backslash_before_brackets(text, parts):
    """One makes them text, two are one of them before a gap."""
    assert sampling.parse_infill(text) == parts


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=st.text(alphabet="\\[]15x ", max_size=12))
def test_any_text_can_be_written_before_and_behind_a_gap(text):
    """Each backslash before brackets with a number twice, and another one in front of those."""
    written = re.sub(r"(?<!\\)(\\*)(?=\[[0-9]+\])", lambda run: run[0] * 2 + "\\", text)
    before = re.sub(r"\\*$", lambda run: run[0] * 2, written)  # a gap follows
    parts = [text, 3, text] if text else [3]
    assert sampling.parse_infill(f"{before}[3]{written}") == parts


@pytest.mark.parametrize("name", ["mdlm", "block", "ar"])
@pytest.mark.parametrize("infill", ["the [3] of [2].", "[2] é[1]🙂  [1]x", "of\n[4]"])
def test_the_text_of_a_template_is_kept(loaded, name, infill):
    some = loaded[name]
    request = sampling.Request(infill=infill, num=6, temperature=2.0)
    parts = sampling.parse_infill(infill)
    for one in sampling.draw(some, request):
        text = "".join(sampling.pieces_of(some, one.tokens))
        pattern = "".join(".*" if isinstance(p, int) else re.escape(p) for p in parts)
        assert re.fullmatch(pattern, text, re.DOTALL)
        assert one.fixed.count(False) == sum(p for p in parts if isinstance(p, int))


def test_the_space_before_a_gap_begins_its_first_token(loaded):
    some = loaded["mdlm"]
    template = sampling.template_of(some, sampling.Request(infill="the [2] of[2]"))
    begun = some.tokenizer.encode("the")  # not the space
    assert template.tokens[0].tolist()[: len(begun) + 1] == [*begun, some.hp.mask_id]
    assert template.after_space.nonzero().tolist() == [[len(begun)]]


def test_prompts_and_lengths(loaded):
    some = loaded["mdlm"]
    prompt = some.tokenizer.encode("of the")
    for length in (0, 9):
        request = sampling.Request(prompt="of the", length=length, num=2, sampler="l2r")
        for one in sampling.draw(some, request):
            assert one.tokens[: len(prompt)] == prompt
            assert len(one.tokens) == (length or WINDOW)
            assert one.calls == len(one.tokens) - len(prompt)


def test_documents_are_filled_up_with_pad(loaded):
    some = loaded["eos"]
    for one in sampling.draw(some, sampling.Request(length=5, num=20, sampler="l2r")):
        assert len(one.tokens) == len(one.fixed) == 5 and not any(one.fixed)
        assert tm.BOS_ID not in one.tokens and max(one.tokens) < some.hp.vocab_size
        x0 = torch.full((1, WINDOW), some.hp.pad_id)
        x0[0, :5] = torch.tensor(one.tokens)
        nats = tm.chain_rule(some.model, x0).double().sum()
        assert one.bits == pytest.approx(nats.item() / tm.math.log(2), abs=1e-4)


@pytest.mark.parametrize("name", ["mdlm", "block"])
def test_batches_make_no_difference(loaded, name):
    drawn = {}
    for batch in (1, 2, 5):
        request = sampling.Request(num=5, batch=batch, seed=3, length=12)
        drawn[batch] = [(one.seed, one.tokens) for one in sampling.draw(loaded[name], request)]
    assert drawn[1] == drawn[2] == drawn[5]
    assert [seed for seed, _ in drawn[1]] == [3, 4, 5, 6, 7]


# ---- The command


@pytest.mark.parametrize("name", ["mdlm", "block", "ar", "eos"])
def test_a_record_can_be_replayed(call, loaded, tmp_path, name):
    path = tmp_path / "steps.json"
    done = call(name, "--prompt", "the", "--num", 3, "--batch", 2, "--json", path)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert list(record) == "version artifact preset sampler settings length mask_id samples".split()
    assert record["artifact"] == f"{name}.mdlm" and record["mask_id"] == 384
    assert record["settings"]["prompt"] == "the" and record["settings"]["temperature"] == 1
    for seed, one in enumerate(record["samples"]):
        z = [t if f else 384 for t, f in zip(one["tokens"], one["prompt_or_template"], strict=True)]
        for step in one["steps"]:
            for position, token in zip(step["positions"], step["tokens"], strict=True):
                z[position] = token
        assert z == one["tokens"] and len(z) == record["length"] == len(one["pieces"])
        assert one["seed"] == seed and one["calls"] == len(one["steps"]) and one["seconds"] > 0
        printed = sample.printable("".join(one["pieces"]))
        assert printed.startswith("the") and printed in done.stdout
        assert f"{one['bits']:.1f} bits" in done.stdout
    assert "steps" not in record["settings"]  # a call for each token
    again = sampling.record(
        loaded[name], sampling.Request(prompt="the", num=3, sampler=record["sampler"])
    )
    for one in record["samples"] + again["samples"]:
        del one["seconds"], one["bits"]
    assert again == record
    assert call(name, "--json", path).returncode == 0  # its own file is replaced


def test_the_settings_of_a_record_are_those_that_shaped_it(loaded):
    some = loaded["mdlm"]
    always = dict(temperature=1.0, top_p=1.0)
    for options, own in (
        (dict(sampler="l2r"), dict()),
        (dict(sampler="l2r", steps=3), dict(steps=3)),
        (dict(sampler="remdm"), dict(eta=0.02)),
        (dict(sampler="eb", prompt="the"), dict(gamma=0.1, prompt="the")),
    ):
        assert sampling.record(some, sampling.Request(**options))["settings"] == own | always


def test_progress_in_a_file_and_figures(call):
    done = call("mdlm", "--num", 3, "--batch", 2, "--sampler", "remdm", "--steps", 8)
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"sample 1-2 of 3: 100 %, \d+ calls", line) for line in lines)
    figures = r"sample 3 of 3, seed 2: 16 tokens in \d model calls, \d+ tokens/s, no exact bits.*"
    assert any(re.fullmatch(figures, line) for line in lines)
    assert re.fullmatch(r"3 samples: \d+ model calls, \d+ tokens/s", lines[-1])
    assert "\x1b" not in done.stdout


def test_texts_from_files(call, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("of the [3]\nthe", encoding="utf-8")
    done = call("mdlm", "--infill-file", template)
    assert done.returncode == 0 and re.search(r"^of the.*\nthe$", done.stdout, re.M | re.S)
    template.write_bytes(b"\xff")
    refused(call("mdlm", "--prompt-file", template), "template.txt", "not UTF-8")
    template.write_bytes(b"")
    refused(call("mdlm", "--infill-file", template), "template.txt: is empty")
    refused(call("mdlm", "--prompt-file", tmp_path), f"{tmp_path}: cannot be read: Is a directory")


def write_into(pipe, data):
    """From another thread, which ends when the reader does."""

    def write():
        try:
            pipe.write_bytes(data)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def test_a_text_from_a_pipe(call, tmp_path):
    """As a shell makes one for <(…)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for option, shown in (("--prompt-file", "^of the"), ("--infill-file", "^of the.* of$")):
        writer = write_into(pipe, b"of the" if option == "--prompt-file" else b"of the [3] of")
        done = call("mdlm", option, pipe)
        writer.join(timeout=5)
        assert done.returncode == 0 and re.search(shown, done.stdout, re.M | re.S), done.stderr


def test_a_text_from_standard_input(files, tiny_env):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/sample.py"), files["mdlm"], "--prompt-file", "-"],
        env=clean_env(TOKENIZER_PATH=tiny_env["TOKENIZER_PATH"], DATA_PATH=tiny_env["DATA_PATH"]),
        input="of the",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "\nof the" in done.stdout, done.stderr


def test_an_empty_standard_input_is_one_line(call, tmp_path):
    (tmp_path / "empty").touch()
    before = os.dup(0)
    with open(tmp_path / "empty") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        refused(call("mdlm", "--infill-file", "-"), "standard input: is empty")
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_a_text_without_an_end_is_refused(call, tmp_path, monkeypatch):
    refused(call("mdlm", "--prompt-file", "/dev/zero"), "/dev/zero: has more than 16,777,216 bytes")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(sample, "LARGEST_TEXT", 5)
    writer = write_into(pipe, b"of the " * 100_000)
    refused(call("mdlm", "--prompt-file", pipe), "pipe: has more than 5 bytes")
    writer.join(timeout=5)


@pytest.mark.parametrize("name, arguments, notes", [
    ("block", ("--infill", "the [3] of"), ["what is to the left and the rest of its block of 4"]),
    ("ar", ("--infill", "the [3] of"), ["sees what is to the left, not what follows"]),
    ("ar", ("--length", 20), ["more than a window of 16", "the last 8 tokens"]),
    ("mdlm", ("--infill", "the [3] of"), []),
])  # fmt: skip
def test_what_a_user_may_not_expect_is_said(call, name, arguments, notes):
    done = call(name, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("note: ") == bool(notes)
    for note in notes:
        assert note in done.stdout


@pytest.mark.parametrize("name, arguments, parts", [
    ("ar", ("--sampler", "confidence"), ["ar.mdlm", "no MASK", "--sampler causal"]),
    ("mdlm", ("--sampler", "causal"), ["mdlm.mdlm", "no causal half"]),
    ("mdlm", ("--sampler", "margins"), ["margins is not one of", "did you mean margin?"]),
    ("mdlm", ("--length", 17), ["--length", "17 tokens", "window"]),
    ("mdlm", ("--prompt", "the of " * 20), ["--prompt", "tokens are more than the 16"]),
    ("mdlm", ("--infill", "the [99] of"), ["--infill", "tokens are more than the 16"]),
    ("mdlm", ("--infill", "the of"), ["--infill", "no gap"]),
    ("mdlm", ("--infill", "a [0] b"), ["[0]"]),
    ("mdlm", ("--infill", "a [2] b", "--length", 9), ["--length does not go with --infill"]),
    ("mdlm", ("--infill", "a [2] b", "--prompt", "a"), ["--prompt", "--infill"]),
    ("mdlm", ("--prompt", "of the of", "--length", 2), ["--length 2", "nothing would be written"]),
    ("mdlm", ("--gamma", 1), ["--gamma is not for"]),
    ("mdlm", ("--sampler", "eb", "--steps", 4), ["--steps is not for --sampler eb", "--gamma"]),
    ("mdlm", ("--steps", 99999), ["--steps 99999 is not between 1 and 16384"]),
    ("mdlm", ("--temperature", -1), ["--temperature -1.0 is not between 0"]),
    ("mdlm", ("--temperature", "nan"), ["--temperature nan"]),
    ("mdlm", ("--top-p", 0), ["--top-p 0.0"]),
    ("mdlm", ("--num", 0), ["--num 0"]),
    ("mdlm", ("--steps", 0), ["--steps 0", "leave it out"]),
    ("mdlm", ("--steps", 10**6), ["--steps 1000000", "16384"]),
    ("mdlm", ("--infill", ""), ["--infill", "empty", "[5]"]),
    ("mdlm", ("--infill", "[9999999999]"), ["9999999999", "longer than"]),
    ("mdlm", ("--infill", "[1048576] [9]"), ["more than 1,048,576"]),
    ("mdlm", ("--prompt", "a\udcff"), ["--prompt", "not UTF-8"]),
    ("mdlm", ("--steps", "few"), ["--steps", "few"]),
    ("mdlm", ("--sampler", "remdm", "--eta", 2), ["--eta 2.0 is not between 0 and 1"]),
    ("block", ("--sampler", "l2r", "--steps", 3), ["--steps 3", "4 blocks"]),
    ("mdlm", ("--prompt-file", "nowhere.txt"), ["nowhere.txt"]),
    ("mdlm", ("--tokenizer", "nowhere.model"), ["nowhere.model"]),
    ("mdlm", ("--json", "."), ["cannot be written"]),
    ("mdlm", ("--json", "a" * 252), ["too long"]),
    ("mdlm", ("--temperature", "1e-320"), ["--temperature 1e-320 is too low", "give 0"]),
    ("mdlm", ("--data", "nowhere"), ["--data nowhere", "no such folder"]),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line(call, name, arguments, parts):
    refused(call(name, *arguments), *parts)


def test_a_prompt_that_is_longer_than_any_text_is_refused(call, monkeypatch):
    monkeypatch.setattr(sampling, "LONGEST", 20)
    refused(call("ar", "--prompt", "é" * 20), "--prompt: 21 tokens are more than 20")


def test_what_is_no_artifact_is_one_line(tool, tmp_path):
    path = tmp_path / "x.mdlm"
    refused(tool(sample, path), "x.mdlm", "no such file")
    path.write_bytes(b"something")
    refused(tool(sample, path), "x.mdlm", "not an artifact")
    refused(tool(sample, "."), ".: is a folder")


def test_other_files_are_not_replaced(call, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[1, 2]")
    refused(call("mdlm", "--json", path), "mine.json", "did not make it")
    assert path.read_text() == "[1, 2]"


def test_symbolic_links_are_not_replaced(call, tmp_path):
    """Whether they lead to a record, to nothing or to themselves. One to a folder is followed."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (tmp_path / "there").symlink_to(folder)
    assert call("mdlm", "--json", tmp_path / "there/a.json").returncode == 0
    record = (folder / "a.json").read_bytes()
    for target in (folder / "a.json", tmp_path / "absent", link):
        link.symlink_to(target)
        refused(call("mdlm", "--json", link), f"{link}: is a symbolic link", f"leads to, {target}")
        refused(call("mdlm", "--json", link / "b.json"), "b.json: cannot be written")
        assert Path(os.readlink(link)) == target
        link.unlink()
    assert (folder / "a.json").read_bytes() == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there"]


# ---- The tokenizer


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The tokenizer and the data of another text, of the same size."""
    root = tmp_path_factory.mktemp("other")
    files = [root / f"doc{n}.txt" for n in range(100, 112)]
    for n, path in enumerate(files):
        path.write_text(text_of(n, 900), encoding="utf-8")
    prepare_tiny(files, root)
    return root / "tokenizers/tiny_384_bpe.model", root / "datasets/tiny_sp384"


def test_the_tokenizer_of_other_data_is_refused(call, files, tiny_env, other, tmp_path):
    tokenizer, data = other
    both = ["is not the tokenizer of the data in", "--tokenizer and --data"]
    refused(call("mdlm", "--tokenizer", tokenizer), f"{tokenizer}: ", tiny_env["DATA_PATH"], *both)
    refused(call("mdlm", "--data", data), tiny_env["TOKENIZER_PATH"], f"{data}: ", *both)
    assert call("mdlm", "--tokenizer", tokenizer, "--data", data).returncode == 0
    for damaged in (None, "[]", "{", '{"tokenizer_sha256": ""}'):  # then nobody knows
        if damaged is not None:
            (tmp_path / tm.VERIFIED).write_text(damaged)
        assert call("mdlm", "--tokenizer", tokenizer, "--data", tmp_path).returncode == 0


def test_the_tokenizer_is_that_of_the_log_beside_the_artifact(
    tool, tiny_env, other, tmp_path, monkeypatch
):
    """Whatever the data are that are at hand."""
    run_python("train_mdlm.py", cwd=tmp_path, RUN_ID="r", **tiny_env | dict(ITERATIONS="2"))
    artifact = tmp_path / "logs/r.mdlm"
    tokenizer, data = other
    wrong = ["--tokenizer", tokenizer, "--data", data]
    right = ["--tokenizer", tiny_env["TOKENIZER_PATH"], "--data", data]
    refused(tool(sample, artifact, *wrong), f"{tokenizer}: r.mdlm was trained with another")
    assert tool(sample, artifact, *right).returncode == 0
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert tool(sample, artifact).returncode == 0  # the log says where they are
    log = artifact.with_suffix(".txt")
    whole = log.read_text()
    relative = {name: f"TOKENIZER_PATH={name}" for name in ("mine.model", "absent.model")}
    named = f"TOKENIZER_PATH={tiny_env['TOKENIZER_PATH']}"
    shutil.copy(tiny_env["TOKENIZER_PATH"], tmp_path / "mine.model")
    log.write_text(whole.replace(named, relative["mine.model"]))
    assert tool(sample, artifact).returncode == 0  # seen from where the run was started
    log.write_text(whole.replace(named, relative["absent.model"]))
    absent = f"absent.model, which {log} names: there is no such file; give it with --tokenizer"
    refused(tool(sample, artifact), absent)
    log.write_text(whole)
    shutil.copy(artifact, tmp_path / "logs/s.mdlm")  # without a log
    assert tool(sample, tmp_path / "logs/s.mdlm", *wrong).returncode == 0
    refused(tool(sample, tmp_path / "logs/s.mdlm", *right), "is not the tokenizer of the data")


def test_a_tokenizer_that_is_none_is_told_by_who_named_it(call, tool, files, tmp_path, monkeypatch):
    none = "is no SentencePiece model; give the .model that the artifact was trained with"
    refused(call("mdlm", "--tokenizer", ROOT / "README.md"), "--tokenizer ", f"README.md: {none}")
    refused(call("mdlm", "--tokenizer", "/nope"), "--tokenizer /nope: there is no such file")
    refused(call("mdlm", "--tokenizer", tmp_path), f"--tokenizer {tmp_path}: is a folder")
    monkeypatch.setenv("TOKENIZER_PATH", "/nope")
    refused(call("mdlm"), "TOKENIZER_PATH=/nope: there is no such file")
    monkeypatch.delenv("TOKENIZER_PATH")
    monkeypatch.chdir(tmp_path)
    refused(tool(sample, files["mdlm"]), "which preset mdlm names: there is no such file")


def test_a_text_that_the_tokenizer_changes_is_refused(loaded, monkeypatch):
    """As one does that normalises it."""
    some = loaded["mdlm"]
    monkeypatch.setattr(sampling.codec, "tokenize", lambda sp, text: sp.encode(text.lower()))
    for request in (sampling.Request(prompt="The"), sampling.Request(infill="of[2] The")):
        with pytest.raises(tm.InputError, match=r"does not keep this text.*The' becomes '.*the'"):
            sampling.template_of(some, request)


# ---- The screen


@pytest.fixture
def screen(call, monkeypatch):
    """Calls the tool as on a terminal of so many columns."""
    monkeypatch.setattr(sample, "choose_view", sample.LiveView)
    monkeypatch.setattr(sample, "FRAME_SECONDS", 0)
    monkeypatch.setattr(sample, "TEXT_SECONDS", 0)

    def show(*arguments, columns=100, **env):
        for name, value in dict(env, FORCE_COLOR="1", COLUMNS=str(columns), TERM="xterm").items():
            monkeypatch.setenv(name, value)
        done = call(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return show


def test_text_is_shown_while_it_is_written(screen):
    shown = screen("mdlm", "--infill", "the [6] of", "--sampler", "l2r")
    for style in ("\x1b[36m", "\x1b[2m\u2591", "\x1b[1;32m"):
        assert style in shown
    for masked in range(6, -1, -1):
        assert f"call {6 - masked}, {masked} masked" in shown
    assert "6 tokens in 6 model calls, " in shown


def test_without_colours_and_on_a_narrow_screen(screen):
    shown = screen("mdlm", columns=12, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", shown)  # a colour
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    lines = re.split(r"\x1b\[[\d;?]*[a-zA-Z]|\r|\n", plain)
    assert max(map(len, lines)) <= 12 and any(lines)


def test_of_a_long_text_the_lines_around_what_is_new_are_shown(screen):
    shown = screen("ar", "--length", 150, "--batch", 1, columns=20, LINES="9")
    pictures = re.split(r"sample 1 of 1: call", shown)[:-1]
    with_new = ["\x1b[1;32m" in picture for picture in pictures]
    assert len(pictures) == 151 and sum(with_new) > 140  # a blank at the end of a line is not shown
    assert max(picture.count("\n") for picture in pictures) <= 9


def test_pictures_that_take_long_are_few(loaded, monkeypatch):
    """So that a long text is not written for the screen most of the time."""
    clock, pictures = [0.0], []

    def draw(view, pieces):
        pictures.append(clock[0])
        clock[0] += 0.1
        return sample.common.require("rich.text").Text()

    monkeypatch.setattr(sample.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sample.LiveView, "around_new", draw)
    some = loaded["ar"]
    request, template = sampling.resolve(some, sampling.Request(length=300))
    view = sample.LiveView(some, request)
    rows = sampling.Rows(some.model, template, request, some.luts)
    rows.steps = [[{}]]
    for _ in range(100):  # calls of a hundredth of a second each
        clock[0] += 0.01
        view(rows)
    assert pictures == pytest.approx([0.01, 0.52, 1.03], abs=0.02)


@pytest.mark.parametrize("options, delay, each", [
    (dict(), None, 0.25),  # 6 calls
    (dict(), 0.7, 0.7),
    (dict(), 0.0, 0.0),
    (dict(steps=4), None, 0.25),
    (dict(infill="", steps=300), None, 3 / 16),  # more steps than tokens
])  # fmt: skip
def test_a_short_text_can_be_watched(loaded, monkeypatch, options, delay, each):
    """Every call has a picture, and the last one stays too."""
    clock, pictures = [100.0], []

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(sample.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sample.time, "sleep", sleep)
    monkeypatch.setattr(sample.LiveView, "picture", lambda *_: pictures.append(clock[0]))
    some = loaded["mdlm"]
    values = dict(infill="the [6] of", sampler="l2r") | options
    request, _ = sampling.resolve(some, sampling.Request(**values))
    view = sample.LiveView(some, request, delay)
    (one,) = sampling.draw(some, request, view)
    view.show(one, "")
    expected = [100 + each * call for call in range(one.calls + 2)]
    assert [*pictures, clock[0]] == pytest.approx(expected)


def test_a_wrong_delay_is_one_line(call):
    for text in ("-1", "nan", "61", "soon"):
        refused(call("mdlm", "--delay", text), f"--delay: {text}: give 0 to 60 seconds")
    assert call("mdlm", "--delay", "60").returncode == 0  # not waited for: no terminal


def test_what_a_terminal_would_obey_is_escaped():
    assert sample.printable("a\x1b[2J\n\tb\x07é") == "a\\x1b[2J\n\tb\\x07é"


def test_without_rich_the_lines_are_plain(loaded, monkeypatch, capsys):
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sample.sys.modules, "rich.console", None)
    view = sample.choose_view(loaded["mdlm"], sampling.Request(sampler="l2r"))
    assert isinstance(view, sample.PlainView)
    assert "package rich is missing" in capsys.readouterr().out


def test_a_terminal_that_can_only_print_gets_lines(call, monkeypatch):
    """As in an editor, or on a serial line: no escapes, and nothing is written over."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for term in ("dumb", "unknown"):
        monkeypatch.setenv("TERM", term)
        done = call("mdlm", "--sampler", "l2r")
        shares = re.findall(r"^sample 1 of 1: (\d+) %, (\d+) calls$", done.stdout, re.M)
        assert shares == [("25", "4"), ("50", "8"), ("75", "12"), ("100", "16")]
        assert "\x1b" not in done.stdout and "\r" not in done.stdout


def test_help_names_every_sampler(tool):
    done = tool(sample, "--help")
    assert done.returncode == 0
    for name, row in sampling.SAMPLERS.items():
        assert re.search(rf"^    {name} +{re.escape(row.about)}$", done.stdout, re.MULTILINE)
