"""What the kernels for 3x3 convolutions have in common: which layers and maps they could take."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from fedkn.layers import circumstances
from fedkn.layers.native import library

__all__ = ["plain"]


def plain(x: object, layer: nn.Conv2d) -> TypeGuard[Tensor]:
    """Whether x are eager float32 maps on the CPU, channels last, and the layer a plain one.

    Plain: 3x3 with padding 1, stride 1 and one group.
    """
    return (
        layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and isinstance(x, Tensor)
        and circumstances.eager()
        and x.dim() == 4
        and x.shape[1] == layer.in_channels
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and bool(library.serves(x, layer.weight, layer.bias))
    )
