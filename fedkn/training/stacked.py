"""Local training of several clients at once: `train_locally` for all of them, step by step.

Their parameters are stacked along a new first axis, the forward pass is `torch.func.vmap` of the
model's (convolutions become grouped ones), and one backward pass of the sum of the losses gives
every client its own gradient. A small model on a tiny batch takes about as long for ten clients
as for two, because most of its time goes into launching operations.

Batches, augmentation and dropout are drawn from the same seeds as in `train_locally`, and the
steps are the same: the results differ by float rounding alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedkn.config import TrainConfig
from fedkn.data.augmentation import augment
from fedkn.errors import UserError
from fedkn.layers import dropout_stream
from fedkn.seeds import derive, torch_generator
from fedkn.training.batches import BatchPlan, plan_batches
from fedkn.training.captured import Captured
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate

__all__ = ["StackedClient", "StackedWorkspace", "train_stacked"]


@dataclass(frozen=True, eq=False)
class StackedClient:
    """One of the clients: its task, the tensors it starts from, and its examples.

    Tensors of the model that are not in `received` start as initialised. `images` (N, C, H, W) are
    uint8, `labels` (N,) int64, both on the model's device.
    """

    task: LocalTask
    received: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor


class StackedWorkspace:
    """Room for `size` clients' parameters, gradients' momentum and losses, kept between rounds.

    Args:
        model: gives the forward pass and the initial values; it is left as it is.
        size: the most clients at once.

    Raises:
        UserError: if the model has tensors that are not trainable parameters, such as BatchNorm's
            running statistics.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if odd := sorted(model.state_dict().keys() - parameters.keys()):
            raise UserError(
                f"clients of a model with buffers, fixed or shared parameters ({odd[0]}, …) cannot "
                "train together: set engine = 'inprocess'"
            )
        self.model = model
        self._kinds = _kinds(model)
        self.size = size
        self.initial = {name: p.detach().clone().contiguous() for name, p in parameters.items()}
        self.values = [_stacked(p, size) for p in self.initial.values()]
        self.velocity = [torch.zeros_like(v) for v in self.values]
        self.anchor = [torch.zeros_like(v) for v in self.values]
        device = self.values[0].device
        self.losses = torch.zeros(size, dtype=torch.float64, device=device)
        self.rate = torch.zeros((), device=device)
        self.steps: dict[tuple[object, ...], Captured] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.losses.device

    def load(self, clients: Sequence[StackedClient]) -> None:
        """Load what the clients received, each in its place.

        Raises:
            ValueError: too many clients, an unknown name, or a shape or dtype that differs.
            UserError: if the model's tensors are others than when the workspace was made of it, or
                are trained no more: what is stacked here would be something else.
        """
        now = _kinds(self.model)
        if odd := sorted(dict(now.items() ^ self._kinds.items())):
            raise UserError(
                f"the model is not the one that its StackedWorkspace was made of "
                f"({', '.join(odd[:3])}): make a new one after changing a model"
            )
        if len(clients) > self.size:
            raise ValueError(f"{len(clients)} clients in a workspace for {self.size}")
        for place, client in enumerate(clients):
            if unknown := sorted(client.received.keys() - self.initial.keys()):
                raise ValueError(f"the model has no tensors named {', '.join(unknown)}")
            for (name, initial), stacked in zip(self.initial.items(), self.values, strict=True):
                value = client.received.get(name, initial)
                if value.shape != initial.shape or value.dtype != initial.dtype:
                    raise ValueError(
                        f"'{name}' is {value.dtype} {tuple(value.shape)}, "
                        f"the model's is {initial.dtype} {tuple(initial.shape)}"
                    )
                stacked[place].copy_(value)
        for anchor, value in zip(self.anchor, self.values, strict=True):
            anchor.copy_(value)
        self.losses.zero_()

    def state(self, place: int) -> dict[str, Tensor]:
        """Return the tensors of the client at `place`: views, which the next `load` overwrites."""
        return {
            name: stacked[place] for name, stacked in zip(self.initial, self.values, strict=True)
        }


def train_stacked(
    workspace: StackedWorkspace,
    clients: Sequence[StackedClient],
    *,
    inputs: Inputs,
    minimum_batch: int,
) -> list[tuple[LocalUpdate, dict[str, Tensor]]]:
    """Train every client from what it received; return what came of each, and its tensors.

    The tensors are views, valid until the workspace is used again. The model's layers must treat
    the examples of a batch independently: shorter batches are filled up with examples of no weight.
    Random draws are those of fedkn's layers alone: others would be drawn for all clients at once,
    so that a client's depended on who trains beside it.

    Raises:
        UserError: if the network draws random numbers of its own (`torch.nn.Dropout`, ...), or has
            operations that `torch.func.vmap` does not know.
        ValueError: if the tasks differ in more than the client, carry anything from round to round,
            correct the gradient, accumulate it or compute in another precision than float32, or as
            `StackedWorkspace.load`.
    """
    started = time.perf_counter()
    kinds = {
        (c.task.round_, c.task.train, c.task.learning_rate, c.task.proximal_mu) for c in clients
    }
    if len(kinds) != 1:
        raise ValueError("clients that train together must be given the same training")
    if any(c.task.correction or c.task.carried or c.task.train.keep_momentum for c in clients):
        raise ValueError("clients that train together keep nothing and correct nothing")
    train = clients[0].task.train
    if train.accumulate > 1 or train.precision != "float32":
        raise ValueError("clients that train together take one batch a step, in float32")
    plans = [_plan(client, minimum_batch) for client in clients]
    # The longest first: whoever has steps left is always the head of the stack.
    order = sorted(range(len(clients)), key=lambda i: -len(plans[i].steps))
    members = [clients[i] for i in order]
    ordered = [plans[i] for i in order]
    task = clients[0].task
    workspace.load(members)
    workspace.model.train()
    workspace.rate.fill_(task.learning_rate)
    with own_draws(workspace.device, derive(task.seed, "network", task.round_)) as draws:
        before = draws.state()
        for step, batch in enumerate(_batches(members, ordered, inputs)):
            _take_step(workspace, batch, task.train, task.proximal_mu, first=step == 0)
            if step == 0 and draws.state() != before:
                raise _draws_of_its_own(workspace.model)
    losses = workspace.losses.tolist()
    seconds = (time.perf_counter() - started) / len(clients)
    results: dict[int, tuple[LocalUpdate, dict[str, Tensor]]] = {}
    for place, (original, plan) in enumerate(zip(order, ordered, strict=True)):
        update = LocalUpdate(
            examples=plan.examples,
            steps=len(plan.steps),
            skipped_batches=plan.skipped_batches,
            skipped_examples=plan.skipped_examples,
            loss=losses[place] / plan.examples if plan.examples else 0.0,
            seconds=seconds,
        )
        results[original] = (update, workspace.state(place))
    return [results[i] for i in range(len(clients))]


@dataclass(frozen=True)
class _Batch:
    """One step's batches of the clients that have one: images (K, B, C, H, W), labels (K, B).

    `weights` (K, B) are 1 for examples, 0 for what fills up; `seeds` (K,) are the dropout's.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    seeds: Tensor


def _stacked(parameter: Tensor, size: int) -> Tensor:
    return parameter.unsqueeze(0).repeat(size, *[1] * parameter.dim())


def _plan(client: StackedClient, minimum_batch: int) -> BatchPlan:
    task = client.task
    return plan_batches(
        len(client.labels),
        task.train,
        minimum_batch,
        seed=task.seed,
        round_=task.round_,
        client=task.client,
    )


def _batches(
    clients: Sequence[StackedClient], plans: Sequence[BatchPlan], inputs: Inputs
) -> Iterator[_Batch]:
    device = clients[0].labels.device
    images = torch.cat([client.images for client in clients])
    labels = torch.cat([client.labels for client in clients])
    starts = [0]
    for client in clients:
        starts.append(starts[-1] + len(client.labels))
    for step in range(len(plans[0].steps)):
        active = sum(len(plan.steps) > step for plan in plans)
        chosen = [plans[k].steps[step][0] for k in range(active)]
        longest = max(map(len, chosen))
        where = torch.stack([_filled(b, longest) + starts[k] for k, b in enumerate(chosen)])
        weights = torch.tensor([[float(i < len(b)) for i in range(longest)] for b in chosen])
        tasks = [client.task for client in clients[:active]]
        seeds = [derive(t.seed, "dropout", t.round_, t.client, step) for t in tasks]
        rows = where.to(device).flatten()
        some = images[rows]
        if inputs.augments:
            pieces = torch.split(some, longest)
            some = torch.cat(
                [
                    _augmented(piece, len(batch), t, step, inputs)
                    for piece, batch, t in zip(pieces, chosen, tasks, strict=True)
                ]
            )
        x = inputs(some).contiguous()
        yield _Batch(
            images=x.view(active, longest, *x.shape[1:]),
            labels=labels[rows].view(active, longest),
            weights=weights.to(device),
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
        )


def _filled(batch: Tensor, length: int) -> Tensor:
    missing = length - len(batch)
    return torch.cat((batch, batch[:1].expand(missing))) if missing else batch


def _augmented(images: Tensor, size: int, task: LocalTask, step: int, inputs: Inputs) -> Tensor:
    # Drawn for the true batch: what fills it up must not change the draws.
    generator = torch_generator(task.seed, "augment", task.round_, task.client, step)
    own = augment(images[:size], generator, flip=inputs.flip, crop_padding=inputs.crop_padding)
    return torch.cat((own, images[size:]))


def _take_step(
    workspace: StackedWorkspace, batch: _Batch, train: TrainConfig, mu: float, *, first: bool
) -> None:
    tensors = (batch.images, batch.labels, batch.weights, batch.seeds)
    active = len(batch.seeds)

    def step(images: Tensor, labels: Tensor, weights: Tensor, seeds: Tensor) -> None:
        _step(workspace, _Batch(images, labels, weights, seeds), train, mu, first=first)

    if workspace.device.type != "cuda":
        step(*tensors)
        return
    key = (active, batch.images.shape, train, mu, first)
    if key not in workspace.steps:
        changed = (*workspace.values, *workspace.velocity, workspace.losses)
        workspace.steps[key] = Captured(step, tensors, changed)
    workspace.steps[key].replay(tensors)


def _step(
    workspace: StackedWorkspace, batch: _Batch, train: TrainConfig, mu: float, *, first: bool
) -> None:
    active = len(batch.seeds)
    # New leaves on the same memory: only the head of the stack has a step to take.
    values = [value.detach()[:active].requires_grad_() for value in workspace.values]
    named = dict(zip(workspace.initial, values, strict=True))
    forward = torch.func.vmap(_forward(workspace.model))
    try:
        scores = forward(named, batch.images, batch.seeds)
    except RuntimeError as error:
        raise _refusal(workspace.model, error) from error
    losses = F.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), reduction="none")
    sums = (losses.view_as(batch.labels) * batch.weights).sum(1)
    sizes = batch.weights.sum(1)
    gradients = list(torch.autograd.grad((sums / sizes).sum(), values))
    with torch.no_grad():
        workspace.losses[:active] += sums.double()
        _update(workspace, gradients, train, mu, first=first)


def _kinds(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    """Return shape, dtype and whether it is trained, for every parameter and buffer of `model`."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (t.shape, t.dtype, t.requires_grad) for name, t in tensors}


def _refusal(model: nn.Module, error: RuntimeError) -> Exception:
    """Return `error` of a forward pass under vmap as one that names the way out, if vmap's own."""
    reason = (str(error).splitlines() or [""])[0]
    if "randomness" in reason:
        return _draws_of_its_own(model)
    if "vmap" not in reason:
        return error
    return UserError(
        f"the network cannot be run for several clients at once ({reason[:200]}): "
        "set engine = 'inprocess'"
    )


def _draws_of_its_own(model: nn.Module) -> UserError:
    found = next((name for name, m in model.named_modules() if _is_random(m)), None)
    which = "" if found is None else f" ({type(model.get_submodule(found)).__name__} '{found}')"
    return UserError(
        f"the network draws random numbers of its own{which}, which clients that train together "
        "would share: set engine = 'inprocess'"
    )


def _is_random(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(word in name for word in ("dropout", "droppath", "stochasticdepth", "rrelu"))


def _forward(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def forward(parameters: dict[str, Tensor], images: Tensor, seed: Tensor) -> Tensor:
        with dropout_stream(seed):
            out: Tensor = functional_call(model, parameters, (images,))
        return out

    return forward


def _update(
    workspace: StackedWorkspace,
    gradients: list[Tensor],
    train: TrainConfig,
    mu: float,
    *,
    first: bool,
) -> None:
    """FlatSGD's step for the clients at the head of the stack, each with its own norm."""
    active = len(gradients[0])
    values = [value[:active] for value in workspace.values]
    if mu:
        anchors = [anchor[:active] for anchor in workspace.anchor]
        torch._foreach_add_(gradients, torch._foreach_sub(values, anchors), alpha=mu)
    if train.clip_norm:
        squares = [g.flatten(1).square().sum(1) for g in gradients]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (train.clip_norm / (norms + 1e-6)).clamp_(max=1.0)
        for g in gradients:
            g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))
    if train.weight_decay:
        torch._foreach_add_(gradients, values, alpha=train.weight_decay)
    if train.momentum:
        velocity = [v[:active] for v in workspace.velocity]
        if first:
            torch._foreach_copy_(velocity, gradients)
        else:
            torch._foreach_mul_(velocity, train.momentum)
            torch._foreach_add_(velocity, gradients)
        gradients = velocity
    torch._foreach_sub_(values, torch._foreach_mul(gradients, workspace.rate))
