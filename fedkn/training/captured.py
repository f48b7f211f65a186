"""A function as a CUDA graph: one launch, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["PRODUCTS", "Captured"]

_WARM_UP = 3

PRODUCTS = 1 << 25
"""Bytes of a graph's own in which cuBLAS computes products, at most: what it takes on an H100."""


class Captured:
    """Captures a function, which works by its side effects, to replay it.

    On the device of what it changes, whichever is the current one.

    Args:
        function: must neither synchronise with the host nor branch on values. A replay reads the
            tensors that it read, where they were.
        changed: what it writes to; put back after each of the calls that the capture needs.

    Raises:
        RuntimeError: the function does what cannot be captured; what it changed is put back.
    """

    def __init__(self, function: Callable[[], None], changed: Sequence[Tensor]) -> None:
        device = changed[0].device if changed else None
        with nullcontext() if device is None else torch.cuda.device(device):
            self._capture(function, changed)

    def replay(self) -> None:
        """Do what the function would."""
        self._graph.replay()

    def _capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> None:
        before = [tensor.clone() for tensor in changed]

        def put_back() -> None:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

        # As torch.cuda.graph asks: a few calls on another stream, so that libraries have chosen
        # their kernels and workspaces before anything is recorded.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch annotates it so
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    function()
                    put_back()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with _products_of_its_own(), torch.cuda.graph(self._graph):
                function()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            put_back()


@contextmanager
def _products_of_its_own() -> Iterator[None]:
    """Let products that are captured inside the block work in memory of their graph alone.

    cuBLAS keeps that memory for a stream, and PyTorch captures all graphs on one. Graphs that are
    replayed at once would write to it at once, and in some releases one that is given up takes it
    from the others (pytorch/pytorch#193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
