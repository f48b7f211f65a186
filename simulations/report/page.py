"""The HTML report: one file that needs neither network nor JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.files import write_atomically
from simulations.report.csv_tables import losses_link
from simulations.report.endings import convergence, not_converged
from simulations.report.facts import facts, judged_by
from simulations.report.losses import HARMLESS, LossLine, losses
from simulations.report.origins import origins
from simulations.report.power import what_own_models_show, what_the_seeds_show
from simulations.report.section import section_view
from simulations.report.settings import held_equal, normalizer_notes, unequal
from simulations.report.standings import fields
from simulations.report.summary import Digest, RunSummary, digest
from simulations.report.templates import environment
from simulations.runs.folder import RunFolder

__all__ = ["build_report"]


def build_report(runs: RunFolder | Sequence[RunFolder], to: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return its path.

    By default the report of one run is report.html in its folder, and that of several is
    report-NAME-NAME.html beside the first one's folder. Raises UserError where a run folder is
    damaged or the file cannot be written; an old report is then left as it was.
    """
    runs = [runs] if isinstance(runs, RunFolder) else list(runs)
    digested = digest(runs)
    if to is None and len(runs) == 1:
        to = runs[0].path / "report.html"
    elif to is None:
        to = runs[0].path.parent / f"report-{'-'.join(run.path.name for run in runs)}.html"
    page = environment().get_template("report.html.jinja").render(_context(digested))
    try:
        write_atomically(to, page.encode())
    except OSError as error:
        raise UserError(f"cannot write the report '{to}': {error.strerror}") from None
    return to


def _context(digested: Digest) -> dict[str, Any]:
    summaries = digested.runs
    unknown = [name for summary in summaries for s in summary.sections for name in s.normalizers]
    runs = [_run(summary, unknown) for summary in summaries]
    sections = [section for run in runs for section in run["sections"]]
    return {
        "title": " and ".join(summary.label for summary in summaries),
        "runs": runs,
        "sections": sections,
        "verdicts": digested.verdicts,
        "beside": digested.beside,
        "fields": fields(digested.contests),
        "own_fields": fields(digested.own_contests),
        "side_by_side": _side_by_side(sections) if len(sections) > 1 else [],
    }


def _run(summary: RunSummary, unknown: Sequence[str]) -> dict[str, Any]:
    groups = {c.config.normalizer.groups for c in summary.results} - {0}
    names = list(dict.fromkeys(name for s in summary.sections for name in s.normalizers))
    contests = [contest for section in summary.sections for contest in section.contests]
    own = [contest for section in summary.sections for contest in section.own_contests]
    lost = [*losses(summary.results, summary.damaged_lines), *_left_out(summary)]
    return {
        "summary": summary,
        "sections": [section_view(summary, section, unknown) for section in summary.sections],
        "alarms": _alarms(summary),
        "losses": lost,
        "losses_csv": losses_link(summary.label, lost),
        "search_losses": losses([c for c in summary.cells if c.purpose == "search"], 0),
        "notes": normalizer_notes(names, groups.pop() if len(groups) == 1 else 0),
        "origins": [of for of in origins(summary.results) if of.told],
        "equal": held_equal(summary.results),
        "unequal": unequal(summary.results, summary.grid.axes),
        "fields": fields(summary.axis_contests),
        "own_fields": fields(summary.own_axis_contests),
        "environment": _flat(summary.folder.environment()),
        "facts": facts(summary),
        "judged_by": judged_by(summary.results),
        "fingerprints": [entry.summary.identity for entry in summary.folder.data()],
        "search": _flat(summary.grid.search),
        "convergence": convergence(summary),
        "not_converged": not_converged(summary),
        "power": what_the_seeds_show(summary.comparisons, contests),
        "own_power": what_own_models_show(summary.own_comparisons, own),
    }


def _alarms(summary: RunSummary) -> list[str]:
    """What the head of the page warns of: all losses but those that the verdict names itself."""
    lines = losses(summary.results, summary.damaged_lines)
    known = ("untrainable cells", *HARMLESS)
    return list(dict.fromkeys(line.what for line in lines if line.what not in known))


def _left_out(summary: RunSummary) -> list[LossLine]:
    """What of the data was not read, or has no image, as the run's partitions tell."""
    tables = [table for section in summary.sections for table in section.tables]
    notes = dict.fromkeys(note for table in tables for note in table.record.notes)
    return [LossLine("of the data", "", 0, "", note) for note in notes]


def _side_by_side(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per batch size and normalizer, one figure per section."""
    ranked = [(n, b) for s in sections for n in s["order"] for b in s["section"].batch_sizes]
    keys = sorted(dict.fromkeys(ranked), key=lambda key: key[1])
    rows = []
    for name, size in keys:
        entries = [(s["section"].entries.get((name, size)), s["metric"]) for s in sections]
        label = next(s["names"][name] for s in sections if name in s["names"])
        rows.append({"name": label, "batch_size": size, "entries": entries})
    return rows


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
