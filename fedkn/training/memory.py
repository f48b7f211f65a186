"""How much memory a local training step takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from fedkn.tasks import Task
from fedkn.training.draws import own_draws
from fedkn.training.precision import training_scores

__all__ = ["peak_bytes", "saved_activations", "step_memory"]


def step_memory(
    model: nn.Module, x: Tensor, targets: Tensor, goal: Task, *, precision: str = "float32"
) -> int:
    """Return the most bytes that one forward and backward pass holds in tensors at once.

    Beyond the model's parameters, gradients, and the batch `x` (N, C, H, W), float32, itself:
    activations kept for the backward pass, gradients of activations, and temporary tensors.
    `targets` are (N, ...), `goal` says the loss; `precision` is ``train.precision``. The step
    leaves its marks: gradients are zero afterwards, the model is in training mode, and running
    statistics have seen the batch.
    """
    for parameter in model.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with draws.seeded(0):
            loss = goal.mean_loss(training_scores(model, x, precision), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so

    model.train()
    with own_draws(x.device, 0) as draws:
        peak = peak_bytes(step, x.device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return peak


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that `step` has allocated on `device` at once.

    Read from the allocator's own events (CPU) or counters (CUDA, after a first step), not from
    the process's resident memory, which says more about the allocator than about the model.
    """
    if device.type == "cuda":
        step()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _no_chatter(),
        # Not torch.profiler's: that imports torch._inductor, which takes seconds.
        profile(profile_memory=True) as recorded,
    ):
        step()
    held = peak = 0
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_activations(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass of `x` keeps for the backward pass.

    Counted once for each storage, without the parameters and without `x` itself.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    known.add(x.untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    watch = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with own_draws(x.device, 0), watch:
        output = model(x)
    # The graph lives until here, so no address was used twice.
    del output
    return sum(kept.values())


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Send the process's standard error to nowhere: the profiler prints two lines a call there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
