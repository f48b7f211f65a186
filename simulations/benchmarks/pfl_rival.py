"""pfl-research (https://github.com/apple/pfl-research, 0.6.0) on the same model and data.

Runs in an environment of its own, which has pfl: see `pfl_environment` in engines.py. For several
processes one is started for each rank, as torchrun does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, federated_data, inputs_of
from fedkn.layers import dropout_stream
from simulations.benchmarks.loop import written_by_hand

__all__ = ["run_pfl"]


def run_pfl(config: ExperimentConfig, each_round: Callable[[], None]) -> None:
    """Train `config` by pfl's FederatedAveraging on its simulated backend."""
    torch.set_num_threads(1)
    np.random.seed(config.seed)  # noqa: NPY002 - pfl's samplers draw from it
    data = federated_data(config)

    def user(client: int) -> Dataset:
        own = data.client(client)
        return Dataset(raw_data=[own.inputs, own.targets], user_id=str(client))

    sampler = get_user_sampler("random", list(range(config.partition.clients)))
    users = FederatedDataset(user, sampler)
    network = _Network(config)
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    train = config.train
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=config.rounds,
            evaluation_frequency=1_000_000,
            train_cohort_size=config.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=train.learning_rate,
            local_batch_size=train.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[_EachRound(each_round)],
    )
    if torch.distributed.is_initialized():
        # Left to the interpreter's end, its threads now and then abort the process.
        torch.distributed.destroy_process_group()


class _Network(nn.Module):
    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.model = written_by_hand(build_model(config))
        self._inputs = inputs_of(config, torch.device("cpu"))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.train()
        with dropout_stream(0):
            scores = self.model(self._inputs(images).contiguous())
        return F.cross_entropy(scores, labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        return {}


class _EachRound(TrainingProcessCallback):  # type: ignore[misc]  # pfl is not installed here
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        self._call()
        return False, Metrics()
