"""From a configuration to the data and the model of an experiment: the same on every machine.

Clients and server both build from here, so that they cannot disagree. Everything is a pure
function of the configuration and is kept in memory, because one process simulates many clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fedkn import models, normalizers, tasks
from fedkn.algorithms import rule_types
from fedkn.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    NormalizerConfig,
    PartitionConfig,
    TaskConfig,
)
from fedkn.data import partition as partitions
from fedkn.data import sources
from fedkn.data.augmentation import channel_statistics, check_augmentation, check_scaling
from fedkn.data.examples import Examples, Source
from fedkn.data.fingerprint import Fingerprint
from fedkn.data.split import stratified_split
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.gpus import make_current
from fedkn.network import Network, build_network
from fedkn.normalizers import Normalizer
from fedkn.options import read_options
from fedkn.tasks import Task
from fedkn.training.inputs import Inputs
from fedkn.training.stackable import try_stacking
from fedkn.training.trial import trial_step

__all__ = [
    "FederatedData",
    "build_model",
    "data_summary",
    "device_of",
    "federated_data",
    "inputs_of",
    "keep_back",
    "layout_on",
    "network_of",
    "normalizer_of",
    "task_of",
    "try_parts",
    "why_alone",
]


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Training images and who holds which, and what the server keeps to evaluate on.

    Attributes:
        train: all clients' images; parts: for every client the indices of those it trains on.
        held: for every client the indices of those it keeps to evaluate its own model on, of the
            kind that ``evaluation.split`` asks for; none unless ``evaluation.client_fraction``.
        validation: held by the server, disjoint from the clients' images; settings are chosen
            on it. test: the source's test images, on which nothing is ever chosen.
        notes: what of the source was left out or passed over.
    """

    train: Examples
    parts: tuple[np.ndarray, ...]
    held: tuple[np.ndarray, ...]
    validation: Examples
    test: Examples
    notes: tuple[str, ...] = ()

    def client(self, partition: int) -> Examples:
        """Return the images of client `partition`."""
        return self.train.select(self.parts[partition])


def federated_data(config: ExperimentConfig) -> FederatedData:
    """Load the source, split off the validation images, and partition the rest.

    The split depends on the data settings alone, the partition on ``config.seed`` as well: another
    seed is another division of the same training images among the clients. Of the images that a
    client keeps from training, a third is for choosing settings, the rest for results.

    Raises:
        UserError: data missing or not what the task needs, or a partition that cannot be made,
            naming the setting to change.
    """
    evaluation = config.evaluation
    _check_targets(config.data, config.task)
    return _federated_data(
        config.data, config.partition, config.seed, evaluation.client_fraction, evaluation.split
    )


def keep_back(
    labels: np.ndarray, client: int, seed: int, fraction: float, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return which of a client's examples it trains on, and on which it evaluates its own model.

    `fraction` of its `labels` (N,) is kept from training, of which a third is for choosing
    settings, the rest for results: `split` (``validation`` or ``test``) says which is wanted.
    """
    if not fraction:
        return np.arange(len(labels)), np.empty(0, dtype=np.int64)
    used, kept = stratified_split(labels, fraction, seed, f"client-{client}")
    rest, chosen_on = stratified_split(labels[kept], 1 / 3, seed, f"choice-{client}")
    return used, kept[chosen_on if split == "validation" else rest]


def normalizer_of(config: ExperimentConfig) -> Normalizer:
    """Return the configured normalizer."""
    return _normalizer(config.normalizer, config.rounds)


def task_of(config: ExperimentConfig) -> Task:
    """Return what the network is trained for.

    Raises:
        UserError: there is no such task, or it does not take the options given.
    """
    return _task(config.task)


def data_summary(config: ExperimentConfig) -> DataSummary:
    """Return what clients must know of the experiment's images, and what a run records of them.

    A function of the data and their scaling alone, whatever the seed and the partition are.

    Raises:
        UserError: the experiment's source cannot be read here.
    """
    summary = _summary(config.data, _scaling(config) == "standardized")
    check_scaling(_scaling(config), getattr(torch, summary.dtype))
    return summary


def build_model(config: ExperimentConfig, summary: DataSummary | None = None) -> nn.Module:
    """Return the model with its initial weights, which depend on ``config.seed`` alone.

    With a `summary` of the experiment's images their source need not be here.
    """
    return network_of(config, summary).module


def network_of(config: ExperimentConfig, summary: DataSummary | None = None) -> Network:
    """Return the model as `build_model` does, and how it came about."""
    if summary is None:
        source = _source(config.data)
        classes, shape = source.num_classes, source.shape
        target = tuple(source.train.targets.shape[1:])
    else:
        classes, shape, target = len(summary.classes), summary.shape, summary.target_shape
    normalizer, outputs = normalizer_of(config), task_of(config).outputs(classes, target)
    network = build_network(
        config.model, normalizer, outputs=outputs, shape=shape, seed=config.seed
    )
    layout = layout_on(device_of(config), normalizer)
    network.module.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
    return network


def try_parts(config: ExperimentConfig, model: nn.Module) -> list[str]:
    """Take a step of `model` on a few training examples, without moving it; return warnings.

    Raises:
        UserError: what is wrong with the model or the task, as `trial_step` finds it.
    """
    device = next(model.parameters()).device
    train, task = _split(config.data)[0], task_of(config)
    size = max(_TRIED, normalizer_of(config).minimum_batch)
    some = train.select(np.arange(size) % len(train)).to(device)
    x = inputs_of(config, device)(some.inputs)
    outputs = task.outputs(len(some.classes), tuple(some.targets.shape[1:]))
    return trial_step(model, task, x, some.targets, outputs=outputs)


_TRIED = 2
"""Examples that parts are tried on: enough for a batch, few enough to cost nothing."""


def layout_on(device: torch.device, normalizer: Normalizer) -> torch.memory_format:
    """Return the layout of maps and filters in which networks train fastest on `device`.

    On a GPU it is channels last for every normalizer (docs/performance.md).
    """
    return torch.channels_last if device.type == "cuda" else normalizer.memory_format


def inputs_of(
    config: ExperimentConfig, device: torch.device, summary: DataSummary | None = None
) -> Inputs:
    """Return how a batch of images is scaled and augmented in this experiment.

    With a `summary` of the experiment's images their source need not be here.
    """
    data, scaling = config.data, _scaling(config)
    told = summary or data_summary(config)
    check_scaling(scaling, getattr(torch, told.dtype))
    dtype = torch.float32 if told.dtype == "uint8" else torch.float64
    mean = deviation = None
    if scaling == "standardized":
        mean, deviation = (
            torch.tensor(v, dtype=dtype, device=device) for v in (told.mean, told.deviation)
        )
    layout = layout_on(device, normalizer_of(config))
    return Inputs(scaling, mean, deviation, data.flip, data.crop_padding, layout)


def why_alone(config: ExperimentConfig) -> str:
    """Return why the clients of `config` cannot be trained together, stacked; empty if they can."""
    normalizer, train = normalizer_of(config), config.train
    reasons = {
        f"the layers of normalizer '{normalizer.name}' mix the examples of a batch or keep "
        "running statistics": not normalizer.together,
        **{rule.alone: bool(rule.alone) for rule in rule_types(config)},
        "DP-SGD draws and clips for each of them": config.privacy.mechanism == "example",
        "train.accumulate gives a step several batches": train.accumulate > 1,
        f"they compute in float32, not in {train.precision}": train.precision == "bfloat16",
    }
    known = next((reason for reason, holds in reasons.items() if holds), "")
    if known or config.model.name in models.names():
        return known
    return _why_own_alone(
        config.model, config.normalizer, config.rounds, config.data, task=config.task
    )


def device_of(config: ExperimentConfig) -> torch.device:
    """Return the device to compute on; ``auto`` is CUDA where there is any.

    A GPU becomes this thread's current one, by which graphs, streams and Triton's kernels go.

    Raises:
        UserError: the device does not exist here.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = '{name}': give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"device = '{name}': this machine has {count} CUDA devices")
        make_current(device.index or 0)
    elif device.type != "cpu":
        raise UserError(f"device = '{name}': give auto, cpu, cuda or cuda:N")
    return device


@lru_cache(maxsize=4)
def _why_own_alone(
    model: ModelConfig,
    normalizer: NormalizerConfig,
    rounds: int,
    data: DataConfig,
    *,
    task: TaskConfig,
) -> str:
    config = ExperimentConfig(
        model=model, normalizer=normalizer, rounds=rounds, data=data, task=task, device="cpu"
    )
    some = _split(data)[0].select(np.arange(2))
    return try_stacking(build_model(config), inputs_of(config, torch.device("cpu"))(some.inputs))


@lru_cache(maxsize=2)
def _source(data: DataConfig) -> Source:
    return sources.load(
        data.source,
        data.root,
        data.download,
        data.image_size,
        options=read_options(data.options),
        train_limit=data.train_limit,
        test_limit=data.test_limit,
        skip_damaged=data.skip_damaged,
    )


@lru_cache(maxsize=2)
def _split(data: DataConfig) -> tuple[Examples, Examples, Examples]:
    source = _source(data)
    check_augmentation(source.train, flip=data.flip, crop_padding=data.crop_padding)
    kept, held = stratified_split(source.train.strata, data.validation_fraction, 0, "validation")
    return source.train.select(kept), source.train.select(held), source.test


@lru_cache(maxsize=4)
def _federated_data(
    data: DataConfig, scheme: PartitionConfig, seed: int, kept_back: float, split: str
) -> FederatedData:
    train, validation, test = _split(data)
    # By class, because a client's examples are all of one origin or mixed on purpose.
    labels = replace(train, origins=None).strata.numpy()
    parts = partitions.partition(
        labels,
        scheme.scheme,
        classed=train.labels is not None,
        origins=train.origins,
        clients=scheme.clients,
        seed=seed,
        alpha=scheme.alpha,
        shards_per_client=scheme.shards_per_client,
        labels_per_client=scheme.labels_per_client,
        sigma=scheme.sigma,
        minimum=scheme.minimum,
    )
    own, held = [], []
    for client, part in enumerate(parts):
        used, kept = keep_back(labels[part], client, seed, kept_back, split)
        own.append(part[used])
        held.append(part[kept])
    notes = _source(data).notes
    return FederatedData(train, tuple(own), tuple(held), validation, test, notes)


def _scaling(config: ExperimentConfig) -> str:
    published = config.data.scaling == "published"
    return normalizer_of(config).published_scaling if published else config.data.scaling


@lru_cache(maxsize=4)
def _summary(data: DataConfig, standardized: bool) -> DataSummary:
    train = _split(data)[0]
    figures = channel_statistics(train) if standardized else None
    return DataSummary.of(train, figures, _fingerprint(data))


@lru_cache(maxsize=2)
def _fingerprint(data: DataConfig) -> Fingerprint:
    return Fingerprint.of(*_split(data))


@lru_cache(maxsize=4)
def _check_targets(data: DataConfig, config: TaskConfig) -> None:
    task = _task(config)
    for part in _split(data):
        task.check(part.targets, part.classes)


@lru_cache(maxsize=4)
def _task(config: TaskConfig) -> Task:
    return tasks.create(config.name, **read_options(config.options))


def _normalizer(config: NormalizerConfig, rounds: int) -> Normalizer:
    settings = {
        "groups": config.groups,
        "bn_statistics": config.bn_statistics,
        # By default the second half of the rounds, the smaller one where they are odd.
        "frozen_from": config.frozen_from or rounds - rounds // 2 + 1,
    }
    known = normalizers.options(config.name)
    options = read_options(config.options)
    if twice := options.keys() & settings.keys():
        raise UserError(f"normalizer.options.{min(twice)} is a setting: normalizer.{min(twice)}")
    return normalizers.create(
        config.name, **{key: value for key, value in settings.items() if key in known}, **options
    )
