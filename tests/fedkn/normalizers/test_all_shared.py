"""What the normalizers whose tensors are all shared have in common."""

import pytest
import torch

from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.normalizers import TensorRole

NAMES = (
    "sws",
    "nf",
    "fedwon",
    "anfr",
    "frn",
    "evonorm_s",
    "rms",
    "lcn",
    "dyt",
    "proxy",
    "brn",
    "feature_norm",
)
WITHOUT_BUFFERS = tuple(name for name in NAMES if name != "brn")


def small(architecture, name, **changes):
    return models.build(
        architecture,
        num_classes=3,
        in_channels=2,
        normalizer=normalizers.create(name),
        width=16 if architecture == "densenet20x16" else 8,
        **changes,
    )


@pytest.mark.parametrize("architecture", ["resnet8", "knresnet18", "densenet20x16", "mobilenet_v2"])
@pytest.mark.parametrize("name", NAMES)
def test_networks_train_and_share_every_tensor(name, architecture):
    torch.manual_seed(0)
    model = small(architecture, name, final_norm="own")
    smallest = normalizers.create(name).minimum_batch
    side = 8 if architecture == "resnet8" else 16
    logits = model(torch.randn(smallest, 2, side, side))
    logits.square().sum().backward()
    assert logits.shape == (smallest, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(torch.randn(1, 2, side, side)).shape == (1, 3)
    rule = normalizers.create(name).federation_rule(model)
    assert list(rule) == list(model.state_dict())
    assert set(rule.values()) == {TensorRole.SHARED}


@pytest.mark.parametrize("name", WITHOUT_BUFFERS)
def test_no_buffers(name):
    assert not list(small("resnet8", name).buffers())


@pytest.mark.parametrize("name", WITHOUT_BUFFERS)
def test_no_example_changes_what_becomes_of_another(name):
    torch.manual_seed(0)
    model = small("resnet8", name).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    torch.testing.assert_close(model.eval()(x)[:1], model.train()(x[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_normalized_does_not_depend_on_its_scale(name):
    if name in ("sws", "nf", "fedwon", "anfr", "dyt", "feature_norm"):
        pytest.skip("it does not normalize activations")
    torch.manual_seed(0)
    make = normalizers.create(name)
    block = make.norm_act(4, "relu")
    x = torch.randn(2, 4, 6, 6)
    if name == "evonorm_s":  # x * sigmoid(v x) is linear in x for a positive x that is large
        x = x.abs() + 20
    torch.testing.assert_close(block(x), block(7 * x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_one_by_one_maps_let_something_through(name, activation):
    torch.manual_seed(0)
    make = normalizers.create(name)
    block = make.conv_norm(4, 32, 1, activation=activation)
    x = torch.randn(make.minimum_batch, 4, 1, 1, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad.abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "channels"),
    [
        ("frn", {"learn_eps": False}, 4),
        ("rms", {}, 1),
        ("lcn", {"channels_per_group": 1}, 4),
        ("brn", {}, 4),
    ],
)
def test_one_by_one_maps_that_would_be_erased_are_refused(name, settings, channels):
    layer = normalizers.create(name, **settings).norm(channels)
    with pytest.raises(UserError, match="erases"):
        layer(torch.randn(1, channels, 1, 1))
    assert layer.eval()(torch.randn(1, channels, 1, 1)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_unknown_activations_are_refused(name):
    make = normalizers.create(name)
    for build in (
        lambda: make.norm_act(4, "rellu"),
        lambda: make.conv_norm(4, 4, 3, activation="rellu"),
    ):
        with pytest.raises(UserError, match="did you mean 'relu'"):
            build()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sws", {"gain": 1}, "no options"),
        ("frn", {"learn_eps": 1}, "true or false"),
        ("evonorm_s", {"groups": -1}, "groups = -1 of normalizer 'evonorm_s'"),
        ("evonorm_s", {"groups": 2, "channels_per_group": 2}, "not both"),
        ("lcn", {"window": 0}, "window = 0"),
        ("lcn", {"channels_per_group": 1.5}, "whole number, 0 or more"),
        ("brn", {"r_max": 0.5}, "r_max = 0.5"),
        ("brn", {"d_max": float("nan")}, "d_max = nan"),
        ("brn", {"ramp": 0}, "ramp = 0"),
        ("brn", {"momentum": 0.0}, "above 0"),
        ("brn", {"rmax": 3}, "did you mean 'r_max'"),
        ("feature_norm", {"scale": 2}, "no options"),
    ],
)
def test_bad_options_are_one_line_that_names_the_fix(name, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        normalizers.create(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "label"),
    [
        ("frn", {}, "FilterResponseNorm + TLU"),
        ("frn", {"learn_eps": False}, "FilterResponseNorm + TLU (fixed eps)"),
        ("evonorm_s", {}, "EvoNorm-S0 (at most 8 groups)"),
        ("lcn", {"window": 5}, "LocalContextNorm (window 5, 2 channels per group)"),
        ("brn", {}, "BatchRenorm (r up to 3, d up to 5 after 400 batches)"),
    ],
)
def test_labels_state_what_results_depend_on(name, settings, label):
    assert normalizers.create(name, **settings).label == label
