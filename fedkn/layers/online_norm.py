"""Online normalization: streaming statistics forward, and a control process backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkn.layers.per_channel import MEAN_AND_VARIANCE, PerChannel, per_channel

__all__ = ["OnlineNorm2d"]


class OnlineNorm2d(PerChannel):
    """Online Normalization (Chiley et al., NeurIPS 2019, arXiv 1905.05894, eq. 8 to 11).

    In training the examples of (N, C, H, W) come one after another, and each is normalized by the
    statistics that those before it left. Per channel, with the mean mu_t and biased variance var_t
    of example t over its pixels, and a_f, a_b the decay factors::

        y_t = (x_t - m) / sqrt(v + eps)
        v  <- a_f v + (1 - a_f) var_t + a_f (1 - a_f) (mu_t - m)²
        m  <- a_f m + (1 - a_f) mu_t

    Backward, for the gradient g_t at y_t, in the same order, with the control values p and q, which
    accumulate how far gradients are from orthogonal to y and to 1::

        g' = g_t - (1 - a_b) q y_t            q <- q + mean(g' y_t)
        dx = g' / sqrt(v + eps) - (1 - a_b) p     p <- p + mean(dx)

    Then scale and bias per channel, and layer scaling, z / sqrt(mean(z²) + eps) over the example.
    In evaluation m and v stay. Buffers: ``running_mean`` (m), ``running_var`` (v),
    ``control_mean`` (p), ``control_projection`` (q).
    """

    running_mean: Tensor
    running_var: Tensor
    control_mean: Tensor
    control_projection: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        begin = MEAN_AND_VARIANCE | {"control_mean": 0.0, "control_projection": 0.0}
        super().__init__(num_channels, begin, eps=eps, device=device, dtype=dtype)
        self.forward_decay, self.backward_decay = forward_decay, backward_decay

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training statistics and control values move."""
        wide = self.wide(x)
        if self.training:
            mean, scale = self._stream(wide.detach())
            y: Tensor = _Controlled.apply(
                wide, mean, scale, self.control_mean, self.control_projection, self.backward_decay
            )  # type: ignore[no-untyped-call]  # torch annotates it so
        else:
            scale = per_channel(torch.rsqrt(self.running_var + self.eps))
            y = (wide - per_channel(self.running_mean)) * scale
        z = y * per_channel(self.weight) + per_channel(self.bias)
        power = z.square().mean((1, 2, 3), keepdim=True)
        return (z * torch.rsqrt(power + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"{self.num_channels}, forward_decay={self.forward_decay}, "
            f"backward_decay={self.backward_decay}"
        )

    @torch.no_grad()
    def _stream(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return by which mean and reciprocal deviation (N, C) each example is normalized."""
        decay = self.forward_decay
        variances, means = torch.var_mean(x, (2, 3), correction=0)
        mean, scale = torch.empty_like(means), torch.empty_like(means)
        for place in range(len(x)):
            mean[place] = self.running_mean
            scale[place] = torch.rsqrt(self.running_var + self.eps)
            away = means[place] - self.running_mean
            between = decay * (1 - decay) * away.square()
            self.running_var.mul_(decay).add_(variances[place], alpha=1 - decay).add_(between)
            self.running_mean.add_(away, alpha=1 - decay)
        return mean, scale


class _Controlled(torch.autograd.Function):
    """(x - mean) * scale, whose gradient is the control process's."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd gives them by position
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        control_mean: Tensor,
        control_projection: Tensor,
        decay: float,
    ) -> Tensor:
        y = (x - mean[..., None, None]) * scale[..., None, None]
        ctx.save_for_backward(y, scale)
        ctx.control, ctx.decay = (control_mean, control_projection), decay
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        y, scale = ctx.saved_tensors
        control_mean, control_projection = ctx.control
        step = 1 - ctx.decay
        out = torch.empty_like(gradient)
        for place in range(len(y)):
            along = per_channel(control_projection) * y[place]
            one = gradient[place] - step * along
            control_projection.add_((one * y[place]).mean((1, 2)))
            one = one * scale[place, :, None, None] - step * per_channel(control_mean)
            control_mean.add_(one.mean((1, 2)))
            out[place] = one
        return out, None, None, None, None, None
