"""Recorded local steps whose 3x3 convolutions are fedkn's, beside the same with PyTorch's.

``python -m simulations.benchmarks.convolved_steps [NORMALIZER ...]``: processor time, in turn,
medians. Of normalizers whose filters are used as they are: the others' layers ask for fedkn's
convolutions themselves.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model
from fedkn.training import Workspace
from simulations.benchmarks.engine_tasks import Task, prepared
from simulations.benchmarks.recorded_steps import step_seconds

__all__ = ["NETWORKS", "both_seconds"]

NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "resnet8, width 16, batch 2": {
        "model.name": "resnet8", "model.width": 16, "train.batch_size": 2,
    },
    "convnet3, width 32, batch 8": {},
    "convnet3, width 8, batch 8": {"model.width": 8},
}  # fmt: skip

_NORMALIZERS = ("none", "batch", "brn", "group", "frn", "rms", "evonorm_s", "lcn", "dyt")


def both_seconds(config: ExperimentConfig) -> tuple[float, float]:
    """Return the seconds of a step with PyTorch's convolutions, and with fedkn's."""
    plain, ours = (build_model(config) for _ in range(2))
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            vars(layer).pop("_conv_forward", None)
    theirs, own = step_seconds(config, [Workspace(plain), Workspace(ours)])
    return theirs, own


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| network | normalizer | PyTorch, ms | fedkn, ms | ratio |\n|---|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        for network, settings in NETWORKS.items():
            for name in sys.argv[1:] or _NORMALIZERS:
                task = Task(network, 10, 32, 2, {**settings, "normalizer.name": name})
                one, other = both_seconds(prepared(task, Path(folder)))
                print(  # noqa: T201
                    f"| {network} | {name} | {1e3 * one:.2f} | {1e3 * other:.2f} "
                    f"| {other / one:.2f} |",
                    flush=True,
                )
