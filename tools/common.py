"""What the tools have in common: where the script is, one-line errors, artifacts, data, files.

A tool imports this file before everything that takes long to import, so that Ctrl-C is one line
from then on, and before `train_mdlm`, which is then found wherever the tool is started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(ROOT))

DPI = 110  # of pictures
MARK = "tools of train_mdlm.py"  # in every picture: only what has it is replaced
MARKED = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}
LARGEST_OUTPUT = 1 << 26  # bytes; what has more is neither read nor replaced


# ---- Signals and standard streams


def on_signals(handler) -> dict[int, object]:
    """Sets the handler of what stops a tool, unless that is ignored (nohup); the handlers before.

    A tool is its own process: no other thread may set handlers.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    return before


def stopped_by(number: int) -> str:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name}"


def one_line(text: str) -> str:
    """Without line breaks, and with escapes for what cannot be printed."""
    printable = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )
    return "".join(printable)


def stop_at_once(number: int, frame: object) -> None:
    """A handler for the time in which packages are imported, and nothing has been done yet."""
    name = Path(sys.argv[0]).name
    os.write(2, f"{name}: error: {one_line(stopped_by(number))}\n".encode(errors="replace"))
    os._exit(2)


def interrupt(number: int, frame: object) -> None:
    """A handler for the time in which a tool works: what it has begun is tidied up."""
    raise KeyboardInterrupt(stopped_by(number))


def open_closed_streams() -> None:
    """Standard streams that are closed (python tool.py >&-) lead nowhere from now on; otherwise the
    next file that is opened would get what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


open_closed_streams()
started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if started.parent in (TOOLS, ROOT / "data"):
    on_signals(stop_at_once)

import torch  # noqa: E402

import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402

# ---- Command lines


def explain(error: Exception) -> str:
    """One line on an error that a user, a file or a machine may cause; raises any other."""
    if isinstance(error, BrokenPipeError):
        return "the output was closed before all of it was written"
    if isinstance(error, OSError) and error.strerror is None:
        return str(error)
    if isinstance(error, (InputError, OSError, ImportError)):
        return tm.explain(error)
    if tm.is_lack_of_memory(error):
        return "out of memory: give less text or fewer windows, or use a larger machine"
    if isinstance(error, (RuntimeError, UnicodeError)):  # of torch, or of a text that is too deep
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {where}: {error}"
    raise error


def outcome(work: Callable[[], None]) -> tuple[int, str]:
    """The exit status of work(), and a line on what went wrong."""
    try:
        work()
    except SystemExit as stop:
        return stop.code or 0, ""
    except KeyboardInterrupt as error:
        return 2, str(error) or stopped_by(signal.SIGINT)
    except Exception as error:
        return 2, explain(error)
    return 0, ""


def run_tool(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates main(): what the user got wrong, or a signal, is one line on stderr, status 2."""
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):  # for screens without Unicode
            stream.reconfigure(errors="backslashreplace")
        before = on_signals(interrupt)
        try:
            status, message = outcome(main)
            _, unwritten = outcome(sys.stdout.flush)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if unwritten:  # Python would try again when it ends, and complain
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if message or unwritten:
            with contextlib.suppress(OSError):
                print(f"{name}: error: {one_line(message or unwritten)}", file=sys.stderr)
            status = 2
        if status:
            sys.exit(status)

    return run


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with `description`, the docstring of a tool, as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(description=description, formatter_class=formatter)


OF_THE_PRESET = "that of the artifact's preset"


def add_tokenizer_option(parser: argparse.ArgumentParser, otherwise: str = OF_THE_PRESET) -> None:
    text = f"SentencePiece model; default: TOKENIZER_PATH, or {otherwise}"
    parser.add_argument("--tokenizer", help=text)


def add_data_options(parser: argparse.ArgumentParser, otherwise: str = OF_THE_PRESET) -> None:
    """The options --data and --tokenizer, which `with_paths` understands; `otherwise` says what is
    taken without them and their variables."""
    text = f"folder with the shards; default: DATA_PATH, or {otherwise}"
    parser.add_argument("--data", help=text)
    add_tokenizer_option(parser, otherwise)


def add_seqs_option(parser: argparse.ArgumentParser, default: int) -> None:
    """The option --seqs: how many windows are scored."""
    text = "windows, evenly spaced; 0: the whole split"
    parser.add_argument("--seqs", type=windows, default=default, help=text)


def windows(text: str) -> int:
    """An argument that is a number of windows which have a standard error."""
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) == 1:
        reason = "give 2 windows or more, for a standard error, or 0 for all of them"
        raise argparse.ArgumentTypeError(f"{text}: {reason}")
    return int(text)


def whole_numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """What an option lists, sorted and once each; InputError unless they are whole numbers from
    `low` to `high`."""
    if not re.fullmatch(r"[0-9]{1,19}(,[0-9]{1,19})*", text):
        raise InputError(f"{option} {text[:40]}: takes whole numbers separated by commas")
    found = sorted({int(part) for part in text.split(",")})
    for number in (found[0], found[-1]):
        if not low <= number <= high:
            raise InputError(f"{option} {text[:40]}: {number} is not between {low} and {high}")
    return found


class Progress:
    """On a terminal, in a line that is written over: how much of some work is done."""

    def __init__(self, name: str):
        self.name = name
        self.percent = -1

    def __call__(self, fraction: float) -> None:
        """`fraction` in [0, 1] is done; at 1 the line is empty again."""
        percent = int(100 * fraction)
        if percent == self.percent or not sys.stdout.isatty():
            return
        self.percent = percent
        line = f"{self.name} {percent} %" if percent < 100 else ""
        with contextlib.suppress(OSError):  # the work outlives its screen
            print(f"\r\x1b[K{line}", end="", flush=True)


def require(package: str) -> ModuleType:
    """A package that only requirements-dev.txt brings; InputError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        missing = package.partition(".")[0]
        message = f"the package {missing} is missing: pip install -r requirements-dev.txt"
        raise InputError(message) from None


# ---- Artifacts and data


def device() -> torch.device:
    """Where models run: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_paths(
    hp: tm.Hyperparameters, data: str | None = None, tokenizer: str | None = None
) -> tm.Hyperparameters:
    """`hp` with the paths given here, else in DATA_PATH and TOKENIZER_PATH, else its own."""
    return dataclasses.replace(
        hp,
        data_path=data or os.environ.get("DATA_PATH") or hp.data_path,
        tokenizer_path=tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path,
    )


def load_model(
    artifact: Path, data: str | None = None, tokenizer: str | None = None
) -> tuple[tm.Model, tm.Hyperparameters]:
    """The model of an artifact, on the device, and its hyperparameters `with_paths`."""
    model, hp = tm.load_artifact(artifact)
    return model.on(device()), with_paths(hp, data, tokenizer)


def load_tokenizer(hp: tm.Hyperparameters) -> tuple[object, tm.ByteTables]:
    """The tokenizer that `hp` names, and its byte tables, on the device."""
    tokenizer = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    return tokenizer, tm.build_sentencepiece_luts(tokenizer, hp.vocab_size, device())


def open_validation(hp: tm.Hyperparameters) -> tm.Split:
    """The validation split that `hp` names, checked, with byte tables on the device."""
    return tm.open_validation(hp, *load_tokenizer(hp))


# ---- Files


@contextlib.contextmanager
def sole_use(path: Path) -> Iterator[None]:
    """Locks a file or folder; InputError if another process has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{path}: another process is using it") from None
    except OSError:
        pass  # some file systems cannot lock
    try:
        yield
    finally:
        os.close(descriptor)


def check_output(path: Path, made: Callable[[Path], bool]) -> None:
    """Before hours of work: InputError if no file can be written at `path`, or if there is one
    already and made(path) says that it is of somebody else."""
    if path.is_symlink():  # what is written would take its place
        target = os.path.realpath(path)
        raise InputError(f"{path}: is a symbolic link: give the name that it leads to, {target}")
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written: not a file name in a folder to write into")
    if path.exists() and not (path.is_file() and made(path)):
        remedy = "move it away or choose another name"
        raise InputError(f"{path}: is there already, and this tool did not make it: {remedy}")
    with contextlib.suppress(FileNotFoundError):
        path.with_name(f"{path.name}.part").lstat()  # OSError for a name that is too long to write


def read_small(path: Path) -> bytes:
    """What is in a file that a tool may have made; nothing if it is too large for that."""
    with path.open("rb") as file:  # perhaps a pipe, which does not say how much is in it
        data = file.read(LARGEST_OUTPUT + 1)
    return data if len(data) <= LARGEST_OUTPUT else b""


def read_json(path: Path) -> object:
    """InputError if there is no JSON, or if it is nested so deeply that nobody wrote it."""
    text = read_small(path)
    if not text and path.stat().st_size:
        raise InputError(f"{path}: has more than {LARGEST_OUTPUT:,} bytes, too many to be read")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "" if isinstance(error, RecursionError) else f": {error}"
        raise InputError(f"{path}: is not JSON that a tool wrote{reason}") from None


def to_json(value: object, indent: int) -> str:
    """InputError if a number is not finite: JSON has no NaN."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError("a figure is not a finite number, which JSON cannot hold") from None


# ---- Pictures


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches."""
    figure_class = require("matplotlib.figure").Figure
    return figure_class(figsize=(width, height), layout="constrained")


def plain_label(name: str) -> str:
    """A name as matplotlib shows it as it is: no formula, no line break, not hidden."""
    label = one_line(name).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def made_object(*fields: str) -> Callable[[Path], bool]:
    """What tells whether a file is a JSON object that has these: a tool made it."""

    def made(path: Path) -> bool:
        with contextlib.suppress(InputError):
            found = read_json(path)
            return isinstance(found, dict) and set(fields) <= found.keys()
        return False

    return made


def made_picture(path: Path) -> bool:
    """Whether a tool made this picture."""
    return MARK.encode() in read_small(path)


def check_picture(path: Path) -> None:
    """Before hours of work: InputError if a picture cannot be written at `path`."""
    check_output(path, made_picture)
    require("matplotlib")
    if picture_format(path) not in MARKED:
        remedy = f"its name has to end in {', '.join(MARKED)}"
        raise InputError(f"{path}: the picture cannot be written: {remedy}")


def picture_format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def picture_bytes(figure, suffix: str = "png", **options) -> bytes:
    """A picture in a format of MARKED, with MARK in it."""
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, metadata={MARKED[suffix]: MARK}, **options)
    return picture.getvalue()


def save_figure(figure, path: Path) -> None:
    """Writes a picture in the format that its name ends in; InputError if that fails."""
    check_picture(path)
    try:
        picture = picture_bytes(figure, picture_format(path), dpi=DPI)
    except ValueError as error:
        raise InputError(f"{path}: the picture cannot be written: {error}") from None
    tm.write_file(path, picture)
