"""How kernels written in Triton are launched: on their tensors' device, and without a second look.

Triton launches on the current device, whatever device the tensors are on, and examines every
argument of every launch for what it might have to compile. Here a launch like an earlier one goes
straight to what was compiled then.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Do what ``kernel[grid](*arguments, **constants)`` does, on the tensors' device.

    `arguments` are the kernel's first, in its order, `constants` all others, by name.
    """
    device = _gpu_of(arguments)
    if device is None:
        kernel[grid](*arguments, **constants)
    elif device == torch.cuda.current_device():
        _launch(kernel, grid, device, arguments, constants)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, device, arguments, constants)


class _Kernel(NamedTuple):
    itself: Any
    """Held, so that its id stays its own."""
    unexamined: tuple[int, ...]
    """Places of the arguments of which Triton looks at the type alone."""
    names: tuple[str, ...]
    """Of all arguments."""


_MOST = 4096  # launches that are known
_INT32 = range(-(2**31), 2**31)

_kernels: dict[int, _Kernel] = {}
# What was compiled for a launch, and its constants in the kernel's order.
_known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    met = _kernels.get(id(kernel)) or _met(kernel)
    # Triton compiles for types, for whether a number is 1 or divisible by 16, and for whether
    # memory begins where 16 bytes may be read at once. Launches alike here are alike in these.
    alike: list[Any] = []
    for argument in arguments:
        if type(argument) is int:
            alike.append(argument)
        elif isinstance(argument, Tensor):
            alike.append((argument.dtype, argument.data_ptr() % 16 == 0))
        else:
            alike.append((type(argument), argument))
    for place in met.unexamined:
        if type(arguments[place]) is int:
            alike[place] = arguments[place] in _INT32
    like = (id(kernel), device, *alike, *constants.items())
    known = _known.get(like)
    if known is not None:
        compiled, last = known
        compiled[(*grid, 1, 1)](*arguments, *last)
        return
    compiled = kernel[grid](*arguments, **constants)
    if _takes_all(compiled):
        if len(_known) >= _MOST:
            _known.clear()
        names = met.names[len(arguments) :]
        _known[like] = compiled, tuple(constants[name] for name in names)


def _met(kernel: Any) -> _Kernel:
    unexamined = tuple(p.num for p in kernel.params if p.do_not_specialize)
    return _kernels.setdefault(id(kernel), _Kernel(kernel, unexamined, tuple(kernel.arg_names)))


def _gpu_of(arguments: tuple[Any, ...]) -> int | None:
    """Return the index of the GPU that the first tensor is on, None if it is on none."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device.index if argument.is_cuda else None
    return None


def _takes_all(compiled: Any) -> bool:
    """Whether what Triton compiled can be launched with all arguments by itself."""
    kind = _compiled_kind()
    return kind is not None and isinstance(compiled, kind)


@functools.cache
def _compiled_kind() -> type[Any] | None:
    """Return the class, None where launches must go by Triton.

    Before 3.5 nothing holds them to its own (before 3.3 it leaves constants out), and for AMD it
    compiles for how large tensors are as well.
    """
    import triton  # noqa: PLC0415 - Triton is optional

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)
    kind: type[Any] = triton.compiler.CompiledKernel
    return None if old or torch.version.hip is not None else kind
