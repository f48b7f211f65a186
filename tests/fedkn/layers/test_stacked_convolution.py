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
