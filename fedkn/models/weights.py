"""Weights from a file, read without running anything that is in it."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkn.errors import UserError, unknown_name
from fedkn.normalizers.frozen import matching, nearby
from fedkn.text import printable

__all__ = ["file_sha256", "load_weights", "read_tensors", "tensor_problem"]


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Return what the file `path` holds by name: safetensors, or what ``torch.save`` wrote.

    The latter is read with ``weights_only=True``, so nothing in it is executed.

    Raises:
        UserError: the file cannot be read, is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"cannot read checkpoint '{printable(path)}': {error.strerror or error}"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"'{printable(path)}' holds more than tensors and is refused, because reading it could "
            "run code: use the authors' checkpoint as published, or save a state_dict alone"
        ) from None
    # What PyTorch raises on damaged bytes ranges from struct.error to AssertionError.
    except (Exception, SafetensorError) as error:
        why = printable(error, 100) or type(error).__name__
        raise UserError(
            f"'{printable(path)}' is not a checkpoint, or is damaged ({why}): fetch it again"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"'{printable(path)}' holds a {type(content).__name__}, not a dict of tensors"
        )
    return content


def load_weights(
    model: nn.Module, path: Path, *, exclude: Sequence[str] = (), sha256: str = ""
) -> tuple[str, list[str]]:
    """Load the tensors of the file `path` into `model`; return its SHA-256 and what was left out.

    The file holds a ``state_dict``, by itself or under that name or ``model``. Every tensor of the
    model must be there in its shape, and no other, but for those that the patterns `exclude` fit,
    which are passed over in the file and stay as they are in the model, and for BatchNorm's counts
    of batches. The model is changed only if everything fits.

    Raises:
        UserError: as `read_tensors`; a file of another hash than `sha256`, if one is given; a
            missing, unexpected or unusable tensor, or another shape; a pattern that fits none.
    """
    found = file_sha256(path)
    if sha256 and found != sha256:
        raise UserError(
            f"'{printable(path)}' is not the file of weights that the run was begun with (SHA-256 "
            f"{found[:12]}…, then {printable(sha256, 12)}…): put that file back, or begin a new run"
        )
    content, named = read_tensors(path), f"model.weights = '{printable(path, 200)}'"
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    target = model.state_dict()
    theirs = [str(name) for name in content]
    for pattern in exclude:
        if not matching([*theirs, *target], [pattern]):
            raise unknown_name(
                "tensor in model.weights_except", pattern, nearby(pattern, [*target, *theirs])
            )
    left = set(matching([*theirs, *target], exclude))
    given = {name: value for name, value in content.items() if name not in left}
    advice = "leave it out by model.weights_except, or give the weights of this model"
    loaded: dict[str, Tensor] = {}
    for name, value in given.items():
        shown = printable(name, 120)
        if name not in target:
            near = nearby(str(name), [*target])[0] if target else ""
            raise UserError(
                f"{named}: the model has no tensor '{shown}' (nearest: '{near}'): {advice}"
            )
        if not isinstance(value, Tensor):
            raise UserError(f"{named}: '{shown}' is no tensor but of type {type(value).__name__}")
        if value.shape != target[name].shape:
            raise UserError(
                f"{named}: '{shown}' is {tuple(value.shape)}, the model's is "
                f"{tuple(target[name].shape)}: {advice}"
            )
        if target[name].is_floating_point() and (problem := tensor_problem(value)):
            raise UserError(f"{named}: '{shown}' {problem}")
        loaded[name] = value
    missing = [
        name
        for name in target
        if name not in loaded and name not in left and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise UserError(
            f"{named} has nothing for the model's '{missing[0]}' ({len(missing)} missing): {advice}"
        )
    with torch.no_grad():
        for name, value in loaded.items():
            target[name].copy_(value)
    return found, sorted(left)


def tensor_problem(tensor: Tensor) -> str | None:
    """Return why `tensor` cannot be a model's weights, None if it can."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _FLOATS:
        return f"is no plain tensor of floating point ({tensor.dtype}, {tensor.layout})"
    return None if tensor.isfinite().all() else "holds numbers that are not finite"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file `path` in hexadecimal; UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"cannot read model.weights = '{printable(path, 200)}': {error.strerror or error}"
        ) from None


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_sums(path: Path) -> None:
    """Raise ValueError where a sum in the file does not match: torch.load does not look at them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad} does not match")
