"""What one client needs to take part in an experiment, kept in memory between its messages."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from clients.device.data import (
    OwnData,
    describe,
    load_own,
    node_data,
    summary_here,
    summary_of,
)
from clients.device.profile import MIB, Profile, fitting_batch, node_profile, step_bytes
from fedkn.algorithms import federation_rule, keeps_model
from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.data.fingerprint import Fingerprint
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.experiment import (
    build_model,
    data_summary,
    device_of,
    federated_data,
    inputs_of,
    keep_back,
    normalizer_of,
    task_of,
)
from fedkn.federation import DATA, fixed_sha256, on_the_wire, told_data
from fedkn.gpus import make_current
from fedkn.normalizers import FederationRule, Normalizer, TensorRole
from fedkn.tasks import Task
from fedkn.training import Inputs, Workspace, check_precision

__all__ = ["Session", "config_in", "open_session"]

_LOG = logging.getLogger("flwr")


@dataclass(frozen=True, eq=False)
class Session:
    """An experiment as seen by the clients of one process, who share a model and the data.

    Attributes:
        config: the experiment's, lowered to what the device can bear.
        profile: what the device can bear; None in a simulation.
        largest_batch: of the local batches; smaller than ``train.batch_size`` where the device
            cannot bear that.
        compared: whether a device's own images were held against the experiment's: not where it
            does not have these and the server has not told of them.
        rule: the role of every tensor of the model.
        fixed_sha256: of the tensors that nobody changes; empty: there are none.
        task: what the network is trained for.
        examples, targets: all those to train on, of which a client sees only its own.
        num_classes: of the experiment.
        parts: for every client the indices of those that it trains on.
        held: for every client the indices of those that it evaluates its own model on.
        own_data: of a device's own images, by which it knows them again; None where the client
            holds a part of the experiment's.
    """

    config: ExperimentConfig
    profile: Profile | None
    largest_batch: int
    compared: bool
    workspace: Workspace
    inputs: Inputs
    normalizer: Normalizer
    rule: FederationRule
    fixed_sha256: str
    task: Task
    examples: Tensor
    targets: Tensor
    parts: tuple[Tensor, ...]
    held: tuple[Tensor, ...]
    num_classes: int
    own_data: Fingerprint | None

    def label_counts(self, partition: int) -> list[int]:
        """Return how many images of each class client `partition` trains on."""
        classes = self.num_classes
        if not classes or self.targets.is_floating_point() or self.targets.ndim > 1:
            return []
        return self.targets[self.parts[partition]].bincount(minlength=classes).tolist()

    def client_data(self, partition: int) -> tuple[Tensor, Tensor]:
        """Return the examples (N, ...) and targets (N, ...) that `partition` trains on."""
        part = self.parts[partition]
        return self.examples.index_select(0, part), self.targets.index_select(0, part)

    def held_data(self, partition: int) -> tuple[Tensor, Tensor]:
        """Return the examples and targets that client `partition` keeps from training."""
        part = self.held[partition]
        return self.examples.index_select(0, part), self.targets.index_select(0, part)

    @cached_property
    def local_tensors(self) -> tuple[str, ...]:
        """The names of the model's tensors that never leave the client."""
        return tuple(name for name, role in self.rule.items() if role is TensorRole.LOCAL)

    @cached_property
    def sent_tensors(self) -> tuple[str, ...]:
        """The names of the model's tensors that travel."""
        return on_the_wire(self.rule)

    @cached_property
    def shared_tensors(self) -> tuple[str, ...]:
        """The names of those that the clients share."""
        return tuple(name for name, role in self.rule.items() if role is TensorRole.SHARED)

    @cached_property
    def keeps_own(self) -> bool:
        """Whether every client keeps tensors or a whole model of its own."""
        return bool(self.local_tensors) or keeps_model(self.config)


def config_in(context: Context) -> ExperimentConfig:
    """Return the configuration of the experiment in `context`."""
    return _config(tuple(context.run_config.items()))


def open_session(context: Context, content: RecordDict | DataSummary | None) -> tuple[Session, int]:
    """Return the session of the experiment in `context` and the client's partition id.

    A node whose config has a ``data-path`` is a device with images of its own; any other holds
    its part of the experiment's source. What the experiment's images are like, a device with its
    own is told in the `content` of a message, or as it is. Before it has one (None) it goes by the
    experiment's source, if that is here too, else by its own images. Any other is told too, and
    must have the same images as the server.

    Raises:
        UserError: a configuration or data that cannot work, or a node without a partition id.
    """
    node = context.node_config
    partition = node.get("partition-id")
    if not isinstance(partition, int):
        raise UserError("the node's config has no partition-id: give --node-config partition-id=N")
    nodes, own = node.get("num-partitions", 0), node_data(node)
    if isinstance(content, RecordDict):
        told = told_data(content) if own or DATA in content else None
    else:
        told = content
    session = _session_of(
        tuple(context.run_config.items()),
        nodes if isinstance(nodes, int) else 0,
        (partition, own) if own else None,
        told,
        node_profile(node),
    )
    if not 0 <= partition < len(session.parts):
        raise UserError(
            f"partition-id {partition}, but partition.clients is {len(session.parts)}: "
            "start as many nodes as there are clients"
        )
    device = session.workspace.device
    if device.type == "cuda":
        make_current(device.index or 0)  # each thread has a current one of its own
    return session, partition


# A message brings the whole run config along: resolving it would cost more than a small reply.
@lru_cache(maxsize=1)
def _config(run_config: tuple[tuple[str, Any], ...]) -> ExperimentConfig:
    return ExperimentConfig.resolve(dict(run_config))


@lru_cache(maxsize=1)
def _session_of(
    run_config: tuple[tuple[str, Any], ...],
    nodes: int,
    own: tuple[int, OwnData] | None,
    told: DataSummary | None,
    profile: Profile | None,
) -> Session:
    config = _config(run_config)
    if not config.partition.clients and not nodes:
        raise UserError(
            "partition.clients is 0 and the node's config has no num-partitions: set one of them"
        )
    return _session(config.for_nodes(nodes), own, told, profile)


# Frozen and hashable, so that all clients of a process find the same session.
@lru_cache(maxsize=1)
def _session(
    asked: ExperimentConfig,
    own: tuple[int, OwnData] | None,
    told: DataSummary | None,
    profile: Profile | None,
) -> Session:
    if profile and profile.threads:
        torch.set_num_threads(profile.threads)
    device = device_of(asked)
    normalizer = normalizer_of(asked)
    config = profile.limited(asked) if profile else asked
    check_precision(config.train.precision, device)
    wanted = (told or summary_here(asked)) if own else None
    held_by = _own_images(asked, wanted, *own) if own else _partitions(asked, told)
    model = _model(asked, normalizer, held_by.summary).to(device)
    rule = federation_rule(config, normalizer, model)
    workspace, inputs = Workspace(model), inputs_of(asked, device, held_by.summary)
    examples, targets = held_by.images.to(device), held_by.labels.to(device)
    task = task_of(asked)
    if own:
        task.check(held_by.labels, held_by.classes)
    # Images go through a model one at a time in private training, in whatever batches.
    one_by_one = asked.privacy.mechanism == "example"
    largest = asked.train.batch_size
    if profile and not one_by_one:
        largest = profile.largest_batch(largest)
    if profile and profile.memory_limit:
        fits = fitting_batch(
            lambda size: step_bytes(
                workspace,
                inputs,
                (examples[:1], targets[:1]),
                size,
                train=config.train,
                goal=task,
            ),
            1 if one_by_one else largest,
            least=normalizer.minimum_batch,
            limit=profile.memory_limit * MIB,
        )
        largest = largest if one_by_one else fits
    if lowered := _lowered(asked.train, config.train, largest):
        _LOG.warning("this device trains with %s", ", ".join(lowered))
    return Session(
        config=config,
        profile=profile,
        largest_batch=largest,
        compared=not own or wanted is not None,
        workspace=workspace,
        inputs=inputs,
        normalizer=normalizer,
        rule=rule,
        fixed_sha256=fixed_sha256(rule, model.state_dict()),
        task=task,
        examples=examples,
        targets=targets,
        parts=tuple(torch.from_numpy(part).to(device) for part in held_by.parts),
        held=tuple(torch.from_numpy(part).to(device) for part in held_by.held),
        own_data=held_by.fingerprint,
        num_classes=len(held_by.classes),
    )


def _model(
    config: ExperimentConfig, normalizer: Normalizer, summary: DataSummary | None
) -> nn.Module:
    """Return the model with its initial tensors, as far as they are not received in every round.

    The file of ``model.weights`` need be here only where tensors of it stay as they are, or stay
    with the client.
    """
    model = build_model(config.resolve(config.flat(), dict.fromkeys(_FILE, "")), summary)
    stays = {TensorRole.FIXED, TensorRole.LOCAL}
    if config.model.weights and stays & set(federation_rule(config, normalizer, model).values()):
        return build_model(config, summary)
    return model


_FILE = ("model.weights", "model.weights_sha256", "model.weights_except")


def _lowered(asked: TrainConfig, train: TrainConfig, largest: int) -> list[str]:
    """Return in words what the device does other than it was asked to."""
    found = []
    if largest < asked.batch_size:
        found.append(f"batches of {largest} (asked: {asked.batch_size}), which a step accumulates")
    if train.local_steps != asked.local_steps:
        found.append(f"{train.local_steps} local_steps (asked: {asked.local_steps or 'no cap'})")
    if train.precision != asked.precision:
        found.append(f"precision {train.precision} (asked: {asked.precision})")
    return found


@dataclass(frozen=True, eq=False)
class _Images:
    """Images, who holds which, and what the model is built from (None: the experiment's source).

    The fingerprint is that of a device's own images.
    """

    summary: DataSummary | None
    fingerprint: Fingerprint | None
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    parts: tuple[np.ndarray, ...]
    held: tuple[np.ndarray, ...]


def _partitions(config: ExperimentConfig, told: DataSummary | None) -> _Images:
    if told is not None and (found := told.changes(data_summary(config))):
        raise UserError(
            "other data here than the server's, or the data changed since the run was begun: "
            f"{'; '.join(found)}. Put the same data in data.root of both"
        )
    data = federated_data(config)
    train = data.train
    return _Images(None, None, train.classes, train.inputs, train.targets, data.parts, data.held)


def _own_images(
    config: ExperimentConfig, wanted: DataSummary | None, partition: int, own: OwnData
) -> _Images:
    """Return the device's own images; the other partitions hold none here."""
    images = load_own(own, config.data, wanted)
    _LOG.info("this device's own data: %s", describe(images))
    evaluation = config.evaluation
    used, kept = keep_back(
        images.strata.numpy(),
        partition,
        config.seed,
        evaluation.client_fraction,
        evaluation.split,
    )
    clients, nothing = range(config.partition.clients), np.empty(0, dtype=np.int64)
    return _Images(
        wanted or summary_of(images),
        Fingerprint.of(images),
        images.classes,
        images.inputs,
        images.targets,
        tuple(used if client == partition else nothing for client in clients),
        tuple(kept if client == partition else nothing for client in clients),
    )
