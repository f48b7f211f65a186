"""The fused kernels under `torch.func.vmap` over clients with their own weights.

To autograd it is one operation whose gradients are its own. On the CPU it is one of
`fedkn.layers.kernel.backends.cpp`: the clients' maps lie side by side in the channels
(`fedkn.layers.side_by_side`). On a GPU it is that of `fedkn.layers.kernel.backends.triton`: a
client is a range of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch

from fedkn.layers import side_by_side, stacked_convolution, triton_switch
from fedkn.layers.circumstances import No, Served, one_vmap_over
from fedkn.layers.kernel.autograd import by_hand
from fedkn.layers.kernel.backends import cpp, triton
from fedkn.layers.kernel.settings import Settings

__all__ = ["forward", "serves"]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Whether there are clients with filters of their own, and kernels for them."""
    if not one_vmap_over(weight):
        return side_by_side.NO_VMAP
    if not triton_switch.reaches(x.device):
        return side_by_side.serves(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        return _AUTOCAST
    return triton.takes(x, weight, side_by_side.clients_of(weight))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Return `definition.convolution` for each client, gradients by hand."""
    clients, key = side_by_side.clients_of(weight), settings.key
    if triton_switch.reaches(x.device):
        return _by_triton(x, weight, bias, settings, clients)
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


def _by_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, clients: int
) -> Tensor:
    key = settings.key
    with side_by_side.outside():
        maps = stacked_convolution.laid_out(
            side_by_side.taken_out(x, 0, clients), settings.geometry
        )
        filters = side_by_side.taken_out(weight, 0, clients).contiguous()
        shift = None if bias is None else side_by_side.taken_out(bias, 0, clients).contiguous()
        if isinstance(key, Tensor):
            settings = settings._replace(key=side_by_side.taken_out(key, 0, clients))
        y = _on_clients(maps, filters, shift, settings)
    return side_by_side.put_back(y, 0)


_on_clients = by_hand(triton)
_AUTOCAST = No("autocast is on, and takes the fused kernels' operations for its own")
