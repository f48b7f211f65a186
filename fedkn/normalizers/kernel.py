"""Kernel normalization: the convolution normalizes each window it looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack, get_args

from torch import nn

from fedkn.errors import UserError, unknown_name
from fedkn.layers import ChannelGain, KernelNorm2d, KNConv2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import ConvOptions, activation_layer, chain

__all__ = ["PUBLISHED_DROPOUT", "KernelNormalizer"]

PUBLISHED_DROPOUT = 0.05  # of the KNResNets in the TMLR paper; other models publish their own

EvalMode = Literal["expected", "plain", "stochastic"]


@dataclass(frozen=True)
class KernelNormalizer(Normalizer):
    """KernelNorm: statistics over the channels and pixels under the kernel, no affine parameters.

    It takes the place of the convolution itself (KNConv), so no layer follows the convolution and
    every convolution has a bias. Options: `dropout_p`, the dropout of the statistics, None for the
    value the model publishes (0.05 outside fedkn's models); `eval_mode`, which variance evaluation
    uses (see `fedkn.layers`); `gain`, a learned factor for every channel after the convolution,
    which no paper has: standardized filters cannot learn a scale.
    """

    name: ClassVar[str] = "kernel"
    title: ClassVar[str] = "KernelNorm"
    paper: ClassVar[str] = "Nasirigerdeh et al., TMLR 2024, arXiv 2205.10089, Eq. 1-5"
    statistics: ClassVar[str] = "all channels and the pixels under the kernel, per image"
    not_for: ClassVar[str] = (
        "Short runs on clients of few labels: it starts late, and with two labels a client it "
        "had learnt next to nothing at batches of 8 (docs/early-training.md); where there is no "
        "compiler its steps take longer than BatchNorm's (docs/benchmarks.md)."
    )
    affine: ClassVar[bool] = False
    published_scaling: ClassVar[Literal["unit", "standardized"]] = "unit"

    _layer: ClassVar[type[KNConv2d]] = KNConv2d

    dropout_p: float | None = None
    eval_mode: EvalMode = "expected"
    gain: bool = False

    def __post_init__(self) -> None:
        p = self.dropout_p
        if p is not None and not (math.isfinite(p) and 0 <= p < 1):
            raise UserError(
                f"dropout_p = {p!r} of normalizer '{self.name}' must be at least 0, below 1"
            )
        if self.eval_mode not in get_args(EvalMode):
            raise unknown_name("eval_mode", str(self.eval_mode), get_args(EvalMode))

    @property
    def label(self) -> str:
        """Title, dropout, and how it evaluates where that is not the default."""
        dropout = "dropout as published" if self.dropout_p is None else f"dropout {self.dropout_p}"
        mode = "" if self.eval_mode == "expected" else f", {self.eval_mode} evaluation"
        gain = ", with a gain" if self.gain else ""
        return f"{self.title} ({dropout}{mode}{gain})"

    def norm(self, channels: int) -> nn.Module:
        """Return KernelNorm2d with a 1x1 kernel: each pixel normalized over its channels."""
        del channels
        return KernelNorm2d(1, dropout_p=self._dropout, eval_mode=self.eval_mode)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        then_norm: bool = False,
        **options: Unpack[ConvOptions],
    ) -> nn.Module:
        """Return KNConv2d, always with a bias: no norm follows it."""
        del then_norm
        return self._knconv(in_channels, out_channels, kernel_size, None, options)

    def conv_norm(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        activation: str | None = None,
        **options: Unpack[ConvOptions],
    ) -> nn.Module:
        """Return KNConv2d and activation. A ReLU is fused into KNConv2d: one map less to keep."""
        fused: Literal["relu"] | None = "relu" if activation == "relu" and not self.gain else None
        return chain(
            conv=self._knconv(in_channels, out_channels, kernel_size, fused, options),
            gain=ChannelGain(out_channels) if self.gain else None,
            activation=None if fused else activation_layer(activation),
        )

    @property
    def _dropout(self) -> float:
        return PUBLISHED_DROPOUT if self.dropout_p is None else self.dropout_p

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return the activation alone: the convolution that follows normalizes."""
        del channels
        return {"activation": activation_layer(activation)}

    def _knconv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        activation: Literal["relu"] | None,
        options: ConvOptions,
    ) -> nn.Module:
        return self._layer(
            in_channels,
            out_channels,
            kernel_size,
            dropout_p=self._dropout,
            eval_mode=self.eval_mode,
            activation=activation,
            **options,
        )
