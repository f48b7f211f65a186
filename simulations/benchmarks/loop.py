"""The floor: federated averaging as one would write it by hand in PyTorch, with no framework.

On a GPU all images are there from the beginning, shuffles are drawn there, maps and filters lie
channels last, products are computed as `train.precision` has it, and nothing waits for the device
before a round is over.
"""

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
from fedkn.experiment import build_model, device_of, federated_data, inputs_of
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
            pipe.send(({k: v.cpu().numpy() for k, v in weights.items()}, share))
        sums, count = trainer.train(weights, shares[0])
        for pipe in pipes:
            more, others = pipe.recv()
            count += others
            for name, value in more.items():
                sums[name] += torch.from_numpy(value).to(trainer.device)
        weights = {name: value / count for name, value in sums.items()}
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
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


def _layout(device: torch.device) -> torch.memory_format:
    """Return how one would lay out maps oneself: as is faster on a GPU, else as by default."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class _Trainer:
    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self.device = device_of(config)
        layout = _layout(self.device)
        self.model = written_by_hand(build_model(config)).to(self.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
        data = federated_data(config)
        self._train = data.train.to(self.device)
        self._parts = [torch.as_tensor(part, device=self.device) for part in data.parts]
        self._inputs = replace(inputs_of(config, self.device), memory_format=layout)
        if self.device.type == "cuda":
            fast = config.train.precision in ("auto", "tf32")
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast

    def train(
        self, weights: dict[str, Tensor], clients: Sequence[int] | np.ndarray
    ) -> tuple[dict[str, Tensor], int]:
        """Return the sum of the clients' weights times their examples, and of the examples."""
        train = self._config.train
        sums = {name: torch.zeros_like(value) for name, value in weights.items()}
        count = 0
        for client in clients:
            part = self._parts[int(client)]
            inputs, targets = self._train.inputs[part], self._train.targets[part]
            self.model.load_state_dict(weights)
            self.model.train()
            optimizer = torch.optim.SGD(self.model.parameters(), lr=train.learning_rate)
            order = torch.randperm(len(part), device=self.device)
            for batch in torch.split(order, train.batch_size):
                optimizer.zero_grad()
                with dropout_stream(0):
                    scores = self.model(self._inputs(inputs[batch]))
                F.cross_entropy(scores, targets[batch]).backward()  # type: ignore[no-untyped-call]  # torch annotates it so
                optimizer.step()
            for name, value in self.model.state_dict().items():
                sums[name] += value * len(part)
            count += len(part)
        return sums, count


def _serve(run_config: dict[str, Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    trainer = _Trainer(ExperimentConfig.resolve(run_config))
    while True:
        try:
            weights, clients = pipe.recv()
        except EOFError:
            return
        tensors = {
            name: torch.from_numpy(value).to(trainer.device) for name, value in weights.items()
        }
        sums, count = trainer.train(tensors, clients)
        pipe.send(({name: value.cpu().numpy() for name, value in sums.items()}, count))
