"""Proxy normalization of an activation: by what it would make of a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ProxyNorm2d"]

_EPS = 0.03
_SAMPLES = 256


class ProxyNorm2d(nn.Module):
    """Proxy-normalized activation (Labatie et al., NeurIPS 2021, arXiv 2106.03743, Sec. 5).

    For a normalized y of (N, C, H, W), per channel, with the activation f::

        z = (f(gamma y + beta) - E[f(gamma Y + beta)]) / sqrt(Var[f(gamma Y + beta)] + 0.03)

    Y, the proxy, is Gaussian of mean beta_p and deviation 1 + gamma_p: y as it would be if it were
    normalized over all images. gamma, beta, gamma_p and beta_p are learned, from 1, 0, 0 and 0. The
    moments are those of 256 numbers of Y at equal steps of its distribution function. They depend
    on parameters alone, so nothing of one example enters another's z. (0.03, 256, the biased
    variance and the steps (i + 1/2)/256: as in Khochawongwat/ProxyNormalization-PyTorch, which
    names the paper for them; the paper's text was not at hand. There Y is a standard Gaussian.)

    Args:
        num_channels: C. activation: f.
    """

    def __init__(self, num_channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.proxy_weight = nn.Parameter(torch.zeros(num_channels))
        self.proxy_bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, y: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        z = self.activation(y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1))
        proxy = self.proxy_bias.unsqueeze(1) + (1 + self.proxy_weight).unsqueeze(1) * _normal(y)
        imagined = self.activation(proxy * self.weight.unsqueeze(1) + self.bias.unsqueeze(1))
        mean = imagined.mean(1)
        variance = (imagined - mean.unsqueeze(1)).square().mean(1)
        scale = torch.rsqrt(variance + _EPS)
        out: Tensor = (z - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        return out.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.num_channels}"


def _normal(like: Tensor) -> Tensor:
    """Return the quantiles of N(0, 1) at (i + 1/2) / 256."""
    places = (torch.arange(_SAMPLES, device=like.device, dtype=torch.float32) + 0.5) / _SAMPLES
    normal: Tensor = torch.special.ndtri(places)
    return normal.to(like.dtype)
