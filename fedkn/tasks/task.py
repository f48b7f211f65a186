"""What a task is: the loss of an example, the metrics, and what targets look like.

A task of your own is a class with what `Task` leaves open, named by reference
(``task.name = "package.module:name"``); docs/tasks.md shows one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedkn.tasks.metric import Metric

__all__ = ["Task"]


class Task(ABC):
    """What networks are trained for.

    Its methods are functions of their arguments and the options that the task was made with.
    `outputs` are what a network returns for N examples, float, the example on the first axis;
    `targets` have it there too. Both are on one device, which may be a GPU.

    Attributes:
        metrics: what `values` returns, the deciding one first: by it learning rates are chosen,
            models judged and tests made.
        least_loss: of an example; clients that report less are refused.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    least_loss: ClassVar[float] = -math.inf

    @property
    def metric(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]

    def outputs(self, classes: int, shape: tuple[int, ...]) -> int:
        """Return how many outputs a network needs: for each class one, else for each number.

        Args:
            classes: how many the data name; 0 where targets have no classes.
            shape: of one example's target.
        """
        return classes or math.prod(shape)

    def check(self, targets: Tensor, classes: Sequence[str]) -> None:  # noqa: B027
        """Raise UserError, naming the fix, if `targets` (N, …) are not such as the task needs.

        Args:
            classes: the names of the classes; empty where targets have none.
        """

    def check_outputs(self, outputs: Tensor, targets: Tensor, count: int) -> None:  # noqa: B027
        """Raise UserError if a network of `count` outputs returned something of another shape."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (N,): of that example alone, whoever is beside it."""

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of `losses`, from which the gradient of a batch is taken.

        For a task that computes it faster at once; the value must be the same.
        """
        return self.losses(outputs, targets).mean()

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what the metrics are made of: sums over examples, int64 or float64.

        The sums of all examples are the sum of those of their parts, however they are divided.
        """

    @abstractmethod
    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics, by name, of all examples that went into `sums`, on the CPU.

        NaN where a metric is not defined for them.
        """

    def by_class(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return figures of each class, by name, where the task has any; NaN where undefined."""
        return {}

    def confusion(self, sums: Mapping[str, Tensor]) -> Tensor | None:
        """Return counts by true class (rows) and predicted class (columns), int64, if any."""
        return None

    def moved(self, targets: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `targets` as they are after augmentation moved the inputs' places by `move`.

        `move` does to a tensor (N, C, H, W) what was done to the inputs, zeros where there was
        nothing. Most targets have no places and stay as they are.
        """
        return targets
