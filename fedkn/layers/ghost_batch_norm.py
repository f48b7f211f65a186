"""Ghost batch normalization: batch normalization of parts of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError
from fedkn.layers.per_channel import MEAN_AND_VARIANCE, PerChannel

__all__ = ["GhostBatchNorm2d"]


class GhostBatchNorm2d(PerChannel):
    """Ghost BatchNorm (Hoffer, Hubara & Soudry, NeurIPS 2017, arXiv 1705.08741, Algorithm 1).

    In training (N, C, H, W) is divided in order into ghost batches of `size` examples, and each is
    normalized by its own mean and biased variance, as BatchNorm would do with it alone::

        y = gamma * (x - mu_g) / sqrt(var_g + eps) + beta

    gamma and beta are those of the layer. The running mean and (unbiased) variance move by
    `momentum` towards each ghost batch's in turn; evaluation is on them. A last ghost batch of one
    example, which BatchNorm cannot normalize, joins the one before it.

    Raises UserError in training for a batch of one example.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_channels: int,
        size: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, MEAN_AND_VARIANCE, eps=eps, device=device, dtype=dtype)
        self.size, self.momentum = size, momentum

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training the running values move."""
        if not self.training:
            return self._normalized(x)
        if len(x) == 1:
            raise UserError(
                "GhostBatchNorm2d cannot normalize a batch of one example: use a local batch of "
                "at least 2"
            )
        return torch.cat([self._normalized(ghost) for ghost in torch.split(x, self._sizes(len(x)))])

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_channels}, size={self.size}, momentum={self.momentum}"

    def _sizes(self, examples: int) -> list[int]:
        whole, rest = divmod(examples, self.size)
        sizes = [self.size] * whole + [rest] * (rest > 0)
        return [*sizes[:-2], sizes[-2] + 1] if sizes[-1] == 1 else sizes

    def _normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
