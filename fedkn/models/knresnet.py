"""KNResNet-18, -34 and -50: the pre-activation networks designed for KernelNorm.

Nasirigerdeh et al., "Kernel Normalized Convolutional Networks", TMLR 2024, arXiv 2205.10089. Their
2x2 kernels and odd channel counts match ResNet's number of parameters. With another normalizer
they become pre-activation ResNets: norm, activation, convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from fedkn.models.blocks import Halve, Head, PreActivationResidual, network, stem
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import Padding, chain

__all__ = ["knresnet18", "knresnet34", "knresnet50"]

# Padding of the 2x2 convolutions between stages, as (left, right, top, bottom).
_BEFORE: Padding = (1, 0, 1, 0)
_AFTER: Padding = (0, 1, 0, 1)
_WIDE: Padding = (2, 1, 2, 1)

Block = Callable[[ModelSpec, int, int, bool], nn.Module]


def knresnet18(spec: ModelSpec) -> nn.Module:
    """Build KNResNet-18."""
    last = _BEFORE if spec.low_resolution else _WIDE
    stages = [
        _stage(spec, basic, 2, 64, 256),
        [_transition(spec, 64, 256, _BEFORE)],
        _stage(spec, basic, 2, 256, 256),
        [_transition(spec, 256, 512, _AFTER)],
        _stage(spec, basic, 1, 512, 512),
        [_transition(spec, 512, 724, last)],
        _stage(spec, basic, 1, 724, 724),
    ]
    return _assemble(spec, 64, stages, 512, _final_convolution(spec, 724))


def knresnet34(spec: ModelSpec) -> nn.Module:
    """Build KNResNet-34."""
    last = _BEFORE if spec.low_resolution else _WIDE
    stages = [
        _stage(spec, basic, 4, 64, 256),
        [_transition(spec, 64, 256, _BEFORE)],
        _stage(spec, basic, 5, 256, 320),
        [_transition(spec, 256, 512, _AFTER)],
        _stage(spec, basic, 3, 512, 640),
        [_transition(spec, 512, 512, last)],
        _stage(spec, basic, 2, 512, 843),
    ]
    return _assemble(spec, 64, stages, 512, _final_convolution(spec, 512))


def knresnet50(spec: ModelSpec) -> nn.Module:
    """Build KNResNet-50."""
    stages = [
        _stage(spec, bottleneck, 4, 256, 64),
        [_transition(spec, 256, 512, _BEFORE)],
        _stage(spec, bottleneck, 5, 512, 128),
        [_transition(spec, 512, 810, _AFTER)],
        _stage(spec, bottleneck, 4, 810, 201),
        [_transition(spec, 810, 2048, 0, kernel_size=1)],
        _stage(spec, bottleneck_1x1, 2, 2048, 512, last=True),
    ]
    return _assemble(spec, 256, stages, 2048)


def basic(spec: ModelSpec, channels: int, inner: int, then_norm: bool) -> nn.Module:
    """Return the basic block: 2x2 convolutions with padding 1, then 0."""
    make = spec.normalizer
    branch = chain(
        conv1=make.conv_norm(channels, inner, 2, padding=1, activation="relu"),
        conv2=make.conv(inner, channels, 2, then_norm=then_norm),
        end=make.branch_end(channels),
    )
    return PreActivationResidual(make.norm_act(channels, "relu"), branch)


def bottleneck(spec: ModelSpec, channels: int, inner: int, then_norm: bool) -> nn.Module:
    """Return the bottleneck block with 2x2, 3x3 and 2x2 kernels."""
    make = spec.normalizer
    branch = chain(
        conv1=make.conv_norm(channels, inner, 2, padding=1, activation="relu"),
        conv2=make.conv_norm(inner, inner, 3, padding=1, activation="relu"),
        conv3=make.conv(inner, channels, 2, then_norm=then_norm),
        end=make.branch_end(channels),
    )
    return PreActivationResidual(make.norm_act(channels, "relu"), branch)


def bottleneck_1x1(spec: ModelSpec, channels: int, inner: int, then_norm: bool) -> nn.Module:
    """Return the bottleneck block with 1x1, 3x3 and 1x1 kernels."""
    make = spec.normalizer
    branch = chain(
        conv1=make.conv_norm(channels, inner, 1, activation="relu"),
        conv2=make.conv_norm(inner, inner, 3, padding=1, activation="relu"),
        conv3=make.conv(inner, channels, 1, then_norm=then_norm),
        end=make.branch_end(channels),
    )
    return PreActivationResidual(make.norm_act(channels, "relu"), branch)


def _stage(
    spec: ModelSpec, block: Block, count: int, channels: int, inner: int, *, last: bool = False
) -> list[tuple[str, nn.Module]]:
    """Return `count` blocks; `last`: nothing but the head comes after them."""
    outer, mid = spec.scaled(channels), spec.scaled(inner)
    then_norm = spec.ends_in_own_norm or not last
    return [("block", block(spec, outer, mid, then_norm or i + 1 < count)) for i in range(count)]


def _transition(
    spec: ModelSpec, in_channels: int, out_channels: int, padding: Padding, kernel_size: int = 2
) -> tuple[str, nn.Module]:
    inputs, outputs = spec.scaled(in_channels), spec.scaled(out_channels)
    make = spec.normalizer
    return "transition", chain(
        before=make.norm_act(inputs, "relu"),
        conv=make.conv(inputs, outputs, kernel_size, then_norm=True, padding=padding),
        pool=_halve(spec),
    )


def _halve(spec: ModelSpec) -> nn.Module:
    # For 224x224 the last convolution has no padding: on a single pixel it would have no output.
    return Halve(least=2 if spec.low_resolution else 4)


def _final_convolution(spec: ModelSpec, in_channels: int) -> nn.Module:
    inputs, outputs = spec.scaled(in_channels), spec.scaled(512)
    make = spec.normalizer
    conv = make.conv(
        inputs,
        outputs,
        2,
        then_norm=spec.ends_in_own_norm,
        padding=1 if spec.low_resolution else 0,
    )
    return chain(pool=_halve(spec), before=make.norm_act(inputs, "relu"), conv=conv)


def _assemble(
    spec: ModelSpec,
    stem_channels: int,
    stages: list[list[tuple[str, nn.Module]]],
    head_channels: int,
    final: nn.Module | None = None,
) -> nn.Module:
    parts = [("stem", stem(spec, spec.scaled(stem_channels), activation=None, norm=False))]
    parts += _numbered(part for stage in stages for part in stage)
    if final is not None:
        parts.append(("final", final))
    parts += [("head", Head(spec, spec.scaled(head_channels), activation="relu"))]
    return network(parts)


def _numbered(parts: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    counts: dict[str, int] = {}
    for kind, part in parts:
        counts[kind] = counts.get(kind, 0) + 1
        yield f"{kind}{counts[kind]}", part
