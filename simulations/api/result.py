"""What came of a run, read from its folder: tables, tests, trained networks, the report."""

from __future__ import annotations

from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from fedkn.text import printable
from simulations.api import frames
from simulations.report import build_report, formats, summary_dict, summary_table
from simulations.report.summary import Section, summarize
from simulations.runs.flower_runs import open_run
from simulations.runs.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

__all__ = ["Result", "load"]


class Result:
    """A run, finished or not, as its folder tells of it at the moment.

    >>> result = fedkn.load("runs/demo")
    >>> result.cells.groupby(["normalizer", "batch_size"]).value.mean()
    >>> result.model("kernel-b2-dirichlet0.3-s0")
    """

    def __init__(self, folder: RunFolder) -> None:
        self._run = folder

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._run.path

    @property
    def cells(self) -> DataFrame:
        """A row for every cell: its settings, its status, its result."""
        return frames.cells(self._run)

    @property
    def rounds(self) -> DataFrame:
        """A row for every round of every cell: its training and its evaluation."""
        return frames.rounds(self._run)

    @property
    def tests(self) -> DataFrame:
        """A row for every two normalizers that were tested on common seeds."""
        return frames.tests(self._run)

    @property
    def learning_rates(self) -> DataFrame:
        """A row for every learning rate that was tried on validation images."""
        return frames.learning_rates(self._run)

    @property
    def failed(self) -> int:
        """How many result cells failed."""
        return self.totals["failed"]

    @property
    def totals(self) -> dict[str, int]:
        """How many result cells are ``completed``, ``failed`` and ``untrainable``."""
        statuses = [cell.status for cell in self._run.cells() if cell.purpose == "result"]
        return {name: statuses.count(name) for name in ("completed", "failed", "untrainable")}

    def model(self, cell: str | None = None) -> nn.Module:
        """Return the trained global network of a cell, on the CPU, in evaluation mode.

        Its parameters have the names that they have in training, and their hash is the cell's
        ``weights_sha256``. It takes inputs as training scales them (``data.scaling``); a program
        that takes pixels is what ``fedkn export`` makes.

        Args:
            cell: its name, as in `cells`; not needed where one result cell is finished.

        Raises:
            UserError: no such cell, none that is trained, or clients keep tensors of the model.
        """
        # Not before it is needed: what exports and classifies has imports of its own.
        from simulations.programs.trained_model import trained_network  # noqa: PLC0415

        return trained_network(self.folder, cell)

    def report(self) -> Path:
        """Build the report from the folder, and return the path of the page."""
        return build_report(self._run)

    def export(self, to: str, folder: str | PathLike[str] | None = None) -> list[Path]:
        """Write the four tables as files, and return their paths, as ``fedkn export-table`` does.

        Args:
            to: ``csv``, ``json`` (a list of rows) or ``parquet``.
            folder: where the files go; by default ``tables`` in the run folder.

        Raises:
            UserError: no such format, an extra that is not installed, or the disk.
        """
        return frames.export(self._run, to, Path(folder) if folder else self.folder / "tables")

    def summary(self) -> dict[str, Any]:
        """Return what ``--json`` prints: every entry of the table, tests and verdicts."""
        return summary_dict(self._run)

    def table(self) -> Group:
        """Return the table of the results, for a terminal (a rich group)."""
        return summary_table(self._run)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.totals.items() if n)
        return f"<fedkn.Result '{self.folder}': {counts or 'nothing has ended'}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdicts and the results."""
        (summary,) = summarize([self._run])
        parts = [f"<p>Run <code>{escape(str(self.folder))}</code></p>"]
        for section in summary.sections:
            label, verdict = (
                escape(printable(of, 10_000)) for of in (section.label, section.verdict)
            )
            parts.append(f"<p><b>{label}</b>: {verdict}</p>{_html_table(section)}")
        return "\n".join(parts)


def load(folder: str | PathLike[str]) -> Result:
    """Return the run in `folder`, whoever made it: the command line, Python, ``flwr run``, a fleet.

    >>> fedkn.load("runs/demo").rounds

    Raises:
        UserError: it is no run folder.
    """
    return Result(open_run(Path(folder)))


def _html_table(section: Section) -> str:
    rows = [("normalizer", "batch size", f"{section.metric.name} ± 95%", "seeds")]
    rows += [
        (
            entry.normalizer,
            str(entry.batch_size),
            formats.interval(entry.accuracy, section.metric),
            f"{entry.accuracy.n}/{entry.planned}",
        )
        for entry in section.entries.values()
    ]
    lines = ["".join(f"<td>{escape(printable(text))}</td>" for text in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
