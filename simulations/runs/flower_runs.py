"""Run folders that the ServerApp wrote by itself, under ``flwr run`` or in a deployment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedkn.config import ExperimentConfig
from simulations.runs.folder import RunFolder, write_json
from simulations.runs.records import CellRecord, GridRecord, partition_label

__all__ = ["open_run"]


def open_run(path: Path) -> RunFolder:
    """Open a run folder; where the ServerApp alone wrote it, add what `RunFolder` lacks.

    That is experiment.json, read off the cells in metrics.jsonl. Raises UserError where `path` is
    no run folder, or a cell's configuration is not one of this fedkn.
    """
    if not (path / "experiment.json").exists() and (path / "metrics.jsonl").is_file():
        cells = RunFolder(path).cells()
        if cells:
            grid = _grid(path.resolve().name, cells)
            write_json(path / "experiment.json", dataclasses.asdict(grid))
    return RunFolder.open(path)


def _grid(name: str, cells: list[CellRecord]) -> GridRecord:
    configs = [cell.config for cell in cells]
    return GridRecord(
        name=name,
        command=f"flwr run . --run-config '{_run_config(configs[0])}'",
        normalizers=list(dict.fromkeys(config.normalizer.name for config in configs)),
        batch_sizes=sorted({config.train.batch_size for config in configs}),
        partitions=list(dict.fromkeys(partition_label(config.partition) for config in configs)),
        seeds=sorted({config.seed for config in configs}),
        learning_rates=sorted({config.train.learning_rate for config in configs}),
        search={},
        experiment=configs[0].flat(),
    )


def _run_config(config: ExperimentConfig) -> str:
    """The keys that differ from the defaults, as ``--run-config`` takes them."""
    defaults = ExperimentConfig().flat()
    changed = {k: v for k, v in config.flat().items() if v != defaults[k]}
    return " ".join(f"{key}={_literal(value)}" for key, value in changed.items())


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
