"""Tensors of the clients of one `torch.func.vmap`, laid side by side in the channels.

The clients' maps become (N, clients * C, H, W), as vmap's own rule for a convolution lays them, so
that one grouped convolution serves all; the native kernels do the rest for each client with its own
filters, gains and masks. Layer by layer the maps stay as they are. What autograd sees is one
operation a layer.

Tensors are taken out of the vmap and results put back by hand: a `torch.autograd.Function` with a
rule for vmap would do the same, and take ten times as long about it as about a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as outside

from fedkn.layers.circumstances import No, Served, one_vmap_over
from fedkn.layers.native import library

__all__ = [
    "NO_VMAP",
    "apart",
    "beside",
    "clients_of",
    "flat",
    "outside",
    "put_back",
    "serves",
    "taken_out",
]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Whether the native kernels serve clients with tensors of their own, side by side."""
    if not one_vmap_over(weight):
        return NO_VMAP
    if torch.is_autocast_enabled("cpu"):
        return _AUTOCAST
    return library.takes(x, weight, bias)


def clients_of(mapped: Tensor) -> int:
    """Return over how many clients `mapped`, which must have a tensor for each, is mapped."""
    return _functorch.get_unwrapped(mapped).shape[_functorch.maybe_get_bdim(mapped)]


def beside(x: Tensor, clients: int) -> Tensor:
    """Return all clients' maps (N, C, H, W) as (N, clients * C, H, W), contiguous."""
    with outside():
        return taken_out(x, 1, clients).flatten(1, 2).contiguous()


def flat(parameter: Tensor, clients: int) -> Tensor:
    """Return all clients' parameter (n, …) as (clients * n, …)."""
    with outside():
        return taken_out(parameter, 0, clients).flatten(0, 1)


def apart(y: Tensor, clients: int) -> Tensor:
    """Return what lies side by side as a client sees its own."""
    with outside():
        maps = y.view(y.shape[0], clients, y.shape[1] // clients, *y.shape[2:])
    return put_back(maps, 1)


def put_back(result: Tensor, clients_at: int) -> Tensor:
    """Return a `result` of all clients, who are a dimension of it, as each sees its own."""
    level = _functorch.peek_interpreter_stack().level()
    own: Tensor = _functorch._add_batch_dim(result, clients_at, level)
    return own


def taken_out(tensor: Tensor, to: int, clients: int) -> Tensor:
    """Return `tensor` with the clients as dimension `to`; repeated where it is all clients' own."""
    if _functorch.is_batchedtensor(tensor):
        inner: Tensor = _functorch.get_unwrapped(tensor)
        return inner.movedim(_functorch.maybe_get_bdim(tensor), to)
    sizes = [-1] * (tensor.dim() + 1)
    sizes[to] = clients
    return tensor.unsqueeze(to).expand(sizes)


NO_VMAP = No("there is no vmap over clients with weights of their own, or more than that one")
_AUTOCAST = No("autocast is on, and takes the fused kernels' operations for its own")
