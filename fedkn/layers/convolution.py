"""3x3 convolutions by fedkn's kernels wherever those serve: of our layers, and of anybody's."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from fedkn.layers import first_convolution as images
from fedkn.layers import winograd as maps
from fedkn.layers.native import library

__all__ = ["convolve", "convolve_by_kernels"]


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's convolution of x by `weight` and `bias` in place of its own.

    x is (N, C, H, W) or (C, H, W), the result is what PyTorch's convolution returns, by its kernel
    or, equal to rounding, by one of ours.
    """
    kernel = images.first_convolution if images.serves(layer, x) else None
    if kernel is None and maps.serves(layer, x):
        kernel = maps.winograd
    if kernel is None or not library.serves(x, weight, bias):
        plain: Tensor = nn.Conv2d._conv_forward(layer, x, weight, bias)
        return plain
    y = kernel(layer, x, weight)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def convolve_by_kernels(model: nn.Module) -> None:
    """Let every 3x3 convolution of `model` that is PyTorch's go by `convolve`, in place.

    Of subclasses those that only make other filters. Types, names, tensors and hooks stay what they
    are.
    """
    for layer in model.modules():
        if (
            isinstance(layer, nn.Conv2d)
            and type(layer)._conv_forward is nn.Conv2d._conv_forward
            and layer.kernel_size == (3, 3)
        ):
            layer._conv_forward = _ByKernels(layer)  # type: ignore[method-assign, assignment]  # called as that is


class _ByKernels:
    """What a layer has for `_conv_forward`.

    It refers to its layer weakly: in a cycle a network would keep its memory until the garbage
    collector comes by.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self._of(), x, weight, bias)

    def __reduce__(self) -> tuple[type[_ByKernels], tuple[nn.Conv2d]]:
        return _ByKernels, (self._of(),)

    def _of(self) -> nn.Conv2d:
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the convolution that this one is a shallow copy of is gone")
        return layer
