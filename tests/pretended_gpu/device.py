"""CPU tensors that say they lie on a GPU, and raise where a device would.

A tensor is on the GPU if its memory is marked so. Operations give their results the place of their
arguments; arguments in two places are refused as PyTorch refuses them, and what cannot be read
without waiting is noted, or refused while a graph is captured. A captured graph keeps the
operations that reached the kernels, and a replay does them again on the same memory: as a CUDA
graph, it knows nothing of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended_gpu.order import Order, Stream
from tests.pretended_gpu.rules import (
    PRODUCTS,
    WAITS,
    check_indices,
    check_places,
    is_view,
    takes_a_generator,
    written,
)
from tests.pretended_gpu.streams import Graph, doubles
from tests.pretended_gpu.tensors import tensors_in
from tests.pretended_gpu.triton_launches import launches

__all__ = ["Gpu", "pretended_gpu"]

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

_device_of = torch.Tensor.device.__get__  # type: ignore[attr-defined]  # a descriptor


class Gpu:
    """What there is of the device.

    Attributes:
        waits: where the host waited for it.
        order: of what its streams do. default, current: streams. capturing: what is captured.
        replaying: whether a graph does its operations again. strict: whether a wait is an error.
        explicit: the device that the call under way names. implicit: whether what PyTorch makes by
            itself is made on the device.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.order = Order()
        self.default = self.current = Stream()
        self.capture_stream = Stream()
        self.capturing: Graph | None = None
        self.replaying = self.strict = False
        self.generator = torch.Generator()
        self.explicit: torch.device | None = None
        self.implicit = False
        self.workspaces: dict[int, Tensor] = {}
        self._marked: dict[int, StorageWeakRef] = {}
        self._in_graphs: set[int] = set()
        self._calls = 0

    def has(self, tensor: Tensor) -> bool:
        """Whether `tensor` is on it."""
        place = place_of(tensor)
        return place is not None and place in self._marked

    def mark(self, tensor: Tensor) -> None:
        """Put a new tensor on it."""
        place = place_of(tensor)
        if place is not None and place not in self._marked:
            with torch._C.DisableTorchFunction():
                self._marked[place] = StorageWeakRef(_plain(tensor).untyped_storage())
            if self.capturing is not None:
                self._in_graphs.add(place)

    def wait(self, what: str) -> None:
        """Let the host wait for the current stream. Raises RuntimeError within a capture."""
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        self.waits.append(what)
        self.order.wait_for(self.current)

    def wait_for_all(self, what: str) -> None:
        """Let the host wait for all streams. Raises RuntimeError within a capture."""
        self.wait(what)
        self.order.wait_for_all()

    def workspace(self, operation: str) -> list[Tensor]:
        """Return the memory that cuBLAS keeps for products on the current stream."""
        if operation not in PRODUCTS:
            return []
        number = self.current.number
        if number not in self.workspaces:
            self.workspaces[number] = torch.empty(1)
            self.mark(self.workspaces[number])
        return [self.workspaces[number]]

    @contextmanager
    def making(self, there: bool) -> Iterator[None]:
        """Let what PyTorch makes by itself inside the block be on the device, or not."""
        before, self.implicit = self.implicit, there
        try:
            yield
        finally:
            self.implicit = before

    def note(self, what: object, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Something was asked for on the current stream."""
        self._calls += 1
        if self._calls % 64 == 0:
            self.forget()
        self.order.note(self.current, self._places(reads), self._places(writes), str(what))

    def forget(self) -> None:
        """Look whose memory was given back."""
        for place in [place for place, ref in self._marked.items() if ref.expired()]:  # type: ignore[no-untyped-call]
            # That of a graph stays the graph's.
            if place in self._in_graphs:
                self._in_graphs.discard(place)
                self.order.gone(place)
            else:
                self.order.freed(place)
            del self._marked[place]

    def _places(self, tensors: Sequence[Tensor]) -> list[int]:
        places = map(place_of, tensors)
        return [place for place in places if place is not None and place in self._marked]


def _plain(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def place_of(tensor: Tensor) -> int | None:
    """Return the id of a tensor's memory; None where it has none."""
    with torch._C.DisableTorchFunction():
        plain = _plain(tensor)
        if plain.layout is not torch.strided or _device_of(plain).type != "cpu":
            return None
        return int(plain.untyped_storage()._cdata)


class _Operations(TorchDispatchMode):
    """Looks at what reaches the kernels."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch imports its compiler, for seconds, to keep it from this mode."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        gpu, name = self.gpu, str(func)
        if gpu.replaying:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        there = [gpu.has(t) for t in given]
        on_gpu = any(there)
        if on_gpu:
            self._check(func, args, given, there)
        if (on_gpu or gpu.implicit) and takes_a_generator(func):
            kwargs = {"generator": gpu.generator, **kwargs}
        known = {place_of(t) for t in given}
        result = func(*args, **kwargs)
        fresh = [t for t in tensors_in(result) if place_of(t) not in known]
        target = on_gpu or (not given and gpu.implicit)
        if gpu.explicit is not None:
            target = gpu.explicit.type == "cuda"
        if target:
            for tensor in fresh:
                gpu.mark(tensor)
        if on_gpu or target:
            if kwargs.get("generator") not in (None, gpu.generator):
                raise RuntimeError(f"Expected a 'cuda' device type for generator: {name}")
            writes = [*fresh, *written(func, args, kwargs), *gpu.workspace(name)]
            if not is_view(func):
                gpu.note(func, given, writes)
            if gpu.capturing is not None:
                gpu.capturing.add(func, (args, kwargs), result, fresh, writes)
        return result

    def _check(self, func: Any, args: Any, given: Sequence[Tensor], there: Sequence[bool]) -> None:
        name = str(func)
        if name.startswith(("fedkn", "mkldnn")) and "keep_mask" not in name:
            raise RuntimeError(f"{name} has no kernel for 'cuda'")
        if name in WAITS:
            self.gpu.wait(name)
        if not check_indices(self.gpu, name, args):
            check_places(self.gpu, func, args, given, there)


class _Functions(TorchFunctionMode):
    """Takes the device out of calls, for PyTorch here knows of none."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        gpu, tensor = self.gpu, torch.Tensor
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (tensor.to, tensor.cpu, tensor.cuda):
            return self._moved(func, args, kwargs)
        if first is not None and gpu.has(first):
            if func is tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func is tensor.tolist:
                gpu.wait("tolist")
            if func is tensor.__deepcopy__:
                result = func(*args, **kwargs)
                gpu.mark(result)
                return result
        if kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        # What a kernel makes for itself it makes where its arguments are.
        with gpu.making(any(map(gpu.has, tensors_in((args, kwargs))))):
            return func(*args, **kwargs)

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `func` makes on the device that it is given."""
        gpu, device = self.gpu, torch.device(kwargs["device"])
        there, data = device.type == "cuda", args[0] if args else None
        generator = kwargs.get("generator")
        if generator is not None and (generator is gpu.generator) != there:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator")
        if device.type == "meta":
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if isinstance(data, Tensor):
                dtype = kwargs.get("dtype") or data.dtype
                return self._moved(torch.Tensor.to, (data, device, dtype), {})
            if there:
                gpu.wait(f"torch.{func.__name__} on the device")
                func = torch.tensor
        before, gpu.explicit = gpu.explicit, device
        try:
            result = func(*args, **kwargs)
        finally:
            gpu.explicit = before
        if there:
            for value in tensors_in(result):
                gpu.mark(value)
        return result

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Do what ``Tensor.to``, ``cpu`` or ``cuda`` does."""
        gpu, source = self.gpu, args[0]
        other = next((a for a in (*args[1:], kwargs.get("other")) if isinstance(a, Tensor)), None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *(a for a in args[1:] if not isinstance(a, Tensor | bool)),
            **{k: v for k, v in kwargs.items() if k in ("device", "dtype") and v is not None},
        )
        flags = [a for a in args[1:] if isinstance(a, bool)]
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        layout = kwargs.get("memory_format", torch.preserve_format)
        here = gpu.has(source)
        target = here if device is None else device.type == "cuda"
        dtype = source.dtype if dtype is None else dtype
        if func is not torch.Tensor.to:
            target = func is torch.Tensor.cuda
        elif other is not None:
            target, dtype = gpu.has(other), other.dtype
        if here != target:
            if not non_blocking:
                gpu.wait(f"copy to the {'device' if target else 'host'}")
            elif gpu.capturing is not None:
                raise RuntimeError("copy of pageable memory while capturing")
        before, gpu.explicit = gpu.explicit, CUDA if target else CPU
        try:
            copy = copy or here != target
            made = source.to(dtype=dtype, copy=copy, memory_format=layout)
        finally:
            gpu.explicit = before
        return made


def _seen_device(gpu: Gpu) -> Callable[[Tensor], torch.device]:
    def device(tensor: Tensor) -> torch.device:
        return CUDA if gpu.has(tensor) else _device_of(tensor)

    return device


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """Let PyTorch have a GPU inside the block."""
    gpu = Gpu()
    device, functions = _seen_device(gpu), _Functions(gpu)
    backward = torch.autograd._engine_run_backward

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        # `Tensor.backward` reaches a mode by itself, and within it the mode is off.
        with functions, gpu.making(any(map(gpu.has, tensors_in(args)))):
            return backward(*args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "device", property(device)),
            (torch.Tensor, "is_cuda", property(gpu.has)),
            (torch.Tensor, "is_cpu", property(lambda t: device(t).type == "cpu")),
            (torch.Tensor, "get_device", lambda t: 0 if gpu.has(t) else -1),
            (torch.autograd, "_engine_run_backward", watched_backward),
            *doubles(gpu),
            *launches(gpu),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(functions)
        stack.enter_context(_Operations(gpu))
        yield gpu
        gpu.forget()
