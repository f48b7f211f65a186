"""The fused CPU kernels under `torch.func.vmap` over clients with their own weights.

The clients' maps lie side by side in the channels (`fedkn.layers.side_by_side`): to autograd it is
one operation of `fedkn.layers.kernel.backends.cpp`, whose gradients are its own.
"""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch

from fedkn.layers import side_by_side
from fedkn.layers.kernel.backends import cpp
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.side_by_side import serves

__all__ = ["forward", "serves"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Return `definition.convolution` for each client, gradients by hand."""
    clients, key = side_by_side.clients_of(weight), settings.key
    keys = None
    if isinstance(key, Tensor):
        inner = _functorch.get_unwrapped(key) if _functorch.is_batchedtensor(key) else key
        keys = inner.tolist() if inner.dim() else [int(inner)] * clients
    elif key is not None:
        keys = [key] * clients
    maps, filters = side_by_side.beside(x, clients), side_by_side.flat(weight, clients)
    shift = None if bias is None else side_by_side.flat(bias, clients)
    with side_by_side.outside():
        y = cpp.of_clients(maps, filters, shift, settings, keys, clients)
    return side_by_side.apart(y, clients)
