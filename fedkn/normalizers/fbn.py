"""FBN: batch normalization by the pooled statistics of all clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import FederatedBatchNorm2d
from fedkn.normalizers.frozen import is_at_rest
from fedkn.normalizers.pooled import PooledNormalizer, moment_role
from fedkn.normalizers.rule import Forward, TensorRole

__all__ = ["FBNNormalizer"]


@dataclass(frozen=True)
class FBNNormalizer(PooledNormalizer):
    """Federated BatchNorm: clients train on the global statistics and measure their batches.

    ``y = gamma * (x - mu_g) / sqrt(var_g + eps) + beta`` in training as in evaluation. Meanwhile
    a client takes the mean mu_k and variance var_k of all values of the round's batches, and the
    server pools them by the law of total variance, weights w_k being the clients' examples::

        mu = sum w_k mu_k         var = sum w_k (var_k + (mu_k - mu)^2)
        mu_g' = (1 - m) mu_g + m mu        var_g' = (1 - m) var_g + m var

    Option: `pooling_momentum`, m. HybridBN's comparison, whose protocol this is, has 0.1, with
    which the initial statistics (0, 1) would keep a fifth of the weight after 15 rounds. So round t
    has ``max(m, 1/t)``: a running mean over the first rounds.

    Federation rule: gamma and beta averaged, the statistics pooled. A batch of one is trained on:
    its own statistics normalize nothing.
    """

    name: ClassVar[str] = "fbn"
    title: ClassVar[str] = "FBN"
    paper: ClassVar[str] = "Guerraoui et al., 2024, arXiv 2405.14670"
    statistics: ClassVar[str] = "all clients' batches of earlier rounds"
    not_for: ClassVar[str] = (
        "Short runs, because clients train on statistics that lag a round behind their weights: "
        "on MNIST it is among the last three in every column of docs/early-training.md."
    )
    affine: ClassVar[bool] = True
    together: ClassVar[bool] = False

    pooling_momentum: float = 0.1

    def norm(self, channels: int) -> nn.Module:
        """Return FederatedBatchNorm2d."""
        return FederatedBatchNorm2d(channels)

    def begin_training(self, model: nn.Module, round: int) -> None:
        """Forget what was measured before."""
        del round
        for layer in model.modules():
            if isinstance(layer, FederatedBatchNorm2d):
                layer.moments.reset()

    def end_training(self, model: nn.Module, forward: Forward, round: int) -> None:
        """Put the moments of the round's batches in the place of the global statistics."""
        del forward, round
        for layer in model.modules():
            if isinstance(layer, FederatedBatchNorm2d) and not is_at_rest(layer):
                layer.moments.write(layer.running_mean, layer.running_var)

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share weight and bias, pool the statistics."""
        del round
        return moment_role(tensor) if isinstance(module, FederatedBatchNorm2d) else None
