"""Counts of classes, and the ratios that are made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["confusion_counts", "defined_mean", "ratio", "ratios"]


def confusion_counts(targets: Tensor, predicted: Tensor, classes: int, known: Tensor) -> Tensor:
    """Return counts by true and predicted class, (classes, classes), int64.

    `targets` and `predicted` are int64 of one shape; where `known` is False nothing is counted.
    """
    nowhere = classes * classes
    places = torch.where(known, targets * classes + predicted, nowhere)
    counts = torch.bincount(places.flatten(), minlength=nowhere + 1)
    return counts[:nowhere].view(classes, classes)


def ratios(numerators: Tensor, denominators: Tensor) -> list[float]:
    """Return each quotient of two counts (K,), NaN where there was nothing to count."""
    pairs = zip(numerators.tolist(), denominators.tolist(), strict=True)
    return [ratio(one, other) for one, other in pairs]


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient, NaN where there was nothing to count."""
    return numerator / denominator if denominator else math.nan


def defined_mean(values: list[float]) -> float:
    """Return the mean of the values that are defined, NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return ratio(math.fsum(defined), len(defined))
