"""HBN: a learned mixture of batch and global statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import HybridBatchNorm2d, Moments
from fedkn.normalizers.frozen import is_at_rest
from fedkn.normalizers.pooled import PooledNormalizer, moment_role
from fedkn.normalizers.rule import Forward, TensorRole
from fedkn.normalizers.statistics_pass import measure

__all__ = ["HBNNormalizer"]


@dataclass(frozen=True)
class HBNNormalizer(PooledNormalizer):
    """Hybrid BatchNorm: each client learns how far to trust the batch, channel by channel.

    In training ``mu = (1 - a) mu_g + a mu_B`` and the variance alike, a = sigmoid(alpha) learned
    and kept by the client; evaluation, of the global model and of a client's own, is on mu_g and
    var_g alone. The statistics are updated apart from the parameters: a pass over all the
    client's images with the weights at rest, whose moments the server pools by the law of total
    variance, as in FBN.

    It departs from the authors' code in three ways. The pass follows the local training, so that
    the statistics belong to the weights that are averaged with them; theirs precedes it, on the
    weights received, and is repeated before each evaluation, which would take another exchange
    of messages. What is measured is what the layers are given, of all images in batches of 64;
    theirs is the mixture that they normalize by, of the first 64 images. And the pooled moments
    replace the server's (`pooling_momentum` 1, as in their evaluation; in training theirs move by
    0.002 a round, which leaves a short run on the initial ones).

    Federation rule: gamma and beta averaged, the statistics pooled, alpha local. A batch of one is
    trained on: the global part of the mixture keeps the image from being erased.
    """

    name: ClassVar[str] = "hbn"
    title: ClassVar[str] = "HBN"
    paper: ClassVar[str] = "Chen et al., ICML 2025, arXiv 2505.21877"
    statistics: ClassVar[str] = "the batch and all pixels, per channel, mixed with the global ones"
    not_for: ClassVar[str] = (
        "Clients that take part once or twice, whose mixture stays close to where it was "
        "initialised; devices for which one more pass over all their images is dear; DP-SGD, "
        "which needs gradients of single examples."
    )
    affine: ClassVar[bool] = True
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    pooling_momentum: float = 1.0

    def norm(self, channels: int) -> nn.Module:
        """Return HybridBatchNorm2d."""
        return HybridBatchNorm2d(channels)

    def end_training(self, model: nn.Module, forward: Forward, round: int) -> None:
        """Put the moments of the client's data in the place of the global statistics."""
        del round
        layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, HybridBatchNorm2d) and not is_at_rest(layer)
        ]
        moments: dict[nn.Module, Moments] = {
            layer: Moments(layer.num_channels, layer.running_mean.device) for layer in layers
        }
        measure(model, moments, forward)
        for layer in layers:
            moments[layer].write(layer.running_mean, layer.running_var)

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share weight and bias, pool the statistics, keep the mixing factor on the client."""
        del round
        if not isinstance(module, HybridBatchNorm2d):
            return None
        return TensorRole.LOCAL if tensor == "mixing" else moment_role(tensor)
