"""The one place that imports torchvision, and that copes with its CUDA wheel beside a CPU torch.

The torchvision wheel of the package index is built for CUDA. Beside a CPU build of torch its
compiled part cannot be loaded, so its operators stay undeclared and the import ends in
``RuntimeError: operator torchvision::nms does not exist``. Data sets, transforms and models do
not need those operators; declaring their schemas is enough for the import to pass.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from fedkn.data.optional import require

__all__ = ["import_torchvision", "way_round_taken", "with_torchvision"]

ResultT = TypeVar("ResultT")

_SYMPTOM = "operator torchvision::nms does not exist"
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# The declarations last as long as the objects that made them.
_declared: list[Any] = []


def import_torchvision() -> ModuleType:
    """Return the torchvision module.

    Beside a CPU torch, the CUDA wheel then lacks `ops.nms` and `io.decode_image` only.

    Raises
    ------
    UserError
        torchvision is not installed.
    """
    try:
        return require("torchvision", "torchvision", "simulation")
    except RuntimeError as error:
        if not _needs_way_round(error):
            raise
    # Only now: declaring first would clash with a healthy build, which declares them itself.
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def with_torchvision(call: Callable[[], ResultT]) -> ResultT:
    """Return what somebody's code returns that may import torchvision, when and how it likes.

    Where that fails as above it is called a second time, once torchvision can be imported, with
    PyTorch's (the CPU's), NumPy's and Python's generators as it found them at first.
    """
    drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        return call()
    except Exception as error:  # libraries wrap it in errors of their own
        if not _needs_way_round(error):
            raise
    import_torchvision()
    torch.set_rng_state(drawn[0])
    np.random.set_state(drawn[1])  # noqa: NPY002
    random.setstate(drawn[2])
    return call()


def _needs_way_round(error: BaseException | None) -> bool:
    """Whether `error`, or what it came of, says that torchvision's compiled part is missing."""
    return error is not None and (
        _SYMPTOM in str(error) or _needs_way_round(error.__cause__ or error.__context__)
    )


def way_round_taken() -> bool:
    """Whether torchvision could be imported only after its operators had been declared here."""
    return bool(_declared)


def _declare_operators() -> None:
    # torch annotates neither the class nor its methods.
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define(f"nms{_BOXES}")
    library.define(f"qnms{_BOXES}")
    _declared.append(library)
