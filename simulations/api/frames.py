"""A run's numbers as pandas tables: those of metrics.jsonl, and what follows of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkn.errors import UserError, unknown_name
from fedkn.files import write_atomically
from simulations.report.axes import held_of
from simulations.report.summary import summarize
from simulations.runs.axes import point_of
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["TABLES", "cells", "export", "learning_rates", "rounds", "tests"]


def cells(run: RunFolder) -> DataFrame:
    """Return a row for every cell that has begun: what it was to do, and what came of it."""
    axes = list(run.grid.axes)
    return _frame(_with_axes(_CELL, axes), (_cell_row(cell, axes) for cell in run.cells()))


def rounds(run: RunFolder) -> DataFrame:
    """Return a row for every round of every cell: its training, and its evaluation if it had one.

    Round 0 is the initial model, which is evaluated and not trained.
    """
    axes = list(run.grid.axes)
    return _frame(
        _with_axes(_ROUND, axes), (row for cell in run.cells() for row in _round_rows(cell, axes))
    )


def tests(run: RunFolder) -> DataFrame:
    """Return a row for every pair that was tested on common seeds: normalizers, values of an axis.

    `varied` is what the two differ in (``normalizer``, or the key of a further axis), `held` what
    is equal.

    `models`: ``global``, or ``own`` for the clients' own models; each is a family of its own, over
    which `p_holm` is corrected.
    """
    (summary,) = summarize([run])
    families = {"global": summary.comparisons, "own": summary.own_comparisons}
    return _frame(
        _TEST,
        (
            {
                "models": models,
                "partition": held.partition,
                "batch_size": held.batch_size,
                "varied": held.axis,
                "held": held.label,
                "first": test.first,
                "second": test.second,
                "seeds": test.n,
                "difference": test.difference,
                "half_width": test.half_width,
                "p": test.p,
                "p_holm": test.p_holm,
                "significant": test.significant,
                "detectable": test.detectable,
            }
            for models, family in families.items()
            for test in family
            for held in (held_of(test),)
        ),
    )


def learning_rates(run: RunFolder) -> DataFrame:
    """Return a row for every learning rate that was tried: its mean value in validation."""
    (summary,) = summarize([run])
    return _frame(
        _with_axes(_RATE, run.grid.axes),
        (
            {
                "normalizer": normalizer,
                "batch_size": batch_size,
                "partition": section.partition,
                **dict(section.point),
                "learning_rate": trial.learning_rate,
                "value": trial.accuracy,
                "cells": trial.cells,
                "chosen": trial.chosen,
                "own": trial.own,
            }
            for section in summary.sections
            for (normalizer, batch_size), trials in section.trials.items()
            for trial in trials
        ),
    )


TABLES = {"cells": cells, "rounds": rounds, "tests": tests, "learning_rates": learning_rates}
"""The tables by name."""


def export(run: RunFolder, to: str, folder: Path) -> list[Path]:
    """Write every table as a file of format `to` into `folder`, and return the paths."""
    if to not in _FORMATS:
        raise unknown_name("format", to, _FORMATS)
    if to == "parquet" and find_spec("pyarrow") is None:
        raise UserError("parquet needs pyarrow: pip install 'fedkn[parquet]'")
    written = []
    for name, table in TABLES.items():
        frame, path = table(run), folder / f"{name}.{to}"
        content = BytesIO()
        _FORMATS[to](frame, content)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
        written.append(path)
    return written


# Floats in full: what is read back is what was written.
_FORMATS: dict[str, Callable[[DataFrame, BytesIO], object]] = {
    "csv": lambda frame, file: frame.to_csv(file, index=False),
    "json": lambda frame, file: file.write(_json(frame)),
    "parquet": lambda frame, file: frame.to_parquet(file, index=False),
}


def _json(frame: DataFrame) -> bytes:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return (json.dumps(rows, indent=1) + "\n").encode()


def _frame(columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> DataFrame:
    """Return the rows as a table, whose columns are there also where no row is.

    The rows may have more: those of the task's metrics come before the loss.
    """
    try:
        import pandas as pd  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise UserError("tables need pandas: pip install 'fedkn[pandas]'") from None
    names, every = list(columns), list(rows)
    place = names.index("loss") if "loss" in names else len(names)
    names[place:place] = dict.fromkeys(key for row in every for key in row if key not in names)
    frame = pd.DataFrame(every, columns=names)
    # A count that is missing somewhere is a count all the same.
    return frame.astype({name: "Int64" for name in names if name in _COUNTS})


_WHICH = ("cell", "purpose", "normalizer", "batch_size", "partition", "seed")
_CELL = (
    *_WHICH,
    *("learning_rate", "status", "rounds", "best_round", "split", "metric", "value", "loss"),
    *("own_mean", "own_worst_tenth", "own_deviation", "parameters", "local_tensors"),
    *("peak_bytes", "seconds", "resumes", "weights_sha256", "error"),
)
_ROUND = (
    *_WHICH,
    *("round", "split", "metric", "value", "loss", "evaluated"),
    *("train_loss", "learning_rate", "clients", "updates", "refused", "failed", "late"),
    *("examples", "steps", "seconds", "train_seconds", "bytes_down", "bytes_up"),
)
_TEST = (
    *("models", "varied", "held", "partition", "batch_size", "first", "second", "seeds"),
    "difference",
    *("half_width", "p", "p_holm", "significant", "detectable"),
)
_RATE = (
    *("normalizer", "batch_size", "partition", "learning_rate", "value"),
    *("cells", "chosen", "own"),
)
_COUNTS = {
    *(
        "best_round",
        "parameters",
        "local_tensors",
        "peak_bytes",
        "evaluated",
        "clients",
        "updates",
        "refused",
    ),
    *("failed", "late", "examples", "steps", "bytes_down", "bytes_up"),
}


def _with_axes(columns: Sequence[str], axes: Iterable[str]) -> tuple[str, ...]:
    """The columns, with those of further axes behind the partition."""
    place = columns.index("partition") + 1
    return (*columns[:place], *axes, *columns[place:])


def _which(cell: CellRecord, axes: Iterable[str]) -> dict[str, Any]:
    return {
        "cell": cell.id,
        "purpose": cell.purpose,
        "normalizer": cell.config.normalizer.name,
        "batch_size": cell.config.train.batch_size,
        "partition": cell.partition,
        **dict(point_of(cell.config, axes)),
        "seed": cell.config.seed,
    }


def _cell_row(cell: CellRecord, axes: Iterable[str]) -> dict[str, Any]:
    split = cell.config.evaluation.split
    evaluations = {e.round: e for e in cell.evaluations if e.split == split}
    # Of a cell that is not at its end the last that is known. One that failed has no result: what
    # it was at first, or before its loss was infinite, is in the table of rounds.
    last = evaluations.get(cell.result_round, next(reversed(evaluations.values()), None))
    own = cell.client_evaluation
    metrics: Mapping[str, float | None] = {} if last is None else last.metrics
    if cell.status in ("failed", "untrainable"):
        last = own = None
        metrics = dict.fromkeys(metrics)
    return {
        **_which(cell, axes),
        "learning_rate": cell.config.train.learning_rate,
        "status": cell.status,
        "rounds": cell.rounds[-1].round if cell.rounds else 0,
        "best_round": cell.best_round,
        "split": split,
        "metric": cell.metric.name,
        "value": None if last is None else last.value,
        **metrics,
        "loss": None if last is None else last.loss,
        "own_mean": None if own is None else own.mean,
        "own_worst_tenth": None if own is None else own.worst_tenth,
        "own_deviation": None if own is None else own.deviation,
        "parameters": cell.parameters,
        "local_tensors": cell.local_tensors,
        "peak_bytes": cell.peak_bytes,
        "seconds": cell.seconds,
        "resumes": cell.resumes,
        "weights_sha256": cell.weights_sha256,
        "error": cell.error,
    }


def _round_rows(cell: CellRecord, axes: Iterable[str]) -> Iterable[dict[str, Any]]:
    trained = {entry.round: entry for entry in cell.rounds}
    evaluated = {(e.round, e.split): e for e in cell.evaluations}
    split = cell.config.evaluation.split
    for number in sorted(trained.keys() | {round_ for round_, _ in evaluated}):
        row = {**_which(cell, axes), "round": number}
        if (entry := trained.get(number)) is not None:
            row |= {
                "seconds": entry.seconds,
                "clients": len(entry.cohort),
                "updates": entry.updates,
                "refused": len(entry.refused),
                "failed": len(entry.failed),
                "late": len(entry.late),
                "examples": entry.examples,
                "steps": entry.steps,
                "train_loss": entry.train_loss,
                "train_seconds": entry.train_seconds,
                "learning_rate": entry.learning_rate,
                "bytes_down": entry.bytes_down,
                "bytes_up": entry.bytes_up,
            }
        if (evaluation := evaluated.get((number, split))) is not None:
            row |= {
                "split": split,
                "metric": cell.metric.name,
                "value": evaluation.value,
                **evaluation.metrics,
                "loss": evaluation.loss,
                "evaluated": evaluation.examples,
            }
        yield row
