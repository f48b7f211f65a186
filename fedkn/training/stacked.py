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
from torch import Tensor, nn
from torch.func import functional_call

from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.gpus import full_gpu
from fedkn.layers.kernel.dropout import dropout_keys
from fedkn.layers.stacked_convolution import StackedConvolutions
from fedkn.seeds import derive
from fedkn.text import printable
from fedkn.training.batches import BatchPlan, plan_batches
from fedkn.training.captured import Captured
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate
from fedkn.training.precision import computing_in
from fedkn.training.recorded import Capture
from fedkn.training.rule import LocalRule
from fedkn.training.stacked_batches import Batch, StackedBatches, StackedClient
from fedkn.training.stacked_workspace import StackedTables, StackedWorkspace

__all__ = ["forward_of", "train_stacked"]


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
            have a rule that cannot be stacked, accumulate the gradient or compute in another
            precision than float32, or as `StackedWorkspace.load`.
    """
    started = time.perf_counter()
    kinds = {
        (c.task.round_, c.task.train, c.task.learning_rate, c.task.rules, c.task.goal)
        for c in clients
    }
    if len(kinds) != 1:
        raise ValueError("clients that train together must be given the same training")
    train, rules = clients[0].task.train, clients[0].task.rules
    if any(client.task.carried for client in clients) or any(rule.alone for rule in rules):
        raise ValueError("clients that train together keep nothing and correct nothing")
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


def _plan(client: StackedClient, minimum_batch: int) -> BatchPlan:
    task = client.task
    return plan_batches(
        len(client.targets),
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
    rules = _acting(task)
    if workspace.capture is None:
        for batch in batches.one_by_one():
            yield partial(_step, workspace, batch, task, rules, partly=False)
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
        self._tables = StackedTables.of(workspace, batches)
        self._filled = 0

    def take(self, step: int) -> None:
        workspace, task = self._workspace, self._task
        if step == self._filled:
            self._fill(step)
        active, stack = self._batches.active(step), workspace.size
        while stack // 2 >= active:
            stack //= 2
        rules = _acting(task)
        key = (stack, self._tables.shape, task.train, task.goal, rules)
        if key not in workspace.steps:
            workspace.steps[key] = self._captured(stack, rules)
        workspace.steps[key].replay()

    def _captured(self, stack: int, rules: tuple[LocalRule, ...]) -> Captured:
        workspace, task = self._workspace, self._task
        changed = (*workspace.values, *workspace.velocity, workspace.losses)
        tables, inputs = self._tables, self._batches.inputs

        def step() -> None:
            _step(workspace, tables.batch(stack, inputs), task, rules, partly=True)

        try:
            return self._capture(step, (*changed, tables.place))
        except RuntimeError as error:
            if full_gpu(error):
                raise
            reason = printable((str(error).strip().splitlines() or ["no reason given"])[0], 200)
            raise UserError(
                f"a step of this network and its loss cannot be recorded ({reason}): compute the "
                "loss without looking at values on the host, or set engine = 'inprocess'"
            ) from error

    def _fill(self, first: int) -> None:
        batches = self._batches
        tables = self._tables
        self._filled = end = min(len(batches), first + tables.room)
        examples, targets = batches.taken(first, end)
        here = slice(0, end - first), slice(0, examples.shape[1])
        for table, values in (
            (tables.examples, examples),
            (tables.targets, targets),
            (tables.weights, batches.weights[first:end]),
            (tables.keys, batches.keys[first:end]),
        ):
            table[here].copy_(values)
        tables.weights[: end - first, examples.shape[1] :].zero_()
        tables.place.zero_()


def _acting(task: LocalTask) -> tuple[LocalRule, ...]:
    return tuple(rule for rule in task.rules if rule.acts)


def _step(
    workspace: StackedWorkspace,
    batch: Batch,
    task: LocalTask,
    rules: tuple[LocalRule, ...],
    *,
    partly: bool,
) -> None:
    """Take a step; `partly`: some of the clients may have no example in the batch."""
    active = len(batch.keys)
    # New leaves on the same memory: only the head of the stack has a step to take.
    values = [value.detach()[:active].requires_grad_() for value in workspace.values]
    named = {**workspace.shared(active), **dict(zip(workspace.initial, values, strict=True))}
    forward = torch.func.vmap(forward_of(workspace.model))
    try:
        with StackedConvolutions():
            outputs = forward(named, batch.x, batch.keys)
    except RuntimeError as error:
        raise _refusal(workspace.model, error) from error
    # Of every example by itself, so that all clients' can be asked for at once.
    losses = task.goal.losses(outputs.flatten(0, 1), batch.targets.flatten(0, 1))
    sums = (losses.view_as(batch.weights) * batch.weights).sum(1)
    sizes = batch.weights.sum(1)
    # A client without such a step has no examples in it.
    gradients = list(torch.autograd.grad((sums / sizes.clamp_min(1.0)).sum(), values))
    with torch.no_grad():
        workspace.losses[:active] += sums.double()
        taking = sizes.clamp_max(1.0) if partly else None
        _update(workspace, gradients, task.train, rules, taking=taking)


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


def forward_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Return one client's forward pass, as a function of its parameters, inputs and keys."""

    def forward(parameters: dict[str, Tensor], x: Tensor, keys: Tensor) -> Tensor:
        with dropout_keys(keys):
            out: Tensor = functional_call(model, parameters, (x,))
        return out

    return forward


def _named(workspace: StackedWorkspace, tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(workspace.initial, tensors, strict=True))


def _update(
    workspace: StackedWorkspace,
    gradients: list[Tensor],
    train: TrainConfig,
    rules: tuple[LocalRule, ...],
    *,
    taking: Tensor | None,
) -> None:
    """FlatSGD's step for the clients at the head of the stack, each with its own norm.

    `rules` are those that act. `taking` (K,) is 1 for those that take it, 0 for those whose values
    stay; None: all take it.
    """
    active = len(gradients[0])
    values = [value[:active] for value in workspace.values]
    for rule in rules:
        rule.stacked(values, gradients, [begun[:active] for begun in workspace.begun])
    for rule in rules:
        rule.limit(_named(workspace, values), _named(workspace, gradients), stacked=True)
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
    if taking is not None and (rules or train.weight_decay or train.momentum):
        # Without any of them, a client whose examples have no weight has no gradient.
        for step in steps:
            step.mul_(taking.view(-1, *[1] * (step.dim() - 1)))
    torch._foreach_sub_(values, steps)
