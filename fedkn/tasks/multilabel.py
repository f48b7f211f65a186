"""Any number of labels for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError
from fedkn.tasks.counts import defined_mean, ratio, ratios
from fedkn.tasks.metric import Metric
from fedkn.tasks.task import Task

__all__ = ["Multilabel"]


class Multilabel(Task):
    """Targets say of each label whether an example has it, 1 or 0, (N, K); outputs are logits.

    The loss is the binary cross entropy in nats, the mean over the labels. An example is said to
    have a label whose logit is above zero (a probability above one half). Micro F1, of all labels
    of all examples together, decides; macro F1 is the mean over the labels that occur, as targets
    or as answers; subset accuracy is the share of examples that have every label right. Average
    precision is no sum over examples, hence none of the metrics.
    """

    metrics = (
        Metric("micro_f1", True, 0.0, 1.0, "%"),
        Metric("macro_f1", True, 0.0, 1.0, "%"),
        Metric("subset_accuracy", True, 0.0, 1.0, "%"),
    )
    least_loss = 0.0

    def outputs(self, classes: int, shape: tuple[int, ...]) -> int:
        """Return one for each label."""
        return shape[0] if shape else classes

    def check(self, targets: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless `targets` are 0 or 1, (N, K), with K names of labels or none."""
        if targets.dim() != 2 or not targets.shape[1]:
            raise UserError(
                f"task 'multilabel' needs targets (N, labels) of 0 and 1, but the data's are "
                f"{tuple(targets.shape)}: let the source return a column for each label, or set "
                "task.name to what the data are for"
            )
        wrong = targets[(targets != 0) & (targets != 1)]
        if len(wrong):
            raise UserError(
                f"task 'multilabel' needs targets of 0 and 1, but {wrong[0].item():g} is among the "
                "data's: let the source say 1 of a label that an example has, else 0, or set "
                "task.name = 'regression'"
            )
        if classes and len(classes) != targets.shape[1]:
            raise UserError(
                f"the data name {len(classes)} labels, but targets have {targets.shape[1]} "
                "columns: let the source name each"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor, count: int) -> None:
        """Raise UserError unless there is a logit for each label: (N, `count`)."""
        if outputs.shape != targets.shape:
            raise UserError(
                f"the network returns {tuple(outputs.shape)} for {len(targets)} examples, where "
                f"multilabel needs {tuple(targets.shape)}, a logit for each label: give its last "
                f"layer {count} outputs (num_classes)"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross entropy of each example, (N,), the mean over its labels."""
        wanted = targets.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1)

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return by label how often it was true, answered and both; and examples, all right."""
        answered, true = outputs > 0, targets != 0
        return {
            "right": (answered & true).sum(0),
            "true": true.sum(0),
            "answered": answered.sum(0),
            "examples": true.new_ones(len(true)).sum(),
            "all_right": (answered == true).all(1).sum(),
        }

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return micro and macro F1, and subset accuracy."""
        right, either = 2 * sums["right"], sums["true"] + sums["answered"]
        return {
            "micro_f1": ratio(int(right.sum()), int(either.sum())),
            "macro_f1": defined_mean(ratios(right, either)),
            "subset_accuracy": ratio(int(sums["all_right"]), int(sums["examples"])),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Return each label's F1."""
        return {"f1": ratios(2 * sums["right"], sums["true"] + sums["answered"])}
