"""The report's figures: what is drawn, of which numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkn import normalizers
from fedkn.tasks.metric import Metric
from simulations.report import formats
from simulations.report.chart import COLOURS, Canvas, Scale, text_width
from simulations.runs.statistics import Interval, mean_interval

__all__ = [
    "FEW",
    "Curve",
    "Finals",
    "Lines",
    "curve_of",
    "final_limits",
    "final_values",
    "learning_curves",
    "style_index",
    "swatch",
]

FEW = 8
"""Of more normalizers than these, panels of curves show no intervals and seeds, which would hide
one another."""

_WIDTH = 440.0
_MARKS_PER_CURVE = 6
# Values that differ more than this many times are drawn by their logarithms, shares never.
_LOG_FROM = 100


@dataclass(frozen=True)
class Curve:
    """One normalizer over the rounds: by round the mean over seeds, its interval and every seed.

    `low` and `high` are the ends of the 95% interval of the mean, within the possible values; NaN
    where a single seed has a value.
    """

    rounds: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: list[list[float]]


@dataclass(frozen=True)
class Lines:
    """The curves of one panel, by normalizer; `metric` says what values are possible."""

    curves: Mapping[str, Curve]
    metric: Metric

    @classmethod
    def of(cls, seeds: Mapping[str, Sequence[Mapping[int, float]]], metric: Metric) -> Lines:
        """Return the panel of one curve by round for each seed of each normalizer."""
        return cls({name: curve_of(curves, metric) for name, curves in seeds.items()}, metric)


@dataclass(frozen=True)
class Finals:
    """A normalizer's values after the last round, by seed, and their interval."""

    name: str
    label: str
    by_seed: Mapping[int, float]
    interval: Interval


def curve_of(seeds: Sequence[Mapping[int, float]], metric: Metric) -> Curve:
    """Return what is drawn of one curve by round for each seed; NaN and infinity are no value."""
    rounds = sorted({number for curve in seeds for number in curve})
    values = [[c[r] for c in seeds if math.isfinite(c.get(r, math.nan))] for r in rounds]
    intervals = [mean_interval(of, metric.lowest, metric.highest) for of in values]
    return Curve(
        rounds,
        [interval.mean for interval in intervals],
        [interval.low for interval in intervals],
        [interval.high for interval in intervals],
        values,
    )


def style_index(normalizer: str, others: Sequence[str] = ()) -> int:
    """Return the place of a normalizer in the styles: the same in every report.

    `others` are the normalizers of this report that the registry does not know.
    """
    known = normalizers.names()
    return [*known, *(name for name in others if name not in known), normalizer].index(normalizer)


def learning_curves(
    lines: Lines, limits: tuple[float, float], label: str, others: Sequence[str] = ()
) -> str:
    """Return one panel: by round the mean, its 95% interval and the seeds of each normalizer.

    Interval and seeds are left out where there are more than `FEW` normalizers. `limits` are those
    of the axis of values; `label` is read out by screen readers.
    """
    metric, curves = lines.metric, lines.curves
    canvas = Canvas(_WIDTH, 290)
    rounds = [number for curve in curves.values() for number in curve.rounds] or [0]
    scales = _panel(canvas, rounds, limits, metric)
    with canvas.clipped(scales.x, scales.y):
        for name, curve in curves.items() if len(curves) <= FEW else ():
            _draw_uncertainty(canvas, curve, scales, style_index(name, others))
        for name, curve in curves.items():
            _draw_mean(canvas, name, curve, scales, style_index(name, others))
    return canvas.svg(f"{label}: {_last_values(curves, metric)}")


def final_limits(finals: Sequence[Finals], metric: Metric) -> tuple[float, float]:
    """Return the limits for panels that show all of `finals`: every seed and every interval."""
    values = [value for of in finals for value in of.by_seed.values()]
    values += [end for of in finals for end in (of.interval.low, of.interval.high)]
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = max(0.04 * (high - low), 0.004 * max(abs(low), abs(high)), 1e-9)
    return max(metric.lowest, low - margin), min(metric.highest, high + margin)


def final_values(
    finals: Sequence[Finals],
    limits: tuple[float, float],
    metric: Metric,
    label: str,
    others: Sequence[str] = (),
) -> str:
    """Return one panel: a row for each normalizer with every seed, the mean and its interval."""
    row, top = 22.0, 4.0
    bottom = top + row * max(1, len(finals))
    height = bottom + 36
    canvas = Canvas(_WIDTH, height)
    left = 12 + min(170.0, max((text_width(f.label) for f in finals), default=40))
    shown = tuple(formats.scaled(limit, metric) for limit in limits)
    x = Scale(shown[0], shown[1], left + 8, _WIDTH - 12)
    for tick in x.ticks(5):
        canvas.rule(x(tick), top, x(tick), bottom)
        canvas.text(x(tick), bottom + 14, f"{tick:,g}", "middle")
    canvas.text((x.start + x.end) / 2, height - 4, _named(metric), "middle")
    for place, of in enumerate(finals):
        middle = top + row * (place + 0.5)
        style = style_index(of.name, others)
        canvas.text(left, middle + 4, of.label, "end", within=left - 8)
        low, high = (formats.scaled(end, metric) for end in (of.interval.low, of.interval.high))
        if math.isfinite(low):
            canvas.rule(x(low), middle, x(high), middle, f"interval k{style % COLOURS}")
            for end in (low, high):
                canvas.rule(x(end), middle - 4, x(end), middle + 4, f"interval k{style % COLOURS}")
        for seed, value in sorted(of.by_seed.items()):
            at = x(formats.scaled(value, metric))
            told = f"{of.label}, seed {seed}: {formats.value(value, metric)}"
            canvas.mark(at, middle + 6, style, size=2.3, kind="seed", title=told)
        if of.interval.n:
            told = f"{of.label}: {formats.interval(of.interval, metric)}"
            canvas.mark(
                x(formats.scaled(of.interval.mean, metric)), middle, style, size=4, title=told
            )
    said = "; ".join(f"{of.label} {formats.interval(of.interval, metric)}" for of in finals)
    return canvas.svg(f"{label}: {said}")


def swatch(normalizer: str, others: Sequence[str]) -> str:
    """Return the line and mark of a normalizer for a legend."""
    canvas = Canvas(34, 14)
    style = style_index(normalizer, others)
    canvas.line([(0, 7), (34, 7)], style)
    canvas.mark(17, 7, style, size=4)
    return canvas.svg("")


def _draw_uncertainty(canvas: Canvas, curve: Curve, scales: _Scales, style: int) -> None:
    """The band of a curve's intervals, and its seeds where it is marked."""
    places = [i for i, low in enumerate(curve.low) if math.isfinite(low)]
    if len(places) > 1:
        low, high = (
            [scales.at(curve.rounds[i], ends[i]) for i in places]
            for ends in (curve.low, curve.high)
        )
        canvas.band(low, high, style)
    for place in _marked(curve, style):
        if len(curve.seeds[place]) > 1:
            for value in curve.seeds[place]:
                x, y = scales.at(curve.rounds[place], value)
                canvas.mark(x, y, style, size=1.7, kind="seed")


def _draw_mean(canvas: Canvas, name: str, curve: Curve, scales: _Scales, style: int) -> None:
    points = [scales.at(*point) for point in zip(curve.rounds, curve.mean, strict=True)]
    canvas.line(points, style)
    for place in _marked(curve, style):
        mean = curve.mean[place]
        if math.isfinite(mean):
            told = f"{name}, round {curve.rounds[place]}: {formats.value(mean, scales.metric)}"
            canvas.mark(*points[place], style, title=told)


def _marked(curve: Curve, style: int) -> range:
    """The places of a curve that have a mark: by style, so that marks do not collide."""
    every = max(1, math.ceil(len(curve.rounds) / _MARKS_PER_CURVE))
    last = len(curve.rounds) - 1
    return range((last - style) % every, last + 1, every)


def _last_values(curves: Mapping[str, Curve], metric: Metric) -> str:
    return "; ".join(
        f"{name} {formats.value(curve.mean[-1], metric)} in round {curve.rounds[-1]}"
        for name, curve in curves.items()
        if curve.rounds
    )


@dataclass(frozen=True)
class _Scales:
    """Where round and value of a panel lie; the vertical scale is in numbers as they are shown."""

    x: Scale
    y: Scale
    metric: Metric

    def at(self, number: int, value: float) -> tuple[float, float]:
        shown = formats.scaled(value, self.metric)
        return self.x(number), self.y(shown) if math.isfinite(value) else math.nan


def _panel(
    canvas: Canvas, rounds: Sequence[int], limits: tuple[float, float], metric: Metric
) -> _Scales:
    """Draw the axes of a panel over the rounds and return its scales."""
    low, high = (formats.scaled(limit, metric) for limit in limits)
    log = metric.unit != "%" and low > 0 and high > _LOG_FROM * low
    y = Scale(low, high, canvas.height - 36, 22, log)
    ticks = [(tick, f"{tick:,g}") for tick in y.ticks()]
    left = 10 + max((text_width(text) for _, text in ticks), default=0)
    x = Scale(min(rounds), max(*rounds, min(rounds) + 1), left + 6, canvas.width - 10)
    for tick, text in ticks:
        canvas.rule(left, y(tick), x.end, y(tick))
        canvas.text(left - 5, y(tick) + 4, text, "end")
    for tick in x.ticks(8, whole=True):
        canvas.rule(x(tick), y.start, x(tick), y.start + 4)
        canvas.text(x(tick), y.start + 16, f"{tick:g}", "middle")
    canvas.text((x.start + x.end) / 2, canvas.height - 4, "round", "middle")
    canvas.text(2, 11, _named(metric))
    return _Scales(x, y, metric)


def _named(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name
