"""A kernel-normalized convolution against a convolution with BatchNorm, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkn.layers import KNConv2d, dropout_stream
from fedkn.training.precision import computing_in
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["LayerCase", "LayerTime", "layer_cases", "measure_layer"]

_TENSORS = {
    "channel_sums": 1,
    "epilogue": 2,
    "reduce_gradient": 3,
    "finish_gradients": 3,
}
"""How many maps each of fedkn's kernels reads and writes; what else it touches is small beside."""


@dataclass(frozen=True)
class LayerCase:
    """A 3x3 layer from `channels` to as many on `batch` maps of `side` pixels to a side."""

    batch: int
    channels: int
    side: int
    channels_last: bool
    dropout: float = 0.05

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "contiguous"
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}, {layout}, p = {self.dropout}"


@dataclass(frozen=True)
class LayerTime:
    """Forward and backward of the layer, as one CUDA graph each.

    Attributes:
        kernel, batch: milliseconds of KNConv2d, and of a convolution with BatchNorm.
        gigabytes: a second, that a copy of maps of this size moves.
        shares: by kernel of fedkn's, how much of that it reaches. microseconds: what each took.
    """

    case: LayerCase
    kernel: float
    batch: float
    gigabytes: float
    shares: Mapping[str, float]
    microseconds: Mapping[str, float]


def layer_cases() -> Iterator[LayerCase]:
    """Yield the layers of the table, the largest maps in the layout of GPUs first."""
    shapes = ((32, 64, 56), (32, 256, 56), (32, 512, 14), (128, 64, 32), (8, 64, 32), (2, 256, 8))
    for channels_last in (True, False):
        for shape in shapes:
            yield LayerCase(*shape, channels_last)
        for shape in (shapes[0], shapes[-1]):
            yield LayerCase(*shape, channels_last, dropout=0.0)


def measure_layer(case: LayerCase, device: Gpu) -> LayerTime:
    """Time both layers in TF32, and each of fedkn's kernels."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    draw = torch.Generator().manual_seed(0)
    size = (case.batch, case.channels, case.side, case.side)

    def drawn() -> Tensor:
        maps = torch.randn(size, generator=draw).to(device.place)
        return maps.contiguous(memory_format=layout)

    x, towards = drawn().requires_grad_(), drawn()
    channels = case.channels
    kernel = KNConv2d(channels, channels, 3, padding=1, dropout_p=case.dropout)
    batch = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
    )
    seed = torch.zeros((), dtype=torch.int64, device=device.place)
    times = []
    with computing_in("tf32", device.place):
        for layer in (kernel, batch):
            layer.to(device.place).to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
            graph = device.capture(_step_of(layer, x, towards, seed), tuple(layer.buffers()))
            times.append(device.milliseconds(graph.replay, seconds=0.1))
        found = device.kernel_microseconds(_step_of(kernel, x, towards, seed))
    other = torch.empty_like(x)
    copy = device.capture(lambda: _copy(other, x.detach()))
    moved = 2 * x.numel() * x.element_size()
    gigabytes = moved / 1e6 / device.milliseconds(copy.replay, seconds=0.05)
    own = {
        name: sum(taken for key, taken in found.items() if name in key)
        for name in _TENSORS
        if any(name in key for key in found)
    }
    shares = {
        name: _TENSORS[name] * x.numel() * x.element_size() / 1e3 / taken / gigabytes
        for name, taken in own.items()
    }
    return LayerTime(
        case,
        kernel=times[0],
        batch=times[1],
        gigabytes=gigabytes,
        shares=shares,
        microseconds=own,
    )


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def _step_of(layer: nn.Module, x: Tensor, towards: Tensor, seed: Tensor) -> Callable[[], None]:
    leaves = (x, *layer.parameters())

    def step() -> None:
        with dropout_stream(seed):
            torch.autograd.grad(layer(x), leaves, towards)

    return step
