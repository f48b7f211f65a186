"""The model on the server: initial tensors, evaluation, and what a training step costs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedkn.algorithms import federation_rule, keeps_model
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, device_of, federated_data, inputs_of, normalizer_of
from fedkn.federation import on_the_wire
from fedkn.normalizers import FederationRule, TensorRole
from fedkn.training import Evaluation, Workspace, check_precision, evaluate, refuse_unprivate
from fedkn.training.memory import step_memory

__all__ = ["GlobalModel"]


class GlobalModel:
    """The configured model and the images that the server evaluates it on.

    Attributes:
        parameters: the names of the tensors that are parameters.
        size: number of trainable parameters (elements). local_tensors: how many clients keep of
            their own. Where they are of the global model, it has them as initialised.
        spreads, counts: the names of buffers that hold variances or deviations, and counts of
            batches. examples: how many the experiment has to train on.

    Raises:
        UserError: a configuration or data that cannot work.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._device = device_of(config)
        normalizer = normalizer_of(config)
        network = build_model(config).to(self._device)
        if config.privacy.mechanism == "example":
            refuse_unprivate(normalizer, network, config.train.precision)
            if not config.privacy.noise_multiplier:
                raise UserError(
                    "privacy.noise_multiplier = 0 protects nothing (epsilon is infinite): raise "
                    "it, or set privacy.mechanism = 'none'"
                )
        self._normalizer = normalizer
        self.parameters = [name for name, _ in network.named_parameters()]
        self.size = sum(p.numel() for p in network.parameters() if p.requires_grad)
        roles = federation_rule(config, normalizer, network).values()
        self.local_tensors = sum(role is TensorRole.LOCAL for role in roles)
        if own := keeps_model(config):
            self.local_tensors = len(roles)
        if self.local_tensors and not config.evaluation.client_fraction:
            normalizers_own = TensorRole.LOCAL in normalizer.federation_rule(network).values()
            keeper = config.normalizer.name if normalizers_own else config.strategy.name
            raise UserError(
                f"{keeper} keeps {'a model' if own else 'tensors'} on the clients: set "
                "evaluation.client_fraction (say 0.2), so that each client's own model can be "
                "evaluated"
            )
        buffers = [name for name, _ in network.named_buffers()]
        self.spreads, self.counts = (
            frozenset(name for name in buffers if name.rpartition(".")[2] in kinds)
            for kinds in (_SPREADS, _COUNTS)
        )
        self._workspace = Workspace(network)
        self._inputs = inputs_of(config, self._device)
        self._minimum_batch = normalizer.minimum_batch
        data = federated_data(config)
        held = data.validation if config.evaluation.split == "validation" else data.test
        if not len(held):
            raise UserError(
                "evaluation.split = 'validation', but data.validation_fraction is 0: raise it"
            )
        self._held = held.to(self._device)
        self._sample = data.train
        self.examples = len(data.train)

    def rule(self, round_: int) -> FederationRule:
        """Return the role of every tensor in `round_` (from 1)."""
        model = self._workspace.model
        return federation_rule(self._config, self._normalizer, model, round_)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the initial tensors that travel, in the order of the model's state."""
        self._workspace.load()
        state = self._workspace.state()
        return {name: state[name].cpu().numpy().copy() for name in on_the_wire(self.rule(1))}

    def evaluate(self, tensors: Mapping[str, np.ndarray]) -> Evaluation:
        """Evaluate the global tensors on the configured split."""
        self._workspace.load({name: torch.from_numpy(value) for name, value in tensors.items()})
        return evaluate(
            self._workspace.model,
            self._held.inputs,
            self._held.targets,
            self._inputs,
            self._config.evaluation.batch_size,
        )

    def memory(self) -> dict[str, int]:
        """Return ``peak_bytes`` of one local batch's training and the ``batch_size`` it is for."""
        size = max(self._config.train.batch_size, self._minimum_batch)
        some = self._sample.select(np.arange(size) % len(self._sample)).to(self._device)
        self._workspace.load()
        precision = self._config.train.precision
        check_precision(precision, self._device)
        peak = step_memory(
            self._workspace.model, self._inputs(some.inputs), some.targets, precision=precision
        )
        return {"peak_bytes": peak, "batch_size": size}


# What the layers call them.
_SPREADS = ("running_var", "running_deviation")
_COUNTS = ("batches", "num_batches_tracked")
