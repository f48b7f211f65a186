"""The engines without a network: ServerApp and ClientApps on one machine.

`inprocess` trains one client after another, in this process and in workers, one thread each;
`batched` does the same with groups of clients that train at once, stacked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedkn.config import ExperimentConfig
from fedkn.experiment import device_of, federated_data
from server.app import app as server_app
from simulations.engines.choice import gpus_of, processes_of
from simulations.engines.crew import Crew
from simulations.engines.grid import InProcessGrid
from simulations.engines.local_host import host_of
from simulations.engines.outcome import Outcome, outcome_in, server_context
from simulations.engines.together import group_size

__all__ = ["InProcessGrid", "Outcome", "run_experiment"]


def run_experiment(config: ExperimentConfig, *, together: bool = False) -> Outcome:
    """Run `config` to its end on this machine; resumes from its checkpoints if there are any.

    `together`: as the `batched` engine, else as `inprocess`, whatever ``config.engine`` says.

    Raises:
        FedknError: what the ServerApp raises.
        UserError: the normalizer's clients cannot train together.
    """
    context = server_context(config)
    with _one_thread(), _collector_at_rest():
        group = group_size(config) if together else 1
        host = host_of(config, together=together)
        crew = Crew(host, (config, together), processes_of(config), gpus=gpus_of(config))
        try:
            sizes = [len(part) for part in federated_data(config).parts]
            server_app(InProcessGrid(host, crew, sizes, device_of(config), group=group), context)
        finally:
            crew.close()
    return outcome_in(context)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread inside the block: small models are fastest so, and so the results are
    the same bits on every machine and in every process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keep the garbage collector, inside the block, from looking through what there is already.

    Training makes many short-lived objects, and each time the collector would visit the hundreds of
    thousands that PyTorch and Flower consist of.
    """
    gc.collect()  # what earlier runs have left would be kept as well
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
