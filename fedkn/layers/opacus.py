"""Per-sample gradients of fedkn's layers for Opacus.

Opacus falls back to functorch for layers it does not know, which breaks on an empty Poisson batch
and on dropout inside a layer. `register` teaches it the KNConv layers: with z the output before
the bias, s the scale and mu the mean of each position,
dw[n] = sum over positions of (g * s)[n] * (unit - mu)[n].

It also puts another rule in place of Opacus' own for Conv2d. That one (as of 1.6) reads its input
with the strides of a contiguous tensor: in channels_last, the layout of most of fedkn's networks,
its gradients are silently wrong and mix the examples of a batch. Padding other than with zeros it
ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers.composite import Settings, draw_mask
from fedkn.layers.dropout import drop_level, dropout_stream, next_number
from fedkn.layers.functional import place_windows
from fedkn.layers.kn_conv import KNConv, KNConv1d, KNConv2d
from fedkn.layers.rivals import LayerNorm2d
from fedkn.layers.statistics import statistics

__all__ = ["register"]


def register() -> None:
    """Register the per-sample gradients of KNConv1d, KNConv2d, Conv2d and LayerNorm2d with Opacus.

    Call it before a model is made private. Raises UserError if Opacus is not installed.
    """
    try:
        from opacus.grad_sample import register_grad_sampler  # noqa: PLC0415 - optional
        from opacus.grad_sample.group_norm import (  # noqa: PLC0415 - optional
            compute_group_norm_grad_sample,
        )
    except ImportError as error:
        raise UserError("Opacus is not installed: pip install 'fedkn[privacy]'") from error
    register_grad_sampler([KNConv1d, KNConv2d])(_per_sample_gradients)
    register_grad_sampler(nn.Conv2d)(_convolution_gradients)
    register_grad_sampler(LayerNorm2d)(compute_group_norm_grad_sample)
    KNConv.recorder = _Recorder()


class _Recorder:
    """Remembers each forward pass's dropout seed until Opacus asks for its gradients."""

    def __init__(self) -> None:
        self._seeds: WeakKeyDictionary[nn.Module, list[tuple[int, int]]] = WeakKeyDictionary()

    def __call__(self, layer: nn.Module, x: Tensor) -> AbstractContextManager[object]:
        # Opacus hooks the layers it serves; it ignores evaluation and passes without gradients.
        if not (layer._forward_hooks and layer.training and torch.is_grad_enabled()):
            return nullcontext()
        seed = next_number()
        self._seeds.setdefault(layer, []).append((x.data_ptr(), seed))
        return dropout_stream(seed)

    def recall(self, layer: nn.Module, x: Tensor) -> int:
        seeds = self._seeds.get(layer, [])
        for i in range(len(seeds) - 1, -1, -1):
            address, seed = seeds[i]
            if address == x.data_ptr():
                del seeds[i:]
                return seed
        raise UserError(
            "a KNConv layer was run before fedkn.layers.opacus.register(): register first"
        )


def _per_sample_gradients(
    layer: KNConv, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    assert isinstance(layer.recorder, _Recorder)
    x, g = activations[0], backprops
    seed = layer.recorder.recall(layer, x)
    samples = x.shape[0]
    found: dict[Tensor, Tensor] = {}
    if samples == 0:
        return _no_gradients(layer)
    if layer.activation is not None:
        with torch.no_grad(), dropout_stream(seed):
            g = g * (layer.apply_to(x) > 0)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.flatten(2).sum(2)
    if layer.weight.requires_grad:
        with dropout_stream(seed):
            found[layer.weight] = _weight_gradients(layer, x, g)
    return found


def _weight_gradients(layer: KNConv, x: Tensor, g: Tensor) -> Tensor:
    padded, geometry = place_windows(
        x, layer.weight, layer.stride, layer.padding, layer.dilation, layer.groups,
        layer.padding_mode,
    )  # fmt: skip
    level = drop_level(layer.dropout_p)
    settings = Settings(geometry, next_number() if level else None, level, layer.eps, relu=False)
    mean, variance = statistics(padded, draw_mask(padded, settings), level, geometry)
    scale = torch.rsqrt(variance + layer.eps)
    units = F.unfold(padded, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    dz = g.flatten(2) * scale.flatten(2)
    gradient = _products(dz, units, layer.groups)
    offset = torch.einsum("nop,np->no", dz, mean.flatten(1))
    return (gradient - offset.unsqueeze(2)).view(len(x), *layer.weight.shape)


def _convolution_gradients(
    layer: nn.Conv2d, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    x, g = activations[0], backprops.flatten(2)
    if not len(x):
        return _no_gradients(layer)
    found: dict[Tensor, Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.sum(2)
    if layer.weight.requires_grad:
        # What the layer itself pads by, for every kind of padding.
        edges = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, edges, mode=mode)
        units = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        found[layer.weight] = _products(g, units, layer.groups).view(len(x), *layer.weight.shape)
    return found


def _products(g: Tensor, units: Tensor, groups: int) -> Tensor:
    """Sum (N, O, P) times (N, groups * K, P) over the positions, within groups: (N, O, K)."""
    samples, _, positions = g.shape
    products = torch.einsum(
        "ngop,ngkp->ngok",
        g.reshape(samples, groups, -1, positions),
        units.reshape(samples, groups, -1, positions),
    )
    return products.reshape(samples, g.shape[1], -1)


def _no_gradients(layer: KNConv | nn.Conv2d) -> dict[Tensor, Tensor]:
    present = (p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad)
    return {parameter: torch.zeros_like(parameter).unsqueeze(0) for parameter in present}
