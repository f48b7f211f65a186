"""One row of the report: a normalizer at a batch size on a partition, digested over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from fedkn.tasks.metric import Metric
from simulations.runs.metric import judged_by
from simulations.runs.records import CellRecord
from simulations.runs.results import ClientEvaluation
from simulations.runs.statistics import (
    Interval,
    RoundsToTarget,
    mean_interval,
    rounds_to_target,
    summarize_rounds,
)

__all__ = ["Entry", "OwnModels", "PrivacySpent", "entry_of"]


@dataclass(frozen=True)
class OwnModels:
    """The clients' own models on the clients' own images after the last round.

    `final` is the mean over the clients by seed, and `accuracy` (the metric's value, whatever the
    metric is) its mean over seeds. `worst_tenth`
    (of the clients) and `spread` (standard deviation over the clients) are means over seeds.
    `failed` counts the clients that could not be evaluated, over all seeds.
    """

    final: dict[int, float]
    accuracy: Interval
    worst_tenth: float
    spread: float
    failed: int


@dataclass(frozen=True)
class PrivacySpent:
    """Epsilon of (epsilon, `delta`)-differential privacy of examples, at the end of the cells.

    Over the `clients` of all cells that have trained. Infinite without noise. `secret`: whether
    batches and noise were drawn from the operating system. `forgotten`: how many times a client
    lost the account of what it had spent, so that its figure is too low.
    """

    largest: float
    median: float
    clients: int
    delta: float
    secret: bool
    forgotten: int


@dataclass(frozen=True)
class Entry:
    """One normalizer at one batch size on one partition, at one point of the further axes.

    `final` is the global model's value of `metric` after the last round by seed, of completed cells
    alone, and `accuracy` its mean, whatever the metric is; `reached`, the first round that is as
    good as the target, of failed cells too: they did not reach it, if they did not before they
    failed. Costs are medians over the cells that have any, NaN where none has. `own` and `privacy`
    are None where there is nothing to tell.
    """

    normalizer: str
    batch_size: int
    metric: Metric
    planned: int
    cells: list[CellRecord]
    final: dict[int, float]
    accuracy: Interval
    reached: dict[int, int | None]
    rounds: RoundsToTarget
    ms_per_step: float
    bytes_down: float
    bytes_up: float
    peak_bytes: float
    parameters: int | None
    own: OwnModels | None
    privacy: PrivacySpent | None

    @property
    def bytes_per_round(self) -> float:
        """Bytes sent and received by the server in a round, whole cohort."""
        return self.bytes_down + self.bytes_up

    @property
    def engine(self) -> str:
        """The engines that trained the cells, as a report names them; empty if none did."""
        trained = [cell for cell in self.cells if cell.status != "untrainable"]
        return ", ".join(sorted({cell.config.engine for cell in trained}))

    @property
    def untrainable(self) -> bool:
        """Whether the normalizer cannot train with such batches."""
        return any(cell.status == "untrainable" for cell in self.cells)

    @property
    def lost(self) -> int:
        """Cells that have ended without a result and will have none."""
        return self.ended - len(self.final)

    @property
    def ended(self) -> int:
        """Cells that have ended, in whatever way."""
        return sum(cell.status != "unfinished" for cell in self.cells)

    @property
    def local_tensors(self) -> int:
        """How many of the model's tensors never leave the clients, as far as is known."""
        return max((cell.local_tensors or 0 for cell in self.cells), default=0)

    def curves(self) -> list[dict[int, float]]:
        """Return values by round of the completed cells; of the others while none is."""
        completed = [cell for cell in self.cells if cell.status == "completed"]
        curves = (c.values(c.config.evaluation.split) for c in completed or self.cells)
        return [curve for curve in curves if curve]


def entry_of(
    normalizer: str, batch_size: int, planned: int, cells: list[CellRecord], metric: Metric
) -> Entry:
    """Return the entry of `cells`, of which `planned` or more are to come.

    `metric` is that of cells that were not evaluated, and tell none.
    """
    if any(cell.evaluations for cell in cells):
        metric = judged_by(cells)
    final, reached = {}, {}
    for cell in cells:
        curve = cell.values(cell.config.evaluation.split)
        # Not the last that is found: a log may have lost lines.
        last = curve.get(cell.result_round, math.nan)
        if cell.status == "completed" and math.isfinite(last):
            final[cell.config.seed] = last
        if cell.status in ("completed", "failed") and not math.isnan(cell.target):
            reached[cell.config.seed] = rounds_to_target(curve, cell.target, metric)
    timed = [cell for cell in cells if sum(r.steps for r in cell.rounds)]
    rounds = [entry for cell in cells for entry in cell.rounds]
    return Entry(
        normalizer=normalizer,
        batch_size=batch_size,
        metric=metric,
        planned=max(planned, len(cells)),
        cells=cells,
        final=final,
        accuracy=mean_interval(list(final.values()), metric.lowest, metric.highest),
        reached=reached,
        rounds=summarize_rounds(list(reached.values())),
        ms_per_step=_median(
            1000 * sum(r.train_seconds for r in cell.rounds) / sum(r.steps for r in cell.rounds)
            for cell in timed
        ),
        bytes_down=_median(r.bytes_down for r in rounds),
        bytes_up=_median(r.bytes_up for r in rounds),
        peak_bytes=_median(cell.peak_bytes for cell in cells if cell.peak_bytes is not None),
        parameters=next((c.parameters for c in cells if c.parameters is not None), None),
        own=_own_models(cells, metric),
        privacy=_privacy(cells),
    )


def _own_models(cells: Sequence[CellRecord], metric: Metric) -> OwnModels | None:
    by_seed = {
        cell.config.seed: evaluation
        for cell in cells
        if cell.status == "completed" and (evaluation := _evaluated(cell)) is not None
    }
    if not by_seed:
        return None
    final = {seed: evaluation.mean for seed, evaluation in by_seed.items()}
    return OwnModels(
        final=final,
        accuracy=mean_interval(list(final.values()), metric.lowest, metric.highest),
        worst_tenth=fmean(evaluation.worst_tenth for evaluation in by_seed.values()),
        spread=fmean(evaluation.deviation for evaluation in by_seed.values()),
        failed=sum(len(evaluation.failed) for evaluation in by_seed.values()),
    )


def _evaluated(cell: CellRecord) -> ClientEvaluation | None:
    """The cell's client evaluation, if any client answered and it is of the cell's split."""
    found = cell.client_evaluation
    if found is None or found.split != cell.config.evaluation.split or not found.clients:
        return None
    return found


def _privacy(cells: Sequence[CellRecord]) -> PrivacySpent | None:
    spent = [epsilon for cell in cells for epsilon in _spent(cell).values()]
    if not spent:
        return None
    settings = cells[0].config.privacy
    return PrivacySpent(
        largest=max(spent),
        median=float(median(spent)),
        clients=len(spent),
        delta=settings.delta,
        secret=settings.secret,
        forgotten=sum(len(entry.state_lost) for cell in cells for entry in cell.rounds),
    )


def _spent(cell: CellRecord) -> Mapping[int, float]:
    """Epsilon by client: what is spent does not grow less, also where a client has lost count."""
    spent: dict[int, float] = {}
    for entry in cell.rounds:
        for client, epsilon in entry.epsilon.items():
            spent[client] = max(epsilon, spent.get(client, 0.0))
    return spent


def _median(values: Iterable[float]) -> float:
    every = list(values)
    return float(median(every)) if every else math.nan
