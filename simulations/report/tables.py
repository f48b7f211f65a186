"""The summary of a run for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedkn.tasks.metric import Metric
from simulations.report.axes import AxisContest
from simulations.report.effects import Effect
from simulations.report.endings import convergence, ending_of
from simulations.report.entries import Entry, OwnModels, PrivacySpent
from simulations.report.power import own_powers_of, powers_of
from simulations.report.summary import RunSummary, Section, digest, summarize
from simulations.report.verdict import Contest
from simulations.runs.folder import RunFolder
from simulations.runs.statistics import Comparison

__all__ = ["digest_dict", "group_counts", "summary_dict"]


def summary_dict(run: RunFolder) -> dict[str, Any]:
    """Return the summary of a run as JSON can hold it: NaN and infinity become None.

    The values of an entry stand under the name of the section's metric (`accuracy` and
    `accuracy_by_seed`, `rmse` and `rmse_by_seed`), shares as fractions; times are milliseconds,
    sizes bytes. `differences` are those to the best mean of the same section and
    batch size, and others that are shown, without the normalizers that keep tensors on the clients;
    `own_differences` are the same for the clients' own models, of all normalizers. A section is a
    partition at one point of the further `axes`, along which `axis_differences` are all pairs.
    `power` is what the tests against the best means could find 4 times in 5 (`detectable`, by
    pair), and the seeds that it takes to find the difference `asked` for so often. `effects` are
    what each setting is worth, averaged over all others (`simulations/report/effects.py`).
    """
    (summary,) = summarize([run])
    return _run_dict(summary)


def digest_dict(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the summary of several runs in one report: each, and what they show side by side.

    In `beside`, `common` counts result cells that all runs have, `settings` are those beyond the
    axes in which cells that are common differ, `untested` says why runs are not tested against each
    other, and `differences` are all pairs of runs, all else being equal.
    """
    digested = digest(runs)
    beside = digested.beside
    return {
        "runs": [_run_dict(summary) for summary in digested.runs],
        "beside": beside
        and {
            "common": beside.common,
            "settings": {of.key: dict(of.values) for of in beside.differences},
            "untested": beside.untested,
            "verdicts": digested.verdicts,
            "differences": _axis_differences(digested.contests),
            "own_differences": _axis_differences(digested.own_contests),
        },
    }


def _run_dict(summary: RunSummary) -> dict[str, Any]:
    run = summary.folder
    return {
        "run": str(run.path),
        "name": summary.grid.name,
        "command": summary.grid.command,
        "complete": not summary.partial,
        "data": [{**entry.settings, "fingerprint": entry.summary.identity} for entry in run.data()],
        "cells": {"planned": summary.planned, "ended": summary.ended},
        "axes": summary.grid.axes,
        "partitions": [_section_dict(section) for section in summary.sections],
        "convergence": convergence(summary),
        "power": [of.to_dict() for of in powers_of(summary)],
        "own_power": [of.to_dict() for of in own_powers_of(summary)],
        "axis_verdicts": summary.axis_verdicts,
        "axis_differences": _axis_differences(summary.axis_contests),
        "own_axis_differences": _axis_differences(summary.own_axis_contests),
        "effects": _effects(summary.effects),
        "own_effects": _effects(summary.own_effects),
    }


def group_counts(entry: Entry) -> int:
    """Return the number of groups that was asked for in the entry's cells (0: the default rule)."""
    return entry.cells[0].config.normalizer.groups if entry.cells else 0


def _section_dict(section: Section) -> dict[str, Any]:
    return {
        "partition": section.partition,
        "axes": dict(section.point),
        "metric": _metric_dict(section.metric),
        "verdict": section.verdict,
        f"target_{section.metric.name}": _finite(section.target),
        "entries": [_entry_dict(entry) for entry in section.entries.values()],
        "keep_tensors": section.keepers,
        "differences": _differences(section.contests),
        "own_differences": _differences(section.own_contests),
    }


def _metric_dict(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        "higher_is_better": metric.higher_is_better,
        "lowest": _finite(metric.lowest),
        "highest": _finite(metric.highest),
        "unit": metric.unit,
    }


def _axis_differences(contests: Sequence[AxisContest]) -> list[dict[str, Any]]:
    return [
        {
            "axis": of.axis,
            "normalizer": of.held.normalizer,
            "partition": of.held.partition,
            "axes": dict(of.held.point),
            "batch_size": of.held.batch_size,
            **_comparison_dict(comparison),
        }
        for of in contests
        for comparison in of.contest.comparisons
    ]


def _effects(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    return [
        {"of": list(effect.of), "cells": effect.cells, **_comparison_dict(effect.comparison)}
        for effect in effects
    ]


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "ahead": comparison.first,
        "behind": comparison.second,
        "seeds": comparison.n,
        "difference": _finite(comparison.difference),
        "half_width": _finite(comparison.half_width),
        "low": _finite(comparison.low),
        "high": _finite(comparison.high),
        "p": _finite(comparison.p),
        "p_holm": _finite(comparison.p_holm),
        "detectable": _finite(comparison.detectable),
        "deviation": _finite(comparison.deviation),
    }


def _differences(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    return [
        {"batch_size": contest.batch_size, **_comparison_dict(comparison)}
        for contest in contests
        for comparison in (*contest.against_winner(), *contest.apart())
    ]


def _entry_dict(entry: Entry) -> dict[str, Any]:
    return {
        **_named(entry.metric, entry.accuracy.mean, entry.final),
        "normalizer": entry.normalizer,
        "groups": group_counts(entry),
        "batch_size": entry.batch_size,
        "half_width": _finite(entry.accuracy.half_width),
        "low": _finite(entry.accuracy.low),
        "high": _finite(entry.accuracy.high),
        "seeds": entry.accuracy.n,
        "planned": entry.planned,
        "lost": entry.lost,
        "untrainable": entry.untrainable,
        "ending": _ending_dict(entry),
        "learning_rates": sorted({cell.config.train.learning_rate for cell in entry.cells}),
        "rounds_to_target": _finite(entry.rounds.median),
        "reached_target": entry.rounds.reached,
        "engine": entry.engine or None,
        "devices": {cell.id: cell.devices for cell in entry.cells if cell.devices},
        "ms_per_step": _finite(entry.ms_per_step),
        "bytes_down_per_round": _finite(entry.bytes_down),
        "bytes_up_per_round": _finite(entry.bytes_up),
        "peak_bytes": _finite(entry.peak_bytes),
        "parameters": entry.parameters,
        "local_tensors": entry.local_tensors,
        "own_models": _own_dict(entry.own, entry.metric) if entry.own else None,
        "privacy": _privacy_dict(entry.privacy) if entry.privacy else None,
    }


def _ending_dict(entry: Entry) -> dict[str, Any] | None:
    """How its cells ended; None where validation examples chose nothing."""
    of = ending_of(entry)
    if of is None:
        return None
    return {
        "flat": of.flat,
        "ran_out": of.ran_out,
        "last_round": of.last,
        "best_round": of.best,
        "at_best_round": _finite(of.at_best.mean),
        "at_last_round": _finite(of.at_last.mean),
    }


def _named(metric: Metric, mean: float, by_seed: Mapping[int, float]) -> dict[str, Any]:
    """Return the values under the name of their metric; what else there is has its name first."""
    return {
        metric.name: _finite(mean),
        f"{metric.name}_by_seed": {str(seed): value for seed, value in sorted(by_seed.items())},
    }


def _own_dict(own: OwnModels, metric: Metric) -> dict[str, Any]:
    return {
        **_named(metric, own.accuracy.mean, own.final),
        "half_width": _finite(own.accuracy.half_width),
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
