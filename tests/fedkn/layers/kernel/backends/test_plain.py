"""What the plain path meets besides what every path meets (`tests.fedkn.layers.kernel`)."""

from __future__ import annotations

import pytest
import torch

from fedkn.layers import KNConv2d, dropout_stream
from fedkn.layers.kernel.settings import Geometry
from fedkn.layers.kernel.statistics import box_quickly
from tests.fedkn.layers.paths import path


def test_what_inference_left_in_the_cache_serves_training() -> None:
    geometry, maps = Geometry((3, 1), (1, 2), (1, 0), (1, 1), 1), torch.randn(1, 1, 9, 13)
    with torch.inference_mode():
        box_quickly(maps, geometry, 0.5)
    assert not torch.is_inference(box_quickly(maps, geometry, 0.5))
    layer, x = KNConv2d(2, 3, (3, 1), stride=(1, 2), padding=(1, 0)), torch.randn(1, 2, 9, 13)
    with path("plain"):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_an_empty_batch_passes() -> None:
    layer, x = KNConv2d(3, 4, 3, padding=1), torch.zeros(0, 3, 5, 5, requires_grad=True)
    with path("plain"):
        layer(x).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad) -> None:
    layer, x = KNConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 9, 9)
    x[0, 1, 4, 4] = bad
    with path("plain"), dropout_stream(1):
        y = layer(x)
    assert not y[0, :, 4, 4].isfinite().any()
    assert y[1].isfinite().all()
