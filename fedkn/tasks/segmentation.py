"""One class for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError
from fedkn.tasks.classification import check_classes
from fedkn.tasks.counts import confusion_counts, defined_mean, ratio, ratios
from fedkn.tasks.metric import Metric
from fedkn.tasks.task import Task
from fedkn.tasks.weights import ClassWeights
from fedkn.text import printable

__all__ = ["Segmentation"]


class Segmentation(Task):
    """Targets are masks, a class for each pixel, int64 (N, H, W); outputs scores (N, K, H, W).

    The loss of an example is the mean over its pixels of their cross entropy in nats, each times
    the weight of its class; 0 where all of them are ignored. The mean IoU decides: intersection
    over union of the pixels of all examples together, the mean over the classes that occur, as
    targets or as answers. So is Dice, which is each class's F1. Augmentation moves the masks as it
    moves the images; where it moves nothing in, pixels are ignored.

    Args:
        ignore_index: pixels of this number belong to no class and count for nothing.
        class_weights: a number for each class, in the order of the classes.
    """

    metrics = (
        Metric("mean_iou", True, 0.0, 1.0, "%"),
        Metric("mean_dice", True, 0.0, 1.0, "%"),
        Metric("pixel_accuracy", True, 0.0, 1.0, "%"),
    )
    least_loss = 0.0

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] = ()) -> None:
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise UserError(
                f"task.options.ignore_index = {printable(ignore_index, 60)}: give a whole number"
            )
        self._ignored = ignore_index
        self._weights = ClassWeights(class_weights)

    def check(self, targets: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless `targets` are int64 (N, H, W), classes or the ignored number."""
        check_classes(targets, classes, "segmentation", axes=3)
        self._weights.check(classes)
        if 0 <= self._ignored < len(classes):
            raise UserError(
                f"task.options.ignore_index = {self._ignored} is one of the {len(classes)} classes "
                f"('{printable(classes[self._ignored], 40)}'): choose another number, such as -1"
            )
        strange = (targets < 0) | (targets >= len(classes))
        wrong = targets[strange & (targets != self._ignored)]
        if len(wrong):
            raise UserError(
                f"a mask has the number {int(wrong[0])}, but there are {len(classes)} classes (0 "
                f"to {len(classes) - 1}): mend the masks, or set task.options.ignore_index = "
                f"{int(wrong[0])} if such pixels belong to no class"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor, count: int) -> None:
        """Raise UserError unless there is a score for each class and pixel: (N, `count`, H, W)."""
        wanted = (len(targets), count, *targets.shape[1:])
        if outputs.shape != wanted:
            raise UserError(
                f"the network returns {tuple(outputs.shape)} for {len(targets)} masks, where "
                f"segmentation needs {wanted}, a score for each class and pixel: choose a network "
                "for segmentation (a model of your own, model.name = 'package.module:name')"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each example, (N,), the mean over its known pixels."""
        every = F.cross_entropy(
            outputs,
            targets,
            self._weights.on(outputs),
            ignore_index=self._ignored,
            reduction="none",
        )
        known = (targets != self._ignored).flatten(1).sum(1)
        return every.flatten(1).sum(1) / known.clamp_min(1)

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the confusion of the known pixels."""
        known = targets != self._ignored
        counts = confusion_counts(targets, outputs.argmax(1), outputs.shape[1], known)
        return {"confusion": counts}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return mean IoU, mean Dice and the share of the known pixels that are right."""
        counts = sums["confusion"]
        of_class = self.by_class(sums)
        return {
            "mean_iou": defined_mean(of_class["iou"]),
            "mean_dice": defined_mean(of_class["dice"]),
            "pixel_accuracy": ratio(int(counts.diagonal().sum()), int(counts.sum())),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return each class's IoU and Dice."""
        counts = sums["confusion"]
        right, both = counts.diagonal(), counts.sum(0) + counts.sum(1)
        return {"iou": ratios(right, both - right), "dice": ratios(2 * right, both)}

    def confusion(self, sums: Mapping[str, Tensor]) -> Tensor | None:
        """Return pixels by true and answered class."""
        return sums["confusion"]

    def moved(self, targets: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the masks moved, ignored where nothing was."""
        return move((targets - self._ignored).unsqueeze(1)).squeeze(1) + self._ignored
