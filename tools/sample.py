"""Writes text with an artifact, and shows it while it is being written.

    python tools/sample.py logs/<run>.mdlm
    python tools/sample.py logs/<run>.mdlm --prompt "Returns the" --num 4
    python tools/sample.py logs/<run>.mdlm --infill "Once [5] a [12]." --sampler confidence
    python tools/sample.py logs/<run>.mdlm --prompt-file - < beginning.txt

A gap of a template, [5], is so many tokens, and the text around it is kept exactly; a space before
a gap comes with its first token. Write \\[5] for brackets that are no gap, and \\\\[5] for a
backslash before a gap; anywhere else a backslash is one. Without --steps a model call writes one
position.

At the end of a sample: its model calls, the tokens per second, and its bits, −log2 of what the
model gave the tokens, where the order is known without them. --json FILE writes every step.

Samplers, the first one that the model has is the default:

"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import common
import sampling

import train_mdlm as tm
from train_mdlm import InputError

FRAME_SECONDS = 0.04  # between two pictures at least
QUICK_SECONDS = 0.01  # for a picture; of one that takes twice as long there are half as many
TEXT_SECONDS = 3.0  # for a text at least, so that it can be watched
LONGEST_DELAY = 0.25  # of them for a call
MOST_DELAY = 60.0  # seconds that a call may be asked to stay on the screen
STYLES = dict(masked="dim", new="bold green", settled="", fixed="cyan")
GLYPH, PLAIN_GLYPH = "\u2591", "_"  # of a masked position
LARGEST_TEXT = 1 << 24  # bytes of a prompt or a template


# ---- Text on a screen


def printable(text: str) -> str:
    """With escapes for what a terminal would obey."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
        for letter in text
    )


def spans(loaded: sampling.Loaded, rows: sampling.Rows, glyph: str) -> Iterator[tuple[str, str]]:
    """The text of the first row, in pieces with their styles."""
    tokens, fixed, fresh = (x.tolist() for x in (rows.z[0], rows.fixed, rows.fresh[0]))
    pieces = sampling.pieces_of(loaded, tokens, unwritten=glyph)
    for token, piece, is_fixed, is_new in zip(tokens, pieces, fixed, fresh, strict=True):
        if token == loaded.hp.pad_id:
            continue
        state = "masked" if token == loaded.hp.mask_id else "new" if is_new else "settled"
        yield printable(piece), STYLES["fixed" if is_fixed else state]


def sample_numbers(rows: sampling.Rows, request: sampling.Request) -> str:
    first = rows.request.seed - request.seed
    last = first + len(rows.z)
    return f"sample {first + 1}" + (f"-{last}" if last > first + 1 else "") + f" of {request.num}"


class LiveView:
    """Shows the first text of a batch while it is being written.

    Each call stays for `delay` seconds at least; None: as long as it takes to watch the text.
    """

    def __init__(
        self, loaded: sampling.Loaded, request: sampling.Request, delay: float | None = None
    ):
        self.loaded, self.request, self.delay = loaded, request, delay
        self.console = common.require("rich.console").Console(highlight=False)
        can_show = self.console.encoding.lower().startswith("utf")
        self.glyph = GLYPH if can_show else PLAIN_GLYPH
        live = common.require("rich.live").Live
        self.live = live(console=self.console, auto_refresh=False, transient=True)
        self.next_picture = 0.0
        self.next_call = 0.0

    def __enter__(self) -> LiveView:
        self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def __call__(self, rows: sampling.Rows) -> None:
        self.wait()
        self.next_call = time.monotonic() + self.delay_of(rows)
        self.picture(rows)

    def wait(self) -> None:
        """Until the last call has been on the screen long enough."""
        time.sleep(max(self.next_call - time.monotonic(), 0))

    def delay_of(self, rows: sampling.Rows) -> float:
        """Seconds for a call."""
        if self.delay is not None:
            return self.delay
        drawn = int((~rows.fixed).sum())
        calls = min(rows.settings.get("steps") or drawn, drawn)
        return min(TEXT_SECONDS / calls, LONGEST_DELAY)

    def picture(self, rows: sampling.Rows) -> None:
        began = time.monotonic()
        if began < self.next_picture:
            return
        masked = int((rows.z[0] == self.loaded.hp.mask_id).sum())
        facts = f"{sample_numbers(rows, self.request)}: call {len(rows.steps[0])}, {masked} masked"
        picture = self.around_new(list(spans(self.loaded, rows, self.glyph)))
        self.live.update(picture.append(f"\n{facts}", STYLES["masked"]), refresh=True)
        now = time.monotonic()
        self.next_picture = now + FRAME_SECONDS * max((now - began) / QUICK_SECONDS, 1)

    def around_new(self, pieces: list[tuple[str, str]]):
        """The text; of one that is too long for the screen the lines around what is new."""
        text = common.require("rich.text").Text
        size = self.console.size
        room = max(size.height - 4, 1)
        width = max(size.width, 1)
        lines = text.assemble(*pieces).wrap(self.console, width)
        until_new = list(itertools.takewhile(lambda piece: piece[1] != STYLES["new"], pieces))
        new = len(text.assemble(*until_new).wrap(self.console, width))
        first = max(min(new - room // 2, len(lines) - room), 0)
        return text("\n").join([*lines[first : first + room], text()])

    def show(self, sample: sampling.Sample, facts: str) -> None:
        self.wait()
        self.live.update("", refresh=True)
        text = common.require("rich.text").Text
        pieces = sampling.pieces_of(self.loaded, sample.tokens)
        styles = [STYLES["fixed" if fixed else "settled"] for fixed in sample.fixed]
        shown = map(printable, pieces)
        self.console.print(text.assemble(*zip(shown, styles, strict=True)))
        self.console.print(text(facts + "\n", STYLES["masked"]))


def can_write_over() -> bool:
    """Whether standard output is a terminal, and one that can replace what it shows."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class PlainView:
    """Lines for a file, or for a terminal that can do no more, or without the package rich."""

    def __init__(self, loaded: sampling.Loaded, request: sampling.Request):
        self.loaded, self.request = loaded, request
        self.writes_over = can_write_over()
        self.progress = common.Progress("written")
        self.quarter = 0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __call__(self, rows: sampling.Rows) -> None:
        drawn = ~rows.fixed
        left = (rows.z == self.loaded.hp.mask_id).sum().item()
        done = 1 - left / (drawn.sum().item() * len(rows.z))
        if self.writes_over:
            self.progress(done)
        quarter = int(4 * done)
        if not done:  # another batch
            self.quarter = 0
        if quarter > self.quarter and not self.writes_over:
            calls = max(map(len, rows.steps))
            share = f"{25 * quarter} %, {counted(calls, 'call')}"
            print(f"{sample_numbers(rows, self.request)}: {share}", flush=True)
        self.quarter = max(quarter, self.quarter)

    def show(self, sample: sampling.Sample, facts: str) -> None:
        pieces = sampling.pieces_of(self.loaded, sample.tokens)
        print(f"{printable(''.join(pieces))}\n{facts}\n", flush=True)


def choose_view(
    loaded: sampling.Loaded, request: sampling.Request, delay: float | None = None
) -> LiveView | PlainView:
    if not can_write_over():
        return PlainView(loaded, request)
    try:
        return LiveView(loaded, request, delay)
    except InputError as error:
        print(f"note: no live view, {error}")
        return PlainView(loaded, request)


# ---- Figures


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def describe(sample: sampling.Sample, number: int, request: sampling.Request) -> str:
    """A line on what a sample has cost."""
    drawn = sample.fixed.count(False)
    line = f"sample {number} of {request.num}, seed {sample.seed}: {counted(drawn, 'token')} in "
    line += f"{counted(sample.calls, 'model call')}, {drawn / sample.seconds:.0f} tokens/s"
    if sample.bits is None:
        return f"{line}, no exact bits: the order depends on tokens that were not kept"
    return f"{line}, {sample.bits:.1f} bits"


def describe_all(samples: list[sampling.Sample]) -> str:
    drawn = sum(sample.fixed.count(False) for sample in samples)
    calls = sum(sample.calls for sample in samples)
    seconds = sum(sample.seconds for sample in samples)
    return f"{len(samples)} samples: {calls} model calls, {drawn / seconds:.0f} tokens/s"


# ---- Command line


def delay_of_option(text: str) -> float:
    """An argument that is a number of seconds for a call."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= MOST_DELAY:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: give 0 to {MOST_DELAY:g} seconds")


def read_text(path: Path) -> str:
    """Of a file, of a pipe or, for -, of standard input; InputError if there is no text, or more
    than anybody would want to go on with."""
    source, name = (0, "standard input") if str(path) == "-" else (path, path)
    try:
        with open(source, "rb", closefd=source != 0) as file:
            text = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if not text:
        raise InputError(f"{name}: is empty")
    if len(text) > LARGEST_TEXT:
        raise InputError(f"{name}: has more than {LARGEST_TEXT:,} bytes, too many for a text")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from None


def list_samplers() -> str:
    return "\n".join(
        f"    {name:<11} {row.about}\n{'':<15} ({', '.join(row.systems)} models"
        f"{'' if row.exact else '; no exact bits'})"
        for name, row in sampling.SAMPLERS.items()
    )


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(__doc__ + list_samplers())
    defaults = sampling.Request()
    parser.add_argument("artifact", type=Path, help="the .mdlm file of a run")
    names = ", ".join(sampling.SAMPLERS)
    parser.add_argument("--sampler", default="", metavar="NAME", help=f"one of {names}")
    texts = parser.add_mutually_exclusive_group()
    file_help = "the same from a file or a pipe; -: from standard input"
    texts.add_argument("--prompt", default="", metavar="TEXT", help="how the text begins")
    texts.add_argument("--prompt-file", type=Path, metavar="FILE", help=file_help)
    texts.add_argument("--infill", metavar="TEXT", help="a template with gaps")
    texts.add_argument("--infill-file", type=Path, metavar="FILE", help=file_help)
    length_help = "tokens of the text, the prompt included; default, or 0: a window"
    parser.add_argument("--length", type=int, default=0, help=length_help)
    parser.add_argument("--steps", type=int, help="model calls of a text at most")
    parser.add_argument("--gamma", type=float, help="of eb: bound in nats (0.1)")
    parser.add_argument("--eta", type=float, help="of remdm: chance to be masked again (0.02)")
    temperature_help = "0: always the most probable token"
    parser.add_argument("--temperature", type=float, default=1.0, help=temperature_help)
    top_p_help = "draw only from the most probable tokens that have this much together"
    parser.add_argument("--top-p", type=float, default=1.0, help=top_p_help)
    seed_help = "of the first sample; the next one has the next seed"
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    parser.add_argument("--num", type=int, default=1, help="samples")
    batch_help = "samples side by side; does not change them"
    parser.add_argument("--batch", type=int, default=defaults.batch, help=batch_help)
    cache_help = "keep no keys and values: slower, the same samples"
    parser.add_argument("--no-cache", dest="cache", action="store_false", help=cache_help)
    delay_help = "on a terminal, of each call at least; 0: as fast as it is; default: so that a "
    delay_help += f"text takes about {TEXT_SECONDS:g} s, at most {LONGEST_DELAY} for each call"
    delay = dict(type=delay_of_option, metavar="SECONDS", help=delay_help)
    parser.add_argument("--delay", **delay)
    json_help = "write every step into this file"
    parser.add_argument("--json", type=Path, metavar="FILE", help=json_help)
    data_help = "folder of the data that the artifact was trained with, by which a wrong tokenizer "
    data_help += "is told; default: DATA_PATH, or that of the run or of its preset"
    parser.add_argument("--data", help=data_help)
    tokenizer_help = "SentencePiece model; default: TOKENIZER_PATH, or that of the run or its "
    tokenizer_help += "preset"
    parser.add_argument("--tokenizer", help=tokenizer_help)
    return parser.parse_args()


def request_of(arguments: argparse.Namespace) -> sampling.Request:
    values = {name: getattr(arguments, name) for name in sampling.Request._fields}
    for name in ("prompt", "infill"):
        path = getattr(arguments, f"{name}_file")
        if path:
            values[name] = read_text(path)
    if values["infill"] == "":
        raise InputError("--infill: the template is empty; write a gap of five tokens as [5]")
    return sampling.Request(**values | dict(infill=values["infill"] or ""))


@common.run_tool
def main() -> None:
    arguments = parse_arguments()
    if arguments.json:
        made = common.made_object("sampler", "mask_id", "samples")
        common.check_output(arguments.json, made)
    request = request_of(arguments)
    loaded = sampling.load(arguments.artifact, arguments.tokenizer, arguments.data)
    request, template = sampling.resolve(loaded, request)
    for note in sampling.notes(loaded, template):
        print(f"note: {note}")
    samples = []
    try:
        with choose_view(loaded, request, arguments.delay) as view:
            for sample in sampling.draw(loaded, request, view):
                samples.append(sample)
                view.show(sample, describe(sample, len(samples), request))
    finally:  # what is finished is kept, also after Ctrl-C
        if arguments.json and samples:
            record = sampling.record(loaded, request, samples)
            tm.write_file(arguments.json, common.to_json(record, indent=None).encode())
    if len(samples) > 1:
        print(describe_all(samples))


if __name__ == "__main__":
    main()
