"""What stands in the place of norms in Fixup's networks: a number before and after a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedkn.layers.convolution import convolve

__all__ = ["Multiplier", "Shift", "ShiftedConv2d"]


class Shift(nn.Module):
    """Add one learned number, which begins at zero (Zhang et al., arXiv 1901.09321, Sec. 3)."""

    def __init__(self) -> None:
        super().__init__()
        # One number in a vector: arrays without dimensions have crashed Flower.
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to ``x + bias``."""
        return x + self.bias


class Multiplier(nn.Module):
    """Multiply by one learned number, which begins at one, and add another, from zero (there)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to ``gain * x + shift``."""
        return x * self.gain.view(1, 1, 1) + self.shift.view(1, 1, 1)


class ShiftedConv2d(nn.Conv2d):
    """Convolution of an input to which one learned number is added, from zero (there).

    The number is added before the input is padded. Takes `torch.nn.Conv2d`'s arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(self.weight.detach().new_zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        shifted = input + self.shift.view(1, 1, 1)
        return convolve(self, shifted, self.weight, self.bias)
