"""What a task's metrics and loss are of a model on examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedkn.seeds import derive
from fedkn.tasks import Task
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.precision import computing_in

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A model on examples.

    Attributes:
        value: of the task's deciding metric. loss: the mean over the examples.
        examples: how many. metrics: all of the task's, by name; NaN where undefined.
        by_class: figures of each class, by name, where the task has them.
        confusion: counts by true class (rows) and predicted class, where the task has them.
    """

    value: float
    loss: float
    examples: int
    metrics: Mapping[str, float]
    by_class: Mapping[str, list[float]] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    examples: Tensor,
    targets: Tensor,
    inputs: Inputs,
    batch_size: int,
    *,
    goal: Task,
) -> Evaluation:
    """Evaluate `model`, in evaluation mode, on `examples` (N, ...) and their `targets` (N, ...).

    All three are on one device. The model is left in the mode in which it came. What a network
    draws in evaluation follows from the number of the batch: the same at every call. Metrics are
    made of sums over the examples, so that batches do not count in them.

    Raises:
        ValueError: if there are no examples.
    """
    if not len(examples):
        raise ValueError("cannot evaluate on no examples")
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64, device=examples.device)
    parts = torch.split(examples, batch_size), torch.split(targets, batch_size)
    with (
        computing_in("float32", examples.device),
        own_draws(examples.device, derive("evaluation")) as draws,
    ):
        for number, (some, wanted) in enumerate(zip(*parts, strict=True)):
            with draws.seeded(derive("evaluation", number)):
                outputs = model(inputs(some))
            for name, part in goal.sums(outputs, wanted).items():
                sums[name] = sums[name] + part if name in sums else part
            loss += goal.losses(outputs, wanted).sum(dtype=torch.float64)
    model.train(was_training)
    here = {name: value.cpu() for name, value in sums.items()}
    metrics, confusion = goal.values(here), goal.confusion(here)
    return Evaluation(
        metrics[goal.metric.name],
        float(loss) / len(examples),
        len(examples),
        metrics,
        goal.by_class(here),
        [] if confusion is None else confusion.tolist(),
    )
