"""A small published table and run folders of its rows, whose every figure is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig
from server.run_data import hold_to_data
from simulations.comparison.grid import GridConfig
from simulations.reproduction import published
from simulations.reproduction.published import PublishedTable, settings_of
from simulations.reproduction.rows import folder_of
from simulations.runs.folder import RunFolder, write_json
from simulations.runs.records import GridRecord, partition_label
from tests.simulations.report.made_runs import data_named

__all__ = ["TABLE", "made_row", "made_table"]

TABLE = """
title = "A small table"
paper = "Nobody et al."
reading = "best"
reading_note = "It takes the best round."
differences = ["Nothing is as in the paper.", "<b>not bold</b>"]
[protocol]
rounds = 3
cohort = 2
[protocol.data]
source = "cifar10"
validation_fraction = 0
[protocol.partition]
scheme = "iid"
clients = 3
[protocol.model]
name = "convnet3"
width = 4
final_norm = "none"
[protocol.train]
learning_rate = 0.05
[scale.small]
note = "Small: 3 rounds."
seeds = 4
[scale.paper]
note = "Paper: 30 rounds."
seeds = 3
[[rows]]
name = "group"
label = "GN"
published = 61.5
[rows.settings]
normalizer.name = "group"
[[rows]]
name = "batch"
label = "BN"
published = 70.0
[rows.settings]
normalizer.name = "batch"
[[rows]]
name = "shards"
label = "BN, shards"
published = 30.0
[rows.settings]
normalizer.name = "batch"
partition.scheme = "shards"
[[rows]]
name = "none"
label = "none <i>"
reason = "the paper has no such row"
[rows.settings]
normalizer.name = "none"
"""


def made_table(folder: Path) -> PublishedTable:
    """Return the table, its file written into `folder`."""
    (folder / "tiny.toml").write_text(TABLE, encoding="utf-8")
    return published.table("tiny", folder)


def made_row(
    of: PublishedTable,
    out: Path,
    row: str,
    finals: Sequence[float],
    *,
    changes: Mapping[str, Any] | None = None,
    data: str | None = "images",
    source: str = "cifar10",
) -> RunFolder:
    """Write the run folder of a row with a seed for each of `finals`, the last round's values.

    The round before was 0.05 better. `changes` are settings beyond the table's.
    """
    settings = settings_of(
        of,
        "small",
        of.row(row),
        seeds=len(finals),
        changes={"data.source": source, **(changes or {})},
    )
    grid = GridConfig.resolve(settings)
    base = grid.experiment
    path = folder_of(of.name, "small", row, out)
    record = GridRecord(
        name=path.name,
        command=f"fedkn reproduce {of.name}",
        normalizers=[base.normalizer.name],
        batch_sizes=[base.train.batch_size],
        partitions=[partition_label(base.partition)],
        seeds=list(range(len(finals))),
        learning_rates=[base.train.learning_rate],
        search={},
        experiment=dict(base.flat()),
    )
    run = RunFolder.create(path, record)
    write_json(path / "grid.json", grid.flat())
    if data is not None:
        hold_to_data(path, base.data, data_named(data))
    lines: list[dict[str, Any]] = []
    for seed, final in enumerate(finals):
        config = ExperimentConfig.resolve(base.flat(), {"seed": seed})
        cell = [
            {"kind": "start", "purpose": "result", "config": config.flat()},
            *(
                {"kind": "evaluation", "round": number, "split": "test", "loss": 1.0}
                | {"metrics": {"accuracy": value}, "examples": 30}
                for number, value in ((1, final / 2), (2, final + 0.05), (3, final))
            ),
            {"kind": "end", "status": "completed", "seconds": 60.0, "weights_sha256": "0" * 64},
        ]
        lines += [{"cell": f"s{seed}", **line} for line in cell]
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert asdict(run.grid) == asdict(record)
    return run
