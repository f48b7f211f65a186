"""GroupNorm, the ReLU after it and max-pooling in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkn.layers import native
from fedkn.layers.autograd import plain_tensors

__all__ = ["group_norm", "group_norm_pool", "pools", "serves"]


def serves(x: object, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `group_norm` takes these: eager float32 maps on the CPU, laid out channels last.

    It needs a weight and a bias, and `native`'s kernels, which the first call may build.
    """
    return (
        isinstance(x, Tensor)
        and plain_tensors()
        and weight is not None
        and bias is not None
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and native.serves(x, weight, bias)
    )


def group_norm(  # noqa: PLR0917 - in group_norm's order
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """`torch.nn.functional.group_norm` of x (N, C, H, W), then ReLU if `relu`: equal to rounding.

    Only for what it `serves`. Differentiable twice. Sums are in double, so that no mean is too far
    from zero for it.
    """
    y: Tensor = torch.ops.fedkn_native.group_norm(x, groups, weight, bias, eps, relu)
    return y


def pools(x: Tensor) -> bool:
    """Whether `group_norm_pool` takes x besides: even sides, and channels in eights."""
    return not (x.shape[1] % 8 or x.shape[2] % 2 or x.shape[3] % 2)


def group_norm_pool(  # noqa: PLR0917 - as above
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """2x2 max-pooling of `group_norm`'s output: (N, C, H, W) to (N, C, H / 2, W / 2).

    Only for what it `serves` and `pools`. The map before the pooling is never written, which saves
    its memory and two thirds of the time.
    """
    y: Tensor = torch.ops.fedkn_native.group_norm_pool(x, groups, weight, bias, eps, relu)
    return y
