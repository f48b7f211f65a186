"""`build`: a network by name, with any normalizer, bit-identical for one seed."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import nn

from fedkn import normalizers
from fedkn.errors import UserError, unknown_name
from fedkn.layers.convolution import convolve_by_kernels
from fedkn.models.blocks import branches
from fedkn.models.catalog import ARCHITECTURES
from fedkn.models.initial import initialize
from fedkn.models.spec import Architecture, FinalNorm, ModelSpec
from fedkn.normalizers import Normalizer

__all__ = ["build", "names"]


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    normalizer: Normalizer,
    width: int | None = None,
    final_norm: FinalNorm | None = None,
    low_resolution: bool = True,
    dropout_p: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the network called `name`: maps (N, in_channels, H, W) to logits (N, num_classes).

    Every setting means the same for every normalizer:

    - `width`: channels of the first layer; the others scale with it. None: as published.
    - `final_norm`: the norm before the last pooling: "none", "kernel" (KernelNorm 1x1), "own" (the
      normalizer's own). None: as the architecture has it, "own" where it is a pre-activation or a
      kernel-normalized network, else "none".
    - `low_resolution`: a 3x3 stem for small images; False: the stem for images of 224x224.
    - `dropout_p`: the option of this name of normalizers that have it (KernelNorm's statistics);
      that of the final norm scales with it and never exceeds the published. None: the normalizer's
      own setting, else as published.
    - `seed`: the initial weights are a pure function of it; global random state is left alone.

    Raises UserError for an unknown name and for settings the network cannot have.
    """
    if name not in ARCHITECTURES:
        raise unknown_name("model", name, ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    _check(name, sizes, final_norm, low_resolution)
    p = _dropout(architecture, normalizer, dropout_p)
    final_p = architecture.final_dropout_p * min(1.0, p / architecture.dropout_p)
    wanted = architecture.final_norm if final_norm is None else final_norm
    spec = ModelSpec(
        num_classes=num_classes,
        in_channels=in_channels,
        normalizer=normalizer.with_settings(dropout_p=p),
        width=architecture.width if width is None else width,
        published_width=architecture.width,
        final_norm=wanted,
        final_normalizer=_final(wanted, normalizer, final_p),
        low_resolution=low_resolution,
    )
    # The layers draw from the global generator when they are made; what they draw is replaced.
    with torch.random.fork_rng(devices=[]):
        model = architecture.builder(spec)
    initialize(model, seed)
    head = model.get_submodule("head.fc")
    assert isinstance(head, nn.Linear)
    spec.normalizer.begin(branches(model), head)
    convolve_by_kernels(model)
    return model


def names() -> tuple[str, ...]:
    """Return the names that `build` knows."""
    return tuple(ARCHITECTURES)


def _check(
    name: str, sizes: dict[str, int | None], final_norm: str | None, low_resolution: bool
) -> None:
    for setting, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{setting} = {value} of model '{name}' must be 1 or more")
    if final_norm is not None and final_norm not in get_args(FinalNorm):
        raise unknown_name("final_norm", final_norm, get_args(FinalNorm))
    wanted = "low" if low_resolution else "high"
    if wanted not in ARCHITECTURES[name].resolutions:
        raise UserError(
            f"model '{name}' has no {wanted}-resolution form: "
            f"set low_resolution={not low_resolution}, or choose a ResNet"
        )


def _final(wanted: FinalNorm, normalizer: Normalizer, dropout_p: float) -> Normalizer | None:
    if wanted == "none":
        return None
    chosen = normalizers.create("kernel") if wanted == "kernel" else normalizer
    return chosen.with_settings(dropout_p=dropout_p)


def _dropout(architecture: Architecture, normalizer: Normalizer, dropout_p: float | None) -> float:
    own: float | None = normalizer.settings.get("dropout_p")
    if dropout_p is None:
        return architecture.dropout_p if own is None else own
    if not (math.isfinite(dropout_p) and 0 <= dropout_p < 1):
        raise UserError(f"dropout_p = {dropout_p} must be at least 0 and below 1")
    if own is not None and own != dropout_p:
        raise UserError(
            f"dropout_p is {dropout_p} for the model and {own} for its normalizer: set one of them"
        )
    return dropout_p
