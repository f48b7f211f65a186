"""Box filters by other means than the definition's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers import tf32
from fedkn.layers.kernel.settings import Geometry
from fedkn.layers.kernel.statistics import box, box_quickly, unbox, unbox_quickly


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


def test_large_maps_are_filtered_without_products() -> None:
    geometry = Geometry((3, 2), (1, 1), (1, 0), (1, 1), 1)
    maps = torch.randn(40, 2, 33, 35, dtype=torch.float64)
    boxed = box(maps, geometry)
    assert torch.equal(box_quickly(maps, geometry), boxed)
    spread = unbox(boxed, (33, 35), geometry)
    torch.testing.assert_close(unbox_quickly(boxed, (33, 35), geometry), spread)


def test_box_filters_keep_their_digits_where_products_may_not() -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    maps, before = torch.randn(2, 2, 32, 32), tf32.switches()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(box_quickly(maps, geometry), box(maps, geometry))
    finally:
        tf32.put_back(before)
