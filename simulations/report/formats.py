"""How the report and the terminal write numbers: one spelling for each kind."""

from __future__ import annotations

import math

from fedkn.tasks.metric import Metric
from simulations.runs.statistics import Comparison, Interval, RoundsToTarget

__all__ = [
    "KEEPS",
    "KEEPS_TENSORS",
    "NOTHING",
    "count",
    "difference",
    "difference_unit",
    "difference_with_unit",
    "epsilon",
    "half_width",
    "interval",
    "milliseconds",
    "p_value",
    "rounds",
    "scaled",
    "size",
    "target",
    "value",
]

NOTHING = "–"
KEEPS = "†"
"""Stands beside a normalizer that keeps tensors on the clients."""
KEEPS_TENSORS = (
    "keeps tensors on the clients: the global model is evaluated with these as initialised, which "
    "is not what the clients get."
)


def value(number: float, metric: Metric) -> str:
    """Return a value of `metric` with its unit: "94.9%", "0.123", "1,240 g"."""
    if math.isnan(number):
        return NOTHING
    return f"{_plain(scaled(number, metric), metric)}{_unit(metric)}"


def difference(number: float, metric: Metric) -> str:
    """Return a difference of two values of `metric`, without the unit; of shares in points.

    An infinite one, which the range of values does not allow, is none.
    """
    if math.isinf(number):
        return "none"
    return NOTHING if math.isnan(number) else _plain(scaled(number, metric), metric)


def difference_unit(metric: Metric) -> str:
    """Return the unit of differences: "points" of shares, else the metric's own."""
    return "points" if metric.unit == "%" else metric.unit


def difference_with_unit(number: float, metric: Metric) -> str:
    """Return a difference of two values of `metric` with its unit: "1.2 points", "0.02 g"."""
    return f"{difference(number, metric)} {difference_unit(metric)}".rstrip()


def interval(of: Interval, metric: Metric) -> str:
    """Return "94.9% ± 1.6", or "98.9% (96.1 to 100.0)" where ± would leave the possible range.

    Without the interval where there is a single seed.
    """
    if math.isnan(of.half_width):
        return value(of.mean, metric)
    return f"{value(of.mean, metric)} {half_width(of, metric)}"


def half_width(of: Interval | Comparison, metric: Metric) -> str:
    """Return what stands behind a mean or difference: "± 1.6" or "(96.1 to 100.0)"."""
    if of.cut:
        return f"({difference(of.low, metric)} to {difference(of.high, metric)})"
    return f"± {difference(of.half_width, metric)}"


def scaled(number: float, metric: Metric) -> float:
    """Return a value as tables and axes show it: a hundred times as large where it is a share."""
    return 100 * number if metric.unit == "%" else number


def target(number: float, metric: Metric) -> str:
    """Return a value that was asked for, with as many digits as it was given."""
    return f"{scaled(number, metric):g}{_unit(metric)}"


def rounds(summary: RoundsToTarget) -> str:
    """Return the median rounds to target, "not reached", and how many reached it where not all."""
    if summary.total == 0:
        return NOTHING
    text = f"{summary.median:g}" if math.isfinite(summary.median) else "not reached"
    if summary.reached == summary.total:
        return text
    return f"{text} ({summary.reached}/{summary.total})"


def milliseconds(value: float) -> str:
    """Return milliseconds with two or three significant digits, without the unit."""
    if math.isnan(value):
        return NOTHING
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def size(value: float) -> str:
    """Return a number of bytes as "1.24 MB" (decimal units)."""
    if math.isnan(value):
        return NOTHING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def p_value(value: float) -> str:
    """Return a p-value with two significant digits, "< 0.0001" below that."""
    if math.isnan(value):
        return NOTHING
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.0995 else f"{value:.2f}"


def count(number: int, noun: str) -> str:
    """Return "1 cell", "2 cells", "1,000 cells"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def epsilon(value: float) -> str:
    """Return an epsilon of differential privacy with three significant digits."""
    return "unbounded" if math.isinf(value) else f"{value:.3g}"


def _plain(number: float, metric: Metric) -> str:
    if metric.unit == "%":
        return f"{number:.1f}"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e6 else f"{number:.3g}"


def _unit(metric: Metric) -> str:
    return metric.unit if metric.unit in ("%", "") else f" {metric.unit}"
