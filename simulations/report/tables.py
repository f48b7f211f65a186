"""The summary of a run for the terminal, and for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedkn.text import printable
from simulations.report import formats
from simulations.report.entries import Entry, OwnModels, PrivacySpent
from simulations.report.settings import display_name
from simulations.report.summary import RunSummary, Section, summarize
from simulations.report.verdict import Contest
from simulations.runs.folder import RunFolder

__all__ = ["group_counts", "summary_dict", "summary_table"]


def summary_table(run: RunFolder) -> Table:
    """Return the table normalizer x batch size of a run; one block per partition and batch size."""
    (summary,) = summarize([run])
    # No lines between columns: a run of one partition then fits 80 columns.
    table = Table(
        title=Text(
            f"{printable(summary.grid.name)}: test accuracy after the last round, "
            "mean ± 95% interval",
            style="table.title",
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    several = len(summary.sections) > 1
    if several:
        table.add_column("partition")
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("normalizer", no_wrap=True)
    # Where there would be no room for them, costs are left to the report.
    columns = _OWN_COLUMNS if _has_own(summary) else _COLUMNS
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name in ("accuracy", "own models"))
    for section in summary.sections:
        for batch_size in section.batch_sizes:
            table.add_section()
            for entry in section.ranked(batch_size):
                row = [_text(section.partition)] if several else []
                mark = formats.KEEPS if entry.normalizer in section.keepers else ""
                figures = _figures(entry)
                table.add_row(
                    *row,
                    str(batch_size),
                    _text(entry.normalizer + mark),
                    *(figures.get(name, formats.NOTHING) for name in columns),
                )
    caption = "\n".join(printable(line, 1000) for line in _caption(summary))
    table.caption = Text(caption, style="table.caption")
    return table


def summary_dict(run: RunFolder) -> dict[str, Any]:
    """Return the summary of a run as JSON can hold it: NaN and infinity become None.

    Accuracies are fractions, times milliseconds, sizes bytes; `differences` are those to the
    highest mean of the same partition and batch size, and others that are shown, without the
    normalizers that keep tensors on the clients; `own_differences` are the same for the clients'
    own models, of all normalizers.
    """
    (summary,) = summarize([run])
    return {
        "run": str(run.path),
        "name": summary.grid.name,
        "command": summary.grid.command,
        "complete": not summary.partial,
        "data": [{**entry.settings, "fingerprint": entry.summary.identity} for entry in run.data()],
        "cells": {"planned": summary.planned, "ended": summary.ended},
        "partitions": [_section_dict(section) for section in summary.sections],
    }


def group_counts(entry: Entry) -> int:
    """Return the number of groups that was asked for in the entry's cells (0: the default rule)."""
    return entry.cells[0].config.normalizer.groups if entry.cells else 0


_COLUMNS = ("accuracy", "seeds", "rounds to target", "ms/step", "bytes/round")
_OWN_COLUMNS = ("accuracy", "own models", "worst tenth", "spread", "seeds", "rounds to target")


def _text(outside: str) -> Text:
    """Text, because a bracket in a name of the run folder is not markup."""
    return Text(printable(outside))


def _has_own(summary: RunSummary) -> bool:
    return any(section.own_contests for section in summary.sections)


def _caption(summary: RunSummary) -> list[str]:
    targets = {section.target for section in summary.sections if not math.isnan(section.target)}
    entries = [entry for section in summary.sections for entry in section.entries.values()]
    names = {display_name(entry.normalizer, group_counts(entry)): entry for entry in entries}
    grouped = [name for name, entry in names.items() if name != entry.normalizer]
    lines = [f"Target accuracy: {', '.join(f'{100 * target:g}%' for target in sorted(targets))}."]
    if not targets:
        lines = []
    engines = sorted({entry.engine for entry in entries if entry.engine})
    if len(engines) > 1 and not _has_own(summary):
        lines.append(f"ms/step: {' and '.join(engines)} trained some each; do not compare across.")
    if grouped:
        lines.append(f"Built as {', '.join(grouped)}.")
    if _has_own(summary):
        lines.append(
            "Own models: every client's own model on its own images; mean over clients, worst "
            "tenth of them, deviation between them."
        )
    if any(section.keepers for section in summary.sections):
        lines.append(f"{formats.KEEPS} {formats.KEEPS_TENSORS}")
    return [*lines, summary.partial] if summary.partial else lines


def _figures(entry: Entry) -> dict[str, str]:
    """The texts of an entry's row by the name of the column."""
    if entry.untrainable and not entry.final:
        return {"accuracy": "untrainable", "seeds": f"0/{entry.planned}"}
    figures = {
        "accuracy": formats.accuracy(entry.accuracy),
        "seeds": f"{entry.accuracy.n}/{entry.planned}",
        "rounds to target": formats.rounds(entry.rounds),
        "ms/step": formats.milliseconds(entry.ms_per_step),
        "bytes/round": formats.size(entry.bytes_per_round),
    }
    if entry.own:
        figures |= {
            "own models": formats.accuracy(entry.own.accuracy),
            "worst tenth": formats.percent(entry.own.worst_tenth),
            "spread": formats.points(entry.own.spread),
        }
    return figures


def _section_dict(section: Section) -> dict[str, Any]:
    return {
        "partition": section.partition,
        "verdict": section.verdict,
        "target_accuracy": _finite(section.target),
        "entries": [_entry_dict(entry) for entry in section.entries.values()],
        "keep_tensors": section.keepers,
        "differences": _differences(section.contests),
        "own_differences": _differences(section.own_contests),
    }


def _differences(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    return [
        {
            "batch_size": contest.batch_size,
            "ahead": comparison.first,
            "behind": comparison.second,
            "seeds": comparison.n,
            "difference": _finite(comparison.difference),
            "half_width": _finite(comparison.half_width),
            "p": _finite(comparison.p),
            "p_holm": _finite(comparison.p_holm),
            "detectable": _finite(comparison.detectable),
        }
        for contest in contests
        for comparison in (*contest.against_winner(), *contest.apart())
    ]


def _entry_dict(entry: Entry) -> dict[str, Any]:
    return {
        "normalizer": entry.normalizer,
        "groups": group_counts(entry),
        "batch_size": entry.batch_size,
        "accuracy": _finite(entry.accuracy.mean),
        "half_width": _finite(entry.accuracy.half_width),
        "accuracy_by_seed": {str(seed): value for seed, value in sorted(entry.final.items())},
        "seeds": entry.accuracy.n,
        "planned": entry.planned,
        "lost": entry.lost,
        "untrainable": entry.untrainable,
        "learning_rates": sorted({cell.config.train.learning_rate for cell in entry.cells}),
        "rounds_to_target": _finite(entry.rounds.median),
        "reached_target": entry.rounds.reached,
        "engine": entry.engine or None,
        "ms_per_step": _finite(entry.ms_per_step),
        "bytes_down_per_round": _finite(entry.bytes_down),
        "bytes_up_per_round": _finite(entry.bytes_up),
        "peak_bytes": _finite(entry.peak_bytes),
        "parameters": entry.parameters,
        "local_tensors": entry.local_tensors,
        "own_models": _own_dict(entry.own) if entry.own else None,
        "privacy": _privacy_dict(entry.privacy) if entry.privacy else None,
    }


def _own_dict(own: OwnModels) -> dict[str, Any]:
    return {
        "accuracy": _finite(own.accuracy.mean),
        "half_width": _finite(own.accuracy.half_width),
        "accuracy_by_seed": {str(seed): value for seed, value in sorted(own.final.items())},
        "seeds": own.accuracy.n,
        "worst_tenth": _finite(own.worst_tenth),
        "spread": _finite(own.spread),
        "failed_clients": own.failed,
    }


def _privacy_dict(spent: PrivacySpent) -> dict[str, Any]:
    """Epsilon is None where it is unbounded."""
    return {
        "epsilon_largest": _finite(spent.largest),
        "epsilon_median": _finite(spent.median),
        "clients": spent.clients,
        "delta": spent.delta,
        "secret": spent.secret,
        "forgotten": spent.forgotten,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
