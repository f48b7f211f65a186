"""Local training with differential privacy of the client's examples: DP-SGD.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133, Algorithm 1:
every example is in a step's batch with the same probability, independently of the others (Poisson
sampling); its gradient is clipped; Gaussian noise is added to the sum. Opacus gives the gradients
of the single examples. docs/privacy.md says what this protects, and what it does not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.config import PrivacyConfig
from fedkn.errors import UserError
from fedkn.layers.opacus import register
from fedkn.normalizers import Normalizer
from fedkn.seeds import derive, numpy_generator
from fedkn.training.batches import plan_batches
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate, Workspace, carried_part
from fedkn.training.optimizer import FlatSGD
from fedkn.training.privacy_spent import PrivacySpent
from fedkn.training.step_batches import step_batches

__all__ = ["poisson_batch", "refuse_unprivate", "train_privately"]


def train_privately(
    workspace: Workspace,
    images: Tensor,
    labels: Tensor,
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
    are fewer. Then follow FedProx's term, weight decay, SCAFFOLD's correction and momentum, which
    see the images through noise alone. ``train.clip_norm`` is not applied.

    The examples drawn go through the model in ``train.accumulate`` equal parts, more where
    ``task.largest_batch`` divides the local batches; their clipped gradients are summed, and noise
    is added once. So a step and its privacy are those of one batch.

    The batches are drawn with ("poisson", round, client, step), the noise with ("noise", round,
    client, step), both from the seed, or both from the operating system with ``privacy.secret``;
    augmentation and dropout as in `train_locally`. The update carries the privacy spent under
    ``privacy/…``, and its ``epsilon`` is that of all rounds together, at ``privacy.delta``. Its
    loss is exact: without noise, over the examples that were drawn.

    Raises:
        UserError: as `refuse_unprivate`, or if Opacus is not installed.
        ValueError: if the privacy spent was carried incompletely.
    """
    started = time.perf_counter()
    refuse_unprivate(normalizer, workspace.model, task.train.precision)
    train, optimizer, model = task.train, workspace.attached(), workspace.model
    size, seed, round_, client = len(labels), task.seed, task.round_, task.client
    plan = plan_batches(
        size, train, normalizer.minimum_batch, seed=seed, round_=round_, client=client
    )
    expected = min(train.batch_size * train.accumulate, size)
    bearable = min(task.largest_batch or train.batch_size, train.batch_size)
    parts = train.accumulate * -(-train.batch_size // bearable)
    spent = PrivacySpent.restored(task.carried)
    anchor = optimizer.values.clone() if task.proximal_mu else None
    correction = optimizer.flat(task.correction) if task.correction else None
    if train.keep_momentum:
        optimizer.restart(carried_part(task.carried, _MOMENTUM))
    total = torch.zeros((), dtype=torch.float64, device=workspace.device)
    summed = torch.zeros_like(optimizer.gradients)
    seen = 0
    model.train()
    # Not completed by end_training, which looks at all images without noise: only layers with
    # buffers need it, and those are refused.
    normalizer.begin_training(model, round_)
    own = own_draws(workspace.device, derive(seed, "network", round_, client))
    with _gradients_by_example(model), own as draws:
        for step in range(len(plan.steps)):
            draw, noise = (_generator(task, what, step, privacy) for what in ("poisson", "noise"))
            batch = poisson_batch(size, expected / size, draw)
            # Without examples the sum is zero and the step is noise alone.
            # A drawn batch may be larger than expected, the parts that are borne may not.
            count = max(parts, -(-len(batch) // bearable)) if task.largest_batch else parts
            chosen = [part for part in torch.tensor_split(batch, count) if len(part)]
            steps, place = ([chosen] if chosen else []), (seed, round_, client)
            summed.zero_()
            for batches in step_batches(images, labels, steps, inputs, place, first=step):
                for x, answers, dropout in batches:
                    with draws.seeded(dropout):
                        loss = F.cross_entropy(model(x), answers, reduction="sum")
                    loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
                    _sum_clipped(optimizer, privacy.clip_norm)
                    summed.add_(optimizer.gradients)
                    total += loss.detach().double()
                    seen += len(answers)
            optimizer.gradients.copy_(summed)
            _add_noise(optimizer, privacy.noise_multiplier * privacy.clip_norm, noise)
            optimizer.gradients.div_(expected)
            if anchor is not None:
                optimizer.add_proximal(anchor, task.proximal_mu)
            optimizer.step(
                task.learning_rate,
                momentum=train.momentum,
                weight_decay=train.weight_decay,
                clip_norm=0.0,
                correction=correction,
            )
    if plan.steps:
        spent = spent.after(privacy.noise_multiplier, expected / size, len(plan.steps))
    velocity = optimizer.velocity() if train.keep_momentum else {}
    return LocalUpdate(
        examples=plan.examples,
        steps=len(plan.steps),
        skipped_batches=plan.skipped_batches,
        skipped_examples=plan.skipped_examples,
        loss=float(total) / seen if seen else 0.0,
        seconds=time.perf_counter() - started,
        carried={_MOMENTUM + name: value.clone() for name, value in velocity.items()}
        | spent.tensors(),
        epsilon=spent.epsilon(privacy.delta),
    )


def refuse_unprivate(normalizer: Normalizer, model: nn.Module, precision: str) -> None:
    """Raise UserError if `model`, built with `normalizer`, cannot be trained so by DP-SGD."""
    if precision != "float32":
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


_MOMENTUM = "momentum/"


def _generator(
    task: LocalTask, what: str, step: int, privacy: PrivacyConfig
) -> np.random.Generator:
    # NumPy's: PyTorch's generator on the CPU uses 32 bits of its seed, few enough to try them all.
    if privacy.secret:
        return np.random.default_rng()
    return numpy_generator(task.seed, what, task.round_, task.client, step)


@contextmanager
def _gradients_by_example(model: nn.Module) -> Iterator[None]:
    """Have Opacus leave the gradients of the examples of a summed loss in ``grad_sample``.

    Afterwards the model is as before, also where a step broke off.
    """
    register()
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415 - optional

    hooked = GradSampleModule(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The images need no gradient, and Opacus needs none of theirs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooked.to_standard_module()
        for module in model.modules():
            for left in ("activations", "max_batch_len"):
                if hasattr(module, left):
                    delattr(module, left)


@torch.no_grad()
def _sum_clipped(optimizer: FlatSGD, clip_norm: float) -> None:
    """Put the sum of the examples' clipped gradients in place of the optimizer's gradient."""
    samples: list[Tensor] = []
    for parameter in optimizer.parameters:
        samples.append(parameter.grad_sample)  # type: ignore[attr-defined]  # Opacus put it there
        parameter.grad_sample = None  # type: ignore[attr-defined]  # and looks there
    squares = torch.stack([g.flatten(1).square().sum(1) for g in samples])
    factors = (clip_norm / (squares.sum(0).sqrt() + 1e-6)).clamp_(max=1.0)
    for parameter, gradients in zip(optimizer.parameters, samples, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(torch.einsum("n,n...->...", factors, gradients))


def _add_noise(optimizer: FlatSGD, deviation: float, generator: np.random.Generator) -> None:
    if deviation:
        noise = torch.from_numpy(generator.standard_normal(len(optimizer.gradients)))
        optimizer.gradients.add_(noise.to(optimizer.gradients), alpha=deviation)
