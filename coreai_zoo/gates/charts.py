"""The figures of a report, as SVG that takes its colours from the page: one chart draws marks and lines on log axes.

A chart on a page is as wide as the page: places along the horizontal axis are shares of the width, everything else is
in pixels. So a phone sees a narrower chart, and text of the same size.
"""

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
class _Frame:
    """Where a chart is drawn.

    Attributes:
        x: the horizontal axis; its places are percent of the width, or SVG units.
        y: the vertical axis; its places are SVG units, on a page pixels.
        fluid: whether places along `x` are percent.
    """

    x: Scale
    y: Scale
    fluid: bool

    def across(self, value: float) -> str:
        """The place of a value along the horizontal axis, as an attribute."""
        return self.at(self.x(value))

    def at(self, place: float) -> str:
        """A place along the horizontal axis as an attribute."""
        return f"{place:.2f}%" if self.fluid else f"{place:.1f}"

    def point(self, x: float, y: float) -> str:
        """A corner of a line or an area, which know no percent; see `Chart._shapes`."""
        return f"{self.x(x):.{2 if self.fluid else 1}f},{self.y(y):.1f}"


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
    """One chart.

    Attributes:
        label: what it shows, in a line.
        x: the two ends of the horizontal axis, and whether it is logarithmic.
        y: the two ends of the vertical axis, which is logarithmic.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        areas: polygons behind everything: points and CSS class.
        told: what can be seen in it, for a reader who cannot see it.
        width: of a file, in SVG units; a page decides by itself.
        height: in SVG units, on a page pixels.
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
    told: str = ""
    width: int = 860
    height: int = 280

    def svg(self) -> str:
        """The chart as an inline SVG element, which the style of the page makes as wide as its axis: see `STYLE`."""
        frame = _Frame(Scale(self.x[0], self.x[1], 0, 100, self.x[2]), self._up(), fluid=True)
        said = f"{self.label}. {self.told}" if self.told else self.label
        return (
            f'<svg class="chart" height="{self.height}" role="img" aria-label="{escape(said)}">'
            f"{self._drawn(frame)}</svg>"
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
            f"{self._drawn(self._frame())}{''.join(texts)}\n</svg>\n"
        )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the chart is in a file, in SVG units."""
        frame = self._frame()
        return frame.x(x), frame.y(y)

    def _frame(self) -> _Frame:
        """Where it is drawn in a file."""
        return _Frame(Scale(self.x[0], self.x[1], _LEFT, self.width - _RIGHT, self.x[2]), self._up(), fluid=False)

    def _up(self) -> Scale:
        return Scale(*self.y, self.height - _BOTTOM, _TOP)

    def _drawn(self, frame: _Frame) -> str:
        parts = [self._shapes(frame, [_polygon(points, css, frame) for points, css in self.areas])]
        parts += self._axes(frame)
        parts += [_rule(rule, frame) for rule in self.rules]
        parts.append(self._shapes(frame, [_polyline(line, frame) for line in self.lines]))
        parts += [_mark(mark, frame) for mark in self.marks]
        return "".join(parts)

    def _shapes(self, frame: _Frame, shapes: Sequence[str]) -> str:
        """Lines and areas; on a page in a picture of their own, a hundred units wide, that is stretched."""
        drawn = "".join(shapes)
        if not frame.fluid or not drawn:
            return drawn
        return (
            f'<svg class="stretched" width="100%" height="{self.height}" viewBox="0 0 100 {self.height}" '
            f'preserveAspectRatio="none">{drawn}</svg>'
        )

    def _axes(self, frame: _Frame) -> list[str]:
        x, y = frame.x, frame.y
        start, end, middle = (frame.at(place) for place in (x.start, x.end, (x.start + x.end) / 2))
        parts = []
        for value in y.ticks():
            at = y(value)
            parts.append(f'<line class="grid" x1="{start}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>')
            text = _power(value)
            parts.append(f'<text class="tick" x="{start}" dx="-7" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        for value in x.ticks():
            place = frame.across(value)
            parts.append(f'<line class="stub" x1="{place}" x2="{place}" y1="{y.start}" y2="{y.start + 4}"/>')
            text = _power(value) if x.log else f"{value:.0f}"
            parts.append(f'<text class="tick" x="{place}" y="{y.start + 17}" text-anchor="middle">{text}</text>')
        parts.append(f'<line class="axis" x1="{start}" x2="{end}" y1="{y.start}" y2="{y.start}"/>')
        parts.append(
            f'<text class="title" x="{middle}" y="{self.height - 5}" text-anchor="middle">{escape(self.x_title)}</text>'
        )
        left, height = x.start - _LEFT + 12, (y.start + y.end) / 2
        parts.append(
            f'<text class="title" transform="translate({left:g} {height}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_title)}</text>"
        )
        return parts


STYLE = f"""\
.chart {{ display: block; overflow: visible;
  width: calc(100% - {_LEFT + _RIGHT}px); margin: 0 {_RIGHT}px 0 {_LEFT}px; }}
.stretched * {{ vector-effect: non-scaling-stroke; }}"""
"""What a page has to say of its charts: labels stand beside an axis that is as wide as what is left."""


def _power(value: float) -> str:
    """A power of ten as text: 0.01, 1, 10⁻⁵."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if -3 <= exponent <= 3 else f"10{str(exponent).translate(_SUBSCRIPT)}"


def _polygon(points: Sequence[tuple[float, float]], css: str, frame: _Frame) -> str:
    return f'<polygon class="{css}" points="{" ".join(frame.point(*point) for point in points)}"/>'


def _rule(rule: Rule, frame: _Frame) -> str:
    at, start, end = frame.y(rule.y), frame.at(frame.x.start), frame.at(frame.x.end)
    line = f'<line class="{rule.css}" x1="{start}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>'
    label = f'<text class="note" x="{end}" dx="-4" y="{at - 4:.1f}" text-anchor="end">{escape(rule.label)}</text>'
    return line + (label if rule.label else "")


def _polyline(line: Line, frame: _Frame) -> str:
    pieces: list[list[str]] = [[]]
    for a, b in line.points:
        if b is None:
            pieces.append([])
        else:
            pieces[-1].append(frame.point(a, b))
    return "".join(f'<polyline class="{line.css}" points="{" ".join(piece)}"/>' for piece in pieces if piece)


_PATHS = {"cross": "M-5 -5l10 10m0 -10l-10 10", "diamond": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z"}


def _mark(mark: Mark, frame: _Frame) -> str:
    a, b = frame.across(mark.x), f"{frame.y(mark.y):.1f}"
    title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
    if mark.shape in _PATHS:
        shape = f'<path class="mark {mark.css}" d="{_PATHS[mark.shape]}">{title}</path>'
        return f'<svg x="{a}" y="{b}" overflow="visible">{shape}</svg>'
    return f'<circle cx="{a}" cy="{b}" r="3.2" class="mark {mark.css}">{title}</circle>'
