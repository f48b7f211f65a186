"""KNConv's gradients by example against a loop over the examples."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv1d, KNConv2d, dropout_stream
from fedkn.layers.kernel.dropout import next_number
from fedkn.layers.kernel.layer import KNConv
from fedkn.layers.opacus import register

opacus = pytest.importorskip("opacus")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


@pytest.fixture(autouse=True)
def registered():
    register()


def planes() -> nn.Sequential:
    return nn.Sequential(
        KNConv2d(3, 8, 3, padding=(1, 0, 1, 0), activation="relu"),
        KNConv2d(8, 6, 3, stride=2, padding=1, groups=2, dilation=2),
        nn.ReLU(),
        KNConv2d(6, 6, 2, padding=1, padding_mode="reflect", dropout_p=0.0, bias=False),
        KernelNorm2d(1, dropout_p=0.0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def lines() -> nn.Sequential:
    return nn.Sequential(
        KNConv1d(3, 8, 3, padding=(2, 1), stride=2, dropout_p=0.0), nn.Flatten(), nn.LazyLinear(4)
    )


@contextmanager
def same_masks():
    """Have every KNConv draw as it does under Opacus."""
    forward = KNConv.forward

    def seeded(layer, x):
        with dropout_stream(next_number()):
            return forward(layer, x)

    with mock.patch.object(KNConv, "forward", seeded):
        yield


@pytest.mark.parametrize("kind", ["planes", "lines"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_per_sample_gradients_match_a_loop(kind, reduction) -> None:
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = planes() if kind == "planes" else lines()
    x = torch.randn(5, 3, 9, 8) if kind == "planes" else torch.randn(5, 3, 9)
    target = torch.tensor([0, 1, 2, 3, 0])
    model(x)  # settles the lazy layer
    each = nn.CrossEntropyLoss(reduction="none")
    # The loop weights the samples of one pass, so that the masks are the same.
    with dropout_stream(1):
        private = GradSampleModule(model, loss_reduction=reduction)
        getattr(each(private(x), target), reduction)().backward()
    samples = {name: p.grad_sample for name, p in model.named_parameters()}
    private.to_standard_module()
    for i in range(5):
        with dropout_stream(1), same_masks():
            loss = each(model(x), target)[i]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(samples, gradients, strict=True):
            scale = gradient.abs().max().clamp_min(1e-3)
            assert ((samples[name][i] - gradient).abs().max() / scale).item() < 1e-5


def test_an_empty_poisson_batch() -> None:
    from opacus import GradSampleModule

    private = GradSampleModule(planes())
    private(torch.randn(0, 3, 9, 8)).sum().backward()
    assert all(p.grad_sample.abs().sum() == 0 for p in private.parameters())


def test_a_network_trains_under_the_privacy_engine() -> None:
    torch.manual_seed(0)
    model = planes()
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(data, batch_size=2),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    sizes = []
    for _ in range(3):
        for x, y in loader:
            sizes.append(len(x))
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y, reduction="mean").backward()
            optimizer.step()
    assert 0 in sizes
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_only_a_layer_that_opacus_hooks_draws_otherwise() -> None:
    from opacus import GradSampleModule

    x, layer = torch.randn(2, 3, 9, 8), KNConv2d(3, 8, 3, dropout_p=0.5)

    def drawn() -> torch.Tensor:
        with dropout_stream(1):
            return layer(x)

    alone = drawn()
    hook = layer.register_forward_hook(lambda *_: None)
    assert torch.equal(drawn(), alone)  # somebody else's
    hook.remove()
    private = GradSampleModule(layer)
    assert not torch.equal(drawn(), alone)
    with torch.no_grad():
        assert torch.equal(drawn(), alone)
    private.to_standard_module()
    assert torch.equal(drawn(), alone)


def test_a_pass_from_before_the_registration_is_named() -> None:
    from opacus import GradSampleModule

    layer = KNConv2d(3, 8, 3)
    private = GradSampleModule(layer)
    with mock.patch.dict(GradSampleModule.GRAD_SAMPLERS, clear=True):
        y = private(torch.randn(2, 3, 9, 8))
    with pytest.raises(UserError, match="register first"):
        y.sum().backward()
