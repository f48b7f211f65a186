"""A client's local steps recorded once, as CUDA graphs, and replayed.

Everything that a round's steps read is put on the device beforehand: the examples of all batches
in the order in which they are taken, and the keys of all dropout calls. A step finds its own by
two counters on the device, which it moves on. So a step is one launch, and between the first and
the last the host computes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedkn.gpus import full_gpu
from fedkn.layers.kernel.dropout import dropout_keys, dropout_stream, keys_of
from fedkn.seeds import derive, torch_generator
from fedkn.training.batches import BatchPlan
from fedkn.training.captured import Captured
from fedkn.training.draws import Draws, own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.precision import training_scores
from fedkn.training.recordable import Counted, Held
from fedkn.training.rule import Acting, take_step

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask
    from fedkn.training.workspace import Workspace

__all__ = ["Capture", "PlannedSteps", "RecordedSteps", "StepRecorder"]

_LOG = logging.getLogger("flwr")


class Capture(Protocol):
    """Makes a function one that can be replayed: `Captured`, or a double of it."""

    def __call__(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Captured:
        """Return `function`, captured."""


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """A client's steps of one round, and what they are taken on.

    `examples` (N, C, H, W) and `targets` (N, ...) are on the model's device, `acting` are the rules
    that change a step, each with the vectors that it reads.
    """

    task: LocalTask
    plan: BatchPlan
    examples: Tensor
    targets: Tensor
    inputs: Inputs
    acting: Acting


class StepRecorder:
    """Records the local steps of one workspace, and keeps them for all clients and rounds.

    Attributes:
        refusal: why steps of this model cannot be recorded; empty while that is not known.
        draws: whether the model draws from the device's own generator. The seed of one step is
            then that of all which run at the same time.
    """

    def __init__(self, workspace: Workspace, capture: Capture = Captured) -> None:
        self.refusal = ""
        self.draws = False
        self._workspace = workspace
        self._capture = capture
        self._held = Held(workspace.model)
        self._calls: dict[object, int] = {}
        self._tables: _Tables | None = None
        self._graphs: dict[object, Captured] = {}

    def begin(self, planned: PlannedSteps) -> RecordedSteps | None:
        """Return the steps of `planned`, recorded where they were not; None where they cannot be.

        The workspace is as it is to be before the first step, and is left so.
        """
        task, plan, examples = planned.task, planned.plan, planned.examples
        if self.refusal or not plan.steps:
            return None
        rules = tuple(rule for rule, _ in planned.acting)
        setting = (task.train, task.goal, rules, self._held.values(), planned.inputs)
        try:
            with own_draws(examples.device, 0) as draws:
                if setting not in self._calls:
                    some = planned.inputs(examples[plan.steps[0][0].to(examples.device)])
                    self._calls[setting] = self._trial(some, task, draws)
                if self.refusal:
                    return None
                tables = self._with_room(planned, self._calls[setting])
                steps = RecordedSteps(self._workspace, tables, planned)
                for sizes in dict.fromkeys(map(_sizes, plan.steps)):
                    if (sizes, setting) not in self._graphs:
                        if len(self._graphs) >= _MOST_GRAPHS:
                            self._graphs.clear()
                        self._graphs[sizes, setting] = self._capture(
                            _step_of(self._workspace, tables, sizes, planned),
                            (*self._changed(), *tables.changed),
                        )
        except RuntimeError as error:
            if full_gpu(error):
                raise
            self._refuse((str(error).strip().splitlines() or [type(error).__name__])[0])
            return None
        steps.graphs = [self._graphs[_sizes(step), setting] for step in plan.steps]
        return steps

    def _changed(self) -> tuple[Tensor, ...]:
        return *self._workspace.optimizer.changed, *self._workspace.model.buffers()

    def _trial(self, x: Tensor, task: LocalTask, draws: Draws) -> int:
        """Return how many dropout calls a forward pass makes, and see whether it can be recorded.

        What a graph would repeat as it was: draws of the host's generators, numbers that modules
        count in Python.
        """
        model = self._workspace.model
        buffers = [buffer.clone() for buffer in model.buffers()]
        counted, host, device = Counted(model, task.goal), draws.host_state(), draws.device_state()
        with dropout_stream(0) as stream, torch.no_grad():
            training_scores(model, x, task.train.precision)
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        if draws.device_state() != device:
            self.draws = True
        if draws.host_state() != host or counted.put_back():
            self._refuse("its forward pass draws on the host, or counts in Python")
        return stream.calls

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        _LOG.warning(
            "steps of this model cannot be recorded (%s): they are launched call by call", reason
        )

    def _with_room(self, planned: PlannedSteps, calls: int) -> _Tables:
        """Return tables for so much, or for a chunk of it; graphs read them where they are."""
        examples, plan = planned.examples, planned.plan
        largest = max(map(_size, plan.steps))
        most = max(largest, _BYTES_AT_ONCE // max(1, examples[:1].nbytes))
        room = min(plan.examples, most)
        known = self._tables
        if known is None or not known.take(examples, planned.targets, room, calls):
            self._graphs.clear()
            room = min(max(256, 1 << (room - 1).bit_length()), most)
            calls = max(calls, 0 if known is None else known.keys.shape[1])
            self._tables = known = _Tables(self._workspace, planned, room, calls)
        return known


class RecordedSteps:
    """The steps of one client's round, ready to be taken one after another."""

    def __init__(self, workspace: Workspace, tables: _Tables, planned: PlannedSteps) -> None:
        self.graphs: list[Captured] = []
        self._workspace = workspace
        self._tables = tables
        self._planned = planned
        self._filled = 0
        tables.total.zero_()
        tables.rate.fill_(planned.task.learning_rate)
        for (_, own), (_, vectors) in zip(
            tables.acting(planned.acting), planned.acting, strict=True
        ):
            for place, vector in zip(own, vectors, strict=True):
                place.copy_(vector)
        self._fill(0)

    def take(self, number: int) -> None:
        """Take step `number`, which follows the one taken before."""
        if number == self._filled:
            self._fill(number)
        self.graphs[number].replay()
        self._workspace.optimizer.started = True

    @property
    def total(self) -> Tensor:
        """The sum of the losses of all examples so far, float64, on the device."""
        return self._tables.total

    def _fill(self, first: int) -> None:
        """Put the examples and keys of the next steps into the tables, as many as there is room."""
        planned, tables = self._planned, self._tables
        steps, task, inputs = planned.plan.steps, planned.task, planned.inputs
        end, examples = first, 0
        while end < len(steps) and examples + _size(steps[end]) <= len(tables.targets):
            examples += _size(steps[end])
            end += 1
        where = torch.cat([batch for step in steps[first:end] for batch in step])
        where = where.to(planned.examples.device)
        taken = planned.examples.index_select(0, where)
        wanted = planned.targets.index_select(0, where)
        if inputs.augments:
            pieces = list(map(_size, steps[first:end]))

            def augmented(some: Tensor) -> Tensor:
                generators = (
                    torch_generator(*_draw(task, "augment", step)) for step in range(first, end)
                )
                return inputs.augmented_pieces(some, pieces, generators)

            taken, wanted = augmented(taken), task.goal.moved(wanted, augmented)
        seeds = [
            derive(*_draw(task, "dropout", number), *((part,) if part else ()))
            for number in range(first, end)
            for part in range(len(steps[number]))
        ]
        keys = keys_of(torch.tensor(seeds).to(where.device), tables.keys.shape[1])
        tables.examples[:examples].copy_(taken)
        tables.targets[:examples].copy_(wanted)
        tables.keys[: len(seeds)].copy_(keys)
        tables.example.zero_()
        tables.batch.zero_()
        self._filled = end


class _Tables:
    """What recorded steps read and where they write it, at addresses that do not change."""

    def __init__(self, workspace: Workspace, planned: PlannedSteps, room: int, calls: int) -> None:
        device = workspace.device
        self.examples = planned.examples.new_empty((room, *planned.examples.shape[1:]))
        # Zeros, which are targets too: a step is tried before the tables are filled.
        self.targets = planned.targets.new_zeros((room, *planned.targets.shape[1:]))
        self.keys = torch.zeros((room, calls), dtype=torch.int64, device=device)
        self.offsets = torch.arange(room, device=device)
        self.example = torch.zeros(1, dtype=torch.int64, device=device)
        self.batch = torch.zeros_like(self.example)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.rate = torch.zeros((), dtype=workspace.optimizer.values.dtype, device=device)
        self._like = workspace.optimizer.values
        self._vectors: list[Tensor] = []

    @property
    def changed(self) -> tuple[Tensor, ...]:
        """What a step writes to."""
        return self.example, self.batch, self.total

    def acting(self, rules: Acting) -> Acting:
        """Return the `rules`, each with vectors of the tables to read, whichever rules they are."""
        while len(self._vectors) < sum(len(vectors) for _, vectors in rules):
            self._vectors.append(torch.zeros_like(self._like))
        places = iter(self._vectors)
        return tuple((rule, tuple(next(places) for _ in vectors)) for rule, vectors in rules)

    def take(self, examples: Tensor, targets: Tensor, room: int, calls: int) -> bool:
        """Whether so many such examples fit, each a batch with so many dropout calls."""
        own, given = (self.examples, self.targets), (examples, targets)
        return (
            all(
                (one.shape[1:], one.dtype) == (other.shape[1:], other.dtype)
                for one, other in zip(own, given, strict=True)
            )
            and len(self.targets) >= room
            and self.keys.shape[1] >= calls
        )


_BYTES_AT_ONCE = 1 << 26
"""Of examples in the tables: longer rounds are taken in chunks."""
_MOST_GRAPHS = 32
"""Kept for one workspace; each has memory of its own."""


def _step_of(
    workspace: Workspace, tables: _Tables, sizes: tuple[int, ...], planned: PlannedSteps
) -> Callable[[], None]:
    """Return a local step over batches of `sizes`, on the tables: `train_locally`'s."""
    model, optimizer, inputs = workspace.model, workspace.optimizer, planned.inputs
    train, acting = planned.task.train, tables.acting(planned.acting)
    goal = planned.task.goal
    size = sum(sizes)

    def step() -> None:
        optimizer.zero_grad()
        where = tables.example + tables.offsets[:size]
        scaled = torch.split(inputs(tables.examples.index_select(0, where)), list(sizes))
        wanted = torch.split(tables.targets.index_select(0, where), list(sizes))
        for x, y in zip(scaled, wanted, strict=True):
            with dropout_keys(tables.keys.index_select(0, tables.batch).squeeze(0)):
                loss = goal.mean_loss(training_scores(model, x, train.precision), y)
            share = None if len(sizes) == 1 else torch.full_like(loss, len(y) / size)
            loss.backward(share)  # type: ignore[no-untyped-call]  # torch annotates it so
            tables.total.add_(loss.detach(), alpha=len(y))
            tables.batch.add_(1)
        tables.example.add_(size)
        take_step(optimizer, acting, tables.rate, train, clip_norm=train.clip_norm)

    return step


def _sizes(step: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(len, step))


def _size(step: Sequence[Tensor]) -> int:
    return sum(map(len, step))


def _draw(task: LocalTask, purpose: str, step: int) -> tuple[int | str, ...]:
    return task.seed, purpose, task.round_, task.client, step
