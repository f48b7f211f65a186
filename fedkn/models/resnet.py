"""ResNet-18, -34 and -50 (He et al., CVPR 2016, arXiv 1512.03385): post-activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedkn.models.blocks import Head, Residual, network, stem
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import chain

__all__ = ["resnet18", "resnet34", "resnet50"]

_CHANNELS = (64, 128, 256, 512)

Branch = Callable[[ModelSpec, int, int, int], nn.Module]


def resnet18(spec: ModelSpec) -> nn.Module:
    """Build ResNet-18."""
    return _resnet(spec, _basic, (2, 2, 2, 2), 1)


def resnet34(spec: ModelSpec) -> nn.Module:
    """Build ResNet-34."""
    return _resnet(spec, _basic, (3, 4, 6, 3), 1)


def resnet50(spec: ModelSpec) -> nn.Module:
    """Build ResNet-50, with the stride in the 3x3 convolution as torchvision has it."""
    return _resnet(spec, _bottleneck, (3, 4, 6, 3), 4)


def _resnet(spec: ModelSpec, branch: Branch, depths: tuple[int, ...], expansion: int) -> nn.Module:
    channels = spec.scaled(64)
    parts = [("stem", stem(spec, channels, activation="relu", norm=True))]
    for stage, (published, depth) in enumerate(zip(_CHANNELS, depths, strict=True), start=1):
        inner = spec.scaled(published)
        for place in range(depth):
            stride = 2 if stage > 1 and place == 0 else 1
            outputs = inner * expansion
            shortcut = None
            if stride != 1 or channels != outputs:
                shortcut = spec.normalizer.conv_norm(channels, outputs, 1, stride=stride)
            block = Residual(branch(spec, channels, inner, stride), shortcut, activation="relu")
            parts.append((f"stage{stage}_block{place + 1}", block))
            channels = outputs
    return network([*parts, ("head", Head(spec, channels))])


def _basic(spec: ModelSpec, inputs: int, inner: int, stride: int) -> nn.Module:
    make = spec.normalizer
    return chain(
        unit1=make.conv_norm(inputs, inner, 3, stride=stride, padding=1, activation="relu"),
        unit2=make.conv_norm(inner, inner, 3, padding=1),
        end=make.branch_end(inner),
    )


def _bottleneck(spec: ModelSpec, inputs: int, inner: int, stride: int) -> nn.Module:
    make = spec.normalizer
    return chain(
        unit1=make.conv_norm(inputs, inner, 1, activation="relu"),
        unit2=make.conv_norm(inner, inner, 3, stride=stride, padding=1, activation="relu"),
        unit3=make.conv_norm(inner, 4 * inner, 1),
        end=make.branch_end(4 * inner),
    )
