"""What an algorithm may change of a client's local training: the protocol of its client half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.training.optimizer import FlatSGD

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = [
    "OWN_MODEL",
    "Acting",
    "AsideStep",
    "BegunRules",
    "LocalRule",
    "Vectors",
    "carried_part",
    "take_step",
    "takes_aside",
]

Vectors = tuple[Tensor, ...]

OWN_MODEL = "own/"
"""What a client carries under this and a tensor's name is that of its own model, to evaluate."""


@dataclass(frozen=True)
class LocalRule:
    """The client half of an algorithm in one round. This one is FedAvg's: it adds nothing.

    A rule is its numbers alone, which the server told: equal rules take equal steps, so that steps
    which were recorded for one client serve the others. The tensors that its steps read are made by
    `begin`, which returns them, and are given back to whatever needs them.

    `gradient`, `limit`, `correct` and `stacked` change the gradients in place by operations on
    tensors, which may be recorded into a CUDA graph: nothing else may decide what they do, and what
    they read stays where it is and as it was.
    """

    alone: ClassVar[str] = ""
    """Why clients under this rule cannot be trained together, stacked; empty if they can."""
    keeps_model: ClassVar[bool] = False
    """Whether a client keeps a model of its own, whole, beside the one that it sends."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Let a rule be used alone that changes steps and does not say how for stacked clients."""
        super().__init_subclass__(**settings)
        changes = any(_changed(cls, method) for method in ("gradient", "correct", "aside"))
        if changes and not cls.alone and not _changed(cls, "stacked"):
            cls.alone = f"{cls.__name__} changes the steps of one client at a time"

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule of a round, by what the server half tells and gives the clients.

        `told` is the config of the training message, `given` the tensors beside the model's.
        Raises UserError if what it needs is not there.
        """
        del told, given
        return cls()

    @classmethod
    def stays(cls, config: ExperimentConfig, model: nn.Module) -> frozenset[str]:
        """Return the names of `model`'s parameters that stay on the client; most share all.

        Server and client ask before the first round: raises UserError if `model` cannot be trained
        under the rule.
        """
        del config, model
        return frozenset()

    def on(self, config: ExperimentConfig, model: nn.Module) -> Self:
        """Return the rule for the parameters of `model`, where it is not the same for all."""
        del config, model
        return self

    @property
    def prelude(self) -> tuple[LocalRule, int] | None:
        """The rule of a pass before its own, from whose end its own begins, and that pass's epochs.

        It is over the same batches, and nothing that it carries is kept.
        """
        return None

    @property
    def own(self) -> LocalRule | None:
        """The rule by which a client then trains its own model, from where that was.

        It is over the same batches. It is `given` the global model as it was received, and what it
        carries is not kept. A rule that returns None trains it otherwise, if it keeps one.
        """
        return None

    @property
    def acts(self) -> bool:
        """Whether it changes the gradient of a step."""
        return False

    @property
    def carries(self) -> bool:
        """Whether a client keeps something for it from round to round."""
        return False

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Prepare the first step from the model that was loaded; return what all steps read.

        Vectors of the optimizer's kind, and laid out as `FlatSGD.values` is.
        """
        del optimizer, task
        return ()

    def aside(self, step: AsideStep, *begun: Tensor) -> None:
        """Do what else a step is for, before it is taken: for a model beside the one that is sent.

        What is left of the optimizer's values and velocity must be what was found. Steps of a rule
        that has this are neither recorded nor stacked, and `begun` may be written to.
        """
        del step, begun

    def gradient(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Add to the gradient of the loss that of what the rule adds to the loss: then clipped."""
        del values, gradients, begun

    def limit(
        self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, stacked: bool
    ) -> None:
        """Limit that gradient parameter by parameter, in place, before its whole norm is clipped.

        Of one client, or `stacked` of K at once: then every tensor has a first axis of K.
        """
        del values, gradients, stacked

    def correct(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Add to the gradient after it was clipped, and weight decay added."""
        del values, gradients, begun

    def stacked(self, values: list[Tensor], gradients: list[Tensor], begun: list[Tensor]) -> None:
        """`gradient` for K clients at once, on one tensor (K, …) a parameter.

        `begun` are the values with which the round began. Not called where `alone` says why not.
        """
        del values, gradients, begun

    def end(
        self, optimizer: FlatSGD, task: LocalTask, steps: int, begun: Vectors
    ) -> dict[str, Tensor]:
        """Return what the client carries to its next round, by name, after so many `steps`."""
        del optimizer, task, steps, begun
        return {}

    def sent(
        self, trained: Mapping[str, Tensor], received: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what is sent for the shared tensors that were `trained` from those `received`."""
        del received
        return dict(trained)


Acting = tuple[tuple[LocalRule, Vectors], ...]


@dataclass(frozen=True, eq=False)
class AsideStep:
    """A step that is about to be taken, to whom takes one beside it.

    Attributes:
        optimizer: of the model that is sent. train, learning_rate: of the step.
        differentiate: put the gradient of the step's loss at the optimizer's present values into
            its gradients, as the step itself is about to: the same batches, the same draws.
    """

    optimizer: FlatSGD
    train: TrainConfig
    learning_rate: float
    differentiate: Callable[[], None]


class BegunRules:
    """The rules of a client's task, begun: each with the vectors that its steps read.

    Attributes:
        acting: of those that change a step, in the order of the task.
    """

    def __init__(self, optimizer: FlatSGD, task: LocalTask) -> None:
        self._optimizer = optimizer
        self._task = task
        self._begun = [(rule, rule.begin(optimizer, task)) for rule in task.rules]
        self.acting: Acting = tuple((rule, begun) for rule, begun in self._begun if rule.acts)

    def end(self, steps: int) -> dict[str, Tensor]:
        """Return what the client carries to its next round, after so many `steps`."""
        carried: dict[str, Tensor] = {}
        for rule, begun in self._begun:
            carried |= rule.end(self._optimizer, self._task, steps, begun)
        return carried


@torch.no_grad()
def take_step(
    optimizer: FlatSGD,
    acting: Acting,
    learning_rate: float | Tensor,
    train: TrainConfig,
    *,
    clip_norm: float,
) -> None:
    """Take a step of SGD by the gradients in `optimizer`, as the `acting` rules change them.

    A `learning_rate` on the device is read there when the step is taken.
    """
    values, gradients = optimizer.values, optimizer.gradients
    for rule, begun in acting:
        rule.gradient(values, gradients, *begun)
    for rule, _ in acting:
        rule.limit(optimizer.named_values, optimizer.named_gradients, stacked=False)
    optimizer.limit(clip_norm=clip_norm, weight_decay=train.weight_decay)
    for rule, begun in acting:
        rule.correct(values, gradients, *begun)
    optimizer.move(learning_rate, momentum=train.momentum)


def _changed(rule: type[LocalRule], method: str) -> bool:
    return getattr(rule, method) is not getattr(LocalRule, method)


def takes_aside(rule: LocalRule) -> bool:
    """Whether a rule does something beside its steps."""
    return rule.acts and _changed(type(rule), "aside")


def carried_part(carried: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what a client carries under names that begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in carried.items() if k.startswith(prefix)}
