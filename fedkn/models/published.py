"""The KernelNorm authors' ImageNet weights of KNResNet-18, -34 and -50."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["load_published_weights"]

# Their names and ours, as pairs of patterns; ".conv1x1" is their wrapper of 1x1 convolutions.
_NAMES = (
    (re.compile(r"block0\.0\.(weight|bias)"), r"stem.first.\1"),
    (re.compile(r"res_block(\d+)\.(conv\d)\.(weight|bias)"), r"block\1.branch.\2.\3"),
    (re.compile(r"trans_block(\d+)\.conv\.(weight|bias)"), r"transition\1.conv.\2"),
    (re.compile(r"conv_block_f\.conv\.(weight|bias)"), r"final.conv.\1"),
    (re.compile(r"fc\.(weight|bias)"), r"head.fc.\1"),
)


def load_published_weights(
    model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Any]
) -> None:
    """Load the authors' checkpoint into `model`, a KNResNet built with the kernel normalizer.

    The ImageNet weights fit ``build("knresnet18", num_classes=1000, in_channels=3,
    low_resolution=False, ...)`` (likewise 34 and 50). A file is read with ``weights_only=True``,
    so nothing in it is executed. The model is changed only if every tensor fits.

    Raises UserError naming the first key, shape or tensor that does not fit, or why the file cannot
    be read.
    """
    if isinstance(path_or_state_dict, Mapping):
        content: Mapping[str, Any] = path_or_state_dict
    else:
        content = _read(Path(path_or_state_dict))
    weights = content["model"] if isinstance(content.get("model"), Mapping) else content
    target = model.state_dict()
    # A convolution that is followed by norm or activation is called "….conv" in our chains.
    ours = {re.sub(r"(branch\.conv\d)\.conv\.", r"\1.", key): key for key in target}
    found: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        key = ours.get(_translated(theirs)) if isinstance(theirs, str) else None
        if key is None:
            name = printable(theirs)
            raise UserError(f"the checkpoint's '{name}' has no place in this model: {_ADVICE}")
        if not isinstance(tensor, Tensor) or tensor.shape != target[key].shape:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"the checkpoint's '{theirs}' is {shape}, the model's '{key}' is "
                f"{tuple(target[key].shape)}: {_ADVICE}"
            )
        problem = "is there under another name too" if key in found else _problem(tensor)
        if problem:
            raise UserError(f"the checkpoint's '{theirs}' {problem}: fetch it again")
        found[key] = tensor
    missing = [key for key in target if key not in found]
    if missing:
        raise UserError(f"the checkpoint has nothing for the model's '{missing[0]}': {_ADVICE}")
    model.load_state_dict(found)


_ADVICE = (
    "build the KNResNet of the same depth with the kernel normalizer and the checkpoint's classes "
    "and resolution (ImageNet: num_classes=1000, low_resolution=False)"
)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _problem(tensor: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _FLOATS:
        return f"is no plain tensor of floating point ({tensor.dtype}, {tensor.layout})"
    return None if tensor.isfinite().all() else "holds numbers that are not finite"


def _translated(theirs: str) -> str:
    plain = theirs.replace(".conv1x1.", ".")
    for pattern, ours in _NAMES:
        if pattern.fullmatch(plain):
            return pattern.sub(ours, plain)
    return ""


def _check_sums(path: Path) -> None:
    """Raise ValueError where a sum in the file does not match: torch.load does not look at them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad} does not match")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint '{path}': {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"'{path}' holds more than tensors and is refused, because reading it could run code: "
            "use the authors' checkpoint as published"
        ) from None
    # What PyTorch raises on damaged bytes ranges from struct.error to AssertionError.
    except Exception as error:
        why = printable(error, 100) or type(error).__name__
        raise UserError(
            f"'{path}' is not a checkpoint, or is damaged ({why}): fetch it again"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' holds a {type(content).__name__}, not a dict of tensors")
    return content
