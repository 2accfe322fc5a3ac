"""tools/report.py: a page that says what the logs say, safely, and looks right in a browser."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import common
import pytest
import report
import report_charts as charts
import report_page
import torch
from conftest import SHIPPED, random_model, refused, run_python, tiny_hp, val_split
from report_page import Measured, Passage, Report, RunLog, Sample, Samples, Share, Token
from run_log import parse_log, read_curve

import train_mdlm as tm

LOGS = sorted(SHIPPED.glob("*.log"))
LOG = SHIPPED / "train_seed42.log"
HOSTILE = "</script><script>alert(1)</script>&\"'"
VOID = {"meta", "input", "br"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """A page, taken apart; it has to be well formed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def page_of(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def run(tiny_env, tmp_path_factory):
    """The log of a finished run, with its artifact beside it."""
    folder = tmp_path_factory.mktemp("run")
    env = tiny_env | dict(ITERATIONS="2", VAL_LOSS_EVERY="1", SCORES="nelbo,l2r:4")
    run_python("train_mdlm.py", cwd=folder, RUN_ID="r", **env)
    return folder / "logs/r.txt"


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    monkeypatch.setattr(report, "ORDERS", 2)
    monkeypatch.setattr(report, "PASSAGE_TOKENS", 64)


def sample_json(**changes):
    """What tools/sample.py writes: a template, two tokens by two calls, and one of them again."""
    steps = [
        dict(positions=[1, 2], tokens=[8, 9]),
        dict(positions=[1], tokens=[384]),
        dict(positions=[1], tokens=[7]),
    ]
    sample = dict(
        seed=3,
        prompt_or_template=[True, False, False],
        tokens=[5, 7, 9],
        pieces=["Once", HOSTILE, "\n"],
        text="Once …",
        calls=3,
        seconds=0.25,
        bits=12.5,
        steps=steps,
    )
    value = dict(version=1, artifact="r.mdlm", preset="demo", sampler="remasking")
    value |= dict(settings={"steps": 3}, length=3, mask_id=384, samples=[sample])
    for name, change in changes.items():
        (sample if name in sample else value)[name] = change
    return value


@pytest.fixture
def samples(tmp_path):
    def write(**changes):
        path = tmp_path / "samples.json"
        path.write_text(json.dumps(sample_json(**changes)))
        return path

    return write


def hostile_report():
    """Everything that can be text is hostile."""
    logs = report.read_logs([LOG])
    begun = logs[0].curve._replace(path=Path("<b>&"))
    logs.append(RunLog(begun, None, [], {}, []))
    pieces = [HOSTILE, "a\0\x1b\x85\ud800\uffff", "\n", " ", "<!--", "]]>"]
    tokens = [Token(piece, 20.0 / (n + 1), (3.0, 1.0, 5.0)) for n, piece in enumerate(pieces)]
    measured = Measured(
        artifact=HOSTILE,
        sha256="0" * 64,
        score="nelbo",
        bpb=2.0,
        stderr=math.nan,
        windows=2,
        shares=[Share(n, 4, 2.0 * n, 0.1) for n in range(1, 5)],
        positions={},
        passages=[Passage(1, tokens)],
        orders=2,
        block_size=0,
    )
    steps = [[(0, HOSTILE)], [(0, None), (1, "x")], [(0, "y")]]
    sample = Sample(1, [False] * 6, pieces, 3, 0.1, None, steps)
    return Report(HOSTILE, logs, measured, "", [Samples(HOSTILE, HOSTILE, {HOSTILE: 1}, [sample])])


# ---- The page


def test_the_page_of_three_seeds_says_what_the_logs_say(tool, tmp_path):
    done = tool(report, *LOGS, "--out", tmp_path / "a.html")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'a.html'}\n", done.stderr
    text, page = page_of(tmp_path / "a.html")
    facts = json.loads((LOG.parent / "submission.json").read_text())
    for figure in (
        f"{facts['val_bpb']:.4f} ± {facts['val_bpb_std']:.4f} bits per byte",
        f"{facts['bytes_total']:,} bytes of 16,000,000",
        facts["hardware"],
        f"{16_000_000 - facts['bytes_total']:,} free",
        facts["script_sha256"],
        "seed 1337: 2.361",
        "Not measured",
    ):
        assert figure in page.words, figure
    for result in facts["seed_results"].values():
        assert f"{result['val_bpb']:.4f} ± {result['val_bpb_stderr']:.4f}" in page.words
    stated = report_page.stated_figures(text)
    assert [entry["seed"] for entry in stated] == [42, 1337, 2026]
    assert stated[0]["val_bpb"] == 2.36860086 and stated[0]["bytes"]["embed"] == 85216
    assert sum(stated[0]["bytes"].values()) < stated[0]["artifact_bytes"]


def test_means_by_position():
    """Of the three seeds of the shipped record."""
    found = report_page.mean_positions(report.read_logs(LOGS))["l2r"]
    first = [float(re.search(r"^prefix:0 bpb:(\S+)", path.read_text(), re.M)[1]) for path in LOGS]
    assert found[0].positions == "0" and found[0].bpb == pytest.approx(sum(first) / 3)
    assert [part.positions for part in found][-1] == "64-127"


def test_a_page_needs_nothing_else(run, samples, tool, tmp_path):
    """No address, no file; each chart has a name, each range and group too; ids are there once."""
    done = tool(report, run, "--samples", samples(), "--out", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    text, page = page_of(tmp_path / "a.html")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<img|<iframe", text)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style", "onclick", "onload"} & attributes.keys(), tag
        assert attributes.get("href", "#").startswith("#")
        if attributes.get("role") or tag in ("input", "nav") and attributes.get("type") != "radio":
            assert attributes.get("aria-label"), (tag, attributes)
    assert len(page.ids) == len(set(page.ids))
    assert {attributes["href"][1:] for attributes in page.all("a")} <= set(page.ids)
    assert all(attributes["role"] == "img" for attributes in page.all("svg"))
    assert len(page.all("svg")) % 2 == 0 and len(page.all("svg")) >= 12
    assert len(page.all("details")) >= 6
    scripted = [attributes for attributes in page.all("div") if "data-sample" in attributes]
    for attributes in scripted + page.all("fieldset"):  # not there without a script
        assert "hidden" in attributes
    assert len(scripted) == 1
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert len(text) < 1_500_000


def test_two_pages_of_the_same_files_are_identical(run, samples, tool, tmp_path):
    for name in ("a.html", "b.html", "a.html"):  # its own page is replaced
        options = ["--samples", samples(), "--seqs", "4", "--out", tmp_path / name]
        assert tool(report, run, *options).returncode == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_text_is_only_text():
    """Of tokens, samples and names: nothing of it is an element, and nothing is lost."""
    text = report_page.page(hostile_report())
    page = Page(text)
    assert len(page.all("script")) == 3 and "<script>alert" not in text
    assert page.words.count(HOSTILE) >= 6 and "<b>&" in page.words and "<b>" not in text
    assert "a␀␛��" in page.words and "\0" not in text
    assert text.encode("utf-8")
    carried = re.search(r'id="steps">(.*?)</script>', text)[1]
    assert json.loads(carried)[0][0] == [[0, HOSTILE]]


def test_what_a_causal_model_has():
    """No shares, and one order."""
    whole = hostile_report()
    passage = Passage(1, [Token("a", 1.5, None), Token("b", 2.5, None)])
    measured = whole.measured._replace(shares=[], passages=[passage])
    page = Page(report_page.page(whole._replace(measured=measured, samples=[])))
    for words in ("nothing is masked", "no other order than left to right", "2.00 bits per token"):
        assert words in page.words
    assert "Any order" not in page.words and "No samples were given" in page.words


def test_colours_are_there_in_both_themes():
    sheet = (common.TOOLS / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r"^:root.*?\{(.*?)^\}", sheet, re.MULTILINE | re.DOTALL)
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in blocks)
    assert light == dark and set(re.findall(r"var\((--\w+)\)", sheet)) <= light
    assert report_page.style().count("\n  color-scheme: dark;") == 2
    assert {f"--b{n}" for n in range(1, len(report_page.BITS_STEPS) + 1)} <= light
    assert {f"--o{n}" for n in range(report_page.ORDER_SHADES)} <= light
    assert {f"--s{n}" for n in range(charts.COLORS)} <= light


def linear(colour):
    """Red, green and blue of #rgb or #rrggbb, as light: sRGB, IEC 61966-2-1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = torch.tensor(list(bytes.fromhex(digits))).double() / 255
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


XYZ = torch.tensor(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
).double()


def contrast(one, other):
    """From 1 to 21 (WCAG 2)."""
    low, high = sorted((XYZ[1] @ linear(colour)).item() for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def difference(one, other):
    """CIE 1976; about 2 can just be seen."""

    def lab(colour):
        x = XYZ @ linear(colour) / XYZ.sum(1)
        f = torch.where(x > (6 / 29) ** 3, x ** (1 / 3), x / (3 * (6 / 29) ** 2) + 4 / 29)
        return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return (lab(one) - lab(other)).norm().item()


def test_contrast_and_difference_are_those_of_their_definitions():
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert difference("#fff", "#000") == pytest.approx(100, abs=0.01)
    assert difference("#ff0000", "#00ff00") == pytest.approx(170.6, abs=0.1)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_on_every_shade_and_shades_can_be_told_apart(theme):
    sheet = (common.TOOLS / "report.css").read_text(encoding="utf-8")
    block = re.findall(r"^:root.*?\{(.*?)^\}", sheet, re.MULTILINE | re.DOTALL)[theme]
    colours = dict(re.findall(r"--(\w+): (#\w+);", block))
    cost = ["page", *(f"b{n}" for n in range(1, len(report_page.BITS_STEPS) + 1))]
    order = [f"o{n}" for n in range(report_page.ORDER_SHADES)]
    for name in [*cost, *order, "given", "soft"]:
        assert contrast(colours["ink"], colours[name]) >= 4.5, name
    for name in ("quiet", "accent", "warning"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    for one, other in [*itertools.pairwise(cost), *itertools.pairwise(order)]:
        assert difference(colours[one], colours[other]) >= 6, (one, other)
    assert difference(colours[cost[-2]], colours[cost[-1]]) >= 12


# ---- Logs


def test_curves_are_those_of_the_log():
    curve = read_curve(LOG)
    assert curve.name == "train_seed42" and curve.planned == 1300
    assert curve.final == 2.36860086 and len(curve.bpb) == len(curve.seconds) == 7
    assert (curve.steps[0], curve.seconds[0], curve.bpb[0]) == (200, 22.416, 2.9764)
    assert (curve.steps[-1], curve.seconds[-1]) == (1300, 145.862)


def test_a_curve_forgets_what_was_done_again(tmp_path):
    """A validation after the checkpoint from which the run went on did not lead to its end."""
    text = LOG.read_text(encoding="utf-8")
    at = text.index("step:1000/1300 train_loss", text.index("\nrun_id:"))
    again = text[text.index("\nrun_id:") + 1 : text.index("step:1/1300 ")]
    resumed = "resumed:logs/my runs/a.ckpt step:600/1300 train_time:70215ms best_val_bpb:2.7\n"
    path = tmp_path / "again.txt"
    path.write_text(text[:at] + again + resumed + text[at:], encoding="utf-8")
    whole, curve = read_curve(LOG), read_curve(path)
    kept = [bpb for bpb in whole.bpb if bpb != whole.bpb[3]]  # that of step 800
    assert curve.bpb == kept and curve.final == whole.final


def test_a_run_that_ended_while_it_was_scored_claims_nothing(tmp_path, tool):
    """Whatever its last line is."""
    lines = LOG.read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "cut.txt"
    for left_out in (1, 2, 5):
        path.write_text("".join(lines[:-left_out]), encoding="utf-8")
        done = tool(report, path, "--logs-only", "--out", tmp_path / "a.html")
        assert done.returncode == 0, done.stderr
        (log,) = report.read_logs([path])
        assert log.run is None and log.curve.bpb


def test_a_run_that_has_not_finished_is_a_curve(tmp_path, tool):
    text = LOG.read_text(encoding="utf-8")
    path = tmp_path / "begun.txt"
    path.write_text(text[: text.index("step:700/1300 ")], encoding="utf-8")
    assert tool(report, path, "--out", tmp_path / "a.html").returncode == 0
    _, page = page_of(tmp_path / "a.html")
    assert "No score yet" in page.words and "not finished: step 600 of 1,300" in page.words
    assert tool(report, path, LOGS[0], "--out", tmp_path / "a.html").returncode == 0
    text, page = page_of(tmp_path / "a.html")
    assert "not finished" in page.words and "2.3611 ± 0.0066 bits per byte" in page.words
    assert [entry.get("seed") for entry in report_page.stated_figures(text)] == [1337, None]


def test_wrong_logs_are_one_line(tmp_path, tool):
    out = ["--out", tmp_path / "a.html"]
    source, end, _ = LOG.read_text(encoding="utf-8").partition("\nrun_id:")
    begun, wrong, other = (tmp_path / name for name in ("begun.txt", "wrong.txt", "other.txt"))
    begun.write_text(f"{source}{end}begun started:now\n", encoding="utf-8")
    refused(tool(report, begun, *out), "begun.txt: no validation in this log")
    text = LOGS[0].read_text(encoding="utf-8")
    wrong.write_text(text.replace("Code size: ", "Code size: 1"), encoding="utf-8")
    refused(tool(report, wrong, *out), "wrong.txt: the sizes in the log of seed 1337 do not add up")
    other.write_text(text.replace(" MATRIX_LR=0.02", " MATRIX_LR=0.03"), encoding="utf-8")
    refused(tool(report, LOG, other, *out), "the logs differ in MATRIX_LR")
    refused(tool(report, LOG, LOG, *out), "have the same seed, 42")
    refused(tool(report, tmp_path / "absent.txt", *out), "absent.txt: there is no such file")
    refused(tool(report, "/dev/zero", *out), "/dev/zero: is no ordinary file")
    (tmp_path / "a.mdlm").write_bytes(b"\xff")
    refused(tool(report, tmp_path / "a.mdlm", *out), "a.mdlm: is no log of a run, and no text")
    assert not (tmp_path / "a.html").exists()


# ---- What needs the model


def windows_of(hp, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(hp.vocab_size, (count, 1 + hp.train_seq_len), generator=generator)


def test_shares_average_to_the_enumerated_bound():
    """All masks of one window, by size: the mean over the sizes is the any-order bound."""
    hp = tiny_hp()
    model = random_model(hp)
    window = windows_of(hp, 1)
    exact = []
    for size in range(1, 5):
        masks = torch.zeros(math.comb(4, size), 4, dtype=torch.bool)
        for row, chosen in enumerate(itertools.combinations(range(4), size)):
            masks[row, list(chosen)] = True
        nll = tm.masked_nll(model, window.expand(len(masks), -1), masks).double().sum(1)
        exact.append(nll.mean().item() / size / math.log(2))
    many = window.expand(4000, -1)
    shares = list(report.measure_shares(model, many, seed=0))
    assert [(share.masked, share.of) for share in shares] == [(n, 4) for n in range(1, 5)]
    for share, bits in zip(shares, exact, strict=True):
        assert abs(share.bits - bits) < 4 * share.stderr + 1e-5
    generator = torch.Generator().manual_seed(0)
    nats = tm.nelbo(model, window[:, 1:].expand(4000, -1), 4, generator)
    stderr = nats.std().item() / 4000**0.5 / 4 / math.log(2)
    bound = nats.mean().item() / 4 / math.log(2)
    assert sum(exact) / 4 == pytest.approx(bound, abs=4 * stderr) and stderr < 0.01


def test_masks_leave_anchors_and_fill_blocks():
    hp = tiny_hp(vocab_size=8, train_seq_len=8, train_batch_tokens=16, block_size=4)
    model = random_model(hp)
    mask = report.masks_of(model, windows_of(hp, 5), 3, seed=0)
    assert (mask.view(-1, 4).sum(1) == 3).all()
    hp = tiny_hp(vocab_size=8, train_seq_len=8, train_batch_tokens=16, anchor_bos=True)
    window = windows_of(hp, 5)
    window[:, 2] = tm.BOS_ID
    mask = report.masks_of(random_model(hp), window, 8, seed=0)
    assert torch.equal(mask, window[:, 1:] != tm.BOS_ID)


@pytest.mark.parametrize(
    "changes", [{}, dict(objective="ar"), dict(block_size=4)], ids=["mdlm", "ar", "block"]
)
def test_bits_of_a_passage_are_those_of_the_chain_rule(tiny_env, changes, monkeypatch):
    """Left to right; and over random orders their mean, the least and the most."""
    monkeypatch.setattr(report, "ORDERS", 5)
    hp = dataclasses.replace(tm.Hyperparameters.from_env(tiny_env), **changes)
    model, val = random_model(hp, scale=0.2), val_split(hp)
    sp = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    assert report.passage_windows(val, hp, 3) == [3, 4]  # of 32 tokens each
    passages = report.measure_passages(model, val, sp, [3, 4], common.Progress("test"))
    window = val.stream.windows([3, 4], hp.train_seq_len)
    expected = tm.chain_rule(model, window[:, 1:], before=window[:, 0]).double() / math.log(2)
    found = [[token.left_to_right for token in passage.tokens] for passage in passages]
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=1e-5)
    if hp.causal:
        assert all(token.orders is None for passage in passages for token in passage.tokens)
        return
    drawn = [
        tm.chain_rule(model, window[:, 1:], order="random", seed=seed, before=window[:, 0])
        for seed in range(5)
    ]
    bits = torch.stack(drawn)[:, 0, 7].double() / math.log(2)
    assert passages[0].tokens[7].orders == pytest.approx(
        (bits.mean().item(), bits.min().item(), bits.max().item()), abs=1e-5
    )
    text = "".join(token.piece for passage in passages for token in passage.tokens)
    decoded = sp.decode(window[:, 1:].flatten().tolist())
    assert decoded.split()[3] in text


def test_bits_by_position_where_the_log_has_none(tiny_env):
    hp = tm.Hyperparameters.from_env(tiny_env)
    model, val = random_model(hp, scale=0.2), val_split(hp)
    found = report.measure_positions(model, hp, val, 3)["l2r"]
    assert [part.positions for part in found] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    window = val.stream.windows(tm.evenly_spaced(val.stream.count_windows(32), 3), 32)
    size = tm.token_bytes(window[:, 1:], window[:, 0], val.luts)[:, 16:].sum()
    bits = tm.chain_rule(model, window[:, 1:])[:, 16:].double().sum() / math.log(2)
    assert found[-1].bpb == pytest.approx((bits / size).item(), rel=1e-5)


def test_the_artifact_beside_the_log_is_measured(run, tool, tmp_path):
    """Scored on all windows again, it has the score of the log."""
    done = tool(report, run, "--seqs", "0", "--window", "2", "--out", tmp_path / "a.html")
    assert done.returncode == 0 and not done.stderr
    _, page = page_of(tmp_path / "a.html")
    again = re.search(
        r"scored again \(nelbo\) on (\S+) windows it has (\S+) ± .*? says (\S+)", page.words
    )
    assert again[2] == again[3]
    assert "windows 2, 3 of the validation split" in page.words
    assert "Bits of a token" in [attributes.get("aria-label") for attributes in page.all("ul")]
    done = tool(report, run, "--logs-only", "--out", tmp_path / "a.html")
    _, page = page_of(tmp_path / "a.html")
    assert "scored again" not in page.words and page.words.count("Not measured") == 2


def test_wrong_artifacts_are_one_line(run, tool, tmp_path, tiny_env):
    out = ["--out", tmp_path / "a.html"]
    for name, data, message in [
        ("absent.mdlm", None, "absent.mdlm: there is no such file"),
        ("foreign.mdlm", b"foreign", "foreign.mdlm: not an artifact of this version"),
    ]:
        if data:
            (tmp_path / name).write_bytes(data)
        refused(tool(report, run, "--artifact", tmp_path / name, *out), message)
    refused(tool(report, run, "--artifact", tmp_path, *out), f"{tmp_path}: is a folder")
    hp = dataclasses.replace(tm.Hyperparameters.from_env(tiny_env), num_layers=2)
    tm.save_artifact(random_model(hp), hp, tmp_path / "other.mdlm")
    done = tool(report, run, "--artifact", tmp_path / "other.mdlm", *out)
    refused(done, "other.mdlm: has ", "it is not the artifact of this run")
    done = tool(report, run, "--artifact", run, "--logs-only", *out)
    refused(done, "is not used with --logs-only")
    own = run.with_suffix(".mdlm")
    done = tool(report, run, "--artifact", own, "--window", "99999", *out)
    refused(done, "--window 99999: the split has windows 0 to ")
    done = tool(report, run, "--artifact", own, "--data", tmp_path, *out)
    refused(done, "DATA_PATH")
    assert not (tmp_path / "a.html").exists()


def test_an_artifact_that_cannot_be_used_is_left_out_if_nobody_asked_for_it(run, tool, tmp_path):
    """Beside the log, but without the text of its run: the page says so."""
    done = tool(report, run, "--data", tmp_path, "--out", tmp_path / "a.html")
    assert done.returncode == 0 and done.stderr.startswith("not measured: ")
    assert done.stderr.count("\n") == 1
    assert "or the text of its run, could not be used" in page_of(tmp_path / "a.html")[1].words


def test_a_log_without_an_artifact_is_told(run, tool, tmp_path):
    alone = tmp_path / "alone.txt"
    shutil.copy(run, alone)
    done = tool(report, alone, "--out", tmp_path / "a.html")
    assert done.returncode == 0
    assert done.stderr == (f"not measured: no artifact beside {alone}\n")
    assert "without the artifact of the run." in page_of(tmp_path / "a.html")[1].words
    assert not tool(report, alone, "--logs-only", "--out", tmp_path / "a.html").stderr


def test_text_of_another_run_is_refused(run):
    (log,) = report.read_logs([run])
    hp = tm.Hyperparameters()
    val = tm.Split(None, None)
    stream = type("Stream", (), dict(total=log.run.val_tokens, facts=dict(bytes=7)))
    with pytest.raises(tm.InputError, match="has 7 validation bytes, but the log says "):
        report.check_text(val._replace(stream=stream), hp, log.run)


def test_pieces_are_as_they_read(tiny_env):
    sp = tm.load_tokenizer(tiny_env["TOKENIZER_PATH"], 384)
    pieces = {sp.id_to_piece(n): report.piece_of(sp, n) for n in range(384)}
    assert pieces["<s>"] == "⟨s⟩" and pieces["<0x0A>"] == "\n" and pieces["<0xE9>"] == "⟨E9⟩"
    assert pieces["\u2581the"] == " the" and report.piece_of(sp, 384) == "⟨384⟩"


# ---- Samples


def test_steps_of_a_sample(samples, tiny_env):
    """The mask is None; a token that changes later is looked up, if the tokenizer is there."""
    sp = tm.load_tokenizer(tiny_env["TOKENIZER_PATH"], 384)
    for tokenizer, first in ((sp, report.piece_of(sp, 8)), (None, HOSTILE)):
        (sample,) = report.read_samples(samples(), tokenizer).samples
        assert sample.steps == [[(1, first), (2, "\n")], [(1, None)], [(1, HOSTILE)]]
    layers = report_page.visible_spans(sample)
    assert layers["given"] == [(0, 0, 2)] and layers["gone"] == [(1, 1, 1)]
    assert sorted(layers["now"]) == [(1, 0, 0), (1, 2, 2), (2, 0, 0)]
    assert sorted(layers["seen"]) == [(1, 0, 0), (1, 2, 2), (2, 0, 2)]
    assert report_page.last_reveals(sample) == {1: 2, 2: 0}
    page = Page(report_page.sample_section([report.read_samples(samples(), None)]))
    assert "2 tokens in 3 calls · 0.2 s · 12.5 bits, 6.25 a token" in page.words


WRONG_SAMPLES = {
    "its version is 2": dict(version=2),
    "sampler is no text": dict(sampler=3),
    "length or mask_id": dict(length=0),
    "settings is no object": dict(settings=[]),
    "samples is no list": dict(samples=[]),
    "a sample is no object": dict(samples=[1]),
    "prompt_or_template of a sample": dict(prompt_or_template=[True]),
    "tokens of a sample": dict(tokens=[1, 2, True]),
    "pieces of a sample": dict(pieces=["a", "b", 3]),
    "calls of a sample": dict(calls=1.5),
    "4 calls of a sample, but 3 steps": dict(calls=4),
    "seed of a sample": dict(seed=10**4000),
    "seconds or bits of": dict(seconds=-1),
    "384 in the tokens of a sample is none": dict(tokens=[5, 7, 384]),
    "385 in the tokens of a step is none": dict(calls=1, steps=[dict(positions=[1], tokens=[385])]),
    "seconds or bits": dict(bits="many"),
    "steps of a sample": dict(steps=[]),
    "a step is no object": dict(steps=[1]),
    "the tokens of a step": dict(steps=[dict(positions=[1], tokens=["a"])]),
    "not one token for each position": dict(steps=[dict(positions=[1], tokens=[])]),
    "a position outside 0 … 2": dict(steps=[dict(positions=[3], tokens=[1])]),
    "changes a position that is given": dict(calls=1, steps=[dict(positions=[0], tokens=[1])]),
    "token 7 at position 1 of a sample, but 8 after its steps": dict(
        calls=1, steps=[dict(positions=[1, 2], tokens=[8, 9])]
    ),
    "token 9 at position 2 of a sample, but 384 after its steps": dict(
        calls=1, steps=[dict(positions=[1], tokens=[7])]
    ),
}


@pytest.mark.parametrize("message", WRONG_SAMPLES)
def test_wrong_samples_are_one_line(message, samples, tool, tmp_path):
    path = samples(**WRONG_SAMPLES[message])
    done = tool(report, LOG, "--samples", path, "--out", tmp_path / "a.html")
    refused(done, f"{path}: ", message)
    assert not (tmp_path / "a.html").exists()


def test_samples_that_are_not_there_are_one_line(tool, tmp_path):
    for path, fault in ((tmp_path, "is a folder"), ("/none.json", "there is no such file")):
        done = tool(report, LOG, "--samples", path, "--out", tmp_path / "a.html")
        refused(done, f"--samples {path}: {fault}")


@pytest.mark.parametrize(
    "name, changes, found",
    [
        ("samples", dict(samples=[sample_json()["samples"][0]] * 30), "30 samples"),
        ("tokens", dict(samples=[sample_json()["samples"][0]] * 3), "30 tokens"),  # 3 + 4 + 3 each
        ("characters", dict(pieces=["", "x" * 30, ""]), "117 characters"),  # three times, and names
    ],
)
def test_what_would_make_an_endless_page_is_refused(
    name, changes, found, samples, tool, tmp_path, monkeypatch
):
    """In one file, or in several together."""
    out = ["--logs-only", "--out", tmp_path / "a.html"]
    path = samples(**changes)
    monkeypatch.setitem(report.MOST_SHOWN, name, 29)
    done = tool(report, LOG, "--samples", path, *out)
    refused(done, f"{path}: ", f"would show {found}", "more than 29: give fewer or shorter")
    assert not (tmp_path / "a.html").exists()
    monkeypatch.setitem(report.MOST_SHOWN, name, int(found.split()[0]))
    assert tool(report, LOG, "--samples", path, *out).returncode == 0
    refused(tool(report, LOG, "--samples", path, "--samples", path, *out), f"{path}: ", name)


def test_a_page_of_the_most_samples_is_no_burden():
    """Sizes of the page for as much as MOST_SHOWN allows, from a tenth of it."""
    (one,) = sample_json()["samples"]
    length = report.MOST_SHOWN["tokens"] // 30
    steps = [dict(positions=[n], tokens=[7]) for n in range(length)]
    same = dict(prompt_or_template=[False] * length, tokens=[7] * length, pieces=[" the"] * length)
    value = sample_json(samples=[one | same | dict(calls=length, steps=steps)])
    shown = report.samples_of(value | dict(length=length), Path("x"), None)
    assert report.amounts(shown)["tokens"] == 3 * length
    assert len(report_page.sample_section([shown])) < 2_000_000
    value = sample_json(samples=[one] * (report.MOST_SHOWN["samples"] // 10))
    assert len(report_page.sample_section([report.samples_of(value, Path("x"), None)])) < 1_000_000


def test_a_samples_file_that_is_too_large_is_said_to_be(samples, tool, tmp_path, monkeypatch):
    path = samples()
    monkeypatch.setattr(common, "LARGEST_OUTPUT", 100)
    done = tool(report, LOG, "--samples", path, "--out", tmp_path / "a.html")
    refused(done, f"{path}: has more than 100 bytes, too many to be read")


# ---- Charts


@pytest.mark.parametrize(
    "low, high, most, ticks",
    [
        (0, 10, 6, [0, 2, 4, 6, 8, 10]),
        (2.3, 3.02, 5, [2.4, 2.6, 2.8, 3.0]),
        (0, 452.9, 5, [0, 100, 200, 300, 400]),
        (-3, 3, 3, [-2, 0, 2]),
    ],
)
def test_ticks_are_round(low, high, most, ticks):
    assert charts.nice_ticks(low, high, most) == pytest.approx(ticks)


def test_labels_do_not_lie_on_each_other():
    moved = charts.spread([50, 52, 51, 200], 15, 30, 260)
    assert moved[3] == 200 and sorted(moved) == [moved[0], moved[2], moved[1], moved[3]]
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(sorted(moved)))
    assert charts.spread([10.0], 15, 30, 260) == [30]
    assert min(charts.spread([259, 260, 260], 15, 30, 260)) >= 30


def test_a_chart_of_one_value_has_an_axis():
    axis = charts.number_axis("", [2.0], 5)
    assert axis.low < 2 < axis.high and axis.ticks


def test_bars_over_the_limit_are_full_and_marked():
    drawn = charts.bar_chart("about", [charts.Bar("a", 1.2, "b")])
    assert 'width="720.0" height="10.0" class="over"' in drawn and "used" not in drawn


def test_a_step_that_was_begun_in_time_is_not_over_the_limit():
    run = parse_log(LOG)
    for seconds, marked in ((600.9, 0), (601.1, 2)):  # in the wide picture and the narrow one
        drawn = report_page.budget_bars([run, run._replace(train_seconds=seconds)])
        assert drawn.count('class="over"') == marked and "601 of 600 s" in drawn


# ---- In a browser


def browse(path, tmp_path):
    """The document after its scripts have run; fails if one of them complains."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and complaints == [], done.stderr[-3000:]
    return done.stdout


DRIVER = """
const told = [];
const one = (selector) => document.querySelector(selector);
const hue = () => getComputedStyle(document.body).color;
const text = () => one(".written").textContent;
const key = (name) => one(".passage").dispatchEvent(new KeyboardEvent("keydown", {key: name}));
try {
  const before = hue();
  one('.theme input[value="dark"]').click();
  told.push(document.documentElement.dataset.theme, before !== hue());
  const range = one(".controls input");
  told.push(one(".controls").hidden, range.max, text());
  for (const step of [0, 1, 2, 3]) {
    range.value = step;
    range.dispatchEvent(new Event("input"));
    const masked = [...document.querySelectorAll(".written .masked")].length;
    told.push([text(), masked, one(".controls output").textContent]);
  }
  key("End");
  key("ArrowLeft");
  told.push(document.querySelectorAll(".here").length, one(".readout").textContent);
  one(".play").click();
  told.push(one(".play").textContent);
} catch (error) { told.push(String(error)); }
document.title = JSON.stringify(told);
"""


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_in_a_browser(tmp_path, monkeypatch):
    """The switch of colours, the slider and the tokens work, and no script complains."""
    program = report_page.script()
    monkeypatch.setattr(report_page, "script", lambda: program + DRIVER)
    path = tmp_path / "a.html"
    path.write_text(report_page.page(hostile_report()), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(path, tmp_path), re.DOTALL)[1]
    told = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    theme, changed, hidden, most, final, *steps, here, readout, playing = told
    assert (theme, changed, hidden, most) == ("dark", True, False, "3")
    rest = final.removeprefix(HOSTILE)
    assert final.startswith(HOSTILE)
    assert steps[0] == [final, 6, "0 of 3 calls"]
    assert steps[1] == [final, 5, "1 of 3 calls"]
    assert steps[2][1:] == [5, "2 of 3 calls"] and steps[2][0].startswith(HOSTILE + "x")
    assert steps[3][0].startswith("yx") and len(steps[3][0]) < len(HOSTILE) + len(rest)
    assert (here, readout) == (1, "“<!--”: 4.00 bits") and playing == "Pause"


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_a_page_without_samples_in_a_browser(tmp_path, tool):
    assert tool(report, *LOGS, "--out", tmp_path / "a.html").returncode == 0
    assert "<h1>demo, 3 runs</h1>" in browse(tmp_path / "a.html", tmp_path)
