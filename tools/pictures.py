"""Draws the pictures of the documentation from the code itself, so that they cannot be stale.

    python tools/pictures.py [--out docs/pictures] [--artifact logs/<run>.mdlm]
    python tools/pictures.py --samples samples.json

flow.png      the story at the top of train_mdlm.py, stop by stop; what a function gives is taken
              from its docstring and its annotations
artifact.png  where the bytes of a submission are: those of an artifact, or of three presets if all
              weights were normal
masks.png     which masks the NELBO draws, and how evenly their sizes are spread
unmasking.png with --samples, and then only this: the first text of that file, which
              tools/sample.py --json wrote, after some of its model calls

Two runs give identical files.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import common
import report
import torch
import torch.nn.functional as F
from report_page import Sample
from torch import Tensor

import train_mdlm as tm
from train_mdlm import InputError

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import FancyBboxPatch, Rectangle
    from matplotlib.textpath import TextToPath
except ImportError:
    missing = "matplotlib is missing: pip install -r requirements-dev.txt"
    print(f"pictures.py: error: {missing}", file=sys.stderr)
    sys.exit(2)

# ---- Sheets and text ---------------------------------------------------------
#
# A sheet is measured in hundredths of an inch, from its upper left corner. Shown 900 pixels wide,
# it has one pixel for each.

WIDTH = 900
MARGIN = 20
LINE = 15.5  # from one line of text to the next
DPI = 200

INK = "#1c2733"
QUIET = "#66758a"
EDGE = "#c3cfdc"
CARD = "#f5f8fb"
BLUE = "#1a5c9e"
ORANGE = "#b04a12"


class Style(NamedTuple):
    """How a piece of text looks; `size` in points."""

    color: str
    size: float = 8.2
    family: str = "DejaVu Sans"
    weight: str = "normal"

    @property
    def font(self) -> FontProperties:
        return FontProperties(family=self.family, weight=self.weight, size=self.size)


PLAIN = Style(INK)
FAINT = Style(QUIET)
STRONG = Style(INK, weight="bold")
TITLE = Style(INK, size=12, weight="bold")
FUNCTION = Style(BLUE, family="DejaVu Sans Mono", size=7.8)
TABLE = Style(ORANGE, family="DejaVu Sans Mono", size=7.8)

Word = list[tuple[str, Style]]  # pieces with no blank between them


def new_sheet(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


@functools.cache
def text_width(text: str, style: Style) -> float:
    points, _, _ = TextToPath().get_text_width_height_descent(text, style.font, ismath=False)
    return points * 100 / 72


BLANK = text_width("a a", PLAIN) - text_width("aa", PLAIN)


def write(
    axes: Axes, x: float, y: float, text: str, style: Style = PLAIN, align: str = "left"
) -> None:
    """One line; y is its baseline."""
    axes.text(x, y, text, color=style.color, fontproperties=style.font, ha=align, va="baseline")


def wrapped(words: Sequence[Word], width: float) -> list[list[Word]]:
    """Lines of words, as many in each as the width has room for."""
    lines, used = [], math.inf
    for word in words:
        needed = sum(text_width(*piece) for piece in word)
        if used + needed > width:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += needed + BLANK
    return lines


def write_lines(axes: Axes, x: float, y: float, lines: list[list[Word]]) -> None:
    """Lines of words below each other; y is the first baseline."""
    for number, line in enumerate(lines):
        position = x
        for word in line:
            for text, style in word:
                write(axes, position, y + number * LINE, text, style)
                position += text_width(text, style)
            position += BLANK


# ---- flow.png ----------------------------------------------------------------

COLUMNS = 3
GAP = 30  # between cards, for the arrows
PADDING = 13
CARD_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
TEXT_WIDTH = CARD_WIDTH - 2 * PADDING
TITLE_LINE = 24  # from the upper edge of a card to the baseline of its title
TITLE_ROOM = 46  # from the upper edge of a card to its first line
FOOT_ROOM = 26  # around the line between the text and the results

STOP = re.compile(r"^    (\w+) {2,}(\S.*(?:\n {9,}\S.*)*)", re.MULTILINE)
HEADING = re.compile(r"^# (?:-{4} |={9,}\n# )(.+?)(?: -+)?$", re.MULTILINE)
DTYPE = r"(?:bool|u?int\d+|float\d+)"
SHAPE = re.compile(rf"(?:(\w+) )?(\([A-Z…](?:,[^()]*)?\)(?: {DTYPE})?)")


class Stop(NamedTuple):
    """A stop of the story."""

    word: str
    text: str  # what happens there, with names in backticks
    section: str  # of the script, in which its first function is
    gives: list[tuple[str, str]]  # functions, and what they give


def find_named(name: str, stop: str, module: ModuleType) -> Callable:
    """The function or class that a story names; InputError if there is none."""
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        found = None
    if not callable(found):
        where = f"{Path(module.__file__).name}: the story at the top"
        raise InputError(f"{where} names {name} at the stop {stop}, and there is no such function")
    return found


def first_sentence(function: Callable) -> str:
    paragraph = (inspect.getdoc(function) or "").split("\n\n")[0]
    return " ".join(paragraph.replace("`", "").split())


def result_of(function: Callable, module: ModuleType) -> str:
    """What a function gives, as far as it says so: shapes, a type of this script, or a dtype."""
    sentence = first_sentence(function)
    signature = inspect.signature(function)
    shapes = []
    for match in SHAPE.finditer(sentence):
        name, shape = match.groups(default="")
        clause = re.split(r"[,:;]", sentence[: match.start()])[-1]
        if name not in signature.parameters and not re.search(r"\bof\b", clause):
            shapes.append(f"{name.lower()} {shape}".strip())
    if shapes:
        return ", ".join(shapes)
    for name in re.findall(r"\w+", str(signature.return_annotation)):
        here = getattr(getattr(module, name, None), "__module__", "") == module.__name__
        if here or name == "bytes":
            return name
    dtype = re.search(rf"\b{DTYPE}\b", sentence)
    return dtype[0] if dtype else ""


def section_of(function: Callable, module: ModuleType) -> str:
    """The heading above a function in the script."""
    lines = inspect.getsource(module).splitlines(keepends=True)
    above = "".join(lines[: inspect.getsourcelines(function)[1]])
    headings = HEADING.findall(above)
    return headings[-1] if headings else ""


def read_story(module: ModuleType) -> list[Stop]:
    """The stops in the module's docstring; InputError for a function that does not exist."""
    stops = []
    for word, text in STOP.findall(module.__doc__ or ""):
        text = " ".join(text.split())
        functions = {name: find_named(name, word, module) for name in re.findall(r"`(.+?)`", text)}
        results = {name: result_of(function, module) for name, function in functions.items()}
        first = next(iter(functions.values()), None)
        section = section_of(first, module) if first else ""
        gives = [(name.split(".")[-1], result) for name, result in results.items() if result]
        stops.append(Stop(word, text, section, gives))
    if not stops:
        raise InputError(f"{Path(module.__file__).name}: has no story at the top")
    return stops


def to_words(text: str, module: ModuleType) -> list[Word]:
    """Words with their styles: functions in backticks, tables of the script in capitals."""
    words = []
    for chunk in text.split():
        word = []
        for piece in re.split(r"(`.+?`|\b[A-Z_]{4,}\b)", chunk):
            if piece.startswith("`"):
                word.append((piece.strip("`"), FUNCTION))
            elif piece.isupper() and hasattr(module, piece):
                word.append((piece, TABLE))
            elif piece:
                word.append((piece, PLAIN))
        words.append(word)
    return words


def result_lines(stop: Stop) -> list[list[Word]]:
    """What each function of a stop gives."""
    lines = []
    for name, result in stop.gives:
        items = re.split(r"(?<=,) (?![^(]*\))", result)  # not within a shape
        words = [[(name, FUNCTION)], [("→", FAINT)], *([(item, FAINT)] for item in items)]
        lines += wrapped(words, TEXT_WIDTH)
    return lines


class Card(NamedTuple):
    """A stop, laid out."""

    stop: Stop
    text: list[list[Word]]
    results: list[list[Word]]

    @property
    def height(self) -> float:
        return TITLE_ROOM + LINE * (len(self.text) + len(self.results)) + FOOT_ROOM


def draw_card(axes: Axes, x: float, y: float, height: float, card: Card) -> None:
    """A box: name and section of the stop, what happens, and below a line what comes out."""
    rounded = "round,pad=0,rounding_size=7"
    box = FancyBboxPatch((x, y), CARD_WIDTH, height, boxstyle=rounded, fc=CARD, ec=EDGE, lw=0.9)
    axes.add_patch(box)
    left, right = x + PADDING, x + CARD_WIDTH - PADDING
    write(axes, left, y + TITLE_LINE, card.stop.word, TITLE)
    write(axes, right, y + TITLE_LINE, card.stop.section, FAINT, align="right")
    write_lines(axes, left, y + TITLE_ROOM, card.text)
    if card.results:
        first = y + height - PADDING - LINE * (len(card.results) - 1)
        axes.plot([left, right], [first - 18, first - 18], color=EDGE, lw=0.7)
        write_lines(axes, left, first, card.results)


def draw_arrow(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """A line through the points, with a head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=QUIET, lw=1.3, solid_joinstyle="round")
    style = dict(arrowstyle="-|>,head_width=0.22,head_length=0.4", color=QUIET, lw=1.3)
    style |= dict(shrinkA=0, shrinkB=0, joinstyle="miter")
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def legend_lines(module: ModuleType) -> list[list[Word]]:
    """What the colours and the letters mean; the letters are explained in the docstring."""
    script = Path(module.__file__).name
    lines = [
        [[("blue", FUNCTION)], [("functions of", PLAIN)], [(script, PLAIN)]],
        [[("orange", TABLE)], [("its tables: a choice is a row", PLAIN)]],
        [[("→", FAINT)], [("what a function gives", FAINT)]],
    ]
    letters = re.search(r"Letters in shapes: (.*?)\.\s", module.__doc__, re.DOTALL)
    if letters:
        lines.append([])
        text = " ".join(letters[1].split())
        for letter, meaning in re.findall(r"\b([A-Z]) ([a-z][^,;]*?)(?= and [A-Z]|[,;]|$)", text):
            lines.append([[(letter, STRONG)], [(meaning, PLAIN)]])
    return lines


def draw_flow(module: ModuleType = tm) -> Figure:
    cards = []
    for stop in read_story(module):
        text = wrapped(to_words(stop.text, module), TEXT_WIDTH)
        cards.append(Card(stop, text, result_lines(stop)))
    rows = [cards[first : first + COLUMNS] for first in range(0, len(cards) + 1, COLUMNS)]
    legend = legend_lines(module)
    legend_height = TITLE_LINE + LINE * len(legend)
    heights = [max([card.height for card in row], default=legend_height) for row in rows]
    figure, axes = new_sheet(2 * MARGIN + sum(heights) + GAP * (len(rows) - 1))
    lefts = [MARGIN + column * (CARD_WIDTH + GAP) for column in range(COLUMNS)]
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for x, card in zip(lefts, row, strict=False):
            draw_card(axes, x, y, height, card)
            title = y + TITLE_LINE - 5
            if x > lefts[0]:
                draw_arrow(axes, [(x - GAP, title), (x, title)])
            elif y > MARGIN:  # from the end of the row above
                start, end, turn = lefts[-1] + CARD_WIDTH / 2, x + CARD_WIDTH / 2, y - GAP / 2
                draw_arrow(axes, [(start, y - GAP), (start, turn), (end, turn), (end, y)])
        y += height + GAP
    write_lines(axes, lefts[len(rows[-1])] + PADDING, y - GAP - heights[-1] + TITLE_LINE, legend)
    return figure


# ---- artifact.png ------------------------------------------------------------

PALETTE = ("#66758a", "#1c2733", "#1a5c9e", "#4fa3b8", "#8cc5a2", "#7d6bb0", "#8c3b68")
PART_NAMES = ("code", "header", *(kind.name for kind in tm.KINDS))
PART_COLORS = dict(zip(PART_NAMES, itertools.cycle(PALETTE), strict=False))
BAR = 26
BAR_ROOM = 142  # from one bar to the next


class Part(NamedTuple):
    """Some bytes of a submission."""

    name: str
    bytes: int
    note: str
    weights: int = 0


class Submission(NamedTuple):
    """The code and an artifact, part by part in the order of the file."""

    name: str
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def header_bytes(hp: tm.Hyperparameters, kinds: dict[str, list]) -> int:
    """What an artifact has besides its weights: magic, length, header and checksum."""
    fields = {field: getattr(hp, field) for field in tm.STORED}
    header = dict(version=tm.FORMAT_VERSION, hyperparameters=fields, kinds=kinds)
    return len(tm.sealed(tm.ARTIFACT_MAGIC + bytes(4) + json.dumps(header).encode()))


def whole(name: str, hp: tm.Hyperparameters, kinds: dict[str, list]) -> Submission:
    """The submission of an artifact of these hyperparameters, and these kinds in its header."""
    script = Path(tm.__file__)
    parts = [
        Part("code", len(script.read_bytes()), script.name),
        Part("header", header_bytes(hp, kinds), "with checksum"),
    ]
    for kind, named in tm.by_kind(tm.outline_model(hp)).items():
        storage, packer, size = kinds[kind.name]
        weights = sum(parameter.numel() for parameter in named.values())
        parts.append(Part(kind.name, size, f"{storage}, {packer}", weights))
    return Submission(name, parts)


def predicted(preset: str) -> Submission:
    """If all weights were normal, as `predicted_bytes` has it: some rows, scaled to all."""
    hp = tm.Hyperparameters(preset)
    kinds = {}
    for kind, named in tm.by_kind(tm.outline_model(hp)).items():
        columns = max(parameter.shape[-1] for parameter in named.values())
        sample = torch.randn(256, columns, generator=tm.seeded("cpu", "predicted bytes"))
        _, facts = tm.pack_kind({"": sample}, hp.storages[kind.name], hp)
        weights = sum(parameter.numel() for parameter in named.values())
        size = math.ceil(facts["bytes"] / sample.numel() * weights)
        kinds[kind.name] = [facts["storage"], facts["packer"], size]
    return whole(f"{preset}, if all weights were normal", hp, kinds)


def of_artifact(path: Path) -> Submission:
    """Of a file; InputError if it is not sound."""
    _, hp = tm.load_artifact(path)
    data = path.read_bytes()
    start = len(tm.ARTIFACT_MAGIC) + 4
    length = int.from_bytes(data[start - 4 : start], "little")
    header = json.loads(data[start : start + length])
    return whole(path.name, hp, header["kinds"])


def draw_submission(axes: Axes, y: float, submission: Submission, scale: float) -> None:
    """A headline, and a bar that is `scale` wide for each byte."""
    limit = tm.SIZE_LIMIT_BYTES * scale
    weights = sum(part.weights for part in submission.parts)
    bits = 8 * sum(part.bytes for part in submission.parts if part.weights) / weights
    left = tm.SIZE_LIMIT_BYTES - submission.bytes
    room = f"{abs(left):,} {'below' if left >= 0 else 'above'} the limit"
    sums = f"{submission.bytes:,} bytes, {room}; {weights:,} weights of {bits:.2f} bits"
    write(axes, MARGIN, y, submission.name, STRONG)
    write(axes, MARGIN + limit - 8, y, sums, FAINT, align="right")
    axes.add_patch(Rectangle((MARGIN, y + 9), limit, BAR, fc=CARD, ec=EDGE, lw=0.9))
    position = MARGIN
    for part in submission.parts:
        size = part.bytes * scale
        axes.add_patch(Rectangle((position, y + 9), size, BAR, fc=PART_COLORS[part.name], lw=0))
        position += size


def write_part(axes: Axes, x: float, y: float, part: Part) -> None:
    """A part's colour, name and figures."""
    axes.add_patch(Rectangle((x, y - 9), 9, 9, fc=PART_COLORS[part.name], lw=0))
    x += 14
    write(axes, x, y, part.name, STRONG)
    write(axes, x, y + LINE, f"{part.bytes:,} bytes")
    write(axes, x, y + 2 * LINE, part.note, FAINT)
    if part.weights:
        bits = 8 * part.bytes / part.weights
        write(axes, x, y + 3 * LINE, f"{bits:.2f} bits a weight", FAINT)


def draw_artifact(submissions: Sequence[Submission]) -> Figure:
    figure, axes = new_sheet(MARGIN + 42 + BAR_ROOM * len(submissions))
    largest = max(tm.SIZE_LIMIT_BYTES, *(submission.bytes for submission in submissions))
    scale = (WIDTH - 2 * MARGIN) / largest
    names = {part.name for submission in submissions for part in submission.parts}
    columns = [name for name in PART_NAMES if name in names]
    column_width = (WIDTH - 2 * MARGIN) / len(columns)
    y = MARGIN + 42
    for submission in submissions:
        draw_submission(axes, y, submission, scale)
        for part in submission.parts:
            x = MARGIN + columns.index(part.name) * column_width
            write_part(axes, x, y + BAR + 30, part)
        y += BAR_ROOM
    limit = MARGIN + tm.SIZE_LIMIT_BYTES * scale
    axes.plot([limit, limit], [MARGIN + 16, y - BAR_ROOM + BAR + 16], color=ORANGE, lw=1.6)
    label = f"limit of code and artifact: {tm.SIZE_LIMIT_BYTES:,} bytes"
    write(axes, limit, MARGIN + 8, label, Style(ORANGE, weight="bold"), align="right")
    return figure


# ---- masks.png ---------------------------------------------------------------

PASSES = 4
SHOWN_WINDOWS = 12
SHOWN_TOKENS = 48
COUNTED_WINDOWS = 2000
BAR_COLOR = "#a9c8de"
TRACK = "#eef2f6"  # where nothing is masked
PASS_COLORS = ("#1a5c9e", "#4fa3b8", "#e0a33a", "#b04a12")


class Masks(NamedTuple):
    """The masks of some windows of L tokens, and what they were drawn from."""

    place: Tensor  # (B, L) int64: of each token on the random circle of its window
    masks: Tensor  # (passes, B, L) bool
    k: Tensor  # (passes, B) int64: how many tokens are masked
    probability: Tensor  # (passes, B) float64: with which that many are masked


def draw_masks(times: Tensor) -> Masks:
    """What `nelbo_masks` yields for windows with these times (B,)."""
    generator = tm.seeded("cpu", "pictures", "keys")
    keys = next(tm.random_keys((len(times), SHOWN_TOKENS), generator))
    allowed = torch.ones_like(keys, dtype=torch.bool)
    masks, weights = zip(*tm.nelbo_masks(PASSES, times, keys, allowed), strict=True)
    k = torch.stack(masks).sum(2)
    probability = 1 / (PASSES * k * torch.stack(weights))  # the weight is made from it
    return Masks(tm.ranks(keys), torch.stack(masks), k, probability)


def golden_times(count: int) -> Tensor:
    """Times (count,) as a score draws them: golden sequence, random offset."""
    offset = torch.rand((), generator=tm.seeded("cpu", "pictures", "offset"), dtype=torch.float64)
    return tm.golden_sequence(torch.arange(count), offset)


def independent_times(count: int) -> Tensor:
    generator = tm.seeded("cpu", "pictures", "times")
    return torch.rand(count, generator=generator, dtype=torch.float64)


def show_masks(axes: Axes, masks: Tensor, title: str) -> None:
    """Masks (passes, B, L) as strips: the passes of a window below each other, then a gap."""
    passes = torch.arange(1.0, PASSES + 1)
    strips = masks.transpose(0, 1) * passes[:, None]  # 0 where nothing is masked
    strips = F.pad(strips, (0, 0, 0, 1), value=math.nan).flatten(0, 1)
    axes.imshow(
        strips.numpy(),
        cmap=ListedColormap([TRACK, *PASS_COLORS]),
        extent=(0, SHOWN_TOKENS, SHOWN_WINDOWS, 0),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=PASSES,
    )
    middle = 0.5 * PASSES / (PASSES + 1)
    axes.set_xlabel(title)
    axes.set_xticks(range(0, SHOWN_TOKENS + 1, SHOWN_TOKENS // 4))
    axes.set_yticks([n + middle for n in range(SHOWN_WINDOWS)], range(1, SHOWN_WINDOWS + 1))
    axes.tick_params(axis="y", length=0)


def show_sizes(axes: Axes, masks: Masks, title: str) -> None:
    """How often masks of each size were drawn, next to how often they should be."""
    sizes = range(1, SHOWN_TOKENS + 1)
    expected = torch.zeros(SHOWN_TOKENS + 1, dtype=torch.float64)
    expected[masks.k] = masks.probability
    expected = expected[1:]
    drawn = masks.k.flatten().bincount(minlength=SHOWN_TOKENS + 1)[1:] / masks.k.numel()
    off = (drawn / expected - 1).square().mean().sqrt()
    axes.bar(sizes, (100 * drawn).tolist(), width=0.8, color=BAR_COLOR, label="drawn")
    axes.plot(sizes, (100 * expected).tolist(), "o", ms=2.4, color=ORANGE, label="exact")
    axes.set(xlabel="k, the masked tokens of a pass", xlim=(0, SHOWN_TOKENS + 1))
    axes.set_xticks([1, *range(SHOWN_TOKENS // 4, SHOWN_TOKENS + 1, SHOWN_TOKENS // 4)])
    axes.set_title(f"{title}: {100 * off:.1f} % off (root mean square)", loc="left")


def draw_nelbo_masks() -> Figure:
    figure = Figure(figsize=(WIDTH / 100, 7.4), layout="constrained")
    (circle, text), (golden, independent) = figure.subplots(2, 2, height_ratios=(3, 2))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    shown = draw_masks(golden_times(SHOWN_WINDOWS))
    order = shown.place.argsort(1).expand_as(shown.masks)
    show_masks(circle, shown.masks.gather(2, order), "place on the random circle")
    show_masks(text, shown.masks, "place in the text")
    circle.set_title("Each pass masks the next arc of a random circle …", loc="left")
    text.set_title("… and so random tokens of the text", loc="left")
    circle.set_ylabel("window")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in PASS_COLORS]
    labels = [f"pass {number + 1}" for number in range(PASSES)]
    place = dict(loc="lower left", bbox_to_anchor=(0, 1.08), borderaxespad=0, borderpad=0)
    circle.legend(handles, labels, ncols=PASSES, handlelength=1, handleheight=1, **place)
    show_sizes(golden, draw_masks(golden_times(COUNTED_WINDOWS)), "Times by the golden sequence")
    show_sizes(independent, draw_masks(independent_times(COUNTED_WINDOWS)), "Independent times")
    golden.set_ylabel(f"% of the masks of {COUNTED_WINDOWS:,} windows")
    golden.legend()
    golden.sharey(independent)
    return figure


# ---- unmasking.png -----------------------------------------------------------

STAGES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the model calls
MONOSPACED = "DejaVu Sans Mono"
SETTLED, FIXED = (Style(color, 8.0, MONOSPACED) for color in (INK, BLUE))
NEW = Style(ORANGE, 8.0, MONOSPACED, "bold")
MASKED = Style(EDGE, 8.0, MONOSPACED)
LETTER = text_width("a" * 100, SETTLED) / 100
LETTERS = int((WIDTH - 2 * MARGIN) / LETTER)  # of a line
STAGE_ROOM = 30  # between two stages


def written_after(sample: Sample, calls: int) -> dict[int, int]:
    """The call that wrote it, by position, of what stands in the text after so many."""
    written: dict[int, int] = {}
    for number, step in enumerate(sample.steps[:calls]):
        for position, piece in step:
            written[position] = number
            if piece is None:  # masked again
                del written[position]
    return written


def text_at(sample: Sample, calls: int, before: int) -> list[tuple[str, Style]]:
    """The text after so many calls, in pieces; those since call number `before` are new."""
    written = written_after(sample, calls)
    pieces = []
    for position, (piece, fixed) in enumerate(zip(sample.pieces, sample.fixed, strict=True)):
        piece = piece.replace("\n", "↵")
        shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in piece)
        if fixed:
            pieces.append((shown, FIXED))
        elif position in written:
            pieces.append((shown, NEW if written[position] >= before else SETTLED))
        else:
            pieces.append(("░" * len(shown), MASKED))
    return pieces


def in_lines(pieces: list[tuple[str, Style]]) -> list[list[tuple[str, Style]]]:
    """Runs of letters of one style, as many in a line as there is room for."""
    letters = [(letter, style) for text, style in pieces for letter in text]
    lines = [letters[i : i + LETTERS] for i in range(0, len(letters), LETTERS)]
    return [
        [
            ("".join(letter for letter, _ in run), style)
            for style, run in itertools.groupby(line, key=lambda pair: pair[1])
        ]
        for line in lines
    ]


def draw_unmasking(path: Path) -> Figure:
    """Of the first text of a file; InputError unless tools/sample.py wrote it."""
    samples = report.read_samples(path, None)
    sample = samples.samples[0]
    counts = [math.ceil(share * len(sample.steps)) for share in STAGES]
    stages = []
    for calls, before in zip(counts, [0, *counts], strict=False):
        stages.append((calls, in_lines(text_at(sample, calls, before))))
    height = MARGIN + sum(STAGE_ROOM + len(lines) * LINE for _, lines in stages)
    figure, axes = new_sheet(height)
    y = MARGIN
    for calls, lines in stages:
        left = len(sample.pieces) - len(written_after(sample, calls)) - sum(sample.fixed)
        title = f"after {calls} of {len(sample.steps)} calls, {left} tokens masked"
        write(axes, MARGIN, y, title, STRONG)
        for number, line in enumerate(lines):
            x = MARGIN
            for text, style in line:
                write(axes, x, y + (number + 1) * LINE, text.replace("$", r"\$"), style)
                x += len(text) * LETTER
        y += STAGE_ROOM + len(lines) * LINE
    return figure


# ---- Main --------------------------------------------------------------------

PRESETS = ("mdlm", "mdlm16", "golf")  # of artifact.png
LOOK = {
    "font.family": PLAIN.family,
    "font.size": PLAIN.size,
    "axes.titlesize": PLAIN.size,
    "axes.titleweight": "bold",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG that depends on the picture only, and says where it is."""
    tm.write_file(path, common.picture_bytes(figure))
    print(path)


def draw_all(out: Path, artifact: Path | None) -> None:
    for name in ("flow.png", "artifact.png", "masks.png"):
        common.check_picture(out / name)
    with matplotlib.style.context(["default", LOOK]):
        flow = draw_flow()
        bars = [of_artifact(artifact)] if artifact else [predicted(preset) for preset in PRESETS]
        save(flow, out / "flow.png")
        save(draw_artifact(bars), out / "artifact.png")
        save(draw_nelbo_masks(), out / "masks.png")


@common.run_tool
def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="a folder")
    parser.add_argument("--artifact", type=Path, help="a .mdlm whose bytes to draw")
    samples_help = "draw only the first text of this file"
    parser.add_argument("--samples", type=Path, metavar="FILE", help=samples_help)
    arguments = parser.parse_args()
    if not arguments.samples:
        draw_all(arguments.out, arguments.artifact)
        return
    common.check_picture(arguments.out / "unmasking.png")
    with matplotlib.style.context(["default", LOOK]):
        save(draw_unmasking(arguments.samples), arguments.out / "unmasking.png")


if __name__ == "__main__":
    main()
