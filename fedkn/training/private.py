"""Local training with differential privacy of the client's examples: DP-SGD.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133, Algorithm 1:
every example is in a step's batch with the same probability, independently of the others (Poisson
sampling); its gradient is clipped; Gaussian noise is added to the sum. Examples go through the
model one at a time, so a gradient is one example's whatever the network is made of.
docs/privacy.md says what this protects, and what it does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.normalizers import Normalizer
from fedkn.seeds import derive, numpy_generator, torch_generator
from fedkn.training.batches import plan_batches
from fedkn.training.draws import own_draws
from fedkn.training.example_draws import example_names
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate
from fedkn.training.mixing import refuse_mixing
from fedkn.training.optimizer import FlatSGD
from fedkn.training.privacy_spent import PrivacySpent
from fedkn.training.rule import BegunRules, take_step
from fedkn.training.sampled_gaussian import Run
from fedkn.training.workspace import Workspace

__all__ = ["poisson_batch", "refuse_unprivate", "steps_of_a_round", "train_privately"]


def train_privately(
    workspace: Workspace,
    examples: Tensor,
    targets: Tensor,
    task: LocalTask,
    *,
    inputs: Inputs,
    normalizer: Normalizer,
    privacy: PrivacyConfig,
) -> LocalUpdate:
    """Train the loaded model by DP-SGD; arguments and result as of `train_locally`.

    As many steps as `train_locally` would take, and the same weight in the average. A step is

        g = (sum over the batch of g_i * min(1, C / ||g_i||) + noise_multiplier * C * z) / B

    with g_i an example's gradient, C the ``privacy.clip_norm``, z standard normal, B the expected
    batch size: ``train.batch_size * train.accumulate``, or all of the client's examples where they
    are fewer. Then follow the task's rules, weight decay and momentum, which see examples through
    noise alone. ``train.clip_norm`` is not applied.

    Each example goes through the model alone, whatever the batch: neither ``train.accumulate`` nor
    ``task.largest_batch`` changes anything but B. Its augmentation and dropout are drawn with
    ("example", round, client, step, its name) from the seed, a name being what `example_names`
    makes of its content: so the sum without one example lacks one vector of norm C at most. A
    gradient that is not finite counts as zero.

    The batches are drawn with ("poisson", round, client, step), the noise with ("noise", round,
    client, step), both from the seed, or both from the operating system with ``privacy.secret``.
    The update carries the privacy spent under ``privacy/…``, and its ``epsilon`` is that of all
    rounds together, at ``privacy.delta``. Its loss is exact: without noise, over the examples that
    were drawn.

    Raises:
        UserError: as `refuse_unprivate`, or if the network mixes examples or fails on one alone.
        ValueError: if the privacy spent was carried incompletely.
    """
    started = time.perf_counter()
    refuse_unprivate(normalizer, workspace.model, task.train.precision)
    train, optimizer, model = task.train, workspace.attached(), workspace.model
    size, seed, round_, client = len(targets), task.seed, task.round_, task.client
    plan = plan_batches(
        size, train, normalizer.minimum_batch, seed=seed, round_=round_, client=client
    )
    expected = min(train.batch_size * train.accumulate, size)
    spent = PrivacySpent.restored(task.carried)
    rules = BegunRules(optimizer, task)
    model.train()
    # Not completed by end_training, which looks at all images without noise: only layers with
    # buffers need it, and those are refused.
    normalizer.begin_training(model, round_)
    each = _Examples(workspace, examples, targets, inputs, task)
    total = torch.zeros((), dtype=torch.float64, device=workspace.device)
    summed = torch.zeros_like(optimizer.gradients)
    seen = 0
    each.refuse_mixing()
    for step in range(len(plan.steps)):
        draw, noise = (_generator(task, what, step, privacy) for what in ("poisson", "noise"))
        batch = poisson_batch(size, expected / size, draw).tolist()
        # Without examples the sum is zero and the step is noise alone.
        summed.zero_()
        for example in batch:
            total += each.differentiate(example, step)
            _add_clipped(summed, optimizer.gradients, privacy.clip_norm)
        seen += len(batch)
        optimizer.gradients.copy_(summed)
        _add_noise(optimizer, privacy.noise_multiplier * privacy.clip_norm, noise)
        # By what was expected: what was drawn would tell of single examples.
        optimizer.gradients.div_(expected)
        take_step(optimizer, rules.acting, task.learning_rate, train, clip_norm=0.0)
    spent = spent.after(privacy.noise_multiplier, expected / size if size else 0.0, len(plan.steps))
    return LocalUpdate(
        examples=plan.examples,
        steps=len(plan.steps),
        skipped_batches=plan.skipped_batches,
        skipped_examples=plan.skipped_examples,
        loss=float(total) / seen if seen else 0.0,
        seconds=time.perf_counter() - started,
        carried=rules.end(len(plan.steps)) | spent.tensors(),
        epsilon=spent.epsilon(privacy.delta),
    )


def steps_of_a_round(size: int, train: TrainConfig, privacy: PrivacyConfig) -> Run:
    """Return what `train_privately` spends in a round on `size` examples, before it does."""
    plan = plan_batches(size, train, 1, seed=0, round_=1, client=0)
    expected = min(train.batch_size * train.accumulate, size)
    return privacy.noise_multiplier, expected / size if size else 0.0, len(plan.steps)


def refuse_unprivate(normalizer: Normalizer, model: nn.Module, precision: str) -> None:
    """Raise UserError if `model`, built with `normalizer`, cannot be trained so by DP-SGD."""
    if precision == "bfloat16":
        raise UserError(
            "privacy.mechanism = 'example' clips every example's gradient, which "
            f"train.precision = '{precision}' would round: set train.precision = 'float32'"
        )
    instead = "choose one that treats every example by itself: kernel, group, ws_group, layer, …"
    if normalizer.mixes_examples:
        raise UserError(
            f"normalizer '{normalizer.name}' normalizes every example by the others in its batch, "
            "so no gradient belongs to one example and none can be clipped for privacy.mechanism "
            f"= 'example': {instead}"
        )
    if buffer := next((name for name, _ in model.named_buffers()), None):
        raise UserError(
            f"the model keeps '{buffer}' beside its parameters, which privacy.mechanism = "
            f"'example' cannot add noise to; with normalizer '{normalizer.name}', {instead}"
        )


def poisson_batch(size: int, rate: float, generator: np.random.Generator) -> Tensor:
    """Return which of `size` examples are in a batch, each with probability `rate`: int64, sorted.

    The batch may be empty.
    """
    return torch.from_numpy(np.flatnonzero(generator.random(size) < rate))


def _generator(
    task: LocalTask, what: str, step: int, privacy: PrivacyConfig
) -> np.random.Generator:
    # NumPy's: PyTorch's generator on the CPU uses 32 bits of its seed, few enough to try them all.
    if privacy.secret:
        return np.random.default_rng()
    return numpy_generator(task.seed, what, task.round_, task.client, step)


class _Examples:
    """A client's examples, each differentiated alone, with draws of its own."""

    def __init__(
        self,
        workspace: Workspace,
        examples: Tensor,
        targets: Tensor,
        inputs: Inputs,
        task: LocalTask,
    ) -> None:
        self._workspace = workspace
        self._examples, self._targets, self._inputs = examples, targets, inputs
        self._task = task
        self._names = example_names(examples, targets)

    def differentiate(self, example: int, step: int) -> Tensor:
        """Put the gradient of `example` in place of the optimizer's; return its loss, float64."""
        task = self._task
        key = derive(task.seed, "example", task.round_, task.client, step, self._names[example])
        some, wanted = self._examples[example : example + 1], self._targets[example : example + 1]
        if self._inputs.augments:

            def augmented(one: Tensor) -> Tensor:
                return self._inputs.augmented(one, torch_generator(key, "augment"))

            some, wanted = augmented(some), task.goal.moved(wanted, augmented)
        self._workspace.optimizer.zero_grad()
        with _seeded(self._workspace.device, derive(key, "network")):
            loss = task.goal.mean_loss(self._workspace.model(self._inputs(some)), wanted)
            loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        return loss.detach().double()

    def refuse_mixing(self) -> None:
        """Raise UserError if the model mixes examples: tried on the first few, once a model."""
        model = self._workspace.model
        if model in _TRIED:
            return

        def gradient(example: int) -> Tensor:
            self.differentiate(example, 0)
            return self._workspace.optimizer.gradients.clone()

        few = self._inputs(self._examples[:_FEW])
        refuse_mixing(model, few, gradient, lambda: _seeded(few.device, 0))
        _TRIED.add(model)


# Enough for a batch, few enough for the memory of a small device.
_FEW = 3
_TRIED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def _seeded(device: torch.device, key: int) -> Iterator[None]:
    """Let every random draw of a forward pass follow from `key`, whoever's generator it takes."""
    with own_draws(device, key) as draws, draws.seeded(key):
        yield


@torch.no_grad()
def _add_clipped(summed: Tensor, gradient: Tensor, clip_norm: float) -> None:
    """Add `gradient`, clipped to `clip_norm`, to `summed`; nothing if it is not finite."""
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if norm < float("inf"):
        summed.add_(gradient, alpha=min(1.0, clip_norm / (norm + 1e-6)))


def _add_noise(optimizer: FlatSGD, deviation: float, generator: np.random.Generator) -> None:
    if deviation:
        noise = torch.from_numpy(generator.standard_normal(len(optimizer.gradients)))
        optimizer.gradients.add_(noise.to(optimizer.gradients), alpha=deviation)
