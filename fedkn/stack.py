"""Named tensors end to end: one client's in one vector for each kind, many clients' as its rows.

Most models have dozens of small tensors. What is asked of all of them (are they finite, how far do
they lie from what was sent, what is their mean) is asked of a few long vectors instead, on the
device where these are: nothing is fetched to the host for one client or one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from fedkn.training.transfer import moved

__all__ = ["Flat", "Layout", "Run", "Stack", "StackRow", "distances", "rows_of"]

Arrays = Mapping[str, np.ndarray]


class Run(NamedTuple):
    """Tensors that lie side by side in the vector of a kind: from `begin` to `end` of it."""

    kind: int
    begin: int
    end: int
    names: tuple[str, ...]


class Layout:
    """Where each of the tensors `like` lies: in the vector of its kind, in their order.

    A kind is a dtype, of tensors in `apart` and of the others: parameters are asked for together,
    and what lies between them in a model's state would cut them in pieces.

    Attributes:
        names: of the tensors, in the order of `like`.
        kinds: for each kind its dtype and how many numbers it has.
    """

    def __init__(
        self, like: Mapping[str, np.ndarray | Tensor], apart: Collection[str] = ()
    ) -> None:
        chosen = frozenset(apart)
        found: dict[tuple[torch.dtype, bool], int] = {}
        sizes: list[int] = []
        self._places: dict[str, tuple[int, int, int, tuple[int, ...]]] = {}
        for name, value in like.items():
            dtype = value.dtype if isinstance(value, Tensor) else _torch_dtype(value.dtype)
            shape = tuple(value.shape)
            kind = found.setdefault((dtype, name in chosen), len(found))
            if kind == len(sizes):
                sizes.append(0)
            size = math.prod(shape)
            self._places[name] = (kind, sizes[kind], sizes[kind] + size, shape)
            sizes[kind] += size
        self.names = tuple(self._places)
        self.kinds = tuple(zip((dtype for dtype, _ in found), sizes, strict=True))
        self._key = (tuple(self._places.items()), self.kinds)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def place(self, name: str) -> tuple[int, int, int, tuple[int, ...]]:
        """Return the kind of a tensor, where it begins and ends in it, and its shape."""
        return self._places[name]

    def runs(self, names: Collection[str]) -> list[Run]:
        """Return where the tensors `names` lie, in as few pieces as there are.

        Raises:
            KeyError: a name that is not in the layout.
        """
        wanted = set(names)
        if unknown := wanted - self._places.keys():
            raise KeyError(f"no tensor named {min(unknown)}")
        pieces: dict[int, list[tuple[int, int, list[str]]]] = {}
        for name in (name for name in self.names if name in wanted):
            kind, begin, end, _ = self._places[name]
            found = pieces.setdefault(kind, [])
            if found and found[-1][1] == begin:
                before, _, listed = found[-1]
                found[-1] = (before, end, [*listed, name])
            else:
                found.append((begin, end, [name]))
        return [
            Run(kind, begin, end, tuple(listed))
            for kind, found in pieces.items()
            for begin, end, listed in found
        ]

    def named(self, run: Run, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors in the numbers of a `run` by name: views."""
        named = {}
        for name in run.names:
            _, begin, end, shape = self._places[name]
            named[name] = values[begin - run.begin : end - run.begin].reshape(shape)
        return named

    def joined(self, arrays: Arrays, run: Run, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return those of the `arrays` that lie in `run` end to end, on `device`."""
        flat = np.concatenate([np.asarray(arrays[name]).reshape(-1) for name in run.names])
        return torch.from_numpy(flat).to(device=device, dtype=dtype)


class Flat:
    """The tensors of one state, one vector for each kind of the `layout`."""

    def __init__(self, layout: Layout, parts: Sequence[Tensor]) -> None:
        self.layout = layout
        self.parts = tuple(parts)

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Tensor]) -> Flat | None:
        """Return a copy of `tensors`, None where they are not those of the `layout`.

        On the device of the first of them.
        """
        if tensors.keys() != set(layout.names):
            return None
        parts: list[list[Tensor]] = [[] for _ in layout.kinds]
        device = next((value.device for value in tensors.values()), _CPU)
        here = moved(tensors, device)
        for name in layout.names:
            value = here[name]
            kind, _, _, shape = layout.place(name)
            if value.shape != shape or value.dtype != layout.kinds[kind][0]:
                return None
            parts[kind].append(value.reshape(-1))
        # A copy, also of a single one.
        return cls(layout, [torch.cat(values) for values in parts])

    @classmethod
    def sent(cls, layout: Layout, arrays: Arrays) -> Flat:
        """Return a copy of `arrays` on the CPU, which must be those of the `layout`."""
        flat = Stack.of(layout, [arrays])
        return cls(layout, [part[0] for part in flat.parts])

    def to(self, device: torch.device) -> Flat:
        """Return it on `device`."""
        return Flat(self.layout, [part.to(device) for part in self.parts])

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the tensors, by name in their order."""
        parts = [part.clone() for part in self.parts]
        named = {}
        for name in self.layout.names:
            kind, begin, end, shape = self.layout.place(name)
            named[name] = parts[kind][begin:end].view(shape)
        return named


class Stack:
    """Many clients' tensors of one layout: for each kind of it a tensor (clients, numbers)."""

    def __init__(self, layout: Layout, parts: Sequence[Tensor], clients: int) -> None:
        """`clients`: how many, also where the layout has no tensors."""
        self.layout = layout
        self.parts = tuple(parts)
        self._clients = clients
        self._hosts: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, layout: Layout, states: Sequence[Arrays | Flat]) -> Stack:
        """Return a copy of `states`, one under the other.

        On the device of the first that is on another than the CPU, if there is one.
        Arrays must be of the layout's names, shapes and dtypes; others that they have are left out.
        """
        devices = (part.device for s in states if isinstance(s, Flat) for part in s.parts)
        device = next((one for one in devices if one != _CPU), _CPU)
        parts = [
            torch.empty((len(states), size), dtype=dtype, device=device)
            for dtype, size in layout.kinds
        ]
        if all(isinstance(state, Flat) for state in states):
            for kind, part in enumerate(parts):
                rows = [state.parts[kind] for state in states if isinstance(state, Flat)]
                torch.stack([row.to(device) for row in rows], out=part)
            return cls(layout, parts, len(states))
        for place, state in enumerate(states):
            if isinstance(state, Flat):
                for part, values in zip(parts, state.parts, strict=True):
                    part[place].copy_(values)
                continue
            here = [np.empty(size, _numpy_dtype(dtype)) for dtype, size in layout.kinds]
            for name in layout.names:
                kind, begin, end, _ = layout.place(name)
                here[kind][begin:end] = np.asarray(state[name]).reshape(-1)
            for part, row in zip(parts, here, strict=True):
                part[place].copy_(torch.from_numpy(row))
        return cls(layout, parts, len(states))

    def __len__(self) -> int:
        return self._clients

    def rows(self) -> list[StackRow]:
        """Return the clients' tensors, one mapping of arrays for each of them."""
        return [StackRow(self, place) for place in range(len(self))]

    def host(self, name: str) -> np.ndarray:
        """Return the clients' tensors of this `name` (clients, ...) on the host, read-only.

        All tensors of its kind are fetched with the first of them, by one transfer.
        """
        kind, begin, end, shape = self.layout.place(name)
        if kind not in self._hosts:
            values = self.parts[kind].cpu().numpy()
            values.flags.writeable = False
            self._hosts[kind] = values
        values = self._hosts[kind][:, begin:end]
        return values.reshape(len(values), *shape)


class StackRow(Mapping[str, np.ndarray]):
    """One client's tensors in a stack: arrays on the host by name, read-only, fetched when read."""

    def __init__(self, stack: Stack, place: int) -> None:
        self.stack = stack
        self.place = place

    def __getitem__(self, name: str) -> np.ndarray:
        kind, begin, end, shape = self.stack.layout.place(name)
        return self._host(kind, name)[self.place, begin:end].reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stack.layout.names)

    def __len__(self) -> int:
        return len(self.stack.layout.names)

    def _host(self, kind: int, name: str) -> np.ndarray:
        if kind not in self.stack._hosts:
            self.stack.host(name)
        return self.stack._hosts[kind]


def rows_of(
    states: Sequence[Arrays], names: Iterable[str]
) -> Iterator[tuple[Layout, Run, list[Tensor]]]:
    """Yield the tensors `names` in runs, and of every run the numbers (n,) of each of the `states`.

    Rows of stacks are taken where they are; anything else is stacked first.
    """
    wanted = set(names)
    if not wanted:
        return
    found = [state for state in states if isinstance(state, StackRow)]
    if len(found) < len(states) or any(one.stack.layout != found[0].stack.layout for one in found):
        like = {name: value for name, value in states[0].items() if name in wanted}
        found = Stack.of(Layout(like), states).rows()
    layout = found[0].stack.layout
    for run in layout.runs(wanted):
        yield (
            layout,
            run,
            [row.stack.parts[run.kind][row.place, run.begin : run.end] for row in found],
        )


def distances(states: Sequence[Arrays], sent: Arrays, names: Iterable[str]) -> list[float]:
    """Return for each of the `states` its Euclidean distance from what was `sent`.

    In float64, over all the tensors `names` together; one transfer brings them to the host.
    """
    if not states:
        return []
    norms: list[Tensor] = []
    for layout, run, rows in rows_of(states, names):
        start = layout.joined(sent, run, rows[0].device, torch.float64)
        # In the same memory for all clients, which stays in a processor's cache.
        move = torch.empty_like(start)
        norms.append(torch.stack([vector_norm(move.copy_(row).sub_(start)) for row in rows]))
    if not norms:
        return [0.0] * len(states)
    found: list[float] = vector_norm(torch.stack(norms), dim=0).tolist()
    return found


_CPU = torch.device("cpu")


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
