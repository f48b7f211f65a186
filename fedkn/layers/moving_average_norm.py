"""Moving-average batch normalization: statistics of the last batches, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedkn.errors import UserError
from fedkn.layers.convolution import convolve
from fedkn.layers.per_channel import PerChannel, per_channel

__all__ = ["CentredConv2d", "MovingAverageNorm2d"]

_CLIP = 5.0
"""By how much a batch may be rescaled towards the running value: between 1/5 and 5."""


class MovingAverageNorm2d(PerChannel):
    """Moving-Average BatchNorm (Yan et al., ICLR 2020, arXiv 2001.06838, Algorithm 1).

    Nothing is centred: the filters before it are (`CentredConv2d`), and what is left of a batch is
    its mean square. In training, per channel of (N, C, H, W), with the mean square c_t of batch t
    over examples and pixels, s_t the mean of c over the last `window` batches (t among them), and a
    running value v::

        z = x / sqrt(s_t + eps)      r = clip(sqrt(s_t + eps) / sqrt(v + eps), 1/5, 5)
        y = gamma * r * z + beta     v <- v + momentum * (s_t - v)

    r is a constant to the gradient. Backward, with the gradient g at r z, p_t = mean(r g z) and q_t
    the mean of p over the same batches::

        dx = (r g - z q_t) / sqrt(s_t + eps)

    Through the first `warmup` batches (the buffer ``batches``, a real number) there is no window
    (s = c, q = p) and no rescaling (r = 1): that is the exact gradient of x / sqrt(c + eps). In
    evaluation ``y = gamma * x / sqrt(v + eps) + beta``, v being the buffer ``running_square``.

    The windows are working memory and no part of a state; `forget` empties them.

    Raises UserError in training where a channel holds a single number, which would be erased.
    """

    running_square: Tensor
    batches: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        window: int = 16,
        warmup: int = 100,
        momentum: float = 0.02,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, {"running_square": 1.0}, eps=eps, device=device, dtype=dtype)
        self.window, self.warmup, self.momentum = window, warmup, momentum
        # One number in a vector: arrays without dimensions have crashed Flower.
        self.register_buffer("batches", torch.zeros(1, device=device))
        self.squares = _Window(window, self.weight)
        self.projections = _Window(window, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training the windows and v move."""
        wide = self.wide(x)
        if self.training:
            y = self._moving(wide)
        else:
            y = wide * per_channel(torch.rsqrt(self.running_square + self.eps))
        return (y * per_channel(self.weight) + per_channel(self.bias)).to(x.dtype)

    def forget(self) -> None:
        """Empty the windows: what they hold are batches under other weights."""
        self.squares.empty()
        self.projections.empty()

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"{self.num_channels}, window={self.window}, warmup={self.warmup}, "
            f"momentum={self.momentum}"
        )

    def _moving(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:
            raise UserError(
                "MovingAverageNorm2d erases a batch of one 1x1 map: use a local batch of at least 2"
            )
        with torch.no_grad():
            own = x.square().mean((0, 2, 3))
            self.batches.add_(1)
            # Decided on the device, so that a recorded step decides it anew.
            cold = self.batches <= self.warmup
            square = torch.where(cold, own, self.squares.take(own))
            deviation = torch.sqrt(square + self.eps)
            ratio = deviation / torch.sqrt(self.running_square + self.eps)
            ratio = torch.where(cold, torch.ones_like(ratio), ratio.clamp(1 / _CLIP, _CLIP))
            self.running_square.lerp_(square, self.momentum)
        out: Tensor = _Averaged.apply(x, deviation, ratio, cold, self.projections)  # type: ignore[no-untyped-call]  # torch annotates it so
        return out


class CentredConv2d(nn.Conv2d):
    """Convolution with centred weights (Yan et al., arXiv 2001.06838, Sec. 4.2).

    Every filter is used without its mean over input channels and positions, so that its outputs
    have a mean of about zero. Takes `torch.nn.Conv2d`'s arguments. Raises UserError for filters of
    a single weight, which would always be zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() == 1:
            raise UserError(
                "centring makes every filter of a single weight zero: give the 1x1 convolution "
                "more than one input channel in each group"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return convolve(self, input, weight, self.bias)


class _Window(nn.Module):
    """The values (C,) of the last batches, the newest first, and how many there are."""

    values: Tensor
    count: Tensor

    def __init__(self, size: int, like: Tensor) -> None:
        super().__init__()
        zeros = like.detach().new_zeros(size, len(like))
        self.register_buffer("values", zeros, persistent=False)
        self.register_buffer("count", zeros[:, 0].sum().view(1).clone(), persistent=False)

    def take(self, value: Tensor) -> Tensor:
        """Take in a batch's value; return the mean over the batches that the window holds."""
        self.values.copy_(torch.cat([value.unsqueeze(0), self.values[:-1]]))
        self.count.add_(1).clamp_(max=len(self.values))
        return self.values.sum(0) / self.count

    def empty(self) -> None:
        """Forget all of them."""
        self.values.zero_()
        self.count.zero_()


class _Averaged(torch.autograd.Function):
    """ratio * x / deviation, whose gradient is made with the average over the last batches."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd gives them by position
        ctx: Any, x: Tensor, deviation: Tensor, ratio: Tensor, cold: Tensor, window: _Window
    ) -> Tensor:
        z = x / per_channel(deviation)
        ctx.save_for_backward(z, deviation, ratio, cold)
        ctx.window = window
        return z * per_channel(ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, deviation, ratio, cold = ctx.saved_tensors
        g = grads[0] * per_channel(ratio)
        own = (g * z).mean((0, 2, 3))
        projection = torch.where(cold, own, ctx.window.take(own))
        dx = (g - z * per_channel(projection)) / per_channel(deviation)
        return dx, None, None, None, None
