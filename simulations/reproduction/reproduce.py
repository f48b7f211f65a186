"""Carries out rows of a published table, one after the other, and writes what came of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.files import write_atomically
from simulations.api import running
from simulations.comparison.duration import duration
from simulations.reproduction.outcome import Outcome, markdown, outcome, to_json
from simulations.reproduction.published import PublishedTable
from simulations.reproduction.rows import Planned, carry_out, plan_row

__all__ = ["estimate", "outcomes_of", "plans", "reproduce", "write_table"]

Say = Callable[[str], None]


def plans(
    of: PublishedTable,
    scale: str,
    rows: Sequence[str],
    out: Path,
    *,
    seeds: int | None,
    changes: dict[str, Any],
) -> list[Planned]:
    """Return what is to be done for `rows`, all of them if none is named.

    Raises UserError for a row or a setting that there is not, or a folder begun with other ones.
    """
    chosen = [of.row(name) for name in dict.fromkeys(rows)] or list(of.rows)
    part = of.part(scale)
    wanted = seeds or part.seeds
    return [plan_row(of, scale, row, out, seeds=wanted, changes=changes) for row in chosen]


def estimate(todo: Sequence[Planned], say: Say) -> None:
    """Say what every row will take on one core, a few of its steps timed here, and the whole.

    Raises UserError for what would make cells fail, before anything is run.
    """
    total = 0.0
    for plan in todo:
        seconds = plan.core_seconds()
        total += seconds
        cells = f"{plan.left} of {plan.seeds} cells left"
        what = f"about {_told(seconds)} on one core" if plan.left else "nothing to do"
        say(f"{plan.row.name}: {cells}, {what}")
    say(f"All of it: about {_told(total)} on one core.")


def reproduce(
    of: PublishedTable,
    scale: str,
    todo: Sequence[Planned],
    out: Path,
    *,
    workers: int | None = None,
    progress: running.Progress = True,
    command: str = "",
    say: Say = lambda _: None,
) -> list[Outcome]:
    """Run what is left of `todo`, write the table after every row, and return all its rows.

    Raises:
        UserError, FedknError: as `fedkn.compare` and `fedkn.resume`; rows before it are kept.
        KeyboardInterrupt: it was stopped; what was done is kept and in the table.
    """
    try:
        for place, plan in enumerate(todo, start=1):
            if plan.left:
                say(f"Row {place} of {len(todo)}, {plan.row.name}: {plan.folder}")
            carry_out(plan, workers=workers, progress=progress, command=command)
            write_table(of, scale, out, command)
    finally:
        write_table(of, scale, out, command)
    return outcomes_of(of, scale, out)


def outcomes_of(of: PublishedTable, scale: str, out: Path) -> list[Outcome]:
    """Return what there is of all rows in `out`."""
    return [outcome(of, scale, row, out) for row in of.rows]


def write_table(of: PublishedTable, scale: str, out: Path, command: str) -> Path:
    """Write NAME-SCALE.md and NAME-SCALE.json into `out`, and return the first's path.

    Raises UserError where that cannot be written.
    """
    outcomes = outcomes_of(of, scale, out)
    path = out / f"{of.name}-{scale}.md"
    text = json.dumps(to_json(of, scale, outcomes), indent=1, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, markdown(of, scale, outcomes, command).encode())
        write_atomically(path.with_suffix(".json"), text.encode())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
    return path


def _told(seconds: float) -> str:
    return "an unknown time" if math.isnan(seconds) else duration(seconds)
