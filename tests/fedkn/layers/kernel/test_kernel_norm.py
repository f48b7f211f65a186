from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkn.layers import KernelNorm1d, KernelNorm2d, KNConv2d, dropout_stream
from fedkn.layers.kernel.dropout import LEVELS, drop_level, keep_mask, next_key
from tests.fedkn.layers.kernel.naive import moments, naive_kernel_norm, padded, units
from tests.fedkn.layers.kernel.test_kn_conv import close, conditioned
from tests.fedkn.layers.paths import path

P = 0.1


@pytest.mark.parametrize("name", ["plain", "composite"])
@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.none() | st.tuples(*[st.integers(1, 3)] * 2),
    sides=st.tuples(*[st.integers(0, 2)] * 4),
    p=st.sampled_from([0.0, P]),
    training=st.booleans(),
    eval_mode=st.sampled_from(["expected", "plain", "stochastic"]),
    extra=st.tuples(*[st.integers(0, 4)] * 2),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_match_the_equations(  # noqa: PLR0917 - hypothesis passes names
    name, kernel, stride, sides, p, training, eval_mode, extra, seed
) -> None:
    torch.manual_seed(seed)
    layer = KernelNorm2d(kernel, stride, sides, p, eval_mode=eval_mode).train(training)
    x = torch.randn(2, 5, kernel[0] + extra[0], kernel[1] + extra[1]) + 0.5
    x.requires_grad_()
    with path(name), dropout_stream(seed):
        y = layer(x)
    mask = None
    if p and (training or eval_mode == "stochastic"):
        with dropout_stream(seed):
            key = next_key(x.device)
        mask = keep_mask(key, y.shape, drop_level(p), torch.float64, x.device)
    window = kernel if stride is None else stride
    unit = units(padded(x.detach().double(), sides), kernel, window, (1, 1))
    unit_mask = None if mask is None else units(mask, kernel, kernel, (1, 1))
    assume(conditioned(moments(unit, unit_mask, drop_level(p) / LEVELS, expected=False)))
    reference = x.detach().double().requires_grad_()
    expected = naive_kernel_norm(
        reference,
        kernel,
        stride=window,
        sides=sides,
        mask=mask,
        p=drop_level(p) / LEVELS,
        expected=not training and eval_mode == "expected",
    )
    close(y, expected, 1e-5)
    upstream = torch.randn(y.shape)
    (actual,) = torch.autograd.grad(y, x, upstream)
    (wanted,) = torch.autograd.grad(expected, reference, upstream.double())
    close(actual, wanted, 1e-5)


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("p", [0.0, P])
def test_gradcheck_and_gradgradcheck(kernel, p) -> None:
    torch.manual_seed(0)
    layer = KernelNorm2d(kernel, stride=1, dropout_p=p)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        with dropout_stream(3):
            return layer(x)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_a_convolution_of_the_windows_is_kn_conv() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6)
    norm = KernelNorm2d(3, stride=1, padding=1, dropout_p=0.0)
    fused = KNConv2d(3, 4, 3, padding=1, dropout_p=0.0, bias=False)
    apart = torch.nn.functional.conv2d(norm(x), fused.weight, stride=3)
    torch.testing.assert_close(apart, fused(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "composite"])
@pytest.mark.parametrize("kernel", [1, (2, 3)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_exact_where_the_mean_is_a_thousand_deviations(name, kernel, p) -> None:
    torch.manual_seed(0)
    layer = KernelNorm2d(kernel, dropout_p=p)
    x = torch.randn(2, 32, 6, 6) + 1000.0
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    for training in (True, False):
        leaf = x.clone().requires_grad_()
        with path(name), dropout_stream(1):
            y = layer.train(training)(leaf)
            (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaf)
        mask = None
        if training and p:
            with dropout_stream(1):
                key = next_key(x.device)
            mask = keep_mask(key, y.shape, drop_level(p), torch.float64, x.device)
        exact = x.double().requires_grad_()
        expected = naive_kernel_norm(
            exact, sizes, stride=sizes, sides=(0, 0, 0, 0), mask=mask,
            p=drop_level(p) / LEVELS, expected=not training,
        )  # fmt: skip
        close(y, expected, 1e-3)
        close(gradient, torch.autograd.grad(expected.pow(3).sum(), exact)[0], 1e-3)


@pytest.mark.parametrize("kernel", [1, 2])
def test_derivatives_of_gradients_where_the_upstream_depends_on_x(kernel) -> None:
    torch.manual_seed(0)
    layer, x = KernelNorm2d(kernel, dropout_p=P), torch.randn(2, 4, 4, 4)

    def second(x):
        with dropout_stream(1):
            y = layer(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with path("plain"):
        actual = second(x.clone().requires_grad_())
    with path("composite"):
        expected = second(x.double().requires_grad_())
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


def test_a_1x1_kernel_keeps_nothing_but_its_input() -> None:
    x, kept = torch.randn(2, 64, 8, 8, requires_grad=True), []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        KernelNorm2d(1)(x)
    assert sum(kept) == x.numel() * (1 + 2 / 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics(dtype) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(2, 32, 4, 4).to(dtype) + 3, torch.randn(2, 32, 4, 4).to(dtype))
    results = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        with dropout_stream(1):
            y = KernelNorm2d(1, dropout_p=P)(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, g.to(leaf.dtype))))
    for mine, wanted in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert ((mine - wanted).norm() / wanted.norm()).item() < 4 * torch.finfo(dtype).eps


def test_units_have_mean_zero_and_variance_one() -> None:
    y = KernelNorm2d(2, dropout_p=0.0)(torch.randn(2, 8, 6, 4) * 5 + 3)
    unit = y.unfold(2, 2, 2).unfold(3, 2, 2)
    assert unit.mean((1, 4, 5)).abs().max().item() < 1e-5
    assert (unit.var((1, 4, 5), correction=0) - 1).abs().max().item() < 1e-4


def test_one_dimension() -> None:
    x = torch.randn(2, 3, 9)
    y = KernelNorm1d(2, stride=3, padding=(1, 0), dropout_p=0.0)(x)
    plane = KernelNorm2d((1, 2), (1, 3), (1, 0, 0, 0), dropout_p=0.0)(x.unsqueeze(2))
    assert y.shape == (2, 3, 6)
    torch.testing.assert_close(y, plane.squeeze(2))
