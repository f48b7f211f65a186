"""Tensors that stay as they are built: no gradient, no step, no way over the wire.

A parameter is frozen by ``requires_grad``, whoever switched it off. A buffer is frozen by its name
alone. A layer all of whose running statistics are frozen normalizes by them, in training as in
evaluation: it is the same function for every client, in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fedkn.errors import UserError, unknown_name

__all__ = ["freeze", "is_at_rest", "is_fixed", "matching", "nearby", "patterns", "train"]


def patterns(text: str) -> tuple[str, ...]:
    """Return the glob patterns in `text`, which are separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def matching(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Return those of `names` that one of the patterns `wanted` fits; a ``*`` goes over dots."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def nearby(name: str, names: Sequence[str]) -> list[str]:
    """Return the few of `names` that are worth telling whoever asked for `name`."""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return near or [*dict.fromkeys(names)][:_TOLD]


def freeze(model: nn.Module, wanted: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """Freeze the parameters and buffers of `model` that the patterns `wanted` fit; return them.

    `known` are names that a pattern may be of, too: those that the model had before another
    normalizer took layers away.

    Raises:
        UserError: a pattern that fits none, naming the nearest tensor.
    """
    if not wanted:
        return []
    names = [*model.state_dict()]
    for pattern in wanted:
        if not matching([*names, *known], [pattern]):
            raise unknown_name("tensor in model.frozen", pattern, nearby(pattern, [*names, *known]))
    frozen = set(matching(names, wanted))
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and dot + name in frozen:
                parameter.requires_grad_(False)
        own = {name for name, buffer in module._buffers.items() if buffer is not None}
        fixed = {name for name in own if dot + name in frozen}
        if fixed:
            vars(module)[_FIXED] = frozenset(fixed | vars(module).get(_FIXED, frozenset()))
        if own and fixed == own and not is_at_rest(module):
            module.register_forward_pre_hook(_rest)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.frozen leaves no parameter to train: freeze fewer")
    return sorted(frozen)


def is_fixed(module: nn.Module, tensor: str) -> bool:
    """Whether the parameter or buffer `tensor` that `module` owns stays as it was built."""
    parameter = module._parameters.get(tensor)
    if parameter is not None:
        return not parameter.requires_grad
    return tensor in vars(module).get(_FIXED, ())


def is_at_rest(module: nn.Module) -> bool:
    """Whether `module` is always in evaluation, because its running statistics are frozen."""
    return _rest in module._forward_pre_hooks.values()


def train(model: nn.Module) -> None:
    """Put `model` in training mode, but for what is at rest.

    That is what its forward pass would do itself, but whoever watches one, to record it, would see
    modules change.
    """
    model.train()
    for module in model.modules():
        if module._forward_pre_hooks and is_at_rest(module):
            module.training = False


_FIXED = "_fixed_buffers"
_TOLD = 12
"""Names of tensors in an error: a model has hundreds."""


def _rest(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Take `module` back into evaluation, from wherever ``model.train()`` has put it."""
    del inputs
    module.training = False
