"""tools/make_record.py: records follow from logs, and the shipped one still does."""

import json
import re

import pytest

from conftest import ROOT, run_python


@pytest.fixture(scope="module")
def logs(tiny_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    env = tiny_env | dict(ITERATIONS="2")
    for seed in ("1", "2"):
        run_python("train_mdlm.py", cwd=folder, RUN_ID=f"s{seed}", SEED=seed, **env)
    return [folder / "logs/s1.txt", folder / "logs/s2.txt"]


def body_of(path):
    """The log without the script's source, which holds the same words."""
    return path.read_text().split("\n" + "=" * 100 + "\n")[1]


def make(logs, out, *extra, check=True):
    return run_python(
        "tools/make_record.py",
        *logs,
        "--name",
        "tiny",
        "--author",
        "A",
        "--github-id",
        "a",
        "--blurb",
        "A test.",
        "--out",
        out / "records",
        *extra,
        cwd=out,
        check=check,
    )


def test_record_is_made_from_the_logs_and_checks(logs, tmp_path):
    folder = make(logs, tmp_path).stdout.strip()
    facts = json.loads((tmp_path / folder / "submission.json").read_text())
    exact = [float(re.search(r"_exact val_loss:\S+ val_bpb:(\S+)", body_of(path))[1]) for path in logs]
    assert facts["val_bpb"] == pytest.approx(sum(exact) / 2, abs=1e-8)
    assert facts["val_bpb_std"] == pytest.approx(abs(exact[0] - exact[1]) / 2**0.5, abs=1e-8)
    assert facts["seeds"] == [1, 2] and facts["step_stop"] == 2 and facts["dataset"] == "tiny_sp384"
    assert facts["bytes_code"] == (ROOT / "train_mdlm.py").stat().st_size and "CPU" in facts["hardware"]
    for field in (
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "val_loss",
        "seed_results",
        "bytes_total",
        "wallclock_seconds",
        "pytorch_version",
        "val_bpb_estimator",
    ):
        assert facts[field], field
    assert (tmp_path / "submission.json").read_bytes() == (tmp_path / folder / "submission.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
        "README.md",
        "requirements.txt",
        "submission.json",
        "train_mdlm.py",
        "train_seed1.log",
        "train_seed2.log",
    ]
    assert (tmp_path / folder / "train_mdlm.py").read_bytes() == (ROOT / "train_mdlm.py").read_bytes()
    run_python("tools/make_record.py", "--check", folder, cwd=tmp_path)
    assert "is there already" in make(logs, tmp_path, check=False).stderr


@pytest.mark.parametrize(
    "name, edit, message",
    [
        (
            "submission.json",
            lambda text: re.sub(r'"val_bpb": [\d.]+', '"val_bpb": 0.9901', text, count=1),
            "val_bpb is 0.9901",
        ),
        ("submission.json", lambda text: text.replace('"seeds": [', '"seed": 3, "seeds": ['), "seed is 3"),
        ("train_mdlm.py", lambda text: text + "# better\n", "is not what the logs say"),
        ("README.md", lambda text: text.replace("val_bpb ", "val_bpb 0"), "is not what the logs say"),
        ("train_seed1.log", lambda text: text.replace("Code size: ", "Code size: 1"), "do not add up"),
        ("train_seed1.log", lambda text: text.split("final_")[0], "did not finish"),
    ],
)
def test_an_edited_record_is_found_out(logs, tmp_path, name, edit, message):
    folder = tmp_path / make(logs, tmp_path).stdout.strip()
    text = (folder / name).read_text()
    if name.endswith(".log"):  # the log quotes the script, which holds the same words
        source, body = text.split("\n" + "=" * 100 + "\n")
        (folder / name).write_text(source + "\n" + "=" * 100 + "\n" + edit(body))
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
    assert json.loads((folder / "submission.json").read_text())["over_budget"] == [
        "training is 700 s, more than the 601 allowed"
    ]


def test_shipped_records_follow_from_their_logs():
    folders = sorted(path.parent for path in (ROOT / "records").glob("*/*/submission.json"))
    assert folders
    for folder in folders:
        run_python("tools/make_record.py", "--check", folder, cwd=ROOT)
    newest = max(folders, key=lambda folder: folder.name)
    assert (ROOT / "submission.json").read_bytes() == (newest / "submission.json").read_bytes()
