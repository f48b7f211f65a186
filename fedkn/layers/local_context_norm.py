"""Local Context Normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError

__all__ = ["LocalContextNorm2d"]


class LocalContextNorm2d(nn.Module):
    """Local Context Normalization (Ortiz et al., CVPR 2020, arXiv 1912.05845).

    ``y = gamma * (x - mu) / sqrt(var + eps) + beta`` on (N, C, H, W), where mu and the biased
    variance of a pixel are over the channels of its group and a window around it, eps 1e-5; gamma
    and beta are learned per channel. An odd window is centred on its pixel; the authors' is one
    pixel off. At the border the window is that of the nearest pixel that has
    a whole one; a window longer than the map is as long as the map. With one that covers the map
    this is GroupNorm.

    Means over channels first, then a box filter: one row and one column at a time, which costs less
    than a square window and, unlike an integral image, does not lose digits over large maps. The
    gradient goes through the statistics (the authors' code cuts it there).

    Args:
        channels_per_group: divides num_channels.
        num_channels: C.
        window: side of the window in pixels.

    Raises UserError in training where a window holds a single number.
    """

    def __init__(
        self,
        channels_per_group: int,
        num_channels: int,
        window: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise UserError(
                f"channels_per_group = {channels_per_group} does not divide {num_channels} channels"
            )
        if window < 1:
            raise UserError(f"window = {window} must be 1 or more")
        self.channels_per_group = channels_per_group
        self.num_channels = num_channels
        self.window = window
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        seen = self.channels_per_group * min(self.window, h) * min(self.window, w)
        if self.training and seen == 1:
            raise UserError(
                f"LocalContextNorm2d with one channel per group erases a {h}x{w} map with a window "
                f"of {self.window}: use more channels per group or a larger window"
            )
        # In half precision the difference of moments below would be noise.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.reshape(n, -1, self.channels_per_group, h, w)
        # The result does not depend on the shift, so neither does the gradient; it keeps
        # E[x^2] - E[x]^2 exact where the mean is large beside the deviation.
        grouped = grouped - grouped.mean((2, 3, 4), keepdim=True).detach()
        mean = self._over_windows(grouped.mean(2))
        variance = self._over_windows(grouped.square().mean(2)) - mean.square()
        scale = torch.rsqrt(variance.clamp(min=0) + self.eps)
        y = ((grouped - mean.unsqueeze(2)) * scale.unsqueeze(2)).reshape(n, c, h, w).to(x.dtype)
        return y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.channels_per_group}, {self.num_channels}, window={self.window}"

    def _over_windows(self, statistic: Tensor) -> Tensor:
        p, q = (min(self.window, side) for side in statistic.shape[2:])
        inner = F.avg_pool2d(F.avg_pool2d(statistic, (p, 1), stride=1), (1, q), stride=1)
        top, left = (p - 1) // 2, (q - 1) // 2
        bottom, right = p - 1 - top, q - 1 - left
        if not inner.is_cuda:
            return F.pad(inner, (left, right, top, bottom), mode="replicate")
        # There the gradient of that padding is summed in whatever order threads arrive.
        rows = torch.cat(
            (
                inner[:, :, :1].expand(-1, -1, top, -1),
                inner,
                inner[:, :, -1:].expand(-1, -1, bottom, -1),
            ),
            2,
        )
        return torch.cat(
            (
                rows[..., :1].expand(-1, -1, -1, left),
                rows,
                rows[..., -1:].expand(-1, -1, -1, right),
            ),
            3,
        )
