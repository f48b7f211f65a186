"""Moments of all the values that a layer was given, whatever the batches they came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Moments"]


class Moments(nn.Module):
    """Counts values per channel and keeps their mean and biased variance, batch after batch.

    A batch B of n values with mean mu_B and biased variance var_B is merged with the m values
    seen before, of mean mu and variance var, by the law of total variance::

        mu'  = mu + (mu_B - mu) n / (m + n)
        var' = (m var + n var_B + (mu_B - mu)^2 m n / (m + n)) / (m + n)

    (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.) The result is that of all values at once, up to rounding. Its buffers are
    float64 and no part of a state: they are a client's working memory within a round.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, num_channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        for name, size in (("count", 1), ("mean", num_channels), ("variance", num_channels)):
            zeros = torch.zeros(size, dtype=torch.float64, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Take in the values of `x`, (N, C) or (N, C, ...); no gradient flows."""
        over = [dim for dim in range(x.dim()) if dim != 1]
        # Half-precision values are taken for what they are, and summed in float32.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, over, correction=0)
        added = x.numel() // x.shape[1]
        total = self.count + added
        share = added / total
        delta = mean - self.mean
        self.variance.lerp_(variance.to(self.variance), share)
        self.variance.add_(delta * delta * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.copy_(total)

    def reset(self) -> None:
        """Forget all values."""
        for buffer in self.buffers():
            buffer.zero_()

    def write(self, mean: Tensor, variance: Tensor) -> None:
        """Put the moments into `mean` and `variance`, (C,) each; leave both if none were seen."""
        if self.count.item():
            mean.copy_(self.mean)
            variance.copy_(self.variance)
