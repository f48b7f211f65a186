"""Global state of Python, NumPy and PyTorch that other people's code may change, put back."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from fedkn.layers import tf32

__all__ = ["untouched"]


@contextmanager
def untouched() -> Iterator[None]:
    """Leave the random generators, and how PyTorch computes, as they were before the block.

    That is: the generators of `random`, NumPy and PyTorch (of every GPU in use), whether gradients
    are recorded, the default dtype and device, the number of threads, the switches of precision
    and determinism, NumPy's handling of floating-point errors, and the current folder.
    """
    before = [(put, get()) for get, put in _STATES]
    cuda = torch.cuda.get_rng_state_all() if _uses_gpu() else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for (get, _), (put, value) in zip(_STATES, before, strict=True):
            # What was not changed is not set: setting has effects of its own.
            if not _equal(get(), value):
                put(value)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _record_gradients(on: bool) -> None:
    torch.set_grad_enabled(on)


def _folder() -> str:
    try:
        return str(os.getcwd())  # noqa: PTH109 - a folder that is gone has no Path
    except OSError:
        return ""


def _go_to(folder: str) -> None:
    with suppress(OSError):
        os.chdir(folder)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


_STATES: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (np.geterr, lambda errors: np.seterr(**errors) and None),
    (torch.is_grad_enabled, _record_gradients),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (tf32.switches, tf32.put_back),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    _attribute(torch.backends.mkldnn, "enabled"),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    (_folder, _go_to),
]
"""How each is read, and how it is set."""
