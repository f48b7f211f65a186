"""The federation rules of PyTorch's BatchNorm, on networks that fedkn did not build."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.data.vision import import_torchvision
from fedkn.normalizers import TensorRole
from fedkn.normalizers.rule import Forward

SHARED, LOCAL, FROZEN, MEAN, VARIANCE = (
    TensorRole.SHARED,
    TensorRole.LOCAL,
    TensorRole.FROZEN,
    TensorRole.MEAN,
    TensorRole.VARIANCE,
)


class Block(nn.Module):
    """Named as in torchvision: no norm but one has "bn" in its name, and one is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.downsample = nn.Sequential(nn.Conv2d(1, 4, 1, stride=2), nn.SyncBatchNorm(4))
        self.bn1 = nn.BatchNorm2d(4, affine=False)
        self.bn_like = nn.GroupNorm(2, 4)
        self.classifier = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def network(normalizer, seed=0):
    return models.build(
        "resnet8",
        num_classes=3,
        in_channels=1,
        width=4,
        normalizer=normalizer,
        final_norm="own",
        seed=seed,
    )


def forward_of(model: nn.Module, images: torch.Tensor) -> Forward:
    @torch.no_grad()
    def forward(batch_size: int) -> None:
        for start in range(0, len(images), batch_size):
            model(images[start : start + batch_size])

    return forward


@pytest.mark.parametrize(
    ("name", "settings", "round_", "roles"),
    [
        ("batch", {}, 1, (SHARED, SHARED, SHARED)),
        ("batch", {"bn_statistics": "recalibrated"}, 1, (SHARED, MEAN, VARIANCE)),
        ("batch", {"bn_statistics": "local"}, 1, (SHARED, LOCAL, LOCAL)),
        ("silobn", {}, 1, (SHARED, LOCAL, LOCAL)),
        ("fedbn", {}, 1, (LOCAL, LOCAL, LOCAL)),
        ("fixbn", {}, 999, (SHARED, SHARED, SHARED)),
        ("fixbn", {"frozen_from": 3}, 2, (SHARED, SHARED, SHARED)),
        ("fixbn", {"frozen_from": 3}, 3, (SHARED, FROZEN, FROZEN)),
        ("fixbn", {"frozen_from": 3}, 4, (SHARED, FROZEN, FROZEN)),
    ],
)
def test_every_batch_norm_has_the_rule_and_nothing_else(name, settings, round_, roles):
    parameters, mean, variance = roles
    model = Block()
    expected = dict.fromkeys(model.state_dict(), SHARED)
    for norm in ("features.1", "downsample.1", "bn1", "classifier.1"):
        expected[f"{norm}.running_mean"] = mean
        expected[f"{norm}.running_var"] = variance
        expected[f"{norm}.num_batches_tracked"] = TensorRole.COUNTER
        if norm != "bn1":
            expected[f"{norm}.weight"] = expected[f"{norm}.bias"] = parameters
    rule = normalizers.create(name, **settings).federation_rule(model, round_)
    assert rule == expected


def test_the_norms_of_other_networks_are_found_where_names_miss_them():
    try:
        model = import_torchvision().models.mobilenet_v2(weights=None)
    except ImportError:
        pytest.skip("torchvision is not installed")
    rule = normalizers.create("fedbn").federation_rule(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(role is LOCAL for role in rule.values()) == 4 * len(norms)
    assert not any("bn" in name for name in rule)


@pytest.mark.parametrize("name", ["batch", "fedbn", "silobn", "fixbn"])
def test_a_local_step_is_batch_norms_own(name):
    """In training they are one layer; only the round tells them apart."""
    normalizer = normalizers.create(name)
    model, plain = network(normalizer), network(normalizers.create("batch"))
    normalizer.begin_training(model.train(), 1)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x), plain.train()(x))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def test_fixbn_once_frozen_trains_in_evaluation_mode_and_changes_no_statistic():
    normalizer = normalizers.create("fixbn", frozen_from=2)
    model = network(normalizer)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    normalizer.begin_training(model.train(), 1)
    model(x)
    after_one = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(
        not torch.equal(v, network(normalizer).state_dict()[k]) for k, v in after_one.items()
    )

    model.eval()
    expected = model(x)
    normalizer.begin_training(model.train(), 2)
    frozen = model(x)
    torch.testing.assert_close(frozen, expected)
    frozen.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(v, after_one[k]) for k, v in model.state_dict().items())
    assert model.training, "what is no BatchNorm stays in training mode"


def test_recalibrated_statistics_are_the_moments_of_each_layers_inputs():
    """Up to 64 images: of the inputs under the very statistics that result, to rounding."""
    normalizer = normalizers.create("batch", bn_statistics="recalibrated")
    model = network(normalizer).double().train()
    images = torch.randn(50, 1, 8, 8, dtype=torch.float64) * 3 + 1
    model(images[:7] * 5)  # running statistics of something else
    counters = {k: v.clone() for k, v in model.state_dict().items() if "tracked" in k}
    normalizer.end_training(model, forward_of(model, images), 1)
    assert model.training

    seen: dict[str, torch.Tensor] = {}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    model.eval()(images)
    for name, norm in norms.items():
        values = seen[name].transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norm.running_var, values.var(1, correction=0), rtol=1e-9, atol=0)
        assert norm.track_running_stats
    assert all(torch.equal(v, counters[k]) for k, v in model.state_dict().items() if k in counters)


@pytest.mark.parametrize("size", [1, 65, 150])
def test_recalibration_pools_whatever_the_batches(size):
    normalizer = normalizers.create("batch", bn_statistics="recalibrated")
    model = nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(3)).double()
    images = torch.randn(size, 3, 2, 2, dtype=torch.float64) + torch.arange(size).view(-1, 1, 1, 1)
    normalizer.end_training(model, forward_of(model, images), 1)
    values = images.mean((2, 3))
    torch.testing.assert_close(model[1].running_mean, values.mean(0))
    torch.testing.assert_close(
        model[1].running_var, values.var(0, correction=0), atol=1e-12, rtol=1e-9
    )


def test_without_images_the_statistics_stay():
    normalizer = normalizers.create("batch", bn_statistics="recalibrated")
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(2.0)
    normalizer.end_training(model, forward_of(model, torch.empty(0, 3, 2, 2)), 1)
    assert model[0].running_mean.tolist() == [2.0] * 3


def test_a_pass_that_fails_leaves_no_hook_behind():
    normalizer = normalizers.create("batch", bn_statistics="recalibrated")
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected 4D"):
        normalizer.end_training(model, forward_of(model, torch.randn(2, 3)), 1)
    assert not model[0]._forward_pre_hooks
    assert model[0].track_running_stats


@pytest.mark.parametrize("setting", ["averaged", "local"])
def test_other_settings_ask_for_no_pass(setting):
    normalizer = normalizers.create("batch", bn_statistics=setting)
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    normalizer.end_training(model, forward_of(model, torch.randn(4, 3, 2, 2)), 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
