"""What a recorded step would repeat as it was: what modules hold in Python."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from fedkn.models.hooks import watched

__all__ = ["Counted", "Held"]


class Counted:
    """What a forward pass and a loss may change in Python, where a recording cannot see it.

    Numbers and words of the modules and of the `task`, and which tensors are the buffers.
    """

    def __init__(self, model: nn.Module, task: object) -> None:
        self._held = [(thing, _held(thing)) for thing in (*model.modules(), task)]
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]

    def put_back(self) -> bool:
        """Put back what has changed since; return whether anything had."""
        changed = False
        for thing, before in self._held:
            now = _held(thing)
            if now != before:
                for key in now.keys() - before.keys():
                    del vars(thing)[key]
                vars(thing).update(before)
                changed = True
        for now, tensors in self._buffers:
            if now.keys() != tensors.keys() or not all(map(is_, now.values(), tensors.values())):
                now.clear()
                now.update(tensors)
                changed = True
        return changed


class Held:
    """What decides in Python what a model's forward pass does: a look that costs microseconds.

    Modes, numbers and words of all modules, what else is put into them, and hooks.

    Attributes:
        watched: whether somebody's hooks see what modules do, which no replay calls; as of the last
            look.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = [vars(module) for module in model.modules()]
        self._hooks = [getattr(m, name) for m in model.modules() for name in _HOOKS]
        self._parameters = list(model.parameters())
        self.watched = False
        self._last: list[object] = []
        self._values: tuple[object, ...] = ()

    def values(self) -> tuple[object, ...]:
        """Return what is equal to an earlier result if nothing of it has changed."""
        now = list(chain.from_iterable(map(dict.values, self._own)))
        now += map(len, self._hooks)
        for parameter in self._parameters:
            now += (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        # Mostly nothing was set since the last look, not even to an equal number.
        if len(now) != len(self._last) or not all(map(is_, now, self._last)):
            self._last = now
            self._values = tuple(v if isinstance(v, _PLAIN) else _Same(v) for v in now)
            self.watched = any(map(watched, self._model.modules()))
        return self._values


_PLAIN = (int, float, str, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Same:
    """A thing as itself, whatever is in it; kept, so that no other gets its id."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _held(thing: object) -> dict[str, Any]:
    own = getattr(thing, "__dict__", {})
    return {k: v for k, v in own.items() if isinstance(v, int | float | str)}
