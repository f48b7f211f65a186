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
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.layers.kernel.dropout import dropout_keys, dropout_stream
from fedkn.layers.stacked_convolution import StackedConvolutions
from fedkn.seeds import derive
from fedkn.training.batches import BatchPlan, plan_batches
from fedkn.training.captured import Captured
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate
from fedkn.training.precision import computing_in
from fedkn.training.recorded import Capture
from fedkn.training.stacked_batches import Batch, StackedBatches, StackedClient
from fedkn.training.transfer import moved

__all__ = ["StackedWorkspace", "train_stacked"]


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
        self.tables: dict[tuple[int, ...], _Tables] = {}
        self.capture: Capture | None = Captured if device.type == "cuda" else None
        self._calls: int | None = None

    def __len__(self) -> int:
        return self.size

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
        for client in clients:
            if unknown := sorted(client.received.keys() - self.initial.keys()):
                raise ValueError(f"the model has no tensors named {', '.join(unknown)}")
        loaded: dict[str, Tensor] = {}
        for name, initial in self.initial.items():
            given = [client.received.get(name) for client in clients]
            if all(value is None for value in given):
                loaded[name] = initial.expand(len(clients), *initial.shape)
                continue
            for value in given:
                if value is not None and (value.shape, value.dtype) != (
                    initial.shape,
                    initial.dtype,
                ):
                    raise ValueError(
                        f"'{name}' is {value.dtype} {tuple(value.shape)}, "
                        f"the model's is {initial.dtype} {tuple(initial.shape)}"
                    )
            device = next(value.device for value in given if value is not None)
            own = initial.to(device) if any(value is None for value in given) else initial
            loaded[name] = torch.stack([own if value is None else value for value in given])
        for stacked, value in zip(self.values, moved(loaded, self.device).values(), strict=True):
            stacked[: len(clients)].copy_(value)
        for anchor, value in zip(self.anchor, self.values, strict=True):
            anchor.copy_(value)
        for velocity in self.velocity:
            velocity.zero_()
        self.losses.zero_()

    def calls(self, client: StackedClient, inputs: Inputs) -> int:
        """Return how many dropout calls a forward pass makes."""
        if self._calls is None:
            some = inputs(client.images[:2]).contiguous()
            with dropout_stream(0) as stream, torch.no_grad():
                functional_call(self.model, self.initial, (some,))
            self._calls = stream.calls
        return self._calls

    def states(self, clients: int) -> list[dict[str, Tensor]]:
        """Return the tensors of each of the first `clients` clients, on the CPU.

        There they are views, which the next `load` overwrites.
        """
        values = zip(self.initial, self.values, strict=True)
        here = moved({name: value[:clients] for name, value in values}, torch.device("cpu"))
        return [{name: value[place] for name, value in here.items()} for place in range(clients)]


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
    if train.accumulate > 1 or train.precision == "bfloat16":
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
    with (
        computing_in(train.precision, workspace.device),
        own_draws(workspace.device, derive(task.seed, "network", task.round_)) as draws,
    ):
        before = draws.state()
        calls = workspace.calls(members[0], inputs) if ordered[0].steps else 0
        batches = StackedBatches(members, ordered, inputs, calls)
        for step, take in enumerate(_steps(workspace, batches, task)):
            take()
            if step == 0 and draws.state() != before:
                raise _draws_of_its_own(workspace.model)
    losses = workspace.losses.tolist()  # waits for the device
    seconds = (time.perf_counter() - started) / len(clients)
    states = workspace.states(len(clients))
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
        results[original] = (update, states[place])
    return [results[i] for i in range(len(clients))]


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


def _steps(
    workspace: StackedWorkspace, batches: StackedBatches, task: LocalTask
) -> Iterator[Callable[[], None]]:
    """Yield the steps, each to be taken before the next is asked for."""
    if workspace.capture is None:
        for batch in batches.one_by_one():
            yield partial(_step, workspace, batch, task.train, task.proximal_mu, partly=False)
        return
    replayed = _Replayed(workspace, batches, task, workspace.capture)
    for step in range(len(batches)):
        yield partial(replayed.take, step)


class _Replayed:
    """The steps of one round as graphs, whose tensors lie where they are for all rounds.

    Graphs are recorded for a few sizes of the stack alone: clients that have no more steps stay in
    it, and their tensors as they are, until half of the stack is done.
    """

    def __init__(
        self,
        workspace: StackedWorkspace,
        batches: StackedBatches,
        task: LocalTask,
        capture: Capture,
    ) -> None:
        self._workspace = workspace
        self._batches = batches
        self._task = task
        self._capture = capture
        self._tables = _Tables.of(workspace, batches)
        self._filled = 0

    def take(self, step: int) -> None:
        workspace, task = self._workspace, self._task
        if step == self._filled:
            self._fill(step)
        active, stack = self._batches.active(step), workspace.size
        while stack // 2 >= active:
            stack //= 2
        key = (stack, self._tables.shape, task.train, task.proximal_mu)
        if key not in workspace.steps:
            changed = (*workspace.values, *workspace.velocity, workspace.losses)
            tables, inputs = self._tables, self._batches.inputs
            workspace.steps[key] = self._capture(
                lambda: _step(
                    workspace,
                    tables.batch(stack, inputs),
                    task.train,
                    task.proximal_mu,
                    partly=True,
                ),
                (),
                (*changed, tables.place),
            )
        workspace.steps[key].replay(())

    def _fill(self, first: int) -> None:
        batches = self._batches
        tables = self._tables
        self._filled = end = min(len(batches), first + tables.room)
        images, labels = batches.taken(first, end)
        here = slice(0, end - first), slice(0, images.shape[1])
        for table, values in (
            (tables.images, images),
            (tables.labels, labels),
            (tables.weights, batches.weights[first:end]),
            (tables.keys, batches.keys[first:end]),
        ):
            table[here].copy_(values)
        tables.weights[: end - first, images.shape[1] :].zero_()
        tables.place.zero_()


class _Tables:
    """What recorded steps read, at addresses that do not change: `room` steps of all clients."""

    def __init__(self, room: int, size: int, images: Tensor, calls: int) -> None:
        """`images` are one step's, (K, B, C, H, W)."""
        self.room = room
        self.images = images.new_zeros((room, size, *images.shape[1:]))
        shape = self.images.shape[:3]
        self.labels = torch.zeros(shape, dtype=torch.int64, device=images.device)
        self.weights = torch.zeros(shape, device=images.device)
        self.keys = torch.zeros((*shape[:2], calls), dtype=torch.int64, device=images.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=images.device)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.images.shape, self.keys.shape[-1]

    @staticmethod
    def of(workspace: StackedWorkspace, batches: StackedBatches) -> _Tables:
        """Return the workspace's tables for batches of that kind, made where there are none."""
        some, _ = batches.taken(0, 1)
        kind = (*some.shape[2:], batches.keys.shape[-1])
        if kind not in workspace.tables:
            room = _BYTES_AT_ONCE // max(1, some[:, :1].nbytes * workspace.size)
            room = max(1, min(room, _MOST_STEPS))
            workspace.tables[kind] = _Tables(room, workspace.size, some[0], kind[-1])
        return workspace.tables[kind]

    def batch(self, clients: int, inputs: Inputs) -> Batch:
        """Return the batch of the step whose turn it is, and move on to the next."""
        images, labels, weights, keys = (
            table[:, :clients].index_select(0, self.place).squeeze(0)
            for table in (self.images, self.labels, self.weights, self.keys)
        )
        x = inputs(images.flatten(0, 1)).contiguous()
        self.place.add_(1)
        return Batch(x.view(*images.shape[:2], *x.shape[1:]), labels, weights, keys)


_BYTES_AT_ONCE = 1 << 26
"""Of pixels in the tables: longer rounds are taken in chunks."""
_MOST_STEPS = 256


def _step(
    workspace: StackedWorkspace, batch: Batch, train: TrainConfig, mu: float, *, partly: bool
) -> None:
    """Take a step; `partly`: some of the clients may have no example in the batch."""
    active = len(batch.keys)
    # New leaves on the same memory: only the head of the stack has a step to take.
    values = [value.detach()[:active].requires_grad_() for value in workspace.values]
    named = dict(zip(workspace.initial, values, strict=True))
    forward = torch.func.vmap(_forward(workspace.model))
    try:
        with StackedConvolutions():
            scores = forward(named, batch.images, batch.keys)
    except RuntimeError as error:
        raise _refusal(workspace.model, error) from error
    losses = F.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), reduction="none")
    sums = (losses.view_as(batch.labels) * batch.weights).sum(1)
    sizes = batch.weights.sum(1)
    # A client without such a step has no examples in it.
    gradients = list(torch.autograd.grad((sums / sizes.clamp_min(1.0)).sum(), values))
    with torch.no_grad():
        workspace.losses[:active] += sums.double()
        taking = sizes.clamp_max(1.0) if partly else None
        _update(workspace, gradients, train, mu, taking=taking)


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
    def forward(parameters: dict[str, Tensor], images: Tensor, keys: Tensor) -> Tensor:
        with dropout_keys(keys):
            out: Tensor = functional_call(model, parameters, (images,))
        return out

    return forward


def _update(
    workspace: StackedWorkspace,
    gradients: list[Tensor],
    train: TrainConfig,
    mu: float,
    *,
    taking: Tensor | None,
) -> None:
    """FlatSGD's step for the clients at the head of the stack, each with its own norm.

    `taking` (K,) is 1 for those that take it, 0 for those whose values stay; None: all take it.
    """
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
        torch._foreach_mul_(velocity, train.momentum)
        torch._foreach_add_(velocity, gradients)
        gradients = velocity
    steps = torch._foreach_mul(gradients, workspace.rate)
    if taking is not None and (mu or train.weight_decay or train.momentum):
        # Without any of them, a client whose examples have no weight has no gradient.
        for step in steps:
            step.mul_(taking.view(-1, *[1] * (step.dim() - 1)))
    torch._foreach_sub_(values, steps)
