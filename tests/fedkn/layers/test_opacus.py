"""Opacus' gradients by example of a plain convolution, which fedkn takes into its own hands."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn.layers.opacus import register

pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2), "bias": False},
        {"padding": "same", "padding_mode": "reflect"},
        {"groups": 2, "stride": 2},
    ],
)
def test_convolutions_in_every_layout(layout, settings) -> None:
    """Opacus' own rule is wrong in channels_last and for padding other than with zeros."""
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3, **settings).double().to(memory_format=layout)
    x = torch.randn(5, 4, 9, 8, dtype=torch.double).contiguous(memory_format=layout)
    private = GradSampleModule(model, loss_reduction="sum")
    private(x).square().sum().backward()
    samples = [p.grad_sample for p in model.parameters()]
    private.to_standard_module()
    for i in range(5):
        gradients = torch.autograd.grad(
            model(x[i : i + 1]).square().sum(), list(model.parameters())
        )
        for sample, gradient in zip(samples, gradients, strict=True):
            torch.testing.assert_close(sample[i], gradient)


def test_an_empty_poisson_batch() -> None:
    from opacus import GradSampleModule

    private = GradSampleModule(nn.Conv2d(3, 4, 3))
    private(torch.randn(0, 3, 9, 8)).sum().backward()
    assert all(p.grad_sample.abs().sum() == 0 for p in private.parameters())
