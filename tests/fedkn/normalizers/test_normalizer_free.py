"""FedWon, NF and ANFR: scaled weight standardization, and what a network needs beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.layers import ScaledWSConv2d, SkipInit, SqueezeExcite2d

RESIDUALS = {
    "resnet8": 2,
    "resnet18": 8,
    "resnet50": 16,
    "preact_resnet18": 8,
    "knresnet13": 4,
    "knresnet18": 6,
    "knresnet50": 15,
    "mobilenet_v2": 10,
    "convnet3": 0,
    "vgg11": 0,
}


def network(architecture: str, name: str) -> nn.Module:
    return models.build(
        architecture,
        num_classes=3,
        in_channels=2,
        width=8,
        normalizer=normalizers.create(name),
        final_norm="none",
    )


@pytest.mark.parametrize("architecture", sorted(set(RESIDUALS) & set(models.names())))
def test_every_residual_branch_and_nothing_else_ends_in_skip_init(architecture):
    for name, kinds in (("nf", (SkipInit,)), ("anfr", (SkipInit, SqueezeExcite2d))):
        model = network(architecture, name)
        for kind in kinds:
            found = sum(isinstance(m, kind) for m in model.modules())
            assert found == RESIDUALS[architecture]
        assert any(isinstance(m, ScaledWSConv2d) for m in model.modules())
    plain = network(architecture, "sws")
    assert not any(isinstance(m, SkipInit) for m in plain.modules())


def test_residual_branches_begin_as_nothing():
    torch.manual_seed(0)
    model = network("resnet8", "nf").eval()
    x = torch.randn(2, 8 * 4, 4, 4)
    block = model.residual2
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.branch.end.gain.fill_(0.5)
    torch.testing.assert_close(block(x), x + 0.5 * block.branch.unit2(block.branch.unit1(x)))


def test_anfrs_branch_is_twice_its_attention():
    torch.manual_seed(0)
    model = network("resnet8", "anfr").eval()
    block = model.residual1
    with torch.no_grad():
        block.branch.end.skip.gain.fill_(1.0)
    x = torch.randn(2, 16, 4, 4)
    maps = block.branch.unit2(block.branch.unit1(x))
    torch.testing.assert_close(block(x), x + 2 * block.branch.end.attention(maps))


def test_all_begin_from_the_same_convolutions_and_head():
    weights = [
        [m.weight for m in network("resnet8", name).modules() if isinstance(m, nn.Conv2d)]
        + [network("resnet8", name).head.fc.weight]
        for name in ("sws", "nf", "fedwon", "anfr")
    ]
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_fedwon_differs_from_sws_in_its_clipping_alone():
    one, other = network("resnet8", "fedwon"), network("resnet8", "sws")
    assert one.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(one(x), other(x))
    assert normalizers.create("fedwon").adaptive_clip == 0.16
    clips = {n: normalizers.create(n).adaptive_clip for n in normalizers.names()}
    assert {n for n, clip in clips.items() if clip} == {"fedwon"}
