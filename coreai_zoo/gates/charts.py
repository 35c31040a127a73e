"""The figures of a report, as SVG that takes its colours from the page: one chart draws marks and lines on log axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from attrs import frozen

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 40
_HEADING = 28  # above the chart, in a file

_SUBSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@frozen
class Scale:
    """An axis: calling it with a value gives the value's place.

    Attributes:
        low: the value at `start`.
        high: the value at `end`.
        start: a place, in SVG units.
        end: a place.
        log: whether equal factors are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        """The place of `value`, clipped to the axis."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values along the axis, at most eight."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / 6))
            return [10.0**power for power in range(first, last + 1, step)]
        step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if (self.high - self.low) / s <= 9)
        return [float(value) for value in range(math.ceil(self.low / step) * step, math.floor(self.high) + 1, step)]


def decades(values: Iterable[float | None], floor: float) -> tuple[float, float]:
    """The two ends of a log axis: whole decades around the positive values, none below `floor`."""
    positive = [max(value, floor) for value in values if value is not None and value > 0]
    low, high = (min(positive), max(positive)) if positive else (floor, 1.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


@frozen
class Line:
    """A polyline through points (x, y); y is None where the line has a gap."""

    points: Sequence[tuple[float, float | None]]
    css: str


@frozen
class Mark:
    """A point with a tooltip; `shape` is `dot`, `diamond` or `cross`."""

    x: float
    y: float
    css: str
    shape: str = "dot"
    title: str = ""


@frozen
class Rule:
    """A horizontal line across the chart, with a label."""

    y: float
    css: str
    label: str = ""


@frozen
class Chart:
    """One chart; `width` and `height` are in SVG units.

    Attributes:
        label: what it shows, for a reader who cannot see it.
        x: the two ends of the horizontal axis, and whether it is logarithmic.
        y: the two ends of the vertical axis, which is logarithmic.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        areas: polygons behind everything: points and CSS class.
    """

    label: str
    x: tuple[float, float, bool]
    y: tuple[float, float]
    x_title: str
    y_title: str
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    rules: Sequence[Rule] = ()
    areas: Sequence[tuple[Sequence[tuple[float, float]], str]] = ()
    width: int = 860
    height: int = 280

    def svg(self) -> str:
        """The chart as an inline SVG element."""
        return (
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.label)}">'
            f"{self._drawn()}</svg>"
        )

    def file(self, description: str, style: str, labels: Sequence[tuple[float, float, str]] = ()) -> str:
        """The chart as an SVG file that needs no page.

        Args:
            description: what can be seen in it, for a reader who cannot see it.
            style: CSS with the colours that a page would give.
            labels: x, y and text of what is written over it, in SVG units.
        """
        texts = (f'<text class="label" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' for x, y, text in labels)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-_HEADING} {self.width} {self.height + _HEADING}" '
            f'role="img" aria-labelledby="title description">\n<title id="title">{escape(self.label)}</title>\n'
            f'<desc id="description">{escape(description)}</desc>\n<style>\n{style}\n</style>\n'
            f'<text class="heading" x="{_LEFT}" y="-8" aria-hidden="true">{escape(self.label)}</text>\n'
            f"{self._drawn()}{''.join(texts)}\n</svg>\n"
        )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the chart is, in SVG units."""
        across, up = self._scales()
        return across(x), up(y)

    def _scales(self) -> tuple[Scale, Scale]:
        return (
            Scale(self.x[0], self.x[1], _LEFT, self.width - _RIGHT, self.x[2]),
            Scale(*self.y, self.height - _BOTTOM, _TOP),
        )

    def _drawn(self) -> str:
        x, y = self._scales()
        parts = [_polygon(points, css, x, y) for points, css in self.areas]
        parts += self._axes(x, y)
        parts += [_rule(rule, x, y) for rule in self.rules]
        parts += [_polyline(line, x, y) for line in self.lines]
        parts += [_mark(mark, x, y) for mark in self.marks]
        return "".join(parts)

    def _axes(self, x: Scale, y: Scale) -> list[str]:
        parts = []
        for value in y.ticks():
            at = y(value)
            parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
            text = _power(value)
            parts.append(f'<text class="tick" x="{x.start - 7}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        for value in x.ticks():
            at = x(value)
            parts.append(f'<line class="stub" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start}" y2="{y.start + 4}"/>')
            text = _power(value) if x.log else f"{value:.0f}"
            parts.append(f'<text class="tick" x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{text}</text>')
        parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
        middle = (x.start + x.end) / 2
        parts.append(
            f'<text class="title" x="{middle}" y="{self.height - 5}" text-anchor="middle">{escape(self.x_title)}</text>'
        )
        height = (y.start + y.end) / 2
        parts.append(
            f'<text class="title" transform="translate(12 {height}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_title)}</text>"
        )
        return parts


def _power(value: float) -> str:
    """A power of ten as text: 0.01, 1, 10⁻⁵."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if -3 <= exponent <= 3 else f"10{str(exponent).translate(_SUBSCRIPT)}"


def _polygon(points: Sequence[tuple[float, float]], css: str, x: Scale, y: Scale) -> str:
    places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return f'<polygon class="{css}" points="{places}"/>'


def _rule(rule: Rule, x: Scale, y: Scale) -> str:
    at = y(rule.y)
    line = f'<line class="{rule.css}" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
    label = f'<text class="note" x="{x.end - 4}" y="{at - 4:.1f}" text-anchor="end">{escape(rule.label)}</text>'
    return line + (label if rule.label else "")


def _polyline(line: Line, x: Scale, y: Scale) -> str:
    pieces: list[list[str]] = [[]]
    for a, b in line.points:
        if b is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x(a):.1f},{y(b):.1f}")
    return "".join(f'<polyline class="{line.css}" points="{" ".join(piece)}"/>' for piece in pieces if piece)


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    a, b = x(mark.x), y(mark.y)
    title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
    if mark.shape == "cross":
        shape = f'<path d="M{a - 5:.1f} {b - 5:.1f}l10 10m0 -10l-10 10"'
    elif mark.shape == "diamond":
        shape = f'<path d="M{a:.1f} {b - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"'
    else:
        shape = f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2"'
    return f'{shape} class="mark {mark.css}">{title}</{"circle" if mark.shape == "dot" else "path"}>'
