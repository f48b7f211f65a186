"""Copies of other people's modules."""

from __future__ import annotations

import copy
from types import UnionType

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedkn.errors import UserError
from fedkn.models.hooks import copy_tensor_hooks

__all__ = ["copied", "lazy_layer"]


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module`, with the hooks of its parameters, which torch leaves out.

    So it leaves what was computed and is kept in an attribute: a weight by the old weight norm, an
    activation that a forward keeps. Of those the copy has the numbers.

    Raises UserError where it cannot be copied.
    """
    computed = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        twin = copy.deepcopy(module, computed)
    except (RuntimeError, TypeError) as error:  # torch's for tensors, pickle's for what hangs on
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
