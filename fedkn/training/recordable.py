"""What a recorded step would repeat as it was: what modules hold in Python."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Hashable
from copy import copy
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from fedkn.models.hooks import watched

__all__ = ["Counted", "Held"]


class Counted:
    """What a forward pass and a loss may change in Python, where a recording cannot see it.

    Numbers and words of the modules and of the `task`, their lists, sets and dictionaries, those of
    somebody's own classes and files, and which tensors are the buffers.
    """

    def __init__(self, model: nn.Module, task: object) -> None:
        things = (*model.modules(), task)
        # Somebody's own class, or the file that it is in, may count too.
        classes = dict.fromkeys(chain.from_iterable(map(_own_classes, things)))
        files = dict.fromkeys(sys.modules[cls.__module__] for cls in classes)
        self._held = [(thing, _held(thing)) for thing in (*things, *classes, *files)]
        self._containers = [
            (value, copy(value), _contents(value))
            for thing, _ in self._held
            for value in _containers(thing)
        ]
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]

    def put_back(self) -> bool:
        """Put back what has changed since; return whether anything had."""
        changed = False
        for thing, before in self._held:
            now = _held(thing)
            if now != before:
                for key in now.keys() - before.keys():
                    delattr(thing, key)
                for key, value in before.items():
                    setattr(thing, key, value)
                changed = True
        for container, before, contents in self._containers:
            if _contents(container) != contents:
                _refill(container, before)
                changed = True
        for now, tensors in self._buffers:
            if now.keys() != tensors.keys() or not all(map(is_, now.values(), tensors.values())):
                now.clear()
                now.update(tensors)
                changed = True
        return changed


class Held:
    """What decides in Python what a model's forward pass does: a look that costs microseconds.

    Modes, numbers and words of all modules, what else is put into them and what is in their lists,
    sets and dictionaries, and hooks.

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
        self._containers: list[Any] = []
        self._contents: list[object] = []
        self._values = _Values(())

    def values(self) -> Hashable:
        """Return what is equal to an earlier result if nothing of it has changed."""
        now: list[object] = list(chain.from_iterable(map(dict.values, self._own)))
        now += map(len, self._hooks)
        for parameter in self._parameters:
            now += (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        # Mostly nothing was set since the last look, not even to an equal number.
        same = len(now) == len(self._last) and all(map(is_, now, self._last))
        if not same:
            self._containers = [value for own in self._own for value in _containers(own)]
        contents = list(map(_contents, self._containers))
        if not same or contents != self._contents:
            self._last, self._contents = now, contents
            values = (*(v if isinstance(v, _PLAIN) else _Same(v) for v in now), *contents)
            self._values = _Values(values)
            self.watched = any(map(watched, self._model.modules()))
        return self._values


class _Values:
    """Hundreds of things whose hash is asked for again and again, and worked out once."""

    def __init__(self, things: tuple[object, ...]) -> None:
        self._things = things
        self._hash = hash(things)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Values) and self._things == other._things)

    def __hash__(self) -> int:
        return self._hash


_PLAIN = (int, float, str, torch.Size)
_CONTAINERS = (list, set, dict, deque)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Same:
    """A thing as itself, whatever is in it; kept, so that no other gets its id."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


_OWN_OF_TORCH = frozenset(vars(nn.Module()))
"""Where a module has its parameters, buffers and hooks, which are looked at by themselves."""


def _own_classes(thing: object) -> list[type]:
    """Return the classes of `thing` that are neither Python's nor PyTorch's nor fedkn's."""
    return [
        cls
        for cls in type(thing).__mro__
        if cls.__module__.partition(".")[0] not in ("builtins", "abc", "typing", "torch", "fedkn")
    ]


def _containers(thing: object) -> list[Any]:
    """Return the lists, sets and dictionaries that a module or task, or its attributes, hold.

    Those in containers too, so that each can be put back as it was.
    """
    own = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    found = [
        value
        for key, value in own.items()
        if isinstance(value, _CONTAINERS) and key not in _OWN_OF_TORCH
    ]
    for container in found:  # grows as it goes
        parts = container.values() if isinstance(container, dict) else container
        found += [
            part
            for part in parts
            if isinstance(part, _CONTAINERS) and not any(part is known for known in found)
        ]
    return found


def _contents(value: object) -> object:
    """Return what is equal while a container holds the same: numbers and words, things as such."""
    if isinstance(value, dict):
        return tuple((_contents(k), _contents(v)) for k, v in value.items())
    if isinstance(value, list | tuple | deque | set):
        return tuple(map(_contents, value))
    return value if isinstance(value, _PLAIN) else _Same(value)


def _refill(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(before)


def _held(thing: object) -> dict[str, Any]:
    own = getattr(thing, "__dict__", {})
    return {k: v for k, v in own.items() if isinstance(v, int | float | str)}
