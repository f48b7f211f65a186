"""``fedkn report``: the report of runs, from their folders alone."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fedkn.text import printable
from simulations.commands import options as o

__all__ = ["report"]


def report(
    *,
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders, or a folder of them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            rich_help_panel="Output",
            help="The page.",
            show_default="report.html in the run folder; of several runs report-NAME-NAME.html "
            "beside the first one's folder; of a folder of them results.html in it",
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Rebuild the report of a run, finished or not, and print its table.

    Several runs get one report: their cells side by side, and those that they have in common tested
    against each other. A folder of run folders gets a page of results: published tables that were
    run again beside the published figures, and every comparison by itself.

    Examples:

      fedkn report runs/demo-20261123-064512

      fedkn report runs/with-momentum runs/without --out momentum.html

      fedkn report docs/runs
    """
    from fedkn.errors import UserError
    from simulations.overview.collection import is_collection
    from simulations.report import build_report, digest_dict, summary_table
    from simulations.runs.flower_runs import open_run
    from simulations.terminal import terminal

    if any(map(is_collection, folders)):
        _of_many(folders, out, as_json=as_json)
        return
    runs = [open_run(folder) for folder in folders]
    written, problem = None, None
    # What is wrong with the run folders is no problem of writing: it comes first.
    summary = digest_dict(runs)
    try:
        written = build_report(runs, out)
    except UserError as error:
        # The numbers can be shown all the same.
        problem = error
    if as_json:
        path = written and str(written)
        listed = [{"report": path, **of} for of in summary["runs"]]
        sys.stdout.write(json.dumps({"report": path, **summary, "runs": listed}) + "\n")
    else:
        console = terminal()
        for run in runs:
            console.print(summary_table(run))
        for sentence in _beside(summary["beside"] or {}):
            console.print(Text(printable(sentence, 1000)), soft_wrap=True)
        if written:
            console.print(f"Report:  {written}", soft_wrap=True)
    if problem:
        raise problem


def _of_many(folders: list[Path], out: Path | None, *, as_json: bool) -> None:
    """The page of results over a folder of run folders."""
    from fedkn.errors import UserError
    from simulations.overview import page
    from simulations.overview.answers import published_sentences
    from simulations.overview.collection import collect
    from simulations.report import summary_dict, summary_table
    from simulations.reproduction.outcome import rich_table
    from simulations.terminal import terminal

    if len(folders) > 1:
        raise UserError("a folder of run folders has a page of its own: give it alone")
    found = page.overview(collect(folders[0]))
    written = page.write_page(found, out)
    if as_json:
        runs = [summary_dict(study.folder) for study in found.studies]
        told = {"report": str(written), **page.to_dict(found), "runs": runs}
        sys.stdout.write(json.dumps(told) + "\n")
        return
    console = terminal()
    for study in found.studies:
        console.print(summary_table(study.folder))
    for table in found.tables:
        console.print(rich_table(table.of.table, table.of.scale, table.outcomes))
        console.print(Text(" ".join(published_sentences(table))), soft_wrap=True)
    for left in found.left_out:
        told_of = printable(f"Left out: {left.path.name}: {left.why}", 1000)
        console.print(Text(told_of), soft_wrap=True)
    console.print(f"Report:  {written}", soft_wrap=True)


def _beside(beside: Mapping[str, Any]) -> Iterator[str]:
    """What several runs show side by side, in sentences."""
    yield from beside.get("verdicts", ())
    for reason in beside.get("untested", ()):
        yield f"{reason}."
    if beside.get("settings"):
        keys = ", ".join(beside["settings"])
        yield f"Cells that the runs have in common differ in: {keys} (values in the report)."
