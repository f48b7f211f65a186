"""The networks with a fully connected head, against the layers that their papers name."""

import pytest
import torch
from torch import nn

from fedkn import models, normalizers


def built(name, normalizer="none", **changes):
    settings = {"num_classes": 10, "in_channels": 3} | changes
    return models.build(name, normalizer=normalizers.create(normalizer), **settings)


def published_simple_cnn(norm):
    layers, channels = [], 3
    for outputs in (16, 32, 64):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), norm(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def published_lenet(first=6, second=16, hidden=(120, 84)):
    return nn.Sequential(
        *(nn.Conv2d(3, first, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(25 * second, hidden[0]), nn.ReLU()),
        *(nn.Linear(*hidden), nn.ReLU(), nn.Linear(hidden[1], 10)),
    )


def published_cnn_cifar():
    return published_lenet(64, 64, (384, 192))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_published_ones():
    assert count(built("lenet")) == count(published_lenet()) == 62_006
    assert count(built("cnn_cifar")) == count(published_cnn_cifar())
    assert count(built("simple_cnn")) == count(published_simple_cnn(lambda _: nn.Identity()))
    # A convolution before a norm has no bias of its own: 16 + 32 + 64 fewer.
    published = count(published_simple_cnn(nn.BatchNorm2d))
    assert count(built("simple_cnn", "batch")) == published - 112


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lenet", published_lenet),
        ("cnn_cifar", published_cnn_cifar),
        ("simple_cnn", lambda: published_simple_cnn(lambda _: nn.Identity())),
    ],
)
def test_they_compute_what_the_published_ones_do(name, published):
    torch.manual_seed(0)
    reference, ours = published(), built(name)
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            mine.copy_(theirs)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lenet", "simple_cnn", "cnn_cifar"])
@pytest.mark.parametrize("side", [8, 28, 32, 48])
def test_weights_do_not_depend_on_the_images(name, side):
    model = built(name, "group", in_channels=1)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 10)
    assert count(model) == count(built(name, "group", in_channels=1))


def test_width_scales_hidden_layers_too():
    half = built("lenet", width=3)
    sizes = [layer.out_features for layer in half.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [60, 42, 10]


@pytest.mark.parametrize(
    ("name", "place", "features"), [("simple_cnn", 1, 1024), ("lenet", -1, 84)]
)
def test_a_normalizers_layer_stands_where_the_paper_has_it(name, place, features):
    model = built(name, "feature_norm")
    seen = []
    after = model.head.fc if place < 0 else model.head.hidden[place]
    after.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(torch.randn(2, 3, 32, 32))
    # FedFN scales the features to the norm of the square root of their number.
    torch.testing.assert_close(seen[0].norm(dim=1), torch.full((2,), features**0.5))
