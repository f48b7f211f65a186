"""Who looks on while a layer runs, and how kernels say which tensors they serve."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

__all__ = ["No", "Served", "eager", "one_vmap_over"]


class No(str):
    """The answer no, with its reason: false, and as a string why."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


Served = Literal[True] | No
"""Whether tensors are served, and if not why not."""


def eager() -> bool:
    """Whether tensors are what they seem: no transform, compiler, exporter or tracer looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def one_vmap_over(weight: Tensor) -> bool:
    """Whether the only transform under way is one `torch.func.vmap`, over `weight` among others.

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
    )
