"""Networks of somebody's own: made by a factory, and converted where they know no normalizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkn.data.vision import with_torchvision
from fedkn.errors import UserError, raised_at, unknown_name
from fedkn.models.copying import copied, lazy_layer
from fedkn.normalizers import Normalizer
from fedkn.text import printable

__all__ = ["OwnNetwork", "make"]


@dataclass(frozen=True, eq=False)
class OwnNetwork:
    """What a factory made. `normalized`: it was given the normalizer, and needs no conversion."""

    module: nn.Module
    normalized: bool


def make(
    name: str,
    factory: object,
    *,
    normalizer: Normalizer,
    offers: Mapping[str, Any],
    options: Mapping[str, Any],
    example: Tensor | None = None,
) -> OwnNetwork:
    """Return what `factory`, which the configuration calls `name`, makes.

    It is called with keywords: the `normalizer` and those of `offers` that its signature names,
    and `options`, which come before an offer of the same name. What it draws from PyTorch's,
    NumPy's and Python's generators is for the caller to seed; its weights are as it set them.

    Args:
        example: a batch that is sent through a network whose layers have no shape yet.

    Raises:
        UserError: the factory cannot be called so, fails, or makes no network; in one line.
    """
    shown = f"model '{printable(name, 120)}'"
    if isinstance(factory, nn.Module) or not callable(factory):
        what = "a network already made" if isinstance(factory, nn.Module) else "not a function"
        raise UserError(
            f"{shown} is {what}: give a function, or a class, that makes a new network whenever it "
            "is called"
        )
    arguments = _arguments(shown, factory, {"normalizer": normalizer, **offers}, options)
    try:
        module = with_torchvision(lambda: factory(**arguments))
    except UserError:
        raise
    except Exception as error:  # somebody's code may fail of anything
        raise UserError(f"{shown} cannot be built: {_said(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{shown} made {_article(type(module).__name__)}, not a torch.nn.Module: let it return "
            "the network"
        )
    normalized = "normalizer" in arguments
    module = copied(module)  # one that the factory keeps must not be trained
    if lazy_layer(module) is not None and example is not None:
        try:
            with torch.no_grad():
                module.eval()(example)
        except Exception as error:
            raise UserError(
                f"{shown} fails on {tuple(example.shape)} inputs: {_said(error)}"
            ) from error
        module.train()
    if lazy := lazy_layer(module):
        raise UserError(f"{shown}: '{lazy}' has no shape yet: give its sizes")
    return OwnNetwork(module, normalized)


def _arguments(
    shown: str, factory: Callable[..., Any], offers: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of a builtin nothing is known
        return dict(options)
    kinds = inspect.Parameter
    named = {
        key: value
        for key, value in parameters.items()
        if value.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    takes_any = any(value.kind is kinds.VAR_KEYWORD for value in parameters.values())
    for option in options:
        if option == "normalizer":
            raise UserError(f"{shown}: the normalizer is no option: set normalizer.name")
        if option not in named and not takes_any:
            if not (valid := named.keys() - offers.keys()):
                raise UserError(f"{shown} takes no options: drop '{option}' of model.options")
            raise unknown_name(f"option of {shown}", option, valid)
    arguments = {key: value for key, value in offers.items() if key in named} | dict(options)
    missing = [
        key
        for key, value in parameters.items()
        if value.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        and value.default is value.empty
        and key not in arguments
    ]
    if missing:
        raise UserError(
            f"{shown} also needs {', '.join(missing)}: give it as model.options.{missing[0]}, or a "
            f"default (fedkn gives {', '.join(offers)} where they are asked for)"
        )
    return arguments


def _said(error: Exception) -> str:
    place = raised_at(error)
    where = "" if place is None else f" ({place[0]}:{place[1]})"
    return printable(f"{type(error).__name__}: {error}", 240) + printable(where, 160)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {printable(name, 60)}"
