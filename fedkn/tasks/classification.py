"""One class for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError
from fedkn.tasks.counts import confusion_counts, defined_mean, ratio, ratios
from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.tasks.task import Task
from fedkn.tasks.weights import ClassWeights

__all__ = ["CLASSIFICATION", "Classification"]


class Classification(Task):
    """Targets are one class for each example, int64 (N,); outputs one score for each class (N, K).

    The loss is cross entropy in nats, of every example times the weight of its class. Accuracy
    decides; macro F1 is the mean over the classes that occur, as targets or as answers.

    Args:
        class_weights: a number for each class, in the order of the classes, each weighing equally
            if there are none. There is no ``balanced``: a device knows its own examples alone, and
            weights of its own would be another loss on every client.
    """

    metrics = (ACCURACY, Metric("macro_f1", True, 0.0, 1.0, "%"))
    least_loss = 0.0

    def __init__(self, class_weights: Sequence[float] = ()) -> None:
        self._weights = ClassWeights(class_weights)

    def check(self, targets: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless `targets` are int64 (N,), indices into at least two classes."""
        check_classes(targets, classes, "classification", axes=1)
        self._weights.check(classes)

    def check_outputs(self, outputs: Tensor, targets: Tensor, count: int) -> None:
        """Raise UserError unless there is a score for each class: (N, `count`)."""
        wanted = (len(targets), count)
        if outputs.shape != wanted:
            raise UserError(
                f"the network returns {tuple(outputs.shape)} for {len(targets)} examples, where "
                f"classification needs {wanted}, a score for each class: give its last layer "
                f"{count} outputs (num_classes)"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted cross entropy of each example, (N,)."""
        weights = self._weights.on(outputs)
        return F.cross_entropy(outputs, targets, weights, reduction="none")

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of `losses`: without weights in one fused call."""
        if self._weights:
            return self.losses(outputs, targets).mean()
        return F.cross_entropy(outputs, targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return how often each class was true, answered and both; confusion of few classes."""
        classes = outputs.shape[1]
        predicted = outputs.argmax(1)
        if classes <= _MOST_CONFUSED:
            everywhere = torch.ones_like(targets, dtype=torch.bool)
            return {"confusion": confusion_counts(targets, predicted, classes, everywhere)}
        right = targets[targets == predicted]
        parts = {"right": right, "true": targets, "predicted": predicted}
        return {name: of.bincount(minlength=classes) for name, of in parts.items()}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return accuracy and macro F1."""
        right, true, predicted = _by_class(sums)
        return {
            "accuracy": ratio(int(right.sum()), int(true.sum())),
            "macro_f1": defined_mean(ratios(2 * right, true + predicted)),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return each class's accuracy (of its own examples) and F1."""
        right, true, predicted = _by_class(sums)
        return {"accuracy": ratios(right, true), "f1": ratios(2 * right, true + predicted)}

    def confusion(self, sums: Mapping[str, Tensor]) -> Tensor | None:
        """Return counts by true and answered class, of at most 200 classes."""
        return sums.get("confusion")


CLASSIFICATION = Classification()
"""Without weights."""

_MOST_CONFUSED = 200
"""Classes up to which all pairs of them are counted."""


def check_classes(targets: Tensor, classes: Sequence[str], task: str, *, axes: int) -> None:
    """Raise UserError unless `targets` are int64 indices into two or more `classes`."""
    if targets.dtype != torch.int64 or targets.dim() != axes:
        shape = "(N,)" if axes == 1 else "(N, H, W)"
        raise UserError(
            f"task '{task}' needs targets of int64 {shape}, classes by number, but the data's are "
            f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}: set task.name to "
            "what the data are for (classification, multilabel, regression, segmentation, or your "
            "own)"
        )
    if len(classes) < 2:
        raise UserError(
            f"task '{task}' needs at least two classes, but the data name {len(classes)}: let the "
            "source name them"
        )


def _by_class(sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return, (K,) each, how often a class was right, true and answered."""
    if "confusion" not in sums:
        return sums["right"], sums["true"], sums["predicted"]
    counts = sums["confusion"]
    return counts.diagonal(), counts.sum(1), counts.sum(0)
