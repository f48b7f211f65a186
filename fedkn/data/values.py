"""Arrays and tensors from outside, as the tensors that `Examples` holds: of the values they had.

No value is rounded: floating point stays what it is, and integers that torch cannot compute with
become wider ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = [
    "INPUT_DTYPES",
    "TARGET_DTYPES",
    "as_array",
    "as_inputs",
    "as_targets",
    "check_shape",
    "dtype_name",
]

INPUT_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
"""The types that inputs may have."""

TARGET_DTYPES = (torch.int64, torch.float32)
"""The types that targets may have: classes, or numbers."""

# Of these torch has the type, but can neither gather nor compare.
_WIDER = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
_LARGEST = 2**63 - 1
_CHUNK = 1 << 22


def as_inputs(what: str, value: Any) -> Tensor:
    """Return inputs (N, ...) as a tensor of one of `INPUT_DTYPES`.

    8-bit and 16-bit integers stay 8 bits or become 32 (uint16), floating point stays as it is.

    Parameters
    ----------
    what
        Names the array in an error.
    value
        A NumPy array, a tensor, or what `numpy.asarray` makes one of.

    Raises
    ------
    UserError
        No numbers, NaN or infinity (naming the first), or not 2 to 5 axes.
    """
    tensor = _tensor(what, value)
    if tensor.dtype not in INPUT_DTYPES:
        raise UserError(
            f"{what} must hold integers or floating point, got {dtype_name(tensor)}: store it as "
            "float32"
        )
    check_shape(what, tensor)
    _refuse_nan(what, tensor)
    return tensor


def as_targets(what: str, value: Any) -> Tensor:
    """Return targets (N, ...) as int64, which are classes, or float32, which are numbers.

    Integers are classes; so are truth values of an example (N,) or a pixel (N, H, W), which become
    0 and 1. Truth values (N, K), K labels of an example that may all hold, become 0.0 and 1.0.

    Raises
    ------
    UserError
        No numbers, NaN or infinity (naming the first), or numbers that float32 cannot hold.
    """
    tensor = _tensor(what, value)
    if tensor.ndim < 1:
        raise UserError(f"{what} must have the examples on its first axis, got a single value")
    if tensor.dtype == torch.bool:
        return tensor.float() if tensor.ndim == 2 else tensor.long()
    if tensor.is_complex():
        raise UserError(f"{what} must hold integers or floating point, got {dtype_name(tensor)}")
    if not tensor.is_floating_point():
        return tensor.long()
    _refuse_nan(what, tensor)
    rounded = tensor.float()
    if not bool(rounded.isfinite().all()):
        where = _first(~rounded.isfinite())
        raise UserError(f"{what} holds {_at(tensor, where)}, which float32 cannot: scale it down")
    return rounded


def as_array(what: str, value: Any) -> np.ndarray:
    """Return a tensor, an array, a table or nested lists as an array.

    Raises UserError, naming `what`, where it cannot be one.
    """
    _refuse_sparse(what, value)
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    # Of lists of different lengths; and anybody's __array__ may raise anything.
    except Exception as error:
        raise UserError(
            f"{what} is no array: its examples differ in shape, or it is none at all "
            f"({type(error).__name__}); give examples of one shape"
        ) from None
    # Tables hold names so.
    if array.dtype == object and array.size and all(isinstance(one, str) for one in array.flat):
        return array.astype(str)
    if array.dtype.hasobject and hasattr(value, "columns") and hasattr(value, "dtypes"):
        _refuse_columns(what, value)
    return array


def check_shape(what: str, inputs: Tensor) -> None:
    """Raise UserError unless `inputs` (N, ...) has 2 to 5 axes, and none but N is empty."""
    if not 2 <= inputs.ndim <= 5 or 0 in inputs.shape[1:]:
        hint = ": give each example an axis, as x[:, None] does" if inputs.ndim == 1 else ""
        raise UserError(
            f"{what} must be (N, F), (N, C, L), (N, C, H, W) or (N, C, D, H, W), "
            f"got {dtype_name(inputs)} {tuple(inputs.shape)}{hint}"
        )


def dtype_name(tensor: Tensor) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_sparse(what: str, value: Any) -> None:
    if isinstance(value, Tensor):
        dense = "" if value.layout is torch.strided else "to_dense"
    else:
        dense = "toarray" if callable(getattr(value, "toarray", None)) else ""
    if dense:
        kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{what} is a sparse {kind}: give x.{dense}()")


def _refuse_columns(what: str, table: Any) -> None:
    """Raise UserError naming the columns of a data frame that make it no array of numbers."""
    kinds = {str(name): str(kind) for name, kind in zip(table.columns, table.dtypes, strict=True)}
    odd = {name: kind for name, kind in kinds.items() if not kind.startswith(_NUMBERS)} or kinds
    shown = ", ".join(f"'{printable(n, 40)}' ({printable(k, 40)})" for n, k in [*odd.items()][:5])
    more = f", and {len(odd) - 5} more" if len(odd) > 5 else ""
    raise UserError(
        f"{what} is a {type(table).__name__} whose columns are no numbers of one type: encode or "
        f"drop {shown}{more}, then give x.to_numpy('float32')"
    )


_NUMBERS = ("int", "uint", "float")


def _tensor(what: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        _refuse_sparse(what, value)
        found = value.detach().cpu()
        name = dtype_name(found)
        if name not in _WIDER:
            return found.contiguous()
        value = found
    array = as_array(what, value)
    if array.dtype.kind not in "biufc":
        raise UserError(f"{what} {_no_numbers(array)}")
    if array.dtype.name in _WIDER:
        if array.dtype == np.uint64 and array.size and int(array.max()) > _LARGEST:
            where = int(array.argmax())
            raise UserError(f"{what} holds {array.max()} (first at index {where}): too large")
        array = array.astype(_WIDER[array.dtype.name])
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # From any byte order to the machine's own; torch takes no other, nor negative strides.
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def _no_numbers(array: np.ndarray) -> str:
    if array.dtype.hasobject:
        return (
            "holds Python objects, most often because examples differ in shape: give all of them "
            "one shape and a type of numbers"
        )
    return f"must hold numbers, got {array.dtype}: encode it as integers or floating point first"


def _refuse_nan(what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), rows):
        bad = ~tensor[start : start + rows].isfinite()
        if bool(bad.any()):
            first, *rest = _first(bad)
            where = (start + first, *rest)
            raise UserError(
                f"{what} holds {_at(tensor, where)}: leave the example out, or put a number there"
            )


def _first(bad: Tensor) -> tuple[int, ...]:
    flat = int(bad.flatten().int().argmax())
    return tuple(int(i) for i in np.unravel_index(flat, tuple(bad.shape)))


def _at(tensor: Tensor, where: tuple[int, ...]) -> str:
    shown = where[0] if len(where) == 1 else where
    return f"{tensor[where].item()} at index {shown}"
