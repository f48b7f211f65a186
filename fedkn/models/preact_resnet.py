"""PreactResNet-18 (He et al., ECCV 2016, arXiv 1603.05027) and the kernel-normalized ResNet-13."""

from __future__ import annotations

from torch import nn

from fedkn.models.blocks import Halve, Head, PreActivationResidual, network, stem
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import chain

__all__ = ["knresnet13", "preact_resnet18"]


def preact_resnet18(spec: ModelSpec) -> nn.Module:
    """Build PreactResNet-18: norm and activation before each 3x3 convolution."""
    channels = spec.scaled(64)
    parts = [("stem", stem(spec, channels, activation=None, norm=False))]
    for stage, published in enumerate((64, 128, 256, 512), start=1):
        outputs = spec.scaled(published)
        for place in (1, 2):
            block = _block(
                spec,
                channels,
                outputs,
                stride=2 if stage > 1 and place == 1 else 1,
                activation="relu",
                then_norm=spec.ends_in_own_norm or (stage, place) != (4, 2),
            )
            parts.append((f"stage{stage}_block{place}", block))
            channels = outputs
    return network([*parts, ("head", Head(spec, channels, activation="relu"))])


def knresnet13(spec: ModelSpec) -> nn.Module:
    """Build KNResNet-13: Mish, 3x3 kernels, four residual blocks, three pooled convolutions.

    Nasirigerdeh et al., SaTML 2023, arXiv 2210.00053.
    """
    make = spec.normalizer
    channels = spec.scaled(64)
    parts = [("conv1", make.conv(spec.in_channels, channels, 3, then_norm=True, padding=1))]
    for place, published in enumerate((64, 128, 256), start=1):
        outputs = spec.scaled(published)
        parts.append((f"residual{place}", _mish_block(spec, channels, then_norm=True)))
        pooled = chain(
            before=make.norm_act(channels, "mish"),
            conv=make.conv(channels, outputs, 3, then_norm=True, padding=1),
            pool=Halve(least=2),
        )
        parts.append((f"conv{place + 1}", pooled))
        channels = outputs
    parts.append(("residual4", _mish_block(spec, channels, then_norm=spec.ends_in_own_norm)))
    return network([*parts, ("head", Head(spec, channels, activation="mish", size=2))])


def _mish_block(spec: ModelSpec, channels: int, *, then_norm: bool) -> nn.Module:
    return _block(spec, channels, channels, stride=1, activation="mish", then_norm=then_norm)


def _block(
    spec: ModelSpec, inputs: int, outputs: int, *, stride: int, activation: str, then_norm: bool
) -> nn.Module:
    make = spec.normalizer
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = make.conv(inputs, outputs, 1, then_norm=then_norm, stride=stride)
    branch = chain(
        conv1=make.conv_norm(inputs, outputs, 3, stride=stride, padding=1, activation=activation),
        conv2=make.conv(outputs, outputs, 3, then_norm=then_norm, padding=1),
        end=make.branch_end(outputs),
    )
    return PreActivationResidual(make.norm_act(inputs, activation), branch, shortcut)
