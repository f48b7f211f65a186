"""The summary of a run for the terminal: the facts of the run, and a table for each partition."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from fedkn.tasks.metric import Metric
from fedkn.text import printable
from simulations.report import formats
from simulations.report.endings import not_converged
from simulations.report.entries import Entry
from simulations.report.facts import facts
from simulations.report.power import Power, own_powers_of, powers_of
from simulations.report.settings import display_name
from simulations.report.summary import RunSummary, Section, summarize
from simulations.report.tables import group_counts
from simulations.runs.folder import RunFolder
from simulations.whole_table import WholeTable

__all__ = ["summary_table"]


def summary_table(run: RunFolder) -> Group:
    """Return what a run was, and tables normalizer x batch size with what came of it.

    On a terminal of 80 columns nothing is cut: long names and intervals are wrapped.
    """
    (summary,) = summarize([run])
    tables = (part for section in summary.sections for part in _section(summary, section))
    caption = "\n".join(printable(line, 1000) for line in _caption(summary))
    parts = [Text(_facts(summary)), *tables]
    return Group(*parts, *([Text(caption, style="dim")] if caption else []))


# Where there would be no room for them, costs are left to the report.
_COLUMNS = ("value", "seeds", "rounds to target", "ms/step", "bytes/round")
_OWN_COLUMNS = ("value", "own models", "worst tenth", "spread", "seeds", "rounds to target")


def _facts(summary: RunSummary) -> str:
    of = [
        f"{fact.name} {printable(fact.text)}{f' ({printable(fact.more)})' if fact.more else ''}"
        for fact in facts(summary)
    ]
    return f"{printable(summary.grid.name)}: {' · '.join(of)}"


def _section(summary: RunSummary, section: Section) -> Iterator[Text | Padding]:
    metric = section.metric
    best = any(c.config.checkpoint.best for e in section.entries.values() for c in e.cells)
    after = "the round best on validation examples" if best else "the last round"
    title = f"{metric.name} after {after}, mean and 95% interval"
    if len(summary.sections) > 1:
        title = f"{printable(section.label)}: {title}"
    table = WholeTable(
        title=Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        # No lines between columns, and little room: they then fit 80 columns.
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.keys = 2
    table.add_column("batch", justify="right")
    table.add_column("normalizer")
    columns = _OWN_COLUMNS if section.own_contests else _COLUMNS
    for name in columns:
        heading = printable(metric.name) if name == "value" else name
        table.add_column(Text(heading), justify="right")
    for batch_size in section.batch_sizes:
        table.add_section()
        for entry in section.ranked(batch_size):
            mark = formats.KEEPS if entry.normalizer in section.keepers else ""
            found = _figures(entry, metric)
            table.add_row(
                str(batch_size),
                # Text, because a bracket in a name of the run folder is not markup.
                Text(printable(entry.normalizer + mark)),
                *(found.get(name, formats.NOTHING) for name in columns),
            )
    yield Padding(table, (1, 0, 0, 0))


def _caption(summary: RunSummary) -> list[str]:
    targets = {
        formats.target(section.target, section.metric)
        for section in summary.sections
        if not math.isnan(section.target)
    }
    entries = [entry for section in summary.sections for entry in section.entries.values()]
    own = any(section.own_contests for section in summary.sections)
    names = {display_name(entry.normalizer, group_counts(entry)): entry for entry in entries}
    grouped = [name for name, entry in names.items() if name != entry.normalizer]
    lines = [f"Target: {', '.join(sorted(targets))}."] if targets else []
    engines = sorted({entry.engine for entry in entries if entry.engine})
    if len(engines) > 1 and not own:
        lines.append(f"ms/step: {' and '.join(engines)} trained some each; do not compare across.")
    if grouped:
        lines.append(f"Built as {', '.join(grouped)}.")
    if own:
        lines.append(
            "Own models: every client's own model on its own examples; mean over clients, worst "
            "tenth of them, deviation between them."
        )
    if any(section.keepers for section in summary.sections):
        lines.append(f"{formats.KEEPS} {formats.KEEPS_TENSORS}")
    lines += [f"Power: {of.short()}{_to_have(summary, of)}." for of in powers_of(summary)]
    lines += [f"Power, own models: {of.short()}." for of in own_powers_of(summary)]
    late = not_converged(summary)
    return [
        *lines,
        *([f"{late}."] if late else []),
        *([summary.partial] if summary.partial else []),
    ]


# Nobody is advised to run more than these.
_SEEDS_ADVISED = 50


def _to_have(summary: RunSummary, power: Power) -> str:
    """The command that adds the seeds, where a run can be given more of them and needs some."""
    seeds = power.seeds_needed
    there = len(summary.grid.seeds)
    if not there < seeds <= _SEEDS_ADVISED or summary.grid.deployed:
        return ""
    if not (summary.folder.path / "grid.json").exists():
        return ""
    return f": fedkn resume {summary.folder.path} --seeds {seeds:.0f}"


def _figures(entry: Entry, metric: Metric) -> dict[str, str]:
    """The texts of an entry's row by the name of the column."""
    if entry.untrainable and not entry.final:
        return {"value": "untrainable", "seeds": f"0/{entry.planned}"}
    figures = {
        "value": formats.interval(entry.accuracy, metric),
        "seeds": f"{entry.accuracy.n}/{entry.planned}",
        "rounds to target": formats.rounds(entry.rounds),
        "ms/step": formats.milliseconds(entry.ms_per_step),
        "bytes/round": formats.size(entry.bytes_per_round),
    }
    if entry.own:
        figures |= {
            "own models": formats.interval(entry.own.accuracy, metric),
            "worst tenth": formats.value(entry.own.worst_tenth, metric),
            "spread": formats.difference(entry.own.spread, metric),
        }
    return figures
