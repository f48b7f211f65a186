"""A partition as a table in the terminal and as a picture: client x label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.text import Text

from fedkn.errors import UserError
from fedkn.text import printable
from simulations.runs.records import EXAMPLES, PartitionRecord
from simulations.whole_table import WholeTable

__all__ = ["partition_table", "save_picture"]

_MOST_NAMED = 60
_SHADES = ("dim", "", "bold")


def partition_table(record: PartitionRecord) -> WholeTable:
    """Return the counts of a partition, a row for each client and the sums below."""
    table = WholeTable(
        title=Text(
            f"{printable(record.partition)}, seed {record.seed}: examples by client"
            f"{'' if _unlabelled(record) else ' and label'}",
            style="table.title",
        ),
        title_justify="left",
        show_footer=True,
    )
    counts = np.array(record.counts)
    largest = counts.max()
    table.add_column("client", justify="right", footer="all")
    if record.names:
        table.keys = 2
        table.add_column("whose")
    for name, total in zip(record.classes, counts.sum(axis=0), strict=True):
        # Text, because a bracket in a class's name is not markup.
        table.add_column(Text(printable(name, 40)), justify="right", footer=str(total))
    if not _unlabelled(record):
        table.add_column("all", justify="right", footer=str(counts.sum()))
    for client, row in enumerate(counts):
        whose = [Text(printable(record.names[client], 40))] if record.names else []
        total = [] if _unlabelled(record) else [str(row.sum())]
        cells = [_shaded(count, largest) for count in row]
        table.add_row(str(client), *whose, *cells, *total)
    return table


def save_picture(records: Sequence[PartitionRecord], path: Path) -> None:
    """Draw the partitions one above the other and write them to `path`, by its suffix.

    Raises UserError if the file cannot be written.
    """
    try:
        with mpl.rc_context(_PLAIN_TEXT):
            _drawn(records).savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write the picture '{path}': {error.strerror}") from None


def _unlabelled(record: PartitionRecord) -> bool:
    return record.classes == [EXAMPLES]


def _drawn(records: Sequence[PartitionRecord]) -> Figure:
    clients = max(len(record.counts) for record in records)
    height = 1.2 + 0.24 * len(records[0].classes)
    figure = Figure(figsize=(max(5.0, 2.0 + 0.3 * clients), height * len(records)))
    FigureCanvasAgg(figure)
    for place, record in enumerate(records, 1):
        axes = figure.add_subplot(len(records), 1, place)
        image = axes.imshow(np.array(record.counts).T, cmap="Blues", aspect="auto", vmin=0)
        axes.set_title(
            f"{printable(record.partition)}, seed {record.seed}", fontsize=10, loc="left"
        )
        axes.set_xlabel("client")
        axes.set_ylabel("" if _unlabelled(record) else "label")
        if record.names and clients <= _MOST_NAMED:
            names = [printable(name, 20) for name in record.names]
            axes.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        classes = [printable(name, 40) for name in record.classes]
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
        figure.colorbar(image, ax=axes, label="examples")
    figure.set_layout_engine("tight")
    return figure


def _shaded(count: int, largest: int) -> Text:
    if not count:
        return Text("·", style="dim")
    return Text(str(count), style=_SHADES[min(2, 3 * count // max(largest, 1))])


# Names of classes and clients come from outside: no mathematics in them.
# Any: what matplotlib calls the type of a setting differs from version to version.
_PLAIN_TEXT: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
}
