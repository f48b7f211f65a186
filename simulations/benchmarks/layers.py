"""One layer, forward and backward: KNConv2d against a convolution with its rivals' norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkn.layers import KNConv2d, LayerNorm2d, WSConv2d, dropout_stream
from simulations.benchmarks.measurement import Case, measured, native_cases
from simulations.benchmarks.results import Row
from simulations.benchmarks.unfolded import UnfoldedKNConv2d

__all__ = ["BASELINE", "SHAPES", "LayerShape", "layer_rows"]

BASELINE = "conv + batch"


@dataclass(frozen=True)
class LayerShape:
    """A 3x3 layer from `channels` to as many, on a map of `size` x `size`."""

    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels} ch, {self.size}x{self.size}"


# The stages of a ResNet-8 of width 16 and of the published ResNet-8 and ResNet-18 on 32x32.
SHAPES = (LayerShape(16, 32), LayerShape(64, 32), LayerShape(128, 16), LayerShape(256, 8))


def layer_rows(
    shape: LayerShape,
    batch_size: int,
    *,
    repetitions: int,
    device: torch.device,
    channels_last: bool,
    compile_too: bool = False,
) -> list[Row]:
    """Time forward and backward of every rival on one shape, in turn; memory beside.

    Standard normal inputs; the gradient of the input is computed too, as inside a network. The
    kernel-normalized layers train with the published dropout of 0.05.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, shape.channels, shape.size, shape.size)

    def draw() -> Tensor:
        noise = torch.randn(size, generator=generator)
        return noise.to(device).contiguous(memory_format=layout)

    x, towards = draw().requires_grad_(), draw()
    layers = {name: layer.to(device) for name, layer in _layers(shape.channels).items()}
    for layer in layers.values():
        for parameter in layer.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
    kernel = layers.pop("KNConv")
    fused = layers.pop("KNConv + ReLU, fused")
    cases = {name: Case(_step(layer, x, towards), layer) for name, layer in layers.items()}
    cases |= native_cases("KNConv", _step(kernel, x, towards), kernel, device)
    cases |= native_cases("KNConv + ReLU, fused", _step(fused, x, towards), fused, device)
    if compile_too:
        for name, layer in ((BASELINE, layers[BASELINE]), ("KNConv", kernel)):
            twin = copy.deepcopy(layer)
            twin.compile()
            cases[f"{name}, compiled"] = Case(_step(twin, x, towards), None)
    return measured(
        cases,
        x.detach(),
        subject=str(shape),
        baseline=BASELINE,
        repetitions=repetitions,
        device=device,
    )


def _layers(channels: int) -> dict[str, nn.Module]:
    def conv(*, bias: bool = False) -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    groups = min(8, channels // 2)
    kernel = KNConv2d(channels, channels, 3, padding=1)
    return {
        "conv": conv(bias=True),
        "conv + batch": nn.Sequential(conv(), nn.BatchNorm2d(channels)),
        "conv + batch + ReLU": nn.Sequential(conv(), nn.BatchNorm2d(channels), nn.ReLU()),
        "conv + ReLU": nn.Sequential(conv(bias=True), nn.ReLU()),
        "conv + group": nn.Sequential(conv(), nn.GroupNorm(groups, channels)),
        "conv + layer": nn.Sequential(conv(), LayerNorm2d(channels)),
        "ws conv + group": nn.Sequential(
            WSConv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels)
        ),
        "KNConv": kernel,
        "KNConv + ReLU, fused": KNConv2d(channels, channels, 3, padding=1, activation="relu"),
        "KNConv, unfolded": UnfoldedKNConv2d(KNConv2d(channels, channels, 3, padding=1)),
    }


def _step(layer: nn.Module, x: Tensor, towards: Tensor) -> Callable[[], None]:
    def step() -> None:
        with dropout_stream(0):  # as the training loop seeds every step
            layer(x).backward(towards)
        # Last, so that a step whose memory is taken does not begin by giving some back.
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    return step
