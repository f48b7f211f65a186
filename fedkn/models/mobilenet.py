"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381)."""

from __future__ import annotations

from torch import nn

from fedkn.models.blocks import Head, Residual, network
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import chain

__all__ = ["mobilenet_v2"]

# Expansion, channels, blocks, stride of the first block (Table 2 of the paper).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(spec: ModelSpec) -> nn.Module:
    """Build MobileNetV2, without torchvision's dropout before the linear layer.

    Low resolution: the stem and the second stage keep their maps' size, as usual for 32x32.
    """
    make = spec.normalizer
    channels = spec.scaled(32)
    stride = 1 if spec.low_resolution else 2
    first = make.conv_norm(
        spec.in_channels, channels, 3, stride=stride, padding=1, activation="relu6"
    )
    parts = [("stem", first)]
    for stage, (expansion, published, depth, first_stride) in enumerate(_STAGES, start=1):
        outputs = spec.scaled(published)
        for place in range(1, depth + 1):
            stride = first_stride if place == 1 else 1
            if spec.low_resolution and stage == 2:
                stride = 1
            block = _inverted(spec, channels, outputs, expansion, stride)
            parts.append((f"stage{stage}_block{place}", block))
            channels = outputs
    outputs = spec.scaled(1280)
    parts.append(("conv_last", make.conv_norm(channels, outputs, 1, activation="relu6")))
    return network([*parts, ("head", Head(spec, outputs))])


def _inverted(spec: ModelSpec, inputs: int, outputs: int, expansion: int, stride: int) -> nn.Module:
    make = spec.normalizer
    inner = inputs * expansion
    residual = stride == 1 and inputs == outputs
    branch = chain(
        expand=None if expansion == 1 else make.conv_norm(inputs, inner, 1, activation="relu6"),
        depthwise=make.conv_norm(
            inner, inner, 3, stride=stride, padding=1, groups=inner, activation="relu6"
        ),
        project=make.conv_norm(inner, outputs, 1),
        end=make.branch_end(outputs) if residual else None,
    )
    return Residual(branch) if residual else branch
