"""Which convolution stands next to which norm, in any torch model.

The data flow is read from a symbolic trace (torch.fx). A model that cannot be traced is read in the
order of its modules, which is right for models that register their layers as they call them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import activation as activations
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedkn.layers import KernelNorm2d, KNConv2d
from fedkn.models.blocks import Halve

__all__ = [
    "COMPUTED_WEIGHT",
    "UNUSABLE",
    "Conv",
    "NormSite",
    "Wiring",
    "computes_its_weight",
    "norm_channels",
    "read_wiring",
]

Conv = nn.Conv2d | KNConv2d
Layout = Literal["maps", "channels_last", "other", "own"]

UNUSABLE = {
    "other": "it does not normalize image maps",
    "own": "its class has a forward of its own, which does more than normalize",
}
"""Why a norm of such a layout is left as it is."""

COMPUTED_WEIGHT = "weight is computed, as by torch.nn.utils.spectral_norm: take that away first"
"""Why a convolution is, whose weight `computes_its_weight` says to be no parameter."""


@dataclass(frozen=True)
class NormSite:
    """A norm and its neighbours.

    Attributes:
        name: the norm's path in the model. layout: what it takes, image maps (N, C, H, W),
            channels_last (N, H, W, C), or other; own, if its class does more than normalize.
        before: the convolution whose output this norm alone reads. after: the convolutions that
            alone read the norm, at most through activations and dropout.
        writers: in-place modules that would write into the norm's input if the norm handed it
            on as it is. overwritten: the model's own code does so, or nobody can tell.
    """

    name: str
    layout: Layout
    before: str | None = None
    after: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    overwritten: bool = False


@dataclass(frozen=True)
class Wiring:
    """All norms of a model; `traced`: read from the data flow, not from the order of modules.

    `strangers` are layers of no known kind that hold parameters or buffers: they may be norms.
    """

    sites: tuple[NormSite, ...]
    traced: bool
    convolutions: tuple[str, ...]
    strangers: tuple[str, ...]


def read_wiring(model: nn.Module) -> Wiring:
    """Return where the norms of `model` are and which convolutions are next to them."""
    convolutions = tuple(name for name, m in model.named_modules() if isinstance(m, Conv))
    strangers = tuple(name for name, m in model.named_modules() if name and _is_strange(m))
    try:
        graph = _Tracer().trace(model)
    except Exception:  # a trace runs the model's own code, which may raise anything
        return Wiring(tuple(_in_module_order(model)), False, convolutions, strangers)
    return Wiring(tuple(_in_data_flow(model, graph)), True, convolutions, strangers)


def norm_channels(norm: nn.Module) -> int:
    """Return the number of channels that a norm layer was made for."""
    if isinstance(norm, _BatchNorm | _InstanceNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[-1]
    raise TypeError(f"{type(norm).__name__} is not a norm with a number of channels")


def computes_its_weight(conv: nn.Module) -> bool:
    """Return whether the weight of a convolution is no parameter of its own."""
    return "weight" not in conv._parameters


_Norm = _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm
_NOT_MAPS = (nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm3d)
_NOT_POINTWISE = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_NOT_NORMS = (
    Conv
    | nn.modules.conv._ConvNd
    | nn.Linear
    | nn.Bilinear
    | nn.Embedding
    | nn.EmbeddingBag
    | nn.RNNBase
    | nn.RNNCellBase
    | nn.MultiheadAttention
    | nn.PReLU
)
_POINTWISE: set[Callable[..., Any]] = {
    torch.relu,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.dropout,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, _Norm | Conv | KernelNorm2d | Halve)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _in_data_flow(model: nn.Module, graph: fx.Graph) -> Iterator[NormSite]:
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)

    def single_conv(node: Any) -> str | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        name = str(node.target)
        return name if isinstance(modules[name], Conv) and len(calls[name]) == 1 else None

    for name, module in modules.items():
        if not isinstance(module, _Norm):
            continue
        if len(calls.get(name, ())) != 1:
            # Never called, or in several places: no neighbour may be changed on its behalf.
            yield NormSite(name, _layout(module, None), overwritten=True)
            continue
        node = calls[name][0]
        source = _only_input(node)
        layout = _layout(module, source)
        if layout == "channels_last" and source is not None:
            source = _only_input(source) if len(source.users) == 1 else None
        alone = source is not None and len(source.users) == 1
        reached = list(_reached(node, modules))
        convs = [single_conv(n) for n in reached if not _is_pointwise(n, modules)]
        yield NormSite(
            name,
            layout,
            before=single_conv(source) if alone else None,
            after=tuple(conv for conv in convs if conv) if convs and all(convs) else (),
            writers=tuple(str(n.target) for n in reached if _is_writer(n, modules)),
            overwritten=any(map(_overwrites, reached)),
        )


def _only_input(node: fx.Node) -> fx.Node | None:
    inputs = node.all_input_nodes
    return inputs[0] if len(inputs) == 1 else None


def _reached(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """Yield what reads `node`, and what reads that where it is an activation or dropout."""
    for user in node.users:
        yield user
        if _is_pointwise(user, modules):
            yield from _reached(user, modules)


def _is_writer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and bool(getattr(modules[str(node.target)], "inplace", False))


def _overwrites(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (operator.iadd, operator.imul) or bool(node.kwargs.get("inplace"))
    return node.op == "call_method" and str(node.target).endswith("_")


def _is_pointwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _is_pointwise_module(modules[str(node.target)])
    if node.op == "call_function":
        return node.target in _POINTWISE
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _is_pointwise_module(module: nn.Module) -> bool:
    if isinstance(module, nn.Identity | _DropoutNd):
        return True
    known = type(module).__module__ == activations.__name__
    return known and not isinstance(module, _NOT_POINTWISE)


def _in_module_order(model: nn.Module) -> Iterator[NormSite]:
    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _Norm | Conv) or not any(module.children())
    ]
    for place, (name, module) in enumerate(leaves):
        if not isinstance(module, _Norm):
            continue
        channels = norm_channels(module)
        earlier = leaves[place - 1] if place else ("", model)
        reached = list(leaves[place + 1 : place + 2])
        for leaf in leaves[place + 2 :]:
            if _is_pointwise_module(reached[-1][1]):
                reached.append(leaf)
        convs = [n for n, m in reached if not _is_pointwise_module(m)]
        follows = bool(reached) and _is_conv(reached[-1][1], "in_channels", channels)
        yield NormSite(
            name,
            _layout(module, None),
            before=earlier[0] if _is_conv(earlier[1], "out_channels", channels) else None,
            after=tuple(convs) if follows else (),
            writers=tuple(n for n, m in reached if getattr(m, "inplace", False)),
            overwritten=True,
        )


def _is_conv(module: nn.Module, side: str, channels: int) -> bool:
    return isinstance(module, Conv) and getattr(module, side) == channels


def _is_strange(module: nn.Module) -> bool:
    """Whether a layer holds tensors itself and is neither a norm that is known nor none."""
    if isinstance(module, _Norm | KernelNorm2d | _NOT_NORMS):
        return False
    # The containers of a model hold parameters too, such as a class token: those have parts.
    if any(module.children()):
        return False
    return bool(module._parameters or module._buffers)


def _layout(norm: nn.Module, source: fx.Node | None) -> Layout:
    if isinstance(norm, _NOT_MAPS):
        return "other"
    if not isinstance(norm, nn.LayerNorm):
        return "maps" if _only_normalizes(norm) else "own"
    if len(norm.normalized_shape) != 1:
        return "other"
    if type(norm).forward is nn.LayerNorm.forward:
        return "channels_last" if _moves_channels_last(source) else "other"
    return "maps" if _normalizes_maps(norm) else "other"


def _only_normalizes(norm: nn.Module) -> bool:
    """Whether a class derived from one of torch's norms computes what that one does: try it."""
    base: Any = next(kind for kind in type(norm).__mro__ if kind.__module__.startswith("torch."))
    if type(norm).forward is base.forward:
        return True
    return _computes(norm, norm_channels(norm), base.forward)


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

    return _computes(norm, norm.normalized_shape[0], by_hand)


def _computes(norm: nn.Module, channels: int, by_hand: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether `norm` gives for maps what `by_hand` gives with its tensors, in evaluation."""
    like = next(norm.parameters(), torch.empty(0))
    x = torch.arange(12 * channels, dtype=like.dtype, device=like.device).sin()
    maps = x.view(2, channels, 2, 3)
    twin = copy.deepcopy(norm).eval()  # a forward may leave marks
    try:
        with torch.no_grad():
            out, expected = twin(maps), by_hand(twin, maps)
    except Exception:  # the model's own code, or a forward for another layout, may raise anything
        return False
    return isinstance(out, Tensor) and out.shape == maps.shape and torch.allclose(out, expected)
