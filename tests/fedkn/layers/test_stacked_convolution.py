from __future__ import annotations

from pathlib import Path

import torch

from fedkn.layers.stacked_convolution import StackedConvolutions
from tests.fedkn.layers.kernel.backends.test_triton import needs_triton, run


@needs_triton
def test_agrees_with_each_clients_own_convolution_in_the_interpreter() -> None:
    run(str(Path(__file__).parent / "convolution_agrees.py"), TRITON_INTERPRET="1")


def test_on_the_cpu_it_is_pytorchs() -> None:
    x, weight = torch.randn(2, 1, 3, 6, 6), torch.randn(2, 4, 3, 3, 3)
    with StackedConvolutions():
        found = torch.func.vmap(torch.conv2d)(x, weight)
    assert torch.equal(found, torch.func.vmap(torch.conv2d)(x, weight))


def test_group_norms_of_maps_in_any_layout_are_those_of_each_client() -> None:
    x = torch.randn(2, 3, 8, 5, 5)
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    layer = torch.nn.GroupNorm(2, 8)

    def norm(maps: torch.Tensor) -> torch.Tensor:
        return layer(maps) + torch.group_norm(maps, 4)

    with StackedConvolutions():
        found = torch.func.vmap(norm)(last)
    for client in (0, 1):
        torch.testing.assert_close(found[client], norm(x[client]))
