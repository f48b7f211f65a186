"""The run folder: what a run leaves behind, read and written in one place.

docs/run-folder.md describes the files. The server of each cell appends the lines of
metrics.jsonl; everything here reads them, also while a run is under way or after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedkn.config import DataConfig, ExperimentConfig
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.files import write_atomically
from server.run_data import Recorded, recorded_data
from simulations.runs.model_record import model_of
from simulations.runs.records import CellRecord, GridRecord, PartitionRecord
from simulations.runs.results import (
    Evaluation,
    Round,
    client_evaluation_of,
    evaluation_of,
    holdings_of,
    metric_of,
    round_of,
)
from simulations.runs.tail import MetricsTail

__all__ = ["RunFolder", "write_json"]


class RunFolder:
    """A run folder on disk. Use `create` for a new run and `open` for one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, grid: GridRecord) -> RunFolder:
        """Make the folder of a new run, with nothing in it but experiment.json; see `creating`."""
        with cls.creating(path, grid) as folder:
            return folder

    @classmethod
    @contextmanager
    def creating(cls, path: str | Path, grid: GridRecord) -> Iterator[RunFolder]:
        """Make the folder, yield it for whatever else a run needs, then write experiment.json.

        That file is the mark of a run folder, so one with the mark can be resumed, and a beginning
        that was cut short without it can be begun again. Raises UserError, with nothing left
        behind, if the disk does not take it all, or, having touched nothing, if `path` holds
        anything else.
        """
        path = Path(path)
        if not cls.may_begin(path):
            raise UserError(
                f"'{path}' exists already: choose another folder, or go on with its run "
                f"by 'fedkn resume {path}'"
            )
        there = path.exists()
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            (path / _BEGINNING).touch()
            _empty(path)  # of what a beginning that was cut short said of other settings and data
            yield cls(path)
            write_json(path / "experiment.json", asdict(grid))
            (path / _BEGINNING).unlink()
        except OSError as error:
            _take_away(path, there)
            raise UserError(f"cannot make the run folder '{path}': {error.strerror}") from None

    @classmethod
    def may_begin(cls, path: Path) -> bool:
        """Whether a run can begin in `path`: nothing is there, or a beginning that was cut short.

        Raises UserError where it cannot be looked into.
        """
        try:
            if not path.is_dir():
                return not path.exists()
            names = {entry.name for entry in path.iterdir()}
        except OSError as error:
            raise UserError(f"cannot make the run folder '{path}': {error.strerror}") from None
        return not names or (_BEGINNING in names and "experiment.json" not in names)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run folder. Raises UserError if `path` is not one."""
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise UserError(f"no run folder '{path}': there is no such folder")
        if not (folder.path / "experiment.json").is_file():
            raise UserError(f"'{path}' is not a run folder: it has no experiment.json")
        _ = folder.grid
        return folder

    @property
    def metrics_path(self) -> Path:
        """The file that the servers of all cells append to."""
        return self.path / "metrics.jsonl"

    @property
    def grid(self) -> GridRecord:
        """experiment.json. Raises UserError if it is damaged."""
        data = self.read("experiment.json")
        try:
            if data.keys() - GridRecord.__dataclass_fields__.keys():
                raise ValueError
            _check(GridRecord, data)
            return GridRecord(**data)
        except ValueError:
            raise UserError(
                f"'{self.path}' is not a run folder of this fedkn: "
                "experiment.json has other fields than expected"
            ) from None

    def write_grid(self, grid: GridRecord) -> None:
        """Write experiment.json anew, of a run that was given more to do."""
        write_json(self.path / "experiment.json", asdict(grid))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json: names to values, one level of tables at most."""
        write_json(self.path / "environment.json", environment)

    def environment(self) -> dict[str, Any]:
        """Return environment.json, empty where it was not written yet."""
        return self.read("environment.json", missing={})

    def write_partitions(self, partitions: Sequence[PartitionRecord]) -> None:
        """Write partition.json: one table of client x label counts per partition and seed."""
        tables = [asdict(partition) for partition in partitions]
        write_json(self.path / "partition.json", {"partitions": tables})

    def partitions(self) -> list[PartitionRecord]:
        """Return the tables of partition.json, empty where it was not written yet."""
        data = self.read("partition.json", missing={"partitions": []})
        try:
            _check(list[PartitionRecord], data.get("partitions"))
            tables = [PartitionRecord(**table) for table in data["partitions"]]
            if not all(_is_rectangular(table) for table in tables):
                raise ValueError
            return tables
        except (ValueError, TypeError):
            raise UserError(
                f"'{self.path / 'partition.json'}' has other fields than expected"
            ) from None

    def data(self) -> list[Recorded]:
        """Return what data.json says of the run's data, nothing where there is none.

        Raises UserError if it is damaged.
        """
        return recorded_data(self.path)

    def data_of(self, config: DataConfig) -> DataSummary | None:
        """Return what the run recorded of the images that `config` selects, None if nothing.

        A run that went on elsewhere has moved its record there, and keeps the lines of cells that
        were trained before: where the data lie tells records apart only if there are several.
        """
        recorded = self.data()
        exactly = [entry.summary for entry in recorded if entry.is_of(config)]
        moved = [entry.summary for entry in recorded if entry.is_of(config, anywhere=True)]
        return exactly[0] if exactly else moved[0] if len(moved) == 1 else None

    def write_cell_config(self, cell: str, config: ExperimentConfig) -> Path:
        """Write cells/CELL/config.json and return the cell's folder."""
        folder = self.path / "cells" / cell
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.flat())
        return folder

    def tail(self) -> MetricsTail:
        """Return a reader that starts at the first line of metrics.jsonl."""
        return MetricsTail(self.metrics_path)

    def tail_of_last(self) -> MetricsTail:
        """Return a reader that starts at the last line of a server's start or resumption."""
        return MetricsTail(self.metrics_path, from_last=("start", "resume"))

    def cells(self) -> list[CellRecord]:
        """Return the cells that have started, or have ended without starting, by first line.

        Truncated and malformed lines are passed over; of two lines for one round the later
        counts. A cell that failed before it began, in a version that did not write down what it
        was to do, is passed over too. Raises UserError where a cell's configuration is neither in
        its lines nor in its config.json, or is not one of this fedkn.
        """
        by_cell: dict[str, list[dict[str, Any]]] = {}
        for line in self.tail().poll():
            by_cell.setdefault(line["cell"], []).append(line)
        found = (self._cell(cell, lines) for cell, lines in by_cell.items())
        return [record for record in found if record is not None]

    def read(self, name: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object in the file `name` of the folder.

        Raises UserError where it cannot be read; a file that is not there is `missing`, if given.
        """
        path = self.path / name
        if missing is not None and not path.exists():
            return missing
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read '{path}' of the run folder: {error}") from None
        if not isinstance(data, dict):
            raise UserError(f"cannot read '{path}' of the run folder: it is not a JSON object")
        return data

    def _cell(self, cell: str, lines: Sequence[dict[str, Any]]) -> CellRecord | None:
        starts = [line for line in lines if line["kind"] == "start"]
        start = starts[-1] if starts else {}
        told = [line["config"] for line in lines if "config" in line]
        try:
            flat = told[-1] if told else self.read(f"cells/{cell}/config.json")
        except UserError:
            if all(line["kind"] == "end" for line in lines):
                return None
            raise
        config = ExperimentConfig.resolve(flat)
        record = CellRecord(
            id=cell,
            purpose="search" if config.evaluation.split == "validation" else "result",
            config=config,
            metric=metric_of(start),
            parameters=start.get("parameters"),
            tensors=start.get("tensors"),
            local_tensors=start.get("local_tensors"),
            model=model_of(start),
        )
        rounds: dict[int, Round] = {}
        evaluated: dict[tuple[int, str], Evaluation] = {}
        for line in lines:
            match line["kind"]:
                case "round":
                    rounds[line["round"]] = round_of(line)
                case "evaluation":
                    evaluated[line["round"], line["split"]] = evaluation_of(line)
                case "client_evaluation":
                    record.client_evaluation = client_evaluation_of(line)
                case "joined":
                    record.holdings |= {held.client: held for held in holdings_of(line)}
                case "memory":
                    record.peak_bytes = max(record.peak_bytes or 0, line["peak_bytes"])
                case "resume":
                    record.resumes += 1
                    record.status = "unfinished"
                    record.devices += [line["device"]] if "device" in line else []
                case "start":
                    record.status = "unfinished"
                    record.devices = [line["device"]] if "device" in line else []
                case "end":
                    record.status = line["status"]
                    record.seconds = line.get("seconds")
                    record.weights_sha256 = line.get("weights_sha256")
                    record.error = line.get("error")
                    record.last_round = line.get("rounds")
                    record.best_round = line.get("best_round")
                case "warning":
                    record.warnings.append(line["text"])
        record.rounds = [rounds[number] for number in sorted(rounds)]
        record.evaluations = [evaluated[key] for key in sorted(evaluated)]
        return record


_BEGINNING = ".beginning"
"""A file that is there until a run folder is whole."""


def _take_away(path: Path, there: bool) -> None:
    """Remove all that a beginning left in `path`, and the folder itself unless it was `there`."""
    with suppress(OSError):
        _empty(path)
        (path / _BEGINNING).unlink(missing_ok=True)
        (path / "cells").rmdir()
        if not there:
            path.rmdir()


def _empty(path: Path) -> None:
    """Remove the files in `path`, but not the mark of a beginning."""
    for entry in path.iterdir():
        if not entry.is_dir() and entry.name != _BEGINNING:
            entry.unlink()


def _check(kind: Any, data: Any) -> None:
    """Raise ValueError where JSON `data` is not of the types that `kind` has."""
    # As text: from objects a strict check would want the very class. Names of files that are not
    # UTF-8 stand in it, whose bytes do not matter here.
    text = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
    TypeAdapter(kind).validate_json(text, strict=True)


def _is_rectangular(table: PartitionRecord) -> bool:
    """Whether every client has a count, 0 or more, for every class."""
    return all(len(row) == len(table.classes) and min(row, default=0) >= 0 for row in table.counts)


def write_json(path: Path, data: Any) -> None:
    """Write `data` so that a kill leaves either the old file or the new one, never half a file."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode("utf-8"))
