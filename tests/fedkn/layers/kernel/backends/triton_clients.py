"""Run by test_triton under TRITON_INTERPRET=1: clients under a vmap against each by itself.

The reference is the definition in float64, differentiated by autograd. And what is launched for a
layer is counted, for one client as for several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fedkn import models, normalizers
from fedkn.layers import KernelNorm2d, KNConv2d, ScaledWSConv2d, WSConv2d, WSKNConv2d, triton_switch
from fedkn.layers import group_norm_kernels as norms
from fedkn.layers import standardization_kernels as scaled
from fedkn.layers.group_norm import group_norm, serves
from fedkn.layers.kernel import definition
from fedkn.layers.kernel.backends import triton_kernels as kernels
from fedkn.layers.kernel.dropout import drop_level, dropout_keys, dropout_stream, keys_of
from fedkn.layers.kernel.settings import Geometry, Settings
from fedkn.layers.stacked_convolution import StackedConvolutions
from fedkn.training.stacked import forward_of
from tests.fedkn.layers import interpreter  # noqa: F401

K, N = 3, 2
torch.manual_seed(0)


class Launches(TorchDispatchMode):
    """Writes down what a device would launch: kernels of ours, and PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and "empty" not in name and name != "_unsafe_view":
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def of(self, run: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
        """Return what ``run(*args)`` returns, and what was launched for it."""
        self.names = []
        with self:
            result = run(*args)
        return result, self.names


class Watched:
    """A kernel whose launches are written down."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.name, self.kernel = name, getattr(module, name)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            launches.names.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


launches = Launches()
for module, name in itertools.product(
    (kernels, norms, scaled), (*kernels.__all__, *norms.__all__, *scaled.__all__)
):
    if hasattr(module, name):
        setattr(module, name, Watched(module, name))


def defined(layer: KNConv2d, x: Tensor, weight: Tensor, bias: Tensor | None, key: Tensor) -> Tensor:
    """Return the layer's output in float64."""
    if isinstance(layer, WSKNConv2d):
        weight = F.layer_norm(weight, weight.shape[1:], eps=1e-5)
    padded, geometry = layer.placed(x)
    settings = layer.settings(geometry, lambda: int(key))
    return definition.convolution(padded, weight, bias, settings)


def call(layer: torch.nn.Module) -> Callable[..., Tensor]:
    def one(parameters: dict[str, Tensor], x: Tensor, keys: Tensor) -> Tensor:
        with dropout_keys(keys):
            return torch.func.functional_call(layer, parameters, (x,))

    return one


def gradients(y: Tensor, leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, g)


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], most: float, *about: Any) -> None:
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = ((one - other).norm() / other.norm()).item()
        assert error < most, (place, error, *about)


FORWARD = ["channel_sums", "moments", "convolution", "epilogue"]
BACKWARD = ["reduce_gradient", "convolution_backward", "finish_gradients"]
LAYERS = (
    KNConv2d(4, 6, 3, padding=1, dropout_p=0.3, activation="relu"),
    KNConv2d(5, 3, (2, 3), stride=2, dropout_p=0.0, bias=False),
    KNConv2d(4, 6, 3, padding=2, dilation=2, groups=2, dropout_p=0.05),
    WSKNConv2d(4, 2, 1, stride=2, dropout_p=0.05, bias=False, keeps_output=True),
)


def check_clients(layer: KNConv2d, offset: float) -> None:
    x = (torch.randn(K, N, layer.in_channels, 6, 6) + offset).requires_grad_()
    own = {
        name: torch.randn(K, *p.shape, requires_grad=True) for name, p in layer.named_parameters()
    }
    keys = torch.tensor([[5], [-7], [2**62 + 1]])
    leaves = [x, *own.values()]
    y, forward = launches.of(torch.func.vmap(call(layer)), own, x, keys)
    g = torch.randn_like(y)
    found, backward = launches.of(gradients, y, leaves, g)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # A list of clients' tensors for each client.
    parts = [
        (maps, *others, *[None] * (3 - len(wide))) for maps, *others in zip(*wide, strict=True)
    ]
    wanted = torch.stack([defined(layer, *part, keys[k]) for k, part in enumerate(parts)])
    agree(
        (y, *found),
        (wanted, *gradients(wanted, wide, g.double())),
        2e-3 if offset else 1e-5,
        layer,
        offset,
    )
    if torch.backends.cudnn.allow_tf32 and layer is LAYERS[0]:
        # Of a network the first layer's maps alone are laid out anew.
        assert forward == ["clone", *FORWARD], forward
        assert backward == BACKWARD, backward


def check_second_derivatives() -> None:
    """Derivatives of gradients are the definition's, each client's by itself."""
    layer = KNConv2d(4, 6, 3, dropout_p=0.3)
    x, keys = torch.randn(K, N, 4, 5, 5), torch.tensor([[5], [-7], [2**62 + 1]])
    weight, bias = torch.randn(K, *layer.weight.shape), torch.randn(K, 6)
    results = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, weight, bias)]
        if wide:
            parts = zip(*leaves, keys, strict=True)
            y = torch.stack([defined(layer, *part) for part in parts])
        else:
            own = {"weight": leaves[1], "bias": leaves[2]}
            y = torch.func.vmap(call(layer))(own, leaves[0], keys)
        first = torch.autograd.grad(y.square().sum(), leaves[:2], create_graph=True)
        penalty = first[0].square().sum() + first[1].square().sum()
        results.append(torch.autograd.grad(penalty, leaves[:2]))
    agree(*results, 1e-4)


def check_one(p: float, half: bool) -> None:
    layer = KNConv2d(4, 6, 3, padding=1, dropout_p=p).to(memory_format=torch.channels_last)
    x = torch.randn(N, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    leaves, key = [x, *layer.parameters()], torch.tensor([3])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y, forward = launches.of(call(layer), {}, x, key)
    assert y.dtype == (torch.bfloat16 if half else torch.float32)
    g = torch.randn_like(y)
    found, backward = launches.of(gradients, y, leaves, g)
    if not half:
        # On the CPU, the key is read.
        assert [f for f in forward if f != "_local_scalar_dense"] == FORWARD, forward
        assert backward == BACKWARD, backward
    assert all(one.dtype == torch.float32 for one in found)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = defined(layer, *wide, key)
    # bfloat16 has 8 bits: up to 4e-3 in each of a few roundings.
    most = 1.5e-2 if half else 1e-5
    agree((y, *found), (wanted, *gradients(wanted, wide, g.double())), most, p, half)


def check_standardized(layer: torch.nn.Module) -> None:
    """A standardized convolution's filters are one operation of all clients, and one back."""
    own = {name: torch.randn(K, *p.shape) for name, p in layer.named_parameters()}
    own["weight"].requires_grad_()
    x, keys = torch.randn(K, N, 4, 6, 6), torch.tensor([[5], [7], [9]])
    with StackedConvolutions():
        y, forward = launches.of(torch.func.vmap(call(layer)), own, x, keys)
    _, backward = launches.of(gradients, y, [own["weight"]], torch.ones_like(y))
    assert forward.count("native_layer_norm") == 1, forward
    assert backward.count("native_layer_norm_backward") == 1, backward
    assert len(forward) <= 3 + len(FORWARD), forward
    assert len(backward) <= 3 + len(BACKWARD), backward


def check_scaled(layer: ScaledWSConv2d) -> None:
    weight = torch.randn(K, *layer.weight.shape)
    weight[0, 1] *= 1e-4  # below the least deviation that is divided by
    own = {"weight": weight, "gain": torch.rand(K, len(layer.gain)) + 0.5}
    leaves = [tensor.requires_grad_() for tensor in own.values()]

    def used(own: dict[str, Tensor]) -> Tensor:
        return functional_call(Used(layer), {f"layer.{name}": t for name, t in own.items()}, ())

    y, forward = launches.of(torch.func.vmap(used), own)
    g = torch.randn_like(y)
    found, backward = launches.of(gradients, y, leaves, g)
    assert (forward, backward) == (["standardize"], ["standardize_back"])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    w, gain = wide
    far = w - w.mean((2, 3, 4), keepdim=True)
    energy = far.square().sum((2, 3, 4), keepdim=True)
    wanted = far / energy.clamp(min=1e-4).sqrt() * gain[..., None, None, None]
    agree((y, *found), (wanted, *gradients(wanted, wide, g.double())), 1e-5)


class Used(torch.nn.Module):
    """The filters that a layer convolves with."""

    def __init__(self, layer: ScaledWSConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.standardized_weight()


def check_norm(shape: tuple[int, ...], groups: int, last: bool, offset: float) -> None:
    """Two ways into the kernels: fused with a ReLU, and a GroupNorm as PyTorch writes it."""
    x = torch.randn(K, N, *shape) + offset
    if last:
        x = x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)
    leaves = [x.requires_grad_(), *(torch.randn(K, shape[0], requires_grad=True) for _ in "wb")]
    g = torch.randn_like(x)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def pytorchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, groups, weight, bias)

    for relu in (True, False):

        def fused(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = relu) -> Tensor:
            assert serves(x, weight, bias)
            return group_norm(x, groups, weight, bias, 1e-5, relu)

        with StackedConvolutions():
            y, forward = launches.of(torch.func.vmap(fused if relu else pytorchs), *leaves)
        found, backward = launches.of(gradients, y, leaves, g)
        assert (forward, backward) == (["normalize"], ["normalize_back", "sum"])
        wanted = torch.stack([pytorchs(*client) for client in zip(*wide, strict=True)])
        wanted = wanted.relu() if relu else wanted
        most = 1e-3 if offset else 1e-5
        agree((y, *found), (wanted, *gradients(wanted, wide, g.double())), most, shape, relu)


def check_kernel_norm(p: float, clients: bool, last: bool) -> None:
    """Windows of one pixel: the convolution's kernels without a convolution."""
    layer = KernelNorm2d(1, dropout_p=p)
    x = torch.randn(K, N, 70, 5, 4) + 3.0
    if last:
        x = x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)
    x = (x if clients else x[0]).detach().requires_grad_()
    keys = torch.tensor([[5], [-7], [2**62 + 1]])
    if clients:
        y, forward = launches.of(torch.func.vmap(call(layer)), {}, x, keys)
    else:
        y, forward = launches.of(call(layer), {}, x, keys[0])
    g = torch.randn_like(y)
    found, backward = launches.of(gradients, y, [x], g)
    assert [f for f in forward if f.islower()][-1:] == ["epilogue"], forward
    assert len(forward) <= 6, forward
    assert backward[-2:] == ["reduce_gradient", "finish_gradients"], backward
    wide = x.detach().double().requires_grad_()
    place, level = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), drop_level(p)
    wanted = [
        definition.norm(maps, Settings(place, 70, int(key) if level else None, level, 1e-5, False))
        for maps, key in zip(wide if clients else wide[None], keys, strict=False)
    ]
    whole = torch.stack(wanted) if clients else wanted[0]
    agree((y, *found), (whole, *gradients(whole, [wide], g.double())), 1e-5, p, clients, last)


def check_network() -> None:
    """A whole network's forward and backward pass, against the definition's operations."""
    model = models.build(
        "resnet8",
        num_classes=3,
        in_channels=2,
        normalizer=normalizers.create("kernel"),
        width=4,
        final_norm="kernel",
    )
    x = torch.randn(2, 2, 2, 8, 8)
    with dropout_stream(0) as stream, torch.no_grad():
        model(x[0])
    keys = keys_of(torch.tensor([0, 1]), stream.calls)
    own = {
        name: torch.stack([p.detach(), 1.1 * p.detach()]).requires_grad_()
        for name, p in model.named_parameters()
    }

    def step() -> tuple[Tensor, ...]:
        with StackedConvolutions():
            y = torch.func.vmap(forward_of(model))(own, x, keys)
        return y, *torch.autograd.grad(y.square().sum(), list(own.values()))

    with mock.patch.object(triton_switch, "reaches", return_value=False):
        wanted, before = launches.of(step)
    found, now = launches.of(step)
    agree(found, wanted, 1e-4)
    assert len(now) <= 90, now
    assert len(before) > 8 * len(now)


# On the CPU TF32 only chooses the way: cuDNN's grouped convolution, or our own kernels.
for layer, tf32 in zip((LAYERS[0], *LAYERS), (False, True, False, True, True), strict=True):
    torch.backends.cudnn.allow_tf32 = tf32
    check_clients(layer, 0.0)
torch.backends.cudnn.allow_tf32 = False
check_clients(LAYERS[1], 1000.0)
check_second_derivatives()
torch.backends.cudnn.allow_tf32 = True
for p, half in itertools.product((0.05, 0.0), (False, True)):
    check_one(p, half)
for standardized in (WSConv2d(4, 6, 3), WSKNConv2d(4, 6, 3, dropout_p=0.05)):
    check_standardized(standardized)
check_scaled(ScaledWSConv2d(130, 2, 3, bias=False))
for shape, groups, last, offset in (
    ((6, 5, 4), 2, True, 0.0),
    ((40, 9, 8), 1, False, 0.0),
    ((3, 17, 16), 3, True, 1000.0),
):
    check_norm(shape, groups, last, offset)
for p, clients, last in ((0.05, True, True), (0.0, True, False), (0.3, False, False)):
    check_kernel_norm(p, clients, last)
check_network()
