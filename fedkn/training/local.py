"""Local training: what a client does between receiving the global model and sending its update."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.normalizers import Forward, Normalizer
from fedkn.seeds import derive
from fedkn.training.batches import plan_batches
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.optimizer import FlatSGD
from fedkn.training.precision import training_scores
from fedkn.training.standing import Standing
from fedkn.training.step_batches import step_batches

__all__ = ["LocalTask", "LocalUpdate", "Workspace", "carried_part", "train_locally"]


@dataclass(frozen=True)
class LocalTask:
    """What one client is to train in one round, and with which seeds.

    Together with the received tensors and the client's data it determines the update to the bit.

    Attributes:
        seed: the experiment's; round_: from 1; client: the partition id.
        train: batches, momentum, weight decay, clipping and precision.
        learning_rate: of this round, which the server knows from its schedule.
        proximal_mu: weight of FedProx's term (0: none).
        correction: added to the gradient of every step, by parameter (SCAFFOLD; empty: none).
        carried: what the client kept of its last round: `LocalUpdate.carried` of then.
        largest_batch: what the device can bear: larger local batches are divided, and a step takes
            the same examples as ever (0: no limit).
    """

    seed: int
    round_: int
    client: int
    train: TrainConfig
    learning_rate: float
    proximal_mu: float = 0.0
    correction: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    largest_batch: int = 0


@dataclass(frozen=True)
class LocalUpdate:
    """What came of it, beside the model's tensors.

    Attributes:
        examples: examples trained on, once for each time; steps: local steps taken, each of which
            is one of the optimizer's, whatever number of local batches it accumulates.
        skipped_batches, skipped_examples: too small for the normalizer.
        loss: mean cross entropy (nats) over the examples trained on, before each step.
        seconds: wall-clock time of the training alone.
        carried: what the client needs in its next round, by name: ``momentum/PARAMETER`` with
            ``train.keep_momentum``.
        epsilon: the privacy spent so far, this round included; None without DP-SGD.
        batch_size: the size of the local batches where a device could not bear the one asked for;
            0 where it is as asked.
    """

    examples: int
    steps: int
    skipped_batches: int
    skipped_examples: int
    loss: float
    seconds: float
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    epsilon: float | None = None
    batch_size: int = 0


class Workspace:
    """One model, kept in memory, into which the state of client after client is loaded.

    Whatever `load` is not given goes back to its initial value, so nothing of one client reaches
    the next. The model's parameters become views of one vector (see `FlatSGD`).

    Raises UserError where a model cannot be trained so, as `FlatSGD`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._take_over(FlatSGD(model))
        self._initial = {name: tensor.clone() for name, tensor in self._tensors.items()}
        # Buffers outside the state (persistent=False) cannot be loaded, but must not be passed on.
        self._passing = {name: buffer.clone() for name, buffer in self._transient.items()}

    def attached(self) -> FlatSGD:
        """Return the optimizer, after a look whether it still moves the model's own tensors.

        Ordinary calls part them: ``model.zero_grad()``, ``.to()``, ``.double()``,
        ``load_state_dict(assign=True)``, ``requires_grad_()``, a second Workspace. Then the model
        as it is now is taken over again, with the values that it has and the optimizer's momentum
        as far as it belongs to parameters that are still trained.

        Raises:
            UserError: if the model has tensors of other names or shapes than it had.
        """
        if self._standing.holds():
            self.optimizer.tie_gradients()
            return self.optimizer
        before = self.optimizer
        self._take_over(FlatSGD(self.model))
        found = {name: t.shape for name, t in (self._tensors | self._transient).items()}
        had = {name: t.shape for name, t in (self._initial | self._passing).items()}
        if found != had:
            odd = sorted(dict(found.items() ^ had.items()))
            raise UserError(
                f"the model is not the one that its Workspace was made of ({', '.join(odd[:3])}): "
                "make a new Workspace after changing a model"
            )
        self.optimizer.resume(before)
        self._initial = _cast(self._initial, self._tensors)
        self._passing = _cast(self._passing, self._transient)
        return self.optimizer

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.optimizer.values.device

    def load(self, *states: Mapping[str, Tensor]) -> None:
        """Load tensors by name, later `states` over earlier ones, the rest as initialised.

        The optimizer forgets its momentum.

        Raises:
            ValueError: if a name is unknown or a shape or dtype differs.
        UserError: as `attached`.
        """
        optimizer = self.attached()
        given: dict[str, Tensor] = {}
        for state in states:
            given.update(state)
        if unknown := sorted(given.keys() - self._tensors.keys()):
            raise ValueError(f"the model has no tensors named {', '.join(unknown)}")
        for name, tensor in self._tensors.items():
            value = given.get(name, self._initial[name])
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(
                    f"'{name}' is {tuple(value.shape)} {value.dtype}, but the model's is "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(value)
        for name, buffer in self._transient.items():
            buffer.copy_(self._passing[name])
        optimizer.restart()

    def state(self) -> dict[str, Tensor]:
        """Return the model's tensors by name: views, which the next `load` overwrites."""
        return dict(self._tensors)

    def _take_over(self, optimizer: FlatSGD) -> None:
        self.optimizer = optimizer
        # Detached tensors share memory with the model: copying into them loads a state in place.
        self._tensors = {name: value.detach() for name, value in self.model.state_dict().items()}
        self._transient = {
            name: buffer for name, buffer in self.model.named_buffers() if name not in self._tensors
        }
        self._standing = Standing(self.model)


def train_locally(
    workspace: Workspace,
    images: Tensor,
    labels: Tensor,
    task: LocalTask,
    *,
    inputs: Inputs,
    normalizer: Normalizer,
) -> LocalUpdate:
    """Train the loaded model on uint8 `images` (N, C, H, W) with int64 `labels` (N,).

    Every step: the batches of `plan_batches`, augmented and scaled, each forward with all random
    draws, the network's own included, from the task's seeds (`fedkn.training.draws`), in
    ``train.precision``, cross entropy and backward; the mean of their gradients, each weighted by
    its examples; FedProx's term where ``task.proximal_mu`` is set, clipping, SCAFFOLD's correction,
    SGD. Images and labels are on the model's device. The model's `normalizer` says what is too
    small a batch, and prepares and completes its layers.

    Where the layers treat every example by itself and drop nothing, a step over several batches is
    that over one batch of all their examples.
    """
    started = time.perf_counter()
    train, optimizer, model = task.train, workspace.attached(), workspace.model
    plan = plan_batches(
        len(labels),
        train,
        normalizer.minimum_batch,
        seed=task.seed,
        round_=task.round_,
        client=task.client,
        largest_batch=task.largest_batch,
    )
    anchor = optimizer.values.clone() if task.proximal_mu else None
    correction = optimizer.flat(task.correction) if task.correction else None
    if train.keep_momentum:
        optimizer.restart(carried_part(task.carried, _MOMENTUM))
    total = torch.zeros((), dtype=torch.float64, device=workspace.device)
    model.train()
    normalizer.begin_training(model, task.round_)
    place = (task.seed, task.round_, task.client)
    with own_draws(workspace.device, derive(task.seed, "network", *place[1:])) as draws:
        for batches in step_batches(images, labels, plan.steps, inputs, place):
            optimizer.zero_grad()
            size = sum(len(batch.labels) for batch in batches)
            for x, answers, dropout in batches:
                with draws.seeded(dropout):
                    loss = F.cross_entropy(training_scores(model, x, train.precision), answers)
                share = None if len(batches) == 1 else loss.new_tensor(len(answers) / size)
                loss.backward(share)  # type: ignore[no-untyped-call]  # torch annotates it so
                total.add_(loss.detach(), alpha=len(answers))
            if anchor is not None:
                optimizer.add_proximal(anchor, task.proximal_mu)
            optimizer.step(
                task.learning_rate,
                momentum=train.momentum,
                weight_decay=train.weight_decay,
                clip_norm=train.clip_norm,
                correction=correction,
            )
        draws.reseed(derive(task.seed, "statistics", *place[1:]))
        normalizer.end_training(model, _pass_over(model, images, inputs), task.round_)
    velocity = optimizer.velocity() if train.keep_momentum else {}
    mean_loss = float(total) / plan.examples if plan.examples else 0.0
    return LocalUpdate(
        examples=plan.examples,
        steps=len(plan.steps),
        skipped_batches=plan.skipped_batches,
        skipped_examples=plan.skipped_examples,
        loss=mean_loss,
        seconds=time.perf_counter() - started,
        carried={_MOMENTUM + name: value.clone() for name, value in velocity.items()},
    )


_MOMENTUM = "momentum/"


def carried_part(carried: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what a client carries under names that begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in carried.items() if k.startswith(prefix)}


def _cast(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(like[name]) for name, value in values.items()}


def _pass_over(model: nn.Module, images: Tensor, inputs: Inputs) -> Forward:
    @torch.no_grad()
    def forward(batch_size: int) -> None:
        for start in range(0, len(images), batch_size):
            model(inputs(images[start : start + batch_size]))

    return forward
