import numpy as np
import pytest
import torch

from fedkn.layers import SkipInit, SqueezeExcite2d


@pytest.mark.parametrize(("channels", "inner"), [(3, 1), (16, 1), (64, 4)])
def test_channels_are_weighted_as_the_paper_has_it(channels, inner):
    torch.manual_seed(0)
    layer = SqueezeExcite2d(channels).double()
    assert layer.squeeze.out_features == inner
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    w1, b1 = (p.detach().numpy() for p in layer.squeeze.parameters())
    w2, b2 = (p.detach().numpy() for p in layer.excite.parameters())
    out = np.empty(x.shape)
    for n, example in enumerate(x.numpy()):
        hidden = np.maximum(w1 @ example.mean((1, 2)) + b1, 0)
        weights = 1 / (1 + np.exp(-(w2 @ hidden + b2)))
        out[n] = example * weights[:, None, None]
    np.testing.assert_allclose(layer(x).detach(), out, rtol=1e-12)


def test_a_skip_init_begins_as_nothing_and_can_leave_it():
    layer = SkipInit()
    x = torch.randn(2, 3, 4, 4)
    assert not layer(x).any()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.gain.grad, x.sum().view(1))
