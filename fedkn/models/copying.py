"""Copies of other people's modules."""

from __future__ import annotations

import copy
from types import UnionType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from fedkn.errors import UserError
from fedkn.models.hooks import copy_tensor_hooks

__all__ = ["copied", "lazy_layer"]


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module`, with the hooks of its parameters, which torch leaves out.

    So it leaves what was computed and is kept in an attribute: a weight by the old weight norm, an
    activation that a forward keeps. Of those the copy has the numbers. What has no shape yet has
    none in the copy.

    Raises UserError where it cannot be copied.
    """
    known: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not is_lazy(value) and not value.is_leaf
    }
    # Of what is lazy torch copies parameters, and refuses buffers.
    lazy = {buffer for buffer in module.buffers() if isinstance(buffer, UninitializedBuffer)}
    for buffer in lazy:
        kind: Any = type(buffer)  # its stub has the arguments of another class
        like = buffer.data
        known[id(buffer)] = kind(buffer.requires_grad, device=like.device, dtype=like.dtype)
    try:
        twin = copy.deepcopy(module, known)
    except Exception as error:  # torch's, pickle's, and that of anybody's own __deepcopy__
        raise UserError(
            f"{type(module).__name__} cannot be copied ({_first_line(error)}): take away what "
            "belongs to one pass or to this process alone"
        ) from error
    copy_tensor_hooks(module, twin)
    return twin


def lazy_layer(module: nn.Module, kinds: type | UnionType = nn.Module) -> str | None:
    """Return the path of a layer of `kinds` whose tensors have no shape yet, None if all have."""
    for name, layer in module.named_modules():
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        lazy = any(tensor is not None and is_lazy(tensor) for tensor in tensors)
        if lazy and isinstance(layer, kinds):
            return str(name)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
