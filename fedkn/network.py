"""From the model of a configuration to a network: fedkn's own or somebody's, with given weights.

The same on every machine, because it is a pure function of the configuration and of what the data
ask for; what was done on the way is told, for the run's record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedkn import models
from fedkn.config import ModelConfig
from fedkn.errors import UserError
from fedkn.files import expanded
from fedkn.layers.convolution import convolve_by_kernels
from fedkn.models import own
from fedkn.models.catalog import ARCHITECTURES
from fedkn.models.changes import Conversion
from fedkn.models.spec import Architecture
from fedkn.models.weights import file_sha256, load_weights
from fedkn.normalizers import Normalizer
from fedkn.normalizers.frozen import freeze, patterns
from fedkn.normalizers.fused import lay_out_inputs
from fedkn.options import read_options
from fedkn.references import find
from fedkn.seeds import derive
from fedkn.training.draws import own_draws

__all__ = ["Network", "build_network", "pinned_weights"]


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and how it came about.

    Attributes:
        module: the network. conversion: what was changed of somebody's network for the normalizer;
            None where it was built with it.
        frozen: the names of the tensors that ``model.frozen`` keeps as they are.
        weights_sha256: of the file of weights (empty: none). left: what was not taken from it.
    """

    module: nn.Module
    conversion: Conversion | None = None
    frozen: tuple[str, ...] = ()
    weights_sha256: str = ""
    left: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return in JSON's types what a run's record says of it, in bounded space."""
        sizes = [(p.numel(), p.requires_grad) for p in self.module.parameters()]
        told: dict[str, Any] = {
            "parameters": sum(size for size, _ in sizes),
            "trained": sum(size for size, trained in sizes if trained),
            "frozen": list(self.frozen[:_MOST]),
            "frozen_tensors": len(self.frozen),
        }
        if self.weights_sha256:
            told["weights"] = {"sha256": self.weights_sha256, "left": list(self.left[:_MOST])}
        if self.conversion is not None:
            changed, kept = self.conversion.changed, self.conversion.kept
            told["conversion"] = {
                "changed": [[c.name, c.before, c.after, c.note] for c in changed[:_MOST]],
                "kept": [[k.name, k.layer, k.reason] for k in kept[:_MOST]],
                "all_changed": len(changed),
                "all_kept": len(kept),
                "traced": self.conversion.traced,
            }
        return told


def build_network(
    model: ModelConfig,
    normalizer: Normalizer,
    *,
    outputs: int,
    shape: tuple[int, ...],
    seed: int,
) -> Network:
    """Return the network of `model` with `normalizer`, in training mode, on the CPU.

    `outputs` are asked of its last layer, `shape` is an example's, channels first. A factory of
    somebody's own is given what it asks for of ``normalizer``, ``num_classes`` or ``num_outputs``,
    ``in_channels``, ``input_shape`` and ``seed``, and ``model.options``. A network that it made
    without the normalizer is converted, after weights were loaded into it.

    Raises:
        UserError: a name, a setting, a factory or a file that cannot be, or does not fit.
    """
    part = find("model", model.name, ARCHITECTURES)
    if isinstance(part, Architecture):
        if model.options:
            raise UserError(
                f"model.options are for a model of your own, '{model.name}' is fedkn's: set "
                "model.width, model.final_norm, …"
            )
        low = _low(part, shape) if model.low_resolution == "auto" else model.low_resolution
        module = models.build(
            model.name,
            num_classes=outputs,
            in_channels=shape[0],
            normalizer=normalizer,
            width=model.width or None,
            final_norm=model.final_norm,
            low_resolution=low,
            dropout_p=None if model.dropout_p == "published" else model.dropout_p,
            seed=seed,
        )
        return _finished(model, Network(module, None, (), *_weights(model, module)))
    _refuse_settings(model)
    if model.dropout_p != "published":
        normalizer = normalizer.with_settings(dropout_p=model.dropout_p)
    offers = {
        "num_classes": outputs,
        "num_outputs": outputs,
        "in_channels": shape[0],
        "input_shape": shape,
        "seed": seed,
    }
    with own_draws(torch.device("cpu"), derive(seed, "initial weights", "own model")):
        made = own.make(
            model.name,
            part,
            normalizer=normalizer,
            offers=offers,
            options=read_options(model.options),
            example=torch.zeros(2, *shape),
        )
        loaded = _weights(model, made.module)
        if made.normalized:
            return _finished(model, Network(made.module.train(), None, (), *loaded))
        before = [*made.module.state_dict()]
        module, conversion = models.convert(made.module, normalizer)
    return _finished(model, Network(module.train(), conversion, (), *loaded), before)


def pinned_weights(model: ModelConfig) -> dict[str, str]:
    """Return what a run begins with instead of the settings of ``model.weights``, by dotted key.

    The path in full and the file's hash, so that whoever goes on with the run, wherever it is
    started, starts from the same weights. Nothing where there are none.

    Raises:
        UserError: the file cannot be read, or has another hash than ``model.weights_sha256``.
    """
    if not model.weights:
        return {}
    path = expanded(model.weights).resolve()
    found = file_sha256(path)
    if model.weights_sha256 not in ("", found):
        raise UserError(f"'{path}' has the SHA-256 {found}, not model.weights_sha256")
    return {"model.weights": str(path), "model.weights_sha256": found}


_MOST = 200
"""Layers and tensors named in a record; their number is told."""

_SMALL_SIDE = 64
"""Pixels to a side up to which a network has the stem for small images."""


def _finished(model: ModelConfig, network: Network, before: Iterable[str] = ()) -> Network:
    """Freeze what is to be frozen; `before` are the tensors that there were before a conversion."""
    frozen = freeze(network.module, patterns(model.frozen), before)
    if model.name not in ARCHITECTURES:
        convolve_by_kernels(network.module)
    if frozen or model.name not in ARCHITECTURES:
        lay_out_inputs(network.module)
    return replace(network, frozen=tuple(frozen))


def _weights(model: ModelConfig, module: nn.Module) -> tuple[str, tuple[str, ...]]:
    if not model.weights:
        if model.weights_except or model.weights_sha256:
            raise UserError("model.weights_except and model.weights_sha256 need model.weights")
        return "", ()
    sha256, left = load_weights(
        module,
        expanded(model.weights),
        exclude=patterns(model.weights_except),
        sha256=model.weights_sha256,
    )
    return sha256, tuple(left)


def _low(architecture: Architecture, shape: tuple[int, ...]) -> bool:
    return "high" not in architecture.resolutions or max(shape[1:], default=0) <= _SMALL_SIDE


def _refuse_settings(model: ModelConfig) -> None:
    """Refuse what only fedkn's own networks have; they have other defaults than "none"."""
    for key, usual in (("width", (0,)), ("low_resolution", ("auto",)), _FINAL_NORMS):
        if (value := getattr(model, key)) not in usual:
            raise UserError(
                f"model.{key} = {value} is for fedkn's own networks, and '{model.name}' is yours: "
                "leave it out, or take it as one of model.options"
            )


_FINAL_NORMS = ("final_norm", ("kernel", "none"))
"""The default means nothing to a model of one's own, whose layers are all its own."""
