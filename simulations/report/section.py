"""One partition of a run as the page shows it: tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from fedkn.tasks.metric import Metric
from simulations.report import figures, formats, pictures
from simulations.report.chart import COLOURS
from simulations.report.classes import ClassResults, class_results, other_metrics
from simulations.report.csv_tables import section_links
from simulations.report.curves import loss_limits, losses_by_round, value_limits
from simulations.report.endings import endings
from simulations.report.settings import display_name
from simulations.report.shades import shades
from simulations.report.standings import standing
from simulations.report.summary import RunSummary, Section
from simulations.report.tables import group_counts
from simulations.report.trials import Trial
from simulations.report.verdict import Contest

__all__ = ["section_view"]

# More tables than this (one per seed) would bury the rest of the page.
_PARTITION_PICTURES = 2
# More confusion matrices than this make the page too large to be sent around.
_CONFUSION_PICTURES = 40
# Of more classes than this a table is not read; the picture and the file are.
_CLASSES_IN_TABLE = 24


def section_view(run: RunSummary, section: Section, unknown: Sequence[str]) -> dict[str, Any]:
    """Return what the template shows of a section.

    `unknown` are the normalizers of the page that may have no style of their own.
    """
    label = f"{run.label}, {section.label}"
    metric = section.metric
    names = [name for name in section.normalizers if _any_curve(section, name)]
    found = [of for e in section.entries.values() if (of := class_results(e)) is not None]
    class_names = _class_names(run, section, found)
    ended = endings(section)
    return {
        "label": section.label,
        "long_label": label,
        "section": section,
        "metric": metric,
        "verdicts": section.verdicts,
        "names": {name: _name(section, name) for name in section.normalizers},
        "styles": {
            name: figures.style_index(name, unknown) % COLOURS for name in section.normalizers
        },
        "shades": shades(section.contests),
        "behind": {(name, c.batch_size) for c in section.contests for name in c.behind()},
        "order": _order(section, metric),
        "standing": _standings(section.contests),
        "own_standing": _standings(section.own_contests),
        "own_order": [(c.batch_size, _own_order(section, c, metric)) for c in section.own_contests],
        "privacy": [entry for entry in section.entries.values() if entry.privacy],
        "legend": [(_name(section, n), Markup(figures.swatch(n, unknown))) for n in names],
        "finals": _finals(section, metric, label, unknown),
        "curves": _curves(section, metric, label, unknown),
        "loss_curves": _loss_curves(section, label, unknown),
        "few": len(names) <= figures.FEW,
        "endings": ended,
        "not_flat": {(of.entry.normalizer, of.entry.batch_size) for of in ended if of.ran_out},
        "best_round": any(
            c.config.checkpoint.best for e in section.entries.values() for c in e.cells
        ),
        "other_metrics": _other_metrics(section),
        "classes": _classes(section, found, class_names, label),
        "csv": section_links(run, section, found, class_names),
        "rates": sorted({t.learning_rate for trials in section.trials.values() for t in trials}),
        "trials": {
            key: {trial.learning_rate: trial for trial in trials}
            for key, trials in section.trials.items()
        },
        "edges": {key for key, trials in section.trials.items() if _at_edge(trials)},
        "used_rates": _used_rates(section),
        "fastest": {size: _fastest(section, size) for size in section.batch_sizes},
        "pictures": [
            (table, Markup(pictures.partition_picture(table.record)))
            for table in section.tables[:_PARTITION_PICTURES]
            if table.record.counts and table.record.counts[0]
        ],
    }


def _name(section: Section, name: str) -> str:
    counts = {group_counts(entry) for entry in section.entries.values() if entry.normalizer == name}
    mark = f" {formats.KEEPS}" if name in section.keepers else ""
    return display_name(name, max(counts, default=0)) + mark


def _any_curve(section: Section, name: str) -> bool:
    return any(entry.curves() for (of, _), entry in section.entries.items() if of == name)


def _order(section: Section, metric: Metric) -> list[str]:
    """The normalizers by their mean over the batch sizes, best first, keepers last."""

    def place(name: str) -> tuple[bool, float]:
        means = [
            e.accuracy.mean for e in section.entries.values() if e.normalizer == name and e.final
        ]
        return name in section.keepers, -metric.sign * fmean(means) if means else math.inf

    return sorted(section.normalizers, key=place)


def _own_order(section: Section, contest: Contest, metric: Metric) -> list[str]:
    """The normalizers by the mean of the clients' own models, those without a result last."""

    def place(name: str) -> float:
        mean = contest.means.get(name)
        return math.inf if mean is None else -metric.sign * mean

    return sorted(section.normalizers, key=place)


def _standings(contests: Sequence[Contest]) -> dict[tuple[str, int], str]:
    return {
        (name, contest.batch_size): standing(contest, name)
        for contest in contests
        for name in contest.means
    }


def _finals(
    section: Section, metric: Metric, label: str, unknown: Sequence[str]
) -> list[tuple[int, Markup]]:
    rows = {
        size: [
            figures.Finals(e.normalizer, _name(section, e.normalizer), e.final, e.accuracy)
            for e in section.ranked(size)
            if e.final
        ]
        for size in section.batch_sizes
    }
    every = [of for finals in rows.values() for of in finals]
    limits = figures.final_limits(every, metric)
    return [
        (
            size,
            Markup(
                figures.final_values(
                    finals, limits, metric, f"results at batch size {size}, {label}", unknown
                )
            ),
        )
        for size, finals in rows.items()
        if finals
    ]


def _curves(
    section: Section, metric: Metric, label: str, unknown: Sequence[str]
) -> list[tuple[int, Markup]]:
    by_size: dict[int, dict[str, list[dict[int, float]]]] = {}
    for (name, size), entry in section.entries.items():
        if curves := entry.curves():
            by_size.setdefault(size, {})[name] = curves
    limits = value_limits(
        [c for of in by_size.values() for seeds in of.values() for c in seeds], metric
    )
    return [
        (
            size,
            Markup(
                figures.learning_curves(
                    figures.Lines.of(curves, metric),
                    limits,
                    f"learning curves at batch size {size}, {label}",
                    unknown,
                )
            ),
        )
        for size, curves in sorted(by_size.items())
    ]


def _loss_curves(
    section: Section, label: str, unknown: Sequence[str]
) -> list[tuple[int, Markup, Markup]]:
    """By batch size the panels of the loss on what is trained on and on what is evaluated on."""
    by_size: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for (name, size), entry in section.entries.items():
        for panel, curves in zip(
            by_size.setdefault(size, ({}, {})), losses_by_round(entry), strict=True
        ):
            if curves:
                panel[name] = curves
    every = [c for pair in by_size.values() for of in pair for seeds in of.values() for c in seeds]
    metric, limits = loss_limits(every)

    def drawn(which: str, panel: Mapping[str, Any], size: int) -> Markup:
        if not panel:
            return Markup()
        what = f"{which} loss at batch size {size}, {label}"
        lines = figures.Lines.of(panel, metric)
        return Markup(figures.learning_curves(lines, limits, what, unknown))

    return [
        (size, drawn("training", training, size), drawn("evaluation", evaluation, size))
        for size, (training, evaluation) in sorted(by_size.items())
        if training or evaluation
    ]


def _other_metrics(section: Section) -> dict[str, Any]:
    """The names of all further metrics, and by entry what it has of them."""
    found = {key: other_metrics(entry) for key, entry in section.entries.items()}
    names = dict.fromkeys(name for of in found.values() for name in of)
    return {"names": list(names), "values": found} if names else {}


def _class_names(run: RunSummary, section: Section, found: Sequence[ClassResults]) -> list[str]:
    """The names of the classes as recorded, or numbers."""
    number = max((len(next(iter(of.by_class.values()), ())) for of in found), default=0)
    cells = (cell for entry in section.entries.values() for cell in entry.cells)
    for cell in cells:
        data = run.folder.data_of(cell.config.data)
        if data is not None and len(data.classes) == number:
            return list(data.classes)
        break
    return [str(place) for place in range(number)]


def _classes(
    section: Section, found: Sequence[ClassResults], names: Sequence[str], label: str
) -> list[dict[str, Any]]:
    """By batch size: pictures of every class, a table of few classes, confusion matrices."""
    views = []
    left = _CONFUSION_PICTURES
    for size in section.batch_sizes:
        place = {e.normalizer: i for i, e in enumerate(section.ranked(size))}
        of_size = sorted(
            (r for r in found if r.batch_size == size), key=lambda r: place[r.normalizer]
        )
        if not of_size:
            continue
        shown = [of for of in of_size if len(of.confusion) == len(names)][:left]
        left -= len(shown)
        metrics = dict.fromkeys(name for of in of_size for name in of.by_class)
        views.append(
            {
                "batch_size": size,
                "pictures": [
                    (m, Markup(_class_picture(section, of_size, m, names, label))) for m in metrics
                ],
                "results": of_size if len(names) <= _CLASSES_IN_TABLE else [],
                "names": names,
                "confusions": [
                    (
                        _name(section, of.normalizer),
                        Markup(
                            pictures.confusion_picture(
                                of.confusion,
                                names,
                                f"confusions of {of.normalizer} at batch size {size}, {label}",
                            )
                        ),
                    )
                    for of in shown
                ],
                "left_out": sum(bool(of.confusion) for of in of_size) - len(shown),
            }
        )
    return views


def _class_picture(
    section: Section,
    results: Sequence[ClassResults],
    metric: str,
    names: Sequence[str],
    label: str,
) -> str:
    having = [of for of in results if metric in of.by_class]
    values = np.array([[i.mean for i in of.by_class[metric][: len(names)]] for of in having])
    shares = all(of.metrics[metric].unit == "%" for of in having)
    return pictures.class_picture(
        values,
        [_name(section, of.normalizer) for of in having],
        names,
        f"{metric} by normalizer and class at batch size {results[0].batch_size}, {label}",
        shares=shares,
    )


def _at_edge(trials: Sequence[Trial]) -> bool:
    return len(trials) > 1 and (trials[0].chosen or trials[-1].chosen)


def _used_rates(section: Section) -> list[tuple[tuple[float, ...], list[str]]]:
    """The learning rates of the result cells, and who used them."""
    users: dict[tuple[float, ...], list[str]] = {}
    for (name, size), entry in section.entries.items():
        rates = tuple(sorted({cell.config.train.learning_rate for cell in entry.cells}))
        if rates:
            users.setdefault(rates, []).append(f"{name} at batch size {size}")
    return list(users.items())


def _fastest(section: Section, size: int) -> Mapping[str, float]:
    """The shortest time of a step of each engine: those of different ones cannot be compared."""
    fastest: dict[str, float] = {}
    for entry in section.ranked(size):
        if not math.isnan(entry.ms_per_step):
            known = fastest.get(entry.engine, math.inf)
            fastest[entry.engine] = min(known, entry.ms_per_step)
    return fastest
