"""The Ray engine: Flower's own simulation runtime, for several GPUs or several machines.

The same ServerApp and ClientApp objects as everywhere. Flower's runtime gives neither of them a
run config when it is started from Python, so both are wrapped to find theirs. Where RAY_ADDRESS
names a cluster, clients train on its machines; else a runtime is started here.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.local_state import STATE_FOLDER, folder_in_run
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, device_of, federated_data, inputs_of, task_of
from fedkn.machine import usable_cores
from fedkn.text import printable
from fedkn.training.captured import PRODUCTS
from fedkn.training.memory import step_memory
from server.app import app as server_app
from simulations.engines.outcome import Outcome, outcome_in, server_context

__all__ = ["gpu_share", "run_experiment"]


def run_experiment(config: ExperimentConfig) -> Outcome:
    """Run `config` to its end on Ray; resumes from its checkpoints if there are any.

    Raises:
        UserError: Ray is not installed, or the configuration names one GPU; or there is no cluster
            at RAY_ADDRESS.
        FedknError: what the ServerApp raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "engine 'ray' needs Ray: pip install 'fedkn[ray]', or set engine = 'inprocess'"
        )
    if config.device.startswith("cuda:"):
        raise UserError(
            f"device = '{config.device}': Ray gives each client its part of a GPU. Set device = "
            "'cuda', and CUDA_VISIBLE_DEVICES to choose among them"
        )
    from flwr.simulation import run_simulation  # noqa: PLC0415 - slow, and only for this engine

    server = _ConfiguredServer(config)
    with (
        tempfile.TemporaryDirectory(prefix="fk", dir="/tmp") as folder,
        _surroundings(folder) as values,
        _cluster(values),
    ):
        run_simulation(
            server_app=server,
            client_app=_ConfiguredClient(config),
            num_supernodes=config.partition.clients,
            backend_config=_backend(config, folder),
        )
    return outcome_in(server.context)


def gpu_share(config: ExperimentConfig) -> float:
    """Return the part of a GPU that one client takes, by its memory: 0 where there is no GPU.

    Measured: a training step's peak; computed: the model, its gradients and momentum, the images,
    and what CUDA itself takes in every process.
    """
    device = device_of(config)
    if device.type != "cuda":
        return 0.0
    model = build_model(config).to(device)
    train = federated_data(config).train
    some = train.select(np.arange(config.train.batch_size) % len(train)).to(device)
    x = inputs_of(config, device)(some.inputs)
    step = step_memory(model, x, some.targets, task_of(config))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    images = train.inputs.numel() * train.inputs.element_size()
    needed = _CUDA_ITSELF + images + _COPIES * parameters + _RECORDED * (step + PRODUCTS)
    _, total = torch.cuda.mem_get_info(device)
    # In hundredths, rounded up: Ray fits as many clients as the fractions allow.
    return min(1.0, math.ceil(100 * needed / total) / 100)


_CUDA_ITSELF = 700 * 1024 * 1024
"""Context, kernels and the allocator's rounding, in every process."""

_COPIES = 4
"""Of the parameters: values, initial values, gradients, momentum."""

_RECORDED = 3
"""Steps are recorded, and each batch size's graph keeps memory of its own."""


def _backend(config: ExperimentConfig, folder: str) -> dict[str, Any]:
    return {
        # Not looked at where a cluster is there already.
        "init_args": {
            "num_cpus": config.workers or usable_cores(),
            "include_dashboard": False,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "_temp_dir": folder,
        },
        "client_resources": {"num_cpus": 1, "num_gpus": _share(config)},
    }


def _share(config: ExperimentConfig) -> float:
    """Return `gpu_share` as it is where the clients train."""
    import ray  # noqa: PLC0415 - slow, and only for this engine

    if not ray.is_initialized():
        return gpu_share(config)
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray has it so
    if config.device == "cpu" or not resources.get("GPU"):
        return 0.0
    return float(ray.get(ray.remote(num_gpus=1)(gpu_share).remote(config)))


class _ConfiguredServer(ServerApp):
    """The ServerApp with its run config; keeps the context in which it ran."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.context = server_context(config)

    def __call__(self, grid: Grid, context: Context) -> None:
        del context
        server_app(grid, self.context)


class _ConfiguredClient(ClientApp):
    """The ClientApp with its run config. Pickled to Ray's actors, so it holds nothing else."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self._run_config = config.flat()
        self._node_config = {STATE_FOLDER: folder_in_run(config)}

    def __call__(self, message: Message, context: Context) -> Message:
        # In the actor: the app object itself need not be picklable.
        from clients.app import app  # noqa: PLC0415
        from simulations.engines.allocator import keep_freed_memory  # noqa: PLC0415

        keep_freed_memory()
        torch.set_num_threads(1)
        # A context's run config cannot be changed; its state is the same object in both.
        own = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**context.node_config, **self._node_config},
            state=context.state,
            run_config=dict(self._run_config),
        )
        return app(message, own)


@contextmanager
def _cluster(values: Mapping[str, str]) -> Iterator[None]:
    """Take part, inside the block, in the cluster that RAY_ADDRESS names, if it names one.

    Its machines were started by somebody else: what clients need of the environment goes along.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        yield
        return
    import ray  # noqa: PLC0415 - slow, and only for this engine

    given = {key: value for key, value in values.items() if not key.startswith(("RAY_", "FLWR_H"))}
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": given},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = printable((str(error).strip().splitlines() or [""])[0], 200)
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS = '{printable(address, 80)}' ({reason}): start "
            "it with 'ray start --head', or unset RAY_ADDRESS to train on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _surroundings(folder: str) -> Iterator[Mapping[str, str]]:
    """Set what Flower and Ray read from the environment, yield it, and undo it."""
    values = {
        "FLWR_HOME": folder,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise it warns that it hides GPUs from actors that asked for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray lowers the priority of its workers; ours are all there is to do.
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        # The actors' import path.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    before = {key: os.environ.get(key) for key in values}
    threads = torch.get_num_threads()
    logger = logging.getLogger("flwr")
    os.environ.update(values)
    torch.set_num_threads(1)
    logger.addFilter(_wanted)
    try:
        yield values
    finally:
        logger.removeFilter(_wanted)
        torch.set_num_threads(threads)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _wanted(record: logging.LogRecord) -> bool:
    """Let pass what our ServerApp logs, and what goes wrong."""
    return "server" in Path(record.pathname).parts or record.levelno >= logging.ERROR
