"""``torch.cuda`` of the GPU that is not there: streams, graphs, and what is asked of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.pretended_gpu.order import Stream
from tests.pretended_gpu.tensors import as_they_are, tensors_in

if TYPE_CHECKING:
    from tests.pretended_gpu.device import Gpu

__all__ = ["Graph", "GraphContext", "doubles"]

_GIB = 2**30


class Graph:
    """A CUDA graph: operations on memory, done again by `replay`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._done: list[tuple[Callable[..., Any], Any, Mapping[str, Any], list[Tensor]]] = []
        self._reads: dict[int, Tensor] = {}
        self._writes: dict[int, Tensor] = {}

    def add(
        self,
        func: Callable[..., Any],
        given: tuple[Any, Mapping[str, Any]],
        result: Any,
        fresh: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        """Keep an operation that has just been done."""
        if not fresh and not written:
            return  # a view, which is where its memory is
        made = [tensor.detach() for tensor in tensors_in(result)] if fresh else []
        args, kwargs = as_they_are(given)
        self._done.append((func, args, kwargs, made))
        for tensor in tensors_in(given):
            self._reads[id(tensor)] = tensor
        for tensor in written:
            self._writes[id(tensor)] = tensor

    def replay(self) -> None:
        """Do all of it again, on the current stream."""
        gpu = self._gpu
        if gpu.capturing is not None:
            raise RuntimeError("a replay within a capture")
        gpu.note("replay", list(self._reads.values()), list(self._writes.values()))
        gpu.replaying = True
        try:
            self._replay()
        finally:
            gpu.replaying = False

    def _replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self._done:
                again = tensors_in(func(*args, **kwargs)) if made else func(*args, **kwargs)
                for before, now in zip(made, again if made else (), strict=True):
                    if before.data_ptr() != now.data_ptr():
                        before.copy_(now)

    def reset(self) -> None:
        """Keep nothing."""
        self._done.clear()


class GraphContext:
    """``torch.cuda.graph``."""

    def __init__(self, gpu: Gpu, graph: Graph) -> None:
        self._gpu, self._graph = gpu, graph

    def __enter__(self) -> None:
        self._gpu.wait_for_all("torch.cuda.graph")
        self._before = self._gpu.current
        self._gpu.current = self._gpu.capture_stream
        self._gpu.capturing = self._graph

    def __exit__(self, *error: object) -> None:
        self._gpu.capturing = None
        self._gpu.order.wait_for(self._gpu.current)
        self._gpu.current = self._before


def doubles(gpu: Gpu) -> Iterator[tuple[object, str, object]]:
    """Yield what is put in place of PyTorch's: owner, name, value."""

    @contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before, gpu.current = gpu.current, stream or gpu.current
        try:
            yield
        finally:
            gpu.current = before

    properties = SimpleNamespace(
        name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 * _GIB
    )
    cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: gpu.capturing is not None,
        "set_device": lambda index: None,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: "pretended",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (70 * _GIB, 80 * _GIB),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: _GIB // 1000,
        "max_memory_reserved": lambda device=None: _GIB // 1000,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait_for_all("synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "strict", mode == "error"),
        "get_rng_state_all": lambda: [gpu.generator.get_state()],
        "set_rng_state_all": lambda states: gpu.generator.set_state(states[0]),
        "Stream": Stream,
        "stream": on,
        "current_stream": lambda device=None: gpu.current,
        "CUDAGraph": lambda: Graph(gpu),
        "graph": lambda graph: GraphContext(gpu, graph),
    }
    for name, value in cuda.items():
        yield torch.cuda, name, value
    yield torch._C, "_cuda_clearCublasWorkspaces", gpu.workspaces.clear
    yield torch.cuda, "default_generators", (gpu.generator,)
    autocast = torch.autocast

    def on_the_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    yield torch, "autocast", on_the_cpu
