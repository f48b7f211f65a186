"""DenseNet-121 and DenseNet-20x16 (Huang et al., CVPR 2017, arXiv 1608.06993)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkn.models.blocks import Halve, Head, network, stem
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import chain

__all__ = ["densenet20x16", "densenet121"]


class Dense(nn.Module):
    """``concatenate(x, branch(x))`` along the channels."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([x, self.branch(x)], 1)


def densenet121(spec: ModelSpec) -> nn.Module:
    """Build DenseNet-121: growth 32, bottlenecks of 128, compression 0.5."""
    channels, growth = spec.scaled(64), spec.scaled(32)
    parts = [("stem", stem(spec, channels, activation="relu", norm=True))]
    depths = (6, 12, 24, 16)
    for stage, depth in enumerate(depths, start=1):
        for place in range(1, depth + 1):
            last = (stage, place) == (len(depths), depth)
            branch = _bottleneck(spec, channels, growth, spec.ends_in_own_norm or not last)
            parts.append((f"dense{stage}_{place}", Dense(branch)))
            channels += growth
        if stage < len(depths):
            parts.append((f"transition{stage}", _transition(spec, channels, channels // 2, 1)))
            channels //= 2
    return network([*parts, ("head", Head(spec, channels, activation="relu"))])


def densenet20x16(spec: ModelSpec) -> nn.Module:
    """Build DenseNet-20x16: three blocks of five 3x3 convolutions, growth 16, no bottlenecks.

    As Nasirigerdeh et al., SaTML 2023, arXiv 2210.00053, use it, without and with KernelNorm.
    """
    make = spec.normalizer
    channels, growth = spec.scaled(32), spec.scaled(16)
    parts = [("conv1", make.conv(spec.in_channels, channels, 3, then_norm=True, padding=1))]
    for stage in (1, 2, 3):
        for place in range(1, 6):
            then_norm = spec.ends_in_own_norm or (stage, place) != (3, 5)
            branch = chain(
                before=make.norm_act(channels, "relu"),
                conv=make.conv(channels, growth, 3, then_norm=then_norm, padding=1),
            )
            parts.append((f"dense{stage}_{place}", Dense(branch)))
            channels += growth
        if stage < 3:
            parts.append((f"transition{stage}", _transition(spec, channels, channels, 3)))
    return network([*parts, ("head", Head(spec, channels, activation="relu"))])


def _bottleneck(spec: ModelSpec, channels: int, growth: int, then_norm: bool) -> nn.Module:
    make = spec.normalizer
    return chain(
        before=make.norm_act(channels, "relu"),
        conv1=make.conv_norm(channels, 4 * growth, 1, activation="relu"),
        conv2=make.conv(4 * growth, growth, 3, then_norm=then_norm, padding=1),
    )


def _transition(spec: ModelSpec, inputs: int, outputs: int, kernel_size: int) -> nn.Module:
    make = spec.normalizer
    return chain(
        before=make.norm_act(inputs, "relu"),
        conv=make.conv(
            inputs, outputs, kernel_size, then_norm=True, padding=(kernel_size - 1) // 2
        ),
        pool=Halve("average"),
    )
