"""What numbers a client's reply may have: one table of ranges for every kind of reply.

Whoever sums, divides or weighs by a client's numbers relies on this: none is negative, none is
infinite, none is larger than the configuration makes possible, so no sum of them overflows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fedkn.config import TrainConfig
from fedkn.federation import EVALUATION_LOSS, EXAMPLES, PARTITION, TRAIN_LOSS, VALUE
from fedkn.tasks import Task
from fedkn.text import printable

__all__ = [
    "Range",
    "evaluation_ranges",
    "joining_ranges",
    "most_examples",
    "named",
    "numbers_in",
    "training_ranges",
]


class Range(NamedTuple):
    """A number of type `kind`, int or float, from `low` to `high`, both possible."""

    kind: type
    low: float
    high: float


def most_examples(
    limit: int | Literal["auto"], experiment: int, declared: Collection[int]
) -> float:
    """Return how many examples a client may have, whose number is its weight in the average.

    ``auto``: no more than there are to train on in the `experiment`, which no part of it exceeds,
    or than ten times the median of what the clients `declared` (the lower of the middle two), for
    devices with images of their own.
    """
    if limit != "auto":
        return limit or math.inf
    median = sorted(declared)[(len(declared) - 1) // 2] if declared else 0
    return max(experiment, _TIMES_THE_MEDIAN * median)


def joining_ranges() -> dict[str, Range]:
    """Return the ranges of an answer on joining; which partitions there are, the caller knows."""
    return {PARTITION: Range(int, 0, _MOST), EXAMPLES: Range(int, 1, _MOST)}


def training_ranges(
    train: TrainConfig,
    partition: int,
    examples: int,
    *,
    round_timeout: float = 0.0,
    private: bool = False,
    least_loss: float = 0.0,
) -> dict[str, Range]:
    """Return the ranges of an update of client `partition`, which declared so many `examples`.

    A device that takes smaller batches than it was asked to takes as many steps all the same, of
    more batches; a batch too small for the normalizer may be no step.

    Args:
        round_timeout: seconds that a round waits for updates. private: whether updates have an
            epsilon. least_loss: the task's.
    """
    passes = train.local_epochs * examples
    steps = train.local_epochs * -(-examples // (train.batch_size * train.accumulate))
    if train.local_steps:
        steps = min(steps, train.local_steps)
    return {
        PARTITION: Range(int, partition, partition),
        EXAMPLES: Range(int, examples, examples),
        "trained-examples": Range(int, 1, passes),
        "steps": Range(int, 1, steps),
        "skipped-batches": Range(int, 0, passes),
        "skipped-examples": Range(int, 0, passes),
        TRAIN_LOSS: _loss_range(least_loss),
        "train-seconds": Range(float, 0.0, max(round_timeout, _DAY)),
        "state-lost": Range(int, 0, 1),
        "data-changed": Range(int, 0, 1),
        "epsilon": Range(float, 0.0, _LARGEST_EPSILON if private else 0.0),
        "batch-size": Range(int, 0, train.batch_size),
    }


def evaluation_ranges(
    fraction: float, partition: int, examples: int, task: Task
) -> dict[str, Range]:
    """Return the ranges of client `partition`'s evaluation of its own model, trained for `task`.

    It declared so many `examples` to train on; how many it can keep from training follows from
    the `fraction` that it was asked to keep.
    """
    metric = task.metric
    held = math.ceil((examples + 1) * fraction / (1 - fraction)) + 1
    return {
        PARTITION: Range(int, partition, partition),
        EXAMPLES: Range(int, 1, held),
        VALUE: Range(
            float, max(metric.lowest, -_LARGEST_VALUE), min(metric.highest, _LARGEST_VALUE)
        ),
        EVALUATION_LOSS: _loss_range(task.least_loss),
    }


def _loss_range(least: float) -> Range:
    return Range(float, max(least, -_LARGEST_LOSS), _LARGEST_LOSS)


def numbers_in(record: Mapping[str, Any], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Return the numbers of a `record`, one for each of the `ranges` and no others.

    Raises:
        ValueError: naming the first that is missing, not expected, of another kind (a list, text, a
            boolean, a fraction where a count belongs), not finite, or out of its range.
    """
    if record.keys() != ranges.keys():
        raise ValueError(f"metrics missing or not expected: {named(record.keys() ^ ranges.keys())}")
    for key, (kind, low, high) in ranges.items():
        value = record[key]
        if type(value) not in (int, float) or not -math.inf < value < math.inf:
            raise ValueError(f"metric '{key}' is {printable(value, 40)}, not a finite number")
        if type(value) is not kind and kind is int:
            raise ValueError(f"metric '{key}' is {value}, not a whole number")
        if not low <= value <= high:
            possible = f"{low:g} is" if low == high else f"{low:g} to {high:g} are"
            raise ValueError(f"metric '{key}' is {_shown(value)}: {possible} possible")
    return {key: ranges[key].kind(record[key]) for key in ranges}


def named(keys: Iterable[str]) -> str:
    """Return a few of `keys`, which a client may have made up, as text."""
    listed = sorted(keys)
    more = f", … ({len(listed)} in all)" if len(listed) > _SHOWN else ""
    return ", ".join(printable(key, 40) for key in listed[:_SHOWN]) + more


def _shown(value: float) -> str:
    return f"{value:g}" if abs(value) <= sys.float_info.max else "beyond all floats"


_SHOWN = 5
_TIMES_THE_MEDIAN = 10
# Of clients, and of one client's images.
_MOST = 10**9
# Losses are computed in float32; those of a diverged model are large, and honest.
_LARGEST_LOSS = 3.5e38
# The root of what a squared float32 can be, and to spare.
_LARGEST_VALUE = 1e39
# That of any noise which can be called so.
_LARGEST_EPSILON = 1e15
# Clients of a simulation are not held to server.round_timeout.
_DAY = 86_400.0
