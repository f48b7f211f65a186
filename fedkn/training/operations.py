"""The operations of a local step on the CPU, written down to be replayed without Python.

A step is computed once, as ever, while a dispatch mode writes down what reaches the kernels:
operations, their arguments, and which result goes where. ``fedkn_native.Step``
(``fedkn/layers/native/step.h``) then does the same operations in the same order, so the bits are
the same. What changes from step to step and is no tensor, dropout keys and the learning rate, is
known in the recording by values that nothing else has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["CannotRecord", "Operations", "Telling"]


class CannotRecord(RuntimeError):
    """A step does what a replay would not; the message says what."""


class Telling(NamedTuple):
    """Values by which arguments are known that change from step to step.

    Attributes:
        keys: of dropout calls, each with its place among those given to a step.
        rate: the learning rate.
    """

    keys: Mapping[int, int]
    rate: float


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Writes down the operations inside its block, as far as tensors are concerned.

    Args:
        inputs: what a step is given anew each time, in this order. Every other tensor that is not
            made in the block is kept, and is read where it is.
        telling: how to know the arguments that change.

    Raises CannotRecord, in the block, where a replay could not do the same.
    """

    def __init__(self, inputs: Sequence[Tensor], telling: Telling) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.draws = False
        self.used: set[int] = set()
        self._telling = telling
        self._kept: list[Tensor] = []
        # Kept tensors are numbered -1, -2, ..., the others 0, 1, ...
        # Weak, so that a step takes no more memory for being recorded.
        self._places: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        for number, tensor in enumerate(inputs):
            self._places[tensor] = number
        self._others = len(inputs)
        self._written: list[_Operation | int] = []
        # The formula of autograd's that is under way, and the first place of what it makes.
        self._formula: Any = None
        self._own = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch imports its compiler, for seconds, to keep it from this mode."""
        return False

    def seed(self, number: int) -> None:
        """Write down that PyTorch's generator is seeded with the seed of this number."""
        self._written.append(number)

    def finished(self, keys: Sequence[int]) -> Any:
        """Return the operations as a ``fedkn_native.Step``, those without effect left out.

        It is given the keys of these places alone, in their order.
        """
        written = _needed(self._written)
        step = torch.classes.fedkn_native.Step(self._kept, self._others)
        for operation in written:
            if isinstance(operation, int):
                if self.draws:
                    step.seed(operation)
            else:
                step.add(*operation.told(len(self._kept), keys))
        return step

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what `func` does, and write it down."""
        del types
        kwargs = kwargs or {}
        _check(func)
        func = self._unwatched(func, args)
        result = func(*args, **kwargs)
        self._write(func, args, kwargs, result)
        return result

    def _unwatched(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return what is called for `func` where no dispatch mode looks on.

        Some formulas of autograd's fill a tensor that they made in place, but if a mode is there a
        copy, which has another layout: sums over it are taken in another order.
        """
        formula = torch._C._current_autograd_node()
        if formula is not self._formula:
            self._formula, self._own = formula, self._others
        if (
            func is torch.ops.aten.masked_fill.Scalar
            and formula is not None
            and formula.name() in _FILLING
            and self._places.get(args[0], -1) >= self._own
        ):
            return torch.ops.aten.masked_fill_.Scalar
        return func

    def _write(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        schema = func._schema
        operation = self._operation(func, args, kwargs)
        if other := [r for r in schema.returns if str(r.type) not in _RETURNS]:
            if operation.tensors:
                raise CannotRecord(f"{func} returns a {other[0].type}")
            return  # such as the dtype that two dtypes are promoted to
        results = [result] if len(schema.returns) == 1 else list(result or ())
        given = set(operation.tensors)
        if not operation.effect:
            returned = [tensor for part in results for tensor in _tensors(part)]
            if func in _ALIASES:
                self._places[returned[0]] = operation.tensors[0]
                return
            if all(self._places.get(tensor) in given for tensor in returned):
                return  # nothing is done: x.contiguous() of what is so
            if _is_view(schema) and all(place < 0 for place in given):
                return  # a view of what stays where it is, kept when it is read
        for part in results:
            places = [self._result(tensor) for tensor in _tensors(part)]
            operation.results.append(
                [-1 if operation.effect and place in given else place for place in places]
            )
        self._written.append(operation)

    def _operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Operation:
        """Return the operation with its arguments, without results."""
        operation = _Operation(func, func._schema.is_mutable)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws = operation.effect = True
        for number, formal in enumerate(func._schema.arguments):
            given = number < len(args)
            value = args[number] if given else kwargs.get(formal.name, formal.default_value)
            if formal.N and isinstance(value, int | float) and not isinstance(value, bool):
                value = [value] * formal.N
            self._argument(operation, value)
        return operation

    def _result(self, tensor: Tensor) -> int:
        """Return the place of a result, a new one where it has none."""
        place = self._places.get(tensor)
        if place is None:
            place = self._others
            self._others += 1
            self._places[tensor] = place
        return place

    def _place(self, tensor: Tensor) -> int:
        place = self._places.get(tensor)
        if place is None:
            self._kept.append(tensor)
            place = -len(self._kept)
            self._places[tensor] = place
        return place

    def _argument(self, operation: _Operation, value: Any) -> None:  # noqa: PLR0912 - a case a kind
        write = operation.write
        if value is None:
            write(_NONE, 0)
        elif isinstance(value, Tensor):
            place = self._place(value)
            operation.tensors.append(place)
            write(_TENSOR, place)
        elif isinstance(value, bool):
            write(_BOOL, int(value))
        elif isinstance(value, int):
            if (key := self._telling.keys.get(value)) is not None:
                self.used.add(key)
                write(_KEY, key)
            else:
                write(_INT, value)
        elif isinstance(value, float):
            if abs(value) == self._telling.rate:
                write(_RATE, 1 if value > 0 else -1)
            else:
                write(_FLOAT, len(operation.floats))
                operation.floats.append(value)
        elif isinstance(value, str | torch.device):
            write(_WORD, len(operation.words))
            operation.words.append(str(value))
        elif isinstance(value, list | tuple):
            write(_LIST, len(value))
            for part in value:
                self._argument(operation, part)
        elif value in _NUMBERS:
            write(_INT, _NUMBERS[value])
        else:
            raise CannotRecord(f"{operation.func} is given a {type(value).__name__}")


class Reading(TorchFunctionMode):
    """Raises CannotRecord where Python reads what is in a tensor without an operation."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, unless it reads."""
        del types
        if getattr(func, "__name__", "") in _READS:
            raise CannotRecord(f"it reads a tensor in Python ({func.__name__})")
        return func(*args, **(kwargs or {}))


_READS = {
    "numpy", "__array__", "tolist", "data_ptr", "untyped_storage", "storage", "__dlpack__",
}  # fmt: skip


class _Operation:
    """An operation: arguments as ``Step.add`` takes them, and where its results go."""

    def __init__(self, func: Any, effect: bool) -> None:
        self.func = func
        self.effect = effect
        self.tensors: list[int] = []
        self.floats: list[float] = []
        self.words: list[str] = []
        self.results: list[list[int]] = []
        self._code: list[tuple[int, int]] = []

    def write(self, kind: int, value: int) -> None:
        """Write down an argument, or a list's beginning or element."""
        self._code.append((kind, value))

    def told(self, kept: int, keys: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of ``Step.add``, where so many tensors and these keys are."""

        def at(place: int) -> int:
            return -1 - place if place < 0 else kept + place

        def number(kind: int, value: int) -> int:
            if kind == _TENSOR:
                return at(value)
            return keys.index(value) if kind == _KEY else value

        code = [part for kind, value in self._code for part in (kind, number(kind, value))]
        results = [[at(p) if p >= 0 else -1 for p in places] for places in self.results]
        schema = self.func._schema
        return schema.name, schema.overload_name, code, self.floats, self.words, results


_NONE, _TENSOR, _INT, _FLOAT, _BOOL, _WORD, _KEY, _RATE, _LIST = range(9)

# PyTorch's own numbers (c10/core/ScalarType.h, Layout.h, MemoryFormat.h).
_NUMBERS: dict[Any, int] = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
    torch.strided: 0, torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2,
    torch.channels_last_3d: 3,
}  # fmt: skip


def _check(func: Any) -> None:
    tags = func.tags
    if torch.Tag.data_dependent_output in tags:
        raise CannotRecord(f"it reads a tensor in Python ({func})")
    if torch.Tag.dynamic_output_shape in tags:
        raise CannotRecord(f"the shapes of its tensors depend on what is in them ({func})")
    if torch.Tag.inplace_view in tags:
        raise CannotRecord(f"it changes the shape of a tensor in place ({func})")


_FILLING = {
    "ClampBackward0", "ClampMaxBackward1", "ClampMinBackward1",
    "FmaxBackward0", "FminBackward0", "MaximumBackward0", "MinimumBackward0",
}  # fmt: skip
"""Formulas that fill in place what they made, but for modes a copy of it: those of torch 2.14."""

_RETURNS = ("Tensor", "List[Tensor]")


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    return [t for t in part or () if isinstance(t, Tensor)]


_ALIASES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh.default,
)
"""Whose result is its argument for whoever does without autograd."""


def _is_view(schema: Any) -> bool:
    infos = [returned.alias_info for returned in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _needed(written: Sequence[_Operation | int]) -> list[_Operation | int]:
    """Return what has an effect, or a result that is needed for one, in the same order."""
    needed: set[int] = set()
    kept: list[_Operation | int] = []
    for operation in reversed(written):
        if isinstance(operation, int):
            kept.append(operation)
            continue
        results = [place for places in operation.results for place in places]
        if operation.effect or not needed.isdisjoint(results):
            needed.update(operation.tensors)
            kept.append(operation)
    return kept[::-1]
