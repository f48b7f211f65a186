"""What the commands that run cells have in common: say what came of a run, and how it ended."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable

import click
import typer
from rich.text import Text

from fedkn.text import printable
from simulations.api.result import Result
from simulations.terminal import terminal

__all__ = ["carry_out", "repeat_command"]


def carry_out(run: Callable[[], Result], *, as_json: bool) -> None:
    """Call `run`, which runs cells, and show what came of it.

    Raises typer.Exit with 1 if a result cell failed, 130 if the run was stopped.
    """
    try:
        result = run()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    summary = result.summary()
    report = result.folder / "report.html"
    if as_json:
        summary["report"] = str(report)
        summary["cells"] |= result.totals
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        console = terminal()
        for section in summary["partitions"]:
            place = ", ".join(f"{key} {value}" for key, value in section["axes"].items())
            verdict = f"With {place}: {section['verdict']}" if place else section["verdict"]
            console.print(Text(printable(verdict, 10_000), style="bold"))
        for sentence in summary["axis_verdicts"]:
            console.print(Text(printable(sentence, 10_000), style="bold"))
        console.print(result.table())
        # Paths must stay whole, to be copied.
        console.print(f"Report:  {report}", soft_wrap=True)
        console.print(f"Again:   fedkn report {shlex.quote(str(result.folder))}", soft_wrap=True)
    if result.failed:
        raise typer.Exit(1)


def repeat_command() -> str:
    """Return the command line of this invocation."""
    arguments = click.get_current_context().find_root().obj
    return shlex.join(["fedkn", *arguments])
