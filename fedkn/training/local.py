"""Local training: what a client does between receiving the global model and sending its update."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedkn.config import TrainConfig
from fedkn.normalizers import Forward, Normalizer, frozen
from fedkn.seeds import derive
from fedkn.tasks import CLASSIFICATION, Task
from fedkn.training.batches import plan_batches
from fedkn.training.draws import Draws, own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.precision import computing_in, training_scores
from fedkn.training.recorded import PlannedSteps
from fedkn.training.rule import AsideStep, BegunRules, LocalRule, take_step, takes_aside
from fedkn.training.step_batches import LocalBatch, step_chunks, steps_of
from fedkn.training.workspace import Workspace

__all__ = ["LocalRound", "LocalTask", "LocalUpdate", "train_locally"]


@dataclass(frozen=True)
class LocalTask:
    """What one client is to train in one round, and with which seeds.

    Together with the received tensors and the client's data it determines the update to the bit.

    Attributes:
        seed: the experiment's; round_: from 1; client: the partition id.
        train: batches, momentum, weight decay, clipping and precision.
        goal: what the network is trained for, which says the loss.
        learning_rate: of this round, which the server knows from its schedule.
        rules: what is to be changed of plain local SGD (none: nothing, as in FedAvg).
        given: what the server sent for the rules beside the model, by parameter, on its device.
        carried: what the client kept of its last round, there too: `LocalUpdate.carried` of then.
        largest_batch: what the device can bear: larger local batches are divided, and a step takes
            the same examples as ever (0: no limit).
    """

    seed: int
    round_: int
    client: int
    train: TrainConfig
    learning_rate: float
    rules: tuple[LocalRule, ...] = ()
    given: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    largest_batch: int = 0
    goal: Task = CLASSIFICATION


@dataclass(frozen=True)
class LocalUpdate:
    """What came of it, beside the model's tensors.

    Attributes:
        examples: examples trained on, once for each time; steps: local steps taken, each of which
            is one of the optimizer's, whatever number of local batches it accumulates.
        skipped_batches, skipped_examples: too small for the normalizer.
        loss: the task's, mean over the examples trained on, before each step.
        seconds: wall-clock time of the training alone.
        carried: what the client needs in its next round, by name, as the rules say.
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


def train_locally(
    workspace: Workspace,
    examples: Tensor,
    targets: Tensor,
    task: LocalTask,
    *,
    inputs: Inputs,
    normalizer: Normalizer,
) -> LocalUpdate:
    """Train the loaded model on `examples` (N, C, H, W) with their `targets` (N, ...).

    Every step: the batches of `plan_batches`, augmented and scaled, each forward with all random
    draws, the network's own included, from the task's seeds (`fedkn.training.draws`), in
    ``train.precision``, the loss of the task's goal and backward; the mean of their gradients, each
    weighted by its examples, clipped; SGD. The task's rules change that gradient before and after
    it is clipped. Examples and targets are on the model's device. The model's `normalizer` says
    what is too small a batch, and prepares and completes its layers.

    Where the layers treat every example by itself and drop nothing, a step over several batches is
    that over one batch of all their examples.
    """
    local = LocalRound(workspace, examples, targets, task, inputs=inputs, normalizer=normalizer)
    return local.at_once()


class LocalRound:
    """A client's local training of one round, begun: its steps can be taken between others'.

    Arguments as in `train_locally`. On CUDA steps are recorded once and replayed
    (`fedkn.training.recorded`), where the model allows it.

    Attributes:
        steps: how many there are to take, in their order, before `end`.
    """

    def __init__(
        self,
        workspace: Workspace,
        examples: Tensor,
        targets: Tensor,
        task: LocalTask,
        *,
        inputs: Inputs,
        normalizer: Normalizer,
    ) -> None:
        self._started = time.perf_counter()
        train, optimizer = task.train, workspace.attached()
        self._workspace = workspace
        self._task = task
        self._examples = examples
        self._inputs = inputs
        self._normalizer = normalizer
        self._plan = plan_batches(
            len(targets),
            train,
            normalizer.minimum_batch,
            seed=task.seed,
            round_=task.round_,
            client=task.client,
            largest_batch=task.largest_batch,
        )
        self.steps = len(self._plan.steps)
        self._rules = BegunRules(optimizer, task)
        self._total = torch.zeros((), dtype=torch.float64, device=workspace.device)
        frozen.train(workspace.model)
        normalizer.begin_training(workspace.model, task.round_)
        self._recorded = None
        self._acting = self._rules.acting
        self._aside = tuple(entry for entry in self._acting if takes_aside(entry[0]))
        if workspace.recorder is not None and not self._aside:
            planned = PlannedSteps(task, self._plan, examples, targets, inputs, self._acting)
            with computing_in(train.precision, workspace.device):
                self._recorded = workspace.recorder.begin(planned)
        self._host = None
        if workspace.host_recorder is not None and self._recorded is None and not self._aside:
            self._host = workspace.host_recorder.begin(
                task, inputs, (examples, targets), self._acting, self._compute
            )
        if self._host is not None:
            self._acting, self._total = self._host.acting, self._host.total
        self._chunks = step_chunks(
            examples,
            targets,
            self._plan.steps,
            inputs,
            (task.seed, task.round_, task.client),
            moved=task.goal.moved,
        )
        self._batches = steps_of(self._chunks)

    @property
    def alone(self) -> bool:
        """Whether no other client may take steps in between, or on the device at the same time.

        Where the network draws for itself, from generators that are the process's; it may, unless
        its steps are recorded, for which its draws are looked at.
        """
        recorder = self._workspace.recorder
        return self._recorded is None or recorder is None or recorder.draws

    def at_once(self) -> LocalUpdate:
        """Take all steps and return what came of them."""
        if self._host is not None and self._host.quiet(self._plan.steps):
            self._host.take(self._chunks)
            return self.end()
        with own_draws(self._workspace.device, self._seed("network")) as draws:
            if self._host is not None:
                self._host.take(self._chunks, draws)
            else:
                for number in range(self.steps):
                    self.take_step(number, draws)
            return self.end(draws)

    def take_step(self, number: int, draws: Draws | None = None) -> None:
        """Take step `number`, which follows the one taken before.

        `draws` are the process's generators; a round that is not `alone` does without.
        """
        if self._recorded is None:
            assert draws is not None
            with computing_in(self._task.train.precision, self._workspace.device):
                self._compute(next(self._batches), draws, self._task.learning_rate)
        else:
            if draws is not None:
                draws.reseed(self._seed("dropout", number))
            self._recorded.take(number)

    def end(self, draws: Draws | None = None) -> LocalUpdate:
        """Complete the model's tensors when all steps are taken, and return what came of it."""
        workspace, plan, task = self._workspace, self._plan, self._task
        model = workspace.model
        forward = _pass_over(model, self._examples, self._inputs)
        if draws is not None:
            draws.reseed(self._seed("statistics"))
        with computing_in("float32", workspace.device):
            self._normalizer.end_training(model, forward, task.round_)
        total = self._total if self._recorded is None else self._recorded.total
        return LocalUpdate(
            examples=plan.examples,
            steps=len(plan.steps),
            skipped_batches=plan.skipped_batches,
            skipped_examples=plan.skipped_examples,
            loss=float(total) / plan.examples if plan.examples else 0.0,
            seconds=time.perf_counter() - self._started,
            carried=self._rules.end(len(plan.steps)),
        )

    def _compute(self, batches: Sequence[LocalBatch], draws: Draws, rate: float) -> None:
        train = self._task.train
        optimizer = self._workspace.optimizer

        def differentiate() -> None:
            self._differentiate(batches, draws)

        for rule, begun in self._aside:
            rule.aside(AsideStep(optimizer, train, rate, differentiate), *begun)
        self._differentiate(batches, draws, self._total)
        take_step(optimizer, self._acting, rate, train, clip_norm=train.clip_norm)

    def _differentiate(
        self, batches: Sequence[LocalBatch], draws: Draws, total: Tensor | None = None
    ) -> None:
        """Put the gradient over `batches` into the optimizer's; add their loss to `total`."""
        task, model = self._task, self._workspace.model
        self._workspace.optimizer.zero_grad()
        size = sum(len(batch.targets) for batch in batches)
        for x, targets, dropout in batches:
            with draws.seeded(dropout):
                scores = training_scores(model, x, task.train.precision)
                loss = task.goal.mean_loss(scores, targets)
            share = None if len(batches) == 1 else loss.new_tensor(len(targets) / size)
            loss.backward(share)  # type: ignore[no-untyped-call]  # torch annotates it so
            if total is not None:
                total.add_(loss.detach(), alpha=len(targets))

    def _seed(self, purpose: str, *more: int) -> int:
        task = self._task
        return derive(task.seed, purpose, task.round_, task.client, *more)


def _pass_over(model: nn.Module, examples: Tensor, inputs: Inputs) -> Forward:
    def forward(batch_size: int) -> None:
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                model(inputs(examples[start : start + batch_size]))

    return forward
