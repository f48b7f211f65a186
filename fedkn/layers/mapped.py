"""The native kernels under `torch.func.vmap` over clients with their own weights.

The clients' maps lie side by side in the channels, (N, clients * C, H, W), as vmap's own rule for a
convolution lays them, so that one grouped convolution serves all; the native kernels do the rest
for each client with its own filters, gains and masks. Layer by layer the maps stay as they are.
What autograd sees is one operation a layer.

Tensors are taken out of the vmap and results put back by hand: a `torch.autograd.Function` with a
rule for vmap would do the same, and take ten times as long about it as about a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from fedkn.layers import native
from fedkn.layers.composite import Settings

__all__ = ["convolution", "group_norm", "max_pool", "serves"]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the only transform under way is one vmap over `weight`, and the kernels serve.

    Inside other transforms, such as `torch.func.grad`, derivatives by hand would have to be
    transformed too. Where clients share weights, vmap's rule is one ordinary convolution.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    stack = _functorch.get_interpreter_stack()
    return (
        stack is not None
        and len(stack) == 1
        and stack[0].key() == TransformType.Vmap
        and _functorch.is_batchedtensor(weight)
        and not torch.is_autocast_enabled("cpu")
        and native.takes(x, weight, bias)
    )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Do what `composite` does, gradients by hand."""
    clients, key = _clients(weight), settings.key
    keys = None
    if isinstance(key, Tensor):
        inner = _functorch.get_unwrapped(key) if _functorch.is_batchedtensor(key) else key
        keys = inner.tolist() if inner.dim() else [int(inner)] * clients
    elif key is not None:
        keys = [key] * clients
    maps, filters = _beside(x, clients), _flat(weight, clients)
    shift = None if bias is None else _flat(bias, clients)
    with temporarily_pop_interpreter_stack():
        y = native.side_by_side(maps, filters, shift, settings, keys, clients)
    return _apart(y, clients)


def group_norm(  # noqa: PLR0917 - as fedkn.layers.group_norm's
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """Do what `fedkn.layers.group_norm.group_norm` does: all clients' groups beside each other."""
    clients = _clients(weight)
    maps, gain, shift = _beside(x, clients), _flat(weight, clients), _flat(bias, clients)
    with temporarily_pop_interpreter_stack():
        y: Tensor = torch.ops.fedkn_native.group_norm(
            maps, clients * groups, gain, shift, eps, relu, False
        )
    return _apart(y, clients)


def max_pool(x: Tensor) -> Tensor:
    """Do what `fedkn.layers.max_pool.max_pool` does."""
    clients = _clients(x)
    maps = _beside(x, clients)
    with temporarily_pop_interpreter_stack():
        y: Tensor = torch.ops.fedkn_native.max_pool(maps)
    return _apart(y, clients)


def _clients(mapped: Tensor) -> int:
    return _functorch.get_unwrapped(mapped).shape[_functorch.maybe_get_bdim(mapped)]


def _beside(x: Tensor, clients: int) -> Tensor:
    """Return all clients' maps (N, C, H, W) as (N, clients * C, H, W), contiguous."""
    with temporarily_pop_interpreter_stack():
        return _taken_out(x, 1, clients).flatten(1, 2).contiguous()


def _flat(parameter: Tensor, clients: int) -> Tensor:
    """Return all clients' parameter (n, …) as (clients * n, …)."""
    with temporarily_pop_interpreter_stack():
        return _taken_out(parameter, 0, clients).flatten(0, 1)


def _taken_out(tensor: Tensor, to: int, clients: int) -> Tensor:
    """Return `tensor` with the clients as dimension `to`; repeated where it is all clients' own."""
    if _functorch.is_batchedtensor(tensor):
        inner: Tensor = _functorch.get_unwrapped(tensor)
        return inner.movedim(_functorch.maybe_get_bdim(tensor), to)
    sizes = [-1] * (tensor.dim() + 1)
    sizes[to] = clients
    return tensor.unsqueeze(to).expand(sizes)


def _apart(y: Tensor, clients: int) -> Tensor:
    """Return what lies side by side as a client sees its own."""
    with temporarily_pop_interpreter_stack():
        maps = y.view(y.shape[0], clients, y.shape[1] // clients, *y.shape[2:])
    own: Tensor = _functorch._add_batch_dim(maps, 1, _functorch.peek_interpreter_stack().level())
    return own
