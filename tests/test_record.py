"""tools/make_record.py: records follow from logs, and the shipped one still does."""

import json
import re
import shlex

import pytest
from conftest import ROOT, run_python
from make_record import SEPARATOR, commands, parse_log

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


def body_of(path):
    """The log without the script's source, which holds the same words."""
    return path.read_text().partition(SEPARATOR)[2]


def make(logs, out, *extra, check=True):
    typed = ["--name", "tiny", "--author", "A", "--github-id", "a", "--blurb", "A test."]
    arguments = [*logs, *typed, "--out", out / "records", *extra]
    return run_python("tools/make_record.py", *arguments, cwd=out, check=check)


def test_record_is_made_from_the_logs_and_checks(logs, tmp_path):
    folder = tmp_path / make(logs, tmp_path).stdout.strip()
    facts = json.loads((folder / "submission.json").read_text())
    line = r"_exact val_loss:\S+ val_bpb:(\S+)"
    exact = [float(re.search(line, body_of(path))[1]) for path in logs]
    assert facts["val_bpb"] == pytest.approx(sum(exact) / 2, abs=1e-8)
    assert facts["val_bpb_std"] == pytest.approx(abs(exact[0] - exact[1]) / 2**0.5, abs=1e-8)
    assert facts["seeds"] == [1, 2] and facts["step_stop"] == 2 and facts["dataset"] == "tiny_sp384"
    script = (ROOT / "train_mdlm.py").read_bytes()
    assert facts["bytes_code"] == len(script) and "CPU" in facts["hardware"]
    for field in FIELDS:
        assert facts[field], field
    own = (folder / "submission.json").read_bytes()
    assert (tmp_path / "submission.json").read_bytes() == own
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "requirements.txt",
        "submission.json",
        "train_mdlm.py",
        "train_seed1.log",
        "train_seed2.log",
    ]
    assert (folder / "train_mdlm.py").read_bytes() == script
    run_python("tools/make_record.py", "--check", folder, cwd=tmp_path)
    assert "is there already" in make(logs, tmp_path, check=False).stderr


@pytest.mark.parametrize(
    "name, pattern, replacement, message",
    [
        ("submission.json", r'"val_bpb": [\d.]+', '"val_bpb": 0.9901', "val_bpb is 0.9901"),
        ("submission.json", r'"seeds": ', '"seed": 3, "seeds": ', "seed is 3"),
        ("train_mdlm.py", r"\Z", "# better\n", "is not what the logs say"),
        ("README.md", "val_bpb ", "val_bpb 0", "is not what the logs say"),
        ("train_seed1.log", "Code size: ", "Code size: 1", "do not add up"),
        ("train_seed1.log", r"(?s)final_.*", "", "did not finish"),
    ],
)
def test_an_edited_record_is_found_out(logs, tmp_path, name, pattern, replacement, message):
    def edit(text):
        edited, count = re.subn(pattern, replacement, text, count=1)
        assert count == 1
        return edited

    folder = tmp_path / make(logs, tmp_path).stdout.strip()
    text = (folder / name).read_text()
    if name.endswith(".log"):  # the log quotes the script, which holds the same words
        source, separator, body = text.partition(SEPARATOR)
        (folder / name).write_text(source + separator + edit(body))
    else:
        (folder / name).write_text(edit(text))
    done = run_python("tools/make_record.py", "--check", folder, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_unusable_logs_are_refused(logs, tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    assert "not a log" in make([tmp_path / "x.txt"], tmp_path, check=False).stderr
    assert "same seed" in make([logs[0], logs[0]], tmp_path, check=False).stderr
    assert "becomes a folder" in make(logs, tmp_path, "--name", "../x", check=False).stderr


def test_over_budget_is_loud_in_the_record(logs, tmp_path):
    text = logs[0].read_text()
    slow = tmp_path / "slow.txt"
    slow.write_text(re.sub(r"(step:2/2 val_loss.*train_time:)\d+ms", r"\g<1>700000ms", text))
    folder = tmp_path / make([slow], tmp_path).stdout.strip()
    assert "**OVER BUDGET: training is 700 s" in (folder / "README.md").read_text()
    facts = json.loads((folder / "submission.json").read_text())
    assert facts["over_budget"] == ["training is 700 s, more than the 601 allowed"]


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


def test_shipped_records_follow_from_their_logs():
    folders = sorted(path.parent for path in (ROOT / "records").glob("*/*/submission.json"))
    assert folders
    for folder in folders:
        run_python("tools/make_record.py", "--check", folder, cwd=ROOT)
    newest = max(folders, key=lambda folder: folder.name)
    assert (ROOT / "submission.json").read_bytes() == (newest / "submission.json").read_bytes()
