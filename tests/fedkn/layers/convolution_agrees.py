"""Run by test_stacked_convolution under TRITON_INTERPRET=1: against each client's own conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedkn.layers.kernel.settings import Geometry
from fedkn.layers.stacked_convolution import StackedConvolutions, convolve_stacked
from tests.fedkn.layers import interpreter  # noqa: F401

CASES = (
    ((3, 2, 3, 8, 8), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 1, 5, 7, 6), 18, (2, 3), (2, 1), (1, 2), (1, 2)),
    ((2, 3, 17, 5, 5), 4, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 2, 33, 6, 4), 3, (3, 3), (2, 2), (1, 1), (1, 1)),
)
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
for shape, outputs, kernel, stride, padding, dilation in CASES:
    clients = shape[0]
    geometry = Geometry(kernel, stride, padding, dilation, 1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(clients, outputs, shape[2], *kernel, requires_grad=True)
    bias = torch.randn(clients, outputs, requires_grad=True)

    place = {"stride": stride, "padding": padding, "dilation": dilation}

    def by_torch(x, weight, bias, place=place):
        return F.conv2d(x, weight, bias, **place)

    wanted = torch.stack([by_torch(*each) for each in zip(x, weight, bias, strict=True)])
    given = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, (x, weight, bias), given)
    for found in (
        convolve_stacked(x, weight, bias, geometry),
        torch.func.vmap(by_torch)(x, weight, bias),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with StackedConvolutions():
        found = torch.func.vmap(by_torch)(x, weight, bias)
    assert torch.equal(found, convolve_stacked(x, weight, bias, geometry))
    torch.backends.cudnn.allow_tf32 = True  # on the CPU it only chooses the way
    with StackedConvolutions():
        grouped = torch.func.vmap(by_torch)(x, weight, bias)
    torch.backends.cudnn.allow_tf32 = False
    torch.testing.assert_close(grouped, wanted, rtol=1e-4, atol=1e-4)
    for each in (found, grouped):
        own = torch.autograd.grad(each, (x, weight, bias), given)
        for one, other in zip(own, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

# What the kernels do not serve is PyTorch's: groups, maps outside a vmap, padding by name.
grouped = torch.randn(2, 4, 1, 3, 3)
maps = torch.randn(2, 1, 4, 6, 6)
with StackedConvolutions():
    found = torch.func.vmap(lambda x, w: F.conv2d(x, w, padding="same", groups=4))(maps, grouped)
    alone = F.conv2d(maps[0], grouped[0], groups=4)
torch.testing.assert_close(found[0], F.conv2d(maps[0], grouped[0], padding="same", groups=4))
torch.testing.assert_close(alone, F.conv2d(maps[0], grouped[0], groups=4))
