"""Charts as SVG, to stand in a page: its style sheet has their colours and fonts.

A chart is drawn twice, for wide screens and for phones, so that its text has the same size in both;
the style sheet shows one of them. Lengths are in pixels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDE, NARROW = 720, 340
LETTER = 7.7  # width of a letter of a label, on average
LINE = 15  # from one label to the next
HEIGHT = 300
LEFT, TOP, BOTTOM = 44, 30, 40  # margins of a plot
COLORS = 6  # series colours in the style sheet: s0, s1, …


class Point(NamedTuple):
    x: float
    y: float
    error: float = 0.0  # standard error of y; 0 or NaN: none is drawn


class Series(NamedTuple):
    """A line, and perhaps a point that does not lie on it."""

    label: str
    points: list[Point]
    final: Point | None = None
    short: str = ""  # label for phones

    def named(self, width: int) -> str:
        return self.short if self.short and width == NARROW else self.label


def error_of(point: Point) -> float:
    """0 if it is not known."""
    return point.error if point.error > 0 else 0.0


def reach(points: Sequence[Point]) -> list[float]:
    """The values of points and the ends of their error bars."""
    return [point.y + sign * error_of(point) for point in points for sign in (-1, 0, 1)]


class Axis(NamedTuple):
    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]  # places and labels


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high, evenly spaced."""
    span = max(high - low, 1e-9)
    magnitude = 10 ** math.floor(math.log10(span / most))
    step = next(
        factor * magnitude
        for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)
        if math.floor(high / (factor * magnitude) + 1e-9)
        - math.ceil(low / (factor * magnitude) - 1e-9)
        < most
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number_axis(title: str, values: Sequence[float], most: int, low: float | None = None) -> Axis:
    """An axis that has room for all values; from `low`, if that is given."""
    least, largest = min(values), max(values)
    margin = 0.06 * (largest - least) or 0.5
    begin = least - margin if low is None else low
    end = largest + margin if low is None else largest
    ticks = nice_ticks(begin, end, most)
    decimals = max(len(f"{tick:.6g}".partition(".")[2]) for tick in ticks)
    labels = [f"{tick:,.{decimals}f}" for tick in ticks]
    return Axis(title, begin, max(end, begin + 1e-9), list(zip(ticks, labels, strict=True)))


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved as little as needed to be `gap` apart and, if that is possible, between
    low and high; their order stays."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[number] for number in order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            lacking = gap - (moved[i + 1] - moved[i])
            if lacking > 0:
                moved[i] -= lacking / 2
                moved[i + 1] += lacking / 2
        moved = [min(max(place, low), high) for place in moved]
    for i in range(len(moved) - 1):  # what is left of it
        moved[i + 1] = max(moved[i + 1], moved[i] + gap)
    found = [0.0] * len(places)
    for number, place in zip(order, moved, strict=True):
        found[number] = place
    return found


# ---- Elements


def text(x: float, y: float, label: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    if anchor != "start":
        attributes += f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(label)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{kind}"/>'


def svg(width: float, height: float, about: str, parts: Sequence[str]) -> str:
    begin = f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{html.escape(about)}">'
    return begin + "".join(parts) + "</svg>"


def for_both(draw: Callable[[int], str]) -> str:
    """draw(width) for wide screens and for phones."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


# ---- Plots


class Plot(NamedTuple):
    """Where values are in a picture."""

    width: int
    right: float  # margin
    x: Axis
    y: Axis

    def at_x(self, value: float) -> float:
        room = self.width - LEFT - self.right
        return LEFT + room * (value - self.x.low) / (self.x.high - self.x.low)

    def at_y(self, value: float) -> float:
        room = HEIGHT - TOP - BOTTOM
        return HEIGHT - BOTTOM - room * (value - self.y.low) / (self.y.high - self.y.low)


def draw_axes(plot: Plot) -> list[str]:
    """Grid lines across, numbers, and what they are."""
    end = plot.width - plot.right
    parts = [text(0, 14, plot.y.title, "quiet")]
    for value, label in plot.y.ticks:
        parts.append(line(LEFT, plot.at_y(value), end, plot.at_y(value), "grid"))
        parts.append(text(LEFT - 8, plot.at_y(value) + 4, label, "tick", "end"))
    floor = HEIGHT - BOTTOM
    parts.append(line(LEFT, floor, end, floor, "axis"))
    free = -math.inf
    for value, label in plot.x.ticks:
        x, half = plot.at_x(value), LETTER * len(label) / 2
        parts.append(line(x, floor, x, floor + 4, "axis"))
        if x - half > free:  # there is room for this label
            parts.append(text(x, floor + 17, label, "tick", "middle"))
            free = x + half
    parts.append(text(end, HEIGHT - 4, plot.x.title, "quiet", "end"))
    return parts


def marker(x: float, y: float, number: int) -> str:
    """A dot of series `number`; its shape tells it from others without colour."""
    shapes = (
        f"M{x - 3.2:.1f} {y:.1f}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
    )
    return f'<path class="dot" d="{shapes[number % len(shapes)]}"/>'


def error_bar(plot: Plot, point: Point) -> str:
    if not error_of(point):
        return ""
    low, high = plot.at_y(point.y - point.error), plot.at_y(point.y + point.error)
    return line(plot.at_x(point.x), low, plot.at_x(point.x), high, "error")


def diamond(x: float, y: float) -> str:
    return f'<path class="final" d="M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z"/>'


def draw_series(plot: Plot, series: Series, number: int) -> str:
    """The line, its points with their errors, and the final point as a diamond."""
    places = [(plot.at_x(point.x), plot.at_y(point.y)) for point in series.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line" d="M{path}"/>'] if len(places) > 1 else []
    for point, (x, y) in zip(series.points, places, strict=True):
        parts += [error_bar(plot, point), marker(x, y, number)]
    if series.final:
        parts.append(error_bar(plot, series.final))
        parts.append(diamond(plot.at_x(series.final.x), plot.at_y(series.final.y)))
    return f'<g class="s{number % COLORS}">{"".join(parts)}</g>'


def end_labels(plot: Plot, chosen: Sequence[Series]) -> list[str]:
    """The name of every series, where it ends."""
    ends = [series.final or series.points[-1] for series in chosen]
    heights = [plot.at_y(point.y) for point in ends]
    moved = spread(heights, LINE, TOP, HEIGHT - BOTTOM)
    parts = []
    for number, (series, y) in enumerate(zip(chosen, moved, strict=True)):
        x = plot.width - plot.right + 10
        parts.append(text(x, y + 4, series.named(plot.width), f"label s{number % COLORS}"))
    return parts


def line_chart(
    about: str,
    x: Axis,
    y: Axis,
    chosen: Sequence[Series],
    level: tuple[float, str] | None = None,
    values: bool = False,
) -> str:
    """Lines with their names at their ends; `level` is a value of y with a name, drawn across, and
    `values` says whether the values are written at the points."""

    def draw(width: int) -> str:
        longest = max((len(series.named(width)) for series in chosen), default=0)
        plot = Plot(width, 14 + LETTER * longest if longest else 8, x, y)
        parts = draw_axes(plot)
        if level:
            height, label = plot.at_y(level[0]), level[1]
            end = width - plot.right
            parts.append(line(LEFT, height, end, height, "level"))
            parts.append(text(end, height + 16, label, "quiet", "end"))
        parts += [draw_series(plot, series, number) for number, series in enumerate(chosen)]
        if values and width == WIDE:
            for point in chosen[0].points:
                above = plot.at_y(point.y + error_of(point)) - 8
                parts.append(text(plot.at_x(point.x), above, f"{point.y:.2f}", "tick", "middle"))
        parts += end_labels(plot, [series for series in chosen if series.label])
        return svg(width, HEIGHT, about, parts)

    return for_both(draw)


class Bar(NamedTuple):
    """A share of something, with words at both ends of the line above it."""

    label: str
    share: float  # of the whole width; over 1: drawn as 1, in the colour of a warning
    note: str
    kind: str = "used"


BAR_ROOM = 42  # of a bar and its words
ZOOM_ROOM = 26


def draw_bar(bar: Bar, top: float, width: int) -> list[str]:
    kind = bar.kind if bar.share <= 1 else "over"
    return [
        text(0, top + 14, bar.label, "label"),
        text(width, top + 14, bar.note, "tick", "end"),
        box(0, top + 20, width, 10, "track"),
        box(0, top + 20, max(width * min(bar.share, 1), 1), 10, kind),
    ]


def bar_chart(about: str, bars: Sequence[Bar], parts: Sequence[Bar] = ()) -> str:
    """Bars below each other; `parts` are shares of what the last of the bars has filled."""

    def draw(width: int) -> str:
        drawn = []
        for number, bar in enumerate(bars):
            drawn += draw_bar(bar, BAR_ROOM * number, width)
        top = BAR_ROOM * len(bars)
        if parts:
            filled, start = width * min(bars[-1].share, 1), top - 12
            path = f"M0 {start}H{filled:.1f}L{width} {top + ZOOM_ROOM - 8}H0z"
            drawn.append(f'<path class="zoom" d="{path}"/>')
            top += ZOOM_ROOM
        for number, bar in enumerate(parts):
            drawn += draw_bar(bar, top + BAR_ROOM * number, width)
        return svg(width, top + BAR_ROOM * len(parts) - 8, about, drawn)

    return for_both(draw)


# ---- The order of unmasking

Span = tuple[int, int, int]  # position, first and last call with this state


def cells(spans: Sequence[Span], across: float, down: float, left: float, kind: str) -> str:
    """A path of one rectangle for each span; `across` and `down` are the size of a cell."""
    path = "".join(
        f"M{left + across * position:.2f} {TOP + down * first:.2f}"
        f"h{across:.2f}v{down * (last - first + 1):.2f}h-{across:.2f}z"
        for position, first, last in spans
    )
    return f'<path class="{kind}" d="{path}"/>' if path else ""


def order_map(
    about: str, length: int, calls: int, layers: Sequence[tuple[str, Sequence[Span]]]
) -> str:
    """Positions from left to right, model calls from top to bottom; each layer is a class of the
    style sheet and its spans."""
    height = min(max(3 * calls, 90), 240)

    def draw(width: int) -> str:
        across, down = (width - LEFT) / length, height / max(calls, 1)
        parts = [text(0, 14, "model call", "quiet"), box(LEFT, TOP, width - LEFT, height, "track")]
        parts += [cells(spans, across, down, LEFT, kind) for kind, spans in layers]
        cursor = f'data-call="{down:.3f}" d="M{LEFT - 4} {TOP}H{width}"'  # a script moves it
        parts.append(f'<path class="cursor" {cursor}/>')
        for call in sorted({1, calls}):
            parts.append(text(LEFT - 8, TOP + down * (call - 0.5) + 4, f"{call}", "tick", "end"))
        floor = TOP + height + 17
        parts.append(text(LEFT, floor, "1", "tick"))
        parts.append(text(width, floor, f"{length}", "tick", "end"))
        parts.append(text((LEFT + width) / 2, floor, "position", "quiet", "middle"))
        return svg(width, floor + 6, about, parts)

    return for_both(draw)
