"""The floor: federated averaging as one would write it by hand in PyTorch, with no framework."""

from __future__ import annotations

import multiprocessing
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, federated_data, inputs_of
from fedkn.layers import dropout_stream
from fedkn.models.blocks import Halve
from fedkn.normalizers.fused import FusedSequential

__all__ = ["run_loop", "written_by_hand"]


def run_loop(config: ExperimentConfig, processes: int, each_round: Callable[[], None]) -> None:
    """Train `config` in so many processes, each with a fixed share of the cohort."""
    torch.set_num_threads(1)
    trainer = _Trainer(config)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    for _ in range(processes - 1):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=_serve, args=(config.flat(), theirs), daemon=True).start()
        pipes.append(ours)
    draw = np.random.default_rng(config.seed)
    for _ in range(config.rounds):
        cohort = draw.choice(config.partition.clients, config.cohort, replace=False)
        shares = np.array_split(cohort, processes)
        for pipe, share in zip(pipes, shares[1:], strict=True):
            pipe.send(({k: v.numpy() for k, v in weights.items()}, share))
        sums, count = trainer.train(weights, shares[0])
        for pipe in pipes:
            more, others = pipe.recv()
            count += others
            for name, value in more.items():
                sums[name] += torch.from_numpy(value)
        weights = {name: value / count for name, value in sums.items()}
        each_round()


def written_by_hand(model: nn.Module) -> nn.Module:
    """Return `model` as one would write it oneself: PyTorch's own layers, laid out as by default.

    Of fedkn's layers those are left that PyTorch lacks; its kernels for GroupNorm and pooling, and
    its choice of the layout, are not the rivals'. For images of 32x32 and more: smaller ones are
    pooled less often by fedkn's networks.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, FusedSequential):
            setattr(model, name, nn.Sequential(OrderedDict(child.named_children())))
        elif isinstance(child, Halve):
            kind = nn.MaxPool2d if child.kind == "max" else nn.AvgPool2d
            setattr(model, name, kind(2))
        else:
            written_by_hand(child)
    for module in model.modules():
        module._forward_pre_hooks.clear()  # fedkn's checks
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


class _Trainer:
    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self.model = written_by_hand(build_model(config))
        self._data = federated_data(config)
        self._inputs = replace(
            inputs_of(config, torch.device("cpu")), memory_format=torch.contiguous_format
        )

    def train(
        self, weights: dict[str, Tensor], clients: Sequence[int] | np.ndarray
    ) -> tuple[dict[str, Tensor], int]:
        """Return the sum of the clients' weights times their examples, and of the examples."""
        train = self._config.train
        sums = {name: torch.zeros_like(value) for name, value in weights.items()}
        count = 0
        for client in clients:
            data = self._data.client(int(client))
            self.model.load_state_dict(weights)
            self.model.train()
            optimizer = torch.optim.SGD(self.model.parameters(), lr=train.learning_rate)
            for batch in torch.split(torch.randperm(len(data)), train.batch_size):
                optimizer.zero_grad()
                with dropout_stream(0):
                    scores = self.model(self._inputs(data.inputs[batch]))
                F.cross_entropy(scores, data.targets[batch]).backward()  # type: ignore[no-untyped-call]  # torch annotates it so
                optimizer.step()
            for name, value in self.model.state_dict().items():
                sums[name] += value * len(data)
            count += len(data)
        return sums, count


def _serve(run_config: dict[str, Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    trainer = _Trainer(ExperimentConfig.resolve(run_config))
    while True:
        try:
            weights, clients = pipe.recv()
        except EOFError:
            return
        tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
        sums, count = trainer.train(tensors, clients)
        pipe.send(({name: value.numpy() for name, value in sums.items()}, count))
