"""LeNet: two 5x5 convolutions and three fully connected layers; narrow, and as CIFAR's CNN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.models.blocks import DenseHead, Halve, network
from fedkn.models.spec import ModelSpec

__all__ = ["cnn_cifar", "lenet"]

_SIDE = 32


def lenet(spec: ModelSpec) -> nn.Module:
    """Build LeNet: 6 and 16 channels, 5x5 without padding, each pooled, then 120, 84, the classes.

    As Li et al., ICDE 2022 (arXiv 2102.02079, Section V) and Flower's niid_bench have it, after
    LeCun et al. 1998: without a norm. Here any normalizer's follows each convolution. Images of
    less than 32 pixels a side stand in a black frame, as LeCun's 28x28 digits did.
    """
    return _built(spec, (6, 16), (120, 84))


def cnn_cifar(spec: ModelSpec) -> nn.Module:
    """Build LeNet at the width of federated learning's CIFAR-10 CNN: 64, 64, then 384 and 192.

    As in the code of Zhang et al., "Understanding the Role of Layer Normalization in Label-Skewed
    Federated Learning", TMLR 2024 (arXiv 2308.09565), which normalizes the hidden layers too.
    """
    return _built(spec, (64, 64), (384, 192))


def _built(spec: ModelSpec, channels: tuple[int, int], hidden: tuple[int, int]) -> nn.Module:
    first, second = map(spec.scaled, channels)
    make = spec.normalizer
    return network(
        [
            ("frame", _Frame()),
            ("conv1", make.conv_norm(spec.in_channels, first, 5, activation="relu")),
            ("pool1", Halve()),
            ("conv2", make.conv_norm(first, second, 5, activation="relu")),
            ("pool2", Halve()),
            ("head", DenseHead(spec, second, 5, map(spec.scaled, hidden))),
        ]
    )


class _Frame(nn.Module):
    """Zeros around images that are smaller than 32x32, on all sides alike."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, max(H, 32), max(W, 32))."""
        height, width = (max(0, _SIDE - side) for side in x.shape[-2:])
        if not height and not width:
            return x
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
