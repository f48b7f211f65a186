"""What a norm layer takes, and whether its class does more than normalize."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedkn.models.hooks import strip_hooks

__all__ = [
    "UNUSABLE",
    "Layout",
    "Norm",
    "channels_of",
    "computes",
    "layout_of",
    "torch_class",
]

Norm = _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm
Layout = Literal[
    "maps", "channels_last", "series", "volumes", "features", "other", "own", "unclear", "pixels"
]

UNUSABLE: dict[Layout, str] = {
    "other": "it does not normalize image maps",
    "own": "its class has a forward of its own, which does more than normalize",
    "unclear": "which of its axes are the channels cannot be told: no convolution beside it has as "
    "many as its first",
    "pixels": "it normalizes every channel's map by itself, with a scale for each pixel, and does "
    "not say how many channels there are",
}
"""Why a norm of such a layout is left as it is."""


def channels_of(norm: nn.Module, layout: Layout) -> int:
    """Return the number of channels that a norm of `layout` was made for."""
    if isinstance(norm, _BatchNorm | _InstanceNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0 if layout == "maps" else -1]
    raise TypeError(f"{type(norm).__name__} is not a norm with a number of channels")


def layout_of(
    norm: nn.Module, source: fx.Node | None, beside: set[int], dims: int | None = None
) -> Layout:
    """Return what `norm` takes.

    Image maps (N, C, H, W), channels_last (N, H, W, C), series (N, C, L), volumes (N, C, D, H, W),
    features (N, C), other; own: its class does more than normalize. LayerNorms over whole maps are
    "maps" where the first of their axes is as long as a convolution `beside` them has channels,
    else "unclear"; over pixels alone they are "pixels".

    Args:
        source: where its input comes from in the data flow, None if that is not known.
        beside: the numbers of channels of convolutions right before and after it.
        dims: how many axes beside examples and channels the layers near it have, None: not known.
    """
    if not isinstance(norm, nn.LayerNorm):
        return _of_channels(norm, dims)
    axes = len(norm.normalized_shape)
    if type(norm).forward is not nn.LayerNorm.forward:
        return "maps" if axes == 1 and _normalizes_maps(norm) else "other"
    if axes in (1, 3) and _moves_channels_last(source):
        return "channels_last"
    if axes == 3:
        return "maps" if norm.normalized_shape[0] in beside else "unclear"
    return "pixels" if axes == 2 and beside else "other"


def torch_class(norm: nn.Module) -> type[nn.Module]:
    """Return the nearest class of torch's that a norm is made of."""
    return next(kind for kind in type(norm).__mro__ if kind.__module__.startswith("torch."))


def computes(norm: nn.Module, channels: int, by_hand: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether `norm` gives for maps what `by_hand` gives with its tensors, in evaluation."""
    twin = _with_numbers(norm).eval()  # a copy: a forward may leave marks
    strip_hooks(twin)  # nobody hears of the trial
    like = next(twin.parameters(), torch.empty(0))
    x = torch.arange(12 * channels, dtype=like.dtype, device=like.device).sin()
    maps = x.view(2, channels, 2, 3)
    try:
        with torch.no_grad():
            out, expected = twin(maps), by_hand(twin, maps)
    except Exception:  # the model's own code, or a forward for another layout, may raise anything
        return False
    return isinstance(out, Tensor) and out.shape == maps.shape and torch.allclose(out, expected)


def _of_channels(norm: nn.Module, dims: int | None) -> Layout:
    if isinstance(norm, _IMAGES) or (dims not in _LAYOUTS and not isinstance(norm, _OTHERS)):
        return "maps" if _only_normalizes(norm) else "own"
    if not type(norm).__module__.startswith("torch."):
        return "own"
    if isinstance(norm, _VOLUMES):
        return "volumes"
    if isinstance(norm, _SERIES):
        return "features" if dims == 0 else "series"
    return _LAYOUTS[dims]


_SERIES = nn.BatchNorm1d | nn.InstanceNorm1d
_VOLUMES = nn.BatchNorm3d | nn.InstanceNorm3d
_IMAGES = nn.BatchNorm2d | nn.InstanceNorm2d
_OTHERS = _SERIES | _VOLUMES
_LAYOUTS: dict[int | None, Layout] = {0: "features", 1: "series", 3: "volumes"}


def _only_normalizes(norm: nn.Module) -> bool:
    """Whether a class derived from one of torch's norms computes what that one does: try it."""
    base: Any = torch_class(norm)
    if type(norm).forward is base.forward:
        return True
    # Parts that do something in training alone, such as dropout, would not show in a trial.
    if any(type(part) is not nn.Identity for part in norm.children()):
        return False
    return computes(norm, channels_of(norm, "maps"), base.forward)


def _moves_channels_last(node: fx.Node | None) -> bool:
    if node is None or node.op not in ("call_function", "call_method"):
        return False
    if node.target not in (torch.permute, "permute"):
        return False
    order = node.args[1] if len(node.args) == 2 else node.args[1:]
    order = order or node.kwargs.get("dims")
    return isinstance(order, tuple | list) and list(order) == [0, 2, 3, 1]


def _normalizes_maps(norm: nn.LayerNorm) -> bool:
    """Whether a LayerNorm with a forward of its own normalizes (N, C, H, W) over C: try it."""

    def by_hand(twin: nn.LayerNorm, maps: Tensor) -> Tensor:
        return nn.LayerNorm.forward(twin, maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return computes(norm, norm.normalized_shape[0], by_hand)


def _with_numbers(norm: nn.Module) -> nn.Module:
    """Return a copy of `norm`, on the CPU with numbers in its tensors if it is on "meta"."""
    twin = copy.deepcopy(norm)
    if not any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        return twin
    twin.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(torch.linspace(0.5, 2, tensor.numel()).view(tensor.shape))
    return twin
