"""A source of somebody's own: a function that returns arrays, tensors or torch data sets."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkn.data.assembly import Part, assembled
from fedkn.data.examples import Examples, Source
from fedkn.data.huggingface import is_huggingface, parts_of
from fedkn.data.items import is_dataset, read_items
from fedkn.data.values import as_inputs
from fedkn.data.vision import with_torchvision
from fedkn.errors import FedknError, UserError
from fedkn.references import where_raised
from fedkn.seeds import derive
from fedkn.text import printable

__all__ = ["load_own_source"]

_KEYS = ("inputs", "targets", "clients")
_TEST_KEYS = ("test_inputs", "test_targets", "test_clients")
_PARTS = ("train", "test")
_FIX = (
    "return (inputs, targets), a mapping with 'inputs' and 'targets', a torch Dataset, or (train, "
    "test) of either"
)


def load_own_source(
    name: str, function: Any, root: Path | None, options: Mapping[str, Any]
) -> Source:
    """Return what `function` gives as the source `name`.

    `function` is called with the options as keyword arguments, and with `root` (a path, or None
    where ``data.root`` is not set) if it takes one. It may draw at random: it always finds the
    same state in PyTorch's, NumPy's and Python's generators, which afterwards are as they were. It
    must return the same data at every call, on which a run insists (`Fingerprint`).

    It returns one of

    - a `Source`;
    - a mapping with ``inputs`` and ``targets``, and perhaps ``clients`` (whose each example is),
      ``classes`` (their names), and ``test_inputs``, ``test_targets``, ``test_clients``;
    - a mapping with ``train``, and perhaps ``test`` and ``classes``; or (train, test): each a
      mapping, a tuple or a data set as below;
    - (inputs, targets) or (inputs, targets, clients);
    - a `Dataset` or `DatasetDict` of Hugging Face (`fedkn.data.huggingface`);
    - a torch `Dataset` of (input, target) or (input, target, client), which is read through once,
      or `Examples`.

    Arrays and tensors have the example on the first axis, and are taken as `fedkn.data.values`
    says. Without test examples a fifth is held out.

    Raises
    ------
    UserError
        It cannot be called so, fails, or returns something else, in one line that says what to
        change.
    """
    where = f"source '{printable(name, 120)}'"
    if not callable(function):
        raise UserError(f"{where} is no function: name one that returns inputs and targets")
    arguments = _arguments(where, function, root, options)
    with _seeded(name):
        try:
            returned = with_torchvision(lambda: function(**arguments))
            return _source(name, where, returned)
        except FedknError:
            raise
        # Somebody's function may fail of anything.
        except Exception as error:
            raise UserError(
                f"{where} failed: {type(error).__name__}: {printable(error, 200)}"
                f"{where_raised(error)}"
            ) from error


def _arguments(
    where: str, function: Callable[..., Any], root: Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    arguments = dict(options)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return arguments
    if "root" in signature.parameters and "root" not in arguments:
        if root is not None:
            arguments["root"] = root
        elif signature.parameters["root"].default is inspect.Parameter.empty:
            raise UserError(f"{where} needs data.root (--root PATH)")
    elif root is not None:
        raise UserError(f"{where} takes no root: leave data.root out, or let the function take one")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{where}: {printable(error)}; it takes {printable(signature, 200)}: set "
            "data.options.NAME for each"
        ) from None
    return arguments


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Give all global generators a state of their own for a while."""
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - theirs, put back
    with torch.random.fork_rng():
        seed = derive(0, "source", name)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002


def _source(name: str, where: str, returned: Any) -> Source:
    if isinstance(returned, Source):
        for part, data in (("training", returned.train), ("test", returned.test)):
            as_inputs(f"{where}: {part} inputs", data.inputs)
            as_inputs(f"{where}: {part} targets", data.targets.reshape(len(data), -1))
        return replace(returned, name=name)
    try:
        parts, classes = _parts(where, returned)
        return assembled(name, where, parts, classes)
    except UserError as error:
        if not _is_pair(returned):
            raise
        raise UserError(
            f"{error} (what it returned, {_kind(returned)}, is taken for (train, test): inputs and "
            "targets are arrays, tensors or lists of numbers)"
        ) from error


def _parts(where: str, returned: Any) -> tuple[list[Part], Any]:
    """Return the parts and the names of the classes, if those are given."""
    if is_huggingface(returned):
        return parts_of(where, returned)
    if isinstance(returned, Mapping):
        return _of_mapping(where, returned)
    if _is_pair(returned):
        return _pair(where, *returned)
    if isinstance(returned, tuple | list) and not _are_arrays(returned):
        raise UserError(f"{where} returned {_kind(returned)}: {_FIX}")
    part, classes = _part(where, returned, "")
    return [part], classes


def _of_mapping(where: str, given: Mapping[Any, Any]) -> tuple[list[Part], Any]:
    known = (*_PARTS, *_KEYS, *_TEST_KEYS, "classes")
    if unknown := [key for key in given if key not in known]:
        raise UserError(
            f"{where} returned a mapping with {printable(unknown, 120)}: give {', '.join(_PARTS)} "
            f"and classes, or {', '.join((*_KEYS, *_TEST_KEYS))} and classes"
        )
    classes = given.get("classes")
    if "train" in given:
        if others := [key for key in given if key not in (*_PARTS, "classes")]:
            raise UserError(f"{where} returned both 'train' and '{others[0]}': leave one out")
        if given.get("test") is None:
            part, found = _part(where, given["train"], "train")
            parts = [part]
        else:
            parts, found = _pair(where, given["train"], given["test"])
        return parts, found if classes is None else classes
    tests = any(given.get(key) is not None for key in _TEST_KEYS)
    parts = []
    for keys in (_KEYS, _TEST_KEYS) if tests else (_KEYS,):
        inputs, targets, clients = keys
        if missing := [key for key in (inputs, targets) if given.get(key) is None]:
            raise UserError(f"{where} returned a mapping without '{missing[0]}': {_FIX}")
        parts.append(Part(given[inputs], given[targets], given.get(clients), keys))
    return parts, classes


def _pair(where: str, train: Any, test: Any) -> tuple[list[Part], Any]:
    (first, classes), (second, others) = _part(where, train, "train"), _part(where, test, "test")
    if classes is not None and others is not None and [*classes] != [*others]:
        raise UserError(f"{where}: the data for training and those for tests differ in classes")
    return [first, second], others if classes is None else classes


def _part(where: str, given: Any, part: str) -> tuple[Part, Any]:
    """Return one part and the names of the classes that its data set has, if it has any."""
    inputs, targets, clients = (f"{part} {key}".strip() for key in _KEYS)
    called = (inputs, targets, clients)
    if is_huggingface(given) and not isinstance(given, dict):
        (found,), classes = parts_of(where, given)
        return found, classes
    if isinstance(given, Mapping):
        if {*given} - {*_KEYS} or not {"inputs", "targets"} <= {*given}:
            raise UserError(
                f"{where}: '{part}' is a mapping with {printable([*given], 120)}: give inputs and "
                "targets, and perhaps clients"
            )
        return Part(given["inputs"], given["targets"], given.get("clients"), called), None
    if isinstance(given, Examples):
        origins = given.origins
        ids = None if origins is None else [origins.names[i] for i in origins.ids.tolist()]
        return Part(given.inputs, given.targets, ids, called), given.classes or None
    if isinstance(given, tuple | list) and _are_arrays(given):
        x, y, *rest = given
        return Part(x, y, rest[0] if rest else None, called), None
    if is_dataset(given) and not _is_array(given):
        shown = f"{where}: {part}" if part else where
        return read_items(shown, given, called), getattr(given, "classes", None)
    raise UserError(f"{where} {f'gives as {part}' if part else 'returned'} {_kind(given)}: {_FIX}")


def _is_pair(returned: Any) -> bool:
    """Whether something is taken for (train, test)."""
    given = isinstance(returned, tuple | list) and len(returned) == 2
    return given and not _are_arrays(returned)


def _are_arrays(given: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a tuple holds inputs, targets and perhaps clients, not parts that hold them."""
    return len(given) in (2, 3) and all(_is_array(one) for one in given)


def _is_array(one: Any) -> bool:
    if isinstance(one, list):
        # Of numbers, names, or lists of them; a list of two arrays is a part.
        return not one or not isinstance(one[0], Tensor | np.ndarray | Mapping | tuple)
    if isinstance(one, Tensor | np.ndarray):
        return True
    # Tables and columns of pandas and its like; sparse arrays, to be refused by name.
    return hasattr(one, "shape") and (hasattr(one, "__array__") or hasattr(one, "toarray"))


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        inside = ", ".join(type(one).__name__ for one in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inside}{', …' if value[4:] else ''})"
    return "nothing" if value is None else f"a {type(value).__name__}"
