"""A run is never lost: killed, stopped or out of disk, it ends with the same artifact."""

import contextlib
import io
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import prepare_text
import pytest
import run_log
import torch
from conftest import FAST_BFLOAT16, body_of, byte_tables, torchrun

import train_mdlm as tm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DEATHS = ("cut off", "before fsync", "before rename", "after rename")  # while a file is written


@pytest.fixture(scope="module")
def env(tiny_env):
    tiny = dict(ITERATIONS="40", EMA_DECAY="0.9", TRAIN_BATCH_TOKENS="128", WARMUP_STEPS="1")
    often = dict(CHECKPOINT_EVERY="0.08", VAL_LOSS_EVERY="15")
    few = dict(FINAL_EVAL_MAX_SEQS="4", EVAL_MAX_SEQS="4", SCORES="", PACK="zlib")
    return tiny_env | tiny | often | few


# ---- Lives of a run


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def life(env, folder, prepare=lambda: None) -> int:
    """A life of a run, in a forked process, which needs no time to import anything; its output
    goes to RUN_ID.out."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        sys.stdout = sys.stderr = open(folder / f"{env['RUN_ID']}.out", "a")  # noqa: SIM115
        sys.argv[1:] = []
        os.environ.update(env)
        torch.set_num_threads(1)
        prepare()
        tm.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        print("Traceback, shown to a user:", repr(error))
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def end(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(env, folder, prepare=lambda: None, **changes) -> tuple[int, str, str]:
    """Exit status of a life, what it printed, and its log without the script's source."""
    env = env | changes
    out, log = folder / f"{env['RUN_ID']}.out", folder / f"logs/{env['RUN_ID']}.txt"
    before = out.stat().st_size if out.exists() else 0
    status = end(life(env, folder, prepare))
    printed = out.read_text()[before:]
    assert "Traceback" not in printed, printed
    return status, printed, body_of(log)


@pytest.fixture(scope="module")
def whole(env, tmp_path_factory):
    """An undisturbed run: its folder, its artifact, and how many seconds it took."""
    folder, began = tmp_path_factory.mktemp("whole"), time.perf_counter()
    status, printed, _ = run(env, folder, RUN_ID="whole")
    assert status == 0, printed
    return folder, (folder / "logs/whole.mdlm").read_bytes(), time.perf_counter() - began


def stop_at(step):
    """For `prepare`: SIGTERM to itself as soon as the log has this step."""

    def prepare():
        call = tm.Log.__call__

        def logged(self, line, **options):
            call(self, line, **options)
            if line.startswith(f"step:{step}/"):
                os.kill(os.getpid(), signal.SIGTERM)

        tm.Log.__call__ = logged

    return prepare


def die_while_writing(how, which):
    """For `prepare`: dies at the `which`-th file that is written."""

    def prepare():
        fsync, replace, calls = os.fsync, os.replace, []

        def cut_off(fd):
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            die()

        def replace_and_die(*paths):
            replace(*paths)
            die()

        def counted(act):
            def call(*arguments):
                calls.append(arguments)
                if len(calls) == which:
                    act(*arguments)
                return (fsync if len(arguments) == 1 else replace)(*arguments)

            return call

        if how == "cut off":
            os.fsync = counted(cut_off)
        elif how == "before fsync":
            os.fsync = counted(die)
        elif how == "before rename":
            os.replace = counted(die)
        else:
            os.replace = counted(replace_and_die)

    return prepare


# ---- Killed and stopped


def test_killed_at_random_moments(env, whole, tmp_path):
    """SIGKILL and SIGTERM, a third of them in the middle of writing a file, and as many lives as it
    takes."""
    g, kills, number = random.Random(0), 0, 0
    while kills < 30:
        number, ended = number + 1, None
        settings = env | dict(RUN_ID=f"run{number}")
        while ended != 0:
            if g.random() < 1 / 3:
                prepare, after = die_while_writing(g.choice(DEATHS), g.randint(1, 4)), 60.0
            else:
                prepare, after = lambda: None, g.uniform(0, 1.2 * whole[2])
            child, until = life(settings, tmp_path, prepare), time.perf_counter() + after
            found = 0, 0
            while not found[0] and time.perf_counter() < until:
                time.sleep(0.002)
                found = os.waitpid(child, os.WNOHANG)
            if not found[0]:
                os.kill(child, g.choice([signal.SIGKILL, signal.SIGTERM]))
                found = os.waitpid(child, 0)
            ended = os.waitstatus_to_exitcode(found[1])
            kills += ended != 0
            too_early = ended == -signal.SIGTERM and after < 0.1  # it had no handler yet
            assert too_early or ended in (0, 2, -signal.SIGKILL)
        assert (tmp_path / f"logs/run{number}.mdlm").read_bytes() == whole[1]
        assert "Traceback" not in (tmp_path / f"run{number}.out").read_text()
        left = [path.name for path in (tmp_path / "logs").glob(f"run{number}.*")]
        # two, and one more where the last was written and death came before the oldest went
        assert sum(name.endswith(".ckpt") for name in left) <= 3
        assert not any("part" in name for name in left)
    logs = [tmp_path / f"logs/run{n}.txt" for n in range(1, number + 1)]
    longest = max(logs, key=lambda path: len(run_log.lives(path)[1]))
    check_records_and_plots(whole[0] / "logs/whole.txt", longest)


def check_records_and_plots(undisturbed, interrupted):
    """The log of several lives says what that of one says."""
    one, several = run_log.parse_log(undisturbed), run_log.parse_log(interrupted)
    assert one.lives == 1 and several.lives > 1
    for fact in "val_bpb val_loss artifact_bytes step_stop source others seqs bytes".split():
        assert getattr(one, fact) == getattr(several, fact)
    one, several = run_log.read_curve(undisturbed), run_log.read_curve(interrupted)
    assert one.bpb == several.bpb and len(one.bpb) == 3 and one.final == several.final
    assert several.seconds == sorted(several.seconds)


def test_what_a_restart_says_and_refuses(env, whole, tmp_path):
    env = env | dict(RUN_ID="r")
    status, printed, log = run(env, tmp_path, stop_at(20))
    goes_on = "step:21/40 stopped by a signal; the same command with RUN_ID=r goes on from here"
    assert status == 2 and goes_on in printed
    assert "error: rank:0 step:21/40 stopped by a signal" in log
    assert "final_" not in log and "finished:" not in log
    checkpoint = tmp_path / "logs/r.00000021.ckpt"
    saved = r"^checkpoint:logs/r.00000021.ckpt time:\d+ms$"
    assert re.search(saved, log, re.MULTILINE) and checkpoint.exists()
    for changes, message in (
        (
            dict(MATRIX_LR="0.03", SEED="5"),
            "was made with SEED=1337 MATRIX_LR=0.02: give it the same",
        ),
        (dict(NUM_LAYERS="2"), "was made with NUM_LAYERS=3"),
        (dict(RESUME="never"), "RUN_ID=r was used before"),
    ):
        status, printed, _ = run(env, tmp_path, **changes)
        assert status == 2 and message in printed and printed.count("\n") <= 12
    # Another run can begin where this one stopped, and what does not change the result may change.
    (tmp_path / "logs/r2.00000021.ckpt").write_bytes(checkpoint.read_bytes())
    for changes in (dict(RUN_ID="r2"), dict(VAL_LOSS_EVERY="7", MICRO_BATCH_TOKENS="512")):
        status, printed, log = run(env, tmp_path, **changes)
        artifact = tmp_path / f"logs/{(env | changes)['RUN_ID']}.mdlm"
        assert status == 0 and artifact.read_bytes() == whole[1]
        resumed = r"(?m)^resumed:\S+r2?.00000021.ckpt step:21/40 train_time:\d+ms$"
        assert re.search(resumed, printed)
        assert "step:21/40 train_loss" not in printed and "step:22/40 train_loss" in printed
    status, printed, _ = run(env, tmp_path)
    assert status == 2 and "was used before" in printed  # it is finished


@pytest.mark.parametrize("where", ["validation", "checkpoint"])
def test_a_signal_after_the_last_step_ends_the_run_too(env, whole, tmp_path, where):
    """With the last checkpoint written: the same command packs and scores."""

    def prepare():
        name = {"validation": "score_windows", "checkpoint": "write_file"}[where]
        act = getattr(tm, name)

        def signalled(*arguments):
            if where == "validation" or "00000040" in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGTERM)
            return act(*arguments)

        setattr(tm, name, signalled)

    status, printed, _ = run(env, tmp_path, prepare, RUN_ID="s", VAL_LOSS_EVERY="0")
    assert status == 2 and "step:40/40 stopped by a signal" in printed
    assert "final_" not in printed
    status, printed, _ = run(env, tmp_path, RUN_ID="s", VAL_LOSS_EVERY="0")
    assert status == 0 and "step:40/40 val_loss" in printed
    assert (tmp_path / "logs/s.mdlm").read_bytes() == whole[1]


def slow_scores(seconds):
    """For `prepare`: every batch of a score takes some time; the run gets SIGTERM in the first."""

    def prepare():
        estimators = tm.ESTIMATORS["mdlm"]
        act, calls = estimators["nelbo"].nats, []

        def slow(*arguments):
            if not calls:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(1)
            time.sleep(seconds)
            return act(*arguments)

        estimators["nelbo"] = estimators["nelbo"]._replace(nats=slow)

    return prepare


def test_a_long_validation_is_cut_short(env, whole, tmp_path):
    """A scheduler waits some seconds only: the checkpoint has to be written before."""
    long = dict(EVAL_MAX_SEQS="64", VAL_BATCH_SIZE="32", VAL_LOSS_EVERY="15")
    env, began = env | dict(RUN_ID="v"), time.perf_counter()
    status, printed, log = run(env, tmp_path, slow_scores(1.0), **long)
    assert status == 2 and "step:15/40 stopped by a signal" in printed
    assert time.perf_counter() - began < 20 and "val_bpb:" not in log.partition("resumed")[0]
    assert (tmp_path / "logs/v.00000015.ckpt").exists()
    assert run(env, tmp_path)[0] == 0
    assert (tmp_path / "logs/v.mdlm").read_bytes() == whole[1]


def test_a_second_signal_does_not_wait(monkeypatch):
    """The first one again, within a second, is what torchrun passes on."""
    clock = tm.Clock(torch.device("cpu"))
    now = [100.0]
    monkeypatch.setattr(tm.time, "perf_counter", lambda: now[0])
    clock.stop()
    now[0] += 0.9
    clock.stop()
    now[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        clock.stop()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal(env, whole, tmp_path, ignored):
    """SIGHUP ends a run with a checkpoint, and one under nohup not at all."""

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        call = tm.Log.__call__

        def logged(self, line, **options):
            call(self, line, **options)
            if line.startswith("step:20/"):
                os.kill(os.getpid(), signal.SIGHUP)

        tm.Log.__call__ = logged

    status, printed, _ = run(env, tmp_path, prepare, RUN_ID="h")
    if not ignored:
        assert status == 2 and "step:21/40 stopped by a signal" in printed
        status, printed, _ = run(env, tmp_path, RUN_ID="h")
    assert status == 0 and (tmp_path / "logs/h.mdlm").read_bytes() == whole[1]


def test_a_run_outlives_its_screen(env, whole, tmp_path):
    """As with `| head`, or when the other end of a connection is gone."""

    def prepare():
        reading, writing = os.pipe()
        os.close(reading)
        sys.stdout = os.fdopen(writing, "w")

    assert end(life(env | dict(RUN_ID="p"), tmp_path, prepare)) == 0
    assert body_of(tmp_path / "logs/p.txt").endswith("\nfinished:p\n")
    assert (tmp_path / "logs/p.mdlm").read_bytes() == whole[1]


def test_what_another_program_made_is_left_alone(env, tmp_path):
    """A text that is no log, and an artifact without a log."""
    logs = tmp_path / "logs"
    logs.mkdir()
    notes = "my notes\nrun_id:notes is what I tried\n"
    (logs / "notes.txt").write_text(notes)
    (logs / "kept.mdlm").write_bytes(b"precious")
    for run_id, name in (("notes", "notes.txt"), ("kept", "kept.mdlm")):
        out = tmp_path / f"{run_id}.out"
        assert end(life(env | dict(RUN_ID=run_id), tmp_path)) == 2
        refused = f"logs/{name}: is not of this run; choose another RUN_ID than {run_id}"
        assert refused in out.read_text()
    assert (logs / "notes.txt").read_text() == notes
    assert (logs / "kept.mdlm").read_bytes() == b"precious"
    (logs / "begun.txt").write_text(Path(tm.__file__).read_text()[:1000])  # killed as it began
    assert end(life(env | dict(RUN_ID="begun"), tmp_path)) == 0


def test_another_number_of_processes(env, tmp_path):
    """Two, one, two: SIGTERM to torchrun, as a scheduler sends it, ends each life with a checkpoint
    and a reason within a minute; the losses of all lives are those of an undisturbed run of one
    process."""
    env = env | dict(RUN_ID="w", ITERATIONS="400", CHECKPOINT_EVERY="300")
    for processes, until in ((2, 8), (1, 20), (2, 32)):
        process = torchrun("--standalone", f"--nproc_per_node={processes}", cwd=tmp_path, **env)
        for line in process.stdout:
            if line.startswith(f"step:{until}/"):
                process.send_signal(signal.SIGTERM)
                break
        began, rest = time.perf_counter(), process.communicate(timeout=60)[0]
        assert process.returncode != 0 and time.perf_counter() - began < 60
        assert "stopped by a signal; the same command with RUN_ID=w goes on from here" in rest
    log = body_of(tmp_path / "logs/w.txt")
    assert re.findall(r"^world_size:(\d)", log, re.MULTILINE) == ["2", "1", "2"]
    assert log.count("\nresumed:") == 2

    def as_torchrun_has_it():
        tm.FAST_BFLOAT16 = FAST_BFLOAT16
        stop_at(32)()

    undisturbed = run(env, tmp_path, as_torchrun_has_it, RUN_ID="u")[2]

    def losses(text):
        found = re.findall(r"^step:(\d+)/400 train_loss:(\S+)", text, re.MULTILINE)
        return {int(step): float(loss) for step, loss in found}

    found, wanted = losses(log), losses(undisturbed)
    rounding = 2e-2 if FAST_BFLOAT16 else 2e-3  # of factors, too
    assert max(abs(found[step] - wanted[step]) for step in range(1, 33)) < rounding


def wait_at_checkpoint():
    """For `prepare`: waits for SIGUSR1 in the middle of writing the last checkpoint."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    fsync = os.fsync

    def waiting(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("00000040.ckpt.part"):
            signal.pause()
        fsync(fd)

    os.fsync = waiting


def test_a_run_is_not_started_twice_at_once(env, whole, tmp_path):
    """The second one is refused, the first one goes on; and a run does not touch what another one
    is writing."""
    first = life(env | dict(RUN_ID="a.b"), tmp_path, wait_at_checkpoint)
    part = tmp_path / "logs/a.b.00000040.ckpt.part"
    until = time.perf_counter() + 60
    while not part.exists() and time.perf_counter() < until:
        time.sleep(0.01)
    status, printed, _ = run(env, tmp_path, RUN_ID="a.b")
    assert status == 2
    assert "logs/a.b.txt: RUN_ID=a.b is running already; choose another" in printed
    assert run(env, tmp_path, RUN_ID="a")[0] == 0 and part.exists()
    os.kill(first, signal.SIGUSR1)
    assert end(first) == 0 and (tmp_path / "logs/a.b.mdlm").read_bytes() == whole[1]


def test_a_long_name_of_a_run_leaves_room_for_those_of_its_files(env, tmp_path):
    name = "x" * 200
    assert run(env, tmp_path, RUN_ID=name)[0] == 0
    assert (tmp_path / f"logs/{name}.mdlm").exists()
    with pytest.raises(tm.InputError, match="at most 200 bytes"):
        tm.Hyperparameters(run_id=name + "x")


ODD_GROUPS = [
    dict(RANK="-1", WORLD_SIZE="1"),
    dict(RANK="1", WORLD_SIZE="1"),
    dict(RANK="x", WORLD_SIZE="2"),
    dict(RANK="0"),
    dict(RANK="0", WORLD_SIZE="-1"),
]


@pytest.mark.parametrize("variables", ODD_GROUPS)
def test_a_group_that_cannot_be_is_one_line(env, tmp_path, variables):
    status, printed, _ = run(env, tmp_path, RUN_ID="g", **variables)
    assert status == 2 and printed.count("\n") == 1
    assert "RANK is no number below WORLD_SIZE" in printed


def test_odd_numbers_of_local_processes_do_not_matter(env, monkeypatch):
    hp = tm.Hyperparameters.from_env(env)
    for value in ("abc", "0", "-1", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        tm.check_memory(hp, torch.device("cpu"))


def test_waiting_for_others_ends_with_a_signal(env, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    child = life(env | dict(RUN_ID="w"), tmp_path, lambda: os.environ.update(group))
    for _ in range(600):  # it waits once others could join
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    late = threading.Timer(10, os.kill, (child, signal.SIGKILL))
    late.start()
    ended = end(child)
    late.cancel()
    assert ended == -signal.SIGTERM


# ---- Damaged checkpoints


def opened(data):
    """Header and tensor of a checkpoint."""
    begin = 4 + int.from_bytes(data[:4], "little")
    return json.loads(data[4:begin]), np.frombuffer(data[begin:-32], np.float32).reshape(4, -1)


def resealed(header, state):
    """A checkpoint of these, with a checksum that is right."""
    text = json.dumps(header).encode()
    return tm.sealed(len(text).to_bytes(4, "little") + text + state.tobytes())


def with_header(change):
    """A checkpoint with another header."""

    def damage(data):
        header, state = opened(data)
        return resealed(change(header), state)

    return damage


def with_fields(**fields):
    """A checkpoint that has these fields instead of its own."""
    return with_header(lambda header: header | fields)


def within(field, **values):
    """A checkpoint with these values in one of its dicts."""
    return with_header(lambda header: header | {field: header[field] | values})


def with_state(change):
    """A checkpoint with another tensor of weights and moments."""

    def damage(data):
        header, state = opened(data)
        return resealed(header, change(state))

    return damage


def pickled(data):
    """As torch.save writes: nothing in a checkpoint is unpickled."""
    torch.save(dict(state=torch.zeros(4, 64), progress=Evil()), buffer := io.BytesIO())
    return tm.sealed(buffer.getvalue())


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


DAMAGES = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "a bit": lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
    "text": lambda data: b"hello\n" * 100,
}
OTHER_VERSIONS = {  # with a checksum that is right
    "list": with_header(lambda header: [1, 2]),
    "fields": with_header(lambda header: {"version": header["version"]}),
    "more fields": with_fields(extra=1),
    "version": with_fields(version=-1),
    "shape": with_state(lambda state: state[:, :-64]),
    "state twice": with_fields(state=7),
    "no state": with_state(lambda state: state[:, :0]),
    "doubles": with_state(lambda state: state.astype(np.float64)),
    "odd length": with_state(lambda state: state.reshape(-1)[:-1]),
    "length of the header": lambda data: tm.sealed(b"\xff" * 4 + data[4:-32]),
    "nested": lambda data: tm.sealed((10**5).to_bytes(4, "little") + b"[" * 10**5),
    "knob": within("hp", no_knob=1),
    "value": within("hp", backbone="\x1b[2J"),
    "progress": within("progress", validated=16),
    "pickle": pickled,
}


@pytest.fixture(scope="module")
def stopped(env, tmp_path_factory):
    """A run with two checkpoints: its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    often = dict(CHECKPOINT_EVERY="1e-6", TRAIN_LOG_EVERY="1")
    assert run(env, folder, stop_at(20), RUN_ID="r", **often)[0] == 2
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    """Copies of its older and its newer checkpoint, in logs/ of this test's folder."""
    (tmp_path / "logs").mkdir()
    paths = []
    for original in sorted((stopped / "logs").glob("r.*.ckpt")):
        paths.append(tmp_path / "logs" / original.name)
        paths[-1].write_bytes(original.read_bytes())
    assert len(paths) == 2
    return paths


def test_a_checkpoint_has_what_a_run_is_and_nothing_else(copied):
    saved, state = opened(copied[1].read_bytes())
    assert saved.keys() == {"version", "hp", "progress", "counts", "averages", "data"}
    assert saved["progress"]["step"] == 21 == sum(saved["counts"])
    checkpoint = tm.read_checkpoint(copied[1])
    assert checkpoint.progress == tm.Progress(**saved["progress"])
    assert checkpoint.hp == tm.Hyperparameters(**saved["hp"])
    assert torch.equal(checkpoint.state, torch.from_numpy(state.copy()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(env, whole, copied, tmp_path, damage):
    """Then the older one is used."""
    older, newest = copied
    damaged = DAMAGES[damage](newest.read_bytes())
    newest.write_bytes(damaged)
    status, printed, _ = run(env, tmp_path, RUN_ID="r")
    assert status == 0 and f"skipped:logs/{newest.name}: damaged" in printed
    assert f"resumed:logs/{older.name} " in printed
    assert (tmp_path / "logs/r.mdlm").read_bytes() == whole[1]
    assert not (tmp_path / "pwned").exists() and not Path("pwned").exists()


@pytest.mark.parametrize("other", OTHER_VERSIONS)
def test_a_checkpoint_of_another_version_is_not_damaged(env, copied, tmp_path, monkeypatch, other):
    """It may be hours of work: nothing is trained over it."""
    older, newest = copied
    newest.write_bytes(OTHER_VERSIONS[other](newest.read_bytes()))
    monkeypatch.chdir(tmp_path)
    hp = tm.Hyperparameters.from_env(env | dict(RUN_ID="r"))
    stream = tm.open_training(hp, tm.load_tokenizer(hp.tokenizer_path, 384), byte_tables(hp))
    trainer = tm.Trainer(hp, stream, torch.device("cpu"), print)
    with pytest.raises(tm.InputError, match=f"^logs/{newest.name}: is of another version of train"):
        trainer.resume()
    assert newest.exists() and older.exists() and not Path("pwned").exists()


def test_a_run_goes_on_with_the_script_that_began_it(env, copied, stopped, tmp_path):
    """Another one leaves the log and the checkpoints as they are, and its user may go back."""
    log = tmp_path / "logs/r.txt"
    log.write_bytes((stopped / "logs/r.txt").read_bytes().replace(b"Muon", b"muon"))
    before = log.read_bytes()
    status, printed, _ = run(env, tmp_path, RUN_ID="r")
    assert status == 2 and "logs/r.txt: is of another version of train_mdlm.py" in printed
    assert log.read_bytes() == before and all(path.exists() for path in copied)


def test_a_checkpoint_for_which_there_is_no_memory_is_not_damaged(copied, monkeypatch):
    def no_memory(data):
        raise MemoryError

    monkeypatch.setattr(tm, "unsealed", no_memory)
    with pytest.raises(MemoryError):
        tm.read_checkpoint(copied[1])


def test_all_checkpoints_damaged_begins_again(env, whole, copied, tmp_path):
    for path in copied:
        path.write_bytes(path.read_bytes()[:-1])
    status, printed, _ = run(env, tmp_path, RUN_ID="r", CHECKPOINT_EVERY="0.1")
    assert status == 0 and printed.count("\nskipped:logs/r.") == 2 and "\nstep:1/40 " in printed
    assert (tmp_path / "logs/r.mdlm").read_bytes() == whole[1]


# ---- What happens around a run


def test_other_shards_are_refused(env, stopped, tmp_path):
    for split in ("train", "val"):
        path = next(Path(env["DATA_PATH"]).glob(f"fineweb_{split}_*.bin"))
        tokens = np.array(tm.open_shard(path))
        tokens[-7] = 300 if split == "train" else tokens[-7]
        prepare_text.write_shard(tmp_path / path.name, tokens)
    path = next((stopped / "logs").glob("r.*.ckpt"))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / path.name.replace("r.", "s.", 1)).write_bytes(path.read_bytes())
    status, printed, _ = run(env, tmp_path, RUN_ID="s", DATA_PATH=str(tmp_path))
    assert status == 2 and "was made with other shards: give it the same" in printed


def test_a_full_disk_keeps_the_last_checkpoint(env, whole, copied, tmp_path):
    """No file may grow beyond 300 kB, as if the disk were full: a checkpoint takes 550 kB."""

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    began = time.perf_counter()
    status, printed, log = run(env, tmp_path, little_room, RUN_ID="r")
    assert status == 2 and time.perf_counter() - began < 60
    assert "cannot be written: File too large" in printed
    assert "error: rank:0 logs/r.000000" in log
    left = sorted(path.name for path in (tmp_path / "logs").glob("r.*"))
    assert left == [*(path.name for path in copied), "r.txt"]
    status, printed, _ = run(env, tmp_path, RUN_ID="r")
    assert status == 0 and f"resumed:logs/{copied[1].name}" in printed
    assert (tmp_path / "logs/r.mdlm").read_bytes() == whole[1]


@pytest.mark.parametrize(
    "how, message",
    [
        ("removed", "cannot be read or written: No such file"),
        ("cut off", "was cut off while it was in use"),
    ],
)
def test_a_shard_that_vanishes_ends_the_run(env, tmp_path, how, message):
    data = tmp_path / "data"
    data.mkdir()
    for path in Path(env["DATA_PATH"]).glob("fineweb_*.bin"):
        (data / path.name).write_bytes(path.read_bytes())

    def vanish():
        step = tm.Trainer.step

        def after_ten(self, number, scale):
            for path in data.glob("fineweb_train_*.bin") if number == 10 else ():
                path.unlink() if how == "removed" else os.truncate(path, 2000)
            return step(self, number, scale)

        tm.Trainer.step = after_ten

    status, printed, log = run(env, tmp_path, vanish, RUN_ID="v", DATA_PATH=str(data))
    assert status == 2 and f"fineweb_train_000000.bin: {message}" in printed and message in log


@pytest.mark.parametrize("allowed", ["0", "2"])
def test_gradients_that_are_not_finite(env, tmp_path, allowed):
    """Two of the steps are poisoned in one group."""

    def poison():
        step = tm.Optimizer.step

        def poisoned(self, number, scale):
            if number in (3, 7):
                self.groups[-1].grads[0] = float("nan")
            return step(self, number, scale)

        tm.Optimizer.step = poisoned

    limits = dict(SKIP_NONFINITE=allowed, WARMUP_STEPS="0")
    status, printed, log = run(env, tmp_path, poison, RUN_ID="n", **limits)
    if allowed == "0":
        assert status == 2 and "step:4 not finite: loss " in printed
        assert "gradients: gain (" in printed and "SKIP_NONFINITE" in printed
        assert "final_" not in log and not (tmp_path / "logs/n.mdlm").exists()
    else:
        skipped = re.findall(r"^step:(\d+) not finite: .*skipped:(\d)$", log, re.MULTILINE)
        assert status == 0 and skipped == [("4", "1"), ("8", "2")]
        assert run_log.parse_log(tmp_path / "logs/n.txt").skipped_steps == 2


@pytest.mark.parametrize("when", ["at a log line", "at a checkpoint"])
def test_a_dropped_token_ends_the_run(env, tmp_path, when):
    """Places for too few masked tokens: the loss would be of another objective, so nothing is
    saved and nothing is scored."""

    def few_places():
        tm.scored_capacity = lambda hp, rows: 8

    log_every = "1" if when == "at a log line" else "0"
    status, printed, log = run(env, tmp_path, few_places, RUN_ID="d", TRAIN_LOG_EVERY=log_every)
    error = [line for line in printed.splitlines() if line.startswith("train_mdlm.py: error: ")]
    assert status == 2 and len(error) == 1 and printed.endswith(error[0] + "\n")
    assert re.search(r"error: step:\d+ \d+ masked tokens had no place in their batch: ", error[0])
    assert "MASK_DIST" in error[0] and "final_" not in log and "checkpoint:" not in log
    assert not list((tmp_path / "logs").glob("d.*.ckpt")) and "train_loss" not in printed
    assert not (tmp_path / "logs/d.mdlm").exists()
