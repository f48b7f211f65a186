"""KernelNorm and the kernel-normalized convolution as functions."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError, unknown_name
from fedkn.layers import autograd
from fedkn.layers.composite import Settings
from fedkn.layers.dropout import drop_level, next_key, next_number, seeded_on_host
from fedkn.layers.padding import Padding, Size, edges, pad, size, zeros_left
from fedkn.layers.statistics import Geometry
from fedkn.layers.unit_norm import normalized_units

__all__ = ["ACTIVATIONS", "EVAL_MODES", "Statistics", "kernel_norm", "kn_conv", "place_windows"]

EVAL_MODES = ("expected", "plain", "stochastic")
ACTIVATIONS = ("relu",)
Statistics = Literal["stochastic", "expected", "plain"]


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout_p: float = 0.05,
    eps: float = 1e-5,
    mode: Statistics = "stochastic",
    activation: str | None = None,
    keeps_output: bool = False,
) -> Tensor:
    """Kernel-normalized convolution: (conv(x, w) - mean * sum(w)) / sqrt(var + eps) + bias.

    Args:
        x: (N, C, H, W), or (N, C, L) with a three-dimensional weight.
        weight: (O, C/groups, KH, KW), or (O, C/groups, K).
        bias: (O,) or None.
        stride: as in `torch.nn.functional.conv2d`.
        padding: an int, (height, width), or (left, right, top, bottom); for one dimension an int
            or (left, right).
        dilation: as in `torch.nn.functional.conv2d`.
        groups: as in `torch.nn.functional.conv2d`. Mean and variance are over ALL channels.
        padding_mode: "zeros", "reflect" or "replicate". The padding belongs to the unit.
        dropout_p: probability with which an element of the unit is left out of the statistics.
            One mask is drawn on the padded input and shared by the windows.
        eps: added to the variance.
        mode: "stochastic" draws a mask (training); "expected" uses the variance that dropout
            gives in expectation, small units averaged over how many elements drop
            (`fedkn.layers.small_units`); "plain" ignores dropout.
        activation: None or "relu", fused into the layer.
        keeps_output: keep the output itself for the backward pass, as with a fused activation,
            not another map of its size. It costs no memory where the next layer keeps it too, as
            max-pooling does, but no operation in place may follow: torch then raises an error.

    Returns (N, O, OH, OW), or (N, O, OL).

    Equations 3 to 5 of Nasirigerdeh et al., TMLR 2024, arXiv 2205.10089.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    eager = autograd.plain_tensors()
    padded, geometry = place_windows(x, weight, stride, padding, dilation, groups, padding_mode)
    level = _level(dropout_p, mode)
    key = _key(padded, level, mode, eager)
    settings = Settings(geometry, key, level, eps, activation == "relu", keeps_output)
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
        return autograd.normalized_convolution(padded, weight, bias, settings, eager).squeeze(2)
    return autograd.normalized_convolution(padded, weight, bias, settings, eager)


def place_windows(  # noqa: PLR0917 - in conv2d's order
    x: Tensor,
    weight: Tensor,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Geometry]:
    """Return x as (N, C, H, W), padded where the convolution cannot, and where its units lie.

    Arguments as in `kn_conv`. Raises UserError where they do not fit each other.
    """
    dims = weight.dim() - 2
    if x.dim() != dims + 2:
        shape = "(N, C, H, W)" if dims == 2 else "(N, C, L)"
        raise UserError(f"KNConv takes {shape}, not {tuple(x.shape)}: add the batch dimension")
    # Compilers trace what is asked of the cache, and warn.
    place = _place.__wrapped__ if torch.compiler.is_compiling() else _place
    sides, geometry = place(
        weight.shape[2:], _fixed(stride), _fixed(padding), _fixed(dilation), groups, padding_mode
    )
    return pad(x if dims == 2 else x.unsqueeze(2), sides, padding_mode), geometry


def kernel_norm(
    x: Tensor,
    kernel_size: Size,
    *,
    stride: Size | None = None,
    padding: Padding = 0,
    padding_mode: str = "zeros",
    dropout_p: float = 0.05,
    eps: float = 1e-5,
    mode: Statistics = "stochastic",
) -> Tensor:
    """KernelNorm: (U - mean(U')) / sqrt(var(U') + eps) for every unit U.

    Args:
        x: (N, C, H, W).
        kernel_size: the window, (height, width).
        stride: distance of the windows; the kernel size if None.
        padding: as in `kn_conv`.
        padding_mode: as in `kn_conv`.
        dropout_p: as in `kn_conv`, but each window draws its own mask.
        eps: added to the variance.
        mode: as in `kn_conv`.

    Returns the windows laid side by side, (N, C, OH * KH, OW * KW).

    Equation 2 of Nasirigerdeh et al., TMLR 2024, arXiv 2205.10089.
    """
    if x.dim() != 4:
        raise UserError(
            f"kernel_norm takes (N, C, H, W), not {tuple(x.shape)}: add the batch dimension"
        )
    kernel_h, kernel_w = size("kernel_size", kernel_size, 2)
    kernel = (kernel_h, kernel_w)
    step_h, step_w = size("stride", kernel if stride is None else stride, 2)
    sides = edges(padding, 2)
    x = pad(x, sides, padding_mode)
    zeros_h, zeros_w = zeros_left(sides, padding_mode)
    if zeros_h or zeros_w:
        x = F.pad(x, (zeros_w, zeros_w, zeros_h, zeros_h))
    windows = _side_by_side(x, kernel, (step_h, step_w))
    geometry = Geometry(kernel, kernel, (0, 0), (1, 1), 1)
    level, eager = _level(dropout_p, mode), autograd.plain_tensors()
    settings = Settings(geometry, _key(windows, level, mode, eager), level, eps, relu=False)
    return normalized_units(windows, settings, eager)


@functools.lru_cache
def _place(  # noqa: PLR0917 - positional, which the cache hashes fastest
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> tuple[tuple[int, ...], Geometry]:
    """Return the four sides' padding, and the geometry of what is left to the convolution."""
    dims = len(kernel)
    sides = edges(padding, dims)
    lines = (1,) * (2 - dims)
    if dims == 1:
        sides = (*sides, 0, 0)
    kernel_h, kernel_w = (*lines, *kernel)
    stride_h, stride_w = (*lines, *size("stride", stride, dims))
    dilation_h, dilation_w = (*lines, *size("dilation", dilation, dims))
    geometry = Geometry(
        kernel=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        padding=zeros_left(sides, padding_mode),
        dilation=(dilation_h, dilation_w),
        groups=groups,
    )
    return sides, geometry


def _fixed(value: Size) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def _level(dropout_p: float, mode: str) -> int:
    if mode not in EVAL_MODES:
        raise unknown_name("evaluation mode", mode, EVAL_MODES)
    return 0 if mode == "plain" else drop_level(dropout_p)


def _key(x: Tensor, level: int, mode: str, eager: bool) -> int | Tensor | None:
    if mode != "stochastic" or not level:
        return None
    if eager and (x.device.type == "cpu" or seeded_on_host()):
        return next_number()
    return next_key(x.device)


def _side_by_side(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    samples, channels, height, width = x.shape
    if height < kernel[0] or width < kernel[1]:
        raise UserError(f"kernel {kernel} is larger than the padded {height}x{width} input")
    if kernel == (1, 1) and stride == (1, 1):
        return x
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    rows, columns = windows.shape[2:4]
    return windows.permute(0, 1, 2, 4, 3, 5).reshape(
        samples, channels, rows * kernel[0], columns * kernel[1]
    )
