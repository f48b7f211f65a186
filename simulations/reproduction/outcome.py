"""What came of a published table: its figures beside ours, as markdown, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box

from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.text import printable
from simulations.report import formats
from simulations.reproduction.published import PublishedTable, Row
from simulations.reproduction.rows import folder_of
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord
from simulations.runs.statistics import Interval, mean_interval
from simulations.whole_table import WholeTable

__all__ = [
    "Outcome",
    "differences",
    "is_of_other_images",
    "markdown",
    "nothing_of",
    "outcome",
    "outcome_of",
    "published_figure",
    "rich_table",
    "table_lines",
    "to_json",
]


@dataclass(frozen=True)
class Outcome:
    """What a row's run folder has so far.

    Attributes:
        best: of every completed cell the best evaluated round's value on test examples, over seeds.
        last: the value of the last round.
        rounds: that a cell has; None where nothing was begun.
        planned: cells that there are to be in its folder. minutes: that all of its cells took,
            finished or not, by the clock.
        source: of the data. classes: that these have, 0 where that is not known.
    """

    row: Row
    metric: Metric
    best: Interval
    last: Interval
    rounds: int | None
    planned: int
    minutes: float
    source: str
    classes: int = 0


def outcome(of: PublishedTable, scale: str, row: Row, out: Path) -> Outcome:
    """Read what there is of a row."""
    folder = folder_of(of.name, scale, row.name, out)
    if RunFolder.may_begin(folder):
        return nothing_of(row)
    return outcome_of(row, RunFolder.open(folder))


def nothing_of(row: Row) -> Outcome:
    """Return what there is of a row that was not begun."""
    nothing = mean_interval([])
    return Outcome(row, ACCURACY, nothing, nothing, None, 0, 0.0, "")


def outcome_of(row: Row, run: RunFolder) -> Outcome:
    """Return what the run folder of a row has so far."""
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
        classes=max((len(entry.summary.classes) for entry in run.data()), default=0),
    )


def rich_table(of: PublishedTable, scale: str, outcomes: Sequence[Outcome]) -> WholeTable:
    """Return the table for a terminal."""
    best, last = ("*" if of.reading == reading else "" for reading in ("best", "last"))
    shown = WholeTable(
        title=f"{of.title}, scale {scale}",
        caption="ours: best and last round, * as the paper reads it; minutes by the clock",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    short = ("published", f"best{best}", f"last{last}", "seeds", "rounds", "minutes")
    shown.add_column("row")
    for column in short:
        shown.add_column(column, justify="right")
    for line in _lines(outcomes):
        shown.add_row(*(printable(cell, 300) for cell in line))
    return shown


def markdown(of: PublishedTable, scale: str, outcomes: Sequence[Outcome], command: str) -> str:
    """Return the table as a page that can be kept."""
    part = of.part(scale)
    head = [
        f"# {of.title}, scale {scale}",
        "",
        f"{of.paper}.",
        "",
        *("```", command, "```", ""),
        f"{part.note} {of.reading_note}",
        "",
    ]
    listed = [f"- {sentence}" for sentence in differences(of, outcomes)]
    reasons = [f"- {o.row.label}: {o.row.reason}." for o in outcomes if o.row.reason]
    notes = ["", "± is the 95% t-interval of the mean over seeds. Differences from the paper:", ""]
    absent = ["", "No published figure:", "", *reasons] if reasons else []
    return "\n".join([*head, *table_lines(of, outcomes), *notes, *listed, *absent]) + "\n"


def to_json(of: PublishedTable, scale: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the same as one object; shares are from 0 to 1, as everywhere in fedkn's JSON."""
    return {
        "table": of.name,
        "title": of.title,
        "paper": of.paper,
        "scale": scale,
        "reading": of.reading,
        "differences": differences(of, outcomes),
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


def table_lines(of: PublishedTable, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table itself, as lines of markdown."""
    columns = _columns(of)
    rule = ["---", *["--:"] * (len(columns) - 1)]
    return [_row(columns), _row(rule), *(_row(line) for line in _lines(outcomes))]


def differences(of: PublishedTable, outcomes: Iterable[Outcome]) -> list[str]:
    """Return in what the runs differ from the paper's, in sentences."""
    return [*of.differences, *_of_data(of, outcomes)]


def _columns(of: PublishedTable) -> list[str]:
    marks = {of.reading: " (as the paper)"}
    return [
        "row",
        "published",
        f"ours, best round{marks.get('best', '')}",
        f"ours, last round{marks.get('last', '')}",
        "seeds",
        "rounds",
        "minutes by the clock",
    ]


def _lines(outcomes: Iterable[Outcome]) -> list[list[str]]:
    return [
        [
            o.row.label,
            published_figure(o.row),
            formats.interval(o.best, o.metric),
            formats.interval(o.last, o.metric),
            f"{o.best.n} of {o.planned}" if o.planned else formats.NOTHING,
            str(o.rounds or formats.NOTHING),
            f"{o.minutes:.1f}" if o.planned else formats.NOTHING,
        ]
        for o in outcomes
    ]


def published_figure(row: Row) -> str:
    """Return what the paper tells of a row, or "none"."""
    if row.published is None:
        return "none"
    spread = "" if row.spread is None else f" ± {row.spread:g}"
    return f"{row.published:g}%{spread}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def is_of_other_images(of: PublishedTable, outcome: Outcome) -> bool:
    """Whether the images have another number of classes than the paper's, as far as is known."""
    expected = _CLASSES.get(_named(of))
    return bool(expected and outcome.classes and outcome.classes != expected)


_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10}


def _named(of: PublishedTable) -> str:
    return str(of.protocol.get("data", {}).get("source", ""))


def _of_data(of: PublishedTable, outcomes: Iterable[Outcome]) -> list[str]:
    """Say where rows were run on the same images from elsewhere, which may be copies, or others."""
    named = _named(of)
    begun = [o for o in outcomes if o.source and o.source != named]
    told = []
    for other in sorted({o.source for o in begun}):
        strange = {o.classes for o in begun if o.source == other and is_of_other_images(of, o)}
        told += [
            f"Read from source '{other}', whose images have {classes} classes, those of '{named}' "
            f"{_CLASSES[named]}: these are not the paper's images, and its figures are of another "
            "task."
            for classes in sorted(strange)
        ]
        if not strange:
            told.append(
                f"Read from source '{other}' in place of '{named}': as good as the copies that lie "
                "there (JPEG copies of CIFAR-10 are a little lossy)."
            )
    return told


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
