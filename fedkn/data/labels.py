"""Integer targets as classes: which there are, and what numbers that are none of a class say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedkn.errors import UserError

__all__ = ["class_names", "labels_of", "text_of"]

# So many classes may be there with a few examples of a few of them, as on a device.
_FEW_CLASSES = 100
# Beyond any number of classes; here so that no label overflows int64.
_LARGEST = 2**31 - 1
_RENUMBER = (
    "labels count from 0; renumber them by numpy.unique(labels, return_inverse=True)[1], or add "
    "'classes', an array of one name for each label"
)


def labels_of(what: str, labels: np.ndarray) -> np.ndarray:
    """Return labels as int64 (N,), none of them negative.

    Raises
    ------
    UserError
        They are no integers from 0, one for each example; `what` names them.
    """
    if labels.ndim != 1:
        raise UserError(
            f"{what} must be one-dimensional, got {labels.shape}: give {_flat(labels)} instead"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} must hold integers, got {labels.dtype}: {_integers(labels)}")
    if labels.size and labels.min() < 0:
        raise UserError(
            f"{what} holds {labels.min()} (first at index {int(labels.argmin())}): labels count "
            "from 0; remove examples without a label"
        )
    if labels.size and labels.max() > _LARGEST:
        raise UserError(f"{what} holds {labels.max()}{_perhaps_negative(labels)}: {_RENUMBER}")
    return labels.astype(np.int64)


def _flat(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return "labels.argmax(1), if these are one-hot,"
    return "labels.ravel()"


def _integers(labels: np.ndarray) -> str:
    if labels.dtype == bool:
        return "store labels.astype(int)"
    if np.issubdtype(labels.dtype, np.floating):
        bad = ~np.isfinite(labels) | (labels != np.floor(labels))
        if bad.any():
            return f"{labels[bad][0]} is no label; remove examples without one"
        return "store labels.astype(int)"
    return "store labels from 0, and the names of the classes as 'classes'"


def _perhaps_negative(labels: np.ndarray) -> str:
    """Return a hint where the largest label is what -1 becomes in a type without a sign."""
    unsigned = np.issubdtype(labels.dtype, np.unsignedinteger)
    if unsigned and labels.size and labels.max() == np.iinfo(labels.dtype).max:
        return f", which is -1 stored as {labels.dtype}"
    return ""


def class_names(
    where: str, targets: Mapping[str, np.ndarray], given: Any = None
) -> tuple[str, ...]:
    """Return the names of the classes that integer `targets` are of, having checked that they are.

    Parameters
    ----------
    where
        Names the data.
    targets
        By what names them: integers, labels (N,) or masks (N, ...), of all parts of the data.
    given
        The names of the classes, one-dimensional text; None: numbers up to the largest target.

    Raises
    ------
    UserError
        A label is of none of the classes, or the numbers are none that count classes.
    """
    names = None if given is None else text_of(f"{where}: 'classes'", given)
    for what, own in targets.items():
        # A pixel may be of no class, which the task knows.
        if names is None or not own.size or own.ndim > 1:
            continue
        if own.max() >= len(names) or own.min() < 0:
            odd = own.max() if own.max() >= len(names) else own.min()
            raise UserError(
                f"{where}: '{what}' must lie in 0..{len(names) - 1}, because 'classes' has "
                f"{len(names)} names, found {odd}{_perhaps_negative(own)}"
            )
    return _numbered(where, list(targets.values())) if names is None else names


def text_of(what: str, given: Any) -> tuple[str, ...]:
    """Return names, one-dimensional text, as a tuple. Raises UserError if they are none."""
    array = np.asarray(given)
    if array.dtype.kind != "U" or array.ndim != 1:
        raise UserError(
            f"{what} must be a one-dimensional array of text, got {array.dtype} {array.shape}"
        )
    return tuple(str(name) for name in array)


def _numbered(where: str, targets: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return the numbers up to the largest label, unless that makes empty classes by mistake."""
    # Below 0 there are only pixels that are of no class: labels were looked at before.
    present = np.unique(np.concatenate([np.unique(own[own >= 0]) for own in targets]))
    if not present.size:
        return ("0",)
    largest, count = int(present[-1]), len(present)
    if largest + 1 > max(_FEW_CLASSES, 2 * count):
        hints = [_perhaps_negative(own) for own in targets]
        raise UserError(
            f"{where}: the labels are {count} different numbers up to {largest}{max(hints)}: "
            f"{_RENUMBER}"
        )
    if present[0] > 0:
        raise UserError(
            f"{where}: the labels run from {present[0]} to {largest}, and none is 0: labels count "
            f"from 0; subtract {present[0]}, or add 'classes', an array of {largest + 1} names, if "
            "the first ones have no example here"
        )
    return tuple(str(label) for label in range(largest + 1))
