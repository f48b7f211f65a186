"""The kernel-normalized layers: KNConv and KernelNorm, in one and two dimensions.

How a tensor goes through a KNConv: it is padded (`padding`), the key of its dropout mask is drawn
(`dropout`), and a backend is asked for the equations of `definition` (`dispatch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkn.errors import UserError, unknown_name
from fedkn.layers import circumstances
from fedkn.layers.kernel import dispatch, units
from fedkn.layers.kernel.backends import opacus
from fedkn.layers.kernel.dropout import draw_key, drop_level
from fedkn.layers.kernel.padding import (
    PADDING_MODES,
    Padding,
    Size,
    edges,
    place,
    size,
    windows,
)
from fedkn.layers.kernel.settings import (
    ACTIVATIONS,
    EVAL_MODES,
    Geometry,
    Settings,
    Statistics,
)

__all__ = ["KNConv", "KNConv1d", "KNConv2d", "KernelNorm1d", "KernelNorm2d"]


class KNConv(nn.Module):
    """What KNConv1d and KNConv2d share."""

    dims: ClassVar[int]

    def __init__(  # noqa: PLR0917 - positional like torch.nn.Conv2d's
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        padding_mode: str = "zeros",
        eval_mode: Statistics = "expected",
        activation: str | None = None,
        keeps_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1 or value % groups:
                raise UserError(
                    f"{name} is {value} with groups={groups}: give a positive multiple of groups"
                )
        _check(eval_mode, padding_mode, dropout_p)
        if activation is not None and activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = size("kernel_size", kernel_size, self.dims)
        self.stride = size("stride", stride, self.dims)
        self.padding = edges(padding, self.dims)
        self.dilation = size("dilation", dilation, self.dims)
        self.groups = groups
        self.dropout_p = dropout_p
        self.eps = eps
        self.padding_mode = padding_mode
        self.eval_mode: Statistics = eval_mode
        self.activation = activation
        self.keeps_output = keeps_output
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights Kaiming-normal (fan-out), as published; zero the bias."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W), or (N, C, L) in one dimension."""
        if self._forward_hooks and opacus.serves(self):
            return opacus.forward(self, x)
        return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """Do what `forward` does, unrecorded."""
        eager = circumstances.eager()
        padded, geometry = self.placed(x)
        settings = self.settings(geometry, lambda: draw_key(self.weight.device, eager))
        y = dispatch.convolution(padded, self.filters(), self.bias, settings, eager)
        return y if self.dims == 2 else y.squeeze(2)

    def placed(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Return x as (N, C, H, W), padded where the convolution cannot, and where its units lie.

        Raises UserError where `x` is of another shape, or smaller than its reflection.
        """
        return place(
            x, self.weight.shape[2:], self.stride, self.padding, self.dilation, self.groups,
            self.padding_mode,
        )  # fmt: skip

    def filters(self) -> Tensor:
        """Return the weight as (O, C/groups, KH, KW)."""
        return self.weight if self.dims == 2 else self.weight.unsqueeze(2)

    def settings(self, geometry: Geometry, draw: Callable[[], int | Tensor]) -> Settings:
        """Return what a pass does, with the dropout mask of the key that `draw` returns.

        It is called where there is a mask: in training, and in evaluation that is stochastic.
        """
        key, level = _mask(self, draw)
        n = geometry.unit_size(self.weight.shape[1] * self.groups)
        relu = self.activation == "relu"
        return Settings(geometry, n, key, level, self.eps, relu, self.keeps_output)

    def extra_repr(self) -> str:
        """Return the settings shown by `print`."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dropout_p={self.dropout_p}, "
            f"eps={self.eps}"
        )
        if self.dilation != (1,) * self.dims:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.eval_mode != "expected":
            text += f", eval_mode={self.eval_mode}"
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.keeps_output:
            text += ", keeps_output=True"
        return text


class KNConv2d(KNConv):
    """Kernel-normalized convolution of (N, C, H, W).

    (conv(x, w) - mu * sum(w)) / sqrt(var + eps) + b, with mu and var of each kernel position over
    ALL channels: equations 3 to 5 of `fedkn.layers.kernel.definition`.

    Args:
        in_channels: as `torch.nn.Conv2d`'s.
        out_channels: as `torch.nn.Conv2d`'s.
        kernel_size: as `torch.nn.Conv2d`'s.
        stride: as `torch.nn.Conv2d`'s.
        padding: an int, (height, width) as PyTorch reads it, or (left, right, top, bottom).
        dilation: as `torch.nn.Conv2d`'s.
        groups: as `torch.nn.Conv2d`'s.
        bias: whether there is one.
        dropout_p: probability with which an element of the unit is left out of the statistics in
            training. One mask is drawn on the padded input and shared by the windows.
        eps: added to the variance.
        padding_mode: "zeros", "reflect" or "replicate". The padding belongs to the unit.
        eval_mode: how statistics are taken in evaluation: "expected" (the variance that dropout
            gives in expectation; units of at most 64 elements are averaged over how many of them
            drop), "plain" (dropout switched off), or "stochastic" for a replay of the authors'
            code, which leaves dropout on.
        activation: None or "relu", which fuses a ReLU and so saves one map of memory in training.
        keeps_output: keep the output itself for the backward pass, not a map of the layer's own.
            It costs no memory where the next layer keeps it too, as max-pooling does, but no
            operation in place may follow: torch then raises an error.
        device: of the parameters.
        dtype: of the parameters.

    The layer has no buffers. Raises UserError for sizes, probabilities or names that make no sense.
    """

    dims = 2


class KNConv1d(KNConv):
    """Kernel-normalized convolution of (N, C, L): `KNConv2d` in one dimension.

    `padding` is an int or (left, right).
    """

    dims = 1


class _KernelNorm(nn.Module):
    dims: ClassVar[int]

    def __init__(  # noqa: PLR0917 - positional like torch.nn.Conv2d's
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Padding = 0,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        padding_mode: str = "zeros",
        eval_mode: Statistics = "expected",
    ) -> None:
        super().__init__()
        _check(eval_mode, padding_mode, dropout_p)
        self.kernel_size = size("kernel_size", kernel_size, self.dims)
        self.stride = self.kernel_size if stride is None else size("stride", stride, self.dims)
        self.padding = edges(padding, self.dims)
        self.dropout_p = dropout_p
        self.eps = eps
        self.padding_mode = padding_mode
        self.eval_mode: Statistics = eval_mode

    def extra_repr(self) -> str:
        """Return the settings shown by `print`."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}, padding_mode={self.padding_mode}, "
            f"eval_mode={self.eval_mode}"
        )

    def _normalize(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W), which is one line high in one dimension."""
        lines, no_lines = (1,) * (2 - self.dims), (0,) * (4 - 2 * self.dims)
        kernel_h, kernel_w = (*lines, *self.kernel_size)
        step_h, step_w = (*lines, *self.stride)
        kernel, sides = (kernel_h, kernel_w), (*self.padding, *no_lines)
        beside = windows(x, kernel, (step_h, step_w), sides, self.padding_mode)
        eager = circumstances.eager()
        key, level = _mask(self, lambda: draw_key(beside.device, eager))
        geometry = Geometry(kernel, kernel, (0, 0), (1, 1), 1)
        n = geometry.unit_size(x.shape[1])
        settings = Settings(geometry, n, key, level, self.eps, relu=False)
        return units.normalized(beside, settings, eager)


class KernelNorm2d(_KernelNorm):
    """Normalize the units (all channels x kernel window) of (N, C, H, W).

    Returns the windows laid side by side, (N, C, OH * KH, OW * KW); with a 1x1 kernel that is the
    input's shape. `stride` is the kernel size if None; `padding` and `eval_mode` as in `KNConv2d`.
    Each window draws its own dropout mask. There are neither parameters nor buffers.

    Equation 2 of `fedkn.layers.kernel.definition`.
    """

    dims = 2

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        return self._normalize(x)


class KernelNorm1d(_KernelNorm):
    """`KernelNorm2d` in one dimension: (N, C, L) gives (N, C, OL * K)."""

    dims = 1

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (N, C, L)."""
        return self._normalize(x.unsqueeze(2)).squeeze(2)


def _check(eval_mode: str, padding_mode: str, dropout_p: float) -> None:
    if eval_mode not in EVAL_MODES:
        raise unknown_name("evaluation mode", eval_mode, EVAL_MODES)
    if padding_mode not in PADDING_MODES:
        raise unknown_name("padding mode", padding_mode, PADDING_MODES)
    drop_level(dropout_p)


def _mask(
    layer: KNConv | _KernelNorm, draw: Callable[[], int | Tensor]
) -> tuple[int | Tensor | None, int]:
    """Return the key of the mask of a pass, None without one, and the drop probability's level."""
    mode = "stochastic" if layer.training else layer.eval_mode
    if mode not in EVAL_MODES:
        raise unknown_name("evaluation mode", mode, EVAL_MODES)
    level = 0 if mode == "plain" else drop_level(layer.dropout_p)
    return (draw() if level and mode == "stochastic" else None), level
