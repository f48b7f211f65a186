from __future__ import annotations

from unittest import mock

import pytest
import torch

from fedkn.layers import dropout_stream
from fedkn.layers.native import library
from fedkn.models import build
from fedkn.normalizers import create
from simulations.benchmarks.loop import written_by_hand


@pytest.mark.parametrize("model", ["convnet3", "resnet8"])
@pytest.mark.parametrize("normalizer", ["group", "kernel"])
def test_a_model_written_by_hand_computes_the_same_by_pytorchs_own_layers(model, normalizer):
    ours, theirs = (
        build(model, num_classes=10, in_channels=3, width=8, normalizer=create(normalizer)).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    theirs = written_by_hand(theirs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    results = []
    for network, given in ((ours, x.contiguous(memory_format=torch.channels_last)), (theirs, x)):
        with dropout_stream(3):
            results.append(network(given))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert all(p.is_contiguous() for p in theirs.parameters())
    if normalizer == "group":
        with mock.patch.object(library, "takes", side_effect=AssertionError):
            theirs(x)
