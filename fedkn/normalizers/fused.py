"""Norms that come as GroupNorm or InstanceNorm, run together with the ReLU that follows them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Unpack

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers.group_norm import group_norm, pools, serves
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import ConvOptions

__all__ = [
    "OWN_HOOKS",
    "FusedNormalizer",
    "FusedSequential",
    "hooked",
    "lay_out_inputs",
    "refuse_single_value",
]


class FusedNormalizer(Normalizer):
    """A normalizer whose blocks are `FusedSequential`s of the same layers, names and values."""

    def conv_norm(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        activation: str | None = None,
        **options: Unpack[ConvOptions],
    ) -> nn.Module:
        """Return convolution, norm and activation (children ``conv``, ``norm``, ``activation``)."""
        block = super().conv_norm(
            in_channels, out_channels, kernel_size, activation=activation, **options
        )
        return FusedSequential(OrderedDict(block.named_children()))

    def norm_act(self, channels: int, activation: str | None) -> nn.Module:
        """Return norm and activation (children ``norm``, ``activation``)."""
        block = super().norm_act(channels, activation)
        return FusedSequential(OrderedDict(block.named_children()))


class FusedSequential(nn.Sequential):
    """A sequence in which a norm, and the ReLU after it, are one operation where that is possible.

    So is a pooling after them (`pooled`).

    The layers stay what they are, so whatever goes by their types or names need not know. Layers
    with hooks are called one by one: whoever hooks a layer should see its own output.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layers in turn."""
        return self._in_turn(input, None)

    def pooled(self, x: Tensor, pool: nn.Module) -> Tensor:
        """Return ``pool(self(x))``, pooled by the last norm itself where that is possible.

        `pool` is a 2x2 max-pooling with stride 2 of maps with sides of 4 and more.
        """
        return self._in_turn(x, pool)

    def _in_turn(self, x: Tensor, pool: nn.Module | None) -> Tensor:
        layers = list(self)
        place = 0
        while place < len(layers):
            layer = layers[place]
            place += 1
            if not isinstance(layer, nn.GroupNorm | nn.InstanceNorm2d) or not _fusible(layer, x):
                x = layer(x)
                continue
            following = layers[place] if place < len(layers) else None
            relu = type(following) is nn.ReLU and not (following.inplace or hooked(following))
            refuse_single_value(layer, (x,))
            groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
            place += relu
            ends = pool is not None and place == len(layers) and min(x.shape[2:]) >= 4
            pooled = ends and pools(x)
            x = group_norm(x, groups, layer.weight, layer.bias, layer.eps, relu, pooled)
            if pooled:
                return x
        return x if pool is None else pool(x)


def refuse_single_value(layer: nn.Module, inputs: tuple[object, ...]) -> None:
    """Forward pre-hook: raise UserError where a group holds one number, in training.

    The mean of one number is the number itself, so the layer would return its bias whatever it is
    given, and nothing before it would learn (known as opacus issue 567).
    """
    x = inputs[0]
    if not layer.training or not isinstance(x, Tensor) or x.dim() < 3:
        return
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else x.shape[1]
    if x.shape[1] == groups and x.shape[2:].numel() == 1:
        raise UserError(
            f"{type(layer).__name__} over {groups} groups of one channel each erases a 1x1 map: "
            "use fewer groups, larger images, or a model that pools less"
        )


def lay_out(layer: nn.Module, inputs: tuple[object, ...]) -> object:
    """Forward pre-hook of a GroupNorm: lay out as usual an input that no gradient is asked of.

    PyTorch's backward pass on the CPU ends the process where such an input is channels last (2.13).
    """
    del layer
    x = inputs[0]
    if not isinstance(x, Tensor) or x.requires_grad or not torch.is_grad_enabled():
        return None
    return (x.contiguous(), *inputs[1:])


def lay_out_inputs(model: nn.Module) -> None:
    """Give every GroupNorm of `model` the hook `lay_out`: before some may be what is frozen."""
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm) and lay_out not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(lay_out)


OWN_HOOKS = (refuse_single_value, lay_out)
"""Hooks of fedkn's own, which nobody put there to see anything."""


def _fusible(layer: nn.GroupNorm | nn.InstanceNorm2d, x: object) -> bool:
    if isinstance(layer, nn.InstanceNorm2d) and layer.track_running_stats:
        return False
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
    return (
        not hooked(layer)
        and serves(x, layer.weight, layer.bias)
        and isinstance(x, Tensor)
        and x.shape[1] == channels
    )


def hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see this layer's own inputs, outputs or gradients."""
    before = [hook for hook in layer._forward_pre_hooks.values() if hook not in OWN_HOOKS]
    return bool(
        before or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
