"""A chart as inline SVG: scales, ticks, marks, pictures of numbers.

Text stays text, and colours are CSS variables of report.css, so that one figure is readable on
light and dark pages and on paper. Nothing has an id, so that any number of figures fit one page.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedkn.text import printable

__all__ = ["COLOURS", "Canvas", "Scale", "text_width"]

COLOURS = 8
"""Number of ``--series-N`` colours in report.css."""

# Corners of the marks around their middle, in units of their size; None is a circle.
_MARKS: tuple[tuple[tuple[float, float], ...] | None, ...] = (
    None,
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((-1.1, -0.9), (1.1, -0.9), (0, 1.2)),
    ((-1.1, 0.9), (1.1, 0.9), (0, -1.2)),
    ((-0.9, -1.1), (-0.9, 1.1), (1.2, 0)),
    ((0.9, -1.1), (0.9, 1.1), (-1.2, 0)),
    ((-1.2, -0.45), (1.2, -0.45), (1.2, 0.45), (-1.2, 0.45)),
    ((-0.45, -1.2), (0.45, -1.2), (0.45, 1.2), (-0.45, 1.2)),
    ((0, -1.2), (1.15, -0.35), (0.7, 1), (-0.7, 1), (-1.15, -0.35)),
    ((-0.6, -1.05), (0.6, -1.05), (1.2, 0), (0.6, 1.05), (-0.6, 1.05), (-1.2, 0)),
    ((-1.2, -1.2), (0, -0.5), (1.2, -1.2), (0.5, 0), (1.2, 1.2), (0, 0.5), (-1.2, 1.2), (-0.5, 0)),
)
_DASHES = ("", "6 3", "1.5 2.5")
# Of a letter's height, which no browser is asked for: a bit more than most letters take.
_LETTER = 0.58
_FONT = 11.0
# Half a mark.
_EDGE = 5.0
# A blue that can be seen on white and on black, with ink of either page on it.
_IMAGE_RGB = (51, 135, 204)
_MOST_ALPHA = 0.78
# What stands for zero on an axis that has none.
_LEAST = 1e-300


def text_width(text: str) -> float:
    """Return about how wide `text` is in a figure, in its units; wide letters count twice."""
    return _FONT * _LETTER * sum(2 if ord(letter) > 0x2E7F else 1 for letter in text)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` laid on positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of `value`, beyond the ends of one that is beyond the limits."""
        low, high, value = (self._linear(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6, whole: bool = False) -> list[float]:
        """Return round values within the scale, no more than about `most`; `whole` numbers only."""
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / most))
            decades = [10.0**n for n in range(first, last + 1, every)]
            if len(decades) > 1:
                return decades
        step = _step((self.high - self.low) / max(1, most - 1), whole)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _linear(self, value: float) -> float:
        return math.log10(max(value, _LEAST)) if self.log else value


@dataclass
class Canvas:
    """A figure under way: `width` x `height` units, of which a letter is 11 high."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def svg(self, label: str) -> str:
        """Return the figure as an element; `label` is what screen readers say, "" of decoration."""
        role = f'role="img" aria-label="{_escaped(label)}"' if label else 'aria-hidden="true"'
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        if not label:
            size += f' width="{_n(self.width)}" height="{_n(self.height)}"'
        kind = "figure" if label else "swatch"
        return f'<svg class="{kind}" {size} {role}>{"".join(self.parts)}</svg>'

    def add(self, element: str) -> None:
        """Add an element as it is."""
        self.parts.append(element)

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", *, within: float = math.inf
    ) -> None:
        """Write `text` with its baseline at `y`, squeezed where it would be wider than `within`."""
        place = f'x="{_n(x)}" y="{_n(y)}"'
        if anchor != "start":
            place += f' text-anchor="{anchor}"'
        if text_width(text) > within:
            place += f' textLength="{_n(within)}" lengthAdjust="spacingAndGlyphs"'
        self.add(f"<text {place}>{_escaped(text)}</text>")

    def slanted(self, x: float, y: float, text: str) -> None:
        """Write `text` downwards to the right of a place: names below narrow columns."""
        place = f"translate({_n(x)} {_n(y)}) rotate(40)"
        self.add(f'<text transform="{place}">{_escaped(text)}</text>')

    def path(self, kind: str, d: str) -> None:
        """Draw a path of class `kind`."""
        self.add(f'<path class="{kind}" d="{d}"/>')

    def rule(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> None:
        """Draw a straight line of class `kind`."""
        self.path(kind, f"M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}")

    @contextmanager
    def clipped(self, x: Scale, y: Scale) -> Iterator[None]:
        """Show of what is drawn meanwhile no more than lies within the scales, or just beyond."""
        left, right = sorted((x.start, x.end))
        top, bottom = sorted((y.start, y.end))
        box = [left - _EDGE, top - _EDGE, right - left + 2 * _EDGE, bottom - top + 2 * _EDGE]
        places = zip(("x", "y", "width", "height"), map(_n, box), strict=True)
        attributes = " ".join(f'{name}="{value}"' for name, value in places)
        self.add(f'<svg {attributes} viewBox="{" ".join(map(_n, box))}">')
        yield
        self.add("</svg>")

    def line(self, points: Iterable[tuple[float, float]], style: int) -> None:
        """Draw a line through `points`; one with a coordinate that is no number breaks it."""
        path, pen = [], "M"
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                path.append(f"{pen}{_n(x)} {_n(y)}")
                pen = "L"
            else:
                pen = "M"
        dash = _DASHES[style // COLOURS % len(_DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        if path:
            self.add(f'<path class="line k{style % COLOURS}"{dashes} d="{"".join(path)}"/>')

    def band(
        self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], style: int
    ) -> None:
        """Fill the area between two lines."""
        around = "L".join(f"{_n(x)} {_n(y)}" for x, y in [*high, *reversed(low)])
        self.path(f"band k{style % COLOURS}", f"M{around}Z")

    def mark(
        self,
        x: float,
        y: float,
        style: int,
        *,
        size: float = 3.2,
        kind: str = "mark",
        title: str = "",
    ) -> None:
        """Draw the mark of a series; `title` is told where the pointer rests on it."""
        corners = _MARKS[style % len(_MARKS)]
        if corners is None:
            tag, shape = "circle", f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(size)}"'
        else:
            path = "L".join(f"{_n(x + size * dx)} {_n(y + size * dy)}" for dx, dy in corners)
            tag, shape = "path", f'd="M{path}Z"'
        told = f"><title>{_escaped(title)}</title></{tag}>" if title else "/>"
        self.add(f'<{tag} class="{kind} k{style % COLOURS}" {shape}{told}')

    def image(
        self, shares: NDArray[np.float64], x: float, y: float, width: float, height: float
    ) -> None:
        """Draw a picture of numbers (0 to 1), a rectangle for each: the larger, the stronger."""
        pixels = np.zeros((*shares.shape, 4), dtype=np.uint8)
        pixels[..., :3] = _IMAGE_RGB
        pixels[..., 3] = np.round(255 * _MOST_ALPHA * np.clip(np.nan_to_num(shares), 0, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.add(
            f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        )


def _escaped(text: str) -> str:
    """Return `text` of outside as markup can hold it, quoted or not."""
    return html.escape(printable(text, 1000))


def _step(least: float, whole: bool) -> float:
    """The smallest of 1, 2, 5, 10, … (or 0.1, 0.2, …) that is not below `least`."""
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
    return max(1.0, step) if whole else step


def _n(value: float) -> str:
    """A coordinate: a tenth of a unit is finer than any screen."""
    return f"{value:.1f}".removesuffix(".0")
