"""A client's local step on the CPU recorded, beside the same computed as it comes.

``python -m simulations.benchmarks.recorded_steps [TASK ...]``: processor time, in turn, medians.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, federated_data, inputs_of, normalizer_of, task_of
from fedkn.training import LocalTask, Workspace, train_locally
from simulations.benchmarks.engine_tasks import TASKS, prepared

__all__ = ["step_seconds"]

_TURNS = 15
_CLIENTS = 5


def step_seconds(config: ExperimentConfig, workspaces: Sequence[Workspace]) -> list[float]:
    """Return the processor seconds of a step, a client's whole local round by its steps.

    In each of the `workspaces`, whose networks are those of `config`, in turn.
    """
    data, inputs = federated_data(config), inputs_of(config, torch.device("cpu"))
    normalizer, goal = normalizer_of(config), task_of(config)

    def seconds(workspace: Workspace, round_: int) -> float:
        begun, steps = time.process_time(), 0
        for client in range(_CLIENTS):
            own = data.client(client)
            task = LocalTask(
                seed=1, round_=round_, client=client, train=config.train, learning_rate=0.1,
                goal=goal,
            )  # fmt: skip
            workspace.load({})
            steps += train_locally(
                workspace, own.inputs, own.targets, task, inputs=inputs, normalizer=normalizer
            ).steps
        return (time.process_time() - begun) / steps

    for round_ in range(3):
        for workspace in workspaces:
            seconds(workspace, round_)
    gc.freeze()
    taken = [[seconds(workspace, turn) for workspace in workspaces] for turn in range(_TURNS)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def _both_ways(config: ExperimentConfig) -> list[float]:
    """Return the seconds of a step as it comes, and recorded."""
    workspaces = [Workspace(build_model(config)) for _ in range(2)]
    workspaces[0].host_recorder = None
    return step_seconds(config, workspaces)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| task | as it comes, ms a step | recorded, ms a step | ratio |\n|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ("small", "fixed", "kernel"):
            one, other = _both_ways(prepared(TASKS[name], Path(folder)))
            print(f"| {name} | {1e3 * one:.2f} | {1e3 * other:.2f} | {other / one:.2f} |")  # noqa: T201
