"""From arrays that somebody gives to a `Source`: the checks that all of them go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkn.data.examples import Examples, Origins, Source
from fedkn.data.labels import class_names, labels_of, text_of
from fedkn.data.split import stratified_split
from fedkn.data.values import as_array, as_inputs, as_targets
from fedkn.errors import UserError

__all__ = ["Part", "assembled"]


@dataclass(frozen=True, eq=False)
class Part:
    """Training or test examples as they were given.

    Attributes
    ----------
    inputs, targets
        Arrays, tensors or what `numpy.asarray` takes, the example on the first axis.
    clients
        Whose each example is, by an integer or a name; None where nothing tells.
    names
        What inputs, targets and clients are called where they come from.
    """

    inputs: Any
    targets: Any
    clients: Any = None
    names: tuple[str, str, str] = ("inputs", "targets", "clients")


def assembled(
    name: str, where: str, parts: Sequence[Part], classes: Any = None, *, labels: bool = False
) -> Source:
    """Return the source `name` of training examples and test examples, where there are any.

    Without test examples a fifth of the training examples is held out by a draw that is always the
    same: of every client where the data say whose they are, else of every class, else of all.

    Parameters
    ----------
    where
        Names the data in an error.
    parts
        The training examples, and the test examples if there are any.
    classes
        Names of the classes, or of the K labels that an example may have; None: not given.
    labels
        Whether targets must be labels (N,).

    Raises
    ------
    UserError
        Something does not fit, named with what to change.
    """
    inputs = [as_inputs(f"{where}: '{part.names[0]}'", part.inputs) for part in parts]
    targets = [_targets(where, part, labels=labels) for part in parts]
    names = _classes(where, parts, targets, classes)
    origins = _origins(where, parts)
    whole = []
    for part, x, y, ids in zip(parts, inputs, targets, origins, strict=True):
        try:
            whole.append(Examples(x, y, names, ids))
        except UserError as error:
            raise UserError(f"{where}, '{part.names[0]}' and '{part.names[1]}': {error}") from error
    if len(whole) == 2:
        return Source(name, whole[0], whole[1])
    (data,) = whole
    kept, held = stratified_split(data.strata, 0.2, seed=0, purpose=f"test images of {name}")
    return Source(name, data.select(kept), data.select(held), held_out=True)


def _targets(where: str, part: Part, *, labels: bool) -> Tensor:
    what, given = f"{where}: '{part.names[1]}'", part.targets
    if not isinstance(given, Tensor):
        given = as_array(what, given)
        if labels or (given.ndim == 1 and given.dtype.kind in "iuU"):
            return torch.from_numpy(labels_of(what, given))
    elif given.ndim == 1 and given.dtype in _INTEGERS:
        return torch.from_numpy(labels_of(what, given.detach().cpu().numpy()))
    targets = as_targets(what, given)
    # K labels of an example, each of which holds or does not.
    if targets.dtype == torch.int64 and targets.ndim == 2 and _truths(targets):
        return targets.float()
    return targets


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _truths(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def _classes(
    where: str, parts: Sequence[Part], targets: Sequence[Tensor], given: Any
) -> tuple[str, ...]:
    if any(own.dtype == torch.float32 for own in targets):
        return () if given is None else text_of(f"{where}: 'classes'", given)
    # As they were given, whose type may say what went wrong.
    found = {part.names[1]: as_array(where, part.targets) for part in parts}
    return class_names(where, found, given)


def _origins(where: str, parts: Sequence[Part]) -> list[Origins | None]:
    """Return whose examples those of each part are, named alike in all."""
    given = {
        place: _ids(f"{where}: '{part.names[2]}'", part.clients)
        for place, part in enumerate(parts)
        if part.clients is not None
    }
    if not given:
        return [None] * len(parts)
    if len({array.dtype.kind for array in given.values()}) > 1:
        raise UserError(f"{where}: clients are integers in one part and names in the other")
    values = np.unique(np.concatenate(list(given.values())))
    names = tuple(str(value) for value in values)
    return [
        Origins(torch.from_numpy(np.searchsorted(values, given[place])), names)
        if place in given
        else None
        for place in range(len(parts))
    ]


def _ids(what: str, given: Any) -> np.ndarray:
    array = as_array(what, given)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise UserError(
            f"{what} must be (N,) integers or names, got {array.dtype} {array.shape}: say of each "
            "example whose it is"
        )
    return array
