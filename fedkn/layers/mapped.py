"""The native kernels under `torch.func.vmap` over clients with their own weights.

The clients' maps lie side by side in the channels, (N, clients * C, H, W), as vmap's own rule for a
convolution lays them, so that one grouped convolution serves all; the native kernels do the rest
for each client with its own filters and masks. Layer by layer the maps stay as they are. What
autograd sees is that one operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType

from fedkn.layers import native
from fedkn.layers.composite import Settings

__all__ = ["convolution", "serves"]


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
    y: Tensor = _SideBySide.apply(x, weight, bias, settings.key, _Leaf(settings))  # type: ignore[no-untyped-call] # torch's
    return y


class _Leaf:
    """Hides the settings from vmap, which would take tuples to pieces, and at length."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings


class _SideBySide(torch.autograd.Function):
    """Only the rule for vmap is ever used: `serves` sees to that."""

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise AssertionError("applied outside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise AssertionError("applied outside vmap")

    @staticmethod
    def vmap(  # noqa: PLR0917 - torch's order
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        leaf: _Leaf,
    ) -> tuple[Tensor, int]:
        clients = info.batch_size
        x = _mapped(x, in_dims[0], 1, clients).flatten(1, 2)
        weight = _mapped(weight, in_dims[1], 0, clients).flatten(0, 1)
        if bias is not None:
            bias = _mapped(bias, in_dims[2], 0, clients).flatten()
        keys = None
        if key is not None:
            keys = [int(key)] * clients if in_dims[3] is None else key.tolist()
        y = native.side_by_side(x.contiguous(), weight, bias, leaf.settings, keys, clients)
        return y.view(y.shape[0], clients, y.shape[1] // clients, *y.shape[2:]), 1


def _mapped(tensor: Tensor, dim: int | None, to: int, clients: int) -> Tensor:
    if dim is None:
        sizes = [-1] * (tensor.dim() + 1)
        sizes[to] = clients
        return tensor.unsqueeze(to).expand(sizes)
    return tensor.movedim(dim, to)
