"""Models and normalizers as a user might bring them: none is fedkn's, none knows fedkn's tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkn import models
from fedkn.data.vision import import_torchvision
from fedkn.normalizers import FederationRule, Normalizer  # noqa: F401 - as a user imports them


class Plain(nn.Module):
    """Convolutions and BatchNorms, with a head."""

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 8, drop: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def with_blocks(normalizer, num_classes, in_channels, seed, *, width=8):
    """Built of fedkn's blocks, and initialised by its rule."""
    network = nn.Sequential(
        normalizer.conv_norm(in_channels, width, 3, padding=1, activation="relu"),
        normalizer.conv_norm(width, width, 3, padding=1, activation="relu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )
    models.initialize(network, seed)
    return network


def asked(num_outputs, input_shape):
    """Draws from every global generator, and takes what it is told."""
    channels, height, width = input_shape
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_outputs))
    with torch.no_grad():
        network[1].weight.add_(float(np.random.rand()) + random.random())  # noqa: NPY002
    return network


def lazy(num_classes):
    """Layers that learn their shapes from a first batch."""
    return nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )


def lazy_norms(num_classes):
    """Norms too, whose buffers have no shape yet."""
    return nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


_SHARED = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def cached():
    """Returns the same network every time."""
    return _SHARED


def pretrained(num_classes):
    """Sets its weights itself."""
    network = Plain(num_classes)
    nn.init.constant_(network.conv1.weight, 0.25)
    return network


def indexed(num_classes):
    """Keeps a constant buffer in its state, as relative positions are kept."""

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(63, -1, -1))
            self.fc = nn.Linear(64, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)[:, self.index])

    return Indexed()


class Branching(nn.Module):
    """Its way depends on the numbers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(64, num_classes)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gate(x.flatten(1)))


class Gate(nn.Module):
    """Halves what is large."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if float(x.detach().abs().sum()) > 1e6 else x


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x - x.mean(0))


class Unet(nn.Module):
    """Down, up and across, as for segmentation."""

    def __init__(self, in_channels: int = 1, num_outputs: int = 2, width: int = 4) -> None:
        super().__init__()
        self.down = _twice(in_channels, width)
        self.inner = _twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined = _twice(2 * width, width)
        self.out = nn.Conv2d(width, num_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        inner = self.inner(torch.max_pool2d(first, 2))
        return self.out(self.joined(torch.cat([first, self.up(inner)], 1)))


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Series(nn.Module):
    """For (N, C, L), with a normalized head."""

    def __init__(self, in_channels: int = 2, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, width, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm1d(width)
        self.hidden = nn.Linear(width, width)
        self.bn3 = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.relu(self.bn3(self.hidden(x.mean(2)))))


class Volumes(nn.Module):
    """For (N, C, D, H, W); `norm` is batch, group or instance."""

    def __init__(self, in_channels: int = 1, num_classes: int = 3, norm: str = "batch") -> None:
        super().__init__()
        kinds = {
            "batch": lambda: nn.BatchNorm3d(8),
            "group": lambda: nn.GroupNorm(2, 8),
            "instance": lambda: nn.InstanceNorm3d(8, affine=True),
        }
        self.conv1 = nn.Conv3d(in_channels, 8, 3, padding=1)
        self.norm1 = kinds[norm]()
        self.conv2 = nn.Conv3d(8, 8, 3, padding=1)
        self.norm2 = kinds[norm]()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3, 4)))


class Attention(nn.Module):
    """A transformer over patches, as ViT."""

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16, drop: float = 0.0):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 2, stride=2)
        layer = nn.TransformerEncoderLayer(width, 2, 32, drop, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.encoder(x)).mean(1))


def mobilenet(num_classes, in_channels):
    """Torchvision's, with a stem for these images."""
    network = import_torchvision().models.mobilenet_v3_small(num_classes=num_classes)
    network.features[0][0] = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    return network


@dataclass(frozen=True)
class HalfNorm(Normalizer):
    """GroupNorm of so many groups, whose output is scaled."""

    name: ClassVar[str] = "half"
    title: ClassVar[str] = "HalfNorm"
    affine: ClassVar[bool] = True

    parts: int = 2

    def norm(self, channels: int) -> nn.Module:
        return nn.GroupNorm(self.parts, channels)


class Untold:
    """No normalizer at all."""


NETWORK = nn.Linear(3, 3)


def needs(depth):
    raise AssertionError(depth)


def fails(num_classes):
    raise RuntimeError(f"no network for {num_classes} classes")


def number():
    return 3
