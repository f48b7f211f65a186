"""What came of a published table: its figures beside ours, as markdown, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.text import printable
from simulations.report import formats
from simulations.reproduction.published import PublishedTable, Row
from simulations.reproduction.rows import folder_of
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord
from simulations.runs.statistics import Interval, mean_interval

__all__ = ["Outcome", "markdown", "outcome", "rich_table", "to_json"]


@dataclass(frozen=True)
class Outcome:
    """What a row's run folder has so far.

    Attributes:
        best: of every completed cell the best evaluated round's value on test examples, over seeds.
        last: the value of the last round.
        rounds: that a cell has; None where nothing was begun.
        planned: cells that there are to be in its folder. minutes: that all of its cells took,
            finished or not, by the clock.
        source: of the data.
    """

    row: Row
    metric: Metric
    best: Interval
    last: Interval
    rounds: int | None
    planned: int
    minutes: float
    source: str


def outcome(of: PublishedTable, scale: str, row: Row, out: Path) -> Outcome:
    """Read what there is of a row."""
    folder = folder_of(of.name, scale, row.name, out)
    nothing = mean_interval([])
    if RunFolder.may_begin(folder):
        return Outcome(row, ACCURACY, nothing, nothing, None, 0, 0.0, "")
    run = RunFolder.open(folder)
    grid, cells = run.grid, [cell for cell in run.cells() if cell.purpose == "result"]
    done = [cell for cell in cells if cell.status == "completed"]
    metric = cells[0].metric if cells else ACCURACY
    return Outcome(
        row=row,
        metric=metric,
        best=_interval([_best(cell) for cell in done], metric),
        last=_interval([_last(cell) for cell in done], metric),
        rounds=int(grid.experiment["rounds"]),
        planned=len(grid.seeds),
        minutes=sum(_seconds(cell) for cell in cells) / 60,
        source=str(grid.experiment.get("data.source", "")),
    )


def rich_table(of: PublishedTable, scale: str, outcomes: Sequence[Outcome]) -> Table:
    """Return the table for a terminal."""
    shown = Table(title=f"{of.title}, scale {scale}", title_justify="left")
    for place, column in enumerate(_columns(of)):
        shown.add_column(column, justify="left" if not place else "right")
    for line in _lines(of, outcomes):
        shown.add_row(*(printable(cell, 300) for cell in line))
    return shown


def markdown(of: PublishedTable, scale: str, outcomes: Sequence[Outcome], command: str) -> str:
    """Return the table as a page that can be kept."""
    columns, part = _columns(of), of.part(scale)
    head = [
        f"# {of.title}, scale {scale}",
        "",
        f"{of.paper}.",
        "",
        *("```", command, "```", ""),
        f"{part.note} {of.reading_note}",
        "",
        _row(columns),
        _row(["---", *["--:"] * (len(columns) - 1)]),
    ]
    body = [_row(line) for line in _lines(of, outcomes)]
    differences = [f"- {sentence}" for sentence in [*of.differences, *_of_data(of, outcomes)]]
    reasons = [f"- {o.row.label}: {o.row.reason}." for o in outcomes if o.row.reason]
    notes = ["", "± is the 95% t-interval of the mean over seeds. Differences from the paper:", ""]
    absent = ["", "No published figure:", "", *reasons] if reasons else []
    return "\n".join([*head, *body, *notes, *differences, *absent]) + "\n"


def to_json(of: PublishedTable, scale: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the same as one object; shares are from 0 to 1, as everywhere in fedkn's JSON."""
    return {
        "table": of.name,
        "title": of.title,
        "paper": of.paper,
        "scale": scale,
        "reading": of.reading,
        "differences": [*of.differences, *_of_data(of, outcomes)],
        "rows": [
            {
                "row": o.row.name,
                "label": o.row.label,
                "published": None if o.row.published is None else o.row.published / 100,
                "reason": o.row.reason,
                "best": _numbers(o.best),
                "last": _numbers(o.last),
                "seeds": o.best.n,
                "planned_seeds": o.planned,
                "rounds": o.rounds,
                "minutes": o.minutes,
                "source": o.source,
            }
            for o in outcomes
        ],
    }


def _columns(of: PublishedTable) -> list[str]:
    marks = {of.reading: " (as the paper)"}
    return [
        "row",
        "published",
        f"ours, best round{marks.get('best', '')}",
        f"ours, last round{marks.get('last', '')}",
        "seeds",
        "rounds",
        "core minutes",
    ]


def _lines(of: PublishedTable, outcomes: Iterable[Outcome]) -> list[list[str]]:
    del of
    return [
        [
            o.row.label,
            _published(o.row),
            formats.interval(o.best, o.metric),
            formats.interval(o.last, o.metric),
            f"{o.best.n} of {o.planned}" if o.planned else formats.NOTHING,
            str(o.rounds or formats.NOTHING),
            f"{o.minutes:.1f}" if o.planned else formats.NOTHING,
        ]
        for o in outcomes
    ]


def _published(row: Row) -> str:
    if row.published is None:
        return "none"
    spread = "" if row.spread is None else f" ± {row.spread:g}"
    return f"{row.published:g}%{spread}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _of_data(of: PublishedTable, outcomes: Iterable[Outcome]) -> list[str]:
    """Say where rows were run on the same images from elsewhere, which may be copies."""
    named = of.protocol.get("data", {}).get("source", "")
    others = sorted({o.source for o in outcomes if o.source and o.source != named})
    return [
        f"Read from source '{other}' in place of '{named}': as good as the copies that lie there "
        "(JPEG copies of CIFAR-10 are a little lossy)."
        for other in others
    ]


def _best(cell: CellRecord) -> float:
    values = [value for round_, value in cell.values("test").items() if round_]
    pick = max if cell.metric.higher_is_better else min
    return pick(values, default=math.nan)


def _last(cell: CellRecord) -> float:
    return cell.values("test").get(cell.result_round, math.nan)


def _seconds(cell: CellRecord) -> float:
    """Of a cell that was gone on with, its last process tells its own part alone."""
    return max(cell.seconds or 0.0, sum(entry.seconds for entry in cell.rounds))


def _interval(values: Sequence[float], metric: Metric) -> Interval:
    return mean_interval(values, metric.lowest, metric.highest)


def _numbers(of: Interval) -> dict[str, float | None]:
    return {
        name: None if math.isnan(value) else value
        for name, value in (("mean", of.mean), ("low", of.low), ("high", of.high))
    }
