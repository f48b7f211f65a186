"""What a recorded step would repeat as it was: what modules hold in Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Counted", "Held"]


class Counted:
    """The numbers and words that modules hold, which a forward pass may change."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, _held(module)) for module in model.modules()]

    def put_back(self) -> bool:
        """Put back what has changed since; return whether anything had."""
        changed = False
        for module, before in self._held:
            now = _held(module)
            if now != before:
                for key in now.keys() - before.keys():
                    del vars(module)[key]
                vars(module).update(before)
                changed = True
        return changed


class Held:
    """What decides in Python what a model's forward pass does: a look that costs microseconds.

    Modes, numbers and words of all modules, and tensors that are neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [vars(module) for module in model.modules()]
        self._tensors: dict[int, Tensor] = {}

    def values(self) -> tuple[object, ...]:
        """Return what is equal to an earlier result if nothing of it has changed."""
        found: list[object] = []
        for own in self._modules:
            for key, value in own.items():
                if isinstance(value, int | float | str):
                    found.append(value)
                elif isinstance(value, Tensor):
                    # Kept, so that no other gets its id.
                    self._tensors[id(value)] = value
                    found.append((key, id(value)))
        return tuple(found)


def _held(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
