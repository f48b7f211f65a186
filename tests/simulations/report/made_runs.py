"""Made-up run folders whose every result is given: by normalizer, batch size, point and seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig
from fedkn.data.fingerprint import Fingerprint
from fedkn.data.summary import DataSummary
from fedkn.tables import nest
from fedkn.tasks.metric import ACCURACY, Metric
from server.run_data import hold_to_data
from simulations.runs.axes import value_text
from simulations.runs.folder import RunFolder
from simulations.runs.records import GridRecord, partition_label

__all__ = ["Value", "data_named", "made_run"]

Value = Callable[[str, int, Mapping[str, Any], int], float]
"""The final value of a cell: of its normalizer, batch size, settings along further axes, seed."""


def data_named(name: str) -> DataSummary:
    """Return a summary of data that no other name has."""
    digests = [hashlib.sha256(f"{name} {part}".encode()).hexdigest() for part in range(5)]
    training, validation, test, images, labelled = digests
    found = Fingerprint(training, validation, test, (80, 10, 30), images, labelled)
    return DataSummary(("a", "b"), (1, 8, 8), fingerprint=found)


def made_run(
    path: Path,
    value: Value,
    *,
    normalizers: Sequence[str] = ("kernel", "group"),
    batch_sizes: Sequence[int] = (2,),
    seeds: Sequence[int] = (0, 1, 2, 3),
    axes: Mapping[str, Sequence[Any]] | None = None,
    metric: Metric | None = None,
    data: str | None = "digits",
    **experiment: Any,
) -> RunFolder:
    """Write a run of one partition whose cells all completed, with two rounds each.

    `metric` is what the cells tell of themselves; without it they are those of an earlier fedkn.
    `data` names the data that it recorded, None for none.
    """
    settings = {"rounds": 2, **{k.replace("__", "."): v for k, v in experiment.items()}}
    base = ExperimentConfig.resolve(settings)
    varied = dict(axes or {})
    grid = GridRecord(
        name=path.name,
        command=f"fedkn compare --name {path.name}",
        normalizers=list(normalizers),
        batch_sizes=list(batch_sizes),
        partitions=[partition_label(base.partition)],
        seeds=list(seeds),
        learning_rates=[0.1],
        search={},
        experiment=dict(base.flat()),
        axes={key: [value_text(v) for v in values] for key, values in varied.items()},
    )
    run = RunFolder.create(path, grid)
    lines: list[dict[str, Any]] = []
    points = [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]
    for point, name, size, seed in product(points, normalizers, batch_sizes, seeds):
        config = ExperimentConfig.resolve(
            settings,
            nest(point),
            {"normalizer.name": name, "train.batch_size": size, "seed": seed},
            {"train.learning_rate": 0.1, "partition.clients": base.partition.clients},
        )
        if data is not None:
            hold_to_data(path, config.data, data_named(f"{data} {config.data.source}"))
        cell = f"{name}-b{size}-{len(lines)}-s{seed}"
        final = value(name, size, point, seed)
        lines += _cell(cell, config, final, metric)
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return run


def _cell(
    cell: str, config: ExperimentConfig, final: float, metric: Metric | None
) -> list[dict[str, Any]]:
    start: dict[str, Any] = {"kind": "start", "purpose": "result", "config": config.flat()}
    if metric is not None:
        ends = {"lowest": metric.lowest, "highest": metric.highest}
        start["task"] = {
            "name": "made up",
            "metric": metric.name,
            "higher_is_better": metric.higher_is_better,
            **{name: end if math.isfinite(end) else None for name, end in ends.items()},
            "unit": metric.unit,
        }
    name = (metric or ACCURACY).name
    evaluations = [
        {
            "kind": "evaluation",
            "round": number,
            "split": "test",
            "metrics": {name: of},
            "loss": 1.0,
            "examples": 30,
        }
        for number, of in enumerate((final / 4, final / 2, final))
    ]
    end = {"kind": "end", "status": "completed", "seconds": 1.0, "weights_sha256": "0" * 64}
    return [{"cell": cell, **line} for line in (start, *evaluations, end)]
