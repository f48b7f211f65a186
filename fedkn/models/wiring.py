"""Which convolution stands next to which norm, in any torch model.

The data flow is read from a symbolic trace (torch.fx). A model that cannot be traced is read in the
order of its modules, which is right for models that register their layers as they call them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation as activations
from torch.nn.modules.dropout import _DropoutNd

from fedkn.layers import KernelNorm2d, KNConv1d, KNConv2d
from fedkn.models.blocks import Halve
from fedkn.models.copying import copied
from fedkn.models.hooks import strip_hooks
from fedkn.models.layouts import Layout, Norm, channels_of, layout_of

__all__ = [
    "COMPUTED_WEIGHT",
    "Conv",
    "NormSite",
    "Wiring",
    "computes_its_weight",
    "read_wiring",
]

Conv = nn.Conv1d | nn.Conv2d | KNConv1d | KNConv2d

COMPUTED_WEIGHT = "weight is computed, as by torch.nn.utils.spectral_norm: take that away first"
"""Why a convolution is, whose weight `computes_its_weight` says to be no parameter."""


@dataclass(frozen=True)
class NormSite:
    """A norm and its neighbours.

    Attributes:
        name: the norm's path in the model. layout: see `layout_of`. channels: how many it has.
        before: the convolution whose output this norm alone reads. alone: why there is none.
        after: the convolutions that alone read the norm, at most through activations and dropout.
        writers: in-place modules that would write into the norm's input if the norm handed it
            on as it is. overwritten: the model's own code does so, or nobody can tell.
    """

    name: str
    layout: Layout
    channels: int
    before: str | None = None
    alone: str = ""
    after: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    overwritten: bool = False


@dataclass(frozen=True)
class Wiring:
    """All norms of a model; `traced`: read from the data flow, not from the order of modules.

    `strangers` are layers of no known kind that hold parameters or buffers: they may be norms.
    `volumes` are convolutions of three dimensions, which no normalizer has another form of.
    `read` are layers whose tensors the model's own code reads beside calling them.
    """

    sites: tuple[NormSite, ...]
    traced: bool
    convolutions: tuple[str, ...]
    strangers: tuple[str, ...]
    volumes: tuple[str, ...]
    read: frozenset[str]


def read_wiring(model: nn.Module) -> Wiring:
    """Return where the norms of `model` are and which convolutions are next to them.

    The model is left alone: what its code does to itself in a trace, it does to a copy.
    """
    convolutions = tuple(name for name, m in model.named_modules() if isinstance(m, Conv))
    strangers = tuple(name for name, m in model.named_modules() if name and _is_strange(m))
    volumes = tuple(name for name, m in model.named_modules() if isinstance(m, nn.Conv3d))
    graph = _trace(model)
    if graph is None:
        sites = tuple(_in_module_order(model))
        return Wiring(sites, False, convolutions, strangers, volumes, frozenset())
    sites = tuple(_in_data_flow(model, graph))
    return Wiring(sites, True, convolutions, strangers, volumes, _read(graph))


def computes_its_weight(conv: nn.Module) -> bool:
    """Return whether the weight of a convolution is no parameter of its own."""
    return "weight" not in conv._parameters


_POOLS = (
    nn.MaxPool1d
    | nn.AvgPool1d
    | nn.MaxPool2d
    | nn.AvgPool2d
    | nn.LPPool2d
    | nn.AdaptiveAvgPool2d
    | nn.AdaptiveMaxPool2d
    | Halve
)
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
    def __init__(self, follows_buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = follows_buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, Norm | Conv | KernelNorm2d | Halve)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph | None:
    """Return the data flow of `model`, None where it cannot be traced."""
    for follows_buffers in (True, False):  # code that writes its own buffers allows the second
        traced = copied(model)
        strip_hooks(traced)  # they are not made for a trace, and some keep what they see
        try:
            return _Tracer(follows_buffers).trace(traced)
        except Exception:  # a trace runs the model's own code, which may raise anything
            continue
    return None


def _read(graph: fx.Graph) -> frozenset[str]:
    """Return the modules of which the code that was traced reads a parameter or buffer itself."""
    return frozenset(
        str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
    )


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

    def alone(source: fx.Node | None) -> str:
        """Why `source` is no convolution that the norm after it has for itself."""
        if source is None or source.op != "call_module":
            return "no convolution stands right before it"
        name = str(source.target)
        if not isinstance(modules[name], Conv):
            return "no convolution stands right before it"
        if len(calls[name]) > 1:
            return f"'{name}', whose output it reads, is called {len(calls[name])} times"
        if len(source.users) > 1:
            return f"what '{name}' gives is read elsewhere as well"
        return ""

    for name, module in modules.items():
        if not isinstance(module, Norm):
            continue
        called = calls.get(name, [])
        if len(called) != 1:
            # Never called, or in several places: no neighbour may be changed on its behalf.
            layout = layout_of(
                module, None, _channels_beside(called, modules), _dims(called, modules)
            )
            times = f"it is called {len(called)} times" if called else "nothing calls it"
            channels = channels_of(module, layout)
            yield NormSite(name, layout, channels, alone=times, overwritten=True)
            continue
        node = called[0]
        source = _only_input(node)
        layout = layout_of(
            module, source, _channels_beside(called, modules), _dims(called, modules)
        )
        if layout == "channels_last" and source is not None:
            source = _only_input(source) if len(source.users) == 1 else None
        problem = alone(source)
        reached = list(_reached(node, modules))
        convs = [single_conv(n) for n in reached if not _is_pointwise(n, modules)]
        yield NormSite(
            name,
            layout,
            channels_of(module, layout),
            before=None if problem else single_conv(source),
            alone=problem,
            after=tuple(conv for conv in convs if conv) if convs and all(convs) else (),
            writers=tuple(str(n.target) for n in reached if _is_writer(n, modules)),
            overwritten=any(map(_overwrites, reached)),
        )


def _dims(called: list[fx.Node], modules: dict[str, nn.Module]) -> int | None:
    """Return how many axes beside examples and channels there are where a norm is `called`.

    Those of the last convolution before it, 0 after a linear layer; None where there is neither.
    """
    seen: set[fx.Node] = set()
    ahead = [argument for node in called for argument in node.all_input_nodes]
    while ahead:
        node = ahead.pop(0)
        if node in seen:
            continue
        seen.add(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if (dims := _dims_of(module)) is not None:
            return dims
        ahead += node.all_input_nodes
    return None


def _dims_of(module: nn.Module | None) -> int | None:
    if isinstance(module, nn.modules.conv._ConvNd | KNConv1d | KNConv2d):
        return len(module.kernel_size)
    return 0 if isinstance(module, nn.Linear) else None


def _channels_beside(called: list[fx.Node], modules: dict[str, nn.Module]) -> set[int]:
    """Return the channels of convolutions before and after the `called` norm."""
    found: set[int] = set()

    def conv(node: fx.Node | None) -> Conv | None:
        module = modules.get(str(node.target)) if node and node.op == "call_module" else None
        return module if isinstance(module, Conv) else None

    for node in called:
        source = _only_input(node)
        while source is not None and _keeps_channels(source, modules):
            source = _only_input(source)
        if before := conv(source):
            found.add(before.out_channels)
        found |= {after.in_channels for user in _reached(node, modules) if (after := conv(user))}
    return found


def _keeps_channels(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POOLS | Norm) or _is_pointwise(node, modules)
    return _is_pointwise(node, modules)


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
        if isinstance(module, Norm | Conv) or not any(module.children())
    ]
    for place, (name, module) in enumerate(leaves):
        if not isinstance(module, Norm):
            continue
        earlier = leaves[place - 1] if place else ("", model)
        reached = list(leaves[place + 1 : place + 2])
        for leaf in leaves[place + 2 :]:
            if _is_pointwise_module(reached[-1][1]):
                reached.append(leaf)
        beside = {m.out_channels for m in (earlier[1],) if isinstance(m, Conv)}
        beside |= {m.in_channels for _, m in reached[-1:] if isinstance(m, Conv)}
        earlier_dims = (_dims_of(leaf) for _, leaf in reversed(leaves[:place]))
        dims = next((dims for dims in earlier_dims if dims is not None), None)
        layout = layout_of(module, None, beside, dims)
        channels = channels_of(module, layout)
        convs = [n for n, m in reached if not _is_pointwise_module(m)]
        follows = bool(reached) and _is_conv(reached[-1][1], "in_channels", channels)
        yield NormSite(
            name,
            layout,
            channels,
            before=earlier[0] if _is_conv(earlier[1], "out_channels", channels) else None,
            after=tuple(convs) if follows else (),
            writers=tuple(n for n, m in reached if getattr(m, "inplace", False)),
            overwritten=True,
        )


def _is_conv(module: nn.Module, side: str, channels: int) -> bool:
    return isinstance(module, Conv) and getattr(module, side) == channels


def _is_strange(module: nn.Module) -> bool:
    """Whether a layer holds tensors itself and is neither a norm that is known nor none."""
    if isinstance(module, Norm | KernelNorm2d | _NOT_NORMS):
        return False
    # The containers of a model hold parameters too, such as a class token: those have parts.
    if any(module.children()):
        return False
    return bool(module._parameters or module._buffers)
