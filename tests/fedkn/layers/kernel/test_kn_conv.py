from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkn.errors import UserError
from fedkn.layers import KNConv1d, KNConv2d, dropout_stream
from fedkn.layers.kernel.dropout import LEVELS, drop_level, keep_mask, next_key
from tests.fedkn.layers.kernel.naive import moments, naive_kn_conv, padded, units
from tests.fedkn.layers.paths import PATHS, path

P = 0.1
EXACT_P = drop_level(P) / LEVELS


@dataclass
class Case:
    x: torch.Tensor
    layer: KNConv2d
    seed: int


@st.composite
def cases(draw, modes=("zeros", "reflect", "replicate")):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    height, width = (dilation[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 4)) for i in range(2))
    mode = draw(st.sampled_from(modes))
    most = min(2, height - 1, width - 1) if mode == "reflect" else 2
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    layer = KNConv2d(
        groups * draw(st.integers(3, 8)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=draw(st.tuples(*[st.integers(1, 3)] * 2)),
        padding=draw(st.tuples(*[st.integers(0, most)] * 4)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, P])),
        padding_mode=mode,
        eval_mode=draw(st.sampled_from(["expected", "plain", "stochastic"])),
        activation=draw(st.sampled_from([None, "relu"])),
        keeps_output=draw(st.booleans()),
    )
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    layer.train(draw(st.booleans()))
    x = torch.randn(draw(st.integers(1, 3)), layer.in_channels, height, width) + 0.5
    return Case(x, layer, seed)


def conditioned(unit_moments) -> bool:
    """No unit is nearly (but not exactly) constant: there float32 loses digits in any formula."""
    mean, variance = unit_moments
    return bool(((variance > 0.1) | (variance + mean.abs() == 0)).all())


def naive(case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    layer = case.layer
    random = layer.dropout_p > 0 and (layer.training or layer.eval_mode == "stochastic")
    mask = None
    if random:
        with dropout_stream(case.seed):
            key = next_key(x.device)
        left, right, top, bottom = layer.padding
        symmetric = layer.padding_mode == "zeros" and left == right and top == bottom
        grown = x if symmetric else padded(x, layer.padding, layer.padding_mode)
        mask = keep_mask(key, grown.shape, drop_level(P), torch.float64, x.device)
        if symmetric:  # a dropped zero is a zero: the mask of the padding does not matter
            mask = padded(mask, layer.padding)
    unit_moments = moments(
        units(padded(x, layer.padding, layer.padding_mode), layer.kernel_size, layer.stride,
              layer.dilation),
        None if mask is None else units(mask, layer.kernel_size, layer.stride, layer.dilation),
        EXACT_P, expected=False,
    )  # fmt: skip
    assume(conditioned(unit_moments))
    y = naive_kn_conv(
        x,
        weight,
        bias,
        stride=layer.stride,
        sides=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        mask=mask,
        p=EXACT_P if layer.dropout_p else 0.0,
        expected=not layer.training and layer.eval_mode == "expected",
    )
    return y.relu() if layer.activation else y


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp_min(1.0)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_outputs_and_gradients_match_the_equations(name: str, case: Case) -> None:
    layer, x = case.layer, case.x.requires_grad_()
    parameters = list(layer.parameters())
    with path(name), dropout_stream(case.seed):
        y = layer(x)
        upstream = torch.randn(y.shape)
        gradients = torch.autograd.grad(y, [x, *parameters], upstream)
        with torch.no_grad(), dropout_stream(case.seed):
            assert torch.equal(layer(x), y)

    doubles = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    expected = naive(case, doubles[0], doubles[1], doubles[2] if len(doubles) > 2 else None)
    close(y, expected, 1e-5)
    for actual, reference in zip(
        gradients, torch.autograd.grad(expected, doubles, upstream.double()), strict=True
    ):
        close(actual, reference, 1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (P, True), (P, False)])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("keeps_output", [False, True])
def test_gradcheck_and_gradgradcheck(groups, p, training, activation, keeps_output) -> None:
    torch.manual_seed(0)
    layer = KNConv2d(
        4, 2, 3, padding=(1, 0, 1, 1), stride=(2, 1), groups=groups, dropout_p=p,
        activation=activation, keeps_output=keeps_output, dtype=torch.float64,
    ).train(training)  # fmt: skip
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        with dropout_stream(3):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_derivatives_of_gradients_where_the_upstream_depends_on_x(name, groups, activation) -> None:
    torch.manual_seed(0)
    layer = KNConv2d(4, 6, 3, padding=1, groups=groups, activation=activation)

    def second(layer, x):
        with dropout_stream(1):
            y = layer(x)
        first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), [x, layer.weight])

    x = torch.randn(2, 4, 6, 6)
    with path(name):
        actual = second(layer, x.clone().requires_grad_())
    with path("composite"):
        expected = second(layer.double(), x.double().requires_grad_())
    for mine, wanted in zip(actual, expected, strict=True):
        assert ((mine - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("p", [0.0, 0.001, 0.05])
@pytest.mark.parametrize("padding", [0, 1])
def test_exact_where_the_mean_is_a_thousand_deviations(name, p, padding) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 8, 8) + 1000.0
    for training in (True, False):
        layer = KNConv2d(32, 8, 3, padding=padding, dropout_p=p).train(training)
        leaf = x.clone().requires_grad_()
        with path(name), dropout_stream(1):
            y = layer(leaf)
            gradient = torch.autograd.grad(y.square().sum(), leaf)[0]
        level = drop_level(p)
        mask = None
        if training and p:
            with dropout_stream(1):
                key = next_key(x.device)
            mask = padded(keep_mask(key, x.shape, level, torch.float64, x.device), layer.padding)
        exact = x.double().requires_grad_()
        expected = naive_kn_conv(
            exact, layer.weight.double(), layer.bias.double(), stride=(1, 1),
            sides=layer.padding, dilation=(1, 1), groups=1, mask=mask, p=level / LEVELS,
            expected=not training,
        )  # fmt: skip
        # float32 two-pass formulas lose 1e-3 here: x itself is only known to 6e-5 deviations.
        close(y, expected, 1e-3)
        close(gradient, torch.autograd.grad(expected.square().sum(), exact)[0], 1e-3)


def test_one_dimension_is_two_dimensions_of_height_one() -> None:
    torch.manual_seed(0)
    line = KNConv1d(3, 4, 3, stride=2, padding=(2, 1), dilation=2)
    plane = KNConv2d(3, 4, (1, 3), stride=(1, 2), padding=(2, 1, 0, 0), dilation=(1, 2))
    plane.load_state_dict({k: v.unsqueeze(2) if v.dim() == 3 else v
                           for k, v in line.state_dict().items()})  # fmt: skip
    x = torch.randn(2, 3, 11)
    with dropout_stream(0):
        y = line(x)
    with dropout_stream(0):
        torch.testing.assert_close(y, plane(x.unsqueeze(2)).squeeze(2))


def test_padding_pair_is_height_then_width_as_in_pytorch() -> None:
    conv = torch.nn.Conv2d(3, 4, 3, padding=(1, 0))
    assert KNConv2d(3, 4, 3, padding=(1, 0))(torch.randn(1, 3, 5, 5)).shape == (
        conv(torch.randn(1, 3, 5, 5)).shape
    )


def test_initialization_is_kaiming_fan_out_with_zero_bias() -> None:
    torch.manual_seed(0)
    layer = KNConv2d(64, 128, 3)
    assert layer.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize(
    "settings_",
    [
        {"groups": 3}, {"dropout_p": 1.0}, {"dropout_p": -0.1}, {"padding": -1},
        {"padding": (1, 2, 3)}, {"padding_mode": "mirror"}, {"eval_mode": "mean"},
        {"activation": "gelu"}, {"kernel_size": 0}, {"stride": 0}, {"dropout_p": float("nan")},
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings_) -> None:
    with pytest.raises(UserError):
        KNConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | settings_)


def test_an_unbatched_input_is_refused() -> None:
    with pytest.raises(UserError, match="batch dimension"):
        KNConv2d(3, 4, 3)(torch.randn(3, 8, 8))
