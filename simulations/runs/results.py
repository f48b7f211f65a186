"""What the lines of metrics.jsonl read as: rounds, evaluations, holdings, losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkn.tasks.metric import ACCURACY, Metric

__all__ = [
    "LARGEST_NUMBER",
    "ClientEvaluation",
    "ClientResult",
    "Evaluation",
    "Holding",
    "Loss",
    "Round",
    "client_evaluation_of",
    "evaluation_of",
    "holdings_of",
    "metric_of",
    "number",
    "round_of",
]

LARGEST_NUMBER = 1e39  # beyond every float32; its square is still a float


@dataclass(frozen=True)
class Loss:
    """A client that did not count in a round or an evaluation, and why.

    `client` is None where nobody could tell whose reply it was.
    """

    client: int | None
    reason: str


@dataclass(frozen=True)
class Round:
    """One round of a cell, as its server reported it. Units as in docs/run-folder.md.

    `late`: clients whose reply was not waited for. `state_lost`: clients that began anew because
    what they keep between rounds was gone. `epsilon`: what each client that trained with
    differential privacy has spent so far, infinite without noise. `batch_sizes`: those of devices
    that could not bear the one asked for. `data_changed`: clients whose own images are others than
    in their first round.
    """

    round: int
    seconds: float
    cohort: tuple[int, ...]
    updates: int
    examples: int
    steps: int
    skipped_batches: int
    skipped_examples: int
    refused: tuple[Loss, ...]
    failed: tuple[Loss, ...]
    train_loss: float
    bytes_down: int
    bytes_up: int
    train_seconds: float
    learning_rate: float
    late: tuple[int, ...] = ()
    state_lost: tuple[int, ...] = ()
    epsilon: Mapping[int, float] = field(default_factory=dict)
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    data_changed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Holding:
    """What a client said on joining that it holds to train on.

    `labels`: examples by class (an index); None where it said no more than their number.
    """

    client: int
    examples: int
    labels: Mapping[int, int] | None


@dataclass(frozen=True)
class Evaluation:
    """The global model on one split after a round.

    `value` is that of the task's deciding metric, which is among the `metrics` too; `loss` the mean
    over `examples`. Numbers that nobody has are NaN. `by_class` has by metric one value for each
    class, `confusion` the examples (of a segmentation the pixels) by true class (rows) and
    predicted class (columns); both are empty but after the last round, and where the task has none.
    """

    round: int
    split: str
    value: float
    loss: float
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ClientResult:
    """One client's own model on the `examples` that it keeps.

    `value`: of the task's deciding metric; `loss`: the mean.
    """

    client: int
    examples: int
    value: float
    loss: float


@dataclass(frozen=True)
class ClientEvaluation:
    """Every client's own model on its own examples of one split, after the last round.

    `mean`, `worst_tenth` (mean of the tenth of the clients that do worst) and `deviation` are of
    the clients' values, each client counting once; NaN where no client answered.
    """

    round: int
    split: str
    mean: float
    worst_tenth: float
    deviation: float
    loss: float
    clients: tuple[ClientResult, ...]
    failed: tuple[Loss, ...]


def round_of(line: Mapping[str, Any]) -> Round:
    """Return the round that a line of kind ``round`` tells of."""
    return Round(
        round=line["round"],
        seconds=number(line["seconds"]),
        cohort=tuple(line["cohort"]),
        updates=line["updates"],
        examples=line["examples"],
        steps=line["steps"],
        skipped_batches=line["skipped_batches"],
        skipped_examples=line["skipped_examples"],
        refused=_losses(line["refused"]),
        failed=_losses(line["failed"]),
        train_loss=number(line["train_loss"]),
        bytes_down=line["bytes_down"],
        bytes_up=line["bytes_up"],
        train_seconds=number(line["train_seconds"]),
        learning_rate=number(line["learning_rate"]),
        late=tuple(line.get("late", ())),
        state_lost=tuple(line.get("state_lost", ())),
        # JSON has no infinity: an epsilon without bound is written as null.
        epsilon={
            int(client): math.inf if value is None else float(value)
            for client, value in line.get("epsilon", {}).items()
        },
        batch_sizes={int(client): n for client, n in line.get("batch_sizes", {}).items()},
        data_changed=tuple(line.get("data_changed", ())),
    )


def holdings_of(line: Mapping[str, Any]) -> list[Holding]:
    """Return what a line of kind ``joined`` tells of the clients that have joined."""
    return [
        Holding(
            of["client"],
            of["examples"],
            None if of["labels"] is None else {int(i): n for i, n in of["labels"].items()},
        )
        for of in line["clients"]
    ]


def evaluation_of(line: Mapping[str, Any]) -> Evaluation:
    """Return what a line of kind ``evaluation`` tells of the global model."""
    return Evaluation(
        round=line["round"],
        split=line["split"],
        value=number(line["value"]),
        loss=number(line["loss"]),
        examples=line["examples"],
        metrics={name: number(value) for name, value in line["metrics"].items()},
        by_class={
            name: tuple(map(number, values)) for name, values in line.get("by_class", {}).items()
        },
        confusion=tuple(map(tuple, line.get("confusion", ()))),
    )


def client_evaluation_of(line: Mapping[str, Any]) -> ClientEvaluation:
    """Return what a line of kind ``client_evaluation`` tells of the clients' own models."""
    return ClientEvaluation(
        round=line["round"],
        split=line["split"],
        mean=number(line["mean"]),
        worst_tenth=number(line["worst_tenth"]),
        deviation=number(line["deviation"]),
        loss=number(line["loss"]),
        clients=tuple(
            ClientResult(of["client"], of["examples"], number(of["value"]), number(of["loss"]))
            for of in line["clients"]
        ),
        failed=_losses(line["failed"]),
    )


def metric_of(line: Mapping[str, Any]) -> Metric:
    """Return by what the cell is judged that a line of kind ``start`` or ``resume`` begins.

    Before tasks were told there was one.
    """
    told = line.get("task")
    if told is None:
        return ACCURACY
    lowest, highest = told["lowest"], told["highest"]
    return Metric(
        told["metric"],
        told["higher_is_better"],
        -math.inf if lowest is None else float(lowest),
        math.inf if highest is None else float(highest),
        told["unit"],
    )


def number(value: float | None) -> float:
    """Return a number of a line as a float: JSON has no NaN, and the log writes null.

    So does what is infinite, or larger than any loss can be and have a square: nobody can compute
    with it.
    """
    return math.nan if value is None or abs(value) > LARGEST_NUMBER else float(value)


def _losses(losses: Iterable[Mapping[str, Any]]) -> tuple[Loss, ...]:
    return tuple(Loss(loss["client"], loss["reason"]) for loss in losses)
