"""The convolution of K clients' maps by their own filters: fedkn's kernels against cuDNN's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.settings import Geometry
from fedkn.layers.stacked_convolution import convolve_stacked
from fedkn.training.precision import computing_in
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["ConvolutionCase", "ConvolutionTime", "convolution_cases", "measure_convolution"]

_CALLS = 10
_GEOMETRY = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


@dataclass(frozen=True)
class ConvolutionCase:
    """A 3x3 convolution of `batch` maps of each client, `side` pixels to a side."""

    clients: int
    batch: int
    channels: int
    filters: int
    side: int

    def __str__(self) -> str:
        return (
            f"{self.clients} clients, {self.batch}x{self.channels}x{self.side}x{self.side}, "
            f"{self.filters} filters"
        )


@dataclass(frozen=True)
class ConvolutionTime:
    """Milliseconds forward and backward, for all clients, each as one CUDA graph.

    `own`: by one launch of fedkn's kernels, float32. `grouped`, `grouped_tf32`: as one convolution
    of as many groups as there are clients, channels last, in float32 and with TF32 products.
    """

    case: ConvolutionCase
    own: float
    grouped: float
    grouped_tf32: float


def convolution_cases() -> Iterator[ConvolutionCase]:
    """Yield the layers of ResNet-8 of width 16 on 32x32 images, 64 clients, batches of 2."""
    for channels, filters, side in ((3, 16, 32), (16, 32, 32), (32, 32, 16), (64, 64, 8)):
        yield ConvolutionCase(64, 2, channels, filters, side)


def measure_convolution(case: ConvolutionCase, device: Gpu) -> ConvolutionTime:
    """Time the case in all three ways."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device.place).requires_grad_()

    x = drawn(case.clients, case.batch, case.channels, case.side, case.side)
    weight = drawn(case.clients, case.filters, case.channels, 3, 3)
    last = torch.channels_last
    maps = x.detach().transpose(0, 1).flatten(1, 2).contiguous(memory_format=last).requires_grad_()
    filters = weight.detach().flatten(0, 1).contiguous(memory_format=last).requires_grad_()
    own = _step_of(lambda: convolve_stacked(x, weight, None, _GEOMETRY), (x, weight))
    grouped = _step_of(
        lambda: F.conv2d(maps, filters, None, 1, 1, 1, case.clients), (maps, filters)
    )
    return ConvolutionTime(
        case,
        own=_milliseconds(own, "float32", device),
        grouped=_milliseconds(grouped, "float32", device),
        grouped_tf32=_milliseconds(grouped, "tf32", device),
    )


def _step_of(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(forward().sum(), leaves)

    return step


def _milliseconds(step: Callable[[], None], precision: str, device: Gpu) -> float:
    def several() -> None:
        for _ in range(_CALLS):
            step()

    with computing_in(precision, device.place):
        graph = device.capture(several)
    return device.milliseconds(graph.replay, seconds=0.05, calls=1) / _CALLS
