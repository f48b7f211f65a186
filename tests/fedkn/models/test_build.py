import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv2d
from fedkn.models.blocks import Halve
from fedkn.normalizers import Normalizer

NAMES = normalizers.names()
KERNEL = normalizers.create("kernel")


def build(name="resnet8", normalizer=KERNEL, **changes):
    settings = {"num_classes": 10, "in_channels": 3} | changes
    return models.build(name, normalizer=normalizer, **settings)


def weights(model):
    return sum(p.numel() for p in model.parameters())


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | KNConv2d)]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("knresnet18", 11_169_670, 11_177_350),
        ("knresnet34", 21_277_280, 21_284_960),
        ("knresnet50", 23_497_160, 23_527_880),
    ],
)
def test_published_parameter_counts(name, low, high):
    assert weights(build(name)) == low
    assert weights(build(name, low_resolution=False)) == high


@pytest.mark.parametrize("normalizer", NAMES)
@pytest.mark.parametrize("final_norm", ["none", "kernel", "own"])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_resnet8_trains_on_every_size(normalizer, final_norm, side):
    model = build(
        normalizer=normalizers.create(normalizer), in_channels=1, width=4, final_norm=final_norm
    )
    x = torch.randn(2, 1, side, side)
    logits = model(x)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x).shape == (2, 10)


@pytest.mark.parametrize("normalizer", NAMES)
def test_final_norm_is_the_same_switch_for_every_normalizer(normalizer):
    def final(choice):
        model = build(normalizer=normalizers.create(normalizer), width=8, final_norm=choice)
        return list(model.head.before)

    assert final("none") == []
    kernel = final("kernel")
    assert [type(layer) for layer in kernel] == [KernelNorm2d]
    assert kernel[0].kernel_size == (1, 1)
    assert kernel[0].dropout_p == 0.25
    own = final("own")
    assert [type(layer) for layer in own] == [type(normalizers.create(normalizer).norm(32))]


def test_every_normalizer_has_the_same_convolutions():
    shapes = set()
    for name in NAMES:
        for architecture in ("resnet8", "knresnet18"):
            model = build(architecture, normalizers.create(name), width=8)
            shapes.add((architecture, tuple(m.weight.shape for m in convolutions(model))))
    assert len(shapes) == 2


def test_same_seed_same_bits_and_global_state_untouched():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build(width=8, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = build(width=8, seed=5)
    other = build(width=8, seed=6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(convolutions(first)[0].weight, convolutions(other)[0].weight)


@pytest.mark.parametrize("architecture", ["resnet8", "knresnet18"])
def test_every_normalizer_starts_from_the_same_weights(architecture):
    reference = build(architecture, width=8, seed=3)
    # Fixup is a way to begin, held in tests/fedkn/normalizers/test_fixup.py.
    for name in set(NAMES) - {"fixup"}:
        model = build(architecture, normalizers.create(name), width=8, seed=3)
        pairs = zip(convolutions(reference), convolutions(model), strict=True)
        assert all(torch.equal(a.weight, b.weight) for a, b in pairs)
        assert torch.equal(reference.head.fc.weight, model.head.fc.weight)


def test_initial_weights_have_kaiming_deviation():
    convs = convolutions(build(width=64))
    for conv in convs[1:]:
        fan_out = conv.weight.shape[0] * conv.weight[0, 0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert conv.bias.abs().sum() == 0


def test_dropout_is_as_published_unless_said():
    def seen(model):
        return [m.dropout_p for m in model.modules() if hasattr(m, "dropout_p")]

    published = seen(build(width=8, final_norm="kernel"))
    assert set(published[:-1]) == {0.1}
    assert published[-1] == 0.25
    assert set(seen(build("knresnet18", width=8))[:-1]) == {0.05}
    halved = seen(build("knresnet18", width=8, dropout_p=0.02))
    assert set(halved[:-1]) == {0.02}
    assert halved[-1] == pytest.approx(0.1)
    more = seen(build("knresnet18", normalizers.create("kernel", dropout_p=0.3), width=8))
    assert set(more[:-1]) == {0.3}
    assert more[-1] == 0.25
    assert set(seen(build("knresnet18", width=8, dropout_p=0.0))) == {0.0}


@dataclass(frozen=True)
class Dropped(Normalizer):
    """One that fedkn does not know, with the option that models publish a value for."""

    name = "dropped"
    affine = False
    dropout_p: float | None = None

    def norm(self, channels):
        return nn.Dropout2d(0.5 if self.dropout_p is None else self.dropout_p)


@pytest.mark.parametrize(
    ("own", "asked", "inner", "final"),
    [(None, None, 0.1, 0.25), (None, 0.04, 0.04, 0.1), (0.02, None, 0.02, 0.05)],
)
def test_any_normalizer_with_this_option_gets_the_models_dropout(own, asked, inner, final):
    model = build(normalizer=Dropped(own), width=8, final_norm="own", dropout_p=asked)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)]
    assert set(rates[:-1]) == {inner}
    assert rates[-1] == pytest.approx(final)
    with pytest.raises(UserError, match="set one of them"):
        build(normalizer=Dropped(0.2), width=8, dropout_p=0.1)


def sides_after_pooling(model, side):
    sides = []
    for module in model.modules():
        if isinstance(module, Halve):
            module.register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    assert model.eval()(torch.randn(1, 3, side, side)).shape == (1, 2)
    return sides


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("knresnet18", [16, 8, 4, 2], [28, 14, 8, 4]),
        ("knresnet34", [16, 8, 4, 2], [28, 14, 8, 4]),
        ("knresnet50", [16, 8, 4], [28, 14, 7]),
    ],
)
def test_maps_of_the_originals(name, low, high):
    width = 16 if name.endswith("50") else 4
    assert sides_after_pooling(build(name, width=width, num_classes=2), 32) == low
    larger = build(name, width=width, num_classes=2, low_resolution=False)
    assert sides_after_pooling(larger, 224) == high
    assert larger.transition1.conv.padding == (1, 0, 1, 0)
    assert larger.transition2.conv.padding == (0, 1, 0, 1)


def test_halving_leaves_tiny_maps_alone():
    assert sides_after_pooling(build(width=4, num_classes=2), 8) == [4, 2, 2]


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("knresnet18", 28, [14, 7, 3, 1]),
        ("knresnet18", 8, [4, 2, 1, 1]),
        ("knresnet34", 28, [14, 7, 3, 1]),
        ("knresnet50", 8, [4, 2, 1]),
        ("knresnet13", 28, [14, 7, 3]),
        ("knresnet13", 12, [6, 3, 1]),
    ],
)
def test_the_knresnets_pool_whatever_can_be_pooled(name, side, expected):
    width = 16 if name.endswith("50") else 4
    assert sides_after_pooling(build(name, width=width, num_classes=2), side) == expected


@pytest.mark.parametrize("side", [28, 20])
def test_small_images_go_through_knresnet18_as_published(side):
    """Layer by layer as the paper has it, every pooling torch's own."""
    model = build("knresnet18", width=8, num_classes=2, in_channels=1).eval()
    x = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    expected = model.stem(x)
    for name, part in model.named_children():
        if name.startswith("block"):
            expected = expected + part.branch(part.before(expected))
        elif name.startswith("transition"):
            expected = F.max_pool2d(part.conv(part.before(expected)), 2)
        elif name == "final":
            expected = part.conv(part.before(F.max_pool2d(expected, 2)))
    expected = model.head.fc(model.head.before(expected).mean((2, 3)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("normalizer", NAMES)
@pytest.mark.parametrize("name", ["resnet8", "knresnet18"])
def test_the_meta_device(normalizer, name):
    """Shapes without numbers: built there or sent there, forward and backward."""
    with torch.device("meta"):
        there = build(name, normalizers.create(normalizer), width=8)
    sent = build(name, normalizers.create(normalizer), width=8).to("meta")
    for model in (there, sent):
        out = model.train()(torch.empty(4, 3, 32, 32, device="meta"))
        assert (out.device.type, out.shape) == ("meta", (4, 10))
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.eval()(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 10)


@pytest.mark.parametrize("normalizer", NAMES)
def test_models_can_be_copied_and_sent_to_other_processes(normalizer):
    model = build(normalizer=normalizers.create(normalizer), width=4).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert torch.equal(model(x), pickle.loads(pickle.dumps(model))(x))


@pytest.mark.parametrize(
    "normalizer", [name for name in NAMES if normalizers.create(name).together]
)
def test_clients_train_together_under_vmap(normalizer):
    model = build(normalizer=normalizers.create(normalizer), width=4, dropout_p=0.0)
    start = {name: torch.stack([p, 1.1 * p]) for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 3, 16, 16)

    def loss(weights, images):
        return functional_call(model, weights, (images,)).square().mean()

    together = vmap(grad(loss), randomness="different")(start, x)
    for client in (0, 1):
        alone = grad(loss)({name: p[client] for name, p in start.items()}, x[client])
        for name, gradient in alone.items():
            largest = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(
                together[name][client], gradient, rtol=1e-4, atol=1e-5 * largest
            )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet9"}, "did you mean 'resnet8'"),
        ({"width": 0}, "width = 0"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"final_norm": "kernels"}, "did you mean 'kernel'"),
        ({"low_resolution": False}, "no high-resolution form"),
        ({"dropout_p": 1.5}, "dropout_p = 1.5"),
        ({"dropout_p": 0.1, "normalizer": normalizers.create("kernel", dropout_p=0.2)}, "set one"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(UserError, match=words):
        build(**changes)
