"""The batched engine's own part: how many clients train together, and by what."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import psutil
import torch

from clients.session import Session
from clients.trainer import Trained, Wanted
from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, device_of, federated_data, inputs_of, task_of
from fedkn.training.captured import PRODUCTS
from fedkn.training.concurrent import ConcurrentWorkspaces, train_concurrently
from fedkn.training.memory import step_memory
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from simulations.engines.choice import Together, processes_of, sharers_of, together_of

__all__ = ["group_size", "train_together"]

_LOG = logging.getLogger("flwr")


def train_together(wanted: Sequence[Wanted]) -> Sequence[Trained]:
    """Train clients of one session, in the way that its configuration asks for."""
    if not wanted:
        return []
    session = wanted[0].session
    clients = [
        StackedClient(w.task, w.received, *session.client_data(w.task.client)) for w in wanted
    ]
    room = _room(session, len(clients))
    if isinstance(room, ConcurrentWorkspaces):
        return train_concurrently(
            room, clients, inputs=session.inputs, normalizer=session.normalizer
        )
    return train_stacked(
        room, clients, inputs=session.inputs, minimum_batch=session.normalizer.minimum_batch
    )


def group_size(config: ExperimentConfig) -> int:
    """Return how many clients of `config` train together.

    Enough to share the work of a step's launches, and few enough for the cohort to make at least
    two groups on the CPU, for two cores; and for what a step holds in memory to take at most a
    quarter of what is free now, or of all that a GPU has: what other programs and cells hold there
    must not change results. Where memory is not short it follows from the configuration alone, not
    from the number of GPUs either, because the size of its group shows in the last bits of a
    client's update. Concurrent clients get the same bits in any group: every GPU gets its own.

    Raises:
        UserError: the configuration's clients cannot train together.
    """
    way = together_of(config)
    device = device_of(config)
    on_gpu = device.type == "cuda"
    most = _MOST_ON_GPU[way] if on_gpu else _MOST_ON_CPU
    least = 2 if not on_gpu else processes_of(config) if way == "concurrent" else 1
    groups = max(least, math.ceil(config.cohort / most))
    each = _bytes_of_a_client(config, device, way)
    free, counted = _memory(device)
    wanted = max(
        1, min(math.ceil(config.cohort / groups), counted // (4 * sharers_of(config) * each))
    )
    fits = max(1, free // each)
    if fits < wanted and way == "stacked":
        _LOG.warning(
            "%d clients train together in place of %d: other programs hold the GPU's memory. In "
            "the last bits results are others",
            fits,
            wanted,
        )
    return min(wanted, fits)


_MOST_ON_CPU = 10
"""Beyond that little is gained (docs/performance.md), and a cohort makes fewer groups."""
_MOST_ON_GPU: dict[Together, int] = {"stacked": 128, "concurrent": 64}
"""Twice as many stacked gain 2% a client (docs/gpu.md), and leave nothing to a second GPU."""

_STACKED = 2
"""Under vmap layers are made of plain operations, which keep about twice as many maps."""

_RECORDED = 3
"""Graphs of a client, one for each batch size, keep memory of their own; tables beside them."""

_COPIES = 6
"""Of the parameters: values, the first ones, momentum, gradients, two for the update's own work."""


def _room(session: Session, clients: int) -> StackedWorkspace | ConcurrentWorkspaces:
    """Return room for so many clients: the last one if it is large enough."""
    known = _known.get(session)
    if known is None or len(known) < clients:
        session.workspace.load()
        model = session.workspace.model
        _known.clear()
        if together_of(session.config) == "stacked":
            known = StackedWorkspace(model, clients)
        else:
            known = ConcurrentWorkspaces(model, clients)
        _known[session] = known
    return known


# Of the session that this process is in.
_known: dict[Session, StackedWorkspace | ConcurrentWorkspaces] = {}


def _bytes_of_a_client(config: ExperimentConfig, device: torch.device, way: Together) -> int:
    model = build_model(config).to(device)
    data = federated_data(config).train
    size = config.train.batch_size
    some = data.select(np.arange(size) % len(data)).to(device)
    inputs = inputs_of(config, device)
    step = step_memory(model, inputs(some.inputs), some.targets, task_of(config))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    held = _STACKED * step if way == "stacked" else _RECORDED * (step + PRODUCTS)
    return max(1, held + _COPIES * parameters)


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that are free on `device`, and those of which groups may take a part."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    free = int(psutil.virtual_memory().available)
    return free, free
