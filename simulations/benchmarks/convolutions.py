"""fedkn's 3x3 convolutions on the CPU beside PyTorch's: a forward pass and both gradients.

``python -m simulations.benchmarks.convolutions``: one thread, processor time, in turn, medians; and
the root mean square errors of outputs and gradients, each by those of PyTorch's, against float64.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedkn.layers.native import library

__all__ = ["IMAGES", "SHAPES", "compared"]

SHAPES = (
    (8, 8, 16, 16), (8, 16, 16, 8), (2, 16, 16, 32), (8, 16, 16, 32), (2, 32, 32, 16),
    (8, 32, 64, 16), (2, 64, 64, 8), (8, 64, 64, 8), (2, 128, 128, 4), (8, 128, 128, 8),
)  # fmt: skip
"""Maps, channels, filters and side: of `small`, `fixed` and ResNet-8 of width 16, and wider."""

IMAGES = ((8, 3, 8, 32), (2, 3, 16, 32), (8, 3, 32, 32), (8, 1, 32, 28))
"""The same of images, whose gradient nobody wants."""

_TURNS = 9

Convolution = Callable[[], tuple[Tensor, ...]]


def compared(shape: tuple[int, int, int, int]) -> tuple[float, float, float]:
    """Return the seconds of ours and of PyTorch's, and the largest ratio of their errors."""
    samples, channels, filters, side = shape
    last = torch.channels_last
    draw = torch.Generator().manual_seed(0)
    sizes = (
        (samples, channels, side, side),
        (filters, channels, 3, 3),
        (samples, filters, side, side),
    )
    x, weight, g = (torch.randn(n, generator=draw).contiguous(memory_format=last) for n in sizes)
    own, images = torch.ops.fedkn_native, channels <= 4
    lanes = 0 if images else own.winograd_lanes(x.shape, filters)

    def ours() -> tuple[Tensor, ...]:
        if images:
            y = own.first_convolution_forward(x, weight)
            return y, own.first_convolution_backward(g, x, weight)
        y = own.winograd_forward(x, weight, lanes)
        return y, *own.winograd_backward(g, x, weight, lanes, [True, True])

    def theirs() -> tuple[Tensor, ...]:
        return _by_torch(x, weight, g, not images)

    exact = _by_torch(x.double(), weight.double(), g.double(), not images)
    errors = [[_rms(a - b) for a, b in zip(way(), exact, strict=True)] for way in (ours, theirs)]
    calls = max(1, int(2e8 / (samples * channels * filters * side * side * 54)))
    taken = [[_seconds(way, calls) for way in (ours, theirs)] for _ in range(_TURNS)]
    mine, other = (statistics.median(column) for column in zip(*taken, strict=True))
    return mine, other, max(a / b for a, b in zip(*errors, strict=True))


def _by_torch(x: Tensor, weight: Tensor, g: Tensor, inner: bool) -> tuple[Tensor, ...]:
    """Return output and gradients, of x where it is an inner layer's."""
    y = torch.conv2d(x, weight, None, 1, 1)
    one, none = [1, 1], [0, 0]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, one, one, one, False, none, 1, [inner, True, False]
    )
    return (y, dx, dw) if inner else (y, dw)


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _seconds(way: Convolution, calls: int) -> float:
    begun = time.process_time()
    for _ in range(calls):
        way()
    return (time.process_time() - begun) / calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not library.load() or not torch.ops.fedkn_native.winograd_lanes([8, 8, 8, 8], 8):
        sys.exit("the fused CPU kernels cannot be had here")
    print("| maps, channels, filters, side | PyTorch, ms | fedkn, ms | ratio | errors |")  # noqa: T201
    print("|---|---|---|---|---|")  # noqa: T201
    with torch.no_grad():
        for each in (*SHAPES, *IMAGES):
            own, torchs, error = compared(each)
            cells = ", ".join(map(str, each))
            print(  # noqa: T201
                f"| {cells} | {1e3 * torchs:.2f} | {1e3 * own:.2f} | {own / torchs:.2f} "
                f"| {error:.1f} |"
            )
