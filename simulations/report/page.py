"""The HTML report: one file that needs neither network nor JavaScript."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fedkn
from fedkn.errors import UserError
from fedkn.files import write_atomically
from fedkn.text import printable
from server.run_data import Recorded
from simulations.report import figures, formats
from simulations.report.losses import DIVIDED, LossLine, losses
from simulations.report.settings import display_name, held_equal, normalizer_notes, unequal
from simulations.report.summary import RunSummary, Section, summarize
from simulations.report.tables import group_counts
from simulations.report.trials import Trial
from simulations.report.verdict import Contest, what_own_models_show, what_the_seeds_show
from simulations.run_folder import RunFolder
from simulations.statistics import FEWEST_SEEDS

__all__ = ["build_report"]

# More than any sentence of ours, and all of most commands.
_LONGEST = 10_000
# More tables than this (one per seed) would bury the rest of the page.
_PARTITION_PICTURES = 2
# From this shade of the heat map on, white text is easier to read than black.
_WHITE_FROM = 0.68
# The functions of `formats` that are filters of the templates.
_FORMATS = (
    "accuracy",
    "epsilon",
    "milliseconds",
    "p_value",
    "percent",
    "points",
    "rounds",
    "size",
)


def build_report(runs: RunFolder | Sequence[RunFolder], to: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return its path.

    By default the report of one run is report.html in its folder, and that of several is
    report-NAME-NAME.html beside the first one's folder. Raises UserError where a run folder is
    damaged or the file cannot be written; an old report is then left as it was.
    """
    runs = [runs] if isinstance(runs, RunFolder) else list(runs)
    summaries = summarize(runs)
    if to is None and len(runs) == 1:
        to = runs[0].path / "report.html"
    elif to is None:
        to = runs[0].path.parent / f"report-{'-'.join(run.path.name for run in runs)}.html"
    page = _environment().get_template("report.html.jinja").render(_context(summaries))
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
    environment.filters["value"] = _value
    return environment


def _visible(value: object) -> str:
    """Return what a template writes of `value`: text of outside has no characters of control."""
    text = value if isinstance(value, Markup) else str(value)
    return text if isinstance(text, Markup) or text.isprintable() else printable(text, _LONGEST)


def _context(summaries: Sequence[RunSummary]) -> dict[str, Any]:
    unknown = [name for summary in summaries for s in summary.sections for name in s.normalizers]
    runs = [_run(summary, unknown) for summary in summaries]
    sections = [section for run in runs for section in run["sections"]]
    return {
        "title": " and ".join(summary.label for summary in summaries),
        "runs": runs,
        "sections": sections,
        "side_by_side": _side_by_side(sections) if len(sections) > 1 else [],
    }


def _run(summary: RunSummary, unknown: Sequence[str]) -> dict[str, Any]:
    groups = {c.config.normalizer.groups for c in summary.results} - {0}
    names = list(dict.fromkeys(name for s in summary.sections for name in s.normalizers))
    contests = [contest for section in summary.sections for contest in section.contests]
    own = [contest for section in summary.sections for contest in section.own_contests]
    return {
        "summary": summary,
        "sections": [_section(summary, section, unknown) for section in summary.sections],
        "alarms": _alarms(summary),
        "losses": [*losses(summary.results, summary.damaged_lines), *_left_out(summary)],
        "search_losses": losses([c for c in summary.cells if c.purpose == "search"], 0),
        "notes": normalizer_notes(names, groups.pop() if len(groups) == 1 else 0),
        "equal": held_equal(summary.results),
        "unequal": unequal(summary.results),
        "environment": _flat(summary.folder.environment()),
        "data": [_data_line(entry) for entry in summary.folder.data()],
        "search": _flat(summary.grid.search),
        "power": what_the_seeds_show(summary.comparisons, contests),
        "own_power": what_own_models_show(summary.own_comparisons, own),
    }


def _data_line(entry: Recorded) -> str:
    """What the run trained on, in one line; class names are left to the partition's picture."""
    summary = entry.summary
    shape = "x".join(map(str, summary.shape))
    counts = "images"
    if summary.fingerprint:
        training, validation, test = summary.fingerprint.counts
        counts = f"{training} training, {validation} validation and {test} test images"
    return (
        f"{entry.settings['source']}: {counts} of {shape} in {len(summary.classes)} classes "
        f"(fingerprint {summary.identity})"
    )


def _alarms(summary: RunSummary) -> list[str]:
    """What the head of the page warns of: all losses but those that the verdict names itself."""
    lines = losses(summary.results, summary.damaged_lines)
    known = ("untrainable cells", DIVIDED)
    return list(dict.fromkeys(line.what for line in lines if line.what not in known))


def _left_out(summary: RunSummary) -> list[LossLine]:
    """What of the data was not read, or has no image, as the run's partitions tell."""
    tables = [table for section in summary.sections for table in section.tables]
    notes = dict.fromkeys(note for table in tables for note in table.record.notes)
    return [LossLine("of the data", "", 0, "", note) for note in notes]


def _section(summary: RunSummary, section: Section, unknown: Sequence[str]) -> dict[str, Any]:
    label = f"{summary.label}, {section.partition}"
    names = [name for name in section.normalizers if _any_cell(section, name)]
    return {
        "label": section.partition,
        "long_label": label,
        "section": section,
        "verdicts": section.verdicts,
        "names": {name: _name(section, name) for name in section.normalizers},
        "styles": {
            name: figures.style_index(name, unknown) % figures.COLOURS
            for name in section.normalizers
        },
        "heat": _heat(section),
        "order": _order(section),
        "standing": _standings(section.contests),
        "own_standing": _standings(section.own_contests),
        "own_order": [(c.batch_size, _own_order(section, c)) for c in section.own_contests],
        "privacy": [entry for entry in section.entries.values() if entry.privacy],
        "legend": [(_name(section, n), Markup(figures.swatch(n, unknown, label))) for n in names],
        "curves": _curves(section, label, unknown),
        "rates": sorted({t.learning_rate for trials in section.trials.values() for t in trials}),
        "trials": {
            key: {trial.learning_rate: trial for trial in trials}
            for key, trials in section.trials.items()
        },
        "edges": {key for key, trials in section.trials.items() if _at_edge(trials)},
        "used_rates": _used_rates(section),
        "fastest": {size: _fastest(section, size) for size in section.batch_sizes},
        "pictures": [
            (table, Markup(figures.partition_picture(table.record)))
            for table in section.tables[:_PARTITION_PICTURES]
            if table.record.counts and table.record.counts[0]
        ],
    }


def _name(section: Section, name: str) -> str:
    counts = {group_counts(entry) for entry in section.entries.values() if entry.normalizer == name}
    mark = f" {formats.KEEPS}" if name in section.keepers else ""
    return display_name(name, max(counts, default=0)) + mark


def _any_cell(section: Section, name: str) -> bool:
    return any(entry.curves() for (of, _), entry in section.entries.items() if of == name)


def _order(section: Section) -> list[str]:
    """The normalizers by their mean accuracy over the batch sizes, best first, keepers last."""

    def place(name: str) -> tuple[bool, float]:
        means = [
            e.accuracy.mean for e in section.entries.values() if e.normalizer == name and e.final
        ]
        return name in section.keepers, -fmean(means) if means else 1.0

    return sorted(section.normalizers, key=place)


def _own_order(section: Section, contest: Contest) -> list[str]:
    """The normalizers by the mean of the clients' own models, those without a result last."""
    return sorted(section.normalizers, key=lambda name: -contest.means.get(name, -1.0))


def _heat(section: Section) -> dict[tuple[str, int], tuple[str, str]]:
    """Background and text colour of each entry with a result, the darker the fewer errors.

    Shades go by the logarithm of the errors: 1% and 2% are as far apart as 20% and 40%, and one
    normalizer that learns nothing does not leave the others all alike.
    """
    means = {
        key: entry.accuracy.mean
        for key, entry in section.entries.items()
        if entry.accuracy.n and entry.normalizer not in section.keepers
    }
    if not means:
        return {}
    errors = {key: -math.log(max(1 - mean, 1e-3)) for key, mean in means.items()}
    low, high = min(errors.values()), max(errors.values())
    colours = {}
    for key, error in errors.items():
        place = (error - low) / (high - low) if high > low else 1.0
        rgb = mpl.colormaps["Blues"](0.08 + 0.8 * place)[:3]
        colours[key] = (mpl.colors.to_hex(rgb), "#000" if place < _WHITE_FROM else "#fff")
    return colours


def _standings(contests: Sequence[Contest]) -> dict[tuple[str, int], str]:
    return {
        (name, contest.batch_size): _standing(contest, name)
        for contest in contests
        for name in contest.means
    }


def _standing(contest: Contest, name: str) -> str:
    """How a normalizer stands to the highest mean, in words."""
    if name == contest.winner:
        return "highest mean" if len(contest.means) > 1 else ""
    difference = f"−{formats.points(contest.means[contest.winner] - contest.means[name])} points"
    if name in contest.behind():
        return difference
    return f"{difference}, not told apart" if contest.tested else difference


def _curves(section: Section, label: str, unknown: Sequence[str]) -> list[tuple[int, Markup]]:
    by_size: dict[int, dict[str, list[dict[int, float]]]] = {}
    for (name, size), entry in section.entries.items():
        if curves := entry.curves():
            by_size.setdefault(size, {})[name] = curves
    limits = _limits([c for curves in by_size.values() for seeds in curves.values() for c in seeds])
    return [
        (
            size,
            Markup(
                figures.learning_curves(
                    curves, limits, f"learning curves at batch size {size}, {label}", unknown
                )
            ),
        )
        for size, curves in sorted(by_size.items())
    ]


def _limits(curves: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    """Accuracy limits for all panels: the steep first third may leave them below."""
    late = [
        value
        for curve in curves
        for number, value in curve.items()
        if 3 * number >= max(curve) and math.isfinite(value)
    ]
    if not late:
        return 0.0, 1.0
    margin = max(0.01, 0.05 * (max(late) - min(late)))
    return max(0.0, min(late) - margin), min(1.005, max(late) + margin)


def _at_edge(trials: Sequence[Trial]) -> bool:
    return len(trials) > 1 and (trials[0].chosen or trials[-1].chosen)


def _used_rates(section: Section) -> list[tuple[tuple[float, ...], list[str]]]:
    """The learning rates of the result cells, and who used them."""
    users: dict[tuple[float, ...], list[str]] = {}
    for (name, size), entry in section.entries.items():
        rates = tuple(sorted({cell.config.train.learning_rate for cell in entry.cells}))
        if rates:
            users.setdefault(rates, []).append(f"{name} at batch size {size}")
    return list(users.items())


def _fastest(section: Section, size: int) -> dict[str, float]:
    """The shortest time of a step of each engine: those of different ones cannot be compared."""
    fastest: dict[str, float] = {}
    for entry in section.ranked(size):
        if not math.isnan(entry.ms_per_step):
            known = fastest.get(entry.engine, math.inf)
            fastest[entry.engine] = min(known, entry.ms_per_step)
    return fastest


def _side_by_side(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per batch size and normalizer, one figure per section."""
    ranked = [(n, b) for s in sections for n in s["order"] for b in s["section"].batch_sizes]
    keys = sorted(dict.fromkeys(ranked), key=lambda key: key[1])
    rows = []
    for name, size in keys:
        entries = [s["section"].entries.get((name, size)) for s in sections]
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


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(entry) for entry in value)
    return "–" if value is None or value == "" else str(value)
