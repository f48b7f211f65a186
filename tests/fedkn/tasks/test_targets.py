"""Targets that a task cannot be trained on are refused in one line that says what to change."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from fedkn import tasks
from fedkn.errors import UserError
from fedkn.tasks import ACCURACY, Classification, Metric, Multilabel, Regression, Segmentation, Task

LABELS = torch.tensor([0, 1, 2, 1])
MASKS = torch.tensor([[[0, 1], [2, 255]]])
NUMBERS = torch.tensor([0.5, 1.0, -3.0])
NAMES = ("cat", "dog", "cow")

GOOD: list[tuple[Task, Tensor, tuple[str, ...], int]] = [
    (Classification(), LABELS, NAMES, 3),
    (Classification([1, 2, 0.5]), LABELS, NAMES, 3),
    (Multilabel(), torch.tensor([[0.0, 1.0], [1.0, 1.0]]), ("a", "b"), 2),
    (Multilabel(), torch.tensor([[0, 1], [1, 1]]), (), 2),
    (Regression(), NUMBERS, (), 1),
    (Regression(), torch.randn(4, 3), (), 3),
    (Segmentation(), MASKS, NAMES, 3),
    (Segmentation(-1), torch.tensor([[[0, 1], [2, -1]]]), NAMES, 3),
]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: type(case[0]).__name__)
def test_what_a_task_needs_is_accepted(case: tuple[Task, Tensor, tuple[str, ...], int]) -> None:
    task, targets, classes, outputs = case
    task.check(targets, classes)
    assert task.outputs(len(classes), tuple(targets.shape[1:])) == outputs


BAD: dict[str, tuple[Task, Tensor, tuple[str, ...], str]] = {
    "numbers as classes": (Classification(), NUMBERS, NAMES, "set task.name"),
    "masks as classes": (Classification(), MASKS, NAMES, "set task.name"),
    "a single class": (Classification(), LABELS, ("cat",), "at least two classes"),
    "a weight too few": (Classification([1, 2]), LABELS, NAMES, "give one for each"),
    "labels as columns": (Multilabel(), LABELS, NAMES, "a column for each label"),
    "half a label": (Multilabel(), torch.tensor([[0.5, 1.0]]), (), "0.5 is among"),
    "a name too many": (Multilabel(), torch.ones(1, 2), NAMES, "3 labels, but targets have 2"),
    "classes as numbers": (Regression(), LABELS, (), "set task.name"),
    "nan": (Regression(), torch.tensor([1.0, torch.nan]), (), "NaN or infinite"),
    "labels as masks": (Segmentation(), LABELS, NAMES, "set task.name"),
    "a class that there is not": (
        Segmentation(),
        torch.full((1, 2, 2), 7),
        NAMES,
        "set task.options.ignore_index = 7",
    ),
    "the ignored is a class": (Segmentation(1), MASKS, NAMES, "is one of the 3 classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_be_trained_on_is_refused(name: str) -> None:
    task, targets, classes, said = BAD[name]
    with pytest.raises(UserError, match=re.escape(said)) as error:
        task.check(targets, classes)
    assert "\n" not in str(error.value)


OPTIONS = {
    "an option that there is not": ("classification", {"depth": 3}, "task.options may be class_we"),
    "no options": ("multilabel", {"weights": [1]}, "task.options may be none"),
    "weights in words": ("classification", {"class_weights": "balanced"}, "a number of at least 0"),
    "a negative weight": ("classification", {"class_weights": [1, -1]}, "a number of at least 0"),
    "no weight at all": ("classification", {"class_weights": [0, 0]}, "a number of at least 0"),
    "no such loss": ("regression", {"loss": "rmse"}, "give mse, mae, huber"),
    "no width": ("regression", {"loss": "huber", "delta": 0}, "a number above 0"),
    "an index in words": ("segmentation", {"ignore_index": "void"}, "a whole number"),
    "no such task": ("clasification", {}, "did you mean 'classification'"),
    "not a task": ("fractions:Fraction", {}, "derived from fedkn.tasks.Task"),
    "an abstract one": ("fedkn.tasks:Task", {}, "abstract"),
    "no function": ("math:pi", {}, "task"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_task_that_cannot_be_made_is_named(name: str) -> None:
    task, options, said = OPTIONS[name]
    with pytest.raises(UserError, match=re.escape(said)) as error:
        tasks.create(task, **options)
    assert "\n" not in str(error.value)


class Unjudged(Classification):
    metrics = (ACCURACY, Metric("accuracy"))


class Nameless(Classification):
    metrics = ()


@pytest.mark.parametrize("name", ["Unjudged", "Nameless"])
def test_a_task_needs_metrics_that_can_be_told_apart(name: str) -> None:
    with pytest.raises(UserError, match="the deciding one first"):
        tasks.create(f"{__name__}:{name}")


def test_masks_are_moved_and_ignored_where_nothing_was() -> None:
    def shifted(images: Tensor) -> Tensor:
        return torch.nn.functional.pad(images, (1, -1))

    moved = Segmentation().moved(MASKS, shifted)
    assert moved.tolist() == [[[255, 0], [255, 2]]]
    assert Classification().moved(LABELS, shifted) is LABELS
