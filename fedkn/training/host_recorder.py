"""A client's local steps on the CPU, each kind recorded once and replayed without Python.

Half of a small network's step is what leads to its kernels: modules, autograd, dispatch. So a step
that was computed a few times as it comes is written down (`fedkn.training.operations`), and from
then on its operations are done one after another in C++. They are the same in the same order, so
the bits are the same; a recording whose first replay has others is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkn.layers.kernel.dropout import Stream, key_number
from fedkn.layers.native import library
from fedkn.models.hooks import watched_everywhere
from fedkn.tasks import Task
from fedkn.training.draws import Draws, own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.operations import CannotRecord, Operations, Reading, Telling
from fedkn.training.recordable import Counted, Held
from fedkn.training.rule import Acting
from fedkn.training.step_batches import LocalBatch, StepChunk

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask
    from fedkn.training.workspace import Workspace

__all__ = ["Compute", "HostRecorder", "HostSteps"]

_LOG = logging.getLogger("flwr")

Compute = Callable[[Sequence[LocalBatch], Draws, float], None]
"""Takes a step on batches, with these draws and this learning rate, as `LocalRound` does."""


class HostRecorder:
    """Records the local steps of one workspace on the CPU, and keeps them for all clients.

    Attributes:
        refusal: why steps of this model cannot be recorded; empty while that is not known.
        total: the sum of the losses of a round's examples so far, float64.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.refusal = ""
        self.total = torch.zeros((), dtype=torch.float64)
        self._workspace = workspace
        self._held = Held(workspace.model)
        self._vectors: list[Tensor] = []
        self._settings: dict[object, dict[tuple[int, ...], _Kind]] = {}

    def begin(
        self,
        task: LocalTask,
        inputs: Inputs,
        data: tuple[Tensor, Tensor],
        acting: Acting,
        compute: Compute,
    ) -> HostSteps | None:
        """Return what takes a round's steps; None where they cannot be recorded.

        `data` are the client's examples (N, ...) and targets (N, ...). The rules `acting` on the
        steps read their vectors where `HostSteps.acting` has them.
        """
        if self.refusal or not library.used():
            return None
        held = self._held.values()
        if self._held.watched or watched_everywhere():
            self._refuse("modules or parameters have hooks, which no replay calls")
            return None
        self.total.zero_()
        own = self._places(acting)
        rules = tuple(rule for rule, _ in acting)
        shapes = tuple((tensor.shape[1:], tensor.dtype) for tensor in data)
        setting = (task.train, task.goal, rules, inputs, shapes, held)
        kinds = self._settings.get(setting)
        if kinds is None:
            if len(self._settings) >= _MOST_SETTINGS:
                self._forget()
            kinds = self._settings[setting] = {}
        return HostSteps(self, own, kinds, task.goal, task.learning_rate, compute)

    def compute(self, steps: HostSteps, chunk: StepChunk, number: int, draws: Draws) -> None:
        """Take step `number` of the `chunk`, one of `steps`, as it comes.

        It is recorded once a few of its kind were taken.
        """
        sizes = chunk.sizes[number]
        kind = steps.kinds.get(sizes)
        if kind is None:
            if len(steps.kinds) >= _MOST:
                steps.kinds.clear()
            kind = steps.kinds[sizes] = _Kind()
        kind.seen += 1
        if self.refusal or kind.seen <= _WORTH:
            steps.compute(chunk.step(number), draws, steps.rate)
            return
        try:
            kind.recorded = self._recorded(steps, chunk, number, draws)
        except CannotRecord as error:
            self._refuse(str(error))

    def _recorded(self, steps: HostSteps, chunk: StepChunk, number: int, draws: Draws) -> _Recorded:
        """Take the step as it comes, and return a recording that takes the same to the bit.

        Raises CannotRecord if there is none; the step is taken.
        """
        batches, optimizer = chunk.step(number), self._workspace.optimizer
        changed = (*optimizer.changed, *self._workspace.model.buffers(), self.total)
        before = [tensor.clone() for tensor in changed]
        failure: CannotRecord | None = None
        try:
            recorded = self._written(steps, batches)
        except CannotRecord as error:
            failure = error
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failure = CannotRecord((str(error).strip().splitlines() or [type(error).__name__])[0])
        _put(changed, before)
        steps.compute(batches, draws, steps.rate)
        if failure is not None:
            raise failure
        after = [tensor.clone() for tensor in changed]
        _put(changed, before)
        try:
            recorded.replay(chunk, number, number + 1, steps.rate)
        except RuntimeError as error:
            failure = CannotRecord((str(error).strip().splitlines() or ["no reason given"])[0])
        same = all(map(_same_bits, changed, after))
        _put(changed, after)
        if failure is None and not same:
            failure = CannotRecord("a replay of it ends in other numbers")
        if failure is not None:
            raise failure
        return recorded

    def _written(self, steps: HostSteps, batches: Sequence[LocalBatch]) -> _Recorded:
        """Compute a step on other examples, and return what was written down of it."""
        others = [
            LocalBatch(_other(batch.x), batch.targets.flip(0), _SEED + number)
            for number, batch in enumerate(batches)
        ]
        keys = {
            key_number(batch.dropout, call): (number, call)
            for number, batch in enumerate(others)
            for call in range(1, _MOST_CALLS + 1)
        }
        telling = Telling({key: place for place, key in enumerate(keys)}, _RATE)
        inputs = [tensor for batch in others for tensor in (batch.x, batch.targets)]
        operations = Operations(inputs, telling)
        counted = Counted(self._workspace.model, steps.goal)
        with own_draws(self._workspace.device, 0) as draws:
            watched, python = _Watched(draws, operations), draws.python_state()
            try:
                with library.recording(), Reading(), operations:
                    steps.compute(others, watched, _RATE)
            finally:
                changed = counted.put_back()
            if changed or draws.python_state() != python:
                raise CannotRecord(
                    "its forward pass draws in Python, counts there or replaces buffers"
                )
        if sum(stream.calls for stream in watched.streams) != len(operations.used):
            raise CannotRecord("its dropout masks are drawn in Python")
        places = list(keys.values())
        used = sorted(operations.used)
        return _Recorded(operations.finished(used), [places[n] for n in used], operations.draws)

    def taken(self) -> None:
        """Note that steps were replayed."""
        self._workspace.optimizer.started = True

    def _places(self, acting: Acting) -> Acting:
        """Return `acting` with the same vectors in places that do not change."""
        like = self._workspace.optimizer.values
        while len(self._vectors) < sum(len(vectors) for _, vectors in acting):
            self._vectors.append(torch.zeros_like(like))
        places = iter(self._vectors)
        return tuple(
            (rule, tuple(next(places).copy_(vector) for vector in vectors))
            for rule, vectors in acting
        )

    def _forget(self) -> None:
        known = [kind.recorded for kinds in self._settings.values() for kind in kinds.values()]
        self._settings.clear()
        if not any(known):
            self._refuse("its modules hold other things in every round")

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        _LOG.info(
            "steps of this model are not recorded (%s): they are computed call by call", reason
        )


@dataclass(frozen=True, eq=False)
class HostSteps:
    """The steps of one client's round.

    Attributes:
        acting: its rules, with vectors that stay in place.
        kinds: the steps known so far, by the sizes of their batches.
    """

    recorder: HostRecorder
    acting: Acting
    kinds: dict[tuple[int, ...], _Kind]
    goal: Task
    rate: float
    compute: Compute

    def quiet(self, steps: Sequence[Sequence[Tensor]]) -> bool:
        """Whether `steps` can be taken without the process's generators: recorded, none draws."""
        for step in steps:
            kind = self.kinds.get(tuple(map(len, step)))
            if kind is None or kind.recorded is None or not kind.recorded.quiet:
                return False
        return True

    def take(self, chunks: Iterable[StepChunk], draws: Draws | None = None) -> None:
        """Take all steps, in their order; they need no `draws` where they are `quiet`."""
        for chunk in chunks:
            number = 0
            while number < len(chunk.sizes):
                kind, end = self.kinds.get(chunk.sizes[number]), number + 1
                if kind is not None and kind.recorded is not None:
                    while end < len(chunk.sizes) and chunk.sizes[end] == chunk.sizes[number]:
                        end += 1
                    kind.recorded.replay(chunk, number, end, self.rate)
                    self.recorder.taken()
                else:
                    assert draws is not None
                    self.recorder.compute(self, chunk, number, draws)
                number = end

    @property
    def total(self) -> Tensor:
        """The sum of the losses of all examples so far, float64."""
        return self.recorder.total


_WORTH = 8
"""Steps of a kind that are computed as they come before it is recorded, which takes as long."""
_MOST, _MOST_SETTINGS = 64, 8
"""Kinds of steps kept for one setting, and settings for one workspace."""
_MOST_CALLS = 512
"""Dropout calls of one forward pass that a recording knows apart."""

# What nothing else in a step is equal to.
_RATE = 0.6180339887498949
_SEED = 0x5DEECE66D1CE4E5B
_OTHER = 0.7182818284590452


@dataclass(eq=False)
class _Kind:
    """Steps on batches of the same shapes: how many were computed as they came; the recording."""

    seen: int = 0
    recorded: _Recorded | None = None


class _Recorded:
    """A step written down, and which dropout keys it takes: batch and call of each."""

    def __init__(self, step: Any, keys: Sequence[tuple[int, int]], draws: bool) -> None:
        self._step = step
        self._keys = keys
        self._draws = draws

    @property
    def quiet(self) -> bool:
        """Whether nothing is drawn in it, nor could be in another pass of the model."""
        return not self._draws and not self._keys

    def replay(self, chunk: StepChunk, begin: int, end: int, rate: float) -> None:
        """Take steps `begin` to `end` of the `chunk`, which are all of its kind."""
        sizes, row = chunk.sizes[begin], chunk.rows[begin]
        rows = slice(row, row + sum(sizes) * (end - begin))
        keys: list[int] = []
        seeds: list[int] = []
        for step in range(begin, begin if self.quiet else end):
            own = [chunk.seed(step, part) for part in range(len(sizes))]
            keys += [key_number(own[part], call) for part, call in self._keys]
            seeds += own
        self._step.take(chunk.x[rows], chunk.targets[rows], sizes, keys, seeds, rate)


class _Watched(Draws):
    """The process's generators; which dropout streams were opened, the recording is told."""

    def __init__(self, draws: Draws, operations: Operations) -> None:
        self._generators = draws._generators
        self._operations = operations
        self.streams: list[Stream] = []

    @contextmanager
    def seeded(self, seed: int) -> Iterator[Stream]:
        """As `Draws`."""
        self._operations.seed(len(self.streams))
        with super().seeded(seed) as stream:
            self.streams.append(stream)
            yield stream


def _other(x: Tensor) -> Tensor:
    """Return other examples of the same kind, laid out alike."""
    return torch.empty_strided(x.shape, x.stride()).copy_(x.flip(0).mul(_OTHER))


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal, NaNs included."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
