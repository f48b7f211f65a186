"""What the plain path does by other means than the definition: box filters, masks kept in bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers import KNConv2d, dropout_stream
from fedkn.layers.dropout import keep_mask, keep_mask_and_bits, mask_of_bits
from fedkn.layers.statistics import Geometry, box, box_quickly, unbox, unbox_quickly
from tests.fedkn.layers.paths import path

CPU = torch.device("cpu")


@st.composite
def windows(draw):
    pairs = [draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(2)]
    padding = draw(st.tuples(*[st.integers(0, 2)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    geometry = Geometry(pairs[0], pairs[1], padding, dilation, 1)
    rows, columns = (dilation[i] * (pairs[0][i] - 1) + 1 + draw(st.integers(0, 6)) for i in (0, 1))
    return geometry, (draw(st.integers(0, 3)), draw(st.integers(1, 2)), rows, columns)


@settings(max_examples=60, deadline=None)
@given(case=windows())
def test_products_with_banded_matrices_are_box_filters(case) -> None:
    geometry, shape = case
    maps = torch.randn(shape, dtype=torch.float64)
    boxed = box(maps, geometry)
    torch.testing.assert_close(box_quickly(maps, geometry), boxed)
    torch.testing.assert_close(box_quickly(maps, geometry, 0.25), 0.25 * boxed)
    back, size = torch.randn_like(boxed), (shape[2], shape[3])
    spread = unbox(back, size, geometry)
    torch.testing.assert_close(unbox_quickly(back, size, geometry), spread)
    torch.testing.assert_close((boxed * back).sum(), (maps * spread).sum())


def test_what_inference_left_in_the_cache_serves_training() -> None:
    geometry, maps = Geometry((3, 1), (1, 2), (1, 0), (1, 1), 1), torch.randn(1, 1, 9, 13)
    with torch.inference_mode():
        box_quickly(maps, geometry, 0.5)
    assert not torch.is_inference(box_quickly(maps, geometry, 0.5))
    layer, x = KNConv2d(2, 3, (3, 1), stride=(1, 2), padding=(1, 0)), torch.randn(1, 2, 9, 13)
    with path("plain"):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_large_maps_are_filtered_without_products() -> None:
    geometry = Geometry((3, 2), (1, 1), (1, 0), (1, 1), 1)
    maps = torch.randn(40, 2, 33, 35, dtype=torch.float64)
    boxed = box(maps, geometry)
    assert torch.equal(box_quickly(maps, geometry), boxed)
    spread = unbox(boxed, (33, 35), geometry)
    torch.testing.assert_close(unbox_quickly(boxed, (33, 35), geometry), spread)


def test_box_filters_keep_their_digits_where_products_may_not() -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    maps, before = torch.randn(2, 2, 32, 32), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(box_quickly(maps, geometry), box(maps, geometry))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 8, 8), (0, 2, 3, 3), (5, 33, 67, 31)]
)
def test_a_mask_comes_back_from_its_bits(shape) -> None:
    size = torch.Size(shape)
    mask, bits = keep_mask_and_bits(-7, size, 20000, torch.float32)
    assert torch.equal(mask, keep_mask(-7, size, 20000, torch.float32, CPU))
    assert torch.equal(mask_of_bits(bits, size, torch.float32), mask)
    assert bits.nbytes <= mask.numel() / 8 + 2 * shape[0] + 1


def test_an_empty_batch_passes() -> None:
    layer, x = KNConv2d(3, 4, 3, padding=1), torch.zeros(0, 3, 5, 5, requires_grad=True)
    with path("plain"):
        layer(x).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad) -> None:
    layer, x = KNConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 9, 9)
    x[0, 1, 4, 4] = bad
    with path("plain"), dropout_stream(1):
        y = layer(x)
    assert not y[0, :, 4, 4].isfinite().any()
    assert y[1].isfinite().all()
