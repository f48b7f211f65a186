"""Which layer of a network is its head."""

from __future__ import annotations

from torch import nn

__all__ = ["head_parameters"]


def head_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of `model`'s last linear layer; none if it has none.

    The last in the order in which modules are registered, which is that of the forward pass in
    fedkn's networks and in most others.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        return ()
    prefix = f"{linears[-1]}." if linears[-1] else ""
    own = model.get_submodule(linears[-1]).named_parameters(recurse=False)
    return tuple(f"{prefix}{name}" for name, _ in own)
