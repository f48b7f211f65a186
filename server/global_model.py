"""The model on the server: initial tensors, evaluation, and what a training step costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedkn.algorithms import federation_rule, keeps_model
from fedkn.config import ExperimentConfig
from fedkn.data.examples import Examples
from fedkn.errors import UserError
from fedkn.experiment import (
    device_of,
    federated_data,
    inputs_of,
    network_of,
    normalizer_of,
    task_of,
    try_parts,
    why_alone,
)
from fedkn.federation import fixed_sha256, on_the_wire
from fedkn.normalizers import FederationRule, TensorRole
from fedkn.tasks import Metric
from fedkn.training import Evaluation, Workspace, check_precision, evaluate, refuse_unprivate
from fedkn.training.memory import step_memory

__all__ = ["GlobalModel"]


class GlobalModel:
    """The configured model and the examples that the server evaluates it on.

    Attributes:
        task: what it is trained for.
        parameters: the names of the tensors that are parameters.
        size: number of trainable parameters (elements). local_tensors: how many clients keep of
            their own. Where they are of the global model, it has them as initialised.
        fixed_sha256: of the tensors that nobody changes and that are not sent; empty: none.
        spreads, counts: the names of buffers that hold variances or deviations, and counts of
            batches. examples: how many the experiment has to train on.

    Raises:
        UserError: a configuration, a task, a model or data that cannot work (`try_parts`).
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self.task = task_of(config)
        self._device = device_of(config)
        normalizer = normalizer_of(config)
        built = network_of(config)
        self._record = built.record()
        network = built.module.to(self._device)
        if config.privacy.mechanism == "example":
            refuse_unprivate(normalizer, network, config.train.precision)
            if not config.privacy.noise_multiplier:
                raise UserError(
                    "privacy.noise_multiplier = 0 protects nothing (epsilon is infinite): raise "
                    "it, or set privacy.mechanism = 'none'"
                )
        self._normalizer = normalizer
        rule = federation_rule(config, normalizer, network)
        self.fixed_sha256 = fixed_sha256(rule, network.state_dict())
        self.parameters = [name for name, _ in network.named_parameters()]
        self.size = sum(p.numel() for p in network.parameters() if p.requires_grad)
        self.local_tensors = sum(role is TensorRole.LOCAL for role in rule.values())
        if own := keeps_model(config):
            self.local_tensors = len(rule)
        if self.local_tensors and not config.evaluation.client_fraction:
            normalizers_own = TensorRole.LOCAL in normalizer.federation_rule(network).values()
            keeper = config.normalizer.name if normalizers_own else config.strategy.name
            raise UserError(
                f"{keeper} keeps {'a model' if own else 'tensors'} on the clients: set "
                "evaluation.client_fraction (say 0.2), so that each client's own model can be "
                "evaluated"
            )
        if self.local_tensors and config.chooses:
            raise UserError(
                f"evaluation.patience and checkpoint.best judge the global model, but "
                f"{config.normalizer.name} keeps tensors on the clients: leave them out"
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
        splits = {config.evaluation.split} | ({"validation"} if config.chooses else set())
        self._held = {}
        for split in splits:
            held = data.validation if split == "validation" else data.test
            if not len(held):
                raise UserError(
                    "evaluation.split = 'validation', but data.validation_fraction is 0: raise it"
                )
            self._held[split] = held.to(self._device)
        self._sample = data.train
        self.examples = len(data.train)
        _check_target(config, self.task.metric)
        self._workspace.load()
        for warning in try_parts(config, self._workspace.model):
            _LOG.warning("%s", warning)

    def rule(self, round_: int) -> FederationRule:
        """Return the role of every tensor in `round_` (from 1)."""
        model = self._workspace.model
        return federation_rule(self._config, self._normalizer, model, round_)

    def record(self) -> dict[str, Any]:
        """Return what the run's record says of how the model came about (docs/run-folder.md)."""
        return {**self._record, "alone": why_alone(self._config)}

    @property
    def described(self) -> str:
        """How large the model is, in words, for the log."""
        total = self._record["parameters"]
        if self.size == total:
            return f"{total:,} parameters"
        return f"{self.size:,} of {total:,} parameters are trained"

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the initial tensors that travel, in the order of the model's state."""
        self._workspace.load()
        state = self._workspace.state()
        return {name: state[name].cpu().numpy().copy() for name in on_the_wire(self.rule(1))}

    def evaluate(self, tensors: Mapping[str, np.ndarray], split: str = "") -> Evaluation:
        """Evaluate the global tensors on `split`, by default the configured one.

        The other one is there if it is the validation images, and they choose.
        """
        held = self._held[split or self._config.evaluation.split]
        self._workspace.load({name: torch.from_numpy(value) for name, value in tensors.items()})
        return evaluate(
            self._workspace.model,
            held.inputs,
            held.targets,
            self._inputs,
            self._config.evaluation.batch_size,
            goal=self.task,
        )

    def memory(self) -> dict[str, int]:
        """Return ``peak_bytes`` of one local batch's training and the ``batch_size`` it is for."""
        size = max(self._config.train.batch_size, self._minimum_batch)
        some = self._some(size)
        self._workspace.load()
        precision = self._config.train.precision
        check_precision(precision, self._device)
        x, targets = self._inputs(some.inputs), some.targets
        peak = step_memory(self._workspace.model, x, targets, self.task, precision=precision)
        return {"peak_bytes": peak, "batch_size": size}

    def _some(self, size: int) -> Examples:
        return self._sample.select(np.arange(size) % len(self._sample)).to(self._device)


def _check_target(config: ExperimentConfig, metric: Metric) -> None:
    target = config.evaluation.target
    if isinstance(target, float) and not metric.lowest <= target <= metric.highest:
        raise UserError(
            f"evaluation.target = {target:g}, but {metric.name} is from {metric.lowest:g} to "
            f"{metric.highest:g}: give a value that it can have, or 'none'"
        )


# Flower's own logger, whose lines are shown wherever a run is followed.
_LOG = logging.getLogger("flwr")


# What the layers call them.
_SPREADS = ("running_var", "running_deviation")
_COUNTS = ("batches", "num_batches_tracked")
