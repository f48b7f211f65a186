"""What Opacus is taught of fedkn's layers, and mended of its own.

Opacus falls back to functorch for layers it does not know, which breaks on an empty Poisson batch
and on dropout inside a layer. `register` teaches it the KNConv layers
(`fedkn.layers.kernel.backends.opacus`).

It also puts another rule in place of Opacus' own for Conv2d. That one (as of 1.6) reads its input
with the strides of a contiguous tensor: in channels_last, the layout of most of fedkn's networks,
its gradients are silently wrong and mix the examples of a batch. Padding other than with zeros it
ignores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers.kernel.backends import opacus as kernel
from fedkn.layers.kernel.layer import KNConv1d, KNConv2d
from fedkn.layers.layer_norm import LayerNorm2d

__all__ = ["register"]


def register() -> None:
    """Register the per-sample gradients of KNConv1d, KNConv2d, Conv2d and LayerNorm2d with Opacus.

    Call it before a model is made private. Raises UserError if Opacus is not installed.
    """
    try:
        from opacus.grad_sample import register_grad_sampler  # noqa: PLC0415 - optional
        from opacus.grad_sample.group_norm import (  # noqa: PLC0415 - optional
            compute_group_norm_grad_sample,
        )
    except ImportError as error:
        raise UserError("Opacus is not installed: pip install 'fedkn[privacy]'") from error
    register_grad_sampler([KNConv1d, KNConv2d])(kernel.backward)
    register_grad_sampler(nn.Conv2d)(_convolution_gradients)
    register_grad_sampler(LayerNorm2d)(compute_group_norm_grad_sample)


def _convolution_gradients(
    layer: nn.Conv2d, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    x, g = activations[0], backprops.flatten(2)
    if not len(x):
        return kernel.no_gradients(layer)
    found: dict[Tensor, Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.sum(2)
    if layer.weight.requires_grad:
        # What the layer itself pads by, for every kind of padding.
        edges = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, edges, mode=mode)
        units = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        gradient = kernel.products(g, units, layer.groups)
        found[layer.weight] = gradient.view(len(x), *layer.weight.shape)
    return found
