"""Which operations PyTorch refuses for tensors in two places, and which make the host wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.pretended_gpu.tensors import tensors_in

if TYPE_CHECKING:
    from tests.pretended_gpu.device import Gpu

__all__ = [
    "PRODUCTS",
    "WAITS",
    "check_indices",
    "check_places",
    "is_view",
    "takes_a_generator",
    "written",
]

WAITS = {
    f"aten.{name}"
    for name in (
        "_local_scalar_dense.default", "nonzero.default", "equal.default", "is_nonzero.default",
        "_unique2.default", "unique_dim.default", "unique_consecutive.default",
        "masked_select.default", "bincount.default", "repeat_interleave.Tensor",
    )
}  # fmt: skip
"""Operations whose result, or its size, the host has to know."""
PRODUCTS = {
    f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
}
"""Operations that cuBLAS does."""
_ACROSS = {"aten.copy_.default", "aten._to_copy.default"}
_INDEXING = {
    f"aten.{name}"
    for name in (
        "index.Tensor", "index_put_.default", "index_put.default", "_index_put_impl_.default",
        "_unsafe_index.Tensor",
    )
}  # fmt: skip
_SCALARS = {
    f"aten.{name}"
    for name in (
        "where.self", "masked_fill.Tensor", "masked_fill_.Tensor", "fill.Tensor", "fill_.Tensor",
    )
}  # fmt: skip


def check_indices(gpu: Gpu, name: str, args: Any) -> bool:
    """Do what indexing would: wait for masks and for indices on the host. False: it is none."""
    if name not in _INDEXING:
        return False
    if not gpu.has(args[0]):
        raise RuntimeError(f"{name}: indices on cuda of a tensor on the CPU")
    for index in args[1]:
        if index is None:
            continue
        if index.numel() and not gpu.has(index):
            gpu.wait(f"{name} by indices on the CPU")
        if index.dtype in (torch.bool, torch.uint8):
            gpu.wait(f"{name} by a mask")
    values = tensors_in(args[2:])
    if any(value.dim() and not gpu.has(value) for value in values):
        raise RuntimeError(f"{name}: values on the CPU for a tensor on cuda")
    return True


def check_places(
    gpu: Gpu, func: Any, args: Any, given: Sequence[Tensor], there: Sequence[bool]
) -> None:
    """Raise RuntimeError if an operation does not take its tensors, some of which are on `gpu`."""
    if all(there):
        return
    name = str(func)
    if name in _ACROSS:
        if len(args) < 3 or not args[2]:
            gpu.wait(f"{name} between the host and the device")
        elif gpu.capturing is not None:
            raise RuntimeError(f"{name} of pageable memory while capturing")
        return
    others = [tensor for tensor, on in zip(given, there, strict=True) if not on]
    numbers = all(tensor.dim() == 0 for tensor in others)
    in_place = name.split(".")[1].endswith("_")
    takes_numbers = torch.Tag.pointwise in func.tags or name in _SCALARS
    if numbers and takes_numbers and (there[0] or not in_place):
        return
    places = ["cuda" if on else "cpu" for on in there]
    shapes = [tuple(tensor.shape) for tensor in given]
    raise RuntimeError(
        f"Expected all tensors to be on the same device: {name} of {places}, {shapes}"
    )


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its argument's memory in another way."""
    returns = func._schema.returns
    return bool(returns) and all(
        found.alias_info is not None and not found.alias_info.is_write for found in returns
    )


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def takes_a_generator(func: Any) -> bool:
    """Whether an operation draws from a generator that it can be given."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    return drawn and any(argument.name == "generator" for argument in func._schema.arguments)
