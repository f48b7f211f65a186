"""The layer factory: networks are written once, in four blocks that every normalizer fills.

=====================  =======================  =================
block                  most normalizers         kernel
=====================  =======================  =================
``conv``               conv                     KNConv
``conv_norm``          conv, norm, activation   KNConv, activation
``norm_act``           norm, activation         activation
``norm``               norm                     KernelNorm 1x1
=====================  =======================  =================

A post-activation network (ResNet, VGG, MobileNet) is a chain of ``conv_norm``; a pre-activation one
(PreactResNet, DenseNet, KNResNet) is ``conv``, then branches of ``norm_act``, ``conv_norm``,
``conv``, then ``norm``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, TypedDict, Unpack

from torch import nn

from fedkn.errors import unknown_name

__all__ = ["ACTIVATIONS", "ConvOptions", "LayerFactory", "Padding", "activation_layer", "chain"]

Padding = int | tuple[int, int] | tuple[int, int, int, int]

# Never in place: an in-place activation would change what a dense block concatenates, and what
# the kernel normalized layers saved for their backward pass.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "mish": nn.Mish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class ConvOptions(TypedDict, total=False):
    """The settings of a convolution that have a default: stride 1, padding 0, dilation, groups 1.

    Padding is a number, a pair (height, width), or four numbers (left, right, top, bottom).
    """

    stride: int | tuple[int, int]
    padding: Padding
    dilation: int | tuple[int, int]
    groups: int


class LayerFactory(ABC):
    """Makes a network's convolutions and norms. Most need `norm` alone."""

    affine: ClassVar[bool]
    """Whether its norms learn a scale and a bias per channel (then the convolution has none)."""

    _conv_layer: ClassVar[type[nn.Conv2d]] = nn.Conv2d

    @abstractmethod
    def norm(self, channels: int) -> nn.Module:
        """Return the layer for a place where a norm stands alone, for maps (N, channels, H, W)."""

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        then_norm: bool = False,
        **options: Unpack[ConvOptions],
    ) -> nn.Module:
        """Return a convolution. It has a bias unless a norm with one follows (`then_norm`)."""
        padding, before = _split_padding(options.get("padding", 0))
        layer = self._conv_layer(
            in_channels,
            out_channels,
            kernel_size,
            stride=options.get("stride", 1),
            padding=padding,
            dilation=options.get("dilation", 1),
            groups=options.get("groups", 1),
            bias=not (then_norm and self.affine),
        )
        if before is None:
            return layer
        return nn.Sequential(OrderedDict(padding=before, conv=layer))

    def conv_norm(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        activation: str | None = None,
        **options: Unpack[ConvOptions],
    ) -> nn.Module:
        """Return convolution, norm and activation (children ``conv``, ``norm``, ``activation``)."""
        conv = self.conv(in_channels, out_channels, kernel_size, then_norm=True, **options)
        return chain(conv=conv, **self._norm_act(out_channels, activation))

    def norm_act(self, channels: int, activation: str | None) -> nn.Module:
        """Return what stands before a pre-activation convolution: norm and activation."""
        return chain(**self._norm_act(channels, activation))

    def before_head(self) -> nn.Module | None:
        """Return what stands between the last pooling and the linear layer, on (N, features)."""
        return None

    def branch_end(self, channels: int) -> nn.Module | None:
        """Return what ends a residual branch, before its (N, channels, H, W) are added."""
        del channels
        return None

    def begin(self, branches: Sequence[nn.Module], head: nn.Linear) -> None:
        """Change the weights that were drawn for a network, in place; most leave them.

        `branches` are the residual ones in their order, each with its `branch_end`, `head` is the
        last layer. Not called where weights are given.
        """
        del branches, head

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return norm and activation by the names of the children; layers may be one, or more."""
        return {"norm": self.norm(channels), "activation": activation_layer(activation)}


def activation_layer(name: str | None) -> nn.Module | None:
    """Return the activation called `name`, None for None; an unknown name raises UserError."""
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def chain(**layers: nn.Module | None) -> nn.Module:
    """Return the layers in sequence, under the names given, without those that are None."""
    present = ((name, layer) for name, layer in layers.items() if layer is not None)
    return nn.Sequential(OrderedDict(present))


def _split_padding(padding: Padding) -> tuple[int | tuple[int, int], nn.Module | None]:
    # torch's convolution pads alike on opposite sides; what is not alike is padded beforehand.
    if isinstance(padding, int):
        return padding, None
    if len(padding) == 2:
        return padding, None
    left, right, top, bottom = padding
    if left == right and top == bottom:
        return (top, left), None
    return 0, nn.ZeroPad2d((left, right, top, bottom))
