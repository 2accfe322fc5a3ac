"""What all tools share: one line for whatever goes wrong, and nothing of somebody else replaced."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import bench
import codec
import common
import compare
import make_record
import pictures
import published
import pytest
import quant_table
import report
import torch
from conftest import ROOT, SHIPPED, clean_env

import train_mdlm as tm

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name != "common.py")
PROGRAMS = [path for path in TOOLS if "__main__" in path.read_text(encoding="utf-8")]
LOG = SHIPPED / "train_seed42.log"


def ended(main, capsys):
    """What is on stderr after a tool that did not do its work."""
    with pytest.raises(SystemExit) as stop:
        common.run_tool(main)()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("test_tools.py: error: ")
    return error.partition("error: ")[2][:-1]


# ---- Errors


def raise_error(error):
    def main():
        raise error

    return main


def recurse():
    recurse()


@pytest.mark.parametrize(
    "main, message",
    [
        (raise_error(tm.InputError("a\nb\u2028c: wrong")), "a b c: wrong"),
        (raise_error(tm.InputError("a\x1b[2Jb\0")), r"a\x1b[2Jb\x00"),
        (raise_error(tm.InputError("caf\udce9")), r"caf\udce9"),
        (raise_error(FileNotFoundError(2, "No such file", "a\nb")), "a b: cannot be read"),
        (raise_error(OSError("odd")), "odd"),
        (raise_error(BrokenPipeError(32, "Broken pipe")), "the output was closed before all"),
        (raise_error(MemoryError()), "out of memory: give less text"),
        (raise_error(RuntimeError("CUDA out of memory")), "out of memory: give less text"),
        (raise_error(RuntimeError("can't allocate memory: you")), "out of memory: give less"),
        (recurse, "RecursionError at test_tools.py"),
        (lambda: torch.zeros(2) @ torch.zeros(3), "RuntimeError at test_tools.py"),
        (lambda: "\udce9".encode(), "UnicodeEncodeError at test_tools.py"),
        (raise_error(KeyboardInterrupt()), "stopped by Ctrl-C"),
    ],
)
def test_an_error_is_one_line(main, message, capsys):
    assert ended(main, capsys).startswith(message)


def test_what_nobody_foresaw_has_a_traceback():
    with pytest.raises(KeyError):
        common.run_tool(raise_error(KeyError("bug")))()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_the_handlers_are_those_before(number, capsys):
    before = signal.getsignal(number)
    stopped = ended(lambda: os.kill(os.getpid(), number), capsys)
    assert stopped == f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}"
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        common.run_tool(lambda: os.kill(os.getpid(), signal.SIGHUP))()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_ctrl_c_while_packages_are_imported_is_one_line(path, tmp_path):
    """A package of that name in the way sends the signal while it is imported."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, str(path)],
        env=clean_env(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{path.name}: error: stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    "module", [bench, codec, compare, make_record, pictures, published, report]
)
def test_wrong_arguments_are_one_line(module, tool):
    done = tool(module, "--no-such\noption")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{module.__name__}.py: error: ") and "see --help" in done.stderr


def test_help_begins_with_what_the_tool_is_for(tool):
    done = tool(codec, "--help")
    assert done.returncode == 0 and not done.stderr
    assert " ".join(codec.__doc__.split()[:8]) in " ".join(done.stdout.split())


# ---- The screen


def test_closed_streams_lead_nowhere():
    """Not into the next file that is opened."""
    program = [sys.executable, str(ROOT / "tools/published.py")]
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *program]
    assert subprocess.run(command, env=clean_env(), stdin=subprocess.DEVNULL).returncode == 0


def test_a_stream_that_is_none_is_opened(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    common.open_closed_streams()
    found = [stream.name for stream in (sys.stdin, sys.stdout, sys.stderr)]
    assert found == [os.devnull] * 3
    print("nothing")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("what", ["pipe", "full"])
def test_a_screen_that_takes_no_more_is_one_line(what, monkeypatch, capfd):
    if what == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        message = "the output was closed before all of it was written"
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
        message = "No space left on device"
    with os.fdopen(writer, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(SystemExit) as stop:
            common.run_tool(lambda: print("something"))()
        monkeypatch.undo()
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("test_tools.py: error: ") and message in error
    assert error.count("\n") == 1


def test_a_screen_without_unicode(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    common.run_tool(lambda: print("1 ± 2 \udce9"))()
    assert screen.buffer.getvalue() == b"1 \\xb1 2 \\udce9\n"


# ---- Files


def test_where_nothing_can_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file/a.png"):
        with pytest.raises(tm.InputError, match="cannot be written: not a file name in a folder"):
            common.check_output(path, lambda path: True)
    common.check_output(tmp_path / "new/folder/a.png", lambda path: False)
    common.check_output(tmp_path / "file", lambda path: True)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file", tmp_path / "pipe"):
        with pytest.raises(tm.InputError, match="this tool did not make it: move it away or"):
            common.check_output(path, lambda path: path.name == "pipe")


def test_json_is_read_and_written_strictly(tmp_path):
    path = tmp_path / "a.json"
    for text in ("", "[" * 100_000, "\xff", "[1"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(tm.InputError, match="a.json: is not JSON that a tool wrote"):
            common.read_json(path)
    path.write_text(common.to_json({"a": [1, None, "±"]}, indent=1), encoding="utf-8")
    assert common.read_json(path) == {"a": [1, None, "±"]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(tm.InputError, match="not a finite number, which JSON cannot hold"):
            common.to_json([value], indent=1)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_only_pictures_of_the_tools_are_replaced(suffix, tmp_path):
    figure = common.new_figure(2, 1)
    path = tmp_path / f"a.{suffix}"
    common.save_figure(figure, path)
    assert common.made_picture(path)
    common.save_figure(figure, path)
    figure.savefig(path, format=suffix.lower())  # by somebody else
    theirs = path.read_bytes()
    with pytest.raises(tm.InputError, match="is there already, and this tool did not make it"):
        common.save_figure(figure, path)
    assert path.read_bytes() == theirs


@pytest.mark.parametrize(
    "module, arguments",
    [
        (report, [LOG]),
        (compare, ["a.mdlm", "b.mdlm"]),
        (quant_table, ["a.mdlm"]),
    ],
)
def test_a_file_of_somebody_else_stays(module, arguments, tool, tmp_path):
    path = tmp_path / "mine.png"
    path.write_text("mine")
    done = tool(module, *arguments, "--out", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "mine.png: is there already, and this tool did not make it" in done.stderr
    assert path.read_text() == "mine"


def test_the_pictures_of_somebody_else_stay(tool, tmp_path):
    (tmp_path / "masks.png").write_text("mine")
    done = tool(pictures, "--out", tmp_path)
    assert done.returncode == 2 and "masks.png: is there already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["masks.png"]


def test_a_format_that_no_picture_has_is_said_before_the_work(tool, tmp_path):
    done = tool(compare, "a.mdlm", "b.mdlm", "--out", tmp_path / "a.docx")
    assert done.returncode == 2 and "a.docx: the picture cannot be written: its" in done.stderr


def test_tables_of_quant_table_are_recognized(tmp_path):
    path = tmp_path / "a.json"
    for value, made in (
        ([{"row": "as given"}], True),
        ([{"row": "mine"}], False),
        ([], False),
        ({"row": "as given"}, False),
        ([1], False),
    ):
        path.write_text(json.dumps(value))
        assert quant_table.made_table(path) == made
    assert all(map(quant_table.made_table, (ROOT / "records/quant_tables").glob("*.json")))


# ---- All tools


def test_labels_are_shown_as_they_are():
    assert common.plain_label("_a$b$\n") == r" _a\$b\$"


def test_every_program_here_is_run_by_run_tool():
    assert {path.stem for path in PROGRAMS} == {path.stem for path in TOOLS} - {
        "sampling",
        "absent_gpu",
        "run_log",
        "decoding",
        "report_page",
        "report_charts",
    }
    for path in PROGRAMS:
        text = path.read_text(encoding="utf-8")
        assert "@common.run_tool\ndef main() -> None:" in text, path
        slow = re.search(r"^(import|from) (torch|numpy|train_mdlm|matplotlib)", text, re.MULTILINE)
        assert text.index("\nimport common") < slow.start(), path
    assert Path(common.TOOLS) == ROOT / "tools"
