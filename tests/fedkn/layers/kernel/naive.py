"""The equations, written down as they stand in the paper, in float64 with unfolding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.settings import SMALL_UNIT

TORCH_MODE = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def padded(x: Tensor, sides: tuple[int, int, int, int], mode: str = "zeros") -> Tensor:
    return F.pad(x, sides, mode=TORCH_MODE[mode])


def units(x: Tensor, kernel, stride, dilation) -> Tensor:
    """(N, OH, OW, C, KH, KW): one unit per kernel position of the padded x, by plain slicing."""
    rows = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    out = []
    for i in range(rows):
        row = []
        for j in range(columns):
            top, left = i * stride[0], j * stride[1]
            row.append(
                x[
                    :,
                    :,
                    top : top + dilation[0] * (kernel[0] - 1) + 1 : dilation[0],
                    left : left + dilation[1] * (kernel[1] - 1) + 1 : dilation[1],
                ]
            )
        out.append(torch.stack(row, 1))
    return torch.stack(out, 1)


def moments(unit: Tensor, unit_mask: Tensor | None, p: float, expected: bool):
    """Mean and variance of each unit, keepdim, two passes."""
    dims = (-3, -2, -1)
    dropped = unit if unit_mask is None else unit * unit_mask / (1 - p)
    mean = dropped.mean(dims, keepdim=True)
    variance = ((dropped - mean) ** 2).mean(dims, keepdim=True)
    if expected:
        n = unit.shape[-1] * unit.shape[-2] * unit.shape[-3]
        second = (unit**2).mean(dims, keepdim=True)
        variance = variance + p / (1 - p) * second * (1 - 1 / n)
    return mean, variance


def normalized(unit, unit_mask, p: float, expected: bool, eps: float) -> Tensor:
    """Each unit less its mean, over its deviation; expected of small units, over how many drop."""
    n = unit.shape[-1] * unit.shape[-2] * unit.shape[-3]
    if not (expected and p and n <= SMALL_UNIT):
        mean, variance = moments(unit, unit_mask, p, expected)
        return (unit - mean) / torch.sqrt(variance + eps)
    mean, variance = moments(unit, None, 0.0, expected=False)
    square = (unit**2).mean((-3, -2, -1), keepdim=True)
    total = torch.zeros_like(unit)
    for dropped in range(n + 1):
        kept = n - dropped
        # Kept elements are `kept` of n drawn without replacement.
        mean_of_kept = mean * kept / n
        error = 0.0 if n == 1 else variance * kept * (n - kept) / (n - 1) / n**2
        variance_of_kept = square * kept / n - mean_of_kept**2 - error
        deviation = torch.sqrt(variance_of_kept / (1 - p) ** 2 + eps)
        some = (unit - mean_of_kept / (1 - p)) / deviation
        total = total + math.comb(n, dropped) * p**dropped * (1 - p) ** kept * some
    return total


def naive_kn_conv(
    x, weight, bias, *, stride, sides, dilation, groups, padding_mode="zeros", mask=None,
    p=0.0, expected=False, eps=1e-5,
) -> Tensor:  # fmt: skip
    """`mask` is of the padded input."""
    kernel = tuple(weight.shape[2:])
    unit = units(padded(x, sides, padding_mode), kernel, stride, dilation)
    unit_mask = None if mask is None else units(mask, kernel, stride, dilation)
    normal = normalized(unit, unit_mask, p, expected, eps)
    inputs = normal.unflatten(3, (groups, -1))
    filters = weight.unflatten(0, (groups, -1))
    y = torch.einsum("nijgckl,gockl->ngoij", inputs, filters).flatten(1, 2)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def naive_kernel_norm(
    x, kernel, *, stride, sides, padding_mode="zeros", mask=None, p=0.0, expected=False, eps=1e-5
) -> Tensor:
    """`mask` has the output's shape: each window has its own."""
    unit = units(padded(x, sides, padding_mode), kernel, stride, (1, 1))
    unit_mask = None if mask is None else units(mask, kernel, kernel, (1, 1))
    normal = normalized(unit, unit_mask, p, expected, eps)
    n, rows, columns, channels, kh, kw = normal.shape
    return normal.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * kh, columns * kw)
