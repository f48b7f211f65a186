from __future__ import annotations

import pytest
import torch

from fedkn.layers.native import library
from simulations.benchmarks import convolved_steps
from simulations.benchmarks.convolutions import SHAPES, compared
from simulations.benchmarks.engine_tasks import Task, prepared


@pytest.mark.parametrize("shape", [(2, 8, 8, 6), (2, 3, 8, 6)])
def test_both_ways_compute_the_same_and_take_time(shape):
    if not library.load() or not torch.ops.fedkn_native.winograd_lanes([8, 8, 8, 8], 8):
        pytest.skip("the fused CPU kernels cannot be had here")
    ours, pytorchs, errors = compared(shape)
    assert min(ours, pytorchs) > 0
    assert errors < 10
    for samples, channels, filters, side in SHAPES:
        size = [samples, channels, side, side]
        assert torch.ops.fedkn_native.winograd_lanes(size, filters), (
            "no comparison: it is PyTorch's"
        )


def test_a_step_is_timed_with_both_convolutions(tmp_path, monkeypatch):
    networks = []
    monkeypatch.setattr(
        convolved_steps,
        "step_seconds",
        lambda _, workspaces: networks.extend(each.model for each in workspaces) or [2.0, 1.0],
    )
    settings = {
        **convolved_steps.NETWORKS["convnet3, width 8, batch 8"],
        "normalizer.name": "rms",
        "cohort": 2,
    }
    config = prepared(Task("one", 2, 8, 1, settings), tmp_path)
    assert convolved_steps.both_seconds(config) == (2.0, 1.0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    plain, ours = (network.to(memory_format=torch.channels_last).eval()(x) for network in networks)
    torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-4)
    assert torch.equal(plain, ours) == (not library.load())
