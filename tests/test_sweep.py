"""tools/sweep.py: a grid of real runs, one of which fails; nothing finished is run again."""

import json
import re
import shlex
import statistics

import pytest

import sweep
from conftest import ROOT, tiny_hp


def test_a_grid_is_every_combination():
    rows = sweep.parse_grid(["NUM_HEADS=2,4", "MASK_EPS=0.001,0.1"])
    assert len(rows) == 4 and rows[1] == dict(NUM_HEADS="2", MASK_EPS="0.1")
    assert sweep.run_id(rows[1], 7) == "NUM_HEADS=2+MASK_EPS=0.1_seed7"
    tied = sweep.parse_grid(["NUM_HEADS=NUM_KV_HEADS=2,4", "MASK_EPS=0.1"])
    assert tied == [dict(NUM_HEADS=n, NUM_KV_HEADS=n, MASK_EPS="0.1") for n in "24"]
    joined = sweep.parse_grid(["MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat", "ITERATIONS=1,2"])
    assert joined == [
        dict(MASKING=m, LOSS_WEIGHT=w, ITERATIONS=n)
        for m, w in (("bernoulli", "elbo"), ("count", "flat"))
        for n in "12"
    ]
    assert sweep.parse_grid(["DATA_PATH=a/b,c/d"]) == [dict(DATA_PATH="a/b"), dict(DATA_PATH="c/d")]
    for bad in (
        ["MASKING/LOSS_WEIGHT=count/flat,elbo"],
        ["MASKING/LOSS_WEIGHT=MASK_EPS=count/flat"],
        ["NUM_HEADS/NUM_HEADS=2/4"],
        ["NUM_HEADS=2,2"],
        ["NUM_HEADS"],
        ["NUM_HEADS="],
        ["SEED=1,2"],
        ["NUM_HEADS=2", "NUM_HEADS=4"],
        ["NUM_HEDS=2"],
    ):
        with pytest.raises(ValueError, match=bad[0].split("=")[0]):
            sweep.parse_grid(bad)


def test_sweep_runs_continues_and_compares(tiny_env, tmp_path, tool, monkeypatch):
    for name in {field.upper() for field in tiny_hp().__dataclass_fields__} - tiny_env.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in (tiny_env | dict(ITERATIONS="2", SCORES="l2r", L2R_SEQS="4")).items():
        monkeypatch.setenv(name, value)
    arguments = ["NUM_HEADS=4,3,2", "--seeds", "1,2", "--out", tmp_path / "heads"]
    done = tool(sweep, *arguments)
    assert done.returncode == 1 and done.stdout.count("FAILED: NUM_HEADS=3 must divide MODEL_DIM=32") == 2
    results = json.loads((tmp_path / "heads/results.json").read_text())
    rows = {row["label"]: row for row in results["rows"]}
    four, two = rows["NUM_HEADS=4"]["val_bpb"], rows["NUM_HEADS=2"]["val_bpb"]
    differences = [two[seed] - four[seed] for seed in ("1", "2")]
    assert rows["NUM_HEADS=2"]["difference"] == pytest.approx(statistics.fmean(differences))
    expected = statistics.stdev(differences) / 2**0.5
    assert rows["NUM_HEADS=2"]["difference_stderr"] == pytest.approx(expected)
    assert rows["NUM_HEADS=3"]["mean"] is None and len(results["failed"]) == 2
    table = (tmp_path / "heads/README.md").read_text()
    assert re.search(r"^\| NUM_HEADS=4 \| \d\.\d{4} \| \d\.\d{4} \| 2 \|  \| \d", table, re.MULTILINE)
    assert (tmp_path / "heads/plot.png").read_bytes().startswith(b"\x89PNG")
    # again: the finished ones are not run, an unfinished one is
    log = tmp_path / "heads/logs/NUM_HEADS=2_seed2.txt"
    log.write_text(log.read_text(encoding="utf-8").partition("\nfinal_")[0], encoding="utf-8")
    again = tool(sweep, *arguments)
    assert again.stdout.count("finished before") == 3
    assert "NUM_HEADS=2_seed2: val_bpb" in again.stdout and log.read_text(encoding="utf-8").count("\nrun_id:") == 2
    assert json.loads((tmp_path / "heads/results.json").read_text())["rows"][2]["val_bpb"] == two


def test_lengths_of_runs_are_compared_at_equal_length_and_drawn_over_tokens(tiny_env, tmp_path, tool, monkeypatch):
    for name in {field.upper() for field in tiny_hp().__dataclass_fields__} - tiny_env.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in (tiny_env | dict(SCORES="l2r", L2R_SEQS="4", OMP_NUM_THREADS="1")).items():
        monkeypatch.setenv(name, value)
    grid = ["MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat", "ITERATIONS=2,4", "--jobs", "2", "--out", tmp_path]
    done = tool(sweep, *grid)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert "Not all runs made all of their steps" not in done.stdout
    for steps in ("2", "4"):
        first = rows[f"MASKING=bernoulli+LOSS_WEIGHT=elbo+ITERATIONS={steps}"]
        other = rows[f"MASKING=count+LOSS_WEIGHT=flat+ITERATIONS={steps}"]
        assert first["first"] is None and other["first"] == first["label"]
        assert other["tokens"] == int(steps) * int(tiny_env["TRAIN_BATCH_TOKENS"])
        assert other["difference"] == pytest.approx(other["val_bpb"]["1337"] - first["val_bpb"]["1337"])
        l2r = other["others"]["l2r"]["1337"] - first["others"]["l2r"]["1337"]
        assert other["others_against"]["l2r"]["difference"] == pytest.approx(l2r)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    told = tool(sweep, *grid[:1], "ITERATIONS=2,3", "--report", "--out", tmp_path)  # one that is there, one that is not
    assert (
        told.returncode == 0 and told.stdout.count("| – | – | 0 |") == 2 and f"{first['mean']:.4f}" not in told.stdout
    )
    assert sorted(tmp_path.glob("logs/*.txt")) == sorted(tmp_path.glob("logs/*ITERATIONS=[24]_seed1337.txt"))
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(found))
    alone = ["MATRIX_LR=0.01", "ITERATIONS=2"]
    beside = tool(sweep, *alone, "--beside", earlier, "--out", tmp_path)
    assert beside.returncode == 0, beside.stderr
    *old, new = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert old == found["rows"] and new["first"] == "MASKING=bernoulli+LOSS_WEIGHT=elbo+ITERATIONS=2"
    first = rows[new["first"]]["val_bpb"]["1337"]
    assert new["difference"] == pytest.approx(new["val_bpb"]["1337"] - first) and new["difference"] != 0
    earlier.write_text("[]")
    for path in (earlier, tmp_path / "nowhere.json"):
        refused = tool(sweep, *alone, "--beside", path, "--out", tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(path) in refused.stderr


@pytest.mark.parametrize("page", ["README.md", "records/README.md"])
def test_the_printed_commands_are_understood(tmp_path, tool, monkeypatch, page):
    """Every one of them, with its variables, up to where the runs would begin."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ").replace("`", "\n")
    commands = re.findall(r"^ *((?:[A-Z]\w+=\S+ +)*)python tools/sweep\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for i, (variables, arguments) in enumerate(commands):
        with monkeypatch.context() as scope:
            for variable in variables.split():
                scope.setenv(*variable.split("=", 1))
            done = tool(sweep, *shlex.split(arguments), "--report", "--out", tmp_path / str(i))
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / str(i) / "results.json").read_text(encoding="utf-8"))["rows"]
        assert len(rows) > 2 and all(row["planned_tokens"] for row in rows)


def test_a_grid_of_which_nothing_can_run_is_told_of(tiny_env, tmp_path, tool, monkeypatch):
    monkeypatch.setenv("PRESET", "demo")
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    done = tool(sweep, "ITERATIONS=2,4", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stdout.count("Failed: ITERATIONS=") == 2 and "Traceback" not in done.stderr


def test_what_cannot_be_swept_is_said_in_one_line(tmp_path, tool):
    for arguments, message in [
        (["NUM_HEDS=2", "--out", tmp_path], "NUM_HEDS is not a hyperparameter"),
        (["NUM_HEADS=2", "--seeds", "a", "--out", tmp_path], "--seeds and --gpus take whole numbers"),
        (["NUM_HEADS=2", "--gpus", "0", "--jobs", "2", "--out", tmp_path], "--jobs does not go with it"),
    ]:
        done = tool(sweep, *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
