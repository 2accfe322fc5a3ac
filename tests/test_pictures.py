"""tools/pictures.py: pictures that follow the code, byte for byte the same in every run."""

import json

import pictures
import pytest
import report
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm

STORY = """A script.

    first    `ranks` ranks, and `golden_sequence` spreads what
             KINDS and MASK name.
    second   `TokenStream.windows` cuts rows.

Letters in shapes: B rows, L positions.
"""


@pytest.fixture
def artifact(tmp_path):
    """A small artifact with every kind of parameter."""
    hp = tiny_hp(neighbors=1, tie_embeddings=False, quant_mode="int7", quant_clip=10.0)
    tm.save_artifact(random_model(hp), hp, tmp_path / "a.mdlm")
    return tmp_path / "a.mdlm"


def test_two_runs_are_identical(tool, tmp_path, artifact, monkeypatch):
    monkeypatch.setitem(pictures.LOOK, "savefig.dpi", 50)  # faster
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        done = tool(pictures, "--out", out, "--artifact", artifact)
        assert done.returncode == 0, done.stderr
        names = ["flow.png", "artifact.png", "masks.png"]
        assert done.stdout.split() == [str(out / name) for name in names]
        found.append([(out / name).read_bytes() for name in names])
        assert all(picture.startswith(b"\x89PNG") for picture in found[-1])
    assert found[0] == found[1]


def test_stops_of_the_story(monkeypatch):
    monkeypatch.setattr(tm, "__doc__", STORY)
    first, second = pictures.read_story(tm)
    assert (first.word, second.word) == ("first", "second")
    assert first.text.endswith("spreads what KINDS and MASK name.")
    assert second.gives == [("windows", "(B, 1 + length) int64")]
    words = [piece for word in pictures.to_words(first.text, tm) for piece in word]
    assert ("ranks", pictures.FUNCTION) in words and ("KINDS", pictures.TABLE) in words
    assert ("MASK", pictures.PLAIN) in words and (",", pictures.PLAIN) not in words


def test_the_story_names_every_function_it_needs():
    """Of the real script: every stop names a function, and the sections of the file are found."""
    stops = pictures.read_story(tm)
    assert [stops[0].word, stops[-1].word] == ["shard", "log"]
    assert all(stop.section for stop in stops)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("`ranks`", "`no_such_function`"),
        ("`TokenStream.windows`", "`TokenStream.doors`"),
        ("`ranks`", "`GOLDEN`"),
    ],
)
def test_unknown_function_is_refused(tool, tmp_path, monkeypatch, right, wrong):
    monkeypatch.setattr(tm, "__doc__", STORY.replace(right, wrong))
    done = tool(pictures, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"names {wrong.strip('`')} at the stop" in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_one_line(tool, tmp_path, monkeypatch):
    missing = tool(pictures, "--out", tmp_path, "--artifact", tmp_path / "missing.mdlm")
    monkeypatch.setattr(tm, "__doc__", "Nothing.")
    silent = tool(pictures, "--out", tmp_path)
    for done, reason in ((missing, "missing.mdlm"), (silent, "has no story")):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr


def test_bytes_of_a_submission(artifact):
    """Of a file: all of them; predicted: those of `predicted_bytes`, and the header."""
    code = len(open(tm.__file__, "rb").read())
    measured = pictures.of_artifact(artifact)
    assert measured.bytes == code + artifact.stat().st_size
    assert [part.name for part in measured.parts] == list(pictures.PART_NAMES)
    predicted = pictures.predicted("demo")
    header = next(part.bytes for part in predicted.parts if part.name == "header")
    assert predicted.bytes - header == tm.predicted_bytes(tm.Hyperparameters("demo"))


@pytest.mark.parametrize("size, room", [(15_999_999, "1 below"), (16_000_002, "2 above")])
def test_room_below_the_limit(monkeypatch, size, room):
    written = []
    monkeypatch.setattr(
        pictures, "write", lambda axes, x, y, text, *more, **options: written.append(text)
    )
    parts = [pictures.Part("code", size - 300, ""), pictures.Part("matrix", 300, "", weights=400)]
    _, axes = pictures.new_sheet(100)
    pictures.draw_submission(axes, 0, pictures.Submission("a", parts), 1e-6)
    assert written == ["a", f"{size:,} bytes, {room} the limit; 400 weights of 6.00 bits"]


def test_probabilities_of_mask_sizes():
    """They are those of k, and sum to 1 over all sizes for each pass and window that has them."""
    masks = pictures.draw_masks(pictures.golden_times(3000))
    by_size = dict(
        zip(masks.k.flatten().tolist(), masks.probability.flatten().tolist(), strict=True)
    )
    assert set(by_size) == set(range(1, pictures.SHOWN_TOKENS + 1))
    assert sum(by_size.values()) == pytest.approx(1)
    assert torch.equal(masks.masks.sum(2), masks.k)


SAMPLE = dict(
    seed=3,
    prompt_or_template=[True, False, False, False],
    tokens=[5, 6, 7, 8],
    pieces=["a", "b\n", "$c", "d"],
    text="ab\n$cd",
    calls=3,
    seconds=0.5,
    bits=None,
    steps=[
        dict(positions=[2, 3], tokens=[7, 9]),
        dict(positions=[1, 3], tokens=[6, 384]),
        dict(positions=[3], tokens=[8]),
    ],
)


@pytest.fixture
def samples(tmp_path):
    value = dict(version=1, artifact="a.mdlm", preset="mdlm", sampler="remdm", settings={})
    value |= dict(length=4, mask_id=384, samples=[SAMPLE])
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(value))
    return path


def test_a_text_while_it_is_being_written(samples):
    """Given, masked, new, settled, and masked again."""
    (sample,) = report.read_samples(samples, None).samples
    fixed, new, settled, masked = pictures.FIXED, pictures.NEW, pictures.SETTLED, pictures.MASKED
    assert pictures.text_at(sample, 0, 0) == [
        ("a", fixed),
        ("░░", masked),
        ("░░", masked),
        ("░", masked),
    ]
    assert pictures.text_at(sample, 2, 1) == [
        ("a", fixed),
        ("b↵", new),
        ("$c", settled),
        ("░", masked),
    ]
    assert pictures.text_at(sample, 3, 3) == [
        ("a", fixed),
        ("b↵", settled),
        ("$c", settled),
        ("d", settled),
    ]


def test_the_picture_of_a_text_is_made_of_its_file_alone(samples, tool, tmp_path):
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        done = tool(pictures, "--samples", samples, "--out", out)
        assert done.returncode == 0 and done.stdout.split() == [str(out / "unmasking.png")]
        assert [path.name for path in out.iterdir()] == ["unmasking.png"]
        found.append((out / "unmasking.png").read_bytes())
    assert found[0] == found[1] and found[0].startswith(b"\x89PNG")
    samples.write_text("{}")
    done = tool(pictures, "--samples", samples, "--out", tmp_path / "one")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "not what tools/sample.py --json writes" in done.stderr
