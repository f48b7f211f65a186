"""The rows of a benchmark: as a table, a picture and JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedkn.machine import processor
from simulations.benchmarks.timing import geometric_mean
from simulations.whole_table import WholeTable

__all__ = ["Row", "as_json_text", "machine", "plot", "ratios", "tables"]


@dataclass(frozen=True)
class Row:
    """One case on one subject at one batch size.

    Attributes:
        case: the rival. subject: the layer's shape or the model.
        milliseconds: median time of forward and backward (or of a training step).
        ratio: median over the repetitions of its time over the baseline's in the same turn.
        saved_bytes: kept for the backward pass. peak_bytes: the most allocated at once.
        saved_ratio, peak_ratio: over the baseline's.
    """

    case: str
    subject: str
    batch_size: int
    milliseconds: float
    ratio: float
    saved_bytes: int | None
    peak_bytes: int
    saved_ratio: float | None
    peak_ratio: float


def ratios(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return for every case the geometric means of its ratios over all its rows."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    summary: dict[str, dict[str, float]] = {}
    for case, some in cases.items():
        means = {
            "time": geometric_mean([row.ratio for row in some]),
            "peak_memory": geometric_mean([row.peak_ratio for row in some]),
        }
        saved = [row.saved_ratio for row in some if row.saved_ratio]
        if saved:
            means["saved_activations"] = geometric_mean(saved)
        summary[case] = {**means, "rows": len(some)}
    return summary


def tables(rows: Sequence[Row], baseline: str) -> list[WholeTable]:
    """Return the geometric means over all rows, and where there are several subjects over each."""
    subjects = list(dict.fromkeys(row.subject for row in rows))
    views = [
        _table(subject, [r for r in rows if r.subject == subject], baseline)
        for subject in subjects
        if len(subjects) > 1
    ]
    return [*views, _table("all" if len(subjects) > 1 else subjects[0], rows, baseline)]


def _table(title: str, rows: Sequence[Row], baseline: str) -> WholeTable:
    batches = sorted({row.batch_size for row in rows})
    view = WholeTable(title=f"{title}; batch {', '.join(map(str, batches))}", title_justify="left")
    view.add_column("case")
    for heading in ("time", "kept for backward", "peak memory"):
        view.add_column(heading, justify="right")
    for case, means in sorted(ratios(rows).items(), key=lambda item: item[1]["time"]):
        saved = means.get("saved_activations")
        view.add_row(
            case,
            f"{means['time']:.2f}x",
            "" if saved is None else f"{saved:.2f}x",
            f"{means['peak_memory']:.2f}x",
            style="bold" if case == baseline else None,
        )
    view.caption = f"Geometric means of ratios to {baseline}; medians of runs taken in turn."
    return view


def as_json_text(name: str, rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Return rows, their geometric means, the settings and the machine as JSON."""
    content = {
        "benchmark": name,
        "settings": settings,
        "machine": machine(),
        "ratios": ratios(rows),
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=1)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{processor()} ({os.cpu_count()} cores)",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def plot(path: Path, rows: Sequence[Row], baseline: str) -> None:
    """Draw the time ratios, a panel for every subject, batch size along the axis."""
    import matplotlib as mpl  # noqa: PLC0415 - optional, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    subjects = list(dict.fromkeys(row.subject for row in rows))
    cases = [case for case in dict.fromkeys(row.case for row in rows) if case != baseline]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.2 * len(subjects) + 1, 3.6), layout="constrained")
        axes = figure.subplots(1, len(subjects), sharey=True, squeeze=False)[0]
        for axis, subject in zip(axes, subjects, strict=True):
            for case in cases:
                points = [r for r in rows if r.subject == subject and r.case == case]
                place = cases.index(case)
                axis.plot(
                    [str(r.batch_size) for r in points],
                    [r.ratio for r in points],
                    color=f"C{place % 10}",
                    linestyle="-" if place < 10 else "--",
                    marker="osv^D"[place % 5],
                    markersize=4,
                    label=case,
                )
            axis.axhline(1, color="black", linewidth=1, linestyle=":")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}x")
            axis.yaxis.set_minor_formatter("{x:g}x")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_title(subject)
            axis.set_xlabel("batch size")
        axes[0].set_ylabel(f"time / {baseline}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.savefig(path, dpi=150)
