from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers import DynamicTanh2d


@settings(deadline=None, max_examples=20)
@given(shape=st.tuples(*(st.integers(1, n) for n in (3, 4, 5, 5))), seed=st.integers(0, 1000))
def test_it_is_the_papers_equation(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = DynamicTanh2d(shape[1]).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(shape, generator=generator).double()
    out = np.empty(shape)
    alpha = layer.alpha.item()
    for n, c, h, w in np.ndindex(*shape):
        squashed = math.tanh(alpha * x[n, c, h, w].item())
        out[n, c, h, w] = layer.weight[c].item() * squashed + layer.bias[c].item()
    torch.testing.assert_close(layer(x), torch.from_numpy(out), rtol=1e-12, atol=1e-12)


def test_it_begins_at_half_and_learns_one_alpha():
    layer = DynamicTanh2d(3)
    assert layer.alpha.tolist() == [0.5]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), torch.tanh(0.5 * x))
    layer(x).square().sum().backward()
    assert layer.alpha.grad is not None
    assert layer.alpha.grad.abs() > 0
