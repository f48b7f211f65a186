"""The report's figures as inline SVG.

Text stays text. Colours are CSS variables of report.css, so that one figure is readable on light
and dark pages: matplotlib draws in marker colours, which are then replaced by the variables.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkn import normalizers
from fedkn.text import printable
from simulations.runs.records import EXAMPLES, PartitionRecord
from simulations.runs.statistics import mean_interval

__all__ = [
    "COLOURS",
    "PLAIN_TEXT",
    "Curves",
    "learning_curves",
    "partition_picture",
    "style_index",
    "swatch",
]

# Normalizer -> one curve per seed, each accuracy (0 to 1) by round.
Curves = Mapping[str, Sequence[Mapping[int, float]]]

# Number of --series-N colours in report.css.
COLOURS = 8
_MARKERS = "osD^vPX<>p*h"
_DASHES = ("-", "--", ":")
_MARKS_PER_CURVE = 6

_INK, _FAINT, _SOFT = "#a1b201", "#a1b202", "#a1b204"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--line)", _SOFT: "var(--soft)"} | {
    f"#a1b3{index:02d}": f"var(--series-{index})" for index in range(COLOURS)
}
# The client x label picture is an image, which no CSS variable reaches: a blue that can be seen on
# white and on black.
_IMAGE_RGB = (0.20, 0.53, 0.80)

# Names of classes are no mathematics: "$" in one could end the drawing.
PLAIN_TEXT: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
}
# Any: what matplotlib calls the type of a setting differs from version to version.
_STYLE: dict[Any, Any] = PLAIN_TEXT | {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def style_index(normalizer: str, others: Sequence[str] = ()) -> int:
    """Return the place of a normalizer in the styles: the same in every report.

    `others` are the normalizers of this report that the registry does not know.
    """
    known = normalizers.names()
    return [*known, *(name for name in others if name not in known), normalizer].index(normalizer)


def learning_curves(
    curves: Curves, limits: tuple[float, float], label: str, others: Sequence[str] = ()
) -> str:
    """Return one panel: mean accuracy by round and the 95% band over seeds of each normalizer.

    The band is left out where a single seed has a value. `limits` are those of the accuracy axis
    (0 to 1); `label` is read out by screen readers.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.1)
        for name, seeds in curves.items():
            _draw_curve(axes, style_index(name, others), seeds)
        axes.set_ylim(100 * limits[0], 100 * limits[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy (%)")
        return _svg(figure, label)


def swatch(normalizer: str, others: Sequence[str], place: str) -> str:
    """Return the line and marker of a normalizer for the legend called `place`."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.42, 0.18)
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **_line(style_index(normalizer, others)))
        return _svg(figure, "", salt=f"{place} {normalizer}")


_MOST_NAMED = 40


def partition_picture(table: PartitionRecord) -> str:
    """Return client x label: the darker, the more images; above it the images of each client."""
    counts = np.array(table.counts, dtype=float).T
    labels, clients = counts.shape
    height = 1.5 + min(4.5, 0.17 * labels)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        sizes, grid = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.5, height - 1.5)])
        sizes.stairs(counts.sum(axis=0), np.arange(clients + 1) - 0.5, fill=True, color=_SOFT)
        sizes.set_ylabel("images")
        sizes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        image = np.zeros((labels, clients, 4))
        image[..., :3] = _IMAGE_RGB
        image[..., 3] = np.sqrt(counts / max(counts.max(), 1))
        grid.imshow(image, aspect="auto", interpolation="none")
        shown = range(0, labels, max(1, math.ceil(labels / 20)))
        grid.set_yticks(list(shown), [printable(table.classes[i], 14) for i in shown])
        if table.names and clients <= _MOST_NAMED:
            names = [printable(name, 14) for name in table.names]
            grid.set_xticks(range(clients), names, rotation=90)
        else:
            grid.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        grid.set_xlabel("client")
        grid.set_ylabel("" if table.classes == [EXAMPLES] else "label")
        return _svg(figure, f"images by client and label, {table.partition}, seed {table.seed}")


def _draw_curve(axes: Axes, index: int, seeds: Sequence[Mapping[int, float]]) -> None:
    rounds = sorted({number for curve in seeds for number in curve})
    by_round = [
        [curve[r] for curve in seeds if math.isfinite(curve.get(r, math.nan))] for r in rounds
    ]
    intervals = [mean_interval(values) for values in by_round]
    mean = 100 * np.array([i.mean for i in intervals])
    half = 100 * np.array([i.half_width for i in intervals])
    every = max(1, math.ceil(len(rounds) / _MARKS_PER_CURVE))
    line = _line(index)
    axes.plot(rounds, mean, markevery=(index % every, every), **line)
    if np.isfinite(half).any():
        low, high = np.clip(mean - half, 0, 100), np.clip(mean + half, 0, 100)
        axes.fill_between(rounds, low, high, color=line["color"], alpha=0.16, linewidth=0)


def _line(index: int) -> dict[str, Any]:
    return {
        "color": f"#a1b3{index % COLOURS:02d}",
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index // COLOURS % len(_DASHES)],
        "linewidth": 1.6,
        "markersize": 4.5,
    }


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _svg(figure: Figure, label: str, salt: str = "") -> str:
    """The figure as an SVG element, the same bytes for the same figure.

    `salt` keeps its ids apart from those of other figures; by default `label` does. Without a
    label the figure is decoration.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The name of a run may be bytes that are no UTF-8.
    encodable = (salt or label).encode("utf-8", "backslashreplace").decode()
    with mpl.rc_context({"svg.hashsalt": encodable}), warnings.catch_warnings():
        # It is the browser that draws the text, in its own fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its rule for every element would reach the whole page; report.css has it for figures.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Several figures share one page: the ids that nothing refers to would be there twice.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    spoken = html.escape(printable(label))
    role = f'role="img" aria-label="{spoken}"' if label else 'aria-hidden="true"'
    return svg.replace("<svg ", f'<svg class="{"figure" if label else "swatch"}" {role} ', 1)
