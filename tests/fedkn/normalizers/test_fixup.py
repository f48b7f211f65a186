"""Fixup: what begins at zero, what is scaled, and where the single numbers stand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkn import models, normalizers
from fedkn.layers import Multiplier, Shift, ShiftedConv2d
from fedkn.models.blocks import branches
from fedkn.normalizers import TensorRole


def network(architecture: str, name: str = "fixup") -> nn.Module:
    return models.build(
        architecture,
        num_classes=3,
        in_channels=2,
        width=8,
        normalizer=normalizers.create(name),
        final_norm="none",
    )


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    ("architecture", "depth", "layers"),
    [("resnet18", 8, 2), ("resnet50", 16, 3), ("preact_resnet18", 8, 2), ("mobilenet_v2", 10, 3)],
)
def test_branches_begin_at_zero_and_the_rest_of_them_scaled(architecture, depth, layers):
    ours, plain = network(architecture), network(architecture, "none")
    pairs = list(zip(branches(ours), branches(plain), strict=True))
    assert len(pairs) == depth
    for branch, drawn in pairs:
        *first, last = zip(convolutions(branch), convolutions(drawn), strict=True)
        assert len(first) == layers - 1
        assert not last[0].weight.any()
        for conv, as_drawn in first:
            scale = depth ** (-1 / (2 * layers - 2))
            torch.testing.assert_close(conv.weight, scale * as_drawn.weight)
    inside = {id(c) for branch, _ in pairs for c in convolutions(branch)}
    for conv, as_drawn in zip(convolutions(ours), convolutions(plain), strict=True):
        assert id(conv) in inside or torch.equal(conv.weight, as_drawn.weight)
    assert not ours.head.fc.weight.any()
    assert not ours.head.fc.bias.any()


def test_a_branch_that_ends_in_an_activation_begins_with_its_multiplier_at_zero():
    torch.manual_seed(0)
    ours, plain = network("resnet8"), network("resnet8", "none")
    for branch, drawn in zip(branches(ours), branches(plain), strict=True):
        assert branch.end.gain.item() == 0
        for conv, as_drawn in zip(convolutions(branch), convolutions(drawn), strict=True):
            torch.testing.assert_close(conv.weight, 2 ** (-1 / 4) * as_drawn.weight)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(ours.residual2(x), x)
    # And it learns: something reaches the multiplier, and then the convolutions.
    with torch.no_grad():
        ours.head.fc.weight.normal_()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ours(torch.randn(4, 2, 16, 16)).square().sum().backward()
        optimizer.step()
    assert all(conv.weight.grad.any() for branch in branches(ours) for conv in convolutions(branch))


def test_a_basic_block_is_the_papers():
    torch.manual_seed(0)
    block = network("resnet18").stage2_block1
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    p = dict(block.named_parameters())
    assert {name for name in p if "bias" in name} == {"branch.unit1.norm.bias"}
    x = torch.randn(2, 8, 6, 6)
    branch = F.conv2d(x + p["branch.unit1.conv.shift"], p["branch.unit1.conv.weight"], None, 2, 1)
    branch = F.relu(branch + p["branch.unit1.norm.bias"])
    branch = F.conv2d(
        branch + p["branch.unit2.conv.shift"], p["branch.unit2.conv.weight"], None, 1, 1
    )
    branch = branch * p["branch.end.gain"] + p["branch.end.shift"]
    shortcut = F.conv2d(x + p["shortcut.conv.shift"], p["shortcut.conv.weight"], None, 2)
    torch.testing.assert_close(block(x), F.relu(branch + shortcut))
    assert len(p) == 9


def test_without_branches_only_the_classifier_begins_otherwise():
    ours, plain = network("vgg6"), network("vgg6", "none")
    for conv, as_drawn in zip(convolutions(ours), convolutions(plain), strict=True):
        assert torch.equal(conv.weight, as_drawn.weight)
    assert not ours.head.fc.weight.any()
    kinds = [type(m) for m in ours.modules()]
    assert Multiplier not in kinds
    assert kinds.count(ShiftedConv2d) == kinds.count(Shift) - 1


def test_everything_is_shared():
    model = network("resnet8")
    rule = normalizers.create("fixup").federation_rule(model)
    assert list(rule) == list(model.state_dict())
    assert set(rule.values()) == {TensorRole.SHARED}
    assert not list(model.buffers())
