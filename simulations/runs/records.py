"""What the files of a run folder say: of the grid, of its partitions, of every cell."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fedkn.config import ExperimentConfig, PartitionConfig
from fedkn.tasks.metric import ACCURACY, Metric
from simulations.runs.model_record import ModelRecord
from simulations.runs.results import ClientEvaluation, Evaluation, Holding, Round

__all__ = ["DEPLOYED", "EXAMPLES", "CellRecord", "GridRecord", "PartitionRecord", "partition_label"]

DEPLOYED = "fedkn deploy run"
"""How the command begins that trains on a fleet's devices."""

EXAMPLES = "examples"
"""The one column of a partition's table where examples have no classes."""

Purpose = Literal["search", "result"]

Status = Literal["completed", "failed", "untrainable", "unfinished"]


@dataclass(frozen=True)
class GridRecord:
    """experiment.json: the resolved grid and the command that repeats it.

    `partitions` holds labels (see `partition_label`); `search` says how learning rates were
    searched (free form, shown in the report); `experiment` is the base experiment's dotted keys;
    `axes` has the values, as texts, of every setting that is varied further.
    """

    name: str
    command: str
    normalizers: list[str]
    batch_sizes: list[int]
    partitions: list[str]
    seeds: list[int]
    learning_rates: list[float]
    search: dict[str, Any]
    experiment: dict[str, Any]
    axes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def deployed(self) -> bool:
        """Whether a fleet's devices train it."""
        return self.command.startswith(DEPLOYED)


@dataclass(frozen=True)
class PartitionRecord:
    """One table of partition.json: `counts[client][label]` images for one partition and seed.

    Of examples without classes there is one column, `EXAMPLES`. `notes`: what of the data was left
    out, passed over or has no example, in sentences. `names`: of each client, whose examples it has
    or of which domain; empty where the data do not say.
    """

    partition: str
    seed: int
    classes: list[str]
    counts: list[list[int]]
    notes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class CellRecord:
    """One cell of the grid: what it was to do and what came of it.

    `metric` is that by which its models are judged. `rounds` and `evaluations` are sorted by round,
    each round once. `status` is "unfinished" for a cell that runs now or was killed: the two look
    alike from the outside. `local_tensors` is the number of the model's tensors that never leave
    the clients, None where no line tells;
    `client_evaluation` is that of the clients' own models, if there was one; `holdings` has by
    client what it said last, on joining, that it holds. Where validation images decided,
    `last_round` is the one after which it ended and `best_round` the best on them; `warnings` are
    of what went wrong beside the run; `devices` are those that it began and went on on, in order,
    empty where no line tells.
    """

    id: str
    purpose: Purpose
    config: ExperimentConfig
    metric: Metric = ACCURACY
    parameters: int | None = None
    tensors: int | None = None
    local_tensors: int | None = None
    model: ModelRecord | None = None
    rounds: list[Round] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    client_evaluation: ClientEvaluation | None = None
    holdings: dict[int, Holding] = field(default_factory=dict)
    peak_bytes: int | None = None
    resumes: int = 0
    status: Status = "unfinished"
    seconds: float | None = None
    weights_sha256: str | None = None
    error: str | None = None
    last_round: int | None = None
    best_round: int | None = None
    warnings: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)

    @property
    def result_round(self) -> int:
        """The round whose model is the cell's result: the best one where that was chosen."""
        if self.config.checkpoint.best and self.best_round:
            return self.best_round
        return self.last_round or self.config.rounds

    @property
    def flat(self) -> bool | None:
        """Whether it completed with a flat curve, as `evaluation.patience` has it.

        That is: so many evaluations on validation examples without a better one. False where the
        rounds ran out before; None where nothing judged it.
        """
        patience = self.config.evaluation.patience
        if self.status != "completed" or not patience or self.last_round is None:
            return None
        judged = self.values("validation")
        waited = sum((self.best_round or 0) < number <= self.last_round for number in judged)
        return self.last_round < self.config.rounds or waited >= patience

    @property
    def partition(self) -> str:
        """The label of the cell's partition."""
        return partition_label(self.config.partition)

    @property
    def target(self) -> float:
        """The value of the metric whose first round is told; NaN: none is."""
        match self.config.evaluation.target:
            case "none":
                return math.nan
            case "auto":
                return _TARGET if self.metric.name == ACCURACY.name else math.nan
            case value:
                return value

    def values(self, split: str) -> dict[int, float]:
        """Return the metric's value by round on `split`."""
        return {e.round: e.value for e in self.evaluations if e.split == split}


_TARGET = 0.8
"""Of accuracy, where nobody asked for another."""


def partition_label(partition: PartitionConfig) -> str:
    """Return the name of a partition in tables and file names: "dirichlet 0.3, 20 clients".

    Partitions that differ in a setting their scheme uses have different labels.
    """
    setting = {
        "dirichlet": f" {partition.alpha:g}",
        "shards": f" of {partition.shards_per_client}",
        "labels": f" of {partition.labels_per_client}",
        "quantity": f" {partition.sigma:g}",
    }.get(partition.scheme, "")
    label = f"{partition.scheme}{setting}, {partition.clients} clients"
    if partition.minimum != PartitionConfig().minimum:
        label += f", minimum {partition.minimum}"
    return label
