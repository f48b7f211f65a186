"""What the engines and their rivals are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkn.config import ExperimentConfig
from fedkn.seeds import numpy_generator

__all__ = ["TASKS", "Task", "prepared"]


@dataclass(frozen=True)
class Task:
    """A federated experiment on images of noise: 3x32x32, ten classes.

    `settings` are dotted keys of the configuration; `rounds` are enough for the workers to be up in
    the second half of them, which is what counts, on a fast machine too.
    """

    title: str
    clients: int
    images: int
    rounds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    test_images: int = 50


_SMALL = {"model.width": 8}
_KERNEL = {
    "model.name": "resnet8",
    "model.width": 16,
    "normalizer.name": "kernel",
    "train.batch_size": 2,
}
# The same images whatever the number of clients, and one step each.
_REGISTERED = {**_SMALL, "train.local_steps": 1}

TASKS: dict[str, Task] = {
    "fixed": Task(
        "100 clients x 50 images, cohort 10, batch 8, three conv blocks of width 32", 100, 50, 60
    ),
    "small": Task("the same at width 8", 100, 50, 120, _SMALL),
    "kernel": Task("the same, KernelNorm ResNet-8 of width 16, batch 2", 100, 50, 24, _KERNEL),
    "many": Task("1,000 clients x 20 images, width 8", 1000, 20, 300, _SMALL),
    **{
        f"registered-{n}": Task(
            f"{n} clients share 50,000 images, cohort {min(n, 50)}",
            n,
            50_000 // n,
            100,
            {**_REGISTERED, "cohort": min(n, 50)},
        )
        for n in (10, 100, 1000, 10_000)
    },
    **{
        f"cohort-{n}": Task(f"cohort {n} of 500", 500, 20, rounds, {**_SMALL, "cohort": n})
        for n, rounds in ((10, 200), (50, 60), (500, 8))
    },
    **{
        f"width-{n}": Task(f"fixed at width {n}", 100, 50, 1600 // n, {"model.width": n})
        for n in (8, 16, 32, 64)
    },
}


def prepared(task: Task, folder: Path) -> ExperimentConfig:
    """Write the images of `task` into `folder` and return its configuration."""
    path = folder / f"{task.clients}x{task.images}+{task.test_images}.npz"
    if not path.exists():
        draw = numpy_generator(0, "benchmark")
        count = task.clients * task.images
        np.savez(
            path,
            images=draw.integers(256, size=(count, 3, 32, 32), dtype=np.uint8),
            labels=draw.integers(10, size=count),
            test_images=draw.integers(256, size=(task.test_images, 3, 32, 32), dtype=np.uint8),
            test_labels=np.arange(task.test_images) % 10,
        )
    return ExperimentConfig.resolve(
        {
            "rounds": task.rounds,
            "cohort": 10,
            "data.source": "arrays",
            "data.root": str(path),
            "data.validation_fraction": 0.0,
            "partition.scheme": "iid",
            "partition.clients": task.clients,
            "partition.minimum": 1,
            "model.name": "convnet3",
            "model.width": 32,
            "model.final_norm": "none",
            "normalizer.name": "group",
            "train.batch_size": 8,
            "train.clip_norm": 0.0,
            "evaluation.every": 1_000_000,
            "device": "cpu",
            **task.settings,
        }
    )
