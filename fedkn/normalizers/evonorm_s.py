"""EvoNorm-S0: normalization and activation in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import EvoNormS0
from fedkn.normalizers.factory import activation_layer
from fedkn.normalizers.group import GroupNormalizer

__all__ = ["EvoNormSNormalizer"]


@dataclass(frozen=True)
class EvoNormSNormalizer(GroupNormalizer):
    """EvoNorm-S0: ``gamma * x * sigmoid(v * x) / sqrt(var + eps) + beta``, var over a group.

    Options as for `GroupNormalizer`, and the same default, so that the two differ in the layer and
    not in the groups; the authors use the largest number up to 32 that divides the channels.

    The layer is its own activation: it takes the place of whatever activation the network asks for.
    After a convolution without one (the end of a residual branch) it is ``gamma * x + beta``, as in
    the authors' networks. A norm that stands alone, such as the final one, is the whole layer. An
    activation that follows an addition or the final norm is the network's own.

    Federation rule: gamma, beta and v are shared.
    """

    name: ClassVar[str] = "evonorm_s"
    title: ClassVar[str] = "EvoNorm-S0"
    paper: ClassVar[str] = "Liu et al., NeurIPS 2020, arXiv 2004.02967"
    statistics: ClassVar[str] = "the channels of a group and all pixels, per image; not centred"
    not_for: ClassVar[str] = (
        "Networks whose own activation matters, such as weights trained with ReLU, because it "
        "replaces it; its mean is below that of ws_group in every column of docs/early-training.md."
    )
    affine: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return EvoNormS0 with its nonlinearity: its scale and bias alone normalize nothing."""
        return EvoNormS0(self.group_count(channels), channels)

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return EvoNormS0 (``norm``), which is any `activation`."""
        nonlinear = activation_layer(activation) is not None  # refuses an unknown name
        return {"norm": EvoNormS0(self.group_count(channels), channels, nonlinear=nonlinear)}
