"""Batch normalization under federated averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fedkn.errors import unknown_name
from fedkn.normalizers.batch_family import BatchNormFamily
from fedkn.normalizers.rule import Forward, TensorRole
from fedkn.normalizers.statistics_pass import recalibrate

__all__ = ["BatchNormalizer"]

_RULES = {
    "averaged": "statistics averaged",
    "recalibrated": "statistics recalibrated",
    "local": "statistics local",
}


@dataclass(frozen=True)
class BatchNormalizer(BatchNormFamily):
    """BatchNorm: y = (x - mu) / sqrt(var + eps) * gamma + beta, statistics over batch and pixels.

    Federation rule: gamma and beta are averaged, the integer batch counters are not. What becomes
    of the running statistics, with which the global model is evaluated, is `bn_statistics`:

    - ``averaged``: averaged like parameters, so that the global model is evaluated on what its
      clients saw. Differences between the clients' means add nothing to the variance.
    - ``recalibrated``: after its training each client passes all its images through the network
      once more and sends the moments of what its norms were given; the server pools them by the
      law of total variance. What a batch is normalized by in training is the same.
    - ``local``: they stay on the client. The global model has those it was initialised with.
    """

    name: ClassVar[str] = "batch"
    title: ClassVar[str] = "BatchNorm"
    paper: ClassVar[str] = "Ioffe & Szegedy, ICML 2015, arXiv 1502.03167, Algorithm 1"
    statistics: ClassVar[str] = "the batch and all pixels, per channel"
    not_for: ClassVar[str] = (
        "Local batches of one image, on which it cannot train; DP-SGD, which needs gradients of "
        "single examples; clients whose images differ, unless `bn_statistics` is recalibrated: "
        "averaged variances leave out how far the clients' means are apart."
    )

    rule_settings: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"bn_statistics": choice} for choice in _RULES
    )

    bn_statistics: str = "averaged"

    def __post_init__(self) -> None:
        if self.bn_statistics not in _RULES:
            raise unknown_name("bn_statistics", self.bn_statistics, _RULES)

    @property
    def label(self) -> str:
        """Title and what becomes of the running statistics."""
        return f"{self.title} ({_RULES[self.bn_statistics]})"

    def end_training(self, model: nn.Module, forward: Forward, round: int) -> None:
        """Replace the running statistics by the moments of the client's data, if so configured."""
        del round
        if self.bn_statistics == "recalibrated":
            recalibrate(model, forward)

    def _parameter_role(self, round: int) -> TensorRole:
        return TensorRole.SHARED

    def _statistic_role(self, tensor: str, round: int) -> TensorRole:
        if self.bn_statistics == "local":
            return TensorRole.LOCAL
        if self.bn_statistics == "averaged":
            return TensorRole.SHARED
        return TensorRole.MEAN if tensor == "running_mean" else TensorRole.VARIANCE
