"""Layers and maps for the tests of kernels for 3x3 convolutions, channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["maps", "plain_layer"]


def plain_layer(channels: int, filters: int, **options: Any) -> nn.Conv2d:
    """Return a convolution as those kernels take it, but for `options`."""
    settings = {"kernel_size": 3, "padding": 1, "bias": False} | options
    layer: nn.Conv2d = nn.Conv2d(channels, filters, **settings)
    return layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # as torch has it


def maps(*shape: int) -> Tensor:
    """Return maps (N, C, H, W), the same for a shape each time."""
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last)
