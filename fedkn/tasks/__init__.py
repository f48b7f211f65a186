"""What a network is trained for: its loss, its metrics, what its targets look like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedkn.data.vision import with_torchvision
from fedkn.errors import UserError
from fedkn.references import find
from fedkn.tasks.classification import CLASSIFICATION, Classification
from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.tasks.multilabel import Multilabel
from fedkn.tasks.regression import Regression
from fedkn.tasks.segmentation import Segmentation
from fedkn.tasks.task import Task
from fedkn.text import printable

__all__ = [
    "ACCURACY",
    "CLASSIFICATION",
    "TASKS",
    "Classification",
    "Metric",
    "Multilabel",
    "Regression",
    "Segmentation",
    "Task",
    "create",
]

TASKS: Mapping[str, Callable[..., Task]] = {
    "classification": Classification,
    "multilabel": Multilabel,
    "regression": Regression,
    "segmentation": Segmentation,
}


def create(name: str, **options: Any) -> Task:
    """Return the task called `name`, ours or a user's own, made with `options`.

    Raises:
        UserError: there is no such task, it does not take these options, or what it makes is none.
    """
    make = find("task", name, TASKS)
    shown = f"task '{printable(name, 120)}'"
    try:
        signature = inspect.signature(make)
        signature.bind(**options)
    except (TypeError, ValueError) as error:
        takes = ", ".join(signature.parameters) if callable(make) else ""
        raise UserError(
            f"{shown}: {printable(error, 120)}: task.options may be {takes or 'none'}"
        ) from None
    try:
        task = with_torchvision(lambda: make(**options))
    except UserError:
        raise
    except Exception as error:
        # Somebody's own code, which may fail of anything.
        raise UserError(
            f"{shown} cannot be made: {type(error).__name__}: {printable(error, 160)}"
        ) from error
    if not isinstance(task, Task):
        raise UserError(
            f"{shown} makes {printable(type(task).__name__, 60)}, no task: let it be a class "
            "derived from fedkn.tasks.Task"
        )
    metrics = getattr(task, "metrics", ())
    names = [metric.name for metric in metrics if isinstance(metric, Metric)]
    if not names or len(names) < len(metrics) or len({*names}) < len(names):
        raise UserError(
            f"{shown}: metrics must be a tuple of fedkn.tasks.Metric, each with a name of its own, "
            "the deciding one first"
        )
    return task
