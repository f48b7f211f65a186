"""The page over many runs: one file that needs neither network nor scripts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from fedkn.errors import UserError
from fedkn.files import write_atomically
from simulations.overview import answers
from simulations.overview.collection import Collection, LeftOut
from simulations.overview.reproduced import Line, Reproduced, reproduced
from simulations.report import figures, formats
from simulations.report.axes import AxisContest
from simulations.report.csv_tables import csv_link
from simulations.report.curves import value_limits
from simulations.report.endings import convergence, not_converged
from simulations.report.facts import facts
from simulations.report.power import Power, powers, powers_of
from simulations.report.section import section_view
from simulations.report.standings import fields
from simulations.report.summary import RunSummary, summarize
from simulations.report.templates import environment
from simulations.reproduction.outcome import differences, published_figure, to_json

__all__ = [
    "Overview",
    "command_of",
    "has_results",
    "overview",
    "powers_in",
    "resume_of",
    "to_dict",
    "write_page",
]


@dataclass(frozen=True)
class Overview:
    """All that the page tells: tables that were run again, comparisons, what was left out."""

    of: Collection
    tables: list[Reproduced]
    studies: list[RunSummary]
    left_out: list[LeftOut]


def overview(of: Collection) -> Overview:
    """Digest what a folder of run folders holds; every run by itself, every table by itself.

    Comparisons of the most that compete come first.
    """
    studies, left_out = [], list(of.left_out)
    for run in of.studies:
        try:
            studies.extend(summarize([run]))
        except UserError as error:
            left_out.append(LeftOut(run.path, str(error)))
    studies.sort(key=lambda study: -max((len(s.normalizers) for s in study.sections), default=0))
    return Overview(of, [reproduced(table) for table in of.tables], studies, left_out)


def write_page(of: Overview, to: Path | None = None) -> Path:
    """Write the page, by default results.html in the folder of the runs, and return its path.

    Raises UserError where it cannot be written; an old page is then left as it was.
    """
    to = to or of.of.path / "results.html"
    here = Path(__file__).parent
    env = environment(here)
    env.globals["page_css"] = Markup((here / "overview.css").read_text(encoding="utf-8"))
    page = env.get_template("overview.html.jinja").render(_context(of, to))
    try:
        write_atomically(to, page.encode())
    except OSError as error:
        raise UserError(f"cannot write the page '{to}': {error.strerror}") from None
    return to


def to_dict(of: Overview) -> dict[str, Any]:
    """Return the answers and figures as JSON can hold them; the runs have their own dictionaries.

    In `answers`, `level` cannot be told apart from `best`, and `behind` can.
    """
    tables = [(table, answers.of_table(table)) for table in of.tables]
    found = [*((table.of.table.title, of_it) for table, of_it in tables)]
    found += [(study.label, answers.of_study(study)) for study in of.studies]
    return {
        "folder": str(of.of.path),
        "answers": [
            {
                "of": title,
                "where": answer.where,
                "best": answer.winner or None,
                "mean": None if math.isnan(answer.best.mean) else answer.best.mean,
                "outcome": answer.outcome,
                "level": answer.level,
                "behind": answer.behind,
                "notes": answer.notes,
            }
            for title, of_it in found
            for answer in of_it
        ],
        "tables": [
            {
                **to_json(table.of.table, table.of.scale, table.outcomes),
                "sentences": answers.published_sentences(table),
                "power": [power.to_dict() for power in powers_in(table)],
            }
            for table in of.tables
        ],
        "left_out": [{"folder": str(left.path), "why": left.why} for left in of.left_out],
    }


def _context(of: Overview, to: Path) -> dict[str, Any]:
    tables = [_table(table, to) for table in of.tables]
    unknown = [n for study in of.studies for s in study.sections for n in s.normalizers]
    begun = [study for study in of.studies if not has_results(study)]
    studies = [_study(study, unknown, to) for study in of.studies if has_results(study)]
    of_studies = [answer for study in studies for answer in study["answers"]]
    of_tables = [answer for table in tables for answer in table["answers"]]
    return {
        "title": of.of.path.resolve().name,
        "asked": _asked(of),
        "studies": studies,
        "tables": tables,
        "of_studies": answers.sentences(of_studies, of.studies),
        "of_tables": answers.sentences(of_tables, []),
        "left_out": of.left_out,
        "begun": begun,
        "folder": _folder(of.of.path),
    }


def _asked(of: Overview) -> list[str]:
    """What is on the page, and how much of it there is."""
    text = ["Which normalizer for clients that can only fit tiny batches?"]
    rows = sum(line.outcome.best.n > 0 for table in of.tables for line in table.lines)
    parts = []
    if of.tables:
        many = formats.count(len(of.tables), "published table")
        parts.append(f"{formats.count(rows, 'row')} of {many} (run again)")
    if of.studies:
        parts.append(formats.count(len(of.studies), "comparison"))
    cells = [cell for study in of.studies for cell in study.results]
    cells += [
        c for table in of.tables for line in table.lines if line.entry for c in line.entry.cells
    ]
    done = sum(cell.status == "completed" for cell in cells)
    hours = sum(max(c.seconds or 0.0, sum(r.seconds for r in c.rounds)) for c in cells) / 3600
    text.append(
        f"Here are {' and '.join(parts)}: {formats.count(done, 'federation')} trained to the end, "
        f"{hours:.1f} hours by the clock, each on one core or device."
    )
    return text


def has_results(study: RunSummary) -> bool:
    """Whether any cell of a comparison has ended with a result."""
    return any(entry.final for section in study.sections for entry in section.entries.values())


def _table(table: Reproduced, to: Path) -> dict[str, Any]:
    of, reading = table.of.table, table.of.table.reading
    metric = next((line.outcome.metric for line in table.lines if line.entry), None)
    name = f"{of.name}-{table.of.scale}"
    return {
        "id": f"table-{name}",
        "name": f"{of.title}, {table.of.scale} scale",
        "of": of,
        "part": of.part(table.of.scale),
        "scale": table.of.scale,
        "lines": [
            {
                "label": line.label + (f" {formats.KEEPS}" if line.keeps else ""),
                "published": published_figure(line.outcome.row),
                "reason": line.outcome.row.reason,
                "outcome": line.outcome,
                "difference": _signed(line, reading),
                "inside": line.inside(reading),
                "folder": line.folder and _link(table.of.out / line.folder, to),
            }
            for line in table.lines
        ],
        "not_run": [line.label for line in table.lines if not line.folder],
        "keeps": any(line.keeps for line in table.lines),
        "metric": metric,
        "answers": answers.of_table(table),
        "along": [],
        "sentences": answers.published_sentences(table),
        "fields": fields([c for c in table.contests if len(c.contest.means) > 1]),
        "curves": _curves(table),
        "legend": _legend(table),
        "csv": _csv(table, name),
        "differences": differences(of, table.outcomes),
        "powers": powers_in(table),
        "command": command_of(table),
        "minutes": sum(line.outcome.minutes for line in table.lines),
        "family": sum(not math.isnan(c.p) for c in table.comparisons),
    }


def powers_in(table: Reproduced) -> list[Power]:
    """Return what the tests between the rows of a table could find."""
    return powers(table.comparisons, [of.contest for of in table.contests])


def _signed(line: Line, reading: str) -> str:
    difference = line.difference(reading)
    if math.isnan(difference):
        return formats.NOTHING
    sign = "−" if difference < 0 else "+"
    return f"{sign}{formats.difference(abs(difference), line.outcome.metric)}"


def _curves(table: Reproduced) -> list[tuple[str, Markup]]:
    """A panel for each set of comparable rows, all on one axis."""
    labels = [line.label for line in table.lines]
    panels = []
    for contest, lines in zip(table.contests, table.members, strict=True):
        curves = {
            line.label: found for line in lines if line.entry and (found := line.entry.curves())
        }
        if curves:
            panels.append((contest, curves))
    every = [curve for _, of in panels for seeds in of.values() for curve in seeds]
    if not every:
        return []
    limits = value_limits(every, panels[0][0].contest.metric)
    return [(of.held.label, _panel(table, of, curves, limits, labels)) for of, curves in panels]


def _legend(table: Reproduced) -> list[tuple[str, Markup]]:
    labels = [line.label for line in table.lines]
    drawn = {line.label for lines in table.members for line in lines}
    return [(of, Markup(figures.swatch(of, labels))) for of in labels if of in drawn]


def _panel(
    table: Reproduced,
    of: AxisContest,
    curves: Mapping[str, list[dict[int, float]]],
    limits: tuple[float, float],
    labels: Sequence[str],
) -> Markup:
    lines = figures.Lines.of(curves, of.contest.metric)
    label = f"learning curves, {table.of.table.title}, {of.held.label}"
    return Markup(figures.learning_curves(lines, limits, label, labels))


def _csv(table: Reproduced, name: str) -> Markup:
    header = (
        *("row", "published", "best_mean", "best_low", "best_high", "last_mean", "last_low"),
        *("last_high", "seeds", "planned", "rounds", "minutes"),
    )
    rows = [
        (
            *(o.row.label, None if o.row.published is None else o.row.published / 100),
            *(o.best.mean, o.best.low, o.best.high, o.last.mean, o.last.low, o.last.high),
            *(o.best.n, o.planned, o.rounds, o.minutes),
        )
        for o in table.outcomes
    ]
    return csv_link(name, "table", header, rows)


def command_of(table: Reproduced) -> str:
    """Return the command that goes on with the table, or runs it anew."""
    sources = {line.outcome.source for line in table.lines if line.outcome.source}
    named = table.of.table.protocol.get("data", {}).get("source", "")
    source = "".join(f" --source {other}" for other in sorted(sources - {named})[:1])
    return (
        f"fedkn reproduce {table.of.table.name} --scale {table.of.scale}{source} --root DATA "
        f"--out {_folder(table.of.out)}"
    )


def resume_of(study: RunSummary) -> str:
    """Return the command that goes on with a comparison from its numbers."""
    return f"fedkn resume {_folder(study.folder.path)} --root DATA"


def _study(study: RunSummary, unknown: Sequence[str], to: Path) -> dict[str, Any]:
    return {
        "id": f"study-{quote(study.folder.path.name)}",
        "name": study.label,
        "summary": study,
        "facts": facts(study),
        "sections": [
            section_view(study, section, unknown)
            for section in study.sections
            if any(entry.final for entry in section.entries.values())
        ],
        "answers": answers.of_study(study),
        "along": study.axis_verdicts,
        "not_converged": not_converged(study),
        "convergence": convergence(study),
        "powers": powers_of(study),
        "folder": _link(study.folder.path, to),
        "again": resume_of(study),
        "family": sum(not math.isnan(c.p) for c in study.comparisons),
        "fields": fields(study.axis_contests),
    }


def _folder(path: Path) -> str:
    """The folder as a command names it: from where it is asked for, if it lies below."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()


def _link(folder: Path, to: Path) -> dict[str, str]:
    """A folder's name and its address, as seen from the page."""
    relative = os.path.relpath(folder.resolve(), to.resolve().parent)
    return {"name": folder.name, "href": quote(f"{Path(relative).as_posix()}/")}
