"""Train for something of your own: how wide a digit is, judged within a tolerance.

A task is a loss for each example and metrics as sums over examples, which are exact whatever the
batch size is and wherever the examples lie. The learning rate, tests and report follow its metric.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

import fedkn
from fedkn.data.sources import load
from fedkn.tasks import Metric, Task


def widths() -> tuple[Tensor, Tensor]:
    """Return the embedded digits, and how many columns of each have ink."""
    digits = load("digits").train
    ink = digits.inputs.float().amax(dim=(1, 2)) > 128
    return digits.inputs, ink.float().sum(1)


class Width(Task):
    """A number for each image; an answer counts if it is off by less than `tolerance`."""

    metrics = (Metric("within", lowest=0.0, highest=1.0, unit="%"),)
    least_loss = 0.0

    def __init__(self, tolerance: float = 0.5) -> None:
        self._tolerance = tolerance

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (N,)."""
        return torch.nn.functional.smooth_l1_loss(outputs[:, 0], targets, reduction="none")

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of examples, and of those that are within the tolerance."""
        close = (outputs[:, 0] - targets).abs() < self._tolerance
        return {"close": close.sum(), "all": torch.tensor(len(targets))}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metric of all examples."""
        return {"within": int(sums["close"]) / int(sums["all"])}


if __name__ == "__main__":
    result = fedkn.compare(
        source="own_task:widths",
        task={"name": "own_task:Width", "options": {"tolerance": 1.0}},
        model={"name": "resnet8", "width": 4},
        normalizer=["kernel", "group"],
        batch_size=4,
        seeds=1,
        learning_rate=[0.01, 0.03],
        partition="iid",
        clients=4,
        cohort=2,
        rounds=2,
        train={"local_steps": 10},
    )
    print(result.cells[["cell", "learning_rate", "metric", "value"]].to_string(index=False))
    print(result.learning_rates[["normalizer", "learning_rate", "value", "chosen"]])
