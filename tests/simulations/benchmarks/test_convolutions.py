from __future__ import annotations

import pytest
import torch

from fedkn.layers.native import library
from simulations.benchmarks.convolutions import SHAPES, compared


def test_both_ways_compute_the_same_and_take_time():
    if not library.load() or not torch.ops.fedkn_native.winograd_lanes([8, 8, 8, 8], 8):
        pytest.skip("the fused CPU kernels cannot be had here")
    ours, pytorchs, errors = compared((2, 8, 8, 6))
    assert min(ours, pytorchs) > 0
    assert errors < 10
    for samples, channels, filters, side in SHAPES:
        size = [samples, channels, side, side]
        assert torch.ops.fedkn_native.winograd_lanes(size, filters), (
            "no comparison: it is PyTorch's"
        )
