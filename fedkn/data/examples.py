"""What every source becomes: examples in memory or memory-mapped, with what is to be predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedkn.data.split import limited
from fedkn.data.values import INPUT_DTYPES, TARGET_DTYPES, check_shape, dtype_name
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["Examples", "Origins", "Source"]


@dataclass(frozen=True, eq=False)
class Origins:
    """Where each example comes from: whose it is, or of which domain.

    Attributes
    ----------
    ids
        int64 tensor (N,), indices into `names`.
    names
        Of the clients or domains, whether or not these examples have one of each.

    Raises
    ------
    UserError
        An id that is none, or a name that is no text, empty, or another one's.
    """

    ids: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_names("client", self.names)
        _check_ids("client ids", self.ids, len(self.names))

    def select(self, chosen: Tensor) -> Self:
        """Return the origins of the examples at the int64 indices `chosen` (M,)."""
        return type(self)(self.ids[chosen.to(self.ids.device)], self.names)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs of one shape, and a target for each.

    Attributes
    ----------
    inputs
        (N, F), (N, C, L), (N, C, H, W) or (N, C, D, H, W), of one of `INPUT_DTYPES`: uint8 are
        images of values 0..255. May be backed by a memory-mapped file.
    targets
        int64 or float32 tensor (N, ...). Integers (N,) are the example's class, (N, H, W) each
        pixel's, where a number of none of the classes may say that a pixel has none; floating
        point is (N,) or (N, K) numbers.
    classes
        Names of the classes, whether or not these examples have each of them; of K labels, where
        targets are floating point. Empty where targets have no names.
    origins
        Whose each example is, or of which domain, where that is known.

    Raises
    ------
    UserError
        A dtype, a shape or a class does not fit this description; a class has no name, a name
        that is no text, or another one's.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()
    origins: Origins | None = None

    def __post_init__(self) -> None:
        _check_names("class", self.classes)
        _check_inputs(self.inputs)
        _check_targets(self.targets, len(self.inputs), self.classes)
        if self.origins is not None and len(self.origins.ids) != len(self.inputs):
            raise UserError(
                f"{len(self.inputs)} examples but {len(self.origins.ids)} client ids: give one each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where targets have no names."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W) of an image."""
        return tuple(self.inputs.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """The class of each example, int64 (N,); None where an example has no one class."""
        return self.targets if self.classes and _one_class_each(self.targets) else None

    @property
    def strata(self) -> Tensor:
        """Integers (N,) by which what is set aside is drawn evenly.

        The origins where they are known, so that every client gives its part; else the classes;
        else all the same, so that the draw is one among all.
        """
        if self.origins is not None:
            return self.origins.ids
        labels = self.labels
        return torch.zeros(len(self), dtype=torch.int64) if labels is None else labels

    def select(self, indices: Tensor | np.ndarray) -> Self:
        """Return a copy of the examples at the integer `indices` (M,), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            inputs=self.inputs[chosen.to(self.inputs.device)],
            targets=self.targets[chosen.to(self.targets.device)],
            origins=self.origins and self.origins.select(chosen),
        )

    def between(self, begin: int, end: int) -> Self:
        """Return the examples from `begin` up to `end` as they lie in memory, not a copy."""
        origins = self.origins
        return replace(
            self,
            inputs=self.inputs[begin:end],
            targets=self.targets[begin:end],
            origins=origins and Origins(origins.ids[begin:end], origins.names),
        )

    def limited(self, limit: int, part: str) -> Self:
        """Return `limit` of the examples (0: all), chosen by `fedkn.data.split.limited`."""
        chosen = limited(self.strata, limit, part)
        return self if chosen is None else self.select(chosen)

    def to(self, device: torch.device | str) -> Self:
        """Return the same data on `device`."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def joined(self, other: Examples) -> Self:
        """Return these examples and then those of `other`, which has the same classes."""
        origins = None
        if self.origins is not None and other.origins is not None:
            origins = Origins(torch.cat([self.origins.ids, other.origins.ids]), self.origins.names)
        return replace(
            self,
            inputs=torch.cat([self.inputs, other.inputs]),
            targets=torch.cat([self.targets, other.targets]),
            origins=origins,
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: training examples, which are partitioned among clients, and test examples.

    Attributes
    ----------
    held_out
        Whether the test examples are a part of what would otherwise be training examples; False
        where whoever made the data set them apart.
    notes
        What was left out or passed over when it was loaded, in sentences that can be shown.

    Raises
    ------
    UserError
        A part is empty, there is only one class, or the two parts differ in classes, in the shape
        or type of inputs, or in those of targets.
    """

    name: str
    train: Examples
    test: Examples
    held_out: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name = printable(self.name, 120)
        for part, data in (("training", self.train), ("test", self.test)):
            if len(data) == 0:
                raise UserError(f"source '{name}' has no {part} examples")
        if self.num_classes == 1 and self.train.targets.dtype == torch.int64:
            only = printable(", ".join(self.train.classes))
            raise UserError(
                f"source '{name}' has one class only ({only}): a classifier needs at least two"
            )
        if self.train.classes != self.test.classes:
            raise UserError(f"source '{name}': training and test classes differ")
        for kind, train, test in (
            ("inputs", self.train.inputs, self.test.inputs),
            ("targets", self.train.targets, self.test.targets),
        ):
            # Masks may be of the images' own size, but of one.
            if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
                raise UserError(
                    f"source '{name}': training {kind} are {_shape(train)} but test {kind} are "
                    f"{_shape(test)}: give both the same"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where targets have no names."""
        return self.train.num_classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W) of an image."""
        return self.train.shape


def _check_names(kind: str, names: tuple[str, ...]) -> None:
    known: dict[str, int] = {}
    for label, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{kind} {label} has no name")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the name of {kind} {label}, '{printable(name)}', is no text: give it in Unicode"
            ) from None
        if name in known:
            kinds = {"class": "classes", "client": "clients"}[kind]
            raise UserError(
                f"{kinds} {known[name]} and {label} are both called '{printable(name)}': give each "
                "a name of its own"
            )
        known[name] = label


def _check_inputs(inputs: Tensor) -> None:
    if inputs.dtype not in INPUT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
        raise UserError(f"inputs must be one of {names}, got {dtype_name(inputs)}")
    check_shape("inputs", inputs)


def _check_targets(targets: Tensor, inputs: int, classes: tuple[str, ...]) -> None:
    if targets.dtype not in TARGET_DTYPES or targets.ndim < 1:
        raise UserError(
            "targets must be an int64 or float32 tensor (N, ...), got "
            f"{dtype_name(targets)} {tuple(targets.shape)}"
        )
    if len(targets) != inputs:
        raise UserError(f"{inputs} inputs but {len(targets)} targets: give one target each")
    if 0 in targets.shape[1:]:
        raise UserError(f"targets of an example have no values: got {tuple(targets.shape)}")
    if not classes:
        return
    if targets.dtype == torch.int64:
        if _one_class_each(targets):
            _check_ids("targets", targets, len(classes))
    elif targets.shape[1:] != (len(classes),) and (targets.ndim > 1 or len(classes) > 1):
        raise UserError(
            f"{len(classes)} classes, but targets {tuple(targets.shape)}: floating-point targets "
            "are (N, K), with K names of classes or none"
        )


def _one_class_each(targets: Tensor) -> bool:
    return targets.dtype == torch.int64 and targets.ndim == 1


def _check_ids(what: str, ids: Tensor, names: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim < 1:
        raise UserError(
            f"{what} must be an int64 tensor (N,), got {dtype_name(ids)} {tuple(ids.shape)}"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < names:
        raise UserError(
            f"{what} must lie in 0..{names - 1}, found {int(ids.min())}..{int(ids.max())}"
        )


def _shape(tensor: Tensor) -> str:
    shape = "x".join(str(side) for side in tensor.shape[1:])
    return f"{dtype_name(tensor)} {shape or '(one number)'}"
