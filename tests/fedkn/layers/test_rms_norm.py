from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.errors import UserError
from fedkn.layers import LayerNorm2d, RMSNorm2d


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 4, 5, 5))),
    seed=st.integers(0, 1000),
)
def test_rms_is_over_the_whole_example(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = RMSNorm2d(shape[1]).double().eval()
    torch.nn.init.normal_(layer.weight, generator=generator)
    torch.nn.init.normal_(layer.bias, generator=generator)
    x = torch.randn(shape, generator=generator).double()
    out = np.empty(shape)
    for n, c in np.ndindex(*shape[:2]):
        root = np.sqrt((x[n].numpy() ** 2).mean() + 1e-5)
        out[n, c] = x[n, c].numpy() / root * layer.weight[c].item() + layer.bias[c].item()
    torch.testing.assert_close(layer(x), torch.from_numpy(out))


def test_rms_norm_is_layer_norm_where_the_mean_is_zero():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x = x - x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(RMSNorm2d(3).double()(x), LayerNorm2d(3).double()(x))
    moved = x + 2
    assert not torch.allclose(RMSNorm2d(3).double()(moved), LayerNorm2d(3).double()(moved))


def test_rms_gradients():
    layer = RMSNorm2d(3).double()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def output(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.weight, layer.bias))


def test_a_single_number_is_refused_in_training():
    with pytest.raises(UserError, match="erases a 1x1 map"):
        RMSNorm2d(1)(torch.ones(2, 1, 1, 1))
    assert RMSNorm2d(2)(torch.ones(2, 2, 1, 1)).shape == (2, 2, 1, 1)
