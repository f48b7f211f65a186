"""Which engine runs an experiment, and in how many processes."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import device_of, why_alone
from fedkn.gpus import visible_gpus
from fedkn.machine import usable_cores
from fedkn.models.catalog import ARCHITECTURES

__all__ = ["Together", "engine_of", "gpus_of", "processes_of", "sharers_of", "together_of"]

Together = Literal["stacked", "concurrent"]
"""How clients train together: in one pass of the model, or each by its own on its own stream."""


def engine_of(config: ExperimentConfig) -> str:
    """Return ``inprocess``, ``batched`` or ``ray``; ``auto`` is resolved.

    On a CPU clients are trained one after another: steps are recorded there, which those of clients
    together are not, and convolutions of one client's are faster (docs/performance.md).

    A function of the configuration and the device alone, not of timings or of the number of cores:
    a run that is resumed elsewhere goes on with the same engine.
    """
    if config.engine != "auto":
        return config.engine
    on_gpu = device_of(config).type == "cuda"
    together = on_gpu and config.cohort >= _FEWEST and not _never_together(config)
    return "batched" if together else "inprocess"


def together_of(config: ExperimentConfig) -> Together:
    """Return how the engine `batched` trains the clients of `config` together.

    On a GPU every model can: stacked, or concurrently where its layers do not allow that or where
    it is wide enough to be faster so (docs/performance.md).

    Raises:
        UserError: the configuration's clients cannot train together.
    """
    on_gpu = device_of(config).type == "cuda"
    if reason := _never_together(config) if on_gpu else why_alone(config):
        raise UserError(
            f"engine 'batched' cannot train these clients together: {reason}. Set engine = "
            "'inprocess'"
        )
    concurrent = on_gpu and (why_alone(config) != "" or _width(config) >= _WIDE)
    return "concurrent" if concurrent else "stacked"


def processes_of(config: ExperimentConfig) -> int:
    """Return in how many processes clients train: ``workers``, or one per core or GPU."""
    if config.workers:
        return min(config.workers, config.cohort)
    if config.device == "cpu" or not torch.cuda.is_available():
        return min(usable_cores(), config.cohort)
    return min(max(1, len(gpus_of(config))), config.cohort)


def gpus_of(config: ExperimentConfig) -> list[str]:
    """Return for each process the GPU to train on; none if there is one GPU, or one is named.

    The first process sees all of them and uses the first.
    """
    gpus = visible_gpus() if config.device in ("auto", "cuda") else []
    if len(gpus) < 2:
        return []
    count = config.workers or len(gpus)
    return [gpus[place % len(gpus)] for place in range(count)]


def sharers_of(config: ExperimentConfig) -> int:
    """Return how many of the processes have to share one device, or the memory of the machine."""
    gpus = len(set(gpus_of(config))) if device_of(config).type == "cuda" else 0
    return math.ceil(processes_of(config) / max(1, gpus))


def _never_together(config: ExperimentConfig) -> str:
    """Return why clients cannot train together on a GPU either; empty if they can."""
    private = config.privacy.mechanism == "example"
    return "DP-SGD draws and clips for each of them" if private else ""


def _width(config: ExperimentConfig) -> int:
    known = ARCHITECTURES.get(config.model.name)
    return config.model.width or (known.width if known else 0)


_WIDE = 64
"""Channels of the first maps from which a GPU trains clients faster each by its own graph."""

_FEWEST = 4
"""Clients of a cohort below which the groups are too small to gain by."""
