"""Conversion of networks for series, volumes and features: converted, or kept and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn import normalizers
from fedkn.errors import UserError
from fedkn.layers import KNConv1d
from fedkn.models import convert
from tests.own_parts import Series, Unet, Volumes

ROUND = [name for name in normalizers.names() if name != "instance"]
INPUTS = {Series: (2, 12), Volumes: (1, 4, 6, 6), Unet: (1, 8, 8)}


def batch(kind, count=3):
    return torch.randn(count, *INPUTS[kind], generator=torch.Generator().manual_seed(0))


def kept(report):
    return {k.name: k.reason for k in report.kept}


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize("kind", [Series, Volumes, Unet])
def test_every_normalizer_gives_a_network_that_trains_and_is_federated(kind, name):
    torch.manual_seed(1)
    normalizer = normalizers.create(name)
    model, report = convert(kind(), normalizer)
    if name == "lcn" and kind is Volumes:
        assert "neighbourhoods" in kept(report)["norm1"]
        with pytest.raises(UserError, match="no federation rule for buffer 'norm1"):
            normalizer.federation_rule(model)
        return
    normalizer.federation_rule(model)
    x = batch(kind)
    model.train()(x).square().sum().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
    norms = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    left = {type(m).__name__ for m in model.modules()} & norms
    family = {"batch", "fedbn", "silobn", "fixbn"}
    assert bool(left) == (name in family), report


def test_statistics_are_those_of_the_axes_that_there_are():
    model, _ = convert(Volumes(), normalizers.create("group"))
    with torch.no_grad():
        model.norm1.norm.weight.normal_()
        model.norm1.norm.bias.normal_()
    x = torch.randn(2, 8, 3, 4, 5)
    expected = nn.functional.group_norm(
        x, model.norm1.norm.num_groups, model.norm1.norm.weight, model.norm1.norm.bias
    )
    torch.testing.assert_close(model.norm1(x), expected)
    series, _ = convert(Series(), normalizers.create("rms"))
    x = torch.randn(2, 8, 7)
    twin = series.bn1.norm
    torch.testing.assert_close(series.bn1(x), twin(x.unsqueeze(-1)).squeeze(-1))


def test_scales_and_biases_go_over():
    model = Series()
    with torch.no_grad():
        model.bn1.weight.normal_()
        model.bn3.bias.normal_()
    converted, _ = convert(model, normalizers.create("group"))
    assert torch.equal(converted.bn1.norm.weight, model.bn1.weight)
    assert torch.equal(converted.bn3.norm.bias, model.bn3.bias)


def test_a_batch_norm_stays_under_the_batch_norms():
    for name in ("batch", "fedbn"):
        model, report = convert(Series(), normalizers.create(name))
        assert type(model.bn1) is nn.BatchNorm1d
        assert not report.changed


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_other_norms_of_volumes_become_batch_norms_over_all_voxels(norm):
    model, report = convert(Volumes(norm=norm), normalizers.create("batch"))
    assert {c.name for c in report.changed} >= {"norm1", "norm2"}
    x = torch.randn(3, 8, 2, 3, 4)
    expected = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(model.train().norm1(x), expected, rtol=1e-4, atol=1e-5)


def test_kernel_normalization_has_series_and_says_that_it_has_no_volumes():
    torch.manual_seed(0)
    plain = Series()
    model, report = convert(plain, normalizers.create("kernel"))
    assert isinstance(model.conv1, KNConv1d)
    assert torch.equal(model.conv1.weight, plain.conv1.weight)
    assert model.conv1.padding == (2, 2)
    assert isinstance(model.bn1, nn.Identity)
    assert model(batch(Series)).shape == (3, 3)
    volumes, report = convert(Volumes(), normalizers.create("kernel"))
    assert kept(report)["conv1"] == "KNConv2d has no form for volumes"
    assert isinstance(volumes.conv1, nn.Conv3d)
    # Its norms stand alone then: single voxels over their channels.
    x = torch.randn(2, 8, 3, 4, 5)
    out = volumes.eval().norm1(x)
    assert out.shape == x.shape
    spread = out.var(1, unbiased=False)
    even = torch.full_like(spread, float(spread.mean()))
    torch.testing.assert_close(spread, even, rtol=0.05, atol=0.05)


def test_weight_standardization_has_neither_and_says_so():
    _, series = convert(Series(), normalizers.create("ws_group"))
    assert kept(series)["conv1"] == "WSConv2d has no form for series"
    _, volumes = convert(Volumes(), normalizers.create("ws_group"))
    assert kept(volumes)["conv2"] == "WSConv2d has no form for volumes"


def test_what_would_erase_features_is_kept_and_named():
    model, report = convert(Series(), normalizers.create("instance"))
    assert "bn3" in kept(report)
    assert type(model.bn3) is nn.BatchNorm1d
    with pytest.raises(UserError, match="no federation rule for buffer 'bn3"):
        normalizers.create("instance").federation_rule(model)


def test_a_norm_with_a_forward_of_its_own_is_kept():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Series()
    model.bn1 = Doubled(8)
    _, report = convert(model, normalizers.create("group"))
    assert "forward of its own" in kept(report)["bn1"]
