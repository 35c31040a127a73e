"""The picture of `zoo sensitivity`: bytes saved against KL, a mark for each part, as an SVG file that stands alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import frozen

from coreai_zoo.gates.charts import Chart, Mark, decades
from coreai_zoo.gates.sensitivity import Sensitivity

_LABELS = 12  # at most; more of them would hide the marks
_LOWEST, _HIGHEST = 1e-12, 1e3  # nats; a KL of zero and one of infinity have no place on a log axis
_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_WIDTH, _HEIGHT = 860, 460
_LETTER, _LINE = 6.4, 13.0  # about, of a label, in SVG units

_STYLE = """\
svg { --page: #ffffff; --ink: #16202c; --soft: #5a6675; --grid: #edf0f3; --axis: #9aa5b1; --part: #2563c9; \
--worst: #c4262e; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --page: #171e27; --ink: #e6ebf1; --soft: #98a5b3; --grid: #222a34; \
--axis: #66727f; --part: #6ea8ff; --worst: #ff6b70; } }
text { fill: var(--soft); font-family: system-ui, sans-serif; font-size: 11.5px; }
.label, .heading { fill: var(--ink); } .heading { font-size: 13px; }
.grid { stroke: var(--grid); } .axis, .stub { stroke: var(--axis); }
.mark { fill: var(--part); fill-opacity: .75; } .mark.worst { fill: var(--worst); }"""


def picture(rows: Sequence[Sensitivity], title: str) -> str:
    """The chart of all parts, those that come first labelled, as the text of an SVG file.

    Args:
        rows: the parts, the worst bargain first.
        title: what was measured, in a line.
    """
    unit, size = _unit(rows)
    places = [(row.part.saved_bytes / size, min(max(row.kl, _LOWEST), _HIGHEST)) for row in rows]
    saved = [x for x, _ in places]
    room = (max(0.0, *saved) - min(0.0, *saved)) * 0.04 or 1.0
    low, high = min(saved) - room if min(saved) < 0 else 0.0, max(0.0, *saved) + room
    worst = min(_LABELS, max(1, len(rows) // 2))
    chart = Chart(
        title,
        (low, high, False),
        decades([kl for _, kl in places], _LOWEST),
        f"{unit} saved",
        "mean KL divergence in nats",
        marks=[
            Mark(*place, css="worst" if rank < worst else "part", title=_told(row, unit, size))
            for rank, (row, place) in enumerate(zip(rows, places, strict=True))
        ],
        width=_WIDTH,
        height=_HEIGHT,
    )
    labels = _labels(chart, places, [str(row.part).removesuffix(".weight") for row in rows[:worst]])
    description = (
        f"{len(rows)} parts, each a mark: to the right what saves more bytes, further up what does more harm. "
        f"The worst bargains, the worst first: {'; '.join(_told(row, unit, size) for row in rows[:worst])}."
    )
    return chart.file(description, _STYLE, labels)


def _unit(rows: Sequence[Sensitivity]) -> tuple[str, int]:
    """The largest unit in which the axis has more than one tick."""
    most = max(abs(row.part.saved_bytes) for row in rows)
    return next((unit for unit in _UNITS if most >= 2 * unit[1]), _UNITS[-1])


def _told(row: Sensitivity, unit: str, size: int) -> str:
    return f"{row.part}, {row.part.saved_bytes / size:.3g} {unit} saved, KL {row.kl:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Box:
    """What a mark or a label covers, in SVG units."""

    left: float
    top: float
    width: float
    height: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


def _labels(chart: Chart, marks: Sequence[tuple[float, float]], texts: Sequence[str]) -> list[tuple[float, float, str]]:
    """Place and text of each label that finds room beside its mark, the first ones first."""
    places = [chart.place(x, y) for x, y in marks]
    taken = [_Box(x - 4, y - 4, 8, 8) for x, y in places]
    first, _ = chart.place(chart.x[0], chart.y[0])
    placed = []
    for text, (x, y) in zip(texts, places, strict=False):
        for box in _beside(x, y, len(text) * _LETTER):
            inside = first < box.left and box.left + box.width < chart.width
            if inside and not any(box.meets(each) for each in taken):
                taken.append(box)
                placed.append((box.left, box.top + _LINE - 3, text))
                break
    return placed


def _beside(x: float, y: float, width: float) -> Iterator[_Box]:
    """To the right of a mark, to its left, above and below, and there to its right and left."""
    for top in (y - _LINE / 2, y - _LINE - 5, y + 5):
        if top == y - _LINE / 2:
            yield from (_Box(left, top, width, _LINE) for left in (x + 7, x - 7 - width))
        else:
            yield from (_Box(left, top, width, _LINE) for left in (x - width / 2, x, x - width))
