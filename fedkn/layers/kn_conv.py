"""KNConv: convolution whose kernel positions are normalized, in one and two dimensions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedkn.errors import UserError, unknown_name
from fedkn.layers.dropout import drop_level
from fedkn.layers.functional import ACTIVATIONS, EVAL_MODES, Statistics, kn_conv
from fedkn.layers.padding import PADDING_MODES, Padding, Size, edges, size

__all__ = ["KNConv", "KNConv1d", "KNConv2d", "Recorder"]


class Recorder(Protocol):
    """Something that seeds and remembers the dropout of each forward pass."""

    def __call__(self, layer: nn.Module, x: Tensor) -> AbstractContextManager[object]:
        """Return the context in which `layer` is applied to `x`."""


class KNConv(nn.Module):
    """What KNConv1d and KNConv2d share."""

    dims: ClassVar[int]
    recorder: ClassVar[Recorder | None] = None
    """Set by `fedkn.layers.opacus.register`."""

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
        if eval_mode not in EVAL_MODES:
            raise unknown_name("evaluation mode", eval_mode, EVAL_MODES)
        if padding_mode not in PADDING_MODES:
            raise unknown_name("padding mode", padding_mode, PADDING_MODES)
        if activation is not None and activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        drop_level(dropout_p)
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
        if self.recorder is None:
            return self.apply_to(x)
        with self.recorder(self, x):
            return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """Do what `forward` does, unrecorded."""
        return kn_conv(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            dropout_p=self.dropout_p,
            eps=self.eps,
            mode="stochastic" if self.training else self.eval_mode,
            activation=self.activation,
            keeps_output=self.keeps_output,
        )

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
    """Kernel-normalized convolution of (N, C, H, W); see `fedkn.layers.functional.kn_conv`.

    `padding` is an int, (height, width) as PyTorch reads it, or (left, right, top, bottom).
    In training the statistics of every kernel position are taken under dropout; in evaluation
    the layer is deterministic and `eval_mode` says how: "expected" (the variance that dropout
    gives in expectation; units of at most 64 elements are averaged over how many of them
    drop), "plain" (dropout switched off), or "stochastic" for a replay of the
    authors' code, which leaves dropout on. `activation="relu"` fuses a ReLU, which saves one
    map of memory per layer in training. `keeps_output=True` saves the output itself for the
    backward pass instead of a map of its own: less memory where the next layer saves it too, but
    no operation in place may follow. The layer has no buffers.

    Raises UserError for sizes, probabilities or names that make no sense.
    """

    dims = 2


class KNConv1d(KNConv):
    """Kernel-normalized convolution of (N, C, L): `KNConv2d` in one dimension.

    `padding` is an int or (left, right).
    """

    dims = 1
