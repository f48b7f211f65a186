"""Run by test_ray_cluster: an experiment on a Ray cluster of two nodes, one core each.

``python -m tests.simulations.engines.ray_cluster FOLDER`` prints as its last line the hash of the
weights. Whoever trained notes its node in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkn.config import ExperimentConfig
from simulations.engines.run import run_experiment
from tests.own_parts import Plain

__all__ = ["NOTES", "SETTINGS", "Noting", "run_on_two_nodes"]

NOTES = "FEDKN_TEST_NODES"
SETTINGS = {
    "rounds": 2,
    "cohort": 6,
    "workers": 1,
    "partition.clients": 8,
    "data.train_limit": 160,
    "data.test_limit": 40,
    "model.name": "tests.simulations.engines.ray_cluster:Noting",
    "normalizer.name": "group",
    "train.batch_size": 4,
    "train.local_steps": 3,
    "device": "cpu",
}


class Noting(Plain):
    """A network that notes on which node of a cluster it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and NOTES in os.environ:
            import ray

            if ray.is_initialized() and (here := ray.get_runtime_context()).get_actor_id():
                (Path(os.environ[NOTES]) / here.get_node_id()).touch()
        found: Tensor = super().forward(x)
        return found


def run_on_two_nodes(folder: Path) -> str:
    """Start two nodes, run the experiment on them, and return the hash of its weights."""
    # There is nothing else to do here.
    os.environ.update({NOTES: str(folder), "RAY_worker_niceness": "0"})
    cluster = _with_patience(_head)
    try:
        _with_patience(lambda: cluster.add_node(**_NODE))
        cluster.wait_for_nodes(timeout=300)
        os.environ["RAY_ADDRESS"] = cluster.address
        config = ExperimentConfig.resolve(SETTINGS, {"engine": "ray"})
        return run_experiment(config).weights_sha256
    finally:
        cluster.shutdown()


_NODE: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 * 2**20,
    "include_log_monitor": False,
}
_TRIALS = 5


def _head() -> Any:
    from ray.cluster_utils import Cluster

    settings = {**_NODE, "include_dashboard": False, "no_monitor": True}
    return Cluster(initialize_head=True, head_node_args=settings)


def _with_patience(start: Callable[[], Any]) -> Any:
    """Return what `start` returns; Ray gives up on a node that is not up in 30 seconds."""
    for _ in range(_TRIALS - 1):
        with suppress(Exception):
            return start()
    return start()


if __name__ == "__main__":
    sys.stdout.write(f"\n{run_on_two_nodes(Path(sys.argv[1]))}\n")
