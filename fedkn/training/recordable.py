"""What a recorded step would repeat as it was: what modules hold in Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Counted", "Held"]


class Counted:
    """What modules hold that a forward pass may change in Python, where a recording cannot see it.

    Numbers and words, and which tensors their buffers are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [(m, _held(m), dict(m._buffers)) for m in model.modules()]

    def put_back(self) -> bool:
        """Put back what has changed since; return whether anything had."""
        changed = False
        for module, before, buffers in self._held:
            now = _held(module)
            if now != before:
                for key in now.keys() - before.keys():
                    del vars(module)[key]
                vars(module).update(before)
                changed = True
            own = module._buffers
            if own.keys() != buffers.keys() or any(own[n] is not b for n, b in buffers.items()):
                own.clear()
                own.update(buffers)
                changed = True
        return changed


class Held:
    """What decides in Python what a model's forward pass does: a look that costs microseconds.

    Modes, numbers and words of all modules, and tensors that are neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [vars(module) for module in model.modules()]

    def values(self) -> tuple[object, ...]:
        """Return what is equal to an earlier result if nothing of it has changed."""
        found: list[object] = []
        for own in self._modules:
            for key, value in own.items():
                if isinstance(value, int | float | str):
                    found.append(value)
                elif isinstance(value, Tensor):
                    found += (key, _Same(value))
        return tuple(found)


class _Same:
    """A tensor as what it is, whatever is in it; kept, so that no other gets its id."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def _held(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
