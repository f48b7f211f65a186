"""The parts that networks share: residual and dense connections, pooling, stem and head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.layers import KNConv2d
from fedkn.layers.max_pool import max_pool
from fedkn.models.spec import ModelSpec
from fedkn.normalizers.factory import activation_layer, chain
from fedkn.normalizers.fused import FusedSequential, hooked

__all__ = [
    "DenseHead",
    "Halve",
    "Head",
    "Network",
    "PreActivationResidual",
    "Residual",
    "branches",
    "network",
    "stem",
]


class Residual(nn.Module):
    """``activation(shortcut(x) + branch(x))``; no shortcut is the identity."""

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = activation_layer(activation) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        out: Tensor = self.activation(self.shortcut(x) + self.branch(x))
        return out


class PreActivationResidual(nn.Module):
    """``x + branch(before(x))``; a shortcut that projects takes ``before(x)`` as well."""

    def __init__(
        self, before: nn.Module, branch: nn.Module, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.before = before
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        ready = self.before(x)
        kept = x if self.shortcut is None else self.shortcut(ready)
        out: Tensor = kept + self.branch(ready)
        return out


def branches(model: nn.Module) -> list[nn.Module]:
    """Return the residual branches of `model`, in their order."""
    blocks = (m for m in model.modules() if isinstance(m, Residual | PreActivationResidual))
    return [block.branch for block in blocks]


class Halve(nn.Module):
    """Pool 2x2 with stride 2, but leave maps with a side below `least` as they are.

    The networks were published for 32x32 images; from there up nothing is left out. On 8x8 digits
    their last poolings would leave a single pixel (with the 4 that is most networks'), or none
    (with 2: what can be pooled is pooled, as the KNResNets' authors do).
    """

    def __init__(self, kind: Literal["max", "average"] = "max", least: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H // 2, W // 2), or to itself."""
        if min(x.shape[-2:]) < self.least:
            return x
        return max_pool(x) if self.kind == "max" else F.avg_pool2d(x, 2)


class Head(nn.Module):
    """Final norm (the switch of every model), activation, average pool to `size`, linear.

    A normalizer may put a layer of its own before the linear one.
    """

    def __init__(
        self, spec: ModelSpec, channels: int, *, activation: str | None = None, size: int = 1
    ) -> None:
        super().__init__()
        self.before = chain(
            norm=spec.final_layer(channels), activation=activation_layer(activation)
        )
        self.pool = _Average(size)
        self.features = spec.normalizer.before_head() or nn.Identity()
        self.fc = nn.Linear(channels * size * size, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, classes)."""
        out: Tensor = self.fc(self.features(self.pool(self.before(x))))
        return out


class DenseHead(nn.Module):
    """Final norm (the switch of every model), the maps at `size` x `size`, hidden layers, linear.

    Every hidden layer has a ReLU. Maps of another size are averaged to `size` x `size` (smaller
    ones repeated), so that the weights do not depend on the images' size; those of `size` are left
    as they are. A normalizer may put a layer of its own before the last linear one, or, with
    `features_first`, before the first.
    """

    def __init__(
        self,
        spec: ModelSpec,
        channels: int,
        size: int,
        hidden: Iterable[int],
        *,
        features_first: bool = False,
    ) -> None:
        super().__init__()
        self.before = chain(norm=spec.final_layer(channels))
        self.pool = _Average(size)
        layers: list[nn.Module] = []
        width = channels * size * size
        for outputs in hidden:
            layers += [nn.Linear(width, outputs), nn.ReLU()]
            width = outputs
        features = spec.normalizer.before_head() or nn.Identity()
        layers.insert(0 if features_first else len(layers), features)
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(width, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, classes)."""
        out: Tensor = self.fc(self.hidden(self.pool(self.before(x))))
        return out


class _Average(nn.Module):
    """The means of `size` x `size` parts of the maps: (N, C, H, W) to (N, C * size²)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if self.size == 1:
            # The same numbers: PyTorch's adaptive pooling to 1x1 takes this mean too, and a detour.
            return x.mean((2, 3))
        return torch.flatten(F.adaptive_avg_pool2d(x, self.size), 1)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def stem(spec: ModelSpec, channels: int, *, activation: str | None, norm: bool) -> nn.Module:
    """Return the first layers of a ResNet.

    Low resolution: 3x3, stride 1. High: 7x7, stride 2, then max-pool 3x3, stride 2. With `norm`
    the convolution is followed by norm and activation, else it stands bare.
    """
    kernel, stride, padding = (3, 1, 1) if spec.low_resolution else (7, 2, 3)
    make = spec.normalizer
    if norm:
        first = make.conv_norm(
            spec.in_channels,
            channels,
            kernel,
            activation=activation,
            stride=stride,
            padding=padding,
        )
    else:
        first = make.conv(
            spec.in_channels, channels, kernel, then_norm=True, stride=stride, padding=padding
        )
    return chain(first=first, pool=None if spec.low_resolution else nn.MaxPool2d(3, 2, 1))


class Network(nn.Sequential):
    """Named parts in sequence, in which a max-pooling is left to the norm before it, if it can."""

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        x = input
        parts = list(self)
        place = 0
        while place < len(parts):
            part, following = parts[place], parts[place + 1 : place + 2]
            place += 1
            if following and isinstance(part, FusedSequential) and _left_to(part, following[0]):
                x = part.pooled(x, following[0])
                place += 1
            else:
                x = part(x)
        return x


def network(parts: Iterable[tuple[str, nn.Module]]) -> Network:
    """Return named parts in sequence: every network of fedkn is one, and ends in its ``head``."""
    whole = Network(OrderedDict(parts))
    for layer in whole.modules():
        if isinstance(layer, KNConv2d):
            # None of these networks writes in place, so where PyTorch pools, it and its convolution
            # keep one map for both.
            layer.keeps_output = True
    return whole


def _left_to(norm: nn.Module, pool: nn.Module) -> bool:
    """Whether `pool` may be done by the norm before it: whoever hooks them should see them."""
    return isinstance(pool, Halve) and pool.kind == "max" and not (hooked(norm) or hooked(pool))
