"""Which networks clients can train together, and which layer is named where they cannot."""

from __future__ import annotations

import pytest
import torch

from fedkn import normalizers
from fedkn.config import ModelConfig
from fedkn.errors import UserError
from fedkn.network import build_network
from fedkn.training.stackable import try_stacking

OWN = "tests.own_parts:"
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def tried(name, normalizer="group", x=X, **settings):
    config = ModelConfig(name=OWN + name, **settings)
    built = build_network(
        config, normalizers.create(normalizer), outputs=10, shape=tuple(x.shape[1:]), seed=0
    )
    module = built.module.to(memory_format=torch.channels_last) if x.dim() == 4 else built.module
    before = {n: t.clone() for n, t in module.state_dict().items()}
    python = torch.get_rng_state()
    found = try_stacking(module, x)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), python)
    assert not any(m._forward_hooks for m in module.modules())
    return found


@pytest.mark.parametrize("normalizer", ["group", "kernel", "none", "ws_group", "layer"])
@pytest.mark.parametrize("name", ["Plain", "with_blocks", "Attention"])
def test_layers_that_allow_it(name, normalizer):
    assert tried(name, normalizer) == ""


def test_frozen_parameters_allow_it():
    assert tried("Plain", "group", frozen="conv1.*, bn1.*") == ""


@pytest.mark.parametrize(
    ("name", "normalizer", "settings", "said"),
    [
        ("Plain", "batch", {}, "BatchNorm2d 'bn1' keeps running_mean"),
        ("Plain", "group", {"options": '{"drop": 0.5}'}, "Dropout 'drop' draws random numbers"),
        ("Attention", "group", {"options": '{"drop": 0.1}'}, "draws random numbers"),
        ("Branching", "group", {}, "Gate 'gate' cannot be run for several clients"),
        ("Mixing", "group", {}, "mixes the examples of a batch"),
    ],
)
def test_the_layer_that_does_not_is_named(name, normalizer, settings, said):
    assert said in tried(name, normalizer, **settings)


def test_a_network_that_fails_by_itself_is_refused():
    with pytest.raises(UserError, match=r"fails on \(3, 2, 8, 8\) inputs at Conv2d 'conv1'"):
        tried("Plain", x=torch.rand(3, 2, 8, 8), options='{"in_channels": 1}')
