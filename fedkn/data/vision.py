"""The one place that imports torchvision, and that copes with its CUDA wheel beside a CPU torch.

The torchvision wheel of the package index is built for CUDA. Beside a CPU build of torch its
compiled part cannot be loaded, so its operators stay undeclared and the import ends in
``RuntimeError: operator torchvision::nms does not exist``. Data sets, transforms and models do
not need those operators; declaring their schemas is enough for the import to pass.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from fedkn.data.optional import require

__all__ = ["import_torchvision", "needs_way_round", "way_round_taken"]

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
        if not needs_way_round(error):
            raise
    # Only now: declaring first would clash with a healthy build, which declares them itself.
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def needs_way_round(error: RuntimeError) -> bool:
    """Whether `error` says that torchvision's compiled part cannot be loaded."""
    return _SYMPTOM in str(error)


def way_round_taken() -> bool:
    """Whether torchvision could be imported only after its operators had been declared here."""
    return bool(_declared)


def _declare_operators() -> None:
    # torch annotates neither the class nor its methods.
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define(f"nms{_BOXES}")
    library.define(f"qnms{_BOXES}")
    _declared.append(library)
