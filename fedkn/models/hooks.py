"""Hooks of modules and parameters: who has them, and how they go over to a copy or a successor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedkn.normalizers.fused import OWN_HOOKS

__all__ = [
    "copy_tensor_hooks",
    "count_hooks",
    "move_hooks",
    "strip_hooks",
    "tied_down",
    "watched",
    "watched_everywhere",
]


def count_hooks(module: nn.Module) -> int:
    """Return how many forward and backward hooks `module` itself has, fedkn's own left out."""
    return sum(map(len, (_own(module, name) for name in _CALLS)))


def tied_down(module: nn.Module) -> str:
    """Return why `module` cannot be another layer, in words; empty if it can.

    Somebody put something into this very module that would be lost: a parametrization, a forward
    of its own, hooks on its state_dict.
    """
    if parametrize.is_parametrized(module):
        return "its tensors are computed by torch.nn.utils.parametrize: take that away first"
    if "forward" in vars(module):
        return "it was given a forward of its own, which does more than its class"
    if any(getattr(module, name, None) for name in _STATE):
        return "it has hooks on its state_dict, which would not fit another layer"
    return ""


def watched(module: nn.Module) -> str:
    """Return who sees what `module` itself takes, gives or learns, in words; empty: nobody."""
    if count_hooks(module):
        return "it has hooks, which should see the same as before"
    if any(_of_tensor(p) for p in module.parameters(recurse=False)):
        return "its parameters have hooks"
    return ""


def watched_everywhere() -> bool:
    """Return whether hooks see what all modules take, give or learn, as PyTorch lets register."""
    return any(getattr(nn.modules.module, f"_global{name}") for name in _CALLS)


def move_hooks(old: nn.Module, new: nn.Module) -> int:
    """Give `new` the forward and backward hooks of `old`; return how many."""
    for name in (*_CALLS, *_FLAGS):
        getattr(new, name).update(_own(old, name))
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook
    return count_hooks(old)


def strip_hooks(model: nn.Module) -> None:
    """Take all forward and backward hooks from `model` and its parts."""
    for module in model.modules():
        for name in (*_CALLS, *_FLAGS):
            getattr(module, name).clear()


def copy_tensor_hooks(source: nn.Module, other: nn.Module) -> list[str]:
    """Give the parameters of `other` the hooks of those of `source` that have the same names.

    Returns the names of those that have none to give them to.
    """
    theirs, lost = dict(other.named_parameters()), []
    for name, old in source.named_parameters():
        if not _of_tensor(old):
            continue
        new = theirs.get(name)
        if new is None or new.shape != old.shape:
            lost.append(name)
            continue
        for hook in (old._backward_hooks or {}).values():
            if new.requires_grad:
                new.register_hook(hook)  # type: ignore[no-untyped-call]  # torch's
        for hook in (getattr(old, _AFTER, None) or {}).values():
            new.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # too
    return lost


_CALLS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_AFTER = "_post_accumulate_grad_hooks"


def _own(module: nn.Module, name: str) -> dict[int, Callable[..., Any]]:
    hooks: dict[int, Callable[..., Any]] = getattr(module, name)
    return {key: hook for key, hook in hooks.items() if hook not in OWN_HOOKS}


def _of_tensor(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, _AFTER, None))
