"""A step tried before the first round: what is wrong with a model or a task is said in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.tasks import Task
from fedkn.text import printable
from fedkn.training.draws import own_draws
from fedkn.training.optimizer import shared_kind, trainable

__all__ = ["trial_step"]

ResultT = TypeVar("ResultT")


def trial_step(
    model: nn.Module, goal: Task, x: Tensor, targets: Tensor, *, outputs: int
) -> list[str]:
    """Take a step with `model` on `x` (N, ...), N > 1, without moving it; return warnings.

    Whoever brings a model or a task is told here what it does wrong, and not by what training
    makes of it. Parameters and their gradients stay as they are; buffers and what modules count do
    not. The model is left in training mode.

    Args:
        outputs: how many the network was built with, as the task asked for.

    Raises:
        UserError: parameters that cannot be trained together; outputs of another shape or dtype,
            or not finite; losses that are not one number for each example, depend on the others,
            are not finite or have no gradient; metrics that are not what the task says, or no sums.
    """
    shared_kind(trainable(model))
    with own_draws(x.device, 0) as draws, draws.seeded(0):
        model.train()
        found = _guarded("the network", lambda: model(x))
        _check_outputs(found, len(x))
        goal.check_outputs(found, targets, outputs)
        _check_finite(found, "the network's outputs", "its initial weights, or data.scaling")
        loss = _tried_loss(goal, found, targets)
        warnings = _check_gradients(model, loss)
        model.eval()
        with torch.no_grad():
            evaluated = _guarded("the network in evaluation", lambda: model(x))
        model.train()
        _check_outputs(evaluated, len(x))
        _try_metrics(goal, evaluated, targets)
    return warnings


_TOLERANCE = 1e-4
_NAMED = 5


def _tried_loss(goal: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    whose = f"task '{printable(type(goal).__name__, 60)}'"
    losses = _guarded(f"{whose}: losses", lambda: goal.losses(outputs, targets))
    if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
        raise UserError(
            f"{whose}: losses returned {_kind(losses)} for {len(outputs)} examples: return one "
            f"loss for each, ({len(outputs)},), with reduction='none' and the mean over all axes "
            "but the first"
        )
    if not losses.is_floating_point():
        raise UserError(f"{whose}: losses are {_kind(losses)}: return floats")
    _check_finite(losses, f"{whose}: losses", "what losses computes (a logarithm of 0, a division)")
    first = _guarded(f"{whose}: losses", lambda: goal.losses(outputs[:1], targets[:1]))
    if not _alike(first, losses[:1]):
        raise UserError(
            f"{whose}: an example's loss changes with those beside it ({losses[0].item():g}, alone "
            f"{first.flatten()[0].item():g}): compute each from its own outputs and target alone"
        )
    mean = _guarded(f"{whose}: mean_loss", lambda: goal.mean_loss(outputs, targets))
    if not isinstance(mean, Tensor) or mean.dim() or not _alike(mean, losses.mean()):
        raise UserError(
            f"{whose}: mean_loss returned {_kind(mean)}"
            f"{f' ({mean.item():g})' if isinstance(mean, Tensor) and not mean.dim() else ''}, but "
            f"the mean of losses is {losses.mean().item():g}: leave mean_loss out, or return that"
        )
    if not mean.requires_grad:
        raise UserError(
            f"{whose}: its loss has no gradient: compute it from the outputs with PyTorch's "
            "operations alone (no argmax, no detach, no NumPy), and train some parameters"
        )
    return mean


def _check_outputs(outputs: object, examples: int) -> None:
    right = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() > 0
    if not right or not isinstance(outputs, Tensor) or len(outputs) != examples:
        raise UserError(
            f"the network returned {_kind(outputs)} for {examples} examples: return one tensor of "
            f"floats with the examples on its first axis, ({examples}, …)"
        )


def _check_finite(values: Tensor, what: str, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"{what} are not finite (NaN or infinite) before any training: look at {where}"
        )


def _check_gradients(model: nn.Module, loss: Tensor) -> list[str]:
    named = trainable(model)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    unused = [name for name, g in zip(named, gradients, strict=True) if g is None]
    if not unused:
        return []
    if len(unused) == len(named):
        raise UserError(
            "no parameter of the network takes part in its outputs: let forward use its layers, "
            "without detach or torch.no_grad"
        )
    shown = ", ".join(printable(name, 60) for name in unused[:_NAMED])
    more = f", … {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    return [
        f"the network's outputs do not depend on {len(unused)} of its {len(named)} parameters, "
        f"which stay as they are initialised: {shown}{more}. Use them in forward, or take them out"
    ]


def _try_metrics(goal: Task, outputs: Tensor, targets: Tensor) -> None:
    whose = f"task '{printable(type(goal).__name__, 60)}'"

    def sums_of(part: slice) -> dict[str, Tensor]:
        sums = _guarded(f"{whose}: sums", lambda: goal.sums(outputs[part], targets[part]))
        if not isinstance(sums, dict) or not all(
            isinstance(of, Tensor) and of.dtype in (torch.int64, torch.float64)
            for of in sums.values()
        ):
            raise UserError(
                f"{whose}: sums must return tensors of int64 or float64 by name, so that sums over "
                "many examples lose nothing"
            )
        return {name: of.cpu() for name, of in sums.items()}

    whole, first, rest = sums_of(slice(None)), sums_of(slice(1)), sums_of(slice(1, None))
    for name, of in whole.items():
        if name not in first or name not in rest or not _alike(first[name] + rest[name], of):
            raise UserError(
                f"{whose}: its sums '{printable(name, 60)}' of all examples are not those of its "
                "parts, added: return sums over examples, no means, and divide in values"
            )
    values = _guarded(f"{whose}: values", lambda: goal.values(whole))
    for metric in goal.metrics:
        value = values.get(metric.name) if isinstance(values, dict) else None
        name = printable(metric.name, 60)
        if not isinstance(value, float):
            raise UserError(
                f"{whose}: values has no float '{name}', which is one of its metrics: return all "
                "of them by name"
            )
        if not math.isnan(value) and not metric.lowest <= value <= metric.highest:
            raise UserError(
                f"{whose}: its {name} is {value:g}, but was said to lie between {metric.lowest:g} "
                f"and {metric.highest:g}: mend values, or the bounds in metrics"
            )
    if strange := values.keys() - {metric.name for metric in goal.metrics}:
        raise UserError(
            f"{whose}: values has '{printable(min(strange), 60)}', which is none of its metrics: "
            "add it to metrics"
        )


def _guarded(whose: str, call: Callable[[], ResultT]) -> ResultT:
    """Return what somebody's own code returns, or say where it failed."""
    try:
        return call()
    except UserError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{whose} fails on the first examples: {type(error).__name__}: {printable(error, 200)}"
        ) from error


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(value.shape)}"
    return f"a {printable(type(value).__name__, 60)}"
