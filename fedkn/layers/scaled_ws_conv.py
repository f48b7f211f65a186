"""Convolution with scaled weight standardization, and the gain that goes with its activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedkn.errors import UserError
from fedkn.layers import circumstances, side_by_side, triton_switch
from fedkn.layers.convolution import convolve
from fedkn.layers.triton_launch import launch

__all__ = ["Gain", "ScaledWSConv2d"]


class ScaledWSConv2d(nn.Conv2d):
    """Convolution with scaled weight standardization (Brock et al., arXiv 2102.06171, eq. 1).

    Every filter w of N weights is used as ``g * (w - mean(w)) / sqrt(max(N var(w), 1e-4))``, with
    the biased variance and a gain g per output channel that is learned from 1. Inputs of variance
    1 and mean 0 so give outputs of variance 1. Takes `torch.nn.Conv2d`'s arguments. Raises
    UserError for filters of a single weight, which would always be zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() == 1:
            raise UserError(
                "scaled weight standardization makes every filter of a single weight zero: give "
                "the 1x1 convolution more than one input channel in each group"
            )
        self.gain = nn.Parameter(self.weight.detach().new_ones(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        return convolve(self, input, self.standardized_weight(), self.bias)

    def standardized_weight(self) -> Tensor:
        """Return the filters that the convolution uses, in the shape of ``weight``."""
        if _of_clients(self.weight, self.gain):
            return _standardized_of_clients(self.weight, self.gain)
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        # The paper's own bound: relative to the sum over a filter, so the same at every width.
        scale = torch.rsqrt((variance * self.weight[0].numel()).clamp(min=_LEAST))
        return (self.weight - mean) * scale * self.gain.view(-1, 1, 1, 1)


_LEAST = 1e-4


def _of_clients(weight: Tensor, gain: Tensor) -> bool:
    """Whether one launch for all clients of a vmap can be had: on a GPU."""
    return (
        circumstances.one_vmap_over(weight)
        and triton_switch.reaches(weight.device)
        and weight.dtype == gain.dtype == torch.float32
        and triton_switch.load()
    )


def _standardized_of_clients(weight: Tensor, gain: Tensor) -> Tensor:
    clients = side_by_side.clients_of(weight)
    with side_by_side.outside():
        filters, gains = (
            side_by_side.taken_out(tensor, 0, clients).contiguous() for tensor in (weight, gain)
        )
        used = _Standardized.apply(filters, gains)  # type: ignore[no-untyped-call] # torch's
    return side_by_side.put_back(used, 0)


class _Standardized(torch.autograd.Function):
    """Of filters (K, O, C/groups, KH, KW) by gains (K, O)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
        from fedkn.layers import standardization_kernels as kernels  # noqa: PLC0415 - Triton is optional

        used, mean, energy = (
            torch.empty_like(weight),
            torch.empty_like(gain),
            torch.empty_like(gain),
        )
        weights = weight[0, 0].numel()
        launch(
            kernels.standardize, (gain.numel(),), weight, gain, used, mean, energy, weights, _LEAST
        )
        ctx.save_for_backward(weight, gain, mean, energy)
        return used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        from fedkn.layers import standardization_kernels as kernels  # noqa: PLC0415 - Triton is optional

        weight, gain, mean, energy = ctx.saved_tensors
        dw, dgain = torch.empty_like(weight), torch.empty_like(gain)
        launch(
            kernels.standardize_back, (gain.numel(),),
            g.contiguous(), weight, gain, mean, energy, dw, dgain, weight[0, 0].numel(), _LEAST,
        )  # fmt: skip
        return dw, dgain


class Gain(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to ``factor * x``."""
        return self.factor * x

    def extra_repr(self) -> str:
        """Return the factor."""
        return f"{self.factor:.4f}"
