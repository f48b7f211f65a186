"""Pictures of many numbers: who holds what, which class is recognised, what it is taken for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkn.text import printable
from simulations.report.chart import Canvas, Scale, text_width
from simulations.runs.records import PartitionRecord

__all__ = ["class_picture", "confusion_picture", "partition_picture"]

_WIDTH = 440.0
# Of more classes than these, a picture has no numbers in its cells, and not every class's name.
_NUMBERED = 12
_NAMED = 24


def partition_picture(table: PartitionRecord) -> str:
    """Return client x label: the stronger, the more images; above it the images of each client."""
    counts = np.array(table.counts, dtype=float).T
    labels, clients = counts.shape
    names = _thinned([printable(name, 14) for name in table.classes], _NAMED)
    left, width = 14 + max(text_width(name) for _, name in names), 740.0
    row = max(4.0, min(16.0, 420 / labels))
    top, bars = 18.0, 46.0
    grid = top + bars + 8
    bottom = grid + row * labels
    canvas = Canvas(width, bottom + 36)
    x = Scale(0, clients, left + 6, width - 6)
    sizes = counts.sum(axis=0)
    y = Scale(0, max(1.0, float(sizes.max())), top + bars, top)
    for tick in y.ticks(3, whole=True):
        canvas.rule(x.start, y(tick), x.end, y(tick))
        canvas.text(left, y(tick) + 4, f"{tick:,g}", "end")
    canvas.text(2, 11, "examples")
    steps = "".join(f"H{x(i):.1f}V{y(size):.1f}H{x(i + 1):.1f}" for i, size in enumerate(sizes))
    canvas.path("bars", f"M{x.start:.1f} {y.start:.1f}{steps}V{y.start:.1f}Z")
    canvas.image(
        np.sqrt(counts / max(counts.max(), 1)), x.start, grid, x.end - x.start, row * labels
    )
    _names_beside(canvas, names, left, grid, row)
    for tick in Scale(0, max(1, clients - 1), 0, 1).ticks(12, whole=True):
        whose = f" {printable(table.names[int(tick)], 8)}" if table.names else ""
        canvas.text(x(tick + 0.5), bottom + 14, f"{tick:g}{whose}", "middle")
    canvas.text((x.start + x.end) / 2, bottom + 31, "client", "middle")
    return canvas.svg(f"examples by client and label, {table.partition}, seed {table.seed}")


def class_picture(
    values: NDArray[np.float64],
    normalizers: Sequence[str],
    classes: Sequence[str],
    label: str,
    *,
    shares: bool = True,
) -> str:
    """Return normalizer x class: the stronger, the higher the value; NaN is left white.

    Args:
        values: (normalizers, classes). label: read out by screen readers. shares: whether the
            values are those from 0 to 1; others are drawn from the least to the largest of them.
    """
    left, width = 14 + min(170.0, max(map(text_width, normalizers))), 740.0
    names = _thinned([printable(name, 14) for name in classes], _NAMED)
    row, top = 18.0, 4.0
    bottom = top + row * len(normalizers)
    tall = 8 + 0.75 * max(text_width(name) for _, name in names)
    canvas = Canvas(width, bottom + tall + 14)
    x = Scale(0, len(classes), left + 6, width - 24)
    canvas.image(values if shares else _spread(values), x.start, top, x.end - x.start, bottom - top)
    canvas.path("frame", f"M{x.start:.1f} {top}H{x.end:.1f}V{bottom:.1f}H{x.start:.1f}Z")
    if len(classes) <= _NUMBERED:
        _numbers(canvas, _texts(values, shares=shares), x, (top, row))
    for place, name in enumerate(normalizers):
        at = top + row * (place + 0.5) + 4
        canvas.text(left, at, name, "end", within=left - 8)
    for place, name in names:
        canvas.slanted(x(place + 0.5), bottom + 12, name)
    return canvas.svg(label)


def confusion_picture(counts: Sequence[Sequence[int]], classes: Sequence[str], label: str) -> str:
    """Return true class x predicted class: the stronger, the larger the share of the true class.

    On a square-root scale, so that of many classes the rarer confusions can be seen.

    Args:
        counts: rows are true classes. label: read out by screen readers.
    """
    table = np.array(counts, dtype=float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = _thinned([printable(name, 14) for name in classes], _NAMED)
    left = 24 + min(110.0, max(text_width(name) for _, name in names))
    side = _WIDTH - left - 24
    row, top = side / len(classes), 18.0
    tall = 8 + 0.75 * min(110.0, max(text_width(name) for _, name in names))
    canvas = Canvas(_WIDTH, top + side + tall + 20)
    x = Scale(0, len(classes), left + 6, left + 6 + side)
    canvas.image(np.sqrt(shares), x.start, top, side, side)
    canvas.path("frame", f"M{x.start:.1f} {top}H{x.end:.1f}V{top + side:.1f}H{x.start:.1f}Z")
    if len(classes) <= _NUMBERED:
        _numbers(
            canvas, _texts(np.where(shares < 0.005, np.nan, shares), shares=True), x, (top, row)
        )
    _names_beside(canvas, names, left, top, row)
    canvas.text(2, 11, "true class")
    for place, name in names:
        canvas.slanted(x(place + 0.5), top + side + 12, name)
    canvas.text(x.end, top + side + tall + 16, "predicted class", "end")
    return canvas.svg(label)


def _numbers(
    canvas: Canvas, texts: Sequence[Sequence[str]], x: Scale, rows: tuple[float, float]
) -> None:
    """Write texts into the cells of a picture; `rows`: where they begin, and their height."""
    top, row = rows
    for line, of_line in enumerate(texts):
        for place, text in enumerate(of_line):
            if text:
                canvas.text(x(place + 0.5), top + row * (line + 0.5) + 4, text, "middle")


def _texts(values: NDArray[np.float64], *, shares: bool) -> list[list[str]]:
    """Shares in per cent, other values with three digits; nothing for NaN."""
    scale, digits = (100, ".0f") if shares else (1, ".3g")
    return [["" if np.isnan(v) else f"{scale * v:{digits}}" for v in line] for line in values]


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values from 0, the least of them, to 1, the largest."""
    if np.isnan(values).all():
        return values
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low if high > low else 1.0)


def _names_beside(
    canvas: Canvas, names: Iterable[tuple[int, str]], left: float, top: float, row: float
) -> None:
    for place, name in names:
        canvas.text(left, top + row * (place + 0.5) + 4, name, "end", within=left - 8)


def _thinned(names: Sequence[str], most: int) -> list[tuple[int, str]]:
    """At most `most` of the names, evenly spread, with their places."""
    return list(enumerate(names))[:: max(1, math.ceil(len(names) / most))]
