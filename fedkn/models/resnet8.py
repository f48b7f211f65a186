"""ResNet-8, the small post-activation network of the KernelNorm privacy paper."""

from __future__ import annotations

from torch import nn

from fedkn.models.blocks import Halve, Head, Residual, network
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import chain

__all__ = ["resnet8"]


def resnet8(spec: ModelSpec) -> nn.Module:
    """Build ResNet-8: conv, conv/2, residual, conv/2, residual, pool, average 2x2, linear.

    All convolutions 3x3; the activation ends each residual branch, before the addition
    (Nasirigerdeh et al., SaTML 2023, arXiv 2210.00053).
    """
    c1, c2, c3 = spec.scaled(64), spec.scaled(128), spec.scaled(256)
    return network(
        [
            ("conv1", _unit(spec, spec.in_channels, c1)),
            ("conv2", _unit(spec, c1, c2)),
            ("pool2", Halve()),
            ("residual1", _residual(spec, c2)),
            ("conv3", _unit(spec, c2, c3)),
            ("pool3", Halve()),
            ("residual2", _residual(spec, c3)),
            ("pool4", Halve()),
            ("head", Head(spec, c3, size=2)),
        ]
    )


def _unit(spec: ModelSpec, in_channels: int, out_channels: int) -> nn.Module:
    return spec.normalizer.conv_norm(in_channels, out_channels, 3, padding=1, activation="relu")


def _residual(spec: ModelSpec, channels: int) -> nn.Module:
    branch = chain(
        unit1=_unit(spec, channels, channels),
        unit2=_unit(spec, channels, channels),
        end=spec.normalizer.branch_end(channels),
    )
    return Residual(branch)
