"""Makes this process one that runs clients: the parent of a run and each of its workers."""

from __future__ import annotations

import torch

from clients.app import app as client_app
from clients.app import train_directly
from clients.local_state import folder_in_run
from fedkn.config import ExperimentConfig
from simulations.engines.allocator import keep_freed_memory
from simulations.engines.device_queues import open_queues
from simulations.engines.host import ClientHost
from simulations.engines.identity import assume_server_identity
from simulations.engines.together import train_together

__all__ = ["host_of"]


def host_of(config: ExperimentConfig, *, together: bool) -> ClientHost:
    """Return what runs the clients of `config` in this process, and prepare the process for it.

    `together`: the clients of a group are trained at once, stacked.
    """
    assume_server_identity()
    keep_freed_memory()
    open_queues()
    torch.set_num_threads(1)
    train = train_together if together else None
    return ClientHost(
        client_app,
        config.partition.clients,
        config.flat(),
        train,
        directly=train_directly,
        state_folder=folder_in_run(config),
    )
