"""Root mean square normalization of maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkn.errors import UserError

__all__ = ["RMSNorm2d"]

_EPS = 1e-5


class RMSNorm2d(nn.Module):
    """RMSNorm over channels and pixels (Zhang and Sennrich, NeurIPS 2019, arXiv 1910.07467, eq. 4).

    ``y = gamma * x / sqrt(mean(x^2) + 1e-5) + beta`` on (N, C, H, W), the mean per example over C,
    H and W: the axes of `LayerNorm2d`, so that the two differ in centring and in nothing else.
    gamma and beta are learned per channel; the paper's bias, too, comes after the gain.

    Raises UserError in training where an example is a single number, of which only the sign would
    be left.
    """

    def __init__(
        self,
        num_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        if self.training and x.shape[1:].numel() == 1:
            raise UserError(
                "RMSNorm2d erases a 1x1 map of one channel: use more channels, larger images, or "
                "a model that pools less"
            )
        scale = torch.rsqrt(x.square().mean((1, 2, 3), keepdim=True) + _EPS)
        return x * scale * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.num_channels}"
