"""SimpleCNN: three 3x3 convolutions and a fully connected head, as in HybridBN's tables."""

from __future__ import annotations

from torch import nn

from fedkn.models.blocks import DenseHead, Halve, network
from fedkn.models.spec import ModelSpec

__all__ = ["simple_cnn"]


def simple_cnn(spec: ModelSpec) -> nn.Module:
    """Build SimpleCNN: 16, 32, 64 channels, each normalized and pooled, then 128 and the classes.

    As in the code of Chen et al., ICML 2025 (arXiv 2505.21877), for 32x32 images. Convolutions
    with a norm behind them have no bias here; theirs have one, which the norm takes out again.
    FedFN's layer stands where they have it, before the first linear layer.
    """
    channels = spec.in_channels
    parts: list[tuple[str, nn.Module]] = []
    for place, published in enumerate((16, 32, 64), start=1):
        outputs = spec.scaled(published)
        unit = spec.normalizer.conv_norm(channels, outputs, 3, padding=1, activation="relu")
        parts += [(f"conv{place}", unit), (f"pool{place}", Halve())]
        channels = outputs
    head = DenseHead(spec, channels, 4, [spec.scaled(128)], features_first=True)
    return network([*parts, ("head", head)])
