from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.errors import UserError
from fedkn.layers import FeatureNorm


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 4), d=st.integers(2, 9), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_features_get_the_norm_sqrt_d_and_keep_their_direction(n, d, scale):
    f = (torch.rand(n, d, dtype=torch.float64) + 0.5) * scale
    exact = d**0.5 * f / f.norm(dim=1, keepdim=True)
    torch.testing.assert_close(FeatureNorm()(f), exact, rtol=1e-5, atol=0)


def test_feature_gradients_also_at_zero():
    f = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FeatureNorm(), (f,))
    zero = torch.zeros(1, 4, requires_grad=True)
    FeatureNorm()(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_a_single_number_is_refused_in_training():
    with pytest.raises(UserError, match="one feature"):
        FeatureNorm()(torch.ones(2, 1))
    assert FeatureNorm().eval()(torch.ones(2, 1)).shape == (2, 1)
