"""Whether a model's tensors are still where they were: a look that costs microseconds."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Standing"]


class Standing:
    """The modules, parameters and buffers of a model at one moment, and their places in memory.

    ``model.state_dict()`` would show the same, in ten times as long.
    """

    def __init__(self, model: nn.Module) -> None:
        registers: list[dict[str, Any]] = [
            register
            for module in model.modules()
            for register in (module._modules, module._parameters, module._buffers)
        ]
        # The objects are kept, so that no other can come to have the id of one of them.
        self._registers = [
            (register, list(register), [*map(id, register.values())], [*register.values()])
            for register in registers
        ]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._tensors = [(t, t.data_ptr(), t.requires_grad) for t in tensors.values()]

    def holds(self) -> bool:
        """Return whether nothing was added, replaced, moved, cast, frozen or freed since."""
        for register, names, ids, _ in self._registers:
            if list(register) != names or [*map(id, register.values())] != ids:
                return False
        for tensor, place, trained in self._tensors:
            if tensor.data_ptr() != place or tensor.requires_grad != trained:
                return False
        return True
