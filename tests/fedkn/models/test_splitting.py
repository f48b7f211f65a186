"""Norms that call an activation of their own behind them are exchanged as others are."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedkn
from fedkn import normalizers
from fedkn.data.vision import with_torchvision
from fedkn.layers import KernelNorm2d, KNConv2d

X = torch.linspace(-3, 3, 2 * 3 * 9 * 9).sin().view(2, 3, 9, 9)


class NormAct(nn.BatchNorm2d):
    """As timm writes them: no call of the base class's forward."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Scaled(NormAct):
    """Does more than its parts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OnNorm(nn.GroupNorm):
    """A group norm with an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm, nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)
    )
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.1, -0.1, 0.2]))
    return made.eval()


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Hardswish(), nn.PReLU(4)])
@pytest.mark.parametrize("name", ["group", "layer", "none", "kernel", "batch", "ws_group"])
def test_it_is_what_the_same_network_of_separate_layers_becomes(act, name):
    normalizer = normalizers.create(name)
    together = net(NormAct(4, act))
    apart = nn.Sequential(together[0], nn.BatchNorm2d(4), act, together[2], together[3])
    apart[1].load_state_dict(
        {k: v for k, v in together[1].state_dict().items() if not k.startswith("act.")}
    )
    one, report = fedkn.convert(together, normalizer)
    two, _ = fedkn.convert(apart, normalizer)
    before = together(X)
    for mode in (False, True):
        torch.manual_seed(1)
        first = one.train(mode)(X)
        torch.manual_seed(1)
        assert torch.equal(first, two.train(mode)(X))
    # The original is left alone, and shares nothing that is trained.
    assert torch.equal(together.eval()(X), before)
    assert type(together[1]) is NormAct
    assert not {id(p) for p in one.parameters()} & {id(p) for p in together.parameters()}
    assert "changed 1: NormAct -> BatchNorm2d, then drop and act" in str(report)
    assert not [kept for kept in report.kept if "forward of its own" in kept.reason]


def test_under_batch_norm_nothing_changes_but_where_the_activation_stands():
    source = net(NormAct(4, nn.ReLU())).train()
    converted, _ = fedkn.convert(source, normalizers.create("batch"))
    assert torch.equal(converted(X), source(X))
    assert torch.equal(converted[1].norm.running_var, source[1].running_var)
    assert int(converted[1].norm.num_batches_tracked) == 1


def test_groups_with_an_activation_are_exchanged_too():
    converted, _ = fedkn.convert(net(OnNorm(4)), normalizers.create("batch"))
    kinds = [type(m) for m in converted.modules()]
    assert nn.BatchNorm2d in kinds
    assert nn.SiLU in kinds
    assert OnNorm not in kinds


def test_a_norm_that_stays_when_it_is_taken_apart_is_told_of_once():
    _, report = fedkn.convert(net(NormAct(4, nn.ReLU())), normalizers.create("batch"))
    (change,) = report.changed
    assert (change.name, change.before) == ("1", "NormAct")
    assert change.note == "its norm stays: it is the 'batch' normalizer's already"
    assert not report.kept
    # One that stands by itself is kept, as ever.
    _, plain = fedkn.convert(net(nn.BatchNorm2d(4)), normalizers.create("batch"))
    assert [kept.name for kept in plain.kept] == ["1"]
    assert not plain.changed


def test_what_does_more_than_its_parts_is_kept():
    _, report = fedkn.convert(net(Scaled(4, nn.ReLU())), normalizers.create("group"))
    assert [kept.name for kept in report.kept] == ["1"]
    assert "forward of its own" in report.kept[0].reason


def test_modes_freezes_and_hooks_go_over():
    source = net(NormAct(4, nn.Dropout(0.5))).train()
    source[1].act.eval()
    source[1].requires_grad_(False)
    seen = []
    source[1].register_forward_hook(lambda *_: seen.append(1))
    converted, _ = fedkn.convert(source, normalizers.create("group"))
    assert isinstance(converted[1].norm, nn.GroupNorm)
    assert converted[1].norm.training
    assert not converted[1].act.training
    assert not any(p.requires_grad for p in converted[1].parameters())
    converted(X)
    assert seen == [1]


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
def test_no_batch_norm_of_timms_networks_is_left(name):
    timm = with_torchvision(lambda: pytest.importorskip("timm"))
    model = timm.create_model(name, num_classes=10)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for normalizer, kind in (("group", nn.GroupNorm), ("kernel", KNConv2d | KernelNorm2d)):
        converted, report = fedkn.convert(model, normalizers.create(normalizer))
        layers = list(converted.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in layers)
        assert any(isinstance(m, kind) for m in layers)
        assert not [kept for kept in report.kept if "BatchNorm" in kept.layer]
        assert converted(torch.randn(2, 3, 32, 32)).shape == (2, 10)
