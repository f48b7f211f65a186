"""The HTML report: one file that needs neither network nor JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fedkn
from fedkn.errors import UserError
from fedkn.files import write_atomically
from fedkn.text import printable
from simulations.report import formats
from simulations.report.csv_tables import losses_link
from simulations.report.facts import facts, judged_by
from simulations.report.losses import HARMLESS, LossLine, losses
from simulations.report.origins import origins
from simulations.report.section import section_view
from simulations.report.settings import held_equal, normalizer_notes, unequal
from simulations.report.standings import fields
from simulations.report.summary import Digest, RunSummary, digest
from simulations.report.verdict import what_own_models_show, what_the_seeds_show
from simulations.runs.folder import RunFolder
from simulations.runs.statistics import FEWEST_SEEDS

__all__ = ["build_report"]

# More than any sentence of ours, and all of most commands.
_LONGEST = 10_000
# The functions of `formats` that are filters of the templates.
_FORMATS = (
    "difference",
    "difference_unit",
    "epsilon",
    "half_width",
    "interval",
    "milliseconds",
    "p_value",
    "rounds",
    "size",
    "target",
    "value",
)


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
    page = _environment().get_template("report.html.jinja").render(_context(digested))
    try:
        write_atomically(to, page.encode())
    except OSError as error:
        raise UserError(f"cannot write the report '{to}': {error.strerror}") from None
    return to


def _environment() -> Environment:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["css"] = Markup((here / "report.css").read_text(encoding="utf-8"))
    environment.globals["version"] = fedkn.__version__
    environment.globals["fewest_seeds"] = FEWEST_SEEDS
    environment.globals["keeps_tensors"] = f"{formats.KEEPS} {formats.KEEPS_TENSORS}"
    for name in _FORMATS:
        environment.filters[name] = getattr(formats, name)
    environment.filters["setting"] = _setting
    return environment


def _visible(value: object) -> str:
    """Return what a template writes of `value`: text of outside has no characters of control."""
    text = value if isinstance(value, Markup) else str(value)
    return text if isinstance(text, Markup) or text.isprintable() else printable(text, _LONGEST)


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


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(entry) for entry in value)
    return "–" if value is None or value == "" else str(value)
