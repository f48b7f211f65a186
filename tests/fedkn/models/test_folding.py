import pytest
import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.errors import UserError
from tests.fedkn.models.test_conversion import NormAndActivation, PreActivation, Untraceable


def unsettled(model, seed=0):
    """Give every batch norm statistics and scales far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_outputs_are_those_of_evaluation(name, torchvision):
    model = unsettled(getattr(torchvision.models, name)(weights=None, num_classes=5)).double()
    folded, report = models.fold_batch_norm(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == len(report.kept)
    assert left == (62 if name == "densenet121" else 0)


def test_our_own_networks_fold():
    model = unsettled(
        models.build(
            "resnet8",
            num_classes=3,
            in_channels=1,
            normalizer=normalizers.create("batch"),
            width=4,
        )
    )
    folded, report = models.fold_batch_norm(model)
    assert len(report.changed) == 7
    assert not report.kept
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert not any(m.training for m in folded.modules())


def test_the_original_is_left_alone():
    model = unsettled(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    models.fold_batch_norm(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_only_a_norm_right_after_its_convolution_is_folded():
    folded, report = models.fold_batch_norm(PreActivation(nn.ReLU()))
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert "no convolution" in report.kept[0].reason
    bare = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert "no running statistics" in models.fold_batch_norm(bare)[1].kept[0].reason


def test_a_norm_that_does_more_than_normalize_is_not_folded():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), NormAndActivation(2))
    folded, report = models.fold_batch_norm(unsettled(model))
    assert "forward of its own" in report.kept[0].reason
    x = torch.randn(2, 2, 3, 3)
    assert torch.equal(folded(x), model.eval()(x))


def test_two_norms_on_one_weight():
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm2d(2), second, nn.BatchNorm2d(2))
    folded, _ = models.fold_batch_norm(unsettled(model))
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_without_a_trace_nothing_is_folded():
    with pytest.raises(UserError, match="cannot be traced"):
        models.fold_batch_norm(Untraceable())
