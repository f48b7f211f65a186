from __future__ import annotations

import pytest
import torch

from fedkn.layers.map_layout import Maps, cdiv, dense, in_one_piece, laid_out_as, maps_of


def beside(x: torch.Tensor) -> torch.Tensor:
    """Clients' maps as a grouped convolution gives them: their channels beside each other."""
    return x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 5, 4, 6),
        torch.randn(3, 5, 4, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 9, 4, 6)[:, 2:7],
        torch.randn(3, 5, 1, 6),
        torch.randn(3, 5, 4, 1),
        torch.randn(2, 3, 5, 4, 6),
        beside(torch.randn(2, 3, 5, 4, 6)),
        torch.randn(3, 5, 4, 6).expand(2, 3, 5, 4, 6),
    ],
)
def test_every_element_is_where_the_strides_say(x) -> None:
    maps = maps_of(x)
    flat = x.as_strided(
        (maps.clients, maps.samples, maps.channels, maps.pixels), maps.strides, x.storage_offset()
    )
    assert torch.equal(flat.reshape(x.shape), x)
    assert maps.all == maps.clients * maps.samples
    assert dense(x) is x
    own = in_one_piece(x)
    assert torch.equal(own, x)
    assert torch.empty_like(own).stride() == own.stride()
    assert (own is x) == (x.untyped_storage().nbytes() == x.nbytes)


def test_pixels_that_are_not_evenly_spaced_are_copied() -> None:
    x = torch.randn(2, 3, 5, 8)[..., :6]
    assert Maps.of(x) is None
    assert torch.equal(dense(x), x)
    assert Maps.of(dense(x)) is not None


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 500])
@pytest.mark.parametrize("side", [1, 7, 8, 56])
@pytest.mark.parametrize("last", [True, False])
def test_tiles_are_powers_of_two_of_at_most_2048_values(channels, side, last) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    maps = maps_of(torch.empty(2, channels, side, side).contiguous(memory_format=layout))
    block_c, block_q = maps.tile()
    group = maps.group_blocks(channels)
    for size in (block_c, block_q, *group.values()):
        assert size & (size - 1) == 0
    assert block_c * block_q * 4 <= 2048
    assert group["BLOCK_C"] * group["BLOCK_P"] <= 2048
    # A tile is full where there is enough to fill it.
    assert block_c * block_q * 4 == 2048 or block_q * 4 >= side * side or block_c >= channels


def test_four_pixels_are_one_access_where_they_are_in_one_piece_that_is_aligned() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert maps_of(x).quads(x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert not maps_of(last).quads(last)
    odd = torch.randn(2, 3, 5, 5)
    assert not maps_of(odd).quads(odd)
    shifted = torch.randn(1 + x.numel())[1:].view(x.shape)
    assert not maps_of(shifted).quads(shifted)


def test_a_gradient_is_laid_out_as_its_map() -> None:
    g, like = torch.randn(2, 3, 5, 4, 6), beside(torch.randn(2, 3, 5, 4, 6))
    own = laid_out_as(g, like)
    assert own.stride() == like.stride()
    assert torch.equal(own, g)
    assert laid_out_as(own, like) is own


def test_division_rounds_up() -> None:
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
