"""tools/make_record.py: records follow from logs, and the shipped one still does."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import make_record
import pytest
import report
import run_log
from conftest import ROOT, SHIPPED, body_of, refused, run_python
from make_record import commands, notes, over_budget, submission
from run_log import HEADLINES, SEPARATOR, parse_log

import train_mdlm as tm

FIELDS = """
    author github_id name blurb date track val_loss seed_results bytes_total wallclock_seconds
    pytorch_version val_bpb_estimator
""".split()


@pytest.fixture(scope="module")
def logs(tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    env = tiny_env | dict(ITERATIONS="2")
    for seed in ("1", "2"):
        run_python("train_mdlm.py", cwd=folder, RUN_ID=f"s{seed}", SEED=seed, **env)
    return [folder / "logs/s1.txt", folder / "logs/s2.txt"]


@pytest.fixture
def make(tool, monkeypatch):
    """Calls make_record.py on logs; its report measures little."""
    monkeypatch.setattr(report, "ORDERS", 1)
    monkeypatch.setattr(report, "PASSAGE_TOKENS", 32)

    def call(logs, out, *extra):
        typed = ["--name", "tiny", "--author", "A", "--github-id", "a", "--blurb", "A test."]
        return tool(make_record, *logs, *typed, "--out", out / "records", *extra)

    return call


@pytest.fixture(scope="module")
def record(logs, tmp_path_factory):
    """The folder of a record, to be copied."""
    typed = dict(author="A", github_id="a", name="tiny", blurb="A test.", track="track")
    return make_record.make(logs, typed, tmp_path_factory.mktemp("made") / "records", [])


def edit(path, *changes, count=1):
    """Replaces patterns in the lines of a log, or in another file."""
    text = path.read_text(encoding="utf-8")
    source, separator, body = text.partition(SEPARATOR)
    if not separator:
        source, body = "", text
    for pattern, replacement in changes:
        body, found = re.subn(pattern, replacement, body, count=count, flags=re.MULTILINE)
        assert found, pattern
    path.write_text(source + separator + body, encoding="utf-8")


def test_record_is_made_from_the_logs_and_checks(logs, tmp_path, make, tool, tiny_env):
    folder = Path(make(logs, tmp_path).stdout.strip())
    facts = json.loads((folder / "submission.json").read_text())
    line = r"_exact val_loss:\S+ val_bpb:(\S+)"
    exact = [float(re.search(line, body_of(path))[1]) for path in logs]
    assert facts["val_bpb"] == pytest.approx(sum(exact) / 2, abs=1e-8)
    assert facts["val_bpb_std"] == pytest.approx(abs(exact[0] - exact[1]) / 2**0.5, abs=1e-8)
    assert facts["seeds"] == [1, 2] and facts["step_stop"] == 2 and facts["dataset"] == "tiny_sp384"
    script = (ROOT / "train_mdlm.py").read_bytes()
    assert facts["bytes_code"] == len(script) and "CPU" in facts["hardware"]
    requirements = (ROOT / "requirements.txt").read_bytes()
    assert facts["requirements_sha256"] == hashlib.sha256(requirements).hexdigest()
    tokenizer = Path(tiny_env["TOKENIZER_PATH"]).read_bytes()
    assert facts["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert facts["val_tokens"] == tm.TokenStream(tiny_env["DATA_PATH"], "val").total
    for field in FIELDS:
        assert facts[field], field
    own = (folder / "submission.json").read_bytes()
    assert (tmp_path / "submission.json").read_bytes() == own
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "report.html",
        "requirements.txt",
        "submission.json",
        "train_mdlm.py",
        "train_seed1.log",
        "train_seed2.log",
    ]
    assert (folder / "train_mdlm.py").read_bytes() == script
    checked = tool(make_record, "--check", folder)
    assert checked.stdout == f"{folder}: everything follows from the logs\n"
    refused(make(logs, tmp_path), "is there already")


def test_sizes_and_times_of_a_record_are_the_largest_of_its_seeds():
    runs = [
        parse_log(path)._replace(
            total_bytes=100 + number,
            train_seconds=5.0 - number,
            eval_seconds=2.0 + number,
            step_stop=9 - number,
            lives=1 + number,
            skipped_steps=2 * number,
        )
        for number, path in enumerate(sorted(SHIPPED.glob("*.log")))
    ]
    facts = submission(runs, {}, {})
    assert facts["bytes_total"] == 102 and facts["step_stop"] == 9
    assert facts["wallclock_seconds"] == 5.0 and facts["eval_seconds"] == 4.0
    assert facts["val_bpb"] == pytest.approx(sum(run.val_bpb for run in runs) / 3)
    results = facts["seed_results"]
    assert "lives" not in results["1337"] and results["2026"]["lives"] == 2
    assert "skipped_steps" not in results["1337"] and results["42"]["skipped_steps"] == 4
    assert "interrupted and resumed, in 3 lives" in notes(runs)
    assert "Seed 42 skipped 4 steps" in notes(runs)


@pytest.mark.parametrize(
    "value, name, limit",
    [("total_bytes", "code + artifact", 16_000_000), ("eval_seconds", "evaluation", 600)],
)
def test_what_is_over_the_limit_of_the_challenge(value, name, limit):
    run = parse_log(SHIPPED / "train_seed42.log")
    assert over_budget([run, run._replace(**{value: limit})]) == []
    (warning,) = over_budget([run._replace(**{value: limit + 1}), run])
    assert warning.startswith(f"{name} is {limit + 1:,} ")


@pytest.mark.parametrize(
    "name, pattern, replacement, message",
    [
        ("submission.json", r'"val_bpb": [\d.]+', '"val_bpb": 0.9901', "val_bpb is 0.9901"),
        ("submission.json", r'"seeds": ', '"seed": 3, "seeds": ', "seed is 3"),
        (
            "submission.json",
            r'"author": ',
            '"author": "B", "author": ',
            "is not what the logs",
        ),
        ("submission.json", r'"val_bpb": [\d.]+', '"val_bpb": NaN', "val_bpb is nan"),
        ("submission.json", r'"blurb": "A test."', '"blurb": ["A"]', "is not that of a record"),
        ("submission.json", r"(?s)\A.*", "[]", "is not that of a record"),
        ("submission.json", r"(?s)\A.*", "[" * 100_000, "is not JSON that a tool wrote"),
        ("submission.json", r"\A", "\0", "is not JSON that a tool wrote"),
        (
            "submission.json",
            r'"requirements_sha256": "\w',
            '"requirements_sha256": "x',
            "made with",
        ),
        ("requirements.txt", "torch==", "torch>=", "is not the file that the record was made with"),
        ("train_mdlm.py", r"\Z", "# better\n", "is not what the logs say"),
        ("README.md", "val_bpb ", "val_bpb 0", "is not what the logs say"),
        ("report.html", "val_bpb ", "val_bpb 0", "is not the file that the record was made with"),
        ("train_seed1.log", "SEED=1", "SEED=3", "train_seed2.log, train_seed3.log"),
    ],
)
def test_an_edited_record_is_found_out(record, tmp_path, tool, name, pattern, replacement, message):
    folder = shutil.copytree(record, tmp_path / record.name)
    edit(folder / name, (pattern, replacement), count=0 if "SEED" in pattern else 1)
    refused(tool(make_record, "--check", folder), message, str(folder))


def test_a_report_belongs_to_its_record(record, tmp_path, tool):
    """Named by its digest, with the figures of the logs; a folder without one is an earlier one."""
    folder = shutil.copytree(record, tmp_path / "a")
    page, facts = folder / "report.html", folder / "submission.json"
    for other in ('"val_bpb":0', '"val_bpb":"damaged'):
        edit(page, (r'"val_bpb":\d', other))
        digest = hashlib.sha256(page.read_bytes()).hexdigest()
        edit(facts, (r'"report_sha256": "\w+"', f'"report_sha256": "{digest}"'))
        done = tool(make_record, "--check", folder)
        refused(done, "report.html: its figures are not those of the")
    page.unlink()
    refused(tool(make_record, "--check", folder), "report.html: is not the file that the record")
    edit(facts, (r',\n  "report_sha256": "\w+"', ""))
    edit(folder / "README.md", (r"\n\[report.html\].*\n", ""))
    done = tool(make_record, "--check", folder)
    assert done.returncode == 0, done.stderr
    page.write_bytes((record / "report.html").read_bytes())
    refused(tool(make_record, "--check", folder), "report.html: submission.json says nothing of it")


def test_samples_are_shown_in_the_report_of_a_record(logs, tmp_path, make):
    samples = tmp_path / "samples.json"
    samples.write_text("{}")
    refused(make(logs, tmp_path, "--samples", samples), "samples.json: its version is None, not 1")
    assert not (tmp_path / "records").exists()
    sample = dict(seed=5, prompt_or_template=[False], tokens=[7], pieces=["<b>"], text="<b>")
    sample |= dict(calls=1, seconds=0.5, bits=None, steps=[dict(positions=[0], tokens=[7])])
    value = dict(version=1, artifact="a.mdlm", preset="demo", sampler="entropy", settings={})
    samples.write_text(json.dumps(value | dict(length=1, mask_id=384, samples=[sample])))
    done = make(logs, tmp_path, "--samples", samples)
    text = (Path(done.stdout.strip()) / "report.html").read_text(encoding="utf-8")
    assert "entropy, a.mdlm" in text and "&lt;b&gt;" in text and "<b>" not in text


def test_unusable_logs_are_refused(logs, tmp_path, make):
    (tmp_path / "x.txt").write_text("hello")
    refused(make([tmp_path / "x.txt"], tmp_path), "x.txt: not a log")
    refused(make([logs[0], logs[0]], tmp_path), "same seed")
    refused(make(logs, tmp_path, "--name", "../x"), "becomes a folder")
    refused(make(logs, tmp_path, "--name", ".."), "becomes a folder")
    refused(make(logs, tmp_path, "--track", ""), "becomes a folder")
    refused(make(logs, tmp_path, "--author", "\udce9"), "--author '\\udce9': is not plain text")
    refused(make([tmp_path / "absent\nlog"], tmp_path), "absent log: cannot be read")
    refused(make([], tmp_path), "give logs and --name")
    refused(make(logs, tmp_path, "--check", tmp_path), "takes no logs beside the folder")
    assert not (tmp_path / "records").exists() and not (tmp_path / "submission.json").exists()


def test_a_record_is_one_system(logs, tmp_path, make):
    for pattern, message in [
        (" MATRIX_LR=0.02 ", "differ in MATRIX_LR (['0.02', '0.03'])"),
        (r" torch:\S+", "differ in torch"),
    ]:
        other = tmp_path / "other.txt"
        other.write_bytes(logs[1].read_bytes())
        edit(other, (pattern, " MATRIX_LR=0.03 " if "LR" in pattern else " torch:1.0"))
        refused(make([logs[0], other], tmp_path), message, "one record is one system")


def test_files_of_somebody_else_stay(logs, tmp_path, make):
    (tmp_path / "submission.json").write_text('{"author": "me"}')
    refused(make(logs, tmp_path), "submission.json: is there already")
    assert (tmp_path / "submission.json").read_text() == '{"author": "me"}'
    assert not (tmp_path / "records").exists()
    (tmp_path / "submission.json").unlink()
    (tmp_path / "records").write_text("mine")
    refused(make(logs, tmp_path), "cannot be written: not a file name in a folder to write into")
    assert (tmp_path / "records").read_text() == "mine"


def test_a_record_is_made_whole_or_not_at_all(logs, tmp_path, make, monkeypatch):
    write_file = tm.write_file

    def full_disk(path, data):
        if path.name == "train_seed2.log":
            raise tm.InputError(f"{path}: cannot be written: No space left on device")
        write_file(path, data)

    monkeypatch.setattr(tm, "write_file", full_disk)
    refused(make(logs, tmp_path), "No space left")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert make(logs, tmp_path).returncode == 0


def test_over_budget_is_loud_in_the_record(logs, tmp_path, make):
    slow = tmp_path / "slow.txt"
    slow.write_bytes(logs[0].read_bytes())
    edit(
        slow,
        (r"^(step:2/2 .*train_time:)\d+ms step_avg:\S+ms", r"\g<1>700000ms step_avg:350000.00ms"),
        (
            "^Training time: .* s; .*",
            "Training time: 700.0 s; not counted\nOVER BUDGET: Training time",
        ),
        ("^OVER BUDGET: Training time", "OVER BUDGET: Training time is 700.0 s"),
        count=0,
    )
    folder = Path(make([slow], tmp_path).stdout.strip())
    assert "**OVER BUDGET: training is 700 s" in (folder / "README.md").read_text()
    facts = json.loads((folder / "submission.json").read_text())
    assert facts["over_budget"] == ["training is 700 s, more than the 601 allowed"]
    edit(slow, ("^OVER BUDGET.*\n", ""))
    refused(make([slow], tmp_path, "--name", "quiet"), "OVER BUDGET is said of it: False")


# ---- The figures of a log agree with one another


EDITS = {  # what somebody changed in a log, and which two figures then differ
    (r"(roundtrip val_loss):3.6331", r"\1:3.5331"): "val_loss:3.5331 is not the exact",
    (r"(roundtrip val_loss:\S+ val_bpb):2.3686", r"\1:2.3685"): "val_bpb:2.3685 is not the exact",
    (r"(_exact val_loss):3.63306640", r"\1:3.63310000"): "is not val_loss:3.63310000 · 2194560",
    (r"(_exact .* val_bpb):2.36860086", r"\1:2.36864000"): "val_bpb:2.36864000 is not val_loss",
    (r"(_exact val_loss):\S+", r"\1:nan"): "no exact score in this log",
    (r"(_exact .* val_bpb):\S+", r"\1:inf"): "no exact score in this log",
    (r"^(score:nelbo bpb):2.3686", r"\1:2.3687"): "score:nelbo has other figures",
    (r"^(score:nelbo .*stderr):0.0065", r"\1:0.0005"): "score:nelbo has other figures",
    (r"^(score:nelbo .*time):31391", r"\1:31392"): "score:nelbo has other figures",
    (r"^(score:nelbo .*seqs):17145", r"\1:17144"): "but seqs:17144 are 2194432 tokens",
    (r"^(score:nelbo .*tokens):2194560", r"\1:2194561"): "is not val_loss|tokens:2194561",
    (r"^(score:nelbo .*bytes):4856277", r"\1:4856297"): "4856297 bytes)",
    (r"^(score:nelbo .*tokens_per_s):69911", r"\1:69913"): "but tokens_per_s:69913",
    (r"^score:nelbo", "score:ar"): "has 0 scores nelbo, not one",
    (r"^score:l2r", "score:ar"): "score:ar is not for mdlm models",
    (r"^(hyperparameters:.*)", r"\1 BLOCK_SIZE=4"): "score:l2r has other figures than val_bpb",
    (r"^(score:nelbo.*)", r"\1\n\1"): "has 2 scores nelbo, not one",
    (r"^(score:l2r bpb):2.4042", r"\1:2.1042"): "score:l2r has bpb:2.1042, but that of no position",
    (r"^(score:l2r bpb):2.4042", r"\1:2,1"): "is not as train_mdlm.py writes it",
    (r"^(score:l2r .*seqs):32 tokens:4096", r"\1:31 tokens:3968"): "but 32 windows were to be",
    (r"^(score:l2r .*time):5826", r"\1:5836"): "score:l2r has time:5836ms, but tokens_per_s:703",
    (r"^(score:l2r.*)", r"\1\n\1"): "two lines are on the same score",
    (r"^Evaluation time: 37.2", "Evaluation time: 37.1"): "Evaluation time: 37.1 s, but the scores",
    (r"^Evaluation time: 37.2", "Evaluation time: 42.4"): "Evaluation time: 42.4 s, but the scores",
    (r"^Evaluation time: .*\n", ""): "no evaluation time in this log",
    (r"^Training time: 145.9", "Training time: 145.8"): "145.8 s is not the last train_time:145862",
    (r"^Training time: .*\n", ""): "no training time in this log",
    (
        r"^(step:1300/.* train_time):145862",
        r"\1:145864",
    ): "145862ms comes after step:1300 train_time:",
    (r"^(step:600/1300 train_loss.*) step_avg:\S+", r"\1 step_avg:117.04ms"): "but step_avg:117.04",
    (r"^step:1100(.*)", r"step:1200\1"): "train_time:|comes after",
    (r"^step:300/1300.*", "step:300/1300 train_loss:2.0 train_time:99000ms step_avg:330.00ms"): (
        "step:400/1300 train_time:45570ms comes after step:300/1300|comes after step:300"
    ),
    (r"^(step:800/1300 train_.*)94168ms step_avg:117.71", r"\g<1>94100ms step_avg:117.62"): (
        "step:800 has train_time:94100ms and train_time:94168ms"
    ),
    (r"^(step:800/1300 train_.*train_time):", r"\1: "): "is not as train_mdlm.py writes it",
    (r"^step:1300/1300 val_.*\n", ""): "no validation after its last step",
    (
        r"^(step:400/1300 val_loss):4.3019",
        r"\1:4.2019",
    ): "val_loss:4.2019 val_bpb:2.8526, in another",
    (r"^(step:400/1300 val_.*seqs):256", r"\1:255"): "validated on seqs:255, not on 256",
    (r"(?s)^step:1300/.*?(?=peak)", ""): "the last step is 1200 of 1300, and no line says",
    (r" ITERATIONS=1300", " ITERATIONS=1301"): "is not a step of ITERATIONS=1301",
    (r"^(Training time.*)", r"stopping_early: x train_time:145862ms step:1300/1300\n\1"): (
        "it made all 1300 steps"
    ),
    (r"^finished:.*\n", ""): "no line that says finished:",
    (
        r"^finished:demo_seed42",
        "finished:demo_seed43",
    ): "finished:demo_seed43 is not run_id:demo_seed42",
    (r"^(finished:.*)", r"\1\nmore"): "something follows after finished:",
    (r"^Code size: 142618", "Code size: 142617"): "the sizes in the log of seed 42 do not add up",
    (r"^(Serialized model .*): 619224", r"\1: 619223"): "the sizes in the log of seed 42",
    (r"^(Total submission size \S+): 761842", r"\1: 761841"): "the sizes in the log of seed 42",
    (r"^(Total submission size) int7", r"\1 int4"): "the artifact is called int7",
    (r"^(kind:matrix .*bytes):275446", r"\1:275445"): "bytes:275445 of",
    (r"^(kind:matrix .*weights):458752", r"\1:458751"): "do not have model_params:1117072",
    (r"^(kind:near .*bits_per_weight):3.884", r"\1:3.885"): "are not bits_per_weight:3.885",
    (r"^(Serialized.*)4.435 bits", r"\g<1>4.434 bits"): "is not the sum of its parts",
    (r"^model_params:1117072", "model_params:1117071"): "do not have model_params:1117071",
    (
        r"^(hyperparameters:.*) SEED=42",
        r"\1 SEED=43",
    ): "overridden: SEED=42, but the hyperparameters",
    (r"^(hyperparameters:.*) SEED=42", r"\1"): "overridden: SEED=42|no SEED",
    (r"^(hyperparameters:.*) RUN_ID=demo", r"\1 RUN_ID=demi"): "not those of training run_id:demo",
    (
        r"^(hyperparameters:.*) EVAL_ONLY=",
        r"\1 EVAL_ONLY=a.mdlm",
    ): "not those of training run_id:demo",
    (r"^hyperparameters: PRESET", "hyperparameters: preset"): "no hyperparameters line in this log",
    (r"^overridden: .*", "overridden: something"): "no line on what was overridden",
    (r"^overridden: .*", "overridden: AB SEED=42"): "overridden: |no line on what was overridden",
    (
        r"^(hyperparameters:.*) OBJECTIVE=mdlm",
        r"\1 OBJECTIVE=ar",
    ): "has 0 scores ar, not one",
    (r"^dataset:docs", "dataset:fine"): "dataset:fine_sp1024 is not the folder DATA_PATH=",
    (r"val_tokens:2194643", "val_tokens:2194560"): "but 17144 windows were to be scored",
    (r"val_tokens:2194643", "val_tokens:2194772"): "17146 windows were to be scored",
    (r"val_windows:17145", "val_windows:17144"): "val_windows:17144, but val_tokens:2194643 have",
    (r"val_tokens:2194643", "val_tokens:" + "9" * 5000): "no dataset line in this log",
    (r"^world_size:1 ", "world_size:8 "): "world_size:8 is not that of hardware:1xCPU",
    (
        r"^(world_size.*)float32",
        r"\1bfloat16",
    ): "compute_dtype:bfloat16 is not COMPUTE_DTYPE=float32",
    (r"^(hardware:.*)", r"\1\n\1"): "more than one hardware line in this log",
}


@pytest.mark.parametrize("change", EDITS)
def test_an_edited_log_is_not_believed(tmp_path, change):
    path = tmp_path / "log.txt"
    path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
    edit(path, change)
    with pytest.raises(tm.InputError) as caught:
        parse_log(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert any(part in message for part in EDITS[change].split("|")), message


def test_a_log_with_the_split_of_the_text(tmp_path, make):
    """Digest of the tokenizer and bytes of the split, as newer scripts write them."""
    digest = "0123456789abcdef" * 4
    line = f"tokenizer_sha256:{digest} val_tokens:2194643 val_bytes:4856400"
    seeds = {}
    for seed in ("42", "2026"):
        seeds[seed] = tmp_path / f"{seed}.txt"
        seeds[seed].write_bytes((SHIPPED / f"train_seed{seed}.log").read_bytes())
        edit(seeds[seed], ("val_tokens:2194643", line))
    run = parse_log(seeds["42"])
    assert (run.tokenizer_sha256, run.val_bytes, run.val_tokens) == (digest, 4856400, 2194643)
    folder = Path(make(seeds.values(), tmp_path).stdout.strip())
    facts = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert facts["tokenizer_sha256"] == digest
    assert facts["val_tokens"] == 2194643 and facts["val_bytes"] == 4856400
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"- the whole split: 2,194,643 tokens, 4,856,400 bytes; tokenizer SHA-256 `{digest}`"
        in text
    )
    for pattern, replacement, message in [
        ("val_bytes:4856400", "val_bytes:4856276", "bytes:4856277, more than val_bytes:4856276"),
        ("val_bytes:4856400", "val_bytes:4956400", "of which 83 tokens are not scored"),
    ]:
        original = seeds["42"].read_bytes()
        edit(seeds["42"], (pattern, replacement))
        with pytest.raises(tm.InputError, match=message):
            parse_log(seeds["42"])
        seeds["42"].write_bytes(original)
    for pattern, replacement, name in [
        ("sha256:0", "sha256:1", "tokenizer_sha256"),
        ("val_bytes:4856400", "val_bytes:4856399", "val_bytes"),
    ]:
        edit(seeds["2026"], (pattern, replacement))
        refused(make(seeds.values(), tmp_path, "--name", "two"), f"the logs differ in {name}")
        edit(seeds["2026"], (replacement, pattern))


def test_a_script_that_writes_the_digest_of_the_tokenizer_has_a_log_with_it(tmp_path):
    """Where a log may lack a line, its source says, which cannot be edited without the digests."""
    path = tmp_path / "log.txt"
    text = (SHIPPED / "train_seed42.log").read_text(encoding="utf-8")
    source, separator, body = text.partition(SEPARATOR)
    longer = source + '\nlog(f"tokenizer_sha256:{digest}")\n'
    more = len(longer.encode()) - len(source.encode())
    body = body.replace("Code size: 142618", f"Code size: {142618 + more}")
    body = body.replace(": 761842 bytes", f": {761842 + more} bytes")
    path.write_text(longer + separator + body, encoding="utf-8")
    with pytest.raises(tm.InputError, match="lacks tokenizer_sha256 or val_bytes"):
        parse_log(path)


RESUMED = (
    """resumed:logs/demo_seed42.00000550.ckpt step:550/1300 train_time:64000ms best_val_bpb:2.85"""
)


def in_two_lives(path, resumed=RESUMED, begin=r"^step:600/1300 train"):
    """A log as it would be, had the run been interrupted after step 500."""
    source, separator, body = (
        (SHIPPED / "train_seed42.log").read_text(encoding="utf-8").partition(SEPARATOR)
    )
    heading, steps = re.split(r"(?<=float32\n)", body, maxsplit=1)
    at = re.search(begin, steps, re.MULTILINE).start()
    resumed = f"{resumed}; skips 9 tokens\n"
    path.write_text(source + separator + heading + steps[:at] + heading + resumed + steps[at:])


def test_time_goes_on_from_life_to_life(tmp_path):
    path = tmp_path / "log.txt"
    in_two_lives(path)
    run = parse_log(path)
    assert run.lives == 2 and run.train_seconds == 145.862
    in_two_lives(path, begin=r"^step:700/1300 train")  # step 600 was done again
    assert parse_log(path).lives == 2
    at_500 = RESUMED.replace("550/", "500/")  # at which there is a line in the first life too
    in_two_lives(path, at_500.replace("64000ms", "58072ms"))
    assert parse_log(path).lives == 2
    in_two_lives(path, at_500)
    with pytest.raises(tm.InputError, match="step:500 has train_time:58072ms and train_time:64000"):
        parse_log(path)
    in_two_lives(path, RESUMED.replace("64000ms", "71000ms"))
    with pytest.raises(
        tm.InputError, match="train_time:70215ms comes after step:550 train_time:71"
    ):
        parse_log(path)
    in_two_lives(path, RESUMED.replace("64000ms", "10000ms"))
    with pytest.raises(tm.InputError, match="step:550 train_time:10000ms comes after step:500"):
        parse_log(path)
    for pattern, replacement, message in [
        (r" MATRIX_LR=0.02", " MATRIX_LR=0.03", "MATRIX_LR is not the same in all lives"),
        (r"val_tokens:2194643", "val_tokens:2194644", "the dataset is not the same in all lives"),
        (r"^model_params:1117072", "model_params:1117073", "model_params:1117072 is not the same"),
    ]:
        in_two_lives(path)
        edit(path, (pattern, replacement))
        with pytest.raises(tm.InputError, match=message):
            parse_log(path)


def test_lives_that_were_cut_off_early_or_in_a_line(tmp_path):
    """Killed before the checkpoint was read, or while a line was written: no reason to doubt."""
    path = tmp_path / "log.txt"
    in_two_lives(path)
    whole = parse_log(path)
    begun = "run_id:demo_seed42 started:2026-11-25T19:39:00 log:logs/demo_seed42.txt\n"
    edit(path, (r"(?s)\A(.+)(?=^run_id:)", rf"\1step:510/1300 train_lo\n{begun}"))
    assert body_of(path).count("\nrun_id:") == 2
    assert parse_log(path) == whole


def test_settings_that_are_no_numbers_are_one_line(tmp_path):
    path = tmp_path / "log.txt"
    for name in ("SEED", "ITERATIONS", "TRAIN_SEQ_LEN", "FINAL_EVAL_MAX_SEQS", "EVAL_MAX_SEQS"):
        for value in ("x", "", "9" * 5000, "0"):
            path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
            edit(path, (rf"(hyperparameters:.*) {name}=\w+", rf"\1 {name}={value}"))
            try:
                assert parse_log(path).val_bpb == 2.36860086
            except tm.InputError as error:
                assert str(error).startswith(f"{path}: ")


def test_a_run_that_met_the_wall_clock(tmp_path):
    path = tmp_path / "log.txt"

    def stopped(step, ms, limit="145.0"):
        path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
        line = f"stopping_early: wallclock_cap train_time:{ms}ms step:{step}/1400"
        edit(
            path,
            (r"^(step:\d+)/1300", r"\1/1400"),
            (" ITERATIONS=1300", " ITERATIONS=1400"),
            count=0,
        )
        edit(path, ("^(Training time)", rf"{line}\n\1"))
        edit(path, (" MAX_WALLCLOCK_SECONDS=400.0", f" MAX_WALLCLOCK_SECONDS={limit}"))

    stopped(1300, 145862)
    assert parse_log(path).step_stop == 1300
    for wrong, message in [
        ((1299, 145862), "no line says that the run stopped early there, after 145862 ms"),
        ((1300, 145000), "no line says that the run stopped early there, after 145862 ms"),
        ((1300, 145862, "146.0"), "early after 145862 ms, before MAX_WALLCLOCK_SECONDS=146.0"),
    ]:
        stopped(*wrong)
        with pytest.raises(tm.InputError, match=message):
            parse_log(path)


def test_places_of_anchors_are_in_the_score(tmp_path):
    """boundary_bits are in bpb and in the loss, and in no position."""
    path = tmp_path / "log.txt"
    path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
    edit(path, (r"^(score:nelbo.*)", r"\1 boundary_bits:48562.8 boundary_bpb:0.0100"))
    parse_log(path)
    edit(path, ("boundary_bpb:0.0100", "boundary_bpb:0.0101"))
    with pytest.raises(tm.InputError, match="boundary_bits and boundary_bpb that do not belong"):
        parse_log(path)


@pytest.mark.parametrize(
    "seqs, tokens, scored", [(100, 6400, True), (100, 6464, False), (34290, 2194624, True)]
)
def test_a_sliding_window_scores_its_last_tokens(tmp_path, seqs, tokens, scored):
    """64 of each here, and of the first one of the whole split all 128."""
    path = tmp_path / "log.txt"
    path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
    counts = f"seqs:{seqs} tokens:{tokens} bytes:4856276 time:1000ms tokens_per_s:{tokens}"
    edit(path, (r"^(Evaluation)", rf"score:sliding bpb:2.3000 stderr:0.0100 {counts}\n\1"))
    edit(path, (r"^Evaluation time: 37.2", "Evaluation time: 38.2"))
    if scored:
        assert parse_log(path).others["sliding"] == (2.3, seqs)
    else:
        with pytest.raises(tm.InputError, match="seqs:100 are 6400 tokens"):
            parse_log(path)


def test_a_score_that_is_no_code_length_says_so(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
    counts = "seqs:100 tokens:12800 bytes:28000 time:1000ms tokens_per_s:12800"
    edit(path, (r"^(Evaluation)", rf"score:tgrid biased:1 bpb:2.3 stderr:0.01 {counts}\n\1"))
    edit(path, (r"^Evaluation time: 37.2", "Evaluation time: 38.2"))
    edit(path, ("bpb:2.3 stderr:0.01 ", "bpb:2.3000 stderr:0.0100 "))
    run = parse_log(path)
    (stated,) = [text for text in make_record.other_scores([run]) if "tgrid" in text]
    assert stated == "tgrid 2.3000 (100 windows, biased: no code length)"
    edit(path, ("tgrid biased:1 ", "tgrid "))
    with pytest.raises(tm.InputError, match="not as train_mdlm.py writes it"):
        parse_log(path)


def test_the_last_line_on_skipped_steps_has_their_number(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes((SHIPPED / "train_seed42.log").read_bytes())
    for step, skipped in ((200, 1), (400, 3)):
        line = f"step:{step - 1} not finite: loss nan, gradients: matrix; skipped:{skipped}"
        edit(path, (rf"^(step:{step}/1300 train)", rf"{line}\n\1"))
    assert parse_log(path).skipped_steps == 3


def test_one_window_makes_no_record(logs, tmp_path, make, monkeypatch):
    """Its standard error is not a number, which JSON does not have."""
    one = parse_log(logs[0])._replace(stderr=float("nan"), seqs=1)
    monkeypatch.setattr(run_log, "parse_log", lambda path: one)
    refused(make([logs[0]], tmp_path), "scored on 1 window", "FINAL_EVAL_MAX_SEQS")
    assert not (tmp_path / "records").exists()


def test_values_with_spaces_and_colons_are_no_obstacle(logs, tmp_path):
    """A folder with a space in its name, and SCORES with a number of windows."""
    source, separator, body = logs[0].read_text().partition(SEPARATOR)
    body = body.replace("DATA_PATH=/", "DATA_PATH=/my SEED/")
    body = body.replace("SCORES=nelbo", "SCORES=nelbo, l2r:64")
    assert body.count("DATA_PATH=/my SEED/") == body.count("SCORES=nelbo, l2r:64") == 2
    path = tmp_path / "spaces.txt"
    path.write_text(source + separator + body)
    run = parse_log(path)
    assert run.seed == 1 and run.preset == "mdlm" and run.dataset == "tiny_sp384"
    (command,) = commands([run])
    words = shlex.split(command)
    assert "SCORES=nelbo, l2r:64" in words and "SEED=1" in words and "torchrun" in words
    assert any(word.startswith("DATA_PATH=/my SEED/") for word in words)


def test_shipped_records_follow_from_their_logs(tool):
    folders = sorted(path.parent for path in (ROOT / "records").glob("*/*/submission.json"))
    assert folders
    for folder in folders:
        done = tool(make_record, "--check", folder)
        assert done.returncode == 0, done.stderr
    newest = max(folders, key=lambda folder: folder.name)
    assert (ROOT / "submission.json").read_bytes() == (newest / "submission.json").read_bytes()


def test_the_headline_of_a_log_is_that_of_the_script():
    assert {system: name for system, (name, _) in HEADLINES.items()} == {
        system: next(iter(scores)) for system, scores in tm.ESTIMATORS.items()
    }
