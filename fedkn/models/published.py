"""The KernelNorm authors' ImageNet weights of KNResNet-18, -34 and -50."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.models.weights import read_tensors, tensor_problem
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
        content = read_tensors(Path(path_or_state_dict))
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
        problem = "is there under another name too" if key in found else tensor_problem(tensor)
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


def _translated(theirs: str) -> str:
    plain = theirs.replace(".conv1x1.", ".")
    for pattern, ours in _NAMES:
        if pattern.fullmatch(plain):
            return pattern.sub(ours, plain)
    return ""
