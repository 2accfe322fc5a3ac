"""tools/sweep.py: a grid of real runs, one of which fails; nothing finished is run again."""

import json
import os
import re
import shlex
import signal
import statistics
import threading
import time
from pathlib import Path

import common
import pytest
import sweep
from conftest import ROOT, SHIPPED
from run_log import parse_log

import train_mdlm as tm

LOG = SHIPPED / "train_seed42.log"


def test_a_grid_is_every_combination(tmp_path):
    rows = sweep.parse_grid(["NUM_HEADS=2,4", "MASK_EPS=0.001,0.1"])
    assert len(rows) == 4 and rows[1] == dict(NUM_HEADS="2", MASK_EPS="0.1")
    assert sweep.Job(rows[1], 7, tmp_path).run_id == "NUM_HEADS=2+MASK_EPS=0.1_seed7"
    tied = sweep.parse_grid(["NUM_HEADS=NUM_KV_HEADS=2,4", "MASK_EPS=0.1"])
    assert tied == [dict(NUM_HEADS=n, NUM_KV_HEADS=n, MASK_EPS="0.1") for n in "24"]
    joined = sweep.parse_grid(["MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat", "ITERATIONS=1,2"])
    assert joined == [
        dict(MASKING="bernoulli", LOSS_WEIGHT="elbo", ITERATIONS="1"),
        dict(MASKING="bernoulli", LOSS_WEIGHT="elbo", ITERATIONS="2"),
        dict(MASKING="count", LOSS_WEIGHT="flat", ITERATIONS="1"),
        dict(MASKING="count", LOSS_WEIGHT="flat", ITERATIONS="2"),
    ]
    assert sweep.parse_grid(["DATA_PATH=a/b,c/d"]) == [dict(DATA_PATH="a/b"), dict(DATA_PATH="c/d")]


@pytest.mark.parametrize(
    "grid",
    [
        ["MASKING/LOSS_WEIGHT=count/flat,elbo"],
        ["MASKING/LOSS_WEIGHT=MASK_EPS=count/flat"],
        ["NUM_HEADS/NUM_HEADS=2/4"],
        ["NUM_HEADS=2,2"],
        ["NUM_HEADS"],
        ["NUM_HEADS="],
        ["SEED=1,2"],
        ["NUM_HEADS=2", "NUM_HEADS=4"],
        ["NUM_HEDS=2"],
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid):
    with pytest.raises(ValueError, match=grid[0].split("=")[0]):
        sweep.parse_grid(grid)


@pytest.mark.parametrize(
    "axis", ["SCORES=nelbo,l2r:64", "SCORES=l2r", "QUANT_MODE=int7,embed:int8"]
)
def test_values_with_commas_belong_in_the_environment(axis):
    with pytest.raises(ValueError, match=f"{axis}: .* commas.*; set it in the environment"):
        sweep.parse_grid([axis])


@pytest.fixture
def in_environment(tiny_env, monkeypatch):
    """Sets tiny_env, with some changes, and nothing else that the script would read."""

    def set_environment(**changes):
        for name in sweep.KNOBS:
            monkeypatch.delenv(name, raising=False)
        for name, value in (tiny_env | changes).items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_a_readme_of_somebody_else_stays(tmp_path, tool):
    (tmp_path / "README.md").write_text("mine")
    done = tool(sweep, "NUM_HEADS=4,2", "--out", tmp_path)
    assert done.returncode == 2 and "has a README.md that this tool did not write" in done.stderr
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["README.md", "plot.png", "results.json"])
def test_what_no_sweep_wrote_stays(tmp_path, tool, name):
    (tmp_path / name).write_text("mine")
    done = tool(sweep, "NUM_HEADS=4,2", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_logs_of_other_settings_are_set_aside_not_replaced(in_environment, tmp_path, capsys):
    in_environment()
    job = sweep.Job(dict(NUM_HEADS="4"), 1, tmp_path)
    (tmp_path / "logs").mkdir()
    for text in ("first", "second"):
        (tmp_path / f"logs/{job.run_id}.txt").write_text(text)
        job.set_aside()
    found = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    name = f"{job.run_id}.txt"
    assert found == {f"set-aside-1-{name}": "first", f"set-aside-2-{name}": "second"}
    assert capsys.readouterr().out.count(f"{job.run_id}: begins anew") == 2
    log = tmp_path / f"logs/{job.run_id}.txt"
    log.write_text("going on")
    with common.sole_use(log), pytest.raises(tm.InputError, match="another process is using it"):
        job.set_aside()
    assert log.exists()


STUBBORN = """
import os, signal, subprocess, sys, time

def stop(*signal_and_frame):
    open("checkpoint", "w").close()
    sys.exit(2)

signal.signal(signal.SIGTERM, stop)
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
child = subprocess.Popen([sys.executable, "-c", ignore + "time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.readline()
with open("part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename("part", "pids")
time.sleep(60)
"""


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None])
def test_no_run_outlives_a_sweep_that_is_stopped(
    in_environment, tmp_path, tool, monkeypatch, number
):
    """Its processes get the time for a checkpoint; what does not end then is killed."""
    in_environment()
    results = (ROOT / "records/sweeps/presets/results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(results)
    script = tmp_path / "script.py"
    script.write_text(STUBBORN)
    monkeypatch.setattr(sweep, "SCRIPT", script)

    def stop_when_it_runs():
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        if number:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sweep, "GRACE_SECONDS", 5.0)
    if number is None:  # an error that nobody foresaw, in another run of the sweep
        run = sweep.Job.run

        def fail(job, *arguments):
            if job.row["NUM_HEADS"] == "4":
                return run(job, *arguments)
            stop_when_it_runs()
            raise RuntimeError("something is broken")

        monkeypatch.setattr(sweep.Job, "run", fail)
    else:
        threading.Thread(target=stop_when_it_runs, daemon=True).start()
    began = time.monotonic()
    done = tool(sweep, "NUM_HEADS=4,2", "--seeds", "1,2", "--jobs", "2", "--out", tmp_path)
    assert time.monotonic() - began < 45  # nobody waits for the child, which sleeps for a minute
    pids = (tmp_path / "pids").read_text().split()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    reason = {signal.SIGINT: "Ctrl-C", None: "something is broken"}.get(number) or number.name
    assert reason in done.stderr and "FAILED" not in done.stdout
    assert (tmp_path / "checkpoint").exists()
    deadline = time.monotonic() + 10  # a killed process takes a moment to end
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))
    assert (tmp_path / "results.json").read_bytes() == results
    assert not (tmp_path / "README.md").exists()


def test_sweep_runs_continues_and_compares(in_environment, tmp_path, tool):
    in_environment(ITERATIONS="2", SCORES="nelbo,l2r:4")
    arguments = ["NUM_HEADS=4,3,2", "--seeds", "1,2", "--out", tmp_path]
    done = tool(sweep, *arguments)
    assert done.returncode == 1
    assert done.stdout.count("FAILED: NUM_HEADS=3 must divide MODEL_DIM=32") == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["failed"]) == 2
    four, three, two = results["rows"]
    seeds = ("1", "2")
    differences = [two["val_bpb"][seed] - four["val_bpb"][seed] for seed in seeds]
    assert two["difference"] == pytest.approx(statistics.fmean(differences))
    stderr = statistics.stdev(differences) / 2**0.5
    assert two["difference_stderr"] == pytest.approx(stderr)
    assert three["mean"] is None and three["tokens"] is None
    assert set(two["others"]) == {"l2r"} and set(two["others"]["l2r"]) == set(seeds)
    table = (tmp_path / "README.md").read_text()
    assert re.search(r"^\| NUM_HEADS=4 \| \d\.\d{4} \| \d\.\d{4} \| 2 \|  \| \d", table, re.M)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # again: the finished ones are not run, an unfinished one is
    log = tmp_path / "logs/NUM_HEADS=2_seed2.txt"
    unfinished, _, _ = log.read_text(encoding="utf-8").partition("\nfinal_")
    log.write_text(unfinished, encoding="utf-8")
    again = tool(sweep, *arguments)
    assert again.stdout.count("finished before") == 3
    assert "NUM_HEADS=2_seed2: val_bpb" in again.stdout
    assert log.read_text(encoding="utf-8").count("\nrun_id:") == 2
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[2]["val_bpb"] == two["val_bpb"]


@pytest.fixture
def horizons(in_environment, tmp_path, tool):
    """Two recipes, each for two and for four steps: the grid, what was printed, and the rows."""
    in_environment(SCORES="nelbo,l2r:4", OMP_NUM_THREADS="1")
    grid = ["MASKING/LOSS_WEIGHT=bernoulli/elbo,count/flat", "ITERATIONS=2,4"]
    done = tool(sweep, *grid, "--jobs", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    return grid, done.stdout, {row["label"]: row for row in found["rows"]}


def test_runs_are_compared_at_equal_length(horizons, tiny_env, tmp_path, tool):
    grid, printed, rows = horizons
    assert "Not all runs made all of their steps" not in printed
    for steps in ("2", "4"):
        first = rows[f"MASKING=bernoulli+LOSS_WEIGHT=elbo+ITERATIONS={steps}"]
        other = rows[f"MASKING=count+LOSS_WEIGHT=flat+ITERATIONS={steps}"]
        assert first["first"] is None and other["first"] == first["label"]
        assert other["tokens"] == int(steps) * int(tiny_env["TRAIN_BATCH_TOKENS"])
        difference = other["val_bpb"]["1337"] - first["val_bpb"]["1337"]
        assert other["difference"] == pytest.approx(difference)
        l2r = other["others"]["l2r"]["1337"] - first["others"]["l2r"]["1337"]
        assert other["others_against"]["l2r"]["difference"] == pytest.approx(l2r)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # a report on runs that are there and on some that are not, which are not run
    told = tool(sweep, grid[0], "ITERATIONS=2,3", "--report", "--out", tmp_path)
    assert told.returncode == 0 and told.stdout.count("| – | – | 0 |") == 2
    four_steps = rows["MASKING=bernoulli+LOSS_WEIGHT=elbo+ITERATIONS=4"]
    assert f"{four_steps['mean']:.4f}" not in told.stdout
    there = tmp_path.glob("logs/*ITERATIONS=[24]_seed1337.txt")
    assert sorted(tmp_path.glob("logs/*.txt")) == sorted(there)


def test_rows_stand_beside_those_of_an_earlier_sweep(horizons, tmp_path, tool):
    _, _, rows = horizons
    earlier = tmp_path / "earlier.json"
    earlier.write_bytes((tmp_path / "results.json").read_bytes())
    alone = ["MATRIX_LR=0.01", "ITERATIONS=2"]
    beside = tool(sweep, *alone, "--beside", earlier, "--out", tmp_path)
    assert beside.returncode == 0, beside.stderr
    *old, new = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert old == list(rows.values())
    assert new["first"] == "MASKING=bernoulli+LOSS_WEIGHT=elbo+ITERATIONS=2"
    difference = new["val_bpb"]["1337"] - rows[new["first"]]["val_bpb"]["1337"]
    assert new["difference"] == pytest.approx(difference) and difference != 0
    earlier.write_text("[]")
    for path in (earlier, tmp_path / "nowhere.json"):
        refused = tool(sweep, *alone, "--beside", path, "--out", tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 and str(path) in refused.stderr


def summary(bpb, text, label="a"):
    """The entry of a row, with one score."""
    return dict(label=label, planned_tokens=1, val_bpb={1: bpb}, others={}, text=text)


def test_figures_of_a_row(tmp_path, in_environment, monkeypatch):
    """Two seeds, paired with an earlier row of three; l2r with one of two."""
    in_environment(ITERATIONS="10", TRAIN_BATCH_TOKENS="32")
    runs = {
        1: dict(val_bpb=2.0, step_stop=10, total_bytes=7, train_seconds=1.0, l2r=3.0),
        2: dict(val_bpb=2.4, step_stop=9, total_bytes=5, train_seconds=2.0, l2r=3.5),
    }

    def finished(job):
        facts = dict(runs[job.seed])
        others = {"l2r": (facts.pop("l2r"), 4)}
        return parse_log(LOG)._replace(others=others, source="x", params=11, **facts)

    monkeypatch.setattr(sweep.Job, "finished", finished)
    first = dict(label="first", planned_tokens=320, val_bpb={1: 1.5, 2: 1.7, 3: 9.0})
    before = [dict(first, label="short", planned_tokens=32), dict(first, others={"l2r": {2: 3.0}})]
    found = sweep.summarize({}, [1, 2], tmp_path, before)
    assert found["first"] == "first" and found["planned_tokens"] == 320
    assert found["mean"] == pytest.approx(2.2) and found["std"] == pytest.approx(0.08**0.5)
    assert found["difference"] == pytest.approx(0.6)  # of 0.5 and 0.7
    assert found["difference_stderr"] == pytest.approx(0.1)
    l2r = found["others_against"]["l2r"]
    assert l2r["difference"] == pytest.approx(0.5) and l2r["difference_stderr"] is None
    assert found["cut"] and found["tokens"] == 320 and found["params"] == 11
    assert found["total_bytes"] == 7 and found["train_seconds"] == pytest.approx(1.5)
    assert len(found["scripts"]) == 1
    runs[2]["step_stop"] = 10
    assert not sweep.summarize({}, [1, 2], tmp_path, before)["cut"]
    alone = sweep.summarize({}, [1, 2], tmp_path, [])
    assert alone["first"] is None and alone["difference"] == 0
    assert alone["others_against"]["l2r"]["difference"] == 0


def test_a_log_of_other_settings_is_not_that_of_a_job(in_environment, tmp_path):
    in_environment()
    job = sweep.Job(dict(NUM_HEADS="4"), 1, tmp_path)
    hp = job.hyperparameters()
    shown = [hp.shown(name) for name in (spec.name for spec in sweep.dataclasses.fields(hp))]
    path = tmp_path / f"logs/{job.run_id}.txt"
    path.parent.mkdir()
    settled = [text.replace("COMPUTE_DTYPE=auto", "COMPUTE_DTYPE=bfloat16") for text in shown]
    for lines, begun in [
        (shown, True),
        (settled, True),
        ([text.replace("NUM_HEADS=4", "NUM_HEADS=44") for text in shown], False),
        ([], False),
    ]:
        path.write_text(f"run_id:x\nhyperparameters: {' '.join(lines)}\n" if lines else "x")
        assert job.begun() == (path if begun else None)


def test_only_an_interrupted_run_of_this_script_goes_on(in_environment, tmp_path):
    """One that the script was changed in, or that ended in no result, begins anew."""
    in_environment()
    job = sweep.Job(dict(NUM_HEADS="4"), 1, tmp_path)
    path = tmp_path / f"logs/{job.run_id}.txt"
    path.parent.mkdir()
    assert not job.goes_on()
    hp = job.hyperparameters()
    source = sweep.SCRIPT.read_text()
    settings = "hyperparameters: " + " ".join(hp.shown(spec.name) for spec in tm.KNOBS) + "\n"
    for text, goes_on in (
        (source + settings, True),
        (source + settings + f"finished:{job.run_id}\n", False),
        (source.replace("Muon", "muon") + settings + source, False),
        (source, False),
    ):
        path.write_text(text)
        assert job.goes_on() == goes_on and not job.finished()


def test_two_rows_never_share_a_log(tmp_path, tool, in_environment):
    in_environment()
    done = tool(sweep, "DATA_PATH=a/b,a-b", "--out", tmp_path / "out")
    assert done.returncode == 2 and "DATA_PATH=a/b and DATA_PATH=a-b: their logs" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_is_used_by_one_sweep_at_a_time(tmp_path, tool, in_environment):
    in_environment()
    with common.sole_use(tmp_path):
        done = tool(sweep, "NUM_HEADS=4,2", "--out", tmp_path)
        assert done.returncode == 2 and "another process is using it" in done.stderr
        assert tool(sweep, "NUM_HEADS=4,2", "--out", tmp_path, "--report").returncode == 0
    with common.sole_use(tmp_path):
        pass


def test_rows_on_another_text_are_not_compared(tmp_path, in_environment, monkeypatch):
    run = parse_log(LOG)._replace(val_bpb=2.0)
    text = sweep.text_of({1: run})
    assert text == dict(
        dataset="docs_sp1024",
        tokenizer_sha256="",
        val_tokens=2194643,
        val_bytes=None,
        score="nelbo",
    )
    assert sweep.text_of({}) is None
    assert sweep.text_of({1: run, 2: run._replace(val_tokens=5)}) is None
    in_environment(ITERATIONS="1", TRAIN_BATCH_TOKENS="32")
    monkeypatch.setattr(sweep.Job, "finished", lambda job: run)
    for change, compared in [
        ({}, True),
        (dict(val_bytes=7), True),  # an older log does not say
        (dict(val_tokens=5), False),
        (dict(dataset="fineweb"), False),
        (dict(score=None), True),  # nor does an older results.json
        (dict(score="l2r"), False),  # a model with blocks
    ]:
        before = summary(1.5, text | change) | dict(planned_tokens=32)
        found = sweep.summarize({}, [1], tmp_path, [before])
        assert (found["first"], found["difference"]) == (("a", 0.5) if compared else (None, 0.0))
        rows = [before | sweep.against({1: 1.5}, {1: 1.5}) | dict(others_against={}), found]
        rows[0] |= dict(first=None, params=1, total_bytes=1, train_seconds=1, cut=False, scripts=[])
        assert ("Not all rows are scored on the same text" in sweep.table(rows, {})) != compared


@pytest.mark.parametrize(
    "name, value",
    [
        ("val_bpb", {"1": "x"}),
        ("val_bpb", {"x": 1.0}),
        ("others_against", []),
        ("mean", "2.5"),
        ("first", 3),
        ("label", None),
        ("scripts", None),
        ("params", "many"),
    ],
)
def test_results_of_somebody_else_are_refused(tmp_path, name, value):
    path = ROOT / "records/sweeps/presets/results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(sweep.read_results(path)) == len(results["rows"])
    for row in ({**results["rows"][0], name: value}, {}):
        (tmp_path / "r.json").write_text(json.dumps(dict(rows=[row])))
        with pytest.raises(tm.InputError, match="r.json: is not a results.json of this version"):
            sweep.read_results(tmp_path / "r.json")


def printed_commands(page):
    """(variables, arguments) of every sweep that a page prints."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ").replace("`", "\n")
    pattern = r"^ *((?:[A-Z]\w+=\S+ +)*)python tools/sweep\.py (.*)$"
    return re.findall(pattern, text, re.MULTILINE)


PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *sorted(ROOT.glob("records/*.md"))]
COMMANDS = [
    pytest.param(variables, arguments, id=f"{page.name}:{number}")
    for page in PAGES
    for number, (variables, arguments) in enumerate(printed_commands(page))
]


def test_the_records_print_their_sweeps():
    printed = sum(len(printed_commands(page)) for page in ROOT.glob("records/*.md"))
    assert printed >= 6


@pytest.mark.parametrize("variables, arguments", COMMANDS)
def test_the_printed_commands_are_understood(tmp_path, tool, monkeypatch, variables, arguments):
    """Every one of them, with its variables, up to where the runs would begin."""
    for variable in variables.split():
        name, _, value = variable.partition("=")
        assert name in sweep.KNOBS | {"OMP_NUM_THREADS"}
        monkeypatch.setenv(name, value)
    done = tool(sweep, *shlex.split(arguments), "--report", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 1 and all(row["planned_tokens"] for row in rows)


def test_a_run_that_cannot_be_begun_is_noted(in_environment, tmp_path, tool, monkeypatch):
    def full_disk(job):
        raise OSError(28, "No space left on device", "x.txt")

    in_environment()
    monkeypatch.setattr(sweep.Job, "set_aside", full_disk)
    done = tool(sweep, "NUM_HEADS=4,2", "--out", tmp_path)
    assert done.returncode == 1 and done.stdout.count("FAILED: x.txt: cannot be read or") == 2


def test_a_grid_of_which_nothing_can_run_is_told_of(tmp_path, tool, monkeypatch):
    monkeypatch.setenv("PRESET", "demo")
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    done = tool(sweep, "ITERATIONS=2,4", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stdout.count("Failed: ITERATIONS=") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["NUM_HEDS=2"], "NUM_HEDS is not a hyperparameter"),
        (["NUM_HEADS=2", "--seeds", "a"], "--seeds a: takes whole numbers"),
        (["NUM_HEADS=2", "--gpus", "0,"], "--gpus 0,: takes whole numbers"),
        (["NUM_HEADS=2", "--gpus", "0", "--jobs", "2"], "--jobs does not go with it"),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(tmp_path, tool, arguments, message):
    done = tool(sweep, *arguments, "--out", tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
