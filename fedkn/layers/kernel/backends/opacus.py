"""Gradients of each example for Opacus: of KNConv's weight and bias, from those of its output.

With z the output before the bias, s the scale and mu the mean of each position,
dw[n] = sum over positions of (g * s)[n] * (unit - mu)[n].

Opacus keeps a layer's input in a hook on its forward pass and asks for the gradients in one on its
backward pass. What it does not keep is the dropout mask: where such a hook is on this very layer,
its forward pass is `forward`, which draws the mask from a seed and remembers that until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers.kernel.dropout import draw_mask, dropout_stream, next_number
from fedkn.layers.kernel.settings import Geometry, Settings
from fedkn.layers.kernel.statistics import statistics

__all__ = ["backward", "forward", "no_gradients", "products", "serves"]


class _Layer(Protocol):
    """What is asked of a KNConv."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    training: bool
    activation: str | None
    eps: float
    groups: int

    def apply_to(self, x: Tensor) -> Tensor: ...
    def placed(self, x: Tensor) -> tuple[Tensor, Geometry]: ...
    def settings(self, geometry: Geometry, draw: Callable[[], int | Tensor]) -> Settings: ...


def serves(layer: nn.Module) -> bool:
    """Whether Opacus will ask `backward` for the gradients of the pass that `layer` starts.

    It will where one of the layer's own hooks is of a module that knows `backward`. Opacus ignores
    evaluation and passes without gradients.
    """
    if not (layer.training and torch.is_grad_enabled()):
        return False
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    return any(backward in getattr(owner, "GRAD_SAMPLERS", {}).values() for owner in owners)


def forward(layer: _Layer, x: Tensor) -> Tensor:
    """Apply `layer` to `x` with a dropout of its own, and remember its seed for `backward`."""
    seed = next_number()
    _seeds.setdefault(layer, []).append((x.data_ptr(), seed))
    with dropout_stream(seed):
        return layer.apply_to(x)


def backward(
    layer: _Layer, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Return the gradients of the weight and the bias by example, (N, …) each, by parameter.

    `activations` has the layer's input, `backprops` is the gradient of its output. Raises UserError
    if the forward pass was before `fedkn.layers.opacus.register`.
    """
    x, g = activations[0], backprops
    seed = _recall(layer, x)
    if not len(x):
        return no_gradients(layer)
    if layer.activation is not None:
        with torch.no_grad(), dropout_stream(seed):
            g = g * (layer.apply_to(x) > 0)
    found: dict[Tensor, Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.flatten(2).sum(2)
    if layer.weight.requires_grad:
        with dropout_stream(seed):
            found[layer.weight] = _weight_gradients(layer, x, g)
    return found


def products(g: Tensor, units: Tensor, groups: int) -> Tensor:
    """Sum (N, O, P) times (N, groups * K, P) over the positions, within groups: (N, O, K)."""
    samples, _, positions = g.shape
    sums = torch.einsum(
        "ngop,ngkp->ngok",
        g.reshape(samples, groups, -1, positions),
        units.reshape(samples, groups, -1, positions),
    )
    return sums.reshape(samples, g.shape[1], -1)


def no_gradients(layer: _Layer | nn.Conv2d) -> dict[Tensor, Tensor]:
    """Return what Opacus wants of an empty batch."""
    present = (p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad)
    return {parameter: torch.zeros_like(parameter).unsqueeze(0) for parameter in present}


# By layer: where each pass's input lies in memory, and its seed. They go with their layer.
_seeds: WeakKeyDictionary[_Layer, list[tuple[int, int]]] = WeakKeyDictionary()


def _recall(layer: _Layer, x: Tensor) -> int:
    seeds = _seeds.get(layer, [])
    for i in range(len(seeds) - 1, -1, -1):
        address, seed = seeds[i]
        if address == x.data_ptr():
            del seeds[i:]
            return seed
    raise UserError("a KNConv layer was run before fedkn.layers.opacus.register(): register first")


def _weight_gradients(layer: _Layer, x: Tensor, g: Tensor) -> Tensor:
    padded, geometry = layer.placed(x)
    settings = layer.settings(geometry, next_number)
    mean, variance = statistics(padded, draw_mask(padded, settings), settings.level, geometry)
    scale = torch.rsqrt(variance + layer.eps)
    units = F.unfold(padded, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    dz = g.flatten(2) * scale.flatten(2)
    gradient = products(dz, units, layer.groups)
    offset = torch.einsum("nop,np->no", dz, mean.flatten(1))
    return (gradient - offset.unsqueeze(2)).view(len(x), *layer.weight.shape)
