"""Per-class results of the final evaluation, over the seeds of a normalizer at a batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedkn.tasks.metric import Metric
from simulations.report.entries import Entry
from simulations.runs.records import CellRecord
from simulations.runs.results import Evaluation
from simulations.runs.statistics import Interval, mean_interval

__all__ = ["ClassResults", "class_results", "final_evaluation", "other_metrics"]


@dataclass(frozen=True)
class ClassResults:
    """What one normalizer does with each class at one batch size.

    `by_class` has by metric one interval over seeds for each class, `metrics` what is known of
    these metrics; `confusion` are examples by true class (rows) and predicted class (columns),
    summed over the seeds, empty where there are none.
    """

    normalizer: str
    batch_size: int
    seeds: int
    by_class: Mapping[str, list[Interval]]
    metrics: Mapping[str, Metric]
    confusion: list[list[int]]


def class_results(entry: Entry) -> ClassResults | None:
    """Return the per-class results of the entry's completed cells, None where they have none."""
    finals = [found for cell in entry.cells if (found := final_evaluation(cell)) is not None]
    per_seed = [by_class for of in finals if (by_class := _by_class(of))]
    if not per_seed:
        return None
    # Cells that were written by different versions may tell of different metrics.
    values = {
        name: [of[name] for of in per_seed]
        for name in per_seed[0]
        if all(name in of for of in per_seed)
    }
    metrics = {
        name: _further(name, [value for seed in of for value in seed], entry.metric)
        for name, of in values.items()
    }
    confusions = [np.array(of.confusion) for of in finals if of.confusion]
    alike = len({table.shape for table in confusions}) == 1
    return ClassResults(
        normalizer=entry.normalizer,
        batch_size=entry.batch_size,
        seeds=len(per_seed),
        by_class={name: _intervals(of, metrics[name]) for name, of in values.items()},
        metrics=metrics,
        confusion=np.sum(confusions, axis=0).tolist() if alike else [],
    )


def other_metrics(entry: Entry) -> dict[str, tuple[Interval, Metric]]:
    """Return every further metric of the final evaluation, those that are numbers, over seeds.

    With each comes what is known of it, as of the metrics by class, so that both have one unit.
    """
    values: dict[str, list[float]] = {}
    for cell in entry.cells:
        found = final_evaluation(cell)
        for name, value in found.metrics.items() if found else ():
            if name != cell.metric.name and math.isfinite(value):
                values.setdefault(name, []).append(value)
    metrics = {name: _further(name, of_seeds, entry.metric) for name, of_seeds in values.items()}
    return {
        name: (mean_interval(values[name], metric.lowest, metric.highest), metric)
        for name, metric in metrics.items()
    }


def final_evaluation(cell: CellRecord) -> Evaluation | None:
    """Return the evaluation of a completed cell's result: of its last round, or its best."""
    wanted = (cell.result_round, cell.config.evaluation.split)
    found = (e for e in cell.evaluations if (e.round, e.split) == wanted)
    return next(found, None) if cell.status == "completed" else None


def _by_class(evaluation: Evaluation) -> dict[str, Sequence[float]]:
    """The metrics by class: those that were written, else the share of a class that was right."""
    if evaluation.by_class:
        return dict(evaluation.by_class)
    if not evaluation.confusion:
        return {}
    rows = [(row[place], sum(row)) for place, row in enumerate(evaluation.confusion)]
    return {"accuracy": [right / of_class if of_class else math.nan for right, of_class in rows]}


def _further(name: str, values: Sequence[float], decides: Metric) -> Metric:
    """What is known of a metric that does not decide: a share, where what decides is one and its
    values allow."""
    if decides.unit == "%" and all(0 <= value <= 1 for value in values if math.isfinite(value)):
        return Metric(name, lowest=0.0, highest=1.0, unit="%")
    return Metric(name)


def _intervals(seeds: Sequence[Sequence[float]], metric: Metric) -> list[Interval]:
    by_class = ([of[place] for of in seeds] for place in range(min(map(len, seeds))))
    known = ([value for value in values if math.isfinite(value)] for values in by_class)
    return [mean_interval(values, metric.lowest, metric.highest) for values in known]
