"""``fedkn doctor``: what would go wrong on this machine."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import typer

from simulations.commands import options as o

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(*, as_json: o.Json = False, debug: o.Debug = False) -> None:
    """Check versions, torchvision, GPU, memory, disk, ports and compiler; say how to mend them.

    Exits with 1 if something fails. A warning is about something that not every run needs.
    """
    from rich.text import Text

    from simulations.doctor import diagnose
    from simulations.terminal import terminal
    from simulations.whole_table import WholeTable

    findings = diagnose(Path("runs"))
    if as_json:
        sys.stdout.write(json.dumps({"findings": [asdict(f) for f in findings]}) + "\n")
    else:
        table = WholeTable(box=None, show_header=False, padding=(0, 2, 0, 0))
        for finding in findings:
            status = Text(finding.status, style=_STYLES[finding.status])
            fix = f"\n→ {finding.fix}" if finding.fix else ""
            table.add_row(status, finding.name, finding.message + fix)
        terminal().print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
