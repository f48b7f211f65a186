"""What the normalizers share whose statistics the server pools: FBN and HBN."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fedkn.errors import UserError
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.rule import FederationRule, TensorRole

__all__ = ["PooledNormalizer", "moment_role"]


class PooledNormalizer(Normalizer):
    """A normalizer with the option `pooling_momentum`, above 0 and at most 1.

    It is the weight of a round's pooled moments against those that the server holds (1: they
    replace). In round t it is at least 1/t: a running mean over the first rounds, in which what the
    statistics were initialised to weighs nothing.
    """

    pooling_momentum: float

    def __post_init__(self) -> None:
        if not 0 < self.pooling_momentum <= 1:
            raise UserError(
                f"pooling_momentum = {self.pooling_momentum!r} of normalizer '{self.name}' must be "
                "above 0 and at most 1"
            )

    @property
    def label(self) -> str:
        """Title and momentum."""
        return f"{self.title} (pooling momentum {self.pooling_momentum:g})"

    def federation_rule(self, model: nn.Module, round: int = 1) -> FederationRule:
        """Return the role of every tensor, and the weight of what is pooled in `round`."""
        rule = super().federation_rule(model, round)
        return replace(rule, pooling_weight=max(self.pooling_momentum, 1 / round))


def moment_role(tensor: str) -> TensorRole:
    """Return MEAN and VARIANCE for running statistics, SHARED for what else a norm has."""
    roles = {"running_mean": TensorRole.MEAN, "running_var": TensorRole.VARIANCE}
    return roles.get(tensor, TensorRole.SHARED)
