"""Batch Renormalization."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.layers.per_channel import PerChannel, per_channel

__all__ = ["BatchRenorm2d"]


class BatchRenorm2d(PerChannel):
    """Batch Renormalization (Ioffe, NeurIPS 2017, arXiv 1702.03275, Algorithm 1).

    In training, per channel of (N, C, H, W), with the mean mu_B and the deviation
    ``s_B = sqrt(var_B + eps)`` of the batch and running values mu and s::

        r = clip(s_B / s, 1 / r_max, r_max)     d = clip((mu_B - mu) / s, -d_max, d_max)
        y = gamma * ((x - mu_B) / s_B * r + d) + beta
        mu += momentum * (mu_B - mu)            s += momentum * (s_B - s)

    r and d are constants to the gradient. In evaluation ``y = gamma * (x - mu) / s + beta``.
    Without the clips, training would normalize by mu and s as well.

    The bounds are a pure function of the number of batches seen (the buffer ``batches``): BatchNorm
    (r_max 1, d_max 0) up to ``ramp / 8``, then linear, d_max to its full value at ``5 / 8 ramp``
    and r_max at ``ramp``. With ramp 40000 that is the paper's schedule. ``batches`` is a real
    number, so that it can be averaged over clients as the running values are.

    Raises UserError in training where a channel holds a single number, which would be erased.
    """

    running_mean: Tensor
    running_deviation: Tensor
    batches: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        ramp: int = 40_000,
        momentum: float = 0.01,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        begin = {"running_mean": 0.0, "running_deviation": 1.0}
        super().__init__(num_channels, begin, eps=eps, device=device, dtype=dtype)
        self.r_max, self.d_max, self.ramp, self.momentum = r_max, d_max, ramp, momentum
        # One number in a vector: arrays without dimensions have crashed Flower.
        self.register_buffer("batches", torch.zeros(1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training the running values move."""
        wide = self.wide(x)
        if self.training:
            y = self._renormalize(wide)
        else:
            y = (wide - per_channel(self.running_mean)) / per_channel(self.running_deviation)
        return (y * per_channel(self.weight) + per_channel(self.bias)).to(x.dtype)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max as they stand after the batches seen, each of shape (1,)."""
        t = self.batches / self.ramp
        r_part = ((t - 1 / 8) / (7 / 8)).clamp(0, 1)
        d_part = ((t - 1 / 8) / (4 / 8)).clamp(0, 1)
        return 1 + (self.r_max - 1) * r_part, self.d_max * d_part

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"{self.num_channels}, r_max={self.r_max}, d_max={self.d_max}, ramp={self.ramp}, "
            f"momentum={self.momentum}"
        )

    def _renormalize(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:
            raise UserError(
                "BatchRenorm2d erases a batch of one 1x1 map: use a local batch of at least 2"
            )
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        deviation = torch.sqrt(variance + self.eps)
        with torch.no_grad():
            r_max, d_max = self.bounds()
            r = (deviation / self.running_deviation).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / self.running_deviation).clamp(-d_max, d_max)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_deviation.lerp_(deviation, self.momentum)
            self.batches.add_(1)
        centred = (x - per_channel(mean)) / per_channel(deviation)
        return centred * per_channel(r) + per_channel(d)
