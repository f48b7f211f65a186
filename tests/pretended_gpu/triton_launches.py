"""Launches of Triton's kernels, interpreted: their pointers must be the device's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tests.pretended_gpu.tensors import tensors_in

if TYPE_CHECKING:
    from tests.pretended_gpu.device import Gpu

__all__ = ["launches"]


def launches(gpu: Gpu) -> Iterator[tuple[object, str, object]]:
    """Yield what is put in place of Triton's: owner, name, value. Only where it interprets."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def watched(kernel: Any, *args: Any, **kwargs: Any) -> None:
        given = tensors_in((args, kwargs))
        if not all(map(gpu.has, given)):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

        def launch(*again: Any, **more: Any) -> None:
            before, gpu.replaying = gpu.replaying, True
            try:
                with torch._C.DisableTorchFunction():
                    run(kernel, *again, **more)
            finally:
                gpu.replaying = before

        if not gpu.replaying:
            # Which of them it writes to is not to be seen from here.
            gpu.note(kernel.fn.__name__, given, [])
            if gpu.capturing is not None:
                gpu.capturing.add(launch, (args, kwargs), None, [], given)
        launch(*args, **kwargs)

    yield InterpretedFunction, "run", watched
